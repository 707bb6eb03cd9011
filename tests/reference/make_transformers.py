"""Fixtures of the causal families, from transformers' own classes: llama, llama-rope, llama-sharded, qwen2 and qwen3.

    python make_transformers.py --out ../fixtures
    python make_transformers.py --out ../fixtures --v5-configs     # with transformers 5: only the newer form of config.json
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import common
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB, BOS, EOS = 160, 1, 2
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=BOS, eos_token_id=EOS, attn_implementation="eager",
)
LLAMA = dict(SHAPE, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True)
# 12 dimensions a head are 6 frequencies; with 64 positions as the original length the bands of llama3 scaling hold
# 1 of them (kept), 1 (blended) and 4 (divided by the factor).
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "llama": (LlamaConfig(**LLAMA), LlamaForCausalLM, 31),
    "llama-rope": (LlamaConfig(**LLAMA, rope_scaling=LLAMA3), LlamaForCausalLM, 37),
    "qwen2": (Qwen2Config(**SHAPE, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False), Qwen2ForCausalLM, 41),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True), Qwen3ForCausalLM, 43),
}


def references(name, model, again):
    ids = common.token_ids(9, (2, 24), VOCAB, (BOS, EOS))
    full = dict(attention_mask=torch.zeros(2, 1, 24, 24))
    blocks, norm = model.model.layers, model.model.norm
    causal, bidirectional = common.forward(model, ids, blocks, norm), common.forward(model, ids, blocks, norm, **full)
    assert torch.equal(causal["logits"], again(ids).logits)
    # A causal row cannot see the last token; a bidirectional one must.
    other = ids.clone()
    other[:, -1] = 100
    assert torch.equal(model(other).logits[:, :-1], causal["logits"][:, :-1])
    assert ((model(other, **full).logits - bidirectional["logits"])[:, :-1].abs().amax(-1) > 1e-4).all()
    common.describe(name, causal["logits"], torch.ones_like(ids, dtype=torch.bool))
    half = again.bfloat16()
    return {
        "input_ids": ids, **causal, **{f"{k}_full": v for k, v in bidirectional.items()},
        "logits_bf16": half(ids).logits.float(),
        "logits_full_bf16": half(ids, attention_mask=full["attention_mask"].bfloat16()).logits.float(),
    }


def greedy(model, name):
    """Plain greedy decoding without a cache: each step runs the whole sequence again."""
    cases = []
    for length in (1, 6, 20):
        def attempt(seed):
            ids = common.token_ids(5000 + seed, (1, length), VOCAB, (BOS, EOS))
            prompt, gap = ids[0].tolist(), 1.0
            for _ in range(16):
                top = model(ids).logits[0, -1].topk(2)
                gap = min(gap, float(top.values[0] - top.values[1]))
                ids = torch.cat([ids, top.indices[None, :1]], 1)
            output = ids[0].tolist()
            if gap < 1e-2 or EOS in output or len(set(output[length:])) < 4:
                return None
            return {"name": f"greedy-p{length}", "algorithm": "greedy", "prompt": prompt, "params": {"max_new_tokens": 16},
                    "output": output, "nfe": 16, "min_gap": {"argmax": gap}}

        cases.append(common.first_good(range(500), attempt))
    return cases


def v5_configs(out):
    """transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling; keep that form beside the other."""
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            transformers.AutoConfig.from_pretrained(out / name).save_pretrained(folder)
            shutil.copy(Path(folder) / "config.json", out / name / "config_v5.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--v5-configs", action="store_true")
    args = parser.parse_args()
    if args.v5_configs:
        return v5_configs(args.out)
    for name, (config, model_class, seed) in MODELS.items():
        folder = args.out / name
        model = model_class(config)
        tied = config.tie_word_embeddings
        common.fill(model, seed, embedding_std=0.6 if tied else 1.0, head_std=None if tied else 4.5, quiet_rows=(EOS,))
        model.save_pretrained(folder)
        again = model_class.from_pretrained(folder, attn_implementation="eager").eval()
        common.save_tensors(folder / "reference.safetensors", references(name, model, again))
        common.save_cases(folder / "decode.json", "greedy decoding, transformers", greedy(model, name))
        if name == "llama":
            sharded = args.out / "llama-sharded"
            model.save_pretrained(sharded, max_shard_size="100KB")
            common.readable(sharded)
            shards = set(json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"].values())
            print("llama-sharded:", sorted(shards))


if __name__ == "__main__":
    main()
