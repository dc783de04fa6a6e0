"""The graphs of the goldens (crates/bitnet-inference/tests/golden, logits of transformers) as GGUF files in llama.cpp."""

import json

import llama_cpp
import numpy as np
import pytest
import torch
from conftest import ROOT, figure, run
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = ROOT / "crates/bitnet-inference/tests/golden"
# Both compute in f32; llama.cpp's exponentials and sines are a little coarser.
BOUND = 1e-3
# name → tokens that llama.cpp computes like transformers: it has no sliding windows for these.
MODELS = {"llama-f32": None, "qwen2-bias": None, "qwen3-yarn": None, "smollm3-nope": None, "phi3-partial": None, "minicpm": None, "mistral-window": 5,
          "qwen35": None, "qwen3-moe": None, "qwen2-moe": None}


def floats(name, tmp_path):
    """The folder as a GGUF of f32, and its golden tokens and logits."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((GOLDEN / name / file).read_bytes())
    out = tmp_path / "model.gguf"
    run("quantize", folder, "--out", out, "--precision", "f32", "--rule", "*=f32", "--quiet")
    golden = load_file(GOLDEN / name / "golden.safetensors")
    return out, golden["tokens"].tolist(), golden["logits"]


def logits_of(path, ids):
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, flash_attn=False, type_k=0, type_v=0)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tmp_path):
    path, ids, expected = floats(name, tmp_path)
    got, top = logits_of(path, ids), np.abs(expected).max()
    errors = np.abs(got - expected).max(1) / top
    alike = MODELS[name] or len(ids)
    figure(f"llama.cpp, {json.loads((GOLDEN / name / 'config.json').read_text())['model_type']}: logits within {errors[:alike].max():.1e} of the largest")
    assert errors[:alike].max() < BOUND, errors
    if alike < len(ids):
        assert errors[alike:].max() > 10 * BOUND, "the window matters"


# What llama.cpp's gemma3 takes as given: the scale of a head's size, which a note says. Of GELU it has a table
# of f16, hence the wider bound of the file.
GEMMA3 = dict(hidden_size=48, intermediate_size=76, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
              vocab_size=61, max_position_embeddings=64, sliding_window=6, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
              rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}})


@pytest.mark.parametrize("change", [{}, {"final_logit_softcapping": 3.0}, {"sliding_window": 7}, {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]},
                                    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}], ids=str)
def test_gemma3(change, tmp_path):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **{**GEMMA3, **change}), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" in name:
                weights.copy_(0.2 * torch.randn_like(weights))
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "model.gguf"
    run("quantize", tmp_path / "model", "--out", out, "--precision", "f32", "--rule", "*=f32", "--quiet")
    ids = torch.randint(3, 61, (40,)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    got = logits_of(out, ids)
    error = np.abs(got - expected).max() / np.abs(expected).max()
    figure(f"llama.cpp, gemma3 {change or ''}: logits within {error:.1e} of the largest")
    assert error < 3 * BOUND, error
