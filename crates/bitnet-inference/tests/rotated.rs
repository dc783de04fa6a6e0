//! A model in a rotated basis against transformers' logits of the same model in its original one.
//! scripts/make-rotated-golden.py writes both, with numpy and gguf-py.

use bitnet_formats::Source;
use bitnet_formats::gguf::{Array, GgufEntry, Value, encode_header};
use bitnet_inference::{
    ActivationType, CacheType, ForwardBuffers, ForwardStep, KvCache, LoadOptions, Model,
    WantedLogits,
};
use bitnet_kernels::Kernels;
use safetensors::SafeTensors;
use std::fs;
use std::path::{Path, PathBuf};

const PROMPT: usize = 23;
/// As in golden.rs: the bound on the difference of a logit relative to the largest logit.
const BOUND: f32 = 2e-5;
const PREFIX: &str = "prism.hadamard.";
const LLAMA: &str = "llama-rotated";
const QWEN35: &str = "qwen35-rotated";

/// A file of a golden: `llama-rotated`, or `qwen35-rotated`, which mlx-lm computed
/// (scripts/make-rotated-delta-golden.py).
fn golden(model: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(model)
        .join(name)
}

/// Tokens and their logits.
fn truth(model: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = fs::read(golden(model, "golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (
        file.tensor("tokens").unwrap(),
        file.tensor("logits").unwrap(),
    );
    let tokens = tokens.data().as_chunks().0.iter();
    let logits = logits.data().as_chunks().0.iter();
    (
        tokens.map(|b| u32::from_le_bytes(*b)).collect(),
        logits.map(|b| f32::from_le_bytes(*b)).collect(),
    )
}

fn load(path: &Path, options: LoadOptions) -> Result<Model, bitnet_inference::Error> {
    Model::load_with(path, &options)
}

/// The prompt in one pass, then the other tokens in pieces.
fn logits(model: &Model, tokens: &[u32], piece: usize) -> Vec<f32> {
    let mut cache = KvCache::new(model.config(), 64, CacheType::F32);
    let mut buffers = ForwardBuffers::default();
    let (prompt, rest) = tokens.split_at(PROMPT);
    let mut all = vec![];
    for tokens in [prompt].into_iter().chain(rest.chunks(piece)) {
        let step = ForwardStep {
            cache: &mut cache,
            tokens,
            want: WantedLogits::All,
        };
        all.extend(model.forward(&mut [step], &mut buffers).unwrap());
    }
    all
}

fn relative(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let top = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let differences = got.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0f32, |m, d| if d <= m { m } else { d }) / top
}

#[test]
fn logits_are_those_of_the_original_basis() {
    let (tokens, expected) = truth(LLAMA);
    let mut first: Option<Vec<u32>> = None;
    for kernels in Kernels::all() {
        for (threads, piece) in [(1, 1), (2, 1), (3, 16)] {
            let options = LoadOptions {
                threads,
                kernels,
                ..Default::default()
            };
            let model = load(&golden(LLAMA, "model.gguf"), options).unwrap();
            let got = logits(&model, &tokens, piece);
            let error = relative(&got, &expected);
            assert!(error < BOUND, "{}: {error:.2e}", kernels.isa());
            let bits: Vec<u32> = got.iter().map(|x| x.to_bits()).collect();
            let first = first.get_or_insert_with(|| bits.clone());
            assert!(*first == bits, "{}, {threads} threads", kernels.isa());
        }
    }
}

/// Ternary layers quantize the rotated input, once for all layers of that basis.
#[test]
fn rotated_inputs_are_quantized() {
    let (tokens, expected) = truth(LLAMA);
    let options = LoadOptions {
        activations: ActivationType::Int8,
        ..Default::default()
    };
    let model = load(&golden(LLAMA, "model.gguf"), options).unwrap();
    assert!(model.integer_products(1, 1) > 0);
    let got = logits(&model, &tokens, 1);
    let error = relative(&got, &expected);
    assert!(error > BOUND && error < 0.1, "{error}");
    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same(&got, &logits(&model, &tokens, 16)));
}

/// A golden with other keys.
fn with_keys(model: &str, to: &Path, edit: impl FnOnce(&mut Vec<(String, Value)>)) {
    let source = Source::open(&golden(model, "model.gguf")).unwrap();
    let mut metadata = source.gguf().to_vec();
    edit(&mut metadata);
    let mut tensors = vec![];
    for stored in source.stored_tensors() {
        tensors.push(GgufEntry {
            name: stored.name.clone(),
            shape: stored.shape.clone(),
            ggml_type: stored.dtype.to_ggml().unwrap(),
            len: stored.len,
        });
    }
    let header = encode_header(&metadata, &tensors, 32).unwrap();
    let mut bytes = header.bytes.clone();
    for (id, offset) in source.stored_ids().zip(&header.offsets) {
        bytes.resize(header.bytes.len() + *offset as usize, 0);
        bytes.extend(source.read_all(id).unwrap());
    }
    bytes.resize(header.file_len() as usize, 0);
    fs::write(to, bytes).unwrap();
}

fn key<'a>(keys: &'a mut [(String, Value)], name: &str) -> &'a mut Value {
    let full = format!("{PREFIX}{name}");
    &mut keys.iter_mut().find(|(k, _)| *k == full).unwrap().1
}

fn names(names: &[&str]) -> Value {
    Array::String(names.iter().map(|n| n.to_string()).collect()).into()
}

/// Errors that the golden must detect, each far beyond the bound.
#[test]
fn mistakes_change_the_logits() {
    let (tokens, expected) = truth(LLAMA);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    type Edit = fn(&mut Vec<(String, Value)>);
    let mistakes: [(&str, Edit); 5] = [
        ("ignored", |keys| {
            keys.retain(|(key, _)| !key.starts_with(PREFIX))
        }),
        ("without signs", |keys| {
            *key(keys, "sign_mode") = "identity".into();
            keys.retain(|(key, _)| !key.contains("sign_values"));
        }),
        ("signs of the other end", |keys| {
            if let Value::Array(Array::I8(signs)) = key(keys, "sign_values") {
                signs[..256].reverse();
            }
        }),
        ("blocks of another size", |keys| {
            *key(keys, "block_size") = Value::U32(256);
        }),
        ("one matrix less", |keys| {
            let all = ["attn_q", "attn_v", "ffn_gate", "ffn_up", "ffn_down"];
            let all: Vec<_> = all.iter().map(|n| format!("blk.0.{n}.weight")).collect();
            *key(keys, "weight_names") = Array::String(all).into();
        }),
    ];
    for (mistake, edit) in mistakes {
        with_keys(LLAMA, &path, edit);
        let model = load(&path, LoadOptions::default()).unwrap();
        let error = relative(&logits(&model, &tokens, 1), &expected);
        assert!(error > 100.0 * BOUND, "{mistake}: {error:.2e}");
    }
    // The file written so is the golden where nothing is changed.
    with_keys(LLAMA, &path, |_| {});
    let model = load(&path, LoadOptions::default()).unwrap();
    assert!(relative(&logits(&model, &tokens, 1), &expected) < BOUND);
}

/// The output matrix of a gated delta net takes the heads in another order than the model has them.
#[test]
fn grouped_value_heads_are_those_of_mlx() {
    let (tokens, expected) = truth(QWEN35);
    let path = golden(QWEN35, "model.gguf");
    let model = load(&path, LoadOptions::default()).unwrap();
    let got = logits(&model, &tokens, 1);
    let error = relative(&got, &expected);
    assert!(error < BOUND, "{error:.2e}");
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&logits(&model, &tokens, 16)));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    type Edit = fn(&mut Vec<(String, Value)>);
    let mistakes: [(&str, Edit); 2] = [
        ("the order of the model", |keys| {
            *key(keys, "gdn_v_grouped") = Value::Bool(false);
        }),
        ("ignored", |keys| {
            keys.retain(|(key, _)| !key.starts_with(PREFIX))
        }),
    ];
    for (mistake, edit) in mistakes {
        with_keys(QWEN35, &path, edit);
        let model = load(&path, LoadOptions::default()).unwrap();
        let error = relative(&logits(&model, &tokens, 1), &expected);
        assert!(error > 100.0 * BOUND, "{mistake}: {error:.2e}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    type Edit = fn(&mut Vec<(String, Value)>);
    let cases: [(Edit, &[&str]); 3] = [
        (
            |keys| keys.push((format!("{PREFIX}rounds"), Value::U32(2))),
            &["prism.hadamard.rounds", "one of the keys", "got 2"],
        ),
        (
            |keys| *key(keys, "version") = Value::U32(2),
            &["prism.hadamard.version", "expected 1, got 2"],
        ),
        (
            |keys| {
                *key(keys, "weight_names") = names(&["token_embd.weight"]);
                *key(keys, "inverse_weight_names") = names(&[]);
            },
            &["token_embd.weight", "inverse_weight_names"],
        ),
    ];
    for (edit, parts) in cases {
        with_keys(LLAMA, &path, edit);
        // A file that is only listed opens.
        assert!(Source::open(&path).is_ok());
        let message = load(&path, LoadOptions::default()).unwrap_err().to_string();
        let all = parts.iter().all(|part| message.contains(part));
        assert!(
            all && message.contains("model.gguf"),
            "{parts:?} in {message}"
        );
    }
}
