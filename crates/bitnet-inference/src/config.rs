//! The config of a graph, read from config.json or from the keys of a GGUF. An entry that no graph
//! supports is an error.

use crate::Result;
use bitnet_formats::arch::{
    self, Activation, Architecture, Biases, DecoderGraph, DeltaShape, Experts, HfConfig, HfDecoder,
    HfRope, LayerAttention, LayerRope, RopeScaling, Scales,
};
use bitnet_formats::{Error, Kind, Source, document};
use bitnet_kernels::dense::RotaryPairing;
use serde_json::Value;
use std::path::Path;

/// Rotary position embedding: pair i of the first d elements of a head rotates by
/// `position · theta^(−2i/d) / divisor_i`, and is multiplied by `attention_factor`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base.
    pub theta: f64,
    /// Elements of a head that rotate.
    pub dims: usize,
    /// Which elements form a pair. Hugging Face folders: halves. GGUF: as the architecture says.
    pub pairing: RotaryPairing,
    /// Divisors of the d/2 frequencies; none means 1.
    pub divisors: Option<Vec<f32>>,
    /// Multiplier of sines and cosines.
    pub attention_factor: f32,
}

impl Rope {
    fn from_hf(rope: &HfRope) -> Self {
        Self {
            theta: rope.theta,
            dims: rope.dims,
            pairing: RotaryPairing::Halves,
            divisors: rope.divisors(),
            attention_factor: rope.attention_factor as f32,
        }
    }

    /// Number of pairs of a head that rotate.
    pub(crate) fn pairs(&self) -> usize {
        self.dims / 2
    }

    /// Frequencies of the d/2 pairs, in radians per position.
    pub(crate) fn frequencies(&self) -> Vec<f32> {
        let frequency = |i: usize| {
            let divisor = self.divisors.as_ref().map_or(1.0, |d| f64::from(d[i]));
            (self.theta.powf(-((2 * i) as f64) / self.dims as f64) / divisor) as f32
        };
        (0..self.pairs()).map(frequency).collect()
    }
}

/// Which head of q and k of a gated delta net serves a head of v.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueHeads {
    /// `h / (value_heads / key_heads)`: Hugging Face's order.
    Grouped,
    /// `h % key_heads`: ggml's.
    Tiled,
}

/// The config of a model: the architecture and sizes of its graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The description of the architecture.
    pub architecture: &'static Architecture,
    /// The parts of the layers.
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
    /// That of layers with a window, where they have their own.
    pub local_rope: Option<Rope>,
    /// What each layer sees and how it rotates.
    pub attention: Vec<LayerAttention>,
    /// Sizes of the layers that are gated delta nets, if any are.
    pub delta: Option<DeltaShape>,
    /// Their order of heads. Hugging Face folders: grouped. GGUF: tiled.
    pub value_heads: ValueHeads,
    /// Multipliers of embedding, scores, residual stream and logits.
    pub scales: Scales,
    /// Mixtures of experts, where layers have them.
    pub experts: Option<Experts>,
    /// Whether the embedding is also the output matrix.
    pub tied: bool,
    /// Which linear layers have biases.
    pub biases: Biases,
    /// Token at the start of texts, if the config names one.
    pub bos: Option<u32>,
    /// Tokens that end a text: those of generation_config.json before those of config.json, and all
    /// of a GGUF that end a text in llama.cpp.
    pub eos: Vec<u32>,
    /// Sentences for the user about what the graph computes otherwise than the file suggests.
    pub notes: Vec<String>,
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
        let decoder = HfDecoder::read(&config, architecture)?;
        let (mut context, mut notes) = (decoder.context, vec![]);
        if let RopeScaling::LongRope { context: short, .. } = decoder.rope.scaling
            && short < context
        {
            notes.push(format!(
                "the model is run with the rotary factors of texts of up to {short} tokens, and \
                 not beyond them: config.json has others for up to {context}"
            ));
            context = short;
        }
        let read = Self {
            architecture,
            graph,
            hidden: decoder.hidden,
            ffn: decoder.ffn,
            layers: decoder.layers.len(),
            heads: decoder.heads,
            kv_heads: decoder.kv_heads,
            head_dim: decoder.head_dim,
            vocab: decoder.vocab,
            context,
            norm_eps: decoder.norm_eps as f32,
            activation: decoder.activation,
            rope: Rope::from_hf(&decoder.rope),
            local_rope: decoder.local_rope.as_ref().map(Rope::from_hf),
            attention: decoder.layers,
            delta: decoder.delta,
            value_heads: ValueHeads::Grouped,
            scales: decoder.scales,
            experts: decoder.experts,
            tied: decoder.tied,
            biases: decoder.biases,
            bos: config.token_ids("bos_token_id")?.first().copied(),
            eos: config.token_ids("eos_token_id")?,
            notes,
        };
        read.check(path)?;
        Ok(read)
    }

    /// Converts the keys of a GGUF to a config.json and reads that.
    fn from_gguf(source: &Source) -> Result<Self> {
        let path = source.path();
        check_gguf_keys(source)?;
        let mut config = Self::from_hf(path, &gguf_config(source)?)?;
        config.value_heads = ValueHeads::Tiled;
        if config.architecture.gguf_adjacent_pairs {
            config.rope.pairing = RotaryPairing::Adjacent;
        }
        let windows = config.attention.iter().filter_map(|layer| layer.window);
        if let Some(window) = windows.min()
            && !config.architecture.gguf_window
        {
            config.notes.push(format!(
                "a token sees {window} positions, as the file says; llama.cpp does not follow it"
            ));
        }
        if let Some(stored) = source.find_stored(arch::ROPE_FREQS) {
            let mut divisors = vec![0.0; source.stored(stored).elements()];
            source.read_floats(stored, 0..divisors.len(), &mut vec![], &mut divisors)?;
            if divisors.len() != config.rope.pairs()
                || !divisors.iter().all(|d| d.is_finite() && *d > 0.0)
            {
                let expected = format!("{} positive divisors", config.rope.pairs());
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

    /// The rotary positions of a layer, if it has any.
    pub(crate) fn layer_rope(&self, layer: usize) -> Option<&Rope> {
        match self.attention[layer].rope {
            LayerRope::None => None,
            LayerRope::Global => Some(&self.rope),
            LayerRope::Local => self.local_rope.as_ref(),
        }
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
        if let Some(experts) = &self.experts {
            bounded("moe_intermediate_size", experts.ffn, 1 << 20)?;
            let shared = experts.shared_ffn.unwrap_or(0);
            bounded("shared_expert_intermediate_size", shared, 1 << 20)?;
        }
        bounded("num_hidden_layers", self.layers, 1 << 12)?;
        bounded("num_attention_heads", self.heads, 1 << 12)?;
        bounded("head_dim", self.head_dim, 1 << 12)?;
        bounded("vocab_size", self.vocab, 1 << 24)?;
        bounded("max_position_embeddings", self.context, 1 << 24)?;
        Ok(())
    }
}

/// Refuses a key of a GGUF that the graph does not follow.
pub(crate) fn check_gguf_keys(source: &Source) -> Result<()> {
    let path = source.path();
    for (key, value) in source.gguf() {
        if let Some((architecture, rest)) = arch::strip_prefix(key)
            && !architecture.follows_gguf_key(rest)
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
    Ok(())
}

/// The config.json of a GGUF.
pub(crate) fn gguf_config(source: &Source) -> Result<Value> {
    let shape = |name: &str| {
        source
            .find_stored(name)
            .filter(|_| name != arch::ROPE_FREQS)
            .map(|i| source.stored(i).shape.clone())
    };
    Ok(arch::hf_config(
        source.path(),
        source.gguf(),
        &shape,
        &|name| source.vector(name),
    )?)
}
