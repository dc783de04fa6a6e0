"""Embeddings of all-MiniLM-L6-v2: against transformers with mean pooling and normalisation, against llama.cpp on the GGUF that the program writes, and the
rank correlation with human judgements of STS-B (dev), of the model and of the model in three bits.

BITNET_STSB names the file of sentence pairs: sentence, sentence, score. It is no part of the repository; without it that test is skipped.
"""

import csv
import os
import subprocess
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from conftest import BIN, MODELS, figure, run, run_json
from transformers import BertModel, PreTrainedTokenizerFast

MINILM = MODELS / "all-MiniLM-L6-v2"
STSB = Path(os.environ.get("BITNET_STSB", "/work/shared/data/stsb-en-dev.csv"))
TEXTS = [
    "a cat",
    "A kitten sleeps on the sofa, doesn't it?",
    "Die Straße ist naß; 你好 world",
    "x",
    "naïve café, 3.14 € & <b>markup</b> [MASK]",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "word " * 700,
]


@pytest.fixture(scope="module")
def truth():
    """Vectors by transformers, each text alone."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MINILM / "tokenizer.json"), pad_token="[PAD]")
    tokenizer._tokenizer.no_truncation()
    model = BertModel.from_pretrained(MINILM, add_pooling_layer=False).eval()

    def embed(texts):
        vectors = []
        for text in texts:
            ids = tokenizer([text], truncation=True, max_length=512, return_tensors="pt")
            with torch.no_grad():
                states = model(**ids).last_hidden_state[0].double()
            vectors.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
        return np.array(vectors)

    return embed


def ours(model, texts, *more):
    return np.array(run_json("embed", model, *texts, "--quiet", *more)["embeddings"])


def test_vectors(truth):
    worst = np.abs(ours(MINILM, TEXTS) - truth(TEXTS)).max()
    figure(f"MiniLM: vectors within {worst:.1e} of transformers")
    assert worst < 1e-6


def test_npy(tmp_path):
    """numpy reads what --format npy writes."""
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS) + "\n")
    done = subprocess.run([BIN, "embed", MINILM, "--file", lines, "--format", "npy"], capture_output=True, check=True)
    (tmp_path / "v.npy").write_bytes(done.stdout)
    array = np.load(tmp_path / "v.npy")
    assert array.dtype == np.float32 and np.array_equal(array, ours(MINILM, TEXTS).astype(np.float32))


def test_gguf(tmp_path, truth):
    """The GGUF, in our program and in llama.cpp, whose GELU is a table of 16-bit floats."""
    out = tmp_path / "minilm.gguf"
    run("convert", MINILM, "--out", out, "--quiet")
    assert np.abs(ours(out, TEXTS) - truth(TEXTS)).max() < 1e-6
    model = llama_cpp.Llama(str(out), embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN, n_ctx=512, verbose=False)
    worst = 0.0
    for text in TEXTS[:2] + TEXTS[3:4]:
        worst = max(worst, np.abs(np.array(model.embed(text, normalize=True)) - truth([text])[0]).max())
    figure(f"MiniLM: llama.cpp on our GGUF within {worst:.1e} of transformers")
    assert worst < 1e-3


def spearman(a, b):
    def ranks(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return np.corrcoef(ranks(np.asarray(a)), ranks(np.asarray(b)))[0, 1]


@pytest.mark.skipif(not STSB.exists(), reason=f"{STSB} is not there")
def test_stsb(tmp_path, truth):
    rows = list(csv.reader(STSB.open(newline="")))
    scores = [float(score) for _, _, score in rows]
    texts = [text for pair in rows for text in pair[:2]]
    lines = tmp_path / "lines.txt"
    assert not any("\n" in text for text in texts)
    lines.write_text("\n".join(texts) + "\n")

    def correlation(vectors):
        return spearman((vectors[0::2] * vectors[1::2]).sum(1), scores)

    def ours_of(model):
        return np.array(run_json("embed", model, "--file", lines, "--quiet")["embeddings"])

    vectors = ours_of(MINILM)
    expected = truth(texts)
    assert np.abs(vectors - expected).max() < 1e-6
    got, told = correlation(vectors), correlation(expected)
    figure(f"MiniLM on STS-B dev: Spearman {got:.4f}, by transformers {told:.4f}")
    assert abs(got - told) < 1e-4
    for name, precision in [("optimal ternary, groups of 32", ["--threshold", "optimal", "--granularity", "group:32"]), ("int4, groups of 32", ["--precision", "int4", "--granularity", "group:32"])]:
        out = tmp_path / name.split()[0]
        run("quantize", MINILM, "--out", out, *precision, "--quiet")
        got = correlation(ours_of(out))
        figure(f"MiniLM on STS-B dev, {name}: Spearman {got:.4f}")
        assert 0.6 < got < told + 0.01
