//! `bitnet convert`

use crate::args::ConvertArgs;
use crate::print::Output;
use crate::{Answer, job};
use bitnet_formats::source::OpenOptions;
use bitnet_quant::{Job, Source};

pub(crate) fn run(args: &ConvertArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let source = Source::open_with(&args.input, &OpenOptions { i2s_layout: args.i2s_order.clone() })?;
    let format = job::format(args.format, &args.job.out);
    let plan = Job::convert(&source, format, args.layout.as_deref(), args.linear_class, &args.job.out)?;
    job::run(&plan, &source, &args.job, out)?;
    Ok(Answer::Yes)
}
