//! Pre-tokenizers of byte-level BPE: how a text is cut into words before tokens merge.

/// The splits of Llama 3 and of Qwen 2, and of the models that took them over.
pub(super) const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
pub(super) const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// How byte-level BPE cuts a text into words before it merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Words {
    /// GPT-2's rule, which is part of the `ByteLevel` step.
    Gpt2,
    /// Single digits, then GPT-2's rule.
    DigitsGpt2,
    /// A regular expression.
    Regex(&'static str),
}

/// A value of `tokenizer.ggml.pre`.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreTokenizer {
    pub(super) name: &'static str,
    pub(super) words: Words,
    /// Whether a word that is a token is taken without merging (`ignore_merges`).
    pub(super) ignore_merges: bool,
    /// Whether llama.cpp adds the first token to a text if the file has no `add_bos_token`.
    pub(super) adds_bos: bool,
}

/// The pre-tokenizers of byte-level BPE that are known on both sides.
pub(super) const PRE: [PreTokenizer; 5] = [
    PreTokenizer {
        name: "gpt-2",
        words: Words::Gpt2,
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        name: "smollm",
        words: Words::DigitsGpt2,
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        name: "llama-bpe",
        words: Words::Regex(LLAMA3),
        ignore_merges: true,
        adds_bos: true,
    },
    PreTokenizer {
        name: "smaug-bpe",
        words: Words::Regex(LLAMA3),
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        name: "qwen2",
        words: Words::Regex(QWEN2),
        ignore_merges: false,
        adds_bos: false,
    },
];
