// Two pages in Chromium exchange messages through a relay: `node meet.mjs RELAY RELAY`, with a WebSocket address of the
// same relay for each page. Prints "met" once they have; after the line "restarted" on standard input they have to do
// so again.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { createInterface } from "node:readline/promises";
import { build } from "esbuild";
import { launch, TIMEOUT } from "./chromium.mjs";

const relays = process.argv.slice(2);
const MESSAGES = 3;

const { outputFiles } = await build({
  entryPoints: ["peer.mjs"],
  bundle: true,
  format: "esm",
  platform: "browser",
  write: false,
});
const html = `<!doctype html>
<meta charset="utf-8">
<link rel="icon" href="data:,">
<p>Reserved <output id="reserved">0</output> times, answered <output id="answered">0</output>, asked <output id="asked">0</output>.</p>
<script type="module" src="/peer.js"></script>`;
const server = createServer(({ url }, response) => {
  const [kind, body] = url === "/peer.js" ? ["text/javascript", outputFiles[0].text] : ["text/html", html];
  response.setHeader("content-type", kind).end(body);
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const here = `http://127.0.0.1:${server.address().port}/`;

const browser = await launch();
const complaints = [];

// Opens a page in a browser context of its own; returns it with the id of its peer.
async function open(relay) {
  // The relay's certificate is self-signed.
  const context = await browser.newContext({ ignoreHTTPSErrors: true });
  context.setDefaultTimeout(TIMEOUT);
  const page = await context.newPage();
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (message) => console.log(`${message.type()}: ${message.text()}`));
  page.on("request", (request) => request.url().startsWith(here) || complaints.push(`asks for ${request.url()}`));
  page.on("websocket", (socket) => /^wss?:\/\/127\.0\.0\.1:/.test(socket.url()) || complaints.push(`connects to ${socket.url()}`));
  await page.goto(here);
  await page.waitForFunction(() => window.befriend);
  const peer = await page.evaluate((relay) => window.start(relay), relay);
  return { page, peer, relay };
}

const counter = (page, what) => page.locator(`#${what}`).innerText().then(Number);

// Waits until a counter of the page has risen by `many`.
async function awaitCount(page, what, many) {
  const wanted = (await counter(page, what)) + many;
  await page.waitForFunction(([what, wanted]) => Number(document.querySelector(`#${what}`).textContent) >= wanted, [what, wanted]);
}

const pages = await Promise.all(relays.map(open));
await Promise.all(pages.map(({ page }) => page.waitForFunction(() => document.querySelector("#reserved").textContent === "1")));
console.log("ok: both pages reserved over WebSocket");

const [first, second] = pages;
await Promise.all([
  first.page.evaluate((friend) => window.befriend(friend), second.peer),
  second.page.evaluate((friend) => window.befriend(friend), first.peer),
]);
const exchange = () => Promise.all(pages.flatMap(({ page }) => [awaitCount(page, "answered", MESSAGES), awaitCount(page, "asked", MESSAGES)]));
await exchange();
for (const [own, other] of [[first, second], [second, first]]) {
  const connections = await own.page.evaluate(() => window.connections());
  const relay = connections.filter(({ address }) => own.relay.startsWith(address));
  assert.equal(relay.length, 1, JSON.stringify(connections));
  const friend = connections.filter(({ peer }) => peer === other.peer);
  assert.ok(friend.length > 0, JSON.stringify(connections));
  for (const { address, limited } of friend) assert.ok(limited && address.includes("/p2p-circuit"), address);
}
console.log("ok: they exchange messages through it, and in no other way");

const input = createInterface({ input: process.stdin });
console.log("met");
assert.equal(await input.question(""), "restarted");
await Promise.all(pages.map(({ page }) => page.waitForFunction(() => Number(document.querySelector("#reserved").textContent) >= 2)));
await exchange();
console.log("ok: after the relay's restart they found each other again");

assert.deepEqual(complaints, []);
await browser.close();
process.exit(0);
