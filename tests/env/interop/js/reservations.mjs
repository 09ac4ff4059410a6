// Reservations: the contents of a granted one, its renewal, and a full table.
import { publicKeyFromProtobuf } from '@libp2p/crypto/keys'
import { RecordEnvelope } from '@libp2p/peer-record'
import { multiaddr } from '@multiformats/multiaddr'
import { check, eventually, newParty, newReserved, proved, refused, securities } from './party.mjs'
import { ReservationVoucher } from './wire.mjs'

// The longest term that the relay grants, in seconds: so short that js-libp2p renews at once
// when asked to reserve again. Some seconds more for rounding.
const TERM = 5 * 60 + 5

const VOUCHER_DOMAIN = 'libp2p-relay-rsvp'
const VOUCHER_TYPE = '0302'

export async function reserve (relay) {
  const relayPeer = peerOf(relay)
  for (const [name, security] of Object.entries(securities)) {
    const party = await newReserved(relay, { security })
    const [connection] = party.getConnections()
    check(connection.encryption.includes(name), `${connection.encryption} is used, not ${name}`)
    check(party.getMultiaddrs().some(address => address.toString().includes('/p2p-circuit')), 'no circuit address')
    const first = party.reservations.getReservation(connection.remotePeer)
    await checkReservation(first, relayPeer, party.peerId)
    proved(`reserve over ${name}: ${left(first)} s, addresses ${first.addrs.map(bytes => multiaddr(bytes))}`)

    const { details } = await party.reservations.addRelay(connection.remotePeer, 'configured')
    const second = details.reservation
    check(second !== first, 'js-libp2p did not ask again')
    await checkReservation(second, relayPeer, party.peerId)
    check(second.expire >= first.expire, `the renewal shortens the term from ${first.expire} to ${second.expire}`)
    check(details.connection === connection.id, 'the renewal did not stay on the connection')
    proved(`renew over ${name}, on the same connection`)
    await party.stop()
  }
}

export async function checkReservation ({ expire, addrs, voucher }, relay, self) {
  check(left({ expire }) > 0 && left({ expire }) <= TERM, `it expires in ${left({ expire })} s`)
  check(addrs.length > 0, 'no addresses')
  for (const address of addrs.map(bytes => multiaddr(bytes).toString())) {
    check(address.endsWith(`/p2p/${relay}`), `${address} does not end in /p2p/${relay}`)
  }
  check(voucher != null, 'no voucher')
  await checkVoucher(voucher, relay, self, expire)
}

async function checkVoucher ({ publicKey, payloadType, payload, signature }, relay, self, expire) {
  const key = publicKeyFromProtobuf(publicKey)
  check(key.toString() === relay, `the voucher is signed by ${key}`)
  check(hex(payloadType) === VOUCHER_TYPE, `the voucher is of type ${hex(payloadType)}`)
  check(hex(payload.relay) === hex(key.toMultihash().bytes), 'the voucher is for another relay')
  check(hex(payload.peer) === hex(self.toMultihash().bytes), 'the voucher is for another peer')
  check(payload.expiration === expire, `the voucher ends at ${payload.expiration}, the reservation at ${expire}`)
  // js-libp2p has decoded the payload, but does not verify the signature.
  const signed = new RecordEnvelope({ publicKey: key, payloadType, payload: ReservationVoucher.encode(payload), signature })
  check(await signed.validate(VOUCHER_DOMAIN), 'the signature of the voucher is wrong')
}

export async function full (relay) {
  const holder = await newReserved(relay)
  const newcomer = await newParty()
  const { remotePeer } = await newcomer.dial(relay)
  const ask = () => newcomer.reservations.addRelay(remotePeer, 'configured')

  await refused(ask(), 'RESERVATION_REFUSED')
  proved('a newcomer to a full table gets RESERVATION_REFUSED')
  await holder.reservations.addRelay(remotePeer, 'configured')
  proved('the holder renews in the full table')
  await holder.stop()
  await eventually(ask)
  proved('the newcomer has the slot after the holder left')
  await newcomer.stop()
}

// Listens through whatever relay it finds, and is connected to this one.
export async function discover (relay) {
  const party = await newParty({ listen: ['/p2p-circuit'] })
  await party.dial(relay)
  const own = () => party.getMultiaddrs().find(address => address.toString().includes(`/p2p/${peerOf(relay)}/p2p-circuit`))
  await eventually(async () => check(own() != null, 'no circuit address'))
  proved(`found the relay by itself and listens on ${own()}`)
  await party.stop()
}

function left ({ expire }) {
  return Number(expire) - Math.floor(Date.now() / 1000)
}

export function peerOf (address) {
  return address.toString().split('/p2p/').at(-1)
}

function hex (bytes) {
  return Buffer.from(bytes).toString('hex')
}
