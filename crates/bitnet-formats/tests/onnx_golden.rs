//! Matrices in the blocks of `MatMulNBits`, against the bytes of onnxruntime's own quantizer, which
//! multiplied them: `scripts/make-onnx-golden.py` wrote both.

use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ZeroPoints};
use bitnet_formats::onnx::BlockFormat;
use serde_json::Value;

fn numbers(case: &Value, key: &str) -> Vec<f32> {
    let list = case[key].as_array().unwrap();
    list.iter().map(|n| n.as_f64().unwrap() as f32).collect()
}

fn size(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap() as usize
}

fn matrix(case: &Value) -> Matrix {
    let precision: Precision = case["precision"].as_str().unwrap().parse().unwrap();
    let granularity = Granularity::Group(size(case, "block"));
    let mut spec = MatrixSpec::new(
        size(case, "rows"),
        size(case, "cols"),
        precision,
        granularity,
    );
    if !case["symmetric"].as_bool().unwrap() {
        spec.zero_points = ZeroPoints::I8;
    }
    Matrix {
        spec,
        values: numbers(case, "values").iter().map(|&v| v as i8).collect(),
        scales: numbers(case, "scales"),
        zero_points: numbers(case, "zero_points"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn blocks_as_onnxruntime_packs_them() {
    let text = include_str!("data/onnx/blocks.json");
    let cases: Vec<Value> = serde_json::from_str(text).unwrap();
    assert_eq!(cases.len(), 12);
    for case in &cases {
        let matrix = matrix(case);
        let format = BlockFormat::of(&matrix.spec).unwrap();
        assert_eq!(format.bits, size(case, "bits"));
        assert_eq!(format.block, size(case, "block"));
        let packed = format.pack(&matrix).unwrap();
        assert_eq!(
            hex(&packed.codes),
            case["codes_hex"],
            "{}",
            matrix.spec.precision
        );
        assert_eq!(hex(&packed.zero_points), case["zero_points_hex"]);
        let scales: Vec<u8> = matrix.scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        assert_eq!(packed.scales, scales);
    }
}

/// Trits are the codes 1, 2 and 3; three bits take four; a scale of a row is one of each block; a
/// short block is filled with the code of 0.
#[test]
fn precisions_and_granularities_that_the_operators_do_not_have() {
    let trits = Matrix {
        spec: MatrixSpec::new(2, 20, Precision::Ternary, Granularity::Channel),
        values: (0..40).map(|i| (i % 3) as i8 - 1).collect(),
        scales: vec![0.5, 2.0],
        zero_points: vec![],
    };
    let format = BlockFormat::of(&trits.spec).unwrap();
    assert_eq!((format.bits, format.block, format.blocks()), (2, 16, 2));
    let packed = format.pack(&trits).unwrap();
    // Codes 1 2 3 1, 2 3 1 2, …, lowest bits first; the second block has 4 codes and 12 of 0.
    assert_eq!(hex(&packed.codes), "799ee7799eaaaaaae7799ee779aaaaaa");
    let scales: Vec<u8> = [0.5f32, 0.5, 2.0, 2.0]
        .iter()
        .flat_map(|s| s.to_le_bytes())
        .collect();
    assert_eq!(packed.scales, scales);
    assert!(packed.zero_points.is_empty());

    let block_of = |cols, granularity| {
        let spec = MatrixSpec::new(4, cols, Precision::Int3, granularity);
        BlockFormat::of(&spec).map(|format| (format.bits, format.block))
    };
    assert_eq!(block_of(4096, Granularity::Tensor).unwrap(), (4, 256));
    assert_eq!(block_of(4096, Granularity::Group(64)).unwrap(), (4, 64));
    assert_eq!(block_of(4096, Granularity::Group(512)).unwrap(), (4, 256));
    assert_eq!(block_of(192, Granularity::Group(96)).unwrap(), (4, 32));
    // One group is a row, however wide it is called.
    assert_eq!(block_of(40, Granularity::Group(100)).unwrap(), (4, 16));
    let refused = block_of(192, Granularity::Group(24))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("24") && refused.contains("dequantize"),
        "{refused}"
    );
    for (planes, zero_points) in [(2, ZeroPoints::None), (1, ZeroPoints::F32)] {
        let spec = MatrixSpec {
            planes,
            zero_points,
            ..MatrixSpec::new(4, 64, Precision::Ternary, Granularity::Channel)
        };
        assert!(BlockFormat::of(&spec).is_err());
    }
}
