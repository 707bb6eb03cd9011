// gRPC-web over fetch: calls, their messages as they arrive, and failures with the google.rpc details that the server sends. Knows
// nothing of any particular service; the schema says which there are.

import { Schema, file } from "./protobuf.js";

/** Bytes of the largest message that is taken from a server. */
const MESSAGE_BYTES_MAX = 64 << 20;

const HEADER_BYTES = 5;
const TRAILERS = 0x80;

const CODES = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/** What an HTTP status means where there is no gRPC status, as gRPC's own mapping has it. */
const HTTP_CODES = {
    400: "INTERNAL",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    429: "UNAVAILABLE",
};

const DETAILS = new Schema();
DETAILS.addFile(
    // In truth Any and Duration are google.protobuf's: the wire does not tell.
    file("google.rpc", {
        Status: { code: [1, "int32"], message: [2, "string"], details: [3, "Any", "repeated"] },
        Any: { type_url: [1, "string"], value: [2, "bytes"] },
        Duration: { seconds: [1, "int64"], nanos: [2, "int32"] },
        BadRequest: { field_violations: [1, "FieldViolation", "repeated"] },
        FieldViolation: { field: [1, "string"], description: [2, "string"] },
        RetryInfo: { retry_delay: [1, "Duration"] },
        RequestInfo: { request_id: [1, "string"] },
    }),
);

/** A call that did not end with OK. */
export class CallError extends Error {
    constructor(code, message, details = {}) {
        super(message);
        this.name = "CallError";
        /** As in google.rpc.Code, by name; "UNREACHABLE" and "BROKEN" where no status came. */
        this.code = code;
        /** Of wrong fields: `{ field, description }`. */
        this.violations = details.violations ?? [];
        /** Seconds after which to try again, if the server says so. */
        this.retrySeconds = details.retrySeconds;
        /** The request's id in the server's log, if it is told. */
        this.requestId = details.requestId;
    }
}

/** What can be called on the server that served the page. */
export class Channel {
    /** `token` gives the bearer token, or nothing. */
    constructor(schema, token = () => undefined, base = "") {
        this.schema = schema;
        this.token = token;
        this.base = base;
    }

    /** A call that has one answer. */
    async unary(path, request, signal) {
        let answer;
        for await (const message of this.stream(path, request, signal)) answer ??= message;
        if (answer === undefined) throw new CallError("INTERNAL", "the server ended the call without an answer");
        return answer;
    }

    /** A call's messages. Aborting `signal` cancels it, and throws its reason. */
    async *stream(path, request, signal) {
        const method = this.schema.methods.get(path);
        if (!method) throw new CallError("UNIMPLEMENTED", `this server has no ${path}`);
        const response = await this.send(path, frame(this.schema.encode(method.input, request)), signal);
        if (response.headers.has("grpc-status")) {
            await response.body?.cancel();
            return succeed(response.headers);
        }
        if (!response.ok)
            throw new CallError(
                HTTP_CODES[response.status] ?? "UNAVAILABLE",
                `the server answered with HTTP status ${response.status}`,
            );
        let trailers;
        for await (const { flags, bytes } of frames(response.body, signal)) {
            if (flags & TRAILERS) trailers = new Headers(parseTrailers(bytes));
            else yield this.schema.decode(method.output, bytes);
        }
        if (!trailers) throw new CallError("BROKEN", "the connection broke before the call was complete");
        succeed(trailers);
    }

    async send(path, body, signal) {
        const headers = {
            "content-type": "application/grpc-web+proto",
            accept: "application/grpc-web+proto",
            "x-grpc-web": "1",
        };
        const token = this.token();
        if (token) headers.authorization = `Bearer ${token}`;
        try {
            return await fetch(this.base + path, { method: "POST", headers, body, signal, cache: "no-store" });
        } catch (error) {
            signal?.throwIfAborted();
            throw new CallError("UNREACHABLE", "the server does not answer", { cause: error });
        }
    }
}

function frame(message) {
    const framed = new Uint8Array(HEADER_BYTES + message.length);
    new DataView(framed.buffer).setUint32(1, message.length);
    framed.set(message, HEADER_BYTES);
    return framed;
}

/** The frames of a body, however its chunks fall. */
export async function* frames(body, signal) {
    const reader = body.getReader();
    let pending = new Uint8Array();
    try {
        for (;;) {
            let length;
            while (pending.length >= HEADER_BYTES) {
                length = new DataView(pending.buffer, pending.byteOffset).getUint32(1);
                if (length > MESSAGE_BYTES_MAX)
                    throw new CallError("RESOURCE_EXHAUSTED", "the server sent a message that is too large");
                if (pending.length < HEADER_BYTES + length) break;
                yield { flags: pending[0], bytes: pending.subarray(HEADER_BYTES, HEADER_BYTES + length) };
                pending = pending.subarray(HEADER_BYTES + length);
            }
            const { done, value } = await read(reader, signal);
            if (done) break;
            const joined = new Uint8Array(pending.length + value.length);
            joined.set(pending);
            joined.set(value, pending.length);
            pending = joined;
        }
        if (pending.length > 0) throw new CallError("BROKEN", "the connection broke in the middle of a message");
    } finally {
        // Also where the reader of the frames has had enough: this is what cancels the call on the server.
        reader.cancel().catch(() => {});
    }
}

async function read(reader, signal) {
    try {
        return await reader.read();
    } catch {
        signal?.throwIfAborted();
        throw new CallError("BROKEN", "the connection broke before the call was complete");
    }
}

function parseTrailers(bytes) {
    const lines = new TextDecoder().decode(bytes).split("\r\n");
    return lines
        .filter((line) => line.includes(":"))
        .map((line) => [line.slice(0, line.indexOf(":")).trim(), line.slice(line.indexOf(":") + 1).trim()]);
}

/** Throws what trailers say unless it is OK. */
function succeed(trailers) {
    const number = Number(trailers.get("grpc-status") ?? 2);
    if (number === 0) return;
    const message = unescaped(trailers.get("grpc-message") ?? "");
    throw new CallError(
        CODES[number] ?? "UNKNOWN",
        message || "the server did not say why",
        readDetails(trailers.get("grpc-status-details-bin")),
    );
}

function unescaped(message) {
    try {
        return decodeURIComponent(message);
    } catch {
        return message;
    }
}

/** Details are told on top of the status: those that cannot be read are left out. */
function readDetails(header) {
    const found = {};
    try {
        const binary = atob((header ?? "").replaceAll("-", "+").replaceAll("_", "/").replace(/=+$/, ""));
        const status = DETAILS.decode(
            "google.rpc.Status",
            Uint8Array.from(binary, (character) => character.charCodeAt(0)),
        );
        for (const { type_url, value } of status.details) {
            const name = type_url?.split("/").pop();
            if (!DETAILS.messages.has(name)) continue;
            const detail = DETAILS.decode(name, value);
            if (name === "google.rpc.BadRequest") found.violations = detail.field_violations;
            if (name === "google.rpc.RetryInfo")
                found.retrySeconds = (detail.retry_delay?.seconds ?? 0) + (detail.retry_delay?.nanos ?? 0) / 1e9;
            if (name === "google.rpc.RequestInfo") found.requestId = detail.request_id;
        }
    } catch (error) {
        console.warn("a status's details cannot be read", error);
    }
    return found;
}
