// An interop client: js-libp2p against a running relay.
//
//   node_modules/.bin/node client.mjs <scenario> <relay multiaddr ending in /p2p/<relay>>...
//
// Prints one line per assertion that held. The first failure is printed in
// one line, and the exit status is 1.
import { multiaddr } from '@multiformats/multiaddr'
import { limited, unlimited } from './circuits.mjs'
import { privately } from './private.mjs'
import { discover, full, reserve } from './reservations.mjs'
import { statuses } from './statuses.mjs'
import { websocket } from './websocket.mjs'

// Scenarios by name, with the relay options each of them expects.
const scenarios = {
  reserve, // --reservation-ttl 5m
  unlimited, // --circuit-bytes 0 --circuit-duration 0s
  limited, // --circuit-bytes 128KiB --circuit-duration 5s
  statuses, // --max-circuits-per-peer 1
  discover, // a relay with a global address and hundreds of others
  full, // --max-reservations 1 --reservation-ttl 5m
  private: privately, // --swarm-key $SWARM_KEY
  websocket // as unlimited; a TCP and a WebSocket address
}

const [name, ...addresses] = process.argv.slice(2)
if (!Object.hasOwn(scenarios, name) || addresses.length === 0) {
  console.error(`usage: node client.mjs ${Object.keys(scenarios).join('|')} <relay multiaddr>...`)
  process.exit(2)
}
try {
  await scenarios[name](...addresses.map(address => multiaddr(address)))
} catch (error) {
  console.error(`failed: ${name}: ${told(error)}`)
  process.exit(1)
}
// Otherwise js-libp2p's timers would keep the process running for a while.
process.exit(0)

// An error and its causes, in one line.
function told (error) {
  const causes = [error.cause, ...error.errors ?? []].filter(cause => cause != null)
  return [error instanceof Event ? `event ${error.type}` : String(error), ...causes.map(told)].join(': ').replaceAll(/\s+/g, ' ')
}
