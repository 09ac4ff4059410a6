// The status page in Chromium: `node page.mjs URL HOLDER SCREENSHOTS`. HOLDER is a peer that holds a slot and is the
// target of a circuit that transfers bytes; another peer is in grace.

import assert from "node:assert/strict";
import { join } from "node:path";
import { status as busy } from "./busy.mjs";
import { fits, launch, open as openPage, rows, text } from "./chromium.mjs";

const [here, holder, screenshots] = process.argv.slice(2);
const browser = await launch();
const open = (size, colorScheme, answer, url = here) => openPage(browser, url, size, colorScheme, answer);

async function shows_the_status() {
  const { page, complaints, close } = await open("desktop", "light");
  // The status may be a second old.
  await rows(page, "#circuits").first().waitFor();
  const status = await page.evaluate(async () => (await fetch("status.json")).json());
  assert.equal(await text(page, "#state"), "serving");
  assert.deepEqual(await page.locator("#counts dd").allInnerTexts(), ["1 of 8", "1", "6"]);
  assert.equal(await page.locator("#about .peer").getAttribute("title"), status.peer);

  assert.equal(await page.title(), "relaylet", "no address is announced");

  // The relay's addresses, whole; a click copies one.
  const addresses = await page.locator("#addresses code").allInnerTexts();
  assert.deepEqual(addresses, status.reachable_at);
  assert.ok(addresses[0].endsWith(`/p2p/${status.peer}`), addresses[0]);
  await page.getByRole("button", { name: `Copy ${addresses[0]}` }).click();
  await page.locator("#addresses .copied").filter({ hasText: "Copied" }).waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), addresses[0]);

  // The limits, and how much of them is used.
  const figure = (title) => page.locator("#figures div").filter({ hasText: title }).locator("dd span").innerText();
  assert.equal(await figure("Circuits"), "1 of 128");
  assert.equal(await figure("Connections"), "2 of 128");
  assert.match(await figure("Memory"), /^[\d.]+ MiB of [\d,]+ MiB$/);
  assert.equal(await page.locator("#figures div").count(), 6, "there is no certificate");
  const limits = await page.locator("#limits div").allInnerTexts();
  for (const limit of ["--max-reservations 8", "--circuit-bytes 1.0 GiB", "--circuit-duration 1 h", "--bandwidth no limit"]) {
    assert.ok(limits.map((text) => text.replace(/\s+/g, " ")).includes(limit), `${limit}: ${limits}`);
  }

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

  // The circuit: both addresses, what is left of its limits, its rate.
  const circuit = rows(page, "#circuits").first();
  const [{ source_address, target_address }] = status.circuits.listed;
  for (const [cell, address] of [source_address, target_address].entries()) {
    const [, ip, host, tcp, port] = address.split("/");
    assert.deepEqual([ip, host, tcp], ["ip4", "127.0.0.1", "tcp"]);
    assert.ok((await circuit.locator("td").nth(cell).innerText()).endsWith(`127.0.0.1:${port}`), address);
  }
  assert.match(await circuit.locator("td").nth(3).innerText(), /^5\d min$/);
  assert.match(await circuit.locator("td").nth(4).innerText(), /iB\s+10\d\d MiB left$/);
  assert.match(await circuit.locator("td").nth(5).innerText(), /^0 B\s+1.0 GiB left$/);
  assert.equal(await circuit.locator(".peer").nth(1).getAttribute("title"), holder);
  await circuit.locator("td").last().filter({ hasNotText: /^0 B\/s$/ }).waitFor();

  // Refusals and their reasons.
  const refused = await text(page, "#refused .tallies");
  assert.match(refused, /CONNECT: the target holds no live reservation/);
  assert.equal(await rows(page, "#latest").count(), status.latest_refusals.length);

  // The page updates itself, and adds nothing to the document that would grow with time.
  await page.evaluate(() => {
    window.added = 0;
    document.addEventListener = () => (window.added += 1);
  });
  for (let updates = 0; updates < 2; updates += 1) {
    const before = await text(page, "#about span");
    await page.waitForFunction((before) => document.querySelector("#about span").innerText !== before, before);
  }
  assert.equal(await page.evaluate(() => window.added), 0);
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
async function copies_without_the_clipboard_api() {
  const there = here.replace("127.0.0.1", "relay.example");
  const { page, complaints, close } = await open("desktop", "light", undefined, there);
  assert.equal(await page.evaluate(() => navigator.clipboard), undefined);
  await page.locator(`#holders .peer[title="${holder}"]`).click();
  await page.locator("#holders .peer.copied").waitFor();
  await page.getByRole("searchbox").focus();
  await page.keyboard.press("Control+V");
  assert.equal(await page.getByRole("searchbox").inputValue(), holder);

  // Where it is not allowed at all, the address is selected.
  const code = page.locator("#addresses code").first();
  await page.evaluate(() => (document.execCommand = () => false));
  await page.locator("#addresses button").first().click();
  await page.locator("#addresses button").filter({ hasText: "Selected" }).waitFor();
  assert.equal(await page.evaluate(() => getSelection().toString()), await code.innerText());
  assert.deepEqual(complaints, []);
  await close();
}

async function shows_when_the_relay_drains_or_does_not_answer() {
  let answer = (route) => route.fulfill({ json: { ...busy, not_serving: "draining" } });
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
  assert.match(await text(page, "#times p"), /^30 min ago: [\d,]+ live, [\d,]+ in grace, [\d,]+ free$/);
  await nothing_covers_the_plot(page);
  await page.getByRole("button", { name: "Day", exact: true }).click();
  await plot.hover();
  assert.match(await text(page, "#times p"), /^12 h ago: /);
  assert.deepEqual(complaints, []);
  await close();
}

async function nothing_covers_the_plot(page) {
  const covering = await page.evaluate(() => {
    const plot = document.querySelector("#plot svg").getBoundingClientRect();
    const labels = document.querySelectorAll("#levels span, #times li, #times p:not([hidden])");
    return [...labels].filter((label) => {
      const { left, right, top, bottom } = label.getBoundingClientRect();
      return right > plot.left && left < plot.right && bottom > plot.top && top < plot.bottom;
    }).map((label) => label.innerText);
  });
  assert.deepEqual(covering, []);
}

async function the_chart_spans_the_uptime_until_that_is_an_hour() {
  // Started 200 s ago; two slots taken since 95 s ago.
  const points = Array.from({ length: 14 }, (_, index) => [index < 7 ? 0 : 2, 0, 6]);
  const young = { ...busy, up_for: 200, slots: { total: 8, live: 2, grace: 0, free: 6 } };
  young.history = { hour: { every: 15, points }, day: { every: 360, points: points.slice(0, 1) } };
  const { page, complaints, close } = await open("phone", "light", (route) => route.fulfill({ json: young }));
  for (const [span, first] of [["Hour", "M0.00 100.00L18.00 100.00"], ["Day", "M0.00 100.00L240.00 51.00"]]) {
    await page.getByRole("button", { name: span, exact: true }).click();
    const line = await page.locator("#plot .live.line").getAttribute("d");
    assert.ok(line.startsWith(first) && line.endsWith("L240.00 51.00"), line);
    assert.deepEqual(await page.locator("#times li").allInnerTexts(), ["3 min 20 s ago", "1 min 40 s ago", "now"]);
    assert.deepEqual(await page.locator("#levels li").allInnerTexts(), ["4", "2", "0"]);
    await nothing_covers_the_plot(page);
  }
  assert.match(await page.locator("#plot").getAttribute("aria-label"), /since the start 3 min 20 s ago: 2 live/);
  assert.deepEqual(complaints, []);
  await close();
}

async function colours_what_needs_attention() {
  for (const [left, shown, kind] of [[5356800, "62 days", ""], [432000, "5 days", "amber"], [7200, "2 h", "amber"], [0, "expired", "bad"]]) {
    const json = { ...busy, certificate_ends_in: left, connections: busy.limits["max-connections"] };
    const { page, close } = await open("phone", "dark", (route) => route.fulfill({ json }));
    const certificate = page.locator("#figures div").last().locator("dd span");
    assert.deepEqual([await certificate.innerText(), await certificate.getAttribute("class")], [shown, kind]);
    assert.equal(await text(page, "#state"), "full");
    assert.match(await text(page, "#reached"), /^All 3,000 connections are open: .* --max-connections /);
    assert.equal(await page.locator("#figures div").nth(1).locator("dd span").getAttribute("class"), "amber");
    await close();
  }
}

async function fits_every_screen_in_light_and_dark() {
  const backgrounds = new Set();
  for (const size of ["desktop", "phone"]) {
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
  copies_without_the_clipboard_api,
  shows_when_the_relay_drains_or_does_not_answer,
  lists_a_thousand_peers,
  the_chart_spans_the_uptime_until_that_is_an_hour,
  colours_what_needs_attention,
  fits_every_screen_in_light_and_dark,
]) {
  await check();
  console.log(`ok: ${check.name.replaceAll("_", " ")}`);
}
await browser.close();
