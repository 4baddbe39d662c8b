//! Holds the invariants of ARCHITECTURE.md that can be read off the sources.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

/// A source file with its path from the root of the repository.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Lines of code: without comments, which may name what they like.
    fn code(&self) -> impl Iterator<Item = &str> {
        self.text.lines().map(str::trim).filter(|line| !line.starts_with("//"))
    }

    fn names(&self, word: &str) -> bool {
        self.code().any(|line| line.contains(word))
    }
}

/// Every file with this ending under a folder of the repository. A folder that is missing fails the test: the rule would
/// hold for nothing.
fn sources(folder: &str, ending: &str) -> Vec<Source> {
    fn walk(path: &Path, files: &mut Vec<PathBuf>) {
        if path.is_file() {
            return files.push(path.to_owned());
        }
        for entry in std::fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
            walk(&entry.unwrap().path(), files);
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    walk(&root.join(folder), &mut files);
    files.retain(|path| path.to_string_lossy().ends_with(ending));
    files.sort();
    assert!(!files.is_empty(), "no {ending} in {folder}");
    let relative = |path: &Path| path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
    files.iter().map(|path| Source { path: relative(path), text: std::fs::read_to_string(path).unwrap() }).collect()
}

fn all_rust() -> Vec<Source> {
    ["src", "nbd", "qcow2", "tests", "benches"]
        .into_iter()
        .filter(|folder| {
            Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).read_dir().is_ok_and(|mut d| d.next().is_some())
        })
        .flat_map(|folder| sources(folder, ".rs"))
        .collect()
}

#[test]
fn nbd_and_qcow2_do_not_know_each_other() {
    for (folder, other) in [("nbd", "qcow2"), ("qcow2", "nbd")] {
        let manifest = sources(folder, "Cargo.toml");
        for file in manifest.into_iter().chain(sources(&format!("{folder}/src"), ".rs")) {
            for name in [format!("blockyard-{other}"), format!("blockyard_{other}")] {
                assert!(!file.names(&name), "{} names {name}", file.path);
            }
        }
    }
}

#[test]
fn only_one_file_names_both_engines() {
    let both = |file: &Source| file.names("blockyard_nbd") && file.names("blockyard_qcow2");
    let found: Vec<String> = sources("src", ".rs").into_iter().filter(both).map(|file| file.path).collect();
    assert!(found.iter().all(|path| path == "src/export.rs"), "{found:?}");
}

#[test]
fn service_never_needs_mount_or_privileges() {
    // What a restore through the kernel would need: other programs, block devices, mounts, another user.
    let words = ["process::Command", "/dev/nbd", "/dev/loop", "mount::", "setuid", "seteuid", "capset", "ioctl("];
    for file in sources("src", ".rs") {
        // The doctor reads which mount a folder is on.
        let words = words.iter().filter(|word| !(**word == "mount::" && file.path.starts_with("src/cli/doctor")));
        // Tests may ask QEMU's tools.
        let code: Vec<&str> = file.code().take_while(|line| *line != "#[cfg(test)]").collect();
        for word in words {
            assert!(!code.iter().any(|line| line.contains(word)), "{} names {word}", file.path);
        }
    }
}

#[test]
fn sql_lives_only_under_store() {
    let statements = ["SELECT ", "INSERT INTO ", "UPDATE ", "DELETE FROM ", "CREATE TABLE ", "PRAGMA ", "sqlx::"];
    for file in sources("src", ".rs") {
        if file.path.starts_with("src/store") {
            continue;
        }
        for statement in statements {
            assert!(!file.names(statement), "{} holds {statement:?}", file.path);
        }
    }
}

#[test]
fn protocol_and_format_are_pure() {
    let pure = [
        "nbd/src/wire",
        "nbd/src/handshake.rs",
        "nbd/src/handshake",
        "nbd/src/transmission.rs",
        "qcow2/src/format",
        "qcow2/src/geometry.rs",
    ];
    for file in pure.into_iter().flat_map(|path| sources(path, ".rs")) {
        for word in ["tokio", "std::fs", "std::net", "std::time", "File", "Socket", "Instant", "async fn"] {
            assert!(!file.names(word), "{} names {word}", file.path);
        }
    }
}

#[test]
fn unsafe_code_has_two_homes() {
    const HOMES: [&str; 2] = ["qcow2/src/storage/ring.rs", "qcow2/src/huge.rs"];
    let has_unsafe = |file: &Source| {
        file.code().any(|line| {
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|word| line.contains(word))
        })
    };
    let found: Vec<String> = all_rust()
        .into_iter()
        .filter(|file| file.path != "tests/tidy.rs" && !HOMES.contains(&file.path.as_str()) && has_unsafe(file))
        .map(|file| file.path)
        .collect();
    assert!(found.is_empty(), "{found:?}");
    for path in ["src/lib.rs", "src/main.rs", "nbd/src/lib.rs"] {
        let file = &sources(path, ".rs")[0];
        assert!(file.names("#![forbid(unsafe_code)]"), "{path} does not forbid unsafe code");
    }
    assert!(sources("qcow2/src/lib.rs", ".rs")[0].names("#![deny(unsafe_code)]"));
    for home in HOMES {
        let text = &sources(home, ".rs")[0].text;
        let blocks = text.matches("unsafe {").count() + text.matches("\nunsafe impl").count();
        assert_eq!(text.matches("// SAFETY: ").count(), blocks, "{home}: a reason for each block");
    }
}

#[test]
fn every_file_says_what_it_holds() {
    for file in all_rust() {
        assert!(file.text.starts_with("//!"), "{} has no header", file.path);
        // Test folders may follow the customs of cargo, where `common` means "no test of its own".
        for word in ["util", "helper", "manager", "common"].into_iter().filter(|_| !file.path.contains("tests/")) {
            assert!(!file.path.contains(word), "{} says nothing about what it holds", file.path);
        }
    }
}

#[test]
fn packages_share_versions_and_lints() {
    for manifest in ["nbd/Cargo.toml", "qcow2/Cargo.toml"] {
        let file = &sources(manifest, ".toml")[0];
        for line in ["version.workspace = true", "edition.workspace = true", "[lints]\nworkspace = true"] {
            assert!(file.text.contains(line), "{manifest} lacks {line:?}");
        }
    }
}

#[test]
fn every_kind_of_event_and_every_alert_has_a_row_in_its_page() {
    let page = &sources("docs/events.md", ".md")[0].text;
    let row = |word: &str| page.lines().any(|line| line.starts_with(&format!("| `{word}` |")));
    for kind in blockyard::store::events::KINDS {
        assert!(row(kind), "docs/events.md has no row for the kind {kind}");
    }
    let words = |line: &str| -> Vec<String> {
        let quoted = line.split('"').skip(1).step_by(2);
        quoted.filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    let mut alerts = 0;
    for file in sources("src", ".rs") {
        for value in file.code().filter_map(|line| line.strip_prefix("\"alert\": ")) {
            let value = value.split(',').next().unwrap();
            // A name stands for the words of the line that gives it to them.
            let named =
                |line: &&str| line.contains(&format!("const {value}:")) || line.contains(&format!("let {value} ="));
            let words = match value.starts_with('"') {
                true => words(value),
                false => file.code().filter(named).flat_map(words).collect(),
            };
            assert!(!words.is_empty(), "{}: which alert is {value}?", file.path);
            for word in words {
                assert!(row(&word), "docs/events.md has no row for the alert {word}");
                alerts += 1;
            }
        }
    }
    assert_eq!(
        alerts,
        page.lines()
            .skip_while(|line| !line.starts_with("| `alert` | when"))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .count(),
        "docs/events.md has alerts that nobody tells"
    );
}
