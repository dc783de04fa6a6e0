//! Parts of a slice on the threads of a pool.

use crate::Pool;
use std::marker::PhantomData;

/// A slice that threads write in disjoint chunks.
struct Shared<'a, T>(*mut T, PhantomData<&'a mut [T]>);

// SAFETY: `Pool::for_chunks`, the only user, gives every chunk to one thread.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<T> Shared<'_, T> {
    /// The whole `Shared` is captured by closures that call this, and not its pointer alone.
    fn start(&self) -> *mut T {
        self.0
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
        let shared = Shared(data.as_mut_ptr(), PhantomData);
        self.run(total.div_ceil(len), |part| {
            let (first, end) = (part * len, (part * len + len).min(total));
            // SAFETY: `Pool::run` calls every part once, chunks of different parts do not overlap,
            // and first < end ≤ total.
            each(part, unsafe {
                std::slice::from_raw_parts_mut(shared.start().add(first), end - first)
            });
        });
    }

    /// [`Pool::for_chunks`] of three slices, whose chunks of `lens` elements belong together.
    ///
    /// # Panics
    /// If a length is 0 or the slices are not as many whole chunks, and with the first panic of
    /// `each`.
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
            "as many chunks of each"
        );
        let (a, b, c) = (
            Shared(a.as_mut_ptr(), PhantomData),
            Shared(b.as_mut_ptr(), PhantomData),
            Shared(c.as_mut_ptr(), PhantomData),
        );
        self.run(parts, |part| {
            // SAFETY: `Pool::run` calls every part once, chunks of different parts do not overlap,
            // and the assertion has them inside the slices.
            unsafe {
                each(
                    part,
                    std::slice::from_raw_parts_mut(a.start().add(part * lens[0]), lens[0]),
                    std::slice::from_raw_parts_mut(b.start().add(part * lens[1]), lens[1]),
                    std::slice::from_raw_parts_mut(c.start().add(part * lens[2]), lens[2]),
                );
            }
        });
    }
}
