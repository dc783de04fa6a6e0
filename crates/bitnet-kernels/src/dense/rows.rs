//! Rows of floats in steps of 16 columns, widened to f32 as they are read.

use super::lanes::{LANES, Lanes};

/// Rows of one element type.
///
/// # Safety
/// [`RowSource::row`] returns rows of [`RowSource::cols`] columns.
pub(super) unsafe trait RowSource<'a>: Copy {
    /// One of them.
    type Row: RowSteps;
    /// Bytes of a step.
    const STEP: usize;
    /// Columns of each row.
    fn cols(self) -> usize;
    /// Row `row`.
    fn row(self, row: usize) -> Self::Row;
    /// Address and bytes of a row.
    fn place(self, row: usize) -> (*const u8, usize);
}

/// A row in steps of 16 columns.
///
/// # Safety
/// [`RowSteps::full`] may be called for every full step of [`RowSteps::cols`] columns.
pub(super) unsafe trait RowSteps: Copy {
    /// Columns of the row.
    fn cols(self) -> usize;
    /// A step that the row has in full.
    ///
    /// # Safety
    /// `step < cols / LANES`.
    unsafe fn full<L: Lanes>(self, lanes: L, step: usize) -> L::Floats;
    /// The step after the full ones, zeros after the end of the row.
    fn tail<L: Lanes>(self, lanes: L) -> L::Floats;

    /// The whole row.
    #[inline(always)]
    fn widen<L: Lanes>(self, lanes: L, to: &mut [f32]) {
        assert!(to.len() == self.cols(), "a row of {} columns", self.cols());
        let (steps, rest) = to.as_chunks_mut::<LANES>();
        for (step, to) in steps.iter_mut().enumerate() {
            // SAFETY: the assertion above gives `to` and the row the same number of steps.
            lanes.store(unsafe { self.full(lanes, step) }, to);
        }
        if !rest.is_empty() {
            let mut padded = [0.0; LANES];
            lanes.store(self.tail(lanes), &mut padded);
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
}

/// The rest of a row after its full steps.
#[inline(always)]
pub(super) fn tail<T: Copy + Default>(row: &[T]) -> [T; LANES] {
    let mut padded = [T::default(); LANES];
    let rest = row.as_chunks::<LANES>().1;
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

macro_rules! rows {
    ($rows:ident, $row:ident, $element:ty, $doc:literal, $load:ident) => {
        #[doc = $doc]
        #[derive(Clone, Copy)]
        pub(super) struct $rows<'a> {
            pub(super) all: &'a [$element],
            pub(super) cols: usize,
        }

        #[derive(Clone, Copy)]
        pub(super) struct $row<'a>(&'a [$element]);

        // SAFETY: `row` takes a slice of `cols` elements.
        unsafe impl<'a> RowSource<'a> for $rows<'a> {
            type Row = $row<'a>;
            const STEP: usize = LANES * size_of::<$element>();
            #[inline(always)]
            fn cols(self) -> usize {
                self.cols
            }
            #[inline(always)]
            fn row(self, row: usize) -> $row<'a> {
                $row(&self.all[row * self.cols..][..self.cols])
            }
            #[inline(always)]
            fn place(self, row: usize) -> (*const u8, usize) {
                (
                    self.all.as_ptr().wrapping_add(row * self.cols).cast(),
                    self.cols * size_of::<$element>(),
                )
            }
        }

        // SAFETY: `cols` is the length of the slice that `full` reads.
        unsafe impl RowSteps for $row<'_> {
            #[inline(always)]
            fn cols(self) -> usize {
                self.0.len()
            }
            #[inline(always)]
            unsafe fn full<L: Lanes>(self, lanes: L, step: usize) -> L::Floats {
                // SAFETY: the function's contract: the step is below the number of chunks.
                lanes.$load(unsafe { self.0.as_chunks::<LANES>().0.get_unchecked(step) })
            }

            #[inline(always)]
            fn tail<L: Lanes>(self, lanes: L) -> L::Floats {
                lanes.$load(&tail(self.0))
            }
        }
    };
}

rows!(Floats, FloatRow, f32, "Rows of f32.", f32);
rows!(Halves, HalfRow, u16, "Rows of binary16.", f16);
rows!(Brains, BrainRow, u16, "Rows of bfloat16.", bf16);
rows!(Bytes, ByteRow, i8, "Rows of integers without scales.", i8);
