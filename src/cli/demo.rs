//! `blockyard demo`: the whole product on this machine, without VMware, configuration or root.
//!
//! A real service, a stand-in for the node, a VM with generated or given disks: one REST call backs it up, and after changes
//! on every disk again and again; every disk of every restore point is read back over NBD and compared with what its source
//! was. Then time passes on a copy of the repository: the oldest point is merged into the next, what is left is restored
//! again, and a flipped bit is found. With `--serve` service and node stay for curl.
//!
//! In the order of a run: [`folder`] is where it all goes, [`disks`] what is backed up, [`stage`] what runs, [`state`] how
//! the disks change, [`copy`] a backup and its progress, [`restore`] the way back, [`replica`] the copy of the repository,
//! [`merge`] and [`damage`] what happens to it, [`report`] what is printed.

mod content;
mod copy;
mod damage;
mod data;
mod disks;
mod error;
mod folder;
mod generate;
mod hub;
mod merge;
mod progress;
mod replica;
mod report;
mod restore;
mod stage;
mod state;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::serve::Stop;
use super::{CliError, Exit, Output};
use crate::config::Server;
use crate::node::fake::Event;
use crate::telemetry;
use copy::Point;
use disks::DemoDisk;
pub(super) use error::DemoError;
use folder::Folder;
use replica::Replica;
use report::{Aged, Made, Story};
use stage::Stage;
use state::State;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Back up this disk, a raw image file or a block device, instead of generated ones; may be repeated. It is only read.
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    /// Keep repository, database and generated disks in this folder, which must be empty or absent.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Back up nothing: leave service and node running until Ctrl-C, ready for requests.
    #[arg(long)]
    serve: bool,
}

pub(super) async fn run(arguments: Arguments, output: &Output) -> Result<Exit, CliError> {
    // Listened for before anything is made: what a signal interrupts is also cleared away.
    let mut stop = Stop::new()?;
    telemetry::init(&Server { log: "error".to_owned(), ..Server::default() });
    let given = disks::open(&arguments.disks)?;
    let folder = Arc::new(Folder::new(arguments.keep.as_deref())?);
    let disks = interruptible(&mut stop, choose(given, &folder, output)).await?;
    let stage = interruptible(&mut stop, Stage::start(&folder, &disks)).await?;
    let done = if arguments.serve {
        serve(&mut stop, &stage, &disks, &folder, output).await
    } else {
        Box::pin(tell(&mut stop, &stage, &disks, &folder, output)).await
    };
    stage.stop().await;
    done
}

/// The given disks, or generated ones when none are given.
async fn choose(given: Vec<DemoDisk>, folder: &Arc<Folder>, output: &Output) -> Result<Vec<DemoDisk>, CliError> {
    if !given.is_empty() {
        for disk in given.iter().filter(|disk| disk.looks_like_qcow2) {
            output.note(&format!(
                "{} is a qcow2 image: its bytes are backed up as they are, not the disk inside",
                disk.path.display()
            ));
        }
        return Ok(given);
    }
    output.note("making three disks");
    // The folder stays until the files in it are finished, also when nobody waits for them any more.
    let folder = Arc::clone(folder);
    let made = tokio::task::spawn_blocking(move || generate::disks(&folder.disks())).await;
    let generated = made.map_err(|_| DemoError::Panicked)??;
    if let Some(why) = generated.without_file_system {
        output.note(&format!("disk 0 has no file system: {why}"));
    }
    Ok(generated.disks)
}

/// Waits for requests. Something changes on every disk after each snapshot, so that the next backup has something to store.
async fn serve(
    stop: &mut Stop,
    stage: &Stage,
    disks: &[DemoDisk],
    folder: &Folder,
    output: &Output,
) -> Result<Exit, CliError> {
    report::ready(stage, disks, output)?;
    tokio::select! {
        () = stop.wait() => {}
        () = change(stage, State::first(disks), output) => {}
    }
    if folder.is_kept() {
        output.note(&report::kept_service(folder));
    }
    Ok(Exit::Ok)
}

/// Presents the next state of the VM as soon as a backup client has the one before; has no end.
async fn change(stage: &Stage, mut state: State, output: &Output) {
    let mut seen = 0;
    loop {
        let log = stage.node().log();
        // A client has its snapshot when it connects, and begins with the first disk.
        let began = |event: &Event| matches!(event, Event::Connected { disk_id: 0 }).then_some(());
        log.first_after(seen, began).await;
        seen = log.count();
        state = state.next();
        stage.present(&state);
        output.note(&report::changed(&state));
    }
}

/// The whole story, and its report.
async fn tell(
    stop: &mut Stop,
    stage: &Stage,
    disks: &[DemoDisk],
    folder: &Arc<Folder>,
    output: &Output,
) -> Result<Exit, CliError> {
    let made = interruptible(stop, back_up_and_restore(stage, disks, output)).await?;
    let replica = interruptible(stop, Replica::start(folder, output)).await?;
    let aged = interruptible(stop, age(&replica, &made.points, output)).await;
    replica.stop().await;
    let story = Story { disks, made, aged: aged? };
    report::result(&story, folder, output)?;
    Ok(story.exit())
}

/// A full, and two incrementals of what changed in between; then each point comes back, and all of them are verified.
async fn back_up_and_restore(stage: &Stage, disks: &[DemoDisk], output: &Output) -> Result<Made, CliError> {
    let first = State::first(disks);
    let second = first.next();
    let third = second.next();
    let points = [
        copy::run(stage, &first, output).await?,
        copy::run(stage, &second, output).await?,
        copy::run(stage, &third, output).await?,
    ];
    let mut restores = Vec::new();
    for point in &points {
        restores.push(restore::run(stage.hub(), point, point.number.to_string(), output).await?);
    }
    let verified = verify::run(stage.hub(), &points).await?;
    output.note(&report::verified(&verified));
    Ok(Made { points, restores, verified })
}

/// What happens to a repository over the years: retention lets the oldest point go, and a disk of the machine loses a bit.
async fn age(replica: &Replica, points: &[Point; 3], output: &Output) -> Result<Aged, CliError> {
    replica.import().await?;
    let (hub, [oldest, next, newest]) = (replica.hub(), points);
    let merge = merge::run(hub, oldest, next, output).await?;
    let restores = vec![
        restore::run(hub, next, format!("{} merged", next.number), output).await?,
        restore::run(hub, newest, format!("{} upon it", newest.number), output).await?,
    ];
    let verified = verify::run(hub, &points[1..]).await?;
    output.note(&report::verified(&verified));
    let damage = damage::run(hub, &points[1..], output).await?;
    Ok(Aged { merge, restores, verified, damage })
}

/// The outcome of `work`, or an error at the first signal.
///
/// # Cancellation
/// At a signal `work` is dropped where it is.
async fn interruptible<T>(stop: &mut Stop, work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    tokio::select! {
        done = work => done,
        () = stop.wait() => Err(DemoError::Interrupted.into()),
    }
}
