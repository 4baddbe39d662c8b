//! TLS from both sides: who may speak when, what is forgotten at the switch, who is let in, and what an attacker can break.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::client::{Client, ClientError, Negotiation, Uri};
use blockyard_nbd::tls::{ClientTls, ServerTls, TlsError, TlsFiles};
use blockyard_nbd::wire::Command;
use blockyard_nbd::wire::option::{
    ExportInfo, INFO_EXPORT, InfoRequest, MetaRequest, OptionCode, ReplyType, WantedInfo, encode_option, encode_reply,
    greeting,
};
use blockyard_nbd::wire::reply::ReplyHeader;
use blockyard_nbd::{Budget, BudgetLimits, Durability, Limits, Options, Stopped, Tls};
use common::certificates::{Authority, CLIENT, CLIENT_TEXT, EXPIRED, NAMES, NOT_YET, Pki, VALID, files, folder};
use common::devices::{Call, Disk, Gate, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::{pattern, request, soon, verdict};
use rcgen::DnType;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};

const SIZE: u64 = 1 << 20;
const PIPE: usize = 64 << 10;
const ACK: ReplyType = ReplyType::ACK;
const BOTH: &[&SupportedProtocolVersion] = &[&TLS12, &TLS13];

async fn served(tls: Tls) -> Served {
    Served::with(Disk::new(NAME, SIZE, Mem::new(SIZE)), Options { tls, ..options() }).await
}

fn go() -> Vec<u8> {
    InfoRequest { name: NAME, wanted: WantedInfo::default() }.encode()
}

fn base() -> Vec<u8> {
    MetaRequest::encode(NAME, &["base:allocation"])
}

/// Sends an option and tells the replies up to the one that ends them.
async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    raw: &mut Raw<S>,
    code: OptionCode,
    data: &[u8],
) -> Vec<(ReplyType, Vec<u8>)> {
    raw.option(code, data).await.unwrap();
    let mut replies = Vec::new();
    loop {
        let (header, data) = soon("an option reply", raw.option_reply()).await.unwrap();
        assert_eq!(header.code, code);
        replies.push((header.reply, data));
        if header.reply == ACK || header.reply.is_error() {
            return replies;
        }
    }
}

async fn last<S: AsyncRead + AsyncWrite + Unpin>(raw: &mut Raw<S>, code: OptionCode, data: &[u8]) -> ReplyType {
    ask(raw, code, data).await.pop().unwrap().0
}

/// A client's side that the test makes itself, from the folder's files.
fn connector(folder: &Path, versions: &[&'static SupportedProtocolVersion]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("ca-cert.pem")).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(ring::default_provider().into());
    let builder = builder.with_protocol_versions(versions).unwrap().with_root_certificates(roots);
    let certificate = CertificateDer::from_pem_file(folder.join("client-cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join("client-key.pem")).unwrap();
    Arc::new(builder.with_client_auth_cert(vec![certificate], key).unwrap()).into()
}

/// Greets and gets the ACK of STARTTLS.
async fn upgrading(served: &Served) -> Raw<DuplexStream> {
    let mut raw = Raw(served.pipe(PIPE));
    raw.greet(3).await.unwrap();
    assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"").await, ACK);
    raw
}

/// Goes on in TLS where the ACK was received.
async fn secure(raw: Raw<DuplexStream>, connector: &TlsConnector) -> Raw<TlsStream<DuplexStream>> {
    let name = ServerName::try_from("localhost").unwrap();
    Raw(soon("the TLS handshake", connector.connect(name, raw.0)).await.unwrap())
}

/// A connection in the transmission phase, in TLS, whose bytes the test writes itself.
async fn entered(served: &Served, connector: &TlsConnector) -> Raw<TlsStream<DuplexStream>> {
    let mut raw = secure(upgrading(served).await, connector).await;
    assert_eq!(last(&mut raw, OptionCode::GO, &go()).await, ACK);
    raw
}

/// Where a server is, for clients with the certificates of this folder.
fn uri(served: &Served, host: &str, folder: &Path) -> Uri {
    let plain = served.handle.uris().remove(0);
    let (_, place) = plain.split_once("://127.0.0.1:").unwrap();
    format!("nbds://{host}:{place}?tls-certificates={}", folder.display()).parse().unwrap()
}

/// A client that does everything right is served.
async fn is_well(served: &Served, pki: &Pki) {
    let client = soon("a good client", Client::connect(&uri(served, "localhost", pki.folder.path()))).await.unwrap();
    client.write(7, &b"hello"[..], Durability::BeforeReply).await.unwrap();
    assert_eq!(client.read(6, 7).await.unwrap(), b"\0hello\0");
    client.disconnect().await.unwrap();
}

/// Every option with data that mean something and with some that do not, without those that end the handshake.
fn questions() -> Vec<(OptionCode, Vec<u8>)> {
    let mut questions = Vec::new();
    for code in [3, 4, 6, 8, 9, 10, 11, 12, 0xffff, u32::MAX].map(OptionCode) {
        questions.extend([(code, Vec::new()), (code, b"xyz".to_vec()), (code, vec![0; 70_000])]);
    }
    questions.extend([OptionCode::INFO, OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT].map(|code| {
        let data = if code == OptionCode::INFO { go() } else { base() };
        (code, data)
    }));
    let stranger = InfoRequest { name: "stranger", wanted: WantedInfo::default() }.encode();
    questions.extend([(OptionCode::INFO, stranger.clone()), (OptionCode::GO, stranger), (OptionCode::GO, Vec::new())]);
    questions
}

#[tokio::test]
async fn without_tls_the_server_says_so_and_goes_on() {
    let served = served(Tls::Off).await;
    let mut raw = Raw(served.pipe(PIPE));
    raw.greet(3).await.unwrap();
    assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"").await, ReplyType::ERR_POLICY);
    assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"x").await, ReplyType::ERR_INVALID);
    for (code, data) in questions() {
        assert_ne!(last(&mut raw, code, &data).await, ReplyType::ERR_TLS_REQD, "{code:?}");
    }
    assert_eq!(last(&mut raw, OptionCode::GO, &go()).await, ACK);
}

#[tokio::test(start_paused = true)]
async fn where_tls_is_required_every_option_is_told_so_until_it_is_started() {
    let pki = Pki::new();
    let served = served(Tls::Required(pki.server(&[]))).await;
    let mut raw = Raw(served.pipe(PIPE));
    raw.greet(3).await.unwrap();
    let good = [(OptionCode::GO, go()), (OptionCode::STRUCTURED_REPLY, Vec::new())];
    for (code, data) in questions().into_iter().chain(good.clone()) {
        assert_eq!(last(&mut raw, code, &data).await, ReplyType::ERR_TLS_REQD, "{code:?} with {} bytes", data.len());
    }
    assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"x").await, ReplyType::ERR_INVALID);
    assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"").await, ACK);
    let mut raw = secure(raw, &connector(pki.folder.path(), BOTH)).await;
    for (code, data) in questions() {
        assert_ne!(last(&mut raw, code, &data).await, ReplyType::ERR_TLS_REQD, "{code:?} with {} bytes", data.len());
    }
    assert_eq!(last(&mut raw, OptionCode::GO, &go()).await, ACK);

    // What cannot be answered politely is not answered.
    for (flags, code, data) in [
        (3, OptionCode::EXPORT_NAME, NAME.as_bytes()),
        (0, OptionCode::EXPORT_NAME, NAME.as_bytes()),
        (2, OptionCode::EXPORT_NAME, NAME.as_bytes()),
        (2, OptionCode::STARTTLS, b""),
    ] {
        let mut raw = Raw(served.pipe(PIPE));
        raw.greet(flags).await.unwrap();
        // A server that has closed takes nothing.
        let _ = raw.option(code, data).await;
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"", "{flags} {code:?}");
    }
    // A client that cannot start TLS need not say more to be turned away.
    let start = tokio::time::Instant::now();
    let mut raw = Raw(served.pipe(PIPE));
    raw.greet(2).await.unwrap();
    assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
    assert!(start.elapsed() < Duration::from_secs(5), "not only after the deadline of the handshake");
    // Leaving is always allowed.
    for data in [&b""[..], b"why?"] {
        let mut raw = Raw(served.pipe(PIPE));
        raw.greet(3).await.unwrap();
        assert_eq!(last(&mut raw, OptionCode::ABORT, data).await, ACK);
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
    }
}

#[tokio::test]
async fn options_are_answered_alike_without_tls_beside_it_and_in_it() {
    let pki = Pki::new();
    let (off, on) = (served(Tls::Off).await, served(Tls::On(pki.server(&[]))).await);
    let required = served(Tls::Required(pki.server(&[]))).await;
    let connector = connector(pki.folder.path(), BOTH);
    let (mut bare, mut beside) = (Raw(off.pipe(PIPE)), Raw(on.pipe(PIPE)));
    bare.greet(3).await.unwrap();
    beside.greet(3).await.unwrap();
    let mut inside = secure(upgrading(&on).await, &connector).await;
    let mut forced = secure(upgrading(&required).await, &connector).await;
    for (code, data) in questions().into_iter().chain([(OptionCode::GO, go())]) {
        let answer = ask(&mut bare, code, &data).await;
        assert_eq!(ask(&mut beside, code, &data).await, answer, "{code:?} beside TLS");
        assert_eq!(ask(&mut inside, code, &data).await, answer, "{code:?} in TLS");
        assert_eq!(ask(&mut forced, code, &data).await, answer, "{code:?} in required TLS");
    }
    // An export that is served both ways is served in the old way, too.
    let mut raw = Raw(on.pipe(PIPE));
    raw.greet(2).await.unwrap();
    raw.option(OptionCode::EXPORT_NAME, NAME.as_bytes()).await.unwrap();
    assert_eq!(raw.receive(10).await.unwrap()[..8], SIZE.to_be_bytes());
}

#[tokio::test]
async fn tls_is_started_once() {
    let pki = Pki::new();
    for tls in [Tls::On(pki.server(&[])), Tls::Required(pki.server(&[]))] {
        let served = served(tls).await;
        let mut raw = secure(upgrading(&served).await, &connector(pki.folder.path(), BOTH)).await;
        for data in [&b""[..], b"x"] {
            assert_eq!(last(&mut raw, OptionCode::STARTTLS, data).await, ReplyType::ERR_INVALID);
        }
        assert_eq!(last(&mut raw, OptionCode::GO, &go()).await, ACK);
    }
}

/// CVE-2021-3716: options that a stranger sent in plain text were in force inside TLS.
#[tokio::test]
async fn what_was_agreed_in_plain_text_is_forgotten() {
    const DF: u16 = 0x80;
    let pki = Pki::new();
    let served = served(Tls::On(pki.server(&[]))).await;
    let connector = connector(pki.folder.path(), BOTH);
    let mut raw = Raw(served.pipe(PIPE));
    raw.greet(3).await.unwrap();
    assert_eq!(last(&mut raw, OptionCode::STRUCTURED_REPLY, b"").await, ACK);
    assert_eq!(ask(&mut raw, OptionCode::SET_META_CONTEXT, &base()).await.len(), 2, "a context and the ACK");
    assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"").await, ACK);
    let mut raw = secure(raw, &connector).await;
    assert_eq!(last(&mut raw, OptionCode::SET_META_CONTEXT, &base()).await, ReplyType::ERR_INVALID);
    let replies = ask(&mut raw, OptionCode::GO, &go()).await;
    let (_, info) = replies.iter().find(|(_, data)| data.starts_with(&INFO_EXPORT.to_be_bytes())).unwrap();
    let info = ExportInfo::decode(info[2..].try_into().unwrap()).unwrap();
    assert_eq!((info.size, info.flags.0 & DF), (SIZE, 0));
    raw.request(request(Command::READ, 1, 0, 512), b"").await.unwrap();
    let reply = soon("a reply", raw.reply()).await.unwrap();
    assert_eq!(reply.0, ReplyHeader::Simple { errno: 0, cookie: 1 });
    raw.receive(512).await.unwrap();
    raw.request(request(Command::BLOCK_STATUS, 2, 0, 512), b"").await.unwrap();
    assert_eq!(verdict(&soon("a reply", raw.reply()).await.unwrap()), (22, 2));

    // Nor are extended headers in force: they would demand another magic, and forbid EXPORT_NAME.
    let mut raw = Raw(served.pipe(PIPE));
    raw.greet(3).await.unwrap();
    assert_eq!(last(&mut raw, OptionCode::EXTENDED_HEADERS, b"").await, ACK);
    assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"").await, ACK);
    let mut raw = secure(raw, &connector).await;
    raw.option(OptionCode::EXPORT_NAME, NAME.as_bytes()).await.unwrap();
    assert_eq!(soon("the size", raw.receive(10)).await.unwrap()[..8], SIZE.to_be_bytes());
    raw.request(request(Command::FLUSH, 3, 0, 0), b"").await.unwrap();
    assert_eq!(verdict(&soon("a reply", raw.reply()).await.unwrap()), (0, 3));

    // Structured replies are there for who asks for them in TLS.
    let mut raw = secure(upgrading(&served).await, &connector).await;
    assert_eq!(last(&mut raw, OptionCode::STRUCTURED_REPLY, b"").await, ACK);
    assert_eq!(ask(&mut raw, OptionCode::SET_META_CONTEXT, &base()).await.len(), 2);
}

/// The other half of CVE-2021-3716: requests that a stranger sent behind STARTTLS were carried out inside TLS.
#[tokio::test]
async fn bytes_behind_starttls_close_the_connection() {
    let pki = Pki::new();
    let served = served(Tls::On(pki.server(&[]))).await;
    for behind in [encode_option(OptionCode::GO, &go()), encode_option(OptionCode::ABORT, b""), vec![0x16], vec![0]] {
        let mut raw = Raw(served.pipe(PIPE));
        raw.greet(3).await.unwrap();
        raw.send(&[encode_option(OptionCode::STARTTLS, b""), behind.clone()].concat()).await.unwrap();
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"", "not even an ACK");

        // Behind the ACK they are no TLS.
        let mut raw = upgrading(&served).await;
        raw.send(&behind).await.unwrap();
        raw.0.shutdown().await.unwrap();
        let told = soon("the close", raw.receive_all()).await.unwrap();
        assert!(told.is_empty() || told[0] == 0x15, "nothing or an alert, not {told:?}");
    }
    assert_eq!(served.stats.snapshot().accepted, 0);
    is_well(&served, &pki).await;
}

#[tokio::test]
async fn garbage_for_a_hello_ends_that_connection_only() {
    let pki = Pki::new();
    let served = served(Tls::Required(pki.server(&[]))).await;
    let hello = {
        // A real hello, to be cut.
        let (ours, mut theirs) = tokio::io::duplex(PIPE);
        let connector = connector(pki.folder.path(), BOTH);
        tokio::spawn(async move { connector.connect(ServerName::try_from("localhost").unwrap(), ours).await });
        let mut hello = vec![0; 5];
        theirs.read_exact(&mut hello).await.unwrap();
        let length = usize::from(u16::from_be_bytes([hello[3], hello[4]]));
        hello.resize(5 + length, 0);
        theirs.read_exact(&mut hello[5..]).await.unwrap();
        hello
    };
    assert!(hello.len() > 100);
    let mut garbage = vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0xff; 20_000],
        vec![0; 20_000],
        // A record of more than the longest, an alert, application data, a hello of nothing, and one that lies.
        [&[0x16, 3, 1, 0xff, 0xff][..], &[1; 20_000]].concat(),
        vec![0x15, 3, 3, 0, 2, 2, 0],
        vec![0x17, 3, 3, 0, 1, 0],
        vec![0x16, 3, 1, 0, 4, 1, 0, 0, 0],
        vec![0x16, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],
    ];
    garbage.extend((0..hello.len()).step_by(7).map(|cut| hello[..cut].to_vec()));
    garbage.extend((5..hello.len()).step_by(11).map(|at| {
        let mut hello = hello.clone();
        hello[at] ^= 0xff;
        hello
    }));
    let cases = garbage.len();
    for bytes in garbage {
        let mut raw = upgrading(&served).await;
        // A server that has closed takes nothing.
        let _ = raw.send(&bytes).await;
        let _ = raw.0.shutdown().await;
        let told = soon("the close", raw.receive_all()).await.unwrap();
        assert!(told.is_empty() || matches!(told[0], 0x15 | 0x16), "{told:?} after {bytes:?}");
    }
    assert!(cases > 50, "{cases} hellos");
    is_well(&served, &pki).await;
    served.connections(0).await;
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_the_handshake_covers_tls() {
    let pki = Pki::new();
    let served = served(Tls::Required(pki.server(&[]))).await;
    let connector = connector(pki.folder.path(), BOTH);
    for drips in [false, true] {
        let start = tokio::time::Instant::now();
        let mut raw = upgrading(&served).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        raw.send(&[0x16, 3, 1]).await.unwrap();
        if drips {
            // A byte of a long hello each second.
            raw.send(&[0x20, 0, 1, 0, 0x1f, 0xfc]).await.unwrap();
            while raw.send(&[0]).await.is_ok() && start.elapsed() < Duration::from_secs(60) {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        assert_eq!(raw.receive_all().await.unwrap_or_default(), b"");
        let took = start.elapsed();
        assert!((10..=12).contains(&took.as_secs()), "{took:?}");
    }
    // Neither does TLS start it again.
    let start = tokio::time::Instant::now();
    let raw = upgrading(&served).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let mut raw = secure(raw, &connector).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(last(&mut raw, OptionCode::LIST, b"").await, ACK);
    let _ = raw.receive_all().await;
    assert!((10..=11).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    // In the transmission phase there is no deadline.
    let mut raw = entered(&served, &connector).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    raw.request(request(Command::FLUSH, 9, 0, 0), b"").await.unwrap();
    assert_eq!(verdict(&raw.reply().await.unwrap()), (0, 9));
}

#[tokio::test]
async fn a_tls_handshake_counts_as_half_open() {
    let pki = Pki::new();
    let limits = Limits { half_open: 2, ..Limits::default() };
    let options = Options { tls: Tls::Required(pki.server(&[])), limits, ..options() };
    let served = Served::with(Disk::new(NAME, SIZE, Mem::new(SIZE)), options).await;
    let mut first = upgrading(&served).await;
    let second = upgrading(&served).await;
    let third = upgrading(&served).await;
    assert_eq!(soon("the eviction of the oldest", first.receive_all()).await.unwrap(), b"");
    let connector = connector(pki.folder.path(), BOTH);
    let mut second = secure(second, &connector).await;
    let mut third = secure(third, &connector).await;
    // And so does what follows it, up to the transmission phase.
    let fourth = upgrading(&served).await;
    let _ = soon("the eviction of the oldest", second.receive_all()).await;
    assert_eq!(last(&mut third, OptionCode::GO, &go()).await, ACK);
    let mut fourth = secure(fourth, &connector).await;
    assert_eq!(last(&mut fourth, OptionCode::GO, &go()).await, ACK);
    is_well(&served, &pki).await;
}

#[tokio::test]
async fn only_clients_with_the_right_certificate_get_in() {
    let pki = Pki::new();
    let (other, imposter) = (Authority::called("Another root"), Authority::new());
    let same_name = |organisation| [(DnType::OrganizationName, organisation), (DnType::CommonName, "backup-1")];
    let with = |pair| folder(&pki.authority, None, Some(&pair));
    let mine = |subject: &[(DnType, &str)]| with(pki.authority.client(subject, VALID));
    let reversed = [CLIENT[1].clone(), CLIENT[0].clone()];
    let longer = [CLIENT[0].clone(), (DnType::CommonName, "backup-10")];
    let served = served(Tls::Required(pki.server(&["CN=other", CLIENT_TEXT]))).await;
    for (client, alert, what) in [
        (folder(&pki.authority, None, None), "CertificateRequired", "no certificate"),
        (with(other.client(CLIENT, VALID)), "UnknownCA", "another authority"),
        (with(imposter.client(CLIENT, VALID)), "DecryptError", "another authority of the same name"),
        (with(pki.authority.client(CLIENT, EXPIRED)), "CertificateExpired", "expired"),
        (with(pki.authority.client(CLIENT, NOT_YET)), "CertificateExpired", "not yet valid"),
        (with(pki.authority.server(NAMES, VALID)), "UnsupportedCertificate", "a server's certificate"),
        (mine(&longer), "AccessDenied", "a longer name"),
        (mine(&same_name("example")), "AccessDenied", "another case"),
        (mine(&reversed), "AccessDenied", "another order"),
        (mine(&CLIENT[1..]), "AccessDenied", "fewer parts"),
        (mine(&same_name("Example,CN=backup-1")), "AccessDenied", "a value that looks like parts"),
    ] {
        let uri = uri(&served, "localhost", client.path());
        let error = soon(what, Client::connect(&uri)).await.expect_err(what).to_string();
        assert!(error.contains(alert), "{what}: {error}");
    }
    assert_eq!(served.stats.snapshot().accepted, 0);
    is_well(&served, &pki).await;

    // Who is in is known by name, and who is not was counted.
    served.connections(0).await;
    let client = Client::connect(&uri(&served, "localhost", pki.folder.path())).await.unwrap();
    // Connected is who has been let in; listed is who is served.
    client.flush().await.unwrap();
    let subjects: Vec<_> = served.stats.live().into_iter().map(|connection| connection.client.tls_subject).collect();
    assert_eq!(subjects, [Some(CLIENT_TEXT.to_owned())]);
    assert_eq!(served.handle.listener_stats().snapshot().rejected, 11);
    drop(client);

    // Without a list every certificate of the authority is good, without an authority none is asked for.
    let all = self::served(Tls::Required(pki.server(&[]))).await;
    let anybody = mine(&longer);
    soon("a client", Client::connect(&uri(&all, "localhost", anybody.path()))).await.unwrap();
    let open = self::served(Tls::Required(pki.open_server())).await;
    let nobody = folder(&pki.authority, None, None);
    soon("a client", Client::connect(&uri(&open, "127.0.0.1", nobody.path()))).await.unwrap();
}

/// CVE-2024-7383: the certificate was not verified.
#[tokio::test]
async fn the_client_wants_the_right_server() {
    let pki = Pki::new();
    let (other, imposter) = (Authority::called("Another root"), Authority::new());
    for (pair, host, what) in [
        (other.server(NAMES, VALID), "localhost", "UnknownIssuer"),
        (imposter.server(NAMES, VALID), "localhost", "BadSignature"),
        (pki.authority.server(NAMES, EXPIRED), "localhost", "expired"),
        (pki.authority.server(NAMES, NOT_YET), "localhost", "not valid yet"),
        (pki.authority.server(&["elsewhere"], VALID), "localhost", "not valid for name"),
        (pki.authority.server(&["localhost"], VALID), "127.0.0.1", "not valid for name"),
        (pki.authority.client(CLIENT, VALID), "localhost", "extended key usage"),
    ] {
        let folder = folder(&pki.authority, Some(&pair), None);
        let tls = ServerTls::load(&TlsFiles { client_ca: None, ..files(folder.path(), &[]) }).unwrap();
        let served = served(Tls::Required(tls)).await;
        let error = soon(what, Client::connect(&uri(&served, host, pki.folder.path()))).await.unwrap_err();
        assert!(matches!(error, ClientError::TlsHandshake(_)), "{what}: {error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert_eq!(served.stats.snapshot().accepted, 0);
    }
    // A name given apart is the one that counts.
    let pair = pki.authority.server(&["hub.example"], VALID);
    let folder = folder(&pki.authority, Some(&pair), None);
    let served = served(Tls::Required(ServerTls::load(&files(folder.path(), &[])).unwrap())).await;
    let mut uri = uri(&served, "localhost", pki.folder.path());
    assert!(Client::connect(&uri).await.is_err());
    uri.tls.as_mut().unwrap().hostname = Some("hub.example".to_owned());
    soon("a client", Client::connect(&uri)).await.unwrap();
}

/// CVE-2019-14842: a server that refused TLS was served in plain text.
#[tokio::test]
async fn the_client_never_falls_back_to_plain_text() {
    let pki = Pki::new();
    let tls = ClientTls::load(pki.folder.path()).unwrap();
    type Replies = &'static [(ReplyType, &'static [u8])];
    let answers: [(&str, Replies); 6] = [
        ("unsupported", &[(ReplyType::ERR_UNSUP, b"")]),
        ("policy", &[(ReplyType::ERR_POLICY, b"no")]),
        ("an ACK behind something else", &[(ReplyType::SERVER, b"\0\0\0\0"), (ACK, b"")]),
        ("an ACK with data", &[(ACK, b"x")]),
        ("an ACK and plain text", &[(ACK, b""), (ACK, b""), (ACK, b"")]),
        ("nothing", &[]),
    ];
    for (what, replies) in answers {
        let mut bytes = greeting().to_vec();
        for (reply, data) in replies {
            encode_reply(&mut bytes, OptionCode::STARTTLS, *reply, &[data]);
        }
        let (mut server, client) = tokio::io::duplex(PIPE);
        server.write_all(&bytes).await.unwrap();
        server.shutdown().await.unwrap();
        let negotiation = Negotiation::over(client).await.unwrap();
        let result = soon(what, negotiation.start_tls(&tls, "localhost")).await;
        assert!(result.is_err(), "{what}");
        // It has closed, and what it said in plain text were its flags and that it wants TLS.
        let mut said = Vec::new();
        soon("the close", server.read_to_end(&mut said)).await.unwrap();
        let plain = [&3u32.to_be_bytes()[..], &encode_option(OptionCode::STARTTLS, b"")].concat();
        assert!(said.starts_with(&plain), "{what}");
        let rest = &said[plain.len()..];
        assert!(rest.is_empty() || matches!(rest[0], 0x15 | 0x16), "{what}: {rest:?}");
    }
    let off = served(Tls::Off).await;
    let error = Client::connect(&uri(&off, "localhost", pki.folder.path())).await.unwrap_err();
    let refused = ReplyType::ERR_POLICY;
    assert!(matches!(error, ClientError::Refused { reply, .. } if reply == refused), "{error}");
    assert_eq!(off.stats.snapshot().accepted, 0);
    // Without certificates it does not even connect.
    let bare: Uri = "nbds://127.0.0.1:1/x".parse().unwrap();
    assert!(matches!(Client::connect(&bare).await, Err(ClientError::NoCertificates)));
    let missing: Uri = "nbds://127.0.0.1:1/x?tls-certificates=/nowhere".parse().unwrap();
    assert!(matches!(Client::connect(&missing).await, Err(ClientError::TlsFiles(_))));
    // And who does not want TLS where it is required is told.
    let required = served(Tls::Required(pki.server(&[]))).await;
    let plain = required.handle.uris()[0].replace("nbds://", "nbd://").parse().unwrap();
    let error = Client::connect(&plain).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { reply: ReplyType::ERR_TLS_REQD, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_and_a_few_large_requests_go_through_tls() {
    const MIB: u64 = 1 << 20;
    let pki = Pki::new();
    let (size, mem) = (128 * MIB, Mem::new(128 * MIB));
    let options = Options { tls: Tls::Required(pki.server(&[])), ..options() };
    let served = Served::with(Disk::new(NAME, size, mem.clone()), options).await;
    let client = Client::connect(&uri(&served, "localhost", pki.folder.path())).await.unwrap();
    let small = (0..10_000u64).map(|number| {
        let client = client.clone();
        tokio::spawn(async move {
            let (at, data) = (number * 700, pattern(number + 1, 512));
            client.write(at, data.clone(), Durability::OnFlush).await.unwrap();
            assert!(client.read(at, 512).await.unwrap() == data, "request {number}");
        })
    });
    for task in small.collect::<Vec<_>>() {
        soon("a small request", task).await.unwrap();
    }
    let large = (0..4u64).map(|number| {
        let client = client.clone();
        tokio::spawn(async move {
            let (at, data) = (number * 32 * MIB, pattern(number + 1, 32 << 20));
            client.write(at, data.clone(), Durability::OnFlush).await.unwrap();
            assert!(client.read(at, 32 << 20).await.unwrap() == data, "request {number}");
        })
    });
    for task in large.collect::<Vec<_>>() {
        soon("a large request", task).await.unwrap();
    }
    soon("the goodbye", client.disconnect()).await.unwrap();
    assert!(mem.content() == (0..4).flat_map(|number| pattern(number + 1, 32 << 20)).collect::<Vec<_>>());
    let figures = served.stats.snapshot();
    assert_eq!((figures.counts.requests, figures.counts.all_errors()), (20_008, 0));
}

#[tokio::test]
async fn each_version_serves_and_says_goodbye() {
    let pki = Pki::new();
    for version in BOTH {
        let connector = connector(pki.folder.path(), &[version]);
        // The client says goodbye: what is outstanding is answered, and a close_notify tells that nothing is missing.
        let served = served(Tls::Required(pki.server(&[CLIENT_TEXT]))).await;
        let mut raw = secure(upgrading(&served).await, &connector).await;
        assert_eq!(raw.0.get_ref().1.protocol_version(), Some(version.version));
        assert_eq!(last(&mut raw, OptionCode::GO, &go()).await, ACK);
        raw.request(request(Command::WRITE, 1, 0, 3), b"abc").await.unwrap();
        raw.request(request(Command::READ, 2, 0, 3), b"").await.unwrap();
        raw.request(request(Command::DISC, 3, 0, 0), b"").await.unwrap();
        // An end without close_notify is an error here.
        let all = soon("the end", raw.receive_all()).await.unwrap();
        assert_eq!(all.len(), 16 + 16 + 3);
        served.connections(0).await;

        // The server stops.
        let mut raw = entered(&served, &connector).await;
        let stopped = served.handle.stop(Duration::from_secs(5));
        let (stopped, told) = soon("the stop", async { tokio::join!(stopped, raw.receive_all()) }).await;
        assert_eq!(stopped, Stopped::Drained);
        assert_eq!(told.unwrap(), b"");

        // A client that aborts the handshake.
        let served = self::served(Tls::On(pki.server(&[]))).await;
        let mut raw = secure(upgrading(&served).await, &connector).await;
        assert_eq!(last(&mut raw, OptionCode::ABORT, b"").await, ACK);
        assert_eq!(soon("the end", raw.receive_all()).await.unwrap(), b"");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_given_up_in_tls_as_well() {
    let pki = Pki::new();
    let served = served(Tls::Required(pki.server(&[]))).await;
    let connector = connector(pki.folder.path(), BOTH);
    // The first fits into what TLS keeps back, so that only the flush notices; the second does not.
    for (round, length) in [(1, 32 << 10), (2, 1 << 20)] {
        let (ours, theirs) = tokio::io::duplex(8 << 10);
        served.handle.serve(theirs);
        let mut raw = Raw(ours);
        raw.greet(3).await.unwrap();
        assert_eq!(last(&mut raw, OptionCode::STARTTLS, b"").await, ACK);
        let mut raw = secure(raw, &connector).await;
        assert_eq!(last(&mut raw, OptionCode::GO, &go()).await, ACK);
        raw.request(request(Command::READ, 1, 0, length), b"").await.unwrap();
        tokio::time::sleep(Duration::from_secs(58)).await;
        assert_eq!(served.stats.snapshot().connections, 1, "round {round}");
        tokio::time::sleep(Duration::from_secs(4)).await;
        let figures = served.stats.snapshot();
        assert_eq!((figures.connections, figures.stalled), (0, round), "round {round}");
    }
}

#[tokio::test]
async fn a_connection_beyond_the_cap_is_told_so_without_tls() {
    let pki = Pki::new();
    let budget = Budget::new(&BudgetLimits { connections: 1, ..BudgetLimits::default() });
    let options = Options { tls: Tls::Required(pki.server(&[])), ..Options::new(budget) };
    let served = Served::with(Disk::new(NAME, SIZE, Mem::new(SIZE)), options).await;
    let first = upgrading(&served).await;
    let mut second = Raw(served.pipe(PIPE));
    second.greet(3).await.unwrap();
    for code in [OptionCode::STARTTLS, OptionCode::LIST, OptionCode(77)] {
        let (reply, text) = ask(&mut second, code, b"").await.pop().unwrap();
        assert_eq!((reply, &text[..]), (ReplyType::ERR_POLICY, &b"too many connections (1 of 1)"[..]));
    }
    let mut first = secure(first, &connector(pki.folder.path(), BOTH)).await;
    assert_eq!(last(&mut first, OptionCode::GO, &go()).await, ACK);
}

#[tokio::test]
async fn a_server_that_stops_says_so_in_tls_and_before_it() {
    let pki = Pki::new();
    let connector = connector(pki.folder.path(), BOTH);
    let device = Hooked::new(Mem::new(SIZE), Gate::new(Call::Read));
    let options = Options { tls: Tls::Required(pki.server(&[])), ..options() };
    let served = Served::with(Disk::new(NAME, SIZE, device.clone()), options).await;
    let mut before = Raw(served.pipe(PIPE));
    before.greet(3).await.unwrap();
    let between = upgrading(&served).await;
    let mut inside = secure(upgrading(&served).await, &connector).await;
    assert_eq!(last(&mut inside, OptionCode::LIST, b"").await, ACK);
    let mut busy = entered(&served, &connector).await;
    busy.request(request(Command::READ, 1, 0, 4096), b"").await.unwrap();
    device.hook.arrived(1).await;

    let stop = tokio::spawn(served.handle.stop(Duration::from_secs(60)));
    busy.request(request(Command::FLUSH, 2, 0, 0), b"").await.unwrap();
    let late = soon("an answer while the server stops", busy.reply()).await.unwrap();
    assert_eq!(verdict(&late), (108, 2));
    let mut between = secure(between, &connector).await;
    for code in [OptionCode::LIST, OptionCode::GO] {
        assert_eq!(last(&mut inside, code, &go()).await, ReplyType::ERR_SHUTDOWN);
        assert_eq!(last(&mut between, code, &go()).await, ReplyType::ERR_SHUTDOWN);
        assert_eq!(last(&mut before, code, &go()).await, ReplyType::ERR_SHUTDOWN);
    }
    assert_eq!(last(&mut before, OptionCode::STARTTLS, b"").await, ReplyType::ERR_SHUTDOWN);
    device.hook.open(1);
    assert_eq!(verdict(&soon("the reply", busy.reply()).await.unwrap()), (0, 1));
    busy.receive(4096).await.unwrap();
    assert_eq!(soon("the end", busy.receive_all()).await.unwrap(), b"", "with a close_notify");
    assert_eq!(soon("the stop", stop).await.unwrap(), Stopped::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_for_nobody_who_is_still_shaking_hands() {
    let pki = Pki::new();
    let served = served(Tls::Required(pki.server(&[]))).await;
    let connector = connector(pki.folder.path(), BOTH);
    let mut greeted = Raw(served.pipe(PIPE));
    greeted.greet(3).await.unwrap();
    let mut silent = upgrading(&served).await;
    let mut stuck = upgrading(&served).await;
    stuck.send(&[0x16, 3, 1, 0x20, 0, 1, 0]).await.unwrap();
    let mut options = secure(upgrading(&served).await, &connector).await;
    let mut idle = entered(&served, &connector).await;
    let start = tokio::time::Instant::now();
    assert_eq!(soon("the stop", served.handle.stop(Duration::from_secs(60))).await, Stopped::Drained);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    for raw in [&mut greeted, &mut silent, &mut stuck] {
        assert_eq!(raw.receive_all().await.unwrap(), b"");
    }
    let _ = options.receive_all().await;
    assert_eq!(idle.receive_all().await.unwrap(), b"", "with a close_notify");
}

#[tokio::test]
async fn a_stream_that_breaks_ends_its_connection_only() {
    let pki = Pki::new();
    let served = served(Tls::Required(pki.server(&[]))).await;
    let connector = connector(pki.folder.path(), BOTH);
    for broken in [&[0x17, 3, 3, 0, 32][..], b"GET / HTTP/1.1\r\n\r\n", &[0x15, 3, 3, 0, 2, 2, 40], b""] {
        let mut raw = entered(&served, &connector).await;
        // A WRITE of which half has come when the stream ends, without close_notify, or turns into something else.
        raw.request(request(Command::WRITE, 1, 0, 4096), &[7; 2048]).await.unwrap();
        let mut below = raw.0.into_inner().0;
        below.write_all(broken).await.unwrap();
        below.write_all(&vec![0xaa; broken.len() * 7]).await.unwrap();
        below.shutdown().await.unwrap();
        let mut told = Vec::new();
        soon("the close", below.read_to_end(&mut told)).await.unwrap();
        served.connections(0).await;
    }
    let figures = served.stats.snapshot();
    assert_eq!(figures.counts.bytes_written, 0, "half a payload is no write");
    is_well(&served, &pki).await;
}

#[test]
fn files_that_cannot_be_used_are_named_with_the_reason() {
    let pki = Pki::new();
    let path = |name: &str| pki.folder.path().join(name);
    let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
    let good = || files(pki.folder.path(), &[]);
    let other = pki.authority.server(NAMES, VALID);
    write("empty.pem", "");
    write("cut.pem", &other.certificate[..other.certificate.len() / 2]);
    write("base64.pem", "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n");
    write("nonsense.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    write("nonsense-key.pem", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    write("locked.pem", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n");
    write("other-key.pem", &other.key);
    ServerTls::load(&good()).unwrap();
    type Check = fn(&TlsError) -> bool;
    let unreadable: Check = |error| matches!(error, TlsError::Unreadable { .. });
    let not_pem: Check = |error| matches!(error, TlsError::NotPem { .. });
    let no_certificate: Check = |error| matches!(error, TlsError::NoCertificate { .. });
    let certificate: Check = |error| matches!(error, TlsError::Certificate { .. });
    let no_key: Check = |error| matches!(error, TlsError::NoKey { .. });
    let key: Check = |error| matches!(error, TlsError::Key { .. });
    let mismatch: Check = |error| matches!(error, TlsError::KeyMismatch { .. });
    type Set = fn(&mut TlsFiles, std::path::PathBuf);
    let as_certificate: Set = |files, path| files.certificate = path;
    let as_key: Set = |files, path| files.key = path;
    let as_roots: Set = |files, path| files.client_ca = Some(path);
    for (set, name, is) in [
        (as_certificate, "absent.pem", unreadable),
        (as_certificate, ".", unreadable),
        (as_certificate, "empty.pem", no_certificate),
        (as_certificate, "server-key.pem", no_certificate),
        (as_certificate, "cut.pem", not_pem),
        (as_certificate, "base64.pem", not_pem),
        (as_certificate, "nonsense.pem", certificate),
        (as_certificate, "client-cert.pem", mismatch),
        (as_key, "absent.pem", unreadable),
        (as_key, "empty.pem", no_key),
        (as_key, "server-cert.pem", no_key),
        (as_key, "locked.pem", no_key),
        (as_key, "nonsense-key.pem", key),
        (as_key, "other-key.pem", mismatch),
        (as_roots, "absent.pem", unreadable),
        (as_roots, "empty.pem", no_certificate),
        (as_roots, "nonsense.pem", certificate),
    ] {
        let mut files = good();
        set(&mut files, path(name));
        let error = ServerTls::load(&files).unwrap_err();
        assert!(is(&error), "{name}: {error:?}");
        assert!(error.to_string().contains(path(name).to_str().unwrap()), "{name}: {error}");
    }
    let allowed = TlsFiles { client_ca: None, ..files(pki.folder.path(), &[CLIENT_TEXT]) };
    assert!(matches!(ServerTls::load(&allowed), Err(TlsError::SubjectsWithoutRoots)));
    // A client has both of its own files or none.
    ClientTls::load(pki.folder.path()).unwrap();
    std::fs::remove_file(path("client-key.pem")).unwrap();
    assert!(unreadable(&ClientTls::load(pki.folder.path()).unwrap_err()));
    std::fs::remove_file(path("client-cert.pem")).unwrap();
    ClientTls::load(pki.folder.path()).unwrap();
    std::fs::remove_file(path("ca-cert.pem")).unwrap();
    assert!(unreadable(&ClientTls::load(pki.folder.path()).unwrap_err()));
}
