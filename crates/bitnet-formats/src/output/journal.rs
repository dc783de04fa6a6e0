//! The journal: a line of JSON for each unit of work that is done.

use super::plan::OutputId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A finished tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Written {
    pub(super) index: OutputId,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) checksum: String,
}

/// A line of the journal: one unit of work.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct JournalLine {
    pub(super) written: Vec<Written>,
    /// Layouts that were chosen while packing.
    pub(super) layouts: BTreeMap<String, String>,
    /// A note of the caller, returned after a resume.
    pub(super) note: serde_json::Value,
    /// Set in the last line: every file of a set is complete, and they are getting their names.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) placing: bool,
}

/// First line of the journal.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Title {
    pub(super) job: String,
    /// Number of its files.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub(super) shards: usize,
}

fn one() -> usize {
    1
}

fn is_one(shards: &usize) -> bool {
    *shards == 1
}

/// A journal as it was found.
pub(super) struct Found<'a> {
    pub(super) title: Option<Title>,
    /// The lines behind the title that end with a line feed.
    pub(super) lines: Vec<&'a [u8]>,
    /// Bytes of the title's line.
    pub(super) title_len: usize,
}

impl<'a> Found<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        let whole = text.split_inclusive(|&b| b == b'\n');
        let mut lines = whole.filter(|line| line.last() == Some(&b'\n'));
        let first = lines.next();
        Self {
            title: first.and_then(|line| serde_json::from_slice(line).ok()),
            title_len: first.map_or(0, <[u8]>::len),
            lines: lines.collect(),
        }
    }

    /// Whether it is of this job, and every file of it was complete.
    pub(super) fn is_placing(&self, job: &str) -> bool {
        let last = self.lines.last();
        let last: Option<JournalLine> = last.and_then(|line| serde_json::from_slice(line).ok());
        self.title
            .as_ref()
            .is_some_and(|t| t.job == job && t.shards > 1)
            && last.is_some_and(|line| line.placing)
    }
}
