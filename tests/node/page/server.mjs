// A server of the binary under test, and what tests ask it by themselves.

import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { createInterface } from "node:readline";
import { promisify } from "node:util";

import { Channel } from "../../../src/http/page/grpc.js";
import { Schema } from "../../../src/http/page/protobuf.js";

const root = fileURLToPath(new URL("../../..", import.meta.url));
const binary = process.env.LACUNA ?? `${root}/target/release/lacuna`;

/** Longer than anything here takes, on a machine that has much else to do. */
export const PATIENCE_MS = 60_000;

const running = new Set();

export class Server {
    /** Starts one with the pair that ships, and waits until it listens and is warm. `http` is the port, 0 for a free one. */
    static async start({ models = ["models/nano", "models/nano-ar"], http = 0, flags = [] } = {}) {
        const server = new Server();
        const load = models.flatMap((model) => ["--model", model]);
        const listen = ["--address", "127.0.0.1:0", "--http", `127.0.0.1:${http}`];
        server.process = spawn(binary, ["serve", ...load, ...listen, ...flags], {
            cwd: root,
            stdio: ["ignore", "ignore", "pipe"],
        });
        running.add(server);
        server.process.once("exit", () => running.delete(server));
        let warm = 0;
        const log = [];
        await new Promise((resolve, reject) => {
            server.process.once("exit", (code) => reject(new Error(`the server ended with ${code}:\n${log.join("\n")}`)));
            // Read to the end, or the server would wait for room in the pipe.
            createInterface(server.process.stderr).on("line", (line) => {
                log.push(line);
                const address = /address=(\S+)/.exec(line)?.[1];
                if (line.includes("listening for HTTP")) server.base = `http://${address}`;
                else if (line.includes("listening address")) server.grpc = address;
                if (line.includes("lifecycle: warm")) warm += 1;
                if (warm === models.length) resolve();
            });
        });
        return server;
    }

    static async stopAll() {
        await Promise.all([...running].map((server) => server.stop("SIGKILL")));
    }

    get port() {
        return Number(new URL(this.base).port);
    }

    async channel() {
        const response = await fetch(`${this.base}/lacuna.v1.descriptors`);
        return new Channel(Schema.read(new Uint8Array(await response.arrayBuffer())), undefined, this.base);
    }

    /** All models' load, added up. */
    async load() {
        const { models } = await (await this.channel()).unary("/lacuna.v1.Models/List", {});
        const sum = (name) => models.reduce((total, model) => total + model.load[name], 0);
        return { waiting: sum("waiting"), resident: sum("resident"), steps: sum("steps") };
    }

    async stop(signal = "SIGTERM") {
        if (this.process.exitCode !== null || this.process.signalCode !== null) return;
        const ended = once(this.process, "exit");
        this.process.kill(signal);
        await ended;
    }
}

/** The text that `lacuna generate` gives. */
export async function generate(...args) {
    const { stdout } = await promisify(execFile)(binary, ["generate", "--json", ...args], { cwd: root });
    return JSON.parse(stdout).text;
}

/** A token, and a server's file that has it. */
export async function makeToken() {
    const { stdout, stderr } = await promisify(execFile)(binary, ["token", "page"]);
    const file = join(tmpdir(), `lacuna-tokens-${process.pid}.toml`);
    await writeFile(file, stderr);
    return { token: stdout.trim(), file };
}

/** Asks until the answer is yes. */
export async function eventually(what, answer) {
    for (const end = Date.now() + PATIENCE_MS; Date.now() < end; await new Promise((resolve) => setTimeout(resolve, 20))) {
        if (await answer()) return;
    }
    throw new Error(`it never came to this: ${what}`);
}
