//! The command line.

use bitnet_benchmarks::operations::{Group, Shape};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Measures the kernels of bitnet-quant beside the machine's ceilings and beside rivals.
#[derive(Debug, Parser)]
#[command(name = "bitnet-benchmarks", version, max_term_width = 120)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Measure the machine and then operations, as shares of its ceilings and as ratios to rivals.
    Compare(CompareArgs),
    /// One HTML file of what compare wrote, to be opened without a network.
    Report(ReportArgs),
    /// What compare runs for each number of threads, in a process of its own: prints the document.
    #[command(hide = true)]
    Measure(MeasureArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Where to write the results, in JSON.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) output: PathBuf,
    /// Numbers of threads, one after another [default: 1 and one on each core; quick: 1].
    #[arg(long, value_delimiter = ',', value_name = "N,…", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Vec<u16>,
    #[command(flatten)]
    pub(crate) what: WhatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MeasureArgs {
    /// Number of threads.
    #[arg(long)]
    pub(crate) threads: u16,
    #[command(flatten)]
    pub(crate) what: WhatArgs,
}

/// What is measured and how long.
#[derive(Debug, Clone, Args)]
pub(crate) struct WhatArgs {
    /// Groups of operations: quantization, packing, simd, gemv, gemm [default: all].
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub(crate) operations: Vec<Group>,
    /// Shapes N×K (out × in) of the weights of gemv and gemm, such as 6912x2560 [default: those of
    /// BitNet 2B-4T and larger].
    #[arg(long, value_delimiter = ',', value_name = "NxK,…")]
    pub(crate) shapes: Vec<Shape>,
    /// Numbers of tokens M of gemm [default: 4,16,128,512; quick: 4,128].
    #[arg(long, value_delimiter = ',', value_name = "M,…", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) tokens: Vec<u32>,
    /// MiB that are cycled through where data comes from memory [default: four times the last
    /// cache, as memory permits; quick: once].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) working_set: Option<u32>,
    /// Turns of each comparison [default: 11; quick: 3].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) turns: Option<u32>,
    /// Our widest kernels alone, without rivals and narrower instruction sets.
    #[arg(long)]
    pub(crate) no_rivals: bool,
    /// Fewer shapes and turns, and a smaller working set: under half a minute.
    #[arg(long)]
    pub(crate) quick: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// What compare wrote.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) input: PathBuf,
    /// Where to write the report.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) output: PathBuf,
}
