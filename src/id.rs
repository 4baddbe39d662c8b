//! Ids of the things the service keeps: opaque text, one type per thing so that they cannot be mixed up.
//!
//! `vm-` and `backup-` ids carry a ULID that grows strictly within one process, so that id order is creation order.
//! Repository ids are chosen by people. A restore point has the id of the job that made it.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use ulid::{Generator, Ulid};
use utoipa::ToSchema;

/// The text is no id of the wanted kind.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not {expected}")]
pub struct IdParseError {
    expected: &'static str,
}

/// A new ULID, larger than every one this process made before, even within a millisecond or after the clock was set back.
pub fn new_ulid() -> Ulid {
    static GENERATOR: Mutex<Generator> = Mutex::new(Generator::new());
    let mut generator = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    match generator.generate() {
        Ok(ulid) => ulid,
        Err(overflow) => overflow.commit_overflow_increment(),
    }
}

macro_rules! prefixed_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $expected:literal, $example:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String, example = $example)]
        pub struct $name(String);

        impl $name {
            /// A new id, never given before.
            #[allow(clippy::new_without_default, reason = "two defaults would not be equal")]
            pub fn new() -> Self {
                Self(format!(concat!($prefix, "{}"), new_ulid()))
            }
        }

        impl FromStr for $name {
            type Err = IdParseError;

            fn from_str(text: &str) -> Result<Self, IdParseError> {
                match text.strip_prefix($prefix).map(Ulid::from_string) {
                    // Compared with its canonical form: a lower-case or over-long spelling is another text.
                    Some(Ok(ulid)) if text[$prefix.len()..] == ulid.to_string() => Ok(Self(text.to_owned())),
                    _ => Err(IdParseError { expected: $expected }),
                }
            }
        }

        text_id!($name);
    };
}

macro_rules! text_id {
    ($name:ident) => {
        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdParseError;

            fn try_from(text: String) -> Result<Self, IdParseError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

prefixed_id!(
    /// Id of a virtual machine, `vm-<ulid>`.
    VmId,
    "vm-",
    "a VM id (vm- and 26 characters)",
    "vm-01JC0A7K2E5H8M3P6R9T1V4X7Z"
);

prefixed_id!(
    /// Id of a job, `backup-<ulid>`, and of the restore point that it leaves. Always 33 characters: the backup client
    /// names its snapshot after it and selects its mode by the prefix.
    BackupId,
    "backup-",
    "a backup id (backup- and 26 characters)",
    "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB"
);

prefixed_id!(
    /// Id of an export of a restore point, `export-<ulid>`.
    ExportId,
    "export-",
    "an export id (export- and 26 characters)",
    "export-01JD8Z3M6Q9V4T2R7XK5N0WCHB"
);

prefixed_id!(
    /// Id of one piece of work on points that are committed, `task-<ulid>`: a verification, a merge, a removal.
    TaskId,
    "task-",
    "a task id (task- and 26 characters)",
    "task-01JD8Z3M6Q9V4T2R7XK5N0WCHB"
);

/// Id of a repository: 1 to 64 characters `[a-z0-9._-]`, the first one a letter or a digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "repo-001")]
pub struct RepositoryId(String);

/// Longest id of a repository, in characters. A guess: long enough for any naming scheme, short enough for a table.
const REPOSITORY_ID_MAX: usize = 64;

impl RepositoryId {
    /// An id made from a display name: lower case, runs of other characters become one `-`. A name without a usable
    /// character gives `repository`.
    pub fn from_name(name: &str) -> Self {
        let mut id = String::new();
        for c in name.chars().flat_map(char::to_lowercase) {
            if c.is_ascii_lowercase() || c.is_ascii_digit() {
                id.push(c);
            } else if !id.is_empty() && !id.ends_with('-') {
                id.push('-');
            }
            if id.len() == REPOSITORY_ID_MAX {
                break;
            }
        }
        let id = id.trim_end_matches('-');
        Self(if id.is_empty() { "repository".to_owned() } else { id.to_owned() })
    }
}

impl FromStr for RepositoryId {
    type Err = IdParseError;

    fn from_str(text: &str) -> Result<Self, IdParseError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-');
        let starts_well = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        if starts_well && text.len() <= REPOSITORY_ID_MAX && text.chars().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdParseError { expected: "a repository id (1 to 64 of a-z 0-9 . _ -, first a letter or a digit)" })
        }
    }
}

text_id!(RepositoryId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_name_of_200_characters_gets_a_normal_id() {
        assert_eq!(BackupId::new().as_str().len(), 33, "ids never depend on names");
        assert_eq!(RepositoryId::from_name(&"x".repeat(200)).as_str().len(), REPOSITORY_ID_MAX);
    }

    #[test]
    fn ids_grow_within_one_process() {
        let ids: Vec<_> = (0..1000).map(|_| BackupId::new()).collect();
        assert!(ids.is_sorted());
    }

    #[test]
    fn only_the_canonical_spelling_of_an_id_is_accepted() {
        let id = VmId::new();
        assert_eq!(id.as_str().parse(), Ok(id.clone()));
        for wrong in [
            "",
            "vm-",
            "vm-1",
            &id.as_str().to_lowercase(),
            &format!("{id}0"),
            "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB",
            "vm-é",
        ] {
            assert!(wrong.parse::<VmId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn repository_ids_are_made_from_names_of_any_kind() {
        for (name, id) in
            [("Main", "main"), ("Büro 2 / Keller", "b-ro-2-keller"), ("  ", "repository"), ("../..", "repository")]
        {
            assert_eq!(RepositoryId::from_name(name).as_str(), id);
        }
        for wrong in ["", "-a", "..", "a/b", "A", "a b", &"a".repeat(65)] {
            assert!(wrong.parse::<RepositoryId>().is_err(), "{wrong}");
        }
    }
}
