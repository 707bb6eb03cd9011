"""Perplexity of a text under `transformers`, cut as `lacuna eval likelihood` cuts it, to hold its figure to.

    python benches/perplexity_transformers.py MODEL FILE --window 1024 --overlap 512
    lacuna eval likelihood FILE --model MODEL --window 1024 --overlap 512 --json

MODEL is a causal one, in a folder in Hugging Face's layout. Every token but the first is scored once, in f32; those of later windows
have at least `--overlap` tokens before them. One JSON object on stdout.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--overlap", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = tokenizer(args.file.read_text(), return_tensors="pt")["input_ids"]
    scored, nats, tokens = 1, 0.0, 0
    while scored < ids.shape[1]:
        start = 0 if scored == 1 else scored - args.overlap
        end = min(start + args.window, ids.shape[1])
        part = ids[:, start:end]
        labels = part.clone()
        labels[:, : scored - start] = -100
        with torch.inference_mode():
            nats += model(part, labels=labels).loss.item() * (end - scored)
        tokens += end - scored
        scored = end
    print(json.dumps({
        "file": args.file.name, "tokens": tokens, "nats": nats, "nats_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens), "window": args.window, "overlap": args.overlap,
        "transformers": transformers.__version__, "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
