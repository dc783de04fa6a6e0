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
import sys
import warnings
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

OUT = Path(__file__).resolve().parents[1] / "crates/bitnet-inference/tests/golden"
PROMPT, STEPS = 23, 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# No dimension is a multiple of 16 columns, 64 rows or a block; heads of 12.
SIZES = dict(hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61,
             max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 40,
            "short_factor": [1.0, 1.5, 2.25], "long_factor": [2.0, 3.0, 5.0]}
BF16, HEADS = torch.bfloat16, dict(head_dim=10)
EXPERTS = dict(num_experts=6, moe_intermediate_size=20, initializer_range=0.25)
# As in its own code, which is not part of transformers.
MINICPM = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}

DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=12, linear_value_head_dim=12)

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
    "qwen2-bias": ("qwen2", BF16, None, dict(tie_word_embeddings=True, rope_parameters={"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0})),
    "qwen2-window": ("qwen2", BF16, None, dict(tie_word_embeddings=False, use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3-yarn": ("qwen3", BF16, None, dict(tie_word_embeddings=True, rope_parameters=YARN, **HEADS)),
    "qwen3-bias": ("qwen3", BF16, None, dict(tie_word_embeddings=False, attention_bias=True, head_dim=20)),
    "mistral-window": ("mistral", BF16, None, dict(tie_word_embeddings=False, sliding_window=5, **HEADS)),
    "smollm3-nope": ("smollm3", BF16, None, dict(tie_word_embeddings=True, num_hidden_layers=4, intermediate_size=44, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})),
    "phi3-longrope": ("phi3", BF16, None, dict(tie_word_embeddings=False, rope_parameters=LONGROPE, original_max_position_embeddings=40, sliding_window=9)),
    "phi3-partial": ("phi3", BF16, None, dict(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})),
    "minicpm": ("minicpm", BF16, None, dict(tie_word_embeddings=True)),
    "gemma3": ("gemma3_text", BF16, None, dict(tie_word_embeddings=True, head_dim=10, query_pre_attn_scalar=17, sliding_window=6, final_logit_softcapping=3.0, layer_types=["sliding_attention", "full_attention"],
               rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}})),
    "qwen35": ("qwen3_5_text", BF16, None, dict(tie_word_embeddings=True, num_hidden_layers=4, intermediate_size=44, head_dim=24, **DELTA)),
    "qwen35-mixed": ("qwen3_5_text", BF16, None, dict(tie_word_embeddings=False, num_hidden_layers=3, head_dim=20, attention_bias=True,
                     layer_types=["full_attention", "linear_attention", "linear_attention"], linear_conv_kernel_dim=3, **{**DELTA, "linear_value_head_dim": 17},
                     rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5})),
}

# transformers saves experts as modules of their own, and reads stacks too.
MODELS.update({
    "qwen3-moe": ("qwen3_moe", BF16, None, dict(tie_word_embeddings=False, num_experts_per_tok=2, norm_topk_prob=True, **EXPERTS, **HEADS)),
    "qwen3-moe-stacked": ("qwen3_moe", BF16, None, dict(tie_word_embeddings=True, num_hidden_layers=3, mlp_only_layers=[1], num_experts_per_tok=3, norm_topk_prob=False, **EXPERTS, **HEADS)),
    "qwen2-moe": ("qwen2_moe", BF16, None, dict(tie_word_embeddings=False, num_experts_per_tok=3, shared_expert_intermediate_size=28, **EXPERTS)),
})


def stack_experts(path):
    """Numbered experts as the parameters of transformers' modules: [E, 2·ffn, hidden] and [E, hidden, ffn]."""
    tensors = load_file(path)
    modules = sorted({name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name})
    for module in modules:
        count = 1 + max(int(name[len(module) + 1:].split(".")[0]) for name in tensors if name.startswith(module + "."))
        take = lambda kind: [tensors.pop(f"{module}.{i}.{kind}_proj.weight") for i in range(count)]
        gate, up, down = take("gate"), take("up"), take("down")
        tensors[module + ".gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        tensors[module + ".down_proj"] = torch.stack(down)
    save_file(tensors, path, metadata={"format": "pt"})


def make(name, seed):
    architecture, dtype, quantization, settings = MODELS[name]
    torch.manual_seed(seed)
    kind = "llama" if architecture == "minicpm" else architecture
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}), dtype=torch.float32)
    with torch.no_grad():
        for parameter, weights in model.named_parameters():
            if "norm" in parameter:
                from_one = architecture in ("gemma3_text", "qwen3_5_text") and "linear_attn" not in parameter
                weights.copy_((not from_one) + 0.2 * torch.randn_like(weights))
            elif parameter.endswith("A_log"):
                # Some heads forget at once, some keep the state for the whole text.
                weights.copy_(torch.linspace(-4, 1, len(weights)))
            elif "conv1d" in parameter:
                weights.copy_(0.5 * torch.randn_like(weights))
            elif parameter.endswith("bias"):  # dt_bias too
                weights.copy_(0.3 * torch.randn_like(weights))
    folder = OUT / name
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name.endswith("-stacked"):
        stack_experts(folder / "model.safetensors")
    if architecture == "minicpm":
        config = json.loads((folder / "config.json").read_text())
        config.update(MINICPM)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
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


def load(folder):
    """The model in transformers. minicpm, which is not in it, as the llama whose weights have its scales."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "minicpm":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = LlamaForCausalLM(LlamaConfig(**{**config, "model_type": "llama", "tie_word_embeddings": False}, attn_implementation="eager"))
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (config["dim_model_base"] / config["hidden_size"])
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * config["scale_emb"]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * (config["scale_depth"] / config["num_hidden_layers"] ** 0.5)
    model.load_state_dict(weights)
    return model.eval()


def logits_of(folder, quantization):
    model = load(folder)
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
    """All folders, or those of the names given."""
    for seed, name in enumerate(MODELS):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        shutil.rmtree(OUT / name, ignore_errors=True)
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
