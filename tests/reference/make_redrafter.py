"""Fixtures of ReDrafter, from Apple's own PyTorch code: `redrafter/`, described in the README there.

    python make_redrafter.py --redrafter ML_RECURRENT_DRAFTER --llama ../fixtures/llama --out ../fixtures

ML_RECURRENT_DRAFTER is a checkout of apple/ml-recurrent-drafter at bd8586bb9bbfa761644c36f932a0cd1eb3f1cdf9. Its own
modeling_llama.py runs the base model. Nothing in it is changed: the package's __init__ is passed over, because it imports the
chat, and torch's topk, rand and Categorical are listened to while Apple's functions run.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import sys
import types
from pathlib import Path
from unittest import mock

import common
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

BOS, EOS, NO_PAD = 1, 2, -1
SHAPES = [(1, 2), (1, 5), (3, 4), (5, 5), (10, 4)]
GOLDEN = [
    [[91, 92, 93, 95], [91, 92, 94, 96], [91, 92, 93, 97]],
    [[93, 94, 95, 92], [93, 95, 96, 93], [93, 94, 97, 96]],
]
CHAIN = 5
# A beam search ranks hundreds of scores, so that a gap of common.MIN_GAP in each cannot be had; f32 errs by some 1e-6.
MIN_BEAM_GAP = 1e-4
# The tiny base has neither chat nor end: its drafter is trained on what it says itself after random prompts.
TRAINING = dict(texts=1536, prompt=8, length=48, steps=1200, batch=128, lr=2e-3)


def apple(folder):
    """The modules of Apple's package, without the package's __init__."""
    package = types.ModuleType("recurrent_drafting")
    package.__path__ = [str(folder / "recurrent_drafting")]
    sys.modules["recurrent_drafting"] = package
    names = ["configuration_drafter", "modeling_drafter", "modeling_llama", "tree_attention", "recurrent_drafting",
             "autoregressive", "stats"]
    return types.SimpleNamespace(**{n: importlib.import_module(f"recurrent_drafting.{n}") for n in names})


def base_model(ap, folder):
    """The tiny Llama in Apple's class, with the head tied to the embedding, checked against transformers' own."""
    config = LlamaConfig.from_pretrained(folder)
    model = ap.modeling_llama.LlamaForCausalLM(config).eval()
    left = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert not left.unexpected_keys, left
    assert all(k == "lm_head.weight" or k.endswith("inv_freq") for k in left.missing_keys), left
    theirs = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return model, theirs


# --------------------------------------------------------------------------------------------------------- drafters


def new_drafter(ap, seed, **shape):
    drafter = ap.modeling_drafter.Drafter(ap.configuration_drafter.DrafterConfig(**shape)).eval()
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in drafter.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3, generator=rng)
        else:
            gain = 2.5 if name == f"lm_head.{shape['num_draft_layers']}.weight" else 1.2
            parameter.normal_(0, gain / math.sqrt(parameter.shape[1]), generator=rng)
    return drafter


def greedy_texts(theirs, count, prompt, length, vocab):
    """`prompt` random tokens and the base model's greedy continuation, and its hidden states: [count, length, ..]."""
    ids = common.token_ids(71, (count, prompt), vocab, (BOS, EOS))
    out = theirs(ids, use_cache=True, output_hidden_states=True)
    hidden = [out.hidden_states[-1]]
    while ids.shape[1] < length:
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        out = theirs(ids[:, -1:], past_key_values=out.past_key_values, use_cache=True, output_hidden_states=True)
        hidden.append(out.hidden_states[-1])
    return ids, torch.cat(hidden, 1)


def train(drafter, theirs, embeddings, *, texts, prompt, length, steps, batch, lr):
    """Cross-entropy of CHAIN - 1 drafted tokens, at every position behind the prompt; the recurrence is Apple's."""
    ids, hidden = greedy_texts(theirs, texts, prompt, length, embeddings.num_embeddings)
    drafted = CHAIN - 1
    starts = [(row, at) for row in range(texts) for at in range(prompt - 1, length - drafted - 1)]
    starts = torch.tensor(starts)
    rng = torch.Generator().manual_seed(72)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        row, at = starts[torch.randint(len(starts), (batch,), generator=rng)].unbind(1)
        with torch.enable_grad():
            context, state, loss = hidden[row, at], torch.zeros(batch, hidden.shape[-1]), 0.0
            for k in range(1, drafted + 1):
                state = torch.nn.functional.silu(drafter.rnn_w(embeddings(ids[row, at + k])) + drafter.rnn_u(state))
                logits = drafter.lm_head(torch.cat([context, state], -1))
                loss = loss + torch.nn.functional.cross_entropy(logits, ids[row, at + k + 1]) / drafted
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step + 1 == steps:
            print(f"  step {step} loss {loss.item():.3f}", flush=True)


def save_drafter(drafter, folder, dtype):
    """In Apple's layout. The weights are rounded to `dtype` first, so that all that follows is computed from what is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    drafter.to(dtype).save_pretrained(folder)
    common.readable(folder)
    return drafter.float()


# ------------------------------------------------------------------------------------------------------- beam search


class Beams:
    """Listens to torch.topk while Apple's beam search runs: the scores that it keeps, and how near the ranking is to a tie."""

    def __init__(self, width):
        self.width, self.topk, self.scores, self.gap = width, torch.topk, None, math.inf

    def __call__(self, values, k, *args, **kwargs):
        found = self.topk(values, k, *args, **kwargs)
        if values.ndim == 2 and k == self.width and values.shape[0] == 1:
            self.scores = found[0]
            ranked = self.topk(values[0], k + 1)[0]
            self.gap = min(self.gap, float((ranked[:-1] - ranked[1:]).min()))
        return found


def search(ap, drafter, context, init, embeddings, width, length):
    listener = Beams(width)
    with mock.patch.object(torch, "topk", listener):
        beams, log_probs = drafter.beam_search_candidates(
            context[None], torch.tensor([init]), embeddings, ap.modeling_drafter.BeamShape(width, length))
    return beams, log_probs, listener


def rounded(tensor):
    return json.loads(json.dumps(tensor.tolist()), parse_float=lambda x: float(f"{float(x):.7g}"))


class Forced:
    """Stands in torch.topk while Apple's beam search of width 1 runs, so that the beam is `chain` whatever the scores."""

    def __init__(self, chain):
        self.topk, self.rest = torch.topk, chain.tolist()

    def __call__(self, values, k, *args, **kwargs):
        if values.ndim != 2:
            return self.topk(values, k, *args, **kwargs)
        token = torch.tensor([[self.rest.pop(0)]])
        return values.gather(1, token), token


def network(ap, drafter, contexts, inits, embeddings):
    """The recurrence along a chain of random tokens, seen at the door of Apple's head."""
    seen, door = [], drafter.input_proj if hasattr(drafter, "input_proj") else drafter.lm_head
    hooks = [door.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone())),
             drafter.lm_head.register_forward_hook(lambda _m, _args, out: seen.append(out.clone()))]
    chains, states, logits, log_probs = [], [], [], []
    for at, (context, init) in enumerate(zip(contexts, inits)):
        seen.clear()
        forced = Forced(common.token_ids(64 + at, (CHAIN - 1,), embeddings.num_embeddings))
        with mock.patch.object(torch, "topk", forced):
            beams, log_p = drafter.beam_search_candidates(
                context[None], torch.tensor([init]), embeddings, ap.modeling_drafter.BeamShape(1, CHAIN))
        entered = torch.cat(seen[0::2], 1)[0]
        assert torch.equal(entered[:, :len(context)], context.expand(CHAIN - 1, -1))
        chains.append(beams[0, 0, :-1])
        states.append(entered[:, len(context):])
        logits.append(torch.cat(seen[1::2], 1)[0])
        log_probs.append(log_p[0, 0])
    for hook in hooks:
        hook.remove()
    return {"context": contexts, "init": torch.tensor(inits), "chain": torch.stack(chains), "states": torch.stack(states),
            "logits": torch.stack(logits), "log_probs": torch.stack(log_probs)}


def beam_cases(ap, name, drafter, contexts, inits, embeddings):
    cases = []
    for (width, length), at in itertools.product(SHAPES, range(len(inits))):
        beams, log_probs, seen = search(ap, drafter, contexts[at], inits[at], embeddings, width, length)
        token = log_probs[0].gather(-1, beams[0, :, 1:, None])[..., 0]
        assert torch.allclose(token.sum(-1), seen.scores[0], atol=1e-4)
        cases.append({"drafter": name, "context": at, "init": inits[at], "width": width, "length": length,
                      "beams": beams[0].tolist(), "scores": rounded(seen.scores[0]), "token_log_probs": rounded(token),
                      "min_gap": float(f"{seen.gap:.3g}")})
    return cases


def clear_contexts(ap, drafter, embeddings, draw):
    """The first three (context, init token) of `draw(seed)` that no search finds near a tie and whose best chain moves."""
    kept = []
    for seed in range(2000):
        context, init = draw(seed)
        gap = min(search(ap, drafter, context, init, embeddings, *shape)[2].gap for shape in SHAPES)
        chain = search(ap, drafter, context, init, embeddings, 1, CHAIN)[0].unique()
        if gap >= MIN_BEAM_GAP and len(chain) > 1:
            kept.append((context, init))
        if len(kept) == 3:
            return torch.stack([c for c, _ in kept]), [i for _, i in kept]
    raise RuntimeError("no such contexts")


# ----------------------------------------------------------------------------------------------------------- packing


def packing(ap, name, beams):
    past, tree = 3, ap.tree_attention
    packed, unpacker, mask, offsets = tree.pack(beams, torch.ones(1, past, dtype=torch.bool))
    assert bool(mask[..., :past].all()) and torch.equal(packed[0][unpacker[0]], beams[0])
    return {"name": name, "beams": beams[0].tolist(), "prefix_tree": tree._dedup_prefix(beams)[0].tolist(),
            "packed": packed[0].tolist(), "position_offsets": offsets[0].tolist(), "unpacker": unpacker[0].tolist(),
            "mask": ["".join("1" if x else "0" for x in row) for row in mask[0, :, past:].tolist()]}


# ------------------------------------------------------------------------------------------------------------ greedy


def plain_greedy(ap, model, prompt, count):
    """Apple's autoregressive loop, and the least gap between the first and second logit."""
    gaps, forward = [], model.llm.forward

    def listening(*args, **kwargs):
        out = forward(*args, **kwargs)
        first, second = out.logits[0, -1].topk(2).values.tolist()
        gaps.append(first - second)
        return out

    tokens = ap.recurrent_drafting.SpecialTokens(NO_PAD, EOS)
    with mock.patch.object(model.llm, "forward", listening):
        *_, ids = ap.autoregressive.generate(model, torch.tensor([prompt]), len(prompt) + count, tokens)
    return ids[0, len(prompt):].tolist(), min(gaps)


def speculative(ap, model, prompt, count, width, length):
    """Apple's generate in greedy mode: what each step drafted, chose and emitted."""
    steps, rd, drafter = [], ap.recurrent_drafting, model.drafter
    draft, choose = drafter.beam_search_candidates, rd._greedy_choose_from_candidates
    gap = math.inf

    def drafting(*args):
        nonlocal gap
        listener = Beams(width)
        with mock.patch.object(torch, "topk", listener):
            beams, log_probs = draft(*args)
        gap = min(gap, listener.gap)
        steps.append({"beams": beams[0].tolist(), "nodes": len(packing(ap, "", beams)["packed"])})
        return beams, log_probs

    def choosing(*args):
        accepted, beam = choose(*args)
        steps[-1].update(accepted=int(accepted), beam=int(beam))
        return accepted, beam

    args = dict(beam_shape=ap.modeling_drafter.BeamShape(width, length), sampling_args=rd.SamplingArgs(1.0, True),
                special_tokens=rd.SpecialTokens(NO_PAD, None))
    texts = []
    draft_here = mock.patch.object(drafter, "beam_search_candidates", drafting)
    with draft_here, mock.patch.object(rd, "_greedy_choose_from_candidates", choosing):
        for ids in model.generate(ap.stats.Ledger(), torch.tensor([prompt]), len(prompt) + count, **args):
            texts.append(ids[0, len(prompt):].tolist())
    done = 1
    for step, text in zip(steps, texts, strict=True):
        step["emitted"], done = text[done:], len(text)
        assert len(step["emitted"]) == step["accepted"] + 1 or len(text) == count
    return {"first": texts[0][0], "steps": steps, "output": texts[-1]}, gap


def greedy_cases(ap, model, theirs, vocab, count=40, width=5, length=5):
    cases = []
    for size, least in ((4, 8), (9, 12), (17, 16)):
        def attempt(seed):
            prompt = common.token_ids(7000 + seed, (size,), vocab, (BOS, EOS)).tolist()
            plain, gap = plain_greedy(ap, model, prompt, count)
            if len(plain) < count or gap < 1e-2:
                return None
            trace, beam_gap = speculative(ap, model, prompt, count, width, length)
            assert trace["output"] == plain, (trace["output"], plain)
            taken = [step["accepted"] for step in trace["steps"]]
            if beam_gap < MIN_BEAM_GAP or sum(taken) < least or min(taken) > 0 or len(set(plain)) < 16:
                return None
            ids = torch.tensor([prompt + plain])
            assert theirs(ids).logits[0, len(prompt) - 1:-1].argmax(-1).tolist() == plain
            return {"name": f"greedy-p{size}", "prompt": prompt, "width": width, "length": length, "max_new_tokens": count,
                    "plain": plain, **trace, "min_gap": {"argmax": float(f"{gap:.4g}"), "beam": float(f"{beam_gap:.3g}")}}

        cases.append(common.first_good(range(20000), attempt))
        case = cases[-1]
        print(f"  {case['name']}: accepted {[s['accepted'] for s in case['steps']]}, gap {case['min_gap']}")
    return cases


# ----------------------------------------------------------------------------------------------------------- sampled


def residual_of(ap, log_q, log_p, beam, accepted):
    """The unnormalised distribution that Apple's next token is drawn from."""
    rd, seen = ap.recurrent_drafting, []
    real = rd.dist.Categorical

    def categorical(probs):
        seen.append(probs.clone())
        return real(probs=probs)

    hidden = torch.zeros(1, log_p.shape[1], log_p.shape[2], 1)
    with mock.patch.object(rd.dist, "Categorical", categorical):
        rd._prepare_next_input(log_q, log_p, hidden, beam, accepted)
    return seen[0][0]


def sampled(ap, drafter, context, init, embeddings, temperature=0.8, width=3, length=4):
    """Apple's sampled acceptance over one beam, for uniforms that end in as many ways as there are."""
    beams, log_q, _ = search(ap, drafter, context, init, embeddings, width, length)
    packed, unpacker, _, _ = ap.tree_attention.pack(beams, torch.ones(1, 1, dtype=torch.bool))
    nodes, vocab = packed.shape[1], log_q.shape[-1]
    rng = torch.Generator().manual_seed(81)
    # A target that neither agrees with the drafter nor ignores it: the drafter's own logits where a node drafted, and noise.
    logits = 1.5 * torch.randn(nodes, vocab, generator=rng)
    for i, k in itertools.product(range(width), range(length - 1)):
        node = int(unpacker[0, i, k])
        logits[node] += log_q[0, i, k].clamp(min=-8) * (0.7 if i == int((unpacker[0, :, k] == node).nonzero()[0]) else 0.0)
    unpacked = ap.tree_attention.unpack(ap.modeling_drafter.warp_logits(logits[None]), unpacker)
    log_p = (unpacked / temperature).log_softmax(-1)
    kept, rd = {}, ap.recurrent_drafting
    ratio = (log_p[:, :, :-1].gather(-1, beams[:, :, 1:, None]) - log_q.gather(-1, beams[:, :, 1:, None])).exp()[..., 0]
    for _ in range(4000):
        uniforms = torch.rand(1, width, length - 1, generator=rng)
        with mock.patch.object(torch, "rand", lambda *_a, **_k: uniforms):
            accepted, beam = rd._choose_from_candidates(beams, log_p, log_q)
        key = (int(beam), int(accepted))
        clear = float((uniforms - ratio).abs().min()) > 1e-3
        if clear and (key not in kept):
            kept[key] = (uniforms[0], residual_of(ap, log_q, log_p, beam, accepted))
    keys = sorted(kept)
    print("  sampled (beam, accepted):", keys, "ratios", ratio[0].tolist())
    return {"beams": beams[0], "packed": packed[0], "unpacker": unpacker[0], "log_q": log_q[0], "logits": logits,
            "log_p": log_p[0], "temperature": torch.tensor(temperature), "uniforms": torch.stack([kept[k][0] for k in keys]),
            "beam": torch.tensor([k[0] for k in keys]), "accepted": torch.tensor([k[1] for k in keys]),
            "next_weights": torch.stack([kept[k][1] for k in keys])}


# -------------------------------------------------------------------------------------------------------------- main


def save_lines(path, note, cases):
    lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
    path.write_text(f'{{"note":{json.dumps(note)},"cases":[\n{lines}\n]}}\n')
    print(f"{path.parent.name}/{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redrafter", type=Path, required=True)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ap, out = apple(args.redrafter), args.out / "redrafter"
    llm, theirs = base_model(ap, args.llama)
    vocab, embeddings = llm.config.vocab_size, llm.get_input_embeddings()
    table = torch.nn.Embedding(64, 32)
    table.weight.normal_(0, 1, generator=torch.Generator().manual_seed(60))

    trained = new_drafter(ap, 61, vocab_size=vocab, hidden_size=48, exit_dim=96, num_draft_layers=2, rnn=True)
    train(trained, theirs, embeddings, **TRAINING)
    small = dict(vocab_size=64, hidden_size=32)
    drafters = {
        "trained": (save_drafter(trained, out / "trained", torch.bfloat16), embeddings),
        "projected": (save_drafter(new_drafter(ap, 62, **small, exit_dim=48, num_draft_layers=1, rnn=True), out / "projected",
                                   torch.float32), table),
        "additive": (save_drafter(new_drafter(ap, 63, **small, exit_dim=64, num_draft_layers=2, rnn=False), out / "additive",
                                  torch.float32), table),
    }

    def after_prompt(seed):
        ids = common.token_ids(8000 + seed, (1, 12), vocab, (BOS, EOS))
        got = theirs(ids, output_hidden_states=True)
        return got.hidden_states[-1][0, -1], int(got.logits[0, -1].argmax())

    def random_context(seed):
        rng = torch.Generator().manual_seed(9000 + seed)
        return torch.randn(32, generator=rng), int(torch.randint(64, (), generator=rng))

    beams, found = [], {}
    for name, (drafter, table_) in drafters.items():
        contexts, inits = clear_contexts(ap, drafter, table_, after_prompt if name == "trained" else random_context)
        found[name] = contexts, inits
        tensors = network(ap, drafter, contexts, inits, table_)
        if table_ is table:
            tensors["embedding"] = table.weight
        common.save_tensors(out / name / "reference.safetensors", tensors)
        beams += beam_cases(ap, name, drafter, contexts, inits, table_)
    save_lines(out / "beams.json", "beam_search_candidates", beams)

    packs = [packing(ap, f"golden-{i}", torch.tensor([rows])) for i, rows in enumerate(GOLDEN)]
    for case in beams:
        if case["context"] == 0 and (case["drafter"] == "trained" or case["width"] >= 5):
            name = f"{case['drafter']}-{case['width']}x{case['length']}"
            packs.append(packing(ap, name, torch.tensor([case["beams"]])))
    save_lines(out / "packing.json", "tree_attention.pack", packs)

    model = ap.recurrent_drafting.RecurrentDrafting(llm, drafters["trained"][0])
    save_lines(out / "greedy.json", "RecurrentDrafting.generate, greedy, beside autoregressive.generate",
               greedy_cases(ap, model, theirs, vocab))
    contexts, inits = found["projected"]
    common.save_tensors(out / "sampled.safetensors", sampled(ap, drafters["projected"][0], contexts[0], inits[0], table))


if __name__ == "__main__":
    main()
