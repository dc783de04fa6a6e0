#!/usr/bin/env python3
"""Compares what bitnet-formats reads from a GGUF file with what Python's gguf package reads: every key, tensor info and decoded float.

    cargo build --release -p bitnet-formats --example gguf_decode
    python scripts/check-gguf.py target/release/examples/gguf_decode model.gguf
"""

import subprocess
import sys
import tempfile

import gguf
import numpy as np

NAMES = {"UINT": "u", "INT": "i", "FLOAT": "f"}


def short(kind):
    name = kind.name
    for long, letter in NAMES.items():
        if name.startswith(long):
            return letter + name.removeprefix(long)
    return name.lower()


def main():
    program, path = sys.argv[1:]
    with tempfile.NamedTemporaryFile() as out:
        log = subprocess.run([program, path], stdout=out, stderr=subprocess.PIPE, check=True, text=True).stderr.splitlines()
        floats = np.memmap(out.name, dtype=np.uint32)
        reader = gguf.GGUFReader(path)
        fields = [f for name, f in reader.fields.items() if not name.startswith("GGUF.")]
        for field, line in zip(fields, log[1:]):
            key, kind, text = line.split("\t")
            assert (key, kind) == (field.name, short(field.types[0])), (line, field.name, field.types)
            value = field.contents()
            if kind == "array":
                assert f"({len(value)} {short(field.types[1])})" in text or len(value) < 50, (line, len(value))
            elif kind[0] in "uif":
                assert np.float64(text) == np.float64(value) or np.float32(text) == np.float32(value), (line, value)
            elif kind == "string" and "…" not in text and "\\" not in text:
                assert text == f'"{value}"', (line, value)
        # Covers the array elements: they came out of the file and went back to the same bytes.
        assert log[-1] == "header encoded again: the same bytes", log[-1]
        at = 0
        kinds = {}
        for tensor, line in zip(reader.tensors, log[1 + len(fields):-1], strict=True):
            name, shape, kind, offset, size = line.split("\t")
            expected = tuple(reversed(tensor.shape.tolist()))
            assert name == tensor.name and kind == tensor.tensor_type.name, line
            assert tuple(int(d) for d in shape.strip("[]").split(",")) == expected, line
            assert (int(offset), int(size)) == (tensor.data_offset, tensor.n_bytes), line
            want = np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).ravel().view(np.uint32)
            got = floats[at:at + want.size]
            assert np.array_equal(got, want), f"{name}: {np.count_nonzero(got != want)} of {want.size} values differ"
            at += want.size
            kinds[kind] = kinds.get(kind, 0) + 1
        assert at == floats.size, (at, floats.size)
    print(f"{len(fields)} keys, {len(reader.tensors)} tensors {kinds}, {at} values: all equal")


if __name__ == "__main__":
    main()
