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
    let message = refusal("evil.bin");
    assert!(message.contains("posix.system"), "{message}");
    assert!(!PathBuf::from("/tmp/bitnet-quant-pickle-ran").exists());
}

#[test]
fn what_cannot_be_read_is_named() {
    for (file, words) in [
        ("transposed.bin", "'w': expected a contiguous tensor"),
        ("compressed.bin", "compressed"),
        ("two.bin", "model, ema"),
        ("legacy.bin", "torch.save"),
    ] {
        let message = refusal(file);
        assert!(message.contains(words), "{file}: {message}");
        assert!(message.contains(file), "{message}");
    }
}

/// Prefixes and changed bytes of a small file: an error or a checkpoint, and no panic.
#[test]
fn damaged_files_are_errors() {
    let whole = std::fs::read(data("module.bin")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.bin");
    for len in (0..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(Source::open(&path).is_err(), "{len} bytes");
    }
    for i in (0..whole.len()).step_by(3) {
        let mut bytes = whole.clone();
        bytes[i] ^= 0x41;
        std::fs::write(&path, &bytes).unwrap();
        drop(Source::open(&path));
    }
}
