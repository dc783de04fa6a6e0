//! `bitnet run`: generates text from a prompt.

use crate::args::model::{RunArgs, read_tools};
use crate::generation::{finish_name, speed, speed_json};
use crate::print::{Answer, Output, note, stderr_line, without_bom};
use crate::progress::interrupt;
use anyhow::Context;
use bitnet_inference::{ChatMessage, Error, Finish};
use serde_json::json;
use std::io::Read;
use std::sync::atomic::Ordering;

pub(crate) fn run(args: &RunArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let options = args.generate.options()?;
    let prompt = match &args.prompt {
        Some(text) => text.clone(),
        None => {
            let mut text = String::new();
            std::io::stdin()
                .lock()
                .read_to_string(&mut text)
                .context("cannot read the prompt from stdin")?;
            without_bom(text, "stdin")
        }
    };
    let tools = args.tools.as_deref().map(read_tools).transpose()?;
    let model = args.load.load(&args.model, &args.quiet)?;
    let tokens = if args.chat {
        model.chat_tokens_with(&[ChatMessage::new("user", prompt)], tools.as_ref())?
    } else {
        args.load.encode(&model, &prompt, &args.quiet)?
    };
    let context = match args.context {
        0 => tokens
            .len()
            .saturating_add(options.max_tokens)
            .clamp(1, model.config().context),
        n => n,
    };
    let interrupt = interrupt();
    let mut generation = model
        .session(context, args.cache.kind)?
        .into_generation(&tokens, &options)?;
    let (mut text, mut ids) = (String::new(), vec![]);
    while !interrupt.load(Ordering::Relaxed)
        && let Some(token) = generation.next()
    {
        let token = token?;
        out.stream(&token.text)?;
        text += &token.text;
        ids.push(token.id);
    }
    if !text.ends_with('\n') {
        out.stream("\n")?;
    }
    let (finish, timings) = (generation.finish(), generation.timings());
    if !args.quiet.quiet {
        if finish == Some(Finish::Context) {
            note(format!(
                "the context of {context} positions is full; --context takes up to {}",
                model.config().context
            ));
        }
        stderr_line(speed(&timings));
    }
    out.document(json!({
        "prompt_tokens": tokens,
        "tokens": ids,
        "text": text,
        "finish": finish_name(finish),
        "speed": speed_json(&timings),
    }));
    if finish.is_none() {
        Err(Error::Interrupted.into())
    } else {
        Ok(Answer::Yes)
    }
}
