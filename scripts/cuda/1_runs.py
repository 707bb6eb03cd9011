#!/usr/bin/env python3
"""Does it run on this GPU, and does it compute the same? Two to four minutes.

The models that ship decode held-out tasks on the CPU and on the GPU: greedy in f32 every text must be the same, in bf16 nearly as many
tasks must be right; perplexities must agree. With LACUNA_TESTS naming the library's test binary, its CUDA tests run too.
"""

import json
import os

from common import ROOT, Run, parser

MODELS = ["nano", "nano-block", "nano-ar"]
SAMPLE = ROOT / "models/nano/README.md"


def evaluation(run, model, device, dtype, tasks, graphs="on"):
    """Texts and outcomes of tasks."""
    outcomes = run.out / f"outcomes-{model}-{device.replace(':', '')}-{dtype}-{graphs}.jsonl"
    outcomes.unlink(missing_ok=True)
    told = run.json("eval", "nano", "--model", f"models/{model}", "--device", device, "--dtype", dtype, "--tasks", tasks,
                    "--cuda-graphs", graphs, "--outcomes", outcomes.resolve())
    if not told:
        return None
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()]
    texts = [line.get("text", line.get("completion")) for line in lines if "text" in line or "completion" in line]
    outcomes.unlink()
    return {"passed": told["passed"], "tasks": told["tasks"], "tokens_per_second": told["tokens_per_second"], "texts": texts}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", type=int, default=40)
    args = arguments.parse_args()
    run = Run("1_runs", args)
    tasks = 4 if run.dry else args.tasks
    found, rows = {"models": {}}, []
    for model in MODELS:
        if not run.time_for(model, 60):
            continue
        cells = {"cpu f32": evaluation(run, model, "cpu", "f32", tasks)}
        for dtype in ["f32", "bf16"]:
            for graphs in ["off", "on"]:
                cells[f"gpu {dtype} graphs {graphs}"] = evaluation(run, model, run.device, dtype, tasks, graphs)
        plain = cells["cpu f32"]
        for name, cell in cells.items():
            if not plain or not cell:
                continue
            run.check(f"{model} {name}: texts came", len(cell["texts"]) == tasks, f"{len(cell['texts'])} of {tasks}")
            same = sum(a == b for a, b in zip(plain["texts"], cell["texts"]))
            if "f32" in name:
                run.check(f"{model} {name}: every text as on the CPU", same == tasks, f"{same} of {tasks}")
            else:
                run.check(f"{model} {name}: as many right", cell["passed"] >= plain["passed"] - max(1, tasks // 20),
                          f"{cell['passed']} and {plain['passed']}")
            rows.append([model, name, f"{cell['passed']}/{cell['tasks']}", f"{same}/{tasks}", float(cell["tokens_per_second"])])
        found["models"][model] = {name: cell and {k: v for k, v in cell.items() if k != "texts"} for name, cell in cells.items()}
    perplexity = {}
    for device, dtype, limit in [("cpu", "f32", 0), (run.device, "f32", 1e-4), (run.device, "bf16", 3e-2)]:
        told = run.json("eval", "likelihood", SAMPLE, "--model", "models/nano-ar", "--device", device, "--dtype", dtype)
        if told:
            perplexity[f"{device} {dtype}"] = told["perplexity"]
        if told and "cpu f32" in perplexity:
            of_cpu = told["perplexity"] / perplexity["cpu f32"] - 1
            run.check(f"perplexity on {device} in {dtype}", abs(of_cpu) <= limit, f"off by {of_cpu:.1e}")
    found["perplexity"] = perplexity
    tests = os.environ.get("LACUNA_TESTS")
    if tests and not run.dry and run.time_for("CUDA tests"):
        done = run.call("--ignored", "cuda", "--test-threads", "1", program=tests, check=False)
        found["cuda_tests"] = done and done.stdout[-4000:]
        run.check("CUDA tests", bool(done) and done.returncode == 0)
    step = ["bench", "step", "--model", "models/nano", "--device", run.device, "--window", "1", "--runs", "3"]
    told = run.json(*step)
    found["processor"] = told and told["processor"]
    found["cuda_graphs"] = told and told["cuda_graphs"]
    run.check_on_gpu("the shim for CUDA graphs is open", bool(told and told["cuda_graphs"]))
    found["fused_kernels"] = told and told["fused_kernels"]
    found["fused_races"] = told and told["fused_races"]
    for race in found["fused_races"] or []:
        print(f"     {race['kernel']}, {race['rows']} rows: {race['ours']:.1f} µs, by libtorch {race['libtorch']:.1f}")
    kernels = ["add_norm", "gated", "rounded", "turned", "statistics"]
    right = run.json(*step, env={"LACUNA_KERNELS": "all"})
    run.check_on_gpu("every fused kernel computes what libtorch does", bool(right and right["fused_kernels"] == kernels),
                     str(right and right["fused_kernels"]))
    run.check_on_gpu("every fused kernel takes less time", found["fused_kernels"] == kernels, str(found["fused_kernels"]))
    bf16 = run.json(*step, "--dtype", "bf16")
    run.check_on_gpu("sequences of many lengths attend at once", bool(bf16 and bf16["many_lengths_at_once"]))
    run.finish(found, ["model", "where", "right", "texts as on the CPU", "tokens/s"], rows)


main()
