//! Weights that are stored `[in, out]` get the values and scales of their transposes, and stacked
//! experts a scale for each output.

use bitnet_checkpoint::forms::Forms;
use bitnet_checkpoint::job::{self, Existing, Options};
use bitnet_checkpoint::rows::{read_all, read_matrix};
use bitnet_checkpoint::{Job, Recipe, Source, compare};
use bitnet_core::random::Random;
use bitnet_core::{Matrix, ScaleDtype};
use bitnet_formats::Content;
use bitnet_kernels::Kernels;
use std::path::{Path, PathBuf};

/// Several strips, none of which ends with a block of what is read.
const INPUTS: usize = 611;
const OUTPUTS: usize = 1003;

fn normal(n: usize) -> Vec<f32> {
    let mut random = Random::new(7);
    (0..n).map(|_| 0.02 * random.normal() as f32).collect()
}

/// Each matrix of `[batch, rows, cols]` transposed.
fn transpose(w: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let matrices = w.chunks(rows * cols);
    matrices
        .flat_map(|m| (0..cols).flat_map(move |c| (0..rows).map(move |r| m[r * cols + c])))
        .collect()
}

/// A file of these tensors.
fn write(path: &Path, tensors: &[(&str, &[usize], &[f32])]) {
    let (mut entries, mut data) = (vec![], vec![]);
    for (name, shape, w) in tensors {
        let start = data.len();
        data.extend(w.iter().flat_map(|w| w.to_le_bytes()));
        let range = [start, data.len()];
        entries.push(format!(
            r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":{range:?}}}"#
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

fn run(job: &Job<'_>, out: &Path) {
    let options = Options {
        threads: 2,
        kernels: Kernels::detect(),
        progress: &(),
        interrupt: &Default::default(),
        existing: Existing::Replace,
    };
    job::run(job, out, &options).unwrap();
}

/// Quantizes a file by a recipe, and dequantizes the result: the paths of both.
fn round_trip(input: &Path, recipe: &str) -> (PathBuf, PathBuf) {
    let named = |end: &str| input.with_extension(format!("{end}.safetensors"));
    let (q, f) = (named("q"), named("f"));
    let source = Source::open(input).unwrap();
    let recipe = Recipe::from_toml(recipe).unwrap();
    run(&Job::quantize(&source, &recipe, &q).unwrap(), &q);
    let source = Source::open(&q).unwrap();
    run(&Job::dequantize(&source, ScaleDtype::F32, &f).unwrap(), &f);
    (q, f)
}

fn matrix(path: &Path, name: &str) -> (Matrix, bool) {
    let source = Source::open(path).unwrap();
    let Content::Quantized(q) = &source.find(name).unwrap().content else {
        panic!("{name} is not quantized")
    };
    (source.matrix(name, q).unwrap(), q.transposed)
}

fn floats(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let source = Source::open(path).unwrap();
    let tensor = source.find(name).unwrap();
    (tensor.shape.clone(), read_all(&source, tensor).unwrap())
}

#[test]
fn a_transposed_weight_gets_the_values_of_its_transpose() {
    let folder = tempfile::tempdir().unwrap();
    let [conv, linear] = ["conv", "linear"].map(|name| folder.path().join(name));
    let w = normal(INPUTS * OUTPUTS);
    let turned = transpose(&w, INPUTS, OUTPUTS);
    let bias: (&str, &[usize], &[f32]) = ("h.0.c_fc.bias", &[OUTPUTS], &w[..OUTPUTS]);
    let name = "h.0.c_fc.weight";
    let [conv, linear] = [conv, linear].map(|path| path.with_extension("safetensors"));
    write(&conv, &[(name, &[INPUTS, OUTPUTS], &w), bias]);
    write(&linear, &[(name, &[OUTPUTS, INPUTS], &turned), bias]);
    let source = Source::open(&conv).unwrap();
    let read = read_matrix(&source, source.find(name).unwrap()).unwrap();
    assert!(read == (turned.clone(), (OUTPUTS, INPUTS)));
    for recipe in [
        "default = {granularity = 'channel'}",
        "default = {granularity = 'group:32', layout = 'auto'}",
        "default = {granularity = 'tensor', threshold = 'optimal'}",
        "default = {precision = 'int4', mapping = 'asymmetric'}",
        "default = {planes = 2}",
    ] {
        let (conv_q, conv_f) = round_trip(&conv, recipe);
        let (linear_q, linear_f) = round_trip(&linear, recipe);
        let ((a, transposed), (b, plain)) = (matrix(&conv_q, name), matrix(&linear_q, name));
        assert!(transposed && !plain);
        assert!(a == b, "{recipe}");
        let (shape, w) = floats(&conv_f, name);
        assert_eq!(shape, [INPUTS, OUTPUTS]);
        assert!(w == transpose(&floats(&linear_f, name).1, OUTPUTS, INPUTS));
        // A comparison reads both in the order of the shape.
        let noise = |a: &Path, b: &Path| {
            let (a, b) = (Source::open(a).unwrap(), Source::open(b).unwrap());
            let tensors = compare::compare(&a, &b, &()).unwrap().tensors;
            tensors.iter().map(|t| t.error.noise).sum::<f64>()
        };
        let (a, b) = (noise(&conv, &conv_q), noise(&linear, &linear_q));
        assert!((a - b).abs() < 1e-9 * b, "{recipe}: {a} {b}");
        assert_eq!(noise(&conv_q, &conv_f), 0.0);
        // Quantized again it stays what it is.
        let (again, _) = round_trip(&conv_q, "");
        assert!(matrix(&again, name).1);
    }
    // What the recipe says counts alone.
    let (q, _) = round_trip(&conv, "transposed = []");
    assert!(!matrix(&q, name).1);
    let (q, _) = round_trip(&linear, "transposed = ['*c_fc*']");
    assert!(matrix(&q, name).1);
}

/// A GGUF with one Q8_0 matrix: a scale and 32 signed bytes a block.
fn q8_0(rows: usize, cols: usize) -> Vec<u8> {
    let name = "blk.0.ffn_down.weight";
    let string = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let number = |n: usize| (n as u64).to_le_bytes();
    let mut bytes = [&b"GGUF\x03\0\0\0"[..], &number(1), &number(1)].concat();
    bytes.extend(string("general.architecture"));
    bytes.extend([&8u32.to_le_bytes()[..], &string("llama")].concat());
    bytes.extend([string(name), 2u32.to_le_bytes().to_vec()].concat());
    bytes.extend([number(cols), number(rows)].concat());
    bytes.extend([&8u32.to_le_bytes()[..], &number(0)].concat());
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    let mut random = Random::new(3);
    for block in 0..rows * cols / 32 {
        bytes.extend((0x1c00 + block as u16 % 0x400).to_le_bytes());
        bytes.extend((0..32).map(|_| (random.bits() >> 32) as u8));
    }
    bytes
}

/// Columns begin and end within the blocks of a row.
#[test]
fn blocks_are_transposed_too() {
    let folder = tempfile::tempdir().unwrap();
    let [gguf, plain] = ["a.gguf", "b.safetensors"].map(|name| folder.path().join(name));
    let cols = 1024;
    std::fs::write(&gguf, q8_0(INPUTS, cols)).unwrap();
    let source = Source::open(&gguf).unwrap();
    let name = source.tensors()[0].name.clone();
    let w = read_all(&source, &source.tensors()[0]).unwrap();
    write(&plain, &[(&name, &[INPUTS, cols], &w)]);
    let recipe = "transposed = ['*']\ninclude = ['*']\nexclude = []";
    let [(a, _), (b, _)] = [&gguf, &plain].map(|path| round_trip(path, recipe));
    let name_of = |path: &Path| Source::open(path).unwrap().tensors()[0].name.clone();
    let [a, b] = [a, b].map(|path| matrix(&path, &name_of(&path)));
    assert!(a.1 && a == b);
    let turned = transpose(&w, INPUTS, cols);
    let error = turned
        .iter()
        .zip(a.0.dequantize())
        .map(|(w, v)| (w - v).abs());
    let signs = turned
        .iter()
        .zip(a.0.dequantize())
        .filter(|(w, v)| **w * v < 0.0);
    assert_eq!(signs.count(), 0);
    assert!(error.sum::<f32>() < w.iter().map(|w| w.abs()).sum());
}

/// Absmean with a scale for each row, by its definition.
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

#[test]
fn stacked_experts_have_a_scale_for_each_output_of_each_expert() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    // H, I: few inputs; H = 2·I; H = I, where down is square.
    for (h, i) in [(64, 12), (64, 32), (48, 48)] {
        for transposed in [false, true] {
            let shape = |rows: usize, cols: usize| match transposed {
                true => [3, cols, rows],
                false => [3, rows, cols],
            };
            let w = normal(3 * 2 * i * h);
            let (gate_up, down) = (shape(2 * i, h), shape(h, i));
            let named = [
                ("l.0.experts.gate_up", gate_up, &w[..]),
                ("l.0.experts.down", down, &w[..3 * h * i]),
            ];
            let tensors: Vec<_> = named.iter().map(|(n, s, w)| (*n, &s[..], *w)).collect();
            write(&input, &tensors);
            let (q, f) = round_trip(&input, "");
            for (name, [_, rows, cols], w) in named {
                assert_eq!(matrix(&q, name).1, transposed, "{name} {h} {i}");
                let expected = match transposed {
                    false => absmean(w, cols),
                    true => transpose(&absmean(&transpose(w, rows, cols), rows), cols, rows),
                };
                let (after, got) = floats(&f, name);
                assert_eq!(after, [3, rows, cols]);
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
                assert!(got.iter().zip(&expected).all(near), "{name} {h} {i}");
            }
        }
    }
}

/// The transposed tensors of a folder with this config and these shapes.
fn transposed(config: &str, tensors: &[(&str, &[usize])]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let w = normal(1 << 16);
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(n, s)| (*n, *s, &w[..s.iter().product::<usize>()]))
        .collect();
    write(&folder.path().join("model.safetensors"), &tensors);
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let source = Source::open(folder.path()).unwrap();
    let forms = Forms::new(&source);
    let is = |t: &&bitnet_formats::Tensor| forms.form(t).is_some_and(|form| form.transposed);
    let mut names: Vec<_> = source
        .tensors()
        .iter()
        .filter(is)
        .map(|t| t.name.clone())
        .collect();
    names.sort();
    names
}

#[test]
fn the_evidence_for_an_order() {
    let none: [&str; 0] = [];
    // The width decides where gate, up and down are apart.
    let trio: [(&str, &[usize]); 3] = [
        ("l.0.moe.w1", &[4, 64, 24]),
        ("l.0.moe.w2", &[4, 24, 64]),
        ("l.0.moe.w3", &[4, 64, 24]),
    ];
    let config = |width| format!(r#"{{"hidden_size": {width}, "num_experts": 4}}"#);
    assert_eq!(transposed(&config(64), &trio), trio.map(|t| t.0));
    assert_eq!(transposed(&config(24), &trio), none);
    assert_eq!(transposed(&config(99), &trio), none);
    // As in gpt-oss: a square one goes by its neighbour.
    let square: [(&str, &[usize]); 3] = [
        ("l.0.experts.in_proj", &[4, 64, 96]),
        ("l.0.experts.in_proj_bias", &[4, 96]),
        ("l.0.experts.mid_proj", &[4, 96, 96]),
    ];
    assert_eq!(transposed("{}", &square), [square[0].0, square[2].0]);
    // GPT-2: the bias, for the square one its neighbour, and the family for what has neither.
    let mut gpt2: [(&str, &[usize]); 6] = [
        ("wte.weight", &[100, 64]),
        ("h.0.attn.c_attn.weight", &[64, 192]),
        ("h.0.attn.c_attn.bias", &[192]),
        ("h.0.attn.c_proj.weight", &[64, 64]),
        ("h.0.other.q.weight", &[64, 64]),
        ("score.weight", &[64, 64]),
    ];
    let family = r#"{"model_type": "gpt2"}"#;
    assert_eq!(transposed("{}", &gpt2), [gpt2[1].0, gpt2[3].0]);
    assert_eq!(transposed(family, &gpt2), [gpt2[1].0, gpt2[3].0, gpt2[4].0]);
    // As mlx-lm stores GPT-2: the bias counts more than the family.
    gpt2[1].1 = &[192, 64];
    assert_eq!(transposed(family, &gpt2), none);
}
