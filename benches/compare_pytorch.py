"""One denoising step of lacuna against the same forward in PyTorch, in turn, on this machine.

    python benches/compare_pytorch.py --rounds 5 --threads 2

Runs in a Python that has tests/reference/requirements.txt, from the project's folder, with target/release/lacuna built. Both
draw random weights of SmolLM2-135M's shape (benches/shapes) in bf16 and run 64 tokens of prompt and 64 of canvas. lacuna's step
is the whole of it: network, vocabulary head on the canvas, statistics, selection and events; PyTorch's is network and head on
the canvas. Each round starts both programs anew; one JSON object on stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    counts = ["--threads", str(args.threads), "--runs", str(args.runs)]
    lacuna = [str(HERE.parent / "target/release/lacuna"), "bench", "step", "--json", "--dtype", "bf16", "--prompt", "64",
              "--canvas", "64", "--random-weights", str(HERE / "shapes/smollm2-135m.json"), *counts]
    pytorch = [sys.executable, str(HERE.parent / "tests/reference/time_forward.py"), "--dtype", "bf16", *counts]
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(json.loads(subprocess.run(lacuna, check=True, capture_output=True).stdout))
        theirs.append(json.loads(subprocess.run(pytorch, check=True, capture_output=True).stdout))
    step = [round_["total"]["median"] for round_ in ours]
    forward = [round_["canvas_rows"]["median_ms"] for round_ in theirs]
    ratios = [a / b for a, b in zip(step, forward)]
    print(json.dumps({
        "what": "milliseconds; medians of each round's runs",
        "rounds": args.rounds, "runs": args.runs, "threads": args.threads, "dtype": "bf16", "prompt": 64, "canvas": 64,
        "torch": theirs[0]["torch"], "transformers": theirs[0]["transformers"],
        "lacuna_step": [round(t, 3) for t in step], "pytorch_forward_and_head": forward,
        "lacuna_median": round(statistics.median(step), 3), "pytorch_median": round(statistics.median(forward), 3),
        "ratio_median": round(statistics.median(ratios), 4), "ratio_min": round(min(ratios), 4), "ratio_max": round(max(ratios), 4),
        "device": "cpu", "model": "random weights of SmolLM2-135M's shape", "command": " ".join(["python", *sys.argv]),
    }))


if __name__ == "__main__":
    main()
