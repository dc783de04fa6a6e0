//! Views of a storage whose elements do not lie in the order of their indices: transposed, sliced
//! or repeated tensors of PyTorch.
//!
//! Any range of bytes of the row-major tensor is read without holding the rest. The range is cut
//! into boxes, and a box into smaller ones until its elements lie close enough in the file to be
//! read at once.

use std::io;

/// A box whose elements span this much is read at once, however few they are: about what a read
/// from the file costs beside its bytes.
const SMALL_SPAN: u64 = 8 << 10;
/// Largest span that is read at once.
const MAX_SPAN: u64 = 1 << 20;
/// Bytes that are read at most for each byte that is wanted, in spans above [`SMALL_SPAN`].
const MAX_WASTE: u64 = 4;

/// Where the elements of a tensor lie, from its first element on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Strided {
    /// Bytes of an element.
    size: u64,
    /// Outermost first, without those of one element.
    dims: Vec<Dim>,
}

/// One dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Dim {
    /// Number of indices, above 0.
    n: u64,
    /// Bytes from one index to the next in the file.
    from: u64,
    /// Bytes from one index to the next in what is read.
    to: u64,
}

type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>;

impl Strided {
    /// A view of elements of `size` bytes, above 0; `strides` counts elements. `None` for a view
    /// without elements, for other than one stride a dimension, and on overflow.
    pub(crate) fn new(shape: &[usize], strides: &[u64], size: u64) -> Option<Self> {
        if shape.len() != strides.len() {
            return None;
        }
        let mut dims: Vec<Dim> = vec![];
        let mut bytes = size;
        // From the innermost outwards; one that continues the dimension inside it joins it.
        for (&n, &stride) in shape.iter().zip(strides).rev() {
            let n = n as u64;
            let (from, to) = (stride.checked_mul(size)?, bytes);
            bytes = bytes.checked_mul(n)?;
            match dims.last_mut() {
                _ if n == 0 => return None,
                _ if n == 1 => {}
                Some(inner) if from == inner.n.checked_mul(inner.from)? => inner.n *= n,
                _ => dims.push(Dim { n, from, to }),
            }
        }
        dims.reverse();
        let view = Self { size, dims };
        let ends = view.dims.iter().try_fold(size, |end, dim| {
            end.checked_add(dim.from.checked_mul(dim.n - 1)?)
        });
        ends.map(|_| view)
    }

    /// Whether the elements lie in the order of their indices, without gaps.
    pub(crate) fn is_contiguous(&self) -> bool {
        match self.dims.as_slice() {
            [] => true,
            [dim] => dim.from == self.size,
            _ => false,
        }
    }

    /// Bytes from the first element to the end of the last one in the file.
    pub(crate) fn span(&self) -> u64 {
        span(&self.dims, self.size)
    }

    /// Fills `buffer` with the bytes from `start` on of the row-major tensor. `read` reads bytes of
    /// the file, counted from the first element.
    pub(crate) fn read(&self, start: u64, buffer: &mut [u8], read: Read<'_>) -> io::Result<()> {
        let mut gather = Gather {
            size: self.size,
            read,
            scratch: vec![],
        };
        let end = start + buffer.len() as u64;
        let aligned = start - start % self.size..end.next_multiple_of(self.size);
        if aligned == (start..end) {
            return gather.range(&self.dims, 0, start, buffer);
        }
        let mut whole = vec![0; (aligned.end - aligned.start) as usize];
        gather.range(&self.dims, 0, aligned.start, &mut whole)?;
        buffer.copy_from_slice(&whole[(start - aligned.start) as usize..][..buffer.len()]);
        Ok(())
    }
}

fn span(dims: &[Dim], size: u64) -> u64 {
    let extents = dims.iter().map(|dim| (dim.n - 1) * dim.from);
    size + extents.sum::<u64>()
}

/// Reads pieces of a view.
struct Gather<'a> {
    size: u64,
    read: Read<'a>,
    scratch: Vec<u8>,
}

impl Gather<'_> {
    /// Bytes from `start` on of the row-major tensor of `dims`, whose first element lies at `base`.
    /// Cuts them into boxes.
    fn range(
        &mut self,
        dims: &[Dim],
        base: u64,
        mut start: u64,
        mut out: &mut [u8],
    ) -> io::Result<()> {
        let Some((outer, inner)) = dims.split_first() else {
            return self.fill(&mut [], base, out);
        };
        while !out.is_empty() {
            let (index, inside) = (start / outer.to, start % outer.to);
            let base = base + index * outer.from;
            let len = out.len() as u64;
            let rows = if inside == 0 { len / outer.to } else { 0 };
            let taken = match rows {
                0 => (outer.to - inside).min(len),
                _ => rows * outer.to,
            };
            let (head, rest) = out.split_at_mut(taken as usize);
            if rows > 0 {
                let mut dims = dims.to_vec();
                dims[0].n = rows;
                self.fill(&mut dims, base, head)?;
            } else {
                self.range(inner, base, inside, head)?;
            }
            start += taken;
            out = rest;
        }
        Ok(())
    }

    /// All elements of a box, to the places that its dimensions give in `out`.
    fn fill(&mut self, dims: &mut [Dim], base: u64, out: &mut [u8]) -> io::Result<()> {
        let span = span(dims, self.size);
        let wanted = dims.iter().map(|dim| dim.n).product::<u64>() * self.size;
        let dense = span <= MAX_SPAN && span / MAX_WASTE <= wanted;
        if span <= SMALL_SPAN || dense {
            self.scratch.resize(span as usize, 0);
            (self.read)(base, &mut self.scratch)?;
            copy(dims, self.size as usize, &self.scratch, out);
            return Ok(());
        }
        // One element spans its size alone, so the widest dimension can be cut.
        let extent = |dim: &Dim| (dim.n - 1) * dim.from;
        let widest = (0..dims.len()).max_by_key(|&d| extent(&dims[d]));
        let Some(widest) = widest else { return Ok(()) };
        let Dim { n, from, to } = dims[widest];
        let half = n / 2;
        dims[widest].n = half;
        self.fill(dims, base, out)?;
        dims[widest].n = n - half;
        self.fill(dims, base + half * from, &mut out[(half * to) as usize..])?;
        dims[widest].n = n;
        Ok(())
    }
}

/// Copies the elements of a box.
fn copy(dims: &[Dim], size: usize, from: &[u8], to: &mut [u8]) {
    match dims {
        [] => to[..size].copy_from_slice(&from[..size]),
        [dim] if dim.from == size as u64 && dim.to == size as u64 => {
            let len = dim.n as usize * size;
            to[..len].copy_from_slice(&from[..len]);
        }
        [dim] => {
            let (source, target) = (dim.from as usize, dim.to as usize);
            for i in 0..dim.n as usize {
                to[i * target..][..size].copy_from_slice(&from[i * source..][..size]);
            }
        }
        [dim, inner @ ..] => {
            let (source, target) = (dim.from as usize, dim.to as usize);
            for i in 0..dim.n as usize {
                copy(inner, size, &from[i * source..], &mut to[i * target..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The row-major bytes by the definition of strides.
    fn expected(storage: &[u8], shape: &[usize], strides: &[u64], size: usize) -> Vec<u8> {
        let elements = shape.iter().product::<usize>();
        let mut out = vec![];
        for i in 0..elements {
            let (mut rest, mut at) = (i, 0);
            for (&n, &stride) in shape.iter().zip(strides).rev() {
                at += (rest % n) as u64 * stride;
                rest /= n;
            }
            let at = at as usize * size;
            out.extend_from_slice(&storage[at..at + size]);
        }
        out
    }

    fn storage(len: u64) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 509) as u8).collect()
    }

    const VIEWS: [(&[usize], &[u64], u64); 9] = [
        (&[5, 7], &[1, 5], 4),
        (&[5, 7], &[14, 1], 2),
        (&[5, 7], &[28, 2], 1),
        (&[4, 3, 5], &[1, 4, 12], 8),
        (&[4, 3, 5], &[5, 40, 1], 2),
        (&[3, 4], &[0, 1], 4),
        (&[3, 4, 2], &[1, 0, 0], 4),
        (&[1, 6, 1], &[9, 3, 7], 2),
        (&[2, 2, 2, 2], &[1, 2, 4, 8], 1),
    ];

    #[test]
    fn every_range_of_small_views() {
        for (shape, strides, size) in VIEWS {
            let view = Strided::new(shape, strides, size).unwrap();
            let storage = storage(view.span());
            let expected = expected(&storage, shape, strides, size as usize);
            let read = |at: u64, out: &mut [u8]| {
                out.copy_from_slice(&storage[at as usize..][..out.len()]);
                Ok(())
            };
            for start in 0..expected.len() {
                for end in start..=expected.len() {
                    let mut out = vec![0; end - start];
                    view.read(start as u64, &mut out, &read).unwrap();
                    assert_eq!(out, expected[start..end], "{shape:?} {start}..{end}");
                }
            }
        }
    }

    /// Views above every limit: pieces of them, with the memory and the bytes that a read may take.
    #[test]
    fn large_views_are_read_in_bounded_pieces() {
        for (shape, strides) in [
            (&[1500usize, 900][..], &[1u64, 1500][..]),
            (&[900, 700], &[2100, 3]),
            (&[40, 50, 300], &[300, 12000, 1]),
            (&[2000, 1000], &[0, 1]),
        ] {
            let view = Strided::new(shape, strides, 4).unwrap();
            let storage = storage(view.span());
            let expected = expected(&storage, shape, strides, 4);
            let total = std::cell::Cell::new(0);
            let read = |at: u64, out: &mut [u8]| {
                assert!(out.len() as u64 <= MAX_SPAN);
                total.set(total.get() + out.len());
                out.copy_from_slice(&storage[at as usize..][..out.len()]);
                Ok(())
            };
            let mut got = vec![0; expected.len()];
            for (i, piece) in got.chunks_mut(300_002).enumerate() {
                view.read(i as u64 * 300_002, piece, &read).unwrap();
            }
            assert!(got == expected, "{shape:?}");
            assert!(total.get() < 40 * got.len(), "{shape:?}: {}", total.get());
        }
    }

    #[test]
    fn contiguous_views_and_those_that_are_none() {
        let view = |shape: &[usize], strides: &[u64]| Strided::new(shape, strides, 4);
        assert!(view(&[3, 4, 5], &[20, 5, 1]).unwrap().is_contiguous());
        assert!(view(&[3, 1, 5], &[5, 99, 1]).unwrap().is_contiguous());
        assert!(view(&[], &[]).unwrap().is_contiguous());
        assert!(!view(&[3, 4], &[1, 3]).unwrap().is_contiguous());
        assert!(!view(&[4], &[2]).unwrap().is_contiguous());
        assert_eq!(view(&[3, 4], &[4]), None);
        assert_eq!(view(&[0, 4], &[4, 1]), None);
        assert_eq!(view(&[2, 2], &[u64::MAX / 4, 1]), None);
        assert_eq!(view(&[1 << 40, 1 << 40], &[0, 0]), None);
    }
}
