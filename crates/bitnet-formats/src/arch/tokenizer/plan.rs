//! Which tokenizer of llama.cpp does what a tokenizer.json describes, or why none does.

use super::charsmap;
use super::pre::{FoundStep, Match, PRE, compare, found_steps};
use super::ranks::{makes_all, scores_of_merges};
use super::to_gguf::{Pairs, key};
use super::vocabulary::{added_ids, has_all_bytes};
use crate::arch::values::shown;
use crate::gguf::Array;
use serde_json::Value;

/// Splits on text with ▁ for a space that only ever cut before a ▁ or around a line feed.
pub(super) const BEFORE_SPACE: &str = r"\n|▁*[^▁\n]+|▁+";
/// Lines, and the line feeds between them.
pub(super) const LINES: &str = r"[^\n]+|[\n]+";
pub(super) const SPACE: char = '▁';
/// Two spaces and more.
const RUNS: &str = " {2,}";

/// A tokenizer in llama.cpp's terms.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) model: &'static str,
    pub(super) pre: Option<&'static str>,
    /// A space before the text.
    pub(super) prefix: bool,
    /// Whether tokens write ▁ for a space.
    pub(super) spaces: bool,
    /// Whether tokens such as `<0x0A>` are bytes.
    pub(super) bytes: bool,
    /// Scores that come from merges.
    pub(super) scores: Option<Vec<f32>>,
    /// Keys of this model alone.
    pub(super) more: Pairs,
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

fn pre_tokenizers(tokenizer: &Value) -> Vec<&Value> {
    steps(tokenizer, "pre_tokenizer", "pretokenizers")
}

fn unknown_pre_tokenizer(tokenizer: &Value) -> String {
    format!(
        "its pre-tokenizer is {}",
        shown(tokenizer.get("pre_tokenizer"))
    )
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
    let normalizers = normalizers(tokenizer, notes);
    let splits = pre_tokenizers(tokenizer);
    if splits.iter().any(|step| step["type"] == "ByteLevel") {
        if let Some(step) = normalizers.first() {
            return Err(format!("its normalizer has {}", shown(Some(step))));
        }
        return plan_byte_level(tokenizer, tokens, merges, notes);
    }
    let apart = added_ids(tokenizer);
    if model["ignore_merges"] == true && !makes_all(tokens, merges, &apart)? {
        return Err("it ignores merges".into());
    }
    let spaces = Spaces::read(tokenizer, &normalizers, &splits, notes)?;
    if let Some((a, b)) = merges
        .iter()
        .find(|(a, b)| !spaces.pieces.keep(&format!("{a}{b}")))
    {
        return Err(format!(
            "the merge '{a}' + '{b}' makes a token that its pre-tokenizer cuts"
        ));
    }
    spaces.only_spaces()?;
    let bytes = model["byte_fallback"] == true
        && has_all_bytes(tokens.iter().flatten().map(String::as_str));
    let plan = Plan {
        prefix: spaces.prefix,
        spaces: true,
        bytes,
        ..Plan::default()
    };
    let mut reason = "it has no byte tokens".to_string();
    if bytes {
        match scores_of_merges(tokens, merges, &apart) {
            Ok(scores) => {
                return Ok(Plan {
                    model: "llama",
                    scores: Some(scores),
                    ..plan
                });
            }
            Err(why) => reason = why,
        }
    }
    by_rank(plan, merges, &reason, notes)
}

/// BPE on text that merges by rank, for a tokenizer that no scores describe.
fn by_rank(
    plan: Plan,
    merges: &[(String, String)],
    reason: &str,
    notes: &mut Vec<String>,
) -> Result<Plan, String> {
    if plan.prefix {
        return Err(format!("it puts a space before the text, and {reason}"));
    }
    if merges
        .iter()
        .any(|(a, b)| a.contains('\n') || b.contains('\n'))
    {
        return Err(format!("it merges line feeds, and {reason}"));
    }
    if !plan.bytes {
        notes.push("llama.cpp drops characters that the tokenizer does not know".into());
    }
    Ok(Plan {
        model: "gpt2",
        pre: Some("sarvam-moe"),
        ..plan
    })
}

/// BPE on GPT-2's byte alphabet.
fn plan_byte_level(
    tokenizer: &Value,
    tokens: &[Option<String>],
    merges: &[(String, String)],
    notes: &mut Vec<String>,
) -> Result<Plan, String> {
    let unknown = || {
        format!(
            "{}, which cuts words as no pre-tokenizer of llama.cpp that this program knows",
            unknown_pre_tokenizer(tokenizer)
        )
    };
    let found: Vec<FoundStep> = found_steps(&pre_tokenizers(tokenizer)).ok_or_else(unknown)?;
    let digits = merges.iter().any(|(a, b)| is_digits(a) && is_digits(b));
    let same_words: Vec<_> = PRE
        .iter()
        .filter(|pre| match compare(&found, pre.steps) {
            Match::Same => true,
            Match::UnlessDigitsMerge => !digits,
            Match::No => false,
        })
        .collect();
    let Some(first) = same_words.first() else {
        return Err(unknown());
    };
    let ignore_merges = tokenizer["model"]["ignore_merges"] == true;
    let same = same_words
        .iter()
        .find(|pre| pre.ignore_merges == ignore_merges);
    let pre = match same {
        Some(pre) => pre,
        // No matter, if merges make each word that is a token.
        None if makes_all(tokens, merges, &added_ids(tokenizer))? => first,
        None if ignore_merges => {
            return Err(
                "it ignores merges, and no pre-tokenizer of llama.cpp with these words does".into(),
            );
        }
        None => {
            return Err(format!(
                "it merges where llama.cpp's pre-tokenizer '{}' takes words that are tokens",
                first.name()
            ));
        }
    };
    notes.extend(pre.differs.map(String::from));
    Ok(Plan {
        model: "gpt2",
        pre: Some(pre.name()),
        ..Plan::default()
    })
}

fn is_digits(token: &str) -> bool {
    !token.is_empty() && token.bytes().all(|b| b.is_ascii_digit())
}

pub(super) fn plan_unigram(
    tokenizer: &Value,
    tokens: &[Option<String>],
    notes: &mut Vec<String>,
) -> Result<Plan, String> {
    let normalizers = normalizers(tokenizer, notes);
    let splits = pre_tokenizers(tokenizer);
    let spaces = Spaces::read(tokenizer, &normalizers, &splits, notes)?;
    let apart = added_ids(tokenizer);
    let cut = tokens.iter().enumerate().find(|(id, token)| {
        let token = token.as_deref().unwrap_or_default();
        !apart.contains(id) && !spaces.pieces.keep(token)
    });
    if let Some((_, Some(token))) = cut {
        return Err(format!("its pre-tokenizer cuts its token '{token}'"));
    }
    if tokenizer["model"]["byte_fallback"] == true {
        notes.push(
            "llama.cpp takes the unknown token where this Unigram tokenizer takes bytes".into(),
        );
    }
    if spaces.charsmap.is_none() && spaces.collapse == Collapse::White {
        notes.push(
            "the tokenizer takes tabs and line feeds for spaces, llama.cpp does not without a \
             precompiled_charsmap"
                .into(),
        );
    }
    let mut more = vec![(
        key("remove_extra_whitespaces"),
        (spaces.collapse != Collapse::None).into(),
    )];
    if let Some(charsmap) = spaces.charsmap {
        more.push((key("precompiled_charsmap"), Array::U8(charsmap).into()));
    }
    Ok(Plan {
        model: "t5",
        prefix: spaces.prefix,
        spaces: true,
        bytes: true,
        more,
        ..Plan::default()
    })
}

pub(super) fn plan_wordpiece(tokenizer: &Value, notes: &mut Vec<String>) -> Result<Plan, String> {
    let model = &tokenizer["model"];
    if model["continuing_subword_prefix"] != "##" {
        return Err(format!(
            "its continuing_subword_prefix is {}",
            shown(model.get("continuing_subword_prefix"))
        ));
    }
    let pre_tokenizers = pre_tokenizers(tokenizer);
    if !matches!(pre_tokenizers.as_slice(), [one] if one["type"] == "BertPreTokenizer") {
        return Err(unknown_pre_tokenizer(tokenizer));
    }
    let normalizers = steps(tokenizer, "normalizer", "normalizers");
    let [normalizer] = normalizers.as_slice() else {
        return Err(format!(
            "its normalizer is {}",
            shown(tokenizer.get("normalizer"))
        ));
    };
    let plain = normalizer["type"] == "BertNormalizer"
        && normalizer["clean_text"] == true
        && normalizer["handle_chinese_chars"] == true;
    let Some(lowercase) = normalizer["lowercase"].as_bool().filter(|_| plain) else {
        return Err(format!("its normalizer has {}", shown(Some(normalizer))));
    };
    let strip = normalizer["strip_accents"].as_bool().unwrap_or(lowercase);
    if let Some(most) = model["max_input_chars_per_word"].as_u64() {
        notes.push(format!(
            "llama.cpp also cuts words of more than {most} characters, which are the unknown token \
             for this tokenizer"
        ));
    }
    if strip {
        notes.push(
            "llama.cpp strips more than accents from Korean and Indic scripts: such words get other \
             tokens"
                .into(),
        );
    }
    let mut more = vec![];
    if (lowercase, strip) != (true, true) {
        more.push((key("normalizer.lowercase"), lowercase.into()));
        more.push((key("normalizer.strip_accents"), strip.into()));
        notes.push(
            "llama.cpp before 2026 lowercases and strips accents, which this tokenizer does not"
                .into(),
        );
    }
    Ok(Plan {
        model: "bert",
        more,
        ..Plan::default()
    })
}

/// The pieces of a text within which a tokenizer with ▁ for a space merges.
#[derive(Clone, Copy)]
enum Pieces {
    /// The whole text.
    Text,
    /// Lines; line feeds stand apart.
    Lines,
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
            Self::Lines => !token.contains('\n') || token.chars().all(|c| c == '\n'),
            Self::Words => {
                let mut word = token.chars().skip_while(|&c| c == SPACE);
                word.all(|c| c != SPACE) && !token.contains('\n')
            }
            Self::Spaces => token.chars().skip(1).all(|c| c != SPACE),
        }
    }
}

/// Which white space a tokenizer reduces to one space between words.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Collapse {
    None,
    Spaces,
    White,
}

/// What a tokenizer that writes ▁ for a space does with spaces.
struct Spaces {
    /// A space before the text.
    prefix: bool,
    pieces: Pieces,
    collapse: Collapse,
    charsmap: Option<Vec<u8>>,
}

impl Spaces {
    fn read(
        tokenizer: &Value,
        normalizers: &[&Value],
        splits: &[&Value],
        notes: &mut Vec<String>,
    ) -> Result<Self, String> {
        let mut spaces = Self {
            prefix: false,
            pieces: Pieces::Text,
            collapse: Collapse::None,
            charsmap: None,
        };
        let mut replaced = false;
        let strips = normalizers.iter().any(|step| {
            step["type"] == "Strip" && step["strip_left"] == false && step["strip_right"] == true
        });
        for step in normalizers {
            let pattern = &step["pattern"];
            match step["type"].as_str() {
                Some("Prepend") if step["prepend"] == "▁" => spaces.prefix = true,
                Some("Replace") if pattern["String"] == " " && step["content"] == "▁" => {
                    replaced = true;
                }
                Some("Replace")
                    if pattern["Regex"] == RUNS
                        && (step["content"] == " " || step["content"] == "▁") =>
                {
                    spaces.collapse = Collapse::Spaces;
                    if !strips {
                        notes.push("llama.cpp drops spaces at the end of a text".into());
                    }
                }
                Some("Strip") if strips => {}
                Some("Precompiled") => spaces.charsmap = Some(charsmap(step)?),
                _ => return Err(format!("its normalizer has {}", shown(Some(step)))),
            }
        }
        for step in splits {
            match step["type"].as_str() {
                Some("WhitespaceSplit") => spaces.collapse = Collapse::White,
                Some("Metaspace") if step["replacement"] == "▁" => {
                    replaced = true;
                    spaces.metaspace(step, notes);
                }
                // Nothing to split on: there are no spaces any more.
                Some("Split") if replaced && step["pattern"]["String"] == " " => {}
                Some("Split") if replaced && step["behavior"] == "Isolated" => {
                    spaces.pieces = match step["pattern"]["Regex"].as_str() {
                        Some(BEFORE_SPACE) => Pieces::Words,
                        Some(LINES) => Pieces::Lines,
                        _ => return Err(unknown_pre_tokenizer(tokenizer)),
                    };
                }
                _ => return Err(unknown_pre_tokenizer(tokenizer)),
            }
        }
        if replaced {
            Ok(spaces)
        } else {
            Err("it neither works on bytes nor writes ▁ for a space".into())
        }
    }

    fn metaspace(&mut self, step: &Value, notes: &mut Vec<String>) {
        let scheme = step["prepend_scheme"].as_str();
        let adds = match scheme {
            Some(scheme) => scheme != "never",
            None => step["add_prefix_space"] != false,
        };
        if adds {
            self.prefix = true;
            if self.collapse == Collapse::None {
                notes.push(
                    "llama.cpp also puts a space before a text that begins with one, and after \
                     every special token; the tokenizer's Metaspace step does not"
                        .into(),
                );
            } else if scheme == Some("first") {
                notes.push(
                    "llama.cpp also puts a space before the text after a special token".into(),
                );
            }
        }
        if step["split"] != false {
            self.pieces = Pieces::Spaces;
        }
    }

    /// Rejects what only the `t5` kind of llama.cpp does.
    fn only_spaces(&self) -> Result<(), String> {
        if self.charsmap.is_some() {
            return Err("it normalizes with a precompiled_charsmap".into());
        }
        if self.collapse != Collapse::None {
            return Err("it drops spaces".into());
        }
        Ok(())
    }
}

/// The table of a `Precompiled` step.
fn charsmap(step: &Value) -> Result<Vec<u8>, String> {
    let text = step["precompiled_charsmap"].as_str();
    let bytes = text
        .and_then(charsmap::decode)
        .ok_or("its precompiled_charsmap is no base64")?;
    charsmap::check(&bytes)?;
    Ok(bytes)
}
