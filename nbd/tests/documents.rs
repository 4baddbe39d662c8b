//! What `docs/nbd-support.md` claims can be looked up: the tests that it names exist, every number of the protocol that the
//! code knows is on it, and what it calls refused or not applicable is in the table of `refused.rs`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn page() -> String {
    read("docs/nbd-support.md")
}

/// The cells of each row of a table.
fn rows(page: &str) -> Vec<Vec<String>> {
    let rows = page.lines().filter(|line| line.starts_with("| "));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// Whether a source has this function, with an attribute that makes it a test in the line above.
fn is_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    lines.windows(2).any(|pair| {
        let function = pair[1].trim_start_matches("async ").starts_with(&format!("fn {name}("));
        function && (pair[0] == "#[test]" || pair[0].starts_with("#[tokio::test"))
    })
}

#[test]
fn every_test_that_the_page_names_exists() {
    let page = page();
    assert!(!page.lines().any(|line| line.matches('`').count() % 2 == 1), "a backtick stands alone");
    let words = page.split('`').skip(1).step_by(2);
    let named: Vec<(&str, &str)> = words.filter_map(|word| word.split_once(".rs::")).collect();
    assert!(named.len() >= 100, "the page names {} tests", named.len());
    let exists = |(file, name): &(&str, &str)| {
        let places = ["nbd/tests", "nbd/src", "tests"].map(|place| root().join(place).join(format!("{file}.rs")));
        places.iter().filter_map(|path| std::fs::read_to_string(path).ok()).any(|source| is_test(&source, name))
    };
    let missing: Vec<_> = named.iter().filter(|named| !exists(named)).collect();
    assert!(missing.is_empty(), "named and not there: {missing:#?}");
}

/// The constants of the wire under their names in the protocol, with their values as written.
fn constants() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for file in ["mod", "option", "request", "reply"] {
        let mut prefix = None;
        for line in read(&format!("nbd/src/wire/{file}.rs")).lines() {
            let line = line.trim();
            if let Some(name) = line.strip_prefix("impl ").and_then(|rest| rest.strip_suffix(" {")) {
                prefix = prefix_of(name);
            } else if let Some((name, _)) = line.split_once(": u16 {") {
                prefix = prefix_of(name);
            }
            if let Some((name, value)) =
                line.strip_prefix("pub const ").and_then(|rest| rest.split_once(": Self = Self("))
            {
                let name = format!("NBD_{}{name}", prefix.unwrap_or_else(|| panic!("{line}: of what?")));
                found.push((name, value.trim_end_matches(");").to_owned()));
            } else if let (Some(prefix), Some((name, value))) = (prefix, line.split_once(" = 0x")) {
                found.push((format!("NBD_{prefix}{name}"), format!("0x{}", value.trim_end_matches(';'))));
            } else if let Some((name, value)) =
                line.strip_prefix("pub const INFO_").and_then(|rest| rest.split_once(": u16 = "))
            {
                found.push((format!("NBD_INFO_{name}"), value.trim_end_matches(';').to_owned()));
            }
        }
    }
    found
}

fn prefix_of(name: &str) -> Option<&'static str> {
    Some(match name {
        "OptionCode" => "OPT_",
        "ReplyType" => "REP_",
        "Command" => "CMD_",
        "CommandFlags" => "CMD_FLAG_",
        "TransmissionFlags" => "FLAG_",
        "ChunkType" => "REPLY_TYPE_",
        _ => return None,
    })
}

fn number(text: &str) -> Option<u64> {
    let text = text.replace(['_', '`'], "");
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[test]
fn every_number_of_the_wire_is_on_the_page() {
    let rows = rows(&page());
    let constants = constants();
    assert!(constants.len() >= 60, "only {} constants found: {constants:?}", constants.len());
    for (name, value) in &constants {
        let row = rows.iter().find(|row| row[0] == format!("`{name}`"));
        let row = row.unwrap_or_else(|| panic!("{name} is not on the page"));
        assert!(number(value).is_some() && number(&row[1]) == number(value), "{name} is {value}");
    }
    let text = page();
    for line in read("nbd/src/wire/mod.rs").lines() {
        let Some((_, value)) = line.strip_prefix("pub const ").and_then(|rest| rest.split_once(" = 0x")) else {
            continue;
        };
        let value = number(&format!("0x{}", value.trim_end_matches(';')));
        let known = rows.iter().any(|row| row[1].split(", ").any(|cell| number(cell) == value));
        assert!(known || text.contains(&format!("{:#x}", value.unwrap())), "{line} is not on the page");
    }
}

#[test]
fn what_is_refused_or_not_applicable_is_in_the_table_that_shows_it() {
    let table = read("nbd/tests/refused.rs");
    let mut lines = 0;
    for row in rows(&page()) {
        let treatment =
            row.iter().skip(1).find(|cell| cell.starts_with("refused") || cell.starts_with("not applicable"));
        if treatment.is_some() {
            let name = row[0].replace('`', "");
            assert!(table.contains(&format!("(\"{name}\",")), "{name:?} has no case in refused.rs");
            lines += 1;
        }
    }
    assert!(lines >= 15, "only {lines} lines");
}
