//! Turns: everything that is compared runs in each turn, so that all of it meets the same
//! neighbours.

use crate::machine::{Ceiling, Machine};
use crate::operations::{Case, Limit};
use crate::results::{Row, Spread};
use std::time::Instant;

/// How long to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Turns of a case.
    pub turns: usize,
    /// Seconds that a contender or a ceiling has in a turn, one call at least.
    pub turn: f64,
    /// Seconds that a contender has in all the turns; a slow one sits some out, and where one call
    /// takes longer, its first is all it gets.
    pub budget: f64,
}

impl Effort {
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

/// Something that can be called over and over, doing `amount` each time.
pub(crate) struct Timed<'a> {
    pub(crate) amount: f64,
    pub(crate) call: Box<dyn FnMut() + 'a>,
}

/// Seconds of one call, over so many.
fn seconds(call: &mut dyn FnMut(), calls: usize) -> f64 {
    let begin = Instant::now();
    (0..calls).for_each(|_| call());
    // A clock may stand still for a moment.
    (begin.elapsed().as_secs_f64() / calls as f64).max(1e-9)
}

/// Calls for one turn.
fn calls(call: &mut dyn FnMut(), effort: &Effort) -> usize {
    let first = seconds(call, 1);
    let calls = (effort.turn / first).ceil() as usize;
    // The first call warms up, and short ones are timed once more to know them better.
    if calls > 16 {
        (effort.turn / seconds(call, 16)).ceil() as usize
    } else {
        calls
    }
    .max(1)
}

/// Rates of the ceilings, a second, over some turns.
pub fn ceilings(machine: &Machine, ceilings: &[Ceiling], effort: &Effort) -> Vec<Spread> {
    let mut timed: Vec<_> = ceilings
        .iter()
        .map(|&ceiling| machine.timed(ceiling))
        .collect();
    let calls: Vec<_> = timed
        .iter_mut()
        .map(|t| calls(&mut t.call, effort))
        .collect();
    let mut rates = vec![vec![]; timed.len()];
    for _ in 0..effort.turns {
        for ((timed, &calls), rates) in timed.iter_mut().zip(&calls).zip(&mut rates) {
            rates.push(timed.amount / seconds(&mut timed.call, calls));
        }
    }
    rates.into_iter().map(Spread::of).collect()
}

/// A contender's result was not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("{case}: {contender} computes something else: {what}")]
pub struct Wrong {
    /// Operation and shape.
    pub case: String,
    /// Who.
    pub contender: String,
    /// The first difference.
    pub what: String,
}

/// Checks every contender of a case and then times them, beside the ceilings that limit them.
///
/// # Errors
/// [`Wrong`] if a result is not right; then nothing is timed.
pub fn case(case: &mut Case, machine: &Machine, effort: &Effort) -> Result<Vec<Row>, Wrong> {
    let mut first = vec![];
    for contender in &mut case.contenders {
        first.push(seconds(&mut || contender.call(), 1));
        contender.check().map_err(|what| Wrong {
            case: format!("{} {}", case.operation, case.shape),
            contender: contender.name.clone(),
            what,
        })?;
    }
    let mut wanted: Vec<Ceiling> = case
        .contenders
        .iter()
        .flat_map(|c| c.limits.iter().map(|l| l.ceiling))
        .collect();
    wanted.sort();
    wanted.dedup();
    let mut tops: Vec<_> = wanted
        .iter()
        .map(|&ceiling| machine.timed(ceiling))
        .collect();
    let top_calls: Vec<_> = tops
        .iter_mut()
        .map(|t| calls(&mut t.call, effort))
        .collect();
    let own: Vec<_> = case
        .contenders
        .iter_mut()
        .zip(&first)
        .map(|(c, &first)| {
            if first > effort.budget {
                0
            } else {
                calls(&mut || c.call(), effort)
            }
        })
        .collect();

    // Rates of the ceilings in each turn; seconds of each contender, where it took part.
    let (mut rates, mut times) = (vec![vec![]; tops.len()], vec![vec![]; own.len()]);
    for turn in 0..effort.turns {
        for ((top, &calls), rates) in tops.iter_mut().zip(&top_calls).zip(&mut rates) {
            rates.push(top.amount / seconds(&mut top.call, calls));
        }
        for (i, contender) in case.contenders.iter_mut().enumerate() {
            let most = (effort.budget / (own[i] as f64 * first[i])).max(1.0) as usize;
            let every = effort.turns.div_ceil(most.min(effort.turns));
            times[i].push(
                (own[i] > 0 && turn % every == 0)
                    .then(|| seconds(&mut || contender.call(), own[i])),
            );
        }
    }
    for (times, first) in times.iter_mut().zip(&first) {
        // A single call outside the turns, set against the middle of them.
        if times.iter().all(Option::is_none) {
            times[effort.turns / 2] = Some(*first);
        }
    }
    Ok(rows(case, &wanted, &rates, &times))
}

fn rows(
    case: &Case,
    wanted: &[Ceiling],
    rates: &[Vec<f64>],
    times: &[Vec<Option<f64>>],
) -> Vec<Row> {
    let spread = |of: &dyn Fn(usize, f64) -> Option<f64>, i: usize| -> Spread {
        Spread::of(
            times[i]
                .iter()
                .enumerate()
                .filter_map(|(turn, t)| of(turn, (*t)?))
                .collect(),
        )
    };
    let median = |of: &[Option<f64>]| Spread::of(of.iter().copied().flatten().collect()).median;
    case.contenders
        .iter()
        .enumerate()
        .map(|(i, contender)| {
            let share = |limit: &Limit| {
                let rates = &rates[wanted
                    .binary_search(&limit.ceiling)
                    .expect("every limit was asked for")];
                (
                    limit.ceiling,
                    spread(&|turn, t| Some(limit.cost / (t * rates[turn])), i),
                )
            };
            // The limit that is nearest is the ceiling.
            let nearest = contender
                .limits
                .iter()
                .map(share)
                .max_by(|a, b| a.1.median.total_cmp(&b.1.median));
            let base = Some(contender.base).filter(|&base| base != i);
            Row {
                group: case.group,
                operation: case.operation.clone(),
                shape: case.shape.clone(),
                threads: case.threads,
                contender: contender.name.clone(),
                ours: contender.ours,
                unit: case.unit,
                turns: times[i].iter().flatten().count(),
                rate: spread(&|_, t| Some(case.amount / t), i),
                ceiling: nearest.map(|n| n.0.to_string()),
                share: nearest.map(|n| n.1),
                base: base.map(|base| case.contenders[base].name.clone()),
                ratio: base.map(|base| {
                    spread(
                        &|turn, t| {
                            Some(t / times[base][turn].unwrap_or_else(|| median(&times[base])))
                        },
                        i,
                    )
                }),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operations::{Contender, Group};
    use crate::results::Unit;
    use bitnet_kernels::Pool;
    use std::sync::Arc;

    fn sleepers(contenders: Vec<Contender>) -> Case {
        let (operation, shape) = ("sleep".into(), "short".into());
        Case {
            group: Group::Gemv,
            operation,
            shape,
            threads: 1,
            unit: Unit::Weights,
            amount: 1.0,
            contenders,
        }
    }

    fn machine() -> Machine {
        Machine::new(Arc::new(Pool::single()), 1 << 20)
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
        let wrong = case(&mut bad, &machine(), &Effort::QUICK).unwrap_err();
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
        let effort = Effort {
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
            &machine(),
            &effort,
        )
        .unwrap();
        assert_eq!(rows[0].ratio, None);
        // Sleeps may be longer than asked for, never shorter: the second sits a turn out at least,
        // and the third gets one call outside them.
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
