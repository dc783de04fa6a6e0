//! Threads that fork and join within microseconds.
//!
//! A decode step forks hundreds of times, so workers spin for [`SPIN`] after a job before they
//! sleep, and a job waits for no worker that has not begun: the caller works through the parts
//! itself, closes the gate when none is left, and waits only for those inside.
//!
//! ```text
//! state = epoch << 32 | OPEN | number of workers inside
//! run:     write the job; epoch += 1, set OPEN; wake sleepers; take parts; clear OPEN; wait until nobody is inside
//! worker:  where OPEN and the epoch is new: count itself in (one compare-exchange), take parts, count itself out
//! ```
//!
//! The job is written only while the gate is closed and no worker is inside, and read only by
//! workers inside.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker looks for the next job before it sleeps.
const SPIN: Duration = Duration::from_micros(20);
/// Bit of the state that lets workers in.
const OPEN: u64 = 1 << 31;
/// Workers inside.
const INSIDE: u64 = OPEN - 1;

/// A fixed number of threads, including the caller's.
///
/// ```
/// use bitnet_kernels::Pool;
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// let (pool, sum) = (Pool::new(2)?, AtomicUsize::new(0));
/// pool.run(10, |part| { sum.fetch_add(part, Ordering::Relaxed); });
/// assert_eq!(sum.into_inner(), 45);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// One job at a time has the workers. A call of [`Pool::run`] made meanwhile, from a part of that
/// job or from another thread, runs all its parts on the thread that made it: it never waits for
/// the pool, so nested use cannot deadlock.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<PoolState>,
    workers: Vec<JoinHandle<()>>,
}

/// A closure `Fn(usize)` without its type.
#[derive(Debug, Clone, Copy)]
struct PoolJob {
    closure: *const (),
    call: unsafe fn(*const (), usize),
    parts: usize,
}

#[derive(Debug)]
struct PoolState {
    state: AtomicU64,
    job: UnsafeCell<PoolJob>,
    /// The next part to take.
    next: AtomicUsize,
    /// Whether some caller has the workers.
    taken: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// The payload of the first panic of a part.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the holder of `taken` while the gate is closed and nobody is inside,
// and read by those inside: the state's release and acquire order the two. The closure it points to
// is `Sync` (`Pool::run` demands it) and outlives its job (`run` waits).
unsafe impl Sync for PoolState {}
// SAFETY: nothing in it belongs to a thread; `job` points to a closure that is `Sync`, as
// `Pool::run` demands.
unsafe impl Send for PoolState {}

/// # Safety
/// `closure` points to a live `F`.
unsafe fn call<F: Fn(usize)>(closure: *const (), part: usize) {
    // SAFETY: the function's contract: a live `F` is there.
    unsafe { (*closure.cast::<F>())(part) }
}

impl PoolState {
    /// Takes parts until none is left, and keeps the first panic.
    fn work(&self, job: PoolJob) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= job.parts {
                return;
            }
            // SAFETY: `Pool::run` made `job` of its closure and the matching `call`, and returns
            // only after it has seen this thread outside: the closure lives.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| unsafe {
                (job.call)(job.closure, part)
            })) {
                self.next.store(job.parts, Ordering::Relaxed);
                self.panic
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(panic);
            }
        }
    }

    /// The loop of a worker.
    fn serve(&self) {
        let mut seen = 0;
        while self.wait(seen) {
            let state = self.state.load(Ordering::Relaxed);
            let fresh = state & OPEN != 0 && state >> 32 != seen;
            if fresh
                && self
                    .state
                    .compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                seen = state >> 32;
                // SAFETY: the compare-exchange above put this thread inside while the gate was
                // open, and `Pool::run` writes the job only while the gate is closed and nobody is
                // inside.
                self.work(unsafe { *self.job.get() });
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Whether the gate is open to a worker that has seen the job `seen`.
    fn open(&self, seen: u64) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        state & OPEN != 0 && state >> 32 != seen
    }

    /// Waits for a job after `seen`; false when there will be none.
    fn wait(&self, seen: u64) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < SPIN {
            for _ in 0..32 {
                if self.open(seen) {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        // Sequentially consistent against `run`: it opens the gate and then looks for sleepers,
        // this counts and then looks at the gate.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !self.open(seen) && !self.stop.load(Ordering::SeqCst) {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        !self.stop.load(Ordering::SeqCst)
    }

    fn wake_all(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

impl Pool {
    /// `threads` threads: the caller of [`Pool::run`] and `threads − 1` workers. 0 means 1.
    ///
    /// # Errors
    /// The system's error if it does not start a thread; threads that were started end.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self::single();
        for i in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("bitnet-{i}"))
                .spawn(move || shared.serve())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// The caller's thread alone.
    pub fn single() -> Self {
        let nothing = PoolJob {
            closure: std::ptr::null(),
            call: call::<fn(usize)>,
            parts: 0,
        };
        let shared = PoolState {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(nothing),
            next: AtomicUsize::new(0),
            taken: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        };
        Self {
            shared: Arc::new(shared),
            workers: vec![],
        }
    }

    /// Number of threads, including the caller's.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `each(part)` once for every part in `0..parts`, in any order and on any thread, and
    /// returns when all are done.
    ///
    /// # Panics
    /// With the first panic of a part, after every part that had begun is over; later parts are not
    /// begun.
    pub fn run<F: Fn(usize) + Sync>(&self, parts: usize, each: F) {
        let shared = &*self.shared;
        if parts <= 1 || self.workers.is_empty() || shared.taken.swap(true, Ordering::Acquire) {
            return (0..parts).for_each(each);
        }
        let job = PoolJob {
            closure: (&raw const each).cast(),
            call: call::<F>,
            parts,
        };
        // SAFETY: this call alone has `taken`, the gate is closed and the last holder saw nobody
        // inside.
        unsafe { *shared.job.get() = job };
        shared.next.store(0, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        shared.state.store(epoch << 32 | OPEN, Ordering::SeqCst);
        shared.wake_all();
        shared.work(job);
        let mut inside = shared.state.fetch_and(!OPEN, Ordering::Acquire) & INSIDE;
        let mut looks = 0u32;
        while inside != 0 {
            // A worker that lost its core gets this one after a while.
            looks += 1;
            if looks.is_multiple_of(1 << 12) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
            inside = shared.state.load(Ordering::Acquire) & INSIDE;
        }
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        shared.taken.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of parts, so it ends only by returning.
            let _ = worker.join();
        }
    }
}
