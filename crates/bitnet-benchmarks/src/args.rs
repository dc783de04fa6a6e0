//! The command line.

use bitnet_benchmarks::selection::{OperationGroup, WeightShape};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Measures the kernels of bitnet-quant against the machine's ceilings and against rivals.
#[derive(Debug, Parser)]
#[command(name = "bitnet-benchmarks", version, max_term_width = 120)]
pub(crate) struct BenchmarkArgs {
    #[command(subcommand)]
    pub(crate) command: BenchmarkCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchmarkCommand {
    /// Measure operations as shares of the machine's ceilings and as ratios to rivals.
    Compare(CompareKernelsArgs),
    /// Render the results of compare as one HTML file that needs no network.
    Report(BenchmarkReportArgs),
    /// Measure with one number of threads and print the document: compare runs this in a process of
    /// its own.
    #[command(hide = true)]
    Measure(MeasureProcessArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CompareKernelsArgs {
    /// Write the results to this file, in JSON.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) output: PathBuf,
    /// Numbers of threads to measure with [default: 1 and one per core; quick: 1].
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,…",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub(crate) threads: Vec<u16>,
    #[command(flatten)]
    pub(crate) selection: SelectionArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MeasureProcessArgs {
    /// Number of threads.
    #[arg(long)]
    pub(crate) threads: u16,
    #[command(flatten)]
    pub(crate) selection: SelectionArgs,
}

/// Which operations to measure, and how long.
#[derive(Debug, Clone, Args)]
pub(crate) struct SelectionArgs {
    /// Groups of operations: quantization, packing, simd, gemv, gemm [default: all].
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub(crate) operations: Vec<OperationGroup>,
    /// Shapes N×K (out × in) of the weights of gemv and gemm, such as 6912x2560 [default: layers of
    /// BitNet 2B-4T and a larger one].
    #[arg(long, value_delimiter = ',', value_name = "NxK,…")]
    pub(crate) shapes: Vec<WeightShape>,
    /// Numbers of tokens M of gemm [default: 4,16,128,512; quick: 4,128].
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "M,…",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub(crate) tokens: Vec<u32>,
    /// Working set in MiB of data that comes from memory [default: four times the last cache, less
    /// if memory is short; quick: once].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) working_set: Option<u32>,
    /// Number of turns of each comparison [default: 11; quick: 3].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) turns: Option<u32>,
    /// Measure our widest kernels alone, without rivals and narrower instruction sets.
    #[arg(long)]
    pub(crate) no_rivals: bool,
    /// Take fewer shapes and turns and a smaller working set: under half a minute.
    #[arg(long)]
    pub(crate) quick: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchmarkReportArgs {
    /// The results that compare wrote.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) input: PathBuf,
    /// Write the report to this file.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) output: PathBuf,
}
