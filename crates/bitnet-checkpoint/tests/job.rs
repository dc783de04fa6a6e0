//! The streamed job gives what the in-memory quantizer gives, and the same bytes however it runs.

use bitnet_checkpoint::job::{self, Existing, Options, Summary};
use bitnet_checkpoint::{Job, Recipe, Source};
use bitnet_core::ops::Scalar;
use bitnet_core::quantize::quantize;
use bitnet_core::random::Random;
use bitnet_core::scheme::Threshold;
use bitnet_core::stats::ErrorStats;
use bitnet_core::{Granularity, Matrix, Scheme};
use bitnet_formats::Content;
use bitnet_kernels::Kernels;
use std::fs;
use std::path::Path;

/// Rows and columns: several strips of 2^18 weights, the last one short, and columns that no block
/// divides.
const SHAPE: (usize, usize) = (1500, 701);

fn weights() -> Vec<f32> {
    let mut random = Random::new(7);
    (0..SHAPE.0 * SHAPE.1)
        .map(|_| {
            let u = ((random.bits() >> 40) as f32 + 0.5) / (1u64 << 24) as f32;
            // Heavier tails than normal.
            (u / (1.0 - u)).ln() * 0.02
        })
        .collect()
}

fn write(path: &Path, w: &[f32]) {
    let header = format!(
        r#"{{"a.weight":{{"dtype":"F32","shape":[{},{}],"data_offsets":[0,{}]}}}}"#,
        SHAPE.0,
        SHAPE.1,
        w.len() * 4
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(w.iter().flat_map(|w| w.to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

fn run(source: &Source, recipe: &str, out: &Path, threads: usize) -> Summary {
    let recipe = Recipe::from_toml(recipe).unwrap();
    let plan = Job::quantize(source, &recipe, out).unwrap();
    let options = Options {
        threads,
        kernels: Kernels::detect(),
        progress: &(),
        interrupt: &Default::default(),
        existing: Existing::Refuse,
    };
    job::run(&plan, out, &options).unwrap()
}

fn read(path: &Path) -> Matrix {
    let source = Source::open(path).unwrap();
    let tensor = source.find("a.weight").unwrap();
    let Content::Quantized(q) = &tensor.content else {
        panic!("not quantized")
    };
    source.matrix("a.weight", q).unwrap()
}

#[test]
fn strips_give_what_the_whole_matrix_gives() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    let w = weights();
    write(&input, &w);
    let source = Source::open(&input).unwrap();
    for granularity in [
        Granularity::Tensor,
        Granularity::Channel,
        Granularity::Group(100),
    ] {
        for &threshold in Threshold::PLAIN {
            let out = folder
                .path()
                .join(format!("{threshold}-{granularity}.safetensors"));
            let summary = run(
                &source,
                &format!("default = {{threshold = '{threshold}', granularity = '{granularity}'}}"),
                &out,
                2,
            );
            let (got, scheme) = (
                read(&out),
                Scheme::ternary(threshold).with_granularity(granularity),
            );
            let expected = quantize(&Scalar, &w, SHAPE.0, SHAPE.1, &scheme, None).unwrap();
            // Sums over strips are joined in another order than sums over the whole: a scale may
            // differ in its last bit, and with it the code of a weight that lies on the edge.
            let differing = got
                .values
                .iter()
                .zip(&expected.values)
                .filter(|(a, b)| a != b)
                .count();
            let allowed = if granularity == Granularity::Tensor {
                2
            } else {
                0
            };
            assert!(
                differing <= allowed,
                "{threshold} {granularity}: {differing} codes differ"
            );
            for (a, b) in got.scales.iter().zip(&expected.scales) {
                assert!(
                    (a - b).abs() <= b.abs() * 1e-6,
                    "{threshold} {granularity}: scales {a} {b}"
                );
            }
            let measured = ErrorStats::measure(&w, &got.dequantize());
            let reported = summary.tensors[0].error.unwrap();
            assert!(
                (measured.sqnr_db() - reported.sqnr_db()).abs() < 1e-9,
                "{threshold} {granularity}"
            );
            assert_eq!(
                (measured.zeros, measured.sign_flips),
                (reported.zeros, reported.sign_flips)
            );
        }
    }
}

#[test]
fn planes_binary_and_integers_stream_too() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    let w = weights();
    write(&input, &w);
    let source = Source::open(&input).unwrap();
    for (i, recipe) in [
        "default = {planes = 2, granularity = 'channel', layout = 'entropy'}",
        "default = {planes = 3, granularity = 'group:100', scale_dtype = 'f16'}",
        "default = {precision = 'binary', split = 'mean'}",
        "default = {precision = 'binary', seed = 5, granularity = 'tensor'}",
        "default = {precision = 'int4', mapping = 'asymmetric', clip = 'search', granularity = 'group:32'}",
        "default = {precision = 'int3', granularity = 'tensor', clip = 'rms:2.5'}",
        "default = {precision = 'int8', layout = 'auto'}",
    ]
    .iter()
    .enumerate()
    {
        let out = folder.path().join(format!("{i}.safetensors"));
        run(&source, recipe, &out, 2);
        let got = read(&out);
        let document = Source::open(&out).unwrap().document().cloned().unwrap();
        let scheme = document.tensors["a.weight"].scheme.unwrap();
        let expected = quantize(&Scalar, &w, SHAPE.0, SHAPE.1, &scheme, None).unwrap();
        if scheme.granularity == Granularity::Tensor {
            let differing = got.values.iter().zip(&expected.values).filter(|(a, b)| a != b).count();
            assert!(differing <= 2, "{recipe}: {differing} codes differ");
        } else {
            assert_eq!(got, expected, "{recipe}");
        }
    }
}

#[test]
fn one_and_two_threads_write_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    write(&input, &weights());
    let source = Source::open(&input).unwrap();
    for recipe in [
        "default = {threshold = 'optimal', granularity = 'tensor'}",
        "default = {threshold = 'median', granularity = 'tensor', layout = 'auto'}",
        "default = {planes = 2, granularity = 'tensor'}",
        "default = {layout = 'entropy'}",
        "default = {precision = 'int4', clip = 'search', granularity = 'tensor'}",
    ] {
        let bytes: Vec<Vec<u8>> = [1, 2, 1, 2, 3]
            .iter()
            .enumerate()
            .map(|(i, &threads)| {
                let out = folder.path().join(format!("{i}.safetensors"));
                run(&source, recipe, &out, threads);
                let bytes = fs::read(&out).unwrap();
                fs::remove_file(&out).unwrap();
                bytes
            })
            .collect();
        assert!(bytes.iter().all(|b| *b == bytes[0]), "{recipe}");
    }
}
