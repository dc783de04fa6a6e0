//! Options that do not exist, do not go together or are missing.

mod common;

use common::{Dir, T, f32s, gauss, llama, safetensors};

const QUANTIZE: &[&str] = &["quantize", "in.safetensors", "--out", "out.safetensors"];

/// `quantize in.safetensors --out out.safetensors` with `more` must be refused.
#[track_caller]
fn refused(more: &[&str], parts: &[&str]) {
    Dir::small().refuses(&[QUANTIZE, more].concat(), parts);
}

#[test]
fn unknown_values_are_named_with_those_there_are() {
    for (flag, value, known) in [
        ("--precision", "int5", "int4"),
        ("--threshold", "optimum", "optimal"),
        ("--threshold", "factor:x", "factor:X"),
        ("--scale", "best", "least-squares"),
        ("--granularity", "row", "channel"),
        ("--granularity", "group:0", "group:N"),
        ("--granularity", "group:-1", "group:N"),
        ("--scale-dtype", "f8", "bf16"),
        ("--format", "tflite", "gguf"),
        ("--rounding", "up", "half-up"),
        ("--clip", "all", "search"),
        ("--mapping", "affine", "asymmetric"),
        ("--split", "median", "optimal"),
        ("--linear-class", "linear", "autobitlinear"),
        ("--layout", "three-bits", "base-3"),
    ] {
        refused(&[flag, value], &[value, known]);
    }
}

#[test]
fn numbers_that_are_none() {
    for (flag, value) in [("--threads", "two"), ("--planes", "x"), ("--seed", "0x")] {
        refused(&[flag, value], &[flag, value]);
    }
    refused(&["--threads", "1000000"], &["threads", "1000000", "1024"]);
    for planes in ["0", "4"] {
        refused(&["--planes", planes], &["planes", planes]);
    }
    for threshold in ["factor:-1", "factor:NaN", "factor:inf"] {
        refused(&["--threshold", threshold], &["factor"]);
    }
    for clip in ["rms:0", "rms:-1", "rms:NaN"] {
        refused(&["--precision", "int4", "--clip", clip], &["clip"]);
    }
}

#[test]
fn an_unknown_flag_or_command() {
    refused(&["--presicion", "int4"], &["--presicion"]);
    let dir = Dir::small();
    dir.refuses(&["quantise", "in.safetensors"], &["quantise"]);
    dir.refuses(&["quantize", "in.safetensors"], &["--out"]);
    dir.refuses(&["convert", "in.safetensors"], &["--out"]);
    dir.refuses(&["dequantize", "in.safetensors"], &["--out"]);
    dir.refuses(&["quantize", "--out", "out.safetensors"], &["<IN>"]);
    dir.refuses(&["compare", "in.safetensors"], &["<QUANTIZED>"]);
    dir.refuses(&["verify"], &["<IN>"]);
    dir.refuses(
        &[
            "compare",
            "in.safetensors",
            "in.safetensors",
            "--min-sqnr",
            "many",
        ],
        &["--min-sqnr", "many"],
    );
    dir.refuses(
        &[
            "compare",
            "in.safetensors",
            "in.safetensors",
            "--max-mse",
            "nan",
        ],
        &["--max-mse", "nan"],
    );
    dir.refuses(
        &[
            "convert",
            "in.safetensors",
            "--out",
            "o.safetensors",
            "--i2s-order",
            "i2",
        ],
        &["--i2s-order", "i2_s-g64"],
    );
    dir.refuses(
        &[
            "dequantize",
            "in.safetensors",
            "--out",
            "o.safetensors",
            "--dtype",
            "f64",
        ],
        &["f64", "bf16"],
    );
}

#[test]
fn help_and_version_are_no_errors() {
    let dir = Dir::new();
    for args in [&["--help"][..], &["--version"], &["quantize", "--help"]] {
        let run = dir.run(args);
        run.is(0);
        assert_eq!(run.stderr(), "");
        assert!(
            run.stdout().starts_with("bitnet") || run.stdout().contains("Usage: bitnet"),
            "{}",
            run.stdout()
        );
    }
}

#[test]
fn a_choice_of_another_precision() {
    for (more, name) in [
        (&["--precision", "int4", "--planes", "2"][..], "planes"),
        (
            &["--precision", "binary", "--threshold", "optimal"],
            "threshold",
        ),
        (
            &["--precision", "int8", "--scale", "least-squares"],
            "scale",
        ),
        (&["--split", "mean"], "split"),
        (&["--precision", "int4", "--seed", "1"], "seed"),
        (&["--mapping", "asymmetric"], "mapping"),
        (&["--precision", "binary", "--clip", "search"], "clip"),
        (&["--precision", "f16", "--threshold", "mean"], "threshold"),
    ] {
        refused(more, &[name, "does not apply"]);
    }
}

#[test]
fn floats_with_a_choice_of_quantized_weights() {
    refused(
        &["--precision", "bf16", "--layout", "two-bit"],
        &["layout", "does not apply", "bf16"],
    );
    refused(
        &["--precision", "keep", "--layout", "two-bit"],
        &["layout", "does not apply", "keep"],
    );
}

#[test]
fn a_layout_of_another_precision() {
    refused(
        &["--precision", "int4", "--layout", "base-3"],
        &["in.safetensors", "'a.weight'", "base-3"],
    );
    refused(
        &["--layout", "one-bit"],
        &["in.safetensors", "'a.weight'", "one-bit"],
    );
    refused(
        &["--planes", "2", "--layout", "tq2_0"],
        &["in.safetensors", "'a.weight'", "tq2_0"],
    );
}

#[test]
fn a_layout_that_does_not_divide_the_columns() {
    for (layout, block) in [("tq1_0", "256"), ("tq2_0", "256"), ("q2_0", "64")] {
        let dir = Dir::new();
        dir.write(
            "in.safetensors",
            safetensors(&[gauss("a.weight", &[8, 300], 0.02)]),
        );
        dir.refuses(
            &[QUANTIZE, &["--layout", layout]].concat(),
            &["in.safetensors", "'a.weight'", layout, "300", block],
        );
    }
}

#[test]
fn a_layout_that_carries_its_scales_refuses_others() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[gauss("a.weight", &[8, 512], 0.02)]),
    );
    let args = [
        QUANTIZE,
        &["--layout", "tq2_0", "--granularity", "group:100"],
    ]
    .concat();
    dir.refuses(&args, &["in.safetensors", "'a.weight'", "tq2_0"]);
}

/// The layouts of ggml may stand in a safetensors file; the document says what they are.
#[test]
fn a_ggml_layout_in_safetensors_is_read_again() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[gauss("a.weight", &[8, 512], 0.02)]),
    );
    dir.run(&[QUANTIZE, &["--layout", "tq2_0"]].concat()).is(0);
    dir.run(&["verify", "out.safetensors"]).is(0);
    let inspect = dir.run(&["inspect", "out.safetensors", "--json"]);
    assert_eq!(inspect.is(0).json()["tensors"][0]["stored_as"], "tq2_0");
}

#[test]
fn a_container_that_does_not_hold_it() {
    let dir = Dir::new();
    llama(&dir, "m");
    for (more, parts) in [
        (
            &["--out", "o.gguf", "--layout", "auto"][..],
            &["auto", "safetensors"][..],
        ),
        (
            &["--out", "o.gguf", "--layout", "base-3"],
            &["gguf", "base-3"],
        ),
        (
            &["--out", "o.gguf", "--precision", "int3"],
            &["gguf", "int3"],
        ),
        (
            &["--out", "o", "--format", "hf-bitnet", "--layout", "auto"],
            &["auto", "safetensors"],
        ),
        (
            &["--out", "o", "--format", "hf-bitnet", "--layout", "two-bit"],
            &["hf-bitnet", "two-bit"],
        ),
        (
            &["--out", "o", "--format", "hf-bitnet", "--precision", "int4"],
            &["hf-bitnet", "int4"],
        ),
        (
            &[
                "--out",
                "o",
                "--format",
                "hf-bitnet",
                "--granularity",
                "group:64",
            ],
            &["m/model.safetensors", "q_proj", "hf-bitnet"],
        ),
        (
            &[
                "--out",
                "o",
                "--format",
                "hf-bitnet",
                "--granularity",
                "channel",
            ],
            &["m/model.safetensors", "q_proj", "hf-bitnet"],
        ),
        (
            &["--out", "o", "--linear-class", "bitlinear"],
            &["linear_class", "hf-bitnet"],
        ),
        (
            &["--out", "o.gguf", "--linear-class", "bitlinear"],
            &["linear_class", "hf-bitnet"],
        ),
        (
            &["--out", "o.safetensors", "--format", "hf-bitnet"],
            &["hf-bitnet", ".safetensors"],
        ),
        (
            &["--out", "o.gguf", "--format", "hf-bitnet"],
            &["hf-bitnet", ".gguf"],
        ),
        (
            &["--out", "o.gguf", "--format", "safetensors"],
            &["safetensors", ".gguf"],
        ),
        (
            &["--out", "o.safetensors", "--format", "gguf"],
            &["gguf", ".safetensors"],
        ),
    ] {
        dir.refuses(&[&["quantize", "m"], more].concat(), parts);
    }
}

#[test]
fn a_file_without_config_has_no_folder_and_no_gguf() {
    let dir = Dir::small();
    dir.refuses(
        &["quantize", "in.safetensors", "--out", "o"],
        &["in.safetensors", "config.json"],
    );
    dir.refuses(
        &[
            "quantize",
            "in.safetensors",
            "--out",
            "o",
            "--format",
            "hf-bitnet",
        ],
        &["in.safetensors", "config.json"],
    );
    dir.refuses(
        &["quantize", "in.safetensors", "--out", "o.gguf"],
        &["in.safetensors", "config.json"],
    );
}

#[test]
fn globs_that_match_nothing() {
    for flag in ["--include", "--exclude"] {
        refused(
            &[flag, "*.wieght"],
            &["'*.wieght'", "matches no tensor", "in.safetensors"],
        );
    }
    refused(
        &["--rule", "*.wieght=int8"],
        &["'*.wieght'", "matches no tensor", "in.safetensors"],
    );
    refused(&["--include", "[a"], &["'[a'"]);
    refused(&["--rule", "a.weight"], &["--rule", "GLOB=PRECISION"]);
    refused(&["--rule", "a.weight=int5"], &["--rule", "int5", "int4"]);
    refused(
        &["--exclude", "a.*"],
        &["in.safetensors", "selects no tensor"],
    );
}

#[test]
fn a_rule_for_a_vector_is_refused() {
    refused(
        &["--rule", "norm.weight=int8"],
        &["in.safetensors", "norm.weight"],
    );
    // A cast is possible.
    Dir::small()
        .run(&[QUANTIZE, &["--rule", "norm.weight=f16"]].concat())
        .is(0);
}

#[test]
fn recipes_that_are_none() {
    let dir = Dir::small();
    for (name, text, parts) in [
        (
            "field.toml",
            "[default]\nthreshhold = 'optimal'",
            &["threshhold", "line 2"][..],
        ),
        ("top.toml", "fromat = 'gguf'", &["fromat"]),
        (
            "rule.toml",
            "[[rule]]\nmatch = '*'\nprecison = 'int8'",
            &["precison"],
        ),
        (
            "value.toml",
            "[default]\nprecision = 'int5'",
            &["int5", "int4"],
        ),
        ("version.toml", "version = 2", &["version 2", "expected 1"]),
        ("garbage.toml", "not = [toml", &["line 1"]),
    ] {
        dir.write(name, text);
        dir.refuses(
            &[QUANTIZE, &["--config", name]].concat(),
            &[&[name], parts].concat(),
        );
    }
    dir.refuses(
        &[QUANTIZE, &["--config", "no.toml"]].concat(),
        &["no.toml", "No such file"],
    );
    dir.write("bytes.toml", [0xff, 0xfe]);
    dir.refuses(
        &[QUANTIZE, &["--config", "bytes.toml"]].concat(),
        &["bytes.toml"],
    );
}

#[test]
fn a_recipe_and_flags_over_it() {
    let dir = Dir::small();
    dir.write("r.toml", "[default]\nprecision = 'int4'\nclip = 'search'\n\n[[rule]]\nmatch = 'norm*'\nprecision = 'f16'");
    let run = dir.run(&[QUANTIZE, &["--config", "r.toml", "--json"]].concat());
    let tensors = run.is(0).json()["tensors"].clone();
    assert_eq!(
        (&tensors[0]["became"], &tensors[1]["became"]),
        (&"int4".into(), &"f16".into())
    );
    let run = dir.run(&[
        "quantize",
        "in.safetensors",
        "--out",
        "o2.safetensors",
        "--config",
        "r.toml",
        "--precision",
        "ternary",
        "--json",
    ]);
    assert_eq!(run.is(0).json()["tensors"][0]["became"], "ternary");
}

#[test]
fn an_unknown_instruction_set() {
    let dir = Dir::small();
    let before = dir.files();
    dir.run_with(QUANTIZE, &[("BITNET_ISA", "mmx")])
        .refused(&["mmx", "scalar"]);
    assert!(dir.files() == before);
}

#[test]
fn planes_are_for_ternary_and_cost_what_they_say() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[gauss("a.weight", &[64, 128], 0.02)]),
    );
    let mut sqnr = vec![];
    for planes in ["1", "2", "3"] {
        let out = format!("{planes}.safetensors");
        let run = dir.run(&[
            "quantize",
            "in.safetensors",
            "--out",
            &out,
            "--planes",
            planes,
            "--threshold",
            "optimal",
            "--json",
        ]);
        sqnr.push(run.is(0).json()["tensors"][0]["sqnr_db"].as_f64().unwrap());
    }
    assert!(
        sqnr[0] + 4.0 < sqnr[1] && sqnr[1] + 3.0 < sqnr[2],
        "{sqnr:?}"
    );
}

#[test]
fn empty_tensors_and_one_weight_pass() {
    let dir = Dir::new();
    let tensors = [
        f32s("a.weight", &[0, 16], &[]),
        f32s("b.weight", &[16, 0], &[]),
        f32s("c.weight", &[1, 1], &[0.5]),
    ];
    dir.write("in.safetensors", safetensors(&tensors));
    for (i, more) in [
        &["--granularity", "tensor"][..],
        &["--granularity", "channel"],
        &["--granularity", "group:3"],
        &["--layout", "entropy"],
        &["--layout", "auto"],
        &["--planes", "2"],
        &["--precision", "int4"],
    ]
    .iter()
    .enumerate()
    {
        let out = format!("{i}.safetensors");
        dir.run(&[&["quantize", "in.safetensors", "--out", &out], *more].concat())
            .is(0);
        dir.run(&["verify", &out]).is(0);
        dir.run(&["inspect", &out, "--json"]).is(0).json();
        dir.run(&["dequantize", &out, "--out", "f.safetensors", "--force"])
            .is(0);
    }
}

#[test]
fn a_scale_too_large_for_its_type_is_an_error() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[f32s("a.weight", &[2, 2], &[1e30, -1e30, 1e30, 1e30])]),
    );
    dir.refuses(
        &[QUANTIZE, &["--scale-dtype", "f16"]].concat(),
        &["in.safetensors", "'a.weight'", "f16"],
    );
    dir.run(QUANTIZE).is(0);
}

#[test]
fn types_of_weights_that_are_read() {
    let dir = Dir::new();
    let f16: Vec<u8> = [0x3c00u16, 0xbc00, 0, 0x3c00]
        .iter()
        .flat_map(|b| b.to_le_bytes())
        .collect();
    let bf16: Vec<u8> = [0x3f80u16, 0xbf80, 0, 0x3f80]
        .iter()
        .flat_map(|b| b.to_le_bytes())
        .collect();
    let f64: Vec<u8> = [1.0f64, -1.0, 0.0, 1.0]
        .iter()
        .flat_map(|b| b.to_le_bytes())
        .collect();
    let tensors = [
        ("a.weight", "F16", f16),
        ("b.weight", "BF16", bf16),
        ("c.weight", "F64", f64),
    ];
    dir.write(
        "in.safetensors",
        safetensors(&tensors.map(|(name, dtype, data)| T(name, dtype, vec![2, 2], data))),
    );
    dir.run(QUANTIZE).is(0);
    let compare = dir.run(&["compare", "in.safetensors", "out.safetensors", "--json"]);
    assert_eq!(compare.is(0).json()["all"]["exact"], true);
}
