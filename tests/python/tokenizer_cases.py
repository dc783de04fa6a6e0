"""Small tokenizers of every kind that GGUF has a name for, trained by `tokenizers`, and texts that are hard for them.

test_tokenizers.py and scripts/make-tokenizer-golden.py use them. The regular expressions are those of the tokenizer.json of the models.
"""

import json
import struct

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog. It's what they'd've done, isn't it? I'LL SAY SO!",
    "def add(a, b):\n    return a + b  # 12345 + 67.89 == 0x1F\n\n\nclass HTTPServer2:\n\tpass\r\n",
    "Der Fluß fließt über Größe und Höhe; l'été à la crème brûlée, señor año, ÉCOLE Été.",
    "Привет, мир! Как дела? Хорошо. Ελληνικά γράμματα και τόνοι.",
    "你好，世界！今天天气很好。我们去公园吧。日本語のテキストです。カタカナ。한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ नमस्ते दुनिया। สวัสดีชาวโลก",
    "https://example.com/path?query=1&x=2 user@example.org {\"key\": [1, 2, 3], \"ok\": true}",
    "2024-01-31 12:00:00 1,000,000.00 3.14159 100% $5 €6 £7 ½ ² Ⅳ ٣٤",
    "word  two   three    four     spaces\ttabs\t\tand\n\nlines\n\n\nmore lines and words and words again",
] * 3

TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "  a  ",
    "Hello, world!",
    "It's they'd we'll I'M YOU'RE don''t 'tis 'Twas rock'n'roll",
    "1 12 123 1234 12345 1234567890 3.14 1,000,000 0x1F 1st",
    "a\nb\n\nc\r\nd\r\n\r\ne \n f\n ",
    "   leading and trailing   ",
    "tabs\tand\t\tmore \t mixed\t ",
    "\n",
    "\n\n\n",
    " \n \n ",
    "camelCase HTTPServer XMLHttpRequest snake_case kebab-case SHOUT",
    "def f(x):\n    if x:\n        return x ** 2\n",
    "!!! ??? ... --- === ### (a) [b] {c} <d> a/b\\c",
    "http://example.com/a?b=c&d=e#f",
    "你好，世界！日本語テキスト 한국어 문장",
    "中文abc中文123中文",
    "Привет, мир! Ελληνικά",
    "مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "über Größe fließt",
    "emoji 😀😃 👨‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
    "math ∑∫√ → ← ≠ ≤ ± × ÷ €£¥",
    "quotes “curly” ‘single’ «guillemets» „low“",
    "control \x01\x02\x7f end",
    "private \ue000 \U0010ffff end",
    "zero\u200bwidth\u200djoin\ufeffbom",
    "<s>begin</s>end <tool> x<tool>y",
    "<s",
    "</s></s> <s>",
    "▁ already ▁▁ marked",
    "<0x0A> <0xFF>",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "xylophone xylophones",
    "abababababab ababa",
    "x" + " " * 40 + "y",
    "=" * 37 + "-" * 23,
    "½ ² Ⅳ ٣٤ ①②",
]

# What the words of `tokenizers` and of llama.cpp differ in: letters beyond ASCII where cases count, marks, spaces.
LETTERS = [
    "ÉCOLE Été élan aÉ ÀÇ",
    "e\u0301te\u0301 combining n\u0303o",
    "\u00a0non\u00a0breaking\u2003em\u2009thin\u3000ideographic",
    "next\u0085line para\u2029graph line\u2028sep",
    "İstanbul ſs 'ſ K",
]

# What the tokenizers are trained on, so that hard texts have merges of their own.
LINES += 3 * [t for t in TEXTS + LETTERS if "<" not in t]

# Tokens of a vocabulary, more or less.
SIZE = 900

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD_END = r"|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + WORD_END
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]" + WORD_END
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + WORD_END
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+" + WORD_END
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
GPT4O = (f"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+" + WORD_END)
TEKKEN = f"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+" + WORD_END
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-"
    "\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-"
    "\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-"
    "\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+")
DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~！-／：-～‘-‟　-。]+"
DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK3_HAN = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK3 = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
             r"|\s*[\r\n]+" + WORD_END)
MINICPM5 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + WORD_END
SEED_CODER = CONTRACTIONS + "|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+" + WORD_END


def split(regex, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(regex), behavior, invert)


def words(*steps, use_regex=False):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


DIGITS = pre_tokenizers.Digits(individual_digits=True)
DEEPSEEK = [split("[\r\n]"), split(DEEPSEEK_LETTERS), split(DEEPSEEK_PUNCTUATION), split("\\s+$"), split(DEEPSEEK_HAN), DIGITS]

# name → (pre-tokenizer, ignore_merges, `tokenizer.ggml.pre` that it must get)
BYTE_LEVEL = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
    "smollm": (words(DIGITS, use_regex=True), False, "smollm"),
    "llama3": (words(split(LLAMA3)), True, "llama-bpe"),
    "llama3-merging": (words(split(LLAMA3)), False, "smaug-bpe"),
    "cl100k": (words(split(CL100K, "removed", True)), False, "smaug-bpe"),
    "qwen2": (words(split(QWEN2)), False, "qwen2"),
    "qwen35": (words(split(QWEN35)), False, "qwen35"),
    "gpt4o": (words(split(GPT4O)), False, "gpt-4o"),
    "tekken": (words(split(TEKKEN)), True, "tekken"),
    "bloom": (words(split(BLOOM)), False, "bloom"),
    "viking": (words(split(BLOOM), DIGITS), False, "viking"),
    "deepseek-llm": (words(*DEEPSEEK), False, "deepseek-llm"),
    "deepseek-coder": (words(split("[\r\n]"), split("\\s?\\p{L}+"), split("\\s?\\p{P}+"), split(DEEPSEEK_HAN), DIGITS), False, "deepseek-coder"),
    "deepseek-v3": (words(split(r"\p{N}{1,3}"), split(DEEPSEEK3_HAN), split(DEEPSEEK3)), False, "deepseek-v3"),
    "minicpm5": (words(split(r"\p{N}{1,3}"), split(MINICPM5)), True, "minicpm5"),
    "seed-coder": (words(split(SEED_CODER)), False, "seed-coder"),
}


def around(tokenizer, before, after):
    pieces = [before, "$A", after]
    specials = [(t, tokenizer.token_to_id(t)) for t in (before, after) if t]
    tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(filter(None, pieces)), special_tokens=specials)


def byte_level(name):
    pre, ignore_merges, _ = BYTE_LEVEL[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=sorted(alphabet), show_progress=False,
                                                             special_tokens=["<s>", "</s>"], min_frequency=1))
    if ignore_merges:
        # A word that no merge makes.
        tokenizer = with_model(tokenizer, lambda model: model["vocab"].update({"xylophone": tokenizer.get_vocab_size()}))
        around(tokenizer, "<s>", None)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def with_model(tokenizer, change):
    """The tokenizer with another model."""
    text = json.loads(tokenizer.to_str())
    change(text["model"])
    return Tokenizer.from_str(json.dumps(text))


def bytes_of(kind):
    return [f"<0x{b:02X}>" for b in range(256)] if kind else []


def spaced(prefix, byte_fallback=True, converted=True, extra=()):
    """BPE on text with ▁ for a space, as of SentencePiece. `converted` lists all splits of a token as merges, as transformers does
    when it converts a SentencePiece model."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    # Tokens with line feeds need byte tokens: see plan.rs.
    lines = LINES if byte_fallback else [line for line in LINES if "\n" not in line and "\r" not in line]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=SIZE + 60, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *bytes_of(byte_fallback)], min_frequency=1))

    def change(model):
        vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
        for more in extra:
            if more in vocab:
                continue
            vocab[more] = len(vocab)
            merges.append((more[:-1], more[-1]))
        if converted:
            from transformers.convert_slow_tokenizer import generate_merges

            order = {}
            for i, (a, b) in enumerate(merges):
                order.setdefault(a + b, -i)
            pieces = {t: order.get(t, -len(merges) - i) for t, i in vocab.items()}
            skip = ["<unk>", "<s>", "</s>", *bytes_of(byte_fallback)]
            merges = generate_merges(vocab, pieces, skip)
        model["merges"] = [list(m) for m in merges]

    tokenizer = with_model(tokenizer, change)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    around(tokenizer, "<s>", None)
    return tokenizer


def charsmap(table):
    """A table of SentencePiece's normalizer: a double array over bytes, then the replacements."""
    trie, strings = {}, b""
    for key, value in sorted(table.items()):
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(strings)
        strings += value.encode() + b"\0"
    units, used, bases = {0: 0}, {0}, {0}

    def place(node, at, label):
        # Cells say of which byte they are, not of which parent: no two may share a base.
        base = next(b for b in range(1, 1 << 20) if b not in bases and not any(b ^ c in used for c in node))
        bases.add(base)
        used.update(base ^ c for c in node)
        units[at] = (at ^ base) << 10 | (0 in node) << 8 | label
        for c, child in node.items():
            if c == 0:
                units[base] = 1 << 31 | child
            else:
                place(child, base ^ c, c)

    place(trie, 0, 0)
    size = (max(units) | 0xFF) + 1
    array = b"".join(struct.pack("<I", units.get(i, 0)) for i in range(size))
    return struct.pack("<I", len(array)) + array + strings


CHARSMAP = charsmap({"\t": " ", "\n": " ", "\r": " ", "\u00a0": " ", "\u3000": " ", "\u2003": " ", "\u2009": " ", "\u0085": " ",
                     "\u2028": " ", "\u2029": " ", "①": "1", "②": "2", "½": "1⁄2", "²": "2",
                     "ﬁ": "fi", "，": ",", "！": "!", "…": "...", "Ⅳ": "IV", "e\u0301": "é"})


def unigram(collapse, table):
    tokenizer = Tokenizer(models.Unigram())
    steps = [normalizers.Precompiled(CHARSMAP)] if table else []
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace]) if collapse else metaspace
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(LINES, trainers.UnigramTrainer(vocab_size=SIZE - 200, show_progress=False, unk_token="<unk>",
                                                                 special_tokens=["<s>", "<pad>", "</s>", "<unk>"]))
    # Scores of 32 bits, as SentencePiece stores them.
    tokenizer = with_model(tokenizer, lambda model: model.update(vocab=[
        [token, struct.unpack("f", struct.pack("f", score))[0]] for token, score in model["vocab"]]))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    around(tokenizer, "<s>", "</s>")
    return tokenizer


def wordpiece(lowercase):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=SIZE, show_progress=False, special_tokens=specials))
    around(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


# name → (tokenizer, tokenizer_config.json, model, pre)
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BERT = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
XLMR = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
PLAIN = {"bos_token": "<s>", "eos_token": "</s>"}
CASES = {name: (lambda name=name: byte_level(name), PLAIN, "gpt2", BYTE_LEVEL[name][2]) for name in BYTE_LEVEL} | {
    "spm": (lambda: spaced(True, converted=False), LLAMA, "llama", None),
    "spm-converted": (lambda: spaced(True), LLAMA, "llama", None),
    "spm-no-prefix": (lambda: spaced(False, extra=["▁▁", "▁▁▁", "▁▁▁▁", "\n\n"]), LLAMA, "llama", None),
    "spm-no-bytes": (lambda: spaced(False, byte_fallback=False, converted=False), LLAMA, "gpt2", "sarvam-moe"),
    "unigram": (lambda: unigram(True, True), XLMR, "t5", None),
    "unigram-spaces": (lambda: unigram(False, False), XLMR, "t5", None),
    "wordpiece": (lambda: wordpiece(True), BERT, "bert", None),
    "wordpiece-cased": (lambda: wordpiece(False), BERT, "bert", None),
}
