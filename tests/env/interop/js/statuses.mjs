// Refusals and their status codes, for js-libp2p's own dial and for requests
// that this client encodes itself, most of which js-libp2p would not send.
import { RELAY_V2_STOP_CODEC } from '@libp2p/circuit-relay-v2'
import { check, connect, eventually, newParty, newReserved, patient, proved, refused, through } from './party.mjs'
import { ask, connectTo, HopMessage, Status } from './wire.mjs'

export async function statuses (relay) {
  const [source, asker, stranger] = [await newParty(), await newParty(), await newParty()]
  const [target, deaf] = [await newReserved(relay), await newReserved(relay)]
  await deaf.unhandle(RELAY_V2_STOP_CODEC)

  await refused(source.dial(through(relay, stranger), patient()), 'NO_RESERVATION')
  proved("js-libp2p's dial of a peer without a reservation fails with NO_RESERVATION")
  await connect(relay, source, target) // the one circuit that it may have

  for (const [what, request, expected] of [
    ['CONNECT to a peer without a reservation', connectTo(stranger.peerId), Status.NO_RESERVATION],
    ['CONNECT to a peer that does not speak stop', connectTo(deaf.peerId), Status.CONNECTION_FAILED],
    ['CONNECT to a peer that has all circuits it may have', connectTo(target.peerId), Status.RESOURCE_LIMIT_EXCEEDED],
    ['CONNECT without a target', { type: HopMessage.Type.CONNECT }, Status.MALFORMED_MESSAGE],
    ['a message of no type', {}, Status.MALFORMED_MESSAGE],
    ['STATUS', { type: HopMessage.Type.STATUS }, Status.UNEXPECTED_MESSAGE],
    ['RESERVE after all that', { type: HopMessage.Type.RESERVE }, Status.OK]
  ]) {
    await answered(asker, relay, request, expected)
    proved(`${what} is answered ${expected}`)
  }

  await deaf.stop()
  // Until the relay has noticed the disconnect, the answer is CONNECTION_FAILED.
  await eventually(() => answered(asker, relay, connectTo(deaf.peerId), Status.NO_RESERVATION))
  proved('CONNECT to a peer that left is answered NO_RESERVATION')
  await Promise.all([source, asker, stranger, target].map(party => party.stop()))
}

async function answered (party, relay, request, expected) {
  const [{ status }, stream] = await ask(party, relay, request)
  check(status === expected, `${expected} expected, got ${status}`)
  await stream.close(patient())
}
