// WebSocket: a reservation over it, and circuits between it and TCP.
import { exchange } from './circuits.mjs'
import { check, connect, newParty, newReserved, proved, securities } from './party.mjs'
import { checkReservation, peerOf } from './reservations.mjs'

// In each direction. js-libp2p's Noise over WebSocket is ten times slower than over TCP.
const BULK = 16 * 1024 * 1024

export async function websocket (overTcp, overWebSocket) {
  for (const [name, security] of Object.entries(securities)) {
    for (const [from, to] of [[overTcp, overWebSocket], [overWebSocket, overTcp], [overWebSocket, overWebSocket]]) {
      const [source, target] = [await newParty({ security }), await newReserved(to, { security })]
      const reservation = target.reservations.getReservation(target.getConnections()[0].remotePeer)
      await checkReservation(reservation, peerOf(to), target.peerId)

      const [near] = await connect(from, source, target)
      for (const [party, address] of [[source, from], [target, to]]) {
        const direct = party.getConnections().find(({ limits, remotePeer }) => limits == null && remotePeer.toString() === peerOf(to))
        check(address.toString().startsWith(direct.remoteAddr.toString()), `the relay was reached at ${direct.remoteAddr}, not ${address}`)
      }
      const rate = await exchange(near, target, BULK)
      proved(`16 MiB each way at once from ${kind(from)} to ${kind(to)} over ${name}: ${rate} MB/s each way`)
      await Promise.all([source.stop(), target.stop()])
    }
  }
}

function kind (address) {
  return address.toString().includes('/ws/') ? 'WebSocket' : 'TCP'
}
