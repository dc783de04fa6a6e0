//! What layers compute with: kernels, threads and scratch memory.

use super::kernel::Scratch;
use crate::{Compute, Machine};
use crate::{Error, Result};
use bitnet_core::memory::HybridMemoryPool;
use bitnet_kernels::Pool;
use std::sync::{Arc, Mutex, PoisonError};

/// Kernels, threads and scratch memory, shared by layers.
///
/// ```
/// use bitnet_quant::{Compute, Runtime};
/// let runtime = Runtime::new(&Compute { threads: 1, ..Compute::default() })?;
/// assert_eq!(runtime.machine.threads, 1);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug)]
pub struct Runtime {
    /// What the configuration came to on this machine.
    pub machine: Machine,
    /// Threads of matrix products.
    pub pool: Pool,
    /// Scratch of forward passes.
    pub memory: HybridMemoryPool,
    /// Quantized activations of forward passes.
    pub(super) scratch: Scratch,
    /// Threads of quantizers; `None`: rayon's own.
    workers: Option<rayon::ThreadPool>,
}

impl Runtime {
    /// Threads and kernels as configured.
    ///
    /// # Errors
    /// [`Error::Kernels`] for an instruction set that does not run here, [`Error::Input`] for
    /// threads that the system refuses.
    pub fn new(compute: &Compute) -> Result<Arc<Self>> {
        let machine = compute.machine()?;
        if machine.threads > crate::recipe::MAX_THREADS {
            return Err(Error::input(
                "threads",
                format!("at most {}", crate::recipe::MAX_THREADS),
                machine.threads,
            ));
        }
        let refused = |e: &dyn std::error::Error| {
            Error::input(
                "threads",
                "threads of the system",
                format!("{}: {e}", machine.threads),
            )
        };
        let workers = match compute.threads {
            0 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n)
                    .build()
                    .map_err(|e| refused(&e))?,
            ),
        };
        let pool = Pool::new(machine.threads).map_err(|e| refused(&e))?;
        Ok(Arc::new(Self {
            machine,
            pool,
            memory: HybridMemoryPool::new(),
            scratch: Scratch::default(),
            workers,
        }))
    }

    /// The one of this configuration: shared by all who ask for it, as long as the program runs.
    ///
    /// # Errors
    /// As [`Runtime::new`].
    pub fn of(compute: &Compute) -> Result<Arc<Self>> {
        static SHARED: Mutex<Vec<(Compute, Arc<Runtime>)>> = Mutex::new(vec![]);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, runtime)) = shared.iter().find(|(of, _)| of == compute) {
            return Ok(runtime.clone());
        }
        let fresh = Self::new(compute)?;
        shared.push((compute.clone(), fresh.clone()));
        Ok(fresh)
    }

    /// Runs `f` on the threads of quantizers.
    pub(crate) fn install<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match &self.workers {
            Some(workers) => workers.install(f),
            None => f(),
        }
    }
}
