//! The rule of an optimizer and its numbers.

use crate::recipe::compile;
use serde::{Deserialize, Serialize};

/// The rule of a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "name", deny_unknown_fields)]
pub enum OptimizerMethod {
    /// Gradient descent with momentum.
    Sgd {
        /// Share of the velocity that remains; 0: none is kept.
        #[serde(default)]
        momentum: f64,
        /// Whether the step looks ahead along the new velocity.
        #[serde(default)]
        nesterov: bool,
    },
    /// Adam (Kingma, Ba 2015): decay goes through the moments.
    Adam(Betas),
    /// Adam with decoupled decay (Loshchilov, Hutter 2019).
    AdamW(Betas),
}

/// The constants of Adam.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Betas {
    /// Share of the first moment that remains.
    pub beta1: f64,
    /// Share of the second moment that remains.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for Betas {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

impl Default for OptimizerMethod {
    fn default() -> Self {
        Self::AdamW(Betas::default())
    }
}

/// Variables that are treated alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Names of variables, as a glob.
    #[serde(rename = "match")]
    pub glob: String,
    /// Their learning rate, as a multiple; 0 keeps them as they are.
    #[serde(default = "one")]
    pub learning_rate: f64,
    /// Their decay λ, where it is not that of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

/// An optimizer by its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The rule of a step.
    pub method: OptimizerMethod,
    /// Learning rate η.
    pub learning_rate: f64,
    /// Decay λ of matrices. Tensors of at most one dimension (biases, norms, scales) and names with
    /// `norm` or `scale` at the end have none.
    pub weight_decay: f64,
    /// Exceptions; the first that matches a name holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub group: Vec<ParameterGroup>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            method: OptimizerMethod::default(),
            learning_rate: 1e-3,
            weight_decay: 0.01,
            group: vec![],
        }
    }
}

impl OptimizerConfig {
    pub(crate) fn problems(&self, wrong: &mut Vec<String>) {
        let mut number = |name: &str, x: f64, ok: bool, expected: &str| {
            if !ok {
                wrong.push(format!("optimizer.{name}: expected {expected}, got {x}"));
            }
        };
        let positive = |x: f64| x.is_finite() && x >= 0.0;
        number(
            "learning_rate",
            self.learning_rate,
            positive(self.learning_rate),
            "a number of at least 0",
        );
        number(
            "weight_decay",
            self.weight_decay,
            positive(self.weight_decay),
            "a number of at least 0",
        );
        match self.method {
            OptimizerMethod::Sgd { momentum, .. } => number(
                "momentum",
                momentum,
                (0.0..1.0).contains(&momentum),
                "a number in [0, 1)",
            ),
            OptimizerMethod::Adam(betas) | OptimizerMethod::AdamW(betas) => {
                number(
                    "beta1",
                    betas.beta1,
                    (0.0..1.0).contains(&betas.beta1),
                    "a number in [0, 1)",
                );
                number(
                    "beta2",
                    betas.beta2,
                    (0.0..1.0).contains(&betas.beta2),
                    "a number in [0, 1)",
                );
                number(
                    "eps",
                    betas.eps,
                    betas.eps.is_finite() && betas.eps > 0.0,
                    "a number above 0",
                );
            }
        }
        for (i, group) in self.group.iter().enumerate() {
            let decay = group.weight_decay.unwrap_or(0.0);
            number(
                &format!("group[{i}].learning_rate"),
                group.learning_rate,
                positive(group.learning_rate),
                "a number of at least 0",
            );
            number(
                &format!("group[{i}].weight_decay"),
                decay,
                positive(decay),
                "a number of at least 0",
            );
        }
        for (i, group) in self.group.iter().enumerate() {
            wrong.extend(
                compile(&group.glob)
                    .err()
                    .map(|e| format!("optimizer.group[{i}].match: {e}")),
            );
        }
    }
}

/// What the schedules say about one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Factor of the learning rate.
    pub learning_rate: f64,
    /// Factor of the decay.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; longer ones are scaled down to it.
    pub clip: Option<f64>,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            learning_rate: 1.0,
            weight_decay: 1.0,
            clip: None,
        }
    }
}
