"""Runs the program, builds small models, and reads what the program wrote without any of its code.

`scripts/python-truth` runs these tests. BITNET_BIN names the binary, BITNET_MODELS the folder that scripts/fetch-models fills.
Nothing here skips: what is missing is a failure. MLX alone may be absent.
"""

import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

# transformers decorates its bitnet layers with torch.compile; the functions as they are written need no C++ compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("BITNET_BIN", ROOT / "target/release/bitnet"))
MODELS = Path(os.environ.get("BITNET_MODELS", Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitnet-quant/models"))

# What the tests measured, printed at the end of the run.
FIGURES = []


def figure(text):
    FIGURES.append(text)


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)


def run(*args, status=0):
    """The program's stdout; it must end with this exit status."""
    done = subprocess.run([BIN, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == status, f"bitnet {' '.join(map(str, args))}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout if status == 0 else done.stderr


def run_json(*args, status=0):
    return json.loads(run("--json", *args, status=status))


def dequantize(path):
    """Every float tensor of a file or folder as `bitnet dequantize` gives it, f32. Names are those of the input."""
    path = Path(path)
    out = path.with_name(path.name + ".dequantized.safetensors")
    run("dequantize", path, "--out", out, "--force", "--quiet")
    tensors = load_file(out)
    out.unlink()
    return tensors


def same(a, b):
    """Equal shapes, types and bits (so −0 is not 0)."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def tensors_of(path):
    """Every tensor of a safetensors file or folder as numpy holds it; bf16 widened to f32."""
    import torch

    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [path]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                tensor = f.get_tensor(name)
                found[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def document_of(path):
    """The document of formats.md 6.1 in a safetensors file."""
    with safe_open(path, framework="numpy") as f:
        return json.loads(f.metadata()["bitnet.document"])


def config(hidden, ffn, layers, vocab, heads, kv_heads, tie=False, dtype="float32"):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
        "vocab_size": vocab, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tie,
        "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False, "torch_dtype": dtype,
    }


def make_llama(folder, hidden=256, ffn=512, layers=2, vocab=512, heads=4, kv_heads=2, tie=False, seed=0, dtype=np.float32):
    """A random llama folder: normal weights, a few heavy columns, norms around 1."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    head = hidden // heads

    def matrix(rows, cols):
        w = rng.standard_normal((rows, cols)) * 0.05 * np.exp(0.3 * rng.standard_normal((rows, 1)))
        w[:, rng.integers(0, cols, 3)] *= 3
        return w.astype(dtype)

    def norm():
        return (1 + 0.1 * rng.standard_normal(hidden)).astype(dtype)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden) * dtype(10), "model.norm.weight": norm()}
    if not tie:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors |= {
            at + "input_layernorm.weight": norm(),
            at + "post_attention_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": matrix(hidden, hidden),
            at + "self_attn.k_proj.weight": matrix(kv_heads * head, hidden),
            at + "self_attn.v_proj.weight": matrix(kv_heads * head, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, hidden),
            at + "mlp.gate_proj.weight": matrix(ffn, hidden),
            at + "mlp.up_proj.weight": matrix(ffn, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, ffn),
        }
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    name = {np.float32: "float32", np.float16: "float16"}[dtype]
    (folder / "config.json").write_text(json.dumps(config(hidden, ffn, layers, vocab, heads, kv_heads, tie, name), indent=1))
    return folder


# The values of formats.md 7.
def golden(n):
    x, out = 1, []
    for _ in range(n):
        x = (x * 1664525 + 1013904223) % 2**32
        out.append((x >> 24) % 3 - 1)
    return np.array(out, np.int8)


GOLDEN = {
    "tq1_0": "35a01c4841984ca19268615183a01bfc73da1a7f6ae951193999db596f507a194e818759b000bd09e27e080c037504ff407c3017003c",
    "tq2_0": "6499a05888192899499111689599a06a0596a055214a686008192641a1688560a295a6068900988268964291810501aa09560410914261222445a0808014116a003c",
    "q2_0": "003c044415854909641189aa828945281a18",
    "q1_0": "3039a2b73b5efbb96b67effedeb69ffbeef8",
    "i2_s": "19660a25226428666146442956660aa950960a5548a12909206498414a2952098a569a906200268229968146425040aa609510044681498818510a02021444a9"
            "0000803f" + 28 * "00",
    "i2_s-g64": "15690019186a0a484a526118544a1188845aaa552841a169045860856a698aa592658584582018a009958040404550aa885988101a016928a449264a0a1010a9"
                "0000803f" + 28 * "00",
    "i2_s-x4": "2a552a180450215842595825545424aa449920516588262a0254a2406021452a52a62694aa808aa29926019262a4209a48652450029191108485421222946019"
               "0000803f" + 28 * "00",
    "hf-bitnet": "a855a8241005482581652558151518aa11660845592298a880158a01094851a8859a9816aa02a28a66984086891a08a6215918058046460412528184881"
                 "60964",
}
GGML_ID = {"tq1_0": 34, "tq2_0": 35, "i2_s": 36, "i2_s-g64": 36, "i2_s-x4": 36, "q1_0": 41, "q2_0": 42}


def write_gguf(path, tensors, keys=(("general.architecture", "llama"),)):
    """A GGUF by hand: {name: (ggml type id, shape outermost first, bytes)}."""

    def string(s):
        return struct.pack("<Q", len(s.encode())) + s.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys:
        header += string(key) + struct.pack("<I", 8) + string(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        header += string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", d) for d in reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)


def read_gguf(path):
    """({key: value}, {name: (ggml type id, shape outermost first, the rest of the file from the tensor on)}), by formats.md 6.3 alone."""
    raw, at = Path(path).read_bytes(), 0
    plain = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, raw, at)
        at += struct.calcsize("<" + code)
        return value

    def string():
        nonlocal at
        n = take("Q")
        at += n
        return raw[at - n:at].decode()

    def value(kind):
        if kind == 8:
            return string()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take(plain[kind])

    assert raw[:4] == b"GGUF"
    at = 4
    assert take("I") == 3
    count, keys = take("Q"), take("Q")
    metadata = {}
    for _ in range(keys):
        name = string()
        metadata[name] = value(take("I"))
    infos = []
    for _ in range(count):
        name = string()
        shape = [take("Q") for _ in range(take("I"))][::-1]
        infos.append((name, shape, take("I"), take("Q")))
    align = metadata.get("general.alignment", 32)
    start = at + -at % align
    assert all(offset % align == 0 for *_, offset in infos)
    return metadata, {name: (kind, tuple(shape), memoryview(raw)[start + offset:]) for name, shape, kind, offset in infos}


def f16_at(block, at):
    return np.ascontiguousarray(block[:, at:at + 2]).view("<f2").astype(np.float32)


def decode_q2_0(raw, shape):
    """formats.md 4.2, in numpy: gguf 0.19 has no Q2_0."""
    blocks = np.frombuffer(raw[: int(np.prod(shape)) // 64 * 18], np.uint8).reshape(-1, 18)
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return (f16_at(blocks, 0) * (codes.reshape(-1, 64).astype(np.float32) - 1)).reshape(shape)


def decode_q1_0(raw, shape):
    """formats.md 4.2, in numpy: gguf 0.19 knows Q1_0 by name and cannot decode it."""
    blocks = np.frombuffer(raw[: int(np.prod(shape)) // 128 * 18], np.uint8).reshape(-1, 18)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return (f16_at(blocks, 0) * (bits.astype(np.float32) * 2 - 1)).reshape(shape)


def decode_i2_s(raw, shape, order="i2_s"):
    """formats.md 4.3."""
    n = int(np.prod(shape))
    scale = np.frombuffer(raw, "<f4", 1, n // 4)[0]
    assert bytes(raw[n // 4 + 4:n // 4 + 32]) == bytes(28)
    fields = (np.frombuffer(raw, np.uint8, n // 4)[:, None] >> np.array([6, 4, 2, 0], np.uint8)) & 3
    if order == "i2_s-x4":
        values = fields.reshape(shape[0] // 4, shape[1], 4).swapaxes(1, 2)
    else:
        values = fields.reshape(-1, 32 if order == "i2_s" else 16, 4).swapaxes(1, 2)
    assert values.max() < 3
    return (values.reshape(shape).astype(np.float32) - 1) * scale


def model_path(*parts):
    path = MODELS.joinpath(*parts)
    assert path.exists(), f"{path} is missing: run scripts/fetch-models and set BITNET_MODELS to the folder that it prints"
    return path


@pytest.fixture(scope="session")
def glassllm():
    return ROOT / "assets/glassllm-en"


@pytest.fixture(scope="session")
def minilm():
    return model_path("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def smollm2():
    return model_path("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def llama256(tmp_path_factory):
    """Hidden 256, ffn 512: every block of ggml divides every row."""
    return make_llama(tmp_path_factory.mktemp("models") / "llama256")


@pytest.fixture(scope="session")
def llama576(tmp_path_factory):
    """Hidden 576, ffn 320: multiples of 64, and of nothing larger that ggml has."""
    return make_llama(tmp_path_factory.mktemp("models") / "llama576", hidden=576, ffn=320, layers=1, vocab=256, heads=9, kv_heads=3, seed=1)
