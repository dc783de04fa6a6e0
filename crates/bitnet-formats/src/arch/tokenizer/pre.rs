//! Pre-tokenizers of byte-level BPE: how a text is cut into words before tokens merge.

use serde_json::{Value, json};

/// The contractions of English in either case.
const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";

pub(super) const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
pub(super) const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const QWEN35: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const MINICPM5: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const SEED_CODER: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const BLOOM: &str = " ?[^(\\s|[.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c}])]+";
/// Letters of the scripts with two cases, with a space before them.
const DEEPSEEK_LETTERS: &str = concat!(
    "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-",
    "\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}",
    "\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}",
    "\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}",
    "\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-",
    "\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}",
    "\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-",
    "\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}",
    "-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}",
    "\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}",
    "\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-",
    "\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-",
    "\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}",
    "-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}",
    "\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+",
);
const DEEPSEEK_PUNCTUATION: &str =
    "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
const DEEPSEEK_HAN: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
const DEEPSEEK3_HAN: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"##,
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// A step of a pre-tokenizer. Each cuts the pieces of the step before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// GPT-2's rule, which is part of the `ByteLevel` step.
    Gpt2,
    /// Each digit is a word.
    Digits,
    /// Matches of a regular expression are words, and what lies between them.
    Regex(&'static str),
}

/// Values of `tokenizer.ggml.pre` with the same rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreTokenizer {
    /// The value to write, then others that llama.cpp treats alike.
    pub(super) names: &'static [&'static str],
    pub(super) steps: &'static [Step],
    /// Whether a word that is a token is taken without merging (`ignore_merges`).
    pub(super) ignore_merges: bool,
    /// Whether llama.cpp adds the first token to a text if the file has no `add_bos_token`.
    pub(super) adds_bos: bool,
    /// What llama.cpp does otherwise than the tokenizers of these models.
    pub(super) differs: Option<&'static str>,
}

impl PreTokenizer {
    const fn new(names: &'static [&'static str], steps: &'static [Step]) -> Self {
        Self {
            names,
            steps,
            ignore_merges: false,
            adds_bos: false,
            differs: None,
        }
    }

    const fn ignoring_merges(self) -> Self {
        Self {
            ignore_merges: true,
            ..self
        }
    }

    const fn with_bos(self) -> Self {
        Self {
            adds_bos: true,
            ..self
        }
    }

    const fn differing(self, differs: &'static str) -> Self {
        Self {
            differs: Some(differs),
            ..self
        }
    }

    /// The value of `tokenizer.ggml.pre` to write.
    pub(super) fn name(&self) -> &'static str {
        self.names[0]
    }
}

const CASES: &str = "llama.cpp tells the cases of letters apart in ASCII only, and cuts at combining \
     marks: words such as 'aÉ' get other tokens";

/// The pre-tokenizers of byte-level BPE that are known on both sides. The first with the same steps
/// is written.
pub(super) const PRE: &[PreTokenizer] = &[
    PreTokenizer::new(
        &[
            "gpt-2",
            "phi-2",
            "olmo",
            "mpt",
            "jais",
            "trillion",
            "granite-docling",
            "modern-bert",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
        ],
        &[Step::Gpt2],
    ),
    PreTokenizer::new(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[Step::Digits, Step::Gpt2],
    ),
    PreTokenizer::new(
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        &[Step::Regex(LLAMA3)],
    )
    .ignoring_merges()
    .with_bos(),
    PreTokenizer::new(
        &["smaug-bpe", "dbrx", "chatglm-bpe"],
        &[Step::Regex(LLAMA3)],
    ),
    PreTokenizer::new(&["glm4", "glm5"], &[Step::Regex(LLAMA3)]).ignoring_merges(),
    PreTokenizer::new(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
            "bailingmoe",
            "bailingmoe2",
            "llada-moe",
        ],
        &[Step::Regex(QWEN2)],
    ),
    PreTokenizer::new(&["qwen35"], &[Step::Regex(QWEN35)]),
    PreTokenizer::new(
        &["deepseek-llm"],
        &[
            Step::Regex(r"[\r\n]"),
            Step::Regex(DEEPSEEK_LETTERS),
            Step::Regex(DEEPSEEK_PUNCTUATION),
            Step::Regex(r"\s+$"),
            Step::Regex(DEEPSEEK_HAN),
            Step::Regex(r"\p{N}+"),
        ],
    ),
    PreTokenizer::new(
        &["deepseek-coder"],
        &[
            Step::Regex(r"[\r\n]"),
            Step::Regex(r"\s?\p{L}+"),
            Step::Regex(r"\s?\p{P}+"),
            Step::Regex(DEEPSEEK_HAN),
            Step::Digits,
        ],
    ),
    PreTokenizer::new(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[
            Step::Regex(r"\p{N}{1,3}"),
            Step::Regex(DEEPSEEK3_HAN),
            Step::Regex(DEEPSEEK3),
        ],
    ),
    PreTokenizer::new(&["tekken"], &[Step::Regex(TEKKEN)])
        .ignoring_merges()
        .with_bos()
        .differing(CASES),
    PreTokenizer::new(
        &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        &[Step::Regex(GPT4O)],
    )
    .differing(CASES),
    PreTokenizer::new(
        &["bloom", "poro-chat", "gpt3-finnish"],
        &[Step::Regex(BLOOM)],
    ),
    PreTokenizer::new(&["viking"], &[Step::Regex(BLOOM), Step::Digits]),
    PreTokenizer::new(
        &["minicpm5"],
        &[Step::Regex(r"\p{N}{1,3}"), Step::Regex(MINICPM5)],
    )
    .ignoring_merges(),
    PreTokenizer::new(&["seed-coder"], &[Step::Regex(SEED_CODER)]),
];

/// What a pre-tokenizer of a tokenizer.json does.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FoundStep {
    Gpt2,
    Digits,
    /// The canonical form of a regular expression.
    Regex(String),
}

impl FoundStep {
    fn is(&self, known: Step) -> bool {
        match (self, known) {
            (Self::Gpt2, Step::Gpt2) | (Self::Digits, Step::Digits) => true,
            (Self::Regex(regex), Step::Regex(known)) => *regex == canonical(known),
            _ => false,
        }
    }
}

/// Whether a pre-tokenizer of a tokenizer.json has the words of a known one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    Same,
    /// If no merge joins two digits.
    UnlessDigitsMerge,
    No,
}

/// Compares step by step.
pub(super) fn compare(found: &[FoundStep], known: &[Step]) -> Match {
    if found.len() != known.len() {
        return Match::No;
    }
    let mut result = Match::Same;
    for (found, &known) in found.iter().zip(known) {
        if *found == FoundStep::Digits && known == Step::Regex(r"\p{N}+") {
            result = Match::UnlessDigitsMerge;
        } else if !found.is(known) {
            return Match::No;
        }
    }
    result
}

/// The steps of a byte-level pre-tokenizer; `None` for one with steps of another kind.
pub(super) fn found_steps(steps: &[&Value]) -> Option<Vec<FoundStep>> {
    let (last, before) = steps.split_last()?;
    let use_regex = last["use_regex"].as_bool().unwrap_or(true);
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    let mut found = vec![];
    for step in before {
        found.push(match step["type"].as_str()? {
            "Digits" if step["individual_digits"] == true => FoundStep::Digits,
            "Split" => FoundStep::Regex(split_regex(step)?),
            _ => return None,
        });
    }
    for step in &mut found {
        if *step == FoundStep::Regex(r"\p{N}".into()) {
            *step = FoundStep::Digits;
        }
    }
    if use_regex {
        found.push(FoundStep::Gpt2);
    }
    (!found.is_empty()).then_some(found)
}

/// The regular expression of a `Split` whose matches are words, and what lies between them.
fn split_regex(step: &Value) -> Option<String> {
    let regex = canonical(step["pattern"]["Regex"].as_str()?);
    let invert = step["invert"].as_bool().unwrap_or(false);
    let isolated = step["behavior"] == "Isolated" && !invert;
    // These match every character: nothing lies between words.
    let matches_all = regex.ends_with(r"|\s+(?!\S)|\s+");
    let removed = step["behavior"] == "Removed" && invert && matches_all;
    (isolated || removed).then_some(regex)
}

/// One spelling for expressions that match the same.
fn canonical(regex: &str) -> String {
    let contractions = concat!(
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|",
        "'[mM]|'[lL][lL]|'[dD])"
    );
    [
        ("\r", r"\r"),
        ("\n", r"\n"),
        ("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),
        (contractions, CONTRACTIONS),
        // Nothing to give back: the next class has none of these characters.
        (r"\p{N}]?+", r"\p{N}]?"),
        (r"\p{N}]++", r"\p{N}]+"),
        // White space up to the last line feed, either way.
        (r"\s*[\r\n]|", r"\s*[\r\n]+|"),
        (r"\p{N}{1}|", r"\p{N}|"),
    ]
    .into_iter()
    .fold(regex.to_string(), |text, (from, to)| text.replace(from, to))
}

/// The steps as those of a tokenizer.json.
pub(super) fn hf_pre_tokenizer(steps: &[Step]) -> Value {
    let mut made: Vec<Value> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Gpt2 => None,
            Step::Digits => Some(json!({"type": "Digits", "individual_digits": true})),
            Step::Regex(regex) => Some(split(regex)),
        })
        .collect();
    let use_regex = steps.contains(&Step::Gpt2);
    made.push(byte_level(false, true, use_regex));
    match made.as_slice() {
        [one] => one.clone(),
        _ => json!({"type": "Sequence", "pretokenizers": made}),
    }
}

/// A step that makes each match a word.
pub(super) fn split(regex: &str) -> Value {
    json!({
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": false,
    })
}

pub(super) fn byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    })
}
