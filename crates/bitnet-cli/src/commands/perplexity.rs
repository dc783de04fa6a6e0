//! `bitnet perplexity`: how well a model predicts a text.

use crate::job::Bar;
use crate::model::PerplexityArgs;
use crate::print::Output;
use crate::{Answer, job};
use bitnet_checkpoint::job::Progress;
use bitnet_inference::perplexity::{Mean, Perplexity, Windows, compare, perplexity};
use serde_json::{Value, json};
use std::cell::Cell;

pub(crate) fn run(args: &PerplexityArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| anyhow::anyhow!("cannot read {}: {e}", args.text.display()))?;
    let model = args.load.load(&args.model)?;
    let reference = args
        .reference
        .as_ref()
        .map(|path| args.load.load(path))
        .transpose()?;
    let mut tokens = model.tokenizer()?.encode(&text, true)?;
    if let Some(reference) = &reference {
        let same = reference.tokenizer()?.encode(&text, true)? == tokens;
        anyhow::ensure!(
            same,
            "{}: the tokenizer cuts the text into other tokens than the reference's",
            args.model.display()
        );
    }
    if args.tokens > 0 {
        tokens.truncate(args.tokens);
    }
    let most = model.config().context.min(
        reference
            .as_ref()
            .map_or(usize::MAX, |r| r.config().context),
    );
    let context = if args.context == 0 {
        most.min(512)
    } else {
        args.context
    };
    anyhow::ensure!(
        context <= most,
        "--context: expected at most {most}, what the model was made for, got {context}"
    );
    let stride = if args.stride == 0 {
        context.div_ceil(2)
    } else {
        args.stride
    };
    let windows = Windows {
        context,
        stride,
        cache: args.load.cache,
    };
    let bar = Bar::new(tokens.len() as u64, args.quiet);
    let done = Cell::new(0);
    let progress = |at: usize, _: usize| {
        bar.advance(at.saturating_sub(done.replace(done.get().max(at))) as u64)
    };
    let interrupt = job::interrupt();
    let mut document = json!({"tokens": tokens.len(), "context": context, "stride": stride});
    let say = |out: &mut Output, name: &str, p: &Perplexity| {
        let line = format!(
            "{name}: perplexity {:.4} ± {:.4} over {} tokens",
            p.value(),
            p.error(),
            p.loss.count()
        );
        out.line(format!(
            "{line} ({:.4} ± {:.4} nats each)",
            p.loss.mean(),
            p.loss.error()
        ));
    };
    match &reference {
        None => {
            let result = perplexity(&model, &tokens, &windows, &progress, interrupt)?;
            drop(bar);
            say(out, &args.model.display().to_string(), &result);
            document["model"] = json_of(&result);
        }
        Some(reference) => {
            let result = compare(&model, reference, &tokens, &windows, &progress, interrupt)?;
            drop(bar);
            say(out, &args.model.display().to_string(), &result.model);
            say(out, "reference", &result.reference);
            let line = |what: &str, m: &Mean, unit: &str| {
                format!("{what}: {:.5} ± {:.5}{unit}", m.mean(), m.error())
            };
            out.line(line(
                "loss above the reference's",
                &result.difference,
                " nats",
            ));
            out.line(line(
                "divergence from the reference",
                &result.divergence,
                " nats",
            ));
            out.line(line("same likeliest token", &result.same_top, ""));
            document["model"] = json_of(&result.model);
            document["reference"] = json_of(&result.reference);
            document["loss_difference"] = mean_json(&result.difference);
            document["divergence"] = mean_json(&result.divergence);
            document["same_top"] = mean_json(&result.same_top);
        }
    }
    out.line(format!(
        "windows of {context} tokens, each {stride} after the one before"
    ));
    out.document(document);
    Ok(Answer::Yes)
}

fn json_of(p: &Perplexity) -> Value {
    json!({"perplexity": p.value(), "error": p.error(), "loss": mean_json(&p.loss)})
}

fn mean_json(m: &Mean) -> Value {
    json!({"mean": m.mean(), "error": m.error(), "count": m.count()})
}
