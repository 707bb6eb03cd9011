#!/usr/bin/env python3
"""Where one step's time goes, kernel by kernel: Nsight Systems or Nsight Compute on `lacuna bench step`, whichever is here.

    python3 scripts/cuda/5_profile.py OUT --shape llada-8b --window 32 --prefix 512 --sequences 1

Write down what you expect before you change what it shows, and what came of it after (docs/LOG.md). In a dry run, and where neither tool
is, the same step is timed without and the table says only that.
"""

import csv
import shutil

from common import Run, parser, shape


# Milliseconds in what the tools call their units; nsys says nothing but nanoseconds.
UNITS = {unit: scale for scale, units in [(1e-6, ["", "ns", "nsecond"]), (1e-3, ["us", "usecond"]), (1.0, ["ms", "msecond"]), (1e3, ["s", "second"])]
         for unit in units}


def kernels(text, name, value):
    """Time by kernel from a tool's CSV, whatever it and the program print before it: kernel, launches, milliseconds."""
    lines = text.splitlines()
    header = next((at for at, line in enumerate(lines) if name in next(csv.reader([line]), [])), len(lines))
    spent = {}
    for row in csv.DictReader(lines[header:]):
        kernel, time_ = row.get(name), (row.get(value) or "").replace(",", "")
        scale = UNITS.get(row.get("Metric Unit") or "")
        if kernel and scale and time_.replace(".", "", 1).isdigit():
            count, total = spent.get(kernel, (0, 0.0))
            spent[kernel] = (count + int(row.get("Instances") or 1), total + float(time_) * scale)
    return sorted(([kernel, count, round(total, 6)] for kernel, (count, total) in spent.items()), key=lambda entry: -entry[2])


# The columns of a kernel's name and its time.
NSYS, NCU = ("Name", "Total Time (ns)"), ("Kernel Name", "Metric Value")
# What both tools print, as far as it matters here; read in every dry run.
SAID = [
    (NSYS, """Processing [a.sqlite] with [cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Name
75.0,3000000,3,1000000.0,"gemm<128, 64>(float*, int)"
25.0,1000000,1,1000000.0,softmax
""", [["gemm<128, 64>(float*, int)", 3, 3.0], ["softmax", 1, 1.0]]),
    (NCU, """==PROF== Connected to process 1
llada: bf16, NVIDIA H100, 1,000 MiB, of 2,000 MiB, free
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","gemm<128, 64>(float*, int)","gpu__time_duration.sum","us","1,500.5"
"1","1","gemm<128, 64>(float*, int)","gpu__time_duration.sum","ns","500,000"
"2","1","softmax","gpu__time_duration.sum","ms","1"
""", [["gemm<128, 64>(float*, int)", 2, 2.0005], ["softmax", 1, 1.0]]),
]


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
        spent = kernels(stats.stdout, *NSYS) if stats else []
    elif not run.dry and (ncu := shutil.which("ncu")):
        tool = "ncu"
        done = run.call("--csv", "--metrics", "gpu__time_duration.sum", "--launch-skip", 2000, "--launch-count", args.kernels, run.lacuna, *few, program=ncu)
        spent = kernels(done.stdout, *NCU) if done else []
    else:
        spent = []
    for columns, said, right in SAID if run.dry else []:
        run.check(f"what is said in columns {', '.join(columns)} is read", kernels(said, *columns) == right)
    run.check("a profile came", run.dry or bool(spent), tool or "neither nsys nor ncu is here")
    all_ = sum(total for _, _, total in spent) or 1.0
    found |= {"tool": tool, "kernels": spent[:60]}
    rows = [[kernel[:70], count, total, 100 * total / all_] for kernel, count, total in spent[:25]]
    for cell in (plain or {}).get("cells", []):
        rows.append(["a step without the tool", 1, cell["total"]["median"], ""])
        rows.append([f"its floor ({cell['floor']['bound']})", 1, cell["floor"]["milliseconds"], ""])
    run.finish(found, ["what", "times", "ms", "% of all kernels"], rows)


main()
