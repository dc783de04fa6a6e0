//! `bitnet quantize`

use crate::args::checkpoint::QuantizeArgs;
use crate::print::{Answer, Output};
use crate::{job, target};
use bitnet_checkpoint::calibration::Calibration;
use bitnet_checkpoint::recipe::{Recipe, Search};
use bitnet_checkpoint::{Job, search};
use std::path::Path;

pub(crate) fn run(args: &QuantizeArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let recipe = recipe(args)?;
    let calibration = args
        .search
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
    job::run(plan, &source, &args.job, &recipe.compute, out)?;
    Ok(Answer::Yes)
}

/// The configuration of file or preset, with the flags over it.
fn recipe(args: &QuantizeArgs) -> anyhow::Result<Recipe> {
    let mut recipe = match (&args.recipe.config, args.recipe.preset) {
        (Some(path), _) => read(path)?,
        (None, Some(preset)) => preset.build()?,
        (None, None) => Recipe::default(),
    };
    let format = target::format(args.container.format, &args.job.out)?;
    if args.recipe.config.is_none() || args.container.format.is_some() {
        recipe.format = format;
    }
    recipe.linear_class = args.container.linear_class.or(recipe.linear_class);
    let tensors = &args.tensors;
    if !tensors.include.is_empty() {
        recipe.include.clone_from(&tensors.include);
    }
    if !tensors.transposed.is_empty() {
        recipe.transposed = Some(tensors.transposed.clone());
    }
    recipe.exclude.extend(tensors.exclude.iter().cloned());
    recipe.rules.splice(0..0, tensors.rule.iter().cloned());
    recipe.default = args.choices.choices().over(&recipe.default);
    let search = &args.search;
    if search.target_bpw.is_some() || search.min_sqnr.is_some() {
        let goal = recipe.search.unwrap_or_default();
        recipe.search = Some(Search {
            target_bpw: search.target_bpw.or(goal.target_bpw),
            min_sqnr: search.min_sqnr.or(goal.min_sqnr),
        });
    }
    Ok(recipe)
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
