"""GGUF against the PyPI package gguf: what we wrote it reads as we do, what it wrote we read as it does, and the golden vectors."""

import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from conftest import (GGML_ID, GOLDEN, decode_i2_s, decode_q1_0, decode_q2_0, dequantize, figure, golden, read_gguf, run, run_json, same, write_gguf)
from safetensors.numpy import load_file

PRECISION = {"tq1_0": "ternary", "tq2_0": "ternary", "q2_0": "ternary", "q8_0": "int8", "q4_0": "int4", "q1_0": "binary"}
BLOCK = {"tq1_0": 256, "tq2_0": 256, "q2_0": 64, "q8_0": 32, "q4_0": 32, "q1_0": 128}
HF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    for hf, ours in HF_NAMES.items():
        if name.endswith(hf + ".weight"):
            return f"blk.{name.split('.')[2]}.{ours}.weight" if ".layers." in name else f"{ours}.weight"
    raise KeyError(name)


def rope_order(w, heads):
    """Rows of q and k as llama.cpp's llama architecture wants them (convert_hf_to_gguf.py's permute)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def decoded(path):
    """{name: (type name, floats)} by the gguf package, and by numpy for the two types that it cannot decode."""
    _, infos = read_gguf(path)
    found = {}
    try:
        reader = gguf.GGUFReader(path)
    except ValueError:
        # gguf 0.19 stops at a type it does not know. Then the file must hold Q2_0, the one such type that we write.
        assert 42 in {kind for kind, *_ in infos.values()} and 42 not in {q.value for q in gguf.GGMLQuantizationType}
        for name, (kind, shape, raw) in infos.items():
            if kind == 42:
                found[name] = ("Q2_0", decode_q2_0(raw, shape))
                continue
            kind = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = np.frombuffer(raw, np.uint8, int(np.prod(shape)) // block * size).reshape(shape[0], -1)
            found[name] = (kind.name, np.ascontiguousarray(gguf.quants.dequantize(data, kind), np.float32).reshape(shape))
        return found
    assert [t.name for t in reader.tensors] == list(infos)
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        assert infos[tensor.name][:2] == (tensor.tensor_type.value, shape)
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q1_0:
            with pytest.raises(NotImplementedError):
                gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            floats = decode_q1_0(infos[tensor.name][2], shape)
        else:
            floats = np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        found[tensor.name] = (tensor.tensor_type.name, floats)
    return found


def check_file(path):
    """Types by name, after every tensor decoded alike."""
    theirs, ours = decoded(path), dequantize(path)
    assert theirs.keys() == ours.keys()
    different = [name for name, (_, floats) in theirs.items() if not same(floats, ours[name])]
    assert not different, different
    return theirs, sum(floats.size for _, floats in theirs.values())


@pytest.mark.parametrize("layout", PRECISION)
@pytest.mark.parametrize("model", ["llama256", "llama576"])
def test_small_model(model, layout, request, tmp_path):
    """Names, shapes, row order, types and every value of an HF folder as GGUF; rows that no block divides are refused by name."""
    folder, out = request.getfixturevalue(model), tmp_path / "out.gguf"
    args = ["quantize", folder, "--out", out, "--format", "gguf", "--precision", PRECISION[layout], "--layout", layout]
    original = load_file(folder / "model.safetensors")
    linear = [n for n in original if "_proj" in n]
    if any(original[n].shape[1] % BLOCK[layout] for n in linear):
        assert layout.upper() in run(*args, status=2).upper()
        assert not out.exists()
        return
    run(*args)
    theirs, _ = check_file(out)
    assert {gguf_name(n) for n in original} == set(theirs)
    heads = {"q_proj": 4 if model == "llama256" else 9, "k_proj": 2 if model == "llama256" else 3}
    for name, w in original.items():
        kind, floats = theirs[gguf_name(name)]
        assert kind == (layout.upper() if name in linear else "F32")
        assert floats.shape == w.shape
        for proj, count in heads.items():
            if proj in name:
                w = rope_order(w, count)
        if name in linear:
            # Only the right rows in the right order lie this near to the original.
            cosine = np.vdot(floats, w) / np.linalg.norm(floats) / np.linalg.norm(w)
            assert cosine > {"q8_0": 0.9999, "q4_0": 0.99}.get(layout, 0.7), (name, cosine)
        else:
            assert same(floats, w), name


def test_small_model_without_a_layout(llama576, tmp_path):
    """Without --layout a row takes the block that divides it, or stays F16 with a note."""
    for precision, kinds in {"ternary": {"Q2_0"}, "int8": {"Q8_0"}, "int4": {"Q4_0"}, "binary": {"F16"}}.items():
        out = tmp_path / f"{precision}.gguf"
        answer = run_json("quantize", llama576, "--out", out, "--precision", precision)
        theirs, _ = check_file(out)
        assert {kind for name, (kind, _) in theirs.items() if name.startswith("blk.") and "norm" not in name} == kinds
        notes = [t["note"] for t in answer["tensors"] if t["note"]]
        assert (len(notes) == 7 and all("F16" in n and "128" in n for n in notes)) if precision == "binary" else not notes


def test_smollm2_reads_as_gguf_reads_it(smollm2):
    """All 272 tensors of a file that llama.cpp wrote (Q4_1, Q8_0 and F32), bit for bit."""
    theirs, values = check_file(smollm2)
    assert len(theirs) == 272
    figure(f"SmolLM2 Q4_1: {len(theirs)} tensors, {values} values equal to gguf's, bit for bit")


@pytest.mark.parametrize("layout", PRECISION)
def test_smollm2_quantized(smollm2, layout, tmp_path):
    """The real model in each type that its rows of 576 and 1536 can hold."""
    out = tmp_path / "out.gguf"
    args = ["quantize", smollm2, "--out", out, "--precision", PRECISION[layout], "--layout", layout]
    if BLOCK[layout] > 64:  # 576 = 9 · 64: of these only the matrices with rows of 1536 can be it
        run(*args, status=2)
        args += ["--include", "*ffn_down.weight"]
    run(*args)
    theirs, values = check_file(out)
    counts = {}
    for kind, _ in theirs.values():
        counts[kind] = counts.get(kind, 0) + 1
    assert len(theirs) == 272 and counts[layout.upper()] == (30 if BLOCK[layout] > 64 else 210 + (layout == "q8_0"))  # the embedding is Q8_0
    figure(f"SmolLM2 to {layout}: {counts}, {values} values equal to the independent decoder's, bit for bit")


def test_golden_vectors_in_gguf(tmp_path):
    """The bytes of formats.md 7 in files that we did not write."""
    for name, raw, values in [
        ("tq1_0", GOLDEN["tq1_0"], golden(256)), ("tq2_0", GOLDEN["tq2_0"], golden(256)), ("q2_0", GOLDEN["q2_0"], golden(64)),
        ("q1_0", GOLDEN["q1_0"], np.where(golden(128) >= 0, 1, -1) * np.float32(0.6484375)),
    ]:
        path = tmp_path / f"{name}.gguf"
        write_gguf(path, {"w": (GGML_ID[name], (1, values.size), bytes.fromhex(raw))})
        assert same(dequantize(path)["w"], values.astype(np.float32).reshape(1, -1) + np.float32(0)), name


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q1_0"])
def test_golden_vectors_by_ggufs_writer(name, tmp_path):
    """The same through gguf.GGUFWriter, three rows with other scales."""
    kind, raw = gguf.GGMLQuantizationType[name], bytes.fromhex(GOLDEN[name.lower()])
    at = 0 if name == "Q1_0" else len(raw) - 2
    rows = [raw[:at] + np.float16(s).tobytes() + raw[at + 2:] for s in (1.0, -0.25, 1e-7)]
    path = tmp_path / "w.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.frombuffer(b"".join(rows), np.uint8).reshape(3, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = np.where(golden(128) >= 0, 1, -1) if name == "Q1_0" else golden(256)
    expected = np.outer(np.float16([1.0, -0.25, 1e-7]).astype(np.float32), values.astype(np.float32))
    got = dequantize(path)["w"]
    assert got.shape == expected.shape and np.array_equal(got, expected)


@pytest.mark.parametrize("order, shape, fit", [
    ("i2_s", (1, 256), ["i2_s", "i2_s-g64"]), ("i2_s-g64", (1, 256), ["i2_s", "i2_s-g64"]), ("i2_s-x4", (4, 64), ["i2_s-g64", "i2_s-x4"]),
])
def test_i2s_orders(order, shape, fit, tmp_path):
    """I2_S in each order through `convert --i2s-order`; the other orders read other values, or refuse the shape."""
    raw = bytearray.fromhex(GOLDEN[order])
    raw[64:68] = np.float32(0.375).tobytes()
    path = tmp_path / "in.gguf"
    write_gguf(path, {"w": (36, shape, bytes(raw))})
    for asked in ["i2_s", "i2_s-g64", "i2_s-x4"]:
        out = tmp_path / f"{asked}.safetensors"
        run("convert", path, "--out", out, "--i2s-order", asked, status=0 if asked in fit else 2)
        assert out.exists() == (asked in fit)
        if asked in fit:
            assert np.array_equal(dequantize(out)["w"], golden(256).reshape(shape) * np.float32(0.375)) == (asked == order), asked


def test_i2s_written(llama256, tmp_path):
    """I2_S that we wrote, decoded from the raw bytes by the text of formats.md 4.3. GGUF holds the first order alone."""
    out = tmp_path / "out.gguf"
    args = ["quantize", llama256, "--out", out, "--granularity", "tensor", "--scale-dtype", "f32", "--layout"]
    for other in ["i2_s-g64", "i2_s-x4"]:
        assert other in run(*args, other, status=2)
    run(*args, "i2_s")
    ours = dequantize(out)
    seen = 0
    for name, (kind, shape, raw) in read_gguf(out)[1].items():
        if kind == 36:
            assert np.array_equal(decode_i2_s(raw, shape), ours[name]), name
            seen += 1
    assert seen == 14


def swap_byte_order(path, target):
    """A big-endian copy, by gguf's own script."""
    shutil.copy(path, target)
    convert = [sys.executable, "-m", "gguf.scripts.gguf_convert_endian", str(target), "big"]
    subprocess.run(convert, input=b"YES\n", check=True, capture_output=True)


def split_by_gguf_py(path, folder, tensors):
    """The parts of a file, by gguf-py's writer."""
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(folder / "p.gguf", architecture, split_max_tensors=tensors, small_first_shard=True)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("p-*.gguf"))


def test_big_endian_and_parts(llama256, tmp_path):
    """A model of ours that gguf-py made big-endian or cut into parts is the same model, and its document is valid."""
    whole = tmp_path / "whole.gguf"
    run("quantize", llama256, "--out", whole, "--format", "gguf", "--precision", "int8", "--layout", "q8_0")
    big = tmp_path / "big.gguf"
    swap_byte_order(whole, big)
    (tmp_path / "parts").mkdir()
    parts = split_by_gguf_py(whole, tmp_path / "parts", 4)
    assert len(parts) > 3
    expected = dequantize(whole)
    again = tmp_path / "again.gguf"
    run("convert", whole, "--out", again)
    for other in [big, parts[0], parts[-1]]:
        found = dequantize(other)
        assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
        run("verify", other)
        run("compare", whole, other)
        (out := tmp_path / "out.gguf").unlink(missing_ok=True)
        run("convert", other, "--out", out)
        assert out.read_bytes() == again.read_bytes()
    parts[2].unlink()
    assert parts[2].name in run("inspect", parts[0], status=2)
