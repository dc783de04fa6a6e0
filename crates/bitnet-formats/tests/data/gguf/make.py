#!/usr/bin/env python3
"""Writes the big-endian files and the split set of this folder, with the PyPI package gguf.

little.gguf, big.gguf      the same model; the second by gguf's own gguf_convert_endian.py
little-2.gguf, big-2.gguf  the same model in the types of plain numbers; both by GGUFWriter
split/m-0000?-of-00004     a model in parts of two tensors, none in the first; whole.gguf in one
"""
import pathlib
import shutil
import subprocess
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

HERE = pathlib.Path(__file__).parent
rng = np.random.default_rng(5)
MODEL = dict(arch="llama")


def metadata(writer):
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -2)
    writer.add_uint16("a.u16", 0x1234)
    writer.add_int16("a.i16", -0x1234)
    writer.add_uint32("a.u32", 0x12345678)
    writer.add_int32("a.i32", -0x12345678)
    writer.add_float32("a.f32", 1.1)
    writer.add_uint64("a.u64", 0x123456789ABCDEF0)
    writer.add_int64("a.i64", -0x123456789ABCDEF)
    writer.add_float64("a.f64", -1.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "größer")
    writer.add_array("a.strings", ["a", "", "bc"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [1.5, -2.25])


def save(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized():
    tensors = {}
    for kind in [T.F32, T.F16, T.BF16, T.Q4_0, T.Q8_0, T.Q4_K, T.Q6_K, T.MXFP4, T.NVFP4]:
        values = rng.standard_normal((2, 256)).astype(np.float32)
        if kind in (T.F32, T.F16):
            data = values.astype(np.float32 if kind == T.F32 else np.float16)
        elif kind in (T.BF16, T.Q4_0, T.Q8_0):
            data = gguf.quants.quantize(values, kind)
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = rng.integers(0, 256, (2, 256 // block * size), dtype=np.uint8)
            blocks = data.reshape(-1, size)
            # Scales in f16 that are finite.
            for at in {T.Q4_K: [0, 2], T.Q6_K: [208]}.get(kind, []):
                blocks[:, at:at + 2] = rng.standard_normal((len(blocks), 1)).astype("<f2").view(np.uint8)
        tensors[kind.name] = (data, kind)
    return tensors


writer = gguf.GGUFWriter(HERE / "little.gguf", **MODEL)
metadata(writer)
for name, (data, kind) in quantized().items():
    writer.add_tensor(name, data, raw_dtype=kind)
save(writer)
shutil.copy(HERE / "little.gguf", HERE / "big.gguf")
convert = [sys.executable, "-m", "gguf.scripts.gguf_convert_endian", HERE / "big.gguf", "big"]
subprocess.run(convert, input=b"YES\n", check=True)

plain = {
    "I8": rng.integers(-128, 128, (3, 8)).astype(np.int8),
    "I16": rng.integers(-(2**15), 2**15, (3, 8)).astype(np.int16),
    "I32": rng.integers(-(2**31), 2**31, (3, 8)).astype(np.int32),
    "I64": rng.integers(-(2**63), 2**63 - 1, (3, 8)).astype(np.int64),
    "F16": rng.standard_normal((3, 8)).astype(np.float16),
    "F32": rng.standard_normal((3, 8)).astype(np.float32),
    "F64": rng.standard_normal((3, 8)),
}
for name, order in [("little-2", gguf.GGUFEndian.LITTLE), ("big-2", gguf.GGUFEndian.BIG)]:
    writer = gguf.GGUFWriter(HERE / f"{name}.gguf", endianess=order, **MODEL)
    metadata(writer)
    for key, data in plain.items():
        writer.add_tensor(key, data.copy())
    save(writer)

(HERE / "split").mkdir(exist_ok=True)
for name, options in [("m", dict(split_max_tensors=2, small_first_shard=True)), ("whole", {})]:
    writer = gguf.GGUFWriter(HERE / "split" / f"{name}.gguf", **MODEL, **options)
    writer.add_uint32("a.u32", 7)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.arange(4 + i, dtype=np.float32) + 10 * i)
    save(writer)
