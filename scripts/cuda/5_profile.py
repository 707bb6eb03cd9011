#!/usr/bin/env python3
"""Where one step's time goes, kernel by kernel: Nsight Systems or Nsight Compute on `lacuna bench step`, whichever is here.

    python3 scripts/cuda/5_profile.py OUT --shape llada-8b --window 32 --prefix 512 --sequences 1

Write down what you expect before you change what it shows, and what came of it after (docs/LOG.md). In a dry run, and where neither tool
is, the same step is timed without and the table says only that.
"""

import csv
import io
import shutil

from common import Run, parser, shape


def kernels(text, name, value, scale):
    """Time by kernel from a tool's CSV, whatever it prints before it."""
    lines = [line for line in text.splitlines() if line.count(",") > 3 or line.startswith('"')]
    spent = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        kernel, time_ = row.get(name), (row.get(value) or "").replace(",", "")
        if kernel and time_.replace(".", "", 1).isdigit():
            count, total = spent.get(kernel, (0, 0.0))
            spent[kernel] = (count + int(row.get("Instances") or 1), total + float(time_) * scale)
    return sorted(([kernel, count, total] for kernel, (count, total) in spent.items()), key=lambda entry: -entry[2])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--shape", default="llada-8b")
    arguments.add_argument("--window", default="32")
    arguments.add_argument("--prefix", default="512")
    arguments.add_argument("--sequences", default="1")
    arguments.add_argument("--cuda-graphs", default="off", help="with them, kernels are seen as part of graphs only")
    arguments.add_argument("--quantize")
    arguments.add_argument("--kernels", type=int, default=700, help="launches that Nsight Compute looks at, behind 2000 others")
    args = arguments.parse_args()
    run = Run("5_profile", args)
    window, prefix = ("8", "32") if run.dry else (args.window, args.prefix)
    step = ["bench", "step", "--random-weights", shape(run, args.shape), "--device", run.device, "--dtype", "bf16", "--window", window, "--prefix", prefix,
            "--sequences", args.sequences, "--cuda-graphs", args.cuda_graphs, "--context", 1024 if run.dry else 4096]
    if args.quantize:
        step += ["--quantize", args.quantize]
    plain = run.json(*step, "--runs", 10, "--warm-up", 3)
    found, rows, tool = {"step": plain, "kernels": []}, [], None
    few = [*step, "--runs", 2, "--warm-up", 1]
    if not run.dry and (nsys := shutil.which("nsys")):
        tool, report = "nsys", run.out.resolve() / "profile.nsys-rep"
        done = run.call("profile", "--force-overwrite", "true", "--output", report, run.lacuna, *few, program=nsys)
        stats = done and run.call("stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", report, program=nsys)
        spent = kernels(stats.stdout, "Name", "Total Time (ns)", 1e-6) if stats else []
    elif not run.dry and (ncu := shutil.which("ncu")):
        tool = "ncu"
        done = run.call("--csv", "--metrics", "gpu__time_duration.sum", "--launch-skip", 2000, "--launch-count", args.kernels, run.lacuna, *few, program=ncu)
        spent = kernels(done.stdout, "Kernel Name", "Metric Value", 1e-6) if done else []
    else:
        spent = []
    run.check("a profile came", run.dry or bool(spent), tool or "neither nsys nor ncu is here")
    all_ = sum(total for _, _, total in spent) or 1.0
    found |= {"tool": tool, "kernels": spent[:60]}
    rows = [[kernel[:70], count, total, 100 * total / all_] for kernel, count, total in spent[:25]]
    for cell in (plain or {}).get("cells", []):
        rows.append(["a step without the tool", 1, cell["total"]["median"], ""])
        rows.append([f"its floor ({cell['floor']['bound']})", 1, cell["floor"]["milliseconds"], ""])
    run.finish(found, ["what", "times", "ms", "% of all kernels"], rows)


main()
