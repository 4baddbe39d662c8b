//! The exports of one listener: names, facts read once, counters, and the devices that were opened.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::handshake::ExportFacts;
use crate::stats::ExportStats;
use crate::wire::{MAX_PAYLOAD, SIZE_LIMIT, string};
use crate::{Device, Error, Export};

/// Exports that may be served together.
#[derive(Debug)]
pub struct Exports {
    entries: Vec<Entry>,
    facts: Arc<[ExportFacts]>,
}

pub(super) struct Entry {
    export: Arc<dyn Export>,
    pub(super) stats: Arc<ExportStats>,
    /// What clients have open, to be flushed at a stop.
    opened: Mutex<Vec<Weak<dyn Device>>>,
}

/// Why exports cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportsError {
    /// The protocol knows no such string ("Conventions").
    #[error("the name or description of export {name:?} has a NUL or more than 4096 bytes")]
    NotAString {
        /// The name, as lossy text.
        name: String,
    },
    /// Two exports have one name.
    #[error("two exports are called {name:?}")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// Clients use signed 64-bit offsets.
    #[error("export {name:?} has {size} bytes, which is not below 2^63")]
    TooLarge {
        /// The name.
        name: String,
        /// The size in bytes.
        size: u64,
    },
    /// "Size constraints".
    #[error("the preferred block size {size} of export {name:?} is no power of two from 512 to 64 MiB")]
    BlockSize {
        /// The name.
        name: String,
        /// The size in bytes.
        size: u32,
    },
}

impl Exports {
    /// Checks the exports and reads their facts.
    pub fn new(exports: impl IntoIterator<Item = Arc<dyn Export>>) -> Result<Self, ExportsError> {
        let mut facts: Vec<ExportFacts> = Vec::new();
        let mut entries = Vec::new();
        for export in exports {
            let fact = facts_of(&*export)?;
            if facts.iter().any(|other| other.name == fact.name) {
                return Err(ExportsError::Duplicate { name: fact.name });
            }
            facts.push(fact);
            entries.push(Entry { export, stats: Arc::default(), opened: Mutex::default() });
        }
        Ok(Self { entries, facts: facts.into() })
    }

    /// One export, which clients also get for the empty name unless [`ListPolicy::Hide`](crate::ListPolicy::Hide) is set.
    pub fn single(export: Arc<dyn Export>) -> Result<Self, ExportsError> {
        Self::new([export])
    }

    pub(super) fn facts(&self) -> &Arc<[ExportFacts]> {
        &self.facts
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Name and entry of each.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.facts.iter().map(|facts| facts.name.as_str()).zip(&self.entries)
    }

    /// The devices that are open and may be written to.
    pub(super) fn writable_devices(&self) -> Vec<Arc<dyn Device>> {
        let entries = self.facts.iter().zip(&self.entries).filter(|(facts, _)| !facts.read_only);
        let mut devices: Vec<Arc<dyn Device>> = Vec::new();
        for (_, entry) in entries {
            let opened = entry.opened.lock().unwrap_or_else(PoisonError::into_inner);
            devices.extend(opened.iter().filter_map(Weak::upgrade));
        }
        devices
    }
}

impl Entry {
    pub(super) async fn open(&self) -> Result<Arc<dyn Device>, Error> {
        let device = self.export.open().await?;
        let weak = Arc::downgrade(&device);
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.retain(|other| other.strong_count() > 0 && !other.ptr_eq(&weak));
        opened.push(weak);
        Ok(device)
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("stats", &self.stats).finish_non_exhaustive()
    }
}

fn facts_of(export: &dyn Export) -> Result<ExportFacts, ExportsError> {
    let name = export.name().to_owned();
    let facts = ExportFacts {
        description: export.description().to_owned(),
        size: export.size(),
        read_only: export.read_only(),
        fast_zero: export.fast_zero(),
        contexts: export.contexts(),
        preferred_block_size: export.preferred_block_size(),
        name,
    };
    let ExportFacts { name, description, size, preferred_block_size: block, .. } = facts.clone();
    if string(name.as_bytes()).is_none() || string(description.as_bytes()).is_none() {
        return Err(ExportsError::NotAString { name });
    }
    if size >= SIZE_LIMIT {
        return Err(ExportsError::TooLarge { name, size });
    }
    if !block.is_power_of_two() || !(512..=MAX_PAYLOAD).contains(&block) {
        return Err(ExportsError::BlockSize { name, size: block });
    }
    Ok(facts)
}
