//! Small checkpoints written byte by byte, and the program run on them.
#![allow(dead_code, reason = "each test file uses a part of this")]

use bitnet_core::random::Random;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A tensor of a safetensors file.
pub(crate) struct T(
    pub(crate) &'static str,
    pub(crate) &'static str,
    pub(crate) Vec<usize>,
    pub(crate) Vec<u8>,
);

/// An f32 tensor.
pub(crate) fn f32s(name: &'static str, shape: &[usize], weights: &[f32]) -> T {
    T(
        name,
        "F32",
        shape.to_vec(),
        weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
    )
}

/// An f32 tensor of normal weights.
pub(crate) fn gauss(name: &'static str, shape: &[usize], sigma: f32) -> T {
    f32s(
        name,
        shape,
        &normal(
            name.len() as u64 + shape[0] as u64,
            shape.iter().product(),
            sigma,
        ),
    )
}

/// A file of this header and this data.
pub(crate) fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// A file of these tensors, one after another.
pub(crate) fn safetensors(tensors: &[T]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), vec![]);
    for T(name, dtype, shape, bytes) in tensors {
        let range = [data.len(), data.len() + bytes.len()];
        header.insert(
            (*name).into(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": range}),
        );
        data.extend(bytes);
    }
    raw(&Value::Object(header).to_string(), &data)
}

/// A safetensors file with one more tensor at its end.
pub(crate) fn with_tensor(file: &[u8], T(name, dtype, shape, bytes): &T) -> Vec<u8> {
    let (size, rest) = file.split_at(8);
    let size = u64::from_le_bytes(size.try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&rest[..size]).unwrap();
    let data = [&rest[size..], bytes].concat();
    let range = [data.len() - bytes.len(), data.len()];
    header[*name] = json!({"dtype": dtype, "shape": shape, "data_offsets": range});
    raw(&header.to_string(), &data)
}

/// Numbers that depend on the seed only.
pub(crate) fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut random = Random::new(seed);
    move || random.bits()
}

/// Weights that are nearly normal: sums of eight uniform numbers.
pub(crate) fn normal(seed: u64, n: usize, sigma: f32) -> Vec<f32> {
    let mut next = random(seed);
    let deviation = (8.0f32 / 12.0).sqrt();
    (0..n)
        .map(|_| {
            let bytes = next().to_le_bytes();
            let sum: f32 = bytes.iter().map(|&b| f32::from(b) / 255.0 - 0.5).sum();
            sum / deviation * sigma
        })
        .collect()
}

/// A folder that is removed after the test.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.at(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Writes a file and the folders above it.
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        self
    }

    pub(crate) fn write_json(&self, name: &str, value: &Value) -> &Self {
        self.write(name, value.to_string())
    }

    /// in.safetensors: a linear layer of 8 × 16 and a norm.
    pub(crate) fn small() -> Self {
        let dir = Self::new();
        dir.write(
            "in.safetensors",
            safetensors(&[
                gauss("a.weight", &[8, 16], 0.02),
                gauss("norm.weight", &[16], 1.0),
            ]),
        );
        dir
    }

    /// Every file below, with its bytes; folders end in a slash.
    pub(crate) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        walk(self.path(), "", &mut found);
        found
    }

    /// Runs the program in this folder.
    pub(crate) fn run(&self, args: &[&str]) -> Run {
        self.run_with(args, &[])
    }

    pub(crate) fn run_with(&self, args: &[&str], env: &[(&str, &str)]) -> Run {
        let output = self
            .command(args)
            .envs(env.iter().copied())
            .output()
            .unwrap();
        Run {
            args: args.iter().map(|&a| a.into()).collect(),
            output,
        }
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
        command
            .args(args)
            .current_dir(self.path())
            .env_remove("BITNET_ISA")
            .env_remove("RUST_BACKTRACE");
        command
    }

    /// Runs the program, which must refuse: status 2, one line that holds all of `parts`, and no
    /// file touched, made or removed.
    #[track_caller]
    pub(crate) fn refuses(&self, args: &[&str], parts: &[&str]) {
        let before = self.files();
        self.run(args).refused(parts);
        let after = self.files();
        let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(
            names(&before),
            names(&after),
            "{args:?} left something behind or removed it"
        );
        assert!(before == after, "{args:?} changed a file");
    }

    /// Every command that reads `input` must refuse it; `verify` must call it damaged if it is one
    /// of our files.
    #[track_caller]
    pub(crate) fn refuses_input(&self, input: &str, parts: &[&str]) {
        self.refuses(&["inspect", input], parts);
        self.refuses(&["quantize", input, "--out", "out.safetensors"], parts);
        self.refuses(&["convert", input, "--out", "out.safetensors"], parts);
        self.refuses(&["dequantize", input, "--out", "out.safetensors"], parts);
        self.refuses(&["compare", input, input], parts);
        if !carries_document(&self.path().join(input)) {
            return self.refuses(&["verify", input], parts);
        }
        let verify = self.run(&["verify", input, "--json"]);
        verify.is(1);
        let what = verify.json()["damage"][0]["what"]
            .to_string()
            .replace("\\\"", "\"");
        assert!(
            parts.iter().all(|part| what.contains(part)),
            "{parts:?} in {what}"
        );
    }
}

fn carries_document(path: &Path) -> bool {
    let path = if path.is_dir() {
        path.join("model.safetensors")
    } else {
        path.to_path_buf()
    };
    fs::read(path).is_ok_and(|bytes| bytes.windows(15).any(|w| w == b"bitnet.document"))
}

fn walk(folder: &Path, prefix: &str, found: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), &format!("{name}/"), found);
            found.insert(format!("{name}/"), vec![]);
        } else {
            found.insert(name, fs::read(entry.path()).unwrap_or_default());
        }
    }
}

/// A program that has ended.
pub(crate) struct Run {
    pub(crate) args: Vec<String>,
    pub(crate) output: Output,
}

impl Run {
    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// The exit status must be this one.
    #[track_caller]
    pub(crate) fn is(&self, status: i32) -> &Self {
        let (out, err) = (self.stdout(), self.stderr());
        assert!(!err.contains("panicked"), "{:?}: {err}", self.args);
        assert_eq!(
            self.output.status.code(),
            Some(status),
            "{:?}\nstdout: {out}\nstderr: {err}",
            self.args
        );
        self
    }

    /// Status 2 and one line on stderr that holds all of `parts`; nothing on stdout.
    #[track_caller]
    pub(crate) fn refused(&self, parts: &[&str]) {
        self.is(2);
        let err = self.stderr();
        assert_eq!(
            err.trim_end_matches('\n').lines().count(),
            1,
            "{:?}: one line, got:\n{err}",
            self.args
        );
        assert!(
            err.starts_with("error: ") && err.ends_with('\n'),
            "{:?}: {err}",
            self.args
        );
        assert_eq!(self.stdout(), "", "{:?}", self.args);
        for part in parts {
            assert!(
                err.contains(part),
                "{:?}: '{part}' is not in: {err}",
                self.args
            );
        }
    }

    /// The document on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.output.stdout)
            .unwrap_or_else(|e| panic!("{:?}: {e}: {}", self.args, self.stdout()))
    }
}

/// A folder `name` with the config.json and the tensors of a small llama: every linear layer
/// divides into blocks of 256.
pub(crate) fn llama(dir: &Dir, name: &str) {
    let mut tensors = vec![gauss("model.embed_tokens.weight", &[32, 256], 0.02)];
    for layer in [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ] {
        tensors.push(gauss(
            format!("model.layers.0.{layer}.weight").leak(),
            &[256, 256],
            0.02,
        ));
    }
    tensors.push(gauss(
        "model.layers.0.mlp.down_proj.weight",
        &[256, 256],
        0.02,
    ));
    for norm in [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ] {
        tensors.push(f32s(norm, &[256], &[1.0; 256]));
    }
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32, "max_position_embeddings": 64,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "float16",
    });
    dir.write(&format!("{name}/model.safetensors"), safetensors(&tensors))
        .write_json(&format!("{name}/config.json"), &config);
}

/// Runs the program where `disk` is a file system of `size` bytes, between two pieces of shell of
/// which the second says something: status, stdout and stderr. `None` where mounting is not
/// allowed.
pub(crate) fn on_a_small_disk(
    dir: &Dir,
    size: &str,
    [before, after]: [&str; 2],
    args: &[&str],
) -> Option<(i32, String, String)> {
    fs::create_dir_all(dir.at("disk")).unwrap();
    let script = format!(
        "mount -t tmpfs -o size={size} none disk 2>/dev/null || exit 77; {before}; \"$0\" \"$@\"; s=$?; {after}; exit $s"
    );
    let output = Command::new("unshare")
        .args([
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            &script,
            env!("CARGO_BIN_EXE_bitnet"),
        ])
        .args(args)
        .current_dir(dir.path())
        .output();
    match output {
        Ok(output) if output.status.code() != Some(77) && !output.stdout.is_empty() => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            Some((
                output.status.code().unwrap(),
                text(&output.stdout),
                text(&output.stderr),
            ))
        }
        _ => {
            println!("skipped: a private tmpfs cannot be mounted here");
            None
        }
    }
}
