//! Experts that are stacked in one tensor `[E, N, K]`: each is a range of its rows, in memory too.

use super::CheckpointLoader;
use crate::Result;
use crate::experts::Expert;
use crate::linear::LinearLayer;
use crate::projections::Projections;
use std::sync::OnceLock;

impl CheckpointLoader<'_> {
    /// The experts of a module, if they are stacked: gate and up in one tensor, as in transformers,
    /// or each projection in its own, as in a GGUF and in MLX.
    pub(super) fn stacked_experts(
        &self,
        mlp: &str,
        [count, ffn, hidden]: [usize; 3],
    ) -> Result<Option<Vec<Expert>>> {
        self.check_not_online(mlp)?;
        let both = format!("{mlp}.experts.gate_up_proj");
        let apart = |name: &str| format!("{mlp}.switch_mlp.{name}.weight");
        let is_there = |name: &str| self.source.find(&self.stored_name(name)).is_some();
        let (gate_up, down): (Vec<Projections<2>>, _) = if is_there(&both) {
            let fused = self.stack(&both, [count, 2 * ffn, hidden])?;
            let fused = fused.into_iter();
            (
                fused.map(|all| Projections::Fused(Box::new(all))).collect(),
                format!("{mlp}.experts.down_proj"),
            )
        } else if is_there(&apart("gate_proj")) {
            let gate = self.stack(&apart("gate_proj"), [count, ffn, hidden])?;
            let up = self.stack(&apart("up_proj"), [count, ffn, hidden])?;
            let pairs = gate.into_iter().zip(up);
            (
                pairs.map(|(a, b)| Projections::Separate([a, b])).collect(),
                apart("down_proj"),
            )
        } else {
            return Ok(None);
        };
        let down = self.stack(&down, [count, hidden, ffn])?;
        let experts = gate_up.into_iter().zip(down);
        let experts = experts.map(|(gate_up, down)| Expert { gate_up, down });
        Ok(Some(experts.collect()))
    }

    /// Refuses experts that a model might make ternary in each forward pass: transformers does it to
    /// linear modules, which its experts are no more since version 5.
    fn check_not_online(&self, mlp: &str) -> Result<()> {
        if !self.is_online(&format!("{mlp}.experts.0.gate_proj"))? {
            return Ok(());
        }
        let expected = "offline in a model with experts, which transformers 5 leaves as they are";
        let (path, key) = (
            self.source.path().join("config.json"),
            "quantization_config.quantization_mode",
        );
        Err(bitnet_formats::Error::config(&path, key, expected, "'online'").into())
    }

    /// A linear layer for each matrix of a tensor.
    fn stack(&self, name: &str, [count, rows, cols]: [usize; 3]) -> Result<Vec<LinearLayer>> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let found = self.find(name, &[count, rows, cols])?;
        let unpacked = OnceLock::new();
        let expert = |i: usize| {
            let mut matrix = found;
            (matrix.first, matrix.unpacked) = (i * rows, Some(&unpacked));
            self.linear_of(matrix, module, None)
        };
        (0..count).map(expert).collect()
    }
}
