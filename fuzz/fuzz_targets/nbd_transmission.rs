//! Bytes as requests, with a qcow2 image behind the server. What is asserted, and why, stands with the function, which an ordinary test calls for the corpus.
#![no_main]

#[path = "../../tests/support/fuzzed_transmission.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::transmission(bytes));
