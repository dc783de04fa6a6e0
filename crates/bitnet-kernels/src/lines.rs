//! Memory for prepacked weights: aligned to cache lines, on huge pages where the system grants
//! them.

use crate::pool::Pool;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// 64 bytes that begin at a multiple of 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct CacheLine(pub(crate) [u8; 64]);

impl CacheLine {
    pub(crate) fn from_words(words: [u64; 8]) -> Self {
        Self(std::array::from_fn(|i| words[i / 8].to_ne_bytes()[i % 8]))
    }
}

/// A huge page of x86-64 and of aarch64 with 4 KiB pages.
const HUGE: usize = 2 << 20;

/// A fixed number of lines. From the size of a huge page on they begin at one, and the system is
/// asked for huge pages.
pub(crate) struct Lines {
    data: NonNull<CacheLine>,
    len: usize,
}

// SAFETY: the lines are owned, like those of a `Vec<CacheLine>`, and belong to no thread.
unsafe impl Send for Lines {}
// SAFETY: the lines are owned, like those of a `Vec<CacheLine>`; shared access only reads.
unsafe impl Sync for Lines {}

impl Lines {
    fn layout(len: usize) -> Layout {
        let bytes = len
            .checked_mul(size_of::<CacheLine>())
            .expect("lines fit the address space");
        let align = if bytes >= HUGE {
            HUGE
        } else {
            align_of::<CacheLine>()
        };
        Layout::from_size_align(bytes, align).expect("lines fit the address space")
    }

    /// `len` lines, all the same.
    ///
    /// # Panics
    /// If they exceed the address space; like a `Vec`, it aborts where there is no memory.
    pub(crate) fn filled(line: CacheLine, len: usize) -> Self {
        Self::filled_on(&Pool::single(), line, len)
    }

    /// The same, written by the threads of a pool: the system clears the pages where they are first
    /// touched.
    ///
    /// # Panics
    /// As [`Lines::filled`].
    pub(crate) fn filled_on(pool: &Pool, line: CacheLine, len: usize) -> Self {
        if len == 0 {
            return Self {
                data: NonNull::dangling(),
                len,
            };
        }
        let layout = Self::layout(len);
        // SAFETY: `len` is not 0, so that the layout has a size.
        let Some(data) = NonNull::new(unsafe { alloc(layout) }) else {
            handle_alloc_error(layout)
        };
        if layout.align() == HUGE {
            advise_pages(data.as_ptr(), layout.size(), Pages::Huge);
        }
        let lines = Self {
            data: data.cast(),
            len,
        };
        let parts = len.div_ceil(HUGE / size_of::<CacheLine>());
        pool.run(parts, |part| {
            // `lines` is shared as a whole: it may go to other threads, its pointer may not.
            let lines = &lines;
            for i in part * len / parts..(part + 1) * len / parts {
                // SAFETY: i < len, for which `layout` was allocated and aligned; parts write
                // different lines, and nothing reads them before `Pool::run` returns.
                unsafe { lines.data.add(i).write(line) };
            }
        });
        lines
    }

    /// The bytes of `lines`.
    pub(crate) fn bytes(lines: &[CacheLine]) -> &[u8] {
        // SAFETY: a `CacheLine` is 64 bytes without padding (`repr(C)`), so the slice is that
        // number of initialised bytes.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
    }
}

/// Size of the pages under memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Huge ones where the system grants them, as under prepacked weights.
    Huge,
    /// The smallest, as under a plain `Vec` where huge pages are for those who ask.
    Small,
}

/// Asks the system for pages of a size under the whole 4 KiB pages of `bytes` bytes at `data`. A
/// refusal leaves its default.
pub(crate) fn advise_pages<T>(data: *const T, bytes: usize, pages: Pages) {
    #[cfg(target_os = "linux")]
    {
        let begin = (data as usize).next_multiple_of(4096);
        let len = (data as usize + bytes).saturating_sub(begin) / 4096 * 4096;
        let advice = match pages {
            Pages::Huge => libc::MADV_HUGEPAGE,
            Pages::Small => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: both advices are about the size of pages: they change no byte of any memory, and
        // of an address without memory they return an error.
        unsafe { libc::madvise(begin as *mut libc::c_void, len, advice) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (data, bytes, pages);
}

/// `len` zeros, on huge pages where the system grants them: for weights, which are read as one
/// stream.
pub fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let zeros = vec![T::default(); len];
    let bytes = size_of_val(zeros.as_slice());
    if bytes >= 2 * HUGE {
        advise_pages(zeros.as_ptr(), bytes, Pages::Huge);
    }
    zeros
}

impl Deref for Lines {
    type Target = [CacheLine];
    fn deref(&self) -> &[CacheLine] {
        // SAFETY: `filled` initialised `len` lines there, which this value owns.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [CacheLine] {
        // SAFETY: `filled` initialised `len` lines there, which this value owns and borrows
        // mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: `filled` allocated it with this layout.
            unsafe { dealloc(self.data.as_ptr().cast(), Self::layout(self.len)) };
        }
    }
}

impl Clone for Lines {
    fn clone(&self) -> Self {
        let mut lines = Self::filled(CacheLine([0; 64]), self.len);
        lines.copy_from_slice(self);
        lines
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lines", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_aligned_filled_and_cloned() {
        for len in [0, 1, 3, HUGE / 64 - 1, HUGE / 64, HUGE / 64 + 1] {
            let mut lines = Lines::filled(CacheLine([7; 64]), len);
            assert_eq!(lines.len(), len);
            assert!(lines.iter().all(|l| *l == CacheLine([7; 64])));
            assert_eq!(
                lines.as_ptr() as usize % if len * 64 >= HUGE { HUGE } else { 64 },
                0
            );
            if let Some(last) = lines.last_mut() {
                last.0[63] = 9;
            }
            let copy = lines.clone();
            assert_eq!(*copy, *lines);
            assert_eq!(Lines::bytes(&copy).last(), (len > 0).then_some(&9));
        }
    }
}
