//! Mixed precision, presets and calibration on the command line.

mod common;

use bitnet_checkpoint::calibration::Calibration;
use common::{Dir, gauss, llama, normal, safetensors};
use serde_json::Value;
use std::collections::BTreeSet;

/// Three layers, of which the second is ten times as strong.
fn three() -> Dir {
    let dir = Dir::new();
    let tensors = [
        gauss("a.weight", &[32, 256], 0.02),
        gauss("bb.weight", &[64, 256], 0.2),
        gauss("ccc.weight", &[32, 512], 0.02),
    ];
    dir.write("in.safetensors", safetensors(&tensors));
    dir
}

fn quantize(dir: &Dir, out: &str, more: &[&str]) -> Value {
    let run = dir.run(
        &[
            &["quantize", "in.safetensors", "--out", out, "--json"],
            more,
        ]
        .concat(),
    );
    run.is(0);
    run.json()
}

/// Σ (w − ŵ)² of all layers, from the SQNR.
fn bits_and_sqnr(report: &Value) -> (f64, f64) {
    (
        report["totals"]["quantized_bits_per_weight"]
            .as_f64()
            .unwrap(),
        report["totals"]["sqnr_db"].as_f64().unwrap(),
    )
}

#[test]
fn a_budget_is_kept_and_used_better_than_by_any_one_setting() {
    let dir = three();
    for target in ["1.2", "2.5", "3.3", "5"] {
        let (bits, sqnr) = bits_and_sqnr(&quantize(
            &dir,
            &format!("{target}.safetensors"),
            &["--target-bpw", target],
        ));
        let budget: f64 = target.parse().unwrap();
        assert!(bits <= budget, "{bits} {target}");
        for (i, setting) in [
            "binary",
            "ternary --threshold optimal",
            "int3 --clip search",
            "int4 --clip search",
        ]
        .iter()
        .enumerate()
        {
            for granularity in ["channel", "group:64"] {
                let flags: Vec<&str> = [
                    "--granularity",
                    granularity,
                    "--scale-dtype",
                    "f16",
                    "--precision",
                ]
                .into_iter()
                .chain(setting.split(' '))
                .collect();
                let uniform = bits_and_sqnr(&quantize(
                    &dir,
                    &format!("{target}-{i}-{granularity}.safetensors"),
                    &flags,
                ));
                assert!(
                    uniform.0 > budget || uniform.1 <= sqnr + 1e-9,
                    "{target}: {setting} {granularity} {uniform:?}, mixed {bits} {sqnr}"
                );
            }
        }
    }
    dir.run(&["verify", "2.5.safetensors"]).is(0);
    // What was chosen is in the file, as rules of a recipe that makes the same file again.
    let report = quantize(&dir, "again.safetensors", &["--target-bpw", "2.5"]);
    assert!(
        report["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["became"].to_string())
            .collect::<BTreeSet<_>>()
            .len()
            > 1
    );
    assert_eq!(dir.read("again.safetensors"), dir.read("2.5.safetensors"));
}

#[test]
fn a_quality_is_reached_by_each_tensor_in_few_bytes() {
    let dir = three();
    let (bits, _) = bits_and_sqnr(&quantize(&dir, "out.safetensors", &["--min-sqnr", "12"]));
    assert!(bits < 4.0, "{bits}");
    dir.run(&[
        "compare",
        "in.safetensors",
        "out.safetensors",
        "--min-sqnr",
        "12",
    ])
    .is(0);
    dir.run(&[
        "compare",
        "in.safetensors",
        "out.safetensors",
        "--min-sqnr",
        "25",
    ])
    .is(1);
    // Both: the budget beyond what the quality needs goes where it helps most.
    let (both, sqnr) = bits_and_sqnr(&quantize(
        &dir,
        "both.safetensors",
        &["--min-sqnr", "12", "--target-bpw", "5"],
    ));
    assert!(bits < both && both <= 5.0 && sqnr > 20.0, "{both} {sqnr}");
    dir.run(&[
        "compare",
        "in.safetensors",
        "both.safetensors",
        "--min-sqnr",
        "12",
    ])
    .is(0);
}

#[test]
fn rules_stay_and_count() {
    let dir = three();
    let report = quantize(
        &dir,
        "out.safetensors",
        &[
            "--target-bpw",
            "4",
            "--rule",
            "a.*=int8",
            "--granularity",
            "group:64",
        ],
    );
    assert!(bits_and_sqnr(&report).0 <= 4.0);
    assert_eq!(report["tensors"][0]["became"], "int8");
    assert!(
        report["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .all(|t| t["granularity"] == "group:64")
    );
}

#[test]
fn gguf_has_its_own_settings() {
    let dir = Dir::new();
    llama(&dir, "model");
    let run = dir.run(&[
        "quantize",
        "model",
        "--out",
        "out.gguf",
        "--target-bpw",
        "3.5",
        "--json",
    ]);
    run.is(0);
    assert!(bits_and_sqnr(&run.json()).0 <= 3.5);
}

#[test]
fn goals_that_cannot_be() {
    let dir = three();
    let quantize = |more: &[&'static str]| {
        [
            &["quantize", "in.safetensors", "--out", "out.safetensors"],
            more,
        ]
        .concat()
    };
    dir.refuses(
        &quantize(&["--target-bpw", "0.5"]),
        &["target_bpw 0.5", "1.0"],
    );
    dir.refuses(&quantize(&["--min-sqnr", "90"]), &["min_sqnr 90"]);
    dir.refuses(
        &quantize(&["--target-bpw", "1.5", "--min-sqnr", "30"]),
        &["budget"],
    );
    for bad in ["0", "-1", "NaN", "inf"] {
        dir.refuses(&quantize(&["--target-bpw", bad]), &[]);
    }
    dir.refuses(
        &quantize(&["--target-bpw", "3", "--precision", "int4"]),
        &["default.precision"],
    );
    dir.refuses(
        &quantize(&["--target-bpw", "3", "--threads", "1000000"]),
        &["1024", "1000000"],
    );
    dir.write("out.safetensors", "something");
    dir.refuses(&quantize(&["--target-bpw", "3"]), &["exists"]);
}

#[test]
fn presets_and_configurations_are_the_same_type() {
    let dir = three();
    let mut sizes = BTreeSet::new();
    for preset in [
        "bitnet",
        "performance",
        "accuracy",
        "memory",
        "balanced",
        "bonsai",
    ] {
        let report = quantize(
            &dir,
            &format!("{preset}.safetensors"),
            &["--preset", preset],
        );
        sizes.insert(report["totals"]["quantized_bits_per_weight"].to_string());
        let config = preset
            .parse::<bitnet_checkpoint::recipe::Preset>()
            .unwrap()
            .build()
            .unwrap();
        dir.write("c.toml", config.to_toml().unwrap())
            .write("c.json", config.to_json().unwrap());
        for file in ["c.toml", "c.json"] {
            quantize(&dir, "same.safetensors", &["--config", file, "--force"]);
            assert!(
                dir.read("same.safetensors") == dir.read(&format!("{preset}.safetensors")),
                "{preset} {file}"
            );
        }
    }
    assert_eq!(sizes.len(), 6, "{sizes:?}");
    let refused = |more: &[&'static str], parts: &[&str]| {
        dir.refuses(
            &[
                &["quantize", "in.safetensors", "--out", "out.safetensors"],
                more,
            ]
            .concat(),
            parts,
        );
    };
    refused(&["--preset", "fast"], &["fast", "balanced"]);
    refused(&["--preset", "memory", "--config", "c.toml"], &["--preset"]);
    // What a configuration says of the machine changes no byte.
    dir.write("machine.toml", "[compute]\nthreads = 1\nisa = 'scalar'\n");
    quantize(&dir, "machine.safetensors", &["--config", "machine.toml"]);
    quantize(&dir, "plain.safetensors", &[]);
    assert!(dir.read("machine.safetensors") == dir.read("plain.safetensors"));
    dir.write("machine.toml", "[compute]\nisa = 'mmx'\n");
    refused(&["--config", "machine.toml"], &["mmx"]);
}

#[test]
fn a_calibration_weighs_the_errors() {
    let dir = three();
    // In the first layer only the even channels carry anything.
    let mut calibration = Calibration::default();
    for (name, k) in [("a.weight", 256), ("bb.weight", 256), ("ccc.weight", 512)] {
        let mut x = normal(3, 20 * k, 1.0);
        if name == "a.weight" {
            x.iter_mut().skip(1).step_by(2).for_each(|x| *x = 0.0);
        }
        calibration.observe(name, k, &x).unwrap();
    }
    calibration.save(&dir.at("calibration.json")).unwrap();
    let flags = ["--threshold", "optimal", "--granularity", "group:32"];
    quantize(&dir, "plain.safetensors", &flags);
    quantize(
        &dir,
        "weighed.safetensors",
        &[&flags[..], &["--calibration", "calibration.json"]].concat(),
    );
    let source = bitnet_formats::Source::open(&dir.at("in.safetensors")).unwrap();
    let weights = {
        let (mut bytes, mut out) = (vec![], vec![0.0; 32 * 256]);
        let first = source.stored_ids().next().unwrap();
        source
            .read_floats(first, 0..32 * 256, &mut bytes, &mut out)
            .unwrap();
        out
    };
    let error = |file: &str| -> f64 {
        let source = bitnet_formats::Source::open(&dir.at(file)).unwrap();
        let tensor = source.find("a.weight").unwrap();
        let bitnet_formats::Content::Quantized(q) = &tensor.content else {
            panic!("{file}")
        };
        let back = source.matrix("a.weight", q).unwrap().dequantize();
        weights
            .iter()
            .zip(&back)
            .step_by(2)
            .map(|(w, v)| f64::from(w - v).powi(2))
            .sum()
    };
    assert!(error("weighed.safetensors") < 0.97 * error("plain.safetensors"));
    // The search spends less on a layer of which half does not matter.
    let mixed = quantize(
        &dir,
        "mixed.safetensors",
        &["--target-bpw", "3", "--calibration", "calibration.json"],
    );
    assert!(bits_and_sqnr(&mixed).0 <= 3.0);

    let refused = |more: &[&'static str], parts: &[&str]| {
        dir.refuses(
            &[
                &[
                    "quantize",
                    "in.safetensors",
                    "--out",
                    "out.safetensors",
                    "--threshold",
                    "optimal",
                ],
                more,
            ]
            .concat(),
            parts,
        );
    };
    refused(&["--calibration", "absent.json"], &["absent.json"]);
    let mut partial = calibration.clone();
    partial.layers.remove("bb.weight");
    partial.save(&dir.at("partial.json")).unwrap();
    dir.refuses(
        &[
            "quantize",
            "in.safetensors",
            "--out",
            "out.safetensors",
            "--target-bpw",
            "3",
            "--calibration",
            "partial.json",
        ],
        &["bb.weight"],
    );
    let mut other = Calibration::default();
    other.observe("a.weight", 8, &[1.0; 8]).unwrap();
    other.save(&dir.at("other.json")).unwrap();
    refused(&["--calibration", "other.json"], &["a.weight", "256", "8"]);
    let mut foreign = Calibration::default();
    foreign.observe("z.weight", 8, &[1.0; 8]).unwrap();
    foreign.save(&dir.at("foreign.json")).unwrap();
    refused(&["--calibration", "foreign.json"], &["no tensor"]);
}
