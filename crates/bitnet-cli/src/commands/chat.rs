//! `bitnet chat`: a conversation. Ctrl-C stops an answer, and at the prompt the program; so does
//! the end of the input.

use crate::args::model::ChatArgs;
use crate::generation::{finish_name, speed, speed_json};
use crate::print::{Answer, Output, note, stderr_line};
use anyhow::Context;
use bitnet_inference::{ChatMessage, Finish, Generation};
use serde_json::json;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether an answer is being generated.
static ANSWERING: AtomicBool = AtomicBool::new(false);

pub(crate) fn run(args: &ChatArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let options = args.generate.options()?;
    let model = args.load.load(&args.model, &args.quiet)?;
    anyhow::ensure!(
        model.can_chat(),
        "{}: the model has no chat template; `bitnet run` generates text from a prompt",
        args.model.display()
    );
    let most = model.config().context;
    let context = match args.context {
        0 => most.min(4096),
        n => n,
    };
    let mut session = model.session(context, args.load.cache)?;
    catch_interrupts()?;
    let system = args.system.as_ref();
    let mut messages: Vec<ChatMessage> = system
        .map(|text| ChatMessage::new("system", text))
        .into_iter()
        .collect();
    let mut turns = vec![];
    let terminal = std::io::stdin().is_terminal();
    while let Some(line) = read_message(terminal, out)? {
        messages.push(ChatMessage::new("user", &line));
        let tokens = model.chat_tokens(&messages)?;
        if tokens.len() >= context {
            messages.pop();
            let needs = format!(
                "the conversation needs {} tokens of a context of {context}",
                tokens.len()
            );
            // Somebody at a terminal may say something shorter.
            anyhow::ensure!(terminal, "{needs}; --context takes up to {most}");
            note(format!("{needs}; this message was not sent"));
            continue;
        }
        let mut generation = session.into_generation(&tokens, &options)?;
        let text = answer(&mut generation, out)?;
        let (finish, timings) = (generation.finish(), generation.timings());
        session = generation.into_session();
        if !args.quiet.quiet {
            match finish {
                Some(Finish::Context) => note(format!(
                    "the context of {context} positions is full; --context takes up to {most}"
                )),
                None => note("stopped"),
                Some(Finish::EndOfText | Finish::Stop | Finish::MaxTokens) => {}
            }
            stderr_line(speed(&timings));
        }
        turns.push(json!({
            "user": line,
            "assistant": text,
            "finish": finish_name(finish),
            "speed": speed_json(&timings),
        }));
        messages.push(ChatMessage::new("assistant", text));
    }
    if terminal {
        stderr_line("");
    }
    out.document(json!({"turns": turns}));
    Ok(Answer::Yes)
}

/// Ctrl-C stops an answer, and at the prompt the program.
fn catch_interrupts() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if !ANSWERING.swap(false, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot catch Ctrl-C")
}

/// The next line with text; `None` at the end of the input.
fn read_message(terminal: bool, out: &mut Output) -> anyhow::Result<Option<String>> {
    loop {
        if terminal {
            out.stream("> ")?;
        }
        let mut line = String::new();
        let read = std::io::stdin().read_line(&mut line);
        if read.context("cannot read a message from stdin")? == 0 {
            return Ok(None);
        }
        let line = line.trim();
        if !line.is_empty() {
            return Ok(Some(line.into()));
        }
    }
}

/// Prints an answer while it is generated, until it ends or Ctrl-C stops it.
fn answer(generation: &mut Generation<'_>, out: &mut Output) -> anyhow::Result<String> {
    ANSWERING.store(true, Ordering::SeqCst);
    let mut text = String::new();
    while ANSWERING.load(Ordering::SeqCst)
        && let Some(token) = generation.next()
    {
        let token = token?;
        out.stream(&token.text)?;
        text += &token.text;
    }
    ANSWERING.store(false, Ordering::SeqCst);
    out.stream("\n")?;
    Ok(text)
}
