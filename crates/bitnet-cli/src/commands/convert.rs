//! `bitnet convert`

use crate::args::checkpoint::ConvertArgs;
use crate::print::{Answer, Output};
use crate::{job, target};
use bitnet_checkpoint::Job;
use bitnet_checkpoint::recipe::Compute;

pub(crate) fn run(args: &ConvertArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let container = &args.container;
    let format = target::format(container.format, &args.job.out)?;
    let source = args.input.open()?;
    let plan = match args.unrotate {
        true => Job::unrotate,
        false => Job::convert,
    };
    let plan = plan(
        &source,
        format,
        args.layout.as_deref(),
        container.linear_class,
        &args.job.out,
    )?;
    job::run(plan, &source, &args.job, &Compute::default(), out)?;
    Ok(Answer::Yes)
}
