//! Models against the inference engine and difference quotients, and their rejection of bad input.

use bitnet_inference::{CacheType, ForwardBuffers, ForwardStep, Model, WantedLogits};
use bitnet_quant::Source;
use bitnet_quant::qat::Linears;
use bitnet_train::folder;
use bitnet_train::models::{
    Cnn, CnnConfig, DecoderModel, DecoderShape, ImageModel, ImageShape, Mlp, MlpConfig,
};
use bitnet_train::ops::cross_entropy;
use bitnet_train::variables::{stream, variables};
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use std::path::Path;

const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/glassllm-en");

fn names(model: &mut dyn Linears) -> Vec<String> {
    let mut names = vec![];
    model
        .visit_linears(&mut |name, _| {
            names.push(name.to_string());
            Ok(())
        })
        .unwrap();
    names
}

/// Logits after each token, by the inference engine.
fn inferred(folder: &Path, tokens: &[u32]) -> Vec<f32> {
    let model = Model::load(folder).unwrap();
    let mut cache = bitnet_inference::KvCache::new(model.config(), tokens.len(), CacheType::F32);
    let mut scratch = ForwardBuffers::default();
    model
        .forward(
            &mut [ForwardStep {
                cache: &mut cache,
                tokens,
                want: WantedLogits::All,
            }],
            &mut scratch,
        )
        .unwrap()
        .to_vec()
}

fn check_against_inference(decoder: &DecoderModel, folder: &Path) {
    let tokens: Vec<u32> = (0..24)
        .map(|i| (i * 37 + 11) % decoder.config().vocab as u32)
        .collect();
    let x = Tensor::new(tokens.as_slice(), &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let logits = decoder
        .forward(&x)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    let truth = inferred(folder, &tokens);
    let scale = truth.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = logits
        .iter()
        .zip(&truth)
        .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    // Sums of up to 400 products in f32, through a few layers.
    assert!(worst < 1e-4 * scale, "{worst} of {scale}");
}

#[test]
fn the_decoder_computes_what_the_inference_engine_does() {
    let source = Source::open(ASSETS.as_ref()).unwrap();
    let vars = VarMap::new();
    let config = source.config().cloned().unwrap();
    let mut decoder =
        DecoderModel::new(ASSETS.as_ref(), &config, 24, &variables(&vars, 0)).unwrap();
    folder::load(&vars, &source).unwrap();
    check_against_inference(&decoder, ASSETS.as_ref());
    let names = names(&mut decoder);
    assert_eq!(
        (names.len(), names[0].as_str(), names[27].as_str()),
        (
            28,
            "model.layers.0.self_attn.q_proj",
            "model.layers.3.mlp.down_proj"
        )
    );
    let all = vars.data().lock().unwrap();
    assert!(
        names
            .iter()
            .all(|name| all.contains_key(&format!("{name}.weight")))
    );
}

#[test]
fn what_is_written_is_what_is_run() {
    for (architecture, tied) in [("llama", true), ("llama", false), ("bitnet", true)] {
        let shape = DecoderShape {
            architecture: architecture.into(),
            hidden: 32,
            ffn: 48,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            tied,
            ..Default::default()
        };
        let config = shape.config_json(50, 32).unwrap();
        let vars = VarMap::new();
        let mut decoder =
            DecoderModel::new("new".as_ref(), &config, 32, &variables(&vars, 5)).unwrap();
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("model");
        folder::save(&path, &folder::tensors(&vars), &config, &[]).unwrap();
        check_against_inference(&decoder, &path);
        assert_eq!(names(&mut decoder).last().unwrap() == "lm_head", !tied);
    }
}

#[test]
fn a_checkpoint_of_another_shape_or_with_other_tensors_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let shape = |layers| DecoderShape {
        hidden: 16,
        ffn: 16,
        layers,
        heads: 2,
        kv_heads: 1,
        ..Default::default()
    };
    let make = |layers| {
        let vars = VarMap::new();
        let config = shape(layers).config_json(9, 8).unwrap();
        DecoderModel::new("new".as_ref(), &config, 8, &variables(&vars, 1)).unwrap();
        (vars, config)
    };
    let (two, config) = make(2);
    folder::save(
        &work.path().join("two"),
        &folder::tensors(&two),
        &config,
        &[],
    )
    .unwrap();
    let source = Source::open(&work.path().join("two")).unwrap();
    let message = |layers| {
        folder::load(&make(layers).0, &source)
            .unwrap_err()
            .to_string()
    };
    assert!(
        message(3).contains("model.layers.2.") && message(3).contains("no such tensor"),
        "{}",
        message(3)
    );
    assert!(
        message(1).contains("model.layers.1.") && message(1).contains("no place"),
        "{}",
        message(1)
    );
    assert!(
        folder::save(
            &work.path().join("two"),
            &folder::tensors(&two),
            &config,
            &[]
        )
        .unwrap_err()
        .to_string()
        .contains("exists")
    );
}

/// The derivative along a random direction of all variables is that of the difference quotient.
fn check_slope(vars: &VarMap, loss: impl Fn() -> Tensor) {
    let gradients = loss().backward().unwrap();
    let mut random = stream(3, "direction");
    let (mut slope, mut directions) = (0.0, vec![]);
    let mut all: Vec<_> = vars
        .data()
        .lock()
        .unwrap()
        .iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, var) in &all {
        let direction: Vec<f32> = (0..var.elem_count())
            .map(|_| random.normal() as f32)
            .collect();
        let direction = Tensor::from_vec(direction, var.shape(), &Device::Cpu).unwrap();
        let gradient = gradients
            .get(var)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        assert!(
            gradient
                .abs()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                > 0.0,
            "{name}"
        );
        slope += f64::from(
            (gradient * &direction)
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap(),
        );
        directions.push((var.clone(), var.as_tensor().copy().unwrap(), direction));
    }
    let at = |h: f64| {
        for (var, start, direction) in &directions {
            var.set(&(start + (direction * h).unwrap()).unwrap())
                .unwrap();
        }
        f64::from(loss().to_scalar::<f32>().unwrap())
    };
    // Small against the embedding's deviation of 0.02, large against the rounding of a loss of 2.
    let h = 1e-4;
    let difference = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
    assert!(
        (slope - difference).abs() < 0.005 * slope.abs() + 5e-3,
        "{slope} and {difference}"
    );
}

#[test]
fn slopes_of_the_decoders_are_those_of_differences() {
    for architecture in ["llama", "bitnet"] {
        let shape = DecoderShape {
            architecture: architecture.into(),
            hidden: 16,
            ffn: 24,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            ..Default::default()
        };
        let vars = VarMap::new();
        let decoder = DecoderModel::new(
            "new".as_ref(),
            &shape.config_json(11, 6).unwrap(),
            6,
            &variables(&vars, 2),
        )
        .unwrap();
        let tokens =
            Tensor::new(&[[1u32, 5, 3, 9, 0, 2], [7, 7, 10, 4, 2, 6]], &Device::Cpu).unwrap();
        check_slope(&vars, || {
            cross_entropy(&decoder.forward(&tokens).unwrap(), &tokens).unwrap()
        });
        let (logits, trace) = decoder.forward_traced(&tokens).unwrap();
        assert_eq!((logits.dims(), trace.hidden.len()), (&[2, 6, 11][..], 2));
        let ([q, k, v], heads) = trace.relations.unwrap();
        assert_eq!(
            (q.dims(), k.dims(), v.dims(), heads),
            (&[2, 6, 16][..], &[2, 6, 8][..], &[2, 6, 8][..], 2)
        );
    }
}

/// A qwen3 is a llama with norms of q and k: trained as llama it would lose them.
#[test]
fn a_model_without_a_training_graph_is_refused() {
    let json = DecoderShape::default().config_json(11, 6).unwrap();
    let mut qwen3 = json.clone();
    qwen3["model_type"] = "qwen3".into();
    let path = Path::new("config.json");
    let error = DecoderModel::new(path, &qwen3, 6, &variables(&VarMap::new(), 2)).unwrap_err();
    let message = error.to_string();
    for part in [
        "config.json: model_type: expected a model that can be trained",
        "'llama' or 'bitnet'",
        "got 'qwen3'",
    ] {
        assert!(message.contains(part), "{message}");
    }
    let shape = DecoderShape {
        architecture: "qwen3".into(),
        ..Default::default()
    };
    let message = shape.config_json(11, 6).unwrap_err().to_string();
    for part in ["expected llama", "bitnet", "got 'qwen3'"] {
        assert!(message.contains(part), "{message}");
    }

    let vars = VarMap::new();
    DecoderModel::new(path, &json, 6, &variables(&vars, 2)).unwrap();
    let mut tensors = folder::tensors(&vars);
    let name = "model.layers.0.self_attn.q_norm.weight";
    let norm = Tensor::ones(32, candle_core::DType::F32, &Device::Cpu).unwrap();
    tensors.insert(name.into(), norm);
    let dir = tempfile::tempdir().unwrap();
    let written = dir.path().join("model");
    folder::save(&written, &tensors, &json, &[]).unwrap();
    let message = folder::load(&vars, &Source::open(&written).unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains(name) && message.contains("training graph"),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1);
}

#[test]
fn slopes_of_the_image_models_are_those_of_differences() {
    let mlp = ImageShape::Mlp(MlpConfig {
        inputs: 64,
        hidden: vec![20, 12],
        classes: 5,
        norm: true,
    });
    let cnn = ImageShape::Cnn(CnnConfig {
        height: 8,
        width: 8,
        channels: vec![4, 6],
        dense: 16,
        classes: 5,
        norm: true,
    });
    for shape in [mlp, cnn] {
        let vars = VarMap::new();
        let model = ImageModel::new(&shape, &variables(&vars, 2)).unwrap();
        let mut random = stream(1, "images");
        let images: Vec<f32> = (0..7 * 64).map(|_| random.normal() as f32).collect();
        let images = Tensor::from_vec(images, (7, 64), &Device::Cpu).unwrap();
        let labels = Tensor::new(&[0u32, 1, 2, 3, 4, 0, 2], &Device::Cpu).unwrap();
        check_slope(&vars, || {
            cross_entropy(&model.forward(&images).unwrap(), &labels).unwrap()
        });
    }
}

#[test]
fn shapes_that_mean_nothing_are_refused() {
    let vb = || variables(&VarMap::new(), 0);
    assert!(
        Mlp::new(
            &MlpConfig {
                inputs: 4,
                hidden: vec![0],
                classes: 2,
                norm: false
            },
            &vb()
        )
        .is_err()
    );
    let odd = CnnConfig {
        height: 6,
        width: 6,
        channels: vec![2, 2],
        dense: 4,
        classes: 2,
        norm: false,
    };
    assert!(
        Cnn::new(&odd, &vb())
            .unwrap_err()
            .to_string()
            .contains("2 channels of 3 × 3")
    );
    let config = DecoderShape {
        hidden: 16,
        ffn: 16,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        ..Default::default()
    }
    .config_json(9, 8)
    .unwrap();
    assert!(
        DecoderModel::new("new".as_ref(), &config, 9, &vb())
            .unwrap_err()
            .to_string()
            .contains("1 to 8")
    );
    assert!(
        DecoderShape {
            architecture: "gpt".into(),
            ..Default::default()
        }
        .config_json(9, 8)
        .is_err()
    );
}
