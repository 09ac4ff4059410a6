// The status of a relay that has run for a year and is nearly full, always the same.

const ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

// Pseudo-random numbers, the same in each run.
function dice(seed) {
  return (below) => {
    seed = (seed * 48271) % 2147483647;
    return seed % below;
  };
}

const roll = dice(4001);
const letters = (n) => Array.from({ length: n }, () => ALPHABET[roll(58)]).join("");
const peer = () => `12D3KooW${letters(44)}`;
const address = () =>
  roll(4) === 0
    ? `/ip6/2001:db8:${roll(65536).toString(16)}:${roll(65536).toString(16)}::1/tcp/${1024 + roll(60000)}`
    : `/ip4/${[198, 51, roll(256), roll(256)].join(".")}/tcp/${1024 + roll(60000)}`;

const TOTAL = 1500;

function holder() {
  const grace = roll(20) === 0;
  return {
    peer: peer(),
    address: grace ? address().replace(/\/tcp.*/, "") : address(),
    state: grace ? "grace" : "live",
    ends_in: grace ? roll(30) : roll(3600),
    silent_for: grace ? null : roll(45),
    circuits: roll(6) === 0 ? 1 + roll(4) : 0,
  };
}

const way = (most) => ({ to_target: roll(most), to_source: roll(most) });

function curve(every, wave) {
  const points = Array.from({ length: 240 }, (_, index) => {
    const taken = Math.round(TOTAL * (0.62 + 0.27 * Math.sin(index / wave) + roll(20) / 1000));
    const grace = 12 + roll(25) + (index > 150 && index < 165 ? 120 - 8 * Math.abs(index - 157) : 0);
    return [taken - grace, grace, TOTAL - taken];
  });
  return { every, points };
}

const holders = Array.from({ length: 1000 }, holder);

const relay = peer();
const party = (role) => {
  const { peer, address } = holders[roll(1000)];
  return { [role]: peer, [`${role}_address`]: address };
};
const rest = ({ to_target, to_source }) => ({ to_target: 131072 - to_target, to_source: 131072 - to_source });

export const status = {
  version: "0.1.0",
  peer: relay,
  draining: false,
  not_serving: null,
  up_for: 31234680,
  addresses: ["/ip4/203.0.113.7/tcp/4001"],
  announced: ["/dns4/relay.example.org/tcp/4001", "/dns4/relay.example.org/tcp/443/tls/ws", "/dns6/relay.example.org/tcp/4001"],
  reachable_at: [
    `/dns4/relay.example.org/tcp/4001/p2p/${relay}`,
    `/dns4/relay.example.org/tcp/443/tls/ws/p2p/${relay}`,
    `/dns6/relay.example.org/tcp/4001/p2p/${relay}`,
  ],
  limits: {
    bandwidth: 0,
    "circuit-bytes": 131072,
    "circuit-duration": 120,
    "max-buffered": 83886080,
    "max-circuits": 1024,
    "max-circuits-per-peer": 64,
    "max-connections": 3000,
    "max-connections-per-peer": 8,
    "max-handshakes": 256,
    "max-reservations": TOTAL,
    "max-streams": 4096,
    "reservation-ttl": 3600,
  },
  memory: { resident: 61234176, estimate: 671088640 },
  certificate_ends_in: 62 * 86400 + 4000,
  slots: { total: TOTAL, live: 1201, grace: 37, free: 262 },
  history: { hour: curve(15, 90), day: curve(360, 40) },
  holders: { count: 1238, listed: holders },
  circuits: {
    count: 83,
    listed: Array.from({ length: 83 }, (_, index) => ({
      id: String(7003 + index),
      ...party("source"),
      ...party("target"),
      open_for: roll(120),
      ends_in: 1 + roll(120),
      carried: way(131072),
      rate: way(10 ** (1 + roll(4))),
    })).map((circuit) => ({ ...circuit, left: rest(circuit.carried) })),
  },
  connections: 1311,
  relayed: { to_target: 8123456789012, to_source: 1123456789012 },
  rate: { to_target: 2312345, to_source: 812345 },
  refused: [
    { what: "CONNECT", why: "the target holds no live reservation", count: 10412, ago: 3 },
    { what: "RESERVE", why: "all slots of the address are taken", count: 3121, ago: 44 },
    { what: "RESERVE", why: "the peer asks too often", count: 890, ago: 1840 },
    { what: "connection", why: "too many connections of the address", count: 311, ago: 86400 },
    { what: "CONNECT", why: "the target could not be won", count: 72, ago: 310 },
    { what: "request", why: "not understood", count: 2, ago: 9000000 },
  ],
  latest_refusals: Array.from({ length: 50 }, (_, index) => ({
    number: 14808 - index,
    what: roll(2) ? "RESERVE" : "CONNECT",
    why: ["the target holds no live reservation", "all slots of the address are taken", "the peer asks too often"][roll(3)],
    peer: peer(),
    address: address(),
    ago: 3 + index * 41,
  })),
  freed: [
    { what: "slot", why: "grace over", count: 220412, ago: 1 },
    { what: "slot", why: "expired", count: 8121, ago: 300 },
    { what: "slot", why: "taken by a newcomer", count: 731, ago: 7000 },
  ],
  questions: { asked: 1203412, unanswered: 20311 },
};
