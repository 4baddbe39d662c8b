//! The `blockyard` binary: hands the command line over to the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    blockyard::cli::run(std::env::args_os())
}
