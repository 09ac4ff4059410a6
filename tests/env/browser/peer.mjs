// The peer of a page: js-libp2p as an application bundles it. It holds a slot on the relay while the page is open, and
// sends messages to its friend, the other page's peer. The page shows its counters.

import { circuitRelayTransport } from "@libp2p/circuit-relay-v2";
import { generateKeyPair } from "@libp2p/crypto/keys";
import { identify } from "@libp2p/identify";
import { noise } from "@libp2p/noise";
import { lpStream } from "@libp2p/utils";
import { webSockets } from "@libp2p/websockets";
import { yamux } from "@libp2p/yamux";
import { multiaddr } from "@multiformats/multiaddr";
import { createLibp2p } from "libp2p";

const PROTOCOL = "/relaylet-browser/1";
const PAUSE = 300; // ms
const STEP = 10_000; // ms

// Circuits have limits unless the relay is told otherwise.
const LIMITED = { runOnLimitedConnection: true };

let relay;
let node;

// The counters: reservations, answers received, messages answered.
const counts = { reserved: 0, answered: 0, asked: 0 };

function count(what) {
  counts[what] += 1;
  document.querySelector(`#${what}`).textContent = counts[what];
}

const pause = () => new Promise((resolve) => setTimeout(resolve, PAUSE));
const patient = () => ({ signal: AbortSignal.timeout(STEP) });
const bytes = (text) => new TextEncoder().encode(text);
const firstLine = (error) => String(error).split("\n")[0];
const text = (bytes) => new TextDecoder().decode(bytes.subarray());

// Reserves on the relay, and again each time that the reservation is lost. Returns the peer id at once.
window.start = async (address) => {
  relay = multiaddr(address);
  const privateKey = await generateKeyPair("Ed25519");
  keepReserved(privateKey);
  return privateKey.publicKey.toString();
};

async function keepReserved(privateKey) {
  for (;;) {
    const peer = await createLibp2p({
      privateKey,
      start: false,
      addresses: { listen: [`${relay}/p2p-circuit`] },
      transports: [webSockets(), circuitRelayTransport()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      services: { identify: identify() },
      // By default, js-libp2p in a browser dials only wss:// and public addresses.
      connectionGater: { denyDialMultiaddr: () => false },
    });
    try {
      await peer.handle(PROTOCOL, answer, LIMITED);
      await peer.start();
      await reserved(peer, true);
      node = peer;
      count("reserved");
      await reserved(peer, false);
    } catch (error) {
      console.log(`not at the relay: ${firstLine(error)}`);
    }
    node = undefined;
    await peer.stop();
    await pause();
  }
}

// Waits until the peer has a relayed address, or has none any more.
async function reserved(peer, wanted) {
  const is = () => peer.getMultiaddrs().some((address) => address.toString().includes("/p2p-circuit"));
  while (is() !== wanted) await pause();
}

async function answer(stream) {
  const words = lpStream(stream);
  const asked = text(await words.read(patient()));
  await words.write(bytes(`you sent: ${asked}`), patient());
  await stream.close(patient());
  count("asked");
}

// Sends messages to the friend while the page is open, and checks the answers.
window.befriend = (friend) => {
  keepGreeting(friend);
};

async function keepGreeting(friend) {
  for (;;) {
    try {
      await greet(friend);
    } catch (error) {
      console.log(`no answer: ${firstLine(error)}`);
    }
    await pause();
  }
}

async function greet(friend) {
  if (!node) return;
  const through = relay.encapsulate(`/p2p-circuit/p2p/${friend}`);
  const stream = await node.dialProtocol(through, PROTOCOL, { ...LIMITED, ...patient() });
  const words = lpStream(stream);
  const sent = `good day, for the ${counts.answered + 1}. time`;
  await words.write(bytes(sent), patient());
  const received = text(await words.read(patient()));
  await stream.close(patient());
  if (received !== `you sent: ${sent}`) throw new Error(`wrong echo: ${received}`);
  count("answered");
}

// Its connections: the peer, the address, and whether they are limited.
window.connections = () =>
  node.getConnections().map(({ remoteAddr, remotePeer, limits }) => ({
    address: remoteAddr.toString(),
    peer: remotePeer.toString(),
    limited: limits != null,
  }));
