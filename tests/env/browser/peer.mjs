// A page's peer: js-libp2p as an application bundles it. It holds a slot on the relay for as long as the
// page is open, and has a word with its friend now and then. How that goes stands in the page.

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

// What the page shows: how often it reserved, got an answer, and was asked.
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

// Comes to the relay, and again each time that it has lost it; yields at once who it is.
window.come = async (address) => {
  relay = multiaddr(address);
  const privateKey = await generateKeyPair("Ed25519");
  stay(privateKey);
  return privateKey.publicKey.toString();
};

async function stay(privateKey) {
  for (;;) {
    const peer = await createLibp2p({
      privateKey,
      start: false,
      addresses: { listen: [`${relay}/p2p-circuit`] },
      transports: [webSockets(), circuitRelayTransport()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      services: { identify: identify() },
      // Browsers keep to wss:// and the internet otherwise.
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

// Until it is reached through the relay, or is no longer.
async function reserved(peer, wanted) {
  const is = () => peer.getMultiaddrs().some((address) => address.toString().includes("/p2p-circuit"));
  while (is() !== wanted) await pause();
}

async function answer(stream) {
  const words = lpStream(stream);
  const asked = text(await words.read(patient()));
  await words.write(bytes(`you said: ${asked}`), patient());
  await stream.close(patient());
  count("asked");
}

// Says something to the friend, and hears the answer, for as long as the page is open.
window.befriend = (friend) => {
  keep(friend);
};

async function keep(friend) {
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
  const said = `good day, for the ${counts.answered + 1}. time`;
  await words.write(bytes(said), patient());
  const heard = text(await words.read(patient()));
  await stream.close(patient());
  if (heard !== `you said: ${said}`) throw new Error(`it was understood as: ${heard}`);
  count("answered");
}

// Whom it is connected to, how, and under what limits.
window.connections = () =>
  node.getConnections().map(({ remoteAddr, remotePeer, limits }) => ({
    address: remoteAddr.toString(),
    peer: remotePeer.toString(),
    limited: limits != null,
  }));
