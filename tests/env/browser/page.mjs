// The status page in Chromium: `node page.mjs URL HOLDER SCREENSHOTS`. HOLDER is a peer that holds a slot and is the
// target of a circuit that transfers bytes; another peer is in grace.

import assert from "node:assert/strict";
import { join } from "node:path";
import { status as busy } from "./busy.mjs";
import { launch, TIMEOUT } from "./chromium.mjs";

const [here, holder, screenshots] = process.argv.slice(2);
const SIZES = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };
const browser = await launch();

// Opens the page as a visitor would. Console messages, errors, and requests to other servers count as complaints.
// `answer` may replace the relay's status.
async function open(size, colorScheme, answer, url = here) {
  const context = await browser.newContext({
    viewport: SIZES[size],
    colorScheme,
    deviceScaleFactor: size === "phone" ? 2 : 1,
    permissions: ["clipboard-read", "clipboard-write"],
  });
  context.setDefaultTimeout(TIMEOUT);
  const page = await context.newPage();
  const complaints = [];
  page.on("console", (message) => message.type() !== "log" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => {
    const to = request.url();
    if (!to.startsWith(url) && !to.startsWith("data:image/svg+xml")) complaints.push(`asks for ${to}`);
  });
  if (answer) await page.route("**/status.json", answer);
  await page.goto(url);
  await page.locator("main").waitFor();
  return { page, complaints, close: () => context.close() };
}

const text = (page, selector) => page.locator(selector).first().innerText();
const rows = (page, section) => page.locator(`${section} tbody tr`);

// Asserts that nothing overflows, at this width and at that of the smallest phone.
async function fits(page) {
  for (const width of [page.viewportSize().width, 320]) {
    await page.setViewportSize({ width, height: 800 });
    const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert.ok(content <= window, `${content} in ${window}`);
  }
}

async function shows_the_status() {
  const { page, complaints, close } = await open("desktop", "light");
  // The status may be a second old.
  await rows(page, "#circuits").first().waitFor();
  const status = await page.evaluate(async () => (await fetch("status.json")).json());
  assert.equal(await text(page, "#state"), "serving");
  assert.deepEqual(await page.locator("#counts dd").allInnerTexts(), ["1", "1", "6"]);
  assert.equal(await page.locator("#about .peer").getAttribute("title"), status.peer);

  // Peer ids are shortened; a click copies the whole id.
  assert.equal(await rows(page, "#holders").count(), status.holders.count);
  const peer = page.locator(`#holders .peer[title="${holder}"]`);
  const shown = await peer.innerText();
  assert.ok(shown.length < 16 && shown.endsWith(holder.slice(-8)), shown);
  await peer.click();
  await page.locator("#holders .peer.copied").waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), holder);
  const states = await page.locator("#holders td.state").allInnerTexts();
  assert.deepEqual(states.sort(), ["in grace", "live"]);
  const row = rows(page, "#holders").filter({ has: page.locator(`[title="${holder}"]`) });
  assert.match(await row.innerText(), /127\.0\.0\.1:\d+/);

  // The search finds one of them.
  const search = page.getByRole("searchbox");
  await search.fill(holder.slice(-8));
  assert.equal(await rows(page, "#holders").count(), 1);
  await search.fill("nobody");
  assert.equal(await text(page, "#holders .none"), "No peer matches.");
  await search.fill("");

  // The circuit and its rate.
  const circuit = rows(page, "#circuits").first();
  assert.equal(await circuit.locator(".peer").nth(1).getAttribute("title"), holder);
  await circuit.locator("td").last().filter({ hasNotText: /^0 B\/s$/ }).waitFor();

  // Refusals and their reasons.
  const refused = await text(page, "#refused .tallies");
  assert.match(refused, /CONNECT: the target holds no live reservation/);
  assert.equal(await rows(page, "#latest").count(), status.latest_refusals.length);

  // The page updates itself.
  const before = await text(page, "#about span");
  await page.waitForFunction((before) => document.querySelector("#about span").innerText !== before, before);
  assert.deepEqual(complaints, []);
  await page.screenshot({ path: join(screenshots, "real.png"), fullPage: true });
  await close();
}

async function runs_no_other_script() {
  const { page, close } = await open("desktop", "light");
  const ran = await page.evaluate(async () => {
    const attempts = [
      () => document.body.append(Object.assign(document.createElement("script"), { text: "window.ran = 1" })),
      () => document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = 1'>"),
      () => setTimeout("window.ran = 1"),
      () => (document.location = "javascript:window.ran = 1"),
    ];
    for (const attempt of attempts) {
      try {
        attempt();
      } catch {
        // Expected: the content security policy forbids it.
      }
    }
    await new Promise((resolve) => setTimeout(resolve));
    return window.ran;
  });
  assert.equal(ran, undefined);
  await close();
}

// Over plain HTTP from another host, browsers do not offer the clipboard API.
async function copies_peer_ids_without_the_clipboard_api() {
  const there = here.replace("127.0.0.1", "relay.example");
  const { page, complaints, close } = await open("desktop", "light", undefined, there);
  assert.equal(await page.evaluate(() => navigator.clipboard), undefined);
  await page.locator(`#holders .peer[title="${holder}"]`).click();
  await page.locator("#holders .peer.copied").waitFor();
  await page.getByRole("searchbox").focus();
  await page.keyboard.press("Control+V");
  assert.equal(await page.getByRole("searchbox").inputValue(), holder);
  assert.deepEqual(complaints, []);
  await close();
}

async function shows_when_the_relay_drains_or_does_not_answer() {
  let answer = (route) => route.fulfill({ json: { ...busy, draining: true } });
  const { page, close } = await open("phone", "light", (route) => answer(route));
  await page.locator("#state.draining").waitFor();
  assert.equal(await text(page, "#state"), "draining");
  answer = (route) => route.abort();
  await page.locator("#state.silent").waitFor();
  assert.match(await text(page, "#state"), /^no answer for/);
  await page.screenshot({ path: join(screenshots, "silent.png") });
  answer = (route) => route.fulfill({ json: busy });
  await page.locator("#state:not(.silent)").waitFor();
  assert.equal(await text(page, "#state"), "serving");
  await close();
}

async function lists_a_thousand_peers() {
  const answer = (route) => route.fulfill({ json: busy });
  const { page, complaints, close } = await open("desktop", "dark", answer);
  assert.match(await text(page, "#holders h2"), /1,238, 1,000 listed/);
  assert.equal(await rows(page, "#holders").count(), 10);
  await page.locator("#holders .more").click();
  assert.equal(await rows(page, "#holders").count(), 1000);
  await page.locator("#holders th button", { hasText: "Circuits" }).click();
  const circuits = await page.locator("#holders td:last-child").allInnerTexts();
  const numbers = circuits.map(Number);
  assert.deepEqual(numbers, numbers.toSorted((a, b) => b - a));

  // The curve, and the values under the pointer.
  const plot = page.locator("#plot");
  assert.match(await plot.getAttribute("aria-label"), /last hour: 1201 live and 37 in grace now/);
  await plot.hover();
  assert.match(await text(page, "#cursor"), /^30 min ago: [\d,]+ live, [\d,]+ in grace, [\d,]+ free$/);
  await page.getByRole("button", { name: "Day", exact: true }).click();
  await plot.hover();
  assert.match(await text(page, "#cursor"), /^12 h ago: /);
  assert.deepEqual(complaints, []);
  await close();
}

async function fits_every_screen_in_light_and_dark() {
  const backgrounds = new Set();
  for (const size of Object.keys(SIZES)) {
    for (const scheme of ["light", "dark"]) {
      const { page, complaints, close } = await open(size, scheme, (route) => route.fulfill({ json: busy }));
      backgrounds.add(await page.evaluate(() => getComputedStyle(document.body).backgroundColor));
      await page.screenshot({ path: join(screenshots, `${size}-${scheme}.png`), fullPage: true });
      await fits(page);
      assert.deepEqual(complaints, []);
      await close();
    }
  }
  assert.equal(backgrounds.size, 2, "dark is not light");
}

for (const check of [
  shows_the_status,
  runs_no_other_script,
  copies_peer_ids_without_the_clipboard_api,
  shows_when_the_relay_drains_or_does_not_answer,
  lists_a_thousand_peers,
  fits_every_screen_in_light_and_dark,
]) {
  await check();
  console.log(`ok: ${check.name.replaceAll("_", " ")}`);
}
await browser.close();
