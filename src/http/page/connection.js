// Keeps in touch with the server: the schema and the models that it serves, and whether it is there at all. A server that went away
// is asked for until it is back, and may then be another one, with other models.

import { CallError, Channel } from "./grpc.js";
import { Schema } from "./protobuf.js";

const TOKEN = "lacuna.token";
/** From the first try again to the longest wait. */
const RETRY_MS = [500, 5000];

export class Connection {
    /**
     * `tell` is told of each change: `{ state, models, error }`. The states: "connecting", "ready", "away" (it does not answer),
     * "draining" (it is shutting down), "locked" (it wants a token).
     */
    constructor(tell) {
        this.tell = tell;
        this.state = "connecting";
        this.channel = undefined;
        this.attempt = 0;
        this.timer = undefined;
    }

    get token() {
        return sessionStorage.getItem(TOKEN) ?? undefined;
    }

    set token(token) {
        sessionStorage.setItem(TOKEN, token);
        this.open();
    }

    async open() {
        clearTimeout(this.timer);
        const attempt = ++this.attempt;
        try {
            const response = await fetch("lacuna.v1.descriptors", { cache: "no-cache", headers: this.token ? { authorization: `Bearer ${this.token}` } : {} }).catch(() => {
                throw new CallError("UNREACHABLE", "the server does not answer");
            });
            if (!response.ok) throw new CallError(response.status === 401 ? "UNAUTHENTICATED" : "UNAVAILABLE", `HTTP status ${response.status}`);
            const bytes = await response.arrayBuffer().catch(() => {
                throw new CallError("BROKEN", "the connection broke");
            });
            const channel = new Channel(Schema.read(new Uint8Array(bytes)), () => this.token);
            const { models } = await channel.unary("/lacuna.v1.Models/List", {}, AbortSignal.timeout(10_000));
            if (attempt !== this.attempt) return;
            this.channel = channel;
            this.wait = RETRY_MS[0];
            this.be("ready", { models });
        } catch (error) {
            if (attempt === this.attempt) this.failed(error);
        }
    }

    /** A call failed: perhaps the server is gone. Says whether that is so, rather than something wrong with the call. */
    failed(error) {
        const states = { UNREACHABLE: "away", BROKEN: "away", UNAVAILABLE: "draining", UNAUTHENTICATED: "locked" };
        const state = states[error.code] ?? (this.channel ? undefined : "away");
        if (!state) return false;
        this.be(state, { error });
        if (state === "locked") return true;
        this.wait = Math.min(this.state === "ready" ? RETRY_MS[0] : (this.wait ?? RETRY_MS[0]) * 1.5, RETRY_MS[1]);
        clearTimeout(this.timer);
        this.timer = setTimeout(() => this.open(), this.wait);
        return true;
    }

    be(state, told) {
        const before = this.state;
        this.state = state;
        this.tell({ state, before, ...told });
    }
}
