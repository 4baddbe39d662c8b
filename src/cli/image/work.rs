//! Long work on images: in a thread of its own, with a bar on a terminal, ended by Ctrl-C.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockyard_qcow2::{Error, Progress, Watch};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use crate::cli::image_error::ImageError;
use crate::cli::serve::Stop;
use crate::cli::{CliError, Output};

const BAR: &str = "{prefix} {bar:32} {percent:>3}% {binary_bytes:>10} {binary_bytes_per_sec:>12}";

/// Runs the work to its end. A signal makes it end by [`Error::Cancelled`], with everything cleared away that it made.
///
/// # Cancellation
/// Dropped, the work goes on in its thread.
pub(super) async fn run<T: Send + 'static>(
    name: &'static str,
    output: &Output,
    work: impl FnOnce(&mut Watch<'_>) -> Result<T, CliError> + Send + 'static,
) -> Result<Result<T, CliError>, CliError> {
    // Listened for before anything is made: what a signal interrupts is also cleared away.
    let mut stop = Stop::new()?;
    let is_over = Arc::new(AtomicBool::new(false));
    let bar = bar_on_terminal(name, output);
    let asked = Arc::clone(&is_over);
    let mut task = tokio::task::spawn_blocking(move || {
        work(&mut |progress: Progress| {
            if let Some(bar) = &bar {
                bar.set_length(progress.total);
                bar.set_position(progress.done);
            }
            if asked.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    });
    loop {
        tokio::select! {
            done = &mut task => return Ok(done.unwrap_or(Err(ImageError::from(Error::Panicked).into()))),
            () = stop.wait() => is_over.store(true, Ordering::Relaxed),
        }
    }
}

/// A bar without a length yet, where somebody can see it.
pub(in crate::cli) fn bar_on_terminal(name: &'static str, output: &Output) -> Option<ProgressBar> {
    (output.has_notes() && std::io::stderr().is_terminal()).then(|| bar(name))
}

fn bar(name: &'static str) -> ProgressBar {
    // A template that cannot be read would fail every run on a terminal; the plain style does as well.
    let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    bar.with_finish(ProgressFinish::Abandon).with_style(style).with_prefix(name)
}
