"""Fixtures of LLaDA: the authors' model class (as Fast-dLLM ships it) and their decoding loops, on tiny random weights.

    python make_llada.py --fast-dllm DIR --llada DIR --out ../fixtures
"""

import argparse
import collections
import inspect
import sys
from pathlib import Path

import common
import torch

VOCAB, MASK, EOS = 160, 156, 150
SHAPE = dict(
    d_model=64, n_heads=4, n_layers=3, mlp_hidden_size=96, vocab_size=VOCAB, embedding_size=VOCAB, max_sequence_length=256,
    rope=True, rope_theta=500000.0, rms_norm_eps=1e-5, layer_norm_type="rms", block_type="llama", activation_type="silu",
    include_bias=False, include_qkv_bias=False, bias_for_layer_norm=False, attention_layer_norm=False,
    attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, scale_logits=False, input_emb_norm=False,
    mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS, init_device="cpu",
)
MODELS = {
    "llada": dict(SHAPE, n_kv_heads=2, weight_tying=False),
    "llada-tied": dict(SHAPE, n_kv_heads=4, weight_tying=True),
}


def build(name, folder, classes):
    config_class, model_class = classes
    model = model_class(config_class(**MODELS[name]), init_params=True)
    tied = MODELS[name]["weight_tying"]
    common.fill(model, seed=11, embedding_std=0.55 if tied else 1.0, head_std=None if tied else 5.0,
                quiet_rows=(MASK, EOS), mask_row=MASK)
    model.save_pretrained(folder)
    # The head as saved is the head that we mean: read it back through the authors' own loader.
    again = model_class.from_pretrained(folder).eval()
    ids = common.masked_input(5, VOCAB, MASK, (MASK, EOS))
    reference = common.forward(model, ids, model.model.transformer.blocks, model.model.transformer.ln_f)
    assert torch.equal(reference["logits"], again(ids).logits)
    common.describe(name, reference["logits"], ids == MASK)
    bf16 = again.bfloat16()(ids).logits.float()
    common.save_tensors(folder / "reference.safetensors", {"input_ids": ids, "logits_bf16": bf16, **reference})
    return model


def softmax_of(_k, logits, token):
    return torch.softmax(logits, -1).gather(-1, token[:, None])[:, 0]


def make_case(model, name, algorithm, function, seed, params, accept, defect=None, logits_of=None, note=None):
    """Run one of the authors' loops from a seeded prompt; None if a decision is too near a tie, or `accept` refuses."""
    prompt = common.token_ids(1000 + seed, (1, 5 + seed % 8), VOCAB, (MASK, EOS))
    torch.manual_seed(seed)
    arguments = {k: v for k, v in params.items() if k in inspect.signature(function).parameters}
    with common.Recorder(model, lambda past: past[0][0].shape[-2]) as recorder:
        result = common.run_quietly(function, model, prompt, mask_id=MASK, **arguments)
    output, nfe = result if isinstance(result, tuple) else (result, len(recorder.calls))
    assert nfe == len(recorder.calls)
    output = output[0].tolist()
    if MASK in output:
        return None
    at, block, blocks = prompt.shape[1], params["block_length"], params["gen_length"] // params["block_length"]

    def limit_of(before):
        return next((at + (b + 1) * block for b in range(blocks) if MASK in before[at + b * block:at + (b + 1) * block]), at)

    def score(k, logits, token):
        if params["remasking"] == "random":
            return torch.tensor(recorder.uniforms[k]["values"])
        if params.get("confidence_eos_eot_inf"):
            logits = logits.clone()
            logits[:, [params["eos_id"], params["eot_id"]]] = -torch.inf
        return softmax_of(k, logits, token)

    gaps, steps = common.audit(recorder, output, MASK, logits_of or (lambda call: call["logits"][0]), score, limit_of)
    for step in steps:
        ranked = sorted(step["score"].values(), reverse=True)
        if params.get("threshold") is not None:
            for s in ranked[1:]:
                gaps["threshold"] = min(gaps.get("threshold", 1), abs(s - params["threshold"]))
        if params.get("factor") is not None:
            step["limits"] = [-1] + [1 - params["factor"] / (j + 1) for j in range(2, len(ranked) + 1)]
            step["pass"] = next((j for j, (s, t) in enumerate(zip(ranked, step["limits"])) if s < t), len(ranked))
            for s, t in list(zip(ranked, step["limits"]))[1:step["pass"] + 1]:
                gaps["threshold"] = min(gaps.get("threshold", 1), abs(s - t))
    if params.get("factor") is not None:
        over = [k for k, s in enumerate(steps) if s["open"] and len(s["taken"]) > max(s["pass"], 1)]
        if bool(over) != (defect is not None):
            return None
        if over:
            defect = f"{defect} (history entries {over})"
    if not common.clear(gaps) or not accept(steps, output[at:]):
        return None
    case = {"name": name, "algorithm": algorithm, "prompt": prompt[0].tolist(), "params": dict(params, mask_id=MASK),
            "output": output, "history": recorder.states(output)[1:], "nfe": nfe, "min_gap": gaps}
    if any(call["kind"] != "full" for call in recorder.calls):
        case["forwards"] = [{k: call[k] for k in ("kind", "start", "ids")} for call in recorder.calls]
    if recorder.uniforms:
        case["uniforms"] = recorder.uniforms
    return dict(case, **({"defect": defect} if defect else {}), **({"note": note} if note else {}))


def anything(_steps, _text):
    return True


def llada_cases(model, path, few):
    """ML-GSAI/LLaDA generate.py. Its end-of-text ids are literals: each case reads the file with ids of this vocabulary."""
    cases = []

    def add(steps, gen, block, remasking="low_confidence", cfg=0.0, suppress=None, defect=None, note=None):
        name = f"{remasking}-s{steps}-g{gen}-b{block}" + (f"-cfg{cfg}" if cfg else "") + (f"-{suppress}" if suppress else "")
        params = dict(steps=steps, gen_length=gen, block_length=block, temperature=0.0, cfg_scale=cfg, remasking=remasking,
                      logits_eos_inf=suppress == "logits_eos_inf", confidence_eos_eot_inf=suppress == "confidence_eos_eot_inf")

        def attempt(seed):
            ids = dict(eos_id=EOS, eot_id=EOS)
            if suppress:
                # Two tokens that an unhindered run commits play end-of-text and end-of-turn: common ones, so that banning
                # them matters, or rare ones, so that few positions share the confidence 0 and tie.
                plain = run(seed, dict(params, logits_eos_inf=False, confidence_eos_eot_inf=False, **ids), anything)
                if plain is None:
                    return None
                counted = [t for t, _n in collections.Counter(plain["output"][len(plain["prompt"]):]).most_common()]
                counted = counted[:2] if suppress == "logits_eos_inf" else counted[-2:]
                if len(counted) < 2:
                    return None
                ids = dict(eos_id=counted[0], eot_id=counted[1])
                case = run(seed, dict(params, **ids), anything)
                return case if case and case["output"] != plain["output"] else None
            return run(seed, dict(params, **ids), lambda _s, text: len(set(text)) >= gen // 4)

        def run(seed, p, accept):
            source = common.load_source(path / "generate.py", [("126081", p["eos_id"]), ("126348", p["eot_id"])])

            def generate(model, prompt, attention_mask=None, steps=0, gen_length=0, block_length=0, temperature=0.0,
                         cfg_scale=0.0, remasking="", mask_id=0, logits_eos_inf=False, confidence_eos_eot_inf=False):
                # Without a mask the guided branch fails: attention_mask_ is never bound.
                return source.generate(model, prompt, attention_mask=torch.ones_like(prompt), steps=steps,
                                       gen_length=gen_length, block_length=block_length, temperature=temperature,
                                       cfg_scale=cfg_scale, remasking=remasking, mask_id=mask_id,
                                       logits_eos_inf=logits_eos_inf, confidence_eos_eot_inf=confidence_eos_eot_inf)

            def logits_of(call):
                logits = call["logits"][0].clone()
                if p["cfg_scale"]:
                    guess = call["logits"][1]
                    logits = guess + (p["cfg_scale"] + 1) * (logits - guess)
                if p["logits_eos_inf"]:
                    logits[:, p["eos_id"]] = -torch.inf
                return logits

            return make_case(model, name, "llada", generate, seed, p, accept, defect, logits_of, note)

        cases.append(common.first_good(range(200), attempt))

    guided = "run with attention_mask = ones, without which cfg_scale > 0 raises NameError"
    alias = ("at temperature 0 two names mean one tensor, so both ids get -inf: the softmax of every position leaves them "
             "out, and a position that predicts one of them has confidence 0, not -inf")
    add(16, 16, 16)
    add(16, 32, 8)
    add(5, 16, 16)
    if few:
        add(4, 16, 16, "random")
        return cases
    add(8, 16, 8)
    add(4, 16, 16)
    add(12, 16, 8)
    add(16, 8, 8, defect="nfe and history only: steps go on after the block is finished, 8 forwards commit nothing")
    for steps, gen, block in [(16, 16, 16), (8, 16, 8), (16, 32, 8), (4, 16, 16), (5, 16, 16)]:
        add(steps, gen, block, "random")
    add(16, 16, 16, cfg=1.5, note=guided)
    add(8, 16, 8, cfg=1.5, note=guided)
    add(5, 16, 16, cfg=0.5, note=guided)
    add(8, 16, 8, "random", cfg=1.5, note=guided)
    add(8, 16, 16, suppress="logits_eos_inf")
    add(16, 32, 8, suppress="logits_eos_inf")
    add(8, 16, 16, suppress="confidence_eos_eot_inf", note=alias)
    add(16, 32, 8, suppress="confidence_eos_eot_inf", note=alias)
    return cases


def fast_cases(model, path, few):
    """Fast-dLLM v1 llada/generate.py: without a cache, then with the prefix cache and with the dual cache."""
    source = common.load_source(path / "generate.py")
    plain, cached = [], []

    def several(steps, text):
        """Some steps commit one token and some several, most blocks take more than one, and the text is not one token."""
        sizes = [len(s["taken"]) for s in steps]
        alone = sum(len(s["taken"]) == len(s["open"]) >= 8 for s in steps)
        return max(sizes) > 1 and 1 in sizes and alone <= len(text) // 32 and len(set(text)) >= max(len(text) // 4, 4)

    def add(to, algorithm, function, gen, block, threshold=None, factor=None, steps=None, defect=None, accept=several):
        rule = f"threshold{threshold}" if threshold is not None else f"factor{factor}" if factor is not None else f"s{steps}"
        params = dict(steps=steps or gen, gen_length=gen, block_length=block, temperature=0.0,
                      remasking="low_confidence", threshold=threshold, factor=factor)
        name = f"{algorithm}-{rule}-g{gen}-b{block}" + ("-defect" if factor is not None and defect else "")
        to.append(common.first_good(range(4000), lambda seed: make_case(
            model, name, algorithm, function, seed, params, accept, defect)))

    last = "when every limit but the last one is met, the last token is committed although it fails its own limit"
    for threshold in (0.9, 0.6, 0.3):
        add(plain, "fast_dllm", source.generate, 32, 8, threshold)
    add(plain, "fast_dllm", source.generate, 16, 16, 0.6)
    if few:
        return plain, cached
    for factor in (1.0, 0.5):
        add(plain, "fast_dllm", source.generate, 16, 8, factor=factor)
    add(plain, "fast_dllm", source.generate, 16, 16, factor=1.0)
    for factor in (1.0, 0.5):
        add(plain, "fast_dllm", source.generate, 32, 8, factor=factor, defect=last)
    add(plain, "fast_dllm", source.generate, 32, 8, steps=16, accept=anything)
    for algorithm, function in (("fast_dllm_prefix_cache", source.generate_with_prefix_cache),
                                ("fast_dllm_dual_cache", source.generate_with_dual_cache)):
        for threshold in (0.9, 0.6):
            add(cached, algorithm, function, 32, 8, threshold)
        add(cached, algorithm, function, 16, 16, 0.6)
        add(cached, algorithm, function, 16, 8, factor=1.0)
        add(cached, algorithm, function, 32, 8, steps=16, accept=anything)
    return plain, cached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast-dllm", type=Path, required=True)
    parser.add_argument("--llada", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    code = args.fast_dllm / "v1" / "llada"
    sys.path.insert(0, str(code))
    from model import LLaDAConfig, LLaDAModelLM

    for name in MODELS:
        folder = args.out / name
        model = build(name, folder, (LLaDAConfig, LLaDAModelLM))
        few = name != "llada"
        plain, cached = fast_cases(model, code, few)
        common.save_cases(folder / "decode.json", "LLaDA generate.py and Fast-dLLM v1 llada/generate.py, no cache",
                          llada_cases(model, args.llada, few) + plain)
        if cached:
            common.save_cases(folder / "decode_cache.json", "Fast-dLLM v1 llada/generate.py with its caches", cached)


if __name__ == "__main__":
    main()
