#!/usr/bin/env python3
"""Writes crates/bitnet-inference/tests/golden: tiny random models and the logits that transformers computes for them in f32.

    scripts/make-inference-golden.py            (with the python of scripts/python-truth --print-python)

Each folder is a model as transformers loads it, and golden.safetensors: `tokens`, a prompt and 16 greedy tokens after it, and `logits` after each of
them but the last: those of the prompt from one forward pass, those of the rest from one decode step each, over the cache.

Packed weights are packed by transformers' own pack_weights, and its own BitLinear and AutoBitLinear read them.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

OUT = Path(__file__).resolve().parents[1] / "crates/bitnet-inference/tests/golden"
PROMPT, STEPS = 23, 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# No dimension is a multiple of 16 columns, 64 rows or a block; heads of 12.
SIZES = dict(hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61,
             max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}

# name: (architecture, dtype on disk, quantization_config, further settings)
MODELS = {
    "llama-f32": ("llama", torch.float32, None, dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "llama-f16-rope": ("llama", torch.float16, None, dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-bf16-head": ("llama", torch.bfloat16, None, dict(tie_word_embeddings=False, head_dim=10, rms_norm_eps=0.05)),
    "llama-bitlinear": ("llama", torch.float32, ("bitlinear", "offline"), dict(tie_word_embeddings=False)),
    "llama-autobitlinear": ("llama", torch.bfloat16, ("autobitlinear", "offline"), dict(tie_word_embeddings=True)),
    "llama-online": ("llama", torch.bfloat16, ("autobitlinear", "online"), dict(tie_word_embeddings=True)),
    "bitnet-bitlinear": ("bitnet", torch.bfloat16, ("bitlinear", "offline"), dict(tie_word_embeddings=True)),
    "bitnet-autobitlinear": ("bitnet", torch.bfloat16, ("autobitlinear", "offline"), dict(tie_word_embeddings=True)),
    "bitnet-online": ("bitnet", torch.bfloat16, ("autobitlinear", "online"), dict(tie_word_embeddings=True)),
    "bitnet-float": ("bitnet", torch.bfloat16, None, dict(tie_word_embeddings=False, hidden_act="silu")),
}


def make(name, seed):
    architecture, dtype, quantization, settings = MODELS[name]
    torch.manual_seed(seed)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "bitnet": (BitNetConfig, BitNetForCausalLM)}[architecture]
    model = model(config(**SIZES, **settings))
    with torch.no_grad():
        for parameter, weights in model.named_parameters():
            if "norm" in parameter:
                weights.copy_(1 + 0.2 * torch.randn_like(weights))
            elif parameter.endswith("bias"):
                weights.copy_(0.3 * torch.randn_like(weights))
    folder = OUT / name
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if quantization:
        linear_class, mode = quantization
        path = folder / "model.safetensors"
        tensors = load_file(path)
        if mode == "offline":
            for key in [k for k in tensors if k.split(".")[-2] in LINEAR and k.endswith(".weight")]:
                w = tensors[key].float()
                mean = w.abs().mean().clamp(min=1e-5)
                tensors[key] = pack_weights((w / mean).round().clamp(-1, 1))
                tensors[key + "_scale"] = (1 / mean if linear_class == "bitlinear" else mean).reshape(1).to(dtype)
            save_file(tensors, path, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def logits_of(folder, quantization):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    torch.nn.Module.float(model)
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.dtype = torch.float32
    if quantization:
        expected = {"bitlinear": BitLinear, "autobitlinear": AutoBitLinear}[quantization[0]]
        found = [type(m) for n, m in model.named_modules() if n.split(".")[-1] in LINEAR]
        assert len(found) == 14 and all(t is expected for t in found), found
    ids = torch.randint(3, SIZES["vocab_size"], (1, PROMPT))
    with torch.no_grad():
        out = model(ids, use_cache=True)
        tokens, logits = ids[0].tolist(), [out.logits[0]]
        for _ in range(STEPS):
            tokens.append(int(logits[-1][-1].argmax()))
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    logits = torch.cat(logits)
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all() and len(logits) == len(tokens)
    return torch.tensor(tokens, dtype=torch.int32), logits.contiguous()


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, name in enumerate(MODELS):
        folder = make(name, seed)
        tokens, logits = logits_of(folder, MODELS[name][2])
        save_file({"tokens": tokens, "logits": logits}, folder / "golden.safetensors")
        # What the folder needs to be a model, and nothing about who wrote it.
        config = json.loads((folder / "config.json").read_text())
        config.pop("transformers_version", None)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{name}: {size} bytes, largest logit {logits.abs().max():.3f}, spread {logits.std():.3f}")


if __name__ == "__main__":
    main()
