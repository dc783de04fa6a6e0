//! Byte-exact vectors of the foreign layouts, from writers other than ours.
//!
//! Values: x ← 1664525·x + 1013904223 mod 2^32 from x = 1, advanced first, v = (x >> 24) mod 3 − 1;
//! scale 1. The vectors of tq1_0, tq2_0, q2_0 and q1_0 were written by ggml's own C functions,
//! those of pq2_0, ptq1_0, i2_s and hf-bitnet by independent ports.

use bitnet_core::pack::by_name;
use bitnet_core::random::GoldenStream;
use bitnet_core::{Error, Granularity, MatrixSpec, Precision, ScaleDtype};

const TQ1_0: &str = "35a01c4841984ca19268615183a01bfc73da1a7f6ae951193999db596f507a194e818759b000bd09e27e080c037504ff407c3017003c";
const TQ2_0: &str = "6499a05888192899499111689599a06a0596a055214a686008192641a1688560a295a6068900988268964291810501aa\
                     09560410914261222445a0808014116a003c";
const Q2_0: &str = "003c044415854909641189aa828945281a18";
const PQ2_0: &str = "003c044415854909641189aa828945281a18666494a564a2248a6982496a68544066";
const PTQ1_0: &str = "2ca6033430a91c6a6f7a93327d7022c00d8ef964fd41b3fb1a2a003c";
const Q1_0: &str = "3039a2b73b5efbb96b67effedeb69ffbeef8";
const I2_S: &str = "19660a25226428666146442956660aa950960a5548a12909206498414a2952098a569a906200268229968146425040aa\
                    609510044681498818510a02021444a90000803f";
const HF_BITNET: &str = "a855a8241005482581652558151518aa11660845592298a880158a01094851a8859a9816aa02a28a66984086891a08a6\
                         21591805804646041252818488160964";

fn hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2));
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
        .collect()
}

fn trits(n: usize) -> Vec<i8> {
    let mut stream = GoldenStream::new(1);
    (0..n).map(|_| stream.trit()).collect()
}

fn spec(rows: usize, cols: usize, precision: Precision, scale_dtype: ScaleDtype) -> MatrixSpec {
    MatrixSpec {
        scale_dtype,
        ..MatrixSpec::new(rows, cols, precision, Granularity::Tensor)
    }
}

/// Both directions; `scales` are in the bytes or empty.
fn both_ways(name: &str, spec: &MatrixSpec, values: &[i8], scales: &[f32], bytes: &[u8]) {
    let layout = by_name(name).unwrap();
    let mut packed = vec![7];
    layout.pack_into(spec, values, scales, &mut packed).unwrap();
    assert_eq!(packed[0], 7, "{name} appends");
    assert_eq!(&packed[1..], bytes, "{name} packed");
    let back = layout.unpack(spec, bytes).unwrap();
    assert_eq!(back.values, values, "{name} unpacked");
    assert_eq!(back.scales.unwrap_or_default(), scales, "{name} scales");
}

#[test]
fn the_values_are_those_of_the_vectors() {
    assert_eq!(
        trits(16),
        [-1, 0, -1, -1, -1, 0, -1, 0, 0, 0, 0, -1, 0, 0, -1, 1]
    );
}

#[test]
fn tq1_0() {
    both_ways(
        "tq1_0",
        &spec(1, 256, Precision::Ternary, ScaleDtype::F16),
        &trits(256),
        &[1.0],
        &hex(TQ1_0),
    );
}

#[test]
fn tq2_0() {
    both_ways(
        "tq2_0",
        &spec(1, 256, Precision::Ternary, ScaleDtype::F16),
        &trits(256),
        &[1.0],
        &hex(TQ2_0),
    );
}

#[test]
fn q2_0() {
    both_ways(
        "q2_0",
        &spec(1, 64, Precision::Ternary, ScaleDtype::F16),
        &trits(64),
        &[1.0],
        &hex(Q2_0),
    );
}

#[test]
fn groups_of_128() {
    let ternary = spec(1, 128, Precision::Ternary, ScaleDtype::F16);
    for (name, vector) in [("pq2_0", PQ2_0), ("q2_0-g128", PQ2_0), ("ptq1_0", PTQ1_0)] {
        both_ways(name, &ternary, &trits(128), &[1.0], &hex(vector));
    }
}

/// Code 3 is +2 under the scale 0.5: the int2 value −2 under −0.5.
#[test]
fn code_3_is_int2_under_the_negated_scale() {
    let codes: Vec<u8> = (0..128).map(|j| (j * 7 / 3 % 4) as u8).collect();
    let values: Vec<i8> = codes.iter().map(|&code| 1 - code as i8).collect();
    for (name, len) in [("q2_0", 64), ("pq2_0", 128), ("q2_0-g128", 128)] {
        let mut bytes = vec![0x00, 0x38];
        bytes.extend(
            codes[..len]
                .chunks(4)
                .map(|c| c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6),
        );
        let int2 = spec(1, len, Precision::Int2, ScaleDtype::F16);
        both_ways(name, &int2, &values[..len], &[-0.5], &bytes);
        let ternary = spec(1, len, Precision::Ternary, ScaleDtype::F16);
        assert!(by_name(name).unwrap().unpack(&ternary, &bytes).is_err());
        let (precision, wider) = by_name(name).unwrap().wider().unwrap();
        assert_eq!(precision, Precision::Int2);
        assert!(wider(&bytes) && wider(&[hex(PQ2_0)[..bytes.len()].to_vec(), bytes].concat()));
        assert!(!wider(&hex(if len == 64 { Q2_0 } else { PQ2_0 })));
        // 0xffff in the place of the scale is no code.
        assert!(!wider(&[vec![0xff, 0xff], vec![0; len / 4]].concat()));
    }
}

#[test]
fn q1_0() {
    // The writer took a bit for x ≥ 0 and the mean |x| as the scale.
    let trits = trits(128);
    let signs: Vec<i8> = trits.iter().map(|&v| if v >= 0 { 1 } else { -1 }).collect();
    let mean = trits.iter().filter(|&&v| v != 0).count() as f32 / 128.0;
    both_ways(
        "q1_0",
        &spec(1, 128, Precision::Binary, ScaleDtype::F16),
        &signs,
        &[ScaleDtype::F16.round(mean)],
        &hex(Q1_0),
    );
}

#[test]
fn i2_s() {
    let mut bytes = hex(I2_S);
    bytes.resize(256 / 4 + 32, 0);
    both_ways(
        "i2_s",
        &spec(1, 256, Precision::Ternary, ScaleDtype::F32),
        &trits(256),
        &[1.0],
        &bytes,
    );
    // Flat: the shape does not matter.
    both_ways(
        "i2_s",
        &spec(2, 128, Precision::Ternary, ScaleDtype::F32),
        &trits(256),
        &[1.0],
        &bytes,
    );
}

#[test]
fn i2_s_orders_by_their_formulas() {
    let values = trits(8 * 64);
    let code = |i: usize| (values[i] + 1) as u8;
    let mut groups = vec![0u8; 128 + 32];
    let mut rows = vec![0u8; 128 + 32];
    for i in 0..512 {
        let (b, g, p) = (i / 64, i % 64 / 16, i % 16);
        groups[16 * b + p] |= code(i) << (6 - 2 * g);
        let (row, col) = (i / 64, i % 64);
        rows[row / 4 * 64 + col] |= code(i) << (6 - 2 * (row % 4));
    }
    for bytes in [&mut groups, &mut rows] {
        bytes[128..132].copy_from_slice(&0.375f32.to_le_bytes());
    }
    let spec = spec(8, 64, Precision::Ternary, ScaleDtype::F32);
    both_ways("i2_s-g64", &spec, &values, &[0.375], &groups);
    both_ways("i2_s-x4", &spec, &values, &[0.375], &rows);
}

#[test]
fn hf_bitnet() {
    both_ways(
        "hf-bitnet",
        &spec(8, 32, Precision::Ternary, ScaleDtype::Bf16),
        &trits(256),
        &[],
        &hex(HF_BITNET),
    );
    let values = [0, -1, -1, 1, -1, 1, -1, 1, 1, 0, 0, -1, 1, -1, 1, -1];
    let bytes = [0b1010_0001, 0b0001_1000, 0b1001_0000, 0b0000_1010];
    both_ways(
        "hf-bitnet",
        &spec(8, 2, Precision::Ternary, ScaleDtype::Bf16),
        &values,
        &[],
        &bytes,
    );
    // Five rows: two byte rows, of which the second has fields of rows 1 and 3 only.
    let values = [1, 0, -1, 1, 1];
    both_ways(
        "hf-bitnet",
        &spec(5, 1, Precision::Ternary, ScaleDtype::Bf16),
        &values,
        &[],
        &[2 | 2 << 4, 1 | 2 << 2],
    );
}

#[test]
fn own_layouts_byte_by_byte() {
    let ternary = |cols| spec(1, cols, Precision::Ternary, ScaleDtype::F32);
    both_ways(
        "two-bit",
        &ternary(6),
        &[-1, 0, 1, -1, 1, 1],
        &[],
        &[0b00_10_01_00, 0b10_10],
    );
    both_ways(
        "base-3",
        &ternary(6),
        &[-1, 1, 0, 0, -1, 1],
        &[],
        &[2 * 3 + 9 + 27, 2],
    );
    both_ways(
        "one-bit",
        &spec(2, 3, Precision::Binary, ScaleDtype::F32),
        &[-1, 1, 1, 1, -1, -1],
        &[],
        &[0b110, 0b001],
    );
    both_ways(
        "two-bit",
        &spec(1, 4, Precision::Int2, ScaleDtype::F32),
        &[-2, -1, 0, 1],
        &[],
        &[0b11_10_01_00],
    );
    both_ways(
        "three-bit",
        &spec(1, 3, Precision::Int3, ScaleDtype::F32),
        &[-4, 3, -1],
        &[],
        &[0b11_111_000, 0],
    );
    both_ways(
        "three-bit",
        &spec(1, 3, Precision::Int3, ScaleDtype::F32),
        &[-3, 3, 3],
        &[],
        &[0b11_111_001, 1],
    );
    both_ways(
        "four-bit",
        &spec(1, 3, Precision::Int4, ScaleDtype::F32),
        &[-8, 7, 0],
        &[],
        &[0xf0, 0x08],
    );
    both_ways(
        "i8",
        &spec(1, 3, Precision::Int8, ScaleDtype::F32),
        &[-128, 127, -1],
        &[],
        &[0x80, 0x7f, 0xff],
    );
    let mut aligned = vec![0; 128];
    (aligned[0], aligned[64]) = (0b10_00_01, 0b01_01_10);
    both_ways(
        "byte-aligned",
        &spec(2, 3, Precision::Ternary, ScaleDtype::F32),
        &[0, -1, 1, 1, 0, 0],
        &[],
        &aligned,
    );
    // 70 zeros, then one +1: a long run of 64 + 6 and a short one.
    let mut long = vec![0; 71];
    long[70] = 1;
    both_ways(
        "run-length",
        &ternary(71),
        &long,
        &[],
        &[3, 0, 0, 0, 63 << 2 | 1, 6, 2],
    );
    both_ways(
        "sparse",
        &ternary(71),
        &long,
        &[],
        &[4, 0, 0, 0, 1, 1, 70, 0],
    );
    both_ways(
        "sparse",
        &ternary(4),
        &[0, -1, 1, -1],
        &[],
        &[3, 0, 0, 0, 0, 0b1110, 0b101],
    );
    both_ways(
        "hybrid",
        &ternary(71),
        &long,
        &[],
        &[4, 0, 0, 0, 1, 63 << 2 | 1, 6, 2],
    );
    both_ways(
        "hybrid",
        &ternary(3),
        &[1, 0, -1],
        &[],
        &[2, 0, 0, 0, 0, 2 + 3],
    );
    // A block of one value is all frequency and no words.
    both_ways(
        "entropy",
        &ternary(71),
        &[0; 71],
        &[],
        &[9, 0, 0, 0, 1, 0, 0, 0x80, 0x20, 0, 0, 1, 0],
    );
    both_ways(
        "entropy",
        &ternary(3),
        &[1, 0, -1],
        &[],
        &[2, 0, 0, 0, 0, 2 + 3],
    );
}

#[test]
fn q8_0_and_q4_0_by_their_formulas() {
    let bytes: Vec<i8> = (0..32i32).map(|i| (i * 8 - 128) as i8).collect();
    let mut q8 = vec![0x00, 0xb8]; // −0.5
    q8.extend(bytes.iter().map(|&v| v as u8));
    both_ways(
        "q8_0",
        &spec(1, 32, Precision::Int8, ScaleDtype::F16),
        &bytes,
        &[-0.5],
        &q8,
    );
    let nibbles: Vec<i8> = (0..32i32).map(|i| (i * 7 % 16 - 8) as i8).collect();
    let mut q4 = vec![0x00, 0xb8];
    q4.extend((0..16).map(|j| (nibbles[j] + 8) as u8 | ((nibbles[j + 16] + 8) as u8) << 4));
    both_ways(
        "q4_0",
        &spec(1, 32, Precision::Int4, ScaleDtype::F16),
        &nibbles,
        &[-0.5],
        &q4,
    );
}

/// One named pattern that no writer produces, and where it is.
#[track_caller]
fn corrupt(name: &str, spec: &MatrixSpec, bytes: &[u8], offset: usize) {
    match by_name(name).unwrap().unpack(spec, bytes) {
        Err(Error::Corrupt {
            layout,
            offset: found,
            ..
        }) => assert_eq!((layout, found), (name, offset)),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn patterns_that_no_writer_produces() {
    let own = |rows, cols, precision| spec(rows, cols, precision, ScaleDtype::F32);
    let ternary = |cols| own(1, cols, Precision::Ternary);
    corrupt("two-bit", &ternary(8), &[0, 0b11_00], 1);
    corrupt("two-bit", &ternary(3), &[0b0100_0000], 0);
    corrupt("two-bit", &own(2, 3, Precision::Int2), &[0, 0b0100_0000], 1);
    corrupt("one-bit", &own(1, 3, Precision::Binary), &[0b1000], 0);
    corrupt("i8", &own(1, 2, Precision::Binary), &[1, 0], 1);
    corrupt("base-3", &ternary(10), &[242, 243], 1);
    corrupt("base-3", &own(2, 2, Precision::Ternary), &[8, 9], 1);
    let mut aligned = vec![0; 128];
    aligned[127] = 1;
    corrupt(
        "byte-aligned",
        &own(2, 3, Precision::Ternary),
        &aligned,
        127,
    );
    corrupt("run-length", &ternary(2), &[1, 0, 0, 0, 3 | 1 << 2], 4); // code 3
    corrupt("run-length", &ternary(2), &[2, 0, 0, 0, 0, 0], 5); // two runs of −1
    corrupt("run-length", &ternary(2), &[1, 0, 0, 0, 2 << 2], 4); // a run of 3
    corrupt("run-length", &ternary(2), &[1, 0, 0, 0, 0], 5); // a run of 1 and nothing
    corrupt("run-length", &ternary(2), &[2, 0, 0, 0, 1 << 2, 0], 5); // two and more
    corrupt(
        "run-length",
        &ternary(64),
        &[3, 0, 0, 0, 63 << 2, 0x80, 0],
        5,
    ); // a varint with a zero byte
    corrupt("sparse", &ternary(2), &[1, 0, 0, 0, 2], 4); // tag
    corrupt("sparse", &ternary(2), &[3, 0, 0, 0, 0, 0b101, 0], 5); // a third of two
    corrupt("sparse", &ternary(2), &[3, 0, 0, 0, 0, 0b01, 0b10], 6); // a second sign
    corrupt("sparse", &ternary(2), &[4, 0, 0, 0, 1, 1, 2, 0], 6); // a non-zero at 2
    corrupt("hybrid", &ternary(2), &[2, 0, 0, 0, 3, 0], 4); // tag
    corrupt("hybrid", &ternary(2), &[2, 0, 0, 0, 0, 9], 5); // base-3 padding
    corrupt(
        "entropy",
        &ternary(71),
        &[8, 0, 0, 0, 1, 1, 0x80, 0x20, 0, 0, 1, 0],
        6,
    ); // frequencies above 4096
    corrupt(
        "entropy",
        &ternary(71),
        &[9, 0, 0, 0, 1, 0, 0, 0x80, 0x20, 0xff, 0xff, 0, 0],
        9,
    ); // a state below 2^16
    corrupt(
        "entropy",
        &ternary(71),
        &[9, 0, 0, 0, 1, 0, 0, 0x80, 0x20, 1, 0, 1, 0],
        9,
    ); // a wrong last state
    corrupt(
        "entropy",
        &ternary(71),
        &[11, 0, 0, 0, 1, 0, 0, 0x80, 0x20, 0, 0, 1, 0, 0, 0],
        13,
    ); // a word too many
    corrupt(
        "entropy",
        &ternary(71),
        &[7, 0, 0, 0, 1, 0, 2, 0, 0, 1, 0],
        5,
    ); // three zeros of three symbols
    corrupt(
        "entropy",
        &ternary(71),
        &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0],
        7,
    ); // zeros after zeros

    let carried = |cols, precision| spec(1, cols, precision, ScaleDtype::F16);
    let replaced = |text: &str, at: usize, byte: u8| {
        let mut bytes = hex(text);
        bytes[at] = byte;
        bytes
    };
    let ternary = |cols| carried(cols, Precision::Ternary);
    for never in [1, 20, 40, 60, 79, 99, 119, 138, 158, 178, 197, 217, 237] {
        corrupt("tq1_0", &ternary(256), &replaced(TQ1_0, 31, never), 31);
        corrupt("tq1_0", &ternary(256), &replaced(TQ1_0, 51, never), 51);
    }
    corrupt("ptq1_0", &ternary(128), &replaced(PTQ1_0, 23, 20), 23);
    corrupt("ptq1_0", &ternary(128), &replaced(PTQ1_0, 24, 2), 24); // q = 1, not a multiple of 3
    corrupt("pq2_0", &ternary(128), &replaced(PQ2_0, 33, 0xc0), 33);
    corrupt("tq1_0", &ternary(256), &replaced(TQ1_0, 48, 2), 48); // q = 1, not a multiple of 3
    corrupt("tq1_0", &ternary(256), &replaced(TQ1_0, 53, 0x7c), 52); // an infinite scale
    corrupt("tq2_0", &ternary(256), &replaced(TQ2_0, 40, 0x30), 40);
    corrupt("q2_0", &ternary(64), &replaced(Q2_0, 17, 0xc0), 17);
    corrupt("q2_0", &ternary(64), &replaced(Q2_0, 1, 0x7e), 0);
    let two_scales = [hex(Q2_0), replaced(Q2_0, 1, 0x40)].concat();
    corrupt("q2_0", &ternary(128), &two_scales, 18);
    let by_block = MatrixSpec {
        granularity: Granularity::Group(64),
        ..ternary(128)
    };
    assert_eq!(
        by_name("q2_0")
            .unwrap()
            .unpack(&by_block, &two_scales)
            .unwrap()
            .scales,
        Some(vec![1.0, 2.0])
    );

    let mut i2_s = hex(I2_S);
    i2_s.resize(96, 0xee); // what is behind the scale is not read
    let tensor = own(1, 256, Precision::Ternary);
    assert_eq!(
        by_name("i2_s")
            .unwrap()
            .unpack(&tensor, &i2_s)
            .unwrap()
            .values,
        trits(256)
    );
    i2_s[63] = 0b11;
    corrupt("i2_s", &tensor, &i2_s, 63);
    i2_s[63] = 0;
    i2_s[67] = 0xff;
    corrupt("i2_s", &tensor, &i2_s, 64);
    corrupt("hf-bitnet", &own(8, 1, Precision::Ternary), &[0, 0xc0], 1);
    corrupt(
        "hf-bitnet",
        &own(5, 1, Precision::Ternary),
        &[0, 0b1_0000],
        1,
    ); // row 5 of five
}

/// Frozen from our own writer, and read back by a decoder written in another language from the
/// prose of the layout alone.
#[test]
fn entropy_is_frozen() {
    let mut stream = GoldenStream::new(1);
    let next = || {
        let u = (stream.bits() >> 16 & 0xff) as i32;
        if u % 8 == 0 {
            (u / 8 - 16).clamp(-1, 1) as i8
        } else {
            0
        }
    };
    let values: Vec<i8> = std::iter::repeat_with(next).take(100).collect();
    let bytes = hex("110000000199039a1bc87f0707a3bff4a8fdd40215");
    both_ways(
        "entropy",
        &spec(1, 100, Precision::Ternary, ScaleDtype::F32),
        &values,
        &[],
        &bytes,
    );
}
