// A private network: hosts with its key are served, others cannot connect.
import { readFileSync } from 'node:fs'
import { generateKey } from '@libp2p/pnet'
import { check, connect, newParty, newReserved, patient, proved } from './party.mjs'

export async function privately (relay) {
  const key = readFileSync(process.env.SWARM_KEY)
  const another = new Uint8Array(95)
  generateKey(another)

  for (const [name, psk] of [['another key', another], ['no key', null]]) {
    const stranger = await newParty({ psk })
    const error = await stranger.dial(relay, patient()).then(() => null, error => error)
    check(error != null, `a host with ${name} is connected`)
    proved(`a host with ${name} cannot connect`)
    await stranger.stop()
  }

  const target = await newReserved(relay, { psk: key })
  const source = await newParty({ psk: key })
  await connect(relay, source, target)
  proved('with the key: a reservation and a circuit')
  await source.stop()
  await target.stop()
}
