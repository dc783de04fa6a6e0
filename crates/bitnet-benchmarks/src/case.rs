//! A case: one operation on one shape, and the contenders that perform it.

use crate::ceiling::Ceiling;
use crate::results::RateUnit;
use crate::selection::OperationGroup;
use crate::testbed::Testbed;
use anyhow::Result;
use std::fmt;

/// The amount of work of a call that one ceiling limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// The ceiling.
    pub ceiling: Ceiling,
    /// Bytes or multiply-adds of a call.
    pub cost: f64,
}

/// One implementation of an operation.
pub struct Contender {
    /// Its name in the results.
    pub name: String,
    /// Whether it is this engine.
    pub ours: bool,
    /// The ceilings that may limit it.
    pub limits: Vec<Limit>,
    /// Index of the contender that it is compared with; its own index for no comparison.
    pub base: usize,
    operation: Box<dyn CheckedCall>,
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
    /// A contender with a state. `call` performs the operation on the state; `check` examines the
    /// result of the last call there and describes the first difference.
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
            operation: Box::new(StatefulCall { state, call, check }),
        }
    }

    pub(crate) fn ours(self) -> Self {
        Self { ours: true, ..self }
    }

    pub(crate) fn limited(self, ceiling: Ceiling, cost: usize) -> Self {
        self.limits([Some(Limit {
            ceiling,
            cost: cost as f64,
        })])
    }

    pub(crate) fn limits(mut self, limits: impl IntoIterator<Item = Option<Limit>>) -> Self {
        self.limits.extend(limits.into_iter().flatten());
        self
    }

    pub(crate) fn against(self, base: usize) -> Self {
        Self { base, ..self }
    }

    /// Performs the operation once.
    pub fn call(&mut self) {
        self.operation.call();
    }

    /// Checks the result of the last [`Contender::call`].
    ///
    /// # Errors
    /// The first difference from the expected result.
    pub fn check(&self) -> Result<(), String> {
        self.operation.check()
    }
}

trait CheckedCall {
    fn call(&mut self);
    fn check(&self) -> Result<(), String>;
}

struct StatefulCall<S, C, K> {
    state: S,
    call: C,
    check: K,
}

impl<S, C: FnMut(&mut S), K: Fn(&S) -> Result<(), String>> CheckedCall for StatefulCall<S, C, K> {
    fn call(&mut self) {
        (self.call)(&mut self.state);
    }

    fn check(&self) -> Result<(), String> {
        (self.check)(&self.state)
    }
}

/// One operation on one shape, and the contenders that perform it.
#[derive(Debug)]
pub struct Case {
    /// Its group.
    pub group: OperationGroup,
    /// Name of the operation.
    pub operation: String,
    /// Shape of the data and where it lies.
    pub shape: String,
    /// Number of threads.
    pub threads: usize,
    /// RateUnit of `amount`.
    pub unit: RateUnit,
    /// Amount of work of a call.
    pub amount: f64,
    /// The contenders; ours come first.
    pub contenders: Vec<Contender>,
}

/// A case whose data is allocated when its turn comes, because each case fills its own working set.
pub struct PlannedCase {
    /// Its group.
    pub group: OperationGroup,
    /// Name of the operation and the shape.
    pub name: String,
    #[expect(clippy::type_complexity, reason = "it is written once")]
    make: Box<dyn FnOnce(&Testbed) -> Result<Case>>,
}

impl fmt::Debug for PlannedCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.group, self.name)
    }
}

impl PlannedCase {
    pub(crate) fn new(
        group: OperationGroup,
        name: impl Into<String>,
        make: impl FnOnce(&Testbed) -> Result<Case> + 'static,
    ) -> Self {
        Self {
            group,
            name: name.into(),
            make: Box::new(make),
        }
    }

    /// Allocates the data and prepares the contenders.
    ///
    /// # Errors
    /// If an engine rejects the data.
    pub fn make(self, machine: &Testbed) -> Result<Case> {
        (self.make)(machine)
    }
}
