//! `bitnet chat`: a conversation. Ctrl-C stops an answer, and at the prompt the program; so does
//! the end of the input.

use crate::Answer;
use crate::commands::run::finish_name;
use crate::model::{ChatArgs, speed, speed_json};
use crate::print::Output;
use anyhow::Context;
use bitnet_inference::{ChatMessage, Finish};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether an answer is being made.
static ANSWERING: AtomicBool = AtomicBool::new(false);

pub(crate) fn run(args: &ChatArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let options = args.generate.options()?;
    let model = args.load.load(&args.model)?;
    anyhow::ensure!(
        model.can_chat(),
        "{}: the model has no chat template; `bitnet run` goes on with a text",
        args.model.display()
    );
    let most = model.config().context;
    let context = if args.context == 0 {
        most.min(4096)
    } else {
        args.context
    };
    let mut session = model.session(context, args.load.cache)?;
    ctrlc::set_handler(|| {
        if !ANSWERING.swap(false, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot catch Ctrl-C")?;
    let system = args
        .system
        .as_ref()
        .map(|text| ChatMessage::new("system", text));
    let mut messages: Vec<ChatMessage> = system.into_iter().collect();
    let mut turns = vec![];
    let terminal = std::io::stdin().is_terminal();
    loop {
        if terminal {
            out.stream("> ")?;
        }
        let mut line = String::new();
        if std::io::stdin()
            .read_line(&mut line)
            .context("cannot read a message from stdin")?
            == 0
        {
            break;
        }
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        messages.push(ChatMessage::new("user", line));
        let tokens = model.chat_tokens(&messages)?;
        if tokens.len() >= context {
            messages.pop();
            let needs = format!(
                "the conversation needs {} tokens of a context of {context}",
                tokens.len()
            );
            // Somebody at a terminal may say something shorter.
            anyhow::ensure!(terminal, "{needs}; --context takes up to {most}");
            eprintln!("note: {needs}; this message was not sent");
            continue;
        }
        ANSWERING.store(true, Ordering::SeqCst);
        let mut generation = session.into_generation(&tokens, &options)?;
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
        let (finish, timings) = (generation.finish(), generation.timings());
        session = generation.into_session();
        match finish {
            Some(Finish::Context) => eprintln!(
                "note: the context of {context} positions is full; --context takes up to {most}"
            ),
            None => eprintln!("note: stopped"),
            Some(Finish::EndOfText | Finish::Stop | Finish::MaxTokens) => {}
        }
        eprintln!("{}", speed(&timings));
        turns.push(json!({"user": line, "assistant": text, "finish": finish_name(finish), "speed": speed_json(&timings)}));
        messages.push(ChatMessage::new("assistant", text));
    }
    if terminal {
        let _ = writeln!(std::io::stderr());
    }
    out.document(json!({"turns": turns}));
    Ok(Answer::Yes)
}
