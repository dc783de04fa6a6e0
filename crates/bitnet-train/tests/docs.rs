//! The settings shown in docs/training.md parse and have their documented values.

use bitnet_quant::qat::{EarlyStopping, Stage};
use bitnet_train::config::ImageConfig;

#[test]
fn settings_in_the_documentation() {
    let text = include_str!("../../../docs/training.md");
    let blocks: Vec<&str> = text
        .split("```toml\n")
        .skip(1)
        .map(|block| block.split("```").next().unwrap_or_default())
        .collect();
    let [first, second] = blocks[..] else {
        panic!("{} blocks of TOML", blocks.len())
    };
    let config: ImageConfig = toml::from_str(first).unwrap();
    config.training.validate().unwrap();
    assert_eq!(
        (config.training.steps, config.training.optimizer.group.len()),
        (3000, 1)
    );
    let config: ImageConfig =
        toml::from_str(&second.replace("[training]\n", "[training]\nsteps = 3000\n")).unwrap();
    config.training.validate().unwrap();
    let training = config.training;
    assert_eq!(
        training.early_stopping,
        Some(EarlyStopping {
            patience: 5,
            min_delta: 0.001
        })
    );
    assert_eq!(
        (training.dead_zone_bias, training.level_regularization),
        (0.001, 0.01)
    );
    let progressive = training.progressive.unwrap();
    let later = "model.layers.0.mlp.down_proj";
    assert_eq!(
        (progressive.at(later, 49).1, progressive.at(later, 150)),
        (0.0, (Stage::Bits(8), 0.5))
    );
    assert_eq!(progressive.settled(), 1550);
}
