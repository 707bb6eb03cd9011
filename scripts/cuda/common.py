"""What the scripts beside this one share: their flags, the binary and its libraries, a clock, tables and results.

Nothing but Python's own library; `torch` is only looked for, never imported, so that its memory stays free for the binary.
"""

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def parser(about):
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT", "cuda-results"), help="folder for the results [default: $OUT]")
    parser.add_argument("--device", default=os.environ.get("DEVICE", "cuda:0"))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes: does the script itself work?")
    parser.add_argument("--seconds", type=int, default=560, help="what does not begin before this many have passed is left out")
    return parser


class Run:
    """One script's run: its flags, its clock, and what it has found."""

    def __init__(self, name, args):
        self.name, self.args, self.began = name, args, time.monotonic()
        self.dry = args.dry_run or args.device == "cpu"
        self.device = "cpu" if self.dry else args.device
        self.out = pathlib.Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.lacuna = os.environ.get("LACUNA", str(ROOT / "target/release/lacuna"))
        if not os.access(self.lacuna, os.X_OK):
            raise SystemExit(f"error: there is no program {self.lacuna}: name the binary in LACUNA")
        self.env = dict(os.environ, LD_LIBRARY_PATH=":".join(libraries()))
        self.problems, self.left_out = [], []

    def left(self):
        return self.args.seconds - (time.monotonic() - self.began)

    def time_for(self, what, seconds=0):
        """Whether there is time for it; if not, it is noted."""
        if self.left() > seconds:
            return True
        self.left_out.append(what)
        return False

    def call(self, *arguments, program=None, check=True, env=None):
        """Runs the binary to its end, or to the end of this run's time, and gives what it wrote. `env` is added to its environment."""
        command = [program or self.lacuna, *map(str, arguments)]
        try:
            done = subprocess.run(command, cwd=ROOT, env={**self.env, **(env or {})}, capture_output=True, text=True,
                                  timeout=max(self.left() + 20, 1))
        except subprocess.TimeoutExpired:
            self.problems.append("out of time: " + " ".join(command[1:]))
            return None
        if done.returncode != 0 and check:
            self.problems.append(" ".join(command[1:]) + ": " + (done.stderr.strip().splitlines() or ["no reason given"])[-1])
            return None
        return done

    def json(self, *arguments, env=None):
        """What the binary prints with --json; None where it fails, which is noted."""
        done = self.call(*arguments, "--json", env=env)
        return done and json.loads(done.stdout)

    def check(self, what, holds, told=""):
        print(f"{'ok  ' if holds else 'BAD '} {what} {told}".rstrip(), flush=True)
        if not holds:
            self.problems.append(f"{what} {told}".rstrip())

    def check_on_gpu(self, what, holds, told=""):
        """`check`, of what only a GPU has."""
        if self.dry:
            print(f"-    {what}: a CPU cannot tell", flush=True)
        else:
            self.check(what, holds, told)

    def finish(self, found, header, rows):
        """Writes the result and prints a table of it, last; the exit status says whether all was well."""
        found = {
            "kind": "cuda-" + self.name, "date": datetime.date.today().isoformat(), "command": " ".join(["python3", *sys.argv]),
            "device": self.device, "gpu": gpu(), "dry_run": self.dry, "seconds": round(time.monotonic() - self.began, 1),
            "problems": self.problems, "left_out": self.left_out, **found,
        }
        path = self.out / f"{self.name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{self.name} on {found['gpu'] or 'the CPU'}, {found['seconds']} s, written to {path}")
        for problem in self.problems:
            print("problem:", problem)
        for what in self.left_out:
            print("left out for want of time:", what)
        table(header, rows)
        raise SystemExit(1 if self.problems else 0)


def libraries():
    """Folders of libtorch's CUDA half and of what it needs, as Python's own torch brings them."""
    given = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    spec = importlib.util.find_spec("torch")
    if not spec or not spec.origin:
        return given
    torch = pathlib.Path(spec.origin).parent
    return [str(torch / "lib"), *sorted(str(lib) for lib in (torch.parent / "nvidia").glob("*/lib")), *given]


def gpu():
    tool = shutil.which("nvidia-smi")
    if not tool:
        return None
    told = subprocess.run([tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], capture_output=True, text=True)
    return told.stdout.strip().splitlines()[0] if told.returncode == 0 and told.stdout.strip() else None


def table(header, rows):
    lines = [header, *[[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


TINY = {
    "llada": {"architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4,
              "mlp_hidden_size": 128, "vocab_size": 1024, "embedding_size": 1024, "max_sequence_length": 1024, "rope": True,
              "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "layer_norm_type": "rms", "activation_type": "silu", "block_type": "llama",
              "weight_tying": False, "mask_token_id": 1023, "torch_dtype": "bfloat16"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1024,
              "max_position_embeddings": 1024, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "hidden_act": "silu",
              "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    "sdar": {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 1024,
             "max_position_embeddings": 1024, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "hidden_act": "silu",
             "tie_word_embeddings": False, "mask_token_id": 1023, "block_size": 4, "torch_dtype": "bfloat16"},
}
TINY_OF = {"llada-8b": "llada", "dream-7b": "qwen2", "qwen2.5-7b": "qwen2", "sdar-4b": "sdar", "sdar-8b": "sdar"}


def shape(run, name):
    """The file of a shape's config.json; a tiny one of its family in a dry run."""
    if not run.dry:
        return ROOT / "benches/shapes" / f"{name}.json"
    path = run.out / f"tiny-{name}.json"
    path.write_text(json.dumps(TINY[TINY_OF[name]]))
    return path.resolve()
