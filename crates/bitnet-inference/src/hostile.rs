//! Bounds on what a tokenizer.json can make the `tokenizers` crate do: it panics on some files, and
//! trusts sizes that they name.

use serde_json::Value;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

/// How many times longer a normalizer may make a text.
const MAX_GROWTH: usize = 4096;

thread_local! {
    /// Whether a panic of this thread is caught and becomes an error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs a function of another crate. A panic is an error with the panic's message, and prints
/// nothing.
pub(crate) fn without_panic<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                before(info);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    CAUGHT.set(outer);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        format!(
            "the file makes the tokenizers library fail: {}",
            text.unwrap_or("it gives no reason").replace('\n', " ")
        )
    })
}

/// [`check_tables`] of the text of a tokenizer.json.
pub(crate) fn check_text(text: &str) -> Result<(), String> {
    // A name can be escaped.
    if !text.contains("charsmap") && !text.contains("\\u00") {
        return Ok(());
    }
    match serde_json::from_str::<Value>(text) {
        Ok(value) => check_tables(&value["normalizer"]),
        // The parser of the tokenizer says it better.
        Err(_) => Ok(()),
    }
}

/// Rejects a table of a sentence-piece normalizer that names more entries than it has: they would
/// be allocated.
pub(crate) fn check_tables(value: &Value) -> Result<(), String> {
    match value {
        Value::Array(items) => items.iter().try_for_each(check_tables),
        Value::Object(map) => map.iter().try_for_each(|(key, value)| {
            match value.as_str().filter(|_| key == "precompiled_charsmap") {
                Some(table) => check_size(table),
                None => check_tables(value),
            }
        }),
        _ => Ok(()),
    }
}

/// A table in base64 begins with the number of bytes of its trie.
fn check_size(table: &str) -> Result<(), String> {
    let bits = table.bytes().take(6).try_fold(0u64, |bits, c| {
        let digit = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        Some(bits << 6 | u64::from(digit))
    });
    let length = table.len() / 4 * 3;
    let size = bits.map(|bits| u32::swap_bytes((bits >> 4) as u32));
    match size {
        Some(size) if table.len() >= 8 && size as usize <= length => Ok(()),
        Some(size) => Err(format!(
            "precompiled_charsmap: expected a trie of at most {length} bytes, got {size}"
        )),
        None => Err("precompiled_charsmap: expected base64".into()),
    }
}

/// Rejects a normalizer that matches nothing, or that makes a text many times longer.
pub(crate) fn check_growth(normalizer: &Value) -> Result<(), String> {
    let growth = growth(normalizer)?;
    if growth > MAX_GROWTH {
        return Err(format!(
            "normalizer: expected one that makes a text at most {MAX_GROWTH} times longer, got \
             {growth}"
        ));
    }
    Ok(())
}

fn growth(normalizer: &Value) -> Result<usize, String> {
    if let Some(all) = normalizer["normalizers"].as_array() {
        return all
            .iter()
            .try_fold(1usize, |product, n| Ok(product.saturating_mul(growth(n)?)));
    }
    let pattern = &normalizer["pattern"];
    let shortest = match (pattern["String"].as_str(), pattern["Regex"].as_str()) {
        (Some(""), _) | (_, Some("")) => {
            return Err("normalizer: expected a pattern to replace, got an empty one".into());
        }
        (Some(text), _) => text.len(),
        _ => 1,
    };
    let content = normalizer["content"].as_str().unwrap_or_default();
    Ok(content.len().div_ceil(shortest).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_panic_is_an_error() {
        let result = without_panic(|| [1, 2].get(2).copied().expect("no third"));
        assert!(result.unwrap_err().ends_with("no third"));
        assert_eq!(without_panic(|| 3), Ok(3));
    }

    #[test]
    fn tables_and_growth_are_bounded() {
        let table = |text: &str| {
            let charsmap = json!({"type": "Precompiled", "precompiled_charsmap": text});
            let all = json!({"normalizer": {"normalizers": [charsmap]}});
            check_text(&all.to_string())
        };
        // 4 bytes of trie in 9, and 0xffffffff.
        assert_eq!(table("BAAAAAAAAAAA"), Ok(()));
        assert!(table("/////w==").unwrap_err().contains("4294967295"));
        assert!(table("BA").is_err() && table("~AAAAAAA").is_err());
        let replace = |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
        assert_eq!(check_growth(&replace(" ", "▁")), Ok(()));
        assert_eq!(check_growth(&Value::Null), Ok(()));
        assert!(
            check_growth(&replace("", "b"))
                .unwrap_err()
                .contains("empty")
        );
        let doubled = vec![replace("a", "aa"); 40];
        let message = check_growth(&json!({"normalizers": doubled})).unwrap_err();
        assert!(message.contains("at most 4096 times longer"), "{message}");
    }
}
