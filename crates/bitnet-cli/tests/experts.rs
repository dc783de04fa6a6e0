//! Mixtures of experts whose matrices fit the blocks of a GGUF: stacked and numbered, as floats and
//! as packed values, in folders and in GGUF files.

mod common;

use bitnet_inference::{
    ActivationType, CacheType, ForwardBuffers, ForwardStep, KvCache, LoadOptions, Model,
    WantedLogits,
};
use common::{Dir, normal};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

const HIDDEN: usize = 256;
const FFN: usize = 256;
const EXPERTS: usize = 4;
const LAYERS: usize = 2;
const VOCAB: usize = 61;

/// How a folder holds its experts.
#[derive(Clone, Copy, PartialEq)]
enum Experts {
    Numbered,
    Stacked,
}

/// A tensor of bf16.
type Tensor = (String, Vec<usize>, Vec<u8>);

fn bf16(name: String, shape: &[usize], weights: &[f32]) -> Tensor {
    let bits = |w: &f32| ((w.to_bits() >> 16) as u16).to_le_bytes();
    (
        name,
        shape.to_vec(),
        weights.iter().flat_map(bits).collect(),
    )
}

/// Matrix `which` of an expert.
fn expert(layer: usize, expert: usize, which: usize) -> Vec<f32> {
    let seed = (layer * EXPERTS + expert) * 3 + which;
    normal(100 + seed as u64, HIDDEN * FFN, 0.06)
}

fn layer(experts: Experts, layer: usize) -> Vec<Tensor> {
    let name = |of: &str| format!("model.layers.{layer}.{of}");
    let mut tensors: Vec<Tensor> = ["input_layernorm", "post_attention_layernorm"]
        .iter()
        .map(|norm| bf16(name(&format!("{norm}.weight")), &[HIDDEN], &[1.0; HIDDEN]))
        .collect();
    for norm in ["q_norm", "k_norm"] {
        tensors.push(bf16(
            name(&format!("self_attn.{norm}.weight")),
            &[64],
            &[1.0; 64],
        ));
    }
    for (i, (of, rows, cols)) in [
        ("self_attn.q_proj", HIDDEN, HIDDEN),
        ("self_attn.k_proj", 128, HIDDEN),
        ("self_attn.v_proj", 128, HIDDEN),
        ("self_attn.o_proj", HIDDEN, HIDDEN),
        ("mlp.gate", EXPERTS, HIDDEN),
    ]
    .into_iter()
    .enumerate()
    {
        let weights = normal((10 * layer + i) as u64, rows * cols, 0.06);
        tensors.push(bf16(name(&format!("{of}.weight")), &[rows, cols], &weights));
    }
    if experts == Experts::Numbered {
        for e in 0..EXPERTS {
            for (which, (of, rows, cols)) in [
                ("gate_proj", FFN, HIDDEN),
                ("up_proj", FFN, HIDDEN),
                ("down_proj", HIDDEN, FFN),
            ]
            .into_iter()
            .enumerate()
            {
                let name = name(&format!("mlp.experts.{e}.{of}.weight"));
                tensors.push(bf16(name, &[rows, cols], &expert(layer, e, which)));
            }
        }
        return tensors;
    }
    let gate_up: Vec<f32> = (0..EXPERTS)
        .flat_map(|e| [expert(layer, e, 0), expert(layer, e, 1)].concat())
        .collect();
    let down: Vec<f32> = (0..EXPERTS).flat_map(|e| expert(layer, e, 2)).collect();
    let shape = [EXPERTS, 2 * FFN, HIDDEN];
    tensors.push(bf16(name("mlp.experts.gate_up_proj"), &shape, &gate_up));
    let shape = [EXPERTS, HIDDEN, FFN];
    tensors.push(bf16(name("mlp.experts.down_proj"), &shape, &down));
    tensors
}

/// The folder `m` of a qwen3_moe.
fn model(experts: Experts) -> Dir {
    let mut tensors: Vec<Tensor> = (0..LAYERS).flat_map(|i| layer(experts, i)).collect();
    tensors.push(bf16("model.norm.weight".into(), &[HIDDEN], &[1.0; HIDDEN]));
    for (i, name) in ["model.embed_tokens.weight", "lm_head.weight"]
        .iter()
        .enumerate()
    {
        let weights = normal(900 + i as u64, VOCAB * HIDDEN, 0.1);
        tensors.push(bf16((*name).into(), &[VOCAB, HIDDEN], &weights));
    }
    let (mut header, mut data) = (Map::new(), vec![]);
    for (name, shape, bytes) in tensors {
        let range = [data.len(), data.len() + bytes.len()];
        header.insert(
            name,
            json!({"dtype": "BF16", "shape": shape, "data_offsets": range}),
        );
        data.extend(bytes);
    }
    let dir = Dir::new();
    let header = Value::Object(header).to_string();
    dir.write("m/model.safetensors", common::raw(&header, &data));
    dir.write_json(
        "m/config.json",
        &json!({
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": HIDDEN, "intermediate_size": 768, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": FFN,
            "norm_topk_prob": true, "torch_dtype": "bfloat16",
        }),
    );
    dir
}

const TOKENS: [u32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 58, 60];

fn load(path: &Path, activations: ActivationType) -> Model {
    let options = LoadOptions {
        threads: 1,
        activations,
        ..LoadOptions::default()
    };
    Model::load_with(path, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn logits(path: &Path, activations: ActivationType) -> Vec<f32> {
    let model = load(path, activations);
    let mut cache = KvCache::new(model.config(), TOKENS.len(), CacheType::F32);
    let step = ForwardStep {
        cache: &mut cache,
        tokens: &TOKENS,
        want: WantedLogits::All,
    };
    let mut buffers = ForwardBuffers::default();
    model.forward(&mut [step], &mut buffers).unwrap().to_vec()
}

/// The largest difference, relative to the largest logit.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0f32, |m, d| if d <= m { m } else { d }) / top
}

#[test]
fn stacked_and_numbered_experts_are_one_model() {
    let [numbered, stacked] = [Experts::Numbered, Experts::Stacked].map(model);
    let float = ActivationType::Float;
    let expected = logits(&numbered.at("m"), float);
    assert_eq!(logits(&stacked.at("m"), float), expected);
    for dir in [&numbered, &stacked] {
        dir.run(&["convert", "m", "--out", "m.gguf"]).is(0);
        dir.run(&["convert", "m.gguf", "--out", "back"]).is(0);
        assert_eq!(logits(&dir.at("m.gguf"), float), expected);
        assert_eq!(logits(&dir.at("back"), float), expected);
        let compared = numbered.run(&[
            "compare",
            "m",
            &dir.at("back").display().to_string(),
            "--json",
        ]);
        assert_eq!(compared.is(0).json()["all"]["exact"], true);
    }
    // Tensors of one name have the same bytes, whatever their order in the file.
    let compared = numbered.run(&[
        "compare",
        "m.gguf",
        &stacked.at("m.gguf").display().to_string(),
        "--json",
    ]);
    assert_eq!(compared.is(0).json()["all"]["exact"], true);
}

/// Each expert is cut out of the packed tensor, or all are unpacked together where the layout cannot
/// be cut: with the weights that `dequantize` writes, the logits are the same up to rounding.
#[test]
fn packed_experts_are_those_that_dequantize_writes() {
    for flags in [
        &["--granularity", "channel"][..],
        &["--granularity", "tensor"],
        &["--granularity", "group:64"],
        &["--layout", "base-3", "--granularity", "channel"],
        &["--layout", "entropy", "--granularity", "channel"],
        &["--layout", "entropy", "--granularity", "group:128"],
        &["--precision", "int4", "--granularity", "group:32"],
        &["--planes", "2", "--granularity", "channel"],
        &["--format", "gguf", "--layout", "q2_0"],
        &["--format", "gguf", "--layout", "tq2_0"],
        &["--format", "gguf", "--precision", "int4"],
    ] {
        for experts in [Experts::Stacked, Experts::Numbered] {
            let dir = model(experts);
            let out = if flags.contains(&"gguf") {
                "q.gguf"
            } else {
                "q"
            };
            dir.run(&[&["quantize", "m", "--out", out], flags].concat())
                .is(0);
            dir.run(&["dequantize", out, "--out", "d"]).is(0);
            let expected = logits(&dir.at("d"), ActivationType::Float);
            let got = logits(&dir.at(out), ActivationType::Float);
            let error = difference(&got, &expected);
            assert!(error < 2e-5, "{flags:?}: {error:e}");
            assert!(
                got.iter().all(|x| x.is_finite())
                    && got != logits(&dir.at("m"), ActivationType::Float)
            );
        }
    }
}

/// Ternary experts with int8 activations: joined in a GGUF, split in a folder, the same bits.
#[test]
fn ternary_experts_keep_their_values_in_each_form() {
    let int8 = ActivationType::Int8;
    for granularity in ["channel", "tensor"] {
        let dir = model(Experts::Numbered);
        dir.run(&[
            "quantize",
            "m",
            "--out",
            "q",
            "--granularity",
            granularity,
            "--scale-dtype",
            "f16",
        ])
        .is(0);
        let expected = logits(&dir.at("q"), int8);
        assert_eq!(logits(&dir.at("q"), int8), expected);
        dir.run(&["convert", "q", "--out", "q.gguf", "--layout", "tq2_0"])
            .is(0);
        assert_eq!(logits(&dir.at("q.gguf"), int8), expected, "{granularity}");
        dir.run(&["convert", "q.gguf", "--out", "back"]).is(0);
        assert_eq!(logits(&dir.at("back"), int8), expected, "{granularity}");
        let compared = dir.run(&["compare", "q", "back", "--json"]).is(0).json();
        assert_eq!(compared["all"]["exact"], true, "{granularity}");
    }
}

/// A packed model takes hardly more memory than its file.
#[test]
fn ternary_experts_are_not_unpacked() {
    let dir = model(Experts::Stacked);
    dir.run(&["quantize", "m", "--out", "q", "--granularity", "channel"])
        .is(0);
    let file = fs::metadata(dir.at("q/model.safetensors")).unwrap().len() as f64;
    for activations in [ActivationType::Int8, ActivationType::Float] {
        let model = load(&dir.at("q"), activations);
        let bytes = model.bytes() as f64;
        assert!(bytes < 1.1 * file, "{activations}: {bytes} of {file}");
        // Two of four experts, and no embedding.
        let [all, read] = [model.bytes(), model.bytes_per_token()];
        assert!(read < all * 7 / 10, "{read} of {all}");
    }
}

#[test]
fn experts_that_cannot_be_one_tensor_are_refused() {
    let dir = model(Experts::Numbered);
    let rule = "model.layers.1.mlp.experts.2.up_proj.weight=f16";
    dir.refuses(
        &["quantize", "m", "--out", "q.gguf", "--rule", rule],
        &["experts.0.up_proj", "experts.2.up_proj", "the same rule"],
    );
    let file = dir.read("m/model.safetensors");
    let text = |from: &str, to: &str| {
        let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(file[8..8 + len].to_vec()).unwrap();
        common::raw(&header.replace(from, to), &file[8 + len..])
    };
    let down = "layers.1.mlp.experts.2.down_proj";
    dir.write(
        "m/model.safetensors",
        text(down, "layers.1.mlp.experts.4.down_proj"),
    );
    let missing = ["layers.1.mlp.experts.", "down_proj", "an expert 2"];
    dir.refuses(&["convert", "m", "--out", "m.gguf"], &missing);
    dir.refuses(
        &["run", "m", "-p", "x"],
        &["layers.1.mlp.experts.2.down_proj.weight"],
    );
}
