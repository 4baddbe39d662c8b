//! Deliberate mistakes, so that the tests can show that they would notice: only in builds with the feature `mutants`.
//!
//! Each stands in the code as `mutant!("name")`, which is `false` in every other build. One at most is alive: that of the
//! environment variable `MUTANT`, or the one that a test chose.

use std::sync::{LazyLock, Mutex, PoisonError};

static ALIVE: LazyLock<Mutex<Option<String>>> = LazyLock::new(|| Mutex::new(std::env::var("MUTANT").ok()));

/// Makes one mistake alive, or none, for the whole process.
pub fn choose(name: Option<&str>) {
    *ALIVE.lock().unwrap_or_else(PoisonError::into_inner) = name.map(str::to_owned);
}

pub(crate) fn is_alive(name: &str) -> bool {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner).as_deref() == Some(name)
}
