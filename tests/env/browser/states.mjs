// The status page in Chromium while a relay fills up: `node states.mjs URL SCREENSHOTS`. Prints `empty` once the page has
// shown no holder, and `three` once it has shown three of 1,024, which have a circuit. Reads a line when all slots are taken.

import assert from "node:assert/strict";
import { once } from "node:events";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fits, launch, open, rows, text } from "./chromium.mjs";

const [here, screenshots] = process.argv.slice(2);
const browser = await launch();
const { page, complaints } = await open(browser, here, "desktop", "light");

// All sizes and colour schemes, as they are now.
async function shoot(name) {
  for (const size of ["desktop", "phone"]) {
    for (const scheme of ["light", "dark"]) {
      const { page, close } = await open(browser, here, size, scheme);
      await page.screenshot({ path: join(screenshots, `${name}-${size}-${scheme}.png`), fullPage: true });
      await fits(page);
      await close();
    }
  }
}

// Without a holder the page tells clients where to reserve.
const { peer } = await page.evaluate(async () => (await fetch("status.json")).json());
const address = `/dns4/relay.example/tcp/4001/p2p/${peer}`;
assert.equal(await text(page, "#state"), "serving");
assert.equal(await text(page, "h1"), "relay.example");
assert.equal(await page.title(), "relay.example · relaylet");
assert.equal(await text(page, "#counts dd"), "0 of 1,024");
assert.equal(await text(page, "#holders .none p"), "No peer holds a slot. Clients reserve one at:");
for (const section of ["#addresses", "#holders"]) {
  assert.equal(await text(page, `${section} code`), address);
  await page.evaluate(() => navigator.clipboard.writeText(""));
  await page.locator(`${section} .copy`).click();
  await page.locator(`${section} .copied`).waitFor();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), address);
}
assert.equal(await text(page, "#circuits .none"), "No circuit is open.");
await shoot("empty");
console.log("empty");

await page.locator("#counts dd", { hasText: /^3 of 1,024$/ }).waitFor();
await rows(page, "#circuits").first().waitFor();
assert.equal(await rows(page, "#holders").count(), 3);
assert.ok(await page.locator("#holders .none").isHidden());
assert.equal(await text(page, "#state"), "serving");
assert.ok(await page.locator("#reached").isHidden());
await shoot("three");
console.log("three");

const input = createInterface(process.stdin);
await once(input, "line");
input.close();
await page.locator("#state.full").waitFor();
assert.equal(await text(page, "#state"), "full");
assert.equal(await text(page, "#counts dd"), "1,024 of 1,024");
assert.equal(await page.title(), "full: relay.example · relaylet");
assert.match(await text(page, "#reached"), /^All 1,024 slots are taken: .* Raise --max-reservations /);
const colour = await page.locator("#state").evaluate((state) => getComputedStyle(state).color);
assert.equal(colour, "rgb(146, 64, 14)", "amber");
await shoot("full");
assert.deepEqual(complaints, []);
await browser.close();
