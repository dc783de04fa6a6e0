//! The threads and the memory that a benchmark runs on, and the measurement of the ceilings there.

use crate::ceiling::Ceiling;
use crate::machine::l2_bytes;
use bitnet_kernels::Pool;
use bitnet_kernels::machine::{Pages, WordBuffer, read, stream, write};
use std::cell::OnceCell;
use std::hint::black_box;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

/// A loop that reaches a ceiling; each call does `amount`.
pub(crate) struct TimedCeiling<'a> {
    pub(crate) amount: f64,
    pub(crate) call: Box<dyn FnMut() + 'a>,
}

/// Number of calls that cover the working set once.
const CALLS: usize = 16;

/// The threads of a benchmark and the working set that they read and write.
#[derive(Debug)]
pub struct Testbed {
    pool: Arc<Pool>,
    working_set: usize,
    l2: usize,
    large: OnceCell<WordBuffer>,
    written: OnceCell<Vec<Mutex<WordBuffer>>>,
}

impl Testbed {
    /// A testbed with the threads of `pool` and a working set in bytes, which should be larger than
    /// the caches.
    pub fn new(pool: Arc<Pool>, working_set: usize) -> Self {
        Self {
            pool,
            working_set,
            l2: l2_bytes(),
            large: OnceCell::new(),
            written: OnceCell::new(),
        }
    }

    /// The threads.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Size of the working set in bytes.
    pub fn working_set(&self) -> usize {
        self.working_set
    }

    /// Size of L2 in bytes, summed over the threads.
    pub fn l2(&self) -> usize {
        self.l2 * self.pool.threads()
    }

    /// Working set per thread in bytes for L2 tests: a quarter of L2, which leaves room for an
    /// output of the same size.
    pub fn in_l2(&self) -> usize {
        self.l2 / 4
    }

    /// The loop that reaches a ceiling.
    pub(crate) fn timed(&self, ceiling: Ceiling) -> TimedCeiling<'_> {
        let threads = self.pool.threads();
        match ceiling {
            Ceiling::MemoryRead => self.reading(
                self.large
                    .get_or_init(|| WordBuffer::new(self.working_set, Pages::Huge)),
            ),
            Ceiling::MemoryReadSmallPages => {
                self.reading(Box::new(WordBuffer::new(self.working_set, Pages::Small)))
            }
            Ceiling::MemoryStream => self.writing(self.written(), stream),
            Ceiling::MemoryWrite => self.writing(self.written(), write),
            Ceiling::L2Read => self.in_cache(|words| {
                black_box(read(words));
            }),
            Ceiling::L2Write => self.in_cache(|words| write(words, 3)),
            Ceiling::Peak(instruction) => {
                const ROUNDS: usize = 2000;
                let amount = (threads * ROUNDS * instruction.multiply_adds()) as f64;
                TimedCeiling {
                    amount,
                    call: Box::new(move || self.pool.run(threads, |_| instruction.run(ROUNDS))),
                }
            }
        }
    }

    /// Reads one part of the memory per call, and the parts in their order.
    fn reading<'a>(&'a self, memory: impl Deref<Target = WordBuffer> + 'a) -> TimedCeiling<'a> {
        let (threads, words) = (self.pool.threads(), memory.words().len() / CALLS);
        let mut call = 0;
        let read = move || {
            let words = &memory.words()[call * words..][..words];
            self.pool.run(threads, |part| {
                black_box(read(
                    &words[part * words.len() / threads..(part + 1) * words.len() / threads],
                ));
            });
            call = (call + 1) % CALLS;
        };
        TimedCeiling {
            amount: (8 * words) as f64,
            call: Box::new(read),
        }
    }

    /// Runs `work` over data that L2 holds, many times per call: a part may run on another core
    /// than in the last call, and then its first pass misses L2.
    fn in_cache(&self, work: fn(&mut [u64])) -> TimedCeiling<'_> {
        const TIMES: usize = 16;
        let threads = self.pool.threads();
        let parts: Vec<_> = (0..threads)
            .map(|_| Mutex::new(WordBuffer::new(self.in_l2(), Pages::Huge)))
            .collect();
        let amount = (TIMES * threads * locked(&parts[0]).bytes()) as f64;
        let call = move || {
            self.pool.run(threads, |part| {
                let mut memory = locked(&parts[part]);
                (0..TIMES).for_each(|_| work(memory.words_mut()));
            });
        };
        TimedCeiling {
            amount,
            call: Box::new(call),
        }
    }

    fn written(&self) -> &[Mutex<WordBuffer>] {
        let parts = CALLS * self.pool.threads();
        self.written.get_or_init(|| {
            (0..parts)
                .map(|_| Mutex::new(WordBuffer::new(self.working_set / parts, Pages::Huge)))
                .collect()
        })
    }

    fn writing<'a>(
        &'a self,
        parts: &'a [Mutex<WordBuffer>],
        fill: fn(&mut [u64], u64),
    ) -> TimedCeiling<'a> {
        let threads = self.pool.threads();
        let mut at = 0;
        let call = move || {
            self.pool.run(threads, |part| {
                fill(locked(&parts[at + part]).words_mut(), 3)
            });
            at = (at + threads) % parts.len();
        };
        TimedCeiling {
            amount: (threads * locked(&parts[0]).bytes()) as f64,
            call: Box::new(call),
        }
    }
}

/// No thread panics while it holds the lock.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ceiling_can_be_measured() {
        for threads in [1, 2] {
            let machine = Testbed::new(Arc::new(Pool::new(threads).unwrap()), 1 << 20);
            for ceiling in Ceiling::all() {
                let mut timed = machine.timed(ceiling);
                (0..2 * CALLS + 1).for_each(|_| (timed.call)());
                assert!(timed.amount > 0.0, "{ceiling}");
            }
        }
    }
}
