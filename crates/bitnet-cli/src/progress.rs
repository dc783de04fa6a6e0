//! Progress on stderr, and Ctrl-C.

use bitnet_checkpoint::job::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A bar of `total` units; invisible with `quiet` and where stderr is no terminal.
pub(crate) fn bar(total: u64, quiet: bool, template: &str) -> ProgressBar {
    let target = if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// A progress bar of bytes, which disappears at the end.
pub(crate) struct ByteBar(ProgressBar);

impl ByteBar {
    pub(crate) fn new(total: u64, quiet: bool) -> Self {
        let template = "{bar:30} {percent:>3}%  {decimal_bytes_per_sec}  {eta} left  {wide_msg}";
        Self(bar(total, quiet, template))
    }
}

impl Drop for ByteBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Progress for ByteBar {
    fn tensor(&self, name: &str) {
        self.0.set_message(name.to_string());
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

/// A progress bar of tokens, which disappears at the end.
pub(crate) struct TokenBar(ProgressBar);

impl TokenBar {
    pub(crate) fn new(total: usize, quiet: bool) -> Self {
        let template = "{bar:30} {percent:>3}%  {per_sec} tokens  {eta} left";
        Self(bar(total as u64, quiet, template))
    }

    /// Sets the number of tokens done.
    pub(crate) fn set(&self, done: usize) {
        self.0.set_position(done as u64);
    }
}

impl Drop for TokenBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Set by the first Ctrl-C; the second one ends the program at once.
pub(crate) fn interrupt() -> &'static AtomicBool {
    static INTERRUPT: AtomicBool = AtomicBool::new(false);
    static HANDLER: OnceLock<()> = OnceLock::new();
    HANDLER.get_or_init(|| {
        // Without a handler Ctrl-C kills the program; the journal lets the next run resume.
        let _ = ctrlc::set_handler(|| {
            if INTERRUPT.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
    });
    &INTERRUPT
}
