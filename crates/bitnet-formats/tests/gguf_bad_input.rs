//! One test for each thing that can be wrong with a GGUF file. Nothing here may panic, nor allocate
//! by a number in the file.

use bitnet_formats::gguf::{
    Array, ByteOrder, EncodedHeader, Error, GgmlType, GgufEntry, GgufHeader, MAX_ARRAY_DEPTH,
    Value, decode, encode_header,
};

const SMALL: &[u8] = include_bytes!("data/gguf/small.gguf");

fn read(file: &[u8]) -> Result<GgufHeader, Error> {
    GgufHeader::read(file, file.len() as u64)
}

/// Builds headers byte by byte.
#[derive(Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn start(tensors: u64, pairs: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(pairs)
    }
    fn u8(mut self, n: u8) -> Self {
        self.0.push(n);
        self
    }
    fn u32(mut self, n: u32) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }
    fn u64(mut self, n: u64) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }
    fn str(self, s: &str) -> Self {
        let mut raw = self.u64(s.len() as u64);
        raw.0.extend(s.as_bytes());
        raw
    }
    fn tensor(self, name: &str, dims: &[u64], id: u32, offset: u64) -> Self {
        let raw = self.str(name).u32(dims.len() as u32);
        dims.iter()
            .fold(raw, |raw, &dim| raw.u64(dim))
            .u32(id)
            .u64(offset)
    }
    /// Pads to the alignment and adds a data section.
    fn data(mut self, bytes: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + bytes, 0);
        self
    }
    fn error(&self) -> Error {
        read(&self.0).expect_err("the file is wrong")
    }
}

macro_rules! assert_error {
    ($error:expr, $pattern:pat $(if $guard:expr)?, $message:expr) => {{
        let error = $error;
        assert!(matches!(error, $pattern $(if $guard)?), "{error:?}");
        assert_eq!(error.to_string(), $message);
    }};
}

#[test]
fn a_plain_file_of_this_builder_is_read() {
    let file = Raw::start(2, 1)
        .str("k")
        .u32(7)
        .u8(1)
        .tensor("a", &[4, 2], 0, 0)
        .tensor("b", &[4], 0, 32)
        .data(48);
    let header = read(&file.0).unwrap();
    assert_eq!(header.get("k"), Some(&Value::Bool(true)));
    assert_eq!(header.tensors[0].shape, [2, 4]);
}

#[test]
fn empty_file() {
    assert_error!(
        read(&[]).unwrap_err(),
        Error::Truncated { .. },
        "GGUF header at offset 0 needs 4 bytes, the file has 0 left"
    );
}

#[test]
fn truncated_anywhere() {
    for len in 0..SMALL.len() - 54 {
        // The last 54 bytes are padding after the last tensor.
        assert!(read(&SMALL[..len]).is_err(), "cut after {len} bytes");
    }
    assert!(read(&SMALL[..SMALL.len() - 54]).is_ok());
}

#[test]
fn shorter_than_announced() {
    for len in [0, 10, 100] {
        let error = GgufHeader::read(&SMALL[..len], SMALL.len() as u64).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error:?}");
        assert!(std::error::Error::source(&error).is_some());
    }
}

#[test]
fn bad_magic() {
    let error = read(b"GGML\x03\0\0\0").unwrap_err();
    assert_error!(
        error,
        Error::Magic { .. },
        "not a GGUF file: starts with bytes [47, 47, 4d, 4c], expected [47, 47, 55, 46]"
    );
}

#[test]
fn versions_that_do_not_exist() {
    assert_error!(
        Raw(b"GGUF".to_vec()).u32(4).u64(0).error(),
        Error::Version { got: 4 },
        "GGUF version 4, expected 1, 2 or 3"
    );
    for got in [0u32, 4] {
        for raw in [got, got.swap_bytes()] {
            let error = Raw(b"GGUF".to_vec()).u32(raw).error();
            assert!(matches!(error, Error::Version { got: g } if g == got));
        }
    }
}

#[test]
fn version_2_is_read() {
    let mut file = SMALL.to_vec();
    file[4] = 2;
    assert_eq!(read(&file).unwrap().version, 2);
}

/// Version 1, in the widths of the first specification: counts, lengths and dimensions are u32.
#[test]
fn version_1_has_narrow_counts() {
    let text = |raw: Raw, s: &str| {
        let mut raw = raw.u32(s.len() as u32);
        raw.0.extend(s.as_bytes());
        raw
    };
    for end in ["", "\0"] {
        let end = |s: &str| format!("{s}{end}");
        let mut raw = Raw(b"GGUF".to_vec()).u32(1).u32(2).u32(3);
        raw = text(raw, &end("general.architecture")).u32(8);
        raw = text(raw, &end("llama"));
        raw = text(raw, &end("tokens")).u32(9).u32(8).u32(2);
        raw = text(text(raw, &end("<s>")), &end(""));
        raw = text(raw, &end("n")).u32(4).u32(7);
        raw = text(raw, &end("a")).u32(2).u32(4).u32(2).u32(0).u64(0);
        raw = text(raw, &end("b")).u32(1).u32(4).u32(0).u64(32);
        let file = raw.data(48);
        let header = read(&file.0).unwrap();
        assert_eq!(header.version, 1);
        assert_eq!(header.byte_order, ByteOrder::Little);
        assert_eq!(
            header.metadata,
            [
                ("general.architecture".into(), Value::from("llama")),
                (
                    "tokens".into(),
                    Value::Array(Array::String(vec!["<s>".into(), String::new()]))
                ),
                ("n".into(), Value::U32(7)),
            ]
        );
        let tensors: Vec<_> = header.tensors.iter().collect();
        assert_eq!(tensors[0].name, "a");
        assert_eq!(tensors[0].shape, [2, 4]);
        assert_eq!(tensors[1].name, "b");
        assert_eq!(tensors[1].offset, header.data_start + 32);
        assert_eq!(header.data_start % 32, 0);
        for len in 0..file.0.len() {
            assert!(read(&file.0[..len]).is_err(), "cut after {len} bytes");
        }
    }
}

/// A zero byte of a token is its own where keys do not end in one.
#[test]
fn zero_bytes_of_values_stay() {
    let pair = |key: &str| {
        let file = Raw::start(0, 1).str(key).u32(8).str("a\0").data(0);
        let mut file = file.0;
        file[4] = 2;
        read(&file).unwrap().metadata.remove(0)
    };
    assert_eq!(pair("k"), ("k".into(), Value::from("a\0")));
    assert_eq!(pair("k\0"), ("k".into(), Value::from("a")));
}

#[test]
fn a_big_endian_file_with_blocks_that_nobody_defines() {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_be_bytes());
    file.extend(1u64.to_be_bytes());
    file.extend(0u64.to_be_bytes());
    file.extend(1u64.to_be_bytes());
    file.push(b'w');
    file.extend(1u32.to_be_bytes());
    file.extend(256u64.to_be_bytes());
    file.extend(35u32.to_be_bytes());
    file.extend(0u64.to_be_bytes());
    let file = Raw(file).data(66);
    assert_error!(
        file.error(),
        Error::BigEndian { .. },
        "tensor 'w': expected a type that is read from big-endian files (F32, F16, Q4_0, Q8_0, \
         Q4_K, Q6_K, I8, I16, I32, I64, F64, BF16, MXFP4, NVFP4), got TQ2_0; write the model again \
         on a little-endian machine"
    );
}

#[test]
fn huge_pair_count() {
    assert!(
        matches!(Raw::start(0, 1 << 60).error(), Error::Truncated { needed, left: 0, .. } if needed > 1 << 60)
    );
    assert!(matches!(
        Raw::start(0, u64::MAX).error(),
        Error::Truncated {
            needed: u64::MAX,
            ..
        }
    ));
}

#[test]
fn huge_tensor_count() {
    assert!(matches!(
        Raw::start(u64::MAX / 24, 0).error(),
        Error::Truncated { .. }
    ));
}

#[test]
fn huge_string() {
    let error = Raw::start(0, 1).u64(1 << 60).data(64).error();
    assert!(
        matches!(error, Error::Truncated { needed, .. } if needed == 1 << 60),
        "{error:?}"
    );
    let error = Raw::start(0, 1)
        .str("k")
        .u32(8)
        .u64(u64::MAX)
        .data(64)
        .error();
    assert!(
        matches!(
            error,
            Error::Truncated {
                needed: u64::MAX,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        error
            .to_string()
            .starts_with("value of key 'k' at offset 45 needs"),
        "{error}"
    );
}

#[test]
fn huge_array() {
    for (id, _) in [(0, 1), (4, 4), (7, 1), (8, 8), (9, 12), (12, 8)] {
        let error = Raw::start(0, 1)
            .str("k")
            .u32(9)
            .u32(id)
            .u64(u64::MAX / 2)
            .data(64)
            .error();
        assert!(matches!(error, Error::Truncated { .. }), "{error:?}");
    }
}

/// A sparse file can be long, so its length alone must not bound what is allocated.
#[test]
fn huge_string_in_a_long_file() {
    let file = Raw::start(0, 1).u64(1 << 40).data(64);
    let error = GgufHeader::read(file.0.as_slice(), 1 << 41).unwrap_err();
    assert!(
        matches!(error, Error::HeaderTooLarge { needed, .. } if needed == 1 << 40),
        "{error:?}"
    );
}

#[test]
fn arrays_nested_too_deeply() {
    let nested = |levels: usize| {
        let raw = (1..levels).fold(Raw::start(0, 1).str("k").u32(9), |raw, _| raw.u32(9).u64(1));
        raw.u32(4).u64(0).data(0)
    };
    assert!(read(&nested(MAX_ARRAY_DEPTH).0).is_ok());
    let error = nested(MAX_ARRAY_DEPTH + 1).error();
    assert_error!(
        error,
        Error::ArrayDepth { .. },
        "key 'k': arrays nested more than 4 deep"
    );
    assert!(matches!(nested(100_000).error(), Error::ArrayDepth { .. }));

    let array = |levels| (1..levels).fold(Array::U8(vec![]), |inner, _| Array::Array(vec![inner]));
    let write = |levels| encode_header(&[("k".into(), array(levels).into())], &[], 32);
    assert!(write(MAX_ARRAY_DEPTH).is_ok());
    assert!(matches!(
        write(MAX_ARRAY_DEPTH + 1),
        Err(Error::ArrayDepth { .. })
    ));
}

#[test]
fn unknown_value_type() {
    let error = Raw::start(0, 1).str("k").u32(13).u64(0).error();
    assert_error!(
        error,
        Error::ValueType { got: 13, .. },
        "key 'k': unknown value type 13 at offset 33, expected 0 to 12"
    );
    assert!(matches!(
        Raw::start(0, 1).str("k").u32(9).u32(99).u64(0).error(),
        Error::ValueType { got: 99, .. }
    ));
}

#[test]
fn boolean_of_two() {
    assert_error!(
        Raw::start(0, 1).str("k").u32(7).u8(2).error(),
        Error::Bool { .. },
        "key 'k': boolean 2 at offset 37, expected 0 or 1"
    );
}

#[test]
fn string_that_is_not_utf8() {
    let error = Raw::start(0, 1).str("k").u32(8).u64(1).u8(0xff).error();
    assert_error!(
        error,
        Error::Utf8 { .. },
        "value of key 'k' at offset 45 is not UTF-8"
    );
}

#[test]
fn duplicate_key() {
    let error = Raw::start(0, 2)
        .str("k")
        .u32(0)
        .u8(1)
        .str("k")
        .u32(0)
        .u8(2)
        .error();
    assert_error!(error, Error::DuplicateKey { .. }, "duplicate key 'k'");
}

#[test]
fn duplicate_tensor() {
    let error = Raw::start(2, 0)
        .tensor("t", &[1], 0, 0)
        .tensor("t", &[1], 0, 32)
        .data(64)
        .error();
    assert_error!(error, Error::DuplicateTensor { .. }, "duplicate tensor 't'");
}

#[test]
fn alignment_of_the_wrong_type_or_size() {
    let error = Raw::start(0, 1)
        .str("general.alignment")
        .u32(10)
        .u64(32)
        .error();
    assert_error!(
        error,
        Error::KeyType { .. },
        "key 'general.alignment': expected u32, got u64"
    );
    for got in [0, 3, 48] {
        let error = Raw::start(0, 1)
            .str("general.alignment")
            .u32(4)
            .u32(got)
            .error();
        assert_error!(
            error,
            Error::Alignment { .. },
            format!("alignment {got}, expected a power of two")
        );
    }
}

#[test]
fn largest_alignment_does_not_overflow() {
    let file = Raw::start(1, 1)
        .str("general.alignment")
        .u32(4)
        .u32(1 << 31)
        .tensor("t", &[1], 0, 0)
        .data(64);
    assert!(matches!(
        file.error(),
        Error::OutsideFile { available: 0, .. }
    ));
}

#[test]
fn too_many_dimensions() {
    let error = Raw::start(1, 0)
        .tensor("t", &[1, 1, 1, 1, 1], 0, 0)
        .data(32)
        .error();
    assert_error!(
        error,
        Error::Dims { got: 5, .. },
        "tensor 't': 5 dimensions, expected at most 4"
    );
    assert!(matches!(
        Raw::start(1, 0).str("t").u32(u32::MAX).data(64).error(),
        Error::Dims { .. }
    ));
}

#[test]
fn dimensions_that_overflow() {
    for dims in [
        &[1 << 32, 1 << 32][..],
        &[u64::MAX],
        &[1 << 62],
        &[1 << 21, 1 << 21, 1 << 21, 1 << 21],
        &[0, u64::MAX, u64::MAX],
    ] {
        let error = Raw::start(1, 0).tensor("t", dims, 0, 0).data(32).error();
        assert!(
            matches!(&error, Error::Tensor { cause, .. } if matches!(**cause, Error::TooLarge { .. })),
            "{error:?}"
        );
    }
}

#[test]
fn unknown_tensor_type() {
    let error = Raw::start(1, 0).tensor("t", &[32], 4, 0).data(64).error();
    assert_error!(
        error,
        Error::UnknownType { id: 4, .. },
        "tensor 't': unknown type id 4"
    );
}

#[test]
fn row_that_is_not_a_multiple_of_the_block() {
    let error = Raw::start(1, 0)
        .tensor("t", &[100, 64], GgmlType::Tq2_0.id(), 0)
        .data(64)
        .error();
    assert_error!(
        error,
        Error::Tensor { .. },
        "tensor 't': 100 values are not a multiple of the 256 values in a block of TQ2_0"
    );
}

#[test]
fn misaligned_offset() {
    let error = Raw::start(1, 0).tensor("t", &[1], 0, 4).data(64).error();
    assert_error!(
        error,
        Error::Misaligned { .. },
        "tensor 't': data offset 4 is not a multiple of the alignment 32"
    );
}

#[test]
fn tensor_outside_the_file() {
    let error = Raw::start(1, 0).tensor("t", &[9], 0, 32).data(64).error();
    assert_error!(
        error,
        Error::OutsideFile { .. },
        "tensor 't': 36 bytes at offset 32 of the data section, which has 64"
    );
    assert!(matches!(
        Raw::start(1, 0)
            .tensor("t", &[1], 0, 1 << 40)
            .data(64)
            .error(),
        Error::OutsideFile { .. }
    ));
    assert!(matches!(
        Raw::start(1, 0)
            .tensor("t", &[1], 0, u64::MAX - 31)
            .data(64)
            .error(),
        Error::OutsideFile { .. }
    ));
    // Not even an empty tensor may lie outside, nor in a data section that the file does not reach.
    assert!(matches!(
        Raw::start(1, 0).tensor("t", &[0], 0, 96).data(64).error(),
        Error::OutsideFile { .. }
    ));
    assert!(matches!(
        Raw::start(1, 0).tensor("tt", &[0], 0, 0).error(),
        Error::OutsideFile { .. }
    ));
}

#[test]
fn overlapping_tensors() {
    let error = Raw::start(2, 0)
        .tensor("b", &[16], 0, 32)
        .tensor("a", &[9], 0, 0)
        .data(96)
        .error();
    assert_error!(
        error,
        Error::Overlap { .. },
        "tensor 'b' starts at offset 128, inside tensor 'a' which ends at 132"
    );
    let error = Raw::start(2, 0)
        .tensor("a", &[1], 0, 0)
        .tensor("b", &[1], 0, 0)
        .data(32)
        .error();
    assert!(matches!(error, Error::Overlap { .. }), "{error:?}");
}

#[test]
fn writer_refuses_what_the_reader_would() {
    fn write(
        metadata: &[(&str, Value)],
        tensors: &[(&str, &[usize], GgmlType, u64)],
        alignment: u32,
    ) -> Result<EncodedHeader, Error> {
        let metadata: Vec<_> = metadata
            .iter()
            .map(|(key, value)| (key.to_string(), value.clone()))
            .collect();
        let tensors: Vec<_> = tensors
            .iter()
            .map(|&(name, shape, ggml_type, len)| GgufEntry {
                name: name.into(),
                shape: shape.into(),
                ggml_type,
                len,
            })
            .collect();
        encode_header(&metadata, &tensors, alignment)
    }
    const F32: GgmlType = GgmlType::F32;
    assert!(matches!(
        write(&[], &[], 48),
        Err(Error::Alignment { got: 48 })
    ));
    assert!(matches!(
        write(&[], &[], 64),
        Err(Error::AlignmentKey {
            expected: 64,
            got: 32
        })
    ));
    assert!(matches!(
        write(&[("k", 1.into()), ("k", 2.into())], &[], 32),
        Err(Error::DuplicateKey { .. })
    ));
    assert!(matches!(
        write(&[], &[("t", &[1], F32, 4), ("t", &[1], F32, 4)], 32),
        Err(Error::DuplicateTensor { .. })
    ));
    assert!(matches!(
        write(&[], &[("t", &[1; 5], F32, 4)], 32),
        Err(Error::Dims { got: 5, .. })
    ));
    let error = write(&[], &[("t", &[2, 3], F32, 20)], 32).unwrap_err();
    assert_error!(
        error,
        Error::Tensor { .. },
        "tensor 't': F32: expected 24 bytes, got 20"
    );
    assert!(matches!(
        write(&[], &[("t", &[100], GgmlType::Q8_0, 0)], 32),
        Err(Error::Tensor { .. })
    ));
    let half: (_, &[usize], _, _) = ("", &[1 << 60], F32, 1 << 62);
    assert!(
        write(
            &[],
            &[
                ("a", half.1, F32, half.3),
                ("b", half.1, F32, half.3),
                ("c", half.1, F32, half.3)
            ],
            32
        )
        .is_ok()
    );
    let all: Vec<_> = ["a", "b", "c", "d"]
        .into_iter()
        .map(|name| (name, half.1, half.2, half.3))
        .collect();
    assert!(matches!(write(&[], &all, 32), Err(Error::Tensor { .. })));
}

#[test]
fn decode_checks_lengths() {
    let mut out = [f32::NAN; 256];
    assert!(matches!(
        decode(GgmlType::Iq2S, &[0; 82], &mut out),
        Err(Error::NoDecoder {
            ggml_type: GgmlType::Iq2S
        })
    ));
    assert!(matches!(
        decode(GgmlType::Q8_0, &[0; 34], &mut out[..31]),
        Err(Error::RowLength {
            cols: 31,
            block: 32,
            ..
        })
    ));
    for len in [0, 33, 35, 68] {
        assert!(matches!(
            decode(GgmlType::Q8_0, &vec![0; len], &mut out[..32]),
            Err(Error::Length { expected: 34, .. })
        ));
    }
    assert!(decode(GgmlType::Q6K, &[], &mut []).is_ok());
}

#[test]
fn sizes_of_fork_types() {
    let bytes = |t: GgmlType, shape: &[usize]| t.tensor_bytes(shape).unwrap();
    assert_eq!(bytes(GgmlType::I2S, &[2560, 6912]), 2560 * 6912 / 4 + 32);
    // Blocks run over the flat tensor: a row may end inside one.
    assert_eq!(bytes(GgmlType::I2S, &[3200, 8640]), 3200 * 8640 / 4 + 32);
    assert!(GgmlType::I2S.tensor_bytes(&[3, 100]).is_err());
    assert_eq!(bytes(GgmlType::Iq1Bn, &[10, 2560]), 10 * (2 + 40 * 13));
    assert_eq!(bytes(GgmlType::Iq2Bn, &[10, 2560]), 10 * (4 + 40 * 16));
    assert_eq!(bytes(GgmlType::F32, &[]), 4);
    assert_eq!(bytes(GgmlType::F32, &[0, 5]), 0);
}

#[test]
fn ids_and_names_are_unique() {
    for &t in GgmlType::ALL {
        // Two types have the id 42; it names the one of llama.cpp.
        if t != GgmlType::Q2_0G128 {
            assert_eq!(GgmlType::from_id(t.id()), Some(t));
        }
        let same_id = if t.id() == 42 { 2 } else { 1 };
        let count =
            |same: &dyn Fn(GgmlType) -> bool| GgmlType::ALL.iter().filter(|u| same(**u)).count();
        assert_eq!(count(&|u| u.name() == t.name()), 1);
        assert_eq!(count(&|u| u.id() == t.id()), same_id);
        assert!(t.block_len() > 0 && t.block_bytes() > 0);
    }
    for id in [4, 5, 31, 32, 33, 37, 38, 43, u32::MAX] {
        assert_eq!(GgmlType::from_id(id), None);
    }
}
