"""A reader of our files written from docs/formats.md with numpy alone. It shares nothing with the program."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
from conftest import decode_i2_s, decode_q1_0, decode_q2_0

ALPHABET = {"binary": (-1, 1), "ternary": (-1, 1), "int2": (-2, 1), "int3": (-4, 3), "int4": (-8, 7), "int8": (-128, 127)}
BITS = {"one-bit": 1, "two-bit": 2, "byte-aligned": 2, "three-bit": 3, "four-bit": 4}
GGML = {"tq1_0": "TQ1_0", "tq2_0": "TQ2_0", "q8_0": "Q8_0", "q4_0": "Q4_0"}
FLOATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


def read_file(path):
    """(metadata, {name: (dtype, shape, bytes)} in the header's order), section 6.2."""
    raw = Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8:8 + length])
    start = 8 + length
    assert start % 8 == 0
    metadata, tensors, spans = header.pop("__metadata__"), {}, []
    for name, info in header.items():
        begin, end = info["data_offsets"]
        assert end - begin == int(np.prod(info["shape"])) * SIZES[info["dtype"]], name
        assert (start + begin) % SIZES[info["dtype"]] == 0, name
        tensors[name] = (info["dtype"], info["shape"], raw[start + begin:start + end])
        spans.append((begin, end))
    spans.sort()
    assert spans[0][0] == 0 and spans[-1][1] == len(raw) - start and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    return metadata, tensors


def floats(dtype, raw):
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, FLOATS[dtype]).astype(np.float32)


def value_of(code, precision):
    """Section 2; code is an unsigned array."""
    code = code.astype(np.int16)
    if precision == "binary":
        return (2 * code - 1).astype(np.int8)
    assert precision != "ternary" or code.max(initial=0) < 3
    return (code + ALPHABET[precision][0]).astype(np.int8)


def symbols(precision):
    low, high = ALPHABET[precision]
    return [-1, 1] if precision == "binary" else list(range(low, high + 1))


def fixed(raw, rows, cols, bits, width):
    flat = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(rows, width), axis=1, bitorder="little")
    assert not flat[:, bits * cols:].any()
    return (flat[:, :bits * cols].reshape(rows, cols, bits) << np.arange(bits, dtype=np.uint8)).sum(2)


def base3(raw, rows, cols):
    rest = np.frombuffer(raw, np.uint8).reshape(rows, -(-cols // 5)).astype(np.int16)
    assert rest.max(initial=0) < 243
    digits = np.stack([rest // 3**i % 3 for i in range(5)], axis=2).reshape(rows, -1)
    assert not digits[:, cols:].any()
    return (digits[:, :cols] - 1).astype(np.int8)


class Bytes:
    def __init__(self, raw):
        self.raw, self.at = raw, 0

    def byte(self):
        self.at += 1
        return self.raw[self.at - 1]

    def varint(self):
        x, shift = 0, 0
        while True:
            b = self.byte()
            x |= (b & 127) << shift
            shift += 7
            if b < 128:
                assert b or shift == 7
                return x

    def take(self, n):
        assert self.at + n <= len(self.raw)
        self.at += n
        return self.raw[self.at - n:self.at]

    def rest(self):
        return self.take(len(self.raw) - self.at)


def bits_of(raw, n):
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
    assert not bits[n:].any()
    return bits[:n]


def run_length(raw, n):
    body, out, last = Bytes(raw), [], None
    while body.at < len(raw):
        token = body.byte()
        code, r = token & 3, token >> 2
        assert code < 3 and code != last
        last = code
        out.append(np.full(r + 1 if r < 63 else 64 + body.varint(), code - 1, np.int8))
    return np.concatenate(out)


def sparse(raw, n):
    body, out = Bytes(raw), np.zeros(n, np.int8)
    if body.byte() == 0:
        places = np.flatnonzero(bits_of(body.take(-(-n // 8)), n))
    else:
        assert raw[0] == 1
        places, at = [], -1
        for _ in range(body.varint()):
            at += body.varint() + 1
            places.append(at)
    out[places] = 1 - 2 * bits_of(body.rest(), len(places)).astype(np.int8)
    return out


def hybrid(raw, n):
    return [lambda r: base3(r, 1, n)[0], lambda r: run_length(r, n), lambda r: sparse(r, n)][raw[0]](raw[1:])


def entropy(raw, n, precision):
    alphabet = symbols(precision)
    body = Bytes(raw)
    if body.byte() == 0:
        rest = body.rest()
        if precision == "ternary":
            return base3(rest, 1, n)[0]
        bits = (len(alphabet) - 1).bit_length()
        return value_of(fixed(rest, 1, n, bits, len(rest))[0], precision)
    log = 14 if precision == "int8" else 12
    m, left, f = 1 << log, 1 << log, []
    while len(f) < len(alphabet) - 1:
        x = body.varint()
        f.append(x)
        left -= x
        if x == 0:
            f += [0] * body.varint()
    assert left >= 0 and len(f) == len(alphabet) - 1
    f.append(left)
    c = np.concatenate([[0], np.cumsum(f)]).tolist()
    symbol_of = np.repeat(np.arange(len(f)), f).tolist()
    lanes = 4 if n >= 4096 else 1
    state = [int.from_bytes(body.take(4), "little") for _ in range(lanes)]
    words = np.frombuffer(body.rest(), "<u2").tolist()
    out, next_word = [0] * n, 0
    for i in range(n):
        x = state[i % lanes]
        slot = x & (m - 1)
        s = symbol_of[slot]
        x = f[s] * (x >> log) + slot - c[s]
        if x < 1 << 16:
            x = (x << 16) + words[next_word]
            next_word += 1
        state[i % lanes] = x
        out[i] = alphabet[s]
    assert next_word == len(words) and all(x == 1 << 16 for x in state)
    return np.array(out, np.int8)


def framed(raw, rows, cols, body):
    per = max(1, 65536 // cols)
    out, at = [], 0
    for first in range(0, rows, per):
        n = min(per, rows - first) * cols
        (length,) = struct.unpack_from("<I", raw, at)
        out.append(body(raw[at + 4:at + 4 + length], n))
        assert out[-1].size == n
        at += 4 + length
    assert at == len(raw)
    return np.concatenate(out).reshape(rows, cols)


def hf_bitnet(raw, rows, cols):
    r = -(-rows // 4)
    fields = (np.frombuffer(raw, np.uint8).reshape(1, r, cols) >> np.array([0, 2, 4, 6], np.uint8)[:, None, None]) & 3
    fields = fields.reshape(4 * r, cols)
    assert not fields[rows:].any() and fields.max() < 3
    return fields[:rows].astype(np.int8) - 1


def unpack(layout, precision, raw, rows, cols):
    """Values [rows, cols] of one of our own layouts, or of hf-bitnet."""
    if layout == "i8":
        return np.frombuffer(raw, np.int8).reshape(rows, cols)
    if layout in BITS:
        width = -(-BITS[layout] * cols // 8)
        if layout == "byte-aligned":
            width = -(-width // 64) * 64
        return value_of(fixed(raw, rows, cols, BITS[layout], width), precision)
    if layout == "base-3":
        return base3(raw, rows, cols)
    if layout == "hf-bitnet":
        return hf_bitnet(raw, rows, cols)
    body = {"run-length": run_length, "sparse": sparse, "hybrid": hybrid, "entropy": lambda r, n: entropy(r, n, precision)}[layout]
    return framed(raw, rows, cols, body)


def granules(parameters, spec, plane):
    """A parameter for each weight of a plane, [rows, cols], section 2."""
    n, k, granularity = spec["rows"], spec["cols"], spec["granularity"]
    parameters = parameters.reshape(spec["planes"], -1)[plane]
    if granularity == "tensor":
        return np.full((n, k), parameters[0])
    if granularity == "channel":
        return np.repeat(parameters[:, None], k, axis=1)
    g = int(granularity.removeprefix("group:"))
    return np.repeat(parameters.reshape(n, -1), g, axis=1)[:, :k]


def decode(entry, tensors):
    """(values or None where the scale is inside, floats of the model's shape) of one tensor of the document."""
    spec, layout = entry["spec"], entry["layout"]
    n, k, planes = spec["rows"], spec["cols"], spec["planes"]
    raw = tensors[entry["packed"]][2]
    if "scale" not in entry:
        if layout in GGML:
            kind = gguf.GGMLQuantizationType[GGML[layout]]
            out = np.ascontiguousarray(gguf.quants.dequantize(np.frombuffer(raw, np.uint8).reshape(n, -1), kind), np.float32)
        elif layout.startswith("i2_s"):
            out = decode_i2_s(raw, (n, k), layout)
        else:
            out = {"q2_0": decode_q2_0, "q1_0": decode_q1_0}[layout](raw, (n, k))
        return None, out.reshape(entry["shape"])
    dtype, _, scale = tensors[entry["scale"]]
    scales = floats(dtype, scale)
    if entry.get("reciprocal"):
        scales = np.float32(1) / scales
    else:
        assert dtype.lower() == spec["scale_dtype"]
    zeros = np.zeros(scales.size, np.float32)
    if spec["zero_points"] != "none":
        dtype, _, stored = tensors[entry["zero_point"]]
        assert dtype == {"i8": "I8", "f32": "F32"}[spec["zero_points"]]
        zeros = np.frombuffer(stored, {"I8": "i1", "F32": "<f4"}[dtype]).astype(np.float32)
    else:
        assert "zero_point" not in entry
    values = unpack(layout, spec["precision"], raw, planes * n, k).reshape(planes, n, k)
    low, high = ALPHABET[spec["precision"]]
    assert low <= values.min() and values.max() <= high
    out = np.zeros((n, k), np.float32)
    for p in range(planes):
        out = out + granules(scales, spec, p) * (values[p].astype(np.float32) - granules(zeros, spec, p))
    if entry.get("transposed"):
        *batch, inputs, outputs = entry["shape"]
        assert inputs == k and outputs * int(np.prod(batch)) == n
        return values, np.ascontiguousarray(np.swapaxes(out.reshape(*batch, outputs, inputs), -1, -2))
    return values, out.reshape(entry["shape"])
