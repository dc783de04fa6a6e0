//! The document that `compare` writes and `report` reads.

use crate::operations::Group;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::path::Path;

/// What `format` says.
pub const FORMAT: &str = "bitnet-benchmarks";
/// The version that is written and read.
pub const VERSION: u32 = 1;
/// No document is larger.
const MAX_BYTES: u64 = 64 << 20;

/// Smallest, median and largest of some measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// The smallest.
    pub smallest: f64,
    /// The middle one; of an even number the upper of two.
    pub median: f64,
    /// The largest.
    pub largest: f64,
}

impl Spread {
    /// Of at least one measurement.
    ///
    /// # Panics
    /// If there is none.
    pub fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        Self {
            smallest: all[0],
            median: all[all.len() / 2],
            largest: all[all.len() - 1],
        }
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Bytes a second.
    #[serde(rename = "B/s")]
    Bytes,
    /// Weights a second.
    #[serde(rename = "weights/s")]
    Weights,
    /// Multiply-adds a second.
    #[serde(rename = "MAC/s")]
    Macs,
}

impl Unit {
    /// In billions.
    pub const fn giga(self) -> &'static str {
        match self {
            Self::Bytes => "GB/s",
            Self::Weights => "G weights/s",
            Self::Macs => "G MAC/s",
        }
    }
}

/// One contender in one case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Group of the operation.
    pub group: Group,
    /// The operation.
    pub operation: String,
    /// On what: N × K of the weights, and where they are.
    pub shape: String,
    /// With how many threads.
    pub threads: usize,
    /// Who.
    pub contender: String,
    /// Whether it is this engine.
    pub ours: bool,
    /// Unit of `rate`.
    pub unit: Unit,
    /// Turns it took part in.
    pub turns: usize,
    /// What it does in a second.
    pub rate: Spread,
    /// Which ceiling is nearest, if one is known.
    pub ceiling: Option<String>,
    /// The share of that ceiling, measured in the same turns: 1 is all of it.
    pub share: Option<Spread>,
    /// With whom it is compared.
    pub base: Option<String>,
    /// How many times as fast `base` is, turn by turn.
    pub ratio: Option<Spread>,
}

/// A ceiling, measured before the operations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CeilingRow {
    /// What.
    pub name: String,
    /// With how many threads.
    pub threads: usize,
    /// Unit of `rate`.
    pub unit: Unit,
    /// What the machine does in a second.
    pub rate: Spread,
}

/// One cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// 1 is the nearest.
    pub level: u32,
    /// Data, Instruction or Unified.
    pub kind: String,
    /// Its size.
    pub bytes: u64,
}

/// The machine, as far as the system tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// Name of the processor.
    pub cpu: String,
    /// Logical processors that this process may use.
    pub processors: usize,
    /// The caches that the first processor sees.
    pub caches: Vec<Cache>,
    /// Memory that was available.
    pub available_bytes: Option<u64>,
    /// Operating system and architecture.
    pub system: String,
    /// Instruction sets that the kernels can use here, narrow to wide.
    pub isas: Vec<String>,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Always [`FORMAT`].
    pub format: String,
    /// Always [`VERSION`].
    pub version: u32,
    /// Version of this program.
    pub program: String,
    /// When it began, by the system's clock, in UTC.
    pub date: String,
    /// The command line.
    pub command: Vec<String>,
    /// The machine.
    pub machine: Facts,
    /// Turns of a case.
    pub turns: usize,
    /// Bytes that are cycled through where data comes from memory.
    pub working_set_bytes: usize,
    /// The ceilings.
    pub ceilings: Vec<CeilingRow>,
    /// The contenders.
    pub rows: Vec<Row>,
}

impl Document {
    /// Parses a document.
    ///
    /// # Errors
    /// If it is not one, or of another version.
    pub fn parse(text: &str) -> Result<Self> {
        // What it is comes before whether all of it is right, so that the message is about the
        // cause.
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
    /// If there is none, or what [`Document::parse`] finds.
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

/// A file that is there whole or not at all: written beside its name and renamed.
#[derive(Debug)]
pub struct Target<'a> {
    path: &'a Path,
    file: tempfile::NamedTempFile,
}

impl<'a> Target<'a> {
    /// Before the work, so that a place that cannot be written to costs no time.
    ///
    /// # Errors
    /// If nothing can be written there.
    pub fn new(path: &'a Path) -> Result<Self> {
        let open = || -> Result<_> {
            if path.is_dir() {
                bail!("is a folder");
            }
            let folder = path
                .parent()
                .filter(|p| !p.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            Ok(tempfile::NamedTempFile::new_in(folder)?)
        };
        let file = open().with_context(|| path.display().to_string())?;
        Ok(Self { path, file })
    }

    /// Writes it and gives it its name.
    ///
    /// # Errors
    /// If the system does not write it.
    pub fn write(mut self, text: &str) -> Result<()> {
        let result = self
            .file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.persist(self.path).map(drop).map_err(|e| e.error));
        result.with_context(|| self.path.display().to_string())
    }
}
