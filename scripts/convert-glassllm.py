#!/usr/bin/env python3
"""Turns the English model of the PyPI wheel glassllm==0.1.0 into a Hugging Face style llama folder.

    scripts/convert-glassllm.py [--wheel WHEEL|FOLDER] [--out assets/glassllm-en] [--verify [--text FILE]]

Without --wheel the pinned wheel is downloaded. Needs numpy and safetensors; --verify also needs torch, transformers
and tokenizers. The wheel is read as data: none of its code is run. Run by a developer, since the result is committed;
the same bytes come out on every run.

What the model computes (from the package's nn.py, model.py and autograd.py), and what changes on the way:

    x = E[ids]                                  no embedding scale, logits = norm(x) · Eᵀ (tied), no biases anywhere
    x += W_O · attn(rms(x, 1e-6) * g1)          pre-norm; 4 query heads and 2 key/value heads of 32, scale 1/√32
    x += W2 · (silu(W1 · h) * (W3 · h))         h = rms(x, 1e-6) * g2; hidden 341 = ⌊8·128/3⌋

    stored [in, out]                         -> [out, in], the row-major convention of torch linear layers
    RoPE turns adjacent pairs (2i, 2i+1)     -> rows of q and k permuted so that the pairs are (i, i + 16), as HF llama does;
                                                attention scores are sums over pairs, so the result is the same
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from safetensors.numpy import save

PACKAGE = "glassllm==0.1.0"
WHEEL_SHA256 = "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b"
WEIGHTS = "glassllm/weights/en.npz"
TOKENIZER = "glassllm/weights/en.tokenizer.json"
LICENSE = "glassllm-0.1.0.dist-info/licenses/LICENSE"
MEMBERS = {
    WEIGHTS: "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
    TOKENIZER: "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
    LICENSE: "9e33376790743d975866a3606a3d8be224344b3ad60d56e9dd84e8a7fb842581",
}
SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"]
CHUNK = r"\n|▁*[^▁\n]+|▁+"

README = """\
# glassllm-en

A very small English llama-style language model (852,608 parameters, 128 tokens of context), kept here so that tests and
examples have a real trained model without a download. It was trained on books by Lewis Carroll and writes
nonsense in that manner; it is good for testing and for nothing else.

Source: the PyPI wheel `glassllm==0.1.0` (sha256 `{sha}`)
by Oséias Dias de Farias, <https://github.com/Oseiasdfarias/glassllm>, MIT licence: see `LICENSE` in this folder, which
covers `model.safetensors` and the tokenizer. `scripts/convert-glassllm.py` writes every file of this folder.

What the conversion changed:

- `glassllm/weights/en.npz` became `model.safetensors` with the names of the Hugging Face llama layout. The values are the same
  16-bit floats; matrices are transposed from [in, out] to [out, in].
- The package rotates adjacent pairs of a head (2i, 2i+1). The rows of each `q_proj` and `k_proj` head are reordered
  (even ones first, then odd ones) so that the rotate-half convention of Hugging Face llama gives the same logits.
- `lm_head` is the embedding (`tie_word_embeddings`), as in the package.
- `en.tokenizer.json` became `tokenizer.json` (the same 1024 ids). Two things differ: the texts `<pad>`, `<unk>`, `<bos>`
  and `<eos>` in an input are read as these special tokens here and as single characters there; and the package
  shows an unknown character as ⁇ when decoding, where `tokenizers` shows `<unk>` or leaves it out.

The model was trained without `<bos>` and `<eos>`: the tokenizer adds neither, and generation ends at a length.
"""


def fail(message):
    sys.exit(f"convert-glassllm: {message}")


def read_members(source):
    """{member: bytes} of the wheel or of its unzipped folder, each checked against its pinned sha256."""
    if source.is_dir():
        data = {name: (source / name).read_bytes() for name in MEMBERS}
    else:
        raw = source.read_bytes()
        got = hashlib.sha256(raw).hexdigest()
        if got != WHEEL_SHA256:
            fail(f"{source}: sha256 is {got}, expected {WHEEL_SHA256}")
        with zipfile.ZipFile(BytesIO(raw)) as wheel:
            data = {name: wheel.read(name) for name in MEMBERS}
    for name, expected in MEMBERS.items():
        got = hashlib.sha256(data[name]).hexdigest()
        if got != expected:
            fail(f"{source}: {name}: sha256 is {got}, expected {expected}")
    return data


def download():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder, PACKAGE]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            fail(f"cannot download {PACKAGE} with pip; pass its wheel with --wheel")
        return read_members(next(Path(folder).glob("*.whl")))


def load_arrays(data):
    with np.load(BytesIO(data[WEIGHTS]), allow_pickle=False) as npz:
        config = json.loads(str(npz["__config__"]))
        return config, {name: npz[name] for name in npz.files if name != "__config__"}


def rotate_half_rows(w, heads):
    """Rows of [heads·d, in], pairs (2i, 2i+1) of each head moved to (i, i + d/2)."""
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def llama_tensors(config, arrays):
    left = dict(arrays)
    tensors = {"model.embed_tokens.weight": left.pop("E"), "model.norm.weight": left.pop("norm_f.gamma")}
    for n in range(config["n_layers"]):
        take = lambda name: left.pop(f"blocks.{n}.{name}")  # noqa: E731
        to = f"model.layers.{n}."
        tensors[to + "input_layernorm.weight"] = take("norm1.gamma")
        tensors[to + "self_attn.q_proj.weight"] = rotate_half_rows(take("attn.W_Q").T, config["n_heads"])
        tensors[to + "self_attn.k_proj.weight"] = rotate_half_rows(take("attn.W_K").T, config["n_kv_heads"])
        tensors[to + "self_attn.v_proj.weight"] = take("attn.W_V").T
        tensors[to + "self_attn.o_proj.weight"] = take("attn.W_O").T
        tensors[to + "post_attention_layernorm.weight"] = take("norm2.gamma")
        tensors[to + "mlp.gate_proj.weight"] = take("ffn.W1").T
        tensors[to + "mlp.up_proj.weight"] = take("ffn.W3").T
        tensors[to + "mlp.down_proj.weight"] = take("ffn.W2").T
    if left:
        fail(f"arrays that nothing uses: {sorted(left)}")
    for name, tensor in tensors.items():
        if tensor.dtype != np.float16:
            fail(f"{name}: dtype is {tensor.dtype}, expected float16")
    return {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}


def llama_config(config, arrays):
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": SPECIALS.index("<bos>"),
        "eos_token_id": SPECIALS.index("<eos>"),
        "head_dim": config["d_model"] // config["n_heads"],
        "hidden_act": "silu",
        "hidden_size": config["d_model"],
        "initializer_range": config["init_std"],
        "intermediate_size": arrays["blocks.0.ffn.W1"].shape[1],
        "max_position_embeddings": config["max_len"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config["n_heads"],
        "num_hidden_layers": config["n_layers"],
        "num_key_value_heads": config["n_kv_heads"],
        "pad_token_id": SPECIALS.index("<pad>"),
        "rms_norm_eps": config["eps"],
        "rope_scaling": None,
        "rope_theta": config["rope_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": config["vocab_size"],
    }


def hf_tokenizer(source):
    """The package's character BPE in the JSON of the `tokenizers` library: NFC, space -> ▁, chunks, ranked merges."""
    vocab = SPECIALS + source["alphabet"] + [a + b for a, b in source["merges"]]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **added} for i, token in enumerate(SPECIALS)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": CHUNK}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocab)},
            "merges": source["merges"],
        },
    }


def tokenizer_config(config):
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": config["max_len"],
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def write(path, content):
    """Beside the target, then renamed: a reader never sees half of a file."""
    raw = content if isinstance(content, bytes) else content.encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(raw)
    os.replace(partial, path)
    print(f"{len(raw):>9}  {hashlib.sha256(raw).hexdigest()}  {path}", file=sys.stderr)


def convert(data, out):
    config, arrays = load_arrays(data)
    pretty = lambda value: json.dumps(value, indent=2, ensure_ascii=False) + "\n"  # noqa: E731
    compact = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"  # noqa: E731
    out.mkdir(parents=True, exist_ok=True)
    write(out / "config.json", pretty(llama_config(config, arrays)))
    write(out / "model.safetensors", save(llama_tensors(config, arrays), metadata={"format": "pt"}))
    write(out / "tokenizer.json", compact(hf_tokenizer(json.loads(data[TOKENIZER]))))
    write(out / "tokenizer_config.json", pretty(tokenizer_config(config)))
    write(out / "LICENSE", data[LICENSE])
    write(out / "README.md", README.format(sha=WHEEL_SHA256))


# --- verification: the package's arithmetic and tokenizer again, from the original files and in their own conventions


def original_forward(config, p, ids):
    """Logits [T, vocab] in float32: weights as stored, [in, out], RoPE over adjacent pairs."""
    heads, kv_heads, eps = config["n_heads"], config["n_kv_heads"], config["eps"]
    d = config["d_model"] // heads
    p = {name: value.astype(np.float32) for name, value in p.items()}
    t = len(ids)
    angles = np.outer(np.arange(config["max_len"]), config["rope_base"] ** (-2.0 * np.arange(d // 2) / d))[:t]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def rms(x, gamma):
        return x / ((x * x).mean(axis=-1, keepdims=True) + eps) ** 0.5 * gamma

    def split(x, n):
        return x.reshape(t, n, d).transpose(1, 0, 2)

    def rotate(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        y = np.empty_like(x)
        y[..., 0::2] = even * cos - odd * sin
        y[..., 1::2] = even * sin + odd * cos
        return y

    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    x = p["E"][np.asarray(ids)]
    future = np.arange(t)[None, :] > np.arange(t)[:, None]
    for n in range(config["n_layers"]):
        w = lambda name: p[f"blocks.{n}.{name}"]  # noqa: E731
        h = rms(x, w("norm1.gamma"))
        q, k, v = split(h @ w("attn.W_Q"), heads), split(h @ w("attn.W_K"), kv_heads), split(h @ w("attn.W_V"), kv_heads)
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(a, heads // kv_heads, axis=0) for a in (k, v))
        scores = np.where(future, -np.inf, q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(d)))
        x = x + (softmax(scores) @ v).transpose(1, 0, 2).reshape(t, heads * d) @ w("attn.W_O")
        h = rms(x, w("norm2.gamma"))
        gate = h @ w("ffn.W1")
        x = x + (gate / (1.0 + np.exp(-gate)) * (h @ w("ffn.W3"))) @ w("ffn.W2")
    return rms(x, p["norm_f.gamma"]) @ p["E"].T


class OriginalTokenizer:
    def __init__(self, source):
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(source["merges"])}
        self.vocab = SPECIALS + source["alphabet"] + [a + b for a, b in source["merges"]]
        self.ids = {token: i for i, token in enumerate(self.vocab)}

    def encode(self, text):
        out = []
        for chunk in re.findall(CHUNK, unicodedata.normalize("NFC", text).replace(" ", "▁")):
            symbols = list(chunk)
            while True:
                known = [(self.ranks[pair], pair) for pair in zip(symbols, symbols[1:]) if pair in self.ranks]
                if not known:
                    break
                pair, merged, i = min(known)[1], [], 0
                while i < len(symbols):
                    whole = tuple(symbols[i : i + 2]) == pair
                    merged.append("".join(pair) if whole else symbols[i])
                    i += 2 if whole else 1
                symbols = merged
            out += [self.ids.get(symbol, self.ids["<unk>"]) for symbol in symbols]
        return out

    def decode(self, ids):
        return "".join("⁇" if i == 1 else "" if i < len(SPECIALS) else self.vocab[i] for i in ids).replace("▁", " ")


def sample_texts(vocab, count, seed=1):
    """Plain sentences, runs of spaces and newlines, pieces of the vocabulary in any order, foreign and odd characters."""
    rng = random.Random(seed)
    fixed = ["", " ", "  ", "\n", "\n\n", " \n ", "Alice was beginning to get very tired of sitting by her sister.", "▁▁a ▁", "a\tb\r\nc",
             "e\u0301 \u0065\u0301 é ﬁ Å\u030a \u1100\u1161", "naïve café Æsop où", "日本語 ünïcödé 🙂 \u200b\u00a0x", "  leading and trailing  ",
             "“Oh dear! Oh dear!” — it said—‘twice’", "3.14159, 2^10 = 1024; a_b [c] {d} & *e*"]  # fmt: skip
    odd = list("éü漢字🙂\t\r\u00a0\u0301\u0308\u200d▁ \n<>#%@~|\\/\"") + ["  ", "\n\n", " the", "ing", "Alice"]
    while len(fixed) < count:
        pieces = rng.choices(vocab[len(SPECIALS) :], k=rng.randint(1, 40))
        for _ in range(rng.randint(0, 6)):
            pieces.insert(rng.randint(0, len(pieces)), rng.choice(odd))
        if rng.random() < 0.5:
            rng.shuffle(pieces)
        fixed.append("".join(pieces).replace("▁", " ") if rng.random() < 0.8 else "".join(pieces))
    return fixed


def verify(data, out, text_file):
    import tokenizers
    import torch
    import transformers

    config, arrays = load_arrays(data)
    theirs, ours = OriginalTokenizer(json.loads(data[TOKENIZER])), tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(out)
    texts = sample_texts(theirs.vocab, 1000)
    if text_file:
        texts += text_file.read_text(encoding="utf-8").splitlines()
    wrong_ids = wrong_text = compared = tokens = 0
    for text in texts:
        want = theirs.encode(text)
        tokens += len(want)
        wrong_ids += ours.encode(text).ids != want or auto(text)["input_ids"] != want
        if 1 not in want:
            compared += 1
            wrong_text += ours.decode(want) != theirs.decode(want)
    print(f"tokenizer: {len(texts)} texts, {tokens} tokens, {wrong_ids} with different ids; decoded {compared} texts without <unk>, {wrong_text} differ")

    model, info = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        fail(f"transformers: {info}")
    model.eval()
    prompts = ["Alice was beginning to", "“Curiouser and curiouser!” cried Alice", "\n", " the", "The Red Queen said, and the King " * 20]
    worst = 0.0
    with torch.no_grad():
        for prompt in prompts:
            ids = theirs.encode(prompt)[: config["max_len"]]
            want, got = original_forward(config, arrays, ids), model(torch.tensor([ids])).logits[0].numpy()
            worst = max(worst, float(np.abs(want - got).max()))
            print(f"logits: {len(ids):3} tokens, max |original - transformers| {np.abs(want - got).max():.2e}, of magnitude {np.abs(want).max():.1f}")
        ids = theirs.encode(prompts[0])
        for _ in range(60):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        again = theirs.encode(prompts[0])
        for _ in range(60):
            again.append(int(original_forward(config, arrays, again)[-1].argmax()))
    print(f"greedy, the same in both: {ids == again}\n{theirs.decode(ids)}")
    if wrong_ids or wrong_text or worst > 1e-4 or ids != again:
        fail("the converted model differs from the original")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, help="the glassllm-0.1.0 wheel or its unzipped folder (default: download it)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "assets" / "glassllm-en")
    parser.add_argument("--verify", action="store_true", help="compare logits and token ids with the original")
    parser.add_argument("--text", type=Path, help="with --verify: more lines of text for the tokenizers")
    args = parser.parse_args()
    data = read_members(args.wheel) if args.wheel else download()
    convert(data, args.out)
    if args.verify:
        verify(data, args.out, args.text)


if __name__ == "__main__":
    main()
