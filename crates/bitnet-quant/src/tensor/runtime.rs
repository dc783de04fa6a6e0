//! What layers compute with: kernels, threads and scratch memory.

use crate::{Compute, Machine};
use crate::{Error, Result};
use bitnet_core::memory::HybridMemoryPool;
use bitnet_kernels::Pool;
use bitnet_kernels::matmul;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    /// The resolved configuration: kernels and number of threads.
    pub machine: Machine,
    /// Threads of matrix products.
    pub pool: Pool,
    /// Scratch memory of forward passes.
    pub memory: HybridMemoryPool,
    /// Prepacked activations of earlier forward passes, whose memory is used again.
    activations: Mutex<Vec<matmul::PrepackedActivations>>,
    /// Threads of quantizers; `None` for rayon's global pool.
    workers: Option<rayon::ThreadPool>,
}

impl Runtime {
    /// Threads and kernels as configured.
    ///
    /// # Errors
    /// [`CheckpointError::Kernels`](crate::CheckpointError::Kernels) for an instruction set that
    /// does not run here, [`Error::Input`] if the system cannot start the threads.
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
            activations: Mutex::default(),
            workers,
        }))
    }

    /// The runtime of this configuration: made once, then shared until the program ends.
    ///
    /// # Errors
    /// As [`Runtime::new`].
    pub fn shared(compute: &Compute) -> Result<Arc<Self>> {
        static SHARED: Mutex<Vec<(Compute, Arc<Runtime>)>> = Mutex::new(vec![]);
        let mut shared = lock(&SHARED);
        if let Some((_, runtime)) = shared.iter().find(|(key, _)| key == compute) {
            return Ok(runtime.clone());
        }
        let fresh = Self::new(compute)?;
        shared.push((compute.clone(), fresh.clone()));
        Ok(fresh)
    }

    /// Activations of an earlier product, to be overwritten.
    pub(crate) fn take_activations(&self) -> Option<matmul::PrepackedActivations> {
        lock(&self.activations).pop()
    }

    /// Keeps activations for a later product.
    pub(crate) fn put_activations(&self, activations: matmul::PrepackedActivations) {
        lock(&self.activations).push(activations);
    }

    /// Runs `f` on the threads of quantizers.
    pub(crate) fn install<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match &self.workers {
            Some(workers) => workers.install(f),
            None => f(),
        }
    }
}

/// A poisoned lock holds no broken state here: its data is replaced whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
