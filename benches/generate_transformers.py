"""Tokens per second of transformers' own greedy `generate`, on the CPU, for comparison with lacuna's.

    python benches/generate_transformers.py MODEL --dtype f32 bf16 --threads 2 --rounds 5

MODEL is a folder in Hugging Face's layout or a GGUF file, which transformers widens (that takes gguf and accelerate). The
prompt is `--prompt` tokens of the text below, and every run makes `--new-tokens`: no token ends it. A round runs each number
format in turn, once for a single token, which is the prefill, and once for all. `decode` is the rate of the tokens after the
first, over the difference of the two times; `whole` is that of all tokens over the whole time. One JSON object on stdout; the
load is the system's one-minute average before and after.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TEXT = (
    "A lighthouse is a tower with a bright light at its top. It stands on a coast or on a rock in the sea and shows ships "
    "where they are and where the danger is. In the nineteenth century its keeper lit the lamp at dusk, wound up the clockwork "
    "that turned the lens, trimmed the wicks through the night and wrote down the weather in the morning. Today most lights "
    "need no keeper at all, and yet the towers have stayed, because a sailor trusts what he sees. "
)


def load(model, dtype):
    folder, extra = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).eval()
    loaded.generation_config.eos_token_id = None
    return loaded, tokenizer


def seconds(model, ids, count):
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True)
    assert out.shape[1] == ids.shape[1] + count
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["f32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    load_before, models = os.getloadavg()[0], {}
    for dtype in args.dtype:
        models[dtype], tokenizer = load(args.model, DTYPES[dtype])
    ids = tokenizer(TEXT * (args.prompt // 64 + 1), return_tensors="pt").input_ids[:, : args.prompt]
    assert ids.shape[1] == args.prompt
    times = {dtype: [] for dtype in args.dtype}
    with torch.inference_mode():
        for model in models.values():
            seconds(model, ids, 8)
        for _ in range(args.rounds):
            for dtype, model in models.items():
                times[dtype].append((seconds(model, ids, 1), seconds(model, ids, args.new_tokens)))

    def rates(pairs):
        decode = [(args.new_tokens - 1) / (whole - first) for first, whole in pairs]
        whole = [args.new_tokens / whole for _, whole in pairs]
        return {name: {"median": round(statistics.median(r), 2), "min": round(min(r), 2), "max": round(max(r), 2)}
                for name, r in (("decode", decode), ("whole", whole))} | {
                    "prefill_ms": round(1e3 * statistics.median(first for first, _ in pairs), 1)}

    print(json.dumps({
        "what": "tokens per second", "torch": torch.__version__, "transformers": transformers.__version__,
        "model": args.model.name, "threads": args.threads, "rounds": args.rounds, "prompt": args.prompt,
        "new_tokens": args.new_tokens, "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        **{dtype: rates(pairs) for dtype, pairs in times.items()},
    }))


if __name__ == "__main__":
    main()
