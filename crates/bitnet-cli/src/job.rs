//! Runs a job with a progress bar and Ctrl-C.

use crate::args::checkpoint::JobArgs;
use crate::print::Output;
use crate::progress::{ByteBar, interrupt};
use crate::report;
use bitnet_checkpoint::job::{self, Existing, Options};
use bitnet_checkpoint::recipe::Compute;
use bitnet_checkpoint::{Error, Job, Source};

/// Calls `f` with a progress bar over `total` bytes, Ctrl-C, and the threads and kernels that flags
/// and configuration ask for.
pub(crate) fn with_options<T>(
    args: &JobArgs,
    compute: &Compute,
    total: u64,
    f: impl FnOnce(&Options<'_>) -> bitnet_checkpoint::Result<T>,
) -> anyhow::Result<T> {
    let bar = ByteBar::new(total, args.quiet.quiet);
    let threads = match args.threads {
        0 => compute.threads,
        n => n,
    };
    let existing = match args.force {
        true => Existing::Replace,
        false => Existing::Refuse,
    };
    let result = f(&Options {
        threads,
        kernels: compute.machine()?.kernels,
        progress: &bar,
        interrupt: interrupt(),
        existing,
    });
    result.map_err(|error| match error {
        Error::Exists { .. } => anyhow::anyhow!("{error}; --force replaces it"),
        error => error.into(),
    })
}

/// Runs the job and prints what became of each tensor.
pub(crate) fn run(
    job: Job<'_>,
    source: &Source,
    args: &JobArgs,
    compute: &Compute,
    out: &mut Output,
) -> anyhow::Result<()> {
    let job = &match args.shard_size {
        Some(size) => job.with_shard_size(size, &args.out)?,
        None => job,
    };
    let summary = with_options(args, compute, job.input_bytes(), |options| {
        job::run(job, &args.out, options)
    })?;
    let input_bytes = source.files().iter().map(|f| f.len).sum();
    let mut notes = [job.losses.as_slice(), &job.notes].concat();
    if args.quiet.quiet {
        for loss in &job.losses {
            out.line(format!("note: {loss}"));
        }
    }
    if let Some(share) = &job.stays_float {
        if share.surprising && args.quiet.quiet {
            // Most people want to know this, whatever else they do not want to read.
            out.line(format!("note: {}", share.text));
        }
        notes.push(share.text.clone());
    }
    if !summary.kept.is_empty() {
        notes.push(format!(
            "of the folder that was {} these stay: {}",
            args.out.display(),
            summary.kept.join(", ")
        ));
    }
    report::print(&summary, &notes, input_bytes, args, out);
    // It belongs to the result: without notes it is said too.
    if args.quiet.quiet && source.has_foreign() {
        source
            .already_quantized()
            .iter()
            .for_each(|what| out.line(what));
    }
    Ok(())
}
