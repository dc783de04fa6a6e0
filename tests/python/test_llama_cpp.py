"""GGUF files that we wrote, evaluated by llama.cpp (llama-cpp-python) and by transformers on the weights that `bitnet dequantize` gives.

llama.cpp multiplies low-bit weights with activations that it rounds: to f16 for F16 weights, to 8 bits in blocks of 256 for TQ1_0 and
TQ2_0 (its Q8_K), in blocks of 32 for the others (Q8_0). The linear layers of the reference round alike, so the logits agree closely.
Bounds are on max |difference| / max |logit|. What is left comes from roundings that fall to the other side of a tie
and are carried through the layers. SmolLM2 has activations so uneven that this alone makes a few percent, in a file
of other people just as in ours: that file is the control.
"""

import llama_cpp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, figure, make_llama, read_gguf, run
from transformers import AutoModelForCausalLM

F16, BOUND, SMOLLM2 = 1e-3, 0.02, 0.1
TOKENS = {"llama": 512, "glassllm": 1024, "smollm2": 49152}


def open_gguf(path):
    return llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=2, flash_attn=False, type_k=0, type_v=0)


def gguf_logits(model, ids):
    model.reset()
    model.eval(ids)
    return np.array(model.scores[:len(ids)])


def hf_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def greedy(logits, ids, steps):
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids


def q8_0(x):
    """Blocks of 32, scale max|x| / 127 stored in f16."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    d = blocks.abs().amax(-1, keepdim=True) / 127
    q = torch.where(d > 0, blocks / d, 0.0).round()
    return (q * d.half().float()).reshape(x.shape)


def q8_k(x):
    """Blocks of 256, scale by the value of largest magnitude, which becomes -127."""
    blocks = x.reshape(*x.shape[:-1], -1, 256)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest != 0, -127 / largest, 0.0)
    q = (blocks * inverse).round().clamp(max=127)
    return torch.where(inverse != 0, q / inverse, 0.0).reshape(x.shape)


# How llama.cpp rounds the input of a matrix of each ggml type.
INPUT = {0: lambda x: x, 1: lambda x: x.half().float(), 34: q8_k, 35: q8_k}


class Rounded(torch.nn.Module):
    def __init__(self, weight, kind):
        super().__init__()
        self.weight, self.round = weight, INPUT.get(kind, q8_0)

    def forward(self, x):
        return F.linear(self.round(x), self.weight)


GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
              "up_proj": "ffn_up", "down_proj": "ffn_down"}


def reference_model(path, folder):
    """The floats in transformers, with linear layers that round their input as llama.cpp does for the file's types."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    types = {name: kind for name, (kind, *_) in read_gguf(path)[1].items()}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            if name == "lm_head":
                kind = types.get("output.weight", types["token_embd.weight"])
            else:
                kind = types[f"blk.{name.split('.')[2]}.{GGUF_NAMES[name.split('.')[-1]]}.weight"]
            model.set_submodule(name, Rounded(layer.weight, kind))
    return model


def compare(path, folder, vocab, prompts=3, length=24):
    """Largest relative difference of a logit; share of positions with the same greedy token; the two models."""
    hf = reference_model(path, folder)
    gguf = open_gguf(path)
    assert gguf.n_vocab() == vocab == hf.config.vocab_size
    rng = np.random.default_rng(0)
    worst, same, count = 0.0, 0, 0
    for _ in range(prompts):
        ids = rng.integers(3, vocab, length).tolist()
        a, b = gguf_logits(gguf, ids), hf_logits(hf, ids)
        assert np.isfinite(a).all() and np.abs(b).max() > 0.1
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
        same += int((a.argmax(1) == b.argmax(1)).sum())
        count += length
    return worst, same / count, gguf, hf


def dequantized_folder(path, tmp_path):
    folder = tmp_path / (path.stem + "-floats")
    run("dequantize", path, "--out", folder)
    return folder


def kinds(path):
    return {kind for kind, shape, _ in read_gguf(path)[1].values() if len(shape) == 2}


# name → (arguments, ggml type of the matrices)
TYPES = {
    "f16": ("--precision f16", 1),
    "tq1_0": ("--layout tq1_0", 34),
    "tq2_0": ("--layout tq2_0", 35),
    "q2_0": ("--layout q2_0", 42),
    "q8_0": ("--precision int8", 8),
    "q4_0": ("--precision int4", 2),
    "q1_0": ("--precision binary", 41),
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_small_llama(kind, tie, tmp_path):
    """Grouped-query attention, tied and untied head, each type that llama.cpp evaluates."""
    args, number = TYPES[kind]
    model = make_llama(tmp_path / "model", tie=tie, seed=5)
    out = tmp_path / "out.gguf"
    run("quantize", model, "--out", out, *args.split())
    assert number in kinds(out)
    worst, same, gguf, hf = compare(out, dequantized_folder(out, tmp_path), TOKENS["llama"])
    assert worst < (F16 if kind == "f16" else BOUND), worst
    figure(f"llama.cpp, small llama {'tied' if tie else 'untied'}, {kind}: logits within {worst:.2e} of the largest, greedy tokens equal at {same:.0%}")
    if kind == "f16":
        ids = [7, 8, 9, 10]
        assert greedy(lambda i: gguf_logits(gguf, i), ids, 16) == greedy(lambda i: hf_logits(hf, i), ids, 16)


def test_the_bound_can_fail(tmp_path):
    """What the bound must catch goes far beyond it: scales off by a tenth, rows of q and k in another order."""
    model = make_llama(tmp_path / "model", seed=5)
    out = tmp_path / "out.gguf"
    run("quantize", model, "--out", out, "--layout", "tq2_0")
    from safetensors.numpy import load_file, save_file

    folder = dequantized_folder(out, tmp_path)
    weights = load_file(folder / "model.safetensors")
    for change in (lambda n, w: w * np.float32(1.1) if "down_proj" in n else w, lambda n, w: w[::-1].copy() if "q_proj" in n else w):
        save_file({n: change(n, w) for n, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        worst, *_ = compare(out, folder, TOKENS["llama"], prompts=1)
        assert worst > 2 * BOUND, worst


@pytest.mark.parametrize("precision", ["f16", "ternary", "int8"])
def test_glassllm(precision, glassllm, tmp_path):
    """The committed model: its 341-wide down projections fall back to F16."""
    out = tmp_path / "out.gguf"
    run("quantize", glassllm, "--out", out, "--precision", precision)
    down = [kind for name, (kind, *_) in read_gguf(out)[1].items() if "ffn_down" in name]
    assert down == [1] * 4 and {"f16": 1, "ternary": 42, "int8": 8}[precision] in kinds(out)
    worst, same, gguf, hf = compare(out, dequantized_folder(out, tmp_path), TOKENS["glassllm"])
    assert worst < (F16 if precision == "f16" else BOUND), worst
    figure(f"llama.cpp, glassllm {precision}: logits within {worst:.2e} of the largest, greedy tokens equal at {same:.0%}")
    if precision == "f16":
        ids = gguf.tokenize(b"Alice was beginning to get very tired", add_bos=True)
        assert greedy(lambda i: gguf_logits(gguf, i), ids, 24) == greedy(lambda i: hf_logits(hf, i), ids, 24)


@pytest.mark.parametrize("precision", ["original", "f16", "int8", "ternary"])
def test_smollm2(precision, smollm2, tmp_path):
    """The real model as it came (Q4_1, the control) and requantized: F16; Q8_0; TQ2_0 (rows of 1536) with Q2_0 (rows of 576)."""
    out = tmp_path / "out.gguf"
    if precision == "original":
        out.symlink_to(smollm2)
    else:
        run("quantize", smollm2, "--out", out, "--precision", precision)
    # The embedding, which is the head too, is Q8_0 in all of them.
    assert kinds(out) == {"original": {3, 8}, "f16": {1, 8}, "int8": {8}, "ternary": {8, 35, 42}}[precision]
    worst, same, gguf, hf = compare(out, dequantized_folder(out, tmp_path), TOKENS["smollm2"], prompts=1)
    assert worst < (BOUND if precision == "f16" else SMOLLM2), worst
    figure(f"llama.cpp, SmolLM2 {precision}: logits within {worst:.2e} of the largest, greedy tokens equal at {same:.0%}")
    if precision == "f16":
        ids = gguf.tokenize(b"The capital of France is", add_bos=False)
        tokens = greedy(lambda i: gguf_logits(gguf, i), ids, 6)
        assert tokens == greedy(lambda i: hf_logits(hf, i), ids, 6)
        assert b"Paris" in gguf.detokenize(tokens)


def test_i2_s_is_for_bitnet_cpp_alone(llama256, tmp_path):
    """llama.cpp has no type 36: it refuses the file, as docs/formats.md leads one to expect, and does not crash."""
    out = tmp_path / "out.gguf"
    run("quantize", llama256, "--out", out, "--layout", "i2_s", "--granularity", "tensor", "--scale-dtype", "f32")
    assert 36 in kinds(out)
    with pytest.raises(ValueError):
        open_gguf(out)


@pytest.mark.parametrize("tied", [True, False])
def test_bonsai(tied, tmp_path):
    """A qwen3 that was trained with every matrix ternary, as `--preset bonsai` packs it: Q2_0, embedding and head too."""
    text, config = tmp_path / "text.txt", tmp_path / "shape.toml"
    text.write_text(" ".join(f"{i} and {i + 1} make {2 * i + 1}." for i in range(1500)))
    config.write_text(f"[model.shape]\ntied = {str(tied).lower()}\n")
    shape = ["--architecture", "qwen3", "--hidden", 128, "--ffn", 256, "--layers", 2, "--heads", 2, "--kv-heads", 1, "--head-dim", 96, "--context", 128]
    flags = ["--config", config, "--tokenizer", ROOT / "assets/glassllm-en/tokenizer.json", "--batch", 2, "--steps", 20, "--no-twin", "--quiet"]
    run("train", "lm", "--text", text, "--out", tmp_path / "run", "--preset", "bonsai", "--format", "gguf", *shape, *flags)
    out = tmp_path / "run/packed.gguf"
    assert kinds(out) == {42}
    worst, same, *_ = compare(out, dequantized_folder(out, tmp_path), TOKENS["glassllm"])
    assert worst < BOUND, worst
    figure(f"llama.cpp, bonsai {'tied' if tied else 'untied'}: logits within {worst:.2e} of the largest, greedy tokens equal at {same:.0%}")


def test_types_that_llama_cpp_knows():
    """0.3.36 has Q1_0 and Q2_0, by the ids that we write."""
    assert (llama_cpp.GGML_TYPE_Q1_0, llama_cpp.GGML_TYPE_Q2_0) == (41, 42)
