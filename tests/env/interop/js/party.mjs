// A party is a js-libp2p host that takes part in a scenario: it listens only on
// addresses through the relay, so that every connection between two parties
// is a circuit.
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

// Far more than any single step takes, even on a busy machine.
const STEP = 180_000

// The secure channels that a relay has to offer, each used alone.
export const securities = { noise: noise(), tls: tls() }

// Starts a party that does not reserve. It pings its connections but does not abort one whose answer takes long: on a busy machine
// pings wait behind megabytes in the party's own buffers, for longer than js-libp2p's timeout.
export async function newParty ({ listen = [], security = securities.noise, psk } = {}) {
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
    connectionMonitor: { abortConnectionOnPingFailure: false },
    connectionGater: { denyDialMultiaddr: () => false } // allows loopback addresses
  })
  // The library does not expose the reservation, which the tests check.
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

// Waits for the next event of this kind that matches.
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

// Rejects with `what` if the promise is not fulfilled within a step's time.
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

// Retries until it succeeds, for what the relay has to notice first.
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

// Asserts that the promise is rejected with these words.
export async function refused (promise, words) {
  const error = await promise.then(() => null, error => error)
  if (error == null) throw new Error(`${words} expected, and it worked`)
  const said = [error, ...error.errors ?? []].join(' ')
  if (!said.includes(words)) throw new Error(`${words} expected, got: ${said}`, { cause: error })
}

export function check (holds, what) {
  if (!holds) throw new Error(what)
}

// Prints one line about an assertion that held.
export function proved (what) {
  console.log(`ok: ${what}`)
}
