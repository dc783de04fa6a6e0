//! The report: one HTML file that refers to nothing outside itself.

use crate::results::{BenchmarkDocument, ContenderRow, MedianRange};
use crate::selection::OperationGroup;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::fmt::Write;

/// Colours of chart and tables, with a dark scheme and one for print.
const STYLE: &str = "
:root {
  color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d5d5d5;
  --ours: #1668b8; --other: #9a9a9a; --soft: #f3f5f8;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e4e4e4; --paper: #16181b; --line: #3a3f45;
  --ours: #5aa9f5; --other: #777; --soft: #1f2328;
} }
@media print {
  :root {
    --ink: #000; --paper: #fff; --line: #bbb; --ours: #1668b8; --other: #999; --soft: #fff;
  }
  section { break-inside: avoid; }
  nav { display: none; }
}
body {
  font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.5rem; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); font-weight: 600; }
tr.ours td:first-child { font-weight: 600; color: var(--ours); }
small { opacity: .7; }
code { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dd { margin: 0; }
svg { display: block; width: 100%; max-width: 46rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .ours { fill: var(--ours); }
svg .other { fill: var(--other); }
svg line { stroke: var(--ink); stroke-width: 1; }
";

/// The whole page.
pub fn html(document: &BenchmarkDocument) -> String {
    let machine = &document.machine;
    let mut groups: Vec<_> = document.rows.iter().map(|r| r.group).collect();
    groups.sort_by_key(|g| OperationGroup::ALL.iter().position(|x| x == g));
    groups.dedup();
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "bitnet-quant: kernels on " (machine.cpu) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "bitnet-quant: kernels on " (machine.cpu) }
                (facts(document))
                p {
                    "Each figure is the median of " (document.turns) " turns, with the smallest "
                    "and the largest beside it. In a turn the ceilings and all contenders of a "
                    "case run one after another; shares and ratios are taken turn by turn. Data "
                    "from memory cycles through a working set of "
                    (bytes(document.working_set_bytes as u64)) " for each contender. A ratio says "
                    "how many times as fast the contender in parentheses is."
                }
                nav { @for group in &groups { a href={ "#" (group) } { (group) } " " } }
                (ceilings(document))
                @for group in &groups {
                    h2 id=(group) { (group) }
                    @for rows in cases(document).filter(|rows| rows[0].group == *group) {
                        (case(rows))
                    }
                }
            }
        }
    };
    page.into_string()
}

/// The machine and the run.
fn facts(document: &BenchmarkDocument) -> Markup {
    let machine = &document.machine;
    let caches: Vec<_> = machine
        .caches
        .iter()
        .map(|c| format!("L{} {} {}", c.level, c.kind, bytes(c.bytes)))
        .collect();
    html! {
        dl {
            dt { "date" } dd { (document.date) }
            dt { "processors" } dd { (machine.processors) ", " (machine.system) }
            dt { "caches" } dd { (caches.join(", ")) }
            @if let Some(available) = machine.available_bytes {
                dt { "memory" } dd { (bytes(available)) " available" }
            }
            dt { "instruction sets" } dd { (machine.isas.join(", ")) }
            dt { "command" } dd { code { (document.command.join(" ")) } }
            dt { "program" } dd { (document.program) }
        }
    }
}

fn ceilings(document: &BenchmarkDocument) -> Markup {
    html! {
        h2 { "Ceilings" }
        table {
            thead { tr { th { "ceiling" } th { "threads" } th { "rate" } } }
            tbody {
                @for ceiling in &document.ceilings {
                    tr {
                        td { (ceiling.name) }
                        td { (ceiling.threads) }
                        td { (range(&ceiling.rate, 1e-9, 1)) " " (ceiling.unit.giga()) }
                    }
                }
            }
        }
    }
}

/// The rows of each operation, shape and number of threads, in the order of the document.
fn cases(document: &BenchmarkDocument) -> impl Iterator<Item = &[ContenderRow]> {
    document
        .rows
        .chunk_by(|a, b| (&a.operation, &a.shape, a.threads) == (&b.operation, &b.shape, b.threads))
}

fn case(rows: &[ContenderRow]) -> Markup {
    let first = &rows[0];
    let threads = if first.threads == 1 {
        " thread"
    } else {
        " threads"
    };
    html! {
        section {
            h3 { (first.operation) ", " (first.shape) ", " (first.threads) (threads) }
            (chart(rows))
            table {
                thead {
                    tr {
                        th { "contender" }
                        th { (first.unit.giga()) }
                        th { "share" }
                        th { "of" }
                        th { "ratio" }
                        th { "turns" }
                    }
                }
                tbody { @for row in rows { (table_row(row)) } }
            }
        }
    }
}

fn table_row(row: &ContenderRow) -> Markup {
    html! {
        tr .ours[row.ours] {
            td { (row.contender) }
            td { (range(&row.rate, 1e-9, 2)) }
            td { @if let Some(share) = &row.share { (range(share, 100.0, 0)) " %" } }
            td { @if let Some(ceiling) = &row.ceiling { (ceiling) } }
            td {
                @if let (Some(ratio), Some(base)) = (&row.ratio, &row.base) {
                    (range(ratio, 1.0, 2)) " " small { "(" (base) ")" }
                }
            }
            td { (row.turns) }
        }
    }
}

/// A bar from 0 to the median for each contender, with a line from the smallest to the largest
/// value.
fn chart(rows: &[ContenderRow]) -> Markup {
    let [left, bar, right, step] = [190.0, 480.0, 70.0, 22.0];
    let top = rows
        .iter()
        .map(|r| r.rate.largest)
        .fold(f64::MIN_POSITIVE, f64::max);
    let x = |rate: f64| left + bar * rate / top;
    let (width, height) = (left + bar + right, step * rows.len() as f64 + 4.0);
    let mut bars = String::new();
    for (i, row) in rows.iter().enumerate() {
        let y = step * i as f64 + 4.0;
        let MedianRange {
            smallest,
            median,
            largest,
        } = row.rate;
        let (class, end, middle) = (if row.ours { "ours" } else { "other" }, x(median), y + 8.0);
        let _ = write!(
            bars,
            r#"<rect class="{class}" x="{left}" y="{y:.1}" width="{:.1}" height="16"/>"#,
            end - left
        );
        let _ = write!(
            bars,
            r#"<line x1="{:.1}" x2="{:.1}" y1="{middle:.1}" y2="{middle:.1}"/>"#,
            x(smallest),
            x(largest)
        );
        let baseline = format!("{:.1}", y + 12.0);
        let labels = html! {
            text x=(left - 8.0) y=(baseline) text-anchor="end" { (row.contender) }
            text x=(format!("{:.1}", x(largest) + 6.0)) y=(baseline) {
                (format!("{:.2}", median / 1e9))
            }
        };
        bars += &labels.into_string();
    }
    let label = format!("{} of each contender", rows[0].unit.giga());
    let view = format!("0 0 {width} {height}");
    html! { svg viewBox=(view) role="img" aria-label=(label) { (PreEscaped(bars)) } }
}

fn range(range: &MedianRange, factor: f64, digits: usize) -> Markup {
    let [low, median, high] =
        [range.smallest, range.median, range.largest].map(|x| format!("{:.digits$}", x * factor));
    html! { (median) " " small { "(" (low) " … " (high) ")" } }
}

fn bytes(n: u64) -> String {
    match n {
        0..1_048_576 => format!("{} KiB", n / 1024),
        1_048_576..10_737_418_240 => format!("{} MiB", n >> 20),
        _ => format!("{} GiB", n >> 30),
    }
}
