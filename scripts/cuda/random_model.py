#!/usr/bin/env python3
"""A model folder of random weights for a config.json: what a server can load where no real weights are at hand.

    python3 random_model.py benches/shapes/llada-8b.json FOLDER

bf16, one file; tokenizer and settings are those of models/nano, whose tokens are the first of the vocabulary. Needs PyTorch for the numbers.
"""

import argparse
import json
import math
import pathlib
import shutil

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
PIECE = 1 << 26


def tensors(config):
    """Names and shapes, by the names that the family's checkpoints have."""
    if config["model_type"] == "llada":
        hidden, layers, heads, kv = config["d_model"], config["n_layers"], config["n_heads"], config["n_kv_heads"]
        mlp, vocab, dim = config["mlp_hidden_size"], config["embedding_size"], config["d_model"] // config["n_heads"]
        names = dict(embedding="model.transformer.wte", layer="model.transformer.blocks.{}", q="q_proj", k="k_proj", v="v_proj", o="attn_out", gate="ff_proj",
                     up="up_proj", down="ff_out", norms=["attn_norm", "ff_norm"], last="model.transformer.ln_f", head="model.transformer.ff_out")
        bias, qk_norm = False, False
    else:
        hidden, layers, heads, kv = (config[name] for name in ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
        mlp, vocab, dim = config["intermediate_size"], config["vocab_size"], config.get("head_dim") or hidden // heads
        names = dict(embedding="model.embed_tokens", layer="model.layers.{}", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
                     o="self_attn.o_proj", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
                     norms=["input_layernorm", "post_attention_layernorm"], last="model.norm", head="lm_head")
        bias, qk_norm = config["model_type"].lower() in ("qwen2", "dream"), config["model_type"] in ("sdar", "qwen3")
    yield names["embedding"] + ".weight", [vocab, hidden]
    for layer in range(layers):
        prefix = names["layer"].format(layer) + "."
        for part, out, inputs in [("q", heads * dim, hidden), ("k", kv * dim, hidden), ("v", kv * dim, hidden), ("o", hidden, heads * dim),
                                  ("gate", mlp, hidden), ("up", mlp, hidden), ("down", hidden, mlp)]:
            yield prefix + names[part] + ".weight", [out, inputs]
            if bias and part in "qkv":
                yield prefix + names[part] + ".bias", [out]
        for norm in names["norms"]:
            yield prefix + norm + ".weight", [hidden]
        for norm in ["self_attn.q_norm", "self_attn.k_norm"] if qk_norm else []:
            yield prefix + norm + ".weight", [dim]
    yield names["last"] + ".weight", [hidden]
    yield names["head"] + ".weight", [vocab, hidden]


def write(config_path, folder, device):
    """Safetensors by hand: a header of names, shapes and places, then the numbers. A few tensors' worth of memory is all it takes."""
    config = json.loads(pathlib.Path(config_path).read_text())
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header, at, all_tensors = {}, 0, list(tensors(config))
    for name, shape in all_tensors:
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(1)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in all_tensors:
            left = math.prod(shape)
            while left:
                count = min(left, PIECE)
                plain = torch.ones(count, device=device) if len(shape) == 1 else torch.randn(count, device=device) * 0.02
                file.write(plain.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
                left -= count
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(ROOT / "models/nano" / name, folder / name)
    return at


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("folder")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"{write(args.config, args.folder, args.device) / 1e9:.2f} GB of weights")
