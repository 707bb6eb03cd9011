// Keeps in touch with the server: the schema and the models that it serves, and whether it is there at all. A server that went away
// is asked for until it is back, and may then be another one, with other models.

import { CallError, Channel } from "./grpc.js";
import { Schema } from "./protobuf.js";

const TOKEN = "lacuna.token";
/** From the first try again to the longest wait. */
const RETRY_MS = [500, 5000];
/** For each answer. */
const PATIENCE_MS = 10_000;

export class Connection {
    /**
     * `tell` is told of each change: `{ state, before, models, error }`. The states: "connecting", "ready", "away" (it does not
     * answer), "unready" (it is starting or shutting down), "locked" (it wants a token).
     */
    constructor(tell) {
        this.tell = tell;
        this.state = "connecting";
        this.channel = undefined;
        this.attempt = 0;
        this.wait = RETRY_MS[0];
    }

    get token() {
        return sessionStorage.getItem(TOKEN) ?? undefined;
    }

    set token(token) {
        sessionStorage.setItem(TOKEN, token);
        this.open();
    }

    /** Asks for all that must be known of the server, now and until it answers. */
    async open() {
        clearTimeout(this.timer);
        const attempt = ++this.attempt;
        try {
            const found = await this.ask();
            if (attempt !== this.attempt) return;
            this.channel = found.channel;
            this.wait = RETRY_MS[0];
            this.be("ready", { models: found.models });
        } catch (error) {
            if (attempt === this.attempt)
                this.lose(error instanceof CallError ? error : new CallError("UNREACHABLE", String(error)));
        }
    }

    async ask() {
        const health = await this.get("health");
        if (health.status === 503) throw new CallError("UNAVAILABLE", "the server is starting or shutting down");
        const descriptors = await this.get("lacuna.v1.descriptors");
        if (descriptors.status === 401) throw new CallError("UNAUTHENTICATED", "it is not known here");
        if (!descriptors.ok) throw new CallError("UNREACHABLE", `the server answers with HTTP status ${descriptors.status}`);
        const channel = new Channel(Schema.read(new Uint8Array(await descriptors.arrayBuffer())), () => this.token);
        const { models } = await channel.unary("/lacuna.v1.Models/List", {}, AbortSignal.timeout(PATIENCE_MS));
        // One that is on its way in or out has but a name.
        const ready = models.filter((model) => model.capabilities);
        if (ready.length === 0) throw new CallError("UNAVAILABLE", "the server has no model that is ready");
        return { channel, models: ready };
    }

    get(path) {
        const headers = this.token ? { authorization: `Bearer ${this.token}` } : {};
        return fetch(path, { cache: "no-cache", headers, signal: AbortSignal.timeout(PATIENCE_MS) });
    }

    /** A call failed. Says whether that is because of the server as a whole, rather than of the call. */
    failed(error) {
        if (["UNREACHABLE", "BROKEN", "UNAUTHENTICATED"].includes(error.code)) {
            this.lose(error);
            return true;
        }
        // It may be shutting down, or a model may be on its way out: that is soon known.
        if (["UNAVAILABLE", "NOT_FOUND"].includes(error.code)) this.open();
        return false;
    }

    lose(error) {
        const state = { UNAUTHENTICATED: "locked", UNAVAILABLE: "unready" }[error.code] ?? "away";
        this.be(state, { error });
        clearTimeout(this.timer);
        // Until there is another token, asking again would not help.
        if (state === "locked") return;
        this.timer = setTimeout(() => this.open(), this.wait);
        this.wait = Math.min(1.5 * this.wait, RETRY_MS[1]);
    }

    be(state, told) {
        const before = this.state;
        this.state = state;
        this.tell({ state, before, ...told });
    }
}
