"""Models that the program runs, against llama.cpp on the same file: greedy tokens, and perplexity on the same text and windows.

llama.cpp rounds the input of a Q4_1 or Q8_0 matrix to 8-bit blocks, and `bitnet` multiplies floats, so it is given the same weights in F16 and F32, where
both multiply floats. A first token that differs is explained by the gap of its two best logits.
"""

import llama_cpp
import numpy as np
import pytest
from conftest import MODELS, ROOT, figure, run, run_json

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three states of matter are",
    "My favourite food is",
    "In 1969 the first",
    "To make bread you need flour,",
    "The quick brown fox",
    "Q: What is 2 + 2?\nA:",
]
STEPS = 64


@pytest.fixture(scope="module")
def smollm2_floats(tmp_path_factory):
    """SmolLM2 as a GGUF of floats: what both programs compute with is then the same."""
    source = MODELS / "SmolLM2-135M-Instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = tmp_path_factory.mktemp("smollm2")
    run("dequantize", source, "--out", folder / "model", "--quiet")
    out = folder / "model.gguf"
    run("quantize", folder / "model", "--out", out, "--precision", "f32", "--rule", "*embed*=f32", "--quiet")
    return out


def open_gguf(path, context):
    return llama_cpp.Llama(str(path), n_ctx=context, logits_all=True, verbose=False, n_threads=2, flash_attn=False, type_k=0, type_v=0)


def logits_of(model, ids):
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float64)


def test_greedy_tokens(smollm2_floats):
    """64 greedy tokens for each of ten prompts."""
    model = open_gguf(smollm2_floats, 128)
    equal, worst = 0, 0.0
    for prompt in PROMPTS:
        ours = run_json("run", smollm2_floats, "--prompt", prompt, "--max-tokens", STEPS, "--ignore-eos", "--cache", "f32")
        ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
        assert ours["prompt_tokens"] == ids, prompt
        # One pass over what we made: llama.cpp's choice after every prefix of it.
        scores = logits_of(model, ids + ours["tokens"][:-1])[len(ids) - 1 :]
        for token, logits in zip(ours["tokens"], scores, strict=True):
            best = int(logits.argmax())
            if best == token:
                equal += 1
            else:
                gap = float(logits[best] - logits[token])
                worst = max(worst, gap)
                assert gap < 0.02, (prompt, token, best, gap)
    figure(f"SmolLM2 in f32, {len(PROMPTS)} prompts: {equal} of {len(PROMPTS) * STEPS} greedy tokens are llama.cpp's, largest logit gap of the rest {worst:.1e}")
    assert equal >= 0.99 * len(PROMPTS) * STEPS


def test_perplexity(smollm2_floats, tmp_path):
    """The same tokens in the same windows: within 0.5 %."""
    text = (ROOT / "README.md").read_text() + (ROOT / "ARCHITECTURE.md").read_text()
    path = tmp_path / "text.txt"
    path.write_text(text)
    context, count = 128, 1024
    ours = run_json("perplexity", smollm2_floats, "--text", path, "--context", context, "--stride", context // 2, "--tokens", count, "--quiet")
    model = open_gguf(smollm2_floats, context)
    ids = model.tokenize(text.encode(), add_bos=False, special=True)[:count]
    losses, scored = [], 1
    for start in range(0, count, context // 2):
        window = ids[start : start + context]
        logits = logits_of(model, window)
        log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
        for i in range(max(scored, start + 1), start + len(window)):
            losses.append(-log_p[i - 1 - start, ids[i]])
        scored = max(scored, start + len(window))
    theirs = float(np.exp(np.mean(losses)))
    got = ours["model"]["perplexity"]
    assert ours["model"]["loss"]["count"] == len(losses) == count - 1
    figure(f"SmolLM2 in f32: perplexity {got:.4f}, llama.cpp {theirs:.4f} over {len(losses)} tokens")
    assert abs(got / theirs - 1) < 0.005
    error = np.std(losses, ddof=1) / np.sqrt(len(losses))
    assert abs(ours["model"]["loss"]["error"] / error - 1) < 0.02


def test_blocks_are_their_floats(smollm2_floats):
    """Weights that stay in the blocks of the file (Q4_1, Q8_0) give the losses of the same weights in f32 to the last bit."""
    source = MODELS / "SmolLM2-135M-Instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    arguments = ["--text", ROOT / "README.md", "--context", 128, "--stride", 128, "--tokens", 256, "--quiet"]
    blocks, floats = (run_json("perplexity", path, *arguments)["model"]["loss"] for path in (source, smollm2_floats))
    assert blocks == floats
    held = {path: run_json("bench", path, "--prompt", 1, "--tokens", 1, "--repeat", 1)["weight_bytes"] for path in (source, smollm2_floats)}
    figure(f"SmolLM2 Q4_1: {held[source] / 1e6:.1f} MB of weights in memory, of a file of {source.stat().st_size / 1e6:.1f} MB; in f32 {held[smollm2_floats] / 1e6:.1f} MB")
    assert held[source] <= 1.02 * source.stat().st_size


@pytest.mark.parametrize("precision", ["original", "tq2_0"])
def test_quantized_files(precision, tmp_path):
    """Files whose inputs llama.cpp rounds and we do not: likely tokens are the same within that rounding."""
    source = MODELS / "SmolLM2-135M-Instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = source
    if precision == "tq2_0":
        # Ternary by plain rounding says nothing, but both programs must say the same nothing. Rows of 576 become Q2_0.
        path = tmp_path / "ternary.gguf"
        run("quantize", source, "--out", path, "--quiet")
    text = ROOT / "README.md"
    ours = run_json("perplexity", path, "--text", text, "--context", 128, "--stride", 128, "--tokens", 128, "--quiet")
    model = open_gguf(path, 128)
    ids = model.tokenize(text.read_bytes(), add_bos=False, special=True)[:128]
    logits = logits_of(model, ids)
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    theirs = float(np.mean([-log_p[i - 1, ids[i]] for i in range(1, 128)]))
    got = ours["model"]["loss"]["mean"]
    figure(f"SmolLM2 {precision}: loss {got:.4f} nats, llama.cpp (rounded inputs) {theirs:.4f}")
    assert abs(got - theirs) < 0.02 * theirs


def test_chat_template_is_transformers(tmp_path):
    """The conversation that `chat` renders is the one that transformers renders."""
    from transformers import AutoTokenizer

    source = MODELS / "SmolLM2-135M-Instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = tmp_path / "model"
    run("dequantize", source, "--out", folder, "--quiet")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in ["What is the capital of France?", "Say \"ja\" — ünïcödé 中文 🎉\n\n  two"]:
        ours = run_json("run", source, "--chat", "--prompt", prompt, "--max-tokens", 1)
        expected = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours["prompt_tokens"] == list(expected)


def test_streamed_text_is_the_decoded_text():
    """Pieces that come token by token put together are what the tokens decode to, also where characters span tokens."""
    source = MODELS / "SmolLM2-135M-Instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ours = run_json("run", source, "--prompt", "🎉🚀 中文 русский", "--max-tokens", 80, "--temperature", 1.5, "--seed", 3, "--ignore-eos")
    model = open_gguf(source, 32)
    bytes_ = model.detokenize(ours["prompt_tokens"] + ours["tokens"])
    before = model.detokenize(ours["prompt_tokens"])
    assert len(ours["tokens"]) == 80
    assert ours["text"] == bytes_[len(before):].decode("utf-8", errors="replace")
