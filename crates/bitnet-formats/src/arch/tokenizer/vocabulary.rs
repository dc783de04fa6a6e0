//! Tokens, merges and scores of a tokenizer.json.

use crate::arch::values::shown;
use serde_json::Value;
use std::collections::HashSet;

/// The merges in the order of their rank: `"a b"`, or `["a", "b"]` in newer files.
pub(super) fn merges(model: &Value) -> Result<Vec<(String, String)>, String> {
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

/// The reason against a token behind the last row.
pub(super) fn outside(token: &str, id: usize, vocab_size: usize) -> String {
    format!("token '{token}' has id {id}, but the embedding has {vocab_size} rows")
}

/// The model's own tokens by id, and the scores of a Unigram model.
#[allow(clippy::type_complexity, reason = "two columns of one table")]
pub(super) fn vocabulary(
    model: &Value,
    vocab_size: usize,
) -> Result<(Vec<Option<String>>, Option<Vec<f32>>), String> {
    let mut tokens = vec![None; vocab_size];
    match &model["vocab"] {
        Value::Object(vocab) => {
            for (token, id) in vocab {
                let id = id
                    .as_u64()
                    .ok_or_else(|| format!("token '{token}' has id {id}"))?
                    as usize;
                *tokens
                    .get_mut(id)
                    .ok_or_else(|| outside(token, id, vocab_size))? = Some(token.clone());
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
                *tokens
                    .get_mut(id)
                    .ok_or_else(|| outside(token, id, vocab_size))? = Some(token.into());
                scores[id] = score as f32;
            }
            Ok((tokens, Some(scores)))
        }
        other => Err(format!("its vocabulary is {}", shown(Some(other)))),
    }
}

/// Ids of the tokens that are looked for in a text before it is cut.
pub(super) fn added_ids(tokenizer: &Value) -> HashSet<usize> {
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    added
        .filter_map(|token| Some(token["id"].as_u64()? as usize))
        .collect()
}

/// The byte of a token such as `<0x0A>`.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let hex = token
        .strip_prefix("<0x")?
        .strip_suffix('>')
        .filter(|h| h.len() == 2)?;
    u8::from_str_radix(hex, 16).ok()
}

pub(super) fn has_all_bytes<'a>(tokens: impl Iterator<Item = &'a str>) -> bool {
    tokens.filter_map(byte_token).collect::<HashSet<u8>>().len() == 256
}
