//! The demo: the figures of each setting, and that the held-out text separates them.

mod common;

use common::Dir;
use serde_json::Value;

#[test]
fn the_demo_separates_its_settings() {
    let dir = Dir::new();
    let demo = dir.run(&["demo", "--json", "--keep", "files"]).is(0).json();
    let settings = demo["settings"].as_array().unwrap();
    assert_eq!(settings.len(), 17);
    assert!(settings.iter().all(|s| s["whole"] == true));
    let number = |value: &Value| value.as_f64().unwrap();
    assert!(number(&demo["tokens"]) > 7_000.0);
    let relative = number(&demo["perplexity_error"]) / number(&demo["perplexity"]);
    assert!(relative < 0.035, "{relative}");
    // Loss added by a setting, and its error.
    let added = |name: &str| {
        let setting = settings.iter().find(|s| s["setting"] == name).unwrap();
        let loss = &setting["loss_difference"];
        (number(&loss["mean"]), number(&loss["error"]))
    };
    assert!(added("int8").0.abs() < 0.01, "{:?}", added("int8"));
    for [better, worse] in [
        ["int8", "int4 group:32"],
        ["int4 group:32", "int3 group:64"],
        ["int3 group:64", "int2 group:64"],
        ["2 trit planes", "ternary optimal"],
        ["int2 group:64", "ternary optimal"],
        ["ternary optimal", "ternary absmean, one scale (b1.58)"],
        ["ternary optimal", "binary"],
    ] {
        let ((a, da), (b, db)) = (added(better), added(worse));
        let error = (da * da + db * db).sqrt();
        assert!(
            b - a > 3.0 * error,
            "{better} {a} ± {da}, {worse} {b} ± {db}"
        );
    }
    dir.run(&["verify", "files/00"]).is(0);
    dir.run(&["verify", "files/15.gguf"]).is(0);
}
