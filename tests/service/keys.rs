//! Every key of the configuration changes something that a test observes: a test sets it, or the table says which test sees
//! what it does by another way. A key that nothing reads cannot stay.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blockyard::config::Config;

/// Keys that no test sets under their name, and the test that observes what they do.
const OBSERVED: &[(&str, &str)] = &[];

/// The sources of the tests, by path; those of this file and of the parser say nothing about what a key does.
fn tests() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut folders, mut found) = (vec![root.join("tests"), root.join("src")], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") && !says_nothing(&path) {
                let text = std::fs::read_to_string(&path).unwrap();
                let tests = if path.starts_with(root.join("src")) {
                    text.split_once("#[cfg(test)]").map_or("", |(_, tests)| tests).to_owned()
                } else {
                    text
                };
                found.insert(path, tests);
            }
        }
    }
    found
}

fn says_nothing(path: &Path) -> bool {
    ["tests/service/keys.rs", "tests/service/configuration.rs"].iter().any(|name| path.ends_with(name))
}

/// Whether a test sets the key: in a table of TOML, as an override from the environment, or on the type.
fn sets(text: &str, key: &str) -> bool {
    let (section, name) = key.rsplit_once('.').unwrap();
    let variable = format!("BLOCKYARD__{}__{}", section.to_uppercase().replace('.', "__"), name.to_uppercase());
    let assigned = |text: &str| {
        text.match_indices(name).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let alone =
                before.is_none_or(|before| !(before.is_alphanumeric() || before == '_')) || text[..at].ends_with("\\n");
            alone && text[at + name.len()..].starts_with(" = ")
        })
    };
    text.contains(&variable) || assigned(text)
}

#[test]
fn every_config_key_changes_something_observable() {
    let tests = tests();
    for (key, test) in OBSERVED {
        let known = Config::reference().iter().any(|(known, _)| known == key);
        assert!(known, "{key} is no key");
        assert!(!tests.values().any(|text| sets(text, key)), "{key} is set by a test and needs no row");
        let there = tests.values().any(|text| text.contains(&format!("fn {test}(")));
        assert!(there, "{key} is said to be observed by {test}, which is no test");
    }
    let unobserved: Vec<String> = Config::reference()
        .into_iter()
        .map(|(key, _)| key)
        .filter(|key| !OBSERVED.iter().any(|(observed, _)| observed == key))
        .filter(|key| !tests.values().any(|text| sets(text, key)))
        .collect();
    assert!(unobserved.is_empty(), "no test says what these do: {unobserved:?}");
}
