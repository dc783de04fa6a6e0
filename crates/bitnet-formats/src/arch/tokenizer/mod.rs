//! Tokenizers: tokenizer.json of Hugging Face as keys of llama.cpp, and back.
//!
//! | tokenizer.json | `tokenizer.ggml.model` | `tokenizer.ggml.pre` |
//! |---|---|---|
//! | BPE on GPT-2's byte alphabet | `gpt2` | by the pre-tokenizer: see `pre.rs` |
//! | BPE on text with ▁ for a space and 256 byte tokens, if scores describe its merges | `llama` | none |
//! | other BPE on text with ▁ for a space | `gpt2` | `sarvam-moe`, which merges by rank on characters |
//! | Unigram | `t5`, which searches the likeliest pieces and knows no byte tokens | none |
//! | WordPiece with BERT's words | `bert` | none |
//! | anything else, or none | `none` | none |
//!
//! The way back reads all of these, and `gemma4`, which is `sarvam-moe` under another name.

mod charsmap;
mod frame;
mod plan;
mod pre;
mod ranks;
mod special;
mod to_gguf;
mod to_hf;
mod vocabulary;
mod wordpiece;

pub(super) use to_gguf::gguf_tokenizer;
pub use to_hf::{GgufTokenizer, hf_tokenizer, hf_tokenizer_settings};

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
