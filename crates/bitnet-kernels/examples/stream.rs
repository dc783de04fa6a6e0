//! Speed of the streams in GB/s, each beside its ceiling measured in the same turns.
//!
//! `cargo run --release -p bitnet-kernels --example stream [isa] [part of an operation's name]`; without an instruction set, all of them.

use bitnet_core::pack::{Layout, by_name};
use bitnet_core::scheme::{Scheme, Threshold};
use bitnet_core::{Granularity, MatrixSpec, Precision, ScaleDtype};
use bitnet_kernels::stream::{Weights, dequantize, pack, quantize, quantize_token, unpack};
use bitnet_kernels::{Isa, Kernels, Pool};
use std::hint::black_box;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

/// Turns of each measurement, and about how long each lasts for the ceiling and for each operation.
const TURNS: usize = 9;
/// Seconds.
const TURN: f64 = 0.012;
/// Floats that no cache holds: 512 MiB.
const COLD: (usize, usize) = (32768, 4096);
/// Rows of a piece of the cold floats that one call takes: 32 MiB.
const PIECE: usize = 2048;

/// Something to measure: bytes that a call moves, and the call.
struct Work<'a> {
    bytes: f64,
    call: Box<dyn FnMut() + 'a>,
}

impl<'a> Work<'a> {
    fn new(bytes: usize, call: impl FnMut() + 'a) -> Self {
        Self { bytes: bytes as f64, call: Box::new(call) }
    }

    fn turn(&mut self, calls: usize) -> f64 {
        let begin = Instant::now();
        (0..calls).for_each(|_| (self.call)());
        self.bytes * calls as f64 / begin.elapsed().as_secs_f64() / 1e9
    }

    fn calls(&mut self) -> usize {
        (self.call)();
        let rate = self.turn(1);
        (TURN * 1e9 * rate / self.bytes).ceil().max(1.0) as usize
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// What is measured: a name, the share of the ceiling that a call can reach at most, and the work on given kernels.
struct Operation<'a> {
    name: String,
    ceiling: Box<dyn Fn() -> Work<'a> + 'a>,
    /// What 100 % is, as a share of the ceiling.
    share: f64,
    work: Box<dyn Fn(Kernels) -> Work<'a> + 'a>,
}

impl Operation<'_> {
    fn print(&self, kernels: &[Kernels]) {
        let mut ceiling = (self.ceiling)();
        let mut works: Vec<Work<'_>> = kernels.iter().map(|&k| (self.work)(k)).collect();
        let (of_ceiling, calls): (usize, Vec<usize>) = (ceiling.calls(), works.iter_mut().map(Work::calls).collect());
        let turns: Vec<(f64, Vec<f64>)> =
            (0..TURNS).map(|_| (ceiling.turn(of_ceiling), works.iter_mut().zip(&calls).map(|(w, &n)| w.turn(n)).collect())).collect();
        let top = median(turns.iter().map(|t| t.0).collect());
        print!("{:44} {top:6.1} |", self.name);
        for i in 0..works.len() {
            let rate = median(turns.iter().map(|t| t.1[i]).collect());
            let share = median(turns.iter().map(|t| 100.0 * t.1[i] / t.0 / self.share).collect());
            let ratio = median(turns.iter().map(|t| t.1[i] / t.1[0]).collect());
            print!(" {rate:6.1} {share:4.0} % {ratio:5.1} × |");
        }
        println!();
    }
}

/// Whether a buffer asks for huge pages or refuses them.
#[derive(Clone, Copy, PartialEq)]
enum Pages {
    Huge,
    Small,
}

/// Numbers that begin at a cache line.
struct Buffer<T> {
    all: Vec<T>,
    start: usize,
}

impl<T: Clone> Buffer<T> {
    /// `n` copies of a number, on pages of that kind where the system grants them.
    fn new(n: usize, value: T, pages: Pages) -> Self {
        let n = n + 64 / size_of::<T>();
        let mut all = Vec::with_capacity(n);
        #[cfg(target_os = "linux")]
        {
            let page = (all.as_ptr() as usize).next_multiple_of(4096);
            let advice = if pages == Pages::Huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
            // SAFETY: advice about memory of ours, which changes no byte of it; a refusal leaves the pages as they are.
            unsafe { libc::madvise(page as *mut libc::c_void, (size_of::<T>() * n).saturating_sub(4096), advice) };
        }
        all.resize(n, value);
        let start = all.as_ptr().align_offset(64);
        Self { all, start }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.all[self.start..self.all.len() + self.start - 64 / size_of::<T>()]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let end = self.all.len() + self.start - 64 / size_of::<T>();
        &mut self.all[self.start..end]
    }
}

/// Bell-shaped floats.
fn weights(n: usize, pages: Pages) -> Buffer<f32> {
    let mut w = Buffer::new(n, 0.0f32, pages);
    let mut state = 1u64;
    for w in w.iter_mut() {
        let mut sum = 0.0;
        for _ in 0..3 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
        }
        *w = sum * 0.03;
    }
    w
}

fn trits(n: usize, pages: Pages) -> Buffer<i8> {
    let mut state = 1u32;
    let mut trits = Buffer::new(n, 0i8, pages);
    for trit in trits.iter_mut() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *trit = ((state >> 16) % 3) as i8 - 1;
    }
    trits
}

/// Reads of `data`, a piece a call, each call where the last one ended.
fn reading(data: &[f32], piece: usize) -> Work<'_> {
    let mut at = 0;
    let piece = piece.min(data.len());
    Work::new(4 * piece, move || {
        black_box(machine::sum(&data[at..at + piece]));
        at = if at + 2 * piece <= data.len() { at + piece } else { 0 };
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let isa: Option<Isa> = arguments.first().and_then(|a| a.parse().ok());
    let wanted = arguments.get(usize::from(isa.is_some())).map_or("", |a| a.as_str());
    let mut kernels: Vec<Kernels> = Kernels::all().filter(|k| k.isa() == Isa::Scalar || isa.is_none_or(|isa| k.isa() == isa)).collect();
    // The streams do not use what distinguishes it from AVX2.
    kernels.retain(|k| k.isa() != Isa::AvxVnni);
    println!("GB/s, one thread, median of {TURNS} turns: ceiling, then for each instruction set the rate, its share of what the ceiling");
    println!("allows, and the ratio to scalar");
    print!("{:44} {:>6} |", "", "");
    kernels.iter().for_each(|k| print!(" {:^21} |", k.isa().to_string()));
    println!();
    for pages in [Pages::Huge, Pages::Small] {
        println!("{}", if pages == Pages::Huge { "huge pages asked for" } else { "4 KiB pages" });
        quantizing(pages, &kernels, wanted);
        coding(pages, &kernels, wanted)?;
    }
    Ok(())
}

fn run<'a>(operations: Vec<Operation<'a>>, kernels: &[Kernels], wanted: &str) {
    operations.iter().filter(|o| o.name.contains(wanted) && !kernels.is_empty()).for_each(|o| o.print(kernels));
}

/// Whether operations at a place can be among those wanted, so that memory is taken only for those.
fn may_be(wanted: &str, place: &str) -> bool {
    wanted.contains(place) || !["L1", "L2", "DRAM"].iter().any(|p| wanted.contains(p))
}

/// Floats to packed codes and to int8.
fn quantizing(pages: Pages, kernels: &[Kernels], wanted: &str) {
    let (rows, cols) = if may_be(wanted, "DRAM") { COLD } else { (PIECE, COLD.1) };
    let w = weights(rows * cols, pages);
    let (w, pool) = (&w[..], &Pool::single());
    let two_bit = by_name("two-bit").expect("a layout of ours");
    let base3 = by_name("base-3").expect("a layout of ours");
    let quantizing = |what: &str, scheme: Scheme, layout: &'static dyn Layout, share: f64| {
        // A tensor that is read twice must not fit the caches.
        let piece = if scheme.granularity == Granularity::Tensor { rows } else { PIECE };
        let work = move |kernels: Kernels| {
            let mut at = 0;
            Work::new(4 * piece * cols, move || {
                let part = Weights::F32(&w[at * cols..(at + piece) * cols]);
                black_box(quantize(kernels, pool, part, piece, cols, &scheme, layout).expect("quantizes"));
                at = (at + piece) % rows;
            })
        };
        let name = format!("{what} {} {} DRAM", scheme.granularity, layout.name());
        Operation { name, ceiling: Box::new(move || reading(w, PIECE * cols)), share, work: Box::new(work) }
    };
    let absmean = Scheme::ternary(Threshold::Absmean);
    let (channel, group) = (Granularity::Channel, Granularity::Group(128));
    let from_dram = if may_be(wanted, "DRAM") { kernels } else { &[] };
    run(
        vec![
            quantizing("absmean", absmean, two_bit, 0.5),
            quantizing("absmean", absmean.with_granularity(channel), two_bit, 1.0),
            quantizing("absmean", absmean.with_granularity(group), two_bit, 1.0),
            quantizing("absmean", absmean, base3, 0.5),
            quantizing("absmean", absmean.with_granularity(channel), base3, 1.0),
            quantizing("mean", Scheme::ternary(Threshold::Mean).with_granularity(channel), two_bit, 1.0),
            quantizing("median", Scheme::ternary(Threshold::Median).with_granularity(channel), two_bit, 1.0),
            quantizing("optimal", Scheme::ternary(Threshold::Optimal).with_granularity(channel), two_bit, 1.0),
            quantizing("optimal", Scheme::ternary(Threshold::Optimal).with_granularity(group), two_bit, 1.0),
        ],
        from_dram,
        wanted,
    );
    if pages == Pages::Huge {
        // 32 rows of 4096 are 512 KiB.
        let warm = &w[..32 * cols];
        let warm_row = move |scheme: Scheme| {
            move |kernels: Kernels| {
                Work::new(4 * warm.len(), move || {
                    black_box(quantize(kernels, pool, Weights::F32(warm), 32, cols, &scheme, two_bit).expect("quantizes"));
                })
            }
        };
        let token = |kernels: Kernels| {
            let (x, mut out, mut sums) = (&w[..64 * 2560], vec![0; 2560], [0]);
            Work::new(4 * x.len(), move || {
                for x in x.chunks(2560) {
                    black_box(quantize_token(kernels, x, 2560, 2560, &mut out, &mut sums).expect("quantizes"));
                }
            })
        };
        run(
            vec![
                Operation {
                    name: "int8 tokens of 2560 L2".into(),
                    ceiling: Box::new(move || reading(&w[..64 * 2560], 64 * 2560)),
                    share: 1.0,
                    work: Box::new(token),
                },
                Operation {
                    name: "absmean channel two-bit L2".into(),
                    ceiling: Box::new(move || reading(warm, warm.len())),
                    share: 1.0,
                    work: Box::new(warm_row(absmean.with_granularity(channel))),
                },
                Operation {
                    name: "absmean group:128 two-bit L2".into(),
                    ceiling: Box::new(move || reading(warm, warm.len())),
                    share: 1.0,
                    work: Box::new(warm_row(absmean.with_granularity(group))),
                },
                Operation {
                    name: "optimal channel two-bit L2".into(),
                    ceiling: Box::new(move || reading(warm, warm.len())),
                    share: 1.0,
                    work: Box::new(warm_row(Scheme::ternary(Threshold::Optimal).with_granularity(channel))),
                },
            ],
            kernels,
            wanted,
        );
    }
}

/// Packing and unpacking.
fn coding(pages: Pages, kernels: &[Kernels], wanted: &str) -> Result<(), Box<dyn std::error::Error>> {
    let pool = &Pool::single();
    let cols = 2560;
    for (rows, place) in [(8, "L1"), (256, "L2"), (100_000, "DRAM")] {
        if !may_be(wanted, place) || place != "DRAM" && pages == Pages::Small {
            continue;
        }
        let values = &trits(rows * cols, pages)[..];
        let scales = [0.5f32];
        let out = &std::cell::RefCell::new(Buffer::new(rows * cols, 0i8, pages));
        let floats = &std::cell::RefCell::new(Buffer::new(if place == "DRAM" { rows / 4 } else { rows / 2 } * cols, 0f32, pages));
        let words = &weights(64 * cols, pages)[..];
        let words = &words[..(rows * cols / 4).min(words.len())];
        let reads = move || reading(words, words.len());
        let writes = move || {
            Work::new(rows * cols, move || {
                machine::fill(&mut out.borrow_mut()[..]);
            })
        };
        let names = ["two-bit", "base-3", "hf-bitnet", "i2_s", "tq1_0", "tq2_0"];
        let packed: Vec<(&str, MatrixSpec, Vec<u8>)> = names[..if place == "L2" { 6 } else { 2 }]
            .iter()
            .copied()
            .map(|name| {
                let dtype = if name.starts_with("tq") { ScaleDtype::F16 } else { ScaleDtype::F32 };
                let spec = MatrixSpec { scale_dtype: dtype, ..MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor) };
                let mut bytes = vec![];
                by_name(name)?.pack_into(&spec, values, &scales, &mut bytes)?;
                Ok((name, spec, bytes))
            })
            .collect::<Result<_, bitnet_core::Error>>()?;
        let mut operations = vec![];
        for (name, spec, bytes) in &packed {
            let layout = by_name(name)?;
            let unpacking = move |kernels: Kernels| {
                Work::new(rows * cols, move || {
                    unpack(kernels, pool, layout, spec, bytes, &mut out.borrow_mut()).expect("unpacks");
                })
            };
            operations.push(Operation {
                name: format!("unpack {name} → i8 {place}"),
                ceiling: Box::new(writes),
                share: 1.0,
                work: Box::new(unpacking),
            });
            if !["two-bit", "base-3"].contains(name) {
                continue;
            }
            let n = floats.borrow().len();
            let dequantizing = move |kernels: Kernels| {
                let part = MatrixSpec { rows: n / cols, ..spec.clone() };
                Work::new(4 * n, move || {
                    let bytes = &bytes[..n.div_ceil(if *name == "two-bit" { 4 } else { 5 })];
                    dequantize(kernels, pool, layout, &part, bytes, &[0.5], &mut floats.borrow_mut()).expect("dequantizes");
                })
            };
            let float_writes = move || {
                Work::new(4 * n, move || {
                    machine::fill(&mut floats.borrow_mut()[..]);
                })
            };
            operations.push(Operation {
                name: format!("dequantize {name} → f32 {place}"),
                ceiling: Box::new(float_writes),
                share: 1.0,
                work: Box::new(dequantizing),
            });
            if place != "DRAM" {
                let packing = move |kernels: Kernels| {
                    let mut bytes = vec![];
                    Work::new(rows * cols, move || {
                        bytes.clear();
                        pack(kernels, pool, layout, spec, values, &[], &mut bytes).expect("packs");
                    })
                };
                operations.push(Operation {
                    name: format!("pack i8 → {name} {place}"),
                    ceiling: Box::new(reads),
                    share: 1.0,
                    work: Box::new(packing),
                });
            }
        }
        run(operations, kernels, wanted);
    }
    Ok(())
}

/// The ceilings, with the widest registers that the machine has.
mod machine {
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;

    /// Reads all of it.
    pub(crate) fn sum(data: &[f32]) -> u32 {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was found on the line above.
            return unsafe { wide_sum(data) };
        }
        data.iter().fold(0, |sum, x| sum ^ x.to_bits())
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn wide_sum(data: &[f32]) -> u32 {
        let mut sums = [_mm512_setzero_si512(); 8];
        for lines in data.as_chunks::<128>().0 {
            for (sum, line) in sums.iter_mut().zip(lines.as_chunks::<16>().0) {
                // SAFETY: 16 numbers of 4 bytes; the read needs no alignment.
                *sum = _mm512_add_epi32(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
            }
        }
        sums.into_iter().map(|s| _mm512_reduce_add_epi32(s) as u32).fold(0, |a, b| a ^ b)
    }

    /// Writes all of it, past the caches where it is larger than they are.
    pub(crate) fn fill<T>(out: &mut [T]) {
        let (bytes, at) = (size_of_val(out), out.as_mut_ptr().cast::<u8>());
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            let head = at.align_offset(64);
            // SAFETY: the feature was found on the line above, and the lines are inside `out`, whose numbers may have any bits.
            return unsafe { wide_fill(at.add(head).cast(), bytes.saturating_sub(head) / 64, bytes >= 16 << 20) };
        }
        // SAFETY: the bytes are those of `out`, whose numbers may have any bits.
        unsafe { at.write_bytes(1, bytes) };
    }

    /// # Safety
    /// `lines` lines from `at` on, which is aligned, are writable.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn wide_fill(at: *mut __m512i, lines: usize, streamed: bool) {
        let ones = _mm512_set1_epi8(1);
        for i in 0..lines {
            // SAFETY: the caller's.
            unsafe { if streamed { _mm512_stream_si512(at.add(i), ones) } else { at.add(i).write_volatile(ones) } }
        }
        _mm_sfence();
    }
}
