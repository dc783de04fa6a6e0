"""What `bitnet train` writes, opened by transformers: the full-precision twin, and the latent weights that it makes ternary in each forward pass."""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import figure, run, run_json

CONTEXT = 16
# Every fourth layer of a smollm3 does not rotate.
LAYERS = {"llama": 2, "bitnet": 2, "qwen3": 2, "smollm3": 4}
WORDS = ["the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "saw ", "the dog. ", "it ran away. "]


@pytest.fixture(scope="module", params=LAYERS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"train-{request.param}")
    draw = random.Random(5)
    text = folder / "text.txt"
    text.write_text("".join(draw.choice(WORDS) for _ in range(4000)))
    shape = ["--architecture", request.param, "--hidden", 32, "--ffn", 48, "--layers", LAYERS[request.param], "--heads", 2, "--kv-heads", 1, "--context", CONTEXT]
    if request.param == "qwen3":
        shape += ["--head-dim", 24]
    flags = ["--batch", 8, "--steps", 120, "--learning-rate", 0.01, "--held-out", 0.2, "--quiet"]
    report = run_json("train", "lm", "--text", text, "--out", folder / "run", *shape, *flags)
    return folder / "run", text, report


def loss(path, text):
    """Mean loss of the held-out fifth in windows, without the first token of each, as transformers computes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    data = text.read_bytes()
    ids = tokenizer(data.decode(), add_special_tokens=False).input_ids
    assert ids == list(data), "the tokens of a text are its bytes"
    held = ids[round(len(ids) * 0.8) :]
    windows = torch.tensor(held[: len(held) // CONTEXT * CONTEXT]).reshape(-1, CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1)).item()


def test_full_precision(trained):
    folder, text, report = trained
    got = loss(folder / "full", text)
    figure(f"twin of {folder.parent.name}: {report['full']:.6f} nats here, {got:.6f} in transformers")
    assert math.isclose(got, report["full"], rel_tol=1e-5)


def test_latent_weights_are_ternary_in_transformers(trained):
    folder, text, report = trained
    got = loss(folder / "latent", text)
    figure(f"quantized of {folder.parent.name}: {report['qat']:.6f} nats packed, {got:.6f} in transformers from latent weights")
    # An activation on the edge between two integers may fall to the other side.
    assert math.isclose(got, report["qat"], rel_tol=2e-3)
    assert abs(report["qat"] - report["full"]) > 1e-4, "quantization changes something"


def test_a_bonsai_is_what_was_trained(tmp_path):
    """Embedding and head are ternary in training too: transformers on the packed weights has the loss that the engine measured."""
    draw = random.Random(6)
    text = tmp_path / "text.txt"
    text.write_text("".join(draw.choice(WORDS) for _ in range(4000)))
    shape = ["--architecture", "qwen3", "--hidden", 64, "--ffn", 128, "--layers", 2, "--heads", 2, "--kv-heads", 1, "--head-dim", 32, "--context", CONTEXT]
    flags = ["--preset", "bonsai", "--activations", "float", "--batch", 8, "--steps", 60, "--learning-rate", 0.01, "--held-out", 0.2, "--no-twin", "--quiet"]
    report = run_json("train", "lm", "--text", text, "--out", tmp_path / "run", *shape, *flags)
    tensors = run_json("inspect", tmp_path / "run/packed")["tensors"]
    matrices = [t for t in tensors if len(t["shape"]) == 2]
    assert len(matrices) == 15 and {t["precision"] for t in matrices} == {"ternary"}
    run("dequantize", tmp_path / "run/packed", "--out", tmp_path / "floats")
    got = loss(tmp_path / "floats", text)
    figure(f"bonsai of qwen3: {report['qat']:.6f} nats packed, {got:.6f} in transformers on its weights")
    assert math.isclose(got, report["qat"], rel_tol=1e-5)


def test_packed_weights_are_ternary(trained):
    folder, _, _ = trained
    tensors = run_json("inspect", folder / "packed")["tensors"]
    linear = [t for t in tensors if "_proj" in t["name"]]
    layers = json.loads((folder / "packed/config.json").read_text())["num_hidden_layers"]
    assert len(linear) == 7 * layers and np.all([t["bits_per_weight"] < 4 for t in linear])
    assert run("verify", folder / "packed")
