# `just` lists the recipes. `just ci` is what CI runs.

set shell := ["bash", "-euo", "pipefail", "-c"]

default:
    @just --list

# Unit, integration and documentation tests of every crate.
test:
    cargo test --workspace --locked

# Formatting, lints and documentation, each warning an error.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

# Tests of the lower crates on aarch64, wasm32 and older x86-64 under emulation; PARTS: aarch64 wasm32 x86 lint.
cross *PARTS:
    scripts/cross-test {{PARTS}}

# Quantize the small model in assets/ in several ways: bits against error.
demo:
    cargo run --release --locked --bin bitnet -- demo

# Kernels beside the machine's ceilings and beside rivals: results.json and report.html.
bench:
    cargo run --release --locked -p bitnet-benchmarks -- compare --output results.json
    cargo run --release --locked -p bitnet-benchmarks -- report --input results.json --output report.html

# Download the real models that the larger tests use (177 MB); prints their folder.
fetch:
    scripts/fetch-models

# Everything that must pass before a merge.
ci:
    .ci/run

# Licences, sources and advisories of the dependencies. Needs cargo-deny (`cargo install cargo-deny --locked`); advisories need the network.
deny *CHECKS:
    cargo deny check {{CHECKS}}
