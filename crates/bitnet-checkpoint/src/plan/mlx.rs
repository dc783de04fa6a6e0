//! Folders that mlx-lm opens: what MLX's affine quantization stores of a matrix.
//!
//! ```text
//! weight = q · scale + bias       q in b bits, the first of a row in the lowest bits of a u32
//! value  = q + low                low is the smallest value: −1 ternary, −2, −4, −8, −128
//! bias   = (low − zero point) · scale
//! ```
//!
//! These are the bytes of our own layouts of 2, 3 and 4 bits. Codes of 8 bits are unsigned in MLX, so
//! their highest bit is inverted.

use bitnet_core::pack::{self, Layout};
use bitnet_core::{Error, Granularity, MatrixSpec, Precision, ScaleDtype, ZeroPoints};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Groups that MLX has kernels for, the one to try first first.
pub(crate) const GROUPS: [usize; 3] = [64, 32, 128];

/// The layout of the codes of a precision; `None` for one that MLX does not have.
pub(crate) fn layout(precision: Precision) -> Option<&'static dyn Layout> {
    (precision != Precision::Binary).then(|| pack::plain(precision))
}

/// Whether MLX can hold the matrix.
pub(crate) fn check(spec: &MatrixSpec) -> Result<(), Error> {
    let refused = |why: String| Err(Error::Unsupported { layout: "mlx", why });
    match spec.granularity {
        _ if spec.planes != 1 => refused(format!("it has 1 plane, and the matrix {}", spec.planes)),
        Granularity::Group(group) if GROUPS.contains(&group) => {
            if spec.cols.is_multiple_of(group) && spec.cols > 0 {
                return Ok(());
            }
            let cols = spec.cols;
            refused(format!("{cols} columns are no whole groups of {group}"))
        }
        other => refused(format!(
            "it has one scale for 32, 64 or 128 columns, and the granularity is {other}"
        )),
    }
}

/// Turns packed codes of ours into those of MLX.
pub(crate) fn encode(precision: Precision, codes: &mut [u8]) {
    if precision == Precision::Int8 {
        codes.iter_mut().for_each(|byte| *byte ^= 0x80);
    }
}

/// The bytes of the biases, in the type of the scales.
pub(crate) fn biases(
    spec: &MatrixSpec,
    dtype: ScaleDtype,
    scales: &[f32],
    zero_points: &[f32],
) -> Vec<u8> {
    let low = f32::from(spec.precision.range().0);
    let mut bytes = Vec::with_capacity(scales.len() * dtype.bytes());
    for (i, scale) in scales.iter().enumerate() {
        let zero = match spec.zero_points {
            ZeroPoints::None => 0.0,
            ZeroPoints::I8 | ZeroPoints::F32 => zero_points.get(i).copied().unwrap_or(0.0),
        };
        dtype.write((low - zero) * scale, &mut bytes);
    }
    bytes
}

/// The key `quantization` of config.json: group and bits of most matrices, and those of each module
/// that differs.
pub(crate) fn config(modules: &BTreeMap<String, (usize, u32)>) -> Option<Value> {
    let mut counts: BTreeMap<(usize, u32), usize> = BTreeMap::new();
    for &kind in modules.values() {
        *counts.entry(kind).or_default() += 1;
    }
    let (&common, _) = counts.iter().max_by_key(|&(_, count)| count)?;
    let json = |(group, bits): (usize, u32)| json!({"group_size": group, "bits": bits});
    let mut section = Map::new();
    section.extend(json(common).as_object().cloned().unwrap_or_default());
    for (module, &kind) in modules.iter().filter(|(_, kind)| **kind != common) {
        section.insert(module.clone(), json(kind));
    }
    Some(Value::Object(section))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What mlx.core.dequantize(w, scales, biases, 32, 2) of MLX 0.30 gives is the values: q = 0, 1, 2
    /// are −s, 0, s.
    #[test]
    fn ternary_codes_and_biases() {
        let spec = MatrixSpec {
            scale_dtype: ScaleDtype::F16,
            ..MatrixSpec::new(1, 32, Precision::Ternary, Granularity::Group(32))
        };
        check(&spec).unwrap();
        let values: Vec<i8> = (0..32).map(|j| (j % 3) as i8 - 1).collect();
        let mut codes = vec![];
        let layout = layout(Precision::Ternary).unwrap();
        layout
            .pack_into(&spec, &values, &[0.5], &mut codes)
            .unwrap();
        encode(Precision::Ternary, &mut codes);
        // 0 1 2 0 1 2 … from the lowest bits on: 0b00_10_01_00, 0b01_00_10_01, 0b10_01_00_10.
        assert_eq!(codes, [0x24, 0x49, 0x92, 0x24, 0x49, 0x92, 0x24, 0x49]);
        assert_eq!(biases(&spec, ScaleDtype::F16, &[0.5], &[]), [0x00, 0xb8]);
        let bad = MatrixSpec::new(1, 33, Precision::Ternary, Granularity::Group(32));
        assert!(check(&bad).is_err());
    }

    #[test]
    fn eight_bits_are_unsigned() {
        let spec = MatrixSpec::new(1, 32, Precision::Int8, Granularity::Group(32));
        let values: Vec<i8> = (0..32).map(|j| (j * 8 - 128) as i8).collect();
        let mut codes = vec![];
        let layout = layout(Precision::Int8).unwrap();
        layout
            .pack_into(&spec, &values, &[1.0], &mut codes)
            .unwrap();
        encode(Precision::Int8, &mut codes);
        let expected: Vec<u8> = (0..32).map(|j| j * 8).collect();
        assert_eq!(codes, expected);
        let bias = biases(&spec, ScaleDtype::F32, &[0.25], &[]);
        assert_eq!(bias, (-32.0f32).to_le_bytes());
    }

    #[test]
    fn modules_that_differ_are_named() {
        let modules = [("a", (64, 2)), ("b", (64, 2)), ("c", (32, 4))];
        let modules = modules.map(|(name, kind)| (name.to_string(), kind)).into();
        let expected = json!({
            "group_size": 64, "bits": 2, "c": {"group_size": 32, "bits": 4}
        });
        assert_eq!(config(&modules), Some(expected));
        assert_eq!(config(&BTreeMap::new()), None);
    }
}
