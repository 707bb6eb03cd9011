// The page's parts that need no browser, on what a real server sends.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { Recording } from "../../../src/http/page/canvas.js";
import { frames } from "../../../src/http/page/grpc.js";
import { page } from "../../../src/http/page/preview.js";
import { parse } from "../../../src/http/page/prompt.js";
import * as share from "../../../src/http/page/share.js";
import { Server } from "./server.mjs";

const GENERATE = "/lacuna.v1.Generation/Generate";
const REQUEST = "lacuna.v1.GenerateRequest";
const PROMPT = "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n";
const TEXT = "    return sum(x for x in xs if x > 17)\n";

let server;
let channel;

before(async () => {
    server = await Server.start();
    channel = await server.channel();
});
after(() => server?.stop());

async function events(request) {
    const all = [];
    for await (const event of channel.stream(GENERATE, request)) all.push(event);
    return all;
}

function recorded(all, ends = [0]) {
    const recording = new Recording(ends);
    for (const event of all) recording.apply(event);
    return recording;
}

const text = (cells) => cells.map((cell) => cell.text).join("");
const committed = (cells) => cells.filter((cell) => cell.look === "committed").length;

test("a schema read at run time finds every method and writes what the server reads", async () => {
    assert.ok(channel.schema.methods.get(GENERATE).streaming);
    assert.equal(channel.schema.methods.get("/lacuna.v1.Models/List").output, "lacuna.v1.ListModelsResponse");
    const seed = 18446744073709551615n;
    const [{ started }] = await events({
        text: PROMPT,
        sampling: {
            seed,
            temperature: 0.25,
            logit_bias: new Map([
                [7, -0.5],
                [940, 2],
            ]),
        },
        priority: -10,
    });
    assert.equal(started.sampling.seed, seed);
    assert.equal(started.sampling.temperature, 0.25);
    assert.deepEqual(
        started.sampling.logit_bias,
        new Map([
            [7, -0.5],
            [940, 2],
        ]),
    );
    assert.equal(started.model, "nano");
    assert.equal(started.canvas.length, 48);
});

test("every kind of field comes back as it was", () => {
    const request = {
        request_id: "a-1",
        model: "näno ✓",
        text: "\ufeff# 🙂\n",
        template: [{ hole: 3 }, { text: "" }, { token_ids: { token_ids: [0, 1, 300, 4294967295] } }],
        sampling: {
            temperature: -1e-300,
            top_k: 4294967295,
            seed: 2n ** 63n,
            logit_bias: new Map([
                [1, 0.5],
                [2, -0.25],
            ]),
        },
        diffusion: {
            steps: 0,
            schedule: "SCHEDULE_TIMESTEPS",
            order: "ORDER_UNSPECIFIED",
            independent: false,
            cache: "DIFFUSION_CACHE_DUAL",
            eps: 0.125,
        },
        stopping: { stop: ["", "\u0000", "x".repeat(300)] },
        step_events: false,
        priority: -2147483648,
    };
    const { schema } = channel;
    const back = schema.decode(REQUEST, schema.encode(REQUEST, request));
    assert.deepEqual(back, request);
    assert.deepEqual(schema.decode(REQUEST, schema.encode(REQUEST, back)), request);
    assert.throws(() => schema.encode(REQUEST, { txt: "" }), /has no field txt/);
    assert.throws(() => schema.encode(REQUEST, { diffusion: { order: "ORDER_OF_BATTLE" } }), /has no ORDER_OF_BATTLE/);
    // Of a oneof the last one counts.
    const both = new Uint8Array([
        ...schema.encode(REQUEST, { text: "a" }),
        ...schema.encode(REQUEST, { chat: { messages: [] } }),
    ]);
    assert.deepEqual([schema.decode(REQUEST, both).text, schema.decode(REQUEST, both).chat], [undefined, { messages: [] }]);
});

test("bytes that are no message are refused and never read beyond their end", () => {
    const { schema } = channel;
    const bytes = schema.encode(REQUEST, {
        text: PROMPT,
        sampling: { seed: 2n ** 40n, logit_bias: new Map([[1, 0.5]]) },
        diffusion: { threshold: 0.5 },
        template: [{ hole: 300 }],
    });
    for (let length = 0; length < bytes.length; length += 1) {
        try {
            schema.decode(REQUEST, bytes.subarray(0, length));
        } catch (error) {
            assert.ok(error instanceof RangeError, String(error));
        }
    }
    assert.throws(() => schema.decode(REQUEST, Uint8Array.of(0x1a, 0xff, 0xff, 0xff, 0xff, 0x0f)), RangeError);
    assert.throws(() => schema.decode(REQUEST, new Uint8Array(11).fill(0x80)), RangeError);
    assert.throws(() => schema.decode(REQUEST, Uint8Array.of(0x0b)), RangeError);
    // What a later server adds is passed over.
    assert.equal(schema.decode(REQUEST, Uint8Array.of(0x98, 0x75, 0x07, 0x1a, 0x01, 0x61)).text, "a");
});

test("an error is a code with its details", async () => {
    await assert.rejects(events({ text: PROMPT, diffusion: { steps: 0 } }), ({ code, message, violations }) => {
        assert.equal(code, "INVALID_ARGUMENT");
        assert.match(message, /^diffusion\.steps: 0 is not/);
        assert.deepEqual(
            violations.map(({ field }) => field),
            ["diffusion.steps"],
        );
        return true;
    });
    await assert.rejects(
        events({ text: PROMPT, model: "größer" }),
        ({ code, message }) => code === "NOT_FOUND" && message.includes("größer"),
    );
    await assert.rejects(channel.unary("/lacuna.v1.Models/Guess", {}), ({ code }) => code === "UNIMPLEMENTED");
});

test("frames are the same however their bytes fall", async () => {
    const body = channel.schema.encode(REQUEST, { text: PROMPT, diffusion: { steps: 4 } });
    const framed = new Uint8Array([0, 0, 0, 0, body.length, ...body]);
    const response = await fetch(server.base + GENERATE, {
        method: "POST",
        headers: { "content-type": "application/grpc-web+proto" },
        body: framed,
    });
    const bytes = new Uint8Array(await response.arrayBuffer());
    const read = async (size) => {
        const found = [];
        const pieces = new ReadableStream({
            start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
            },
        });
        for await (const frame of frames(pieces))
            found.push({ flags: frame.flags, bytes: Buffer.from(frame.bytes).toString("hex") });
        return found;
    };
    const whole = await read(bytes.length);
    assert.ok(whole.length > 4 && whole.at(-1).flags === 0x80);
    assert.deepEqual(await read(1), whole);
    assert.deepEqual(await read(7), whole);
    const cut = new Response(bytes.slice(0, bytes.length - 3)).body;
    await assert.rejects(
        async () => {
            for await (const _ of frames(cut));
        },
        ({ code }) => code === "BROKEN",
    );
});

test("replaying every step rebuilds the canvas and ends in the text", async () => {
    const recording = recorded(await events({ text: PROMPT, diffusion: { steps: 48, finish_early: false } }));
    assert.equal(recording.length, 48);
    assert.equal(recording.text, TEXT);
    for (let position = 0; position <= recording.length; position += 1)
        assert.equal(committed(recording.cellsAt(position)), position);
    assert.ok(recording.cellsAt(0).every((cell) => cell.look === "masked" && cell.text === ""));
    assert.ok(recording.cellsAt(1).some((cell) => cell.look === "guess" && cell.confidence > 0));
    assert.equal(text(recording.finalCells()), TEXT);
    // Backwards and across, the same.
    const canvas = (position) => recording.cellsAt(position).map(({ look, text }) => [look, text]);
    const forwards = Array.from({ length: 49 }, (_, position) => canvas(position));
    for (const position of [48, 3, 31, 32, 0, 47, 1]) assert.deepEqual(canvas(position), forwards[position]);
    // Cells that a step leaves alone are the same objects.
    const [before, behind] = [recording.cellsAt(20), recording.cellsAt(21)];
    assert.ok(before.every((cell, at) => cell.look !== "committed" || cell.change || behind[at] === cell));
});

test("autoregression is recorded alike, and time passes with the steps", async () => {
    const recording = recorded(
        await events({ model: "nano-ar", text: PROMPT, autoregressive: { drafter: "DRAFTER_REDRAFTER", adapt: false } }),
    );
    assert.equal(text(recording.finalCells()), TEXT);
    assert.ok(recording.finished.usage.speculation.acceptance_length > 1);
    const times = Array.from({ length: recording.length + 1 }, (_, position) => recording.secondsAt(position));
    assert.equal(times[0], 0);
    assert.ok(times.every((time, at) => at === 0 || time > times[at - 1]));
    // Sums of parts, which round.
    assert.ok(Math.abs(times.at(-1) - recording.finished.usage.decoding_seconds) < 1e-9);
    assert.deepEqual(
        times.map((time) => recording.positionAt(time)),
        times.map((_, position) => position),
    );
});

test("infilled text is given text and found text, in one", async () => {
    const { text: prompt, template } = parse(
        "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n    return sum(⟦5⟧ if x > 7)\n",
    );
    assert.deepEqual(template, [{ hole: 5 }, { text: " if x > 7)\n" }]);
    const recording = recorded(await events({ text: prompt, template }));
    assert.equal(text(recording.finalCells()), "x for x in xs if x > 7)\n");
    assert.deepEqual(parse("⟦2⟧⟦03⟧"), { template: [{ hole: 2 }, { hole: 3 }] });
    assert.deepEqual(parse("a [2] ⟦x⟧"), { text: "a [2] ⟦x⟧" });
});

// No decoder here masks again or edits yet, but the API has both.
test("edits and cells that are masked again are seen", () => {
    const recording = new Recording([9]);
    const edit = (position, text, status, token_id = 1) => ({
        position,
        token_id,
        text,
        status: `EDIT_STATUS_${status}`,
        confidence: 0.5,
    });
    const step = (step, ...edits) => recording.apply({ step: { step, block: 0, edits } });
    recording.apply({
        started: {
            canvas: [
                { token_id: 0, text: "<mask>", masked: true },
                { token_id: 0, text: "<mask>", masked: true },
            ],
        },
    });
    step(0, edit(0, "a", "COMMITTED"), edit(1, "b", "PROVISIONAL"), edit(99, "far", "COMMITTED"), edit(1, "?", "UNKNOWN"));
    step(1, edit(0, "c", "EDITED"), edit(1, "b", "COMMITTED"));
    step(2, edit(1, "<mask>", "REMASKED"));
    step(4, edit(1, "d", "PROVISIONAL"));
    step(5, edit(1, "<end>", "COMMITTED", 9));
    const looks = Array.from({ length: 6 }, (_, position) =>
        recording.cellsAt(position).map(({ look, text, change }) => [look, text, change].filter(Boolean).join(" ")),
    );
    assert.deepEqual(looks, [
        ["masked", "masked"],
        ["committed a committed", "guess b"],
        ["committed c edited", "committed b committed"],
        ["committed c", "masked remasked"],
        ["committed c", "guess d"],
        ["committed c", "committed <end> committed"],
    ]);
    const [first, second] = recording.cellsAt(5);
    assert.deepEqual([first.edited, second.edited, second.end], [true, true, true]);
    assert.ok(recording.cellsAt(4)[1].remasked);
    // A text that no cells spell out is right all the same.
    recording.apply({ committed: { text: "c…" } });
    recording.apply({ finished: {} });
    assert.equal(text(recording.finalCells()), "c…");
    assert.throws(() => new Recording().apply({ step: { edits: [] } }), /not Started/);
});

test("a shared state comes back, and nothing else comes with it", () => {
    const state = { prompt: "🙂⟦8⟧\n", chat: true, lanes: [{ model: "nano" }, { model: "-" }] };
    const expected = { prompt: "", chat: false, lanes: [{ model: "" }, { model: "" }] };
    assert.deepEqual(share.decode(`#${share.encode(state)}`, expected), state);
    const hostile = { prompt: 7, chat: "yes", lanes: "none", token: "x", extra: {} };
    assert.deepEqual(share.decode(share.encode(hostile), expected), expected);
    for (const fragment of ["", "#", "#%%%", "#AAAA", `#${share.encode(null).slice(1)}`, "#".padEnd(200_001, "A")])
        assert.equal(share.decode(fragment, expected), undefined);
});

test("a page is found where there is one", () => {
    assert.equal(page("", "Here:\n```html\n<p>1</p>\n```\nDone", true), "<p>1</p>\n");
    assert.equal(page("Snake:\n<!DOCTYPE html>\n<html>", "<p>", false), "<!DOCTYPE html>\n<html><p>");
    assert.equal(page("<html>", "return 1", true), undefined);
    assert.equal(page("def f(x):\n", "    return x < html\n", false), undefined);
});
