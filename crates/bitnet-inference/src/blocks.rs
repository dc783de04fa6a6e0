//! Weights that keep their stored integer codes in memory, with float activations.

use crate::{Error, Result};
use bitnet_core::pack::PackedLen;
use bitnet_core::{Matrix, MatrixSpec, Precision, ScaleDtype, ZeroPoints};
use bitnet_formats::gguf::{BlockIntegers, GgmlType, integers};
use bitnet_formats::{ScaleSource, Source, StoredId, StoredMatrix};
use bitnet_kernels::Pool;
use bitnet_kernels::dense::{BLOCK, BlockCodes, BlockRow, BlockType, Blocks, ScaleType};
use std::ops::Range;

/// Block type in memory for a GGUF type: 5- and 6-bit codes become 8-bit, the rest is unchanged.
pub(crate) fn gguf_block_type(stored: GgmlType) -> Option<BlockType> {
    let (codes, scales, minimum) = match stored {
        GgmlType::Q4_0 => (BlockCodes::Int4, ScaleType::F16, false),
        GgmlType::Q4_1 => (BlockCodes::Int4, ScaleType::F16, true),
        GgmlType::Q5_0 | GgmlType::Q8_0 => (BlockCodes::Int8, ScaleType::F16, false),
        GgmlType::Q5_1 => (BlockCodes::Int8, ScaleType::F16, true),
        GgmlType::Q2K => (BlockCodes::Int8, ScaleType::Nested { group: 16 }, true),
        GgmlType::Q3K | GgmlType::Q6K => (BlockCodes::Int8, ScaleType::Nested { group: 16 }, false),
        GgmlType::Q4K => (BlockCodes::Int4, ScaleType::Nested { group: 32 }, true),
        GgmlType::Q5K => (BlockCodes::Int8, ScaleType::Nested { group: 32 }, true),
        _ => return None,
    };
    Some(BlockType {
        codes,
        scales,
        minimum,
    })
}

/// Reads the blocks of some rows of a stored tensor, one strip at a time.
pub(crate) fn gguf_blocks(
    pool: &Pool,
    source: &Source,
    stored: StoredId,
    ggml_type: GgmlType,
    kind: BlockType,
    (rows, cols): (Range<usize>, usize),
) -> Result<Blocks> {
    let (path, name) = (source.file_of(stored), &source.stored(stored).name);
    let bad = |e: &dyn std::fmt::Display| {
        Error::from(bitnet_formats::Error::tensor(
            path,
            name,
            "weights",
            e.to_string(),
        ))
    };
    let size = ggml_type.row_bytes(cols).map_err(|e| bad(&e))?;
    Blocks::new(pool, rows.len(), cols, kind, |first, strip| {
        let first = rows.start + first;
        let mut bytes = vec![0; strip.rows() * size];
        source.read(stored, (first * size) as u64, &mut bytes)?;
        for (i, bytes) in bytes.chunks_exact(size.max(1)).enumerate() {
            let mut row = strip.row(i);
            let [scales, minima] = &mut row.halves;
            let to = BlockIntegers {
                codes: row.codes,
                halves: [scales, minima],
                factors: row.factors,
            };
            integers(ggml_type, bytes, to).map_err(|e| bad(&e))?;
            if row
                .halves
                .iter()
                .any(|all| all.iter().any(|half| half & 0x7c00 == 0x7c00))
            {
                let got = format!("NaN or infinity in row {}", first + i);
                return Err(bitnet_formats::Error::tensor(path, name, "finite scales", got).into());
            }
        }
        Ok(())
    })
}

/// Block type that holds a quantized matrix exactly, if there is one. The matrix must have one
/// plane and no zero points.
pub(crate) fn block_type(matrix: &Matrix) -> Option<BlockType> {
    let half = |s: &f32| half::f16::from_f32(*s).to_f32().to_bits() == s.to_bits();
    let halves = || matrix.scales.iter().all(half);
    spec_block_type(&matrix.spec, &halves)
}

/// [`block_type`] of a spec; `halves` says whether binary16 holds all scales, whatever their type.
fn spec_block_type(spec: &MatrixSpec, halves: &dyn Fn() -> bool) -> Option<BlockType> {
    if spec.planes != 1 || spec.zero_points != ZeroPoints::None {
        return None;
    }
    let group = spec.granule_cols();
    let fits = |line: usize| group.is_multiple_of(line) || group >= spec.cols;
    let codes = match spec.precision {
        Precision::Ternary | Precision::Binary | Precision::Int2 if fits(64) => BlockCodes::Trits,
        Precision::Int8 => BlockCodes::Int8,
        _ => BlockCodes::Int4,
    };
    // One f32 scale per 64 columns takes as many bytes as one f16 scale per 32.
    let halves = codes != BlockCodes::Trits
        && group < 2 * BLOCK
        && fits(BLOCK)
        && (spec.scale_dtype == ScaleDtype::F16 || halves());
    let scales = if halves {
        ScaleType::F16
    } else {
        ScaleType::F32 { group }
    };
    let kind = BlockType {
        codes,
        scales,
        minimum: false,
    };
    let line = if codes == BlockCodes::Int8 { 16 } else { 32 };
    (halves || fits(line)).then_some(kind)
}

/// Converts a matrix to the block type that [`block_type`] returned.
pub(crate) fn matrix_blocks(
    pool: &Pool,
    matrix: &Matrix,
    kind: BlockType,
) -> Result<Blocks, bitnet_kernels::Error> {
    let (spec, cols) = (&matrix.spec, matrix.spec.cols);
    Blocks::new(pool, spec.rows, cols, kind, |first, strip| {
        for i in 0..strip.rows() {
            let values = &matrix.values[(first + i) * cols..][..cols];
            let scale = |column: usize| matrix.scales[spec.scale_index(0, first + i, column)];
            fill_row(strip.row(i), kind, spec, values, &scale);
        }
        Ok(())
    })
}

/// Converts some rows of a stored matrix that holds its scales, one strip at a time, to the block
/// type that its spec has. `None` if it has none, if `keeps` does not take it, or if the layout has no
/// rows that can be read alone.
pub(crate) fn strip_blocks(
    pool: &Pool,
    source: &Source,
    q: &StoredMatrix,
    range: Range<usize>,
    keeps: impl Fn(BlockType) -> bool,
    error: impl Fn(bitnet_kernels::Error) -> Error + Sync,
) -> Result<Option<Blocks>> {
    let spec = &q.spec;
    let by_rows = q.scales == ScaleSource::Inside && q.layout.chunk_rows(spec) == Some(1);
    let kind = spec_block_type(spec, &|| false).filter(|kind| by_rows && keeps(*kind));
    let (Some(kind), PackedLen::Exact(len)) = (kind, q.layout.packed_len(spec)) else {
        return Ok(None);
    };
    let (rows, cols) = (spec.rows, spec.cols);
    let row_bytes = len / rows.max(1);
    let blocks = Blocks::new(pool, range.len(), cols, kind, |first, strip| {
        let first = range.start + first;
        let mut bytes = vec![0; strip.rows() * row_bytes];
        source.read(q.packed, (first * row_bytes) as u64, &mut bytes)?;
        let spec = MatrixSpec {
            rows: strip.rows(),
            ..spec.clone()
        };
        let unpacked = q.layout.unpack(&spec, &bytes);
        let unpacked = unpacked.map_err(|e| error(e.into()))?;
        let scales = unpacked.scales.unwrap_or_default();
        for (i, values) in unpacked.values.chunks_exact(cols.max(1)).enumerate() {
            let scale = |column: usize| scales[spec.scale_index(0, i, column)];
            fill_row(strip.row(i), kind, &spec, values, &scale);
        }
        Ok::<(), Error>(())
    })?;
    Ok(Some(blocks))
}

/// Writes the codes and scales of a row. Trits hold the int2 values 1 … −2 as the codes of −1 … 2,
/// under the negated scale.
fn fill_row(
    row: BlockRow<'_>,
    kind: BlockType,
    spec: &MatrixSpec,
    values: &[i8],
    scale: &dyn Fn(usize) -> f32,
) {
    let negated = kind.codes == BlockCodes::Trits && spec.precision == Precision::Int2;
    let scale = |column: usize| {
        if negated {
            -scale(column)
        } else {
            scale(column)
        }
    };
    let offset = match kind.codes {
        BlockCodes::Trits => 1,
        BlockCodes::Int4 => 8,
        BlockCodes::Int8 => 0,
    };
    for (code, &v) in row.codes.iter_mut().zip(values) {
        *code = (offset + if negated { -v } else { v }).cast_unsigned();
    }
    let group = spec.granule_cols();
    for (g, s) in row.floats.iter_mut().enumerate() {
        *s = scale(g * group);
    }
    for (g, s) in row.halves[0].iter_mut().enumerate() {
        *s = half::f16::from_f32(scale(g * BLOCK)).to_bits();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::Granularity;
    use bitnet_core::random::Random;
    use bitnet_formats::Content;
    use bitnet_formats::gguf::{GgufEntry, decode, encode_header};

    const TYPES: [GgmlType; 10] = [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2K,
        GgmlType::Q3K,
        GgmlType::Q4K,
        GgmlType::Q5K,
        GgmlType::Q6K,
    ];

    /// Writes a file with one tensor per type, of random blocks with finite weights. Returns the
    /// bytes of each tensor.
    fn file(path: &std::path::Path, rows: usize, cols: usize) -> Vec<Vec<u8>> {
        let mut random = Random::new(7);
        let mut tensors = vec![];
        let mut all = vec![];
        for ggml_type in TYPES {
            let mut bytes = vec![];
            while bytes.len() < rows * ggml_type.row_bytes(cols).unwrap() {
                let block: Vec<u8> = (0..ggml_type.block_bytes())
                    .map(|_| random.bits() as u8)
                    .collect();
                let mut weights = vec![0.0; ggml_type.block_len()];
                decode(ggml_type, &block, &mut weights).unwrap();
                if weights.iter().all(|w| w.is_finite()) {
                    bytes.extend(block);
                }
            }
            tensors.push(GgufEntry {
                name: ggml_type.to_string(),
                shape: vec![rows, cols],
                ggml_type,
                len: bytes.len() as u64,
            });
            all.push(bytes);
        }
        let header = encode_header(&[], &tensors, 32).unwrap();
        let mut out = header.bytes.clone();
        for (bytes, offset) in all.iter().zip(&header.offsets) {
            out.resize(header.bytes.len() + *offset as usize, 0);
            out.extend(bytes);
        }
        out.resize(header.file_len() as usize, 0);
        std::fs::write(path, out).unwrap();
        all
    }

    #[test]
    fn blocks_hold_what_the_file_says_bit_for_bit() {
        let (rows, cols) = (300, 512);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blocks.gguf");
        let bytes = file(&path, rows, cols);
        let source = Source::open(&path).unwrap();
        for (ggml_type, bytes) in TYPES.into_iter().zip(bytes) {
            let stored = source.find_stored(&ggml_type.to_string()).unwrap();
            let kind = gguf_block_type(ggml_type).unwrap();
            let blocks = gguf_blocks(
                &Pool::new(2).unwrap(),
                &source,
                stored,
                ggml_type,
                kind,
                (0..rows, cols),
            )
            .unwrap();
            let (mut expected, mut row) = (vec![0.0; rows * cols], vec![f32::NAN; cols]);
            decode(ggml_type, &bytes, &mut expected).unwrap();
            for (n, expected) in expected.chunks(cols).enumerate() {
                blocks.row_into(n, &mut row);
                let equal = row
                    .iter()
                    .zip(expected)
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(
                    equal,
                    "{ggml_type}, row {n}: expected {expected:?}, got {row:?}"
                );
            }
            // Some rows alone, as of one expert.
            let some = (130..170, cols);
            let part =
                gguf_blocks(&Pool::single(), &source, stored, ggml_type, kind, some).unwrap();
            assert_eq!(part.rows(), 40);
            part.row_into(3, &mut row);
            assert_eq!(row, expected[133 * cols..][..cols], "{ggml_type}");
            let most = match ggml_type {
                GgmlType::Q4K => 1.05,
                GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q8_0 => 1.02,
                _ => f64::INFINITY,
            };
            assert!(
                (blocks.bytes() as f64) < most * bytes.len() as f64,
                "{ggml_type}: {} bytes of {}",
                blocks.bytes(),
                bytes.len()
            );
        }
    }

    /// Random two-bit codes, with code 3, and ternary ones, as ggml decodes them.
    #[test]
    fn ternary_types_are_read_by_strips() {
        let (rows, cols) = (70, 512);
        let (mut random, dir) = (Random::new(5), tempfile::tempdir().unwrap());
        let cases = [
            ("q2_0", Precision::Int2),
            ("q2_0-g128", Precision::Int2),
            ("pq2_0", Precision::Int2),
            ("pq2_0", Precision::Ternary),
            ("ptq1_0", Precision::Ternary),
            ("tq2_0", Precision::Ternary),
            ("q1_0", Precision::Binary),
        ];
        for (n, (name, precision)) in cases.into_iter().enumerate() {
            let layout = bitnet_core::pack::by_name(name).unwrap();
            let mut spec = layout.foreign_spec(rows, cols).unwrap();
            spec.precision = precision;
            let (low, high) = precision.range();
            let values: Vec<i8> = (0..rows * cols)
                .map(|_| match precision {
                    Precision::Binary => 2 * (random.bits() % 2) as i8 - 1,
                    _ => low + (random.bits() % (i64::from(high - low) + 1) as u64) as i8,
                })
                .collect();
            let scale = |bits: u64| half::f16::from_f32((bits % 1000) as f32 / 777.0 - 0.3);
            let scales: Vec<f32> = (0..spec.scales_len())
                .map(|_| scale(random.bits()).to_f32())
                .collect();
            let mut bytes = vec![];
            layout
                .pack_into(&spec, &values, &scales, &mut bytes)
                .unwrap();
            let ggml_type = bitnet_formats::dtype::ggml_type_of(layout).unwrap();
            let path = dir.path().join(format!("{n}.gguf"));
            let entry = GgufEntry {
                name: "w".into(),
                shape: vec![rows, cols],
                ggml_type,
                len: bytes.len() as u64,
            };
            let header = encode_header(&[], &[entry], 32).unwrap();
            let mut file = header.bytes.clone();
            file.extend(&bytes);
            file.resize(header.file_len() as usize, 0);
            std::fs::write(&path, file).unwrap();

            let source = Source::open(&path).unwrap();
            let Content::Quantized(q) = &source.tensors()[0].content else {
                panic!("{name}");
            };
            assert_eq!((q.layout.name(), q.spec.precision), (name, precision));
            let refused = |e| Error::Matrix {
                path: path.clone(),
                tensor: "w".into(),
                source: e,
            };
            let (mut expected, mut row) = (vec![0.0; rows * cols], vec![f32::NAN; cols]);
            decode(ggml_type, &bytes, &mut expected).unwrap();
            for range in [0..rows, 0..5, 33..rows] {
                let (pool, first) = (Pool::new(2).unwrap(), range.start * cols);
                let blocks = strip_blocks(&pool, &source, q, range.clone(), |_| true, refused);
                let blocks = blocks.unwrap().unwrap();
                assert_eq!(blocks.kind().codes, BlockCodes::Trits, "{name}");
                assert_eq!(blocks.rows(), range.len());
                for (n, expected) in expected[first..].chunks(cols).take(range.len()).enumerate() {
                    blocks.row_into(n, &mut row);
                    assert_eq!(row, expected, "{name}, row {n} of {range:?}");
                }
            }
        }
    }

    #[test]
    fn scales_that_are_no_numbers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blocks.gguf");
        file(&path, 8, 256);
        let header = bitnet_formats::gguf::GgufHeader::read(
            std::fs::File::open(&path).unwrap(),
            std::fs::metadata(&path).unwrap().len(),
        )
        .unwrap();
        let at = header.tensor("Q4_1").unwrap().offset as usize + 3 * 160;
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at..at + 2].copy_from_slice(&0x7c00u16.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let source = Source::open(&path).unwrap();
        let (stored, kind) = (
            source.find_stored("Q4_1").unwrap(),
            gguf_block_type(GgmlType::Q4_1).unwrap(),
        );
        let message = gguf_blocks(
            &Pool::single(),
            &source,
            stored,
            GgmlType::Q4_1,
            kind,
            (0..8, 256),
        )
        .unwrap_err()
        .to_string();
        assert!(
            ["blocks.gguf", "Q4_1", "finite scales", "row 3"]
                .iter()
                .all(|part| message.contains(part)),
            "{message}"
        );
    }

    #[test]
    fn quantized_layers_hold_their_values() {
        let mut random = Random::new(3);
        let cases = [
            (
                Precision::Ternary,
                Granularity::Tensor,
                Some(BlockCodes::Trits),
            ),
            (
                Precision::Ternary,
                Granularity::Channel,
                Some(BlockCodes::Trits),
            ),
            (
                Precision::Ternary,
                Granularity::Group(128),
                Some(BlockCodes::Trits),
            ),
            (
                Precision::Ternary,
                Granularity::Group(32),
                Some(BlockCodes::Int4),
            ),
            (
                Precision::Binary,
                Granularity::Group(64),
                Some(BlockCodes::Trits),
            ),
            (
                Precision::Int2,
                Granularity::Group(32),
                Some(BlockCodes::Int4),
            ),
            (
                Precision::Int2,
                Granularity::Group(64),
                Some(BlockCodes::Trits),
            ),
            (
                Precision::Int4,
                Granularity::Group(96),
                Some(BlockCodes::Int4),
            ),
            (Precision::Int4, Granularity::Group(16), None),
            (
                Precision::Int8,
                Granularity::Group(16),
                Some(BlockCodes::Int8),
            ),
            (
                Precision::Int8,
                Granularity::Channel,
                Some(BlockCodes::Int8),
            ),
        ];
        for (precision, granularity, codes) in cases {
            for scale_dtype in [ScaleDtype::F32, ScaleDtype::F16] {
                let mut spec = MatrixSpec::new(9, 200, precision, granularity);
                spec.scale_dtype = scale_dtype;
                let (low, high) = precision.range();
                let span = i64::from(high) - i64::from(low) + 1;
                let mut value = || (i64::from(low) + (random.bits() % span as u64) as i64) as i8;
                let values = (0..9 * 200).map(|_| {
                    loop {
                        let v = value();
                        if precision.contains(v) {
                            break v;
                        }
                    }
                });
                let values = values.collect();
                let scale = |bits: u64| {
                    half::f16::from_f32((bits % 1000) as f32 / 777.0 - 0.3).to_f32()
                        * if scale_dtype == ScaleDtype::F32 {
                            1.001
                        } else {
                            1.0
                        }
                };
                let scales = (0..spec.scales_len())
                    .map(|_| scale(random.bits()))
                    .collect();
                let matrix = Matrix {
                    spec,
                    values,
                    scales,
                    zero_points: vec![],
                };
                matrix.validate().unwrap();
                let kind = block_type(&matrix);
                assert_eq!(kind.map(|k| k.codes), codes, "{precision}, {granularity:?}");
                let Some(kind) = kind else { continue };
                let blocks = matrix_blocks(&Pool::single(), &matrix, kind).unwrap();
                let (mut row, mut expected) = (vec![0.0; 200], vec![0.0; 200]);
                for n in 0..9 {
                    blocks.row_into(n, &mut row);
                    matrix.dequantize_row_into(n, &mut expected);
                    assert!(
                        // A zero may have the other sign.
                        row.iter()
                            .zip(&expected)
                            .all(|(a, b)| a.to_bits() == b.to_bits() || (a == b && *a == 0.0)),
                        "{precision}, {granularity:?}: {row:?}, {expected:?}"
                    );
                }
            }
        }
    }
}
