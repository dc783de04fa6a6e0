//! `bitnet dequantize`

use crate::args::checkpoint::DequantizeArgs;
use crate::print::{Answer, Output};
use crate::{job, target};
use bitnet_checkpoint::Job;
use bitnet_checkpoint::recipe::Compute;

pub(crate) fn run(args: &DequantizeArgs, out: &mut Output) -> anyhow::Result<Answer> {
    target::format(None, &args.job.out)?;
    let source = args.input.open()?;
    let plan = Job::dequantize(&source, args.dtype, &args.job.out)?;
    job::run(plan, &source, &args.job, &Compute::default(), out)?;
    Ok(Answer::Yes)
}
