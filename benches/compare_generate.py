"""Plain greedy decoding of lacuna against transformers' `generate`, in turn, on this machine.

    python benches/compare_generate.py MODEL --dtype f32 --rounds 5 --threads 2

MODEL is a folder in Hugging Face's layout. Runs in a Python that has transformers, from the project's folder, with
target/release/lacuna built. With --file lacuna reads that GGUF file, of which MODEL has the same numbers as floats. Both continue
the same 64 tokens by up to 128, from a key/value cache, in the same dtype; rates are of the tokens behind the first. Each round
starts both programs anew; one JSON object on stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from generate_transformers import TEXT
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompt = tokenizer.decode(tokenizer(TEXT).input_ids[:64])
    ours_from = args.file or args.model
    lacuna = [str(HERE.parent / "target/release/lacuna"), "generate", "--model", str(ours_from), "--drafter", "none", "--json",
              "--dtype", args.dtype, "--threads", str(args.threads), "--max-new-tokens", "128", prompt]
    theirs_command = [sys.executable, str(HERE / "generate_transformers.py"), str(args.model), "--dtype", args.dtype,
                      "--threads", str(args.threads), "--rounds", "1"]
    ours, theirs, loads = [], [], []
    for _ in range(args.rounds):
        usage = json.loads(subprocess.run(lacuna, check=True, capture_output=True).stdout)["usage"]
        assert usage["prompt_tokens"] == 64 and usage["generated_tokens"] > 32, usage
        first = usage["seconds_to_first_commit"]
        ours.append((usage["generated_tokens"] - 1) / (usage["decoding_seconds"] - first))
        theirs.append(json.loads(subprocess.run(theirs_command, check=True, capture_output=True).stdout))
        loads.append(round(os.getloadavg()[0], 2))
    rates = [run[args.dtype]["decode"]["median"] for run in theirs]
    ratios = [a / b for a, b in zip(ours, rates)]
    print(json.dumps({
        "what": "tokens per second behind the first", "model": ours_from.name, "dtype": args.dtype, "threads": args.threads,
        "rounds": args.rounds, "torch": theirs[0]["torch"], "transformers": theirs[0]["transformers"], "load_average": loads,
        "lacuna": [round(rate, 2) for rate in ours], "transformers_generate": rates,
        "lacuna_median": round(statistics.median(ours), 2), "transformers_median": round(statistics.median(rates), 2),
        "ratio_median": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3), "device": "cpu", "command": " ".join(["python", *sys.argv]),
    }))


if __name__ == "__main__":
    main()
