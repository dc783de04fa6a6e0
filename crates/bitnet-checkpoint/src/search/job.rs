//! The search over the tensors of a checkpoint.

use super::{Candidate, select};
use crate::calibration::{Calibration, importance};
use crate::forms::MatrixForm;
use crate::job::Options;
use crate::plan::{Action, Builder};
use crate::recipe::{Choices, Format, Recipe, Rule, Search, Target, escape};
use crate::rows::{
    StripGranule, WeightRows, in_parallel, strip_rows, thread_pool, windows, with_rows,
};
use crate::target::{Outputs, check_target, weights_name};
use crate::{Error, Result};
use bitnet_core::granule::Importance;
use bitnet_core::quantize::{Fitted, fit, quantize_rows};
use bitnet_core::scheme::{Clip, Mapping, Threshold};
use bitnet_core::stats::ErrorStats;
use bitnet_core::{Granularity, Precision, ScaleDtype, Scheme};
use bitnet_formats::{Source, Tensor, TensorId};
use std::path::Path;

/// Runs the search of a recipe. Returns the recipe without the search, with one rule for each
/// tensor that `default` would have decided.
///
/// Tensors that a rule of the recipe matches keep that rule. If the rule quantizes them, they count
/// in the budget. A calibration weights errors by the second moments of the channels; it must cover
/// every searched tensor.
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
    let weights = match &builder.sidecars {
        Some(sidecars) => weights_name(sidecars).into(),
        None => out.to_path_buf(),
    };
    let outputs = Outputs {
        sidecars: builder.sidecars.as_ref(),
        weights: vec![weights],
    };
    check_target(source, &outputs, out, options.existing)?;
    let plan = SearchPlan::new(source, recipe, &mut builder, calibration)?;
    let budget = plan.budget(search)?;
    let candidates = plan.measure(source, options)?;
    let best = select(
        &candidates,
        budget.map(|b| b - plan.fixed_bytes),
        search.min_sqnr,
    )?;
    let mut resolved = Recipe {
        search: None,
        ..recipe.clone()
    };
    let picked = plan.tensors.iter().zip(candidates.iter().zip(best.picks));
    resolved
        .rules
        .extend(picked.map(|(searched, (candidates, pick))| Rule {
            glob: escape(&searched.tensor.name),
            choices: candidates[pick].choices.clone(),
        }));
    Ok(resolved)
}

/// A tensor that the search chooses for.
struct SearchedTensor<'a> {
    tensor: &'a Tensor,
    form: MatrixForm,
    importance: Option<Vec<f32>>,
    /// The settings that the container can hold: choices, bytes, scheme.
    possible: Vec<(Choices, u64, Scheme)>,
}

/// The tensors and settings of a search.
struct SearchPlan<'a> {
    tensors: Vec<SearchedTensor<'a>>,
    /// Bytes of the tensors that rules of the recipe quantize.
    fixed_bytes: u64,
    /// Weights that the budget covers.
    weights: u64,
}

impl<'a> SearchPlan<'a> {
    fn new(
        source: &'a Source,
        recipe: &Recipe,
        builder: &mut Builder<'_>,
        calibration: Option<&Calibration>,
    ) -> Result<Self> {
        let selector = recipe.selector(source)?;
        builder.forms = selector.forms().clone();
        let grid = grid(recipe.format, &recipe.default)?;
        let mut plan = Self {
            tensors: vec![],
            fixed_bytes: 0,
            weights: 0,
        };
        for (index, tensor) in source.tensor_ids().zip(source.tensors()) {
            let Some(choices) = selector.choices(tensor) else {
                continue;
            };
            if selector.has_rule(&tensor.name) {
                if matches!(choices.target(), Target::Quantized(_))
                    && let Some((bytes, _)) = builder.planned(index, &choices)?
                {
                    plan.fixed_bytes += bytes;
                    plan.weights += tensor.elements() as u64;
                }
                continue;
            }
            let possible = possible_settings(builder, index, &grid)?;
            if possible.is_empty() {
                // No low-bit layout holds it: it stays float, whatever is chosen.
                continue;
            }
            let Some(form) = builder.forms.form(tensor) else {
                continue;
            };
            plan.weights += tensor.elements() as u64;
            let shape = Some((form.rows, form.cols));
            plan.tensors.push(SearchedTensor {
                tensor,
                form,
                importance: importance(calibration, &tensor.name, shape)?,
                possible,
            });
        }
        if plan.tensors.is_empty() {
            return Err(Error::Recipe(format!(
                "the search has no tensor of {} to choose for",
                source.path().display()
            )));
        }
        Ok(plan)
    }

    /// The budget in bytes, if the search has one.
    fn budget(&self, search: &Search) -> Result<Option<u64>> {
        let Some(bits) = search.target_bpw else {
            return Ok(None);
        };
        let budget = (bits * self.weights as f64 / 8.0).floor() as u64;
        let smallest = |searched: &SearchedTensor<'_>| {
            searched.possible.iter().map(|p| p.1).min().unwrap_or(0)
        };
        let least = self.fixed_bytes + self.tensors.iter().map(smallest).sum::<u64>();
        if least > budget {
            let reachable = least as f64 * 8.0 / self.weights as f64;
            return Err(Error::Recipe(format!(
                "target_bpw {bits}: the smallest settings take {reachable:.3} bits per weight"
            )));
        }
        Ok(Some(budget))
    }

    /// Quantizes each tensor with each of its settings and measures the error.
    fn measure(&self, source: &Source, options: &Options<'_>) -> Result<Vec<Vec<Candidate>>> {
        let pool = thread_pool(options.threads)?;
        let mut candidates = vec![];
        for searched in &self.tensors {
            let tensor = searched.tensor;
            options.progress.tensor(&tensor.name);
            let schemes: Vec<Scheme> = searched.possible.iter().map(|p| p.2).collect();
            let importance = searched.importance.as_deref();
            let errors = pool.install(|| {
                with_rows(source, tensor, None, |rows| {
                    measure(&rows.in_form(searched.form), &schemes, importance, options)
                })
            })?;
            let settings = searched.possible.iter().zip(errors);
            candidates.push(
                settings
                    .map(|((choices, bytes, _), (error, stats))| Candidate {
                        choices: choices.clone(),
                        bytes: *bytes,
                        error,
                        sqnr_db: stats.sqnr_db(),
                    })
                    .collect(),
            );
            options.progress.advance(source.bytes_of(tensor));
        }
        Ok(candidates)
    }
}

/// The settings of the grid that the container can hold for a tensor; none if it would stay float.
fn possible_settings(
    builder: &mut Builder<'_>,
    index: TensorId,
    grid: &[Choices],
) -> Result<Vec<(Choices, u64, Scheme)>> {
    let mut refusal = None;
    let mut possible = vec![];
    for choices in grid {
        match builder.planned(index, choices) {
            Ok(Some((bytes, scheme))) => possible.push((choices.clone(), bytes, scheme)),
            Ok(None) => {}
            Err(error) => refusal = refusal.or(Some(error)),
        }
    }
    match refusal {
        Some(error) if possible.is_empty() => Err(error),
        _ => Ok(possible),
    }
}

/// The settings that the search chooses among. Granularity, scales and rounding of the default
/// apply to all of them.
///
/// # Errors
/// [`Error::Recipe`] for a format with one precision only.
pub fn grid(format: Format, default: &Choices) -> Result<Vec<Choices>> {
    let with_precision = |precision| Choices {
        precision: Some(Target::Quantized(precision)),
        ..Choices::default()
    };
    let ternary = Choices {
        threshold: Some(Threshold::Optimal),
        ..with_precision(Precision::Ternary)
    };
    let planes = |n| Choices {
        planes: Some(n),
        ..ternary.clone()
    };
    let int = |precision| Choices {
        clip: Some(Clip::Search),
        ..with_precision(precision)
    };
    let shifted = |precision| Choices {
        mapping: Some(Mapping::Asymmetric),
        ..int(precision)
    };
    let grid: Vec<(Choices, &[usize])> = match format {
        // 0 stands for one scale for each channel.
        Format::Safetensors => vec![
            (with_precision(Precision::Binary), &[0, 128, 64]),
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
            with_precision(Precision::Binary),
            ternary,
            int(Precision::Int4),
            int(Precision::Int8),
        ]
        .map(|c| (c, &[][..]))
        .to_vec(),
        Format::Mlx => [
            ternary,
            int(Precision::Int3),
            int(Precision::Int4),
            int(Precision::Int8),
        ]
        .map(|c| (c, &[64][..]))
        .to_vec(),
        Format::Onnx => {
            return Err(Error::Recipe(
                "format onnx takes a model as it is: search into a folder, then convert it".into(),
            ));
        }
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
    rows: &WeightRows<'_>,
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
                    &StripGranule {
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
        type Errors = Vec<(f64, ErrorStats)>;
        let parts = in_parallel(window.len(), |i, scratch| -> Result<Errors> {
            let range = window[i].clone();
            let first = range.start;
            rows.read(range, &mut scratch.bytes, &mut scratch.weights)?;
            scratch.back.resize(cols, 0.0);
            let one = |(scheme, fitted): (&Scheme, &Option<Fitted>)| -> Result<(f64, ErrorStats)> {
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
        });
        for part in parts {
            sums.iter_mut()
                .zip(part?)
                .for_each(|(sum, (weighted, stats))| *sum = (sum.0 + weighted, sum.1.merge(stats)));
        }
    }
    Ok(sums)
}

impl Search {
    /// The least error within `target_bpw` bits per weight.
    pub fn within(target_bpw: f64) -> Self {
        Self {
            target_bpw: Some(target_bpw),
            min_sqnr: None,
        }
    }

    /// The fewest bytes with at least `min_sqnr` dB for each tensor.
    pub fn with_min_sqnr(min_sqnr: f64) -> Self {
        Self {
            target_bpw: None,
            min_sqnr: Some(min_sqnr),
        }
    }
}

impl Builder<'_> {
    /// Bytes and scheme of a tensor with these choices; `None` if it would stay float.
    fn planned(&mut self, index: TensorId, choices: &Choices) -> Result<Option<(u64, Scheme)>> {
        let (jobs, outs) = (self.tensor_jobs.len(), self.tensors.len());
        self.quantize(index, choices)?;
        let scheme = match self.tensor_jobs.last().map(|u| &u.action) {
            Some(Action::Pack(pack)) if self.tensor_jobs.len() > jobs => pack.scheme,
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
