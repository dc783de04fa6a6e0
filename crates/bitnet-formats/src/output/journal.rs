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
}

/// First line of the journal.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Title {
    pub(super) job: String,
}
