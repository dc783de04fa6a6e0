"""ONNX folders that we wrote: onnx's checker takes them, and onnxruntime's logits are those of transformers on the same weights as floats.

The reference is `bitnet dequantize` of the same folder in transformers, f32. Each model is run as a program would: a prefill, then one token at a time
with the keys and values that came out. A wrong order of codes, zero point or scale gives other weights, and is seen here (`test_mistakes_are_seen`).
"""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import BIN, config, dequantize, document_of, figure, make_llama, run
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

onnx = pytest.importorskip("onnx", reason="onnx is not installed: scripts/python-truth --install")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: scripts/python-truth --install")

# Largest difference of a logit over the largest logit: sums in another order in f32.
BOUND = 2e-5
PREFILL, STEPS = 11, 6

# What `bitnet quantize` gets; None for a model that stays as it is.
CASES = {
    "float": None,
    "ternary": [],
    "ternary-g64": ["--granularity", "group:64"],
    "ternary-tensor": ["--granularity", "tensor"],
    "binary": ["--precision", "binary"],
    "int2-asymmetric": ["--precision", "int2", "--mapping", "asymmetric", "--granularity", "group:32"],
    "int3": ["--precision", "int3", "--granularity", "group:64"],
    "int4": ["--precision", "int4", "--granularity", "group:128"],
    "int4-asymmetric": ["--precision", "int4", "--mapping", "asymmetric", "--granularity", "group:32"],
    "int8": ["--precision", "int8"],
    "int8-asymmetric": ["--precision", "int8", "--mapping", "asymmetric", "--granularity", "group:48"],
    "embedding-ternary": ["--granularity", "group:64", "--rule", "*embed*=ternary", "--rule", "lm_head*=ternary"],
    "embedding-int4": ["--rule", "*embed*=int4", "--rule", "lm_head*=int8"],
}


def export(folder, out, *flags):
    run("convert", folder, "--format", "onnx", "--out", out, "--quiet", *flags)
    return out


def session(folder):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def cache_of(model, batch):
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in model.get_inputs() if i.name.startswith("past_key_values")}


def ort_logits(folder, ids, prefill=PREFILL):
    """Logits of every position: the prompt at once, then token by token."""
    model = session(folder)
    names = [o.name for o in model.get_outputs()]
    past, logits, seen = cache_of(model, len(ids)), [], 0
    for end in [prefill, *range(prefill + 1, ids.shape[1] + 1)]:
        feeds = {"input_ids": ids[:, seen:end], "attention_mask": np.ones((len(ids), end), np.int64)} | past
        got = dict(zip(names, model.run(None, feeds), strict=True))
        past = {n.replace("present", "past_key_values"): v for n, v in got.items() if n.startswith("present")}
        logits.append(got["logits"])
        seen = end
    return np.concatenate(logits, 1)


def torch_logits(folder, tmp_path, ids):
    floats = tmp_path / "floats"
    run("dequantize", folder, "--out", floats, "--force", "--quiet")
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def ids_of(vocab, batch=2, seed=3):
    return np.random.default_rng(seed).integers(0, vocab, (batch, PREFILL + STEPS), dtype=np.int64)


def relative(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def check(folder, out, tmp_path, vocab, name):
    onnx.checker.check_model(str(out / "model.onnx"))
    ids = ids_of(vocab)
    error = relative(ort_logits(out, ids), torch_logits(folder, tmp_path, ids))
    figure(f"ONNX {name}: logits of {PREFILL} + {STEPS} tokens within {error:.1e} of the largest one")
    assert error < BOUND, (name, error)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Hidden 192, ffn 320: blocks of 64 and of 32 divide the rows, larger ones do not."""
    return make_llama(tmp_path_factory.mktemp("onnx") / "llama", hidden=192, ffn=320, vocab=300, heads=6, kv_heads=2)


def quantized(llama, tmp_path, flags):
    if flags is None:
        return llama
    run("quantize", llama, "--out", tmp_path / "quantized", "--quiet", *flags)
    return tmp_path / "quantized"


@pytest.mark.parametrize("name", CASES)
def test_logits(llama, name, tmp_path):
    folder = quantized(llama, tmp_path, CASES[name])
    out = export(folder, tmp_path / "onnx")
    check(folder, out, tmp_path, 300, name)


@pytest.mark.parametrize("name", ["float", "float16", "ternary", "int4-asymmetric"])
def test_tied(name, tmp_path):
    """One matrix is embedding and head: the file holds its bytes once."""
    dtype = np.float16 if name == "float16" else np.float32
    folder = make_llama(tmp_path / "llama", hidden=128, ffn=256, vocab=300, tie=True, dtype=dtype)
    if name.startswith("float"):
        flags = None
    else:
        flags = [*CASES[name], "--rule", f"*embed*={name.split('-')[0]}"]
    folder = quantized(folder, tmp_path, flags)
    out = export(folder, tmp_path / "onnx")
    check(folder, out, tmp_path, 300, f"tied {name}")
    stored = load_file(out / "model.onnx.data")
    assert sum("embed_tokens" in n for n in stored) == {"float": 1, "float16": 1, "ternary": 2, "int4-asymmetric": 3}[name]
    assert not any("lm_head" in n for n in stored)


def test_odd_widths(tmp_path):
    """Rows of 80 and 100: blocks of 16, and the last one of a row is padded."""
    folder = make_llama(tmp_path / "llama", hidden=80, ffn=100, vocab=90, heads=5, kv_heads=1)
    for name, flags in (("ternary", []), ("groups", ["--precision", "int4", "--granularity", "group:48"])):
        run("quantize", folder, "--out", tmp_path / name, "--quiet", *flags)
        out = export(tmp_path / name, tmp_path / f"{name}-onnx")
        check(tmp_path / name, out, tmp_path, 90, f"odd widths, {name}")


def test_glassllm(glassllm, tmp_path):
    """A real model, with rows of 341."""
    run("quantize", glassllm, "--out", tmp_path / "ternary", "--threshold", "optimal", "--granularity", "group:64", "--quiet")
    for folder in (glassllm, tmp_path / "ternary"):
        out = export(folder, tmp_path / f"{folder.name}-onnx")
        check(folder, out, tmp_path, 1024, folder.name)


def test_from_gguf(llama, tmp_path):
    """Rows of q and k change places in a GGUF, and back."""
    run("convert", llama, "--out", tmp_path / "model.gguf", "--quiet")
    out = export(tmp_path / "model.gguf", tmp_path / "onnx")
    ids = ids_of(300)
    assert relative(ort_logits(out, ids), torch_logits(llama, tmp_path, ids)) < BOUND


def test_llama3_rope(tmp_path):
    folder = make_llama(tmp_path / "llama", hidden=128, ffn=256, vocab=300)
    path = folder / "config.json"
    value = json.loads(path.read_text())
    value["rope_theta"] = 500000.0
    value["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    path.write_text(json.dumps(value))
    check(folder, export(folder, tmp_path / "onnx"), tmp_path, 300, "llama3 rope")


def test_biases(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64, initializer_range=0.08, attention_bias=True, mlp_bias=True))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "llama")
    run("quantize", tmp_path / "llama", "--out", tmp_path / "ternary", "--quiet")
    check(tmp_path / "ternary", export(tmp_path / "ternary", tmp_path / "onnx"), tmp_path, 300, "biases")


def test_head_norms(tmp_path):
    """qwen3's norms of heads. Its tensors say that they are there; transformers computes them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(6)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=48, vocab_size=300)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, max_position_embeddings=64, initializer_range=0.08, tie_word_embeddings=False)).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(tmp_path / "qwen3")
    path = tmp_path / "qwen3" / "config.json"
    value = json.loads(path.read_text())
    done = subprocess.run([BIN, "inspect", str(tmp_path / "qwen3"), "--headers"], capture_output=True, text=True)
    assert done.returncode == 0
    probe = subprocess.run([BIN, "convert", str(tmp_path / "qwen3"), "--format", "onnx", "--out", str(tmp_path / "onnx")], capture_output=True, text=True)
    if probe.returncode != 0:
        # Until the architecture has a description: its graph is a llama's with two norms more.
        path.write_text(json.dumps(value | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
        export(tmp_path / "qwen3", tmp_path / "onnx")
    ids = ids_of(300)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    error = relative(ort_logits(tmp_path / "onnx", ids), expected)
    figure(f"ONNX head norms: within {error:.1e}")
    assert error < BOUND


def test_bitnet(tmp_path):
    """Norms before the output projections, and relu². The activations are floats, which is said."""
    from transformers import BitNetConfig, BitNetForCausalLM

    torch.manual_seed(7)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)
    model = BitNetForCausalLM(BitNetConfig(**shape, max_position_embeddings=64, initializer_range=0.08, rope_theta=10000.0, pad_token_id=0)).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(tmp_path / "bitnet")
    said = run("convert", tmp_path / "bitnet", "--format", "onnx", "--out", tmp_path / "onnx", "--quiet")
    assert "float activations" in said
    check(tmp_path / "bitnet", tmp_path / "onnx", tmp_path, 300, "bitnet")


def test_padded_batch(llama, tmp_path):
    """Prompts of different lengths in one batch, padded on the right: each has the logits that it has alone."""
    out = export(llama, tmp_path / "onnx")
    ids, model = ids_of(300), session(out)
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    both = model.run(["logits"], {"input_ids": ids, "attention_mask": mask} | cache_of(model, 2))[0]
    alone = model.run(["logits"], {"input_ids": ids[1:, :9], "attention_mask": mask[1:, :9]} | cache_of(model, 1))[0]
    assert relative(both[1, :9], alone[0]) < BOUND


def unpack(codes, bits):
    """Codes of uint8[N, blocks, bytes], the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((codes[..., None] >> shifts) & (2**bits - 1)).reshape(len(codes), -1)


@pytest.mark.parametrize("name", ["ternary-g64", "int4-asymmetric", "int8"])
def test_stored_bytes(llama, name, tmp_path):
    """The data file by the definition of MatMulNBits alone: (code − zero point) · scale are the weights."""
    folder = quantized(llama, tmp_path, CASES[name])
    out = export(folder, tmp_path / "onnx")
    stored, floats = load_file(out / "model.onnx.data"), dequantize(folder)
    graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
    layers = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(layers) == 14
    for node in layers:
        a = {x.name: x.i for x in node.attribute}
        codes, scales = stored[node.input[1]], stored[node.input[2]]
        assert codes.shape == (a["N"], -(-a["K"] // a["block_size"]), a["block_size"] * a["bits"] // 8)
        zero = np.float32(2 ** (a["bits"] - 1))
        if len(node.input) > 3:
            zero = unpack(stored[node.input[3]], a["bits"])[:, : codes.shape[1]].astype(np.float32).repeat(a["block_size"], 1)
        weights = (unpack(codes, a["bits"]).astype(np.float32) - zero) * scales.repeat(a["block_size"], 1)
        assert np.array_equal(weights[:, : a["K"]], floats[node.input[1].removesuffix("_codes")]), node.name
    offsets = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    raw = (out / "model.onnx.data").read_bytes()
    for tensor, at in offsets.items():
        region = raw[int(at["offset"]) :][: int(at["length"])]
        assert at["location"] == "model.onnx.data" and region == stored[tensor].tobytes()


def test_mistakes_are_seen(llama, tmp_path):
    """Codes in the wrong order within a byte, a zero point off by one, blocks of another size: the check above fails for each."""
    folder = quantized(llama, tmp_path, CASES["int4"])
    out = export(folder, tmp_path / "onnx")
    ids = ids_of(300)
    expected = torch_logits(folder, tmp_path, ids)
    path, data = out / "model.onnx", out / "model.onnx.data"
    graph, raw = path.read_bytes(), data.read_bytes()
    model = onnx.load(str(path), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    at = {e.key: int(e.value) for t in model.graph.initializer if t.name == node.input[1] for e in t.external_data if e.key != "location"}
    region = slice(at["offset"], at["offset"] + at["length"])
    codes = np.frombuffer(raw[region], np.uint8)
    for mistake in (codes >> 4 | codes << 4, codes ^ 0x11):
        data.write_bytes(raw[: region.start] + mistake.tobytes() + raw[region.stop :])
        assert relative(ort_logits(out, ids), expected) > 50 * BOUND
    data.write_bytes(raw)
    assert relative(ort_logits(out, ids), expected) < BOUND
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "rotary_interleaved":
                attribute.i = 1
    path.write_bytes(model.SerializeToString())
    assert relative(ort_logits(out, ids), expected) > 50 * BOUND
    path.write_bytes(graph)


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_same_bytes_and_replace(llama, tmp_path):
    folder = quantized(llama, tmp_path, CASES["ternary"])
    first = files_of(export(folder, tmp_path / "a", "--threads", "1"))
    assert {"model.onnx", "model.onnx.data", "config.json", "genai_config.json"} <= set(first)
    assert files_of(export(folder, tmp_path / "b", "--threads", "2")) == first
    assert "--force" in run("convert", folder, "--format", "onnx", "--out", tmp_path / "a", status=2)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    run("convert", llama, "--format", "onnx", "--out", tmp_path / "a", "--force", "--quiet")
    run("convert", folder, "--format", "onnx", "--out", tmp_path / "a", "--force", "--quiet")
    assert files_of(tmp_path / "a") == first | {"notes.txt": b"mine"}
    files = document_of(tmp_path / "a" / "model.onnx.data")["files"]
    assert {"model.onnx", "config.json", "genai_config.json"} <= set(files)


def test_killed(tmp_path):
    """kill -9 at any time, and the same command again: the same bytes, nothing beside them."""
    folder = make_llama(tmp_path / "llama", hidden=768, ffn=1536, vocab=4000, heads=12, kv_heads=4)
    expected = files_of(export(folder, tmp_path / "whole"))
    (tmp_path / "out").mkdir()
    for delay in (0.02, 0.05, 0.1, 0.2, 0.3):
        command = [BIN, "convert", str(folder), "--format", "onnx", "--out", str(tmp_path / "out" / "m"), "--force"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        export(folder, tmp_path / "out" / "m", "--force")
        assert files_of(tmp_path / "out" / "m") == expected
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["m"]


def test_refused(llama, tmp_path):
    """One line each: what it is, and what to do."""

    def refused(folder, *words, flags=("--format", "onnx"), command="convert", out="onnx"):
        said = run(command, folder, *flags, "--out", tmp_path / out, status=2).strip()
        assert len(said.splitlines()) == 1 and all(w in said for w in words), said
        assert not (tmp_path / out).exists()

    groups = quantized(llama, tmp_path, ["--granularity", "group:24"])
    refused(groups, "down_proj", "groups of 24", "dequantize")
    run("quantize", llama, "--out", tmp_path / "planes", "--planes", "2", "--quiet")
    refused(tmp_path / "planes", "_proj", "2 trit planes", "--planes 1")
    run("quantize", llama, "--out", tmp_path / "binary", "--precision", "binary", "--split", "mean", "--quiet")
    refused(tmp_path / "binary", "zero points are floats")
    refused(llama, "convert", command="quantize")
    refused(llama, "a folder", out="m.safetensors")
    refused(llama, "two-bit", flags=("--format", "onnx", "--layout", "two-bit"))
    extra = tmp_path / "extra"
    extra.mkdir()
    tensors = load_file(llama / "model.safetensors")
    (extra / "config.json").write_text((llama / "config.json").read_text())
    save_file(tensors | {"model.layers.0.mlp.router.weight": np.ones((4, 192), np.float32)}, extra / "model.safetensors")
    refused(extra, "router")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, extra / "model.safetensors")
    refused(extra, "layers.1.mlp.up_proj", "none")
    save_file(tensors, extra / "model.safetensors")
    (extra / "config.json").write_text(json.dumps(config(192, 321, 2, 300, 6, 2)))
    refused(extra, "[321, 192]", "[320, 192]")
    (extra / "config.json").write_text(json.dumps(config(192, 320, 2, 300, 8, 2)))
    refused(extra, "head_dim", "multiple of 16", "24")


def test_genai(llama, tmp_path):
    """onnxruntime-genai opens the folder and generates what transformers would."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    out = export(llama, tmp_path / "onnx")
    model = genai.Model(str(out))
    parameters = genai.GeneratorParams(model)
    ids = ids_of(300, batch=1)[:, :PREFILL]
    parameters.set_search_options(max_length=PREFILL + STEPS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids[0].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    got = generator.get_sequence(0)
    floats = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    expected = floats.generate(torch.from_numpy(ids), max_length=PREFILL + STEPS, do_sample=False)[0].numpy()
    assert list(got) == list(expected)
