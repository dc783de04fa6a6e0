//! The examples below the help of each command; a test parses them.

pub(super) const PROGRAM: &str = "\
Examples:
  bitnet demo
  bitnet quantize model/ --out model-ternary --threshold optimal
  bitnet compare model/ model-ternary
  bitnet run model-ternary --prompt \"Once upon a time\"
  bitnet help quantize

Exit status: 0 done, 1 the answer is no, 2 bad usage or bad input, 130 interrupted.";

pub(super) const QUANTIZE: &str = "\
Examples:
  bitnet quantize model/ --out model-ternary --threshold optimal --granularity group:128
  bitnet quantize model/ --out model.gguf --threshold optimal
  bitnet quantize model/ --out model-hf --format hf-bitnet
  bitnet quantize model/ --out mixed --rule '*embed*=int8' --rule '*.down_proj.*=int4'
  bitnet quantize model/ --out best --target-bpw 2.5
  bitnet quantize model.gguf --out small.safetensors --planes 2 --layout auto
  bitnet quantize model/ --out model.gguf --preset bonsai";

pub(super) const INSPECT: &str = "\
Examples:
  bitnet inspect model-ternary
  bitnet inspect model.gguf --headers --quiet";

pub(super) const CONVERT: &str = "\
Examples:
  bitnet convert model-hf --out model.gguf
  bitnet convert model-hf --out parts.gguf --shard-size 2GB
  bitnet convert model.gguf --out model.safetensors --layout base-3
  bitnet convert rotated.gguf --out plain.gguf --unrotate
  bitnet convert model-ternary --format onnx --out model-onnx";

pub(super) const DEQUANTIZE: &str = "\
Examples:
  bitnet dequantize model.gguf --out floats.safetensors --dtype bf16";

pub(super) const COMPARE: &str = "\
Examples:
  bitnet compare model/ model-ternary
  bitnet compare model/ model-ternary --min-sqnr 5 --quiet

Exit status: 1 if a gate fails.";

pub(super) const VERIFY: &str = "\
Examples:
  bitnet verify model-ternary

Exit status: 1 if something is damaged.";

pub(super) const RUN: &str = "\
Examples:
  bitnet run model.gguf --prompt \"Once upon a time\" --max-tokens 64
  bitnet run model/ --chat --prompt \"Name three birds.\" --temperature 0.8 --seed 7
  bitnet run model/ --quiet < prompt.txt > text.txt";

pub(super) const CHAT: &str = "\
Examples:
  bitnet chat model.gguf
  bitnet chat model/ --system \"Answer in one sentence.\" --temperature 0.8";

pub(super) const EMBED: &str = "\
Examples:
  bitnet embed model/ \"a cat\" \"a kitten\" --similarity
  bitnet embed model/ --file lines.txt --format npy > vectors.npy
  bitnet embed model.gguf --prompt-name query --format jsonl < questions.txt";

pub(super) const PERPLEXITY: &str = "\
Examples:
  bitnet perplexity model.gguf --text book.txt
  bitnet perplexity model-ternary --text book.txt --reference model/";

pub(super) const BENCH: &str = "\
Examples:
  bitnet bench model.gguf
  bitnet bench --shape bitnet-2b-4t --prompt 512 --repeat 5
  bitnet bench --shape bonsai-8b --activations int8";

#[cfg(feature = "train")]
pub(super) const TRAIN: &str = "\
Examples:
  bitnet train lm --text book.txt --steps 3000 --out run
  bitnet train image --data fashion-mnist --out run --teacher self";

#[cfg(feature = "train")]
pub(super) const TRAIN_IMAGE: &str = "\
Examples:
  bitnet train image --data fashion-mnist --out run --teacher self
  bitnet train image --data fashion-mnist --out run --resume";

#[cfg(feature = "train")]
pub(super) const TRAIN_LM: &str = "\
Examples:
  bitnet train lm --text book.txt --steps 3000 --out run
  bitnet train lm --text book.txt --from model/ --learning-rate 1e-4 --out tuned
  bitnet train lm --text book.txt --architecture qwen3 --preset bonsai --format gguf --out run";

pub(super) const DEMO: &str = "\
Examples:
  bitnet demo
  bitnet demo --keep files";

pub(super) const COMPLETIONS: &str = "\
Examples:
  bitnet completions bash > ~/.local/share/bash-completion/completions/bitnet
  bitnet completions zsh > ~/.zfunc/_bitnet
  bitnet completions fish > ~/.config/fish/completions/bitnet.fish";

pub(super) const MANUAL: &str = "\
Examples:
  bitnet manual ~/.local/share/man/man1";
