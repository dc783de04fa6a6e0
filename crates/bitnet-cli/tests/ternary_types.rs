//! Q2_0 in groups of 64 and 128, PQ2_0, PTQ1_0: read, regrouped, and refused where values or scales
//! would be lost.

mod common;

use bitnet_core::ScaleDtype;
use common::Dir;

const Q2_0: u32 = 42;
const PQ2_0: u32 = 142;
const PTQ1_0: u32 = 143;

/// A GGUF with one tensor `t.weight` of this type, `rows` × `cols`, written by hand.
fn gguf(dir: &Dir, name: &str, ggml_type: u32, [rows, cols]: [u64; 2], data: &[u8]) {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend([1u64, 1].map(u64::to_le_bytes).concat());
    let string = |file: &mut Vec<u8>, s: &str| {
        file.extend((s.len() as u64).to_le_bytes());
        file.extend(s.as_bytes());
    };
    string(&mut file, "general.architecture");
    file.extend(8u32.to_le_bytes());
    string(&mut file, "llama");
    string(&mut file, "t.weight");
    file.extend(2u32.to_le_bytes());
    file.extend([cols, rows].map(u64::to_le_bytes).concat());
    file.extend(ggml_type.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    file.resize(file.len().next_multiple_of(32), 0);
    dir.write(name, file);
}

/// Blocks of two-bit codes: the scale of block b, then the codes of `size` elements.
fn two_bits(codes: &[u8], size: usize, scale: impl Fn(usize) -> f32) -> Vec<u8> {
    let blocks = codes.chunks(size).enumerate();
    blocks
        .flat_map(|(b, codes)| {
            let fours = codes.chunks(4);
            let bytes = fours.map(|c| c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
            let mut block = vec![];
            ScaleDtype::F16.write(scale(b), &mut block);
            block.extend(bytes);
            block
        })
        .collect()
}

/// Codes of 8 rows of 1024 columns, below `levels`.
fn codes(levels: u8) -> Vec<u8> {
    (0..8 * 1024u32)
        .map(|i| ((i.wrapping_mul(2_654_435_761) >> 13) % u32::from(levels)) as u8)
        .collect()
}

fn scale(group: usize) -> f32 {
    0.25 + group as f32 / 64.0
}

/// The tensor's bytes at the end of a GGUF, without padding.
fn data(dir: &Dir, name: &str, len: usize) -> Vec<u8> {
    let file = dir.read(name);
    file[file.len() - len.next_multiple_of(32)..][..len].to_vec()
}

#[test]
fn groups_of_64_and_128_and_back() {
    let (dir, codes) = (Dir::new(), codes(3));
    // Pairs of groups of 64 have one scale.
    let g64 = two_bits(&codes, 64, |b| scale(b / 2));
    let g128 = two_bits(&codes, 128, scale);
    gguf(&dir, "g64.gguf", Q2_0, [8, 1024], &g64);
    gguf(&dir, "g128.gguf", Q2_0, [8, 1024], &g128);
    gguf(&dir, "pq2.gguf", PQ2_0, [8, 1024], &g128);
    for (name, layout) in [("g64", "q2_0"), ("g128", "q2_0-g128"), ("pq2", "pq2_0")] {
        let inspect = dir.run(&["inspect", &format!("{name}.gguf"), "--json"]);
        let json = inspect.is(0).json();
        assert_eq!(json["tensors"][0]["stored_as"], layout, "{name}");
        assert_eq!(json["tensors"][0]["precision"], "ternary");
        for (to, expected) in [("q2_0", &g64), ("q2_0-g128", &g128), ("pq2_0", &g128)] {
            let (from, out) = (format!("{name}.gguf"), format!("{name}-{to}.gguf"));
            dir.run(&["convert", &from, "--out", &out, "--layout", to])
                .is(0);
            assert!(&data(&dir, &out, expected.len()) == expected, "{out}");
            dir.run(&["verify", &out]).is(0);
            dir.run(&["compare", &from, &out]).is(0);
        }
        // Through trits five a byte and our own layout.
        let ours = format!("{name}.safetensors");
        let from = format!("{name}.gguf");
        dir.run(&[
            "convert", &from, "--out", "p.gguf", "--layout", "ptq1_0", "--force",
        ])
        .is(0);
        dir.run(&["convert", "p.gguf", "--out", &ours, "--layout", "base-3"])
            .is(0);
        dir.run(&["compare", &from, &ours]).is(0);
    }
    let json = dir.run(&["inspect", "p.gguf", "--json"]).is(0).json();
    assert!(
        json["opened_by"]["Prism's fork of llama.cpp"].is_array(),
        "{json}"
    );
}

#[test]
fn scales_that_differ_are_not_merged() {
    let (dir, codes) = (Dir::new(), codes(3));
    gguf(
        &dir,
        "g64.gguf",
        Q2_0,
        [8, 1024],
        &two_bits(&codes, 64, |b| scale(b / 2 + usize::from(b == 5))),
    );
    let args = ["convert", "g64.gguf", "--out", "o.gguf", "--layout"];
    for layout in ["q2_0-g128", "pq2_0", "ptq1_0"] {
        let parts = ["t.weight", "row 0, column 320", "2.96875e-1", "2.8125e-1"];
        dir.refuses(&[&args[..], &[layout]].concat(), &parts);
    }
    dir.run(&[&args[..], &["q2_0"]].concat()).is(0);
}

#[test]
fn code_3_is_kept_or_refused() {
    let (dir, codes) = (Dir::new(), codes(4));
    let blocks = two_bits(&codes, 128, scale);
    gguf(&dir, "pq2.gguf", PQ2_0, [8, 1024], &blocks);
    let json = dir.run(&["inspect", "pq2.gguf", "--json"]).is(0).json();
    assert_eq!(json["tensors"][0]["precision"], "int2");
    for layout in ["ptq1_0", "tq2_0"] {
        let args = ["convert", "pq2.gguf", "--out", "o.gguf", "--layout", layout];
        dir.refuses(&args, &["t.weight", layout, "int2"]);
    }
    dir.run(&["convert", "pq2.gguf", "--out", "o.safetensors"])
        .is(0);
    dir.run(&["compare", "pq2.gguf", "o.safetensors"]).is(0);
    dir.run(&["dequantize", "pq2.gguf", "--out", "f.safetensors"])
        .is(0);
    let floats = dir.read("f.safetensors");
    let floats = &floats[floats.len() - 4 * codes.len()..];
    for (i, (bytes, code)) in floats.chunks(4).zip(&codes).enumerate() {
        let expected = (f32::from(*code) - 1.0) * scale(i / 128);
        let got = f32::from_le_bytes(bytes.try_into().unwrap());
        assert_eq!(got, expected, "weight {i}");
    }
    // And back, to the byte.
    let args = [
        "convert",
        "pq2.gguf",
        "--out",
        "back.gguf",
        "--layout",
        "q2_0-g128",
    ];
    dir.run(&args).is(0);
    assert!(data(&dir, "back.gguf", blocks.len()) == blocks);
}

#[test]
fn trits_in_the_order_of_positions() {
    // 128 values whose only +1 is element 81: digit 0 of byte 1 of the second stage.
    let dir = Dir::new();
    let zero = ((121u16 * 256).div_ceil(243)) as u8;
    let four_zeros = ((120u16 * 256).div_ceil(243)) as u8;
    let mut block = vec![zero; 24];
    block[17] = ((121u16 + 81) * 256).div_ceil(243) as u8;
    block.extend([four_zeros, four_zeros, 0x00, 0x3c]);
    gguf(&dir, "p.gguf", PTQ1_0, [1, 128], &block);
    dir.run(&["dequantize", "p.gguf", "--out", "f.safetensors"])
        .is(0);
    let file = dir.read("f.safetensors");
    let floats: Vec<f32> = file[file.len() - 512..]
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let expected: Vec<f32> = (0..128).map(|i| f32::from(u8::from(i == 81))).collect();
    assert_eq!(floats, expected);
}
