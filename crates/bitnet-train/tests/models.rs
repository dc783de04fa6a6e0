//! Models against the inference engine and difference quotients, and their rejection of bad input.

use bitnet_core::Granularity;
use bitnet_inference::{CacheType, ForwardBuffers, ForwardStep, Model, WantedLogits};
use bitnet_quant::qat::{Linears, StraightThroughEstimator, prepare};
use bitnet_quant::recipe::Preset;
use bitnet_quant::{Activations, Source};
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
        (names.len(), names[0].as_str(), names[28].as_str()),
        (29, "model.embed_tokens", "model.layers.3.mlp.down_proj")
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
    for (architecture, tied, head_dim) in [
        ("llama", true, None),
        ("llama", false, None),
        ("bitnet", true, None),
        ("qwen2", true, None),
        ("qwen3", true, Some(12)),
        ("qwen3", false, None),
        ("mistral", false, Some(6)),
        ("smollm3", true, None),
    ] {
        let shape = DecoderShape {
            architecture: architecture.into(),
            hidden: 32,
            ffn: 48,
            layers: 5,
            heads: 4,
            kv_heads: 2,
            head_dim,
            tied,
            ..Default::default()
        };
        let mut config = shape.config_json(50, 32).unwrap();
        if architecture == "mistral" {
            // As many positions as are trained: it hides nothing.
            config["sliding_window"] = 32.into();
        }
        let vars = VarMap::new();
        let mut decoder =
            DecoderModel::new("new".as_ref(), &config, 32, &variables(&vars, 5)).unwrap();
        // New gains and biases are 1 and 0, with which a graph without them computes the same.
        let mut random = stream(9, "gains");
        for (_, var) in folder::sorted(&vars).iter().filter(|(_, v)| v.rank() == 1) {
            let offset: Vec<f32> = (0..var.elem_count())
                .map(|_| 0.3 * random.normal() as f32)
                .collect();
            let offset = Tensor::from_vec(offset, var.shape(), &Device::Cpu).unwrap();
            var.set(&(var.as_tensor() + offset).unwrap()).unwrap();
        }
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
    for architecture in ["llama", "bitnet", "qwen2", "qwen3", "smollm3"] {
        let shape = DecoderShape {
            architecture: architecture.into(),
            hidden: 16,
            ffn: 24,
            layers: if architecture == "smollm3" { 4 } else { 2 },
            heads: 4,
            kv_heads: 2,
            head_dim: (architecture == "qwen3").then_some(6),
            ..Default::default()
        };
        let (q_len, kv_len) = if architecture == "qwen3" {
            (24, 12)
        } else {
            (16, 8)
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
        assert_eq!(
            (logits.dims(), trace.hidden.len()),
            (&[2, 6, 11][..], shape.layers)
        );
        let ([q, k, v], heads) = trace.relations.unwrap();
        assert_eq!(
            (q.dims(), k.dims(), v.dims(), heads),
            (
                &[2, 6, q_len][..],
                &[2, 6, kv_len][..],
                &[2, 6, kv_len][..],
                2
            )
        );
    }
}

/// A gemma3 is a llama with more norms: trained as llama it would lose them.
#[test]
fn a_model_without_a_training_graph_is_refused() {
    let json = DecoderShape::default().config_json(11, 6).unwrap();
    let mut gemma3 = json.clone();
    gemma3["model_type"] = "gemma3_text".into();
    gemma3["hidden_activation"] = "gelu_pytorch_tanh".into();
    gemma3["sliding_window"] = 6.into();
    let path = Path::new("config.json");
    let error = DecoderModel::new(path, &gemma3, 6, &variables(&VarMap::new(), 2)).unwrap_err();
    let message = error.to_string();
    for part in [
        "config.json: model_type: expected a model that can be trained",
        "'llama', 'bitnet', 'qwen2', 'qwen3', 'mistral' or 'smollm3'",
        "got 'gemma3_text'",
    ] {
        assert!(message.contains(part), "{message}");
    }
    let shape = DecoderShape {
        architecture: "gemma3_text".into(),
        ..Default::default()
    };
    let message = shape.config_json(11, 6).unwrap_err().to_string();
    for part in ["expected llama", "bitnet", "got 'gemma3_text'"] {
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

/// What the graph has no gradient for is refused by the key that asks for it.
#[test]
fn windows_and_rotations_without_gradients_are_refused() {
    for (architecture, key, value, got) in [
        ("mistral", "sliding_window", serde_json::json!(5), "got 5"),
        (
            "qwen3",
            "rope_scaling",
            serde_json::json!({"rope_type": "linear", "factor": 2.0}),
            "linear",
        ),
    ] {
        let shape = DecoderShape {
            architecture: architecture.into(),
            ..Default::default()
        };
        let mut json = shape.config_json(11, 6).unwrap();
        json[key] = value;
        let new = DecoderModel::new("c".as_ref(), &json, 6, &variables(&VarMap::new(), 2));
        let message = new.unwrap_err().to_string();
        assert!(message.contains(key) && message.contains(got), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
}

/// A fake-quantized embedding: rows and tied logits are those of Ŵ, and the gradient is that of
/// both uses.
#[test]
fn an_embedding_is_quantized_in_both_places() {
    let shape = DecoderShape {
        architecture: "qwen3".into(),
        hidden: 16,
        ffn: 24,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        ..Default::default()
    };
    let json = shape.config_json(11, 6).unwrap();
    let vars = VarMap::new();
    let mut decoder = DecoderModel::new("new".as_ref(), &json, 6, &variables(&vars, 2)).unwrap();
    let mut recipe = Preset::Bonsai.build().unwrap();
    recipe.default.granularity = Some(Granularity::Group(8));
    recipe.activations = Some(Activations::Float);
    let names = prepare(
        &mut decoder,
        &recipe,
        StraightThroughEstimator::Plain,
        &vars,
    )
    .unwrap();
    assert_eq!((names.len(), names[0].as_str()), (8, "model.embed_tokens"));
    let tokens = Tensor::new(&[[1u32, 5, 3, 9, 0, 2]], &Device::Cpu).unwrap();
    let logits = decoder.forward(&tokens).unwrap();
    let loss = cross_entropy(&logits, &tokens).unwrap();
    let gradients = loss.backward().unwrap();
    let latent = folder::sorted(&vars)["model.embed_tokens.weight"].clone();
    let gradient = gradients.get(&latent).unwrap().to_vec2::<f32>().unwrap();
    // Token 10 is not read: only the head sees its row.
    assert!(gradient.iter().all(|row| row.iter().any(|g| *g != 0.0)));

    // A float model on the quantized weights computes the same, and has the same gradients.
    let rounded = VarMap::new();
    let twin = DecoderModel::new("new".as_ref(), &json, 6, &variables(&rounded, 2)).unwrap();
    let twins = folder::sorted(&rounded);
    decoder
        .visit_linears(&mut |name, linear| {
            let weights = linear.as_qat().unwrap().dequantized_weights()?;
            let first = weights.to_vec2::<f32>()?[0][..8].to_vec();
            let scale = first.iter().fold(0f32, |m, w| m.max(w.abs()));
            assert!(
                first.iter().all(|w| [0.0, scale].contains(&w.abs())),
                "{name}"
            );
            Ok(twins[&format!("{name}.weight")].set(&weights)?)
        })
        .unwrap();
    let expected = twin.forward(&tokens).unwrap();
    let of_twin = cross_entropy(&expected, &tokens)
        .unwrap()
        .backward()
        .unwrap();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // Sums of the dense kernels and of candle, in different orders.
    let pairs = flat(&logits).into_iter().zip(flat(&expected));
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6));
    for (name, var) in folder::sorted(&vars) {
        let (got, expected) = (
            flat(gradients.get(&var).unwrap()),
            flat(of_twin.get(&twins[&name]).unwrap()),
        );
        let largest = expected.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
        assert!(
            got.iter()
                .zip(&expected)
                .all(|(g, e)| (g - e).abs() < 1e-5 * largest),
            "{name}"
        );
    }
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
