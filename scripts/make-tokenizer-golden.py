#!/usr/bin/env python3
"""Writes crates/bitnet-inference/tests/golden/tokenizers.json: small tokenizers and the ids that `tokenizers` gives for hard texts.

    scripts/make-tokenizer-golden.py       (with the python of scripts/python-truth --print-python)

The tokenizers are those of tests/python/tokenizer_cases.py, smaller. Each entry of `cases` has the tokenizer.json, the tokenizer_config.json,
and the ids of each of `texts`; null where white space beside ▁ is dropped before there is a ▁ for it.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/python"))

import tokenizer_cases as cases

NAMES = ["smollm", "llama3", "qwen35", "gpt4o", "deepseek-v3", "spm", "spm-no-prefix", "spm-no-bytes", "unigram", "wordpiece"]
# A line for each word, lest the alphabet of tokens without GPT-2's bytes fills the vocabulary.
LINES = ["It's what they'd've done, isn't it? I'LL SAY SO!", "the cat and the hat, 12345 + 67.89 == 0x1F\n\n\treturn a + b  # ok",
         "Größe über alles, éÉ", "Привет мир", "你好，世界", "word  two   three    four"] * 3


def main():
    cases.LINES, cases.SIZE = LINES, 340
    texts = cases.TEXTS + cases.LETTERS
    made = {}
    for name in NAMES:
        make, settings, model, pre = cases.CASES[name]
        tokenizer = make()
        made[name] = {"model": model, "pre": pre, "settings": settings, "tokenizer": json.loads(tokenizer.to_str()),
                      "ids": [None if name == "unigram" and "▁" in text else tokenizer.encode(text).ids for text in texts]}
    out = ROOT / "crates/bitnet-inference/tests/golden/tokenizers.json"
    lines = [f"{json.dumps(name)}: {json.dumps(case, ensure_ascii=False, separators=(',', ':'))}" for name, case in made.items()]
    out.write_text('{"texts": ' + json.dumps(texts) + ',\n"cases": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    print(f"{out}: {out.stat().st_size} bytes")


main()
