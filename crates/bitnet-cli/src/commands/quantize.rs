//! `bitnet quantize`

use crate::args::QuantizeArgs;
use crate::print::Output;
use crate::{Answer, job};
use bitnet_checkpoint::calibration::Calibration;
use bitnet_checkpoint::recipe::{Recipe, Search};
use bitnet_checkpoint::{Job, search};
use std::path::Path;

pub(crate) fn run(args: &QuantizeArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let mut recipe = match (&args.config, args.preset) {
        (Some(path), _) => read(path)?,
        (None, Some(preset)) => preset.build()?,
        (None, None) => Recipe::default(),
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
    if args.target_bpw.is_some() || args.min_sqnr.is_some() {
        let goal = recipe.search.unwrap_or_default();
        recipe.search = Some(Search {
            target_bpw: args.target_bpw.or(goal.target_bpw),
            min_sqnr: args.min_sqnr.or(goal.min_sqnr),
        });
    }
    let calibration = args
        .calibration
        .as_deref()
        .map(Calibration::load)
        .transpose()?;
    let source = args.input.open()?;
    let total = source.tensors().iter().map(|t| source.bytes_of(t)).sum();
    let recipe = job::with_options(&args.job, &recipe.compute, total, |options| {
        search::resolve(
            &source,
            &recipe,
            &args.job.out,
            options,
            calibration.as_ref(),
        )
    })?;
    let plan = match &calibration {
        Some(calibration) => {
            Job::quantize_calibrated(&source, &recipe, &args.job.out, calibration)?
        }
        None => Job::quantize(&source, &recipe, &args.job.out)?,
    };
    job::run(&plan, &source, &args.job, &recipe.compute, out)?;
    Ok(Answer::Yes)
}

fn read(path: &Path) -> anyhow::Result<Recipe> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| anyhow::anyhow!("cannot read {}: {e}", path.display()))?;
    let json = path.extension().is_some_and(|e| e == "json");
    let config = if json {
        Recipe::from_json(&text)
    } else {
        Recipe::from_toml(&text)
    };
    config.map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}
