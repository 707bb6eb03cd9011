"""Fixtures of GGUF import: tiny files as llama.cpp's converter writes them, and what transformers, gguf and llama.cpp read.

    python make_gguf.py --out ../fixtures/gguf     # transformers 5.23.0, gguf 0.19.0, torch 2.11.0, llama-cpp-python 0.3.36
    python make_gguf.py --out FOLDER --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

`llama.gguf` has every storage type that can be read and byte-level BPE cut as Llama 3's, `qwen2.gguf` biases and its own cuts,
`spm.gguf` is a SentencePiece vocabulary without a network. Beside each: `*.json` with token ids of texts, and, where there is a
network, the logits. `blocks.safetensors` has a few blocks of each type and their values.
"""

import argparse
import json
from pathlib import Path

import common
import gguf
import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

HIDDEN = FFN = 256
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32

CORPUS = """
def solve(xs):
    return [x * 2 for x in xs if x > 10]
The quick brown fox jumps over the lazy dog; it's what they'd do in 2024 and 2025, won't they?
for i in range(100):
    print(f"{i}: {i ** 2}")
Grüße aus München, naïve café. 東京は日本の首都です。
""" * 4

TEXTS = [
    "", " ", "a", "  two  spaces   and more    ", "Hello, world!", "it's they'll WE'RE i'd", "1234567890 12 3.14159 1e-7",
    "def f(x):\n    if x:\n\t\treturn x\n\n\n    return None\n", "\n\n \n x", "trailing space ", "tab\tand\r\nwindows\r\nlines",
    "Grüße, naïve café, Ωmega, дом", "東京は日本の首都です", "emoji 🙂👩‍👩‍👧‍👦🇩🇪 end", "½ ² Ⅷ ٣ १२३", "a\u00a0b\u2003c\u200bd",
    "<|im_start|>user\nhi<|im_end|>\n", "no<|im_end|>gap<|im_start|> x", "<tool> word <tool>", "x" * 70, "!!!???...,,,;;;",
    "price: $1,000.50 (50% off) <a href='#'>@me</a>", "\x00\x07 control", "don't stop", "The quick brown fox",
]

CHAT = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ------------------------------------------------------------------------------------------------ blocks


def half(x):
    return np.frombuffer(np.float16(x).tobytes(), np.uint8)


def pack_scales(scales, mins):
    """The 12 bytes of eight scales and minimums of 6 bits (the inverse of ggml's get_scale_min_k4)."""
    out = np.zeros(12, np.uint8)
    out[0:4] = scales[:4] | (scales[4:] >> 4) << 6
    out[4:8] = mins[:4] | (mins[4:] >> 4) << 6
    out[8:12] = (scales[4:] & 15) | (mins[4:] & 15) << 4
    return out


def k_block(kind, rng, std):
    """One random block of a K type, of mean near zero."""
    def byte(n):
        return rng.integers(0, 256, n, dtype=np.uint8)

    if kind == Type.Q6_K:
        scales = rng.integers(-127, 128, 16).astype(np.int8).view(np.uint8)
        return np.concatenate([byte(128), byte(64), scales, half(std / (73 * 18.5))])
    top = 16 if kind == Type.Q4_K else 32
    scales = rng.integers(8, 64, 8).astype(np.uint8)
    mins = np.minimum(scales.astype(int) + rng.integers(-2, 3, 8), 63).astype(np.uint8)
    d = std / (36 * top * 0.29)
    parts = [half(d), half(d * (top - 1) / 2), pack_scales(scales, mins)]
    return np.concatenate(parts + ([byte(32)] if kind == Type.Q5_K else []) + [byte(128)])


def encode(values, kind, rng):
    """Bytes [rows, bytes per row]; K types, which gguf cannot quantise to, get random blocks of the same spread."""
    if kind in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        rows, std = values.shape[0], float(values.std())
        per_row = values.shape[1] // 256
        return np.stack([np.concatenate([k_block(kind, rng, std) for _ in range(per_row)]) for _ in range(rows)])
    if kind in (Type.F32, Type.F16):
        return values.astype(np.float32 if kind == Type.F32 else np.float16)
    return gguf.quants.quantize(values, kind)


KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def blocks(path):
    """Blocks of bytes as they may come: any bits but for scales, which are finite."""
    rng, tensors = np.random.default_rng(7), {}
    for kind in KINDS:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        count = 3 if elements == 256 else 8
        data = rng.integers(0, 256, (count, size), dtype=np.uint8)
        # Where f16 scales lie in a block.
        at = {Type.Q6_K: [208], Type.Q4_0: [0], Type.Q5_0: [0], Type.Q8_0: [0]}.get(kind, [0, 2])
        for row in data if elements > 1 else []:
            for place in at:
                row[place:place + 2] = half(rng.normal() * 0.1)
        if kind in (Type.F32, Type.F16, Type.BF16):
            data = encode(rng.normal(size=(count, 1)).astype(np.float32), kind, rng).view(np.uint8).reshape(count, size)
        values = gguf.quants.dequantize(data.view({Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8)), kind)
        assert np.isfinite(values).all()
        tensors[f"{kind.name}.bytes"] = torch.from_numpy(data.copy())
        tensors[f"{kind.name}.values"] = torch.from_numpy(np.ascontiguousarray(values, np.float32).reshape(-1))
    save_file(tensors, path)


# -------------------------------------------------------------------------------------------- vocabulary


def byte_level(regex, size):
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def add_byte_level(writer, pre, regex, size, begins):
    tokens, merges = byte_level(regex, size)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokens, types = tokens + special + ["<tool>"], types + [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.USER_DEFINED]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|begin|>"))
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eot_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(begins)
    writer.add_chat_template(CHAT)
    return len(tokens)


def sentencepiece(path):
    """Characters, bytes and merged words, scored as SentencePiece does: the earlier merged, the better."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    words.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=260, show_progress=False))
    vocab = words.get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    merged = [piece for piece in pieces if len(piece) > 1]
    single = [piece for piece in pieces if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + merged + single
    kind = gguf.TokenType
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + [kind.NORMAL] * (len(merged) + len(single))
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(single))]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add_network(writer, "llama", len(tokens), 0, 32, 1, 1, 16)
    # An embedding, for the vocabulary's size.
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
    finish(writer)


# ----------------------------------------------------------------------------------------------- networks


def add_network(writer, arch, vocab, layers, hidden, heads, kv_heads, ffn):
    writer.add_vocab_size(vocab)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(max(layers, 1))
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5 if arch == "llama" else 1e-6)
    writer.add_rope_freq_base(10000.0 if arch == "llama" else 1e6)
    if arch == "llama":
        writer.add_rope_dimension_count(hidden // heads)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensors(writer, rng, vocab, layers, hidden, heads, kv_heads, ffn, kinds, bias, tied):
    """`kinds` cycles over the matrices of the layers. Rows of queries and keys need no permutation here: they are random."""
    def add(name, shape, kind, std):
        values = rng.normal(size=shape).astype(np.float32) * std
        writer.add_tensor(name, encode(values, kind, rng), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, rng.uniform(0.5, 1.5, hidden).astype(np.float32))

    add("token_embd.weight", (vocab, hidden), Type.Q8_0, 0.6 if tied else 1.0)
    dim, order = hidden // heads, iter(kinds)
    for layer in range(layers):
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
        shapes = {"attn_q": (heads * dim, hidden), "attn_k": (kv_heads * dim, hidden), "attn_v": (kv_heads * dim, hidden),
                  "attn_output": (hidden, heads * dim), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
                  "ffn_down": (hidden, ffn)}
        for name, shape in shapes.items():
            gain = 1.6 if name in ("attn_q", "attn_k") else 1.2
            add(f"blk.{layer}.{name}.weight", shape, next(order), gain / shape[1] ** 0.5)
            if bias and name in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{layer}.{name}.bias", rng.normal(size=shape[0]).astype(np.float32) * 0.3)
    norm("output_norm.weight")
    if not tied:
        add("output.weight", (vocab, hidden), Type.Q6_K, 4.5 / hidden ** 0.5)


def llama(path):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import _LLAMA3_SPLIT
    writer = GGUFWriter(path, "llama")
    vocab = add_byte_level(writer, "llama-bpe", _LLAMA3_SPLIT, 295, True)
    add_network(writer, "llama", vocab, 2, HIDDEN, HEADS, KV_HEADS, FFN)
    kinds = [Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q4_0, Type.Q4_1, Type.Q5_K, Type.Q4_K,
             Type.Q5_0, Type.F16, Type.BF16, Type.Q5_1, Type.Q4_K, Type.Q4_0, Type.Q6_K]
    add_tensors(writer, np.random.default_rng(3), vocab, 2, HIDDEN, HEADS, KV_HEADS, FFN, kinds, False, False)
    finish(writer)


def qwen2(path):
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
    writer = GGUFWriter(path, "qwen2")
    vocab = add_byte_level(writer, "qwen2", PRETOKENIZE_REGEX, 290, False)
    add_network(writer, "qwen2", vocab, 2, 64, 4, 2, 96)
    kinds = [Type.Q8_0, Type.F16, Type.Q4_1, Type.Q8_0, Type.BF16, Type.Q4_0, Type.Q5_1] * 2
    add_tensors(writer, np.random.default_rng(5), vocab, 2, 64, 4, 2, 96, kinds, True, True)
    finish(writer)


def spm_reference(path):
    """llama.cpp's tokens: before a text that begins with a space, transformers leaves out the one that SentencePiece adds."""
    vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def tokens(text, begin):
        return vocabulary.tokenize(text.encode(), add_bos=begin, special=True)

    cases = [{"text": text, "ids": tokens(text, False), "special": tokens(text, True)} for text in TEXTS + ["<s>hi</s> there"]]
    path.with_suffix(".json").write_text(json.dumps({"texts": cases}, ensure_ascii=False, indent=1) + "\n")


def reference(path):
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    cases = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        cases.append({"text": text, "ids": ids, "special": tokenizer(text).input_ids})
    messages = [{"role": "user", "content": "Say 12 + 30."}, {"role": "assistant", "content": "42"},
                {"role": "user", "content": "Grüße"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    record = {"texts": cases, "messages": messages, "chat": chat}
    path.with_suffix(".json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    ids = common.token_ids(9, (2, 24), model.config.vocab_size)
    logits = model(ids).logits
    common.describe(path.stem, logits, torch.ones_like(ids, dtype=torch.bool))
    common.save_tensors(path.with_suffix(".safetensors"), {"input_ids": ids, "logits": logits})


def smollm2(path, out):
    """What tests/smollm2.rs compares. Tokens are llama.cpp's: transformers does not know how SmolLM2 cuts digits off."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = TEXTS + [CORPUS, Path(__file__).read_text(), Path(__file__).with_name("README.md").read_text()]
    cases = [{"text": text, "llama_cpp": vocabulary.tokenize(text.encode(), add_bos=False, special=True),
              "transformers": tokenizer(text, add_special_tokens=False).input_ids} for text in texts]
    messages = [{"role": "user", "content": "Say 12 + 30."}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompts = [chat, "The capital of France is", "def fibonacci(n):\n    ", "1, 2, 3, 5, 8,", TEXTS[11] + TEXTS[12],
               "".join(TEXTS[:12])]
    tensors = {}
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([vocabulary.tokenize(prompt.encode(), add_bos=False, special=True)])
        logits = model(ids).logits
        tensors |= {f"input_ids_{index}": ids, f"logits_{index}": logits}
        print(repr(prompt[:40]), ids.shape[1], repr(tokenizer.decode(logits[0, -1].argmax())))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "smollm2.safetensors")
    (out / "smollm2.json").write_text(json.dumps({"texts": cases, "messages": messages, "chat": chat, "prompts": len(prompts)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path, help="SmolLM2's GGUF file: write what tests/smollm2.rs needs, and nothing else")
    args = parser.parse_args()
    out = args.out
    if args.smollm2:
        return smollm2(args.smollm2, out)
    out.mkdir(parents=True, exist_ok=True)
    blocks(out / "blocks.safetensors")
    for make in (llama, qwen2):
        path = out / f"{make.__name__}.gguf"
        make(path)
        reference(path)
    sentencepiece(out / "spm.gguf")
    spm_reference(out / "spm.gguf")
    common.readable(out)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:8} {path.name}")


if __name__ == "__main__":
    main()
