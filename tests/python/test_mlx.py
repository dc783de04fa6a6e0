"""MLX folders: mlx.core.dequantize gives our values, and mlx-lm the logits of the float twin.

MLX has no wheel for every machine that runs the other tests: these are skipped, with the reason, where it is absent.
"""

import json

import numpy as np
import pytest
from conftest import dequantize, figure, make_llama, run, run_json

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]' mlx-lm")
mlx_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed: pip install mlx-lm")

CASES = {
    "ternary": ([], 2, 64),
    "ternary, groups of 128": (["--granularity", "group:128"], 2, 128),
    "int2": (["--precision", "int2"], 2, 64),
    "int2 with zero points": (["--precision", "int2", "--mapping", "asymmetric"], 2, 64),
    "int3": (["--precision", "int3"], 3, 64),
    "int4": (["--precision", "int4", "--granularity", "group:32"], 4, 32),
    "int8": (["--precision", "int8"], 8, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_mlx_reads_the_values_and_the_logits(tmp_path, name):
    flags, bits, group = CASES[name]
    folder = make_llama(tmp_path / "m", tie=name == "int4")
    out = tmp_path / "mlx"
    run("quantize", folder, "--out", out, "--format", "mlx", *flags)
    run("verify", out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == {"group_size": group, "bits": bits}

    # The same values in our own container, and as floats.
    twin = tmp_path / "twin"
    more = flags if "--granularity" in flags else [*flags, "--granularity", "group:64"]
    run("quantize", folder, "--out", twin, *more)
    floats = dequantize(twin)
    stored = mx.load(str(out / "model.safetensors"))
    quantized = [n.removesuffix(".scales") for n in stored if n.endswith(".scales")]
    assert len(quantized) == 14
    for module in quantized:
        w, scales, biases = (stored[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        assert w.dtype == mx.uint32
        got = np.array(mx.dequantize(w, scales, biases, group_size=group, bits=bits))
        want = floats[f"{module}.weight"]
        error = np.abs(got - want).max()
        assert error <= (0 if name.startswith("ternary") else 2e-6 * np.abs(want).max()), (module, error)
    # We read the folder as the floats that it stands for.
    ours = dequantize(out)
    assert all(np.allclose(ours[n], floats[n], rtol=1e-5, atol=1e-7) for n in floats)

    model, _ = mlx_utils.load_model(out)
    plain = tmp_path / "floats"
    run("dequantize", twin, "--out", plain)
    reference, _ = mlx_utils.load_model(plain)
    tokens = mx.array([[1, 17, 300, 5, 211, 44, 9, 480]])
    got, want = (np.array(m(tokens).astype(mx.float32)) for m in (model, reference))
    error = np.abs(got - want).max() / np.abs(want).max()
    figure(f"mlx-lm, {name}: logits within {error:.1e} of the float twin's")
    assert error < 1e-5


def test_layers_that_differ_are_named_and_floats_stay(tmp_path):
    folder = make_llama(tmp_path / "m", dtype=np.float16)
    out = tmp_path / "mlx"
    run("quantize", folder, "--out", out, "--format", "mlx", "--exclude", "*.layers.1.mlp.*",
        "--rule", "model.layers.0.mlp.down_proj.weight=int4")
    section = json.loads((out / "config.json").read_text())["quantization"]
    assert section == {"group_size": 64, "bits": 2, "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 4}}
    model, _ = mlx_utils.load_model(out)
    layers = model.model.layers
    assert (layers[0].mlp.down_proj.bits, layers[0].mlp.down_proj.group_size) == (4, 64)
    assert (layers[0].mlp.up_proj.bits, layers[0].mlp.up_proj.group_size) == (2, 64)
    assert not hasattr(layers[1].mlp.up_proj, "bits")
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()


def test_a_ternary_model_of_ours_becomes_mlx_without_loss(tmp_path):
    folder = make_llama(tmp_path / "m")
    packed, out = tmp_path / "packed", tmp_path / "mlx"
    run("quantize", folder, "--out", packed, "--granularity", "tensor")
    run("convert", packed, "--out", out, "--format", "mlx")
    floats, stored = dequantize(packed), mx.load(str(out / "model.safetensors"))
    section = json.loads((out / "config.json").read_text())["quantization"]
    assert section == {"group_size": 128, "bits": 2}
    for name in [n.removesuffix(".scales") for n in stored if n.endswith(".scales")]:
        parts = (stored[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        got = np.array(mx.dequantize(*parts, group_size=128, bits=2))
        assert (got == floats[f"{name}.weight"]).all(), name
    assert {t["precision"] for t in run_json("inspect", out)["tensors"]} == {"ternary", None}
    # And back: the ternary values, in the groups of MLX.
    back = tmp_path / "back"
    run("convert", out, "--out", back, "--layout", "base-3")
    again = dequantize(back)
    assert again.keys() == floats.keys() and all((again[n] == floats[n]).all() for n in floats)
