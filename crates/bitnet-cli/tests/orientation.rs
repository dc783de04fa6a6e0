//! Weights that are stored `[in, out]`, and stacked experts: which they are, and that their scales
//! belong to outputs.

mod common;

use common::{Dir, T, f32s, gauss, llama, normal, safetensors};
use serde_json::{Value, json};

/// A tensor of a safetensors file: type, shape and bytes.
fn stored(dir: &Dir, file: &str, name: &str) -> (String, Vec<usize>, Vec<u8>) {
    let bytes = dir.read(file);
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let info = &header[name];
    let number = |v: &Value| v.as_u64().unwrap() as usize;
    let range = &info["data_offsets"];
    (
        info["dtype"].as_str().unwrap().into(),
        info["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(number)
            .collect(),
        bytes[8 + len + number(&range[0])..8 + len + number(&range[1])].to_vec(),
    )
}

/// An f32 tensor of a safetensors file.
fn floats(dir: &Dir, file: &str, name: &str) -> (Vec<usize>, Vec<f32>) {
    let (_, shape, bytes) = stored(dir, file, name);
    let floats = bytes
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (shape, floats.collect())
}

/// Each matrix of `[batch, rows, cols]` transposed.
fn transpose(w: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let matrices = w.chunks(rows * cols);
    matrices
        .flat_map(|m| (0..cols).flat_map(move |c| (0..rows).map(move |r| m[r * cols + c])))
        .collect()
}

/// The names that `inspect` calls quantized, and of these the transposed ones.
fn quantized(dir: &Dir, name: &str) -> (Vec<String>, Vec<String>) {
    let report = dir.run(&["inspect", name, "--headers", "--json"]).json();
    let names = |key: &dyn Fn(&Value) -> bool| {
        let tensors = report["tensors"].as_array().unwrap().iter();
        let names = tensors.filter(|t| key(t)).map(|t| t["name"].as_str());
        names.map(|name| name.unwrap().to_string()).collect()
    };
    (
        names(&|t| !t["precision"].is_null()),
        names(&|t| t["transposed"] == true),
    )
}

/// A folder `m` with these tensors of random weights.
fn folder(config: &Value, tensors: &[(&'static str, &[usize])]) -> Dir {
    let dir = Dir::new();
    let tensors: Vec<T> = tensors.iter().map(|(n, s)| gauss(n, s, 0.02)).collect();
    dir.write("m/model.safetensors", safetensors(&tensors))
        .write_json("m/config.json", config);
    dir
}

/// Several strips, none of which ends with a block of what is read.
const INPUTS: usize = 611;
const OUTPUTS: usize = 1003;

#[test]
fn a_transposed_weight_gets_the_bytes_of_its_transpose() {
    let dir = Dir::new();
    let w = normal(3, INPUTS * OUTPUTS, 0.02);
    let bias = || gauss("h.0.mlp.c_fc.bias", &[OUTPUTS], 0.1);
    let weight = |shape: &[usize], w: &[f32]| f32s("h.0.mlp.c_fc.weight", shape, w);
    let (conv, linear) = (
        weight(&[INPUTS, OUTPUTS], &w),
        weight(&[OUTPUTS, INPUTS], &transpose(&w, INPUTS, OUTPUTS)),
    );
    dir.write("conv.safetensors", safetensors(&[conv, bias()]))
        .write("linear.safetensors", safetensors(&[linear, bias()]));
    for options in [
        &["--granularity", "channel"][..],
        &["--granularity", "group:32", "--layout", "auto"],
        &["--granularity", "tensor", "--threshold", "optimal"],
        &["--precision", "int4", "--mapping", "asymmetric"],
        &["--planes", "2"],
    ] {
        for name in ["conv", "linear"] {
            let [input, q, f] = ["", "-q", "-f"].map(|end| format!("{name}{end}.safetensors"));
            let args = ["quantize", &input, "--out", &q, "--force"];
            let said = dir.run(&[&args[..], options].concat()).is(0).stdout();
            let note = "1 weights are stored [in, out], e.g. h.0.mlp.c_fc.weight (by their biases)";
            assert_eq!(said.contains(note), name == "conv", "{said}");
            dir.run(&["verify", &q]).is(0);
            dir.run(&["dequantize", &q, "--out", &f, "--force"]).is(0);
        }
        for part in ["packed", "scale"] {
            let name = format!("h.0.mlp.c_fc.weight_{part}");
            assert_eq!(
                stored(&dir, "conv-q.safetensors", &name),
                stored(&dir, "linear-q.safetensors", &name),
                "{name} {options:?}"
            );
        }
        let name = "h.0.mlp.c_fc.weight";
        let (shape, conv) = floats(&dir, "conv-f.safetensors", name);
        let (_, linear) = floats(&dir, "linear-f.safetensors", name);
        assert_eq!(shape, [INPUTS, OUTPUTS]);
        assert!(conv == transpose(&linear, OUTPUTS, INPUTS), "{options:?}");
        // Both sides of a comparison are read in the order of the shape.
        let error = |name: &str| {
            let files = ["", "-q"].map(|end| format!("{name}{end}.safetensors"));
            let report = dir.run(&["compare", &files[0], &files[1], "--json"]).json();
            report["tensors"][0]["sqnr_db"].as_f64().unwrap()
        };
        assert!((error("conv") - error("linear")).abs() < 1e-6);
        let floats = ["compare", "conv-q.safetensors", "conv-f.safetensors"];
        let report = dir.run(&[&floats[..], &["--json"]].concat()).json();
        assert_eq!(report["all"]["exact"], true, "{report}");
    }
    // Quantized again, and converted, they stay what they are.
    for command in [
        &["quantize", "conv-q.safetensors", "--planes", "2"][..],
        &["convert", "conv-q.safetensors", "--layout", "i8"],
    ] {
        let out = ["--out", "again.safetensors", "--force"];
        dir.run(&[command, &out].concat()).is(0);
        let names = vec!["h.0.mlp.c_fc.weight".to_string()];
        assert_eq!(quantized(&dir, "again.safetensors"), (names.clone(), names));
    }
    let args = ["dequantize", "again.safetensors", "--out", "f.safetensors"];
    dir.run(&args).is(0);
    let name = "h.0.mlp.c_fc.weight";
    assert!(floats(&dir, "f.safetensors", name) == floats(&dir, "conv-f.safetensors", name));
}

#[test]
fn other_formats_refuse_transposed_weights() {
    let dir = Dir::new();
    llama(&dir, "m");
    let down = "model.layers.0.mlp.down_proj.weight";
    let transposed = ["--transposed", "*down_proj*"];
    let gguf = ["quantize", "m", "--out", "q.gguf"];
    let parts = [down, "[out, in]", "--format safetensors"];
    dir.refuses(&[&gguf[..], &transposed].concat(), &parts);
    let hf = ["quantize", "m", "--out", "hf", "--format", "hf-bitnet"];
    dir.refuses(&[&hf[..], &transposed].concat(), &[down, "Conv1D"]);
    let ours = ["quantize", "m", "--out", "q", "--granularity", "tensor"];
    dir.run(&[&ours[..], &transposed].concat()).is(0);
    dir.refuses(&["convert", "q", "--out", "q.gguf"], &parts);
    let hf = ["convert", "q", "--out", "hf", "--format", "hf-bitnet"];
    dir.refuses(&hf, &[down, "Conv1D"]);
    // The matrix is square: its shape alone would say nothing.
    dir.refuses(&["bench", "q"], &[down, "packed transposed"]);
}

/// The weights of stacked experts by the definition of absmean, one scale for each row.
fn absmean(w: &[f32], cols: usize) -> Vec<f32> {
    let row = |w: &[f32]| {
        let mean = w.iter().map(|w| f64::from(w.abs())).sum::<f64>() / w.len() as f64;
        let value = move |w: &f32| (f64::from(*w) / mean).round_ties_even().clamp(-1.0, 1.0);
        w.iter()
            .map(|w| (value(w) * mean) as f32)
            .collect::<Vec<_>>()
    };
    w.chunks(cols).flat_map(row).collect()
}

fn close(a: &[f32], b: &[f32]) -> bool {
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
    a.len() == b.len() && a.iter().zip(b).all(near)
}

#[test]
fn stacked_experts_have_a_scale_for_each_output_of_each_expert() {
    // H, I: few inputs; H = 2·I; H = I, where down is square.
    for (h, i) in [(64, 12), (64, 32), (48, 48), (40, 8)] {
        for transposed in [false, true] {
            let shape = |rows: usize, cols: usize| match transposed {
                true => [3, cols, rows],
                false => [3, rows, cols],
            };
            let dir = Dir::new();
            let names = ["l.0.mlp.experts.gate_up_proj", "l.0.mlp.experts.down_proj"];
            let shapes = [shape(2 * i, h), shape(h, i)];
            let experts: Vec<T> = (0..2)
                .map(|k| gauss(names[k], &shapes[k], 0.02))
                .chain([gauss("l.0.mlp.router.weight", &[3, h], 0.02)])
                .collect();
            dir.write("in.safetensors", safetensors(&experts));
            let said = dir
                .run(&["quantize", "in.safetensors", "--out", "q.safetensors"])
                .is(0)
                .stdout();
            let evidence = "2 weights are stored [in, out], e.g. ";
            assert_eq!(said.contains(evidence), transposed, "{said}");
            let mut quantized = quantized(&dir, "q.safetensors");
            quantized.0.sort();
            assert_eq!(quantized.0, [names[1], names[0]], "{h} {i}");
            assert_eq!(quantized.1.len(), if transposed { 2 } else { 0 });
            dir.run(&["dequantize", "q.safetensors", "--out", "f.safetensors"])
                .is(0);
            for (name, shape) in names.iter().zip(shapes) {
                let (_, w) = floats(&dir, "in.safetensors", name);
                let (after, got) = floats(&dir, "f.safetensors", name);
                assert_eq!(after, shape);
                let expected = match transposed {
                    false => absmean(&w, shape[2]),
                    true => transpose(
                        &absmean(&transpose(&w, shape[1], shape[2]), shape[1]),
                        shape[2],
                        shape[1],
                    ),
                };
                assert!(close(&got, &expected), "{name} {shape:?} {transposed}");
            }
        }
    }
}

/// Gate, up and down apart, and a layer in which neither is alone.
#[test]
fn separate_experts_are_known_by_the_width_and_by_biases() {
    let mut config = json!({"hidden_size": 64, "num_experts": 4});
    let trio: [(&'static str, &[usize]); 3] = [
        ("l.0.moe.w1", &[4, 64, 24]),
        ("l.0.moe.w2", &[4, 24, 64]),
        ("l.0.moe.w3", &[4, 64, 24]),
    ];
    let dir = folder(&config, &trio);
    dir.run(&["quantize", "m", "--out", "q"]).is(0);
    let names = trio.map(|t| t.0.to_string()).to_vec();
    assert_eq!(quantized(&dir, "q").1, names);
    // The same shapes are [out, in] in a model of another width.
    config["hidden_size"] = json!(24);
    let dir = folder(&config, &trio);
    dir.run(&["quantize", "m", "--out", "q"]).is(0);
    assert_eq!(quantized(&dir, "q"), (names, vec![]));
    // As in gpt-oss: square ones go by their neighbour.
    let dir = folder(
        &json!({}),
        &[
            ("l.0.mlp.experts.in_proj", &[4, 64, 96]),
            ("l.0.mlp.experts.in_proj_bias", &[4, 96]),
            ("l.0.mlp.experts.mid_proj", &[4, 96, 96]),
            ("l.0.mlp.experts.mid_proj_bias", &[4, 96]),
        ],
    );
    let said = dir.run(&["quantize", "m", "--out", "q"]).is(0).stdout();
    assert_eq!(quantized(&dir, "q").1.len(), 2);
    let evidence = "(1 by their biases, 1 by the other weights of their modules)";
    assert!(said.contains(evidence), "{said}");
}

#[test]
fn the_matrices_of_conv1d_are_found_without_a_list_of_names() {
    let gpt2: [(&'static str, &[usize]); 7] = [
        ("wte.weight", &[100, 64]),
        ("h.0.attn.c_attn.weight", &[64, 192]),
        ("h.0.attn.c_attn.bias", &[192]),
        ("h.0.attn.c_proj.weight", &[64, 64]),
        ("h.0.attn.c_proj.bias", &[64]),
        ("h.0.other.q.weight", &[64, 64]),
        ("score.weight", &[64, 64]),
    ];
    // Without a config: the bias, and for the square one its neighbour; none says it of the others.
    let dir = folder(&json!({"vocab_size": 100}), &gpt2);
    dir.run(&["quantize", "m", "--out", "q"]).is(0);
    let attention = ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"];
    assert_eq!(quantized(&dir, "q").1, attention);
    assert_eq!(quantized(&dir, "q").0.len(), 4);
    // A family of Conv1D has it in all blocks.
    let family = json!({"vocab_size": 100, "model_type": "gpt2"});
    let dir = folder(&family, &gpt2);
    let said = dir.run(&["quantize", "m", "--out", "q"]).is(0).stdout();
    assert_eq!(
        quantized(&dir, "q").1,
        [&attention[..], &["h.0.other.q.weight"]].concat()
    );
    assert!(said.contains("1 by model_type"), "{said}");
    // As mlx-lm stores GPT-2: the biases contradict the family, which is said.
    let turned: Vec<(&'static str, &[usize])> = gpt2
        .iter()
        .map(|&(name, shape)| match shape {
            [64, 192] => (name, &[192, 64][..]),
            other => (name, other),
        })
        .collect();
    let dir = folder(&family, &turned);
    let said = dir.run(&["quantize", "m", "--out", "q"]).is(0).stdout();
    assert_eq!(quantized(&dir, "q").1, [] as [&str; 0]);
    let note = "config.json says gpt2, whose weights transformers stores [in, out], but";
    assert!(said.contains(note), "{said}");
}

#[test]
fn the_recipe_says_what_is_transposed() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[
            gauss("h.0.a.weight", &[64, 96], 0.02),
            gauss("h.0.a.bias", &[96], 0.02),
            gauss("h.0.b.weight", &[64, 96], 0.02),
        ]),
    );
    let quantize = ["quantize", "in.safetensors", "--out", "q.safetensors"];
    let transposed = |options: &[&str]| {
        dir.run(&[&quantize[..], &["--force"], options].concat())
            .is(0);
        quantized(&dir, "q.safetensors").1
    };
    assert_eq!(transposed(&[]), ["h.0.a.weight"]);
    assert_eq!(transposed(&["--transposed", "*.b.*"]), ["h.0.b.weight"]);
    dir.write("none.toml", "transposed = []");
    let none: [&str; 0] = [];
    assert_eq!(transposed(&["--config", "none.toml"]), none);
    dir.refuses(
        &[&quantize[..], &["--force", "--transposed", "*.c.*"]].concat(),
        &["'*.c.*' matches no tensor"],
    );
    dir.write("bad.toml", "transposed = ['[']");
    dir.refuses(
        &[&quantize[..], &["--force", "--config", "bad.toml"]].concat(),
        &["glob '['"],
    );
}

#[test]
fn convolutions_stay_floats_whatever_the_number_of_experts() {
    let dir = folder(
        &json!({"num_experts": 64, "hidden_size": 64}),
        &[
            ("l.0.mixer.conv1d.weight", &[64, 1, 4]),
            ("l.0.mixer.in_proj.weight", &[64, 64]),
            ("l.0.conv.weight", &[64, 64, 3]),
            ("encoder.down.weight", &[64, 64, 3]),
            ("patch.proj.weight", &[64, 3, 4, 4]),
        ],
    );
    let said = dir.run(&["quantize", "m", "--out", "q"]).is(0).stdout();
    assert_eq!(quantized(&dir, "q").0, ["l.0.mixer.in_proj.weight"]);
    assert!(said.contains("tensors of 3 dimensions"), "{said}");
    // A rule reaches them: a row is all that makes one output.
    let rule = ["--rule", "*conv.weight=ternary"];
    dir.run(&[&["quantize", "m", "--out", "r"][..], &rule].concat())
        .is(0);
    let (_, shape, _) = stored(&dir, "r/model.safetensors", "l.0.conv.weight_scale");
    assert_eq!(shape, [64]);
}

/// What a file says of a transposed matrix must be true of its shape.
#[test]
fn a_document_whose_shape_is_not_transposed_is_refused() {
    let dir = Dir::new();
    let a = gauss("a.weight", &[32, 96], 0.02);
    dir.write("in.safetensors", safetensors(&[a]));
    let args = ["quantize", "in.safetensors", "--out", "q.safetensors"];
    dir.run(&[&args[..], &["--transposed", "a.weight"]].concat())
        .is(0);
    let bytes = dir.read("q.safetensors");
    let (from, to) = (r#"\"shape\":[32,96]"#, r#"\"shape\":[96,32]"#);
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes());
    let mut bad = bytes.clone();
    bad[at.unwrap()..][..to.len()].copy_from_slice(to.as_bytes());
    dir.write("bad.safetensors", bad);
    dir.refuses(
        &["inspect", "bad.safetensors"],
        &["a.weight", "a shape that ends in 32 inputs", "[96, 32]"],
    );
}
