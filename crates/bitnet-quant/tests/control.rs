//! Precision control: it settles, follows a stream, and stays within its bounds.

use bitnet_core::Precision;
use bitnet_quant::{PrecisionControlConfig, PrecisionController, QuantizationStats};
use proptest::prelude::*;

fn observation(sqnr_db: f32) -> QuantizationStats {
    QuantizationStats {
        elements_count: 1,
        quantization_error: 10f32.powf(-sqnr_db / 20.0),
        compression_ratio: 4.0,
        min_value: -1.0,
        max_value: 1.0,
        scale_factor: 1.0,
        zero_point: None,
    }
}

fn policies() -> impl Strategy<Value = PrecisionControlConfig> {
    prop::sample::select(vec![
        PrecisionControlConfig::conservative(),
        PrecisionControlConfig::balanced(),
        PrecisionControlConfig::aggressive(),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The quality depends on the precision alone, up to noise below the margin: each precision is
    /// left at most once downwards and once upwards, then nothing changes.
    #[test]
    fn a_steady_stream_settles(
        config in policies(),
        first in -5.0f32..20.0,
        steps in prop::collection::vec(0.5f32..25.0, 5),
        noise in prop::collection::vec(-0.2f32..0.2, 97),
    ) {
        let mut quality = vec![first];
        steps.iter().for_each(|s| quality.push(quality[quality.len() - 1] + s));
        let ladder = config.precisions.clone();
        let mut controller = PrecisionController::new(config).unwrap();
        let mut last_change = 0;
        for i in 0..2000 {
            let level = ladder.iter().position(|&p| p == controller.precision()).unwrap();
            if controller.adjust_precision_dynamically(&observation(quality[level] + noise[i % noise.len()])).unwrap().is_some() {
                last_change = i;
            }
        }
        let summary = controller.get_performance_summary();
        prop_assert!(summary.raised + summary.lowered <= 2 * ladder.len() as u64, "{summary:?}");
        prop_assert!(last_change < 200, "still changing at {last_change}");
    }

    /// For any stream the precision is one of the configuration and moves by one step at a time.
    #[test]
    fn any_stream_stays_within_bounds(config in policies(), stream in prop::collection::vec(-40.0f32..140.0, 1..300)) {
        let ladder = config.precisions.clone();
        let mut controller = PrecisionController::new(config).unwrap();
        for sqnr in stream {
            let before = controller.precision();
            let change = controller.adjust_precision_dynamically(&observation(sqnr)).unwrap();
            let at = |p: Precision| ladder.iter().position(|&q| q == p).unwrap();
            match change {
                Some(c) => {
                    prop_assert_eq!((c.from_precision, c.to_precision), (before, controller.precision()));
                    prop_assert_eq!(at(c.to_precision).abs_diff(at(c.from_precision)), 1);
                }
                None => prop_assert_eq!(before, controller.precision()),
            }
        }
    }
}

#[test]
fn it_follows_a_stream_that_gets_harder_and_easier() {
    let mut controller = PrecisionController::new(PrecisionControlConfig::balanced()).unwrap();
    // The quality of each precision on easy data; hard data is 15 dB worse.
    let easy = |p: Precision| 6.0 * (p.levels() as f32).log2();
    let run = |controller: &mut PrecisionController, worse: f32| {
        for _ in 0..50 {
            let sqnr = easy(controller.precision()) - worse;
            controller
                .adjust_precision_dynamically(&observation(sqnr))
                .unwrap();
        }
        controller.precision()
    };
    assert_eq!(run(&mut controller, 0.0), Precision::Int4);
    assert_eq!(run(&mut controller, 15.0), Precision::Int8);
    assert_eq!(run(&mut controller, 0.0), Precision::Int4);
}

#[test]
fn a_metric_out_of_bounds_raises_and_bad_numbers_are_refused() {
    let mut controller = PrecisionController::new(PrecisionControlConfig::aggressive()).unwrap();
    controller.add_metric("perplexity", [0.0, 20.0]).unwrap();
    controller.record_metric("perplexity", 25.0).unwrap();
    let good = observation(6.0);
    assert_eq!(
        controller.adjust_precision_dynamically(&good).unwrap(),
        None
    );
    let change = controller
        .adjust_precision_dynamically(&good)
        .unwrap()
        .unwrap();
    assert_eq!(change.to_precision, Precision::Int2);
    assert!(controller.record_metric("perplexity", f32::NAN).is_err());
    assert!(controller.record_metric("loss", 1.0).is_err());
    assert!(controller.add_metric("loss", [1.0, 0.0]).is_err());
    for bad in [f32::NAN, -1.0] {
        assert!(
            controller
                .adjust_precision_dynamically(&QuantizationStats {
                    quantization_error: bad,
                    ..good
                })
                .is_err()
        );
    }
    let watching = PrecisionControlConfig {
        adjust: false,
        window: 2,
        ..PrecisionControlConfig::aggressive()
    };
    let mut controller = PrecisionController::new(watching).unwrap();
    for sqnr in [0.0, 0.0, 20.0, 20.0] {
        assert_eq!(
            controller
                .adjust_precision_dynamically(&observation(sqnr))
                .unwrap(),
            None
        );
    }
    assert_eq!(controller.recent().len(), 2);
    assert!((controller.get_performance_summary().recent_error - 0.1).abs() < 1e-6);
    assert!((controller.get_performance_summary().average_error - 0.55).abs() < 1e-6);
}
