#!/usr/bin/env python3
"""What a step costs, beside the least that it can cost and beside plain PyTorch. Under ten minutes; SHAPES in turn while time lasts.

Random weights of published shapes; windows by cached prefixes by sequences; with and without CUDA graphs, without our own kernels, and with what
--quantize names.
Beside it the same shape in PyTorch (torch_forward.py). Give --shapes for others, or in another order.
"""

import json
import subprocess
import sys

from common import ROOT, Run, parser, shape

SHAPES = ["llada-8b", "sdar-8b", "qwen2.5-7b", "dream-7b", "sdar-4b"]
# What the targets are about comes first, then the whole grid.
TARGET = (["32"], ["512"], ["1", "32"])
GRID = (["1", "8", "32", "64", "128", "256"], ["0", "512", "2048"], ["1", "4", "16", "32"])
TINY = (["1", "8"], ["0", "32"], ["1", "2"])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--shapes", default=",".join(SHAPES))
    arguments.add_argument("--quantize", default="", help="schemes to measure too, such as fp8,fp8-block")
    arguments.add_argument("--runs", type=int, default=10)
    args = arguments.parse_args()
    run = Run("2_steps", args)
    runs, dtype = (2 if run.dry else args.runs), "bf16"
    found, rows = {"results": []}, []
    lanes = [("graphs", ["--cuda-graphs", "on"], {}), ("eager", ["--cuda-graphs", "off"], {})]
    # What fused kernels bring: a CPU's own kernels are not what this is about.
    lanes += [] if run.dry else [("libtorch", ["--cuda-graphs", "on"], {"LACUNA_KERNELS": "off"})]
    lanes += [(scheme, ["--cuda-graphs", "on", "--quantize", scheme], {}) for scheme in args.quantize.split(",") if scheme]

    def measure(name, lane, flags, env, grid):
        windows, prefixes, sequences = map(",".join, grid)
        told = run.json("bench", "step", "--random-weights", shape(run, name), "--device", run.device, "--dtype", dtype, "--window", windows,
                        "--prefix", prefixes, "--sequences", sequences, "--runs", runs, "--warm-up", 1 if run.dry else 3, "--context", 1024 if run.dry else 4096,
                        *flags, env=env)
        if told:
            run.check(f"{name} {lane}: every point was measured or says why not",
                      len(told["cells"]) + len(told["skipped"]) == len(grid[0]) * len(grid[1]) * len(grid[2]))
            found["results"].append({"shape": name, "lane": lane, **told})
            for cell in told["cells"]:
                rows.append([name, lane, cell["window"], cell["prefix"], cell["sequences"], cell["total"]["median"],
                             cell["times_floor"], 100 * cell["outside_share"], cell["tokens_per_second"].get("5", cell["tokens_per_second"]["1"])])

    def pytorch(name, grid):
        command = [sys.executable, str(ROOT / "scripts/cuda/torch_forward.py"), str(shape(run, name)), "--device", run.device, "--dtype", dtype,
                   "--runs", str(runs), *[flag for pair in zip(["--window", "--prefix", "--sequences"], map(",".join, grid)) for flag in pair]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(run.left() + 20, 1))
        except subprocess.TimeoutExpired:
            run.problems.append(f"out of time: {name} in PyTorch")
            return
        if done.returncode != 0:
            run.problems.append("PyTorch: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1])
            return
        told = json.loads(done.stdout)
        found["results"].append({"shape": name, "lane": "pytorch", **told})
        for cell in told["cells"]:
            rows.append([name, told["by"], cell["window"], cell["prefix"], cell["sequences"], cell["median"], "", "", ""])

    names = args.shapes.split(",")[: 3 if run.dry else None]
    for grid in [TINY] if run.dry else [TARGET, GRID]:
        for name in names:
            need = 30 if grid is TARGET else 0 if run.dry else 100
            for lane, flags, env in lanes:
                if run.time_for(f"{name} {lane}, {'the whole grid' if grid is GRID else 'the first points'}", need):
                    measure(name, lane, flags, env, grid)
            if grid is not GRID and run.time_for(f"{name} in PyTorch", need):
                pytorch(name, grid)
    run.finish(found, ["shape", "lane", "window", "prefix", "seqs", "ms", "times floor", "outside %", "tok/s at 5"], rows)


main()
