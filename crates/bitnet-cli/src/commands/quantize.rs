//! `bitnet quantize`

use crate::args::QuantizeArgs;
use crate::print::Output;
use crate::{Answer, job};
use bitnet_quant::{Job, Recipe};

pub(crate) fn run(args: &QuantizeArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let mut recipe = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| anyhow::anyhow!("cannot read {}: {e}", path.display()))?;
            Recipe::from_toml(&text).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?
        }
        None => Recipe::default(),
    };
    if args.config.is_none() || args.format.is_some() {
        recipe.format = job::format(args.format, &args.job.out);
    }
    recipe.linear_class = args.linear_class.or(recipe.linear_class);
    if !args.include.is_empty() {
        recipe.include.clone_from(&args.include);
    }
    recipe.exclude.extend(args.exclude.iter().cloned());
    recipe.rules.splice(0..0, args.rule.iter().cloned());
    recipe.default = args.choices.choices().over(&recipe.default);
    let source = args.input.open()?;
    let plan = Job::quantize(&source, &recipe, &args.job.out)?;
    job::run(&plan, &source, &args.job, out)?;
    Ok(Answer::Yes)
}
