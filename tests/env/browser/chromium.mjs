// Starts Chromium with the options that these tests need, and opens the status page in it.

import assert from "node:assert/strict";
import { chromium } from "playwright-core";

export const TIMEOUT = 180_000;

export function launch() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    // Containers run the tests as root, which the sandbox does not support; no foreign page is opened.
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      "--host-resolver-rules=MAP relay.example 127.0.0.1",
    ],
  });
}

const SIZES = { desktop: { width: 1280, height: 900 }, phone: { width: 360, height: 780 } };

// Opens the status page as a visitor would. Console messages, errors, and requests to other servers count as
// complaints. `answer` may replace the relay's status.
export async function open(browser, url, size, colorScheme, answer) {
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

export const text = (page, selector) => page.locator(selector).first().innerText();
export const rows = (page, section) => page.locator(`${section} tbody tr`);

// Asserts that nothing is wider than the window, at its width and at that of the smallest phone.
export async function fits(page) {
  for (const width of [page.viewportSize().width, 320]) {
    await page.setViewportSize({ width, height: 800 });
    const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert.ok(content <= window, `${content} in ${window}`);
  }
}
