//! The command line itself: help, typos, completions, manual pages, closed pipes, and what is
//! printed of a job.

mod common;

use common::{Dir, Run, f32s, gauss, llama, safetensors};
use std::fs;
use std::fs::File;
use std::io::pipe;
use std::process::{Command, Stdio};

/// The commands that the help lists.
fn commands(dir: &Dir) -> Vec<String> {
    let help = dir.run(&["--help"]).is(0).stdout();
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        .filter(|line| !line.starts_with("   "))
        .map(|line| line.split_whitespace().next().unwrap().to_string())
        .filter(|name| name != "help")
        .collect()
}

#[test]
fn the_program_alone_prints_its_help() {
    let dir = Dir::new();
    let alone = dir.run(&[]);
    alone.is(0);
    assert_eq!(alone.stderr(), "");
    for part in ["Usage: bitnet", "quantize", "Examples:"] {
        assert!(alone.stdout().contains(part), "{}", alone.stdout());
    }
    dir.refuses(&["--json"], &["--help"]);
}

#[test]
fn typos_are_answered_with_what_was_meant() {
    let dir = Dir::small();
    let out = "out.safetensors";
    let q =
        |more: &[&'static str]| [&["quantize", "in.safetensors", "--out", out][..], more].concat();
    for (args, meant) in [
        (vec!["quantise", "in.safetensors"], "quantize"),
        (vec!["inpsect", "in.safetensors"], "inspect"),
        (q(&["--treshold", "optimal"]), "--threshold"),
        (q(&["--threshold", "optiaml"]), "optimal"),
        (q(&["--threshold", "fctor:0.7"]), "factor:X"),
        (q(&["--layout", "base3"]), "base-3"),
        (q(&["--precision", "tenary"]), "ternary"),
        (q(&["--granularity", "chanel"]), "channel"),
        (q(&["--preset", "acuracy"]), "accuracy"),
        (q(&["--format", "safetensor"]), "safetensors"),
        (q(&["--scale-dtype", "bf1"]), "bf16"),
        (q(&["--i2s-order", "i2_s_x4"]), "i2_s-x4"),
        (q(&["--rule", "a.*=ternery"]), "ternary"),
        (vec!["bench", "--shape", "tini"], "tiny"),
        (vec!["run", "m", "--cache", "in8"], "int8"),
        (vec!["run", "m", "--activations", "flaot"], "float"),
        (vec!["completions", "bsh"], "bash"),
    ] {
        dir.refuses(&args, &[&format!("did you mean '{meant}'?")]);
    }
    #[cfg(feature = "train")]
    for (flag, value, meant) in [
        ("--estimator", "streched", "stretched"),
        ("--activations", "sing", "sign"),
        ("--architecture", "lama", "llama"),
    ] {
        let meant = format!("did you mean '{meant}'?");
        dir.refuses(&["train", "lm", "--out", "o", flag, value], &[&meant]);
    }
}

#[test]
fn help_keeps_the_width_of_the_terminal() {
    let dir = Dir::new();
    for command in commands(&dir) {
        let run = dir.run_with(&[&command, "--help"], &[("COLUMNS", "72")]);
        let text = run.is(0).stdout();
        assert!(text.contains("Examples:"), "{command}: {text}");
        for line in text.lines() {
            // A word that is longer stands alone in its line.
            assert!(
                line.chars().count() <= 72 || line.split_whitespace().count() == 1,
                "{command}: {line}"
            );
        }
    }
}

#[test]
fn flags_stand_under_headings_and_the_common_ones_first() {
    let help = Dir::new().run(&["quantize", "--help"]).is(0).stdout();
    let at = |text: &str| help.find(text).unwrap_or_else(|| panic!("{text}: {help}"));
    let order = [
        "--out",
        "--force",
        "\nPrecision:",
        "--threshold",
        "\nTensors:",
        "--rule",
        "\nSearch:",
        "--target-bpw",
        "\nContainer:",
        "--i2s-order",
        "Examples:",
    ];
    for pair in order.windows(2) {
        assert!(at(pair[0]) < at(pair[1]), "{pair:?}: {help}");
    }
}

#[test]
fn completions_for_each_shell() {
    let dir = Dir::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = dir.run(&["completions", shell]).is(0).stdout();
        for part in ["perplexity", "granularity"] {
            assert!(script.contains(part), "{shell}: {part}");
        }
        // The scripts of these shells complete values too.
        if ["bash", "zsh", "fish"].contains(&shell) {
            assert!(script.contains("least-squares"), "{shell}");
        }
    }
}

#[test]
fn a_manual_page_for_each_command() {
    let dir = Dir::new();
    dir.write("man/other.1", "mine");
    for _ in 0..2 {
        dir.run(&["manual", "man"]).is(0);
        let pages = dir.files();
        assert_eq!(pages["man/other.1"], b"mine");
        for command in commands(&dir) {
            let page = &pages[&format!("man/bitnet-{command}.1")];
            let text = String::from_utf8_lossy(page);
            assert!(
                text.contains(".SH NAME") && text.contains("Examples"),
                "{text}"
            );
        }
        assert!(pages.contains_key("man/bitnet.1"));
        assert!(
            pages
                .keys()
                .all(|name| name.ends_with(".1") || name == "man/")
        );
    }
    dir.write("file", "");
    dir.run(&["manual", "file/man"])
        .refused(&["file/man", "cannot create"]);
}

/// What a command prints to: its status and its stderr.
fn run_into(dir: &Dir, args: &[&str], stdout: Stdio, stderr: Stdio) -> (Option<i32>, String) {
    let mut command: Command = dir.command(args);
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    (output.status.code(), text)
}

/// The commands that are quick, on small inputs.
const QUICK: &[&[&str]] = &[
    &[],
    &["--help"],
    &["--version"],
    &["help", "quantize"],
    &[
        "quantize",
        "in.safetensors",
        "--out",
        "q.safetensors",
        "--force",
    ],
    &["inspect", "in.safetensors"],
    &["inspect", "in.safetensors", "--json"],
    &[
        "convert",
        "t.safetensors",
        "--out",
        "c.safetensors",
        "--force",
    ],
    &[
        "dequantize",
        "t.safetensors",
        "--out",
        "d.safetensors",
        "--force",
    ],
    &["compare", "in.safetensors", "t.safetensors"],
    &["verify", "t.safetensors"],
    &[
        "bench", "--shape", "tiny", "--prompt", "2", "--tokens", "2", "--repeat", "1",
    ],
    &["completions", "bash"],
    &["manual", "man"],
];

/// A small checkpoint, and it in ternary.
fn prepared() -> Dir {
    let dir = Dir::small();
    dir.run(&["quantize", "in.safetensors", "--out", "t.safetensors"])
        .is(0);
    dir
}

#[test]
fn a_closed_pipe_ends_each_command_quietly() {
    let dir = prepared();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/glassllm-en");
    let text = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../assets/glassllm-en/LICENSE"
    );
    let models: &[&[&str]] = &[
        &["run", model, "-p", "Alice", "-n", "4", "--quiet"],
        &["run", model, "-p", "Alice", "-n", "4", "--quiet", "--json"],
        &["perplexity", model, "--text", text],
    ];
    for args in QUICK.iter().chain(models) {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (status, err) = run_into(&dir, args, writer.into(), Stdio::piped());
        assert_eq!((status, err.as_str()), (Some(0), ""), "{args:?}");
    }
    // The answer of a gate stands.
    let gate = [
        "compare",
        "in.safetensors",
        "t.safetensors",
        "--min-sqnr",
        "90",
    ];
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let (status, err) = run_into(&dir, &gate, writer.into(), Stdio::piped());
    assert_eq!((status, err.as_str()), (Some(1), ""));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_an_error_and_a_full_stderr_is_none() {
    let dir = prepared();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/glassllm-en");
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    for args in QUICK.iter().filter(|args| args.first() != Some(&"manual")) {
        let (status, err) = run_into(&dir, args, full(), Stdio::piped());
        assert_eq!(status, Some(2), "{args:?}: {err}");
        assert!(
            err.contains("cannot write to stdout") && err.lines().count() == 1,
            "{args:?}: {err}"
        );
    }
    let run = ["run", model, "-p", "Alice", "-n", "4"];
    for args in QUICK.iter().chain([&&run[..]]) {
        let (status, _) = run_into(&dir, args, Stdio::null(), full());
        assert_eq!(status, Some(0), "{args:?}");
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (status, _) = run_into(&dir, args, Stdio::null(), writer.into());
        assert_eq!(status, Some(0), "{args:?}");
    }
    let (status, _) = run_into(&dir, &["inspect", "none"], Stdio::null(), full());
    assert_eq!(status, Some(2));
}

#[test]
fn endings_that_no_container_has() {
    let dir = prepared();
    llama(&dir, "m");
    for out in ["model.bin", "model.safetensor", "m.ternary/../model.pt"] {
        for args in [
            ["quantize", "in.safetensors", "--out", out],
            ["convert", "t.safetensors", "--out", out],
            ["dequantize", "t.safetensors", "--out", out],
        ] {
            dir.refuses(
                &args,
                &[out, "unknown ending", ".safetensors", ".gguf", "folder"],
            );
        }
    }
    // Names of folders.
    for out in ["model-1.5b", "qwen2.5-tern", "llama.final/", "v1.58"] {
        dir.run(&["quantize", "m", "--out", out]).is(0);
        assert!(dir.at(out).join("config.json").exists(), "{out}");
    }
    fs::rename(dir.at("v1.58"), dir.at("old.model")).unwrap();
    dir.run(&["quantize", "m", "--out", "old.model", "--force"])
        .is(0);
}

#[test]
fn a_target_that_exists_is_named_with_the_flag_that_replaces_it() {
    let dir = prepared();
    dir.refuses(
        &["quantize", "in.safetensors", "--out", "t.safetensors"],
        &["t.safetensors exists already; --force replaces it"],
    );
    dir.write("kept/x", "");
    dir.refuses(
        &["demo", "--keep", "kept"],
        &["kept exists already", "--keep"],
    );
}

#[test]
fn a_file_that_grew_is_larger() {
    let dir = Dir::new();
    let weights: Vec<f32> = (0..64 * 64).map(|i| (i % 3) as f32 - 1.0).collect();
    dir.write(
        "in.safetensors",
        safetensors(&[f32s("a.weight", &[64, 64], &weights)]),
    );
    let run = dir.run(&["quantize", "in.safetensors", "--out", "t.safetensors"]);
    assert!(
        run.is(0).stdout().contains("times smaller"),
        "{}",
        run.stdout()
    );
    let run = dir.run(&["dequantize", "t.safetensors", "--out", "f.safetensors"]);
    let text = run.is(0).stdout();
    assert!(
        text.contains("times larger") && !text.contains("smaller"),
        "{text}"
    );
}

/// 30 tensors, the later ones harder to quantize.
fn many() -> Dir {
    let dir = Dir::new();
    let tensors: Vec<_> = (0..30)
        .map(|i| {
            let mut weights = common::normal(i, 16 * 32, 0.02);
            weights[0] = 0.1 * i as f32;
            f32s(format!("layers.{i:02}.weight").leak(), &[16, 32], &weights)
        })
        .collect();
    dir.write("in.safetensors", safetensors(&tensors));
    dir
}

#[track_caller]
fn tensors_shown(run: &Run) -> Vec<String> {
    let text = run.is(0).stdout();
    text.lines()
        .filter(|line| line.starts_with("layers."))
        .map(|line| line.split_whitespace().next().unwrap().into())
        .collect()
}

#[test]
fn of_many_tensors_the_worst_are_printed() {
    let dir = many();
    let quantize = |more: &[&str]| {
        let out = [
            "quantize",
            "in.safetensors",
            "--out",
            "q.safetensors",
            "--force",
        ];
        dir.run(&[&out[..], more].concat())
    };
    let run = quantize(&["--granularity", "tensor"]);
    let shown = tensors_shown(&run);
    assert_eq!(shown.len(), 10, "{}", run.stdout());
    assert_eq!(shown[0], "layers.29.weight", "{}", run.stdout());
    assert!(run.stdout().contains("30 tensors") && run.stdout().contains("--verbose"));
    assert!(run.stdout().contains("30 tensors quantized at"));
    assert_eq!(tensors_shown(&quantize(&["--verbose"])).len(), 30);
    let json = quantize(&["--json"]).json();
    assert_eq!(json["tensors"].as_array().unwrap().len(), 30);
    // Tensors without an error are none of the worst.
    let run = dir.run(&["convert", "q.safetensors", "--out", "c.safetensors"]);
    assert!(tensors_shown(&run).is_empty(), "{}", run.stdout());
}

#[test]
fn quiet_is_the_summary_alone() {
    let dir = many();
    let q = [
        "quantize",
        "in.safetensors",
        "--out",
        "q.safetensors",
        "--quiet",
    ];
    for (args, lines) in [
        (&q[..], 2),
        (&["inspect", "q.safetensors", "-q"], 3),
        (&["compare", "in.safetensors", "q.safetensors", "-q"], 4),
        (&["verify", "q.safetensors", "-q"], 1),
        (
            &["convert", "q.safetensors", "--out", "c.safetensors", "-q"],
            2,
        ),
        (
            &[
                "dequantize",
                "q.safetensors",
                "--out",
                "d.safetensors",
                "-q",
            ],
            1,
        ),
    ] {
        let run = dir.run(args);
        assert_eq!(run.is(0).stderr(), "", "{args:?}");
        assert_eq!(run.stdout().lines().count(), lines, "{}", run.stdout());
    }
    dir.refuses(
        &[&q[..], &["--verbose"]].concat(),
        &["--verbose", "--quiet"],
    );
}

#[test]
fn findings_have_names_that_are_words() {
    let dir = Dir::new();
    let mut broken = vec![0.5; 64];
    broken[3] = f32::NAN;
    dir.write(
        "in.safetensors",
        safetensors(&[
            f32s("dead.weight", &[8, 8], &[0.0; 64]),
            f32s("nan.weight", &[8, 8], &broken),
            gauss("odd.weight", &[8, 9], 0.02),
        ]),
    );
    let text = dir.run(&["inspect", "in.safetensors"]).is(0).stdout();
    for line in [
        "all zero: dead.weight: ",
        "not finite: nan.weight: ",
        "columns: odd.weight: ",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    let json = dir
        .run(&["inspect", "in.safetensors", "--json"])
        .is(0)
        .json();
    assert_eq!(json["findings"][0]["check"], "dead");
}
