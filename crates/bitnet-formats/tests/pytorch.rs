//! PyTorch checkpoints against what torch itself reads; `data/pytorch/make.py` wrote the files.

use bitnet_formats::Source;
use serde_json::Value;
use std::path::PathBuf;

fn data(name: &str) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/pytorch");
    PathBuf::from(folder).join(name)
}

fn refusal(name: &str) -> String {
    Source::open(&data(name)).unwrap_err().to_string()
}

#[test]
fn tensors_are_those_of_torch() {
    let expected = std::fs::read(data("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    for (file, tensors) in expected.as_object().unwrap() {
        let source = Source::open(&data(file)).unwrap();
        let tensors = tensors.as_object().unwrap();
        assert_eq!(source.stored_tensors().len(), tensors.len(), "{file}");
        for (name, tensor) in tensors {
            let id = source.find_stored(name).unwrap_or_else(|| panic!("{name}"));
            let stored = source.stored(id);
            let bytes = source.read_all(id).unwrap();
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(tensor["bytes"], hex, "{file} {name}");
            assert_eq!(tensor["shape"], Value::from(stored.shape.clone()), "{name}");
            let dtype = match tensor["dtype"].as_str().unwrap() {
                "float8_e4m3fn" => "F8_E4M3",
                "bfloat16" => "BF16",
                "float16" => "F16",
                "float32" => "F32",
                "float64" => "F64",
                "int64" => "I64",
                "uint8" => "U8",
                other => panic!("{other}"),
            };
            assert_eq!(stored.dtype.to_string(), dtype, "{name}");
        }
    }
}

#[test]
fn what_is_left_out_is_said() {
    let notes = Source::open(&data("nested.bin"))
        .unwrap()
        .notes()
        .join("\n");
    assert!(notes.contains("its entry 'state_dict'"), "{notes}");
    assert!(Source::open(&data("state.bin")).unwrap().notes().is_empty());
}

#[test]
fn a_name_beyond_tensors_is_refused_and_nothing_runs() {
    for file in ["evil.bin", "legacy-evil.bin"] {
        let message = refusal(file);
        assert!(message.contains("posix.system"), "{message}");
    }
    assert!(!PathBuf::from("/tmp/bitnet-quant-pickle-ran").exists());
}

#[test]
fn what_cannot_be_read_is_named() {
    for (file, words) in [("compressed.bin", "compressed"), ("two.bin", "model, ema")] {
        let message = refusal(file);
        assert!(message.contains(words), "{file}: {message}");
        assert!(message.contains(file), "{message}");
    }
}

/// Prefixes and changed bytes of a small file: an error or a checkpoint, and no panic.
#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.bin");
    for file in [
        "module.bin",
        "strided.bin",
        "legacy-nested.bin",
        "legacy-protocol4.bin",
    ] {
        let whole = std::fs::read(data(file)).unwrap();
        let step = 1 + whole.len() / 150;
        for len in (0..whole.len()).step_by(step) {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(Source::open(&path).is_err(), "{file}: {len} bytes");
        }
        for i in (0..whole.len()).step_by(step) {
            let mut bytes = whole.clone();
            bytes[i] ^= 0x41;
            std::fs::write(&path, &bytes).unwrap();
            let Ok(source) = Source::open(&path) else {
                continue;
            };
            // A changed shape may repeat elements many times.
            let small = |id: &_| source.stored(*id).len < 1 << 16;
            for id in source.stored_ids().filter(small) {
                drop(source.read_all(id));
            }
        }
    }
}

/// A legacy file: its first four pickles and keys, then `storages`.
fn legacy(object: &[u8], storages: &[u8]) -> Vec<u8> {
    let magic = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
    let pickles: [&[u8]; 5] = [
        &[b"\x8a\x0a", &magic[..]].concat(),
        b"M\xe9\x03",
        b"}",
        object,
        b"]X\x01\0\0\0ka",
    ];
    let pickles = pickles.iter().map(|p| [b"\x80\x02", *p, b"."].concat());
    let mut file: Vec<u8> = pickles.flatten().collect();
    file.extend_from_slice(storages);
    file
}

/// The pickle of `{'w': shape [2, 3] with `strides` from element `offset`}`; `part` is the last
/// item of the storage's reference.
fn one_tensor(class: &str, part: &str, strides: [u8; 2], offset: u8) -> Vec<u8> {
    let mut pickle = b"}U\x01wctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\n".to_vec();
    pickle.extend(format!("{class}\nU\x01kU\x03cpuK\x08{part}tQK").bytes());
    pickle.extend([
        offset, b'K', 2, b'K', 3, 0x86, b'K', strides[0], b'K', strides[1], 0x86,
    ]);
    pickle.extend(b"tRs");
    pickle
}

/// What torch before 0.4 and Python 2 wrote: `_rebuild_tensor`, byte strings, and storages that are
/// a part of another.
#[test]
fn the_oldest_pickles() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.pth");
    let elements: Vec<u8> = (0..8i16).flat_map(i16::to_le_bytes).collect();
    let storages = [&8u64.to_le_bytes()[..], &elements].concat();
    let read = |object: &[u8], storages: &[u8]| {
        std::fs::write(&path, legacy(object, storages)).unwrap();
        let source = Source::open(&path).map_err(|e| e.to_string())?;
        let id = source.find_stored("w").unwrap();
        let bytes = source.read_all(id).unwrap();
        let (numbers, _) = bytes.as_chunks::<2>();
        Ok::<_, String>(
            numbers
                .iter()
                .map(|b| i16::from_le_bytes(*b))
                .collect::<Vec<_>>(),
        )
    };
    let whole = one_tensor("ShortStorage", "N", [3, 1], 2);
    assert_eq!(read(&whole, &storages).unwrap(), [2, 3, 4, 5, 6, 7]);
    let part = one_tensor("ShortStorage", "(U\x01vK\x01K\x07t", [1, 2], 0);
    assert_eq!(read(&part, &storages).unwrap(), [1, 3, 5, 2, 4, 6]);

    for (object, storages, words) in [
        (
            one_tensor("ShortStorage", "N", [3, 1], 3),
            &storages[..],
            "a view inside the 16 bytes",
        ),
        (
            one_tensor("ShortStorage", "N", [1, 4], 0),
            &storages,
            "a view inside the 16 bytes",
        ),
        (
            one_tensor("FloatStorage", "N", [3, 1], 0),
            &storages,
            "cut short",
        ),
        (whole.clone(), &storages[..23], "cut short"),
        (whole.clone(), &storages[..7], "cut short"),
        (
            whole.clone(),
            &9u64.to_le_bytes(),
            "8 elements in storage 'k'",
        ),
        (b"]".to_vec(), &storages, "keys of storages"),
    ] {
        let message = read(&object, storages).unwrap_err();
        assert!(message.contains(words), "{message}");
        assert!(message.contains("old.pth"), "{message}");
    }
}

/// A file of a few bytes cannot ask for the memory of a tensor that repeats them.
#[test]
fn repeated_elements_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.pth");
    let mut object = one_tensor("FloatStorage", "N", [0, 0], 0);
    let at = object.windows(2).position(|w| w == [b'K', 3]).unwrap();
    object.splice(at..at + 2, *b"J\xff\xff\xff\x7f");
    let storages = [&8u64.to_le_bytes()[..], &[0; 32]].concat();
    std::fs::write(&path, legacy(&object, &storages)).unwrap();
    let message = Source::open(&path).unwrap_err().to_string();
    assert!(message.contains("repeated elements"), "{message}");
}
