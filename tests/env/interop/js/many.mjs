// Many concurrent circuits between two parties, each transferring data in both directions as fast as it can.
//
//   node_modules/.bin/node many.mjs <relay multiaddr> <circuits> <seconds> [<target>]
//
// Without a target it reserves, prints its peer id and accepts circuits. tests/env/interop/many.rs describes the bytes.
import { once } from 'node:events'
import { RELAY_V2_HOP_CODEC, RELAY_V2_STOP_CODEC } from '@libp2p/circuit-relay-v2'
import { peerIdFromString } from '@libp2p/peer-id'
import { pbStream } from '@libp2p/utils'
import { multiaddr } from '@multiformats/multiaddr'
import { check, newParty, newReserved, patient } from './party.mjs'
import { connectTo, HopMessage, Status, StopMessage } from './wire.mjs'

// The number of bytes after which a payload repeats: a prime, so that a lost, duplicated or moved part is noticed.
const PERIOD = 65521
const PIECE = 16 * 1024

const [address, count, seconds, to] = process.argv.slice(2)
const relay = multiaddr(address)
const circuits = Number(count)
const options = { maxInboundStreams: 2 * circuits, maxOutboundStreams: 2 * circuits, ...patient() }
const sent = Array(circuits).fill(0)
const received = Array(circuits).fill(0)
try {
  await (to == null ? target() : source(peerIdFromString(to)))
} catch (error) {
  console.error(`failed: many: ${String(error?.stack ?? error).replaceAll(/\s+/g, ' ')}`)
  process.exit(1)
}
process.exit(0)

async function target () {
  const party = await newReserved(relay)
  const [connection] = party.getConnections()
  await party.unhandle(RELAY_V2_STOP_CODEC)
  const done = new Promise((resolve, reject) => {
    let left = circuits
    const comes = async stream => {
      await agree(stream)
      let circuit
      const whole = converse(stream, bytes => { circuit = bytes[0]; return circuit }, false)
      await whole
      if (--left === 0) resolve()
    }
    party.handle(RELAY_V2_STOP_CODEC, stream => { comes(stream).catch(reject) }, options)
  })
  console.log(`peer ${party.peerId}`)
  await done
  await ends(party, connection)
}

async function source (target) {
  const party = await newParty()
  const connection = await party.dial(relay, patient())
  const conversations = []
  for (let circuit = 0; circuit < circuits; circuit++) {
    const stream = await connection.newStream(RELAY_V2_HOP_CODEC, options)
    const messages = pbStream(stream).pb(HopMessage)
    await messages.write(connectTo(target), patient())
    const answer = await messages.read(patient())
    check(answer.status === Status.OK, `circuit ${circuit} is answered ${answer.status}`)
    messages.unwrap().unwrap()
    stream.send(Buffer.of(circuit))
    const conversation = converse(stream, () => circuit, true)
    conversation.catch(() => {}) // it is awaited later
    conversations.push(conversation)
  }
  await Promise.all(conversations)
  await ends(party, connection)
}

// The other side may still be reading: exit only when standard input ends.
async function ends (party, connection) {
  const left = party.getConnections().map(({ id, status }) => `${id} ${status}`)
  check(left.join() === `${connection.id} open`, `connections to the relay: ${left}; it was ${connection.id}`)
  console.log(`sent [${sent.join(' ')}]`)
  console.log(`received [${received.join(' ')}]`)
  process.stdin.resume()
  await once(process.stdin, 'end')
}

async function agree (stream) {
  const messages = pbStream(stream).pb(StopMessage)
  const request = await messages.read(patient())
  check(request.type === StopMessage.Type.CONNECT, `a stop stream with ${request.type}`)
  await messages.write({ type: StopMessage.Type.STATUS, status: Status.OK }, patient())
  messages.unwrap().unwrap()
}

// Sends for the whole duration and closes its half, while it receives up to the other side's end. The first byte that a
// target receives is the number of the circuit.
function converse (stream, circuitOf, isSource) {
  return new Promise((resolve, reject) => {
    let circuit = isSource ? circuitOf() : undefined
    let expected
    let writes
    const begin = () => {
      expected = repeating(2 * circuit + (isSource ? 1 : 0))
      writes = send(stream, circuit, isSource)
      writes.catch(reject)
    }
    if (isSource) begin()
    stream.addEventListener('message', ({ data }) => {
      let bytes = Buffer.from(data.subarray())
      if (circuit == null) {
        circuit = circuitOf(bytes)
        bytes = bytes.subarray(1)
        begin()
      }
      while (bytes.length > 0) {
        const from = received[circuit] % PERIOD
        const some = bytes.subarray(0, PERIOD)
        if (!some.equals(expected.subarray(from, from + some.length))) {
          reject(new Error(`circuit ${circuit}: a wrong byte within ${some.length} after ${received[circuit]}`))
        }
        received[circuit] += some.length
        bytes = bytes.subarray(some.length)
      }
    })
    const end = () => {
      const whole = ['open', 'closing', 'closed'].includes(stream.status) && circuit != null
      if (!whole) reject(new Error(`circuit ${circuit}: the stream is ${stream.status} after ${received[circuit]} bytes`))
      else writes.then(resolve, reject)
    }
    if (stream.readableEnded) end()
    else stream.addEventListener('end', end)
  })
}

async function send (stream, circuit, isSource) {
  const payload = repeating(2 * circuit + (isSource ? 0 : 1))
  const until = Date.now() + 1000 * Number(seconds)
  while (Date.now() < until) {
    const from = sent[circuit] % PERIOD
    sent[circuit] += PIECE
    stream.send(payload.subarray(from, from + PIECE))
    // Yields to other circuits. Each drain of the connection wakes all streams, so onDrain would let them pile up.
    do await new Promise(resolve => setTimeout(resolve, 1))
    while (stream.writeBufferLength > 4 * PIECE && stream.status === 'open')
  }
  await stream.close({ signal: AbortSignal.timeout(120_000) })
}

// The payload of a seed, repeated, so that any slice of a period is contiguous.
function repeating (seed) {
  const once = Buffer.alloc(PERIOD)
  for (let at = 0; at < PERIOD; at++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
    once[at] = seed >>> 24
  }
  return Buffer.concat([once, once, once])
}
