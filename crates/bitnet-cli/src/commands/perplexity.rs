//! `bitnet perplexity`: how well a model predicts a text.

use crate::args::model::PerplexityArgs;
use crate::print::{Answer, Output, without_bom};
use crate::progress::{TokenBar, interrupt};
use bitnet_inference::Model;
use bitnet_inference::perplexity::{Mean, Perplexity, Windows, compare, perplexity};
use serde_json::{Value, json};

pub(crate) fn run(args: &PerplexityArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| anyhow::anyhow!("cannot read {}: {e}", args.text.display()))?;
    let text = without_bom(text, &args.text.display().to_string());
    let model = args.load.load(&args.model, &args.quiet)?;
    let reference = args
        .reference
        .as_ref()
        .map(|path| args.load.load(path, &args.quiet))
        .transpose()?;
    let tokens = tokens(args, &text, &model, reference.as_ref())?;
    let windows = windows(args, &model, reference.as_ref())?;
    let bar = TokenBar::new(tokens.len(), args.quiet.quiet);
    let progress = |done: usize, _: usize| bar.set(done);
    let interrupt = interrupt();
    let mut document = json!({
        "tokens": tokens.len(),
        "context": windows.context,
        "stride": windows.stride,
    });
    let name = args.model.display().to_string();
    match &reference {
        None => {
            let result = perplexity(&model, &tokens, &windows, &progress, interrupt)?;
            drop(bar);
            out.line(line(&name, &result));
            document["model"] = json_of(&result);
        }
        Some(reference) => {
            let result = compare(&model, reference, &tokens, &windows, &progress, interrupt)?;
            drop(bar);
            out.line(line(&name, &result.model));
            out.line(line("reference", &result.reference));
            document["model"] = json_of(&result.model);
            document["reference"] = json_of(&result.reference);
            for (name, key, mean, unit) in [
                (
                    "loss above the reference's",
                    "loss_difference",
                    &result.difference,
                    " nats",
                ),
                (
                    "divergence from the reference",
                    "divergence",
                    &result.divergence,
                    " nats",
                ),
                ("same likeliest token", "same_top", &result.same_top, ""),
            ] {
                let (value, error) = (mean.mean(), mean.error());
                out.line(format!("{name}: {value:.5} ± {error:.5}{unit}"));
                document[key] = mean_json(mean);
            }
        }
    }
    out.line(format!(
        "windows of {} tokens, each {} after the one before",
        windows.context, windows.stride
    ));
    out.document(document);
    Ok(Answer::Yes)
}

/// The tokens of the text, which must be the same for both models.
fn tokens(
    args: &PerplexityArgs,
    text: &str,
    model: &Model,
    reference: Option<&Model>,
) -> anyhow::Result<Vec<u32>> {
    let mut tokens = args.load.encode(model, text, &args.quiet)?;
    if let Some(reference) = reference {
        anyhow::ensure!(
            reference.tokenizer()?.encode(text, true)? == tokens,
            "{}: the tokenizer cuts the text into other tokens than the reference's",
            args.model.display()
        );
    }
    if args.tokens > 0 {
        tokens.truncate(args.tokens);
    }
    Ok(tokens)
}

/// Windows that both models have a context for.
fn windows(
    args: &PerplexityArgs,
    model: &Model,
    reference: Option<&Model>,
) -> anyhow::Result<Windows> {
    let contexts = [Some(model), reference].into_iter().flatten();
    let most = contexts.map(|m| m.config().context).min().unwrap_or(0);
    let context = match args.context {
        0 => most.min(512),
        n => n,
    };
    anyhow::ensure!(
        context <= most,
        "--context: expected at most {most}, the model's, got {context}"
    );
    Ok(Windows {
        context,
        stride: match args.stride {
            0 => context.div_ceil(2),
            n => n,
        },
        cache: args.cache.kind,
    })
}

/// Perplexity in one line.
fn line(name: &str, p: &Perplexity) -> String {
    format!(
        "{name}: perplexity {:.4} ± {:.4} over {} tokens ({:.4} ± {:.4} nats each)",
        p.value(),
        p.error(),
        p.loss.count(),
        p.loss.mean(),
        p.loss.error()
    )
}

fn json_of(p: &Perplexity) -> Value {
    json!({"perplexity": p.value(), "error": p.error(), "loss": mean_json(&p.loss)})
}

fn mean_json(m: &Mean) -> Value {
    json!({"mean": m.mean(), "error": m.error(), "count": m.count()})
}
