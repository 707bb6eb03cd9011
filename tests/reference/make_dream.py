"""Fixtures of Dream: the authors' model class and diffusion loops, as Fast-dLLM ships them, on tiny random weights.

    python make_dream.py --fast-dllm DIR --out ../fixtures
"""

import argparse
import sys
import types
from pathlib import Path

import common
import torch

VOCAB, MASK, PAD, EPS = 160, 155, 150, 1e-3
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, mask_token_id=MASK,
    pad_token_id=PAD, bos_token_id=PAD, eos_token_id=PAD,
)


def shift(logits):
    return torch.cat([logits[:1], logits[:-1]])


def build(folder, config_class, model_class, generation_class):
    model = model_class(config_class(**SHAPE))
    common.fill(model, seed=23, embedding_std=1.0, head_std=5.0, quiet_rows=(MASK, PAD), mask_row=MASK)
    model.generation_config = generation_class(mask_token_id=MASK, pad_token_id=PAD, bos_token_id=PAD, eos_token_id=PAD)
    model.save_pretrained(folder)
    again = model_class.from_pretrained(folder).eval()
    ids = common.masked_input(7, VOCAB, MASK, (MASK, PAD))
    reference = common.forward(model, ids, model.model.layers, model.model.norm)
    assert torch.equal(reference["logits"], again(ids).logits)
    common.describe("dream", torch.stack([shift(row) for row in reference["logits"]]), ids == MASK)
    bf16 = again.bfloat16()(ids).logits.float()
    common.save_tensors(folder / "reference.safetensors", {"input_ids": ids, "logits_bf16": bf16, **reference})
    return model


def make_case(model, source, name, algorithm, seed, params, accept, block=None, holes=(), defect=None, note=None):
    """Run diffusion_generate of `source` from a seeded prompt; None if a decision is too near a tie or `accept` refuses."""
    prompt = common.token_ids(3000 + seed, (1, 5 + seed % 8), VOCAB, (MASK, PAD))
    prompt[0, list(holes)] = MASK
    torch.manual_seed(seed)
    config = {k: params[k] for k in ("max_new_tokens", "steps", "eps", "alg", "alg_temp", "temperature", "top_p", "top_k")}
    generation = source.DreamGenerationConfig(mask_token_id=MASK, pad_token_id=PAD, bos_token_id=PAD, eos_token_id=PAD, **config)
    extra = {k: params[k] for k in ("threshold", "block_length", "dual_cache") if k in params}
    for method in ("diffusion_generate", "_sample"):
        setattr(model, method, types.MethodType(getattr(source.DreamGenerationMixin, method), model))
    with common.Recorder(model, lambda past: past[0][0].shape[1]) as recorder:
        output = common.run_quietly(model.diffusion_generate, prompt, generation_config=generation, **extra)[0].tolist()
    if MASK in output:
        return None
    at, alg = prompt.shape[1], params["alg"]

    def limit_of(before):
        ends = range(at + block, len(before) + 1, block)
        return next((end for end in ends if MASK in before[:end]), at)

    def score(k, logits, _token):
        if alg == "origin":
            masked = torch.tensor(recorder.calls[k]["ids"]) == MASK
            chance = torch.zeros(len(masked))
            chance[masked] = 1 - torch.tensor(recorder.uniforms[k]["values"])
            return chance
        by_entropy = alg == "entropy" or (block and alg != "confidence_threshold")
        return source.sample_tokens(logits, 0.0, params["top_p"], params["top_k"], alg == "topk_margin", by_entropy)[0]

    gaps, steps = common.audit(
        recorder, output, MASK, lambda call: shift(call["logits"][0]), score, limit_of if block else None,
        (lambda call: call["start"] if call["kind"] == "full" else None) if block else None)
    extras = {}
    if alg == "origin":
        # The authors' own arithmetic, in f32.
        t = torch.linspace(1, params["eps"], params["steps"] + 1)
        extras["p_transfer"] = [float(1 - t[i + 1] / t[i]) for i in range(params["steps"] - 1)] + [1.0]
        for p, draw in zip(extras["p_transfer"], recorder.uniforms):
            gaps["threshold"] = min([gaps.get("threshold", 1)] + [abs(u - p) for u in draw["values"]])
    if alg == "confidence_threshold":
        for step in steps:
            if step["forced"] is None:
                for s in sorted(step["score"].values())[:-1]:
                    gaps["threshold"] = min(gaps.get("threshold", 1), abs(s - params["threshold"]))
    if not common.clear(gaps) or not accept(steps, output[at:]):
        return None
    case = {"name": name, "algorithm": algorithm, "prompt": prompt[0].tolist(), "params": dict(params, mask_id=MASK),
            "output": output, "history": recorder.states(output)[1:], "nfe": len(recorder.calls), "min_gap": gaps, **extras}
    if block:
        case["forwards"] = [{k: call[k] for k in ("kind", "start", "ids")} for call in recorder.calls]
    if recorder.uniforms:
        case["uniforms"] = recorder.uniforms
    return dict(case, **({"defect": defect} if defect else {}), **({"note": note} if note else {}))


def varied(_steps, text):
    return len(set(text)) >= len(text) // 4


def several(steps, text):
    sizes = [len(s["taken"]) for s in steps if s["forced"] is None]
    return max(sizes) > 1 and 1 in sizes and varied(steps, text)


def whole_canvas_cases(model, source):
    cases = []

    def add(alg, steps, gen=16, top_p=None, top_k=None, alg_temp=None, holes=(), threshold=None, accept=varied, note=None):
        params = dict(max_new_tokens=gen, steps=steps, eps=EPS, alg=alg, alg_temp=alg_temp, temperature=0.0, top_p=top_p, top_k=top_k)
        if threshold is not None:
            params["threshold"] = threshold
        name = f"{alg}-s{steps}-g{gen}" + "".join(
            f"-{k}{v}" for k, v in dict(top_p=top_p, top_k=top_k, alg_temp=alg_temp, threshold=threshold).items() if v is not None)
        name += "-holes" if holes else ""
        cases.append(common.first_good(range(1000), lambda seed: make_case(
            model, source, name, "dream", seed, params, accept, holes=holes, note=note)))

    for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
        for steps in (4, 8, 16):
            add(alg, steps)
    add("origin", 8, gen=32)
    add("maskgit_plus", 8, gen=32)
    add("entropy", 5, alg_temp=0.0)
    add("maskgit_plus", 8, alg_temp=0.0)
    for alg in ("maskgit_plus", "topk_margin", "entropy"):
        add(alg, 8, top_p=0.9)
        add(alg, 8, top_k=5)
        add(alg, 8, top_p=0.9, top_k=5)
    infill = "the mask ids inside the prompt are holes: Dream fills every mask of the canvas"
    add("entropy", 6, gen=8, holes=(1, 3), note=infill)
    add("origin", 6, gen=8, holes=(1, 3), note=infill)
    capped = ("Fast-dLLM's rule without blocks: a step commits at most (masks at the start / steps) + what earlier steps left "
              "over, and after the last step it goes on until no mask is left")
    add("confidence_threshold", 8, threshold=0.9, accept=several, note=capped)
    add("confidence_threshold", 4, threshold=0.6, accept=several, note=capped)
    return cases


def block_cases(model, source):
    cases = []
    forced = "the refresh forward commits the first token of the block whatever its confidence, and nothing else"
    for dual in (False, True):
        algorithm = "fast_dllm_dream_" + ("dual_cache" if dual else "prefix_cache")

        def add(alg, gen, block, steps, threshold=None, accept=several, defect=forced):
            params = dict(max_new_tokens=gen, steps=steps, eps=EPS, alg=alg, alg_temp=0.0, temperature=0.0, top_p=None, top_k=None,
                          block_length=block, dual_cache=dual, **({} if threshold is None else {"threshold": threshold}))
            name = f"{algorithm}-{alg}-s{steps}-g{gen}-b{block}" + (f"-threshold{threshold}" if threshold is not None else "")
            cases.append(common.first_good(range(1000), lambda seed: make_case(
                model, source, name, algorithm, seed, params, accept, block=block, defect=defect)))

        for threshold in (0.9, 0.6):
            add("confidence_threshold", 32, 8, 32, threshold)
        add("confidence_threshold", 16, 16, 16, 0.6)
        add("entropy", 16, 8, 8, accept=varied,
            defect=forced + "; every rule but confidence_threshold ranks by entropy, whatever its name")
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast-dllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(args.fast_dllm / "v1" / "dream"))
    from model import DreamConfig, DreamModel
    from model import generation_utils, generation_utils_block

    folder = args.out / "dream"
    model = build(folder, DreamConfig, DreamModel, generation_utils.DreamGenerationConfig)
    common.save_cases(folder / "decode.json", "Dream diffusion_generate, as in Fast-dLLM v1 dream/model/generation_utils.py",
                      whole_canvas_cases(model, generation_utils))
    common.save_cases(folder / "decode_cache.json", "Fast-dLLM v1 dream/model/generation_utils_block.py",
                      block_cases(model, generation_utils_block))


if __name__ == "__main__":
    main()
