//! The pool: every part runs once, also with nested calls, several callers and panics.

use bitnet_kernels::Pool;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn counters(n: usize) -> Vec<AtomicUsize> {
    (0..n).map(|_| AtomicUsize::new(0)).collect()
}

fn add(counter: &AtomicUsize) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn all(counters: &[AtomicUsize], n: usize) -> bool {
    counters.iter().all(|c| c.load(Ordering::Relaxed) == n)
}

#[test]
fn every_part_runs_once() {
    let threads = if cfg!(target_family = "wasm") {
        &[0, 1][..]
    } else {
        &[0, 1, 2, 3, 8]
    };
    for &threads in threads {
        let pool = Pool::new(threads).unwrap();
        assert_eq!(pool.threads(), threads.max(1));
        for parts in [0, 1, 2, 3, 7, 1000] {
            let done = counters(parts);
            pool.run(parts, |part| add(&done[part]));
            assert!(all(&done, 1), "{parts} parts on {threads} threads");
        }
    }
}

#[test]
#[cfg_attr(target_family = "wasm", ignore = "there is one thread")]
fn many_jobs_with_and_without_sleep_between() {
    let pool = Pool::new(3).unwrap();
    let done = counters(5);
    for job in 0..20_000 {
        if job % 4000 == 0 {
            // Longer than workers spin: they sleep and must be woken.
            std::thread::sleep(Duration::from_millis(2));
        }
        pool.run(5, |part| add(&done[part]));
    }
    assert!(all(&done, 20_000));
}

#[test]
#[cfg_attr(target_family = "wasm", ignore = "there is one thread")]
fn workers_take_part() {
    let pool = Pool::new(2).unwrap();
    let threads = std::sync::Mutex::new(std::collections::HashSet::new());
    let together = std::sync::Barrier::new(2);
    pool.run(2, |_| {
        together.wait();
        threads.lock().unwrap().insert(std::thread::current().id());
    });
    assert_eq!(threads.into_inner().unwrap().len(), 2);
}

#[test]
#[cfg_attr(target_family = "wasm", ignore = "there is one thread")]
fn nested_jobs_run() {
    let pool = Pool::new(3).unwrap();
    let done = counters(4 * 5 * 6);
    pool.run(4, |a| {
        pool.run(5, |b| pool.run(6, |c| add(&done[(a * 5 + b) * 6 + c])))
    });
    assert!(all(&done, 1));
}

#[test]
#[cfg_attr(target_family = "wasm", ignore = "there is one thread")]
fn many_callers_at_once() {
    let pool = Pool::new(3).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let done = counters(9);
                for _ in 0..2000 {
                    pool.run(9, |part| add(&done[part]));
                }
                assert!(all(&done, 2000));
            });
        }
    });
}

#[test]
#[cfg_attr(panic = "abort", ignore = "a panic ends the program")]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    for threads in [1, 2, 3] {
        let pool = Pool::new(threads).unwrap();
        for broken in [0, 1, 63] {
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, |part| {
                    if part == broken {
                        panic!("part {part}")
                    }
                });
            }));
            assert_eq!(
                panic.unwrap_err().downcast_ref::<String>().unwrap(),
                &format!("part {broken}")
            );
            let done = counters(64);
            pool.run(64, |part| add(&done[part]));
            assert!(all(&done, 1), "after a panic on {threads} threads");
        }
    }
}

#[test]
#[cfg_attr(target_family = "wasm", ignore = "there is one thread")]
fn dropping_joins() {
    for _ in 0..200 {
        let pool = Pool::new(4).unwrap();
        pool.run(4, |_| {});
        drop(pool);
    }
}

#[test]
#[cfg(target_family = "wasm")]
fn a_thread_that_does_not_start_is_an_error() {
    assert!(Pool::new(2).is_err());
}
