"""lacuna with its weights in fewer bits against itself with floats, in turn: tokens per second, and what that costs in perplexity.

    python benches/compare_schemes.py MODEL --quantize int8 --against bf16 --text FILE --rounds 7 --threads 2

Greedy autoregressive decoding of 128 tokens behind a short prompt; a rate leaves the first token out. A round starts the program anew for
each side. Perplexities are of FILE, a text or .jsonl with {"text": …} a line, in f32 activations, once. Run from the project's folder
with target/release/lacuna built. The environment's RUN_UNDER may name a command to run each measurement under. One JSON object on stdout.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

from compare_llama_cpp import LACUNA, run

PROMPT = "def fibonacci(n):"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--dtype", default="f32", help="of activations beside quantised weights")
    parser.add_argument("--against", default="bf16", choices=["f32", "bf16"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    common = ["--model", args.model, "--device", "cpu", "--threads", args.threads]
    ours, floats = ["--dtype", args.dtype, "--quantize", args.quantize], ["--dtype", args.against]

    def rate(how):
        generate = [LACUNA, "generate", *common, *how, "--method", "autoregressive", "--drafter", "none", "--max-new-tokens", 128,
                    "--temperature", 0, "--json", PROMPT]
        usage = json.loads(run(generate)[0])["usage"]
        return (usage["generated_tokens"] - 1) / (usage["decoding_seconds"] - usage["seconds_to_first_commit"])

    def perplexity(how):
        return json.loads(run([LACUNA, "eval", "likelihood", args.text, *common, *how, "--json"])[0])["perplexity"]

    pairs, loads = [], []
    for _ in range(args.rounds):
        pairs.append((rate(ours), rate(floats)))
        loads.append(round(os.getloadavg()[0], 2))
    texts = {}
    if args.text:
        before, after = perplexity(["--dtype", "f32"]), perplexity(["--dtype", "f32", "--quantize", args.quantize])
        texts = {"text": args.text.name, "perplexity_f32": round(before, 4), "perplexity_" + args.quantize: round(after, 4),
                 "perplexity_change": round(after / before - 1, 5)}
    ratios = [a / b for a, b in pairs]
    print(json.dumps({
        "what": "tokens per second behind the first", "model": args.model.name, "dtype": args.dtype, "quantization": args.quantize,
        "threads": args.threads, "rounds": args.rounds, "load_average": loads, "lacuna_" + args.quantize: [round(a, 2) for a, _ in pairs],
        "floats_" + args.against: [round(b, 2) for _, b in pairs], "lacuna_median": round(statistics.median(a for a, _ in pairs), 2),
        "floats_median": round(statistics.median(b for _, b in pairs), 2), "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4), "ratio_max": round(max(ratios), 4), **texts, "device": "cpu",
        "command": f"python benches/compare_schemes.py {args.model.name} --quantize {args.quantize} --dtype {args.dtype} --against {args.against}"
                   f"{f' --text {args.text.name}' if args.text else ''} --rounds {args.rounds} --threads {args.threads}",
    }))


if __name__ == "__main__":
    main()
