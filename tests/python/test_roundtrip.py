"""From one container to another and back: codes and scales are the same, by numpy."""

import json

import decoder
import numpy as np
import pytest
import torch
from conftest import dequantize, figure, run, tensors_of
from transformers import AutoModelForCausalLM


def codes(path):
    """{name: (values, floats)} of one safetensors file."""
    metadata, tensors = decoder.read_file(path)
    document = json.loads(metadata["bitnet.document"])
    return {name: decoder.decode(entry, tensors) for name, entry in document["tensors"].items()}, document


@pytest.mark.parametrize("layout", ["tq1_0", "tq2_0", "q2_0", "i2_s"])
def test_folder_to_gguf_to_folder(layout, llama256, tmp_path):
    """HF folder → ternary folder → GGUF → folder: names, row order of q and k, codes and scales come back."""
    first, middle, last = tmp_path / "first", tmp_path / "middle.gguf", tmp_path / "last"
    scale = ["--scale-dtype", "f32" if layout == "i2_s" else "f16"]
    run("quantize", llama256, "--out", first, "--granularity", "tensor", "--threshold", "optimal", *scale)
    run("convert", first, "--out", middle, "--layout", layout)
    run("convert", middle, "--out", last, "--layout", "two-bit")
    before, _ = codes(first / "model.safetensors")
    after, document = codes(last / "model.safetensors")
    assert before.keys() == after.keys() and len(before) == 14
    for name, (values, floats) in before.items():
        assert document["tensors"][name]["layout"] == "two-bit"
        assert np.array_equal(values, after[name][0]) and np.array_equal(floats, after[name][1]), name
    a, b = dequantize(first), dequantize(last)
    assert a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (llama256, last))
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rope_theta", "model_type"]
    assert {k: ours[k] for k in keys} == {k: theirs.get(k, theirs.get("rope_parameters", {}).get(k)) for k in keys}
    figure(f"folder → {layout} → folder: {sum(v[0].size for v in after.values())} codes and all scales equal")


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("model", ["llama576", "glassllm"])
def test_hf_bitnet_and_safetensors(model, linear_class, request, tmp_path):
    """hf-bitnet → every own ternary layout → hf-bitnet gives the same stored tensors."""
    folder = request.getfixturevalue(model)
    first = tmp_path / "first"
    run("quantize", folder, "--out", first, "--format", "hf-bitnet", "--linear-class", linear_class)
    stored, floats = tensors_of(first), dequantize(first)
    for layout in ["two-bit", "base-3", "entropy", "sparse"]:
        middle, last = tmp_path / f"{layout}", tmp_path / f"{layout}-back"
        run("convert", first, "--out", middle, "--format", "safetensors", "--layout", layout)
        decoded, document = codes(middle / "model.safetensors")
        assert {e["layout"] for e in document["tensors"].values()} == {layout}
        assert all(np.array_equal(w, floats[n]) for n, (_, w) in decoded.items())
        assert "quantization_config" not in json.loads((middle / "config.json").read_text())
        run("convert", middle, "--out", last, "--format", "hf-bitnet", "--linear-class", linear_class)
        again = tensors_of(last)
        assert again.keys() == stored.keys()
        for name in stored:
            if not name.endswith("_scale"):
                assert np.array_equal(again[name], stored[name]), name
        back = dequantize(last)
        assert all(np.array_equal(back[n], floats[n]) for n in floats)


def test_conventions_turn_round(llama576, tmp_path):
    """bitlinear ↔ autobitlinear: the codes stay, the scale is inverted, the weights are the same."""
    a, b = tmp_path / "a", tmp_path / "b"
    run("quantize", llama576, "--out", a, "--format", "hf-bitnet", "--linear-class", "bitlinear")
    run("convert", a, "--out", b, "--format", "hf-bitnet", "--linear-class", "autobitlinear")
    first, second = tensors_of(a), tensors_of(b)
    scales = [n for n in first if n.endswith("_scale")]
    assert len(scales) == 7
    for name in first:
        if name in scales:
            assert np.array_equal(np.float32(1) / first[name], second[name]), name
        else:
            assert np.array_equal(first[name], second[name])
    floats = dequantize(b)
    assert all(np.array_equal(w, floats[n]) for n, w in dequantize(a).items())


def test_smollm2_as_a_folder(smollm2, tmp_path):
    """The GGUF as an HF folder loads in transformers without a missing or left-over weight, and predicts English."""
    folder = tmp_path / "folder"
    run("dequantize", smollm2, "--out", folder, "--dtype", "bf16")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    import llama_cpp

    text = b"The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
    vocabulary = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    ids = vocabulary.tokenize(text, add_bos=False)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0]
    assert torch.isfinite(logits).all()
    assert vocabulary.detokenize([int(logits[-1].argmax())]).strip() == b"Rome"
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert loss < 3
    figure(f"SmolLM2 GGUF → folder → transformers: finite logits, next token Rome, {float(loss):.2f} nats a token")
