//! Disjoint parts of slices and matrices on the threads of a pool.

use crate::pool::Pool;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A slice that threads write in disjoint chunks.
struct SharedSlice<'a, T> {
    data: *mut T,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: the functions of `Pool` below, the only users, give every element to one part, and
// `Pool::run` gives every part to one thread.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Self {
            data: slice.as_mut_ptr(),
            borrowed: PhantomData,
        }
    }

    /// Closures that call this capture the whole `SharedSlice`, not its pointer alone.
    fn start(&self) -> *mut T {
        self.data
    }

    /// Elements `first..first + len`.
    ///
    /// # Safety
    /// They are inside the slice, and no other reference to one of them exists.
    #[expect(
        clippy::mut_from_ref,
        reason = "threads share the slice and write different elements"
    )]
    unsafe fn chunk(&self, first: usize, len: usize) -> &mut [T] {
        // SAFETY: this function's contract is that of `from_raw_parts_mut`.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(first), len) }
    }
}

/// Some columns of a row-major matrix; other threads have the other columns.
pub(crate) struct ColumnsMut<'a, T> {
    data: *mut T,
    rows: usize,
    /// Columns of the whole matrix.
    stride: usize,
    columns: Range<usize>,
    borrowed: PhantomData<&'a mut [T]>,
}

impl<T> ColumnsMut<'_, T> {
    /// Which columns of the matrix these are.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Some of these columns in one row.
    ///
    /// # Panics
    /// If the matrix has no such row, or these are other columns.
    #[inline]
    pub(crate) fn row(&mut self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(
            row < self.rows
                && self.columns.start <= columns.start
                && columns.start <= columns.end
                && columns.end <= self.columns.end,
            "columns of the output"
        );
        // SAFETY: `Pool::for_columns` checked that `data` points to `rows · stride` elements, and
        // made `columns` end at `stride` at most; the assertion puts the slice inside of both. It
        // gave these columns to this value alone, which the slice borrows mutably.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.data.add(row * self.stride + columns.start),
                columns.len(),
            )
        }
    }
}

impl Pool {
    /// Calls `each(i, chunk)` for every chunk of `len` elements, in any order and on any thread;
    /// the last chunk may be shorter.
    ///
    /// ```
    /// let mut squares = [0; 10];
    /// bitnet_kernels::Pool::new(2)?.for_chunks(&mut squares, 3, |i, chunk| {
    ///     chunk.iter_mut().enumerate().for_each(|(j, s)| *s = (3 * i + j).pow(2));
    /// });
    /// assert_eq!(squares, [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Panics
    /// If `len` is 0, and with the first panic of `each`.
    pub fn for_chunks<T: Send, F: Fn(usize, &mut [T]) + Sync>(
        &self,
        data: &mut [T],
        len: usize,
        each: F,
    ) {
        assert!(len > 0, "chunks of at least one element");
        let total = data.len();
        let shared = SharedSlice::new(data);
        self.run(total.div_ceil(len), |part| {
            let (first, end) = (part * len, (part * len + len).min(total));
            // SAFETY: first < end ≤ total; chunks of different parts do not overlap, and
            // `Pool::run` calls every part once.
            each(part, unsafe { shared.chunk(first, end - first) });
        });
    }

    /// [`Pool::for_chunks`] of two slices, whose chunks of `lens` elements belong together.
    ///
    /// # Panics
    /// If a length is 0 or the slices are not the same number of whole chunks, and with the first
    /// panic of `each`.
    pub fn for_chunks_of_two<A: Send, B: Send>(
        &self,
        (a, b): (&mut [A], &mut [B]),
        lens: [usize; 2],
        each: impl Fn(usize, &mut [A], &mut [B]) + Sync,
    ) {
        // Elements without a size, which take no memory.
        let mut nothing = vec![(); a.len() / lens[0]];
        let each = |part: usize, a: &mut [A], b: &mut [B], _: &mut [()]| each(part, a, b);
        self.for_chunks_of_three((a, b, &mut nothing), [lens[0], lens[1], 1], each);
    }

    /// [`Pool::for_chunks`] of three slices, whose chunks of `lens` elements belong together.
    ///
    /// # Panics
    /// If a length is 0 or the slices are not the same number of whole chunks, and with the first
    /// panic of `each`.
    pub(crate) fn for_chunks_of_three<A: Send, B: Send, C: Send>(
        &self,
        (a, b, c): (&mut [A], &mut [B], &mut [C]),
        lens: [usize; 3],
        each: impl Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync,
    ) {
        let parts = a.len() / lens[0];
        assert!(
            [a.len(), b.len(), c.len()]
                .iter()
                .zip(lens)
                .all(|(&all, len)| all == parts * len),
            "the same number of chunks of each"
        );
        let (a, b, c) = (
            SharedSlice::new(a),
            SharedSlice::new(b),
            SharedSlice::new(c),
        );
        self.run(parts, |part| {
            // SAFETY: the assertion above has `parts` chunks inside each slice; those of different
            // parts do not overlap, and `Pool::run` calls every part once.
            let (a, b, c) = unsafe {
                (
                    a.chunk(part * lens[0], lens[0]),
                    b.chunk(part * lens[1], lens[1]),
                    c.chunk(part * lens[2], lens[2]),
                )
            };
            each(part, a, b, c);
        });
    }

    /// Cuts the columns of `out`, `[rows, cols]` row-major, into `parts` ranges of whole units of
    /// `unit` columns (the last unit may be shorter), and calls `each` with every range.
    ///
    /// # Panics
    /// If `out` has another length, and with the first panic of `each`.
    pub(crate) fn for_columns<T: Send>(
        &self,
        out: &mut [T],
        (rows, cols): (usize, usize),
        unit: usize,
        parts: usize,
        each: impl Fn(ColumnsMut<'_, T>) + Sync,
    ) {
        assert_eq!(
            Some(out.len()),
            rows.checked_mul(cols),
            "the length of a product of {rows} × {cols}"
        );
        let (units, shared) = (cols.div_ceil(unit), SharedSlice::new(out));
        let begin = |part: usize| (part * units / parts * unit).min(cols);
        self.run(parts, |part| {
            each(ColumnsMut {
                data: shared.start(),
                rows,
                stride: cols,
                columns: begin(part)..begin(part + 1),
                borrowed: PhantomData,
            });
        });
    }

    /// Calls `each` once with each of `parts`, in any order and on any thread.
    pub(crate) fn for_each<T: Send>(
        &self,
        parts: impl IntoIterator<Item = T>,
        each: impl Fn(T) + Sync,
    ) {
        let parts: Vec<Mutex<Option<T>>> = parts
            .into_iter()
            .map(|part| Mutex::new(Some(part)))
            .collect();
        self.run(parts.len(), |i| {
            if let Some(part) = lock(&parts[i]).take() {
                each(part);
            }
        });
    }
}

/// Locks a mutex that another part may have poisoned: its panic ends the run, see [`Pool::run`].
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
