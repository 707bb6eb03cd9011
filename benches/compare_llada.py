"""The authors' LLaDA `generate.py` (PyTorch) against lacuna, in turn, on this machine: same weights, canvas and steps.

    python benches/compare_llada.py MODEL --llada DIR --fast-dllm DIR --dtype f32 --rounds 5 --threads 2

MODEL is a LLaDA checkpoint, or a Llama one with tied weights, which is written anew as a LLaDA: the names of tensors and settings
differ, the network does not but for its attention, and what it says is no text but takes as long. `--llada` is a checkout of
ML-GSAI/LLaDA, whose loop is run, and `--fast-dllm` one of NVlabs/Fast-dLLM, which holds the authors' network with the layers
as they were. Runs in a Python with the transformers that these ask for (4.51), from the project's folder, with
target/release/lacuna built. A round starts both programs anew; each generates once to warm up and once for the clock, greedily,
by low-confidence remasking in one block. Both commit the same number of tokens at each step, and how many tokens are the
same is told too. torch.compile, which that copy of the network puts around one call for attention, is off. The environment's RUN_UNDER may name a command to run each measurement under. One JSON object on stdout.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LACUNA = str(HERE.parent / "target/release/lacuna")
TEXT = (
    "A lighthouse is a tower with a bright light at its top. It stands on a coast or on a rock in the sea and shows ships "
    "where they are and where the danger is. In the nineteenth century its keeper lit the lamp at dusk, wound up the clockwork "
    "that turned the lens, trimmed the wicks through the night and wrote down the weather in the morning. "
)
TASK = "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n"
LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
         "self_attn.o_proj": "attn_out", "post_attention_layernorm": "ff_norm", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj",
         "mlp.down_proj": "ff_out"}


def relabel(model, folder, mask):
    """Writes the Llama in `model` as a LLaDA with the mask token `mask`."""
    from safetensors.torch import load_file, save_file

    llama = json.loads((model / "config.json").read_text())
    assert llama["tie_word_embeddings"] and not llama["attention_bias"], "only tied weights without biases are relabelled"
    config = dict(
        architectures=["LLaDAModelLM"], model_type="llada", d_model=llama["hidden_size"], n_layers=llama["num_hidden_layers"],
        n_heads=llama["num_attention_heads"], n_kv_heads=llama["num_key_value_heads"], mlp_hidden_size=llama["intermediate_size"],
        vocab_size=llama["vocab_size"], embedding_size=llama["vocab_size"], max_sequence_length=2048, rope=True,
        rope_theta=llama.get("rope_theta") or llama["rope_parameters"]["rope_theta"], rope_full_precision=True,
        rms_norm_eps=llama["rms_norm_eps"], layer_norm_type="rms", activation_type="silu", block_type="llama", block_group_size=1,
        alibi=False, attention_layer_norm=False, include_bias=False, include_qkv_bias=False, bias_for_layer_norm=False,
        input_emb_norm=False, scale_logits=False, weight_tying=True, attention_dropout=0.0, residual_dropout=0.0,
        embedding_dropout=0.0, mask_token_id=mask, eos_token_id=0, pad_token_id=0,
    )
    names = {"model.embed_tokens.weight": "model.transformer.wte.weight", "model.norm.weight": "model.transformer.ln_f.weight"}
    for layer in range(llama["num_hidden_layers"]):
        for theirs, ours in LAYER.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"model.transformer.blocks.{layer}.{ours}.weight"
    weights = load_file(model / "model.safetensors")
    # Embedding and head are one: a mask that has no direction is never the best token, which would leave cells masked.
    weights["model.embed_tokens.weight"][mask] = 0
    save_file({names[name]: weight for name, weight in weights.items() if name != "lm_head.weight"}, folder / "model.safetensors",
              metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    # A token that is never chosen, so that more than a few are compared.
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')


def theirs(args):
    """One warm generation by the authors' code, and its tokens."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path[:0] = [str(args.llada), str(args.fast_dllm / "v1" / "llada")]
    import torch
    import transformers
    from generate import generate
    from model import LLaDAModelLM

    torch.set_num_threads(args.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = LLaDAModelLM.from_pretrained(args.model, torch_dtype=dtype).eval()
    prompt = torch.tensor([json.loads(args.theirs)])
    mask = model.config.mask_token_id

    def run():
        start = time.perf_counter()
        out = generate(model, prompt, steps=args.steps, gen_length=args.canvas, block_length=args.canvas, mask_id=mask)
        return time.perf_counter() - start, out[0, prompt.shape[1]:].tolist()

    run()
    seconds, tokens = run()
    print(json.dumps({"ms": seconds * 1e3, "tokens": tokens, "torch": torch.__version__, "transformers": transformers.__version__}))


def compare(args, model, name):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = TASK if args.prompt == 0 else tokenizer.decode(tokenizer.encode(TEXT).ids[:args.prompt])
    prompt = tokenizer.encode(text).ids
    under = shlex.split(os.environ.get("RUN_UNDER", ""))

    def run(command):
        done = subprocess.run([*under, *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)

    place = ["--model", str(model), "--dtype", args.dtype, "--threads", str(args.threads), "--max-new-tokens", str(args.canvas)]
    settings = ["--steps", str(args.steps), "--block-length", str(args.canvas), "--no-finish-early"]
    lane = f"diffusion steps={args.steps} block-length={args.canvas} no-finish-early"
    lacuna = [LACUNA, "compare", "--json", *place, "--judge", "none", "--warm-up", "1", "--lane", lane, text]
    script = [sys.executable, __file__, str(model), "--llada", str(args.llada), "--fast-dllm", str(args.fast_dllm), "--dtype", args.dtype,
              "--threads", str(args.threads), "--steps", str(args.steps), "--canvas", str(args.canvas), "--theirs", json.dumps(prompt)]
    ours, authors, loads = [], [], []
    for _ in range(args.rounds):
        usage = run(lacuna)["lanes"][0]["usage"]
        assert usage["prompt_tokens"] == len(prompt) and usage["forwards"]["denoise"] == args.steps, usage
        ours.append(usage["decoding_seconds"] * 1e3 / args.steps)
        found = run(script)
        authors.append(found["ms"] / args.steps)
        loads.append(round(os.getloadavg()[0], 2))
    generated = run([LACUNA, "generate", "--json", *place, *settings, text])
    # lacuna ends a text at an end-of-text token and leaves what stands behind it out.
    tokens = generated["token_ids"]
    ratios = [a / b for a, b in zip(ours, authors)]
    print(json.dumps({
        "what": f"milliseconds per denoising step of {args.canvas} cells behind {len(prompt)} tokens", "model": name, "dtype": args.dtype,
        "threads": args.threads, "rounds": args.rounds, "prompt": len(prompt), "canvas": args.canvas, "steps": args.steps,
        "torch": found["torch"], "transformers": found["transformers"], "load_average": loads,
        "lacuna_step": [round(t, 3) for t in ours], "authors_generate_py": [round(t, 3) for t in authors],
        "lacuna_median": round(statistics.median(ours), 3), "authors_median": round(statistics.median(authors), 3),
        "ratio_median": round(statistics.median(ratios), 4), "ratio_min": round(min(ratios), 4), "ratio_max": round(max(ratios), 4),
        "tokens_compared": len(tokens), "tokens_same": sum(a == b for a, b in zip(tokens, found["tokens"])),
        "device": "cpu", "command": args.command,
    }))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llada", type=Path, required=True)
    parser.add_argument("--fast-dllm", type=Path, required=True)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a text; 0 for a task of the kind that nano knows")
    parser.add_argument("--canvas", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--mask", type=int, default=16, help="the mask token of a Llama that is relabelled")
    parser.add_argument("--theirs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        return theirs(args)
    sizes = f"--prompt {args.prompt} --canvas {args.canvas} --steps {args.steps} --rounds {args.rounds} --threads {args.threads}"
    args.command = f"python benches/compare_llada.py {args.model.name} --llada LLADA --fast-dllm FAST_DLLM --dtype {args.dtype} {sizes}"
    if json.loads((args.model / "config.json").read_text())["model_type"] == "llada":
        return compare(args, args.model, args.model.name)
    with tempfile.TemporaryDirectory() as folder:
        relabel(args.model, Path(folder), args.mask)
        compare(args, Path(folder), f"{args.model.name} as llada")


if __name__ == "__main__":
    main()
