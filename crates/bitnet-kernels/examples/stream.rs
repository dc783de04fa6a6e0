//! Speed of the streams in GB/s, each beside its ceiling measured in the same turns.
//!
//! `cargo run --release -p bitnet-kernels --example stream [isa] [part of an operation's name]`;
//! without an instruction set, all of them.

use bitnet_core::pack::{Layout, by_name};
use bitnet_core::random::Random;
use bitnet_core::scheme::{Scheme, Threshold};
use bitnet_core::{Granularity, MatrixSpec, Precision, ScaleDtype};
use bitnet_kernels::machine::{self, Pages, WordBuffer};
use bitnet_kernels::matmul::{MatrixParameters, Prepacked, Stream};
use bitnet_kernels::stream::{
    FloatWeights, PackedMatrix, dequantize, pack, quantize_into, quantize_token, unpack,
};
use bitnet_kernels::{Isa, Kernels, Pool};
use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

/// Turns of each measurement, and about how long each lasts for the ceiling and for each operation.
const TURNS: usize = 9;
/// Seconds.
const TURN: f64 = 0.012;
/// Floats that no cache holds, not even a large one that is shared: 2 GiB.
const COLD: (usize, usize) = (131_072, 4096);
/// Rows of a piece of the cold floats that one call takes: 32 MiB.
const PIECE: usize = 2048;

/// Something to measure: bytes that a call moves, and the call.
struct Work<'a> {
    bytes: f64,
    call: Box<dyn FnMut() + 'a>,
}

impl<'a> Work<'a> {
    fn new(bytes: usize, call: impl FnMut() + 'a) -> Self {
        Self {
            bytes: bytes as f64,
            call: Box::new(call),
        }
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

/// What is measured: a name, the share of the ceiling that a call can reach at most, and the work
/// on given kernels.
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
        let (of_ceiling, calls): (usize, Vec<usize>) =
            (ceiling.calls(), works.iter_mut().map(Work::calls).collect());
        let turns: Vec<(f64, Vec<f64>)> = (0..TURNS)
            .map(|_| {
                (
                    ceiling.turn(of_ceiling),
                    works
                        .iter_mut()
                        .zip(&calls)
                        .map(|(w, &n)| w.turn(n))
                        .collect(),
                )
            })
            .collect();
        let top = median(turns.iter().map(|t| t.0).collect());
        print!("{:44} {top:6.1} |", self.name);
        for i in 0..works.len() {
            let rate = median(turns.iter().map(|t| t.1[i]).collect());
            let share = median(
                turns
                    .iter()
                    .map(|t| 100.0 * t.1[i] / t.0 / self.share)
                    .collect(),
            );
            let ratio = median(turns.iter().map(|t| t.1[i] / t.1[0]).collect());
            print!(" {rate:6.1} {share:4.0} % {ratio:5.1} × |");
        }
        println!();
    }
}

/// Numbers in memory of that kind of page.
struct Buffer<T> {
    memory: WordBuffer,
    len: usize,
    of: PhantomData<T>,
}

/// Numbers that any bits are.
trait Number: Copy {}
impl Number for f32 {}
impl Number for i8 {}
impl Number for u8 {}

impl<T: Number> Buffer<T> {
    fn new(len: usize, pages: Pages) -> Self {
        Self {
            memory: WordBuffer::new(size_of::<T>() * len, pages),
            len,
            of: PhantomData,
        }
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the memory has at least `len` numbers, begins at a cache line, and any bits are a
        // number.
        unsafe { std::slice::from_raw_parts(self.memory.words().as_ptr().cast(), self.len) }
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably; every number is bits that a word may have.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.words_mut().as_mut_ptr().cast(), self.len)
        }
    }
}

/// The whole words of a slice.
fn words<T: Number>(of: &[T]) -> &[u64] {
    // SAFETY: any bits of numbers are a word.
    unsafe { of.align_to().1 }
}

/// Bell-shaped floats.
fn weights(n: usize, pages: Pages) -> Buffer<f32> {
    let mut w = Buffer::<f32>::new(n, pages);
    let mut random = Random::new(1);
    for w in w.iter_mut() {
        let sum: f64 = (0..3).map(|_| random.uniform() - 0.5).sum();
        *w = sum as f32 * 0.03;
    }
    w
}

fn trits(n: usize, pages: Pages) -> Buffer<i8> {
    let mut random = Random::new(1);
    let mut trits = Buffer::<i8>::new(n, pages);
    for trit in trits.iter_mut() {
        *trit = random.trit();
    }
    trits
}

/// Writes all of it, past the caches where it is larger than they are.
fn fill(memory: &mut WordBuffer) {
    if memory.bytes() >= 16 << 20 {
        machine::stream(memory.words_mut(), 1)
    } else {
        machine::write(memory.words_mut(), 1)
    }
}

/// Reads of `data`, a piece a call, each call where the last one ended.
fn reading(data: &[f32], piece: usize) -> Work<'_> {
    let mut at = 0;
    let piece = piece.min(data.len());
    Work::new(4 * piece, move || {
        black_box(machine::read(words(&data[at..at + piece])));
        at = if at + 2 * piece <= data.len() {
            at + piece
        } else {
            0
        };
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let isa: Option<Isa> = arguments.first().and_then(|a| a.parse().ok());
    let wanted = arguments
        .get(usize::from(isa.is_some()))
        .map_or("", |a| a.as_str());
    let mut kernels: Vec<Kernels> = Kernels::all()
        .filter(|k| k.isa() == Isa::Scalar || isa.is_none_or(|isa| k.isa() == isa))
        .collect();
    // The streams do not use what distinguishes it from AVX2.
    kernels.retain(|k| k.isa() != Isa::AvxVnni);
    println!(
        "GB/s, one thread, median of {TURNS} turns: ceiling, then for each instruction set the rate, its share of what the ceiling"
    );
    println!("allows, and the ratio to scalar");
    print!("{:44} {:>6} |", "", "");
    kernels
        .iter()
        .for_each(|k| print!(" {:^21} |", k.isa().to_string()));
    println!();
    for pages in [Pages::Huge, Pages::Small] {
        println!(
            "{}",
            if pages == Pages::Huge {
                "huge pages asked for"
            } else {
                "4 KiB pages"
            }
        );
        quantizing(pages, &kernels, wanted);
        coding(pages, &kernels, wanted)?;
    }
    Ok(())
}

fn run<'a>(operations: Vec<Operation<'a>>, kernels: &[Kernels], wanted: &str) {
    operations
        .iter()
        .filter(|o| o.name.contains(wanted) && !kernels.is_empty())
        .for_each(|o| o.print(kernels));
}

/// Whether operations at a place can be among those wanted, so that memory is taken only for those.
fn may_be(wanted: &str, place: &str) -> bool {
    wanted.contains(place) || !["L1", "L2", "DRAM"].iter().any(|p| wanted.contains(p))
}

/// The memory that the first call fills and later calls overwrite.
fn empty(scheme: &Scheme) -> PackedMatrix {
    PackedMatrix {
        spec: scheme.spec(0, 0).expect("a scheme of weights"),
        bytes: vec![],
        scales: vec![],
        zero_points: vec![],
    }
}

/// Floats to packed codes and to int8.
fn quantizing(pages: Pages, kernels: &[Kernels], wanted: &str) {
    let (rows, cols) = if may_be(wanted, "DRAM") {
        COLD
    } else {
        (PIECE, COLD.1)
    };
    let w = weights(rows * cols, pages);
    let (w, pool) = (&w[..], &Pool::single());
    let two_bit = by_name("two-bit").expect("a layout of ours");
    let base3 = by_name("base-3").expect("a layout of ours");
    let quantizing = |what: &str, scheme: Scheme, layout: &'static dyn Layout, share: f64| {
        // A tensor that is read twice must not fit the caches.
        let piece = if scheme.granularity == Granularity::Tensor {
            rows
        } else {
            PIECE
        };
        let work = move |kernels: Kernels| {
            let (mut at, mut out) = (0, empty(&scheme));
            Work::new(4 * piece * cols, move || {
                let part = FloatWeights::F32(&w[at * cols..(at + piece) * cols]);
                quantize_into(
                    kernels,
                    pool,
                    part,
                    (piece, cols),
                    &scheme,
                    layout,
                    &mut out,
                )
                .expect("quantizes");
                at = (at + piece) % rows;
            })
        };
        let name = format!("{what} {} {} DRAM", scheme.granularity, layout.name());
        Operation {
            name,
            ceiling: Box::new(move || reading(w, PIECE * cols)),
            share,
            work: Box::new(work),
        }
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
            quantizing(
                "mean",
                Scheme::ternary(Threshold::Mean).with_granularity(channel),
                two_bit,
                1.0,
            ),
            quantizing(
                "median",
                Scheme::ternary(Threshold::Median).with_granularity(channel),
                two_bit,
                1.0,
            ),
            quantizing(
                "optimal",
                Scheme::ternary(Threshold::Optimal).with_granularity(channel),
                two_bit,
                1.0,
            ),
            quantizing(
                "optimal",
                Scheme::ternary(Threshold::Optimal).with_granularity(group),
                two_bit,
                1.0,
            ),
        ],
        from_dram,
        wanted,
    );
    if pages == Pages::Huge {
        // 32 rows of 4096 are 512 KiB.
        let warm = &w[..32 * cols];
        let warm_row = move |scheme: Scheme| {
            move |kernels: Kernels| {
                let mut out = empty(&scheme);
                Work::new(4 * warm.len(), move || {
                    quantize_into(
                        kernels,
                        pool,
                        FloatWeights::F32(warm),
                        (32, cols),
                        &scheme,
                        two_bit,
                        &mut out,
                    )
                    .expect("quantizes");
                })
            }
        };
        let token = |kernels: Kernels| {
            let (x, mut out, mut sums) = (&w[..64 * 2560], vec![0; 2560], [0]);
            Work::new(4 * x.len(), move || {
                for x in x.chunks(2560) {
                    black_box(
                        quantize_token(kernels, x, 2560, 2560, &mut out, &mut sums)
                            .expect("quantizes"),
                    );
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
                    work: Box::new(warm_row(
                        Scheme::ternary(Threshold::Optimal).with_granularity(channel),
                    )),
                },
            ],
            kernels,
            wanted,
        );
    }
}

/// Packing and unpacking.
fn coding(
    pages: Pages,
    kernels: &[Kernels],
    wanted: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    let pool = &Pool::single();
    let cols = 2560;
    for (rows, place) in [(8, "L1"), (256, "L2"), (100_000, "DRAM")] {
        if !may_be(wanted, place) || place != "DRAM" && pages == Pages::Small {
            continue;
        }
        let values = &trits(rows * cols, pages)[..];
        let scales = [0.5f32];
        let out = &std::cell::RefCell::new(Buffer::<i8>::new(rows * cols, pages));
        let floats = &std::cell::RefCell::new(Buffer::<f32>::new(
            if place == "DRAM" { rows / 4 } else { rows / 2 } * cols,
            pages,
        ));
        let floats_read = &weights(64 * cols, pages)[..];
        let floats_read = &floats_read[..(rows * cols / 4).min(floats_read.len())];
        let reads = move || reading(floats_read, floats_read.len());
        let writes = move || {
            Work::new(rows * cols, move || {
                fill(&mut out.borrow_mut().memory);
            })
        };
        let names = ["two-bit", "base-3", "hf-bitnet", "i2_s", "tq1_0", "tq2_0"];
        let packed: Vec<(&str, MatrixSpec, Vec<u8>)> = names[..if place == "L2" { 6 } else { 2 }]
            .iter()
            .copied()
            .map(|name| {
                let dtype = if name.starts_with("tq") {
                    ScaleDtype::F16
                } else {
                    ScaleDtype::F32
                };
                let spec = MatrixSpec {
                    scale_dtype: dtype,
                    ..MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor)
                };
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
                    unpack(kernels, pool, layout, spec, bytes, &mut out.borrow_mut())
                        .expect("unpacks");
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
                let part = MatrixSpec {
                    rows: n / cols,
                    ..spec.clone()
                };
                Work::new(4 * n, move || {
                    let bytes = &bytes[..n.div_ceil(if *name == "two-bit" { 4 } else { 5 })];
                    dequantize(
                        kernels,
                        pool,
                        layout,
                        &part,
                        bytes,
                        &[0.5],
                        &mut floats.borrow_mut(),
                    )
                    .expect("dequantizes");
                })
            };
            let float_writes = move || {
                Work::new(4 * n, move || {
                    fill(&mut floats.borrow_mut().memory);
                })
            };
            operations.push(Operation {
                name: format!("dequantize {name} → f32 {place}"),
                ceiling: Box::new(float_writes),
                share: 1.0,
                work: Box::new(dequantizing),
            });
            if place == "DRAM" {
                let prepacking = move |kernels: Kernels| {
                    Work::new(bytes.len(), move || {
                        let parts = MatrixParameters {
                            spec,
                            scales: &[0.5],
                            zero_points: &[],
                        };
                        black_box(
                            Prepacked::from_wire(
                                &kernels,
                                pool,
                                layout,
                                parts,
                                bytes,
                                Stream::TwoBit,
                            )
                            .expect("a matrix"),
                        );
                    })
                };
                let stored = move || {
                    Work::new(bytes.len(), move || {
                        black_box(machine::read(words(bytes)));
                    })
                };
                operations.push(Operation {
                    name: format!("prepack {name} → kernel layout {place}"),
                    ceiling: Box::new(stored),
                    share: 1.0,
                    work: Box::new(prepacking),
                });
            } else {
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
