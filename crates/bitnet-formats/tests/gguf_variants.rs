//! Big-endian GGUF and GGUF in parts, against the same models as one little-endian file; gguf-py
//! wrote them all (`data/gguf/make.py`).

use bitnet_formats::{Kind, Source, gguf};
use std::fs;
use std::path::{Path, PathBuf};

fn data(name: &str) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gguf");
    Path::new(folder).join(name)
}

/// Name, type, shape and bytes of every tensor, by name.
fn tensors(source: &Source) -> Vec<(String, String, Vec<usize>, Vec<u8>)> {
    let mut all: Vec<_> = source
        .stored_ids()
        .map(|id| {
            let t = source.stored(id);
            let bytes = source.read_all(id).unwrap();
            (t.name.clone(), t.dtype.to_string(), t.shape.clone(), bytes)
        })
        .collect();
    all.sort();
    all
}

fn assert_same(a: &Source, b: &Source) {
    assert_eq!(a.gguf(), b.gguf());
    assert_eq!(a.kind(), Kind::Gguf);
    assert!(a.stored_tensors().len() > 4);
    for (a, b) in tensors(a).iter().zip(&tensors(b)) {
        assert_eq!(a, b);
    }
    assert_eq!(a.stored_tensors().len(), b.stored_tensors().len());
}

#[test]
fn big_endian_files_are_the_same_models() {
    for (little, big) in [("little.gguf", "big.gguf"), ("little-2.gguf", "big-2.gguf")] {
        let bytes = fs::read(data(big)).unwrap();
        let header = gguf::GgufHeader::read(&bytes[..], bytes.len() as u64).unwrap();
        assert_eq!(header.byte_order, gguf::ByteOrder::Big);
        let (little, big) = (Source::open(&data(little)), Source::open(&data(big)));
        let (little, big) = (little.unwrap(), big.unwrap());
        assert_same(&big, &little);
        assert_eq!(big.gguf().len(), 16);
        // Ranges that cut elements and blocks.
        for id in little.stored_ids() {
            let whole = little.read_all(id).unwrap();
            for (start, end) in [(1, whole.len()), (0, whole.len() - 1), (7, 8), (5, 20)] {
                let mut part = vec![0; end - start];
                big.read(id, start as u64, &mut part).unwrap();
                assert_eq!(part, whole[start..end], "{}", little.stored(id).name);
            }
        }
    }
}

/// A folder with the parts of a model under the names of `names`.
fn parts(names: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in names {
        let from = data("split").join(from);
        fs::copy(from, folder.path().join(to)).unwrap();
    }
    folder
}

const NAMES: [&str; 4] = [
    "m-00001-of-00004.gguf",
    "m-00002-of-00004.gguf",
    "m-00003-of-00004.gguf",
    "m-00004-of-00004.gguf",
];

#[test]
fn any_part_opens_the_whole_model() {
    let whole = Source::open(&data("split/whole.gguf")).unwrap();
    for name in NAMES {
        let path = data("split").join(name);
        let source = Source::open(&path).unwrap();
        assert_same(&source, &whole);
        assert_eq!(source.path(), path);
        assert_eq!(source.files().len(), 4);
        assert!(source.notes().is_empty(), "{:?}", source.notes());
        assert!(
            source
                .gguf()
                .iter()
                .all(|(key, _)| !key.starts_with("split."))
        );
    }
}

/// Messages of opening `name` in a folder.
fn refusal(folder: &tempfile::TempDir, name: &str) -> String {
    let error = Source::open(&folder.path().join(name)).unwrap_err();
    error.to_string()
}

fn assert_words(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn parts_that_are_not_there_are_named() {
    let folder = parts(&[(NAMES[0], NAMES[0]), (NAMES[2], NAMES[2])]);
    for name in [NAMES[0], NAMES[2]] {
        let words = [name, "all 4 parts", "got 2 of them", NAMES[1], NAMES[3]];
        assert_words(&refusal(&folder, name), &words);
    }
    let folder = parts(&[(NAMES[1], "renamed.gguf")]);
    let words = ["renamed.gguf", "-00002-of-00004.gguf", "part 2 of 4"];
    assert_words(&refusal(&folder, "renamed.gguf"), &words);
}

#[test]
fn parts_that_do_not_belong_together_are_named() {
    // The third part twice.
    let mut names = NAMES.map(|name| (name, name));
    names[1].0 = NAMES[2];
    let message = refusal(&parts(&names), NAMES[0]);
    assert_words(&message, &[NAMES[1], "split.no", "expected 1", "got 2"]);
    // A model in one file under the name of a part.
    names[1].0 = "whole.gguf";
    let message = refusal(&parts(&names), NAMES[3]);
    assert_words(&message, &[NAMES[1], "part 2 of 4", "no part"]);
}

/// Replaces a number behind a key: 4 bytes of type and `old`.
fn patch(path: &Path, key: &str, old: &[u8], new: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.windows(key.len()).position(|w| w == key.as_bytes());
    let at = at.unwrap() + key.len() + 4;
    assert_eq!(&bytes[at..at + old.len()], old, "{key}");
    bytes[at..at + new.len()].copy_from_slice(new);
    fs::write(path, bytes).unwrap();
}

#[test]
fn wrong_counts_and_doubled_tensors_are_named() {
    let all = || parts(&NAMES.map(|name| (name, name)));
    let folder = all();
    let path = folder.path().join(NAMES[2]);
    patch(&path, "split.tensors.count", &[5, 0], &[6, 0]);
    let words = [NAMES[2], "split.tensors.count", "expected 5", "got 6"];
    assert_words(&refusal(&folder, NAMES[0]), &words);

    let folder = all();
    for name in NAMES {
        let path = folder.path().join(name);
        patch(&path, "split.tensors.count", &[5, 0], &[9, 0]);
    }
    let words = [NAMES[0], "split.tensors.count", "expected 5", "got 9"];
    assert_words(&refusal(&folder, NAMES[3]), &words);

    let folder = all();
    patch(
        &folder.path().join(NAMES[3]),
        "split.count",
        &[4, 0],
        &[3, 0],
    );
    let words = [NAMES[3], "split.count", "expected 4", "got 3"];
    assert_words(&refusal(&folder, NAMES[0]), &words);

    let folder = all();
    let path = folder.path().join(NAMES[3]);
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(2).position(|w| w == b"t4").unwrap();
    bytes[at + 1] = b'0';
    fs::write(&path, bytes).unwrap();
    let words = [NAMES[3], "'t0'", "one part", NAMES[1]];
    assert_words(&refusal(&folder, NAMES[0]), &words);
}

#[test]
fn a_folder_of_parts_says_which_file_to_give() {
    let message = Source::open(&data("split")).unwrap_err().to_string();
    assert_words(&message, &["give the file", ".gguf"]);
    let folder = parts(&NAMES.map(|name| (name, name)));
    let error = Source::open(folder.path()).unwrap_err().to_string();
    assert_words(&error, &["one GGUF model in 4 parts", NAMES[0]]);
}
