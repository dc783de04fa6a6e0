//! The config of a graph, read from config.json or from the keys of a GGUF. An entry that no graph
//! supports is an error.

use crate::Result;
use bitnet_formats::arch::{self, Activation, Architecture, DecoderGraph, HfConfig};
use bitnet_formats::{Error, Kind, Source, document};
use bitnet_kernels::dense::RotaryPairing;
use serde_json::Value;
use std::path::Path;

/// Rotary position embedding: pair i of a head with d elements rotates by
/// `position · theta^(−2i/d) / divisor_i`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base.
    pub theta: f64,
    /// Which elements form a pair. Hugging Face folders: halves. GGUF: as the architecture says.
    pub pairing: RotaryPairing,
    /// Divisors of the d/2 frequencies; none means 1.
    pub divisors: Option<Vec<f32>>,
}

impl Rope {
    /// Frequencies of the d/2 pairs, in radians per position.
    pub(crate) fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let frequency = |i: usize| {
            let divisor = self.divisors.as_ref().map_or(1.0, |d| f64::from(d[i]));
            (self.theta.powf(-((2 * i) as f64) / head_dim as f64) / divisor) as f32
        };
        (0..head_dim / 2).map(frequency).collect()
    }
}

/// The config of a model: the architecture and sizes of its graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The description of the architecture.
    pub architecture: &'static Architecture,
    /// The equations of the layers.
    pub graph: DecoderGraph,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Elements of the feed-forward product.
    pub ffn: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Number of positions that the model was trained for.
    pub context: usize,
    /// ε of the norms, added to the mean square.
    pub norm_eps: f32,
    /// Activation function of the feed-forward gate.
    pub activation: Activation,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the embedding is also the output matrix.
    pub tied: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Token at the start of texts, if the config names one.
    pub bos: Option<u32>,
    /// Tokens that end a text: those of generation_config.json before those of config.json, and all
    /// of a GGUF that end a text in llama.cpp.
    pub eos: Vec<u32>,
}

impl Config {
    /// Reads the config of an open checkpoint.
    ///
    /// # Errors
    /// [`crate::Error::File`] for an architecture, activation, rotary embedding or key that no
    /// graph supports, for a missing key, and for keys that contradict each other.
    pub fn read(source: &Source) -> Result<Self> {
        source.refuse_undecoded()?;
        match (source.kind(), source.config()) {
            (Kind::Gguf, _) => Self::from_gguf(source),
            (_, Some(value)) => {
                let path = &source.path().join("config.json");
                let mut config = Self::from_hf(path, value)?;
                config.eos = arch::eos_ids(source.path(), &HfConfig { path, value })?;
                Ok(config)
            }
            (..) => Err(Error::file(
                source.path(),
                "a folder with config.json or a GGUF: weights alone are no model",
                "one .safetensors",
            )
            .into()),
        }
    }

    /// Reads a config.json; `path` is for messages.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn from_hf(path: &Path, value: &Value) -> Result<Self> {
        let architecture = Architecture::from_hf_config(path, value)?;
        let graph = architecture.inference_graph(path)?;
        let config = HfConfig { path, value };
        let (hidden, heads) = (
            config.size("hidden_size")?,
            config.size("num_attention_heads")?,
        );
        let kv_heads = config
            .optional_size("num_key_value_heads")?
            .unwrap_or(heads);
        let head_dim = match config.optional_size("head_dim")? {
            Some(n) => n,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(config
                    .bad(
                        "head_dim",
                        &format!("the size of one of {heads} heads, which do not divide {hidden}"),
                    )
                    .into());
            }
        };
        if heads % kv_heads != 0 {
            return Err(config
                .bad(
                    "num_key_value_heads",
                    &format!("a divisor of {heads} heads"),
                )
                .into());
        }
        if architecture.heads_fill_hidden && heads * head_dim != hidden {
            return Err(config
                .bad(
                    "head_dim",
                    &format!(
                        "{hidden} / {heads}, since the norm of the heads has hidden_size elements"
                    ),
                )
                .into());
        }
        let rope = arch::HfRope::read(&config, architecture, head_dim)?;
        let divisors = rope
            .freqs
            .or(rope.linear.map(|factor| vec![factor as f32; head_dim / 2]));
        let default_eps = architecture.hf_defaults.map(|d| d.rms_norm_eps);
        let read = Self {
            architecture,
            graph,
            hidden,
            ffn: config.size("intermediate_size")?,
            layers: config.size("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            vocab: config.size("vocab_size")?,
            context: config.size("max_position_embeddings")?,
            norm_eps: config.float_or("rms_norm_eps", default_eps)? as f32,
            activation: architecture.activation(&config)?,
            rope: Rope {
                theta: rope.theta,
                pairing: RotaryPairing::Halves,
                divisors,
            },
            tied: config.flag("tie_word_embeddings")?,
            attention_bias: config.flag("attention_bias")?,
            mlp_bias: config.flag("mlp_bias")?,
            bos: config.token_ids("bos_token_id")?.first().copied(),
            eos: config.token_ids("eos_token_id")?,
        };
        read.check(path)?;
        Ok(read)
    }

    /// Converts the keys of a GGUF to a config.json and reads that.
    fn from_gguf(source: &Source) -> Result<Self> {
        let path = source.path();
        for (key, value) in source.gguf() {
            if let Some((architecture, rest)) = arch::strip_prefix(key)
                && !architecture.gguf_keys.contains(&rest)
                && key != document::KEY
            {
                return Err(Error::config(
                    path,
                    key,
                    "a key that this engine's graph follows",
                    value.preview(80),
                )
                .into());
            }
        }
        let shape = |name: &str| {
            source
                .find_stored(name)
                .filter(|_| name != arch::ROPE_FREQS)
                .map(|i| source.stored(i).shape.clone())
        };
        let mut config = Self::from_hf(path, &arch::hf_config(path, source.gguf(), &shape)?)?;
        if config.architecture.gguf_adjacent_pairs {
            config.rope.pairing = RotaryPairing::Adjacent;
        }
        if let Some(stored) = source.find_stored(arch::ROPE_FREQS) {
            let mut divisors = vec![0.0; source.stored(stored).elements()];
            source.read_floats(stored, 0..divisors.len(), &mut vec![], &mut divisors)?;
            if divisors.len() != config.head_dim / 2
                || !divisors.iter().all(|d| d.is_finite() && *d > 0.0)
            {
                let expected = format!("{} positive divisors", config.head_dim / 2);
                return Err(Error::tensor(
                    path,
                    arch::ROPE_FREQS,
                    expected,
                    format!("{divisors:.60?}"),
                )
                .into());
            }
            config.rope.divisors = Some(divisors);
        }
        Ok(config)
    }

    /// Checks the bounds that keep later arithmetic from overflowing.
    fn check(&self, path: &Path) -> Result<()> {
        let bounded = |key: &str, n: usize, most: usize| {
            if n <= most {
                Ok(())
            } else {
                Err(Error::config(
                    path,
                    key,
                    format!("at most {most}"),
                    n.to_string(),
                ))
            }
        };
        bounded("hidden_size", self.hidden, 1 << 17)?;
        bounded("intermediate_size", self.ffn, 1 << 20)?;
        bounded("num_hidden_layers", self.layers, 1 << 12)?;
        bounded("num_attention_heads", self.heads, 1 << 12)?;
        bounded("head_dim", self.head_dim, 1 << 12)?;
        bounded("vocab_size", self.vocab, 1 << 24)?;
        bounded("max_position_embeddings", self.context, 1 << 24)?;
        Ok(())
    }
}
