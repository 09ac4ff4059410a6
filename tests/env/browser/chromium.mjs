// Chromium as these tests look through it.

import { chromium } from "playwright-core";

export const PATIENCE = 180_000;

export function launch() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    // It is root who runs it where there is nothing else, and nobody else's pages are looked at.
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
