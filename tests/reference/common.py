"""What the fixture scripts share: tiny random weights, forward references, and a record of a decode.

Import this before torch: it turns off torch.compile, which the authors' LLaDA file asks for, and keeps to one thread.
"""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import io
import json
import math
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)

# A decode whose decisions hang on less than this would make a test of rounding, not of the rule.
MIN_GAP = 1e-3


def load_source(path, replace=()):
    """Import one file of the authors' code from its text, after literal substitutions that must each apply."""
    text = Path(path).read_text()
    for old, new in replace:
        if old not in text:
            raise ValueError(f"{path}: nothing to replace: {old!r}")
        text = text.replace(old, str(new))
    module = types.ModuleType(Path(path).stem)
    exec(compile(text, Path(path).name, "exec"), module.__dict__)
    return module


# ---------------------------------------------------------------------------------------------- weights


def fill(model, seed, *, embedding_std, head_std=None, quiet_rows=(), mask_row=None):
    """Random weights that make every part of the network matter.

    Norms lie in 0.5..1.5, biases are not zero, queries and keys are large enough for attention to be uneven.
    `quiet_rows` of the vocabulary head are shrunk, so that those tokens are never predicted; with a tied head
    (`head_std=None`) these are rows of the embedding. `mask_row` of the embedding is shrunk too: a masked position then
    carries mostly what attention brings to it, and predictions differ from position to position.
    """
    rng = torch.Generator().manual_seed(seed)
    tied = head_std is None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        parent, leaf = name.split(".")[-2:]
        if parameter is embedding.weight:
            parameter.normal_(0, embedding_std, generator=rng)
        elif parameter is head.weight:
            parameter.normal_(0, head_std / math.sqrt(parameter.shape[1]), generator=rng)
        elif "norm" in parent or parent == "ln_f":
            parameter.uniform_(0.5, 1.5, generator=rng)
        elif leaf == "bias":
            parameter.normal_(0, 0.3, generator=rng)
        else:
            gain = 1.6 if parent in ("q_proj", "k_proj") else 1.2
            parameter.normal_(0, gain / math.sqrt(parameter.shape[1]), generator=rng)
    rows = embedding.weight if tied else head.weight
    for row in quiet_rows:
        rows[row] *= 0.05
    if mask_row is not None and not (tied and mask_row in quiet_rows):
        embedding.weight[mask_row] *= 0.3
    return model.eval()


def token_ids(seed, shape, vocab, avoid=()):
    """Uniform ids below `vocab`, none of them in `avoid`."""
    rng = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([t for t in range(vocab) if t not in avoid])
    return allowed[torch.randint(len(allowed), shape, generator=rng)]


def masked_input(seed, vocab, mask_id, avoid):
    """[2, 24]: scattered masks in the first row, a masked tail in the second."""
    ids = token_ids(seed, (2, 24), vocab, avoid)
    ids[0, [3, 4, 9, 13, 14, 15, 20, 23]] = mask_id
    ids[1, 14:] = mask_id
    return ids


# ------------------------------------------------------------------------------------- forward references


def forward(model, ids, blocks, norm, **kwargs):
    """Logits, the hidden state after the last norm, and the residual stream after each block."""
    seen, handles = {}, []

    def keep(name):
        def hook(_module, _args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).float().clone()

        return hook

    for i, block in enumerate(blocks):
        handles.append(block.register_forward_hook(keep(f"layer_{i}")))
    handles.append(norm.register_forward_hook(keep("hidden")))
    logits = model(ids, **kwargs).logits.float().clone()
    for handle in handles:
        handle.remove()
    return {"logits": logits, **seen}


def save_tensors(path, tensors):
    save_file({k: v.detach().contiguous().clone() for k, v in sorted(tensors.items())}, path)
    readable(path.parent)
    print(f"{path.parent.name}/{path.name}:", {k: tuple(v.shape) for k, v in sorted(tensors.items())})


def readable(folder):
    """safetensors writes files that only their owner may read."""
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def describe(name, logits, masked):
    """Print what the fixture is worth: the spread of confidence and how often the prediction changes."""
    p, token = torch.softmax(logits.double(), -1).max(-1)
    p, token = p[masked], token[masked]
    print(f"{name}: confidence {p.min():.3f}..{p.max():.3f}, median {p.median():.3f}, "
          f"{len(token.unique())} tokens over {len(token)} positions")


# ------------------------------------------------------------------------------------------ decode records


class Recorder:
    """Stands in a model's forward while the authors' loop runs, and keeps every call and every draw of torch.rand."""

    def __init__(self, model, layer_past_length):
        self.model, self.past_length = model, layer_past_length
        self.calls, self.uniforms = [], []

    def __enter__(self):
        forward, rand = self.model.forward, torch.rand

        def recorded(input_ids, *args, **kwargs):
            past, replace = kwargs.get("past_key_values"), kwargs.get("replace_position")
            if replace is not None:
                kind, start = "block", int(replace[0].nonzero()[0])
            elif past is not None:
                kind, start = "suffix", self.past_length(past)
            else:
                kind, start = "full", 0
            ids = input_ids[0].tolist()
            output = forward(input_ids, *args, **kwargs)
            self.calls.append({"kind": kind, "start": start, "ids": ids, "logits": output.logits.clone()})
            return output

        def drawn(*args, **kwargs):
            u = rand(*args, **kwargs)
            self.uniforms.append({"shape": list(u.shape), "values": [float(v) for v in u.flatten()]})
            return u

        self.model.forward, torch.rand = recorded, drawn
        self._undo = lambda: (delattr(self.model, "forward"), setattr(torch, "rand", rand))
        return self

    def __exit__(self, *_):
        self._undo()

    def states(self, output):
        """The whole sequence before each call, and last of all the output."""
        sequence, states = list(self.calls[0]["ids"]), []
        for call in self.calls:
            end = call["start"] + len(call["ids"])
            sequence = sequence[: call["start"]] + call["ids"] + sequence[end:]
            states.append(list(sequence))
        return states + [output]


def run_quietly(function, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


def audit(recorder, output, mask_id, logits_of, confidence_of, limit_of=None, force_of=None):
    """Check that the record explains the output, and measure how far each decision was from a tie.

    logits_of(call)            the logits that the rule saw, aligned to the window's positions
    confidence_of(k, logits, token)   the score by which step k ranks each row of the window
    limit_of(before, start)    the first position that may not be committed in this step
    force_of(call)             a position that is committed whatever its score
    """
    states = recorder.states(output)
    select = argmax = math.inf
    steps = []
    for k, call in enumerate(recorder.calls):
        before, after, start = states[k], states[k + 1], call["start"]
        logits = logits_of(call).double()
        token = logits.argmax(-1)
        score = confidence_of(k, logits, token)
        limit = limit_of(before) if limit_of else len(before)
        open_ = [i for i in range(start, min(limit, start + len(call["ids"]))) if before[i] == mask_id]
        taken = [i for i in range(len(before)) if before[i] != after[i]]
        assert set(taken) <= set(open_), (k, taken, open_)
        for i in taken:
            assert after[i] == int(token[i - start]), f"step {k}: position {i} is not the argmax"
            top = logits[i - start].topk(2).values
            argmax = min(argmax, float(top[0] - top[1]))
        forced = force_of(call) if force_of else None
        ranked = [] if forced is not None else taken
        left = [i for i in open_ if i not in taken]
        if ranked and left:
            select = min(select, min(float(score[i - start]) for i in ranked) - max(float(score[i - start]) for i in left))
        steps.append({"open": open_, "taken": taken, "forced": forced,
                      "score": {i: float(score[i - start]) for i in open_}})
    gaps = {"argmax": argmax, "select": select}
    return {k: v for k, v in gaps.items() if v < math.inf}, steps


def first_good(seeds, attempt):
    """The first prompt seed for which `attempt` gives a case (it returns None to refuse)."""
    for seed in seeds:
        case = attempt(seed)
        if case is not None:
            return case
    raise RuntimeError("no prompt gives such a case")


def clear(gaps):
    return all(v >= MIN_GAP for v in gaps.values())


def save_cases(path, note, cases):
    """One case a line, so that a change of one case is a change of one line."""
    for case in cases:
        case["min_gap"] = {k: float(f"{v:.4g}") for k, v in case["min_gap"].items()}
    lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
    path.write_text(f'{{"note":{json.dumps(note)},"cases":[\n{lines}\n]}}\n')
    print(f"{path.parent.name}/{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")
    for case in cases:
        print(f"  {case['name']:44} nfe {case['nfe']:3} gap {case['min_gap']} {case.get('defect', '')[:60]}")
