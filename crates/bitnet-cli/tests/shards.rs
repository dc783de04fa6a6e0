//! Outputs in several files: safetensors shards with their index, split GGUF sets.

mod common;

use common::{Dir, gauss, llama, random, safetensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

const SIZE: &str = "100KB";

/// The folder `m`: a small llama with a tokenizer's vocabulary beside it.
fn model() -> Dir {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.write("m/vocab.txt", "t");
    dir
}

fn shard(dir: &Dir, args: &[&str]) {
    dir.run(&[args, &["--shard-size", SIZE]].concat()).is(0);
}

/// Names of the files in a folder.
fn names(dir: &Dir, folder: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(dir.at(folder)).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn weights(dir: &Dir, folder: &str) -> Vec<String> {
    let all = names(dir, folder).into_iter();
    all.filter(|n| n.ends_with(".safetensors") || n.ends_with(".gguf"))
        .collect()
}

/// Header and data of a safetensors file.
fn parts(file: &[u8]) -> (Value, &[u8]) {
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..end]).unwrap(), &file[end..])
}

/// Type, shape and bytes of each tensor of a safetensors file.
fn tensors(file: &[u8]) -> BTreeMap<String, (Value, Value, Vec<u8>)> {
    let (header, data) = parts(file);
    let tensors = header.as_object().unwrap().iter();
    tensors
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, t)| {
            let at = |i: usize| t["data_offsets"][i].as_u64().unwrap() as usize;
            let bytes = data[at(0)..at(1)].to_vec();
            (
                name.clone(),
                (t["dtype"].clone(), t["shape"].clone(), bytes),
            )
        })
        .collect()
}

#[test]
fn a_folder_in_shards_holds_the_tensors_of_one_file() {
    let dir = model();
    for command in [
        &["quantize", "m"] as &[&str],
        &["quantize", "m", "--format", "hf-bitnet"],
        &[
            "quantize",
            "m",
            "--layout",
            "auto",
            "--granularity",
            "tensor",
        ],
        &["convert", "m"],
        &["dequantize", "m", "--dtype", "bf16"],
    ] {
        dir.run(&[command, &["--out", "whole"]].concat()).is(0);
        shard(&dir, &[command, &["--out", "out"]].concat());
        assert!(weights(&dir, "whole") == ["model.safetensors"]);
        let files = weights(&dir, "out");
        let count = files.len();
        assert!(count > 1, "{command:?}");
        let index: Value =
            serde_json::from_slice(&dir.read("out/model.safetensors.index.json")).unwrap();
        let (mut found, mut total) = (BTreeMap::new(), 0);
        for (i, file) in files.iter().enumerate() {
            assert_eq!(
                *file,
                format!("model-{:05}-of-{count:05}.safetensors", i + 1)
            );
            let bytes = dir.read(&format!("out/{file}"));
            let (header, data) = parts(&bytes);
            assert_eq!(header["__metadata__"]["format"], "pt");
            let in_file = tensors(&bytes);
            assert!(
                data.len() <= 100_000 || in_file.len() == 1,
                "{file}: {}",
                data.len()
            );
            for (name, tensor) in in_file {
                assert_eq!(index["weight_map"][&name], **file);
                total += tensor.2.len();
                assert!(found.insert(name, tensor).is_none());
            }
        }
        assert_eq!(index["metadata"]["total_size"], total);
        assert_eq!(index["weight_map"].as_object().unwrap().len(), found.len());
        assert!(
            found == tensors(&dir.read("whole/model.safetensors")),
            "{command:?}"
        );
        assert_eq!(dir.read("out/config.json"), dir.read("whole/config.json"));

        let verified = dir.run(&["verify", "out", "--json"]).is(0).json();
        assert_eq!(verified["checked"], found.len());
        dir.run(&["inspect", "out"]).is(0);
        let same = dir.run(&["compare", "whole", "out", "--min-sqnr", "150"]);
        same.is(0);
        // The same bytes again, whatever the number of threads.
        shard(
            &dir,
            &[command, &["--out", "again", "--threads", "1"]].concat(),
        );
        for file in names(&dir, "out") {
            let at = |folder| dir.read(&format!("{folder}/{file}"));
            assert!(at("out") == at("again"), "{file}");
        }
        for folder in ["whole", "out", "again"] {
            fs::remove_dir_all(dir.at(folder)).unwrap();
        }
    }
}

#[test]
fn below_the_size_there_is_one_file() {
    let dir = model();
    dir.run(&["quantize", "m", "--out", "whole"]).is(0);
    for size in ["1MB", "50GB", "2GiB"] {
        let args = [
            "quantize",
            "m",
            "--out",
            "out",
            "--force",
            "--shard-size",
            size,
        ];
        let run = dir.run(&[&args[..], &["--json"]].concat());
        assert_eq!(
            run.is(0).json()["files"],
            serde_json::json!(["out/model.safetensors"])
        );
        assert!(dir.read("out/model.safetensors") == dir.read("whole/model.safetensors"));
        assert_eq!(names(&dir, "out"), names(&dir, "whole"));
    }
    dir.run(&["quantize", "m", "--out", "q.gguf", "--shard-size", "1GB"])
        .is(0);
    assert_eq!(
        names(&dir, "."),
        ["m", "out", "q.gguf", "whole"].map(String::from).into()
    );
}

#[test]
fn sizes_that_are_none_and_files_that_are_never_split() {
    let dir = model();
    for (size, parts) in [
        ("5", &["'5'", "--shard-size", "5GB"] as &[&str]),
        ("GB", &["5GB, 500MB or 2GiB"]),
        ("5GX", &["5GX", "5GB, 500MB or 2GiB"]),
        ("-1GB", &["-1GB"]),
        ("0GB", &["more than 0 bytes"]),
    ] {
        let flag = format!("--shard-size={size}");
        dir.refuses(&["quantize", "m", "--out", "out", &flag], parts);
    }
    for command in ["quantize", "convert", "dequantize"] {
        let args = [
            command,
            "m",
            "--out",
            "out.safetensors",
            "--shard-size",
            "1GB",
        ];
        dir.refuses(&args, &["out.safetensors", "never split", "give a folder"]);
    }
    let name = "out-00001-of-00002.gguf";
    let args = ["quantize", "m", "--out", name, "--shard-size", "10KB"];
    dir.refuses(&args, &[name, "such as out.gguf"]);
}

#[test]
fn a_tensor_larger_than_the_size_has_a_file_of_its_own() {
    let dir = model();
    dir.run(&["dequantize", "m", "--out", "out", "--shard-size", "1B"])
        .is(0);
    let files = weights(&dir, "out");
    assert_eq!(files.len(), 11);
    for file in files {
        assert_eq!(tensors(&dir.read(&format!("out/{file}"))).len(), 1);
    }
    // The scales of a matrix stay beside its codes.
    dir.run(&["quantize", "m", "--out", "q", "--shard-size", "1B"])
        .is(0);
    for file in weights(&dir, "q") {
        let names: Vec<String> = tensors(&dir.read(&format!("q/{file}")))
            .into_keys()
            .collect();
        let scales = names.iter().filter(|n| n.ends_with("_scale")).count();
        assert_eq!(names.len(), 1 + scales, "{names:?}");
    }
}

#[test]
fn force_replaces_every_shard_of_before_and_nothing_else() {
    let dir = model();
    let run = |size: &str| {
        let args = [
            "quantize",
            "m",
            "--out",
            "out",
            "--force",
            "--shard-size",
            size,
        ];
        dir.run(&args).is(0);
        dir.run(&["verify", "out"]).is(0);
        weights(&dir, "out").len()
    };
    let many = run("20KB");
    dir.write("out/mine.txt", "mine");
    let few = run("100KB");
    assert!(many > few && few > 1, "{many} {few}");
    assert_eq!(run("1GB"), 1);
    assert!(!dir.at("out/model.safetensors.index.json").exists());
    assert_eq!(run("20KB"), many);
    assert_eq!(dir.read("out/mine.txt"), b"mine");

    let without = ["quantize", "m", "--out", "out", "--shard-size", "20KB"];
    dir.refuses(&without, &["out exists already", "--force"]);
    // A shard that this program did not write could be taken for one of the new ones.
    dir.write(
        "out/model-00001-of-00077.safetensors",
        safetensors(&[gauss("x", &[2, 2], 1.0)]),
    );
    let force = [
        "quantize",
        "m",
        "--out",
        "out",
        "--shard-size",
        "20KB",
        "--force",
    ];
    dir.refuses(
        &force,
        &["model-00001-of-00077.safetensors", "move it away"],
    );
}

#[test]
fn damage_of_any_shard_is_found() {
    let dir = model();
    shard(&dir, &["quantize", "m", "--out", "out"]);
    let mut next = random(5);
    let files = names(&dir, "out");
    for file in files
        .iter()
        .filter(|f| *f != "vocab.txt" && *f != "config.json")
    {
        let path = format!("out/{file}");
        let good = dir.read(&path);
        let text = String::from_utf8_lossy(&good).into_owned();
        let mut places: Vec<usize> = (0..8).map(|_| next() as usize % good.len()).collect();
        places.extend(text.find("\"pt\"").map(|at| at + 1));
        for place in places {
            let mut bad = good.clone();
            bad[place] ^= 1 << (next() % 7);
            dir.write(&path, &bad);
            let run = dir.run(&["verify", "out"]);
            let status = run.output.status.code();
            assert!(
                matches!(status, Some(1 | 2)),
                "byte {place} of {file}: {}",
                run.stdout()
            );
        }
        dir.write(&path, &good);
    }
    dir.run(&["verify", "out"]).is(0);
}

#[test]
fn a_missing_a_swapped_and_another_shard() {
    let dir = model();
    shard(&dir, &["quantize", "m", "--out", "out"]);
    shard(
        &dir,
        &["quantize", "m", "--out", "other", "--threshold", "mean"],
    );
    let files = weights(&dir, "out");
    assert_eq!(files, weights(&dir, "other"));
    let path = |file: &str| format!("out/{file}");
    for file in &files {
        let good = dir.read(&path(file));
        fs::remove_file(dir.at(&path(file))).unwrap();
        dir.refuses(&["inspect", "out"], &[file, "1 of ", "missing"]);
        // Of another run, with tensors of the same names, types and shapes.
        dir.write(&path(file), dir.read(&format!("other/{file}")));
        dir.run(&["verify", "out"]).is(1);
        dir.write(&path(file), good);
    }
    let (first, last) = (path(&files[0]), path(&files[files.len() - 1]));
    let (a, b) = (dir.read(&first), dir.read(&last));
    dir.write(&first, &b).write(&last, &a);
    dir.refuses(&["inspect", "out"], &["index puts here"]);
    dir.write(&first, &a).write(&last, &b);
    dir.run(&["verify", "out"]).is(0);

    // One shard alone: the first needs the others, and the last says what it is.
    dir.refuses(&["inspect", &first], &["file 1 of", "give its folder"]);
    let note = dir.run(&["inspect", &last]);
    assert!(
        note.is(0).stdout().contains("give its folder"),
        "{}",
        note.stdout()
    );
}

#[test]
fn hostile_indexes() {
    let dir = model();
    shard(&dir, &["quantize", "m", "--out", "out"]);
    let path = "out/model.safetensors.index.json";
    let good: Value = serde_json::from_slice(&dir.read(path)).unwrap();
    let first = "model.layers.0.self_attn.q_proj.weight_packed";
    assert!(good["weight_map"][first].is_string());
    let mut outside = good.clone();
    outside["weight_map"][first] = "../m/model.safetensors".into();
    let mut absent = good.clone();
    absent["weight_map"][first] = "model-00009-of-00009.safetensors".into();
    let mut extra = good.clone();
    extra["weight_map"]["ghost"] = weights(&dir, "out")[0].clone().into();
    for (index, parts) in [
        (outside, &[first, "file name in the same folder"] as &[&str]),
        (absent, &["model-00009-of-00009.safetensors", "missing"]),
        (extra, &["ghost", "none of that name"]),
    ] {
        dir.write_json(path, &index);
        dir.refuses(&["inspect", "out"], parts);
        // An index that is not the one that was written vouches for no file.
        let force = ["quantize", "m", "--out", "out", "--force"];
        dir.refuses(&force, &["move it away"]);
    }
}

/// Little-endian number at a place.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Type and bytes of the value of a key of a GGUF.
fn value<'a>(file: &'a [u8], key: &str) -> Option<(u32, &'a [u8])> {
    let name = [&(key.len() as u64).to_le_bytes()[..], key.as_bytes()].concat();
    let at = file.windows(name.len()).position(|w| w == name)? + name.len();
    Some((u32_at(file, at), &file[at + 4..]))
}

#[test]
fn a_gguf_set_has_the_names_and_keys_of_gguf_split() {
    let dir = model();
    fs::create_dir(dir.at("set")).unwrap();
    let args = [
        "quantize",
        "m",
        "--out",
        "set/q.gguf",
        "--shard-size",
        "50KB",
        "--json",
    ];
    let json = dir.run(&args).is(0).json();
    let files = weights(&dir, "set");
    let count = files.len();
    assert!(count > 2, "{files:?}");
    assert_eq!(json["output"], format!("set/{}", files[0]));
    assert_eq!(json["files"].as_array().unwrap().len(), count);
    let mut total = 0;
    for (i, name) in files.iter().enumerate() {
        assert_eq!(*name, format!("q-{:05}-of-{count:05}.gguf", i + 1));
        let file = dir.read(&format!("set/{name}"));
        let (no, of, tensors) = ("split.no", "split.count", "split.tensors.count");
        // Types: 2 is u16, 5 is i32.
        let number = |key| value(&file, key).map(|(kind, bytes)| (kind, u32_at(bytes, 0)));
        assert_eq!(
            number(no).map(|(t, n)| (t, n & 0xffff)),
            Some((2, i as u32))
        );
        assert_eq!(
            number(of).map(|(t, n)| (t, n & 0xffff)),
            Some((2, count as u32))
        );
        assert_eq!(number(tensors), Some((5, 11)));
        assert_eq!(value(&file, "general.architecture").is_some(), i == 0);
        assert_eq!(value(&file, "bitnet.document").is_some(), i == 0);
        let keys = u32_at(&file, 16);
        assert!(i == 0 || keys == 3, "{keys}");
        total += u32_at(&file, 8);
    }
    assert_eq!(total, 11);
    dir.refuses(&args, &[&files[0], "exists already"]);
}

#[test]
fn a_gguf_set_is_read_and_verified() {
    let dir = model();
    let quantize = |out, threshold| {
        let args = ["quantize", "m", "--out", out, "--threshold", threshold];
        dir.run(&[&args[..], &["--shard-size", "50KB"]].concat())
            .is(0);
    };
    dir.run(&["quantize", "m", "--out", "whole.gguf"]).is(0);
    quantize("q.gguf", "absmean");
    quantize("other.gguf", "mean");
    let files: Vec<String> = weights(&dir, ".")
        .into_iter()
        .filter(|name| name.starts_with("q-"))
        .collect();
    let first = files[0].as_str();
    let verified = dir.run(&["verify", first, "--json"]).is(0).json();
    assert_eq!(verified["checked"], 11);
    dir.run(&["compare", "whole.gguf", first, "--min-sqnr", "150"])
        .is(0);
    for file in &files {
        let good = dir.read(file);
        let after = |key: &str| {
            let place = good.windows(key.len()).position(|w| w == key.as_bytes());
            place.unwrap() + key.len()
        };
        // The type and the value of a key, and data.
        let mut places = vec![good.len() - 1];
        for key in ["split.no", "split.count", "split.tensors.count"] {
            places.extend([after(key), after(key) + 4]);
        }
        for place in places {
            let mut bad = good.clone();
            bad[place] ^= 1;
            dir.write(file, &bad);
            let run = dir.run(&["verify", first]);
            let status = run.output.status.code();
            assert!(matches!(status, Some(1 | 2)), "byte {place} of {file}");
        }
        dir.write(file, dir.read(&file.replace("q-", "other-")));
        dir.run(&["verify", first]).is(1);
        dir.write(file, good);
    }
    dir.run(&["verify", first]).is(0);
}

#[test]
fn force_replaces_the_gguf_set_of_before() {
    let dir = model();
    let run = |size: &str| {
        let args = [
            "quantize",
            "m",
            "--out",
            "q.gguf",
            "--force",
            "--shard-size",
            size,
        ];
        dir.run(&args).is(0);
        let mut names = weights(&dir, ".");
        names.retain(|name| name.starts_with("q"));
        names
    };
    let many = run("20KB");
    // Files of others: another name, another set, one of the same name without a document.
    let others = [
        "q2-00001-of-00002.gguf",
        "q-x-00001-of-00002.gguf",
        "q-00001-of-00099.gguf",
    ];
    for name in others {
        dir.write(name, "GGUF of another");
    }
    let few = run("50KB");
    assert!(few.len() < many.len(), "{few:?}");
    let own = |names: &[String]| {
        let own = names.iter().filter(|n| !others.contains(&n.as_str()));
        own.cloned().collect::<Vec<_>>()
    };
    let count = own(&few).len();
    assert!(
        own(&few)
            .iter()
            .all(|n| n.ends_with(&format!("-of-{count:05}.gguf"))),
        "{few:?}"
    );
    assert!(others.iter().all(|o| few.iter().any(|n| n == o)));
    // One file in place of the set, and the set in place of it.
    assert_eq!(own(&run("1GB")), ["q.gguf"]);
    assert_eq!(own(&run("20KB")), many);
    // The name is taken by the set, too.
    dir.refuses(
        &["quantize", "m", "--out", "q.gguf"],
        &["exists already", "--force"],
    );
}

#[cfg(unix)]
mod killed {
    use super::{model, names, shard, weights};
    use crate::common::{Dir, random};
    use std::collections::BTreeSet;
    use std::fs;
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    /// Kills at random moments, and runs to the end: the same bytes, and nothing beside them.
    fn check(dir: &Dir, args: &[&str], expected: &str, out: &str) {
        let clock = Instant::now();
        shard(dir, &[args, &["--out", &format!("{expected}/q")]].concat());
        let whole = clock.elapsed();
        let mut next = random(3);
        let target = format!("{out}/q");
        for _ in 0..10 {
            let args = [args, &["--out", &target, "--shard-size", super::SIZE]].concat();
            for _ in 0..2 {
                let mut command = dir.command(&args);
                let mut child = command
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                std::thread::sleep(whole.mul_f64((next() % 1000) as f64 / 1000.0));
                let _ = child.kill();
                child.wait().unwrap();
            }
            let run = dir.run(&args);
            if run.output.status.code() == Some(2) {
                run.refused(&["exists already"]);
            }
            let whole = dir.at(&format!("{expected}/q"));
            assert_eq!(
                names(dir, &format!("{out}/q")),
                names(dir, &format!("{expected}/q"))
            );
            for name in fs::read_dir(whole).unwrap().map(|e| e.unwrap().file_name()) {
                let read = |folder: &str| fs::read(dir.at(folder).join("q").join(&name)).unwrap();
                assert!(read(out) == read(expected), "{name:?}");
            }
            assert_eq!(names(dir, out), BTreeSet::from(["q".into()]));
            fs::remove_dir_all(dir.at(out).join("q")).unwrap();
        }
    }

    #[test]
    fn a_folder_in_shards_resumes() {
        let dir = model();
        fs::create_dir(dir.at("a")).unwrap();
        fs::create_dir(dir.at("b")).unwrap();
        check(&dir, &["quantize", "m", "--threshold", "optimal"], "a", "b");
    }

    /// Every state that a kill between two renames leaves.
    #[test]
    fn a_gguf_set_killed_between_two_renames() {
        let dir = model();
        for folder in ["whole", "set"] {
            fs::create_dir(dir.at(folder)).unwrap();
        }
        let args = |out| {
            [
                "quantize",
                "m",
                "--out",
                out,
                "--shard-size",
                "50KB",
                "--threshold",
                "optimal",
            ]
        };
        dir.run(&args("whole/q.gguf")).is(0);
        let files = weights(&dir, "whole");
        let (journal, partial) = ("set/q.gguf.bitnet-journal", ".bitnet-partial");
        // A journal of the job, from a run that is killed when it has begun a tensor.
        let text = {
            let mut done = None;
            for _ in 0..50 {
                let mut command = dir.command(&args("set/q.gguf"));
                let mut child = command
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                let start = Instant::now();
                let mut seen = Vec::new();
                while child.try_wait().unwrap().is_none()
                    && start.elapsed() < Duration::from_secs(20)
                {
                    // The journal stays until all files have their names.
                    let text = fs::read(dir.at(journal)).unwrap_or_default();
                    if text.len() > seen.len() {
                        seen = text;
                    }
                }
                child.wait().unwrap();
                for file in names(&dir, "set") {
                    fs::remove_file(dir.at("set").join(file)).unwrap();
                }
                if String::from_utf8_lossy(&seen).contains("\"placing\":true")
                    && seen.ends_with(b"\n")
                {
                    done = Some(seen);
                    break;
                }
            }
            done.expect("a whole journal")
        };
        // Files from `placed` on have their names; the old set may still have the others.
        for placed in 0..=files.len() {
            for old in [false, true] {
                dir.write(journal, &text);
                for (i, file) in files.iter().enumerate() {
                    let bytes = dir.read(&format!("whole/{file}"));
                    if i >= placed {
                        dir.write(&format!("set/{file}"), bytes);
                    } else {
                        dir.write(&format!("set/{file}{partial}"), bytes);
                        if old && i > 0 {
                            dir.write(&format!("set/{file}"), "old");
                        }
                    }
                }
                let run = dir.run(&args("set/q.gguf"));
                run.is(0);
                assert_eq!(weights(&dir, "set"), files, "{placed}");
                assert_eq!(
                    names(&dir, "set").len(),
                    files.len(),
                    "{:?}",
                    names(&dir, "set")
                );
                for file in &files {
                    let at = |folder| dir.read(&format!("{folder}/{file}"));
                    assert!(at("set") == at("whole"), "{file}");
                }
                // Damage meanwhile: everything is written again.
                if placed == 2 && !old {
                    dir.write(journal, &text);
                    let last = format!("set/{}", files[files.len() - 1]);
                    let mut bytes = dir.read(&last);
                    let end = bytes.len();
                    bytes[end / 2] ^= 1;
                    dir.write(&last, &bytes);
                    dir.run(&args("set/q.gguf")).is(0);
                    assert!(dir.read(&last) != bytes);
                    assert_eq!(names(&dir, "set").len(), files.len());
                }
                for file in names(&dir, "set") {
                    fs::remove_file(dir.at("set").join(file)).unwrap();
                }
            }
        }
    }
}
