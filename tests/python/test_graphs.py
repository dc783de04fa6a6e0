"""The graphs of the goldens (crates/bitnet-inference/tests/golden, logits of transformers) as GGUF files in llama.cpp."""

import json

import llama_cpp
import numpy as np
import pytest
from conftest import ROOT, figure, run
from safetensors.numpy import load_file

GOLDEN = ROOT / "crates/bitnet-inference/tests/golden"
# Both compute in f32; llama.cpp's exponentials and sines are a little coarser.
BOUND = 1e-3
# name → tokens that llama.cpp computes like transformers: it has no sliding windows for these.
MODELS = {"llama-f32": None, "qwen2-bias": None, "qwen3-yarn": None, "smollm3-nope": None, "phi3-partial": None, "minicpm": None, "gemma3": None, "mistral-window": 5}


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
