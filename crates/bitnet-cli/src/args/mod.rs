//! The command line.

pub(crate) mod checkpoint;
mod examples;
pub(crate) mod model;
pub(crate) mod names;
#[cfg(feature = "train")]
pub(crate) mod train;

use checkpoint::{CompareArgs, ConvertArgs, DequantizeArgs, InspectArgs, QuantizeArgs, VerifyArgs};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use model::{BenchArgs, ChatArgs, EmbedArgs, PerplexityArgs, RunArgs};
use std::path::PathBuf;
#[cfg(feature = "train")]
use train::TrainArgs;

/// Ternary and low-bit models: quantize, inspect, convert, dequantize, compare and verify
/// checkpoints; run models, chat with them, embed texts, measure their perplexity, bench their speed, train new
/// ones. The demo quantizes a built-in model; completions and manual are for your shell
#[derive(Debug, Parser)]
#[command(name = "bitnet", version, max_term_width = 120, after_help = examples::PROGRAM)]
pub(crate) struct Cli {
    /// Print one JSON document on stdout
    #[arg(long, global = true, display_order = 1000)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Quantize a checkpoint
    ///
    /// Reads a .safetensors, .bin (PyTorch) or .gguf file, or a folder with config.json; writes
    /// whichever --out names. Embeddings, heads, norms and routers are kept unless a rule names them.
    #[command(after_help = examples::QUANTIZE)]
    Quantize(Box<QuantizeArgs>),
    /// List the tensors of a checkpoint with their bits per weight, and report what looks wrong
    #[command(after_help = examples::INSPECT)]
    Inspect(InspectArgs),
    /// Write the same codes in another container or layout
    #[command(after_help = examples::CONVERT)]
    Convert(ConvertArgs),
    /// Write every tensor of a checkpoint as floats
    #[command(after_help = examples::DEQUANTIZE)]
    Dequantize(DequantizeArgs),
    /// Compare two checkpoints tensor by tensor: what did quantization lose?
    #[command(after_help = examples::COMPARE)]
    Compare(CompareArgs),
    /// Check tensors, metadata and the files beside them against their checksums
    #[command(after_help = examples::VERIFY)]
    Verify(VerifyArgs),
    /// Generate text from a prompt
    #[command(after_help = examples::RUN)]
    Run(RunArgs),
    /// Talk with a model that has a chat template
    #[command(after_help = examples::CHAT)]
    Chat(ChatArgs),
    /// Give each text a vector, by an embedding model
    #[command(after_help = examples::EMBED)]
    Embed(EmbedArgs),
    /// Measure how well a model predicts a text, and how far it is from a reference
    #[command(after_help = examples::PERPLEXITY)]
    Perplexity(PerplexityArgs),
    /// Measure speed, load time and memory of a model, or of a shape with synthetic weights
    #[command(after_help = examples::BENCH)]
    Bench(BenchArgs),
    /// Train a model with quantized weights, and pack it
    #[cfg(feature = "train")]
    #[command(after_help = examples::TRAIN)]
    Train(Box<TrainArgs>),
    /// Quantize the built-in model in several ways and print size against error
    #[command(after_help = examples::DEMO)]
    Demo(DemoArgs),
    /// Print a completion script for a shell
    #[command(after_help = examples::COMPLETIONS)]
    Completions(CompletionsArgs),
    /// Write the manual pages, one for each command
    #[command(after_help = examples::MANUAL)]
    Manual(ManualArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Keep the written files in this new folder
    #[arg(long, value_name = "FOLDER")]
    pub(crate) keep: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManualArgs {
    /// The folder to write to; it is created if it does not exist
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Splits as a shell does, without the redirections.
    fn words(line: &str) -> Vec<String> {
        let (mut words, mut quote) = (vec![String::new()], None);
        for c in line.chars() {
            match (c, quote) {
                ('\'' | '"', None) => quote = Some(c),
                (c, Some(q)) if c == q => quote = None,
                (' ', None) => words.push(String::new()),
                ('<' | '>', None) => break,
                (c, _) => words.last_mut().unwrap().push(c),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    /// Calls `f` for a command and all below it.
    fn each(command: &clap::Command, f: &mut dyn FnMut(&clap::Command)) {
        f(command);
        for sub in command.get_subcommands() {
            each(sub, f);
        }
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_has_examples_that_parse() {
        each(&Cli::command(), &mut |command| {
            let name = command.get_name();
            let help = command.get_after_help().map(ToString::to_string);
            let help = help.unwrap_or_default();
            let examples: Vec<&str> = help
                .lines()
                .filter_map(|line| line.strip_prefix("  "))
                .collect();
            assert!(!examples.is_empty(), "{name}: no examples");
            for example in examples {
                match Cli::try_parse_from(words(example)) {
                    Ok(_) => {}
                    Err(error) if !error.use_stderr() => {}
                    Err(error) => panic!("{example}: {error}"),
                }
            }
        });
    }

    #[test]
    fn the_summary_names_each_command() {
        let cli = Cli::command();
        let about = cli.get_about().unwrap().to_string();
        for command in cli.get_subcommands() {
            assert!(about.contains(command.get_name()), "{}", command.get_name());
        }
    }
}
