//! What the machine is and what it can do at most.

use crate::measure::Timed;
use crate::results::{Cache, Facts, Unit};
use bitnet_kernels::machine::{Instruction, WordBuffer, Pages, read, stream, write};
use bitnet_kernels::{Isa, Kernels, Pool};
use std::cell::OnceCell;
use std::fmt;
use std::hint::black_box;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Something that limits an operation. The order has no meaning but to sort by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ceiling {
    /// Reading memory that no cache holds, on huge pages.
    MemoryRead,
    /// The same on 4 KiB pages.
    MemoryReadSmallPages,
    /// Writing memory past the caches.
    MemoryStream,
    /// Writing memory through the caches, which read it first.
    MemoryWrite,
    /// Reading what L2 holds.
    L2Read,
    /// Writing what L2 holds.
    L2Write,
    /// Multiplying and adding on registers.
    Peak(Instruction),
}

/// The int8 products that an instruction set has, if their peak is known.
pub fn dot_product(isa: Isa) -> Option<Instruction> {
    let instruction = match isa {
        Isa::Sse41 => Instruction::Maddubs128,
        Isa::Avx2 => Instruction::Maddubs256,
        Isa::AvxVnni => Instruction::Dpbusd256,
        Isa::Avx512 | Isa::Avx512Vbmi => Instruction::Dpbusd512,
        _ => return None,
    };
    instruction.is_available().then_some(instruction)
}

impl Ceiling {
    /// All that can be measured here.
    pub fn all() -> Vec<Self> {
        let memory = [
            Self::MemoryRead,
            Self::MemoryReadSmallPages,
            Self::MemoryStream,
            Self::MemoryWrite,
            Self::L2Read,
            Self::L2Write,
        ];
        memory
            .into_iter()
            .chain(Instruction::all().map(Self::Peak))
            .collect()
    }

    /// What it is counted in.
    pub const fn unit(self) -> Unit {
        if matches!(self, Self::Peak(_)) {
            Unit::Macs
        } else {
            Unit::Bytes
        }
    }
}

impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MemoryRead => f.pad("memory read, huge pages"),
            Self::MemoryReadSmallPages => f.pad("memory read, small pages"),
            Self::MemoryStream => f.pad("memory write, non-temporal"),
            Self::MemoryWrite => f.pad("memory write, through caches"),
            Self::L2Read => f.pad("L2 read"),
            Self::L2Write => f.pad("L2 write"),
            Self::Peak(instruction) => instruction.fmt(f),
        }
    }
}

/// Calls that it takes to go once through the working set.
const CALLS: usize = 16;

/// The ceilings, measured with some threads over a working set.
#[derive(Debug)]
pub struct Machine {
    pool: Arc<Pool>,
    working_set: usize,
    l2: usize,
    large: OnceCell<WordBuffer>,
    written: OnceCell<Vec<Mutex<WordBuffer>>>,
}

impl Machine {
    /// `working_set` in bytes is what no cache is to hold.
    pub fn new(pool: Arc<Pool>, working_set: usize) -> Self {
        Self {
            pool,
            working_set,
            l2: l2_bytes(),
            large: OnceCell::new(),
            written: OnceCell::new(),
        }
    }

    /// The threads that measure.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Bytes that no cache is to hold.
    pub fn working_set(&self) -> usize {
        self.working_set
    }

    /// Bytes of L2, of all threads.
    pub fn l2(&self) -> usize {
        self.l2 * self.pool.threads()
    }

    /// Bytes of a thread that its L2 holds beside as much again and what else there is: a quarter
    /// of it.
    pub fn in_l2(&self) -> usize {
        self.l2 / 4
    }

    pub(crate) fn timed(&self, ceiling: Ceiling) -> Timed<'_> {
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
                Timed {
                    amount,
                    call: Box::new(move || self.pool.run(threads, |_| instruction.run(ROUNDS))),
                }
            }
        }
    }

    /// Reads a part of the memory in each call, and the next in the next.
    fn reading<'a>(&'a self, memory: impl Deref<Target = WordBuffer> + 'a) -> Timed<'a> {
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
        Timed {
            amount: (8 * words) as f64,
            call: Box::new(read),
        }
    }

    /// Goes over what L2 holds, many times in a call: a part may run on another core than in the
    /// last one, and then fetches its words once.
    fn in_cache(&self, work: fn(&mut [u64])) -> Timed<'_> {
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
        Timed {
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

    fn writing<'a>(&'a self, parts: &'a [Mutex<WordBuffer>], fill: fn(&mut [u64], u64)) -> Timed<'a> {
        let threads = self.pool.threads();
        let mut at = 0;
        let call = move || {
            self.pool.run(threads, |part| {
                fill(locked(&parts[at + part]).words_mut(), 3)
            });
            at = (at + threads) % parts.len();
        };
        Timed {
            amount: (threads * locked(&parts[0]).bytes()) as f64,
            call: Box::new(call),
        }
    }
}

/// Nothing panics while it holds one.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the system tells about the machine.
pub fn facts() -> Facts {
    let cpuinfo = text("/proc/cpuinfo");
    let cpu = field(&cpuinfo, "model name")
        .or_else(|| field(&cpuinfo, "Hardware"))
        .unwrap_or("unknown");
    let model = field(&cpuinfo, "model").map_or(String::new(), |model| format!(", model {model}"));
    Facts {
        cpu: format!("{cpu}{model}"),
        processors: processors(),
        caches: caches(),
        available_bytes: available(),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        isas: Kernels::all().map(|k| k.isa().to_string()).collect(),
    }
}

/// Logical processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What no cache holds: four times the last cache (the fourth part of it that may remain by chance
/// matters little), 256 MiB at least, and at most a twelfth of the memory that is available,
/// because every contender has its own.
pub fn working_set() -> usize {
    let last = caches().iter().map(|c| c.bytes).max().unwrap_or(64 << 20);
    let most = available().map_or(1 << 30, |bytes| bytes / 12);
    (4 * last).max(256 << 20).min(most.max(16 << 20)) as usize
}

fn l2_bytes() -> usize {
    caches()
        .iter()
        .find(|c| c.level == 2)
        .map_or(512 << 10, |c| c.bytes as usize)
}

fn caches() -> Vec<Cache> {
    let read = |index: usize| {
        let file = |name: &str| {
            text(&format!(
                "/sys/devices/system/cpu/cpu0/cache/index{index}/{name}"
            ))
        };
        let size = file("size");
        let (number, factor) = match size.trim().strip_suffix('K') {
            Some(kib) => (kib, 1024),
            None => (size.trim().strip_suffix('M')?, 1 << 20),
        };
        let kind = file("type").trim().to_owned();
        Some(Cache {
            level: file("level").trim().parse().ok()?,
            kind,
            bytes: number.parse::<u64>().ok()? * factor,
        })
    };
    (0..8).map_while(read).collect()
}

fn available() -> Option<u64> {
    let meminfo = text("/proc/meminfo");
    let kib: u64 = field(&meminfo, "MemAvailable")?
        .strip_suffix(" kB")?
        .parse()
        .ok()?;
    Some(kib * 1024)
}

/// Empty where there is no such file.
fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The value after `name` and a colon.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

/// Now, as `2026-01-31T23:59:59Z`.
pub fn now() -> String {
    date(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
    )
}

/// Seconds since 1970 in the Gregorian calendar, counted in years that begin in March, so that a
/// leap day is the last of its year.
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (
        era * 400 + year + u64::from(month >= 10),
        if month < 10 { month + 3 } else { month - 9 },
    );
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }

    #[test]
    fn every_ceiling_can_be_measured() {
        for threads in [1, 2] {
            let machine = Machine::new(Arc::new(Pool::new(threads).unwrap()), 1 << 20);
            for ceiling in Ceiling::all() {
                let mut timed = machine.timed(ceiling);
                (0..2 * CALLS + 1).for_each(|_| (timed.call)());
                assert!(timed.amount > 0.0, "{ceiling}");
            }
        }
    }
}
