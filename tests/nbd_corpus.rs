//! The corpus of the fuzz target of the transmission phase, with a qcow2 image behind it, and every finding so far, replayed.
//!
//! `WRITE_SEEDS=1 cargo test --test nbd_corpus` writes the seeds that are generated here; what a fuzzer found is added by hand.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures of the run")]

#[path = "support/fuzzed_transmission.rs"]
mod fuzzed_transmission;

use std::path::Path;

use fuzzed_transmission::{seed, transmission};

#[test]
fn every_input_that_a_fuzzer_kept_or_found_is_survived() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/nbd_transmission");
    if std::env::var_os("WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        for (name, first) in [
            ("simple", 0),
            ("simple-frozen", 4),
            ("structured", 1),
            ("structured-frozen", 5),
            ("structured-both", 17),
            ("structured-none", 9),
            ("extended", 2),
            ("extended-frozen", 6),
            ("extended-both", 18),
            ("extended-none", 10),
        ] {
            std::fs::write(folder.join(name), seed(first)).unwrap();
        }
    }
    let (mut count, mut cuts) = (0, 0);
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if std::panic::catch_unwind(|| transmission(&bytes)).is_err() {
            panic!("{} is a finding", path.display());
        }
        for end in (0..bytes.len()).step_by(bytes.len().div_ceil(100)) {
            transmission(&bytes[..end]);
            cuts += 1;
        }
        count += 1;
    }
    println!("{count} inputs and {cuts} fronts of them");
    assert!(count >= 8, "only {count} inputs");
}
