#!/usr/bin/env python3
"""Compares a Hugging Face model folder with a GGUF of the same model: logits, greedy tokens and tokenization.

    cargo run --release -p bitnet-formats --example gguf_model -- FOLDER model.gguf
    python scripts/check-gguf-model.py FOLDER model.gguf [--tolerance 1e-4] [--no-tokenizer]

transformers in f32 on the one side, llama-cpp-python with an f32 key/value cache on the other. Exit status 1 where they differ: a logit by more than the
tolerance times the largest one, a greedy continuation in a token, or a text in its tokens. Texts with characters that the tokenizer does
not know are counted apart, since llama.cpp leaves such characters out where GGUF has no byte tokens.
"""

import argparse
import sys

import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "Alice was beginning to get very tired of sitting by her sister on the bank.",
    "“Curiouser and curiouser!” cried Alice.",
    "The quick brown fox jumps over the lazy dog.",
    "It's what I'd say: they're sure we've won, he'll stay, I'm not.",
    "IT'S WHAT I'D SAY, THEY'RE GONE",
    "def f(x):\n    return x ** 2 + 1\n",
    "one  two   three    four",
    "trailing spaces   ",
    "a line\nanother line\n\na paragraph\n\n\nand more",
    "1234567890 3.14159 1,000,000 2026-11-23",
    "no1 2b x86_64 v0.3.36",
    "Hello, world!",
    "hello",
    "H",
    "\n",
    "\n\n",
    "tab\tand\ttabs\t\tin a row",
    "carriage\r\nreturns\r\n",
    "She said, (quietly) [and then] {again}: -- no; yes? * & _ !",
    "Größe, naïve café, Ærø, smørrebrød, façade",
    "Привет, мир",
    "你好，世界",
    "日本語のテキスト",
    "🙂 and 👩‍👩‍👧 and 🇩🇪",
    "∑ x² ≤ ∫ f(x) dx",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "http://example.com/path?query=1&other=two#end",
    "user@example.com",
    '{"key": [1, 2, 3], "other": null}',
    "<b>bold</b> &amp; <i>italic</i>",
    "...!!!???",
    "a.b.c,d;e:f",
    "mixedCASEWords andSnake_case_words",
    "“Off with her head!” the Queen shouted at the top of her voice. Nobody moved.",
    "‘What’s the use of a book,’ thought Alice",
    "x" * 40,
    "the the the the the the",
    "ﬁ ligature and ½ and №",
    "Ã© Â° â€™",
    "end of text",
    " one leading space",
    "  two leading spaces",
    " ",
]


def hf_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def gguf_logits(model, ids):
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def check_logits(hf, gguf, prompts, tolerance, steps):
    good = True
    worst = 0.0
    for ids in prompts:
        expected, got = hf_logits(hf, ids), gguf_logits(gguf, ids)
        worst = max(worst, float(np.abs(expected - got).max() / np.abs(expected).max()))
        ours, theirs = list(ids), list(ids)
        for _ in range(steps):
            ours.append(int(hf_logits(hf, ours)[-1].argmax()))
            theirs.append(int(gguf_logits(gguf, theirs)[-1].argmax()))
        if ours != theirs:
            print(f"greedy tokens differ: {ours} {theirs}")
            good = False
    print(f"{len(prompts)} prompts: largest difference of a logit {worst:.3g} of the largest logit; greedy tokens {'agree' if good else 'differ'}")
    return good and worst <= tolerance


def check_tokenizer(folder, gguf):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    unknown = tokenizer.backend_tokenizer.token_to_id(tokenizer.unk_token) if tokenizer.unk_token else None
    same, different, skipped = 0, 0, 0
    added = [token.content for token in tokenizer.added_tokens_decoder.values()][:8]
    texts = TEXTS + [text for token in added for text in (f"one {token} two", f"one{token}two", f"{token}{token} x")]
    for text in texts:
        expected = tokenizer.encode(text)
        got = gguf.tokenize(text.encode(), add_bos=True, special=True)
        if got == expected:
            same += 1
        elif unknown in expected and got == [i for i in expected if i != unknown]:
            skipped += 1
        else:
            different += 1
            print(f"tokens of {text!r} differ:\n  {expected}\n  {got}")
    print(f"{len(texts)} texts: {same} tokenized alike, {skipped} alike but for unknown characters, {different} not")
    return different == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("gguf")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-tokenizer", action="store_true")
    args = parser.parse_args()
    gguf = llama_cpp.Llama(args.gguf, n_ctx=128, logits_all=True, verbose=False, n_threads=2, flash_attn=False, type_k=0, type_v=0)
    hf = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    vocab = min(hf.config.vocab_size, gguf.n_vocab())
    prompts = [rng.integers(0, vocab, size=n).tolist() for n in rng.integers(1, 48, size=args.prompts)]
    good = hf.config.vocab_size == gguf.n_vocab()
    good &= check_logits(hf, gguf, prompts, args.tolerance, args.steps)
    if not args.no_tokenizer:
        good &= check_tokenizer(args.folder, gguf)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
