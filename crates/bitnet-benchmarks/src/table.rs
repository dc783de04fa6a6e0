//! The results as text for the terminal.

use bitnet_benchmarks::results::{BenchmarkDocument, ContenderRow, MedianRange};
use std::fmt::Write;

/// Tables with aligned columns: the ceilings, then each case.
pub(crate) fn text(document: &BenchmarkDocument) -> String {
    let machine = &document.machine;
    let mut out = format!(
        "{}, {} processor(s), {}; {}\n",
        machine.cpu,
        machine.processors,
        machine.isas.join(" "),
        document.date
    );
    let set = document.working_set_bytes >> 20;
    let _ = writeln!(
        out,
        "median (smallest … largest) of {} turns; working set of data from memory: {set} MiB",
        document.turns
    );
    let head = ["ceiling", "threads", "rate"].map(String::from).to_vec();
    let rows = document.ceilings.iter().map(|c| {
        vec![
            c.name.clone(),
            c.threads.to_string(),
            giga(&c.rate) + " " + c.unit.giga(),
        ]
    });
    table(&mut out, head, rows.collect());
    let mut rest = document.rows.as_slice();
    while let Some(first) = rest.first() {
        let case = |r: &ContenderRow| (r.operation.clone(), r.shape.clone(), r.threads);
        let (rows, after) = rest.split_at(
            rest.iter()
                .position(|r| case(r) != case(first))
                .unwrap_or(rest.len()),
        );
        rest = after;
        let title = format!(
            "{}, {}, {} thread(s)",
            first.operation, first.shape, first.threads
        );
        let head = vec![
            title,
            first.unit.giga().into(),
            "share of the ceiling".into(),
            "ours is × as fast".into(),
        ];
        let row = |r: &ContenderRow| {
            let share = r
                .share
                .as_ref()
                .map(|s| scaled(s, 100.0, 0) + " %")
                .zip(r.ceiling.as_ref())
                .map(|(s, c)| format!("{s} of {c}"));
            let ratio = r.ratio.as_ref().map(|ratio| scaled(ratio, 1.0, 2));
            vec![
                r.contender.clone(),
                giga(&r.rate),
                share.unwrap_or_default(),
                ratio.unwrap_or_default(),
            ]
        };
        table(&mut out, head, rows.iter().map(row).collect());
    }
    out
}

fn giga(spread: &MedianRange) -> String {
    scaled(spread, 1e-9, if spread.median < 10e9 { 2 } else { 1 })
}

fn scaled(spread: &MedianRange, factor: f64, digits: usize) -> String {
    let [low, median, high] = [spread.smallest, spread.median, spread.largest]
        .map(|x| format!("{:.digits$}", x * factor));
    format!("{median} ({low} … {high})")
}

/// Appends a table. The first column is aligned left, the others right.
fn table(out: &mut String, head: Vec<String>, rows: Vec<Vec<String>>) {
    let all: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |c: usize| {
        all.iter()
            .filter_map(|row| row.get(c))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..all[0].len()).map(width).collect();
    for (i, row) in all.iter().enumerate() {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, &w))| {
            if c == 0 {
                format!("{cell:<w$}")
            } else {
                format!("{cell:>w$}")
            }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(out, "{}{}", if i == 0 { "\n" } else { "" }, line.trim_end());
        if i == 0 {
            let _ = writeln!(
                out,
                "{}",
                "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1))
            );
        }
    }
}
