// One lane: a model, how it is to decode, its canvas, and what came of it.

import { CallError } from "./grpc.js";
import { Recording } from "./canvas.js";
import { FieldProblem, options, real, whole } from "./settings.js";
import { CanvasView } from "./view.js";
import { figures, rate } from "./figures.js";
import { page, Preview } from "./preview.js";

const DRAFTERS = {
    DRAFTER_REDRAFTER: "ReDrafter",
    DRAFTER_MEDUSA: "Medusa",
    DRAFTER_CHAIN: "a chain of draws",
    DRAFTER_LOOKUP: "prompt lookup",
};
const RULES = { steps: "Steps", threshold: "Threshold", factor: "Factor", entropy_bound: "Nats" };
const ORDERS = {
    ORDER_CONFIDENCE: "confident first",
    ORDER_MARGIN: "clearest first",
    ORDER_ENTROPY: "lowest entropy first",
    ORDER_RANDOM: "in any order",
    ORDER_LEFT_TO_RIGHT: "left to right",
};

/** What a lane's settings are called where the page is shared. */
const SETTINGS = ["model", "method", "rule", "value", "block-length", "order", "drafter", "draft-length"];

export class Lane {
    /** `kind` is what it is for: "diffusion" or "autoregressive". `replay` plays it. */
    constructor(kind, replay) {
        this.kind = kind;
        this.replay = replay;
        this.root = document.getElementById("lane").content.cloneNode(true).firstElementChild;
        this.root.dataset.kind = kind;
        this.view = new CanvasView(this.find(".canvas"));
        this.preview = new Preview(this.find(".preview"), this.find(".frame"));
        this.models = [];
        this.wanted = {};
        this.prompt = "";
        this.reset();
        this.listen();
    }

    find(selector) {
        return this.root.querySelector(selector);
    }

    listen() {
        this.find(".rule").addEventListener("input", () => (this.find(".value").value = this.usualValue()));
        for (const control of this.root.querySelectorAll(".head select, .options select, .options input")) {
            control.addEventListener("input", () => this.settle());
        }
        this.find(".play").addEventListener("click", () => this.toggle());
        this.find(".slider").addEventListener("input", ({ target }) => {
            this.replay.stop();
            this.show(Number(target.value));
        });
        this.find(".canvas").addEventListener("keydown", (event) => this.key(event));
        this.find(".copy").addEventListener("click", () => this.copy());
        this.find(".seed").addEventListener("click", () =>
            this.root.dispatchEvent(new CustomEvent("seed", { detail: this.seed })),
        );
    }

    /** The seed in force, as digits. */
    get seed() {
        const seed = this.recording.started?.sampling?.seed;
        return seed === undefined ? undefined : String(seed);
    }

    key(event) {
        if (event.ctrlKey || event.altKey || event.metaKey || this.find(".slider").disabled) return;
        const moves = { ArrowLeft: this.position - 1, ArrowRight: this.position + 1, Home: 0, End: this.recording.length };
        if (event.key === " ") this.toggle();
        else if (event.key in moves) {
            this.replay.stop();
            this.show(Math.min(Math.max(moves[event.key], 0), this.recording.length));
        } else return;
        event.preventDefault();
    }

    toggle() {
        if (this.replay.lanes.includes(this)) this.replay.stop();
        else this.replay.play([this]);
    }

    // --- settings ---

    /** Takes the models that the server has. A lane that was told to use another one goes back to what it is for. */
    setModels(models) {
        this.models = models;
        const usual = this.usualModel();
        const select = this.find(".model");
        const chosen = this.wanted.model ?? (select.value || undefined);
        options(select, [...models.map((model) => [model.name, model.name]), ["-", "no model: leave it empty"]]);
        const known = chosen === "-" || models.some((model) => model.name === chosen);
        select.value = known ? chosen : (usual?.name ?? "-");
        this.settle();
        if (!this.settled && this.model) {
            this.settled = true;
            if (this.method === "diffusion") this.useSteps();
            this.restore(this.wanted);
        }
        this.wanted = {};
    }

    usualModel() {
        const can = ({ capabilities }) =>
            this.kind === "diffusion" ? capabilities.diffusion : capabilities.autoregressive && !capabilities.diffusion;
        return this.models.find(can) ?? this.models.find(({ capabilities }) => capabilities[this.kind]);
    }

    /** To begin with, so many steps that one sees them. */
    useSteps() {
        this.find(".rule").value = "steps";
        this.find(".value").value = this.usualValue();
        this.settle();
    }

    usualValue() {
        const usual = {
            steps: String(Math.max(Math.floor((this.model?.default_max_new_tokens ?? 48) / 6), 1)),
            threshold: "0.9",
            factor: "1",
            entropy_bound: "0.5",
        };
        return usual[this.find(".rule").value] ?? "";
    }

    get model() {
        return this.models.find((model) => model.name === this.find(".model").value);
    }

    get method() {
        const { capabilities } = this.model ?? {};
        if (!capabilities) return this.kind;
        if (capabilities.diffusion && capabilities.autoregressive) return this.find(".method").value;
        return capabilities.diffusion ? "diffusion" : "autoregressive";
    }

    /** Shows what goes with the model and the method. */
    settle() {
        const { model, method } = this;
        this.root.dataset.method = method;
        this.root.dataset.empty = String(!model);
        this.root.dataset.both = String(Boolean(model?.capabilities.diffusion && model.capabilities.autoregressive));
        const rule = this.find(".rule").value;
        this.find(".value-name").textContent = RULES[rule] ?? "Value";
        this.find(".value").disabled = rule === "";
        const drafters = (model?.drafters ?? []).map(({ drafter }) => [drafter, DRAFTERS[drafter] ?? drafter]);
        options(this.find(".drafter"), [["DRAFTER_NONE", "none"], ...drafters]);
        this.find(".draft-length").disabled = this.find(".drafter").value === "DRAFTER_NONE";
        this.find("h2").textContent = method === "diffusion" ? "Diffusion" : "Autoregression";
        this.root.setAttribute("aria-label", `${this.find("h2").textContent} lane`);
        this.find(".canvas").setAttribute("aria-label", `${this.find("h2").textContent}: canvas`);
        this.find(".slider").setAttribute("aria-label", `${this.find("h2").textContent}: step`);
        this.find("summary").textContent = model ? this.summary() : "nothing";
    }

    summary() {
        if (this.method === "autoregressive") {
            const drafter = this.find(".drafter");
            return drafter.value === "DRAFTER_NONE" ? "one token at a time" : `drafts by ${drafter.selectedOptions[0].text}`;
        }
        const value = this.find(".value").value;
        const rule = {
            steps: `${value} steps`,
            threshold: `threshold ${value}`,
            factor: `factor ${value}`,
            entropy_bound: `entropy up to ${value}`,
        }[this.find(".rule").value];
        const block = this.find(".block-length").value;
        return [rule ?? "the model's own pace", block && `blocks of ${block}`, ORDERS[this.find(".order").value]]
            .filter(Boolean)
            .join(" · ");
    }

    get settings() {
        return Object.fromEntries(SETTINGS.map((name) => [name, this.find(`.${name}`).value]));
    }

    /** Takes settings back; before the models are known, when they are. */
    restore(settings) {
        if (this.models.length === 0) this.wanted = settings;
        for (const [name, value] of Object.entries(settings)) {
            const control = this.find(`.${name}`);
            if (control.matches("input") || [...control.options].some((option) => option.value === value))
                control.value = value;
            // What a select holds may depend on those before it.
            if (this.models.length > 0) this.settle();
        }
    }

    /** The method as a GenerateRequest has it. Throws FieldProblem for what cannot be sent. */
    methodMessage() {
        if (this.method === "autoregressive") {
            const drafter = this.find(".drafter").value;
            const draft_length =
                drafter === "DRAFTER_NONE" ? undefined : whole(this.find(".draft-length"), "autoregressive.draft_length");
            return { autoregressive: { drafter, draft_length } };
        }
        const rule = this.find(".rule").value;
        const diffusion = {
            block_length: whole(this.find(".block-length"), "diffusion.block_length"),
            order: this.find(".order").value || undefined,
        };
        if (rule !== "") {
            const path = `diffusion.${rule}`;
            const value = rule === "steps" ? whole(this.find(".value"), path) : real(this.find(".value"), path);
            if (value === undefined) throw new FieldProblem(path, "it must have a value");
            diffusion[rule] = value;
        }
        return { diffusion };
    }

    /** Why this lane cannot do a request, if it cannot. */
    unable({ template }) {
        if (template && !this.model.capabilities.infill)
            return `${this.model.name} writes from left to right: it cannot fill a hole.`;
        return undefined;
    }

    // --- running ---

    reset() {
        this.recording = new Recording();
        this.position = 0;
        this.root.dataset.state = "empty";
        this.say("");
        this.preview.offer(undefined);
        this.draw([]);
    }

    say(message, failed = false) {
        this.find(".message").textContent = message;
        this.find(".message").classList.toggle("failed", failed);
    }

    /** Says why it does not run at all. */
    refuse(reason) {
        this.reset();
        this.root.dataset.state = "refused";
        this.say(reason);
    }

    wait(prompt) {
        this.reset();
        this.prompt = prompt;
        this.root.dataset.state = "waiting";
        this.draw([]);
        this.say("waits for its turn");
    }

    /** Runs a request to its end. Throws what the call throws, with all that came until then still shown. */
    async run(channel, request, prompt, signal) {
        this.wait(prompt);
        this.say("");
        this.root.dataset.state = "running";
        this.find(".canvas").setAttribute("aria-busy", "true");
        this.recording = new Recording(this.model.end_token_ids);
        try {
            for await (const event of channel.stream(
                "/lacuna.v1.Generation/Generate",
                { model: this.model.name, ...request, ...this.methodMessage() },
                signal,
            )) {
                this.recording.apply(event);
                this.drawSoon();
            }
            if (!this.recording.finished) throw new CallError("BROKEN", "the server ended the call too early");
            this.root.dataset.state = "finished";
        } catch (error) {
            this.root.dataset.state = signal.aborted ? "cancelled" : "failed";
            throw error;
        } finally {
            this.find(".canvas").removeAttribute("aria-busy");
            cancelAnimationFrame(this.drawing);
            this.drawing = undefined;
            this.show(this.recording.length);
            if (this.recording.finished) this.preview.offer(page(this.prompt, this.recording.text, Boolean(request.chat)));
        }
    }

    /** At most once per frame of the screen, however many events come. */
    drawSoon() {
        this.drawing ??= requestAnimationFrame(() => {
            this.drawing = undefined;
            this.show(this.recording.length);
        });
    }

    // --- showing ---

    /** Shows the canvas behind so many steps; `clock` is the time in seconds that a replay has come to. */
    show(position, { clock } = {}) {
        const { recording } = this;
        this.position = position;
        const done = recording.finished && position === recording.length;
        this.draw(done ? recording.finalCells() : recording.cellsAt(position), clock);
    }

    draw(cells, clock) {
        const { recording, position } = this;
        const done = Boolean(recording.finished) && position === recording.length;
        this.root.dataset.done = String(done);
        this.root.dataset.autoregressive = String(Boolean(recording.started?.autoregressive));
        this.view.show(this.prompt, cells);
        const running = this.root.dataset.state === "running";
        const slider = this.find(".slider");
        slider.max = String(recording.length);
        slider.value = String(position);
        slider.disabled = running || recording.length === 0;
        this.find(".play").disabled = slider.disabled;
        this.find(".copy").disabled = recording.text === "";
        const step = recording.steps[position - 1]?.step;
        const words = recording.started
            ? step === undefined
                ? "before the first step"
                : `step ${step + 1} of ${recording.steps.at(-1).step + 1}`
            : "";
        slider.setAttribute("aria-valuetext", words);
        this.find(".position").textContent = words;
        const usage = recording.finished?.usage;
        this.find(".rate").replaceChildren(...rate(usage, clock));
        if (this.told !== usage) this.find(".figures").replaceChildren(...figures(usage, recording));
        this.told = usage;
        this.find(".seed").hidden = this.seed === undefined;
        this.find(".seed").textContent = `Seed ${this.seed}`;
    }

    /** Follows the replay: whether this lane is playing. */
    showPlaying(playing) {
        const button = this.find(".play");
        button.textContent = playing ? "❚❚" : "▶";
        button.setAttribute("aria-label", playing ? "Pause" : "Play");
    }

    async copy() {
        const { text } = this.recording;
        const copied = await copy(text);
        const button = this.find(".copy");
        button.textContent = copied ? "Copied" : "Cannot copy";
        setTimeout(() => (button.textContent = "Copy"), 1500);
    }
}

/** Browsers give pages that came without encryption no clipboard, but a selection they copy. */
export async function copy(text) {
    if (navigator.clipboard)
        return navigator.clipboard.writeText(text).then(
            () => true,
            () => false,
        );
    const before = document.activeElement;
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    before?.focus();
    return copied;
}
