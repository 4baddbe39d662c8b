//! The tests that the documents name, as `file.rs::name`, exist: a page that claims more than is shown is worse than none.
//! What the pages say besides is for people to read.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

/// Every `file.rs::name` between backticks.
fn named_tests(text: &str) -> Vec<(String, String)> {
    let words = text.split('`').skip(1).step_by(2);
    let pairs = words.filter_map(|word| word.split_once(".rs::"));
    pairs.map(|(file, name)| (format!("{file}.rs"), name.to_owned())).collect()
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
fn every_test_that_a_document_names_exists() {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = engine.parent().unwrap();
    let mut missing = Vec::new();
    for (document, at_least) in [("docs/qcow2-support.md", 100), ("docs/durability.md", 15), ("docs/retention.md", 10)]
    {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        assert!(!text.lines().any(|line| line.matches('`').count() % 2 == 1), "{document}: a backtick stands alone");
        let named = named_tests(&text);
        assert!(named.len() >= at_least, "{document} names {} tests", named.len());
        for (file, name) in named {
            let places = [engine.join("tests"), engine.join("src"), root.join("tests"), root.join("src")];
            let sources: Vec<String> =
                places.iter().filter_map(|place| std::fs::read_to_string(place.join(&file)).ok()).collect();
            if !sources.iter().any(|source| is_test(source, &name)) {
                missing.push(format!("{document}: {file}::{name}"));
            }
        }
    }
    assert!(missing.is_empty(), "named and not there:\n{}", missing.join("\n"));
}
