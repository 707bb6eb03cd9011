"""Time PyTorch's bidirectional forward of a Llama of SmolLM2-135M's shape, with random weights, on the CPU.

    python time_forward.py --threads 2 --dtype bf16 --runs 10

One JSON object on stdout, times in milliseconds: `all_rows` computes the logits of every row, `canvas_rows` those of the
canvas only. To alternate with another program, give --rounds and --between: the command runs after each round but the last,
and its output goes to stderr.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
             vocab_size=49152, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=100000.0, max_position_embeddings=2048)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


def check_bidirectional(forward, ids):
    """The first row must see the last token."""
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % SHAPE["vocab_size"]
    if torch.equal(forward(ids, 0)[0, 0], forward(other, 0)[0, 0]):
        raise SystemExit("the forward is causal: this transformers ignores is_causal")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--between", help="a shell command to run between rounds")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--canvas", type=int, default=64)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, torch_dtype=DTYPES[args.dtype], attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(DTYPES[args.dtype]).eval()
    ids = torch.randint(SHAPE["vocab_size"], (1, args.prompt + args.canvas))

    def forward(ids, rows):
        """Logits of the last `rows` rows, or of all for 0."""
        return model(ids, use_cache=False, is_causal=False, logits_to_keep=rows).logits

    cases, times = {"all_rows": 0, "canvas_rows": args.canvas}, {"all_rows": [], "canvas_rows": []}
    with torch.inference_mode():
        check_bidirectional(forward, ids)
        for round_ in range(args.rounds):
            for _ in range(args.warmup):
                for rows in cases.values():
                    forward(ids, rows)
            for _ in range(args.runs):
                for name, rows in cases.items():
                    start = time.perf_counter()
                    forward(ids, rows)
                    times[name].append((time.perf_counter() - start) * 1e3)
            if args.between and round_ + 1 < args.rounds:
                subprocess.run(args.between, shell=True, check=True, stdout=sys.stderr)

    summary = {name: {"median_ms": round(statistics.median(t), 3), "min_ms": round(min(t), 3), "max_ms": round(max(t), 3),
                      "runs": len(t)} for name, t in times.items()}
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "dtype": args.dtype,
                      "threads": args.threads, "prompt": args.prompt, "canvas": args.canvas,
                      "parameters": sum(p.numel() for p in model.parameters()), **summary}))


if __name__ == "__main__":
    main()
