//! The document that `compare` writes and `report` reads.

use crate::selection::OperationGroup;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::Path;

/// The value of `format`.
pub const FORMAT: &str = "bitnet-benchmarks";
/// The version of the document that this program writes and reads.
pub const VERSION: u32 = 1;
/// Limit on the size of a document in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Smallest, median and largest value of the turns.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MedianRange {
    /// The smallest value.
    pub smallest: f64,
    /// The median; for an even number of turns the upper of the middle two.
    pub median: f64,
    /// The largest value.
    pub largest: f64,
}

impl MedianRange {
    /// Summarizes the values of all turns.
    ///
    /// # Panics
    /// If `all` is empty.
    pub fn from_turns(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        Self {
            smallest: all[0],
            median: all[all.len() / 2],
            largest: all[all.len() - 1],
        }
    }
}

/// Unit of a rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RateUnit {
    /// Bytes per second.
    #[serde(rename = "B/s")]
    Bytes,
    /// Weights per second.
    #[serde(rename = "weights/s")]
    Weights,
    /// Multiply-adds per second.
    #[serde(rename = "MAC/s")]
    Macs,
}

impl RateUnit {
    /// Name of the unit times 10⁹.
    pub const fn giga(self) -> &'static str {
        match self {
            Self::Bytes => "GB/s",
            Self::Weights => "G weights/s",
            Self::Macs => "G MAC/s",
        }
    }
}

/// The measurements of one contender in one case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContenderRow {
    /// OperationGroup of the operation.
    pub group: OperationGroup,
    /// The operation.
    pub operation: String,
    /// Shape of the data, N × K for weights, and where the data lies.
    pub shape: String,
    /// Number of threads.
    pub threads: usize,
    /// Name of the contender.
    pub contender: String,
    /// Whether it is this engine.
    pub ours: bool,
    /// RateUnit of `rate`.
    pub unit: RateUnit,
    /// Number of turns in which the contender ran.
    pub turns: usize,
    /// Work per second.
    pub rate: MedianRange,
    /// Name of the nearest ceiling, if one is known.
    pub ceiling: Option<String>,
    /// Share of that ceiling, measured in the same turns; 1 is the whole ceiling.
    pub share: Option<MedianRange>,
    /// Name of the contender that it is compared with.
    pub base: Option<String>,
    /// Time of this contender divided by that of `base`, turn by turn.
    pub ratio: Option<MedianRange>,
}

/// A ceiling, measured before the operations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CeilingRow {
    /// Name of the ceiling.
    pub name: String,
    /// Number of threads.
    pub threads: usize,
    /// RateUnit of `rate`.
    pub unit: RateUnit,
    /// What the machine reaches per second.
    pub rate: MedianRange,
}

/// One cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuCache {
    /// Level; 1 is nearest to the core.
    pub level: u32,
    /// Data, Instruction or Unified.
    pub kind: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// What the system tells about the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineFacts {
    /// Name of the processor.
    pub cpu: String,
    /// Logical processors that this process may use.
    pub processors: usize,
    /// The caches that the first processor sees.
    pub caches: Vec<CpuCache>,
    /// Available memory in bytes.
    pub available_bytes: Option<u64>,
    /// Operating system and architecture.
    pub system: String,
    /// Instruction sets that the kernels can use on this machine, narrow to wide.
    pub isas: Vec<String>,
}

/// The document: all results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchmarkDocument {
    /// Always [`FORMAT`].
    pub format: String,
    /// Always [`VERSION`].
    pub version: u32,
    /// Version of this program.
    pub program: String,
    /// Start of the run in UTC, by the system's clock.
    pub date: String,
    /// The command line.
    pub command: Vec<String>,
    /// The machine that ran.
    pub machine: MachineFacts,
    /// Number of turns of a case.
    pub turns: usize,
    /// Size in bytes of a working set that comes from memory.
    pub working_set_bytes: usize,
    /// The ceilings, for each number of threads.
    pub ceilings: Vec<CeilingRow>,
    /// The contenders of all cases.
    pub rows: Vec<ContenderRow>,
}

impl BenchmarkDocument {
    /// Parses a document.
    ///
    /// # Errors
    /// If the text is no document of this format and version.
    pub fn parse(text: &str) -> Result<Self> {
        // Format and version are checked before the rest, so that the message names the cause.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_str(text).context("no document of this program")?;
        if head.format != FORMAT || head.version != VERSION {
            bail!(
                "expected {FORMAT} version {VERSION}, got {} version {}",
                head.format,
                head.version
            );
        }
        Ok(serde_json::from_str(text)?)
    }

    /// Reads a document from a file.
    ///
    /// # Errors
    /// If the file cannot be read, or as [`BenchmarkDocument::parse`] finds.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let mut text = String::new();
            std::fs::File::open(path)?
                .take(MAX_BYTES + 1)
                .read_to_string(&mut text)?;
            if text.len() as u64 > MAX_BYTES {
                bail!("more than {MAX_BYTES} bytes");
            }
            Self::parse(&text)
        };
        read().with_context(|| path.display().to_string())
    }
}
