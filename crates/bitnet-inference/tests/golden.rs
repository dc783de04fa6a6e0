//! Logits of tiny random models against logits of transformers in f32.
//! scripts/make-inference-golden.py generates both.

mod refusals;

use bitnet_inference::{
    CacheType, Config, FloatType, ForwardBuffers, ForwardStep, KvCache, LoadOptions, Model,
    WantedLogits,
};
use bitnet_kernels::Kernels;
use safetensors::{Dtype, SafeTensors};
use std::fs;
use std::path::{Path, PathBuf};

const PROMPT: usize = 23;
const STEPS: usize = 16;
/// Bound on the difference of a logit relative to the largest logit. Floats: sums of at most 76
/// products in f32, over two layers. With quantized inputs a last bit could move an activation
/// across a tie to the next code, 1/127 of the largest of its token; these models have no such tie.
const BOUND: f32 = 2e-5;

const MODELS: [&str; 25] = [
    "llama-f32",
    "llama-f16-rope",
    "llama-bf16-head",
    "llama-bitlinear",
    "llama-autobitlinear",
    "llama-online",
    "bitnet-bitlinear",
    "bitnet-autobitlinear",
    "bitnet-online",
    "bitnet-float",
    "qwen2-bias",
    "qwen2-window",
    "qwen3-yarn",
    "qwen3-bias",
    "mistral-window",
    "smollm3-nope",
    "phi3-longrope",
    "phi3-partial",
    "minicpm",
    "gemma3",
    "qwen35",
    "qwen35-mixed",
    "qwen3-moe",
    "qwen3-moe-stacked",
    "qwen2-moe",
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

struct Golden {
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

fn golden(name: &str) -> Golden {
    let bytes = fs::read(folder(name).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (
        file.tensor("tokens").unwrap(),
        file.tensor("logits").unwrap(),
    );
    assert_eq!((tokens.dtype(), logits.dtype()), (Dtype::I32, Dtype::F32));
    let tokens: Vec<u32> = tokens
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    let logits: Vec<f32> = logits
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    assert_eq!(tokens.len(), PROMPT + STEPS);
    Golden { tokens, logits }
}

fn load(path: &Path, threads: usize, kernels: Kernels) -> Model {
    Model::load_with(
        path,
        &LoadOptions {
            threads,
            kernels,
            ..Default::default()
        },
    )
    .unwrap()
}

/// The prompt in one pass, then one token at a time.
fn as_generated(model: &Model, tokens: &[u32], cache: CacheType) -> Vec<f32> {
    let (mut cache, mut scratch) = (
        KvCache::new(model.config(), 64, cache),
        ForwardBuffers::default(),
    );
    let step = ForwardStep {
        cache: &mut cache,
        tokens: &tokens[..PROMPT],
        want: WantedLogits::All,
    };
    let mut logits = model.forward(&mut [step], &mut scratch).unwrap().to_vec();
    for token in tokens[PROMPT..].chunks(1) {
        logits.extend(
            model
                .forward(
                    &mut [ForwardStep {
                        cache: &mut cache,
                        tokens: token,
                        want: WantedLogits::Last,
                    }],
                    &mut scratch,
                )
                .unwrap(),
        );
    }
    assert_eq!(cache.len(), tokens.len());
    logits
}

fn relative(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let top = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let worst =
        got.iter().zip(expected).fold(
            0.0f32,
            |m, (a, b)| if (a - b).abs() <= m { m } else { (a - b).abs() },
        );
    worst / top
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn logits_are_those_of_transformers() {
    let mut failed = vec![];
    for name in MODELS {
        let (model, golden) = (load(&folder(name), 1, Kernels::detect()), golden(name));
        let error = relative(
            &as_generated(&model, &golden.tokens, CacheType::F32),
            &golden.logits,
        );
        println!("{name}: {error:.1e}");
        if error.is_nan() || error > BOUND {
            failed.push(format!("{name}: {error:.2e}"));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn caches_of_fewer_bits_lose_what_they_must() {
    for name in MODELS {
        let (model, golden) = (load(&folder(name), 1, Kernels::detect()), golden(name));
        let [half, int8] = [CacheType::F16, CacheType::Int8]
            .map(|c| relative(&as_generated(&model, &golden.tokens, c), &golden.logits));
        // With quantized inputs a changed key may move an activation to the next code, and so
        // activations of the next layer.
        assert!(
            half > 0.0 && half < 0.05 && int8 < 0.3,
            "{name}: {half} {int8}"
        );
        if name == "llama-f32" {
            assert!(half < 2e-3 && int8 < 0.05 && half < int8, "{half} {int8}");
        }
    }
}

#[test]
fn threads_instruction_sets_and_batches_change_no_bit() {
    // One of each graph, and each kind of weights.
    for name in [
        "llama-f32",
        "llama-bitlinear",
        "bitnet-autobitlinear",
        "qwen2-window",
        "qwen3-yarn",
        "mistral-window",
        "smollm3-nope",
        "phi3-longrope",
        "minicpm",
        "gemma3",
        "qwen35",
        "qwen35-mixed",
        "qwen3-moe",
        "qwen3-moe-stacked",
        "qwen2-moe",
    ] {
        let golden = golden(name);
        let mut first: Option<Vec<u32>> = None;
        for kernels in Kernels::all() {
            for threads in [1, 2, 3] {
                let model = load(&folder(name), threads, kernels);
                assert_eq!(model.threads(), threads);
                let logits = bits(&as_generated(&model, &golden.tokens, CacheType::F16));
                assert_eq!(
                    *first.get_or_insert_with(|| logits.clone()),
                    logits,
                    "{name}, {}, {threads} threads",
                    kernels.isa()
                );
            }
        }
        let model = load(&folder(name), 2, Kernels::detect());
        let vocab = model.config().vocab;
        let expected = first.unwrap();
        let mut scratch = ForwardBuffers::default();
        // All tokens in one pass, in odd pieces, and one by one.
        for piece in [golden.tokens.len(), 7, 1] {
            let mut cache = KvCache::new(model.config(), 40, CacheType::F16);
            let mut logits = vec![];
            for tokens in golden.tokens.chunks(piece) {
                logits.extend(bits(
                    model
                        .forward(
                            &mut [ForwardStep {
                                cache: &mut cache,
                                tokens,
                                want: WantedLogits::All,
                            }],
                            &mut scratch,
                        )
                        .unwrap(),
                ));
            }
            assert_eq!(logits, expected, "{name}, pieces of {piece}");
        }
        // Three sequences together, with different lengths and requested logits.
        let mut caches = [0; 3].map(|_| KvCache::new(model.config(), 64, CacheType::F16));
        let [a, b, c] = &mut caches;
        let other: Vec<u32> = golden.tokens.iter().rev().copied().collect();
        let mut steps = [
            ForwardStep {
                cache: a,
                tokens: &golden.tokens[..30],
                want: WantedLogits::Last,
            },
            ForwardStep {
                cache: b,
                tokens: &other,
                want: WantedLogits::Nothing,
            },
            ForwardStep {
                cache: c,
                tokens: &golden.tokens[..12],
                want: WantedLogits::All,
            },
        ];
        let logits = bits(model.forward(&mut steps, &mut scratch).unwrap());
        assert_eq!(logits.len(), 13 * vocab);
        assert_eq!(
            logits[..vocab],
            expected[29 * vocab..30 * vocab],
            "{name}: the last of the first"
        );
        assert_eq!(
            logits[vocab..],
            expected[..12 * vocab],
            "{name}: all of the third"
        );
        let [a, _, c] = &mut caches;
        let mut steps = [
            ForwardStep {
                cache: c,
                tokens: &golden.tokens[12..14],
                want: WantedLogits::Last,
            },
            ForwardStep {
                cache: a,
                tokens: &golden.tokens[30..31],
                want: WantedLogits::Last,
            },
        ];
        let logits = bits(model.forward(&mut steps, &mut scratch).unwrap());
        assert_eq!(logits[..vocab], expected[13 * vocab..14 * vocab]);
        assert_eq!(logits[vocab..], expected[30 * vocab..31 * vocab]);
    }
}

/// Ternary experts, router and shared expert with int8 inputs: the same bits everywhere.
#[test]
fn ternary_experts_have_the_same_bits_everywhere() {
    let path = folder("qwen2-moe").join("config.json");
    let config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let config = Config::from_hf(&path, &config).unwrap();
    let tokens = golden("qwen2-moe").tokens;
    let mut first: Option<Vec<u32>> = None;
    for kernels in Kernels::all() {
        for threads in [1, 3] {
            let options = LoadOptions {
                threads,
                kernels,
                ..LoadOptions::default()
            };
            let model = Model::synthetic(config.clone(), &options).unwrap();
            assert!(model.integer_products(1, 1) > 0);
            for piece in [tokens.len(), 5, 1] {
                let mut cache = KvCache::new(model.config(), 40, CacheType::F32);
                let (mut buffers, mut logits) = (ForwardBuffers::default(), vec![]);
                for tokens in tokens.chunks(piece) {
                    let step = ForwardStep {
                        cache: &mut cache,
                        tokens,
                        want: WantedLogits::All,
                    };
                    logits.extend(bits(model.forward(&mut [step], &mut buffers).unwrap()));
                }
                let first = first.get_or_insert_with(|| logits.clone());
                assert_eq!(*first, logits, "{}, {threads}, {piece}", kernels.isa());
            }
        }
    }
}

/// A copy of a model folder that a test may change.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(folder(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

/// The error of a folder that must not load.
#[track_caller]
fn refused(dir: &Path, parts: &[&str]) {
    let message = Model::load(dir).unwrap_err().to_string();
    assert!(
        parts.iter().all(|p| message.contains(p)) && !message.contains('\n'),
        "{parts:?} in {message}"
    );
}

/// The bytes of a tensor, changed in place.
fn edit_tensor(dir: &Path, tensor: &str, edit: impl Fn(&mut [u8])) {
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (len, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let (start, end) = header.tensors()[tensor].data_offsets;
    edit(&mut bytes[8 + len + start..8 + len + end]);
    fs::write(path, bytes).unwrap();
}

/// The largest difference of a changed folder to the golden of the unchanged one.
fn error_of(dir: &Path, name: &str) -> f32 {
    let (golden, model) = (golden(name), load(dir, 1, Kernels::detect()));
    let logits = as_generated(&model, &golden.tokens, CacheType::F32);
    relative(&logits, &golden.logits)
}

/// Errors that the goldens must detect, each far beyond the bound.
#[test]
fn mistakes_change_the_logits() {
    let error = error_of;
    // SiLU for ReLU².
    let dir = copy("bitnet-autobitlinear");
    edit_config(dir.path(), |c| c["hidden_act"] = "silu".into());
    let got = error(dir.path(), "bitnet-autobitlinear");
    assert!(got > 100.0 * BOUND, "activation: {got}");
    // The inverted scale, in weights whose size does not reveal it.
    for (name, class) in [
        ("llama-bitlinear", "autobitlinear"),
        ("llama-autobitlinear", "bitlinear"),
    ] {
        let dir = copy(name);
        edit_config(dir.path(), |c| {
            c["quantization_config"]["linear_class"] = class.into()
        });
        let got = error(dir.path(), name);
        assert!(got > 100.0 * BOUND, "scale: {got}");
    }
    // Codes in the other order within each byte, and rows packed side by side.
    let swapped = |b: u8| b << 6 | (b & 0x0c) << 2 | (b & 0x30) >> 2 | b >> 6;
    let dir = copy("bitnet-bitlinear");
    edit_tensor(dir.path(), "model.layers.1.mlp.up_proj.weight", |bytes| {
        bytes.iter_mut().for_each(|b| *b = swapped(*b))
    });
    let got = error(dir.path(), "bitnet-bitlinear");
    assert!(got > 100.0 * BOUND, "bits: {got}");
    // Another base of the rotation, another epsilon.
    for (key, value) in [("rope", 1e6), ("rms_norm_eps", 1e-2)] {
        let dir = copy("llama-f32");
        edit_config(dir.path(), |c| match key {
            "rope" => c["rope_parameters"]["rope_theta"] = value.into(),
            _ => c[key] = value.into(),
        });
        let got = error(dir.path(), "llama-f32");
        assert!(got > 100.0 * BOUND, "{key}: {got}");
    }
}

/// Each fact of a graph, told otherwise than it is: the goldens must see it.
#[test]
fn each_fact_of_a_graph_counts() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit); 29] = [
        ("qwen2-window", |c| c["sliding_window"] = 8.into()),
        ("qwen2-window", |c| {
            c["layer_types"][0] = "sliding_attention".into()
        }),
        ("qwen3-yarn", |c| {
            c["rope_parameters"]["rope_type"] = "default".into()
        }),
        ("qwen3-yarn", |c| {
            c["rope_parameters"]["attention_factor"] = 1.into()
        }),
        ("qwen3-yarn", |c| {
            c["rope_parameters"]["beta_slow"] = 2.into()
        }),
        ("mistral-window", |c| c["sliding_window"] = 4.into()),
        ("mistral-window", |c| c["sliding_window"] = 6.into()),
        ("smollm3-nope", |c| c["no_rope_layers"][0] = 0.into()),
        ("smollm3-nope", |c| {
            c["rope_parameters"]["factor"] = 2.into()
        }),
        ("phi3-longrope", |c| {
            c["rope_parameters"]["short_factor"][1] = 1.into()
        }),
        ("phi3-longrope", |c| c["sliding_window"] = 10.into()),
        ("phi3-longrope", |c| {
            c["rope_parameters"]["attention_factor"] = 1.into()
        }),
        ("phi3-partial", |c| {
            c["rope_parameters"]["partial_rotary_factor"] = 1.into()
        }),
        ("minicpm", |c| c["scale_emb"] = 11.into()),
        ("minicpm", |c| c["scale_depth"] = 1.into()),
        ("minicpm", |c| c["dim_model_base"] = 15.into()),
        ("gemma3", |c| c["sliding_window"] = 7.into()),
        ("gemma3", |c| {
            c["layer_types"][1] = "sliding_attention".into()
        }),
        ("gemma3", |c| c["query_pre_attn_scalar"] = 10.into()),
        ("gemma3", |c| {
            c["final_logit_softcapping"] = serde_json::Value::Null
        }),
        ("gemma3", |c| {
            c["rope_parameters"]["sliding_attention"]["rope_theta"] = 10000.into()
        }),
        ("qwen35", |c| {
            c["rope_parameters"]["partial_rotary_factor"] = 0.5.into()
        }),
        ("qwen35", |c| c["rms_norm_eps"] = 1e-2.into()),
        ("qwen35-mixed", |c| {
            c["rope_parameters"]["rope_theta"] = 10000.into()
        }),
        // Weights of experts that are softmaxed after they were chosen are normalized ones.
        ("qwen3-moe", |c| c["norm_topk_prob"] = false.into()),
        ("qwen3-moe", |c| c["num_experts_per_tok"] = 3.into()),
        ("qwen3-moe-stacked", |c| c["norm_topk_prob"] = true.into()),
        ("qwen3-moe-stacked", |c| c["num_experts_per_tok"] = 2.into()),
        ("qwen2-moe", |c| c["norm_topk_prob"] = true.into()),
    ];
    for (i, (name, edit)) in cases.into_iter().enumerate() {
        let dir = copy(name);
        edit_config(dir.path(), edit);
        let got = error_of(dir.path(), name);
        assert!(got > 20.0 * BOUND, "{name}, case {i}: {got}");
    }
    // Gains and biases, a number of each: bf16 0 for what it was.
    for (name, tensor) in [
        ("qwen2-bias", "self_attn.q_proj.bias"),
        ("qwen2-bias", "self_attn.v_proj.bias"),
        ("qwen3-bias", "self_attn.o_proj.bias"),
        ("qwen3-bias", "self_attn.q_norm.weight"),
        ("qwen3-yarn", "self_attn.k_norm.weight"),
        ("gemma3", "self_attn.q_norm.weight"),
        ("gemma3", "post_attention_layernorm.weight"),
        ("gemma3", "pre_feedforward_layernorm.weight"),
        ("gemma3", "post_feedforward_layernorm.weight"),
        ("qwen35", "linear_attn.conv1d.weight"),
        ("qwen35", "linear_attn.A_log"),
        ("qwen35-mixed", "linear_attn.dt_bias"),
        ("qwen35-mixed", "linear_attn.norm.weight"),
        ("qwen35-mixed", "linear_attn.in_proj_b.weight"),
        ("qwen3-moe", "mlp.gate.weight"),
        ("qwen2-moe", "mlp.gate.weight"),
        ("qwen2-moe", "mlp.shared_expert_gate.weight"),
        ("qwen2-moe", "mlp.shared_expert.up_proj.weight"),
    ] {
        let dir = copy(name);
        let tensor = format!("model.layers.1.{tensor}");
        edit_tensor(dir.path(), &tensor, |bytes| bytes[..8].fill(0));
        let got = error_of(dir.path(), name);
        assert!(got > 20.0 * BOUND, "{name}, {tensor}: {got}");
    }
}

/// Gate and up, experts, and matrices of one expert, in another place: the goldens must see it.
#[test]
fn each_expert_has_its_place() {
    let name = "qwen3-moe-stacked";
    let module = "model.layers.2.mlp.experts";
    // Bytes of a matrix of 20 × 48.
    let matrix = 2 * 20 * 48;
    for (tensor, a, b) in [
        ("gate_up_proj", 0, matrix),
        ("gate_up_proj", 3 * matrix, 5 * matrix),
        ("down_proj", matrix, 4 * matrix),
    ] {
        let dir = copy(name);
        edit_tensor(dir.path(), &format!("{module}.{tensor}"), |bytes| {
            let (first, second) = bytes.split_at_mut(b);
            first[a..][..matrix].swap_with_slice(&mut second[..matrix]);
        });
        let got = error_of(dir.path(), name);
        assert!(got > 20.0 * BOUND, "{tensor}, {a}, {b}: {got}");
    }
}

#[test]
fn experts_that_do_not_fit_are_refused() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit, &[&str]); 7] = [
        (
            "qwen3-moe",
            |c| {
                c["quantization_config"] = serde_json::json!({"quant_method": "bitnet",
                    "linear_class": "autobitlinear", "quantization_mode": "online"})
            },
            &["quantization_mode", "experts"],
        ),
        (
            "qwen3-moe",
            |c| c["num_local_experts"] = 7.into(),
            &["layers.0.mlp.gate.weight", "[7, 48]", "[6, 48]"],
        ),
        (
            "qwen3-moe-stacked",
            |c| c["moe_intermediate_size"] = 10.into(),
            &["experts.gate_up_proj", "[6, 20, 48]", "[6, 40, 48]"],
        ),
        (
            "qwen3-moe-stacked",
            |c| c["mlp_only_layers"] = serde_json::json!([]),
            &["layers.1.mlp.gate.weight", "no such tensor"],
        ),
        (
            "qwen3-moe",
            |c| c["mlp_only_layers"] = serde_json::json!([0]),
            &["layers.0.mlp.gate_proj.weight", "no such tensor"],
        ),
        (
            "qwen3-moe",
            |c| c["num_experts"] = 5.into(),
            &["num_local_experts", "5, as num_experts says", "6"],
        ),
        (
            "qwen2-moe",
            |c| c["model_type"] = "qwen3_moe".into(),
            &["_norm", "no such tensor"],
        ),
    ];
    for (name, edit, parts) in cases {
        let dir = copy(name);
        edit_config(dir.path(), edit);
        refused(dir.path(), parts);
    }
    let dir = copy("qwen3-moe-stacked");
    let tensor = "model.layers.2.mlp.experts.down_proj";
    edit_tensor(dir.path(), tensor, |bytes| {
        bytes[4000..4002].copy_from_slice(&0x7fc0u16.to_le_bytes())
    });
    refused(dir.path(), &[tensor, "finite", "NaN at index 2000"]);
}

/// A token without finite activations has experts like any other.
#[test]
fn logits_of_experts_that_are_no_numbers_do_not_panic() {
    let dir = copy("qwen3-moe");
    // The largest finite bf16, so that sums of products are infinite or NaN.
    edit_tensor(dir.path(), "model.layers.0.mlp.gate.weight", |bytes| {
        bytes
            .chunks_exact_mut(2)
            .enumerate()
            .for_each(|(i, w)| w.copy_from_slice(&[0x7f, 0x7f | ((i % 2) as u8) << 7]))
    });
    let (golden, model) = (golden("qwen3-moe"), load(dir.path(), 1, Kernels::detect()));
    let logits = as_generated(&model, &golden.tokens, CacheType::F32);
    assert_eq!(logits.len(), golden.logits.len());
}

#[test]
fn rounding_by_choice_says_what_it_did() {
    // For normal weights: 6.02 dB per bit and the effect of blocks. The bounds hold for any model.
    for (embedding, least, most) in [
        (FloatType::Int4, 15.0, 27.0),
        (FloatType::Int8, 40.0, 50.0),
        (FloatType::Bf16, 52.0, 60.0),
    ] {
        let options = LoadOptions {
            threads: 2,
            embedding,
            ..LoadOptions::default()
        };
        let model = Model::load_with(folder("llama-f32"), &options).unwrap();
        let notes: Vec<_> = model
            .notes()
            .iter()
            .filter_map(|n| n.split_once(&format!("rounded to {embedding}: ")))
            .collect();
        let [(what, decibels)] = notes[..] else {
            panic!("{:?}", model.notes())
        };
        assert!(what.starts_with("embedding"));
        let got: f64 = decibels.split(' ').next().unwrap().parse().unwrap();
        assert!(least < got && got < most, "{embedding}: {got} dB");
    }
    let exact = Model::load(folder("llama-f32")).unwrap();
    assert!(
        exact.notes().iter().all(|n| !n.contains("rounded")),
        "{:?}",
        exact.notes()
    );
}
