"""HF `bitnet` folders that we wrote, loaded by transformers: its weights are ours, and its logits follow from them.

The reference is the same model with float linear layers that hold the weights of `bitnet dequantize` and quantize their input as
../../docs/formats.md's readers do: s = 127 / max(max|x|, 1e-5) per token, x̂ = clamp(round(x·s), −128, 127) / s.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import dequantize, figure, make_llama, run, same
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, unpack_weights

CLASSES = {"bitlinear": BitLinear, "autobitlinear": AutoBitLinear}
# Largest difference of a logit over the largest logit. In f32 an activation may lie so near a tie that it rounds to the neighbour.
BOUND = {torch.float32: 5e-3, torch.float16: 0.02, torch.bfloat16: 0.06}


def random_llama(folder, dtype, tie):
    torch.manual_seed(11)
    config = LlamaConfig(hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=300, max_position_embeddings=64, initializer_range=0.08, tie_word_embeddings=tie, pad_token_id=0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


class Reference(torch.nn.Linear):
    """A float layer with the int8 activation quantizer."""

    def forward(self, x):
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return F.linear((x * s).round().clamp(-128, 127), self.weight) / s


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def reference_model(folder, quantized, tmp_path):
    """The dequantized folder in f32, Reference in place of the layers named."""
    floats = tmp_path / "floats"
    run("dequantize", folder, "--out", floats, "--force")
    model = load(floats, torch.float32)
    for name in quantized:
        old = model.get_submodule(name)
        new = Reference(old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        model.set_submodule(name, new)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def relative(a, b):
    if not torch.isfinite(a).all():
        return float("inf")
    return float((a - b).abs().max() / b.abs().max())


def set_class(folder, linear_class):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linear_class"] = linear_class
    path.write_text(json.dumps(config))


def check(folder, linear_class, dtype, tmp_path, label, expected_layers):
    """Weights equal exactly, logits within the bound, and with the other class far outside it."""
    floats = dequantize(folder)
    ids = torch.tensor([np.random.default_rng(2).integers(3, 290, 20).tolist()])
    with open(folder / "config.json") as f:
        quantization = json.load(f)["quantization_config"]
    assert quantization["quant_method"] == "bitnet" and quantization["linear_class"] == linear_class
    model = load(folder, dtype)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (BitLinear, AutoBitLinear))}
    assert len(layers) == expected_layers and all(type(m) is CLASSES[linear_class] for m in layers.values())
    for name, layer in layers.items():
        scale = layer.weight_scale.float()
        if linear_class == "bitlinear":
            assert layer.weight.dtype == torch.uint8
            theirs = unpack_weights(layer.weight, torch.float32) / scale
        else:
            theirs = layer.weight.detach().float() * scale
        assert layer.weight_scale.dtype == dtype and float(scale) != 1
        assert np.array_equal(theirs.numpy(), floats[name + ".weight"]), name
    # Everything else came through as well: a layer that the loader missed would be random.
    rest = [n for n, _ in model.named_parameters() if n.removesuffix(".weight") not in layers]
    assert rest and all(same(model.get_parameter(n).detach().float().numpy(), floats[n]) for n in rest)
    reference = logits(reference_model(folder, layers, tmp_path), ids)
    got = logits(model, ids)
    error, bound = relative(got, reference), BOUND[dtype]
    assert error < bound, error
    # The same bytes under the other convention, which our own reader refuses and transformers takes.
    other = next(c for c in CLASSES if c != linear_class)
    set_class(folder, other)
    message = run("dequantize", folder, "--out", tmp_path / "never", status=2)
    assert "linear_class" in message and not (tmp_path / "never").exists()
    wrong = relative(logits(load(folder, dtype), ids), reference)
    set_class(folder, linear_class)
    assert wrong > 10 * bound and wrong > 0.3, wrong
    figure(f"transformers, {label}, {linear_class}: {len(layers)} layers' weights equal, logits within {error:.1e}; wrong class {wrong:.2g}")
    return model


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("linear_class", CLASSES)
def test_random_llama(linear_class, dtype, tie, tmp_path):
    """A model that transformers made: scales in the model's type, tied and untied heads."""
    source, out = random_llama(tmp_path / "source", dtype, tie), tmp_path / "out"
    run("quantize", source, "--out", out, "--format", "hf-bitnet", "--linear-class", linear_class)
    stored = load_torch(out / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tie)
    scales = {t.dtype for n, t in stored.items() if n.endswith("_scale")}
    assert scales == {dtype} and all(t.shape == (1,) for n, t in stored.items() if n.endswith("_scale"))
    check(out, linear_class, dtype, tmp_path, f"random llama {dtype} {'tied' if tie else 'untied'}".replace("torch.", ""), 14)


@pytest.mark.parametrize("linear_class", CLASSES)
def test_bitlinear_is_the_default(linear_class, tmp_path):
    """No --linear-class means bitlinear."""
    source, out = random_llama(tmp_path / "source", torch.float32, False), tmp_path / "out"
    run("quantize", source, "--out", out, "--format", "hf-bitnet", *(["--linear-class", linear_class] if linear_class != "bitlinear" else []))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["linear_class"] == linear_class


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("linear_class", CLASSES)
def test_excluded_layers(linear_class, tie, tmp_path):
    """Layers that stay floats are named in modules_to_not_convert, and transformers leaves them alone."""
    source, out = random_llama(tmp_path / "source", torch.float32, tie), tmp_path / "out"
    run("quantize", source, "--out", out, "--format", "hf-bitnet", "--linear-class", linear_class, "--exclude", "*down_proj*")
    names = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {f"model.layers.{i}.mlp.down_proj" for i in range(2)} <= set(names)
    model = check(out, linear_class, torch.float32, tmp_path, f"down_proj excluded {'tied' if tie else 'untied'}", 12)
    down = model.model.layers[0].mlp.down_proj
    assert type(down) is torch.nn.Linear
    assert torch.equal(down.weight, load_torch(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize("linear_class", CLASSES)
def test_glassllm(linear_class, glassllm, tmp_path):
    """The committed F16 model: transformers cannot hold 341 packed rows, so gate and up stay F16."""
    out = tmp_path / "out"
    run("quantize", glassllm, "--out", out, "--format", "hf-bitnet", "--linear-class", linear_class)
    names = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {f"model.layers.{i}.mlp.{p}_proj" for i in range(4) for p in ("gate", "up")} <= set(names)
    check(out, linear_class, torch.float16, tmp_path, "glassllm (float16)", 20)


def test_a_folder_that_transformers_packed(tmp_path):
    """pack_weights of transformers, read by us: every value, in both conventions."""
    from safetensors.torch import save_file
    from transformers.integrations.bitnet import pack_weights

    generator = torch.Generator().manual_seed(4)
    for linear_class, stored in [("bitlinear", torch.tensor([6.5])), ("autobitlinear", torch.tensor([0.15625], dtype=torch.bfloat16))]:
        folder = tmp_path / linear_class
        folder.mkdir()
        values = torch.randint(-1, 2, (64, 50), generator=generator)
        save_file({"a.weight": pack_weights(values.clone()), "a.weight_scale": stored}, folder / "model.safetensors")
        config = {"model_type": "llama", "quantization_config": {"quant_method": "bitnet", "linear_class": linear_class}}
        (folder / "config.json").write_text(json.dumps(config))
        expected = values.float() / stored.float() if linear_class == "bitlinear" else values.float() * stored.float()
        assert np.array_equal(dequantize(folder)["a.weight"], expected.numpy())
