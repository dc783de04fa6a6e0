//! Runs a planned job: the whole model, tensor by tensor, in bounded memory.
//!
//! ```text
//! for each tensor:                                      (this thread)           (writer thread)
//!   tensor granularity: passes over strips ── fit ──┐
//!   strips of rows, in windows, on all threads:     ▼
//!     read ─► f32 ─► quantize ─► measure ─► pack ─► in order ──── channel ───► checksum ─► write ─► journal
//! ```
//!
//! Strips and their order do not depend on the number of threads, so neither do the bytes. Memory
//! holds a window of strips; the values of one tensor (a byte each) only where its layout packs a
//! matrix as a whole.

use crate::plan::Job;
pub use crate::report::{Options, Progress, Summary, TensorReport};
use crate::rows::thread_pool;
use crate::target::{Outputs, check_target, place_folder, weights_name};
use crate::worker::{Worker, WriterMessage};
use crate::{Error, Result};
use bitnet_formats::output::{Writer, is_placing};
use bitnet_formats::replace;
pub use bitnet_formats::replace::Existing;
use std::fs;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

/// Runs a job and writes `target`.
///
/// An interrupted or killed run leaves a partial file beside the target; the same job resumes from
/// it and ends with the same bytes. Any other failure leaves nothing behind.
///
/// # Errors
/// [`Error::Exists`], [`Error::SameFile`], [`Error::Interrupted`], [`Error::Tensor`] for weights
/// that cannot be quantized, and [`Error::File`] for what cannot be read or written.
pub fn run(job: &Job<'_>, target: &Path, options: &Options<'_>) -> Result<Summary> {
    let start = Instant::now();
    if job.sidecars.is_some() {
        replace::recover_folder(&replace::beside(target, replace::PARTIAL), target)?;
    }
    let outputs = Outputs {
        sidecars: job.sidecars.as_ref(),
        weights: job.layout.files(match &job.sidecars {
            Some(sidecars) => Path::new(weights_name(sidecars)),
            None => target,
        }),
    };
    // What a killed run of this job gave its name is no obstacle.
    if job.sidecars.is_some() || !is_placing(target, &job.layout) {
        check_target(job.source, &outputs, target, options.existing)?;
    }
    let folder = job
        .sidecars
        .is_some()
        .then(|| replace::beside(target, replace::PARTIAL));
    let pool = thread_pool(options.threads)?;
    let file = match (&folder, &job.sidecars) {
        (Some(folder), Some(sidecars)) => match fs::create_dir(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(bitnet_formats::Error::io(folder, "create")(error).into());
            }
            _ => folder.join(weights_name(sidecars)),
        },
        _ => target.to_path_buf(),
    };
    let writer = Writer::open(&file, job.layout.clone()).inspect_err(|_| {
        // Only if it is empty: it may be the work of another process.
        folder
            .iter()
            .for_each(|folder| drop(fs::remove_dir(folder)));
    })?;
    // The writer holds its lock from here on, so this process owns the folder.
    let clean = |error: Error| {
        if let (Some(folder), false) = (&folder, matches!(error, Error::Interrupted)) {
            let _ = fs::remove_dir_all(folder);
        }
        error
    };
    let resumed = writer.notes().len();
    let mut reports: Vec<TensorReport> = writer
        .notes()
        .iter()
        .filter_map(|note| serde_json::from_value(note.clone()).ok())
        .collect();

    let (writer, outcome) = work(job, options, &pool, writer, resumed);
    let fresh: Vec<TensorReport> = match outcome {
        Ok(fresh) => fresh,
        Err(error) => {
            if !matches!(error, Error::Interrupted) {
                writer.abandon();
            }
            return Err(clean(error));
        }
    };
    reports.extend(fresh);
    // The folder is ours, whatever an earlier run left in it.
    let existing = match folder {
        Some(_) => Existing::Replace,
        None => options.existing,
    };
    let file_bytes = writer.finish(existing).map_err(|e| clean(e.into()))?;
    let kept = match &folder {
        Some(folder) => place_folder(folder, &outputs, target, options.existing).map_err(clean)?,
        None => vec![],
    };
    let files = outputs.weights.into_iter();
    let files = files.map(|file| match &folder {
        Some(_) => target.join(file),
        None => file,
    });
    Ok(Summary {
        tensors: reports,
        kept,
        files: files.collect(),
        file_bytes,
        input_bytes: job.input_bytes(),
        resumed,
        elapsed: start.elapsed(),
    })
}

/// Processes the tensors after the first `resumed` on the threads of `pool`, while another thread
/// writes. Returns the writer, which a failed job abandons.
fn work(
    job: &Job<'_>,
    options: &Options<'_>,
    pool: &rayon::ThreadPool,
    writer: Writer,
    resumed: usize,
) -> (Writer, Result<Vec<TensorReport>>) {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel::<WriterMessage>(4);
        let thread = scope.spawn(move || {
            let mut writer = writer;
            for message in receiver {
                if let Err(error) = message.apply(&mut writer) {
                    return (writer, Err(error));
                }
            }
            (writer, Ok(()))
        });
        let worked = pool.install(|| {
            let mut fresh = vec![];
            for tensor_job in &job.tensor_jobs[resumed.min(job.tensor_jobs.len())..] {
                let worker = Worker {
                    job,
                    tensor_job,
                    options,
                    out: &sender,
                };
                fresh.push(worker.run()?);
            }
            Ok(fresh)
        });
        drop(sender);
        // The panicking thread has printed why; pass the panic on.
        let (writer, written) = thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // An error of the writer comes first: it is why the channel closed.
        match (written, worked) {
            (Err(error), _) => (writer, Err(Error::from(error))),
            (Ok(()), outcome) => (writer, outcome),
        }
    })
}
