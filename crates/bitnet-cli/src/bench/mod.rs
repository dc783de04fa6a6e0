//! Speed of prefill and decode of a model, beside what the machine can do at most.

mod ceilings;

use crate::args::model::BenchArgs;
use crate::progress::interrupt;
use bitnet_inference::{Error, LoadOptions, Model, Session};
use bitnet_kernels::Isa;
use ceilings::{Ceilings, peak_memory};
use std::sync::atomic::Ordering;
use std::time::Instant;

pub(crate) use ceilings::SpeedRange;

/// Everything that `bitnet bench` prints.
pub(crate) struct SpeedReport {
    pub(crate) name: String,
    pub(crate) made_up: bool,
    pub(crate) load_seconds: f64,
    pub(crate) threads: usize,
    pub(crate) isa: Isa,
    pub(crate) prefill: SpeedRange,
    pub(crate) decode: SpeedRange,
    /// Bytes per second of a plain read, and the decode speed as a share of it.
    pub(crate) read: SpeedRange,
    pub(crate) decode_share: f64,
    /// int8 multiply-adds per second, and the prefill speed as a share of it.
    pub(crate) products: Option<SpeedRange>,
    pub(crate) prefill_share: Option<f64>,
    /// int8 multiply-adds of the prefill.
    pub(crate) integers: usize,
    pub(crate) bytes_per_token: usize,
    pub(crate) weight_bytes: usize,
    pub(crate) cache_bytes: usize,
    pub(crate) peak_bytes: Option<u64>,
}

/// Loads the model and measures it and the machine in turns.
pub(crate) fn measure(args: &BenchArgs, options: &LoadOptions) -> anyhow::Result<SpeedReport> {
    let begin = Instant::now();
    let (name, model) = match (&args.model, &args.shape) {
        (Some(path), _) => (path.display().to_string(), Model::load_with(path, options)?),
        (None, Some(shape)) => (
            format!("{shape}, synthetic weights"),
            Model::synthetic_shape(shape, options)?,
        ),
        (None, None) => anyhow::bail!("expected a model or --shape, got none"),
    };
    let load_seconds = begin.elapsed().as_secs_f64();
    let (prompt, count) = (args.prompt as usize, args.tokens as usize);
    let mut session = model.session(prompt + count, args.cache.kind)?;
    let cache_bytes = session.cache_bytes();
    // A token reads the weights and, on average, the cache of half the tokens decoded before it.
    let bytes_per_token =
        model.bytes_per_token() + cache_bytes * (2 * prompt + count) / (2 * (prompt + count));
    let (mut prefill, mut decode, mut ceilings) = (vec![], vec![], None);
    let mut peak_bytes = None;
    // One repetition more, which is not counted: it touches memory for the first time.
    for repetition in 0..=args.repeat {
        let (prefilled, decoded) = repeat(args, &model, &mut session)?;
        // Memory of the ceilings below is not the model's.
        peak_bytes = peak_bytes.or_else(peak_memory);
        let ceilings = match &mut ceilings {
            None => ceilings.insert(Ceilings::new(model.threads(), bytes_per_token)?),
            Some(ceilings) => ceilings,
        };
        if repetition > 0 {
            prefill.push(prompt as f64 / prefilled);
            decode.push(count as f64 / decoded);
            ceilings.measure();
        }
    }
    let ceilings = ceilings.ok_or_else(|| anyhow::anyhow!("nothing was measured"))?;
    let (prefill, decode) = (SpeedRange::new(prefill), SpeedRange::new(decode));
    let (read, products) = (ceilings.read(), ceilings.products());
    let integers = model.integer_products(prompt, 1);
    Ok(SpeedReport {
        name,
        made_up: args.shape.is_some(),
        load_seconds,
        threads: model.threads(),
        isa: options.kernels.isa(),
        decode_share: decode.median * bytes_per_token as f64 / read.median,
        prefill_share: products
            .as_ref()
            .filter(|_| integers > 0)
            .map(|p| prefill.median / prompt as f64 * integers as f64 / p.median),
        prefill,
        decode,
        read,
        products,
        integers,
        bytes_per_token,
        weight_bytes: model.bytes(),
        cache_bytes,
        peak_bytes,
    })
}

/// Seconds of one prefill and of the decoding after it.
fn repeat(
    args: &BenchArgs,
    model: &Model,
    session: &mut Session<'_>,
) -> anyhow::Result<(f64, f64)> {
    let vocab = model.config().vocab as u32;
    // Any tokens do: the time depends on their number.
    let tokens: Vec<u32> = (0..args.prompt)
        .map(|i| i.wrapping_mul(2_654_435_761) % vocab)
        .collect();
    session.clear();
    let begin = Instant::now();
    session.prefill(&tokens)?;
    let prefilled = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    for i in 0..args.tokens {
        if interrupt().load(Ordering::Relaxed) {
            return Err(Error::Interrupted.into());
        }
        session.decode(i % vocab)?;
    }
    Ok((prefilled, begin.elapsed().as_secs_f64()))
}
