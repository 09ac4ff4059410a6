// Starts Chromium with the options that these tests need.

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
