//! How a generation ended and how fast it was, for people and for programs.

use bitnet_inference::{Finish, Timings};
use serde_json::{Value, json};

/// The reason that generation ended, for programs.
pub(crate) fn finish_name(finish: Option<Finish>) -> &'static str {
    match finish {
        Some(Finish::EndOfText) => "end_of_text",
        Some(Finish::Stop) => "stop",
        Some(Finish::MaxTokens) => "max_tokens",
        Some(Finish::Context) => "context",
        None => "interrupted",
    }
}

/// Speeds in one line.
pub(crate) fn speed(timings: &Timings) -> String {
    let (prompt, decoded) = (timings.prompt_tokens, timings.decoded_tokens);
    format!(
        "prompt {prompt} tokens, {:.1} tokens/s; decode {decoded} tokens, {:.1} tokens/s",
        timings.prompt_speed(),
        timings.decode_speed()
    )
}

/// Speeds for programs.
pub(crate) fn speed_json(timings: &Timings) -> Value {
    json!({
        "prompt_tokens": timings.prompt_tokens,
        "prompt_seconds": timings.prompt.as_secs_f64(),
        "decoded_tokens": timings.decoded_tokens,
        "decode_seconds": timings.decode.as_secs_f64(),
    })
}
