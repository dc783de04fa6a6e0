//! Big-endian files: every number of more than one byte lies with its most significant byte first,
//! those inside the blocks of quantized types too.

use super::GgmlType;
use std::io;

/// The order of the bytes of a number in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteOrder {
    /// Least significant byte first: nearly every file.
    Little,
    /// Most significant byte first: files for s390x and the like.
    Big,
}

/// Bytes of the largest block whose numbers are known here.
const MAX_BLOCK_BYTES: usize = 210;

/// The numbers of more than one byte in a block, as offset and bytes, for the types that
/// gguf-py's `gguf_convert_endian.py` converts and for plain numbers; `None` for other types.
const fn numbers(ggml_type: GgmlType) -> Option<&'static [(usize, usize)]> {
    Some(match ggml_type {
        GgmlType::F64 | GgmlType::I64 => &[(0, 8)],
        GgmlType::F32 | GgmlType::I32 => &[(0, 4)],
        GgmlType::F16 | GgmlType::Bf16 | GgmlType::I16 => &[(0, 2)],
        GgmlType::I8 | GgmlType::Mxfp4 | GgmlType::Nvfp4 => &[],
        // The f16 scale comes first, or two of them, or the scale comes last.
        GgmlType::Q4_0 | GgmlType::Q8_0 => &[(0, 2)],
        GgmlType::Q4K => &[(0, 2), (2, 2)],
        GgmlType::Q6K => &[(208, 2)],
        _ => return None,
    })
}

/// Names of the types that are read from big-endian files.
pub(super) fn readable() -> String {
    let types = GgmlType::ALL.iter().filter(|t| t.swaps());
    types.map(|t| t.name()).collect::<Vec<_>>().join(", ")
}

impl GgmlType {
    /// Whether tensors of this type are read from big-endian files.
    pub fn swaps(self) -> bool {
        numbers(self).is_some()
    }

    /// Fills `buffer` with the bytes from `start` on of a tensor that is stored big-endian, in
    /// little-endian order. `read` reads bytes of the tensor as they are stored; `start` and the
    /// length need not be those of whole blocks.
    pub(crate) fn read_swapped(
        self,
        start: u64,
        buffer: &mut [u8],
        read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let fields = match numbers(self) {
            Some([]) => return read(start, buffer),
            Some(fields) => fields,
            None => return Err(io::ErrorKind::Unsupported.into()),
        };
        let block = self.block_bytes();
        let swap = |bytes: &mut [u8]| {
            for &(at, len) in fields {
                bytes[at..at + len].reverse();
            }
        };
        // A part of the block around `at`.
        let read_part = |at: u64, out: &mut [u8]| -> io::Result<()> {
            let mut whole = [0; MAX_BLOCK_BYTES];
            let whole = &mut whole[..block];
            let skipped = (at % block as u64) as usize;
            read(at - skipped as u64, whole)?;
            swap(whole);
            out.copy_from_slice(&whole[skipped..skipped + out.len()]);
            Ok(())
        };
        let before = match (start % block as u64) as usize {
            0 => 0,
            inside => (block - inside).min(buffer.len()),
        };
        let (head, rest) = buffer.split_at_mut(before);
        let (middle, tail) = rest.split_at_mut(rest.len() - rest.len() % block);
        let after = start + (before + middle.len()) as u64;
        if !head.is_empty() {
            read_part(start, head)?;
        }
        if !middle.is_empty() {
            read(start + before as u64, middle)?;
            middle.chunks_exact_mut(block).for_each(swap);
        }
        if !tail.is_empty() {
            read_part(after, tail)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every range of three blocks, whole and cut anywhere.
    #[test]
    fn any_range_is_swapped_alike() {
        for &ggml_type in GgmlType::ALL.iter().filter(|t| t.swaps()) {
            let block = ggml_type.block_bytes();
            assert!(block <= MAX_BLOCK_BYTES, "{ggml_type}");
            let stored: Vec<u8> = (0..3 * block).map(|i| (i * 7 + i / 251) as u8).collect();
            let mut expected = stored.clone();
            for bytes in expected.chunks_mut(block) {
                for &(at, len) in numbers(ggml_type).unwrap() {
                    bytes[at..at + len].reverse();
                }
            }
            let read = |at: u64, out: &mut [u8]| {
                out.copy_from_slice(&stored[at as usize..][..out.len()]);
                Ok(())
            };
            for start in 0..stored.len() {
                for end in start..=stored.len() {
                    let mut out = vec![0; end - start];
                    ggml_type
                        .read_swapped(start as u64, &mut out, &read)
                        .unwrap();
                    assert_eq!(out, expected[start..end], "{ggml_type} {start}..{end}");
                }
            }
        }
    }
}
