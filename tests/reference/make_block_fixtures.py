"""Fixtures of the block-causal families: SDAR and Fast-dLLM v2, their authors' model classes and decoding loops on tiny random
weights.

    python make_block_fixtures.py --sdar SDAR --fast-dllm FAST_DLLM --fast-dllm-v2-model FOLDER --out ../fixtures

Needs transformers 4.53.1 and einops 0.8.1 (see requirements-block.txt): both model files ask for classes that 4.51 has not yet
and 4.54 has no more. SDAR is a checkout of JetAstra/SDAR, FAST_DLLM one of NVlabs/Fast-dLLM, FOLDER the remote code of the
checkpoint Fast_dLLM_v2_7B (modeling.py and configuration.py).

What is done to the authors' code: torch.compile is off; SDAR's two kernels from flash_attn are replaced by what they compute, its
training loss by nothing; `torch.multinomial` takes the most probable token while SDAR's loop runs, since it can only sample.
"""

import argparse
import collections
import importlib.machinery
import math
import sys
import types
from pathlib import Path

import common
import torch
import torch.nn.functional as F

VOCAB, MASK, EOS = 160, 156, 150
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, use_sliding_window=False,
    mask_token_id=MASK, bos_token_id=EOS, eos_token_id=EOS,
)


# ------------------------------------------------------------------------------------------ the authors' code


def stand_in(name, **members):
    module = types.ModuleType(name)
    # transformers asks for the spec when it looks whether the package is there, and then finds no metadata: it is not.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(members)
    sys.modules[name] = module


def rms_norm(x, weight, bias, eps):
    assert bias is None
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def full_attention(query, key, value, causal, softmax_scale):
    """[batch, seq, heads, head_dim], everything visible."""
    assert not causal
    swap = lambda t: t.transpose(1, 2)
    return swap(F.scaled_dot_product_attention(swap(query), swap(key), swap(value), scale=softmax_scale, enable_gqa=True))


def package(folder, name, *modules):
    """The modules of a checkpoint's folder, which import one another relatively."""
    parent = types.ModuleType(name)
    parent.__path__ = [str(folder)]
    sys.modules[name] = parent
    return [importlib.import_module(f"{name}.{module}") for module in modules]


def sdar_classes(checkout):
    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton", "flash_attn.bert_padding"):
        stand_in(name, index_first_axis=None, pad_input=None, unpad_input=None, flash_attn_varlen_func=None,
                 flash_attn_func=full_attention)
    stand_in("flash_attn.ops.triton.layer_norm", rms_norm_fn=rms_norm)
    stand_in("sdar.fused_linear_diffusion_cross_entropy", FusedLinearDiffusionCrossEntropyLoss=None)
    folder = checkout / "training" / "model" / "SDAR-4B-Chat"
    configuration, modeling = package(folder, "sdar", "configuration_sdar", "modeling_sdar")
    return configuration.SDARConfig, modeling.SDARForCausalLM, common.load_source(checkout / "generate.py")


def fast_classes(checkout, folder):
    configuration, modeling = package(folder, "fast_dllm_v2", "configuration", "modeling")
    source, = package(checkout / "v2", "fast_dllm_v2_loop", "generation_functions")
    return configuration.Fast_dLLM_QwenConfig, modeling.Fast_dLLM_QwenForCausalLM, source


# --------------------------------------------------------------------------------------------------- recording


class Calls:
    """Every call of the model while an author's loop runs: its kind, where it starts, its ids and its logits."""

    def __init__(self, model, describe):
        self.model, self.describe, self.calls = model, describe, []

    def __enter__(self):
        forward = self.model.forward

        def recorded(*args, **kwargs):
            ids = (args[0] if args else kwargs["input_ids"])[0].tolist()
            kind, start = self.describe(kwargs)
            output = forward(*args, **kwargs)
            self.calls.append({"kind": kind, "start": start, "ids": ids, "logits": output.logits[0].clone()})
            return output

        self.model.forward = recorded
        return self

    def __exit__(self, *_):
        del self.model.forward


def told(calls, prompt, output, shift):
    """What each call changed: the difference to what the next one (or the output) shows of the same positions.
    True if one wrote over what was not masked."""
    sequence, rewritten = list(prompt), False
    for call, after in zip(calls, calls[1:] + [{"start": 0, "ids": output}]):
        start, end = call["start"], call["start"] + len(call["ids"])
        sequence[start:end] = call["ids"]
        # Where logits are shifted, a call that stores keys tells the token behind its own, too.
        end += shift if call["kind"] in ("prefill", "store") else 0
        sequence += [MASK] * (end - len(sequence))
        known = dict(zip(range(after["start"], after["start"] + len(after["ids"])), after["ids"]))
        call["edits"] = [[p, known[p]] for p in range(start, end) if known.get(p, sequence[p]) != sequence[p]]
        for position, token in call["edits"]:
            rewritten |= sequence[position] != MASK
            sequence[position] = token
    return rewritten


def measure(calls, shift, unit, chosen_by, threshold):
    """How far each decision was from a tie, and how many tokens each denoising call took of how many."""
    gaps, taken = collections.defaultdict(lambda: math.inf), []
    for call in calls:
        start, logits = call["start"], call["logits"].double()
        edits = dict(map(tuple, call["edits"]))
        for position, token in edits.items():
            row = logits[position - shift - start]
            top = row.topk(2)
            assert token == int(top.indices[0]), f"position {position} is not the argmax"
            gaps["argmax"] = min(gaps["argmax"], float(top.values[0] - top.values[1]))
        if call["kind"] not in ("denoise", "refine"):
            continue
        masked = [p for p, t in zip(range(start, start + len(call["ids"])), call["ids"]) if t == MASK]
        # Of a block the leftmost unit that has something open.
        masked = [p for p in masked if p // unit == masked[0] // unit]
        assert set(edits) <= set(masked)
        taken.append((len(edits), len(masked)))
        if chosen_by == "place":
            continue
        score = {p: float(torch.softmax(logits[max(p - shift - start, 0)], -1).max()) for p in masked}
        left = [score[p] for p in masked if p not in edits]
        if left:
            gaps["select"] = min(gaps["select"], min(score[p] for p in edits) - max(left))
        if threshold is not None:
            gaps["threshold"] = min([gaps["threshold"]] + [abs(s - threshold) for s in score.values()])
    return {k: v for k, v in gaps.items() if v < math.inf}, taken


def case_of(name, algorithm, prompt, params, calls, output, gaps, **more):
    kinds = collections.Counter(call["kind"] for call in calls)
    forwards = [{"kind": c["kind"], "start": c["start"], "length": len(c["ids"]), "edits": c["edits"]} for c in calls]
    return {"name": name, "algorithm": algorithm, "prompt": prompt, "params": dict(params, mask_id=MASK), "output": output,
            "nfe": len(calls), "kinds": dict(kinds), "forwards": forwards, "min_gap": gaps, **more}


def lively(text):
    return len(set(text)) >= len(text) // 3


# --------------------------------------------------------------------------------------------------------- SDAR


def sdar_case(model, source, name, seed, length, params, accept, note=None, defect=None):
    prompt = common.token_ids(7000 + seed, (1, length), VOCAB, (MASK, EOS))

    def describe(kwargs):
        first = kwargs["position_ids"][0, 0].item()
        stores = kwargs["store_kv"]
        kind = "denoise" if not stores else "prefill" if first == 0 and kwargs["position_ids"].shape[1] <= length else "store"
        return kind, first

    multinomial = torch.multinomial
    torch.multinomial = lambda probs, num_samples: probs.argmax(-1, keepdim=True)
    try:
        with Calls(model, describe) as record:
            output = source.block_diffusion_generate(
                model, {"input_ids": prompt}, MASK, temperature=1.0, top_k=0, top_p=1.0, **params)[0].tolist()
    finally:
        torch.multinomial = multinomial
    prompt = prompt[0].tolist()
    calls = record.calls
    # Blocks behind a stop are left as they were.
    rewritten = told(calls, prompt, output, 0)
    if rewritten != (defect is not None):
        return None
    by = "place" if params["remasking_strategy"] == "sequential" else "confidence"
    threshold = params["confidence_threshold"] if params["remasking_strategy"] == "low_confidence_dynamic" else None
    if rewritten:
        gaps, taken = {}, []
    else:
        gaps, taken = measure(calls, 0, params["block_length"], by, threshold)
    text = [t for t in output[length:] if t != MASK]
    if not common.clear(gaps) or not accept(taken) or not lively(text):
        return None
    more = {k: v for k, v in (("note", note), ("defect", defect)) if v}
    return case_of(name, "sdar", prompt, params, calls, output, gaps, **more)


def one_by_one(_taken):
    return True


def mixed(taken):
    """Some steps take one token, some several but not all."""
    return any(n == 1 < m for n, m in taken) and any(1 < n for n, m in taken)


def sdar_cases(model, source):
    cases = []

    def add(strategy, block, steps, length, gen, threshold=0.85, accept=one_by_one, **more):
        name = f"{strategy}-b{block}-s{steps}-p{length}" + (f"-t{threshold}" if "dynamic" in strategy else "")
        params = dict(gen_length=gen, block_length=block, denoising_steps=steps, remasking_strategy=strategy,
                      confidence_threshold=threshold)
        cases.append(common.first_good(
            range(4000), lambda seed: sdar_case(model, source, name, seed, length, params, accept, **more)))

    static, dynamic, sequential = "low_confidence_static", "low_confidence_dynamic", "sequential"
    for block, steps, length in [(4, 4, 8), (4, 4, 7), (4, 4, 3), (4, 4, 21), (4, 2, 8), (4, 3, 12), (8, 8, 11), (8, 4, 16), (8, 3, 24)]:
        add(static, block, steps, length, 4 * block - length % block)
    for block, length in [(4, 8), (4, 6), (4, 1), (8, 5), (8, 19)]:
        for threshold in (0.85, 0.5, 0.2):
            add(dynamic, block, block, length, 6 * block - length % block, threshold, mixed)
    # Everything passes, and nothing does.
    add(dynamic, 4, 4, 9, 15, 0.0)
    add(dynamic, 4, 4, 9, 15, 0.9999)
    # At least two a step, whatever the threshold.
    add(dynamic, 8, 4, 16, 32, 0.8)
    add(dynamic, 4, 2, 10, 18, 0.6)
    for block, steps, length in [(4, 4, 8), (4, 4, 5), (4, 2, 6), (8, 3, 12)]:
        add(sequential, block, steps, length, 4 * block - length % block)
    rewrites = "where a step's share is more than what is masked, topk takes cells that are not, and rewrites them"
    add(static, 4, 2, 9, 15, defect=rewrites)

    # A stop: one of the tokens that an unhindered run commits. The block that has it is completed, and no other is begun.
    def stopped(seed):
        params = dict(gen_length=32, block_length=4, denoising_steps=4, remasking_strategy=dynamic, confidence_threshold=0.5)
        free = sdar_case(model, source, "", seed, 10, params, mixed)
        if free is None:
            return None
        text = free["output"][10:]
        stop = next((t for i, t in enumerate(text) if 8 <= i < 20 and text.index(t) == i and (10 + i) % 4 < 3), None)
        if stop is None:
            return None
        return sdar_case(model, source, "stop", seed, 10, dict(params, stopping_criteria_idx=[stop]), mixed)

    cases.append(common.first_good(range(4000), stopped))
    return cases


def sdar(args):
    config_class, model_class, source = sdar_classes(args.sdar)
    folder = args.out / "sdar"
    model = model_class(config_class(**SHAPE, head_dim=16, block_size=4, sliding_window=None, fuse_cross_entropy=True))
    common.fill(model, seed=53, embedding_std=1.0, head_std=5.0, quiet_rows=(MASK, EOS), mask_row=MASK)
    model.save_pretrained(folder)
    tensors = {}
    for block in (4, 8):
        tensors |= sdar_reference(model, block)
    common.save_tensors(folder / "reference.safetensors", tensors)
    common.save_cases(folder / "decode.json", "JetAstra/SDAR generate.py, taking the most probable token", sdar_cases(model, source))


def sdar_reference(model, block):
    """Block-causal prefill of 24 tokens and, over what it stored, one denoising step of the next block."""
    from transformers.cache_utils import DynamicCache

    ids = common.token_ids(61, (1, 24), VOCAB, (MASK, EOS))
    step = common.token_ids(62 + block, (1, block), VOCAB, (MASK, EOS))
    step[0, 1::2] = MASK
    place = torch.arange(24 + block) // block
    mask = (place[:, None] >= place[None, :]).float()[None]
    position, past = torch.arange(24 + block)[None], DynamicCache()
    run = lambda ids, a, b, stores: common.forward(
        model, ids, model.model.layers, model.model.norm, attention_mask=mask[:, a:b, :b], position_ids=position[:, a:b],
        past_key_values=past, use_cache=True, store_kv=stores)
    prefill, denoise = run(ids, 0, 24, True), run(step, 24, 24 + block, False)
    assert past.get_seq_length() == 24
    common.describe(f"sdar b{block}", denoise["logits"], step == MASK)
    return {"input_ids": ids, f"hidden_b{block}": prefill["hidden"], f"logits_b{block}": prefill["logits"],
            f"step_ids_b{block}": step, f"step_logits_b{block}": denoise["logits"]}


# -------------------------------------------------------------------------------------------------- Fast-dLLM v2


def fast_case(model, source, name, seed, length, params, accept, defect=None):
    prompt = common.token_ids(9000 + seed, (1, length), VOCAB, (MASK, EOS))
    block, stored = params["block_size"], [0]

    def describe(kwargs):
        size = kwargs["input_ids"].shape[1]
        start = stored[0] + (kwargs.get("replace_position") or 0)
        if kwargs.get("update_past_key_values"):
            stored[0] += size
            return "prefill" if stored[0] <= length else "store", start
        return "refine" if kwargs.get("replace_position") is not None else "denoise", start

    with Calls(model, describe) as record:
        found = source.Fast_dLLM_QwenForCausalLM.batch_sample(
            model, prompt.clone(), types.SimpleNamespace(pad_token_id=0), min_len=length, seq_len=torch.tensor([length]),
            mask_id=MASK, temperature=0.0, **params)
    output, calls, prompt = found[0].tolist(), record.calls, prompt[0].tolist()
    stop = params["stop_token"]
    ended = output.index(stop, length) + 1 if stop in output[length:] else None
    if defect:
        calls_of = [dict(c, edits=[]) for c in calls]
        return case_of(name, "fast_dllm_v2", prompt, params, calls_of, output, {}, defect=defect)
    told(calls, prompt, output, 1)
    if ended:
        # The original completes the block behind a stop and then writes padding there: neither is wanted.
        calls[-1]["edits"] = [edit for edit in calls[-1]["edits"] if edit[0] < ended]
        while all(position >= ended for position, _token in calls[-1]["edits"]):
            calls.pop()
        output = output[:ended]
    gaps, taken = measure(calls, 1, params["small_block_size"], "confidence", params["threshold"])
    if not common.clear(gaps) or not accept(taken) or not lively(output[length:]):
        return None
    return case_of(name, "fast_dllm_v2", prompt, params, calls, output, gaps)


def fast_cases(model, source):
    cases = []

    def params_of(block, small, new, threshold, cached, stop=-1):
        return dict(block_size=block, small_block_size=small, max_new_tokens=new, threshold=threshold, use_block_cache=cached,
                    stop_token=stop)

    def add(block, small, length, new, threshold, cached, accept=mixed, **more):
        name = f"b{block}-{small}-p{length}-t{threshold}" + ("-cached" if cached else "")
        params = params_of(block, small, new, threshold, cached)
        cases.append(common.first_good(
            range(4000), lambda seed: fast_case(model, source, name, seed, length, params, accept, **more)))

    for cached in (False, True):
        add(32, 8, 40, 64, 0.5, cached)
        add(32, 8, 64, 64, 0.3, cached)
        add(32, 8, 5, 32, 0.7, cached)
        add(32, 32, 33, 32, 0.4, cached)
        add(16, 4, 21, 48, 0.6, cached)
        add(16, 4, 32, 32, 0.95, cached, one_by_one)
        add(16, 8, 3, 48, 0.3, cached)
    add(16, 4, 25, 32, 0.0, True, one_by_one)
    unseen = "a prompt of exactly one block is never run (min_len > block_size): the text does not depend on it"
    add(16, 4, 16, 32, 0.5, False, defect=unseen)

    def stopped(cached):
        def attempt(seed):
            params = params_of(32, 8, 64, 0.5, cached)
            free = fast_case(model, source, "", seed, 37, params, mixed)
            if free is None:
                return None
            text = free["output"][37:]
            # Not the first of a block: what the storing forward chose is not looked at by batch_sample.
            stop = next((t for i, t in enumerate(text) if 30 <= i < 50 and text.index(t) == i and (37 + i) % 32), None)
            if stop is None:
                return None
            return fast_case(model, source, "stop" + ("-cached" if cached else ""), seed, 37, dict(params, stop_token=stop), mixed)

        return attempt

    for cached in (False, True):
        cases.append(common.first_good(range(4000), stopped(cached)))
    return cases


def fast_reference(model):
    """Prefill of two blocks, a step of the third over what it stored, and a step of its second sub-block in the place of what
    that left of it in the block's own cache."""
    ids = common.token_ids(71, (1, 64), VOCAB, (MASK, EOS))
    step = common.token_ids(72, (1, 32), VOCAB, (MASK, EOS))
    step[0, 9:] = MASK
    refined = step[:, 8:16].clone()
    refined[0, [2, 5]] = torch.tensor([17, 93])
    blocks, norm = model.model.layers, model.model.norm
    kept = {}

    def run(ids, **kwargs):
        def keep(_module, _args, output):
            kept.update(past=output.past_key_values, block=output.block_past_key_values)

        handle = model.register_forward_hook(keep)
        found = common.forward(model, ids, blocks, norm, use_cache=True, **kwargs)
        handle.remove()
        return found

    prefill = run(ids, update_past_key_values=True, block_size=32)
    past = kept["past"]
    denoise = run(step, past_key_values=past, use_block_cache=True)
    refine = run(refined, past_key_values=past, use_block_cache=True, block_past_key_values=kept["block"], replace_position=8)
    assert past.get_seq_length() == 64
    common.describe("fast-dllm-v2", denoise["logits"], step == MASK)
    return {"input_ids": ids, "hidden": prefill["hidden"], "logits": prefill["logits"], "step_ids": step,
            "step_logits": denoise["logits"], "refine_ids": refined, "refine_logits": refine["logits"]}


def fast(args):
    config_class, model_class, source = fast_classes(args.fast_dllm, args.fast_dllm_v2_model)
    folder = args.out / "fast-dllm-v2"
    model = model_class(config_class(**SHAPE, bd_size=32))
    model.sample_with_top_p = types.MethodType(model_class.sample_with_top_p, model)
    common.fill(model, seed=59, embedding_std=1.0, head_std=5.0, quiet_rows=(MASK, EOS), mask_row=MASK)
    model.save_pretrained(folder)
    common.save_tensors(folder / "reference.safetensors", fast_reference(model))
    common.save_cases(folder / "decode.json", "NVlabs/Fast-dLLM v2/generation_functions.py batch_sample", fast_cases(model, source))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdar", type=Path, required=True)
    parser.add_argument("--fast-dllm", type=Path, required=True)
    parser.add_argument("--fast-dllm-v2-model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sdar(args)
    fast(args)


if __name__ == "__main__":
    main()
