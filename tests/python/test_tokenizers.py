"""Tokenizers in GGUF, both ways: the ids of `tokenizers` on the folder are those of llama.cpp on the GGUF that we write from it, and those
of `tokenizers` on the tokenizer.json that we write from the GGUF.

`bitnet run` reads a GGUF as the same tokenizer.json (crates/bitnet-inference/src/tokenizer.rs compares the two).
"""

import json
import os
import shutil

import llama_cpp
import numpy as np
import pytest
import tokenizer_cases as cases
from conftest import MODELS, figure, make_llama, read_gguf, run
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

ROWS = 1024

# Texts that llama.cpp cuts otherwise, as a note of the command says or docs/compatibility.md; our own reading is that of `tokenizers`.
NEXT_LINE = next(t for t in cases.LETTERS if "\u0085" in t)
INDIC = next(t for t in cases.TEXTS if "नमस्ते" in t)
KOREAN = next(t for t in cases.TEXTS if "한국어" in t)
MARKS = next(t for t in cases.LETTERS if "\u0301" in t)
SKIPPED = {
    # Marks do not belong to letters.
    "gpt4o": [INDIC, MARKS],
    "tekken": [INDIC, MARKS],
    # A space before a space, before ▁, and after each special token.
    "unigram-spaces": [" a", "  a  ", "   leading and trailing   ", " \n \n ", "<s>begin</s>end <tool> x<tool>y", "▁ already ▁▁ marked"],
    # Decomposed forms are one character long, all marks are stripped, and U+0085 is a space.
    "wordpiece": [KOREAN, INDIC, NEXT_LINE],
    "wordpiece-cased": [NEXT_LINE],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("weights") / "llama", hidden=64, ffn=64, layers=1, vocab=ROWS, heads=2, kv_heads=1)


def folder_of(weights, tmp_path, tokenizer, settings, rows=ROWS):
    folder = tmp_path / "folder"
    shutil.copytree(weights, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    if rows != ROWS:
        tensors = load_file(folder / "model.safetensors")
        tensors |= {n: np.zeros((rows, 64), np.float32) for n in ("model.embed_tokens.weight", "lm_head.weight")}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def there_and_back(folder, tmp_path):
    """The GGUF, what llama.cpp reads of it, and the tokenizer of the folder that we write from it."""
    out = tmp_path / "out.gguf"
    said = run("quantize", folder, "--out", out, "--precision", "f16")
    back = tmp_path / "back"
    run("dequantize", out, "--out", back)
    return out, llama_cpp.Llama(str(out), vocab_only=True, verbose=False), Tokenizer.from_file(str(back / "tokenizer.json")), said


def different(expected, got, texts):
    return [(text, a, b) for text in texts if (a := expected(text)) != (b := got(text))]


def hf(tokenizer):
    return lambda text: tokenizer.encode(text).ids


def llama(model):
    return lambda text: model.tokenize(text.encode(), add_bos=True, special=True)


@pytest.mark.parametrize("name", cases.CASES)
def test_small(name, weights, tmp_path):
    make, settings, model, pre = cases.CASES[name]
    tokenizer = make()
    out, gguf, back, _ = there_and_back(folder_of(weights, tmp_path, tokenizer, settings), tmp_path)
    metadata = read_gguf(out)[0]
    assert (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")) == (model, pre)
    # White space beside ▁ is dropped before there is a ▁ for it.
    texts = [t for t in cases.TEXTS + cases.LETTERS if not (name == "unigram" and "▁" in t)]
    # The tokenizer of a GGUF cuts at line feeds, so unknown text before and behind one stays apart.
    whole = [t for t in texts if not (name == "spm-no-bytes" and ("\n" in t or "\r" in t))]
    assert different(hf(tokenizer), hf(back), whole) == []
    skipped = SKIPPED.get(name, [])
    if name == "spm-no-bytes":
        # llama.cpp drops what the tokenizer does not know.
        skipped = [text for text in texts if "\n" in text or "\r" in text or 0 in tokenizer.encode(text).ids]
        assert len(skipped) < len(texts) / 2
    assert different(hf(tokenizer), llama(gguf), [t for t in texts if t not in skipped]) == []
    if name == "spm-no-bytes":
        return
    # What is skipped for llama.cpp does differ.
    assert len(different(hf(tokenizer), llama(gguf), skipped)) == len(skipped)


def test_real_wordpiece(weights, tmp_path):
    """The tokenizer of all-MiniLM-L6-v2."""
    tokenizer = Tokenizer.from_file(str(MODELS / "all-MiniLM-L6-v2/tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    folder = folder_of(weights, tmp_path, tokenizer, cases.BERT, tokenizer.get_vocab_size())
    _, gguf, back, _ = there_and_back(folder, tmp_path)
    texts = cases.TEXTS + cases.LETTERS + cases.LINES
    assert different(hf(tokenizer), hf(back), texts) == []
    # As SKIPPED["wordpiece"]: Korean, Indic marks, U+0085.
    skipped = [t for t in texts if any("\uac00" <= c <= "\ud7a3" or "\u0900" <= c <= "\u097f" or c == "\u0085" for c in t)]
    assert different(hf(tokenizer), llama(gguf), [t for t in texts if t not in skipped]) == []
    assert len(different(hf(tokenizer), llama(gguf), skipped)) == len(skipped)


def test_real_byte_level(tmp_path):
    """A GGUF of other people: SmolLM2."""
    path = MODELS / "SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    back = tmp_path / "back"
    run("dequantize", path, "--out", back)
    gguf = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = cases.TEXTS + cases.LETTERS + cases.LINES
    assert different(llama(gguf), hf(Tokenizer.from_file(str(back / "tokenizer.json"))), texts) == []
