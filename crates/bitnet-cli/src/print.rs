//! The one place that prints results: tables for people, one JSON document for programs.

use anyhow::Context;
use std::io::{self, IsTerminal, Write};

/// What a command that ran to its end answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done, or yes.
    Yes,
    /// A gate failed, or the file is damaged.
    No,
}

/// What an error of stdout begins with.
pub(crate) const CANNOT_WRITE: &str = "cannot write to stdout";

/// A note on stderr. Where stderr cannot be written, the note is lost and nothing else happens.
pub(crate) fn note(text: impl AsRef<str>) {
    stderr_line(format!("note: {}", printable(text.as_ref())));
}

/// A text without the byte order mark that some editors write before it; says so.
pub(crate) fn without_bom(text: String, from: &str) -> String {
    match text.strip_prefix('\u{feff}') {
        Some(rest) => {
            note(format!(
                "{from}: the byte order mark at its start is not part of the text"
            ));
            rest.to_string()
        }
        None => text,
    }
}

/// A line on stderr, if it can be written.
pub(crate) fn stderr_line(line: impl AsRef<str>) {
    let _ = writeln!(io::stderr(), "{}", line.as_ref());
}

/// Collects what a command prints, so that a command that fails prints nothing.
pub(crate) struct Output {
    json: bool,
    text: String,
    bytes: Option<Vec<u8>>,
    document: Option<serde_json::Value>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json,
            text: String::new(),
            bytes: None,
            document: None,
        }
    }

    /// A line for people.
    pub(crate) fn line(&mut self, line: impl AsRef<str>) {
        self.text += printable(line.as_ref().trim_end()).as_str();
        self.text.push('\n');
    }

    /// Prints the text of a model at once. On a terminal, control characters other than line feeds
    /// and tabs are escaped; elsewhere the text is printed as it is.
    pub(crate) fn stream(&mut self, text: &str) -> anyhow::Result<()> {
        if self.json {
            return Ok(());
        }
        if !io::stdout().is_terminal() {
            return self.raw(text.as_bytes());
        }
        let mut shown = String::new();
        for c in text.chars() {
            if !c.is_control() || matches!(c, '\n' | '\t') {
                shown.push(c);
            } else {
                shown.extend(c.escape_default());
            }
        }
        self.raw(shown.as_bytes())
    }

    /// A table for people.
    pub(crate) fn table(&mut self, table: &Table) {
        for line in table.lines() {
            self.line(line);
        }
    }

    /// The document for programs.
    pub(crate) fn document(&mut self, document: serde_json::Value) {
        self.document = Some(document);
    }

    /// Bytes as they are, for people and programs alike.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)
            .and_then(|()| out.flush())
            .context(CANNOT_WRITE)
    }

    /// Bytes that are the result, in place of lines.
    pub(crate) fn bytes(&mut self, bytes: Vec<u8>) {
        self.bytes = Some(bytes);
    }

    /// Prints what was collected.
    pub(crate) fn flush(&mut self) -> anyhow::Result<()> {
        let text = match &self.document {
            Some(document) if self.json => format!("{document:#}\n"),
            _ => std::mem::take(&mut self.text),
        };
        match self.bytes.take().filter(|_| !self.json) {
            Some(bytes) => self.raw(&bytes),
            None => self.raw(text.as_bytes()),
        }
    }
}

/// Control characters as escapes: names come from files, and must not steer a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}

/// Rows of cells; the first column is aligned left, the others right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|s| (*s).into()).collect()],
        }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows
            .push(cells.iter().map(|cell| printable(cell)).collect());
    }

    fn lines(&self) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| {
            self.rows
                .iter()
                .filter_map(|r| r.get(c))
                .map(|s| s.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate();
            cells
                .map(|(c, (cell, &w))| {
                    if c == 0 {
                        format!("{cell:<w$}")
                    } else {
                        format!("{cell:>w$}")
                    }
                })
                .collect::<Vec<_>>()
                .join("  ")
        };
        let mut lines: Vec<String> = self.rows.iter().map(line).collect();
        lines.insert(
            1,
            "-".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1)),
        );
        lines
    }
}

/// Bytes for people.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..10_000 => format!("{n} B"),
        10_000..10_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// Decibels for people.
pub(crate) fn decibels(db: f64) -> String {
    if db.is_infinite() && db > 0.0 {
        "exact".into()
    } else {
        format!("{db:.2}")
    }
}

/// A shape for people.
pub(crate) fn shape(shape: &[usize]) -> String {
    if shape.is_empty() {
        "scalar".into()
    } else {
        shape
            .iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join("×")
    }
}

/// A share in percent.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}

/// A number whose size is not known.
pub(crate) fn scientific(x: f64) -> String {
    if x == 0.0 {
        "0".into()
    } else {
        format!("{x:.2e}")
    }
}
