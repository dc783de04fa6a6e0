//! The operations that are measured. Each case has its name, shape, amount of work, ceilings, call
//! and check in one place.

mod data;
mod packing;
mod product;
mod products;
mod quantization;
mod rivals;
mod simd;

pub use rivals::threads as rival_threads;

use crate::case::PlannedCase;
use crate::selection::{CaseSelection, OperationGroup};
use anyhow::{Result, bail};

/// The cases of a selection, in the order in which they run.
///
/// # Errors
/// If the selection is empty.
pub fn plan(selection: &CaseSelection) -> Result<Vec<PlannedCase>> {
    let rivals = selection.rivals;
    let mut plan = vec![];
    for group in &selection.groups {
        match group {
            OperationGroup::Quantization => plan.extend(quantization::plan(rivals)),
            OperationGroup::Packing => plan.extend(packing::plan(rivals)),
            OperationGroup::Simd => plan.extend(simd::plan(rivals)),
            OperationGroup::Gemv => plan.extend(
                selection
                    .gemv
                    .iter()
                    .flat_map(|&shape| products::plan(OperationGroup::Gemv, shape, 1, rivals)),
            ),
            OperationGroup::Gemm => {
                for &shape in &selection.gemm {
                    plan.extend(selection.tokens.iter().flat_map(|&tokens| {
                        products::plan(OperationGroup::Gemm, shape, tokens, rivals)
                    }));
                }
            }
        }
    }
    if plan.is_empty() {
        bail!("nothing to measure");
    }
    Ok(plan)
}
