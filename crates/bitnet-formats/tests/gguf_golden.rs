//! Against files that Python's gguf package wrote (scripts/make-gguf-golden.py).

use bitnet_core::random::GoldenStream;
use bitnet_formats::gguf::{
    Array, GgmlType, GgufEntry, GgufHeader, GgufTensor, Value, decode, encode_header, has_decoder,
};

const DECODE: &[u8] = include_bytes!("data/gguf/decode.gguf");
const SMALL: &[u8] = include_bytes!("data/gguf/small.gguf");

fn read(file: &[u8]) -> GgufHeader {
    GgufHeader::read(file, file.len() as u64).unwrap()
}

fn data<'a>(file: &'a [u8], tensor: &GgufTensor) -> &'a [u8] {
    &file[tensor.offset as usize..][..tensor.len as usize]
}

#[test]
fn every_decoder_gives_the_reference_bits() {
    let header = read(DECODE);
    let mut failures = Vec::new();
    let mut seen = 0;
    for &ggml_type in GgmlType::ALL.iter().filter(|&&t| has_decoder(t)) {
        if matches!(
            ggml_type,
            GgmlType::F64 | GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64
        ) {
            continue; // gguf has no dequantizer for them; see `plain_numbers`
        }
        let of_a_fork = GgmlType::Q2_0G128 == ggml_type || ggml_type.id() > GgmlType::Q2_0.id();
        if of_a_fork {
            continue; // gguf does not know them; see `ternary_values`
        }
        let bytes = data(
            DECODE,
            header.tensor(&format!("{ggml_type}.bytes")).unwrap(),
        );
        let expected = data(
            DECODE,
            header.tensor(&format!("{ggml_type}.floats")).unwrap(),
        );
        let mut out = vec![f32::NAN; expected.len() / 4];
        decode(ggml_type, bytes, &mut out).unwrap();
        for (i, (got, expected)) in out.iter().zip(expected.as_chunks().0).enumerate() {
            let expected = f32::from_le_bytes(*expected);
            if got.to_bits() != expected.to_bits() {
                failures.push(format!(
                    "{ggml_type}[{i}]: expected {expected:?}, got {got:?}"
                ));
            }
        }
        seen += 1;
    }
    assert!(
        failures.is_empty(),
        "{} values differ:\n{}",
        failures.len(),
        failures[..failures.len().min(40)].join("\n")
    );
    assert_eq!(
        seen,
        header.tensors.len() / 2,
        "a type in the golden file has no decoder"
    );
}

#[test]
fn half_precision_decodes_every_pattern() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut out = vec![0.0; 1 << 16];
    decode(GgmlType::Bf16, &bytes, &mut out).unwrap();
    assert!(
        out.iter()
            .enumerate()
            .all(|(i, x)| x.to_bits() == (i as u32) << 16)
    );
    decode(GgmlType::F16, &bytes, &mut out).unwrap();
    for (i, &x) in out.iter().enumerate() {
        let (sign, exponent, fraction) = (
            1.0 - 2.0 * (i >> 15) as f64,
            (i >> 10) as i32 & 31,
            (i & 1023) as f64,
        );
        match exponent {
            31 if fraction != 0.0 => assert!(x.is_nan()),
            31 => assert_eq!(f64::from(x), sign * f64::INFINITY),
            0 => assert_eq!(
                f64::from(x).to_bits(),
                (sign * fraction * 2f64.powi(-24)).to_bits()
            ),
            _ => assert_eq!(
                f64::from(x),
                sign * (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15)
            ),
        }
    }
}

#[test]
fn plain_numbers() {
    fn check(ggml_type: GgmlType, bytes: &[u8], expected: &[f32]) {
        let mut out = vec![f32::NAN; expected.len()];
        decode(ggml_type, bytes, &mut out).unwrap();
        assert_eq!(out, expected, "{ggml_type}");
    }
    check(
        GgmlType::I8,
        &[0, 127, 128, 255],
        &[0.0, 127.0, -128.0, -1.0],
    );
    check(GgmlType::I16, &[0, 128, 255, 255], &[-32768.0, -1.0]);
    check(GgmlType::I32, &16_777_217i32.to_le_bytes(), &[16_777_216.0]);
    check(
        GgmlType::I64,
        &i64::MIN.to_le_bytes(),
        &[-9_223_372_036_854_775_808.0],
    );
    check(GgmlType::F64, &0.1f64.to_le_bytes(), &[0.1]);
}

fn small_metadata() -> Vec<(String, Value)> {
    let pair = |key: &str, value: Value| (key.to_string(), value);
    vec![
        pair("general.architecture", "bitnet-b1.58".into()),
        pair("general.alignment", Value::U32(64)),
        pair("t.u8", Value::U8(200)),
        pair("t.i8", Value::I8(-100)),
        pair("t.u16", Value::U16(60000)),
        pair("t.i16", Value::I16(-30000)),
        pair("t.u32", Value::U32(4_000_000_000)),
        pair("t.i32", Value::I32(-2_000_000_000)),
        pair("t.u64", Value::U64(u64::MAX)),
        pair("t.i64", Value::I64(i64::MIN)),
        pair("t.f32", Value::F32(1e-5)),
        pair("t.f64", Value::F64(0.1)),
        pair("t.true", Value::Bool(true)),
        pair("t.false", Value::Bool(false)),
        pair("t.string", "grüße 世界".into()),
        pair(
            "a.string",
            Array::String(vec!["<s>".into(), String::new(), "▁x".into()]).into(),
        ),
        pair("a.bool", Array::Bool(vec![true, false]).into()),
        pair("a.u8", Array::U8(vec![0, 255]).into()),
        pair("a.i8", Array::I8(vec![-128, 127]).into()),
        pair("a.u16", Array::U16(vec![65535]).into()),
        pair("a.i16", Array::I16(vec![-32768]).into()),
        pair("a.u32", Array::U32(vec![1, 2, 3]).into()),
        pair("a.i32", Array::I32(vec![-1]).into()),
        pair("a.u64", Array::U64(vec![u64::MAX]).into()),
        pair("a.i64", Array::I64(vec![i64::MIN]).into()),
        pair("a.f32", Array::F32(vec![0.5, -0.25]).into()),
        pair("a.f64", Array::F64(vec![0.1]).into()),
    ]
}

#[test]
fn reads_what_python_wrote() {
    let header = read(SMALL);
    assert_eq!((header.version, header.alignment), (3, 64));
    assert_eq!(header.metadata, small_metadata());
    let tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t.shape.as_slice(), t.ggml_type, t.len))
        .collect();
    assert_eq!(
        tensors,
        [
            ("plain.weight", [2, 3].as_slice(), GgmlType::F32, 24),
            ("half.weight", &[2, 3, 4], GgmlType::F16, 48),
            ("q8_0.weight", &[3, 64], GgmlType::Q8_0, 204),
            ("tq2_0.weight", &[2, 256], GgmlType::Tq2_0, 132),
            ("bf16.weight", &[5], GgmlType::Bf16, 10),
        ]
    );
    let relative: Vec<_> = header
        .tensors
        .iter()
        .map(|t| t.offset - header.data_start)
        .collect();
    assert_eq!(relative, [0, 64, 128, 384, 576]);
    assert_eq!(header.data_start % 64, 0);
    assert_eq!(
        header.get("t.u32").and_then(Value::as_u64),
        Some(4_000_000_000)
    );
    assert!(header.get("t.u33").is_none() && header.tensor("no").is_none());
}

/// The header that we write for the same content has the same bytes as the one that Python wrote.
#[test]
fn writes_what_python_wrote() {
    let header = read(SMALL);
    let tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|t| GgufEntry {
            name: t.name.clone(),
            shape: t.shape.clone(),
            ggml_type: t.ggml_type,
            len: t.len,
        })
        .collect();
    let encoded = encode_header(&small_metadata(), &tensors, 64).unwrap();
    assert_eq!(encoded.bytes, SMALL[..header.data_start as usize]);
    let mut file = encoded.bytes.clone();
    for (i, tensor) in header.tensors.iter().enumerate() {
        assert_eq!(file.len() as u64, tensor.offset);
        file.extend(data(SMALL, tensor));
        file.resize(
            file.len() + encoded.padding_after(i, tensor.len) as usize,
            0,
        );
    }
    assert_eq!(file.len() as u64, encoded.file_len());
    assert_eq!(file, SMALL);
}

/// Blocks that ggml's C functions (of Prism's types: ports of them) wrote for ternary values from a
/// generator: the values come back.
#[test]
fn ternary_values() {
    let mut stream = GoldenStream::new(1);
    let values: Vec<i8> = (0..256).map(|_| stream.trit()).collect();
    let check = |ggml_type: GgmlType, hex: &str, value: fn(i8) -> f32| {
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
            .collect();
        let mut out = vec![f32::NAN; ggml_type.block_len()];
        decode(ggml_type, &bytes, &mut out).unwrap();
        assert_eq!(
            out,
            values[..out.len()]
                .iter()
                .map(|&v| value(v))
                .collect::<Vec<_>>(),
            "{ggml_type}"
        );
    };
    check(
        GgmlType::Tq1_0,
        "35a01c4841984ca19268615183a01bfc73da1a7f6ae951193999db596f507a194e818759b000bd09e27e080c037504ff407c3017003c",
        f32::from,
    );
    check(
        GgmlType::Tq2_0,
        "6499a05888192899499111689599a06a0596a055214a686008192641a1688560a295a6068900988268964291810501aa09560410914261222445a0808014116a003c",
        f32::from,
    );
    check(
        GgmlType::Q2_0,
        "003c044415854909641189aa828945281a18",
        f32::from,
    );
    let groups_of_128 = "003c044415854909641189aa828945281a18666494a564a2248a6982496a68544066";
    check(GgmlType::Pq2_0, groups_of_128, f32::from);
    check(GgmlType::Q2_0G128, groups_of_128, f32::from);
    check(
        GgmlType::Ptq1_0,
        "2ca6033430a91c6a6f7a93327d7022c00d8ef964fd41b3fb1a2a003c",
        f32::from,
    );
    // One bit, and the mean of |v| as scale: here 0x3930.
    check(
        GgmlType::Q1_0,
        "3039a2b73b5efbb96b67effedeb69ffbeef8",
        |v| if v >= 0 { 0.6484375 } else { -0.6484375 },
    );
}
