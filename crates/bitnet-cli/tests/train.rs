//! `bitnet train`: small runs from beginning to end, killed ones, and bad input.
#![cfg(feature = "train")]

mod common;

use common::{Dir, on_a_small_disk, random};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A folder `images` of 8 × 8 pixels in four classes: which quarter is bright.
fn images(dir: &Dir) {
    for (part, count) in [("train", 512usize), ("t10k", 128)] {
        let mut next = random(count as u64);
        let (mut pixels, mut labels) = (vec![], vec![]);
        for _ in 0..count {
            let class = (next() >> 33) % 4;
            labels.push(class as u8);
            for y in 0..8 {
                for x in 0..8 {
                    let bright = (y / 4) * 2 + x / 4 == class;
                    pixels.push(((next() >> 40) % 150) as u8 + if bright { 60 } else { 0 });
                }
            }
        }
        let n = (count as u32).to_be_bytes();
        let size = 8u32.to_be_bytes();
        dir.write(
            &format!("images/{part}-images-idx3-ubyte"),
            [&[0, 0, 8, 3], &n[..], &size, &size, &pixels].concat(),
        );
        dir.write(
            &format!("images/{part}-labels-idx1-ubyte"),
            [&[0, 0, 8, 1], &n[..], &labels].concat(),
        );
    }
}

/// text.txt: sentences of a few words in random order.
fn text(dir: &Dir) {
    let words = [
        "the ",
        "cat ",
        "sat ",
        "on ",
        "a ",
        "mat ",
        "and ",
        "saw ",
        "the dog. ",
        "it ran away. ",
    ];
    let mut next = random(5);
    let text: String = (0..4000)
        .map(|_| words[((next() >> 33) % 10) as usize])
        .collect();
    dir.write("text.txt", text);
}

const IMAGE: [&str; 14] = [
    "train",
    "image",
    "--data",
    "images",
    "--classes",
    "4",
    "--sizes",
    "16",
    "--batch",
    "32",
    "--learning-rate",
    "0.01",
    "--quiet",
    "--json",
];
const LM: [&str; 24] = [
    "train",
    "lm",
    "--text",
    "text.txt",
    "--context",
    "16",
    "--hidden",
    "16",
    "--ffn",
    "24",
    "--layers",
    "2",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--batch",
    "8",
    "--learning-rate",
    "0.01",
    "--quiet",
    "--json",
    "--held-out",
    "0.2",
];

/// Arguments, of which those of `more` count where both have a flag.
fn with<'a>(base: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    let mut args: Vec<&str> = vec![];
    let mut at = 0;
    while at < base.len() {
        let replaced = base[at].starts_with("--") && more.contains(&base[at]);
        if !replaced {
            args.push(base[at]);
        }
        at += if replaced { 2 } else { 1 };
    }
    [&args, more].concat()
}

fn number(report: &Value, key: &str) -> f64 {
    report[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} in {report}"))
}

#[test]
fn images_from_files_to_a_packed_folder() {
    let dir = Dir::new();
    images(&dir);
    // An empty folder is used as if it were not there.
    std::fs::create_dir(dir.at("run")).unwrap();
    let args = with(
        &IMAGE,
        &[
            "--steps",
            "120",
            "--out",
            "run",
            "--teacher",
            "self",
            "--telemetry",
            "40",
        ],
    );
    let run = dir.run(&args);
    let report = run.is(0).json();
    for key in ["full", "qat"] {
        // A guess is wrong three times of four.
        assert!(number(&report, key) < 0.1, "{report}");
    }
    assert_eq!(
        report["qat"], report["qat_in_training"],
        "integers give the classes that training saw: {report}"
    );
    assert!(
        number(&report, "packed_bits") < 3.0 && report["steps"] == 120,
        "{report}"
    );
    for file in [
        "run.toml",
        "report.json",
        "full/model.safetensors",
        "latent/config.json",
        "packed/model.safetensors",
        "telemetry-quantized.jsonl",
        "training.svg",
        "training.png",
    ] {
        assert!(dir.at("run").join(file).exists(), "{file}");
    }
    assert!(
        !dir.at("run/ptq").exists()
            && !dir.at("run/rounded").exists()
            && !dir.at("run/rehearsal").exists()
    );
    let inspected = dir.run(&["inspect", "run/packed", "--json"]);
    inspected.is(0);
    // Done is done: the same run says the same again, and nobody else's.
    let again = dir.run(&with(&args, &["--resume"]));
    assert_eq!(again.is(0).json(), report);
    dir.refuses(&args, &["run exists already", "--resume"]);
    dir.refuses(
        &with(&args, &["--resume", "--seed", "3"]),
        &["run.toml", "seed = 0", "seed = 3"],
    );
}

#[test]
fn a_cnn_keeps_its_first_layer() {
    let dir = Dir::new();
    images(&dir);
    let args = with(
        &IMAGE,
        &[
            "--steps",
            "40",
            "--out",
            "run",
            "--network",
            "cnn",
            "--sizes",
            "4,8",
            "--no-twin",
            "--estimator",
            "lsq",
            "--granularity",
            "channel",
        ],
    );
    let report = dir.run(&args).is(0).json();
    assert!(
        report.get("full").is_none() && report["qat"] == report["qat_in_training"],
        "{report}"
    );
    let tensors = dir.run(&["inspect", "run/packed", "--json"]).is(0).json()["tensors"].to_string();
    assert!(tensors.contains("conv.0.weight"), "{tensors}");
    assert!(
        dir.run(&["inspect", "run/packed"])
            .is(0)
            .stdout()
            .lines()
            .any(|l| l.contains("conv.1.weight") && l.contains("ternary"))
    );
    assert!(
        dir.run(&["inspect", "run/packed"])
            .stdout()
            .lines()
            .any(|l| l.contains("conv.0.weight") && !l.contains("ternary"))
    );
}

#[test]
fn text_to_a_packed_model_that_the_engine_runs() {
    let dir = Dir::new();
    text(&dir);
    let report = dir
        .run(&with(
            &LM,
            &[
                "--steps",
                "300",
                "--hidden",
                "32",
                "--ffn",
                "48",
                "--out",
                "run",
                "--teacher",
                "self",
            ],
        ))
        .is(0)
        .json();
    let (full, ptq, qat) = (
        number(&report, "full"),
        number(&report, "ptq"),
        number(&report, "qat"),
    );
    // ln 256 = 5.5; the words leave about one nat a letter.
    assert!(full < 2.0 && qat < 2.3 && qat < ptq, "{report}");
    // f32 sums in another order, and here and there an activation on the edge between two integers.
    assert!(
        (qat - number(&report, "qat_in_training")).abs() < 2e-3,
        "{report}"
    );
    // The latent weights, made ternary on the way, are the packed model.
    let perplexity = |path: &str, more: &[&str]| {
        let args = [
            &[
                "perplexity",
                path,
                "--text",
                "text.txt",
                "--context",
                "16",
                "--json",
                "--quiet",
                "--cache",
                "f32",
            ],
            more,
        ]
        .concat();
        number(&dir.run(&args).is(0).json()["model"], "perplexity")
    };
    let (packed, latent) = (perplexity("run/packed", &[]), perplexity("run/latent", &[]));
    assert!(
        (packed / latent - 1.0).abs() < 2e-3,
        "{packed} and {latent}"
    );
    let said = dir
        .run(&[
            "run",
            "run/packed",
            "--prompt",
            "the cat ",
            "-n",
            "12",
            "--json",
        ])
        .is(0)
        .json();
    assert!(!said["text"].as_str().unwrap().is_empty());
}

/// Lines of a log with an evaluation: step and value.
fn evaluations(dir: &Dir, log: &str) -> Vec<(u64, f64)> {
    let log = String::from_utf8(dir.read(log)).unwrap();
    let lines = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["kind"] == "evaluation")
        .map(|line| (line["step"].as_u64().unwrap(), number(&line, "value")))
        .collect()
}

#[test]
fn early_stopping_packs_the_best_weights() {
    let dir = Dir::new();
    images(&dir);
    let more = [
        "--steps",
        "400",
        "--learning-rate",
        "0.05",
        "--evaluate-every",
        "5",
        "--patience",
        "3",
        "--keep",
        "1",
        "--out",
        "run",
    ];
    let args = with(&IMAGE, &more);
    let report = dir.run(&args).is(0).json();
    let seen = evaluations(&dir, "run/telemetry-quantized.jsonl");
    let best = *seen
        .iter()
        .min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)))
        .unwrap();
    let last = *seen.last().unwrap();
    assert_eq!(
        last.0,
        best.0 + 3 * 5,
        "three without improvement: {seen:?}"
    );
    assert!(last.0 < 400, "{seen:?}");
    assert_eq!(
        (
            report["qat_step"].as_u64(),
            number(&report, "qat_in_training")
        ),
        (Some(best.0), best.1),
        "{report}"
    );
    assert_eq!(report["qat"], report["qat_in_training"], "{report}");
    let folders = std::fs::read_dir(dir.at("run/checkpoints/quantized")).unwrap();
    let mut names: Vec<String> = folders
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [best.0, last.0].map(|step| format!("step-{step:09}"))
    );
    // The floats that were packed are those of that step, name by name, behind headers of their
    // own.
    let data = |file: &str| {
        let bytes = dir.read(file);
        bytes[8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize..].to_vec()
    };
    let of = |name: &str| {
        data(&format!(
            "run/checkpoints/quantized/{name}/model.safetensors"
        ))
    };
    assert!(
        data("run/latent/model.safetensors") == of(&names[0]) && of(&names[0]) != of(&names[1])
    );
    assert_eq!(dir.run(&with(&args, &["--resume"])).is(0).json(), report);
    let said = dir
        .run(&with(
            &args
                .iter()
                .copied()
                .filter(|a| *a != "--json")
                .collect::<Vec<_>>(),
            &["--resume"],
        ))
        .is(0)
        .stdout();
    assert!(
        said.contains(&format!("after step {}, the best evaluation", best.0)),
        "{said}"
    );
}

#[test]
fn stages_strength_and_a_dead_zone_bias_by_flags() {
    let dir = Dir::new();
    images(&dir);
    let flags = [
        "--initial-bits",
        "8",
        "--strength-warmup",
        "20",
        "--dead-zone-bias",
        "0.01",
        "--telemetry",
        "1",
    ];
    let report = dir
        .run(&with(
            &IMAGE,
            &[&flags[..], &["--steps", "90", "--no-twin", "--out", "run"]].concat(),
        ))
        .is(0)
        .json();
    // The bias of the dead zone is in the packed file.
    assert_eq!(report["qat"], report["qat_in_training"], "{report}");
    let own = String::from_utf8(dir.read("run/run.toml")).unwrap();
    assert!(
        own.contains("dead_zone_bias = 0.01")
            && own.contains("warmup = 20")
            && own.contains("[15, { bits = 4 }]"),
        "{own}"
    );
    let log = String::from_utf8(dir.read("run/telemetry-quantized.jsonl")).unwrap();
    let records: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|l: &Value| l["kind"] == "layer")
        .collect();
    // At step 1 nothing counts yet, at step 12 a half; eight bits have few zeros, trits many.
    let at = |step: u64| records.iter().find(|r| r["step"] == step).unwrap();
    assert_eq!(
        (
            number(at(1), "lambda"),
            number(at(11), "lambda"),
            number(at(30), "lambda")
        ),
        (0.0, 0.5, 1.0)
    );
    assert!(
        number(at(10), "dead_zone") < 0.1 && number(at(60), "dead_zone") > 0.1,
        "{} {}",
        at(10),
        at(60)
    );
}

/// Learned scales of integers, and the four levels around 0 that are stretched, reach the file as
/// they were learned.
#[test]
fn learned_scales_of_integers_are_packed() {
    let dir = Dir::new();
    images(&dir);
    for (i, (estimator, precision, format, became)) in [
        ("lsq", "int4", "safetensors", "int4"),
        ("lsq", "int2", "safetensors", "int2"),
        ("stretched", "int2", "safetensors", "int3"),
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("run{i}");
        let flags = [
            "--estimator",
            estimator,
            "--precision",
            precision,
            "--granularity",
            "channel",
            "--format",
            format,
            "--no-twin",
        ];
        let report = dir
            .run(&with(
                &IMAGE,
                &[&flags[..], &["--steps", "60", "--out", &out]].concat(),
            ))
            .is(0)
            .json();
        // The same integers: the same classes.
        assert_eq!(
            report["qat"], report["qat_in_training"],
            "{estimator} {precision}: {report}"
        );
        assert!(number(&report, "qat") < 0.3, "{report}");
        let tensors = dir
            .run(&["inspect", &format!("{out}/packed")])
            .is(0)
            .stdout();
        assert_eq!(
            tensors
                .lines()
                .filter(|l| l.contains("layers.") && l.contains(became))
                .count(),
            2,
            "{tensors}"
        );
        dir.run(&["verify", &format!("{out}/packed")]).is(0);
    }
}

/// The disk is full in the middle: one line, and a run that goes on elsewhere from what was
/// written.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_the_checkpoints_before() {
    let dir = Dir::new();
    images(&dir);
    let args = |out| {
        with(
            &IMAGE,
            &[
                "--steps",
                "60",
                "--every",
                "1",
                "--keep",
                "0",
                "--no-twin",
                "--out",
                out,
            ],
        )
    };
    dir.run(&args("whole")).is(0);
    let after = "cp -r disk/run saved && ls saved/checkpoints/quantized";
    let Some((status, out, err)) =
        on_a_small_disk(&dir, "400k", ["true", after], &args("disk/run"))
    else {
        return;
    };
    assert_eq!(status, 2, "{err}");
    assert!(
        err.starts_with("error: ")
            && err.lines().count() == 1
            && err.contains("No space left")
            && err.contains("disk/run"),
        "{err}"
    );
    let steps: Vec<&str> = out.lines().collect();
    assert!(
        steps.len() > 2
            && steps.len() < 60
            && steps
                .iter()
                .all(|name| name.len() == "step-000000001".len()),
        "{out}"
    );
    let mut going_on = args("saved");
    going_on.push("--resume");
    dir.run(&going_on).is(0);
    for file in ["latent/model.safetensors", "packed/model.safetensors"] {
        assert!(
            dir.read(&format!("saved/{file}")) == dir.read(&format!("whole/{file}")),
            "{file}"
        );
    }
    for name in steps {
        let file = format!("checkpoints/quantized/{name}/model.safetensors");
        assert!(
            dir.read(&format!("saved/{file}")) == dir.read(&format!("whole/{file}")),
            "{file}"
        );
    }
}

#[test]
fn gguf_holds_what_was_trained() {
    let dir = Dir::new();
    text(&dir);
    let shape = [
        "--hidden",
        "256",
        "--ffn",
        "256",
        "--layers",
        "1",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--batch",
        "2",
    ];
    let report = dir
        .run(&with(
            &LM,
            &[
                &shape[..],
                &[
                    "--steps",
                    "6",
                    "--no-twin",
                    "--format",
                    "gguf",
                    "--out",
                    "run",
                ],
            ]
            .concat(),
        ))
        .is(0)
        .json();
    // Measured by the engine, which opened the file; its scales have 11 bits.
    assert!(
        (number(&report, "qat") - number(&report, "qat_in_training")).abs() < 5e-3,
        "{report}"
    );
    assert!(
        report["packed"].as_str().unwrap().ends_with("packed.gguf")
            && number(&report, "packed_bits") < 2.2,
        "{report}"
    );
    let tensors = dir.run(&["inspect", "run/packed.gguf"]).is(0).stdout();
    assert_eq!(
        tensors
            .lines()
            .filter(|line| line.contains("blk.0.") && line.contains("ternary"))
            .count(),
        7,
        "{tensors}"
    );
    dir.run(&["verify", "run/packed.gguf"]).is(0);
    // Bytes have no tokenizer in GGUF.
    let args = ["run", "run/packed.gguf", "--prompt", "the cat "];
    dir.run(&args).refused(&["packed.gguf", "tokenizer"]);
}

#[test]
fn other_containers_hold_the_same_model() {
    let dir = Dir::new();
    text(&dir);
    let mut losses = vec![];
    // 16 and 24 rows are multiples of 4, as hf-bitnet needs; blocks of GGUF need 256 columns, so
    // that these stay in floats there.
    for (format, out) in [("safetensors", "a"), ("hf-bitnet", "b")] {
        let report = dir
            .run(&with(
                &LM,
                &[
                    "--steps",
                    "20",
                    "--out",
                    out,
                    "--format",
                    format,
                    "--no-twin",
                ],
            ))
            .is(0)
            .json();
        losses.push(number(&report, "qat"));
    }
    assert!((losses[0] - losses[1]).abs() < 1e-5, "{losses:?}");
}

#[test]
fn fine_tuning_begins_where_the_model_is() {
    let dir = Dir::new();
    let assets = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/glassllm-en");
    for entry in std::fs::read_dir(assets).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        dir.write(
            &format!("model/{name}"),
            std::fs::read(entry.path()).unwrap(),
        );
    }
    dir.write(
        "model/generation_config.json",
        r#"{"eos_token_id": [7, 8]}"#,
    );
    dir.write("model/chat_template.jinja", "{{ messages }}");
    dir.write(
        "text.txt",
        "Alice was beginning to get very tired of sitting by her sister on the bank. ".repeat(60),
    );
    let base = [
        "train",
        "lm",
        "--text",
        "text.txt",
        "--from",
        "model",
        "--context",
        "32",
        "--batch",
        "4",
        "--steps",
        "4",
        "--quiet",
        "--json",
        "--held-out",
        "0.3",
    ];
    let report = dir
        .run(&with(
            &base,
            &[
                "--out",
                "run",
                "--teacher",
                assets,
                "--no-twin",
                "--learning-rate",
                "0.0001",
            ],
        ))
        .is(0)
        .json();
    assert_eq!(report["parameters"], 852_608);
    for file in [
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    ] {
        let (written, given) = (format!("run/packed/{file}"), format!("model/{file}"));
        assert_eq!(dir.read(&written), dir.read(&given), "{file}");
    }
    dir.refuses(&with(&base, &["--out", "x", "--hidden", "64"]), &["--from"]);

    // A graph that is not there, or has other weights, is no llama.
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let bytes = std::fs::read(format!("{assets}/{file}")).unwrap();
        dir.write(&format!("qwen3/{file}"), bytes);
    }
    let mut config: Value = serde_json::from_slice(&dir.read("qwen3/config.json")).unwrap();
    let from_qwen3: Vec<&str> = base
        .iter()
        .map(|arg| if *arg == "model" { "qwen3" } else { arg })
        .collect();
    for (model_type, parts) in [
        (
            "phi3",
            ["qwen3/config.json: model_type", "'llama'", "'qwen3'"],
        ),
        (
            "qwen3",
            ["qwen3", "self_attn.k_norm.weight", "no such tensor"],
        ),
    ] {
        config["model_type"] = model_type.into();
        dir.write("qwen3/config.json", config.to_string());
        dir.refuses(&with(&from_qwen3, &["--out", "x"]), &parts);
    }
}

/// Names and layouts of the tensors of two dimensions; each must be ternary.
fn ternary_matrices(dir: &Dir, path: &str) -> Vec<(String, String)> {
    let document = dir.run(&["inspect", path, "--json"]).is(0).json();
    let tensors = document["tensors"].as_array().unwrap().iter();
    let matrices = tensors.filter(|t| t["shape"].as_array().unwrap().len() == 2);
    let text = |v: &Value| v.as_str().unwrap_or("none").to_string();
    let found: Vec<_> = matrices
        .map(|t| {
            assert_eq!(t["precision"], "ternary", "{path}: {t}");
            (text(&t["name"]), text(&t["stored_as"]))
        })
        .collect();
    assert_eq!(found.len(), 9, "{path}: {found:?}");
    found
}

/// A qwen3 that is trained as it is packed: every matrix ternary in groups of 128, embedding and
/// output matrix too.
#[test]
fn a_bonsai_is_ternary_in_every_matrix() {
    let dir = Dir::new();
    text(&dir);
    let tokenizer = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../assets/glassllm-en/tokenizer.json"
    );
    dir.write("untied.toml", "[model.shape]\ntied = false");
    let base = [
        "train",
        "lm",
        "--config",
        "untied.toml",
        "--preset",
        "bonsai",
        "--architecture",
        "qwen3",
        "--head-dim",
        "64",
        "--hidden",
        "128",
        "--ffn",
        "128",
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--text",
        "text.txt",
        "--tokenizer",
        tokenizer,
        "--context",
        "16",
        "--batch",
        "2",
        "--steps",
        "4",
        "--quiet",
        "--json",
    ];
    let trained = |out, format| {
        let run = dir.run(&with(&base, &["--out", out, "--format", format]));
        let report = run.is(0).json();
        let (measured, in_training) = (number(&report, "qat"), number(&report, "qat_in_training"));
        // The engine opened the file. Inputs of embedding and head are floats in both.
        assert!((measured - in_training).abs() < 1e-4, "{report}");
    };
    trained("run", "gguf");
    let layouts = |path: &str| -> Vec<String> {
        let found = ternary_matrices(&dir, path);
        let heads = ["token_embd.", "output.", "model.embed_tokens.", "lm_head."];
        let is_head = |name: &str| heads.iter().any(|head| name.starts_with(head));
        assert_eq!(
            found.iter().filter(|(name, _)| is_head(name)).count(),
            2,
            "{found:?}"
        );
        found.into_iter().map(|(_, layout)| layout).collect()
    };
    assert_eq!(layouts("run/packed.gguf"), ["q2_0"; 9]);
    let generate = [
        "-p",
        "the cat",
        "--max-tokens",
        "4",
        "--temperature",
        "0",
        "--quiet",
    ];
    let text_of = |path| {
        dir.run(&[&["run", path], &generate[..]].concat())
            .is(0)
            .stdout()
    };
    let text = text_of("run/packed.gguf");

    // The same run in another container, and from there to a GGUF: groups of 128 are none of 256.
    trained("same", "safetensors");
    assert_eq!(layouts("same/packed"), ["two-bit"; 9]);
    dir.run(&["convert", "same/packed", "--out", "same.gguf"])
        .is(0);
    assert_eq!(layouts("same.gguf"), ["q2_0"; 9]);
    assert_eq!(text_of("same.gguf"), text);
    dir.run(&["compare", "same.gguf", "run/packed.gguf"]).is(0);

    // After training, and in the types of Prism's programs and in MLX.
    for (out, more, layout) in [
        ("ptq.gguf", &[][..], "q2_0"),
        ("pq2.gguf", &["--layout", "pq2_0"], "pq2_0"),
        ("ptq1.gguf", &["--layout", "ptq1_0"], "ptq1_0"),
        ("mlx", &["--format", "mlx"], "two-bit"),
    ] {
        let args = ["quantize", "run/full", "--preset", "bonsai", "--out", out];
        dir.run(&[&args[..], more].concat()).is(0);
        assert_eq!(layouts(out), [layout; 9]);
        assert_eq!(text_of(out), text_of("ptq.gguf"), "{out}");
    }
}

/// Starts a run, waits for a checkpoint of the quantized model, sends a signal, and returns the
/// exit status.
fn stop(dir: &Dir, args: &[&str], out: &str, name: &str) -> Option<i32> {
    let mut child = dir
        .command(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (start, folder) = (Instant::now(), dir.at(out).join("checkpoints/quantized"));
    let found = || {
        std::fs::read_dir(&folder).is_ok_and(|mut all| {
            all.any(|e| e.is_ok_and(|e| !e.file_name().to_string_lossy().contains("partial")))
        })
    };
    while !found() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the run ended before it could be stopped"
        );
        assert!(start.elapsed() < Duration::from_secs(120), "no checkpoint");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(
        Command::new("kill")
            .args([name, &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    child.wait().unwrap().code()
}

#[test]
#[cfg(unix)]
fn killed_and_interrupted_runs_end_with_the_same_weights() {
    let dir = Dir::new();
    text(&dir);
    let more = [
        "--steps",
        "200",
        "--every",
        "5",
        "--keep",
        "2",
        "--teacher",
        "self",
        "--evaluate-every",
        "45",
        "--telemetry",
        "10",
    ];
    let args = |out| with(&LM, &[&more[..], &["--out", out]].concat());
    dir.run(&args("whole")).is(0);
    let mut killed = args("killed");
    for times in 0..3 {
        if times == 1 {
            killed.push("--resume");
        }
        let folder = dir.at("killed/checkpoints/quantized");
        // The next kill waits for a checkpoint that is not there yet.
        let _ = std::fs::read_dir(&folder).map(|all| all.count());
        assert_eq!(stop(&dir, &killed, "killed", "-KILL"), None);
    }
    dir.run(&killed).is(0);
    assert_eq!(stop(&dir, &args("stopped"), "stopped", "-INT"), Some(130));
    let mut going_on = args("stopped");
    going_on.push("--resume");
    dir.run(&going_on).is(0);
    for file in [
        "latent/model.safetensors",
        "packed/model.safetensors",
        "full/model.safetensors",
    ] {
        let whole = dir.read(&format!("whole/{file}"));
        assert!(
            dir.read(&format!("killed/{file}")) == whole,
            "{file} after kills"
        );
        assert!(
            dir.read(&format!("stopped/{file}")) == whole,
            "{file} after an interruption"
        );
    }
    let kept = std::fs::read_dir(dir.at("whole/checkpoints/quantized"))
        .unwrap()
        .count();
    assert!(
        (2..=3).contains(&kept),
        "the newest two and the best: {kept}"
    );
}

#[test]
fn bad_input_is_one_line_and_leaves_nothing() {
    let dir = Dir::new();
    images(&dir);
    text(&dir);
    let image =
        |more: &[&'static str]| with(&with(&IMAGE, &["--steps", "5", "--out", "run"]), more);
    let lm = |more: &[&'static str]| with(&with(&LM, &["--steps", "5", "--out", "run"]), more);
    dir.refuses(
        &image(&["--classes", "3"]),
        &["train-labels-idx1-ubyte", "below 3"],
    );
    dir.refuses(&image(&["--network", "rnn"]), &["--network", "mlp, cnn"]);
    dir.refuses(&image(&["--exclude", "nothing*"]), &["nothing*"]);
    dir.refuses(&image(&["--format", "gguf"]), &["model_type"]);
    dir.refuses(&image(&["--steps", "0"]), &["steps: expected at least 1"]);
    dir.refuses(&image(&["--batch", "0"]), &["batch"]);
    dir.refuses(
        &image(&["--resume", "--teacher", "images"]),
        &["config.json"],
    );
    dir.refuses(
        &lm(&["--context", "99999"]),
        &["text.txt", "more than 99999 tokens"],
    );
    dir.refuses(&lm(&["--heads", "3"]), &["head_dim", "even"]);
    dir.refuses(&lm(&["--tokenizer", "text.txt"]), &["text.txt: tokenizer"]);
    dir.refuses(&lm(&["--precision", "keep"]), &["quantize"]);
    dir.refuses(
        &lm(&["--activations", "int4"]),
        &["activations", "int8 or float"],
    );
    dir.refuses(&lm(&["--estimator", "magic"]), &["--estimator"]);
    dir.refuses(
        &lm(&["--estimator", "stretched", "--precision", "int4"]),
        &["stretched"],
    );
    dir.refuses(
        &lm(&["--dead-zone-bias", "0.001"]),
        &["dead_zone_bias", "0.001 and model.layers", "without one"],
    );
    dir.refuses(
        &image(&["--dead-zone-bias", "0.001", "--precision", "int4"]),
        &["dead-zone bias", "ternary"],
    );
    dir.refuses(
        &image(&["--patience", "3"]),
        &["early_stopping", "evaluate_every above 0"],
    );
    dir.refuses(
        &image(&["--patience", "0", "--evaluate-every", "2"]),
        &["patience", "at least 1"],
    );
    dir.refuses(&image(&["--initial-bits", "9"]), &["--initial-bits"]);
    dir.refuses(
        &image(&["--initial-bits", "5", "--steps", "50"]),
        &["progressive.stages", "2, 3, 4 or 8 bits"],
    );
    dir.refuses(
        &image(&["--strength-warmup", "5"]),
        &["progressive", "before step 5"],
    );
    dir.write("bad.toml", "[training]\nstepz = 3\n");
    dir.refuses(&lm(&["--config", "bad.toml"]), &["bad.toml", "stepz"]);
    dir.write("images/train-images-idx3-ubyte", [0, 0, 8, 1, 0, 0]);
    dir.refuses(&image(&[]), &["train-images-idx3-ubyte", "idx magic"]);
    dir.write("text.txt", "");
    dir.refuses(&lm(&[]), &["text.txt", "an empty file"]);
    dir.write("run/other", "");
    dir.refuses(
        &lm(&["--resume", "--text", "bad.toml", "--context", "2"]),
        &["run.toml"],
    );
}

#[test]
fn a_loss_that_diverges_stops_the_run() {
    let dir = Dir::new();
    images(&dir);
    let run = dir.run(&with(
        &IMAGE,
        &[
            "--steps",
            "50",
            "--out",
            "run",
            "--learning-rate",
            "1e30",
            "--every",
            "1",
            "--no-twin",
        ],
    ));
    run.refused(&["step"]);
    assert!(
        dir.at("run/checkpoints/quantized").exists(),
        "earlier checkpoints stay"
    );
    assert!(
        run.stderr().contains("step-0000"),
        "the last good checkpoint is named: {}",
        run.stderr()
    );
}

#[test]
fn settings_come_from_toml_and_layers_go_through_stages() {
    let dir = Dir::new();
    text(&dir);
    let toml = r#"
        [run]
        teacher = "self"
        distillation = { logits = 0.4, temperature = 2.0, hidden = 0.1, relations = 0.1 }

        [training]
        steps = 60
        clip = 1.0
        estimator = "clipped:1.5"

        [training.telemetry]
        every = 5

        [training.progressive]
        stages = [[0, { bits = 8 }], [20, { bits = 4 }], [40, "target"]]
        warmup = 10

        [training.quantization.default]
        granularity = "channel"

        [[training.quantization.rule]]
        match = "*.down_proj.weight"
        precision = "int8"
    "#;
    dir.write("settings.toml", toml);
    let report = dir
        .run(&with(
            &LM,
            &["--out", "run", "--config", "settings.toml", "--batch", "4"],
        ))
        .is(0)
        .json();
    assert_eq!(report["steps"], 60);
    // One layer of five takes float inputs in the engine, for it is not ternary.
    assert!(
        (number(&report, "qat") - number(&report, "qat_in_training")).abs() < 0.02,
        "{report}"
    );
    let log = String::from_utf8(dir.read("run/telemetry-quantized.jsonl")).unwrap();
    let records: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let lambdas: Vec<f64> = records
        .iter()
        .filter_map(|r| r["lambda"].as_f64())
        .collect();
    assert!(
        lambdas.iter().any(|&l| l < 1.0) && lambdas.last() == Some(&1.0),
        "{lambdas:?}"
    );
    let tensors = dir.run(&["inspect", "run/packed"]).is(0).stdout();
    assert_eq!(
        tensors
            .lines()
            .filter(|l| l.contains("down_proj") && l.contains("int8"))
            .count(),
        2,
        "{tensors}"
    );
    let own = String::from_utf8(dir.read("run/run.toml")).unwrap();
    assert!(
        own.contains("temperature = 2.0") && own.contains("batch = 4"),
        "{own}"
    );
}
