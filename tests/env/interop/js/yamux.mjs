// One end of a raw yamux session: js-libp2p's yamux against the relay's.
//
//   node_modules/.bin/node yamux.mjs <address> client|server <seed> <streams>
//
// Opens that many streams and answers as many; tests/env/interop/yamux.rs describes their contents. Prints "done" once all
// have ended as expected, and waits for the session to end; prints a failure in one line.
import { once } from 'node:events'
import { connect } from 'node:net'
import { yamux } from '@libp2p/yamux'
// js-libp2p does not export it.
import { toMultiaddrConnection } from './node_modules/@libp2p/tcp/dist/src/socket-to-conn.js'

const KIB = 1024
const HEADER = 16
const TIMEOUT = 180_000

// How a stream ends.
const BOTH = 0 // both sides write at once and finish
const LATE = 1 // the acceptor writes only after the opener's end
const CUT = 2 // the opener resets it
const REFUSE = 3 // the acceptor resets it
const ENOUGH = 4 // the opener finishes, reads half of the answer, and resets it
const OUTCOMES = 5

const [address, role, seed, streams] = process.argv.slice(2)
const log = Object.assign(() => {}, { trace () {}, error () {}, newScope: () => log })
async function run (streams) {
  const [host, port] = address.split(':')
  const socket = connect(Number(port), host)
  await once(socket, 'connect')
  const connection = toMultiaddrConnection({ socket, direction: role === 'client' ? 'outbound' : 'inbound', log })
  const ended = new Promise(resolve => connection.addEventListener('close', resolve))
  const muxer = yamux()().createStreamMuxer(connection)
  const random = generator(Number(seed))
  const below = count => Math.floor(random() / 2 ** 32 * count)

  const early = ended.then(() => { throw new Error(`the session ended, go-away ${muxer.remoteGoAway}, ours ${muxer.localGoAway}`) })
  early.catch(() => {})
  const answers = new Promise((resolve, reject) => {
    let left = streams
    muxer.addEventListener('stream', ({ detail }) => {
      answer(detail).then(() => { if (--left === 0) resolve() }, reject)
    })
  })
  const open = async () => {
    const running = new Set()
    const atOnce = 1 + below(24)
    for (let opened = 0; opened < streams; opened++) {
      while (running.size >= atOnce) await Promise.race(running)
      if (below(4) === 0) await muxer.ping()
      const plan = aPlan(random, below)
      const asked = ask(await muxer.createStream(), plan).then(() => running.delete(asked))
      running.add(asked)
    }
    await Promise.all(running)
  }
  await Promise.race([Promise.all([answers, open()]), early])
  console.log('done')
  // The other side ends the session with a normal go-away.
  await ended
  if (muxer.remoteGoAway !== 0 || muxer.localGoAway !== undefined) {
    throw new Error(`the session's end: go-away ${muxer.remoteGoAway}, ours ${muxer.localGoAway}`)
  }
}

function aPlan (random, below) {
  const size = () => below([1, 20, 20 * KIB, 100 * KIB, 500 * KIB][below(5)])
  return {
    seed: random(),
    there: size(),
    back: size(),
    outcome: below(OUTCOMES),
    slow: Math.max(0, below(12) - 8), // how many milliseconds readers wait now and then
    piece: 1 + below([KIB, 60 * KIB][below(2)])
  }
}

// The opener's side of a stream.
async function ask (stream, plan) {
  const received = new Receiver(stream, plan)
  const header = Buffer.alloc(HEADER)
  header.writeUInt32BE(plan.seed, 0)
  header.writeUInt32BE(plan.there, 4)
  header.writeUInt32BE(plan.back, 8)
  header.writeUInt8(plan.outcome, 12)
  header.writeUInt8(plan.slow, 13)
  header.writeUInt16BE(plan.piece, 14)
  const write = async () => {
    await drained(stream, stream.send(header))
    await send(stream, plan.seed, plan.there, plan.piece)
    if (plan.outcome !== CUT) await stream.close(patient())
  }
  received.expect(~plan.seed, plan.outcome === ENOUGH ? plan.back >> 1 : plan.back)
  switch (plan.outcome) {
    case BOTH:
    case LATE:
      await withContext('ask', plan, write(), received.whole())
      break
    case CUT:
      await withContext('ask', plan, write())
      stream.abort(new Error('it is cut'))
      break
    case REFUSE:
      write().catch(() => {}) // until the reset arrives
      await withContext('ask', plan, received.broken())
      break
    case ENOUGH:
      await withContext('ask', plan, write(), received.some())
      stream.abort(new Error('it is enough'))
  }
}

// The acceptor's side.
async function answer (stream) {
  const received = new Receiver(stream)
  const header = await received.header()
  const plan = {
    seed: header.readUInt32BE(0),
    there: header.readUInt32BE(4),
    back: header.readUInt32BE(8),
    outcome: header.readUInt8(12),
    slow: header.readUInt8(13),
    piece: header.readUInt16BE(14)
  }
  received.plan = plan
  received.expect(plan.seed, plan.there)
  const write = async () => {
    await send(stream, ~plan.seed, plan.back, plan.piece)
    if (plan.outcome !== REFUSE) await stream.close(patient())
  }
  switch (plan.outcome) {
    case BOTH:
      await withContext('answer', plan, write(), received.whole())
      break
    case LATE:
      await withContext('answer', plan, received.whole())
      await withContext('answer', plan, write())
      break
    case CUT:
      write().catch(() => {})
      await withContext('answer', plan, received.broken())
      break
    case REFUSE:
      await withContext('answer', plan, write())
      stream.abort(new Error('it is refused'))
      break
    case ENOUGH:
      // It may have been reset.
      await withContext('answer', plan, Promise.all([write().catch(() => {}), received.ended()]))
      await withContext('answer', plan, received.clean ? received.whole() : received.broken())
  }
}

// Waits for the promises; adds the side and the plan of the stream to an error.
async function withContext (what, plan, ...promises) {
  try {
    await within(Promise.all(promises))
  } catch (error) {
    throw new Error(`${what} ${JSON.stringify(plan)}: ${error}`)
  }
}

// Checks each received byte, and the end.
class Receiver {
  #stream
  #begin = Buffer.alloc(0)
  #began = Promise.withResolvers()
  #left = Promise.withResolvers() // no byte is missing
  #end = Promise.withResolvers()
  #expected
  #wrong

  constructor (stream, plan) {
    this.#stream = stream
    this.plan = plan
    for (const { promise } of [this.#began, this.#left, this.#end]) promise.catch(() => {})
    stream.addEventListener('message', ({ data }) => this.#take(Buffer.from(data.subarray())))
    const ends = () => {
      this.clean = ['open', 'closing', 'closed'].includes(stream.status)
      this.#began.reject(new Error('it ended before its header'))
      this.#left.reject(new Error(`it ended with ${this.missing} missing`))
      this.#end.resolve()
    }
    stream.readableEnded ? ends() : stream.addEventListener('end', ends)
  }

  #take (bytes) {
    if (this.#expected == null) {
      this.#begin = Buffer.concat([this.#begin, bytes])
      if (this.#begin.length >= HEADER) this.#began.resolve(this.#begin)
      return
    }
    const wrong = this.missing < 0 ? -1 : bytes.findIndex(byte => byte !== this.#expected() >>> 24)
    if (wrong >= 0) this.#wrong ??= new Error(`a wrong byte with ${this.missing - wrong} missing`)
    this.missing -= bytes.length
    if (this.missing <= 0) this.#left.resolve()
    const { status, readStatus } = this.#stream
    if (this.plan?.slow > 0 && this.missing > 0 && status === 'open' && readStatus === 'readable') {
      this.#stream.pause()
      setTimeout(() => { if (this.#stream.readStatus === 'paused') this.#stream.resume() }, this.plan.slow)
    }
  }

  async header () {
    return within(this.#began.promise)
  }

  expect (seed, count) {
    this.#expected = generator(seed)
    this.missing = count
    if (count <= 0) this.#left.resolve()
    const rest = this.#begin.subarray(HEADER)
    if (rest.length > 0) this.#take(rest)
  }

  async ended () {
    await this.#end.promise
    if (this.#wrong != null) throw this.#wrong
  }

  async some () {
    await this.#left.promise
    if (this.#wrong != null) throw this.#wrong
  }

  async whole () {
    await this.ended()
    if (!this.clean || this.missing !== 0) throw new Error(`${this.#stream.status} with ${this.missing} missing`)
  }

  async broken () {
    await this.ended()
    if (this.clean || this.missing < 0) throw new Error(`${this.#stream.status} is no reset, ${this.missing} missing`)
  }
}

async function send (stream, seed, count, piece) {
  const next = generator(seed)
  for (let left = count; left > 0;) {
    const bytes = Buffer.alloc(Math.min(left, piece))
    for (let at = 0; at < bytes.length; at++) bytes[at] = next() >>> 24
    await drained(stream, stream.send(bytes))
    left -= bytes.length
  }
}

async function drained (stream, goesOn) {
  if (!goesOn) await stream.onDrain(patient())
}

function patient () {
  return { signal: AbortSignal.timeout(TIMEOUT) }
}

function within (promise) {
  return Promise.race([
    promise,
    new Promise((resolve, reject) => setTimeout(() => reject(new Error(`nothing within ${TIMEOUT} ms`)), TIMEOUT).unref())
  ])
}

// Numbers of 32 bits; the highest byte of each is the payload of its seed.
function generator (seed) {
  return () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
    return seed
  }
}

try {
  await run(Number(streams))
} catch (error) {
  console.error('failed: yamux:', String(error?.stack ?? error).replaceAll(/\s+/g, ' '))
  process.exit(1)
}
process.exit(0)
