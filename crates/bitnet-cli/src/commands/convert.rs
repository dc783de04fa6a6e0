//! `bitnet convert`

use crate::args::ConvertArgs;
use crate::print::Output;
use crate::{Answer, job};
use bitnet_checkpoint::Job;
use bitnet_checkpoint::recipe::Compute;

pub(crate) fn run(args: &ConvertArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let source = args.input.open()?;
    let format = job::format(args.format, &args.job.out);
    let plan = Job::convert(
        &source,
        format,
        args.layout.as_deref(),
        args.linear_class,
        &args.job.out,
    )?;
    job::run(&plan, &source, &args.job, &Compute::default(), out)?;
    Ok(Answer::Yes)
}
