//! What there is to measure, defined once: name, shape, amount, limits, call and check.

mod packing;
mod products;
mod quantization;
mod rivals;
mod simd;

pub use rivals::threads as rival_threads;

use crate::machine::{Ceiling, Machine};
use crate::results::Unit;
use anyhow::{Result, bail};
use bitnet_core::named;
use bitnet_core::random::nth;
use bitnet_kernels::Kernels;
use std::fmt;
use std::str::FromStr;

/// A group of operations, by the name that `--operations` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Floats to values, packed or not.
    Quantization,
    /// Values to packed bytes.
    Packing,
    /// Packed bytes to values.
    Simd,
    /// A matrix times one token.
    Gemv,
    /// A matrix times several tokens.
    Gemm,
}

named!(Group, "operation", {
    Quantization = "quantization",
    Packing = "packing",
    Simd = "simd",
    Gemv = "gemv",
    Gemm = "gemm",
});

/// N × K: out_features × in_features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the weights.
    pub n: usize,
    /// Columns of the weights.
    pub k: usize,
}

/// Most weights of a shape: with copies in f32 it has to fit into memory.
const MAX_WEIGHTS: usize = 1 << 28;

impl Shape {
    /// A shape that [`Shape::from_str`] would accept too.
    pub const fn new(n: usize, k: usize) -> Self {
        Self { n, k }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}×{}", self.n, self.k))
    }
}

impl FromStr for Shape {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let sides = s
            .split_once(['x', '×'])
            .and_then(|(n, k)| Some((n.parse().ok()?, k.parse().ok()?)));
        match sides {
            Some((n @ 1.., k @ 1..))
                if usize::checked_mul(n, k).is_some_and(|w| w <= MAX_WEIGHTS) =>
            {
                Ok(Self { n, k })
            }
            _ => Err(format!(
                "'{s}' is no shape, expected N×K such as 6912x2560, of 1 to {MAX_WEIGHTS} weights"
            )),
        }
    }
}

/// Which cases.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Groups, in the order in which they run.
    pub groups: Vec<Group>,
    /// Shapes of the weights of the products.
    pub gemv: Vec<Shape>,
    /// The same for several tokens.
    pub gemm: Vec<Shape>,
    /// Numbers of tokens of the second.
    pub tokens: Vec<usize>,
    /// Who takes part beside our widest kernels.
    pub rivals: Rivals,
}

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rivals {
    /// Other engines, our scalar code and the narrower instruction sets.
    All,
    /// Nobody: our widest kernels alone.
    None,
}

/// What a call needs of a ceiling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// The ceiling.
    pub ceiling: Ceiling,
    /// Bytes or multiply-adds of a call.
    pub cost: f64,
}

/// Somebody who does an operation.
pub struct Contender {
    /// Who.
    pub name: String,
    /// Whether it is this engine.
    pub ours: bool,
    /// What may limit it.
    pub limits: Vec<Limit>,
    /// Index of the contender that it is compared with; its own for no comparison.
    pub base: usize,
    run: Box<dyn Run>,
}

impl fmt::Debug for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contender")
            .field("name", &self.name)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Contender {
    /// Somebody with some state, which `call` works on and whose last result `check` finds right or
    /// says what is wrong with it.
    pub(crate) fn new<S: 'static>(
        name: impl Into<String>,
        state: S,
        call: impl FnMut(&mut S) + 'static,
        check: impl Fn(&S) -> Result<(), String> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            ours: false,
            limits: vec![],
            base: 0,
            run: Box::new(Parts { state, call, check }),
        }
    }

    fn ours(self) -> Self {
        Self { ours: true, ..self }
    }

    fn limited(self, ceiling: Ceiling, cost: usize) -> Self {
        self.limits([Some(Limit {
            ceiling,
            cost: cost as f64,
        })])
    }

    fn limits(mut self, limits: impl IntoIterator<Item = Option<Limit>>) -> Self {
        self.limits.extend(limits.into_iter().flatten());
        self
    }

    fn against(self, base: usize) -> Self {
        Self { base, ..self }
    }

    /// Does the operation once.
    pub fn call(&mut self) {
        self.run.call();
    }

    /// Whether the last [`Contender::call`] was right.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.run.check()
    }
}

trait Run {
    fn call(&mut self);
    fn check(&self) -> Result<(), String>;
}

struct Parts<S, C, K> {
    state: S,
    call: C,
    check: K,
}

impl<S, C: FnMut(&mut S), K: Fn(&S) -> Result<(), String>> Run for Parts<S, C, K> {
    fn call(&mut self) {
        (self.call)(&mut self.state);
    }

    fn check(&self) -> Result<(), String> {
        (self.check)(&self.state)
    }
}

/// One operation on one shape, and those who do it.
#[derive(Debug)]
pub struct Case {
    /// Its group.
    pub group: Group,
    /// What is done.
    pub operation: String,
    /// On what.
    pub shape: String,
    /// With how many threads.
    pub threads: usize,
    /// Unit of `amount`.
    pub unit: Unit,
    /// What a call does.
    pub amount: f64,
    /// Those who do it; the first is what others are compared with.
    pub contenders: Vec<Contender>,
}

/// A case that is made when its turn comes, because each has its own gigabyte.
pub struct Planned {
    /// Its group.
    pub group: Group,
    /// What it will be.
    pub name: String,
    #[expect(clippy::type_complexity, reason = "it is written once")]
    make: Box<dyn FnOnce(&Machine) -> Result<Case>>,
}

impl fmt::Debug for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.group, self.name)
    }
}

impl Planned {
    fn new(
        group: Group,
        name: impl Into<String>,
        make: impl FnOnce(&Machine) -> Result<Case> + 'static,
    ) -> Self {
        Self {
            group,
            name: name.into(),
            make: Box::new(make),
        }
    }

    /// The case, with its data.
    ///
    /// # Errors
    /// If an engine does not take the data.
    pub fn make(self, machine: &Machine) -> Result<Case> {
        (self.make)(machine)
    }
}

/// The cases of a selection.
///
/// # Errors
/// If the selection has none.
pub fn plan(selection: &Selection) -> Result<Vec<Planned>> {
    let rivals = selection.rivals;
    let mut plan = vec![];
    for group in &selection.groups {
        match group {
            Group::Quantization => plan.extend(quantization::plan(rivals)),
            Group::Packing => plan.extend(packing::plan(rivals)),
            Group::Simd => plan.extend(simd::plan(rivals)),
            Group::Gemv => plan.extend(
                selection
                    .gemv
                    .iter()
                    .flat_map(|&shape| products::planned(Group::Gemv, shape, 1, rivals)),
            ),
            Group::Gemm => {
                for &shape in &selection.gemm {
                    plan.extend(
                        selection.tokens.iter().flat_map(|&tokens| {
                            products::planned(Group::Gemm, shape, tokens, rivals)
                        }),
                    );
                }
            }
        }
    }
    if plan.is_empty() {
        bail!("nothing to measure");
    }
    Ok(plan)
}

/// `n` trits, each value as often as the others.
fn trits(n: usize) -> Vec<i8> {
    (0..n).map(|i| (nth(i as u64, 0) % 3) as i8 - 1).collect()
}

/// `n` weights that look like a layer's: sums of four uniform ones, of standard deviation 0.02.
fn weights(n: usize) -> Vec<f32> {
    let uniform = |bits: u64| (bits & 0xffff) as f32 / 65_535.0 - 0.5;
    let sum = |x: u64| uniform(x) + uniform(x >> 16) + uniform(x >> 32) + uniform(x >> 48);
    (0..n).map(|i| sum(nth(i as u64, 0)) * 0.034_641).collect()
}

/// Our kernels, widest first; only those if there are no rivals.
fn kernels(rivals: Rivals) -> Vec<Kernels> {
    let mut kernels: Vec<_> = Kernels::all().collect();
    kernels.reverse();
    kernels.truncate(if rivals == Rivals::All {
        kernels.len()
    } else {
        1
    });
    kernels
}

/// Whether a result is what it must be, or the first place where it is not.
fn same<T: PartialEq + fmt::Debug>(what: &str, expected: &[T], got: &[T]) -> Result<(), String> {
    if expected.len() != got.len() {
        return Err(format!(
            "{what}: expected {}, got {}",
            expected.len(),
            got.len()
        ));
    }
    match expected.iter().zip(got).position(|(e, g)| e != g) {
        None => Ok(()),
        Some(i) => Err(format!(
            "{what}: expected {:?} at {i}, got {:?}",
            expected[i], got[i]
        )),
    }
}
