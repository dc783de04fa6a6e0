//! Ceilings of the machine: loops that only read, only write or only multiply. Other loops are
//! measured as shares of them.
//!
//! ```
//! use bitnet_kernels::machine::{Instruction, WordBuffer, Pages, read};
//! let memory = WordBuffer::new(1 << 20, Pages::Huge);
//! let begin = std::time::Instant::now();
//! let sum = read(memory.words());
//! println!("{} bytes in {:?} ({sum})", memory.bytes(), begin.elapsed());
//! for instruction in Instruction::all() {
//!     instruction.run(1000);
//!     println!("{instruction}: {} multiply-adds", 1000 * instruction.multiply_adds());
//! }
//! ```

#[cfg(target_arch = "x86_64")]
mod x86;

use crate::lines::{CacheLine, advise_pages};
use std::fmt;

pub use crate::lines::Pages;

/// Words that begin at a cache line and have been written, so that their pages are there.
#[derive(Debug)]
pub struct WordBuffer(Vec<CacheLine>);

impl WordBuffer {
    /// `bytes`, rounded up to cache lines, of mixed bits.
    pub fn new(bytes: usize, pages: Pages) -> Self {
        let len = bytes.div_ceil(size_of::<CacheLine>());
        let mut lines: Vec<CacheLine> = Vec::with_capacity(len);
        advise_pages(lines.as_ptr(), len * size_of::<CacheLine>(), pages);
        let word = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        lines.extend(
            (0..len).map(|i| CacheLine::from_words(std::array::from_fn(|j| word(8 * i + j)))),
        );
        Self(lines)
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }

    /// All words.
    pub fn words(&self) -> &[u64] {
        // SAFETY: a `CacheLine` is 8 words without padding, aligned to more than a word needs.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), 8 * self.0.len()) }
    }

    /// All words.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: a `CacheLine` is 8 words without padding, aligned to more than a word needs, and
        // every pattern of bits is one; the words are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), 8 * self.0.len()) }
    }
}

/// Sum of the words modulo 2⁶⁴: a loop that only reads.
pub fn read(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: `is_x86_feature_detected!` found the feature on the line above.
        return unsafe { x86::read_512(words) };
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: `is_x86_feature_detected!` found the feature on the line above.
        return unsafe { x86::read_256(words) };
    }
    words.iter().fold(0, |sum, &word| sum.wrapping_add(word))
}

/// Fills the words through the caches.
pub fn write(words: &mut [u64], word: u64) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: `is_x86_feature_detected!` found the feature on the line above.
        return unsafe { x86::write_512(words, word) };
    }
    words.fill(word);
}

/// Fills the words past the caches (non-temporal stores), where the machine can; else as
/// [`write()`] does.
pub fn stream(words: &mut [u64], word: u64) {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every pattern of bits is a `CacheLine`, and `align_to_mut` sees to its alignment.
        let (head, lines, tail) = unsafe { words.align_to_mut::<CacheLine>() };
        head.fill(word);
        tail.fill(word);
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: `is_x86_feature_detected!` found the feature on the line above.
            unsafe { x86::stream_512(lines, word) };
        } else {
            x86::stream_128(lines, word);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    write(words, word);
}

/// An instruction, or a pair of them, that multiplies and adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Instruction {
    /// int8, 512 bits, AVX-512 VNNI.
    Dpbusd512,
    /// int8, 256 bits, AVX-VNNI.
    Dpbusd256,
    /// int8, 256 bits, AVX2: products of bytes added in pairs, then to sums of 16 bits.
    Maddubs256,
    /// The same with 128 bits, SSSE3.
    Maddubs128,
    /// f32, 512 bits, AVX-512.
    Fma512,
    /// f32, 256 bits.
    Fma256,
    /// f32, 128 bits, two instructions.
    MulAdd128,
}

impl Instruction {
    /// All of them, int8 before f32, wide to narrow.
    const ALL: [Self; 7] = [
        Self::Dpbusd512,
        Self::Dpbusd256,
        Self::Maddubs256,
        Self::Maddubs128,
        Self::Fma512,
        Self::Fma256,
        Self::MulAdd128,
    ];

    /// Those that this machine runs.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(|instruction| instruction.is_available())
    }

    /// Whether it multiplies bytes.
    pub const fn is_int8(self) -> bool {
        matches!(
            self,
            Self::Dpbusd512 | Self::Dpbusd256 | Self::Maddubs256 | Self::Maddubs128
        )
    }

    /// Whether this machine runs it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Self::Dpbusd512 => is_x86_feature_detected!("avx512vnni"),
            Self::Dpbusd256 => is_x86_feature_detected!("avxvnni"),
            Self::Maddubs256 => is_x86_feature_detected!("avx2"),
            Self::Maddubs128 => is_x86_feature_detected!("ssse3"),
            Self::Fma512 => is_x86_feature_detected!("avx512f"),
            Self::Fma256 => is_x86_feature_detected!("fma"),
            Self::MulAdd128 => true,
        };
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Multiply-adds of one round of [`Instruction::run`].
    pub const fn multiply_adds(self) -> usize {
        match self {
            Self::Dpbusd512 => 24 * 64,
            Self::Dpbusd256 | Self::Maddubs256 => 12 * 32,
            Self::Maddubs128 => 12 * 16,
            Self::Fma512 => 24 * 16,
            Self::Fma256 => 12 * 8,
            Self::MulAdd128 => 12 * 4,
        }
    }

    /// Runs it on registers alone, in chains that do not wait for one another.
    ///
    /// # Panics
    /// If the machine does not run it.
    pub fn run(self, rounds: usize) {
        assert!(self.is_available(), "this machine does not run {self}");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` found the features of the instruction: the assertion above.
        unsafe {
            match self {
                Self::Dpbusd512 => x86::dpbusd_512(rounds),
                Self::Dpbusd256 => x86::dpbusd_256(rounds),
                Self::Maddubs256 => x86::maddubs_256(rounds),
                Self::Maddubs128 => x86::maddubs_128(rounds),
                Self::Fma512 => x86::fma_512(rounds),
                Self::Fma256 => x86::fma_256(rounds),
                Self::MulAdd128 => x86::mul_add_128(rounds),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = rounds;
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Dpbusd512 => "vpdpbusd zmm",
            Self::Dpbusd256 => "vpdpbusd ymm",
            Self::Maddubs256 => "vpmaddubsw + vpaddw ymm",
            Self::Maddubs128 => "pmaddubsw + paddw xmm",
            Self::Fma512 => "vfmadd231ps zmm",
            Self::Fma256 => "vfmadd231ps ymm",
            Self::MulAdd128 => "mulps + addps xmm",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_and_written_whole() {
        for pages in [Pages::Huge, Pages::Small] {
            for bytes in [0, 1, 64, 4096, 5_000_001] {
                let mut memory = WordBuffer::new(bytes, pages);
                assert_eq!(memory.bytes(), bytes.next_multiple_of(64));
                // Lengths and beginnings that no loop divides.
                for cut in [0, 1, 7, 9, 65] {
                    let sum =
                        |words: &[u64]| words.iter().fold(0u64, |sum, &w| sum.wrapping_add(w));
                    let words = memory.words().get(cut..).unwrap_or_default();
                    assert_eq!(read(words), sum(words), "{bytes} bytes from word {cut}");
                    for (fill, word) in [(write as fn(&mut [u64], u64), 5), (stream, 7)] {
                        let first = memory.words().first().copied();
                        let words = memory.words_mut().get_mut(cut..).unwrap_or_default();
                        fill(words, word);
                        assert!(
                            words.iter().all(|&w| w == word),
                            "{bytes} bytes from word {cut}"
                        );
                        assert!(
                            cut == 0 || memory.words().first().copied() == first,
                            "a word before the first was written"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn instructions_run() {
        for instruction in Instruction::ALL {
            if instruction.is_available() {
                instruction.run(3);
                assert!(instruction.multiply_adds() > 0);
            } else {
                println!("skipped: this machine does not run {instruction}");
            }
        }
    }
}
