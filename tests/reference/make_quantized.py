"""Quantised checkpoints and what their original code computes with them: `quantized/`.

    python make_quantized.py --out ../fixtures --deepseek DEEPSEEK_V3      # transformers 5.23.0, compressed-tensors 0.20.0, triton 3.6.0
    python make_quantized.py --out ../fixtures --written FOLDER ...         # what transformers computes from folders of ours

The folders are tiny random models that compressed-tensors quantised and saved, or transformers in DeepSeek's convention. Each has
a `reference.safetensors`: `input_ids`, `logits` as transformers gives them, activations quantised where the scheme says so, and
`logits_weights` with the quantised weights alone. `blocks/` is a matrix with ragged blocks, dequantised by DeepSeek's
own kernel. `written.safetensors` has logits of the last of some tokens, in f32, from what `lacuna quantize models/nano-ar FOLDER --to
SCHEME` wrote, each by its folder's name.
"""

import argparse
import importlib.util
import json
import os
import shutil
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # DeepSeek's kernel runs on the CPU so

import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
VOCAB = 64
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, bos_token_id=1, eos_token_id=2, attn_implementation="eager", rms_norm_eps=1e-5,
)
CHANNEL = dict(num_bits=8, type="int", strategy="channel", symmetric=True)
TOKEN = dict(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
FLOAT = dict(num_bits=8, type="float", symmetric=True)
FLOAT_TOKEN = dict(FLOAT, strategy="token", dynamic=True)
HEAD = ["re:.*lm_head$"]


def cases():
    """Name, model's class, dtype, whether tied, extra settings, and compressed-tensors' config."""
    linear = ["Linear"]
    yield "int8", "Llama", torch.float32, True, dict(num_hidden_layers=1), dict(
        ignore=["lm_head"], config_groups=dict(a=dict(targets=linear, weights=CHANNEL, input_activations=TOKEN)))
    yield "int8-weights", "Qwen2", torch.float32, True, dict(num_hidden_layers=1), dict(
        ignore=["lm_head", "re:.*layers.0.*v_proj"], config_groups=dict(a=dict(targets=linear, weights=CHANNEL)))
    # As real ones are: scales in the model's bf16, a head of its own in 8 bits.
    yield "int4", "Qwen3", torch.bfloat16, False, dict(head_dim=16), dict(ignore=["model.layers.0.self_attn.v_proj"], config_groups=dict(
        a=dict(targets=linear, weights=dict(num_bits=4, type="int", strategy="group", group_size=16, symmetric=True)),
        b=dict(targets=HEAD, weights=CHANNEL)))
    # 60 columns are 7.5 words; the head is quantised otherwise: "mixed-precision".
    yield "int4-rows", "Llama", torch.float32, False, dict(intermediate_size=60, num_hidden_layers=1), dict(ignore=[], config_groups=dict(
        a=dict(targets=linear, weights=dict(num_bits=4, type="int", strategy="channel", symmetric=True)),
        b=dict(targets=HEAD, weights=CHANNEL, input_activations=TOKEN)))
    yield "fp8", "Qwen2", torch.float32, True, dict(num_hidden_layers=1), dict(
        ignore=["lm_head"], config_groups=dict(a=dict(targets=linear, weights=dict(FLOAT, strategy="channel"), input_activations=FLOAT_TOKEN)))
    yield "fp8-tensor", "Llama", torch.float32, True, dict(num_hidden_layers=1), dict(
        ignore=["lm_head"], config_groups=dict(a=dict(targets=linear, weights=dict(FLOAT, strategy="tensor"), input_activations=FLOAT_TOKEN)))
    # Ragged in both directions.
    yield "fp8-blocks", "Llama", torch.float32, True, dict(num_hidden_layers=1), dict(ignore=["lm_head"], config_groups=dict(a=dict(
        targets=linear, weights=dict(FLOAT, strategy="block", block_structure=[24, 24]),
        input_activations=dict(FLOAT, strategy="group", group_size=32, dynamic=True))))


def build(kind, dtype, tied, extra, seed):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **extra}, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        draw = torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * (0.3 if "bias" in name else 0.25)
        parameter.data.copy_(draw)
    return model.to(dtype)


def scales(weight, args):
    """The scales of `weight` by compressed-tensors' own rule."""
    from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant

    rows, columns = weight.shape
    match args.strategy:
        case "tensor":
            low, high = weight.min().reshape(1), weight.max().reshape(1)
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group":
            groups = weight.view(rows, columns // args.group_size, args.group_size)
            low, high = groups.amin(2), groups.amax(2)
        case "block":
            padded = maybe_pad_tensor_for_block_quant(weight, tuple(args.block_structure))
            h, w = args.block_structure
            blocks = padded.view(padded.shape[0] // h, h, padded.shape[1] // w, w)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return calculate_qparams(low, high, args)[0]


def compressed(out, name, kind, dtype, tied, extra, config, seed):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    model = build(kind, dtype, tied, extra, seed)
    apply_quantization_config(model, QuantizationConfig(**config), show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight_scale.data.copy_(scales(module.weight.data, module.quantization_scheme.weights))
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = out / name
    model.save_pretrained(folder)
    compressor.update_config(folder)


def deepseek(out, name, seed):
    """As transformers saves what it quantises in blocks: DeepSeek's names."""
    model = build("Llama", torch.float32, True, dict(num_hidden_layers=1), seed)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for key in [k for k in tensors if k.endswith("_proj.weight")]:
        weight = tensors[key]
        blocks = weight.view(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[key] = (blocks / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
        tensors[key + "_scale_inv"] = scale
    folder = out / name
    model.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [16, 16]}}, indent=2) + "\n")


def logits_of(folder, ids, weights_only=False, dtype=None):
    import transformers

    settings = json.loads((folder / "config.json").read_text())
    dtype = dtype or getattr(torch, settings.get("dtype") or settings.get("torch_dtype"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        model(ids)  # what is compressed is decompressed by the first forward
        for module in model.modules() if weights_only else ():
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False
        return model(ids).logits.float()


def ragged(out, checkout):
    """A matrix of [132, 130] in blocks of 128, through DeepSeek's own kernel."""
    spec = importlib.util.spec_from_file_location("kernel", checkout / "inference/kernel.py")
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    torch.manual_seed(5)
    weight = (torch.randn(132, 130) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) * 1e-3 + 1e-4
    values = kernel.weight_dequant(weight, scale, 128)
    assert values.dtype == torch.float32 and values[131, 129] == weight[131, 129].float() * scale[1, 1]
    # A product as they compute it, in blocks of 32: inputs in codes, each group with its scale.
    narrow, narrow_scale = (torch.randn(40, 96) * 100).to(torch.float8_e4m3fn), torch.rand(2, 3) * 1e-3 + 1e-4
    x = torch.randn(3, 96)
    # Scales are theirs; codes are torch's, since Triton's interpreter halves what it should round up to a power of two.
    _, scales = kernel.act_quant(x, 32)
    scales = scales.repeat_interleave(32, 1)
    product = ((x / scales).to(torch.float8_e4m3fn).float() * scales) @ kernel.weight_dequant(narrow, narrow_scale, 32).T
    (out / "blocks").mkdir()
    rows = [0, 127, 128, 131]
    save_file({"weight": weight, "scale_inv": scale, "rows": torch.tensor(rows), "values": values[rows].contiguous(),
               "narrow": narrow, "narrow_scale_inv": narrow_scale, "x": x, "product": product}, out / "blocks/model.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--deepseek", type=Path)
    parser.add_argument("--written", type=Path, nargs="+")
    arguments = parser.parse_args()
    out = arguments.out / "quantized"
    if arguments.written:
        ids = torch.tensor([[40, 300, 12, 77, 501, 9, 220, 64]])
        record = {"input_ids": ids}
        for folder in arguments.written:
            for name, weights_only in ("logits", False), ("logits_weights", True):
                record[f"{folder.name}.{name}"] = logits_of(folder, ids, weights_only, torch.float32)[:, -1:].contiguous()
        save_file(record, out / "written.safetensors")
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for seed, case in enumerate(cases()):
        compressed(out, *case, seed=70 + seed)
    deepseek(out, "deepseek", 90)
    ids = torch.randint(3, VOCAB, (1, 10), generator=torch.Generator().manual_seed(1))
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        (folder / "generation_config.json").unlink(missing_ok=True)
        reference = {"input_ids": ids, "logits": logits_of(folder, ids), "logits_weights": logits_of(folder, ids, True)}
        save_file(reference, folder / "reference.safetensors")
        gap = (reference["logits"] - reference["logits_weights"]).norm() / reference["logits_weights"].norm()
        print(f"{folder.name}: {sum(f.stat().st_size for f in folder.iterdir())} bytes, activations change the logits by {gap:.2e}")
    ragged(out, arguments.deepseek)


if __name__ == "__main__":
    main()
