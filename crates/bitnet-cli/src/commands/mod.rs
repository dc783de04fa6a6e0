//! One file for each command.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod demo;
pub(crate) mod dequantize;
pub(crate) mod embed;
pub(crate) mod inspect;
pub(crate) mod manual;
pub(crate) mod perplexity;
pub(crate) mod quantize;
pub(crate) mod run;
#[cfg(feature = "train")]
pub(crate) mod train;
pub(crate) mod verify;
