//! Where the result goes: never over the input, never half, and nothing left when it cannot go
//! there.

mod common;

use common::{Dir, gauss, llama, on_a_small_disk, safetensors};
use std::fs;

const QUANTIZE: &[&str] = &["quantize", "in.safetensors", "--out"];

fn to(out: &'static str) -> Vec<&'static str> {
    [QUANTIZE, &[out]].concat()
}

#[test]
fn an_output_that_exists_stays() {
    let dir = Dir::small();
    dir.write("out.safetensors", "mine")
        .write("folder/file", "mine");
    dir.refuses(
        &to("out.safetensors"),
        &["out.safetensors", "exists already"],
    );
    llama(&dir, "m");
    dir.refuses(
        &["quantize", "m", "--out", "folder"],
        &["folder", "exists already"],
    );
    dir.refuses(
        &["convert", "in.safetensors", "--out", "out.safetensors"],
        &["out.safetensors", "exists already"],
    );
    dir.refuses(
        &["dequantize", "in.safetensors", "--out", "out.safetensors"],
        &["out.safetensors", "exists already"],
    );
}

#[test]
fn force_replaces_it() {
    let dir = Dir::small();
    dir.run(&to("new.safetensors")).is(0);
    dir.write("out.safetensors", "mine");
    dir.run(&[to("out.safetensors"), vec!["--force"]].concat())
        .is(0);
    assert_eq!(dir.read("new.safetensors"), dir.read("out.safetensors"));
    assert_eq!(dir.files().len(), 3);
}

#[test]
fn force_replaces_a_folder_that_holds_a_model() {
    let dir = Dir::new();
    llama(&dir, "m");
    let args = ["quantize", "m", "--out", "out", "--format", "hf-bitnet"];
    dir.run(&args).is(0);
    let first = dir.files();
    dir.write("out/model.safetensors", "damaged");
    dir.run(&[&args[..], &["--force"]].concat()).is(0);
    assert_eq!(dir.files(), first);
}

/// The document lists what this program wrote. Other files and folders stay, and are named.
#[test]
fn force_keeps_the_files_of_others() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.write("m/vocab.txt", "a b c");
    let args = ["quantize", "m", "--out", "out", "--force"];
    dir.run(&args).is(0);
    dir.write("out/results.json", "{}")
        .write("out/runs/1/log.txt", "mine");
    let with_own = dir.files();
    // What this program wrote is replaced, or goes where the new result has none of it.
    dir.write("out/config.json", "changed");
    let said = dir.run(&args).is(0).stdout();
    assert!(said.contains("stay: results.json, runs"), "{said}");
    assert!(dir.files() == with_own);
    fs::remove_file(dir.at("m/vocab.txt")).unwrap();
    dir.run(&args).is(0);
    assert!(!dir.at("out/vocab.txt").exists());
    assert_eq!(dir.read("out/runs/1/log.txt"), b"mine");
    dir.run(&["verify", "out"]).is(0);
}

#[test]
fn force_replaces_no_file_of_others() {
    let dir = Dir::new();
    llama(&dir, "m");
    let args = ["quantize", "m", "--out", "out", "--force"];
    dir.run(&args).is(0);
    dir.write("m/notes.md", "theirs")
        .write("out/notes.md", "mine");
    dir.refuses(&args, &["out", "notes.md", "move it away"]);
    // Weights that stay could be taken for the new ones.
    fs::remove_file(dir.at("out/notes.md")).unwrap();
    dir.write("out/model-00001-of-00002.safetensors", "mine");
    dir.refuses(&args, &["out", "model-00001-of-00002.safetensors"]);
}

#[test]
fn an_empty_folder_is_used() {
    let dir = Dir::new();
    llama(&dir, "m");
    fs::create_dir(dir.at("out")).unwrap();
    dir.run(&["quantize", "m", "--out", "out"]).is(0);
    assert_eq!(
        dir.files().keys().filter(|f| f.starts_with("out")).count(),
        3
    );
}

/// --force says that the output may go, not that the model it is made from may.
#[test]
fn force_does_not_remove_a_folder_around_the_input() {
    let dir = Dir::new();
    llama(&dir, "models/m");
    dir.write("models/notes.txt", "mine");
    dir.refuses(
        &["quantize", "models/m", "--out", "models", "--force"],
        &["models", "input"],
    );
    dir.refuses(
        &[
            "quantize",
            "models/m/",
            "--out",
            "models/../models/",
            "--force",
        ],
        &["models", "input"],
    );
}

/// A folder of other things is no output of ours: it is not swept away.
#[test]
fn force_does_not_remove_a_folder_that_is_no_model() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.write("home/letters/one.txt", "mine");
    dir.refuses(
        &["quantize", "m", "--out", "home", "--force"],
        &["home", "config.json"],
    );
}

#[test]
fn force_does_not_put_a_file_in_the_place_of_a_folder() {
    let dir = Dir::small();
    dir.write("out.safetensors/mine", "mine");
    dir.refuses(
        &[to("out.safetensors"), vec!["--force"]].concat(),
        &["out.safetensors", "director"],
    );
}

#[test]
fn the_input_is_no_output() {
    let dir = Dir::small();
    let absolute = dir.at("in.safetensors").display().to_string();
    // Many times up from anywhere is the root; from there the absolute path leads back.
    let round = format!("{}{}", "../".repeat(40), absolute.trim_start_matches('/'));
    for out in ["in.safetensors", "./in.safetensors", &round, &absolute] {
        for force in [&[][..], &["--force"]] {
            dir.refuses(
                &[QUANTIZE, &[out], force].concat(),
                &["in.safetensors", "is the input"],
            );
        }
    }
}

#[test]
fn the_input_through_a_link_is_no_output() {
    let dir = Dir::small();
    llama(&dir, "m");
    std::os::unix::fs::symlink("in.safetensors", dir.at("link.safetensors")).unwrap();
    fs::hard_link(dir.at("in.safetensors"), dir.at("hard.safetensors")).unwrap();
    std::os::unix::fs::symlink("m", dir.at("n")).unwrap();
    dir.refuses(
        &[to("link.safetensors"), vec!["--force"]].concat(),
        &["link.safetensors", "is the input"],
    );
    dir.refuses(
        &[
            "quantize",
            "link.safetensors",
            "--out",
            "in.safetensors",
            "--force",
        ],
        &["in.safetensors", "is the input"],
    );
    dir.refuses(
        &["quantize", "m", "--out", "n", "--force"],
        &["n is the input"],
    );
    dir.refuses(
        &["quantize", "n", "--out", "m", "--force"],
        &["m is the input"],
    );
    dir.refuses(
        &["quantize", "m", "--out", "./m/", "--force"],
        &["is the input"],
    );
    dir.refuses(
        &["quantize", "m", "--out", "m/model.safetensors", "--force"],
        &["is the input"],
    );
    // A hard link is another name: replacing it leaves the first name alone.
    let before = dir.read("in.safetensors");
    dir.run(&[to("hard.safetensors"), vec!["--force"]].concat())
        .is(0);
    assert_eq!(dir.read("in.safetensors"), before);
}

#[test]
fn a_folder_that_does_not_exist() {
    let dir = Dir::small();
    llama(&dir, "m");
    dir.refuses(
        &to("no/out.safetensors"),
        &["no/out.safetensors", "No such file"],
    );
    dir.refuses(
        &["quantize", "m", "--out", "no/way/out"],
        &["no/way/out", "No such file"],
    );
}

#[test]
fn a_path_below_a_file() {
    let dir = Dir::small();
    llama(&dir, "m");
    dir.refuses(
        &to("in.safetensors/out.safetensors"),
        &["in.safetensors/out.safetensors", "Not a directory"],
    );
    dir.refuses(
        &["quantize", "m", "--out", "in.safetensors/out"],
        &["in.safetensors/out", "Not a directory"],
    );
}

#[test]
fn a_device_is_no_output() {
    let dir = Dir::small();
    dir.refuses(&to("/proc/out.safetensors"), &["/proc/out.safetensors"]);
}

/// Another process that writes the same target keeps its work.
#[test]
fn a_target_that_another_process_writes() {
    let dir = Dir::small();
    llama(&dir, "m");
    for (journal, args) in [
        ("out.safetensors.bitnet-journal", to("out.safetensors")),
        (
            "out.bitnet-partial/model.safetensors.bitnet-journal",
            vec!["quantize", "m", "--out", "out"],
        ),
    ] {
        dir.write(journal, "theirs\n");
        let file = fs::File::open(dir.at(journal)).unwrap();
        file.lock().unwrap();
        dir.refuses(&args, &[args[3], "another one at work"]);
        drop(file);
        dir.run(&args).is(0);
        assert!(!dir.at(journal).exists());
    }
}

/// A folder replaces another by two renames. After a kill between them the next run gives the old
/// one its name back, and after the second it removes the old one.
#[test]
fn a_replacement_that_was_killed() {
    let dir = Dir::new();
    llama(&dir, "m");
    let args = ["quantize", "m", "--out", "out"];
    let force = [&args[..], &["--force"]].concat();
    dir.run(&args).is(0);
    let whole = dir.files();
    let replaced = dir.at("out.bitnet-partial-replaced");

    fs::rename(dir.at("out"), &replaced).unwrap();
    dir.run(&args).refused(&["out", "exists already"]);
    assert!(dir.files() == whole);
    fs::rename(dir.at("out"), &replaced).unwrap();
    dir.run(&force).is(0);
    assert!(dir.files() == whole);

    dir.write("out.bitnet-partial-replaced/config.json", "{}");
    dir.run(&force).is(0);
    assert!(dir.files() == whole);

    // The weights are finished, the folder has not its name yet.
    fs::rename(dir.at("out"), dir.at("out.bitnet-partial")).unwrap();
    dir.run(&args).is(0);
    assert!(dir.files() == whole);
}

#[test]
fn a_folder_named_with_a_slash() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.run(&["quantize", "m/", "--out", "out/"]).is(0);
    dir.run(&["verify", "out/"]).is(0);
    assert_eq!(dir.files().len(), 6, "{:?}", dir.files().keys());
    dir.refuses(
        &["quantize", "m/", "--out", "out/"],
        &["out/", "exists already"],
    );
}

#[test]
fn a_folder_holds_what_the_model_needs_and_no_more() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.write("m/tokenizer.json", "{}")
        .write("m/LICENSE", "free")
        .write("m/spiece.model", "pieces")
        .write("m/pytorch_model.bin", "old")
        .write("m/rust_model.ot", "old")
        .write("m/model.onnx_data", "old")
        .write("m/model.safetensors.tmp", "old")
        .write("m/trainer_state.json", "{}")
        .write("m/.git/x", "x")
        .write("m/sub/x", "x");
    dir.write("m/other.safetensors.bitnet-journal", "x");
    let said = dir.run(&["quantize", "m", "--out", "out"]).is(0).stdout();
    for part in [
        "note: the folder sub is not copied",
        "model.onnx_data, model.safetensors.tmp, pytorch_model.bin, rust_model.ot, \
         trainer_state.json",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let files: Vec<String> = dir
        .files()
        .into_keys()
        .filter(|f| f.starts_with("out"))
        .collect();
    assert_eq!(
        files,
        [
            "out/",
            "out/LICENSE",
            "out/config.json",
            "out/model.safetensors",
            "out/spiece.model",
            "out/tokenizer.json"
        ]
    );
    assert_eq!(dir.read("out/tokenizer.json"), b"{}");
}

/// Runs the program on a disk of `size` bytes, and then says what is left there.
fn on_a_full_disk(
    dir: &Dir,
    size: &str,
    fill: &str,
    args: &[&str],
) -> Option<(i32, String, String)> {
    let after = "echo \"left: $(ls -A disk)\"; head -c 4 disk/out.safetensors 2>/dev/null";
    on_a_small_disk(dir, size, [fill, after], args)
}

#[track_caller]
fn full(dir: &Dir, size: &str, fill: &str, args: &[&str], left: &str) {
    let before = dir.files();
    let Some((status, out, err)) = on_a_full_disk(dir, size, fill, args) else {
        return;
    };
    assert_eq!(
        (status, out.trim()),
        (2, format!("left: {left}").trim()),
        "{err}"
    );
    assert!(
        err.starts_with("error: ")
            && err.lines().count() == 1
            && err.contains("No space left")
            && err.contains("disk/"),
        "{err}"
    );
    let mut after = dir.files();
    after.remove("disk/");
    assert!(
        before
            .iter()
            .all(|(name, bytes)| name == "disk/" || after.get(name) == Some(bytes)),
        "the input changed"
    );
}

#[test]
fn a_disk_that_fills_up_under_a_file() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[
            gauss("a.weight", &[700, 1100], 0.02),
            gauss("b.weight", &[700, 1100], 0.02),
        ]),
    );
    full(
        &dir,
        "64k",
        ":",
        &[
            "quantize",
            "in.safetensors",
            "--out",
            "disk/out.safetensors",
        ],
        "",
    );
    full(
        &dir,
        "256k",
        ":",
        &[
            "quantize",
            "in.safetensors",
            "--out",
            "disk/out.safetensors",
        ],
        "",
    );
    full(
        &dir,
        "256k",
        ":",
        &[
            "quantize",
            "in.safetensors",
            "--out",
            "disk/out.safetensors",
            "--layout",
            "auto",
        ],
        "",
    );
    full(
        &dir,
        "64k",
        ":",
        &[
            "dequantize",
            "in.safetensors",
            "--out",
            "disk/out.safetensors",
        ],
        "",
    );
}

#[test]
fn a_disk_that_fills_up_under_a_folder() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.write("m/vocab.txt", vec![b' '; 100_000]);
    let args = [
        "quantize",
        "m",
        "--out",
        "disk/out",
        "--format",
        "hf-bitnet",
    ];
    full(&dir, "64k", ":", &args, "");
    // Enough for the weights, not for the vocabulary beside them.
    full(&dir, "220k", ":", &args, "");
    full(
        &dir,
        "64k",
        ":",
        &["quantize", "m", "--out", "disk/out.gguf"],
        "",
    );
}

#[test]
fn a_disk_that_is_full_from_the_start() {
    let dir = Dir::small();
    llama(&dir, "m");
    let fill = "cat /dev/zero > disk/full 2>/dev/null";
    full(
        &dir,
        "64k",
        fill,
        &[
            "quantize",
            "in.safetensors",
            "--out",
            "disk/out.safetensors",
        ],
        "full",
    );
    full(
        &dir,
        "64k",
        fill,
        &["quantize", "m", "--out", "disk/out"],
        "full",
    );
}

/// The room for the header is a hole until the end: here the last write, of several pages, is what
/// fails.
#[test]
fn a_disk_that_fills_up_at_any_page_leaves_an_old_output_alone() {
    let dir = Dir::new();
    let tensors: Vec<_> = (0..40)
        .map(|i| gauss(format!("layers.{i}.weight").leak(), &[8, 16], 0.02))
        .collect();
    dir.write("in.safetensors", safetensors(&tensors));
    let args = [
        "quantize",
        "in.safetensors",
        "--out",
        "disk/out.safetensors",
        "--force",
    ];
    let (mut refused, mut done) = (0, 0);
    for pages in 1..20 {
        let fill = format!(
            "echo mine > disk/out.safetensors; head -c {} /dev/zero > disk/full",
            (20 - pages) * 4096
        );
        let Some((status, out, err)) = on_a_full_disk(&dir, "84k", &fill, &args) else {
            return;
        };
        if status == 0 {
            done += 1;
            continue;
        }
        refused += 1;
        assert_eq!(
            (status, out.trim()),
            (2, "left: full\nout.safetensors\nmine"),
            "{pages} pages: {err}"
        );
        assert!(
            err.contains("No space left") && err.lines().count() == 1,
            "{err}"
        );
    }
    assert!(refused >= 8 && done >= 1, "{refused} {done}");
}
