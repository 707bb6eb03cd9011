#!/usr/bin/env python3
"""Whole decoding of requests on random weights of real shapes: diffusion and left to right, 1 to 64 requests at a time. Under ten minutes.

A folder of random weights is written, served, and put under a load for each number of requests. What comes out is noise, so that nothing
may depend on it: diffusion commits in equal parts over --steps, and no text ends early. Where does each stop scaling, and how much of a round
is outside the network?
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

from common import ROOT, Run, parser, shape

NEW, STEPS, BLOCK = 128, 32, 32


@contextlib.contextmanager
def served(run, model, flags):
    """A server with that model, and where it listens."""
    command = [run.lacuna, "--log-format", "json", "serve", "--model", str(model), "--device", run.device, "--address", "127.0.0.1:0", "--http",
               "127.0.0.1:0", "--max-resident", "64", "--queue", "128", "--context", "512" if run.dry else "2048", *flags]
    log = open(run.out / "serve.log", "w+")
    server = subprocess.Popen(command, cwd=ROOT, env=run.env, stderr=log, stdout=log)
    try:
        addresses, warm, began = {}, False, time.monotonic()
        while len(addresses) < 2 or not warm:
            time.sleep(0.2)
            text = (run.out / "serve.log").read_text()
            for line in text.splitlines():
                fields = json.loads(line).get("fields", {}) if line.startswith("{") else {}
                message = fields.get("message", "")
                if "address" in fields and message.startswith("listening"):
                    addresses["http" if "http" in message.lower() else "grpc"] = fields["address"]
                warm |= message == "warm"
            if server.poll() is not None or time.monotonic() - began > min(240, run.left() + 20):
                raise RuntimeError("the server did not start: " + (text.strip().splitlines() or ["no log"])[-1])
        yield addresses
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def counters(address):
    """Sums of the server's counters by name, whatever their labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    sums = {}
    for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", text, re.M):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--concurrency", default="1,2,4,8,16,32,64")
    arguments.add_argument("--duration", type=float, default=6)
    arguments.add_argument("--folder", help="where the weights go (16 GB) [default: a temporary folder]")
    args = arguments.parse_args()
    run = Run("3_decode", args)
    concurrency = "1,2" if run.dry else args.concurrency
    new = 16 if run.dry else NEW
    steps = new // 4
    work = tempfile.mkdtemp(dir=args.folder, prefix="random-")
    prompts = run.out.resolve() / "prompts.jsonl"
    prompts.write_text("".join(json.dumps("def solve(xs): return sum(x for x in xs if x > %d)\n" % n * (2 if run.dry else 8)) + "\n" for n in range(8)))
    diffusion = ["--steps", steps, "--block-length", min(BLOCK, new), "--suppress-end", "--no-finish-early"]
    plans = [
        ("llada-8b", "diffusion, dual cache", ["--method", "diffusion", "--cache", "dual", *diffusion]),
        ("sdar-8b", "diffusion, blocks", ["--method", "diffusion", "--steps", 2 * steps, "--suppress-end", "--no-finish-early"]),
        ("qwen2.5-7b", "left to right", ["--method", "autoregressive", "--drafter", "none", "--suppress-end"]),
        ("qwen2.5-7b", "left to right, lookup", ["--method", "autoregressive", "--drafter", "lookup", "--suppress-end"]),
    ]
    found, rows, written = {"lanes": []}, [], None
    try:
        for name, lane, flags in plans:
            need = 0 if run.dry else 120
            if not run.time_for(f"{name}, {lane}", need):
                continue
            folder = f"{work}/{name}"
            if written != name:
                for old in os.listdir(work):
                    shutil.rmtree(f"{work}/{old}")
                command = [sys.executable, str(ROOT / "scripts/cuda/random_model.py"), str(shape(run, name)), folder, "--device", run.device]
                try:
                    made = subprocess.run(command, capture_output=True, text=True, timeout=max(run.left() + 20, 1))
                except subprocess.TimeoutExpired:
                    run.problems.append(f"out of time: random weights of {name}")
                    break
                if made.returncode != 0:
                    run.problems.append("random weights: " + (made.stderr.strip().splitlines() or ["?"])[-1])
                    continue
                written = name
            try:
                with served(run, folder, []) as addresses:
                    before, began = counters(addresses["http"]), time.monotonic()
                    told = run.json("bench", "serve", "--target", addresses["grpc"], "--concurrency", concurrency, "--prompts", prompts, "--max-new-tokens", new,
                                    "--duration", 0.5 if run.dry else args.duration, *flags)
                    after, wall = counters(addresses["http"]), time.monotonic() - began
            except RuntimeError as error:
                run.problems.append(f"{name}, {lane}: {error}")
                continue
            if not told:
                continue
            # The load is never without a request, so that what is not a forward is the engine's own time, and the client's.
            forwards = after["lacuna_forward_seconds_sum"] - before.get("lacuna_forward_seconds_sum", 0.0)
            outside = 100 * (1 - forwards / wall)
            found["lanes"].append({"shape": name, "lane": lane, "bench": told, "seconds": wall, "forward_seconds": forwards})
            one = told["lanes"][0]["tokens_per_second"]
            for each in told["lanes"]:
                counted = each["counted"]
                run.check(f"{name}, {lane}, {each['lane']}: nothing failed", counted["failed"] == 0 and counted["finished"] > 0, str(counted["finished"]))
                forwards = sum(each["forwards"].values())
                rows.append([name, lane, each["lane"].split()[-1], each["tokens_per_second"], each["tokens_per_second"] / one if one else 0.0,
                             forwards / each["window_seconds"], each["generated_tokens"] / max(forwards, 1), outside])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    run.finish(found, ["shape", "lane", "requests", "tokens/s", "times one", "sequence forwards/s", "tokens a forward", "outside % (all)"], rows)


main()
