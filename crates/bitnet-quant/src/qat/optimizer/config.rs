//! The configuration of an optimizer.

use crate::recipe::compile;
use serde::{Deserialize, Serialize};

/// The method of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "name", deny_unknown_fields)]
pub enum OptimizerMethod {
    /// Gradient descent with momentum.
    Sgd {
        /// Momentum μ; 0 keeps no velocity.
        #[serde(default)]
        momentum: f64,
        /// Whether to use Nesterov's momentum.
        #[serde(default)]
        nesterov: bool,
    },
    /// Adam (Kingma, Ba 2015): weight decay is part of the gradient.
    Adam(Betas),
    /// Adam with decoupled decay (Loshchilov, Hutter 2019).
    AdamW(Betas),
}

/// The constants of Adam.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Betas {
    /// Decay rate β₁ of the first moment.
    pub beta1: f64,
    /// Decay rate β₂ of the second moment.
    pub beta2: f64,
    /// ε, added to the root of the second moment.
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

/// Variables with their own learning rate or weight decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Names of variables, as a glob.
    #[serde(rename = "match")]
    pub glob: String,
    /// Factor of the learning rate; 0 freezes the variables.
    #[serde(default = "one")]
    pub learning_rate: f64,
    /// Weight decay λ of these variables instead of the common one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

/// The configuration of an optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The method of an optimizer.
    pub method: OptimizerMethod,
    /// Learning rate η.
    pub learning_rate: f64,
    /// Weight decay λ of matrices. Tensors of at most one dimension (biases, norms, scales) and
    /// names that end with `norm` or `scale` have none.
    pub weight_decay: f64,
    /// Exceptions by name; the first that matches applies.
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

/// Learning rate, weight decay and clipping of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Factor of the learning rate.
    pub learning_rate: f64,
    /// Factor of the weight decay.
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
