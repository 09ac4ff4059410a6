// The messages of the protocol, encoded with js-libp2p's internal definitions, and
// one exchange of them.
import { RELAY_V2_HOP_CODEC } from '@libp2p/circuit-relay-v2'
import { pbStream } from '@libp2p/utils'
import { HopMessage } from './node_modules/@libp2p/circuit-relay-v2/dist/src/pb/index.js'
import { patient } from './party.mjs'

export { HopMessage, ReservationVoucher, Status, StopMessage } from './node_modules/@libp2p/circuit-relay-v2/dist/src/pb/index.js'

export function connectTo (peer) {
  return { type: HopMessage.Type.CONNECT, peer: { id: peer.toMultihash().bytes, addrs: [] } }
}

// Sends one request to the relay; returns the answer, and the stream, which may now be a circuit.
export async function ask (party, relay, request) {
  const stream = await party.dialProtocol(relay, RELAY_V2_HOP_CODEC, patient())
  const messages = pbStream(stream).pb(HopMessage)
  await messages.write(request, patient())
  const answer = await messages.read(patient())
  return [answer, messages.unwrap().unwrap()]
}
