//! The corpora of the fuzz targets of the handshake and of the client, and every finding so far, replayed from `fuzz/seeds/`.
//!
//! `WRITE_SEEDS=1 cargo test -p blockyard-nbd --test corpus` writes the seeds that are generated here; what a fuzzer found
//! is added by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures of the run")]

#[path = "support/fuzzed.rs"]
mod fuzzed;

use std::path::{Path, PathBuf};

use blockyard_nbd::wire::option::{InfoRequest, MetaRequest, OptionCode, WantedInfo, encode_option};
use fuzzed::NAME;

fn seeds(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target)
}

/// Handshakes of every kind, behind the byte that says how they are heard.
fn handshakes() -> Vec<(&'static str, Vec<u8>)> {
    let info = |name| InfoRequest { name, wanted: WantedInfo { name: true, description: true } }.encode();
    let base = MetaRequest::encode(NAME, &["base:allocation", "base:", "x:y"]);
    let talk = |first: u8, flags: u32, options: &[(OptionCode, &[u8])]| {
        let options = options.iter().flat_map(|(code, data)| encode_option(*code, data));
        [first].into_iter().chain(flags.to_be_bytes()).chain(options).collect::<Vec<u8>>()
    };
    let structured: (OptionCode, &[u8]) = (OptionCode::STRUCTURED_REPLY, b"");
    let go = (OptionCode::GO, &info(NAME)[..]);
    vec![
        ("go", talk(0, 3, &[go])),
        ("export-name", talk(0, 1, &[(OptionCode::EXPORT_NAME, NAME.as_bytes())])),
        ("not-fixed", talk(0, 0, &[(OptionCode::EXPORT_NAME, b"")])),
        ("list", talk(0, 3, &[(OptionCode::LIST, b""), (OptionCode::ABORT, b"bye")])),
        ("info", talk(0x20, 3, &[(OptionCode::INFO, &info("")), (OptionCode::INFO, &info("nosuch")), go])),
        ("contexts", talk(0x40, 3, &[structured, (OptionCode::SET_META_CONTEXT, &base), go])),
        ("list-contexts", talk(0, 3, &[(OptionCode::LIST_META_CONTEXT, &MetaRequest::encode(NAME, &[])), structured])),
        ("extended", talk(0, 3, &[(OptionCode::EXTENDED_HEADERS, b""), structured, go])),
        ("unknown", talk(0x60, 3, &[(OptionCode(77), b"what?"), (OptionCode::PEEK_EXPORT, b"x"), go])),
        ("starttls", talk(0, 3, &[(OptionCode::STARTTLS, b""), go])),
        ("starttls-on", talk(0x30, 3, &[structured, (OptionCode::STARTTLS, b""), go])),
        ("starttls-required", talk(0x18, 3, &[go, (OptionCode::STARTTLS, b"")])),
        ("hidden", talk(1, 3, &[(OptionCode::LIST, b""), go])),
        ("refused", talk(4, 3, &[(OptionCode::LIST, b""), go])),
        ("stopping", talk(6, 3, &[(OptionCode::INFO, &info(NAME)), go])),
        ("requests-behind", [talk(0, 3, &[go]), vec![0x25, 0x60, 0x95, 0x13], vec![0; 24]].concat()),
    ]
}

fn write_seeds() {
    let plans =
        [0u8, 1, 2, 3, 6, 7, 8, 14, 16, 18, 20, 21].map(|plan| (format!("plan-{plan}"), fuzzed::conversation(plan)));
    let handshakes = handshakes().into_iter().map(|(name, bytes)| (name.to_owned(), bytes));
    for (target, files) in [("nbd_handshake", handshakes.collect()), ("nbd_client", Vec::from(plans))] {
        std::fs::create_dir_all(seeds(target)).unwrap();
        for (name, bytes) in files {
            std::fs::write(seeds(target).join(name), bytes).unwrap();
        }
    }
}

fn replay(target: &str, run: fn(&[u8])) {
    let mut count = 0;
    for entry in std::fs::read_dir(seeds(target)).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if std::panic::catch_unwind(|| run(&bytes)).is_err() {
            panic!("{} is a finding", path.display());
        }
        // Cut anywhere it is as harmless.
        for end in (0..bytes.len()).step_by(bytes.len().div_ceil(200)) {
            run(&bytes[..end]);
        }
        count += 1;
    }
    println!("{target}: {count} inputs");
    assert!(count >= 8, "{target}: only {count} inputs");
}

#[test]
fn every_input_that_a_fuzzer_kept_or_found_is_survived() {
    if std::env::var_os("WRITE_SEEDS").is_some() {
        write_seeds();
    }
    replay("nbd_handshake", fuzzed::handshake);
    replay("nbd_client", fuzzed::client);
}
