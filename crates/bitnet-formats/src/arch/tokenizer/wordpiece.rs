//! WordPiece: a tokenizer.json marks tokens that continue a word with `##`, a GGUF those that begin
//! one with ▁.

use super::kind;
use super::plan::SPACE;

const CONTINUES: &str = "##";

/// A token of a tokenizer.json as llama.cpp writes it.
pub(super) fn to_gguf(token: &str, kind: i32) -> String {
    if !is_piece(kind) {
        return token.into();
    }
    match token.strip_prefix(CONTINUES) {
        Some(rest) if !rest.is_empty() => rest.into(),
        _ => format!("{SPACE}{token}"),
    }
}

/// A token of a GGUF as a tokenizer.json writes it.
pub(super) fn to_hf(token: &str, kind: i32) -> String {
    if !is_piece(kind) {
        return token.into();
    }
    match token.strip_prefix(SPACE) {
        Some(rest) => rest.into(),
        None => format!("{CONTINUES}{token}"),
    }
}

/// Whether words are made of the token; others stand for themselves.
fn is_piece(kind: i32) -> bool {
    kind == kind::NORMAL || kind == kind::UNKNOWN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_go_both_ways() {
        for (hf, gguf, kind) in [
            ("ing", "▁ing", kind::NORMAL),
            ("##ing", "ing", kind::NORMAL),
            ("##", "▁##", kind::NORMAL),
            ("####", "##", kind::NORMAL),
            ("[CLS]", "[CLS]", kind::CONTROL),
            ("[PAD9]", "[PAD9]", kind::UNUSED),
        ] {
            assert_eq!(to_gguf(hf, kind), gguf);
            assert_eq!(to_hf(gguf, kind), hf);
        }
    }
}
