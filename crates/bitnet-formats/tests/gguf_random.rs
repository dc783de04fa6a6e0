//! Random headers survive a round trip; random damage is an error or another header, never a panic.

use bitnet_formats::gguf::{
    Array, GgmlType, GgufEntry, GgufHeader, Value, decode, encode_header, has_decoder,
};
use proptest::collection::vec;
use proptest::num::{f32 as float32, f64 as float64};
use proptest::prelude::*;

const SMALL: &[u8] = include_bytes!("data/gguf/small.gguf");

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..8).prop_map(|chars| chars.into_iter().collect())
}

/// Floats that equal themselves.
fn f32s() -> impl Strategy<Value = f32> {
    float32::POSITIVE
        | float32::NEGATIVE
        | float32::NORMAL
        | float32::SUBNORMAL
        | float32::ZERO
        | float32::INFINITE
}

fn f64s() -> impl Strategy<Value = f64> {
    float64::POSITIVE
        | float64::NEGATIVE
        | float64::NORMAL
        | float64::SUBNORMAL
        | float64::ZERO
        | float64::INFINITE
}

fn array() -> impl Strategy<Value = Array> {
    let flat = prop_oneof![
        vec(any::<u8>(), 0..6).prop_map(Array::U8),
        vec(any::<i8>(), 0..6).prop_map(Array::I8),
        vec(any::<u16>(), 0..6).prop_map(Array::U16),
        vec(any::<i16>(), 0..6).prop_map(Array::I16),
        vec(any::<u32>(), 0..6).prop_map(Array::U32),
        vec(any::<i32>(), 0..6).prop_map(Array::I32),
        vec(any::<u64>(), 0..6).prop_map(Array::U64),
        vec(any::<i64>(), 0..6).prop_map(Array::I64),
        vec(f32s(), 0..6).prop_map(Array::F32),
        vec(f64s(), 0..6).prop_map(Array::F64),
        vec(any::<bool>(), 0..6).prop_map(Array::Bool),
        vec(text(), 0..6).prop_map(Array::String),
    ];
    // Three levels around the numbers: as deep as is allowed.
    flat.prop_recursive(3, 16, 4, |inner| vec(inner, 0..4).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        f32s().prop_map(Value::F32),
        f64s().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        text().prop_map(Value::String),
        array().prop_map(Value::Array),
    ]
}

/// All types but the two that share an id: in a small file offsets do not tell them apart.
fn types() -> Vec<GgmlType> {
    let all = GgmlType::ALL.iter().copied();
    all.filter(|t| t.id() != GgmlType::Q2_0.id()).collect()
}

fn tensor(index: usize) -> impl Strategy<Value = GgufEntry> {
    (
        text(),
        proptest::sample::select(types()),
        vec(0usize..4, 0..4),
        0usize..3,
    )
        .prop_map(move |(name, ggml_type, mut shape, blocks)| {
            shape.push(blocks * ggml_type.block_len());
            GgufEntry {
                name: format!("{index} {name}"),
                len: ggml_type.tensor_bytes(&shape).unwrap(),
                shape,
                ggml_type,
            }
        })
}

fn tensors() -> impl Strategy<Value = Vec<GgufEntry>> {
    (tensor(0), tensor(1), tensor(2), 0usize..=3)
        .prop_map(|(a, b, c, count)| [a, b, c].into_iter().take(count).collect())
}

proptest! {
    #[test]
    fn headers_round_trip(pairs in vec((text(), value()), 0..8), tensors in tensors(), shift in 0u32..9) {
        let alignment = 1u32 << shift;
        let mut metadata = vec![("general.alignment".to_string(), Value::U32(alignment))];
        metadata.extend(pairs.into_iter().enumerate().map(|(i, (key, value))| (format!("{key} {i}"), value)));
        let encoded = encode_header(&metadata, &tensors, alignment).unwrap();
        let mut file = encoded.bytes.clone();
        file.resize(encoded.file_len() as usize, 0);
        let header = GgufHeader::read(file.as_slice(), file.len() as u64).unwrap();
        prop_assert_eq!(header.version, 3);
        prop_assert_eq!(header.alignment, alignment);
        prop_assert_eq!(header.data_start, encoded.bytes.len() as u64);
        prop_assert_eq!(header.metadata, metadata);
        prop_assert_eq!(header.tensors.len(), tensors.len());
        for ((got, expected), offset) in header.tensors.iter().zip(&tensors).zip(&encoded.offsets) {
            prop_assert_eq!(&got.name, &expected.name);
            prop_assert_eq!(&got.shape, &expected.shape);
            prop_assert_eq!((got.ggml_type, got.len, got.offset), (expected.ggml_type, expected.len, header.data_start + offset));
        }
    }

    #[test]
    fn previews_are_short_and_printable(value in value(), max_chars in 0usize..100) {
        let shown = value.preview(max_chars);
        // Escapes are at most ten characters for one; what is left out takes a few words.
        prop_assert!(shown.chars().count() <= 10 * max_chars + 60, "{}", shown);
        prop_assert!(!shown.chars().any(char::is_control), "{}", shown);
    }

    #[test]
    fn damage_never_panics(damage in vec((0usize..SMALL.len(), any::<u8>()), 1..6), cut in 0usize..SMALL.len()) {
        let mut file = SMALL.to_vec();
        for (at, byte) in damage {
            file[at] = byte;
        }
        for file in [&file[..], &file[..cut]] {
            let Ok(header) = GgufHeader::read(file, file.len() as u64) else { continue };
            for t in header.tensors {
                let bytes = &file[t.offset as usize..][..t.len as usize];
                if has_decoder(t.ggml_type) {
                    let mut out = vec![0.0; t.shape.iter().product()];
                    decode(t.ggml_type, bytes, &mut out).unwrap();
                }
            }
        }
    }

    #[test]
    fn noise_never_panics(noise in vec(any::<u8>(), 0..300), pairs in 0u64..4, tensors in 0u64..4) {
        prop_assert!(GgufHeader::read(noise.as_slice(), noise.len() as u64).is_err());
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(tensors.to_le_bytes());
        file.extend(pairs.to_le_bytes());
        file.extend(noise);
        let _ = GgufHeader::read(file.as_slice(), file.len() as u64);
    }

    #[test]
    fn any_block_decodes(noise in vec(any::<u8>(), 292)) {
        for &ggml_type in GgmlType::ALL.iter().filter(|&&t| has_decoder(t)) {
            decode(ggml_type, &noise[..ggml_type.block_bytes()], &mut vec![0.0; ggml_type.block_len()]).unwrap();
        }
    }
}
