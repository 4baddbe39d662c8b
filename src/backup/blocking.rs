//! File system steps of a job. They run on blocking threads and cannot be cut short, so a job that is stopped in the
//! middle of one waits for it before it undoes anything: a directory must not appear after it was removed.

use std::io;

use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// The steps of one job that were begun.
#[derive(Debug, Default)]
pub(super) struct Work {
    running: JoinSet<()>,
}

impl Work {
    /// Begins a step and waits for its result.
    ///
    /// # Cancellation
    /// The step runs to its end all the same; [`Self::finished`] waits for it.
    ///
    /// # Errors
    /// Those of the step, as its error type makes them of an I/O error when it ended by a panic.
    pub(super) async fn run<T, E, F>(&mut self, step: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<io::Error> + Send + 'static,
        F: FnOnce() -> Result<T, E> + Send + 'static,
    {
        self.begin(step).await.unwrap_or_else(|_| Err(io::Error::other("a file system step ended by a panic").into()))
    }

    /// Begins a step whose result comes through the returned channel, so that several run at once.
    pub(super) fn begin<T, F>(&mut self, step: F) -> oneshot::Receiver<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        self.running.spawn_blocking(move || {
            // Nobody waits for the result of a step whose job was stopped.
            let _ = sender.send(step());
        });
        receiver
    }

    /// Waits until every step that was begun has ended.
    pub(super) async fn finished(&mut self) {
        while self.running.join_next().await.is_some() {}
    }
}
