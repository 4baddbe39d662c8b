//! Bytes as the handshake of a client. What is asserted, and why, stands with the function, which an ordinary test calls for the corpus.
#![no_main]

#[path = "../../nbd/tests/support/fuzzed.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::handshake(bytes));
