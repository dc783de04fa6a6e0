//! Interrupted and killed runs: the same command goes on where they were and ends with the same
//! bytes.
#![cfg(unix)]

mod common;

use common::{Dir, gauss, llama, random, safetensors};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const JOURNAL: &str = "out.safetensors.bitnet-journal";
const PARTIAL: &str = "out.safetensors.bitnet-partial";

/// in.safetensors with six tensors of this many rows of 1024, and whole.safetensors that it
/// becomes.
fn model(rows: usize) -> Dir {
    let dir = Dir::new();
    // The same weights in each: what matters is the time they take.
    let names = [
        "a.weight", "b.weight", "c.weight", "d.weight", "e.weight", "f.weight",
    ];
    let mut tensors = vec![gauss(names[0], &[rows, 1024], 0.02)];
    for name in &names[1..] {
        let data = tensors[0].3.clone();
        tensors.push(common::T(name, "F32", vec![rows, 1024], data));
    }
    dir.write("in.safetensors", safetensors(&tensors));
    drop(tensors);
    dir
}

fn args(out: &str) -> Vec<&str> {
    vec![
        "quantize",
        "in.safetensors",
        "--out",
        out,
        "--threads",
        "2",
        "--json",
        "--threshold",
        "optimal",
    ]
}

fn start(dir: &Dir, args: &[&str]) -> Child {
    dir.command(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(
        Command::new("kill")
            .args([name, &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
}

/// Lines of a journal, its title not counted.
fn lines(dir: &Dir, journal: &str) -> usize {
    fs::read(dir.at(journal)).map_or(0, |text| {
        text.iter()
            .filter(|&&b| b == b'\n')
            .count()
            .saturating_sub(1)
    })
}

/// Waits until the journal has that many lines; false if the program ended before.
fn wait_for(dir: &Dir, child: &mut Child, journal: &str, count: usize) -> bool {
    let start = Instant::now();
    loop {
        if lines(dir, journal) >= count {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "no line in {journal}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Starts the program and stops it after that many tensors, by a signal. Where the machine was too
/// fast, again.
fn stop_after(
    dir: &Dir,
    args: &[&str],
    journal: &str,
    count: usize,
    name: &str,
) -> (Option<i32>, String) {
    let out = dir.at(args[3]);
    for _ in 0..20 {
        let mut child = start(dir, args);
        if wait_for(dir, &mut child, journal, count) {
            signal(&child, name);
        }
        let output = child.wait_with_output().unwrap();
        if !out.exists() {
            return (
                output.status.code(),
                String::from_utf8_lossy(&output.stderr).into_owned(),
            );
        }
        // A kill between the file's name and the end of the journal leaves both.
        let _ = fs::remove_file(dir.at(journal));
        let _ = fs::remove_dir_all(dir.at(&format!("{}.bitnet-partial", args[3])));
        fs::remove_file(&out)
            .or_else(|_| fs::remove_dir_all(&out))
            .unwrap();
    }
    panic!("the program always ended before it could be stopped");
}

#[test]
fn ctrl_c_leaves_work_that_the_next_run_takes_over() {
    let dir = model(2048);
    dir.run(&args("whole.safetensors")).is(0);
    for name in ["-INT", "-TERM"] {
        let (status, err) = stop_after(&dir, &args("out.safetensors"), JOURNAL, 1, name);
        assert_eq!(status, Some(130), "{err}");
        assert_eq!(err, "error: interrupted; run the same command to resume\n");
        assert!(
            dir.at(JOURNAL).exists()
                && dir.at(PARTIAL).exists()
                && !dir.at("out.safetensors").exists()
        );
        let run = dir.run(&args("out.safetensors"));
        assert!(
            run.is(0).json()["resumed"].as_u64().unwrap() >= 1,
            "{}",
            run.stdout()
        );
        assert_eq!(run.json()["tensors"].as_array().unwrap().len(), 6);
        assert!(dir.read("out.safetensors") == dir.read("whole.safetensors"));
        assert!(!dir.at(JOURNAL).exists() && !dir.at(PARTIAL).exists());
        fs::remove_file(dir.at("out.safetensors")).unwrap();
    }
}

#[test]
fn kill_at_random_moments() {
    let dir = model(1024);
    let clock = Instant::now();
    dir.run(&args("whole.safetensors")).is(0);
    let whole = clock.elapsed();
    let mut next = random(11);
    for _ in 0..6 {
        let mut child = start(&dir, &args("out.safetensors"));
        std::thread::sleep(whole.mul_f64((next() % 1000) as f64 / 1000.0));
        // It may be done already.
        let _ = child.kill();
        child.wait().unwrap();
        let done = dir.at("out.safetensors").exists();
        if !done {
            dir.run(&args("out.safetensors")).is(0);
        }
        assert!(dir.read("out.safetensors") == dir.read("whole.safetensors"));
        let left: Vec<_> = dir
            .files()
            .into_keys()
            .filter(|f| f.contains("bitnet-"))
            .collect();
        assert!(done || left.is_empty(), "{left:?}");
        left.iter()
            .for_each(|f| fs::remove_file(dir.at(f)).unwrap());
        fs::remove_file(dir.at("out.safetensors")).unwrap();
    }
}

#[test]
fn killed_after_each_tensor_in_turn() {
    let dir = model(512);
    dir.run(&args("whole.safetensors")).is(0);
    // Each run gets at least one tensor further than the one before.
    for count in 1..6 {
        let mut child = start(&dir, &args("out.safetensors"));
        let running = wait_for(&dir, &mut child, JOURNAL, count);
        child.kill().unwrap();
        child.wait().unwrap();
        if !running {
            break;
        }
    }
    if !dir.at("out.safetensors").exists() {
        let resumed = dir.run(&args("out.safetensors")).is(0).json()["resumed"]
            .as_u64()
            .unwrap();
        assert!(resumed >= 4, "{resumed}");
    }
    assert!(dir.read("out.safetensors") == dir.read("whole.safetensors"));
}

#[test]
fn auto_layouts_and_a_folder_resume_too() {
    let dir = model(1024);
    dir.write("m/model.safetensors", dir.read("in.safetensors"))
        .write("m/config.json", "{}")
        .write("m/tokenizer.txt", "t");
    let auto = |out| {
        vec![
            "quantize",
            "m",
            "--out",
            out,
            "--layout",
            "auto",
            "--granularity",
            "tensor",
            "--json",
        ]
    };
    let bitnet = |out| {
        vec![
            "quantize",
            "m",
            "--out",
            out,
            "--format",
            "hf-bitnet",
            "--threshold",
            "optimal",
            "--json",
        ]
    };
    let journal = "out.bitnet-partial/model.safetensors.bitnet-journal";
    for args in [&auto as &dyn Fn(&'static str) -> Vec<&'static str>, &bitnet] {
        dir.run(&args("whole")).is(0);
        stop_after(&dir, &args("out"), journal, 2, "-KILL");
        assert!(!dir.at("out").exists());
        let run = dir.run(&args("out"));
        assert!(run.is(0).json()["resumed"].as_u64().unwrap() >= 2);
        assert!(dir.read("out/model.safetensors") == dir.read("whole/model.safetensors"));
        assert_eq!(dir.read("out/config.json"), dir.read("whole/config.json"));
        dir.run(&["verify", "out"]).is(0);
        assert!(!dir.at("out.bitnet-partial").exists());
        fs::remove_dir_all(dir.at("out")).unwrap();
        fs::remove_dir_all(dir.at("whole")).unwrap();
    }
}

#[test]
fn a_gguf_resumes() {
    let dir = Dir::new();
    llama(&dir, "m");
    let args = |out| {
        vec![
            "quantize",
            "m",
            "--out",
            out,
            "--threshold",
            "optimal",
            "--threads",
            "1",
            "--json",
        ]
    };
    dir.run(&args("whole.gguf")).is(0);
    let mut child = start(&dir, &args("out.gguf"));
    wait_for(&dir, &mut child, "out.gguf.bitnet-journal", 1);
    let _ = child.kill();
    child.wait().unwrap();
    if !dir.at("out.gguf").exists() {
        dir.run(&args("out.gguf")).is(0);
    }
    assert!(dir.read("out.gguf") == dir.read("whole.gguf"));
}

#[test]
fn a_journal_of_another_recipe_counts_for_nothing() {
    let dir = model(1024);
    let other = [
        "quantize",
        "in.safetensors",
        "--out",
        "out.safetensors",
        "--threshold",
        "median",
        "--json",
    ];
    stop_after(&dir, &other, JOURNAL, 2, "-KILL");
    dir.run(&args("whole.safetensors")).is(0);
    assert_eq!(dir.run(&args("out.safetensors")).is(0).json()["resumed"], 0);
    assert!(dir.read("out.safetensors") == dir.read("whole.safetensors"));
}

#[test]
fn a_journal_of_another_input_counts_for_nothing() {
    let dir = model(512);
    stop_after(&dir, &args("out.safetensors"), JOURNAL, 2, "-KILL");
    // As many bytes, other weights.
    let mut file = dir.read("in.safetensors");
    let len = file.len();
    file[len - 4 * 512 * 1024..].fill(0);
    std::thread::sleep(Duration::from_millis(20));
    dir.write("in.safetensors", file);
    dir.run(&args("whole.safetensors")).is(0);
    assert_eq!(dir.run(&args("out.safetensors")).is(0).json()["resumed"], 0);
    assert!(dir.read("out.safetensors") == dir.read("whole.safetensors"));
}

#[test]
fn damage_between_the_runs_is_noticed() {
    let dir = model(1024);
    dir.run(&args("whole.safetensors")).is(0);
    stop_after(&dir, &args("out.safetensors"), JOURNAL, 3, "-KILL");
    let (partial, journal) = (dir.read(PARTIAL), dir.read(JOURNAL));
    let text = String::from_utf8(journal.clone()).unwrap();
    let mut resumed = vec![];
    let mut go_on = |what: &str, partial: &[u8], journal: &[u8]| {
        dir.write(PARTIAL, partial).write(JOURNAL, journal);
        let run = dir.run(&args("out.safetensors"));
        resumed.push(run.is(0).json()["resumed"].as_u64().unwrap());
        assert!(
            dir.read("out.safetensors") == dir.read("whole.safetensors"),
            "{what}"
        );
        fs::remove_file(dir.at("out.safetensors")).unwrap();
    };
    go_on("nothing", &partial, &journal);
    // A byte in the last quarter of what was written, where journaled codes of a later tensor lie,
    // or in the first scales.
    let header =
        8 + u64::from_le_bytes(dir.read("whole.safetensors")[..8].try_into().unwrap()) as usize;
    let scales = 6 * 1024 * 4;
    let mut bad = partial.clone();
    bad[header + 5] ^= 1;
    go_on("a byte of the first scales", &bad, &journal);
    let mut bad = partial.clone();
    bad[header + scales + 1024 * 256 + 77] ^= 0x10;
    go_on("a byte of the second tensor's codes", &bad, &journal);
    go_on(
        "a partial file that was cut",
        &partial[..header + scales + 1000],
        &journal,
    );
    go_on("no partial file", b"", &journal);
    go_on("half a line", &partial, &journal[..journal.len() - 10]);
    go_on(
        "garbage in the journal",
        &partial,
        format!("{text}garbage\n").as_bytes(),
    );
    go_on("a journal of garbage", &partial, &[0xff; 1000]);
    go_on("no journal", &partial, b"");
    let title_only = &text[..=text.find('\n').unwrap()];
    go_on("a title", &partial, title_only.as_bytes());
    let all = resumed[0];
    assert!(all >= 3, "{resumed:?}");
    assert_eq!(resumed, [all, 0, 1, 0, 0, all - 1, all, 0, 0, 0]);
}

/// A journal is a file like any other: what it claims is checked.
#[test]
fn a_journal_that_lies_is_not_believed() {
    let dir = model(512);
    dir.run(&args("whole.safetensors")).is(0);
    stop_after(&dir, &args("out.safetensors"), JOURNAL, 2, "-KILL");
    let (partial, text) = (
        dir.read(PARTIAL),
        String::from_utf8(dir.read(JOURNAL)).unwrap(),
    );
    let second = text.lines().nth(1).unwrap();
    for (what, lie) in [
        (
            "an index that there is not",
            text.replacen("\"index\":0", "\"index\":4000", 1),
        ),
        ("a length", text.replacen("\"len\":", "\"len\":1", 1)),
        ("an offset", text.replacen("\"offset\":", "\"offset\":9", 1)),
        (
            "an enormous offset",
            text.replacen("\"offset\":", "\"offset\":1844674407370955", 1),
        ),
        (
            "a tensor twice",
            text.replacen(second, &format!("{second}\n{second}"), 1),
        ),
        (
            "a line without tensors",
            text.replacen(second, "{\"written\":[],\"layouts\":{},\"note\":null}", 1),
        ),
    ] {
        assert_ne!(lie, text, "{what}");
        dir.write(PARTIAL, &partial).write(JOURNAL, lie);
        let run = dir.run(&args("out.safetensors"));
        // Either the lie is seen, or the run ends in a clear refusal: never in wrong bytes.
        if run.output.status.code() == Some(2) {
            run.refused(&["out.safetensors"]);
            assert!(
                !dir.at(PARTIAL).exists() && !dir.at(JOURNAL).exists(),
                "{what}"
            );
        } else {
            run.is(0);
            assert!(
                dir.read("out.safetensors") == dir.read("whole.safetensors"),
                "{what}"
            );
            fs::remove_file(dir.at("out.safetensors")).unwrap();
        }
    }
}
