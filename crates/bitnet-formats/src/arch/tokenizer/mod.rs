//! Tokenizers: tokenizer.json of Hugging Face as keys of llama.cpp, and back for byte-level BPE.
//!
//! | tokenizer.json | `tokenizer.ggml.model` | `tokenizer.ggml.pre` |
//! |---|---|---|
//! | BPE on GPT-2's byte alphabet | `gpt2` | by the pre-tokenizer: see `pre.rs` |
//! | BPE on text with ▁ for a space and 256 byte tokens | `llama` | none |
//! | BPE on text with ▁ for a space, no byte tokens | `gpt2` | `sarvam-moe`, which merges by rank on characters |
//! | Unigram | `t5`, which searches the likeliest pieces and knows no byte tokens | none |
//! | anything else, or none | `none` | none |

mod plan;
mod pre;
mod to_gguf;
mod to_hf;
mod vocabulary;

pub(super) use to_gguf::gguf_tokenizer;
pub use to_hf::{GgufTokenizer, gguf_bpe, hf_tokenizer};

/// Values of `tokenizer.ggml.token_type`.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
    pub(super) const BYTE: i32 = 6;
}

#[cfg(test)]
mod tests;
