// A party is a js-libp2p host that takes part in a scenario: it listens on no
// address but those through the relay, so that every connection between two
// parties is a circuit.
import { circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { preSharedKey } from '@libp2p/pnet'
import { tcp } from '@libp2p/tcp'
import { tls } from '@libp2p/tls'
import { webSockets } from '@libp2p/websockets'
import { yamux } from '@libp2p/yamux'
import { createLibp2p } from 'libp2p'

// Far more than any single step takes, on a busy machine too.
const STEP = 180_000

// What a relay has to offer, each to be used alone.
export const securities = { noise: noise(), tls: tls() }

// Starts a party that does not reserve. One that waits does so for the answers to
// its pings, which on a busy machine are behind what WebSocket holds: megabytes.
export async function newParty ({ listen = [], security = securities.noise, waits = false, psk } = {}) {
  let circuits
  const party = await createLibp2p({
    addresses: { listen },
    transports: [
      tcp(),
      webSockets(),
      components => {
        circuits = circuitRelayTransport()(components)
        return circuits
      }
    ],
    connectionEncrypters: [security],
    connectionProtector: psk == null ? undefined : preSharedKey({ psk }),
    streamMuxers: [yamux()],
    services: { identify: identify(), ping: ping() },
    connectionMonitor: { abortConnectionOnPingFailure: !waits },
    connectionGater: { denyDialMultiaddr: () => false } // loopback, which it would not dial
  })
  // The library keeps a reservation to itself; the tests look at it.
  party.reservations = circuits.reservationStore
  return party
}

// Starts a party that reserves as js-libp2p does for a configured relay.
export async function newReserved (relay, options) {
  return newParty({ ...options, listen: [relay.encapsulate('/p2p-circuit').toString()] })
}

// Opens a circuit from one party to the other and returns both of its ends.
export async function connect (relay, source, target) {
  const arrival = event(target, 'connection:open', open => open.remotePeer.equals(source.peerId))
  const near = await source.dial(through(relay, target), patient())
  return [near, await arrival]
}

export function through (relay, target) {
  return relay.encapsulate(`/p2p-circuit/p2p/${target.peerId}`)
}

// The next event of this kind that is the one.
export function event (target, kind, isTheOne = () => true) {
  return inTime(kind, resolve => {
    const listener = ({ detail }) => {
      if (isTheOne(detail)) {
        target.removeEventListener(kind, listener)
        resolve(detail)
      }
    }
    target.addEventListener(kind, listener)
  })
}

// A promise that is kept within a step's time, or broken by name.
export function inTime (what, executor) {
  return new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error(`${what}: nothing within ${STEP} ms`)), STEP).unref()
    executor(resolve, reject)
  })
}

// For calls that take a signal.
export function patient () {
  return { signal: AbortSignal.timeout(STEP) }
}

// Tries until it works, for what the relay has to notice first.
export async function eventually (attempt) {
  const giveUp = Date.now() + STEP
  for (;;) {
    try {
      return await attempt()
    } catch (error) {
      if (Date.now() > giveUp) throw error
    }
    await new Promise(resolve => setTimeout(resolve, 100))
  }
}

// Fails unless the promise is broken with these words.
export async function refused (promise, words) {
  const error = await promise.then(() => null, error => error)
  if (error == null) throw new Error(`${words} expected, and it worked`)
  const said = [error, ...error.errors ?? []].join(' ')
  if (!said.includes(words)) throw new Error(`${words} expected, got: ${said}`, { cause: error })
}

export function check (holds, what) {
  if (!holds) throw new Error(what)
}

// Prints one line about something that holds.
export function proved (what) {
  console.log(`ok: ${what}`)
}
