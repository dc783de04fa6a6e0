//! The operations of `compare` under criterion, on small data that caches hold. `RAYON_NUM_THREADS`
//! sets the number of threads, for us as for rivals.

use bitnet_benchmarks::operations::{plan, rival_threads};
use bitnet_benchmarks::results::RateUnit;
use bitnet_benchmarks::selection::{CaseSelection, OperationGroup, Rivals, WeightShape};
use bitnet_benchmarks::testbed::Testbed;
use bitnet_kernels::Pool;
use criterion::{Criterion, Throughput};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of the data that `compare` takes from memory.
const WORKING_SET: usize = 8 << 20;

/// Checks and then times every contender of these groups.
pub(crate) fn run(groups: &[OperationGroup], rivals: Rivals) {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(200))
        .configure_from_args();
    let shapes = vec![WeightShape::new(1024, 2560)];
    let selection = CaseSelection {
        groups: groups.to_vec(),
        gemv: shapes.clone(),
        gemm: shapes,
        tokens: vec![4, 32],
        rivals,
    };
    let testbed = Testbed::new(
        Arc::new(Pool::new(rival_threads()).expect("threads")),
        WORKING_SET,
    );
    for planned in plan(&selection).expect("something to measure") {
        let mut case = planned
            .make(&testbed)
            .expect("data that every engine takes");
        let mut group = criterion.benchmark_group(format!("{}, {}", case.operation, case.shape));
        let amount = case.amount as u64;
        group.throughput(if case.unit == RateUnit::Bytes {
            Throughput::Bytes(amount)
        } else {
            Throughput::Elements(amount)
        });
        for contender in &mut case.contenders {
            contender.call();
            contender
                .check()
                .unwrap_or_else(|what| panic!("{}: {what}", contender.name));
            group.bench_function(contender.name.clone(), |b| b.iter(|| contender.call()));
        }
        group.finish();
    }
    criterion.final_summary();
}
