//! Measuring in turns: in each turn all ceilings and contenders of a case run one after another, so
//! that a disturbance of the machine meets all of them.

use crate::case::{Case, Contender, Limit};
use crate::ceiling::Ceiling;
use crate::results::{ContenderRow, MedianRange};
use crate::testbed::{Testbed, TimedCeiling};
use std::time::Instant;

/// How long to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeasuringTime {
    /// Number of turns of a case.
    pub turns: usize,
    /// Seconds of a contender or a ceiling in a turn; it gets one call at least.
    pub turn: f64,
    /// Seconds of a contender in all turns together. A slow contender skips turns; if a single call
    /// takes longer, its first call is its only one.
    pub budget: f64,
}

impl MeasuringTime {
    /// The default.
    pub const FULL: Self = Self {
        turns: 11,
        turn: 0.008,
        budget: 0.3,
    };
    /// For a first look.
    pub const QUICK: Self = Self {
        turns: 3,
        turn: 0.004,
        budget: 0.1,
    };
}

/// Seconds per call, averaged over `calls` calls.
fn seconds(call: &mut dyn FnMut(), calls: usize) -> f64 {
    let begin = Instant::now();
    (0..calls).for_each(|_| call());
    // The clock may not advance during a short call.
    (begin.elapsed().as_secs_f64() / calls as f64).max(1e-9)
}

/// Number of calls that fill one turn.
fn calls_per_turn(call: &mut dyn FnMut(), time: &MeasuringTime) -> usize {
    let first = seconds(call, 1);
    let calls = (time.turn / first).ceil() as usize;
    // The first call warms up; short calls are timed again, for a better estimate.
    if calls > 16 {
        (time.turn / seconds(call, 16)).ceil() as usize
    } else {
        calls
    }
    .max(1)
}

/// The loops of some ceilings, with the rate of each in every turn so far.
struct CeilingRates<'a> {
    ceilings: &'a [Ceiling],
    loops: Vec<TimedCeiling<'a>>,
    calls: Vec<usize>,
    rates: Vec<Vec<f64>>,
}

impl<'a> CeilingRates<'a> {
    fn new(testbed: &'a Testbed, ceilings: &'a [Ceiling], time: &MeasuringTime) -> Self {
        let mut loops: Vec<_> = ceilings
            .iter()
            .map(|&ceiling| testbed.timed(ceiling))
            .collect();
        let calls = loops
            .iter_mut()
            .map(|l| calls_per_turn(&mut l.call, time))
            .collect();
        Self {
            ceilings,
            rates: vec![vec![]; loops.len()],
            loops,
            calls,
        }
    }

    /// Runs every loop for one turn.
    fn run_turn(&mut self) {
        for ((timed, &calls), rates) in self.loops.iter_mut().zip(&self.calls).zip(&mut self.rates)
        {
            rates.push(timed.amount / seconds(&mut timed.call, calls));
        }
    }

    /// Rates of one ceiling, turn by turn.
    fn rates(&self, ceiling: Ceiling) -> &[f64] {
        let at = self.ceilings.binary_search(&ceiling);
        &self.rates[at.expect("the ceilings of all contenders are measured, in sorted order")]
    }
}

/// Measures the rates of ceilings, per second.
pub fn ceilings(testbed: &Testbed, ceilings: &[Ceiling], time: &MeasuringTime) -> Vec<MedianRange> {
    let mut measured = CeilingRates::new(testbed, ceilings, time);
    (0..time.turns).for_each(|_| measured.run_turn());
    measured
        .rates
        .into_iter()
        .map(MedianRange::from_turns)
        .collect()
}

/// A contender computed a wrong result.
#[derive(Debug, thiserror::Error)]
#[error("{case}: {contender} computes something else: {what}")]
pub struct WrongResult {
    /// Operation and shape.
    pub case: String,
    /// Name of the contender.
    pub contender: String,
    /// The first difference.
    pub what: String,
}

/// Checks every contender of a case, then times them in turns with the ceilings that limit them.
///
/// # Errors
/// [`WrongResult`] if a result is not right; then nothing is timed.
pub fn case(
    case: &mut Case,
    testbed: &Testbed,
    time: &MeasuringTime,
) -> Result<Vec<ContenderRow>, WrongResult> {
    let first_calls = check(case)?;
    let mut wanted: Vec<Ceiling> = case
        .contenders
        .iter()
        .flat_map(|c| c.limits.iter().map(|l| l.ceiling))
        .collect();
    wanted.sort();
    wanted.dedup();
    let mut ceilings = CeilingRates::new(testbed, &wanted, time);
    let mut timed: Vec<_> = case
        .contenders
        .iter_mut()
        .zip(first_calls)
        .map(|(contender, first)| TimedContender::new(contender, first, time))
        .collect();
    for turn in 0..time.turns {
        ceilings.run_turn();
        timed
            .iter_mut()
            .for_each(|contender| contender.run_turn(turn, time));
    }
    let seconds: Vec<_> = timed
        .into_iter()
        .map(|contender| contender.finish(time))
        .collect();
    Ok(rows(case, &ceilings, &seconds))
}

/// Runs every contender once and checks its result. Returns the seconds of these first calls.
fn check(case: &mut Case) -> Result<Vec<f64>, WrongResult> {
    let mut first_calls = vec![];
    for contender in &mut case.contenders {
        first_calls.push(seconds(&mut || contender.call(), 1));
        contender.check().map_err(|what| WrongResult {
            case: format!("{} {}", case.operation, case.shape),
            contender: contender.name.clone(),
            what,
        })?;
    }
    Ok(first_calls)
}

/// A contender with its seconds per call in every turn so far; `None` where it skipped the turn.
struct TimedContender<'a> {
    contender: &'a mut Contender,
    /// Seconds of the first call.
    first: f64,
    /// Calls per turn; 0 if a single call exceeds the budget.
    calls: usize,
    seconds: Vec<Option<f64>>,
}

impl<'a> TimedContender<'a> {
    fn new(contender: &'a mut Contender, first: f64, time: &MeasuringTime) -> Self {
        let calls = if first > time.budget {
            0
        } else {
            calls_per_turn(&mut || contender.call(), time)
        };
        Self {
            contender,
            first,
            calls,
            seconds: vec![],
        }
    }

    fn run_turn(&mut self, turn: usize, time: &MeasuringTime) {
        let affordable = (time.budget / (self.calls as f64 * self.first)).max(1.0) as usize;
        let every = time.turns.div_ceil(affordable.min(time.turns));
        let runs = self.calls > 0 && turn.is_multiple_of(every);
        let (contender, calls) = (&mut self.contender, self.calls);
        self.seconds
            .push(runs.then(|| seconds(&mut || contender.call(), calls)));
    }

    /// Seconds per call of all turns. A contender without a turn has its first call, which is
    /// compared with the turn in the middle.
    fn finish(mut self, time: &MeasuringTime) -> Vec<Option<f64>> {
        if self.seconds.iter().all(Option::is_none) {
            self.seconds[time.turns / 2] = Some(self.first);
        }
        self.seconds
    }
}

/// The rows of the document for a case.
fn rows(
    case: &Case,
    ceilings: &CeilingRates<'_>,
    seconds: &[Vec<Option<f64>>],
) -> Vec<ContenderRow> {
    // Applies `value` to turn and seconds, in the turns in which contender `i` ran.
    let range = |i: usize, value: &dyn Fn(usize, f64) -> f64| {
        let turns = seconds[i].iter().enumerate();
        MedianRange::from_turns(
            turns
                .filter_map(|(turn, t)| Some(value(turn, (*t)?)))
                .collect(),
        )
    };
    let row = |(i, contender): (usize, &Contender)| {
        let share = |limit: &Limit| {
            let rates = ceilings.rates(limit.ceiling);
            (
                limit.ceiling,
                range(i, &|turn, t| limit.cost / (t * rates[turn])),
            )
        };
        // The ceiling with the largest share is the nearest.
        let nearest = contender
            .limits
            .iter()
            .map(share)
            .max_by(|a, b| a.1.median.total_cmp(&b.1.median));
        let base = Some(contender.base).filter(|&base| base != i);
        let ratio = |base: usize| {
            let usual = range(base, &|_, t| t).median;
            range(i, &|turn, t| t / seconds[base][turn].unwrap_or(usual))
        };
        ContenderRow {
            group: case.group,
            operation: case.operation.clone(),
            shape: case.shape.clone(),
            threads: case.threads,
            contender: contender.name.clone(),
            ours: contender.ours,
            unit: case.unit,
            turns: seconds[i].iter().flatten().count(),
            rate: range(i, &|_, t| case.amount / t),
            ceiling: nearest.map(|n| n.0.to_string()),
            share: nearest.map(|n| n.1),
            base: base.map(|base| case.contenders[base].name.clone()),
            ratio: base.map(ratio),
        }
    };
    case.contenders.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::RateUnit;
    use crate::selection::OperationGroup;
    use bitnet_kernels::Pool;
    use std::sync::Arc;

    fn sleepers(contenders: Vec<Contender>) -> Case {
        let (operation, shape) = ("sleep".into(), "short".into());
        Case {
            group: OperationGroup::Gemv,
            operation,
            shape,
            threads: 1,
            unit: RateUnit::Weights,
            amount: 1.0,
            contenders,
        }
    }

    fn testbed() -> Testbed {
        Testbed::new(Arc::new(Pool::single()), 1 << 20)
    }

    #[test]
    fn what_is_wrong_is_not_timed() {
        let count = |name: &'static str, wrong: bool| {
            let check = move |calls: &usize| {
                if wrong {
                    Err(format!("after {calls} call"))
                } else {
                    Ok(())
                }
            };
            Contender::new(name, 0usize, |calls| *calls += 1, check)
        };
        let mut bad = sleepers(vec![count("good", false), count("bad", true)]);
        let wrong = case(&mut bad, &testbed(), &MeasuringTime::QUICK).unwrap_err();
        assert_eq!(
            wrong.to_string(),
            "sleep short: bad computes something else: after 1 call"
        );
    }

    #[test]
    fn ratios_say_how_many_times_as_fast_the_first_is() {
        let sleep = |name: &'static str, ms: u64| {
            Contender::new(
                name,
                (),
                move |()| std::thread::sleep(std::time::Duration::from_millis(ms)),
                |()| Ok(()),
            )
        };
        let time = MeasuringTime {
            turns: 3,
            turn: 0.001,
            budget: 0.05,
        };
        let rows = case(
            &mut sleepers(vec![
                sleep("fast", 1),
                sleep("slow", 20),
                sleep("slower", 80),
            ]),
            &testbed(),
            &time,
        )
        .unwrap();
        assert_eq!(rows[0].ratio, None);
        // A sleep may take longer than requested, never shorter: the second contender skips at
        // least one turn, and the third has its first call only.
        let turns: Vec<_> = rows.iter().map(|r| r.turns).collect();
        assert!(
            (1..=3).contains(&turns[0]) && (1..=2).contains(&turns[1]) && turns[2] == 1,
            "{turns:?}"
        );
        for (row, least) in rows.iter().zip([0.001, 0.02, 0.08]) {
            assert!(row.rate.largest <= 1.0 / least, "{row:?}");
            let ratio = row.ratio.unwrap_or(row.rate);
            assert!(ratio.smallest <= ratio.median && ratio.median <= ratio.largest);
        }
    }
}
