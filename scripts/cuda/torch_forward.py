#!/usr/bin/env python3
"""A step of the same shape in plain PyTorch, eager: `transformers` where it is installed, else its operations written out.

    python3 torch_forward.py config.json --window 32 --prefix 512 --sequences 1,32

Random weights; a window over cached keys and values, logits of every row of it, all sequences as one batch (which a server's sequences
of different lengths are not). One JSON object on stdout, milliseconds.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def numbers(text):
    return [int(number) for number in text.split(",")]


def sizes(config):
    """The names that LLaDA has for the sizes, and those that everybody else has."""
    def of(*names, default=None):
        return next((config[name] for name in names if config.get(name) is not None), default)
    hidden, heads = of("d_model", "hidden_size"), of("n_heads", "num_attention_heads")
    return dict(hidden=hidden, heads=heads, kv_heads=of("n_kv_heads", "num_key_value_heads", default=heads), layers=of("n_layers", "num_hidden_layers"),
                mlp=of("mlp_hidden_size", "intermediate_size"), vocab=of("embedding_size", "vocab_size"),
                head_dim=of("head_dim", default=hidden // heads), eps=of("rms_norm_eps", default=1e-6), theta=of("rope_theta", default=1e6))


class Transformers:
    """The peer that people have: a Llama of this shape."""

    def __init__(self, s, device, dtype):
        import transformers
        self.by = "transformers " + transformers.__version__
        config = transformers.LlamaConfig(
            hidden_size=s["hidden"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"],
            intermediate_size=s["mlp"], vocab_size=s["vocab"], head_dim=s["head_dim"], rms_norm_eps=s["eps"], rope_theta=s["theta"],
            max_position_embeddings=8192, tie_word_embeddings=False, attn_implementation="sdpa")
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with torch.device(device):
            self.model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(default)
        self.cache = transformers.DynamicCache
        self.s, self.device, self.dtype = s, device, dtype

    def prepare(self, window, prefix, sequences):
        self.past = self.cache()
        shape = (sequences, self.s["kv_heads"], prefix, self.s["head_dim"])
        for layer in range(self.s["layers"] if prefix else 0):
            self.past.update(torch.randn(shape, device=self.device, dtype=self.dtype), torch.randn(shape, device=self.device, dtype=self.dtype), layer)
        self.prefix = prefix
        self.ids = torch.randint(self.s["vocab"], (sequences, window), device=self.device)

    def step(self):
        logits = self.model(self.ids, past_key_values=self.past, use_cache=True).logits
        self.past.crop(self.prefix)
        return logits


class Plain:
    """The same operations written out, where `transformers` is not installed."""

    def __init__(self, s, device, dtype):
        self.by, self.s, self.device, self.dtype = "plain PyTorch", s, device, dtype
        def matrix(out, inputs):
            return torch.randn(out, inputs, device=device, dtype=dtype) * 0.02
        query, key = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
        self.embedding, self.head = matrix(s["vocab"], s["hidden"]), matrix(s["vocab"], s["hidden"])
        self.layers = [dict(q=matrix(query, s["hidden"]), k=matrix(key, s["hidden"]), v=matrix(key, s["hidden"]), o=matrix(s["hidden"], query),
                            gate=matrix(s["mlp"], s["hidden"]), up=matrix(s["mlp"], s["hidden"]), down=matrix(s["hidden"], s["mlp"]))
                       for _ in range(s["layers"])]
        self.norm = torch.ones(s["hidden"], device=device, dtype=dtype)

    def prepare(self, window, prefix, sequences):
        s = self.s
        shape = (sequences, s["kv_heads"], prefix, s["head_dim"])
        self.past = [(torch.randn(shape, device=self.device, dtype=self.dtype), torch.randn(shape, device=self.device, dtype=self.dtype))
                     for _ in range(s["layers"])]
        angles = torch.arange(prefix, prefix + window, device=self.device)[:, None] * s["theta"] ** (
            -torch.arange(0, s["head_dim"], 2, device=self.device) / s["head_dim"])
        angles = torch.cat([angles, angles], -1)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        self.ids = torch.randint(s["vocab"], (sequences, window), device=self.device)

    def step(self):
        s, (batch, window) = self.s, self.ids.shape
        def rotate(x):
            half = x.shape[-1] // 2
            return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin
        def norm(x):
            return F.rms_norm(x, self.norm.shape, self.norm, s["eps"])
        x = F.embedding(self.ids, self.embedding)
        for layer, (keys, values) in zip(self.layers, self.past):
            h = norm(x)
            q, k, v = (F.linear(h, layer[name]).view(batch, window, -1, s["head_dim"]).transpose(1, 2) for name in "qkv")
            k, v = torch.cat([keys, rotate(k)], 2), torch.cat([values, v], 2)
            mixed = F.scaled_dot_product_attention(rotate(q), k, v, enable_gqa=s["heads"] != s["kv_heads"])
            x = x + F.linear(mixed.transpose(1, 2).reshape(batch, window, -1), layer["o"])
            h = norm(x)
            x = x + F.linear(F.silu(F.linear(h, layer["gate"])) * F.linear(h, layer["up"]), layer["down"])
        return F.linear(norm(x), self.head)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--window", type=numbers, default=[32])
    parser.add_argument("--prefix", type=numbers, default=[512])
    parser.add_argument("--sequences", type=numbers, default=[1])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    args = parser.parse_args()
    with open(args.config) as file:
        shape = sizes(json.load(file))
    try:
        model = Transformers(shape, args.device, DTYPES[args.dtype])
    except ImportError:
        model = Plain(shape, args.device, DTYPES[args.dtype])
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    cells = []
    with torch.inference_mode():
        for sequences in args.sequences:
            for prefix in args.prefix:
                for window in args.window:
                    model.prepare(window, prefix, sequences)
                    times = []
                    for run in range(args.warm_up + args.runs):
                        wait()
                        began = time.perf_counter()
                        model.step()
                        wait()
                        times.append((time.perf_counter() - began) * 1e3)
                    times = times[args.warm_up:]
                    cells.append({"window": window, "prefix": prefix, "sequences": sequences, "median": statistics.median(times),
                                  "min": min(times), "max": max(times)})
    print(json.dumps({"by": model.by, "torch": torch.__version__, "dtype": args.dtype, "cells": cells}))


main()
