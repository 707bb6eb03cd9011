#!/usr/bin/env python3
"""Training on this machine, within the time: first of the demonstration model at another budget, then of draft heads for its sibling.

Checks that loss falls and that the model is as right as before, and measures tokens a second. What has been trained is left in the results'
folder in pieces of at most 16 MiB (`cat model.safetensors.* > model.safetensors`).
"""

import json
import pathlib
import shutil

from common import ROOT, Run, parser

PIECE = 16 << 20


def split(folder):
    """Large files become numbered pieces; a training's own state stays behind."""
    for path in sorted(pathlib.Path(folder).rglob("*.safetensors")):
        if "training" in path.parts[len(pathlib.Path(folder).parts):]:
            path.unlink()
        elif path.stat().st_size > PIECE:
            data = path.read_bytes()
            for piece in range(0, len(data), PIECE):
                path.with_name(f"{path.name}.{piece // PIECE:03}").write_bytes(data[piece:piece + PIECE])
            path.unlink()


def curve(folder):
    lines = [json.loads(line) for path in pathlib.Path(folder).rglob("curve.jsonl") for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=6.5, help="for the model")
    arguments.add_argument("--drafter-minutes", type=float, default=1.5)
    arguments.add_argument("--batch", type=int, default=128)
    args = arguments.parse_args()
    run = Run("4_training", args)
    sizes = ["--batch", 4, "--layers", 1, "--hidden-size", 64, "--heads", 2, "--dtype", "f32"] if run.dry else ["--batch", args.batch]
    budget = ["--steps", 20] if run.dry else ["--minutes", args.minutes]
    found, rows = {"runs": []}, []
    model = run.out.resolve() / "nano-trained"
    shutil.rmtree(model, ignore_errors=True)
    device = ["--device", run.device]
    if run.call("train", "--out", model, "--tokenizer", "models/nano", "--seed", 1, *budget, *sizes, *device):
        told = curve(model)
        found["runs"].append({"what": "model", "curve": told})
        if not run.dry:
            run.check("the loss fell", told and told[-1]["loss"] < 0.5 * told[0]["loss"], f"{told[0]['loss']} to {told[-1]['loss']}")
        scored = run.json("eval", "nano", "--model", model, "--tasks", 4 if run.dry else 100, *device)
        if scored:
            found["runs"][-1]["eval"] = {key: scored[key] for key in ["passed", "tasks", "tokens_per_forward", "tokens_per_second"]}
            rows.append(["nano", len(told), told[-1]["tokens_per_second"] if told else 0, f"{scored['passed']}/{scored['tasks']}"])
        split(model)
    heads = run.out.resolve() / "redrafter-trained"
    shutil.rmtree(heads, ignore_errors=True)
    budget = ["--steps", 5, "--texts", 16, "--batch", 4, "--length", 16] if run.dry else ["--minutes", args.drafter_minutes]
    if run.time_for("draft heads", 60) and run.call("train", "drafter", "--teacher", "models/nano-ar", "--kind", "redrafter", "--layers", 1,
                                                    "--out", heads, "--seed", 1, *budget):
        told = curve(heads)
        found["runs"].append({"what": "redrafter on the CPU", "curve": told})
        rows.append(["redrafter (on the CPU)", len(told), "", ""])
        split(heads)
    run.finish(found, ["what", "points of its curve", "tokens/s", "right"], rows)


main()
