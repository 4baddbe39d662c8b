//! Where other servers give up: each test shows that they do, and that ours does not.

use std::io::{ErrorKind as Io, Read};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::{Device, ErrorKind, Options, Tls};

use crate::common::certificates::Pki;
use crate::common::devices::{Call, Disk as Export, Faulty, Gate, Hooked, Mem};
use crate::common::servers::options;
use crate::common::soon;
use crate::conversation::{Player, Request, Step, command, flag, option};
use crate::programs::Folder;
use crate::script::{Form, NAME, SIZE, enter, one, request};
use crate::servers::{Ours, Theirs, glance};

/// A disk of QEMU that takes a minute for each read: none ends before its test.
const SLOW: [&str; 5] =
    ["qemu-nbd", "-t", "-e0", "--image-opts", "driver=null-co,size=1M,read-zeroes=off,latency-ns=60000000000"];

fn ours(device: Arc<dyn Device>) -> Ours {
    Ours::start(Export::new(NAME, SIZE, device), options())
}

/// A client in the transmission phase.
fn entered(stream: UnixStream, form: Form, name: &str) -> Player {
    let mut player = Player::new(stream);
    for step in enter(form, name) {
        let line = player.step(&step, false);
        assert!(line.starts_with("NBDMAGIC") || line.ends_with("ACK"), "{step:?}: {line}");
    }
    player
}

fn reads(count: u64) -> Vec<Request> {
    (0..count).map(|number| request(command::READ, 0, number * 4096, 4096)).collect()
}

#[test]
fn an_unreadable_sector_does_not_cost_the_connection() {
    const BAD: u64 = 32768;
    let conversation = |mut player: Player| {
        [one(command::READ, 0, 0, 65536), one(command::READ, 0, 0, 4096)].map(|step| player.step(&step, false))
    };
    let faulty = Faulty { call: Call::Read, byte: BAD, error: ErrorKind::Io };
    let ours = ours(Hooked::new(Mem::filled(SIZE, 1), faulty));
    let [bad, good] = conversation(entered(ours.connect(), Form::Structured, NAME));
    assert_eq!(bad, "EIO");
    assert!(good.starts_with("OK"), "{good}");

    let folder = Folder::new();
    let file = folder.file("disk.raw");
    std::fs::write(&file, vec![1; SIZE as usize]).unwrap();
    let options = format!(
        "driver=blkdebug,image.driver=file,image.filename={file},inject-error.0.event=none,\
         inject-error.0.iotype=read,inject-error.0.sector={},inject-error.0.errno=5",
        BAD / 512
    );
    let qemu = Theirs::start(folder, &["qemu-nbd", "-t", "-e", "0", "--image-opts", &options]);
    let [bad, _] = conversation(entered(qemu.connect(), Form::Structured, ""));
    assert_eq!(bad, "closes", "qemu-nbd");
}

#[test]
fn a_flag_that_was_not_offered_does_not_cost_the_server() {
    let zero = one(command::WRITE_ZEROES, flag::FAST_ZERO, 0, 4096);
    let export = Export::new(NAME, SIZE, Mem::new(SIZE)).without_fast_zero();
    let ours = Ours::start(export, options());
    let mut player = entered(ours.connect(), Form::Simple, NAME);
    assert_eq!(player.step(&zero, false), "EINVAL");
    assert!(player.step(&one(command::READ, 0, 0, 512), false).starts_with("OK"));

    let folder = Folder::new();
    let file = folder.file("disk.raw");
    std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
    let nbdkit = Theirs::start(folder, &["nbdkit", "-f", "file", &file]);
    let mut player = entered(nbdkit.connect(), Form::Simple, "");
    assert_eq!(player.step(&zero, false), "closes", "nbdkit");
    const SIGABRT: i32 = 6;
    assert_eq!(nbdkit.process.wait().signal(), Some(SIGABRT), "nbdkit");
}

#[test]
fn a_goodbye_waits_for_the_answers_before_it() {
    let goodbye = Step::Disconnect(reads(8), request(command::DISC, 0, 0, 0));
    let gated = Hooked::new(Mem::filled(SIZE, 1), Gate::new(Call::Read));
    let ours = ours(gated.clone());
    let mut player = entered(ours.connect(), Form::Simple, NAME);
    ours.runtime.spawn(async move {
        gated.hook.arrived(8).await;
        gated.hook.open(8);
    });
    assert_eq!(player.step(&goodbye, false), "answers 8 of 8, then closes");

    let qemu = Theirs::start(Folder::new(), &SLOW);
    let mut player = entered(qemu.connect(), Form::Simple, "");
    assert_eq!(player.step(&goodbye, false), "answers 0 of 8, then closes", "qemu-nbd");
}

#[test]
fn a_stop_waits_for_what_is_under_way() {
    let read = reads(1);
    let gated = Hooked::new(Mem::filled(SIZE, 1), Gate::new(Call::Read));
    let Ours { handle, runtime, folder } = ours(gated.clone());
    let mut player = entered(UnixStream::connect(folder.file("socket")).unwrap(), Form::Simple, NAME);
    player.send(&read).unwrap();
    runtime.block_on(soon("the read", gated.hook.arrived(1)));
    let stop = runtime.spawn(handle.stop(Duration::from_secs(60)));
    // It has begun when later requests are turned away.
    let flush = one(command::FLUSH, 0, 0, 0);
    let turned_away = std::iter::repeat_with(|| player.step(&flush, false)).find(|line| line != "OK");
    assert_eq!(turned_away.as_deref(), Some("ESHUTDOWN"));
    gated.hook.open(1);
    let answer = player.hear(&read, false, false).unwrap();
    assert!(answer.starts_with("OK"), "{answer}");
    drop(player);
    runtime.block_on(soon("the stop", stop)).unwrap();

    let qemu = Theirs::start(Folder::new(), &SLOW);
    let mut player = entered(qemu.connect(), Form::Structured, "");
    player.send(&read).unwrap();
    // It is under way when a later request, that waits for no disk, is answered.
    assert_eq!(player.step(&one(command::TRIM, 0, SIZE, 512), false), "EINVAL");
    qemu.process.terminate();
    let answer = player.hear(&read, false, false);
    assert_eq!(answer.unwrap_err().kind(), Io::UnexpectedEof, "qemu-nbd");
}

#[test]
fn a_client_too_many_is_told_so_at_once() {
    let mut few = options();
    few.connections_per_export = 1;
    let ours = Ours::start(Export::new(NAME, SIZE, Mem::new(SIZE)), few);
    let mut first = entered(ours.connect(), Form::Simple, NAME);
    let mut second = Player::new(ours.connect());
    let lines: Vec<String> = enter(Form::Simple, NAME).iter().map(|step| second.step(step, false)).collect();
    assert_eq!(lines[1], "ERR_POLICY", "{lines:?}");
    assert!(first.step(&one(command::READ, 0, 0, 512), false).starts_with("OK"));

    // Without options it serves one client and ends.
    let folder = Folder::new();
    let file = folder.file("disk.raw");
    std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
    let qemu = Theirs::start(folder, &["qemu-nbd", "-f", "raw", &file]);
    let mut first = entered(qemu.connect(), Form::Simple, "");
    let mut second = qemu.connect();
    for _ in 0..100 {
        assert!(first.step(&one(command::READ, 0, 0, 512), false).starts_with("OK"));
    }
    assert_eq!(glance(&mut second).unwrap_err().kind(), Io::WouldBlock, "qemu-nbd: no greeting");
    first.step(&Step::Disconnect(Vec::new(), request(command::DISC, 0, 0, 0)), false);
    assert!(qemu.process.wait().success(), "qemu-nbd");
    let heard = second.read(&mut [0; 18]);
    assert!(!matches!(heard, Ok(1..)), "qemu-nbd: it was never greeted: {heard:?}");
}

#[test]
fn an_abort_is_acknowledged_before_tls() {
    let abort = [Step::Hello(3), Step::Option(option::ABORT, Vec::new())];
    let tls = Tls::Required(Pki::new().server(&[]));
    let ours = Ours::start(Export::new(NAME, SIZE, Mem::new(SIZE)), Options { tls, ..options() });
    let mut player = Player::new(ours.connect());
    assert_eq!(abort.clone().map(|step| player.step(&step, false))[1], "ACK");

    let folder = Folder::new();
    std::fs::write(folder.file("keys.psk"), "client:6162636465666768").unwrap();
    let file = folder.file("disk.raw");
    std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
    let credentials = format!("tls-creds-psk,id=tls,endpoint=server,dir={}", folder.0.display());
    let line = ["qemu-nbd", "-t", "--object", &credentials, "--tls-creds", "tls", "-f", "raw", &file];
    let qemu = Theirs::start(folder, &line);
    let mut player = Player::new(qemu.connect());
    assert_eq!(abort.map(|step| player.step(&step, false))[1], "ERR_TLS_REQD", "qemu-nbd");
}
