//! Vectors of tiny random embedding models against those of transformers in f32.
//! scripts/make-embed-golden.py generates both.

use bitnet_inference::{EmbedOptions, Embedder, LoadOptions, Model, Normalization, Pooling};
use bitnet_kernels::Kernels;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Model, and what its files say: pooling, and whether vectors have the length 1.
const MODELS: [(&str, Pooling, bool); 4] = [
    ("embed-bert", Pooling::Mean, true),
    ("embed-bert-inside", Pooling::Mean, true),
    ("embed-qwen3", Pooling::Last, true),
    ("embed-gemma3", Pooling::Mean, false),
];
/// Bound on the difference of an element relative to the largest one, as for logits.
const BOUND: f32 = 2e-5;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn texts(name: &str) -> Vec<String> {
    let golden = fs::read_to_string(folder(name).join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let texts = golden["texts"].as_array().unwrap().iter();
    texts.map(|text| text.as_str().unwrap().into()).collect()
}

/// A tensor of 32-bit elements of the golden file.
fn tensor(name: &str, tensor: &str) -> Vec<[u8; 4]> {
    let bytes = fs::read(folder(name).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensor(tensor).unwrap().data().as_chunks().0.to_vec()
}

fn expected(name: &str, pooling: Pooling, text: usize) -> Vec<f32> {
    let values = tensor(name, &format!("{pooling}.{text}"));
    values.into_iter().map(f32::from_le_bytes).collect()
}

fn options(pooling: Option<Pooling>, normalization: Normalization) -> EmbedOptions {
    EmbedOptions {
        load: LoadOptions {
            threads: 1,
            ..LoadOptions::default()
        },
        pooling,
        normalization,
        prompt: None,
    }
}

fn load(path: &Path) -> Embedder {
    Embedder::load_with(path, &options(None, Normalization::Model)).unwrap()
}

/// The largest difference relative to the largest element.
fn relative(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let top = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let differences = got.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0f32, |m, d| if d <= m { m } else { d }) / top
}

fn unit(x: &[f32]) -> Vec<f32> {
    let length = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    x.iter().map(|x| (f64::from(*x) / length) as f32).collect()
}

/// A copy of a golden folder.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    for file in ["", "1_Pooling"] {
        let Ok(list) = fs::read_dir(folder(name).join(file)) else {
            continue;
        };
        for entry in list.map(Result::unwrap).filter(|e| e.path().is_file()) {
            let to = dir.path().join(file).join(entry.file_name());
            fs::copy(entry.path(), to).unwrap();
        }
    }
    dir
}

/// Sets an entry of a JSON file of a folder.
fn edit(folder: &Path, file: &str, pointer: &str, key: &str, value: Value) {
    let path = folder.join(file);
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    json.pointer_mut(pointer).unwrap()[key] = value;
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn vectors_are_those_of_transformers() {
    let mut failed = vec![];
    for (name, _, _) in MODELS {
        let texts = texts(name);
        for pooling in Pooling::ALL {
            let options = options(Some(*pooling), Normalization::Never);
            let embedder = Embedder::load_with(folder(name), &options).unwrap();
            for (i, vector) in embedder.embed(&texts).unwrap().iter().enumerate() {
                let error = relative(vector, &expected(name, *pooling, i));
                if error.is_nan() || error > BOUND {
                    failed.push(format!("{name}, {pooling}, text {i}: {error:e}"));
                }
            }
        }
        let embedder = load(&folder(name));
        for (i, text) in texts.iter().enumerate() {
            let tokens = tensor(name, &format!("tokens.{i}"));
            let tokens: Vec<u32> = tokens.into_iter().map(u32::from_le_bytes).collect();
            let got = embedder.encode(text).unwrap();
            assert_eq!(got.tokens, tokens, "{name}: {text}");
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn the_files_say_pooling_and_length() {
    for (name, pooling, normalized) in MODELS {
        let embedder = load(&folder(name));
        assert_eq!(
            (embedder.pooling(), embedder.normalizes()),
            (pooling, normalized)
        );
        let said = embedder
            .notes()
            .iter()
            .any(|n| n.contains("no file names the pooling"));
        assert_eq!(said, name == "embed-bert-inside", "{:?}", embedder.notes());
        let vectors = embedder.embed(&texts(name)).unwrap();
        for (i, vector) in vectors.iter().enumerate() {
            let plain = expected(name, pooling, i);
            let expected = if normalized { unit(&plain) } else { plain };
            assert!(relative(vector, &expected) <= BOUND, "{name}, text {i}");
        }
    }
}

/// The texts of a batch, their order, threads and instruction set change no bit.
#[test]
fn a_vector_depends_on_its_text_alone() {
    let bits = |vectors: Vec<Vec<f32>>| -> Vec<Vec<u32>> {
        let bits = |v: &Vec<f32>| v.iter().map(|x| x.to_bits()).collect();
        vectors.iter().map(bits).collect()
    };
    for (name, _, _) in MODELS {
        let texts = texts(name);
        let embedder = load(&folder(name));
        let together = bits(embedder.embed(&texts).unwrap());
        for (text, expected) in texts.iter().zip(&together) {
            assert_eq!(
                bits(embedder.embed(&[text]).unwrap())[0],
                *expected,
                "{name}: {text}"
            );
        }
        for kernels in Kernels::all() {
            for threads in [1, 3] {
                let mut options = options(None, Normalization::Model);
                (options.load.kernels, options.load.threads) = (kernels, threads);
                let embedder = Embedder::load_with(folder(name), &options).unwrap();
                let reversed: Vec<&String> = texts.iter().rev().collect();
                let mut got = bits(embedder.embed(&reversed).unwrap());
                got.reverse();
                assert_eq!(got, together, "{name}, {}, {threads}", kernels.isa());
            }
        }
        assert!(embedder.embed::<&str>(&[]).unwrap().is_empty());
    }
}

/// A decoder computes a long text in several passes, and batches hold several texts of it.
#[test]
fn long_texts_are_cut_between_their_special_tokens() {
    let text = "a cat ".repeat(300);
    let bert = load(&folder("embed-bert"));
    let encoded = bert.encode(&text).unwrap();
    assert_eq!(
        (bert.max_tokens(), encoded.tokens.len(), encoded.full),
        (20, 20, 602)
    );
    assert_eq!((encoded.tokens[0], encoded.tokens[19]), (2, 3));
    let inside = load(&folder("embed-bert-inside"));
    assert_eq!(inside.encode(&text).unwrap().tokens.len(), 24);

    let qwen = load(&folder("embed-qwen3"));
    let encoded = qwen.encode(&text).unwrap();
    assert_eq!((encoded.tokens.len(), encoded.tokens[95]), (96, 1));
    let long = copy("embed-qwen3");
    edit(
        long.path(),
        "config.json",
        "",
        "max_position_embeddings",
        json!(4096),
    );
    let long = load(long.path());
    let short = long.embed(&["a cat"]).unwrap();
    let vectors = long.embed(&[&text[..], "a cat", &text, "the"]).unwrap();
    assert_eq!(vectors[0], vectors[2]);
    assert_eq!(vectors[1], short[0]);
    assert!((0..vectors[0].len()).any(|i| vectors[0][i] != vectors[1][i]));
}

#[test]
fn prompts_stand_before_the_text() {
    let with = |prompt: Option<&str>| {
        let options = EmbedOptions {
            prompt: prompt.map(Into::into),
            ..options(None, Normalization::Model)
        };
        Embedder::load_with(folder("embed-qwen3"), &options)
    };
    let embed = |prompt, text| with(prompt).unwrap().embed(&[text]).unwrap();
    let plain = embed(None, "the cat: a sofa");
    assert_eq!(embed(Some("query"), "a sofa"), plain);
    assert_eq!(embed(Some("document"), "a sofa"), embed(None, "a sofa"));
    let message = with(Some("qeury")).unwrap_err().to_string();
    for part in [
        "config_sentence_transformers.json",
        "query",
        "document",
        "'qeury'",
    ] {
        assert!(message.contains(part), "{message}");
    }
    let dir = copy("embed-qwen3");
    let file = "config_sentence_transformers.json";
    edit(dir.path(), file, "", "default_prompt_name", json!("query"));
    assert_eq!(load(dir.path()).embed(&["a sofa"]).unwrap(), plain);
}

/// The goldens notice each fact.
#[test]
fn another_fact_gives_other_vectors() {
    for (name, key, value) in [
        ("embed-bert", "layer_norm_eps", json!(1e-12)),
        ("embed-bert", "num_attention_heads", json!(2)),
        ("embed-qwen3", "rms_norm_eps", json!(0.1)),
        ("embed-gemma3", "sliding_window", json!(3)),
    ] {
        let dir = copy(name);
        edit(dir.path(), "config.json", "", key, value);
        let changed = load(dir.path()).embed(&texts(name)).unwrap();
        let told = load(&folder(name)).embed(&texts(name)).unwrap();
        let error = relative(&changed[0], &told[0]);
        assert!(error > 10.0 * BOUND, "{name}, {key}: {error:e}");
    }
}

#[test]
fn bad_models_and_texts_are_refused() {
    let refusal = |dir: &TempDir| {
        let error = Embedder::load(dir.path()).unwrap_err();
        error.to_string()
    };
    for (file, pointer, key, value, part) in [
        (
            "config.json",
            "",
            "hidden_act",
            json!("gelu_new"),
            "hidden_act: expected 'gelu'",
        ),
        (
            "config.json",
            "",
            "hidden_size",
            json!(40),
            "shape [55, 40]",
        ),
        (
            "config.json",
            "",
            "type_vocab_size",
            json!(2),
            "token_type_embeddings",
        ),
        (
            "modules.json",
            "/1",
            "type",
            json!("models.WordWeights"),
            "[1].type",
        ),
        ("modules.json", "/2", "type", json!("models.Dense"), "Dense"),
        (
            "1_Pooling/config.json",
            "",
            "word_embedding_dimension",
            json!(384),
            "44",
        ),
    ] {
        let dir = copy("embed-bert");
        edit(dir.path(), file, pointer, key, value);
        let message = refusal(&dir);
        assert!(
            message.contains(part) && message.contains(file.split('/').next_back().unwrap())
                || message.contains(".safetensors"),
            "{message}"
        );
    }
    let dir = copy("embed-bert");
    fs::write(
        dir.path().join("modules.json"),
        r#"[{"path": "", "type": "Transformer"}]"#,
    )
    .unwrap();
    assert!(refusal(&dir).contains("--pooling"));
    let options = options(Some(Pooling::Cls), Normalization::Model);
    let embedder = Embedder::load_with(dir.path(), &options).unwrap();
    assert_eq!(embedder.pooling(), Pooling::Cls);
    for text in ["", " \n\t"] {
        let message = embedder.embed(&["a cat", text]).unwrap_err().to_string();
        assert!(message.contains("empty text"), "{message}");
    }
    let message = embedder
        .embed_tokens(&[&[2, 99, 3]])
        .unwrap_err()
        .to_string();
    assert!(message.contains("token 99"), "{message}");
    let error = embedder.embed_tokens(&[&[7; 25]]).unwrap_err().to_string();
    assert!(error.contains("25 tokens"), "{error}");
    assert!(embedder.embed_tokens(&[&[]]).is_err());
    let dir = copy("embed-bert");
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(refusal(&dir).contains("tokenizer"));
    let message = Model::load(folder("embed-bert")).unwrap_err().to_string();
    assert!(message.contains("bitnet embed"), "{message}");
}
