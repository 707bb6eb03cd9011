// The page: puts prompt, settings and lanes together, runs them, and says what goes wrong where it belongs.

import { Connection } from "./connection.js";
import { EXAMPLES } from "./examples.js";
import { outcome } from "./figures.js";
import { CallError } from "./grpc.js";
import { copy, Lane } from "./lane.js";
import { parse, PromptBox } from "./prompt.js";
import { Replay } from "./replay.js";
import { clearProblems, FieldProblem, real, showProblem, whole } from "./settings.js";
import * as share from "./share.js";
import { startTheme } from "./theme.js";

const $ = (id) => document.getElementById(id);

const replay = new Replay(({ lanes: playing }) => {
    for (const lane of lanes) lane.showPlaying(playing.includes(lane));
});
const lanes = ["diffusion", "autoregressive"].map((kind) => new Lane(kind, replay));
$("lanes").append(...lanes.map((lane) => lane.root));

const connection = new Connection(connected);
const prompt = new PromptBox($("prompt"), $("backdrop"), countTokens);
/** Cancels what runs; nothing if nothing does. */
let running;

// --- the server ---

const BANNERS = {
    away: "The server does not answer. Perhaps it was stopped, or is starting again: this page goes on asking, and says so when it is back.",
    unready:
        "The server is starting or shutting down, and takes no requests. This page goes on asking, and says so when it does.",
    back: "The server is back. What it was doing for this page is lost: run it again.",
    locked: "The server wants a bearer token.",
};
const STATES = { ready: "connected", away: "no answer", unready: "not ready", locked: "locked" };

function connected({ state, before, models, error }) {
    document.body.dataset.server = state;
    $("access").hidden = state !== "locked";
    const missed = state === "ready" && (before === "away" || before === "unready");
    say(
        state === "locked" && connection.token
            ? `The server does not take this token: ${error.message}`
            : (BANNERS[missed ? "back" : state] ?? ""),
        missed,
    );
    $("server").textContent = STATES[state];
    if (state === "locked") $("token").focus();
    if (models) {
        for (const lane of lanes) lane.setModels(models);
        $("server").textContent = models.length === 1 ? models[0].name : `${models.length} models`;
        $("max-new-tokens").placeholder = String(lanes.find((lane) => lane.model)?.model.default_max_new_tokens ?? "");
    }
    $("run").disabled = state !== "ready" && !running;
}

/** Above everything, since it concerns everything. */
function say(message, good = false) {
    $("banner").hidden = message === "";
    $("banner").classList.toggle("good", good);
    // Said once, however often it is found.
    if ($("banner").textContent !== message) $("banner").textContent = message;
}

async function countTokens(text) {
    const model = lanes.find((lane) => lane.model?.capabilities.infill)?.model.name ?? "";
    const { tokens } = await connection.channel.unary(
        "/lacuna.v1.Tokenization/Tokenize",
        { model, text },
        AbortSignal.timeout(2000),
    );
    return tokens.length;
}

// --- running ---

/** What all lanes are asked, as fields of a GenerateRequest. */
function sharedRequest() {
    const { text, template } = parse(prompt.text);
    if ($("chat").checked && template)
        throw new FieldProblem("prompt", "a chat message has no holes: send it as it is, or take them out");
    const max_new_tokens = template ? undefined : whole($("max-new-tokens"), "stopping.max_new_tokens");
    return {
        ...($("chat").checked ? { chat: { messages: [{ role: "user", content: text }] } } : { text }),
        template,
        stopping: max_new_tokens === undefined ? undefined : { max_new_tokens },
        sampling: { temperature: real($("temperature"), "sampling.temperature"), seed: whole($("seed"), "sampling.seed") },
    };
}

async function run() {
    clearProblems(document);
    replay.stop();
    $("outcome").textContent = "";
    if (connection.state === "ready") say("");
    const able = [];
    let request;
    try {
        request = sharedRequest();
        for (const lane of lanes) {
            lane.reset();
            if (!lane.model) continue;
            lane.methodMessage();
            const reason = lane.unable(request);
            if (reason) lane.refuse(reason);
            else able.push(lane);
        }
    } catch (error) {
        if (!(error instanceof FieldProblem)) throw error;
        showProblem([$("request"), $("lanes")], error.field, error.message);
        return;
    }
    if (able.length === 0) {
        $("outcome").textContent = "No lane has a model that can do this.";
        return;
    }
    running = new AbortController();
    showRunning(true);
    try {
        await runLanes(able, request, running.signal);
    } finally {
        running = undefined;
        showRunning(false);
    }
    conclude(able);
}

async function runLanes(able, request, signal) {
    const before = request.chat ? "" : (request.text ?? "");
    const one = (lane) => lane.run(connection.channel, request, before, signal).catch((error) => failed(lane, error, signal));
    if ($("order").value === "at-once") {
        await Promise.all(able.map(one));
        return;
    }
    for (const lane of able) lane.wait(before);
    for (const lane of able) {
        if (signal.aborted || connection.state !== "ready") lane.say("not run");
        else await one(lane);
    }
}

function failed(lane, error, signal) {
    if (signal.aborted) {
        lane.say("cancelled");
        return;
    }
    if (!(error instanceof CallError)) {
        lane.say(`This page failed: ${error.message}`, true);
        throw error;
    }
    const gone = connection.failed(error);
    const again = error.retrySeconds === undefined ? "" : `. Try again in ${Math.ceil(error.retrySeconds)} s`;
    const messages = {
        UNREACHABLE: "The server does not answer.",
        BROKEN: "The server went away in the middle of this.",
        RESOURCE_EXHAUSTED: `${again ? "The server is busy" : "This is too much for the server"}: ${error.message}${again}`,
        UNAVAILABLE: `${error.message}${again}`,
        DEADLINE_EXCEEDED: "This took longer than the server allows.",
        UNAUTHENTICATED: "This needs a token.",
    };
    lane.say(messages[error.code] ?? error.message, true);
    if (gone) return;
    const shown = error.violations.filter(({ field, description }) =>
        showProblem([lane.root, $("request")], field, description),
    );
    if (shown.length > 0) lane.say("not run: see the marked field", true);
}

/** What came of it; runs that were over too soon to be watched are played again, slowed, unless motion is unwelcome. */
function conclude(able) {
    const finished = able.filter((lane) => lane.recording.finished);
    $("race").disabled = finished.length === 0;
    if (finished.length === 2) $("outcome").textContent = outcome(...finished);
    else if (finished.length === 1) $("outcome").textContent = `${finished[0].find("h2").textContent} has finished.`;
    const seconds = Math.max(0, ...finished.map((lane) => lane.recording.finished.usage.decoding_seconds));
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (finished.length > 0 && seconds < 1.5 && !still) race();
}

function race() {
    const finished = lanes.filter((lane) => lane.recording.finished);
    if (finished.length === 0) return;
    const slower = replay.play(finished, { fromStart: true });
    const words =
        slower >= 1 ? `slowed ${slower.toFixed(slower < 10 ? 1 : 0)} times` : `hurried ${(1 / slower).toFixed(1)} times`;
    $("race").textContent = `Replay on one clock (${words})`;
}

function showRunning(on) {
    document.body.dataset.running = String(on);
    $("run").textContent = on ? "Cancel" : "Run";
    $("run").title = on ? "Esc" : "Ctrl+Enter";
    $("run").classList.toggle("running", on);
    $("race").disabled = on;
    $("run").disabled = !on && connection.state !== "ready";
}

function toggleRun() {
    if (running) running.abort(new DOMException("cancelled", "AbortError"));
    else if (!$("run").disabled) run();
}

// --- the form ---

const FIELDS = ["max-new-tokens", "temperature", "seed", "order"];

function state() {
    const fields = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
    return { prompt: prompt.text, chat: $("chat").checked, ...fields, lanes: lanes.map((lane) => lane.settings) };
}

function restore() {
    const found = share.decode(location.hash, state());
    prompt.text = found?.prompt ?? EXAMPLES[0].prompts[0][1];
    if (!found) return;
    $("chat").checked = found.chat;
    for (const id of FIELDS) $(id).value = found[id];
    found.lanes.forEach((settings, at) => lanes[at].restore(settings));
}

function fillExamples() {
    EXAMPLES.forEach(({ group, prompts }, at) => {
        const element = document.createElement("optgroup");
        element.label = group;
        element.append(...prompts.map(([name], index) => new Option(name, `${at}.${index}`)));
        $("examples").append(element);
    });
}

function useExample() {
    const [at, index] = $("examples").value.split(".").map(Number);
    const { chat = false, maxNewTokens = "", prompts } = EXAMPLES[at];
    prompt.text = prompts[index][1];
    $("chat").checked = chat;
    $("max-new-tokens").value = maxNewTokens;
    $("examples").value = "";
    $("prompt").focus();
}

async function shareAddress() {
    history.replaceState(null, "", `#${share.encode(state())}`);
    const copied = await copy(location.href);
    $("share").textContent = copied ? "Address copied" : "See the address";
    setTimeout(() => ($("share").textContent = "Share"), 2000);
}

function key(event) {
    const control = event.ctrlKey || event.metaKey;
    if (control && event.key === "Enter") {
        if (!running) toggleRun();
    } else if (control && event.key === "m" && document.activeElement === $("prompt")) prompt.makeHole();
    else if (control && event.key === "/") $("keys").showModal();
    else if (event.key === "Escape" && !$("keys").open && (running || replay.playing)) {
        if (running) toggleRun();
        else replay.finish();
    } else return;
    event.preventDefault();
}

fillExamples();
restore();
startTheme($("theme"));
$("request").addEventListener("submit", (event) => {
    event.preventDefault();
    toggleRun();
});
$("access").addEventListener("submit", (event) => {
    event.preventDefault();
    connection.token = $("token").value.trim();
    $("token").value = "";
});
$("examples").addEventListener("change", useExample);
// The selection in the box is what the hole is made of: a press must not take it away.
$("hole").addEventListener("pointerdown", (event) => event.preventDefault());
$("hole").addEventListener("click", () => prompt.makeHole());
$("race").addEventListener("click", race);
$("share").addEventListener("click", shareAddress);
for (const lane of lanes) lane.root.addEventListener("seed", ({ detail }) => ($("seed").value = detail));
$("help").addEventListener("click", () => $("keys").showModal());
addEventListener("keydown", key);
addEventListener("hashchange", restore);
connection.open();
