//! JSON as Python writes it: with `NaN`, `Infinity` and `-Infinity`, which JSON does not have.

use crate::{Error, Result, hints};
use serde_json::Value;
use std::path::Path;

/// First character of the string that stands for such a number in a [`Value`]. No text has it: it
/// is no character of Unicode.
const MARK: char = '\u{fdd0}';

const WORDS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Parses a JSON file that Python may have written. `NaN`, `Infinity` and `-Infinity` become
/// values that are no numbers, so that a reader of such a key refuses it; [`to_text`] writes them
/// as they were.
///
/// # Errors
/// [`Error::File`] for anything else that is not JSON, with what the file is if that shows.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Value> {
    let error = match serde_json::from_slice(bytes) {
        Ok(value) => return Ok(value),
        Err(error) => error,
    };
    if let Some(text) = marked(bytes)
        && let Ok(value) = serde_json::from_str(&text)
    {
        return Ok(value);
    }
    let got = hints::file_content(bytes).map_or_else(|| error.to_string(), str::to_string);
    Err(Error::file(path, "JSON", got))
}

/// A value of [`parse`] as JSON over several lines, with the numbers that JSON does not have.
pub fn to_text(value: &Value) -> String {
    unmarked(&serde_json::to_string_pretty(value).unwrap_or_default())
}

/// Turns the strings for such numbers into the words that Python writes.
pub(crate) fn unmarked(json: &str) -> String {
    if !json.contains(MARK) {
        return json.into();
    }
    let mut text = json.to_string();
    for word in WORDS {
        text = text.replace(&format!("\"{MARK}{word}\""), word);
    }
    text
}

/// The text with a string in place of each such number; `None` if there is none.
fn marked(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut out = String::with_capacity(text.len() + 64);
    let (mut rest, mut in_string, mut found) = (text, false, false);
    while let Some(c) = rest.chars().next() {
        let word = WORDS.iter().find(|word| rest.starts_with(**word));
        if let Some(word) = word.filter(|_| !in_string) {
            out.extend(['"', MARK]);
            out.push_str(word);
            out.push('"');
            rest = &rest[word.len()..];
            found = true;
            continue;
        }
        let mut len = c.len_utf8();
        match c {
            '"' => in_string = !in_string,
            '\\' if in_string => {
                len += rest[1..].chars().next().map_or(0, char::len_utf8);
            }
            _ => {}
        }
        out.push_str(&rest[..len]);
        rest = &rest[len..];
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Value> {
        parse(Path::new("config.json"), text.as_bytes())
    }

    #[test]
    fn numbers_that_python_writes_go_round() {
        let text =
            r#"{"a": [0.5, Infinity, -Infinity], "b": NaN, "é\"NaN": "Infinity, \\", "c": 1}"#;
        let value = read(text).unwrap();
        assert_eq!(value["é\"NaN"], "Infinity, \\");
        assert_eq!(value["c"], 1);
        assert!(value["b"].as_f64().is_none() && value["a"][1].as_f64().is_none());
        let written = to_text(&value);
        let compact: String = written.split_whitespace().collect();
        assert!(
            compact.contains(r#""a":[0.5,Infinity,-Infinity],"b":NaN,"#),
            "{written}"
        );
        assert_eq!(read(&written).unwrap(), value);
    }

    #[test]
    fn other_text_is_refused_and_named() {
        for (text, got) in [
            ("{\"a\": NaNs}", "expected"),
            ("{\"a\": infinity}", "expected value"),
            ("\u{feff}{}", "expected value"),
            (
                "version https://git-lfs.github.com/spec/v1\noid sha256:0",
                "git lfs pull",
            ),
            ("  <!DOCTYPE html>", "an HTML page"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(
                message.contains("JSON") && message.contains(got),
                "{message}"
            );
        }
    }
}
