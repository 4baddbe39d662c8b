//! Questions to file systems that may hang: one at a time to each folder, and nobody waits longer for the answer than a limit.
//!
//! A call to a mount that hangs cannot be taken back: its thread waits until the mount answers or is gone. So a question that got no
//! answer stays the only one; whoever asks meanwhile is refused without a thread of his own. Only short questions are asked here. What
//! reads or writes for long comes after one of them was answered.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

/// Why a question has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// The file system did not answer in time, or owes an answer to somebody else.
    #[error("its file system does not answer")]
    Unanswered,
    /// The question ended by a panic.
    #[error("looking at a folder ended by a panic")]
    Panicked,
}

/// The questions that are under way.
#[derive(Debug, Default)]
pub struct Probes {
    turns: Mutex<HashMap<PathBuf, Arc<Semaphore>>>,
}

impl Probes {
    /// Asks the file system of a folder, when it is this question's turn. `question` may block.
    ///
    /// # Cancellation
    /// A question that was begun goes on, and is the only one until it ends.
    ///
    /// # Errors
    /// There was no answer within `limit`.
    pub async fn ask<T: Send + 'static>(
        &self,
        folder: &Path,
        limit: Duration,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ProbeError> {
        let deadline = Instant::now() + limit;
        let turn = timeout_at(deadline, self.turn(folder).acquire_owned()).await;
        // The semaphore is never closed.
        let turn = turn.ok().and_then(Result::ok).ok_or(ProbeError::Unanswered)?;
        let answer = tokio::task::spawn_blocking(move || {
            let answer = question();
            drop(turn);
            answer
        });
        match timeout_at(deadline, answer).await {
            Ok(answer) => answer.map_err(|_| ProbeError::Panicked),
            Err(_) => Err(ProbeError::Unanswered),
        }
    }

    fn turn(&self, folder: &Path) -> Arc<Semaphore> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody asks, or waits to ask, are as good as new ones.
        turns.retain(|_, turn| turn.available_permits() == 0 || Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(folder.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(1))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn while_one_question_has_no_answer_no_other_is_begun_and_other_folders_answer() {
        let probes = Probes::default();
        let (answer, answers) = mpsc::channel::<()>();
        let hung = probes.ask(Path::new("/hung"), SHORT, move || answers.recv().is_ok()).await;
        assert_eq!(hung, Err(ProbeError::Unanswered));
        for _ in 0..3 {
            let refused = probes.ask(Path::new("/hung"), SHORT, || panic!("a second question")).await;
            assert_eq!(refused, Err::<(), _>(ProbeError::Unanswered));
        }
        assert_eq!(probes.ask(Path::new("/other"), LONG, || 1).await, Ok(1));
        answer.send(()).unwrap();
        assert_eq!(probes.ask(Path::new("/hung"), LONG, || 2).await, Ok(2));
        assert!(probes.turns.lock().unwrap().len() <= 2, "what is over is forgotten");
    }

    #[tokio::test]
    async fn a_question_that_panics_leaves_the_next_one_its_turn() {
        let probes = Probes::default();
        let panicked = probes.ask(Path::new("/here"), LONG, || panic!("on purpose")).await;
        assert_eq!(panicked, Err::<(), _>(ProbeError::Panicked));
        assert_eq!(probes.ask(Path::new("/here"), LONG, || 1).await, Ok(1));
    }
}
