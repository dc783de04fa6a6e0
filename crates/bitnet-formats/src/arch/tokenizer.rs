//! Tokenizers: tokenizer.json of Hugging Face as keys of llama.cpp, and back for byte-level BPE.
//!
//! | tokenizer.json | `tokenizer.ggml.model` | `tokenizer.ggml.pre` |
//! |---|---|---|
//! | BPE on GPT-2's byte alphabet | `gpt2` | by the pre-tokenizer: see [`PRE`] |
//! | BPE on text with ▁ for a space and 256 byte tokens | `llama` | none |
//! | BPE on text with ▁ for a space, no byte tokens | `gpt2` | `sarvam-moe`, which merges by rank on characters |
//! | Unigram | `t5`, which searches the likeliest pieces and knows no byte tokens | none |
//! | anything else, or none | `none` | none |

use super::keys::GgufKeys;
use super::values::{find, shown};
use crate::gguf::{self, Array};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// The splits of Llama 3 and of Qwen 2, and of the models that took them over.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How byte-level BPE cuts a text into words before it merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    /// GPT-2's rule, which is part of the `ByteLevel` step.
    Gpt2,
    /// Single digits, then GPT-2's rule.
    DigitsGpt2,
    /// A regular expression.
    Regex(&'static str),
}

/// `tokenizer.ggml.pre`, the words it means, and whether a word that is a token is taken without
/// merging (`ignore_merges`).
const PRE: [(&str, Words, bool); 5] = [
    ("gpt-2", Words::Gpt2, false),
    ("smollm", Words::DigitsGpt2, false),
    ("llama-bpe", Words::Regex(LLAMA3), true),
    ("smaug-bpe", Words::Regex(LLAMA3), false),
    ("qwen2", Words::Regex(QWEN2), false),
];

/// Splits on text with ▁ for a space that only ever cut before a ▁ or around a line feed.
const BEFORE_SPACE: &str = r"\n|▁*[^▁\n]+|▁+";
const SPACE: char = '▁';

/// Values of `tokenizer.ggml.token_type`.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
    pub(super) const BYTE: i32 = 6;
}

type Pairs = Vec<(String, gguf::Value)>;

/// The tokenizer's keys. What cannot be expressed becomes `none` and a note.
pub(super) fn gguf_tokenizer(
    folder: &Path,
    config: &Value,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> Result<Pairs> {
    let none = || vec![("tokenizer.ggml.model".into(), "none".into())];
    let lost = "the file has no tokenizer, so programs must give and take token ids";
    let settings = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_else(|| json!({}));
    let path = folder.join("tokenizer.json");
    let Some(tokenizer) = read_json(&path)? else {
        notes.push(format!("there is no tokenizer.json: {lost}"));
        return Ok(none());
    };
    let template = match fs::read_to_string(folder.join("chat_template.jinja")) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(Error::io(&folder.join("chat_template.jinja"), "read")(e)),
    };
    match express(&tokenizer, &settings, config, vocab_size) {
        Ok((mut pairs, said)) => {
            notes.extend(said);
            if let Some(template) = template.or_else(|| chat_template(&settings)) {
                pairs.push(("tokenizer.chat_template".into(), template.into()));
            }
            Ok(pairs)
        }
        Err(reason) => {
            notes.push(format!(
                "tokenizer.json cannot be expressed ({reason}): {lost}"
            ));
            Ok(none())
        }
    }
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::file(path, "JSON", e.to_string())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, "read")(e)),
    }
}

fn chat_template(settings: &Value) -> Option<String> {
    match settings.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default")?;
            default["template"].as_str().map(Into::into)
        }
        _ => None,
    }
}

/// What a tokenizer is in llama.cpp's terms.
struct Plan {
    model: &'static str,
    pre: Option<&'static str>,
    /// A space before the text.
    prefix: bool,
    /// Whether tokens write ▁ for a space.
    spaces: bool,
}

/// The keys and notes, or the reason why there are none.
fn express(
    tokenizer: &Value,
    settings: &Value,
    config: &Value,
    vocab_size: usize,
) -> Result<(Pairs, Vec<String>), String> {
    let model = &tokenizer["model"];
    let mut notes = vec![];
    let merges = merges(model)?;
    let (mut tokens, mut scores) = vocabulary(model, vocab_size)?;
    let plan = match model["type"].as_str() {
        Some("BPE") => plan_bpe(tokenizer, &tokens, &merges, &mut notes)?,
        Some("Unigram") => plan_unigram(tokenizer, &mut notes)?,
        _ => return Err(format!("its model is {}", shown(model.get("type")))),
    };

    let mut types: Vec<i32> = tokens
        .iter()
        .map(|t| {
            if t.is_some() {
                kind::NORMAL
            } else {
                kind::UNUSED
            }
        })
        .collect();
    if plan.model == "llama" || plan.model == "t5" {
        for (token, kind) in tokens.iter().zip(&mut types) {
            if token.as_deref().and_then(byte_token).is_some() {
                *kind = kind::BYTE;
            }
        }
    }
    let unknown = match model["unk_id"].as_u64() {
        Some(id) => Some(id as usize),
        None => model["unk_token"]
            .as_str()
            .and_then(|text| tokens.iter().position(|t| t.as_deref() == Some(text))),
    };
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let (Some(id), Some(text)) = (added["id"].as_u64(), added["content"].as_str()) else {
            return Err(format!("an added token is {}", shown(Some(added))));
        };
        let id = id as usize;
        let Some(slot) = tokens.get_mut(id) else {
            return Err(format!(
                "token '{text}' has id {id}, but the embedding has {vocab_size} rows"
            ));
        };
        let special = added["special"].as_bool().unwrap_or(false);
        if ["lstrip", "rstrip", "single_word"]
            .iter()
            .any(|flag| added[*flag] == true)
        {
            notes.push(format!("token '{text}' takes the spaces beside it or stands as a single word only: llama.cpp does not"));
        }
        // Added tokens are looked for in the text as it came, with spaces.
        *slot = Some(if special || !plan.spaces {
            text.into()
        } else {
            text.replace(SPACE, " ")
        });
        types[id] = if special {
            kind::CONTROL
        } else {
            kind::USER_DEFINED
        };
    }
    if let Some(kind) = unknown
        .and_then(|id| types.get_mut(id))
        .filter(|_| plan.spaces)
    {
        *kind = kind::UNKNOWN;
    }
    let unused = tokens.iter().filter(|t| t.is_none()).count();
    if unused > 0 {
        notes.push(format!(
            "{unused} rows of the embedding have no token; they are named [PAD…]"
        ));
    }
    let tokens: Vec<String> = tokens
        .into_iter()
        .enumerate()
        .map(|(i, t)| t.unwrap_or_else(|| format!("[PAD{i}]")))
        .collect();
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if ids.insert(token.as_str(), id).is_some() {
            return Err(format!("token '{token}' is there twice"));
        }
    }

    if plan.model == "llama" && scores.is_none() {
        scores = Some(scores_of_merges(&tokens, &merges));
    }
    let id_of = |name: &str| special_id(settings, config, name, &ids);
    let (bos, eos) = (id_of("bos"), id_of("eos"));
    let mut pairs: Pairs = vec![("tokenizer.ggml.model".into(), plan.model.into())];
    let mut put =
        |key: &str, value: gguf::Value| pairs.push((format!("tokenizer.ggml.{key}"), value));
    if let Some(pre) = plan.pre {
        put("pre", pre.into());
    }
    for (key, id) in [
        ("bos_token_id", bos),
        ("eos_token_id", eos),
        ("padding_token_id", id_of("pad")),
    ] {
        if let Some(id) = id {
            put(key, gguf::Value::U32(id as u32));
        }
    }
    if let Some(id) = unknown.or_else(|| id_of("unk")) {
        put("unknown_token_id", gguf::Value::U32(id as u32));
    }
    if eos.is_none() {
        notes.push(
            "there is no end-of-text token: llama.cpp takes a token of its own choice for it"
                .into(),
        );
    }
    for (key, side, id) in [
        ("add_bos_token", Side::Start, bos),
        ("add_eos_token", Side::End, eos),
    ] {
        let adds = adds(
            tokenizer,
            settings,
            side,
            id.and_then(|id| tokens.get(id)).map(String::as_str),
        )?;
        put(key, adds.into());
    }
    put("add_space_prefix", plan.prefix.into());
    if let Some(scores) = scores {
        put("scores", Array::F32(scores).into());
    }
    put("token_type", Array::I32(types).into());
    put("tokens", Array::String(tokens).into());
    if plan.model == "gpt2" {
        put(
            "merges",
            Array::String(
                merges
                    .into_iter()
                    .map(|(a, b)| format!("{a} {b}"))
                    .collect(),
            )
            .into(),
        );
    }
    Ok((pairs, notes))
}

/// The merges in the order of their rank: `"a b"`, or `["a", "b"]` in newer files.
fn merges(model: &Value) -> Result<Vec<(String, String)>, String> {
    let list = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    list.iter()
        .map(|merge| {
            let pair = match merge {
                Value::String(s) => s.split_once(' '),
                Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
                _ => None,
            };
            let pair = pair.filter(|(a, b)| {
                !a.is_empty() && !b.is_empty() && !a.contains(' ') && !b.contains(' ')
            });
            pair.map(|(a, b)| (a.into(), b.into()))
                .ok_or_else(|| format!("a merge is {}", shown(Some(merge))))
        })
        .collect()
}

/// The model's own tokens by id, and the scores of a Unigram model.
#[allow(clippy::type_complexity, reason = "two columns of one table")]
fn vocabulary(
    model: &Value,
    vocab_size: usize,
) -> Result<(Vec<Option<String>>, Option<Vec<f32>>), String> {
    let mut tokens = vec![None; vocab_size];
    let outside = |token: &str, id: usize| {
        format!("token '{token}' has id {id}, but the embedding has {vocab_size} rows")
    };
    match &model["vocab"] {
        Value::Object(vocab) => {
            for (token, id) in vocab {
                let id = id
                    .as_u64()
                    .ok_or_else(|| format!("token '{token}' has id {id}"))?
                    as usize;
                *tokens.get_mut(id).ok_or_else(|| outside(token, id))? = Some(token.clone());
            }
            Ok((tokens, None))
        }
        Value::Array(vocab) => {
            let mut scores = vec![0.0; vocab_size];
            for (id, entry) in vocab.iter().enumerate() {
                let (Some(token), Some(score)) = (entry[0].as_str(), entry[1].as_f64()) else {
                    return Err(format!(
                        "an entry of its vocabulary is {}",
                        shown(Some(entry))
                    ));
                };
                *tokens.get_mut(id).ok_or_else(|| outside(token, id))? = Some(token.into());
                scores[id] = score as f32;
            }
            Ok((tokens, Some(scores)))
        }
        other => Err(format!("its vocabulary is {}", shown(Some(other)))),
    }
}

/// SentencePiece's convention: a token's score is minus the rank of the first merge that makes it.
/// llama.cpp joins the neighbours of the highest score first, so tokens that no merge makes come
/// last.
fn scores_of_merges(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut rank = HashMap::with_capacity(merges.len());
    for (i, (a, b)) in merges.iter().enumerate() {
        rank.entry(format!("{a}{b}")).or_insert(i);
    }
    tokens
        .iter()
        .enumerate()
        .map(|(id, t)| -(rank.get(t).copied().unwrap_or(merges.len() + id) as f32))
        .collect()
}

/// The byte of a token such as `<0x0A>`.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token
        .strip_prefix("<0x")?
        .strip_suffix('>')
        .filter(|h| h.len() == 2)?;
    u8::from_str_radix(hex, 16).ok()
}

fn has_all_bytes(tokens: &[Option<String>]) -> bool {
    tokens
        .iter()
        .flatten()
        .filter_map(|t| byte_token(t))
        .collect::<HashSet<u8>>()
        .len()
        == 256
}

/// The steps of a normalizer or pre-tokenizer: those of a `Sequence`, or the one.
fn steps<'a>(tokenizer: &'a Value, part: &str, inner: &str) -> Vec<&'a Value> {
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
            notes.push(format!("the tokenizer normalizes text to {form}, llama.cpp does not: text in another form gets other tokens"));
            false
        }
        _ => true,
    });
    rest
}

fn plan_bpe(
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
        if let Some(step) = normalizers.first() {
            return Err(format!("its normalizer has {}", shown(Some(step))));
        }
        let words = words(&splits).ok_or_else(|| {
            format!(
                "its pre-tokenizer is {}",
                shown(tokenizer.get("pre_tokenizer"))
            )
        })?;
        let pre = PRE
            .iter()
            .find(|(_, w, ignore)| (*w, *ignore) == (words, ignore_merges));
        let (pre, ..) = pre
            .ok_or("it ignores merges, and no pre-tokenizer of llama.cpp with these words does")?;
        return Ok(Plan {
            model: "gpt2",
            pre: Some(pre),
            prefix: false,
            spaces: false,
        });
    }
    if ignore_merges {
        return Err("it ignores merges".into());
    }
    let (prefix, pieces) = spaces(tokenizer, &normalizers, &splits, notes)?;
    let whole = |token: &str| match pieces {
        Pieces::Text => true,
        Pieces::Words => {
            token
                .chars()
                .skip_while(|&c| c == SPACE)
                .all(|c| c != SPACE)
                && !token.contains('\n')
        }
        Pieces::Spaces => token.chars().skip(1).all(|c| c != SPACE),
    };
    if let Some((a, b)) = merges.iter().find(|(a, b)| !whole(&format!("{a}{b}"))) {
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
    notes.push("llama.cpp leaves out characters that the tokenizer does not know".into());
    Ok(Plan {
        model: "gpt2",
        pre: Some("sarvam-moe"),
        prefix: false,
        spaces: true,
    })
}

fn plan_unigram(tokenizer: &Value, notes: &mut Vec<String>) -> Result<Plan, String> {
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

/// What a tokenizer with ▁ for a space merges within.
#[derive(Clone, Copy)]
enum Pieces {
    /// The whole text.
    Text,
    /// Words with all spaces before them; line feeds stand alone.
    Words,
    /// Words with one space before them.
    Spaces,
}

/// Whether a space goes before the text, and what is merged, for a tokenizer that writes ▁ for a
/// space.
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
                    notes.push("llama.cpp also puts a space before a text that begins with one, and after every special token; the tokenizer's Metaspace step does not".into());
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

/// The id of a special token: by its text in tokenizer_config.json, else by number in config.json.
fn special_id(
    settings: &Value,
    config: &Value,
    name: &str,
    ids: &HashMap<&str, usize>,
) -> Option<usize> {
    let token = &settings[format!("{name}_token")];
    let text = token.as_str().or_else(|| token["content"].as_str());
    if let Some(&id) = text.and_then(|text| ids.get(text)) {
        return Some(id);
    }
    let id = &config[format!("{name}_token_id")];
    let id = id.as_u64().or_else(|| id[0].as_u64())? as usize;
    (id < ids.len()).then_some(id)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Start,
    End,
}

/// Whether the tokenizer puts `token` at this side of every text. A template decides where there is
/// one, as it does in `tokenizers`.
fn adds(
    tokenizer: &Value,
    settings: &Value,
    side: Side,
    token: Option<&str>,
) -> Result<bool, String> {
    let processors = steps(tokenizer, "post_processor", "processors");
    for step in &processors {
        match step["type"].as_str() {
            Some("ByteLevel") => {}
            Some("TemplateProcessing") => {
                let single = step["single"].as_array().map_or(&[][..], Vec::as_slice);
                let at = single
                    .iter()
                    .position(|item| item.get("Sequence").is_some())
                    .ok_or("its template has no text")?;
                let around = if side == Side::Start {
                    &single[..at]
                } else {
                    &single[at + 1..]
                };
                return match around {
                    [] => Ok(false),
                    [one] if token.is_some() && one["SpecialToken"]["id"].as_str() == token => {
                        Ok(true)
                    }
                    _ => Err(format!(
                        "its template puts {} beside the text",
                        shown(Some(&json!(around)))
                    )),
                };
            }
            _ => return Err(format!("its post-processor has {}", shown(Some(step)))),
        }
    }
    let key = if side == Side::Start {
        "add_bos_token"
    } else {
        "add_eos_token"
    };
    Ok(token.is_some() && settings[key] == true)
}

/// Byte-level BPE of a GGUF, in the terms of Hugging Face.
#[derive(Debug)]
pub struct GgufTokenizer<'a> {
    /// tokenizer.json, with no vocabulary and no merges in its model.
    pub frame: Value,
    /// tokenizer_config.json.
    pub settings: Value,
    /// Names of all token ids, those of unused ones too.
    pub tokens: &'a [String],
    types: &'a [i32],
    merges: &'a [String],
}

impl<'a> GgufTokenizer<'a> {
    /// The model's vocabulary: unused tokens are not in it.
    pub fn vocabulary(&self) -> impl Iterator<Item = (&'a str, usize)> {
        let tokens = self.tokens.iter().zip(self.types).enumerate();
        tokens
            .filter(|(_, (_, kind))| **kind != kind::UNUSED)
            .map(|(id, (token, _))| (token.as_str(), id))
    }

    /// The merges by rank.
    pub fn merges(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.merges.iter().filter_map(|m| m.split_once(' '))
    }
}

/// tokenizer.json and tokenizer_config.json of a GGUF with byte-level BPE; `None` for other
/// tokenizers, and for words that are not known here.
pub fn hf_tokenizer(metadata: &[(String, gguf::Value)]) -> Option<(Value, Value)> {
    let tokenizer = gguf_bpe(metadata)?;
    let vocab: Map<String, Value> = tokenizer
        .vocabulary()
        .map(|(token, id)| (token.into(), id.into()))
        .collect();
    let merges: Vec<Value> = tokenizer.merges().map(|(a, b)| json!([a, b])).collect();
    let GgufTokenizer {
        mut frame,
        settings,
        ..
    } = tokenizer;
    (frame["model"]["vocab"], frame["model"]["merges"]) = (vocab.into(), merges.into());
    Some((frame, settings))
}

/// The tokenizer of a GGUF with byte-level BPE, its large lists left where they are; `None` as for
/// [`hf_tokenizer`].
pub fn gguf_bpe(metadata: &[(String, gguf::Value)]) -> Option<GgufTokenizer<'_>> {
    let get = |key: &str| find(metadata, &format!("tokenizer.ggml.{key}"));
    if get("model")?.as_str()? != "gpt2" {
        return None;
    }
    let pre = get("pre")?.as_str()?;
    let (_, words, ignore_merges) = PRE.into_iter().find(|(name, ..)| *name == pre)?;
    let tokens = get("tokens")?.as_strings()?;
    let types = match get("token_type")?.as_array()? {
        Array::I32(types) if types.len() == tokens.len() => types,
        _ => return None,
    };
    let merges = get("merges")?.as_strings()?;
    if merges.iter().any(|m| !m.contains(' ')) {
        return None;
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let pre_tokenizer = match words {
        Words::Gpt2 => byte_level.clone(),
        Words::DigitsGpt2 => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level]})
        }
        Words::Regex(regex) => {
            let mut bytes = byte_level.clone();
            bytes["use_regex"] = false.into();
            let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, bytes]})
        }
    };
    let mut added = vec![];
    for (id, (token, &kind)) in tokens.iter().zip(types).enumerate() {
        if matches!(kind, kind::CONTROL | kind::USER_DEFINED | kind::UNKNOWN) {
            let special = kind != kind::USER_DEFINED;
            added.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special}));
        }
    }
    let token_of = |key: &str| {
        get(key)
            .and_then(gguf::Value::as_u64)
            .and_then(|id| tokens.get(id as usize).map(|t| (t, id)))
    };
    let flag =
        |key: &str, default: bool| get(key).and_then(gguf::Value::as_bool).unwrap_or(default);
    // Without the key llama.cpp adds the token to texts of llama-bpe.
    let (add_bos, add_eos) = (
        flag("add_bos_token", pre == "llama-bpe"),
        flag("add_eos_token", false),
    );
    let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut specials = Map::new();
    for (adds, key, at) in [
        (add_bos, "bos_token_id", 0),
        (add_eos, "eos_token_id", usize::MAX),
    ] {
        if let Some((token, id)) = token_of(key).filter(|_| adds) {
            single.insert(
                at.min(single.len()),
                json!({"SpecialToken": {"id": token, "type_id": 0}}),
            );
            specials.insert(
                token.clone(),
                json!({"id": token, "ids": [id], "tokens": [token]}),
            );
        }
    }
    let byte_level_after = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let post_processor = if specials.is_empty() {
        byte_level_after.clone()
    } else {
        let mut pair = single.clone();
        pair.extend(single.iter().map(|item| {
            let mut item = item.clone();
            for part in ["Sequence", "SpecialToken"] {
                if let Some(part_of_item) = item.get_mut(part) {
                    part_of_item["type_id"] = 1.into();
                    if part == "Sequence" {
                        part_of_item["id"] = "B".into();
                    }
                }
            }
            item
        }));
        let template = json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": specials});
        json!({"type": "Sequence", "processors": [byte_level_after, template]})
    };
    let frame = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": byte_level_after,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": ignore_merges,
            "vocab": {},
            "merges": [],
        },
    });
    let mut settings = json!({
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": false,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    let names = [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ];
    for (name, key) in names {
        if let Some((token, _)) = token_of(key) {
            settings[name] = token.as_str().into();
        }
    }
    if let Some(template) = find(metadata, "tokenizer.chat_template").and_then(gguf::Value::as_str)
    {
        settings["chat_template"] = template.into();
    }
    if let Some(length) = GgufKeys::new(Path::new("GGUF metadata"), metadata)
        .ok()
        .and_then(|k| k.size("context_length").ok())
    {
        settings["model_max_length"] = length.into();
    }
    Some(GgufTokenizer {
        frame,
        settings,
        tokens,
        types,
        merges,
    })
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
