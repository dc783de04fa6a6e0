//! Which tokenizer of llama.cpp does what a tokenizer.json describes, or why none does.

use super::pre::{LLAMA3, PRE, PreTokenizer, QWEN2, Words};
use super::vocabulary::has_all_bytes;
use crate::arch::values::shown;
use serde_json::Value;

/// Splits on text with ▁ for a space that only ever cut before a ▁ or around a line feed.
pub(super) const BEFORE_SPACE: &str = r"\n|▁*[^▁\n]+|▁+";
pub(super) const SPACE: char = '▁';

/// A tokenizer in llama.cpp's terms.
pub(super) struct Plan {
    pub(super) model: &'static str,
    pub(super) pre: Option<&'static str>,
    /// A space before the text.
    pub(super) prefix: bool,
    /// Whether tokens write ▁ for a space.
    pub(super) spaces: bool,
}

/// The steps of a normalizer or pre-tokenizer: those of a `Sequence`, or the one.
pub(super) fn steps<'a>(tokenizer: &'a Value, part: &str, inner: &str) -> Vec<&'a Value> {
    match &tokenizer[part] {
        Value::Null => vec![],
        sequence if sequence["type"] == "Sequence" => {
            sequence[inner].as_array().into_iter().flatten().collect()
        }
        one => vec![one],
    }
}

/// Takes unicode normal forms out of the normalizer, with a note: llama.cpp applies none.
fn normalizers<'a>(tokenizer: &'a Value, notes: &mut Vec<String>) -> Vec<&'a Value> {
    let mut rest = steps(tokenizer, "normalizer", "normalizers");
    rest.retain(|step| match step["type"].as_str() {
        Some(form @ ("NFC" | "NFKC" | "NFD" | "NFKD")) => {
            notes.push(format!(
                "the tokenizer normalizes text to {form}, llama.cpp \
                 does not: text in another form gets other tokens"
            ));
            false
        }
        _ => true,
    });
    rest
}

pub(super) fn plan_bpe(
    tokenizer: &Value,
    tokens: &[Option<String>],
    merges: &[(String, String)],
    notes: &mut Vec<String>,
) -> Result<Plan, String> {
    let model = &tokenizer["model"];
    for key in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        if !(model[key].is_null() || model[key] == "" || model[key] == 0.0) {
            return Err(format!("its {key} is {}", shown(model.get(key))));
        }
    }
    let ignore_merges = model["ignore_merges"].as_bool().unwrap_or(false);
    let normalizers = normalizers(tokenizer, notes);
    let splits = steps(tokenizer, "pre_tokenizer", "pretokenizers");
    if splits.iter().any(|step| step["type"] == "ByteLevel") {
        return plan_byte_level(tokenizer, &normalizers, &splits, ignore_merges);
    }
    if ignore_merges {
        return Err("it ignores merges".into());
    }
    let (prefix, pieces) = spaces(tokenizer, &normalizers, &splits, notes)?;
    if let Some((a, b)) = merges
        .iter()
        .find(|(a, b)| !pieces.keep(&format!("{a}{b}")))
    {
        return Err(format!(
            "the merge '{a}' + '{b}' makes a token that its pre-tokenizer cuts"
        ));
    }
    if model["byte_fallback"] == true && has_all_bytes(tokens) {
        return Ok(Plan {
            model: "llama",
            pre: None,
            prefix,
            spaces: true,
        });
    }
    if prefix {
        return Err("it puts a space before the text and has no byte tokens".into());
    }
    if merges
        .iter()
        .any(|(a, b)| a.contains('\n') || b.contains('\n'))
    {
        return Err("it merges line feeds".into());
    }
    notes.push("llama.cpp drops characters that the tokenizer does not know".into());
    Ok(Plan {
        model: "gpt2",
        pre: Some("sarvam-moe"),
        prefix: false,
        spaces: true,
    })
}

/// BPE on GPT-2's byte alphabet.
fn plan_byte_level(
    tokenizer: &Value,
    normalizers: &[&Value],
    splits: &[&Value],
    ignore_merges: bool,
) -> Result<Plan, String> {
    if let Some(step) = normalizers.first() {
        return Err(format!("its normalizer has {}", shown(Some(step))));
    }
    let words = words(splits).ok_or_else(|| {
        format!(
            "its pre-tokenizer is {}",
            shown(tokenizer.get("pre_tokenizer"))
        )
    })?;
    let known = |p: &&PreTokenizer| (p.words, p.ignore_merges) == (words, ignore_merges);
    let pre = PRE
        .iter()
        .find(known)
        .ok_or("it ignores merges, and no pre-tokenizer of llama.cpp with these words does")?;
    Ok(Plan {
        model: "gpt2",
        pre: Some(pre.name),
        prefix: false,
        spaces: false,
    })
}

pub(super) fn plan_unigram(tokenizer: &Value, notes: &mut Vec<String>) -> Result<Plan, String> {
    let normalizers = normalizers(tokenizer, notes);
    let splits = steps(tokenizer, "pre_tokenizer", "pretokenizers");
    let (prefix, pieces) = spaces(tokenizer, &normalizers, &splits, notes)?;
    if !matches!(pieces, Pieces::Text) {
        return Err("it is a Unigram model on pieces of the text".into());
    }
    // Its `llama` kind merges by score, which finds other pieces in most texts.
    if tokenizer["model"]["byte_fallback"] == true {
        notes.push(
            "llama.cpp takes the unknown token where this Unigram tokenizer takes bytes".into(),
        );
    }
    Ok(Plan {
        model: "t5",
        pre: None,
        prefix,
        spaces: true,
    })
}

/// The words that a byte-level pre-tokenizer makes; `None` if it is none of the known ones.
fn words(splits: &[&Value]) -> Option<Words> {
    let byte_level = |step: &Value, regex: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == regex
    };
    match splits {
        [bytes] if byte_level(bytes, true) => Some(Words::Gpt2),
        [digits, bytes]
            if byte_level(bytes, true)
                && digits["type"] == "Digits"
                && digits["individual_digits"] == true =>
        {
            Some(Words::DigitsGpt2)
        }
        [split, bytes] if byte_level(bytes, false) && split["type"] == "Split" => {
            let plain = split["behavior"] == "Isolated" && split["invert"].as_bool() != Some(true);
            let regex = [LLAMA3, QWEN2]
                .into_iter()
                .find(|regex| split["pattern"]["Regex"] == **regex)?;
            plain.then_some(Words::Regex(regex))
        }
        _ => None,
    }
}

/// The pieces of a text within which a tokenizer with ▁ for a space merges.
#[derive(Clone, Copy)]
enum Pieces {
    /// The whole text.
    Text,
    /// Words with all spaces before them; line feeds stand alone.
    Words,
    /// Words with one space before them.
    Spaces,
}

impl Pieces {
    /// Whether a token can stand within a piece.
    fn keep(self, token: &str) -> bool {
        match self {
            Self::Text => true,
            Self::Words => {
                let mut word = token.chars().skip_while(|&c| c == SPACE);
                word.all(|c| c != SPACE) && !token.contains('\n')
            }
            Self::Spaces => token.chars().skip(1).all(|c| c != SPACE),
        }
    }
}

/// For a tokenizer that writes ▁ for a space: whether it puts a space before the text, and within
/// which pieces it merges.
fn spaces(
    tokenizer: &Value,
    normalizers: &[&Value],
    splits: &[&Value],
    notes: &mut Vec<String>,
) -> Result<(bool, Pieces), String> {
    let (mut prefix, mut replaced) = (false, false);
    for step in normalizers {
        match step["type"].as_str() {
            Some("Prepend") if step["prepend"] == "▁" => prefix = true,
            Some("Replace") if step["pattern"]["String"] == " " && step["content"] == "▁" => {
                replaced = true
            }
            _ => return Err(format!("its normalizer has {}", shown(Some(step)))),
        }
    }
    let mut pieces = Pieces::Text;
    for step in splits {
        match step["type"].as_str() {
            Some("Metaspace") if step["replacement"] == "▁" => {
                replaced = true;
                let adds = match step["prepend_scheme"].as_str() {
                    Some(scheme) => scheme != "never",
                    None => step["add_prefix_space"] != false,
                };
                if adds {
                    prefix = true;
                    notes.push("llama.cpp also puts a space before a text that begins with one, and after \
                         every special token; the tokenizer's Metaspace step does not".into());
                }
                if step["split"] != false {
                    pieces = Pieces::Spaces;
                }
            }
            // Nothing to split on: there are no spaces any more.
            Some("Split") if replaced && step["pattern"]["String"] == " " => {}
            Some("Split")
                if replaced
                    && step["pattern"]["Regex"] == BEFORE_SPACE
                    && step["behavior"] == "Isolated" =>
            {
                pieces = Pieces::Words
            }
            _ => {
                return Err(format!(
                    "its pre-tokenizer is {}",
                    shown(tokenizer.get("pre_tokenizer"))
                ));
            }
        }
    }
    if replaced {
        Ok((prefix, pieces))
    } else {
        Err("it neither works on bytes nor writes ▁ for a space".into())
    }
}
