// The page in Chromium, against a real server with the pair of models that ships.

import assert from "node:assert/strict";
import { rm } from "node:fs/promises";
import { createServer } from "node:http";
import { after, before, describe, test } from "node:test";

import { accessible, canvas, close, figure, idle, lane, launch, longRun, PROMPT, run, state, visit } from "./browser.mjs";
import { eventually, generate, makeToken, PATIENCE_MS, Server } from "./server.mjs";

let browser;
let server;

before(async () => {
    [browser, server] = await Promise.all([launch(), Server.start()]);
});
// What a failed test leaves running would keep this process.
after(async () => {
    await browser?.close();
    await Server.stopAll();
});

const open = (options = {}) => visit(browser, { base: server.base, ...options });

describe("the page", { timeout: 5 * PATIENCE_MS }, () => {
    test("runs both lanes to the end, with the texts that the same seed gives elsewhere", async () => {
        const page = await open();
        await page.fill("#prompt", PROMPT);
        await page.fill("#temperature", "0.7");
        await page.fill("#seed", "18446744073709551615");
        await run(page);
        await state(page, "diffusion", "finished");
        await state(page, "autoregressive", "finished");
        const seeded = ["--temperature", "0.7", "--seed", "18446744073709551615"];
        const diffusion = await generate("--server", server.grpc, "--method", "diffusion", "--steps", "8", ...seeded, PROMPT);
        const autoregressive = await generate("--model", "models/nano-ar", ...seeded, PROMPT);
        assert.ok(diffusion.length > 20 && autoregressive.length > 20);
        assert.equal(await canvas(page, "diffusion"), PROMPT + diffusion);
        assert.equal(await canvas(page, "autoregressive"), PROMPT + autoregressive);
        assert.ok(Number(await figure(page, "diffusion", "forwards")) <= 8);
        assert.match(await lane(page, "diffusion").locator(".rate").textContent(), /^[\d,]+ tokens\/s$/);
        assert.match(await page.locator("#outcome").textContent(), /times as long/);
        assert.equal(await lane(page, "diffusion").locator(".seed").textContent(), "Seed 18446744073709551615");
        // Drafted, the same text.
        await lane(page, "autoregressive").locator("summary").click();
        await lane(page, "autoregressive").locator(".drafter").selectOption("DRAFTER_REDRAFTER");
        await page.locator("#order").selectOption("at-once");
        await run(page);
        assert.equal(await canvas(page, "autoregressive"), PROMPT + autoregressive);
        assert.match(await figure(page, "autoregressive", "acceptance length"), /^\d\.\d$|no drafts/);
        await close(page);
    });

    test("replays by slider, keys and play", async () => {
        const page = await open({ reducedMotion: "no-preference" });
        await page.fill("#prompt", PROMPT);
        await run(page);
        // Played again of itself, since it was over too soon to be seen.
        await page.waitForFunction(
            () =>
                document.querySelector('[data-kind="diffusion"] .slider').value !==
                document.querySelector('[data-kind="diffusion"] .slider').max,
        );
        await page.keyboard.press("Escape");
        const text = await canvas(page, "diffusion");
        const slider = lane(page, "diffusion").locator(".slider");
        const steps = Number(await slider.getAttribute("max"));
        assert.ok(steps > 2 && steps <= 8, `${steps} steps`);
        const committed = () => lane(page, "diffusion").locator(".cell.committed").count();
        await slider.focus();
        await page.keyboard.press("Home");
        assert.equal(await lane(page, "diffusion").locator(".cell.masked").count(), 48);
        assert.equal(await canvas(page, "diffusion"), PROMPT);
        const counts = [0];
        for (let step = 1; step < steps; step += 1) {
            await page.keyboard.press("ArrowRight");
            counts.push(await committed());
            assert.equal(await lane(page, "diffusion").locator(".now-committed").count(), counts.at(-1) - counts.at(-2));
        }
        assert.ok(
            counts.every((count, at) => at === 0 || count > counts[at - 1]),
            String(counts),
        );
        assert.match(
            await lane(page, "diffusion").locator(".position").textContent(),
            new RegExp(`^step ${steps - 1} of ${steps}$`),
        );
        await page.keyboard.press("End");
        assert.equal(await canvas(page, "diffusion"), text);
        // The canvas itself takes keys, too.
        await lane(page, "diffusion").locator(".canvas").focus();
        await page.keyboard.press("ArrowLeft");
        assert.equal(await committed(), counts.at(-1));
        await page.keyboard.press(" ");
        assert.equal(await lane(page, "diffusion").locator(".play").getAttribute("aria-label"), "Pause");
        await lane(page, "diffusion").locator('.play[aria-label="Play"]').waitFor();
        assert.equal(await canvas(page, "diffusion"), text);
        await close(page);
    });

    test("cancels in the middle, which frees the server", async () => {
        const page = await open();
        await longRun(page);
        await page.keyboard.press("Escape");
        await state(page, "diffusion", "cancelled");
        await eventually("nothing runs", async () => {
            const { waiting, resident } = await server.load();
            return waiting + resident === 0;
        });
        const { steps } = await server.load();
        await new Promise((resolve) => setTimeout(resolve, 100));
        assert.equal((await server.load()).steps, steps);
        assert.equal(await lane(page, "diffusion").locator(".message").textContent(), "cancelled");
        assert.equal(await lane(page, "autoregressive").locator(".message").textContent(), "not run");
        assert.ok((await lane(page, "diffusion").locator(".cell.committed").count()) < 200);
        // What came until then can be replayed.
        await lane(page, "diffusion").locator(".slider").focus();
        await page.keyboard.press("Home");
        assert.equal(await lane(page, "diffusion").locator(".cell.masked").count(), 200);
        await close(page);
    });

    test("fills a hole that was marked in a text", async () => {
        const page = await open();
        const text =
            "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n    return sum(1 for y in xs if x > 7)\n";
        await page.fill("#prompt", text);
        const [start, end] = [text.indexOf("1 for"), text.indexOf(" if x")];
        await page.locator("#prompt").evaluate((area, [start, end]) => area.setSelectionRange(start, end), [start, end]);
        await page.locator("#prompt").press("Control+m");
        // As long as what was there, in the model's tokens.
        await page.waitForFunction(() => document.querySelector("#backdrop mark")?.textContent === "⟦5⟧");
        assert.equal(await page.locator("#prompt").inputValue(), `${text.slice(0, start)}⟦5⟧${text.slice(end)}`);
        await run(page);
        assert.equal(await canvas(page, "diffusion"), text.replace("1 for y in xs", "x for x in xs"));
        assert.equal(await lane(page, "diffusion").locator(".cell.fixed").last().textContent(), "\n");
        assert.match(await lane(page, "autoregressive").locator(".message").textContent(), /cannot fill a hole/);
        await close(page);
    });

    test("says at the field what is wrong with it", async () => {
        const page = await open();
        await lane(page, "diffusion")
            .locator(".options")
            .evaluate((details) => (details.open = true));
        await lane(page, "diffusion").locator(".rule").selectOption("threshold");
        await lane(page, "diffusion").locator(".value").fill("7");
        await lane(page, "diffusion")
            .locator(".options")
            .evaluate((details) => (details.open = false));
        await run(page);
        const value = lane(page, "diffusion").locator(".value");
        assert.equal(await value.getAttribute("aria-invalid"), "true");
        assert.match(await page.locator(`#${await value.getAttribute("aria-describedby")}`).textContent(), /7/);
        assert.ok(await value.isVisible());
        // What cannot even be sent is told alike, and nothing runs.
        await value.fill("0.9");
        await page.fill("#seed", "-1");
        await run(page);
        assert.equal(await page.locator("#seed").getAttribute("aria-invalid"), "true");
        assert.equal(await value.getAttribute("aria-invalid"), null);
        assert.equal(await page.evaluate(() => document.activeElement.id), "seed");
        await accessible(page, "a wrong field");
        await close(page);
    });

    test("takes generated text for nothing but text, outside its frame", async (context) => {
        let calls = 0;
        const elsewhere = createServer((_, response) => {
            calls += 1;
            response.setHeader("access-control-allow-origin", "*").end("x");
        });
        await new Promise((resolve) => elsewhere.listen(0, "127.0.0.1", resolve));
        context.after(() => elsewhere.close());
        const away = `http://127.0.0.1:${elsewhere.address().port}`;
        // Refused requests are what this is about; the browser logs each.
        const page = await open({
            expected: /Content Security Policy|sandboxed|Blocked a frame with origin "null"|ERR_BLOCKED_BY_CSP/,
        });
        const hostile = `<script>parent.harmed=1</script><img src=x onerror=parent.harmed=2>`;
        await page.fill("#prompt", `${hostile}\n⟦1⟧<html><img src=${away}><script>title="it ran"</script>`);
        await run(page);
        await state(page, "diffusion", "finished");
        assert.ok((await canvas(page, "diffusion")).startsWith(hostile));
        assert.equal(await lane(page, "diffusion").locator(".canvas :is(script, img, b, link)").count(), 0);
        assert.equal(await page.evaluate(() => window.harmed), undefined);
        assert.equal(calls, 0);
        // Nor does anything else that is not the server's own run here.
        await page.evaluate(() => {
            const script = document.createElement("script");
            script.textContent = "window.harmed = 3";
            document.body.append(script);
            const link = document.createElement("div");
            link.innerHTML = '<a href="javascript:window.harmed = 4" onclick="window.harmed = 5">x</a>';
            document.body.append(link);
            link.firstChild.click();
            setTimeout("window.harmed = 6");
        });
        await page.waitForTimeout(100);
        assert.equal(await page.evaluate(() => window.harmed), undefined);
        await lane(page, "diffusion").locator(".preview").click();
        const element = lane(page, "diffusion").locator("iframe");
        assert.equal(await element.getAttribute("sandbox"), "allow-scripts");
        const frame = await (await element.elementHandle()).contentFrame();
        await eventually("the page in the frame runs", () =>
            frame.evaluate(() => globalThis.title === "it ran").catch(() => false),
        );
        const found = await frame.evaluate(
            async ([away, own]) => {
                const found = { origin };
                const attempt = async (name, act) => {
                    try {
                        const patience = new Promise((_, reject) => setTimeout(reject, 2000));
                        found[name] = String(await Promise.race([act(), patience]));
                    } catch {
                        found[name] = "refused";
                    }
                };
                await attempt("away", () => fetch(away));
                await attempt("own", () => fetch(own, { mode: "no-cors" }));
                await attempt("parent", () => parent.document.title);
                await attempt("storage", () => localStorage.length);
                await attempt("top", () => (top.location = away));
                await attempt(
                    "socket",
                    () =>
                        new Promise((resolve, reject) =>
                            Object.assign(new WebSocket(away.replace("http", "ws")), { onopen: resolve, onerror: reject }),
                        ),
                );
                await attempt(
                    "worker",
                    () =>
                        new Promise((resolve, reject) =>
                            Object.assign(new Worker(`${away}/worker.js`), { onmessage: resolve, onerror: reject }),
                        ),
                );
                navigator.sendBeacon(`${away}/beacon`);
                for (const [name, attributes] of [
                    ["script", { src: away }],
                    ["iframe", { src: away }],
                    ["object", { data: away }],
                    ["form", { action: away }],
                    ["link", { rel: "stylesheet", href: away }],
                ]) {
                    document.body.append(Object.assign(document.createElement(name), attributes));
                }
                document.querySelector("form").submit();
                open(away);
                return found;
            },
            [away, server.base],
        );
        const refused = ["away", "own", "parent", "storage", "top", "socket", "worker"].map((name) => [name, "refused"]);
        assert.deepEqual(found, { origin: "null", ...Object.fromEntries(refused) });
        // It cannot lead itself away either. Later, so that the answer to this is not lost with the page.
        await frame.evaluate((away) => void setTimeout(() => (location = `${away}/frame`)), away);
        await new Promise((resolve) => setTimeout(resolve, 300));
        assert.equal(calls, 0, "the frame has reached the network");
        assert.equal(page.context().pages().length, 1);
        assert.ok(page.url().startsWith(server.base));
        assert.equal(await page.evaluate(() => window.harmed), undefined);
        await close(page);
    });

    test("says when the server went away, and when it is back", async () => {
        let own = await Server.start();
        const page = await open({ base: own.base, expected: /Failed to load resource|net::ERR/ });
        await longRun(page);
        await own.stop("SIGKILL");
        await state(page, "diffusion", "failed");
        assert.match(await lane(page, "diffusion").locator(".message").textContent(), /went away in the middle/);
        assert.match(await page.locator("#banner").textContent(), /does not answer/);
        assert.ok(await page.locator("#run").isDisabled());
        own = await Server.start({ http: own.port });
        await page.waitForSelector('[data-server="ready"]');
        assert.match(await page.locator("#banner").textContent(), /is back/);
        await page.fill("#max-new-tokens", "");
        await lane(page, "diffusion").locator(".value").fill("8");
        await run(page);
        await state(page, "diffusion", "finished");
        assert.ok(await page.locator("#banner").isHidden());
        await close(page);
        await own.stop();
    });

    test("sees a run through while the server shuts down, and says that nothing new is taken", async () => {
        const own = await Server.start();
        const page = await open({ base: own.base, expected: /Failed to load resource|net::ERR/ });
        await longRun(page);
        const stopped = own.stop("SIGTERM");
        await state(page, "diffusion", "finished");
        await page.locator("#banner").waitFor();
        assert.match(await page.locator("#banner").textContent(), /does not answer|shutting down/);
        await idle(page);
        assert.match(await lane(page, "autoregressive").locator(".message").textContent(), /does not answer|shutting down/);
        assert.ok(await page.locator("#run").isDisabled());
        await stopped;
        await close(page);
    });

    test("says that the server is busy", async () => {
        const own = await Server.start({ flags: ["--max-resident", "1", "--queue", "1"] });
        const page = await open({ base: own.base });
        const channel = await own.channel();
        const abort = new AbortController();
        const long = {
            text: PROMPT,
            diffusion: { steps: 200, finish_early: false, suppress_end: true },
            stopping: { max_new_tokens: 200n },
            priority: 10,
        };
        const streams = [0, 1].map(() => channel.stream("/lacuna.v1.Generation/Generate", long, abort.signal));
        await streams[0].next();
        const second = streams[1].next().catch(() => {});
        await eventually("one waits", async () => (await own.load()).waiting === 1);
        await page.locator("#run").click();
        await state(page, "diffusion", "failed");
        assert.match(await lane(page, "diffusion").locator(".message").textContent(), /busy.*Try again in \d+ s/);
        await state(page, "autoregressive", "finished");
        abort.abort();
        await second;
        await close(page);
        await own.stop();
    });

    test("can be used with keys alone", async () => {
        const page = await open();
        for (let presses = 0; (await page.evaluate(() => document.activeElement.id)) !== "prompt"; presses += 1) {
            assert.ok(presses < 12, "the prompt cannot be reached");
            await page.keyboard.press("Tab");
        }
        await page.keyboard.press("Control+a");
        await page.keyboard.insertText(PROMPT);
        await page.keyboard.press("Control+Enter");
        await state(page, "autoregressive", "finished");
        await idle(page);
        const reached = new Set();
        for (let presses = 0; presses < 40 && !reached.has("slider"); presses += 1) {
            await page.keyboard.press("Tab");
            reached.add(
                await page.evaluate(
                    () => document.activeElement.id || document.activeElement.classList[0] || document.activeElement.tagName,
                ),
            );
        }
        for (const stop of [
            "max-new-tokens",
            "temperature",
            "seed",
            "order",
            "chat",
            "hole",
            "run",
            "model",
            "SUMMARY",
            "canvas",
            "play",
            "slider",
        ]) {
            assert.ok(reached.has(stop), `${stop} cannot be reached, but ${[...reached]}`);
        }
        await page.keyboard.press("Home");
        assert.equal(await canvas(page, "diffusion"), PROMPT);
        await page.keyboard.press("Control+/");
        assert.ok(await page.locator("#keys").isVisible());
        await page.keyboard.press("Escape");
        assert.ok(await page.locator("#keys").isHidden());
        assert.ok(await page.evaluate(() => document.activeElement.classList.contains("slider")));
        await close(page);
    });

    test("is light and dark, accessible in both, and keeps what was chosen", async () => {
        const page = await open({ colorScheme: "dark" });
        const brightness = () => page.evaluate(() => /\d+/.exec(getComputedStyle(document.body).backgroundColor)[0] / 1);
        assert.ok((await brightness()) < 60);
        await page.fill("#prompt", PROMPT);
        await run(page);
        await lane(page, "diffusion").locator(".slider").focus();
        await page.keyboard.press("Home");
        await page.keyboard.press("ArrowRight");
        await accessible(page, "dark, in the middle");
        await page.locator("#theme").click();
        assert.ok((await brightness()) > 200);
        await lane(page, "diffusion").locator("summary").click();
        await accessible(page, "light, in the middle");
        await page.reload();
        await page.waitForSelector('[data-server="ready"]');
        assert.ok((await brightness()) > 200);
        assert.equal(await page.locator("#theme").getAttribute("aria-label"), "Theme: light");
        await close(page);
    });

    test("fits a narrow screen", async () => {
        const page = await open({ viewport: { width: 320, height: 700 } });
        await page.fill("#prompt", PROMPT);
        await run(page);
        await lane(page, "diffusion").locator("summary").click();
        assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth));
        const [first, second] = await Promise.all(
            ["diffusion", "autoregressive"].map((kind) => lane(page, kind).boundingBox()),
        );
        assert.ok(second.y >= first.y + first.height && first.width > 280);
        await accessible(page, "narrow");
        await close(page);
    });

    test("is shared by its address", async () => {
        const page = await open();
        await page.fill("#prompt", "# ⟦3⟧ <b>\n");
        await page.fill("#seed", "11");
        await lane(page, "diffusion").locator("summary").click();
        await lane(page, "diffusion").locator(".rule").selectOption("threshold");
        await lane(page, "diffusion").locator(".value").fill("0.75");
        await lane(page, "autoregressive").locator(".model").selectOption("nano");
        await page.locator("#share").click();
        await page.waitForFunction(() => location.hash.length > 10);
        const other = await open({ hash: new URL(page.url()).hash });
        const settings = (page) =>
            page.evaluate(() =>
                [...document.querySelectorAll("input, select:not(#examples), textarea")].map((control) =>
                    control.type === "checkbox" ? control.checked : control.value,
                ),
            );
        assert.deepEqual(await settings(other), await settings(page));
        assert.equal(await other.locator("#prompt").inputValue(), "# ⟦3⟧ <b>\n");
        assert.equal(await lane(other, "autoregressive").locator(".model").inputValue(), "nano");
        // An address that makes no sense is none.
        const broken = await open({ hash: "#%F0garbage" });
        assert.match(await broken.locator("#prompt").inputValue(), /^# /);
        for (const one of [page, other, broken]) await close(one);
    });

    test("copies the text", async () => {
        const page = await open();
        await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
        await page.fill("#prompt", PROMPT);
        await run(page);
        await lane(page, "diffusion").locator(".copy").click();
        await page.waitForFunction(() => document.querySelector(".copy").textContent === "Copied");
        assert.equal(PROMPT + (await page.evaluate(() => navigator.clipboard.readText())), await canvas(page, "diffusion"));
        await close(page);
    });

    test("makes do with one model", async () => {
        const own = await Server.start({ models: ["models/nano-ar"] });
        const page = await open({ base: own.base });
        assert.equal(await lane(page, "diffusion").locator(".model").inputValue(), "-");
        await page.fill("#prompt", PROMPT);
        await run(page);
        await state(page, "autoregressive", "finished");
        assert.equal(await canvas(page, "diffusion"), "");
        // The other lane can have the same model, to go on in another way.
        await lane(page, "diffusion").locator(".model").selectOption("nano-ar");
        await lane(page, "diffusion").locator("summary").click();
        await lane(page, "diffusion").locator(".drafter").selectOption("DRAFTER_MEDUSA");
        await run(page);
        assert.equal(await canvas(page, "diffusion"), await canvas(page, "autoregressive"));
        assert.match(await page.locator("#outcome").textContent(), /Both wrote the same text/);
        await close(page);
        await own.stop();
    });

    test("asks for a token where the server wants one, and keeps it for the tab alone", async (context) => {
        const { token, file } = await makeToken();
        context.after(() => rm(file));
        const own = await Server.start({ flags: ["--tokens", file] });
        const page = await open({ base: own.base, ready: false, expected: /status of 401/ });
        await page.waitForSelector('[data-server="locked"]');
        assert.match(await page.locator("#banner").textContent(), /wants a bearer token/);
        await page.fill("#token", "lacuna_wrong");
        await page.keyboard.press("Enter");
        await page.waitForFunction(() => /does not take this token/.test(document.getElementById("banner").textContent));
        await page.fill("#token", token);
        await page.keyboard.press("Enter");
        await page.waitForSelector('[data-server="ready"]');
        assert.ok(await page.locator("#access").isHidden());
        await run(page);
        await state(page, "diffusion", "finished");
        await page.locator("#share").click();
        await page.waitForFunction(() => location.hash.length > 10);
        assert.ok(!atob(new URL(page.url()).hash.slice(1).replaceAll("-", "+").replaceAll("_", "/")).includes(token));
        assert.deepEqual(await page.evaluate(() => [localStorage.length, sessionStorage.length]), [0, 1]);
        await close(page);
        await own.stop();
    });
});
