//! `bitnet chat`: a conversation. Ctrl-C stops an answer, and at the prompt the program; so does
//! the end of the input.

use crate::args::model::{ChatArgs, read_tools};
use crate::generation::{finish_name, speed, speed_json};
use crate::print::{Answer, Output, note, stderr_line, without_bom};
use anyhow::Context;
use bitnet_inference::{ChatMessage, Finish, GenerateOptions, Generation, Model, Session, Tools};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether an answer is being generated.
static ANSWERING: AtomicBool = AtomicBool::new(false);

pub(crate) fn run(args: &ChatArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let options = args.generate.options()?;
    let tools = args.tools.as_deref().map(read_tools).transpose()?;
    let model = args.load.load(&args.model, &args.quiet)?;
    anyhow::ensure!(
        model.can_chat(),
        "{}: the model has no chat template; `bitnet run` generates text from a prompt",
        args.model.display()
    );
    let context = match args.context {
        0 => model.config().context.min(4096),
        n => n,
    };
    let session = model.session(context, args.cache.kind)?;
    catch_interrupts()?;
    let system = args.system.as_ref();
    let mut conversation = Conversation {
        model: &model,
        options,
        tools,
        quiet: args.quiet.quiet,
        context,
        system: system.map(|text| ChatMessage::new("system", text)),
        messages: vec![],
        turns: vec![],
        dropped: 0,
        refused: 0,
    };
    let result = conversation.hold(session, out);
    let mut document = json!({
        "turns": conversation.turns,
        "dropped_turns": conversation.dropped,
        "refused_messages": conversation.refused,
    });
    if let Err(error) = &result {
        document["error"] = error.to_string().into();
    }
    out.document(document);
    if result.is_err() {
        // What was said stays; the error follows on stderr.
        out.flush()?;
    }
    result.map(|()| Answer::Yes)
}

/// A conversation, and what became of it.
struct Conversation<'m> {
    model: &'m Model,
    options: GenerateOptions,
    tools: Option<Tools>,
    quiet: bool,
    context: usize,
    system: Option<ChatMessage>,
    /// Questions and answers that the model sees, without the system message.
    messages: Vec<ChatMessage>,
    /// Every turn, for the document.
    turns: Vec<Value>,
    /// Number of turns that the model no longer sees.
    dropped: usize,
    /// Number of messages that were too long to send.
    refused: usize,
}

impl Conversation<'_> {
    /// Answers messages until the end of the input.
    fn hold(&mut self, mut session: Session<'_>, out: &mut Output) -> anyhow::Result<()> {
        let terminal = std::io::stdin().is_terminal();
        let mut first = true;
        while let Some(line) = read_message(terminal, first, out)? {
            first = false;
            self.messages.push(ChatMessage::new("user", &line));
            let Some(tokens) = self.prompt()? else {
                continue;
            };
            let mut generation = session.into_generation(&tokens, &self.options)?;
            let text = answer(&mut generation, out)?;
            let (finish, timings) = (generation.finish(), generation.timings());
            session = generation.into_session();
            if !self.quiet {
                match finish {
                    Some(Finish::Context) => note(format!(
                        "the context of {} positions is full; --context takes up to {}",
                        self.context,
                        self.model.config().context
                    )),
                    None => note("stopped"),
                    Some(Finish::EndOfText | Finish::Stop | Finish::MaxTokens) => {}
                }
                stderr_line(speed(&timings));
            }
            self.turns.push(json!({
                "user": line,
                "assistant": text,
                "finish": finish_name(finish),
                "speed": speed_json(&timings),
            }));
            self.messages.push(ChatMessage::new("assistant", text));
        }
        if terminal {
            stderr_line("");
        }
        Ok(())
    }

    /// The tokens of the conversation. Where they leave no room for an answer, the oldest turns are
    /// dropped until half of the context is free. `None` if the last message alone is too long; it
    /// is then taken back.
    fn prompt(&mut self) -> anyhow::Result<Option<Vec<u32>>> {
        let room = self.options.max_tokens.min(self.context / 8).max(1);
        let mut tokens = self.tokens(0)?;
        if tokens.len() + room <= self.context {
            return Ok(Some(tokens));
        }
        let mut drop = 0;
        while tokens.len() > self.context / 2 && drop + 2 < self.messages.len() {
            drop += 2;
            tokens = self.tokens(drop)?;
        }
        let most = self.model.config().context;
        if tokens.len() >= self.context {
            self.messages.pop();
            self.refused += 1;
            note(format!(
                "this message was not sent: it needs {} tokens of a context of {}; --context \
                 takes up to {most}",
                tokens.len(),
                self.context
            ));
            return Ok(None);
        }
        self.messages.drain(..drop);
        self.dropped += drop / 2;
        if drop > 0 && !self.quiet {
            note(format!(
                "the context of {} positions is full: the model no longer sees the oldest {} of {} \
                 turns; --context takes up to {most}",
                self.context,
                self.dropped,
                self.turns.len()
            ));
        }
        Ok(Some(tokens))
    }

    /// The tokens of the conversation without its first `drop` messages.
    fn tokens(&self, drop: usize) -> anyhow::Result<Vec<u32>> {
        let messages: Vec<ChatMessage> = self
            .system
            .iter()
            .chain(&self.messages[drop..])
            .cloned()
            .collect();
        let tools = self.tools.as_ref();
        Ok(self.model.chat_tokens_with(&messages, tools)?)
    }
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
fn read_message(terminal: bool, first: bool, out: &mut Output) -> anyhow::Result<Option<String>> {
    loop {
        if terminal {
            out.stream("> ")?;
        }
        let mut line = String::new();
        let read = std::io::stdin().read_line(&mut line);
        if read.context("cannot read a message from stdin")? == 0 {
            return Ok(None);
        }
        let line = if first {
            without_bom(line, "stdin")
        } else {
            line
        };
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
