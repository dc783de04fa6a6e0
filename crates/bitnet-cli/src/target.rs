//! What `--out` names: the container by its ending, and endings that no container has.

use anyhow::bail;
use bitnet_checkpoint::recipe::Format;
use std::path::{MAIN_SEPARATOR, Path};

/// The container to write: the one of the flag, or by the ending of the output's name.
///
/// # Errors
/// For a file with an ending that no container has.
pub(crate) fn format(flag: Option<Format>, out: &Path) -> anyhow::Result<Format> {
    if let Some("onnx") = unknown_ending(out) {
        bail!(
            "--out {}: ONNX is a folder with model.onnx and its weights: --format onnx --out {}",
            out.display(),
            out.with_extension("").display()
        );
    }
    if let Some(ending) = unknown_ending(out) {
        bail!(
            "--out {}: unknown ending .{ending}; a file ends in .safetensors or .gguf, a folder \
             has no ending, or a slash after its name",
            out.display()
        );
    }
    let gguf = out.extension().is_some_and(|e| e == "gguf");
    Ok(flag.unwrap_or(if gguf {
        Format::Gguf
    } else {
        Format::Safetensors
    }))
}

/// The ending of a name that looks like a file's and is none of those that are written. What begins
/// with a digit, or holds anything but letters and digits, is part of a folder's name:
/// `model-1.5b`, `qwen2.5-tern`.
fn unknown_ending(out: &Path) -> Option<&str> {
    let ending = out.extension()?.to_str()?;
    let known = matches!(ending, "safetensors" | "gguf");
    let a_file = ending.starts_with(|c: char| c.is_ascii_alphabetic())
        && ending.chars().all(|c| c.is_ascii_alphanumeric());
    let text = out.as_os_str().to_string_lossy();
    let a_folder = text.ends_with(MAIN_SEPARATOR) || text.ends_with('/') || out.is_dir();
    (a_file && !known && !a_folder).then_some(ending)
}
