// Circuits without limits, as an application uses them, and circuits with limits.
import { RELAY_V2_STOP_CODEC } from '@libp2p/circuit-relay-v2'
import { pbStream } from '@libp2p/utils'
import { check, connect, event, inTime, newParty, newReserved, patient, proved, refused } from './party.mjs'
import { payload, receive, send } from './payload.mjs'
import { ask, connectTo, Status, StopMessage } from './wire.mjs'

const PROTOCOL = '/relaylet-interop/1'
const MIB = 1024 * 1024
const BULK = 64 * MIB // in each direction

// The limits that the relay was started with.
const LIMIT_BYTES = 128 * 1024
const LIMIT_SECONDS = 5
// An idle circuit closes between these two: the limit, with tolerance for a busy machine.
const SOONEST = 4
const LATEST = 15

export async function unlimited (relay) {
  const [source, target] = [await newParty(), await newReserved(relay)]
  const [near, far] = await connect(relay, source, target)
  check(near.limits == null && far.limits == null, 'the circuit is marked as limited')

  const rate = await exchange(near, target, BULK)
  proved(`64 MiB each way at once, unlimited at both ends: ${rate} MB/s each way`)
  await Promise.all([source.stop(), target.stop()])
}

// Sends bytes both ways at once on a stream of the circuit; returns the rate in MB/s.
export async function exchange (near, target, bytes) {
  const arrival = inTime('the stream at the target', resolve => target.handle(PROTOCOL, resolve))
  // An ordinary stream, which js-libp2p refuses on a limited connection.
  const there = await near.newStream(PROTOCOL, patient())
  const back = await arrival
  const start = Date.now()
  const [question, answer] = [1, 2] // seeds
  const [atSource, atTarget] = await Promise.all([
    receive(there, payload(answer)),
    receive(back, payload(question)),
    sendAll(there, question, bytes),
    sendAll(back, answer, bytes)
  ])
  for (const [end, { count, error }] of Object.entries({ source: atSource, target: atTarget })) {
    check(error == null && count === bytes, `the ${end} got ${count} bytes: ${error}`)
  }
  return (bytes / 1e3 / (Date.now() - start)).toFixed(1)
}

// Closes only its own direction after the bytes.
async function sendAll (stream, seed, bytes) {
  await send(stream, payload(seed), bytes)
  await stream.close(patient())
}

export async function limited (relay) {
  const [source, target] = [await newParty(), await newReserved(relay)]
  await marked(relay, source, target)
  await inBytes(relay, source, target)
  await Promise.all([source.stop(), target.stop()])
}

// How js-libp2p reports a limited circuit, and how its time runs out.
async function marked (relay, source, target) {
  const start = Date.now()
  const [near, far] = await connect(relay, source, target)
  const ends = [near, far].map(end => event(end === near ? source : target, 'connection:close', closed => closed.id === end.id))
  for (const { limits } of [near, far]) {
    // js-libp2p counts down the limits that the relay sent.
    const { bytes, seconds } = limits ?? {}
    check(bytes > LIMIT_BYTES / 2 && bytes <= LIMIT_BYTES, `the limit in bytes is ${bytes}`)
    check(seconds > 0 && seconds <= LIMIT_SECONDS, `the limit in seconds is ${seconds}`)
  }
  await refused(near.newStream(PROTOCOL, patient()), 'LimitedConnectionError')
  proved('both ends know the circuit as limited, and an ordinary stream on it is refused')
  await source.services.ping.ping(target.peerId, patient()) // ping allows limits
  proved('a ping passes')
  await Promise.all(ends)
  const took = (Date.now() - start) / 1000
  check(took > SOONEST && took < LATEST, `an idle circuit closed after ${took} s`)
  proved(`an idle circuit closed after ${took.toFixed(1)} s`)
}

// Uses the protocol directly: js-libp2p's own circuits use up part of the limit for Noise.
async function inBytes (relay, source, target) {
  const arrival = inTime('the stop stream at the target', async resolve => {
    await target.unhandle(RELAY_V2_STOP_CODEC)
    await target.handle(RELAY_V2_STOP_CODEC, resolve)
  })
  const [[answer, there], back] = await Promise.all([ask(source, relay, connectTo(target.peerId)), arrival.then(agree)])
  check(answer.status === Status.OK, `CONNECT is answered ${answer.status}`)
  check(Number(answer.limit.data) === LIMIT_BYTES && answer.limit.duration === LIMIT_SECONDS, 'other limits are told')

  const seed = 3
  const bytes = payload(seed)
  const received = receive(back, payload(seed))
  const ended = receive(there, bytes) // expects no bytes, then the end
  await send(there, bytes, LIMIT_BYTES)
  // One byte beyond the limit; the reset may arrive first.
  await send(there, bytes, 1).catch(() => {})
  const { count, error } = await received
  check(count === LIMIT_BYTES, `${count} bytes passed under a limit of ${LIMIT_BYTES}: ${error}`)
  check(error != null, 'the stream past the limit ended like a finished one')
  const sender = await ended
  check(sender.count === 0 && sender.error != null, 'the sender was not told')
  proved(`exactly ${count} bytes passed, and the next one reset both ends`)
}

// Accepts a circuit as the target of it.
async function agree (stream) {
  const messages = pbStream(stream).pb(StopMessage)
  const request = await messages.read(patient())
  check(request.type === StopMessage.Type.CONNECT, `a stop stream with ${request.type}`)
  await messages.write({ type: StopMessage.Type.STATUS, status: Status.OK }, patient())
  return messages.unwrap().unwrap()
}
