//! Cases of the operations of a graph: attention, norms, gates, recurrences.

use super::Table;
use super::cases::{Results, each_length, floats, int8};
use crate::dense::{Attention, AttentionScratch, Cached, DeltaTokens, RotaryPairing, TokenHeads};
use crate::hadamard::Signs;
use half::f16;

/// Attention over each kind of cache of `positions`.
fn attentions(positions: usize, head_dim: usize, mut each: impl FnMut(Attention<'_>)) {
    let (floats, int8) = (floats(positions * head_dim), int8(positions * head_dim));
    let halves: Vec<u16> = floats.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
    let scales: Vec<f32> = (0..positions).map(|i| 0.01 + i as f32 * 1e-4).collect();
    for cached in [
        Cached::F32(&floats),
        Cached::F16(&halves),
        Cached::Int8(&int8, &scales),
    ] {
        for window in [None, Some(positions.div_ceil(3))] {
            each(Attention {
                keys: cached,
                values: cached,
                len: positions,
                window,
                head_dim,
                scale: 0.2,
            });
        }
    }
}

pub(super) fn attend(table: &Table) -> String {
    let mut results = Results::default();
    for (positions, head_dim, heads) in [(1, 16, 1), (5, 24, 2), (67, 64, 3), (130, 80, 5)] {
        let q = floats(heads * head_dim);
        attentions(positions, head_dim, |attention| {
            let mut out = vec![9.0; q.len()];
            table.attend(&attention, &q, &mut out);
            results.floats(&out);
        });
    }
    results.0
}

pub(super) fn attend_run(table: &Table) -> String {
    let mut results = Results::default();
    for (positions, head_dim, heads, tokens) in [(3, 16, 1, 2), (70, 24, 3, 6), (66, 64, 5, 3)] {
        let width = heads * head_dim;
        let at = TokenHeads {
            tokens,
            width,
            stride: width + 8,
        };
        let q = floats(tokens * at.stride);
        attentions(positions, head_dim, |attention| {
            let attention = Attention {
                len: positions + 1 - tokens,
                ..attention
            };
            let mut out = vec![9.0; q.len()];
            let mut scratch = AttentionScratch::default();
            table.attend_run(&attention, at, &q, &mut out, &mut scratch);
            results.floats(&out);
        });
    }
    results.0
}

pub(super) fn rms_norm(table: &Table) -> String {
    each_length(|n, results| {
        let mut out = vec![9.0; n];
        table.rms_norm(&floats(n), &floats(n + 1)[1..], 1e-5, &mut out);
        results.floats(&out);
    })
}

pub(super) fn rms_norm_in_place(table: &Table) -> String {
    each_length(|n, results| {
        let mut x = floats(n);
        table.rms_norm_in_place(&mut x, &floats(n + 1)[1..], 1e-5);
        results.floats(&x);
    })
}

pub(super) fn layer_norm(table: &Table) -> String {
    each_length(|n, results| {
        let (mut out, gains) = (vec![9.0; n], floats(n + 1));
        let weights = [&gains[1..], &gains[..n]];
        table.layer_norm(&floats(n), weights, 1e-5, &mut out);
        results.floats(&out);
    })
}

pub(super) fn rotate(table: &Table) -> String {
    each_length(|n, results| {
        let angles: Vec<(f32, f32)> = (0..n)
            .map(|i| (i as f32 * 0.1).sin_cos())
            .map(|(sin, cos)| (cos, sin))
            .collect();
        for pairing in [RotaryPairing::Halves, RotaryPairing::Adjacent] {
            let mut x = floats(6 * n);
            table.rotate(&mut x, &angles, pairing);
            results.floats(&x);
        }
    })
}

fn each_gate(gate: impl Fn(&[f32], &[f32], &mut [f32])) -> String {
    each_length(|n, results| {
        let gates: Vec<f32> = floats(n).iter().map(|x| 100.0 * x).collect();
        let mut out = vec![9.0; n];
        gate(&gates, &floats(n + 1)[1..], &mut out);
        results.floats(&out);
    })
}

pub(super) fn silu_mul(table: &Table) -> String {
    each_gate(|gate, up, out| table.silu_mul(gate, up, out))
}

pub(super) fn relu2_mul(table: &Table) -> String {
    each_gate(|gate, up, out| table.relu2_mul(gate, up, out))
}

pub(super) fn gelu_tanh_mul(table: &Table) -> String {
    each_gate(|gate, up, out| table.gelu_tanh_mul(gate, up, out))
}

pub(super) fn sigmoid_mul(table: &Table) -> String {
    each_gate(|gate, up, out| table.sigmoid_mul(gate, up, out))
}

pub(super) fn conv_silu(table: &Table) -> String {
    each_length(|n, results| {
        let mut out = vec![9.0; n];
        table.conv_silu(&floats(4 * n), &floats(4 * n + 1)[1..], &mut out);
        results.floats(&out);
    })
}

pub(super) fn delta_tokens(table: &Table) -> String {
    let mut results = Results::default();
    for (key_dim, value_dim, tokens) in [(1, 1, 2), (12, 17, 3), (33, 16, 1), (128, 128, 4)] {
        let (q, k) = (floats(tokens * key_dim), floats(tokens * key_dim + 1));
        let (v, gates) = (floats(tokens * value_dim), floats(2 * tokens));
        let gates: Vec<(f32, f32)> = gates.chunks(2).map(|x| (x[0], x[1])).collect();
        let run = DeltaTokens {
            tokens,
            q: &q,
            k: &k[1..],
            key_stride: key_dim,
            v: &v,
            value_stride: value_dim,
            gates: &gates,
            gate_stride: 1,
            key_dim,
            value_dim,
        };
        let mut state = floats(DeltaTokens::state_len(key_dim, value_dim));
        let mut out = vec![9.0; tokens * value_dim];
        table.delta_tokens(&run, &mut state, &mut out);
        results.floats(&state);
        results.floats(&out);
    }
    results.0
}

pub(super) fn gelu(table: &Table) -> String {
    each_length(|n, results| {
        let mut x: Vec<f32> = floats(n).iter().map(|x| 30.0 * x).collect();
        table.gelu(&mut x);
        results.floats(&x);
    })
}

pub(super) fn add(table: &Table) -> String {
    each_length(|n, results| {
        let mut x = floats(n);
        table.add(&mut x, &floats(n + 1)[1..]);
        results.floats(&x);
    })
}

pub(super) fn hadamard(table: &Table) -> String {
    let mut results = Results::default();
    for block in [1, 2, 8, 16, 32, 64, 128, 512, 1024, 4096] {
        let width = 3 * block;
        let signs = floats(width).iter().map(|x| x.signum()).collect::<Vec<_>>();
        for signs in [Signs::None, Signs::Before(&signs), Signs::After(&signs)] {
            let mut x = floats(2 * width);
            table.hadamard(&mut x, block, signs);
            results.floats(&x);
        }
    }
    results.0
}
