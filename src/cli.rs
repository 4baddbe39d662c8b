//! The command line: one file per noun, one enum of all commands, one meaning per exit code.
//!
//! `serve` is the service, `demo` brings its own, `image` and `nbd` work on files, and `doctor` on a folder; everything else is a
//! client of the REST API and knows nothing that a script with curl would not.

mod backup;
mod below;
mod client;
mod demo;
mod doctor;
mod error;
mod image;
mod image_error;
mod listen;
mod nbd;
mod output;
mod point;
mod repo;
mod restore;
mod retention;
mod serve;
mod size;
mod stream;
mod table;
mod tls;
mod vm;
mod watch;

use std::ffi::OsString;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

pub use error::{CliError, Exit};
pub use output::{Format, Output};

/// Backs up all disks of a VM from one snapshot.
#[derive(Debug, Parser)]
#[command(name = "blockyard", version, propagate_version = true, after_help = error::EXIT_CODES)]
struct Cli {
    /// Form of what is printed: text for people, json for programs (one document; of `watch`, one line per event). `restore raw` is told by it, too, what to make.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    output: Vec<Printed>,
    /// Print nothing but what was asked for, and errors.
    #[arg(long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service.
    Serve(serve::Arguments),
    /// Try everything on this machine, without VMware or configuration: back up, restore, merge, damage and find it.
    Demo(demo::Arguments),
    /// The VMs that can be backed up.
    #[command(subcommand)]
    Vm(vm::Command),
    /// The folders that backups go to.
    #[command(subcommand)]
    Repo(repo::Command),
    /// Start, wait for, look at and cancel backups.
    #[command(subcommand)]
    Backup(backup::Command),
    /// The restore points that backups left.
    #[command(subcommand)]
    Point(point::Command),
    /// Serve or copy the disks of a restore point.
    #[command(subcommand, after_help = error::EXIT_CODES)]
    Restore(restore::Command),
    /// Serve one qcow2 image over NBD until SIGTERM or Ctrl-C.
    Nbd(nbd::Arguments),
    /// qcow2 images, without a service.
    #[command(subcommand, after_help = error::EXIT_CODES)]
    Image(image::Command),
    /// What a folder has for images: how they will be written there, why, and how fast.
    #[command(after_help = error::EXIT_CODES)]
    Doctor(doctor::Arguments),
}

/// How long a process that is done waits for threads that still read or write files: what an interrupted command was making is
/// removed by them. A guess.
const THREADS_LIMIT: Duration = Duration::from_secs(10);

/// Runs one command and tells the shell how it went.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = commands().try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version count as errors there, and have exit code 0. Without a terminal there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8));
        }
    };
    let output = match printed(&cli) {
        Ok(format) => Output::new(format, cli.quiet),
        Err(value) => {
            let text = format!("invalid value '{value}' for '--output <FORMAT>': text and json are possible");
            let _ = commands().error(ErrorKind::InvalidValue, text).print();
            return ExitCode::from(Exit::Usage as u8);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => return output.failure(&CliError::Runtime { source }),
    };
    let done = runtime.block_on(dispatch(cli, &output));
    // A thread that waits for a disk that hangs must not keep a process that is done.
    runtime.shutdown_timeout(THREADS_LIMIT);
    match done {
        Ok(exit) => exit.into(),
        Err(error) => output.failure(&error),
    }
}

/// All commands. Of `restore raw` the help of `--output` is another one: there it names what to make in the first place.
fn commands() -> clap::Command {
    let all = Cli::command();
    let output = all.get_arguments().find(|argument| argument.get_id() == "output").cloned();
    all.mut_subcommand("restore", |restore| {
        restore.mut_subcommand("raw", |raw| raw.args(output.map(restore::named_target)))
    })
}

/// A value of `--output`: a format, or a target of `restore raw`.
#[derive(Clone, Debug)]
enum Printed {
    Format(Format),
    Target(String),
}

impl FromStr for Printed {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Format::from_str(text, false).map_or_else(|_| Self::Target(text.to_owned()), Self::Format))
    }
}

impl Cli {
    fn targets(&self) -> impl Iterator<Item = &str> {
        self.output.iter().filter_map(|value| match value {
            Printed::Target(target) => Some(target.as_str()),
            Printed::Format(_) => None,
        })
    }
}

/// The format, the last one if there are several; or the value that is none, of a command that makes nothing.
fn printed(cli: &Cli) -> Result<Format, &str> {
    match cli.targets().next() {
        Some(target) if !matches!(&cli.command, Command::Restore(command) if command.takes_target()) => Err(target),
        _ => Ok(cli.output.iter().rev().find_map(Printed::format).unwrap_or(Format::Text)),
    }
}

impl Printed {
    fn format(&self) -> Option<Format> {
        match self {
            Self::Format(format) => Some(*format),
            Self::Target(_) => None,
        }
    }
}

async fn dispatch(cli: Cli, output: &Output) -> Result<Exit, CliError> {
    let targets: Vec<String> = cli.targets().map(str::to_owned).collect();
    match cli.command {
        Command::Serve(arguments) => serve::run(arguments, output).await,
        Command::Demo(arguments) => Box::pin(demo::run(arguments, output)).await,
        Command::Vm(command) => vm::run(command, output).await,
        Command::Repo(command) => repo::run(command, output).await,
        Command::Backup(command) => backup::run(command, output).await,
        Command::Point(command) => point::run(command, output).await,
        Command::Restore(command) => restore::run(command, &targets, output).await,
        Command::Nbd(arguments) => nbd::run(arguments, output).await,
        Command::Image(command) => image::run(command, output).await,
        Command::Doctor(arguments) => doctor::run(arguments, output).await,
    }
}
