"""Our safetensors files: opened by the package, decoded by numpy from docs/formats.md, and the quantizers against numpy's arithmetic."""

import json

import decoder
import numpy as np
import pytest
import torch
import xxhash
from conftest import GOLDEN, dequantize, figure, golden, make_llama, run, run_json
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

TERNARY = ["two-bit", "base-3", "byte-aligned", "run-length", "sparse", "hybrid", "entropy", "i8", "hf-bitnet", "auto"]
SETTINGS = {
    # ternary, every layout, every granularity and scale type somewhere; groups of 100 leave a tail of 41 in 341 and of 28 in 128
    **{layout: f"--layout {layout} --granularity {'tensor' if layout == 'hf-bitnet' else g} --scale-dtype {d}"
       for layout, g, d in zip(TERNARY, ["channel", "group:100", "tensor"] * 4, ["f32", "f16", "bf16", "bf16"] * 3)},
    "two-bit f32 group": "--granularity group:64",
    "two-bit bf16 channel": "--scale-dtype bf16",
    "two-bit f16 tensor": "--granularity tensor --scale-dtype f16",
    "two planes": "--planes 2 --granularity group:128 --layout base-3 --scale-dtype f16",
    "three planes": "--planes 3 --layout two-bit",
    "two planes, entropy": "--planes 2 --granularity tensor --layout entropy",
    "binary": "--precision binary",
    "binary mean": "--precision binary --split mean --granularity group:100 --scale-dtype bf16",
    "binary optimal entropy": "--precision binary --split optimal --layout entropy",
    "binary seed i8": "--precision binary --seed 7 --layout i8",
    "int2": "--precision int2 --granularity group:30",
    "int2 asymmetric": "--precision int2 --mapping asymmetric --layout byte-aligned --scale-dtype f16",
    "int3": "--precision int3 --clip search --layout entropy",
    "int3 asymmetric": "--precision int3 --mapping asymmetric --granularity group:64",
    "int4": "--precision int4 --clip rms:2.5",
    "int4 asymmetric": "--precision int4 --mapping asymmetric --granularity group:100 --scale-dtype bf16",
    "int4 entropy": "--precision int4 --layout entropy --granularity tensor",
    "int8": "--precision int8 --rounding half-away",
    "int8 asymmetric entropy": "--precision int8 --mapping asymmetric --layout entropy",
    "int8 asymmetric": "--precision int8 --mapping asymmetric --granularity tensor --layout i8",
}
BLOCKS = ["tq1_0", "tq2_0", "q2_0", "q1_0", "q8_0", "q4_0", "i2_s", "i2_s-g64", "i2_s-x4"]
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8, "I64": torch.int64}


def check(path, original):
    """One file of ours: structure, checksums, digest, packages, values. Returns how many quantized tensors it holds."""
    metadata, tensors = decoder.read_file(path)
    text = metadata["bitnet.document"]
    document = json.loads(text)
    assert document["version"] == 1
    # checksums and digest, section 6.1
    assert document["checksums"] == {name: xxhash.xxh3_128(raw).hexdigest() for name, (_, _, raw) in tensors.items()}
    hashed = text.rstrip(" ").replace(f'"digest":"{document["digest"]}"', '"digest":""')
    hashed += "".join(f"\n{name} {dtype} [{', '.join(map(str, shape))}]" for name, (dtype, shape, _) in sorted(tensors.items()))
    assert document["digest"] == xxhash.xxh3_128(hashed.encode()).hexdigest()
    # the package, both frameworks
    with safe_open(path, framework="pt") as f:
        assert f.metadata() == metadata and set(f.keys()) == set(tensors)
        for name, (dtype, shape, raw) in tensors.items():
            tensor = f.get_tensor(name)
            assert tensor.dtype == TORCH[dtype] and list(tensor.shape) == shape
            assert tensor.contiguous().view(torch.uint8 if tensor.dim() else tensor.dtype).numpy().tobytes() == raw
    with safe_open(path, framework="numpy") as f:
        for name, (dtype, shape, raw) in tensors.items():
            if dtype != "BF16":
                array = f.get_tensor(name)
                assert array.tobytes() == raw and list(array.shape) == shape and array.flags.aligned
    # values
    ours = dequantize(path)
    named = set()
    for name, entry in document["tensors"].items():
        named |= {entry[k] for k in ("packed", "scale", "zero_point") if k in entry}
        spec = entry["spec"]
        assert entry["shape"] == list(original[name].shape) and spec["rows"] * spec["cols"] == original[name].size
        _, expected = decoder.decode(entry, tensors)
        assert ours[name].dtype == np.float32 and np.array_equal(expected, ours[name]), name
    with safe_open(path, framework="numpy") as f:
        integers = {name for name in tensors.keys() - named if tensors[name][0] == "I64"}
        assert all(np.array_equal(f.get_tensor(name), ours[name]) for name in integers)
    for name in tensors.keys() - named - integers:
        assert np.array_equal(decoder.floats(*tensors[name][::2]), ours[name].ravel())
    assert set(ours) == (tensors.keys() - named) | document["tensors"].keys() == set(original)
    return document


@pytest.mark.parametrize("setting", SETTINGS)
def test_glassllm(setting, glassllm, tmp_path):
    """Rows of 128 and 341 in every layout, precision, granularity, scale type and zero point."""
    out = tmp_path / "out.safetensors"
    run("quantize", glassllm, "--out", out, *SETTINGS[setting].split())
    document = check(out, load_file(glassllm / "model.safetensors"))
    assert len(document["tensors"]) == 28
    args = dict(zip(SETTINGS[setting].split()[::2], SETTINGS[setting].split()[1::2]))
    for entry in document["tensors"].values():
        assert entry["spec"]["precision"] == args.get("--precision", "ternary")
        assert entry["spec"]["granularity"] == args.get("--granularity", "channel")
        assert entry["spec"]["scale_dtype"] == args.get("--scale-dtype", "f32")
        assert entry["spec"]["planes"] == int(args.get("--planes", 1))
        assert entry["layout"] != "auto" and entry["layout"] == args.get("--layout", entry["layout"]).replace("auto", entry["layout"])
        zero = "f32" if args.get("--split") else "i8" if args.get("--mapping") == "asymmetric" else "none"
        assert entry["spec"]["zero_points"] == zero


@pytest.mark.parametrize("layout", BLOCKS)
def test_foreign_blocks(layout, llama256, tmp_path):
    """Layouts with the scale inside, in safetensors."""
    precision = {"q1_0": "binary", "q8_0": "int8", "q4_0": "int4"}.get(layout, "ternary")
    granularity = ["--granularity", "tensor", "--scale-dtype", "f32"] if layout.startswith("i2_s") else []
    out = tmp_path / "out.safetensors"
    run("quantize", llama256, "--out", out, "--precision", precision, "--layout", layout, *granularity)
    document = check(out, load_file(llama256 / "model.safetensors"))
    assert len(document["tensors"]) == 14 and {e["layout"] for e in document["tensors"].values()} == {layout}


def test_own_layouts_of_sparse_weights(tmp_path):
    """Mostly-zero weights take the other forms of sparse, run-length and hybrid bodies."""
    rng = np.random.default_rng(3)
    tensors = {f"{p}.weight": (rng.standard_normal((300, 501)) * (rng.random((300, 501)) < p)).astype(np.float32) for p in (0.5, 0.05, 0.001)}
    tensors["zero.weight"] = np.zeros((40, 7), np.float32)
    save_file(tensors, tmp_path / "in.safetensors")
    for layout in ["run-length", "sparse", "hybrid", "entropy", "auto"]:
        out = tmp_path / f"{layout}.safetensors"
        run("quantize", tmp_path / "in.safetensors", "--out", out, "--layout", layout)
        check(out, tensors)


def test_minilm(minilm, tmp_path):
    """The real F32 model, one scale per row."""
    out = tmp_path / "out.safetensors"
    run("quantize", minilm, "--out", out, "--threshold", "optimal", "--layout", "base-3")
    document = check(out, load_file(minilm / "model.safetensors"))
    figure(f"MiniLM, base-3: {len(document['tensors'])} quantized tensors equal to numpy's decoding")


def test_hf_bitnet_golden(tmp_path):
    """The golden HF bytes, in a folder that we did not write, in both conventions."""
    packed = np.frombuffer(bytes.fromhex(GOLDEN["hf-bitnet"]), np.uint8).reshape(2, 32)
    for linear_class in ["bitlinear", "autobitlinear", None]:
        folder = tmp_path / str(linear_class)
        folder.mkdir()
        save_file({"p.weight": packed, "p.weight_scale": np.array([0.25], np.float32)}, folder / "model.safetensors")
        quantization = {"quant_method": "bitnet"} | ({"linear_class": linear_class} if linear_class else {})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
        run("dequantize", folder, "--out", tmp_path / "out.safetensors", "--force")
        expected = golden(256).reshape(8, 32) * np.float32(0.25 if linear_class == "autobitlinear" else 4)
        assert np.array_equal(load_file(tmp_path / "out.safetensors")["p.weight"], expected)


# The quantizers against numpy. Everything in f64, on the weights as the file holds them.


def parts(w, granularity):
    return [w.reshape(-1)] if granularity == "tensor" else list(w.reshape(len(w), -1))


def reference(a, rule):
    """(scale, cut) for magnitudes a (f64): the weights above the cut are kept."""
    mean = a.mean()
    if rule == "absmean":
        return mean, mean / 2
    if rule == "optimal":
        # Brute force: the sum of the k largest, for every k.
        largest = np.sort(a)[::-1]
        sums, k = np.cumsum(largest), np.arange(1, a.size + 1)
        best = np.argmax(sums**2 / k)
        s = sums[best] / k[best]
        below = largest[best + 1] if best + 1 < a.size else 0
        assert below <= s / 2 * (1 + 1e-9) and largest[best] >= s / 2 * (1 - 1e-9)
        return s, s / 2
    cut = {"mean": 0.7 * mean, "median": 0.8 * np.median(a)}[rule]
    return a[a > cut].mean(), cut


@pytest.mark.parametrize("model", ["glassllm", "minilm"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rule", ["absmean", "mean", "median", "optimal"])
def test_ternary_rules(rule, granularity, model, request, tmp_path):
    """Codes, scales and SQNR of the four rules on real tensors."""
    folder = request.getfixturevalue(model)
    out = tmp_path / "out.safetensors"
    run("quantize", folder, "--out", out, "--threshold", rule, "--granularity", granularity, "--layout", "i8")
    original = load_file(folder / "model.safetensors")
    metadata, tensors = decoder.read_file(out)
    document = json.loads(metadata["bitnet.document"])
    compared = {t["name"]: t for t in run_json("compare", folder, out)["tensors"]}
    near, codes, worst_scale, worst_sqnr = 0, 0, 0.0, 0.0
    for name, entry in document["tensors"].items():
        w = original[name].astype(np.float64).reshape(len(original[name]), -1)
        values, floats = decoder.decode(entry, tensors)
        scales = decoder.floats(*tensors[entry["scale"]][::2])
        for part, got, scale in zip(parts(w, granularity), parts(values[0], granularity), scales):
            a = np.abs(part)
            s, cut = reference(a, rule)
            worst_scale = max(worst_scale, abs(scale - s) / s)
            different = got != np.sign(part) * (a > cut)
            assert (np.abs(a[different] / cut - 1) < 1e-6).all(), (name, int(different.sum()))
            near += int(different.sum())
            codes += a.size
        sqnr = 10 * np.log10((w**2).sum() / ((w - floats.reshape(w.shape).astype(np.float64)) ** 2).sum())
        worst_sqnr = max(worst_sqnr, abs(compared[name]["sqnr_db"] / sqnr - 1))
    assert worst_scale < 1e-6 and worst_sqnr < 1e-6
    figure(f"{model} {rule} per {granularity}: {codes} codes, {near} at the threshold differ; scales within {worst_scale:.1e}, SQNR within {worst_sqnr:.1e}")


@pytest.mark.parametrize("args", ["int8", "int4", "int3", "int2", "int8 --mapping asymmetric", "int4 --mapping asymmetric"])
def test_integer_rules(args, glassllm, tmp_path):
    """Absmax integers with and without a zero point: round(w/s) + z, half to even."""
    out = tmp_path / "out.safetensors"
    precision, *more = args.split()
    run("quantize", glassllm, "--out", out, "--precision", precision, *more, "--granularity", "group:100", "--layout", "i8")
    original = load_file(glassllm / "model.safetensors")
    metadata, tensors = decoder.read_file(out)
    low, high = decoder.ALPHABET[precision]
    different = 0
    for name, entry in json.loads(metadata["bitnet.document"])["tensors"].items():
        w = original[name].astype(np.float64)
        values, _ = decoder.decode(entry, tensors)
        scales = decoder.floats(*tensors[entry["scale"]][::2]).reshape(len(w), -1)
        zeros = np.frombuffer(tensors[entry["zero_point"]][2], np.int8).reshape(scales.shape) if more else np.zeros(scales.shape)
        for g in range(scales.shape[1]):
            part, got = w[:, 100 * g:100 * g + 100], values[0][:, 100 * g:100 * g + 100]
            if more:
                lo, hi = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
                s = (hi - lo) / (high - low)
                z = np.clip(np.round(low - lo / scales[:, g].astype(np.float64)), low, high)
                assert np.abs(zeros[:, g] - z).max() == 0
            else:
                s, z = np.abs(part).max(1) / high, 0 * part[:, 0]
            assert np.abs(scales[:, g] / s - 1).max() < 1e-6
            exact = part / scales[:, g:g + 1].astype(np.float64)
            wrong = got != np.clip(np.round(exact) + z[:, None], low, high)
            assert (np.abs(np.abs(exact - np.floor(exact)) - 0.5)[wrong] < 2e-5).all()
            different += int(wrong.sum())
    figure(f"glassllm {args}, groups of 100: codes equal but for {different} at a tie")


def test_binary_rule(glassllm, tmp_path):
    """sign(w) with 0 as +1, and mean|w|."""
    out = tmp_path / "out.safetensors"
    run("quantize", glassllm, "--out", out, "--precision", "binary")
    original = load_file(glassllm / "model.safetensors")
    metadata, tensors = decoder.read_file(out)
    for name, entry in json.loads(metadata["bitnet.document"])["tensors"].items():
        w = original[name].astype(np.float64)
        values, _ = decoder.decode(entry, tensors)
        assert np.array_equal(values[0], np.where(w >= 0, 1, -1))
        assert np.abs(decoder.floats(*tensors[entry["scale"]][::2]) / np.abs(w).mean(1) - 1).max() < 1e-6


OTHERS = ["absmean", "absmean --scale least-squares", "mean", "median", "adaptive", "factor:0.9"]


@pytest.mark.parametrize("model, granularity", [
    ("glassllm", "tensor"), ("glassllm", "channel"), ("glassllm", "group:64"), ("minilm", "tensor"), ("minilm", "channel"), ("smollm2", "channel"),
])
def test_optimal_is_at_least_as_good(model, granularity, request, tmp_path):
    """On every tensor of every model, against every other rule, by `compare`."""
    source, out = request.getfixturevalue(model), tmp_path / "out.safetensors"

    def errors(rule):
        run("quantize", source, "--out", out, "--force", "--granularity", granularity, "--threshold", *rule.split())
        return {t["name"]: t["mse"] for t in run_json("compare", source, out)["tensors"] if t["entropy_bits"] is not None}

    best = errors("optimal")
    assert len(best) == {"glassllm": 28, "minilm": 37, "smollm2": 210}[model]
    margin = []
    for rule in OTHERS:
        other = errors(rule)
        assert other.keys() == best.keys()
        worse = {n: (best[n], other[n]) for n in best if best[n] > other[n] * (1 + 1e-9)}
        assert not worse, (rule, worse)
        margin.append(f"{rule} {10 * np.log10(min(other[n] / best[n] for n in best)):.3f}")
    figure(f"optimal on {model} per {granularity}: best on all {len(best)} tensors; least gain in dB over {', '.join(margin)}")
