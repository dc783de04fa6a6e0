//! The search over the tensors of a checkpoint.

use super::{Candidate, select};
use crate::calibration::{Calibration, importance};
use crate::job::Options;
use crate::plan::{Builder, Work};
use crate::recipe::Search;
use crate::recipe::{Choices, Format, Recipe, Rule, Target};
use crate::rows::{Rows, Scratch, Strips, strip_rows, thread_pool, windows, with_rows};
use crate::target::check_target;
use crate::{Error, Result};
use bitnet_core::granule::Importance;
use bitnet_core::quantize::{Fitted, fit, quantize_rows};
use bitnet_core::scheme::{Clip, Mapping, Threshold};
use bitnet_core::stats::ErrorStats;
use bitnet_core::{Granularity, Precision, ScaleDtype, Scheme};
use bitnet_formats::{Source, TensorId};
use rayon::prelude::*;
use std::path::Path;

/// The recipe with the search carried out: a rule for each tensor that `default` would have
/// decided, and no search.
///
/// Tensors that a rule of the recipe matches stay as it says; if it quantizes them, they count in
/// the budget. With a calibration errors are weighted by the second moments of the channels, and
/// every tensor searched must be in it.
///
/// # Errors
/// [`Error::Recipe`] for a budget that no setting reaches, before anything is read;
/// [`Error::NotCalibrated`]; as [`crate::Job::quantize`].
pub fn resolve(
    source: &Source,
    recipe: &Recipe,
    out: &Path,
    options: &Options<'_>,
    calibration: Option<&Calibration>,
) -> Result<Recipe> {
    let Some(search) = &recipe.search else {
        return Ok(recipe.clone());
    };
    recipe.validate()?;
    let mut builder = Builder::new(source, recipe.format, out, recipe.linear_class)?;
    check_target(source, builder.sidecars.is_some(), out, options.existing)?;
    let selector = recipe.selector(source)?;
    let grid = grid(recipe.format, &recipe.default)?;
    let (mut fixed_bytes, mut weights) = (0, 0);
    let mut tensors = vec![];
    for (index, tensor) in source.tensor_ids().zip(source.tensors()) {
        let Some(choices) = selector.choices(tensor) else {
            continue;
        };
        if selector.has_rule(&tensor.name) {
            if matches!(choices.target(), Target::Quantized(_))
                && let Some((bytes, _)) = builder.planned(index, &choices)?
            {
                fixed_bytes += bytes;
                weights += tensor.elements() as u64;
            }
            continue;
        }
        let mut refusal = None;
        let mut possible = vec![];
        for choices in &grid {
            match builder.planned(index, choices) {
                Ok(Some((bytes, scheme))) => possible.push((choices.clone(), bytes, scheme)),
                Ok(None) => {}
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        match (possible.is_empty(), refusal) {
            (true, Some(error)) => return Err(error),
            // No low-bit layout holds it: it stays float, whatever is chosen.
            (true, None) => continue,
            (false, _) => {}
        }
        weights += tensor.elements() as u64;
        tensors.push((
            tensor,
            importance(calibration, &tensor.name, tensor.matrix_shape())?,
            possible,
        ));
    }
    if tensors.is_empty() {
        return Err(Error::Recipe(format!(
            "the search has no tensor of {} to choose for",
            source.path().display()
        )));
    }
    let budget = search
        .target_bpw
        .map(|bits| (bits * weights as f64 / 8.0).floor() as u64);
    let least: u64 = fixed_bytes
        + tensors
            .iter()
            .map(|t| t.2.iter().map(|p| p.1).min().unwrap_or(0))
            .sum::<u64>();
    if let (Some(budget), Some(bits)) = (budget, search.target_bpw)
        && least > budget
    {
        let reachable = least as f64 * 8.0 / weights as f64;
        return Err(Error::Recipe(format!(
            "target_bpw {bits}: the smallest settings take {reachable:.3} bits per weight"
        )));
    }
    let pool = thread_pool(options.threads)?;
    let mut candidates = vec![];
    for (tensor, importance, possible) in &tensors {
        options.progress.tensor(&tensor.name);
        let schemes: Vec<Scheme> = possible.iter().map(|p| p.2).collect();
        let cols = tensor.matrix_shape().map_or(1, |s| s.1);
        let errors = pool.install(|| {
            with_rows(source, tensor, None, |rows| {
                measure(
                    &rows.reshaped(cols),
                    &schemes,
                    importance.as_deref(),
                    options,
                )
            })
        })?;
        let one = |((choices, bytes, _), (error, stats)): (
            &(Choices, u64, Scheme),
            (f64, ErrorStats),
        )| Candidate {
            choices: choices.clone(),
            bytes: *bytes,
            error,
            sqnr_db: stats.sqnr_db(),
        };
        candidates.push(possible.iter().zip(errors).map(one).collect::<Vec<_>>());
        options.progress.advance(source.bytes_of(tensor));
    }
    let best = select(
        &candidates,
        budget.map(|b| b - fixed_bytes),
        search.min_sqnr,
    )?;
    let mut resolved = Recipe {
        search: None,
        ..recipe.clone()
    };
    for ((tensor, ..), (candidates, pick)) in tensors.iter().zip(candidates.iter().zip(best.picks))
    {
        resolved.rules.push(Rule {
            glob: globset::escape(&tensor.name),
            choices: candidates[pick].choices.clone(),
        });
    }
    Ok(resolved)
}

/// Settings to choose among. What the default says of granularity, scales and rounding holds for
/// all.
pub fn grid(format: Format, default: &Choices) -> Result<Vec<Choices>> {
    let of = |precision| Choices {
        precision: Some(Target::Quantized(precision)),
        ..Choices::default()
    };
    let ternary = Choices {
        threshold: Some(Threshold::Optimal),
        ..of(Precision::Ternary)
    };
    let planes = |n| Choices {
        planes: Some(n),
        ..ternary.clone()
    };
    let int = |precision| Choices {
        clip: Some(Clip::Search),
        ..of(precision)
    };
    let shifted = |precision| Choices {
        mapping: Some(Mapping::Asymmetric),
        ..int(precision)
    };
    let grid: Vec<(Choices, &[usize])> = match format {
        // 0 stands for one scale for each channel.
        Format::Safetensors => vec![
            (of(Precision::Binary), &[0, 128, 64]),
            (ternary.clone(), &[0, 256, 128, 64, 32]),
            (shifted(Precision::Int2), &[64, 32]),
            (planes(2), &[0, 128, 64]),
            (int(Precision::Int3), &[0, 128, 64, 32]),
            (planes(3), &[0, 128]),
            (int(Precision::Int4), &[0, 128, 64, 32]),
            (shifted(Precision::Int4), &[32]),
            (int(Precision::Int8), &[0, 64]),
        ],
        Format::Gguf => [
            of(Precision::Binary),
            ternary,
            int(Precision::Int4),
            int(Precision::Int8),
        ]
        .map(|c| (c, &[][..]))
        .to_vec(),
        Format::HfBitnet => {
            return Err(Error::Recipe(
                "format hf-bitnet holds one precision, so there is nothing to search".into(),
            ));
        }
    };
    let fixed = default.granularity.is_some() || format == Format::Gguf;
    let scales = if format == Format::Gguf {
        default.scale_dtype
    } else {
        default.scale_dtype.or(Some(ScaleDtype::F16))
    };
    let mut all = vec![];
    for (choices, groups) in grid {
        let granularities: Vec<Option<Granularity>> = match fixed {
            true => vec![default.granularity],
            false => groups
                .iter()
                .map(|&g| {
                    Some(if g == 0 {
                        Granularity::Channel
                    } else {
                        Granularity::Group(g)
                    })
                })
                .collect(),
        };
        let rounding = default.rounding;
        all.extend(granularities.into_iter().map(|granularity| Choices {
            granularity,
            scale_dtype: scales,
            rounding,
            ..choices.clone()
        }));
    }
    Ok(all)
}

/// `Σ h·(w − ŵ)²` and the plain figures of each scheme, in one pass over the rows. A scheme that
/// cannot hold the weights loses infinitely.
fn measure(
    rows: &Rows<'_>,
    schemes: &[Scheme],
    importance: Option<&[f32]>,
    options: &Options<'_>,
) -> Result<Vec<(f64, ErrorStats)>> {
    let (kernels, cols) = (options.kernels, rows.cols);
    let strip = strip_rows(cols);
    let fitted: Vec<Option<Fitted>> = schemes
        .iter()
        .map(|scheme| match scheme.granularity {
            Granularity::Tensor => {
                let h = importance
                    .filter(|_| scheme.uses_importance())
                    .map(Importance::new)
                    .transpose()?;
                fit(
                    &kernels,
                    &Strips {
                        rows,
                        strip,
                        interrupt: options.interrupt,
                    },
                    scheme,
                    h,
                )
                .map(Some)
            }
            _ => Ok(None),
        })
        .collect::<Result<_>>()?;
    let mut sums = vec![(0.0, ErrorStats::default()); schemes.len()];
    for window in windows(rows.count, strip) {
        if options.interrupt.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let parts: Vec<Result<Vec<(f64, ErrorStats)>>> = window
            .into_par_iter()
            .map_init(Scratch::default, |scratch, range| {
                let first = range.start;
                rows.read(range, &mut scratch.bytes, &mut scratch.weights)?;
                scratch.back.resize(cols, 0.0);
                let one =
                    |(scheme, fitted): (&Scheme, &Option<Fitted>)| -> Result<(f64, ErrorStats)> {
                        let h = importance.filter(|_| scheme.uses_importance() && fitted.is_none());
                        let matrix = match quantize_rows(
                            &kernels,
                            &scratch.weights,
                            cols,
                            first,
                            scheme,
                            fitted.as_ref(),
                            h,
                        ) {
                            Err(bitnet_core::Error::Scheme(_)) => {
                                return Ok((f64::INFINITY, ErrorStats::default()));
                            }
                            other => other?,
                        };
                        let (mut weighted, mut stats) = (0.0, ErrorStats::default());
                        for (row, w) in scratch.weights.chunks(cols).enumerate() {
                            matrix.dequantize_row_into(row, &mut scratch.back);
                            let error = ErrorStats::measure(w, &scratch.back);
                            weighted += match importance {
                                None => error.noise,
                                Some(h) => (w.iter().zip(&scratch.back).zip(h))
                                    .map(|((w, v), h)| f64::from(*h) * f64::from(w - v).powi(2))
                                    .sum(),
                            };
                            stats = stats.merge(error);
                        }
                        Ok((weighted, stats))
                    };
                schemes.iter().zip(&fitted).map(one).collect()
            })
            .collect();
        for part in parts {
            sums.iter_mut()
                .zip(part?)
                .for_each(|(sum, (weighted, stats))| *sum = (sum.0 + weighted, sum.1.merge(stats)));
        }
    }
    Ok(sums)
}

impl Search {
    /// Least error within so many bits per weight.
    pub fn within(target_bpw: f64) -> Self {
        Self {
            target_bpw: Some(target_bpw),
            min_sqnr: None,
        }
    }

    /// Fewest bytes with at least so many dB for each tensor.
    pub fn of_quality(min_sqnr: f64) -> Self {
        Self {
            target_bpw: None,
            min_sqnr: Some(min_sqnr),
        }
    }
}

impl Builder<'_> {
    /// Bytes and scheme of a tensor with these choices; `None` if it would stay float.
    fn planned(&mut self, index: TensorId, choices: &Choices) -> Result<Option<(u64, Scheme)>> {
        let (units, outs) = (self.units.len(), self.tensors.len());
        self.quantize(index, choices)?;
        let scheme = match self.units.last().map(|u| &u.work) {
            Some(Work::Pack(pack)) if self.units.len() > units => pack.scheme,
            _ => None,
        };
        Ok(scheme.map(|scheme| {
            (
                self.tensors
                    .iter()
                    .skip(outs)
                    .map(|t| t.len.bound() as u64)
                    .sum(),
                scheme,
            )
        }))
    }
}
