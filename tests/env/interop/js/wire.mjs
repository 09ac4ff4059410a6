// The messages of the protocol, in js-libp2p's own words, which it keeps to
// itself, and one exchange of them by hand.
import { RELAY_V2_HOP_CODEC } from '@libp2p/circuit-relay-v2'
import { pbStream } from '@libp2p/utils'
import { HopMessage } from './node_modules/@libp2p/circuit-relay-v2/dist/src/pb/index.js'
import { patient } from './party.mjs'

export { HopMessage, ReservationVoucher, Status, StopMessage } from './node_modules/@libp2p/circuit-relay-v2/dist/src/pb/index.js'

export function connectTo (peer) {
  return { type: HopMessage.Type.CONNECT, peer: { id: peer.toMultihash().bytes, addrs: [] } }
}

// Sends one request to the relay; yields the answer, and the stream that may be a circuit now.
export async function ask (party, relay, request) {
  const stream = await party.dialProtocol(relay, RELAY_V2_HOP_CODEC, patient())
  const messages = pbStream(stream).pb(HopMessage)
  await messages.write(request, patient())
  const answer = await messages.read(patient())
  return [answer, messages.unwrap().unwrap()]
}
