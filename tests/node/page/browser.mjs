// Chromium, and what tests do on the page again and again.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

import { chromium } from "playwright-core";

import { PATIENCE_MS } from "./server.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
export const PROMPT =
    "# Loop over table and return a dict of the entries of table, each value as a string.\ndef answer(table):\n";
const FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

/** A profile of its own for each test comes with the page, not the browser. */
export function launch() {
    return chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
}

/** A page in a profile of its own; what it logs as an error, unless `expected`, fails the test. */
export async function visit(browser, { base, hash = "", expected = /^$/, ready = true, ...options }) {
    const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, reducedMotion: "reduce", ...options });
    const page = await context.newPage();
    page.setDefaultTimeout(PATIENCE_MS);
    page.problems = [];
    const problem = (text) => expected.test(text) || page.problems.push(text);
    page.on("pageerror", (error) => problem(String(error)));
    page.on("console", (message) => message.type() === "error" && problem(message.text()));
    await page.goto(`${base}/${hash}`);
    if (ready) await page.waitForSelector('[data-server="ready"]');
    return page;
}

export async function close(page) {
    assert.deepEqual(page.problems, []);
    await page.context().close();
}

export const lane = (page, kind) => page.locator(`.lane[data-kind="${kind}"]`);
export const state = (page, kind, wanted) =>
    page.waitForSelector(`.lane[data-kind="${kind}"][data-state="${wanted}"]`, { state: "attached" });
export const canvas = (page, kind) =>
    lane(page, kind)
        .locator(".canvas")
        .evaluate((element) => element.textContent);
export const idle = (page) => page.waitForFunction(() => document.getElementById("run").textContent === "Run");
export const figure = (page, kind, name) => lane(page, kind).locator(`[data-figure="${name}"] dd`).textContent();

export async function run(page) {
    await page.locator("#run").click();
    await idle(page);
}

/** A canvas so long, in so many steps, that there is a middle. */
export async function longRun(page) {
    await page.fill("#prompt", PROMPT);
    await page.fill("#max-new-tokens", "200");
    await lane(page, "diffusion").locator("summary").click();
    await lane(page, "diffusion").locator(".value").fill("200");
    await lane(page, "diffusion").locator(".order").selectOption("ORDER_RANDOM");
    await page.locator("#run").click();
    await page.waitForFunction(() => document.querySelectorAll('[data-kind="diffusion"] .cell.committed').length > 2);
}

export async function accessible(page, what) {
    await page.evaluate(AXE);
    const { violations } = await page.evaluate(() =>
        globalThis.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }),
    );
    const told = violations.map(
        ({ id, nodes }) => `${what}: ${id}: ${nodes.map(({ html, failureSummary }) => `${html} ${failureSummary}`).join("\n")}`,
    );
    assert.deepEqual(told, []);
}
