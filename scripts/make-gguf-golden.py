#!/usr/bin/env python3
"""Writes the golden files of crates/bitnet-formats/tests/data/gguf.

    pip install gguf==0.19.0 numpy
    python scripts/make-gguf-golden.py --ggml path/to/libggml-base.so

`decode.gguf`: for each tensor type NAME a pair of tensors, `NAME.bytes` (I8) and `NAME.floats` (F32): blocks and what they decode to.
The floats come from gguf.quants.dequantize, those of Q1_0 and Q2_0, which gguf 0.19 knows by name at most, from the C functions in
ggml's shared library.

`small.gguf`: every kind of metadata value and a few tensors, written by gguf.GGUFWriter.
"""

import argparse
import ctypes
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

OUT = pathlib.Path(__file__).resolve().parent.parent / "crates/bitnet-formats/tests/data/gguf"

# Byte offsets of the f16 numbers in a block.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "TQ1_0": [52], "TQ2_0": [64], "Q1_0": [0], "Q2_0": [0],
}
SIZES = {name: gguf.GGML_QUANT_SIZES[T[name]] for name in HALVES if name != "Q2_0"} | {"Q2_0": (64, 18)}
QUANTIZABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "BF16", "F16"]
# f16 scales of the random blocks: ordinary, negative, zero, the smallest subnormal, the largest finite number.
SCALES = [0x2A3D, 0xB1C7, 0x0000, 0x0001, 0x7BFF]


class Lcg:
    def __init__(self, state=1):
        self.state = state

    def byte(self):
        self.state = (self.state * 1664525 + 1013904223) % 2**32
        return self.state >> 24

    def bytes(self, n):
        return bytes(self.byte() for _ in range(n))

    def floats(self, n):
        return np.array([(self.byte() * 256 + self.byte()) / 32768 - 1 for _ in range(n)], dtype=np.float32)


def random_blocks(name, rng):
    _, size = SIZES[name]
    blocks = []
    for index, scale in enumerate(SCALES if SIZES[name][0] < 256 else SCALES[:3]):
        block = bytearray(rng.bytes(size))
        for n, at in enumerate(HALVES[name]):
            half = scale if n == 0 else SCALES[(index + 1) % len(SCALES[:2])]
            block[at:at + 2] = half.to_bytes(2, "little")
        blocks.append(bytes(block))
    return b"".join(blocks)


def dequantize(name, data, ggml):
    if name in ("Q1_0", "Q2_0"):
        out = np.zeros(len(data) // SIZES[name][1] * SIZES[name][0], dtype=np.float32)
        function = getattr(ggml, f"dequantize_row_{name.lower()}")
        function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
        function(data, out.ctypes.data, out.size)
        return out
    return np.asarray(gguf.quants.dequantize(np.frombuffer(data, dtype=np.uint8), T[name])).ravel()


def decode_file(ggml):
    writer = gguf.GGUFWriter(OUT / "decode.gguf", "golden")
    rng = Lcg()

    def add(name, data):
        floats = dequantize(name, data, ggml)
        assert floats.dtype == np.float32 and np.isfinite(floats).all(), name
        writer.add_tensor(f"{name}.bytes", np.frombuffer(data, dtype=np.int8))
        writer.add_tensor(f"{name}.floats", floats)

    for name in HALVES:
        data = random_blocks(name, rng)
        if name in QUANTIZABLE:
            x = rng.floats(SIZES[name][0])
            data += gguf.quants.quantize(x[None, :], T[name]).tobytes()
        add(name, data)
    for name in ("BF16", "F16"):
        x = np.concatenate([rng.floats(29), np.array([0.0, -0.0, 1e-7], dtype=np.float32)])
        add(name, gguf.quants.quantize(x[None, :], T[name]).tobytes())
    add("F32", rng.floats(32).tobytes())
    write(writer)


def small_file():
    writer = gguf.GGUFWriter(OUT / "small.gguf", "bitnet-b1.58")
    writer.add_custom_alignment(64)
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -100)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 4000000000)
    writer.add_int32("t.i32", -2000000000)
    writer.add_uint64("t.u64", 2**64 - 1)
    writer.add_int64("t.i64", -(2**63))
    writer.add_float32("t.f32", 1e-5)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.true", True)
    writer.add_bool("t.false", False)
    writer.add_string("t.string", "grüße 世界")
    writer.add_array("a.string", ["<s>", "", "▁x"])
    writer.add_array("a.bool", [True, False])
    for kind, values in (("U8", [0, 255]), ("I8", [-128, 127]), ("U16", [65535]), ("I16", [-32768]), ("U32", [1, 2, 3]),
                         ("I32", [-1]), ("U64", [2**64 - 1]), ("I64", [-(2**63)]), ("F32", [0.5, -0.25]), ("F64", [0.1])):
        long = {"U": "UINT", "I": "INT", "F": "FLOAT"}[kind[0]] + kind[1:]
        writer.add_key_value(f"a.{kind.lower()}", values, V.ARRAY, sub_type=V[long])
    rng = Lcg(7)
    writer.add_tensor("plain.weight", rng.floats(6).reshape(2, 3))
    writer.add_tensor("half.weight", rng.floats(24).reshape(2, 3, 4).astype(np.float16))
    for name, shape in (("Q8_0", (3, 64)), ("TQ2_0", (2, 256)), ("BF16", (5,))):
        x = rng.floats(int(np.prod(shape))).reshape(shape)
        writer.add_tensor(f"{name.lower()}.weight", gguf.quants.quantize(x, T[name]), raw_dtype=T[name])
    write(writer)


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", required=True, help="libggml-base.so of a ggml that has Q1_0 and Q2_0")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    decode_file(ctypes.CDLL(args.ggml))
    small_file()
