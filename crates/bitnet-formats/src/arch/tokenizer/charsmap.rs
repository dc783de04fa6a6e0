//! The table of a SentencePiece normalizer: base64 in a tokenizer.json, bytes in a GGUF.

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The bytes of a text in base64 with padding.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for (i, chunk) in text.chunks_exact(4).enumerate() {
        let padding = chunk.iter().rev().take_while(|c| **c == b'=').count();
        if padding > 2 || (padding > 0 && (i + 1) * 4 != text.len()) {
            return None;
        }
        let mut bits = 0u32;
        for c in &chunk[..4 - padding] {
            let digit = DIGITS.iter().position(|d| d == c)?;
            bits = bits << 6 | digit as u32;
        }
        bits <<= 6 * padding;
        bytes.extend(&bits.to_be_bytes()[1..4 - padding]);
    }
    Some(bytes)
}

/// Bytes in base64 with padding.
pub(super) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut padded = [0; 4];
        padded[1..=chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes(padded);
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63];
            text.push(if i <= chunk.len() { digit as char } else { '=' });
        }
    }
    text
}

/// Rejects a table that is shorter than it says: it begins with the number of bytes of its trie, and
/// replacements follow the trie.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let Some((size, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(format!(
            "precompiled_charsmap: expected at least 4 bytes, got {}",
            bytes.len()
        ));
    };
    let size = u32::from_le_bytes(*size);
    if size as usize >= rest.len() {
        return Err(format!(
            "precompiled_charsmap: expected a trie of less than {} bytes, got {size}",
            rest.len()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64() {
        // RFC 4648, section 10.
        for (plain, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(plain.as_bytes()), text);
            assert_eq!(decode(text).unwrap(), plain.as_bytes());
        }
        for bad in ["Zg", "Zg=a", "Z===", "Zg==Zg==", "Zm9~"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }

    #[test]
    fn tables_are_as_long_as_they_say() {
        assert_eq!(check(&[1, 0, 0, 0, 7, 0]), Ok(()));
        assert!(check(&[1, 0, 0]).unwrap_err().contains("got 3"));
        assert!(check(&[2, 0, 0, 0, 7, 0]).unwrap_err().contains("got 2"));
    }
}
