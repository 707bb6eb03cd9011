"""Fixtures of Medusa, from its own code: `medusa/`, described in the README there.

    python make_medusa.py --medusa MEDUSA --out ../fixtures

MEDUSA is a checkout of FasterDecoding/Medusa at e2a5d20c048a9b0a4092e6933c34313687422518. Its copies of transformers' models
are older than the transformers used here and are not wanted: empty classes take their place while medusa_model.py is imported.
"""

import argparse
import importlib
import json
import math
import sys
import types
from pathlib import Path

import common
import torch

HIDDEN, VOCAB, HEADS, LAYERS = 32, 64, 4, 1
SMALL = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
ROWS = 3


def authors(folder):
    """Medusa's modules, without its package's __init__ and its copies of the base models."""
    for name in ("medusa", "medusa.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    for file, classes in {"modeling_llama_kv": ["LlamaForCausalLM"], "modeling_mistral_kv": ["MistralForCausalLM"]}.items():
        stand_in = types.ModuleType(file)
        for name in classes:
            setattr(stand_in, name, type(name, (torch.nn.Module,), {}))
        sys.modules[f"medusa.model.{file}"] = stand_in
    names = ["medusa_model", "utils", "medusa_choices"]
    return types.SimpleNamespace(**{n: importlib.import_module(f"medusa.model.{n}") for n in names})


def heads(medusa):
    """The ModuleList that MedusaModelABC builds, with random weights instead of the identity that training starts from."""
    block = medusa.medusa_model.ResBlock
    made = torch.nn.ModuleList(
        torch.nn.Sequential(*[block(HIDDEN) for _ in range(LAYERS)], torch.nn.Linear(HIDDEN, VOCAB, bias=False))
        for _ in range(HEADS))
    rng = torch.Generator().manual_seed(51)
    for name, parameter in made.named_parameters():
        std = 0.3 if name.endswith("bias") else (1.2 if "linear" in name else 2.5) / math.sqrt(HIDDEN)
        parameter.normal_(0, std, generator=rng)
    return made.eval()


def accept_cases(medusa, retrieve, nodes, tree):
    """Greedy acceptance: what the base says after each node, and the path that it agrees with longest."""
    paths = [[node for node in path if node >= 0] for path in retrieve.tolist()]
    parents = {b: a for path in paths for a, b in zip(path, path[1:])}
    # Not 0: that is what Medusa pads short paths with, and it accepts the padding where the base says 0.
    wrong = next(t for t in range(1, VOCAB) if t not in tree)
    first, middle, last = paths[0], paths[len(paths) // 2], paths[-1]
    cases = []
    for goal in (0, first[-1], first[-2], middle[-1], last[-1], last[-2]):
        says = torch.full((nodes,), wrong)
        node = goal
        while node:
            says[parents[node]] = tree[node]
            node = parents[node]
        logits = torch.nn.functional.one_hot(says, VOCAB).float()[retrieve]
        candidates = torch.tensor(tree + [0])[retrieve]
        best, accepted = medusa.utils.evaluate_posterior(logits, candidates, 0)
        path = retrieve[best, : int(accepted) + 1].tolist()
        cases.append({"argmax": says.tolist(), "best_candidate": int(best), "accept_length": int(accepted), "path": path})
    return cases


def tree_case(medusa, name, choices, head_logits, base_logits):
    buffers = medusa.utils.generate_medusa_buffers(choices, device="cpu")
    retrieve, drafted = buffers["retrieve_indices"], []
    for row in range(ROWS):
        cart, tree = medusa.utils.generate_candidates(
            head_logits[:, row][:, None, None], base_logits[row][None, None], buffers["tree_indices"], retrieve)
        drafted.append({"row": row, "tree": tree[0].tolist(), "cartesian": cart.tolist()})
    nodes = len(buffers["tree_indices"])
    return {
        "name": name, "choices": [list(c) for c in choices], "tree_indices": buffers["tree_indices"].tolist(),
        "position_ids": buffers["medusa_position_ids"].tolist(), "retrieve_indices": retrieve.tolist(),
        "mask": ["".join(str(int(x)) for x in row) for row in buffers["medusa_attn_mask"][0, 0].tolist()],
        "candidates": drafted, "accept": accept_cases(medusa, retrieve, nodes, drafted[0]["tree"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medusa", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    medusa, out = authors(args.medusa), args.out / "medusa"
    out.mkdir(parents=True, exist_ok=True)
    made = heads(medusa)
    config = medusa.medusa_model.MedusaConfig(medusa_num_heads=HEADS, medusa_num_layers=LAYERS, base_model_name_or_path="")
    config.save_pretrained(out)
    common.save_tensors(out / "medusa_lm_head.safetensors", made.state_dict())
    rng = torch.Generator().manual_seed(52)
    hidden, base = torch.randn(ROWS, HIDDEN, generator=rng), 3 * torch.randn(ROWS, VOCAB, generator=rng)
    logits = torch.stack([head(hidden) for head in made])
    ranked = logits.topk(11).values
    assert float((ranked[..., :-1] - ranked[..., 1:]).min()) > 1e-4, "candidates too near a tie"
    common.save_tensors(out / "reference.safetensors", {"hidden": hidden, "base_logits": base, "logits": logits})
    trees = {"mc_sim_7b_63": medusa.medusa_choices.mc_sim_7b_63, "small": SMALL}
    cases = [json.dumps(tree_case(medusa, n, c, logits, base), separators=(",", ":")) for n, c in trees.items()]
    note = "generate_medusa_buffers, generate_candidates and evaluate_posterior at temperature 0"
    (out / "trees.json").write_text(f'{{"note":{json.dumps(note)},"cases":[\n' + ",\n".join(cases) + "\n]}\n")


if __name__ == "__main__":
    main()
