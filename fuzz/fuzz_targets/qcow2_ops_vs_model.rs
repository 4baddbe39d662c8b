//! Operations on a new image against an array of bytes. What is asserted, and why, stands with the function, which an ordinary test calls for the corpus.
#![no_main]

#[path = "../../qcow2/tests/support/fuzzed.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::operations(bytes));
