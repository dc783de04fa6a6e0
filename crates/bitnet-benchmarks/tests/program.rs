//! The program from the outside: its results, its report and its messages for bad input. Speed is
//! not tested.

use bitnet_benchmarks::results::{BenchmarkDocument, ContenderRow, MedianRange};
use bitnet_benchmarks::selection::OperationGroup;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

fn run(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bitnet-benchmarks"))
        .current_dir(folder)
        .args(args)
        .output()
        .unwrap()
}

/// Status 2, one line on stderr that holds `parts`, nothing on stdout.
#[track_caller]
fn refused(folder: &Path, args: &[&str], parts: &[&str]) {
    let output = run(folder, args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
    assert!(
        error.starts_with("error: ") && output.stdout.is_empty(),
        "{args:?}: {error}"
    );
    parts
        .iter()
        .for_each(|part| assert!(error.contains(part), "{args:?}: no '{part}' in {error}"));
}

const SMALL: [&str; 12] = [
    "compare",
    "--quick",
    "--turns",
    "2",
    "--working-set",
    "1",
    "--shapes",
    "70x352,5x64",
    "--tokens",
    "2,33",
    "--threads",
    "1,2",
];

#[test]
fn compare_and_report() {
    let folder = tempfile::tempdir().unwrap();
    let output = run(
        folder.path(),
        &[&SMALL[..], &["--output", "results.json"]].concat(),
    );
    let (text, errors) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{errors}");
    let document = BenchmarkDocument::read(&folder.path().join("results.json")).unwrap();

    assert_eq!(document.turns, 2);
    assert_eq!(document.working_set_bytes, 1 << 20);
    assert_eq!(
        document.command[1..],
        [&SMALL[..], &["--output", "results.json"]].concat()
    );
    let year: u32 = document.date[..4].parse().unwrap();
    assert!(
        (2024..3000).contains(&year) && document.date.len() == 20,
        "{}",
        document.date
    );
    assert_eq!(
        document
            .rows
            .iter()
            .map(|r| r.group.to_string())
            .collect::<BTreeSet<_>>(),
        OperationGroup::ALL.iter().map(|g| g.to_string()).collect()
    );
    for threads in [1, 2] {
        assert!(
            document
                .ceilings
                .iter()
                .any(|c| c.threads == threads && c.name == "memory read, huge pages")
        );
    }
    let sound = |s: &MedianRange| {
        s.smallest > 0.0 && s.smallest <= s.median && s.median <= s.largest && s.largest.is_finite()
    };
    assert!(document.ceilings.iter().all(|c| sound(&c.rate)));
    for rows in document
        .rows
        .chunk_by(|a, b| (&a.operation, &a.shape, a.threads) == (&b.operation, &b.shape, b.threads))
    {
        let title = (&rows[0].operation, &rows[0].shape, rows[0].threads);
        assert!(rows[0].ours && rows[0].base.is_none(), "{title:?}");
        // Every instruction set that the machine runs takes part, and each that is not the first is
        // compared with one that is there.
        let all = !title.0.starts_with("other weights");
        for isa in document.machine.isas.iter().filter(|_| all) {
            assert!(
                rows.iter().any(|r| r.contender == format!("bitnet {isa}")),
                "{title:?}: no {isa}"
            );
        }
        for row in rows {
            assert!(sound(&row.rate) && (1..=2).contains(&row.turns), "{row:?}");
            assert_eq!(row.share.is_some(), row.ceiling.is_some(), "{row:?}");
            assert!(
                [&row.share, &row.ratio].into_iter().flatten().all(sound),
                "{row:?}"
            );
            if let Some(base) = &row.base {
                assert!(
                    row.ratio.is_some() && rows.iter().any(|r| &r.contender == base),
                    "{row:?}"
                );
            }
            assert!(
                text.contains(&row.contender)
                    && text.contains(&row.operation)
                    && text.contains(&row.shape),
                "{row:?}"
            );
        }
    }
    let of = |group: OperationGroup, threads: usize| {
        document
            .rows
            .iter()
            .filter(move |r| r.group == group && r.threads == threads)
    };
    for rival in ["candle f32", "candle Q8_0", "candle Q4_0", "gemm crate f32"] {
        for (group, cases) in [(OperationGroup::Gemv, 2), (OperationGroup::Gemm, 4)] {
            for threads in [1, 2] {
                assert_eq!(
                    of(group, threads).filter(|r| r.contender == rival).count(),
                    cases,
                    "{rival}, {group}"
                );
            }
        }
    }

    let output = run(
        folder.path(),
        &[
            "report",
            "--input",
            "results.json",
            "--output",
            "report.html",
        ],
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    complete(
        &std::fs::read_to_string(folder.path().join("report.html")).unwrap(),
        &document,
    );
}

/// The page needs nothing from elsewhere and shows every row.
fn complete(page: &str, document: &BenchmarkDocument) {
    for outside in ["http", "//", "src=", "<link", "<script", "@import", "url("] {
        assert!(
            !page.contains(outside),
            "the report refers to something outside: {outside}"
        );
    }
    let sections: Vec<String> = page.split("<section>").skip(1).map(plain).collect();
    for row in &document.rows {
        let ContenderRow {
            operation,
            shape,
            threads,
            ..
        } = row;
        let title = format!("{operation}, {shape}, {threads} thread");
        let section = sections
            .iter()
            .find(|s| s.trim_start().starts_with(&title))
            .unwrap_or_else(|| panic!("no section {title}"));
        let shown = |s: &MedianRange, factor: f64, digits: usize| {
            let [low, median, high] =
                [s.smallest, s.median, s.largest].map(|x| format!("{:.digits$}", x * factor));
            format!("{median} ({low} … {high})")
        };
        let mut cells = vec![
            row.contender.clone(),
            shown(&row.rate, 1e-9, 2),
            row.turns.to_string(),
        ];
        cells.extend(row.share.as_ref().map(|s| shown(s, 100.0, 0) + " %"));
        cells.extend(
            row.ratio
                .as_ref()
                .zip(row.base.as_ref())
                .map(|(r, base)| format!("{} ({base})", shown(r, 1.0, 2))),
        );
        cells.extend(row.ceiling.clone());
        cells.iter().for_each(|cell| {
            assert!(
                section.contains(cell.as_str()),
                "{title}: no '{cell}' for {row:?}"
            )
        });
    }
    assert_eq!(page.matches("<rect ").count(), document.rows.len());
}

/// The text of some HTML without its tags.
fn plain(html: &str) -> String {
    let text: String = html
        .split('<')
        .map(|part| part.split_once('>').map_or(part, |(_, text)| text))
        .collect();
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
}

#[test]
fn names_are_escaped_in_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let spread = r#"{"smallest":1.0,"median":2.0,"largest":3.0}"#;
    let row = format!(
        r#"{{"group":"gemv","operation":"<b>&","shape":"1×1","threads":1,"contender":"<script>","ours":false,"unit":"B/s","turns":1,
        "rate":{spread},"ceiling":null,"share":null,"base":null,"ratio":null}}"#
    );
    let machine = r#"{"cpu":"\"<i>\"","processors":1,"caches":[],"available_bytes":null,"system":"s","isas":[]}"#;
    let text = format!(
        r#"{{"format":"bitnet-benchmarks","version":1,"program":"p","date":"d","command":[],"machine":{machine},"turns":1,
        "working_set_bytes":1,"ceilings":[],"rows":[{row}]}}"#
    );
    std::fs::write(folder.path().join("in.json"), text).unwrap();
    let output = run(
        folder.path(),
        &["report", "--input", "in.json", "--output", "out.html"],
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let page = std::fs::read_to_string(folder.path().join("out.html")).unwrap();
    for raw in ["<script>", "<b>", "<i>"] {
        assert!(!page.contains(raw), "{raw} came through");
    }
    assert!(page.contains("&lt;script&gt;"));
}

#[test]
fn bad_usage() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    refused(
        at,
        &["compare", "--output", "o.json", "--operations", "gemv,gemw"],
        &["gemw", "quantization, packing, simd, gemv, gemm"],
    );
    refused(
        at,
        &["compare", "--output", "o.json", "--shapes", "12"],
        &["'12'", "N×K"],
    );
    refused(
        at,
        &["compare", "--output", "o.json", "--shapes", "0x5"],
        &["'0x5'"],
    );
    refused(
        at,
        &[
            "compare",
            "--output",
            "o.json",
            "--shapes",
            "99999999999x99999999999",
        ],
        &["99999999999x99999999999", "268435456"],
    );
    refused(
        at,
        &["compare", "--output", "o.json", "--threads", "0"],
        &["0", "--threads"],
    );
    refused(at, &["compare"], &["--output"]);
    refused(
        at,
        &["compare", "--quick", "--output", "no/such/folder/o.json"],
        &["no/such/folder/o.json", "No such file"],
    );
    refused(
        at,
        &["compare", "--quick", "--output", "."],
        &["is a folder"],
    );
    assert_eq!(
        std::fs::read_dir(at).unwrap().count(),
        0,
        "something was left behind"
    );
}

#[test]
fn bad_results() {
    let folder = tempfile::tempdir().unwrap();
    let bad = |text: &str, parts: &[&str]| {
        std::fs::write(folder.path().join("in.json"), text).unwrap();
        refused(
            folder.path(),
            &["report", "--input", "in.json", "--output", "out.html"],
            &[&["in.json"], parts].concat(),
        );
        assert!(!folder.path().join("out.html").exists());
    };
    bad("", &["line 1"]);
    bad(
        "{\"format\": \"bitnet-benchmarks\", \"version\"",
        &["line 1"],
    );
    bad("[1, 2]", &["line 1"]);
    bad(
        "{\"format\": \"other\", \"version\": 1}",
        &[
            "expected bitnet-benchmarks version 1",
            "got other version 1",
        ],
    );
    bad(
        "{\"format\": \"bitnet-benchmarks\", \"version\": 2}",
        &["got bitnet-benchmarks version 2"],
    );
    bad(
        "{\"format\": \"bitnet-benchmarks\", \"version\": 1}",
        &["missing field"],
    );
    bad(&"[".repeat(100_000), &["line 1"]);
    refused(
        folder.path(),
        &["report", "--input", "none.json", "--output", "out.html"],
        &["none.json", "No such file"],
    );
}
