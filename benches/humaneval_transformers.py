"""Greedy answers of `transformers` to HumanEval's problems through a model's chat template, to hold `lacuna eval humaneval --chat` to.

    python benches/humaneval_transformers.py MODEL HumanEval.jsonl.gz COMPLETIONS.jsonl --max-new-tokens 512
    lacuna eval humaneval --data HumanEval.jsonl.gz --chat --judge COMPLETIONS.jsonl

MODEL is a folder in Hugging Face's layout. The user's message is EvalPlus's (github.com/evalplus/evalplus), word
for word that of `lacuna eval`. Problems of like length run side by side, filled up on the left; what a row sees does not change by
that, but its sums are taken in another order, so a near tie may fall the other way than alone (`--batch 1`). One JSON object a
problem goes to COMPLETIONS: the rendered prompt, the answer's text, its tokens with the one that ended it left out, and the
seconds of its batch. A run that was cut off goes on where it stopped.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

INSTRUCTION = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"


def problems(path):
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as lines:
        return [json.loads(line) for line in lines if line.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("completions", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    done = {json.loads(line)["task"] for line in open(args.completions)} if args.completions.exists() else set()

    work = []
    for problem in problems(args.data):
        message = f"{INSTRUCTION}\n```\n{problem['prompt'].strip()}\n```\n"
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if problem["task_id"] not in done:
            work.append((problem["task_id"], prompt, ids))
    work.sort(key=lambda entry: len(entry[2]))

    with open(args.completions, "a") as out:
        for at in range(0, len(work), args.batch):
            part = work[at : at + args.batch]
            inputs = tokenizer.pad({"input_ids": [ids for _, _, ids in part]}, return_tensors="pt")
            width, start = inputs["input_ids"].shape[1], time.perf_counter()
            with torch.inference_mode():
                found = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
            seconds = time.perf_counter() - start
            for (task, prompt, ids), row in zip(part, found[:, width:].tolist()):
                tokens = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
                text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                record = {"task": task, "sample": 0, "prompt": prompt, "text": text, "generated_tokens": len(tokens)}
                record |= {"prompt_tokens": len(ids), "token_ids": tokens, "batch_seconds": round(seconds, 2)}
                out.write(json.dumps(record) + "\n")
            out.flush()
            print(f"{at + len(part)} of {len(work)}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
