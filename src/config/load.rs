//! From file and environment to a [`Config`]: which file, what overrides it, and what an unknown key is told.
//!
//! The known keys are not listed a second time: they are read off a configuration that has one entry of everything.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{Config, Credential, DEFAULT_NODE, Node, Webhook};

/// Where the file is looked for when nothing names one; it may be missing.
const DEFAULT_FILE: &str = "/etc/blockyard/blockyard.toml";
/// Names the file when the command line does not.
const FILE_VARIABLE: &str = "BLOCKYARD_CONFIG";
/// `BLOCKYARD__SECTION__KEY` overrides `section.key` of the file.
const OVERRIDE_PREFIX: &str = "BLOCKYARD__";
/// Sections whose entries are named by the operator.
const NAMED_SECTIONS: [&str; 3] = ["nodes", "credentials", "webhooks"];
/// The name that stands for all of them in the table of known keys.
const ANY_NAME: &str = "<name>";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{} is not valid TOML: {source}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A key or section that does not exist.
    #[error("unknown key `{key}`, did you mean `{nearest}`?")]
    UnknownKey {
        /// As it was written, with its section.
        key: String,
        /// The known key or section most like it.
        nearest: String,
    },
    /// A variable with the override prefix that names no key.
    #[error(
        "environment variable {variable} overrides nothing: write BLOCKYARD__SECTION__KEY, such as BLOCKYARD__SERVER__BIND"
    )]
    MalformedVariable {
        /// The variable.
        variable: String,
    },
    /// A value of the wrong type or form.
    #[error("`{key}`{}: {reason}", value.as_ref().map(|value| format!(" = {value}")).unwrap_or_default())]
    WrongType {
        /// The key with its section.
        key: String,
        /// The value as TOML, unless it is a whole section.
        value: Option<String>,
        /// What is wrong with it.
        reason: String,
    },
    /// A value of the right type that breaks a rule.
    #[error("`{key}` {rule}")]
    Invalid {
        /// The key with its section.
        key: String,
        /// The rule and the value that broke it.
        rule: String,
    },
    /// One of the above, with the place to set it right.
    #[error("{error} ({origin})")]
    At {
        /// What is wrong.
        error: Box<ConfigError>,
        /// Where.
        origin: Origin,
    },
}

/// Where a key has its value from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This file.
    File(PathBuf),
    /// This variable of the environment.
    Variable(String),
    /// Its default: this file does not set it.
    Unset(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "in {}", path.display()),
            Self::Variable(name) => write!(f, "in the environment variable {name}"),
            Self::Unset(path) => write!(f, "not set in {}", path.display()),
        }
    }
}

/// The environment variables that the configuration reads, so that a test can pass its own.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    file: Option<PathBuf>,
    overrides: BTreeMap<String, OsString>,
}

impl Environment {
    /// The variables of this process.
    pub fn of_the_process() -> Self {
        std::env::vars_os().collect()
    }
}

impl FromIterator<(OsString, OsString)> for Environment {
    fn from_iter<I: IntoIterator<Item = (OsString, OsString)>>(variables: I) -> Self {
        let mut environment = Self::default();
        for (name, value) in variables {
            if name == FILE_VARIABLE {
                environment.file = Some(value.into());
            } else if let Some(name) = name.to_str().filter(|name| name.starts_with(OVERRIDE_PREFIX)) {
                environment.overrides.insert(name.to_owned(), value);
            }
        }
        environment
    }
}

impl Config {
    /// Reads the file (`file`, else `BLOCKYARD_CONFIG`, else the default place when it exists), applies the overrides of the
    /// environment and checks the result.
    ///
    /// # Errors
    ///
    /// The first key that is unknown, of the wrong type, or breaks a rule, by its name.
    pub fn load(file: Option<&Path>, environment: &Environment) -> Result<Self, ConfigError> {
        let named = file.or(environment.file.as_deref());
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Unreadable { path: path.to_owned(), source }),
        };
        Self::from_toml(&text, path, environment)
    }

    /// The same for text that was read already; `path` is for messages only.
    pub fn from_toml(text: &str, path: &Path, environment: &Environment) -> Result<Self, ConfigError> {
        let syntax = |source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) };
        let table: Table = text.parse().map_err(syntax)?;
        Self::from_table(table.clone(), environment).map_err(|error| {
            let (ConfigError::UnknownKey { key, .. }
            | ConfigError::WrongType { key, .. }
            | ConfigError::Invalid { key, .. }) = &error
            else {
                return error;
            };
            let variable = environment.overrides.keys().find(|variable| path_of(variable).join(".") == *key);
            let origin = match variable {
                Some(variable) => Origin::Variable(variable.clone()),
                None if value_of(&table, key).is_some() => Origin::File(path.to_owned()),
                None => Origin::Unset(path.to_owned()),
            };
            ConfigError::At { error: Box::new(error), origin }
        })
    }

    fn from_table(mut table: Table, environment: &Environment) -> Result<Self, ConfigError> {
        let known = known_keys();
        check_known(&table, &known, &mut Vec::new())?;
        for (variable, value) in &environment.overrides {
            let value = value.to_str().ok_or_else(|| ConfigError::MalformedVariable { variable: variable.clone() })?;
            apply_override(&mut table, &known, variable, value)?;
        }
        let mut config: Self = serde_path_to_error::deserialize(Value::Table(table.clone())).map_err(|error| {
            let key = error.path().to_string();
            let value = value_of(&table, &key).filter(|value| !value.is_table()).map(ToString::to_string);
            ConfigError::WrongType { key, value, reason: error.inner().message().to_owned() }
        })?;
        config.validate()?;
        config.nodes.entry(DEFAULT_NODE.to_owned()).or_default();
        Ok(config)
    }

    /// Every key with its default as it is written in the file, named `section.key`, in the order of the names. A required
    /// key has an empty default.
    pub fn reference() -> Vec<(String, String)> {
        fn walk(table: &Table, prefix: &str, keys: &mut Vec<(String, String)>) {
            for (name, value) in table {
                let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                match value {
                    Value::Table(table) => walk(table, &name, keys),
                    // Texts, numbers and lists of texts look the same in JSON and TOML.
                    value => keys.push((name, serde_json::to_string(value).unwrap_or_default())),
                }
            }
        }
        let mut keys = Vec::new();
        walk(&known_keys(), "", &mut keys);
        keys
    }
}

/// A configuration with one entry of everything, as a table.
fn known_keys() -> Table {
    let credential = Credential {
        vcenter_host: String::new(),
        username: String::new(),
        password_file: PathBuf::new(),
        datacenter: None,
    };
    let webhook = Webhook { url: String::new(), secret_file: PathBuf::new(), events: Vec::new() };
    let config = Config {
        nodes: BTreeMap::from([(ANY_NAME.to_owned(), Node::default())]),
        credentials: BTreeMap::from([(ANY_NAME.to_owned(), credential)]),
        webhooks: BTreeMap::from([(ANY_NAME.to_owned(), webhook)]),
        ..Config::default()
    };
    match Value::try_from(config) {
        Ok(Value::Table(table)) => table,
        // The types above hold nothing that TOML cannot write; a unit test reads the result.
        _ => Table::new(),
    }
}

fn check_known(table: &Table, known: &Table, section: &mut Vec<String>) -> Result<(), ConfigError> {
    for (name, value) in table {
        let entry = known.get(ANY_NAME).or_else(|| known.get(name));
        section.push(name.clone());
        match (value, entry) {
            (_, None) => return Err(unknown(section, known)),
            (Value::Table(table), Some(Value::Table(known))) => check_known(table, known, section)?,
            // A table for a value or a value for a table is a wrong type, which serde words better.
            (_, Some(_)) => {}
        }
        section.pop();
    }
    Ok(())
}

/// The error for the key `path`, whose siblings are `known`.
fn unknown(path: &[String], known: &Table) -> ConfigError {
    let key = path.join(".");
    let leaf = path.last().map_or("", String::as_str);
    let all: Vec<String> = Config::reference().into_iter().map(|(key, _)| key).collect();
    // The right key in the wrong section is likelier than a similar word in the right one.
    let moved = all.iter().find(|known| known.rsplit('.').next() == Some(leaf));
    let section = path.get(..path.len().saturating_sub(1)).unwrap_or_default();
    let sibling = || {
        let best = known.keys().map(|known| (strsim::jaro_winkler(known, leaf), known));
        let best = best.max_by(|a, b| a.0.total_cmp(&b.0)).map_or("", |(_, known)| known);
        section.iter().map(String::as_str).chain([best]).collect::<Vec<_>>().join(".")
    };
    ConfigError::UnknownKey { key, nearest: moved.cloned().unwrap_or_else(sibling) }
}

/// The sections and the key that a variable overrides.
fn path_of(variable: &str) -> Vec<String> {
    variable.trim_start_matches(OVERRIDE_PREFIX).split("__").map(str::to_ascii_lowercase).collect()
}

/// What a table has under a key with its section, or under one item of its list, such as `auth.callback_peers[0]`.
fn value_of<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut names = key.split('.').map(|name| name.split('[').next().unwrap_or_default());
    let first = table.get(names.next()?)?;
    names.try_fold(first, |value, name| value.as_table()?.get(name))
}

fn apply_override(table: &mut Table, known: &Table, variable: &str, text: &str) -> Result<(), ConfigError> {
    let malformed = || ConfigError::MalformedVariable { variable: variable.to_owned() };
    let path = path_of(variable);
    let wanted = if NAMED_SECTIONS.contains(&path[0].as_str()) { 3 } else { 2 };
    if path.len() != wanted || path.iter().any(String::is_empty) {
        return Err(malformed());
    }
    let (mut target, mut known) = (table, known);
    for (depth, name) in path.iter().enumerate() {
        let entry = known.get(ANY_NAME).or_else(|| known.get(name)).ok_or_else(|| unknown(&path[..=depth], known))?;
        match entry {
            Value::Table(inner) if depth + 1 < path.len() => {
                known = inner;
                let slot = target.entry(name.clone()).or_insert_with(|| Value::Table(Table::new()));
                target = slot.as_table_mut().ok_or_else(malformed)?;
            }
            example if depth + 1 == path.len() => {
                target.insert(name.clone(), parse_like(example, &path.join("."), text)?);
            }
            _ => return Err(malformed()),
        }
    }
    Ok(())
}

/// `text` as a value of the type that `example` has. A list is written with commas, that of subjects with semicolons.
fn parse_like(example: &Value, key: &str, text: &str) -> Result<Value, ConfigError> {
    let wrong = |expected: &str| ConfigError::WrongType {
        key: key.to_owned(),
        value: Some(format!("{text:?}")),
        reason: format!("this is no {expected}"),
    };
    Ok(match example {
        Value::Integer(_) => Value::Integer(text.parse().map_err(|_| wrong("whole number"))?),
        Value::Float(_) => Value::Float(text.parse().map_err(|_| wrong("number"))?),
        Value::Boolean(_) => Value::Boolean(text.parse().map_err(|_| wrong("true or false"))?),
        Value::Array(_) => {
            // Subjects are full of commas.
            let separator = if key == "nbd.allow_subjects" { ';' } else { ',' };
            let items = text.split(separator).map(str::trim).filter(|item| !item.is_empty());
            Value::Array(items.map(|item| Value::String(item.to_owned())).collect())
        }
        _ => Value::String(text.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_names_every_section_and_both_named_ones() {
        let keys: Vec<_> = Config::reference().into_iter().map(|(key, _)| key).collect();
        for key in
            ["server.bind", "auth.callback_peers", "database.url", "nodes.<name>.url", "credentials.<name>.username"]
        {
            assert!(keys.iter().any(|known| known == key), "{key} is missing in {keys:?}");
        }
    }
}
