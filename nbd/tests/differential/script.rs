//! What is said: every option, every command with every flag at every edge, in each form of replies.

use crate::conversation::{Request, Step, command, encode_option, flag, option};

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// 1 MiB, empty, writable.
    Writable,
    /// The same, read-only.
    ReadOnly,
    /// 1000 bytes.
    Odd,
}

/// A conversation that is had with every server.
pub struct Script {
    /// Unique; the table of differences refers to it.
    pub name: String,
    pub disk: Disk,
    /// Compares numbers that servers choose, too.
    pub facts: bool,
    /// Changes the disk.
    pub writes: bool,
    /// Tells nothing about a server without extended headers.
    pub extended: bool,
    pub steps: Vec<Step>,
}

/// Name of the export everywhere.
pub const NAME: &str = "disk0";
pub const DESCRIPTION: &str = "a disk for tests";
pub const SIZE: u64 = 1 << 20;

/// How requests are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Simple,
    Structured,
    Extended,
}

pub fn all() -> Vec<Script> {
    let mut scripts = handshakes();
    for (form, name) in [(Form::Simple, "simple"), (Form::Structured, "structured"), (Form::Extended, "extended")] {
        scripts.extend(transmissions(form, name));
    }
    for (index, script) in scripts.iter().enumerate() {
        assert!(scripts[..index].iter().all(|other| other.name != script.name), "{} twice", script.name);
    }
    scripts
}

fn prefixed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes(), bytes].concat()
}

/// Data of INFO and GO.
fn info(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = prefixed(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = prefixed(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(prefixed(query.as_bytes())));
    data
}

fn option(code: u32, data: &[u8]) -> Step {
    Step::Option(code, data.to_vec())
}

pub fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request {
    // Any cookie will do; this one tells requests of one step apart.
    let cookie = (offset ^ (length << 32)).rotate_left(7) ^ u64::from(command) ^ (u64::from(flags) << 48);
    Request { command, flags, offset, length, cookie }
}

pub fn one(command: u16, flags: u16, offset: u64, length: u64) -> Step {
    Step::Requests(vec![request(command, flags, offset, length)])
}

/// A handshake that ends in the transmission phase of an export.
pub fn enter(form: Form, name: &str) -> Vec<Step> {
    let mut steps = vec![Step::Hello(3)];
    match form {
        Form::Simple => {}
        Form::Structured => steps.push(option(option::STRUCTURED_REPLY, b"")),
        Form::Extended => steps.push(option(option::EXTENDED_HEADERS, b"")),
    }
    if form != Form::Simple {
        steps.push(option(option::SET_META_CONTEXT, &meta(name, &["base:allocation"])));
    }
    steps.push(option(option::GO, &info(name.as_bytes(), &[])));
    steps
}

fn writes(step: &Step) -> bool {
    matches!(step, Step::Requests(requests) if requests.iter().any(|request| request.command == command::WRITE))
}

fn handshakes() -> Vec<Script> {
    use option::*;
    let mut scripts = Vec::new();
    let mut script = |name: &str, steps: Vec<Step>| {
        scripts.push(Script {
            name: name.to_owned(),
            disk: Disk::Writable,
            facts: false,
            writes: false,
            extended: false,
            steps,
        });
    };
    let go = || option(GO, &info(NAME.as_bytes(), &[]));
    let read = || one(command::READ, 0, 0, 512);
    let abort = || option(ABORT, b"");
    let hello = || Step::Hello(3);
    // A single option, with a look whether the next is understood.
    let mut single = |name: &str, code: u32, data: &[u8]| {
        script(name, vec![hello(), option(code, data), abort()]);
    };

    single("ABORT with data", ABORT, b"goodbye");
    single("LIST", LIST, b"");
    single("LIST with data", LIST, b"disk0");
    single("PEEK_EXPORT", PEEK_EXPORT, b"disk0");
    single("STARTTLS where there is no TLS", STARTTLS, b"");
    single("STARTTLS with data", STARTTLS, b"now");
    single("option 0", 0, b"");
    single("option 12 with data", 12, b"twelve");
    single("option 4294967295", u32::MAX, b"");
    single("unknown option of 65537 bytes", 4711, &[7; 65537]);

    single("INFO", INFO, &info(NAME.as_bytes(), &[]));
    single("INFO for everything", INFO, &info(NAME.as_bytes(), &[0, 1, 2, 3]));
    single("INFO for unknown information", INFO, &info(NAME.as_bytes(), &[4711, 0xffff]));
    single("INFO for the same twice", INFO, &info(NAME.as_bytes(), &[1, 1, 2, 1]));
    single("INFO with the empty name", INFO, &info(b"", &[1]));
    single("INFO with an unknown name", INFO, &info(b"nosuch", &[]));
    single("INFO with a name of 4096 bytes", INFO, &info(&[b'n'; 4096], &[]));
    single("INFO with a name of 4097 bytes", INFO, &info(&[b'n'; 4097], &[]));
    single("INFO with a NUL in the name", INFO, &info(b"disk0\0", &[]));
    single("INFO with a name that is not UTF-8", INFO, &info(&[0xff, 0xfe], &[]));
    single("INFO without data", INFO, b"");
    single("INFO of 3 bytes", INFO, &[0; 3]);
    single("INFO without a count", INFO, &prefixed(NAME.as_bytes()));
    single("INFO whose name is longer than its data", INFO, &[0, 0, 0, 200, b'd', 0, 0]);
    single("INFO whose name has 4294967295 bytes", INFO, &[0xff, 0xff, 0xff, 0xff, b'd', 0, 0]);
    let mut wrong = info(NAME.as_bytes(), &[1, 2]);
    wrong[10] = 3;
    single("INFO with fewer kinds than counted", INFO, &wrong);
    wrong[10] = 1;
    single("INFO with more kinds than counted", INFO, &wrong);
    single("INFO of 65544 bytes", INFO, &info(&[b'n'; 65538], &[]));

    single("STRUCTURED_REPLY with data", STRUCTURED_REPLY, b"please");
    single("EXTENDED_HEADERS", EXTENDED_HEADERS, b"");
    single("EXTENDED_HEADERS with data", EXTENDED_HEADERS, b"please");
    single("SET_META_CONTEXT before structured replies", SET_META_CONTEXT, &meta(NAME, &["base:allocation"]));
    single("LIST_META_CONTEXT before structured replies", LIST_META_CONTEXT, &meta(NAME, &["base:allocation"]));

    // Options that need structured replies before them.
    let mut after = |name: &str, code: u32, data: &[u8]| {
        script(name, vec![hello(), option(STRUCTURED_REPLY, b""), option(code, data), abort()]);
    };
    after("STRUCTURED_REPLY twice", STRUCTURED_REPLY, b"");
    after("EXTENDED_HEADERS after STRUCTURED_REPLY", EXTENDED_HEADERS, b"");
    for (name, code) in [("LIST_META_CONTEXT", LIST_META_CONTEXT), ("SET_META_CONTEXT", SET_META_CONTEXT)] {
        let mut after = |what: &str, data: &[u8]| after(&format!("{name} {what}"), code, data);
        after("without queries", &meta(NAME, &[]));
        after("for base:allocation", &meta(NAME, &["base:allocation"]));
        after("for base:", &meta(NAME, &["base:"]));
        after("for qemu:", &meta(NAME, &["qemu:"]));
        after("for qemu:allocation-depth", &meta(NAME, &["qemu:allocation-depth"]));
        after("for the same twice", &meta(NAME, &["base:allocation", "base:allocation"]));
        after("for an unknown leaf", &meta(NAME, &["base:nosuch"]));
        after("for an unknown namespace", &meta(NAME, &["nosuch:allocation", "base:allocation"]));
        after("for :", &meta(NAME, &[":"]));
        after("for an empty query", &meta(NAME, &[""]));
        after("for a query without a colon", &meta(NAME, &["base"]));
        after("for an unknown export", &meta("nosuch", &["base:allocation"]));
        after("without data", b"");
        let mut wrong = meta(NAME, &["base:allocation"]);
        wrong.push(0);
        after("with a byte left over", &wrong);
        wrong.pop();
        wrong[9..13].copy_from_slice(&1_000_000_u32.to_be_bytes());
        after("with a million queries counted", &wrong);
        wrong[9..13].copy_from_slice(&1_u32.to_be_bytes());
        wrong[13..17].copy_from_slice(&200_u32.to_be_bytes());
        after("with a query longer than the data", &wrong);
    }

    for flags in [0, 1, 2, 3, 4, 0x13, u32::MAX] {
        script(&format!("client flags {flags:#x}, then GO"), vec![Step::Hello(flags), go(), read()]);
    }
    for flags in [0, 1, 2, 3] {
        let length = if flags & 2 == 0 { 134 } else { 10 };
        let name = format!("client flags {flags:#x}, then EXPORT_NAME");
        script(&name, vec![Step::Hello(flags), Step::ExportName(NAME, length), read()]);
    }
    script("EXPORT_NAME with the empty name", vec![hello(), Step::ExportName("", 10), read()]);
    script("EXPORT_NAME with an unknown name", vec![hello(), Step::ExportName("nosuch", 10), read()]);
    script(
        "EXPORT_NAME after EXTENDED_HEADERS",
        vec![hello(), option(EXTENDED_HEADERS, b""), Step::ExportName(NAME, 10), read()],
    );
    script("option with the wrong magic", vec![hello(), Step::Last(b"IHAVEOPS\0\0\0\x03\0\0\0\0".to_vec())]);
    script("option of 4294967295 bytes", {
        let mut header = encode_option(LIST, b"");
        header[12..].fill(0xff);
        vec![hello(), Step::Last(header)]
    });
    script("GO for an unknown export, then GO", vec![hello(), option(GO, &info(b"nosuch", &[])), go(), read()]);
    script("GO with the empty name", vec![hello(), option(GO, &info(b"", &[1]))]);
    script(
        "GO whose name is longer than its data",
        vec![hello(), option(GO, &[0, 0, 0, 200, b'd', 0, 0]), go(), read()],
    );
    script(
        "STRUCTURED_REPLY after EXTENDED_HEADERS",
        vec![hello(), option(EXTENDED_HEADERS, b""), option(STRUCTURED_REPLY, b""), abort()],
    );
    script(
        "EXTENDED_HEADERS twice",
        vec![hello(), option(EXTENDED_HEADERS, b""), option(EXTENDED_HEADERS, b""), abort()],
    );

    // What contexts do to BLOCK_STATUS.
    let mut contexts = |name: &str, sets: &[Vec<u8>]| {
        let mut steps = vec![hello(), option(STRUCTURED_REPLY, b"")];
        steps.extend(sets.iter().map(|data| option(SET_META_CONTEXT, data)));
        steps.push(go());
        steps.push(one(command::BLOCK_STATUS, 0, 0, SIZE));
        script(name, steps);
    };
    let base = || meta(NAME, &["base:allocation"]);
    contexts("no context, then BLOCK_STATUS", &[]);
    contexts("base:allocation, then BLOCK_STATUS", &[base()]);
    contexts("two contexts, then BLOCK_STATUS", &[meta(NAME, &["qemu:allocation-depth", "base:allocation"])]);
    contexts("no queries after base:allocation, then BLOCK_STATUS", &[base(), meta(NAME, &[])]);
    contexts("a failing set after base:allocation, then BLOCK_STATUS", &[base(), b"nonsense".to_vec()]);
    contexts("a set for an unknown export, then BLOCK_STATUS", &[base(), meta("nosuch", &["base:allocation"])]);
    contexts("contexts of the empty name, GO for the real one", &[meta("", &["base:allocation"])]);

    script(
        "what the export is",
        vec![hello(), option(STRUCTURED_REPLY, b""), option(INFO, &info(NAME.as_bytes(), &[3])), abort()],
    );
    script("what the export is, read-only", vec![hello(), option(INFO, &info(NAME.as_bytes(), &[3])), abort()]);
    for script in &mut scripts {
        if script.name.starts_with("what the export is") {
            script.facts = true;
        }
        if script.name.ends_with("read-only") {
            script.disk = Disk::ReadOnly;
        }
    }
    scripts
}

fn transmissions(form: Form, word: &str) -> Vec<Script> {
    use command::*;
    let enter = enter(form, NAME);
    let mut scripts = Vec::new();
    let mut script = |name: &str, disk: Disk, steps: Vec<Step>| {
        scripts.push(Script {
            name: format!("{word}: {name}"),
            disk,
            facts: false,
            writes: true,
            extended: form == Form::Extended,
            steps: [&enter[..], &steps].concat(),
        });
    };
    let commands = [
        (READ, "READ"),
        (WRITE, "WRITE"),
        (FLUSH, "FLUSH"),
        (TRIM, "TRIM"),
        (CACHE, "CACHE"),
        (WRITE_ZEROES, "WRITE_ZEROES"),
        (BLOCK_STATUS, "BLOCK_STATUS"),
    ];
    let flags = [flag::FUA, flag::NO_HOLE, flag::DF, flag::REQ_ONE, flag::FAST_ZERO, flag::PAYLOAD_LEN, 0x40, 0x8000];
    for (command, name) in commands {
        // A server that takes an effect for a payload would wait for it, and the next request would not be understood.
        let flagged = flags.map(|flag| match (command, flag) {
            (FLUSH, _) => one(command, flag, 0, 0),
            (_, flag::PAYLOAD_LEN) => one(command, flag, 65536, 4096),
            _ => one(command, flag, 65536, 65536),
        });
        script(&format!("{name} with each flag"), Disk::Writable, flagged.to_vec());
        let edges = [
            (SIZE - 65536, 65536),
            (SIZE - 4096, 8192),
            (SIZE + 4096, 4096),
            (u64::MAX - 511, 1024),
            (0, 0),
            (SIZE, 0),
            (SIZE + 1, 0),
        ];
        let edges = edges.map(|(offset, length)| one(command, 0, offset, length));
        script(&format!("{name} at each edge"), Disk::Writable, edges.to_vec());
    }
    let all = |length: u64| commands.map(|(command, _)| one(command, 0, 0, length));
    script("each command, read-only", Disk::ReadOnly, all(4096).to_vec());
    let without_payload = all(u64::from(u32::MAX)).into_iter().filter(|step| !writes(step));
    script("each command over 4294967295 bytes", Disk::Writable, without_payload.collect());
    let unknown = [8, 9, 200, 0xffff].map(|command| one(command, 0, 0, 0));
    script("unknown commands", Disk::Writable, unknown.to_vec());
    script(
        "what was written, zeroed and trimmed",
        Disk::Writable,
        vec![
            one(WRITE, 0, 65536, 131_072),
            one(WRITE, flag::FUA, 262_143, 3),
            one(READ, 0, 65530, 12),
            one(WRITE_ZEROES, 0, 131_072, 65536),
            one(READ, 0, 0, 262_150),
            one(WRITE_ZEROES, flag::NO_HOLE, 524_288, 65536),
            one(TRIM, 0, 65536, 65536),
            one(FLUSH, 0, 0, 0),
            one(READ, 0, 131_072, 131_078),
        ],
    );
    if form != Form::Simple {
        script(
            "BLOCK_STATUS of data between holes",
            Disk::Writable,
            vec![
                one(WRITE, flag::FUA, 65536, 65536),
                one(BLOCK_STATUS, 0, 0, SIZE),
                one(BLOCK_STATUS, flag::REQ_ONE, 0, SIZE),
                one(BLOCK_STATUS, 0, 65536, 65536),
                one(BLOCK_STATUS, 0, SIZE - 512, 512),
                one(READ, flag::DF, 0, 262_144),
                one(READ, 0, 0, 262_144),
            ],
        );
    }
    if form == Form::Extended {
        let long = commands.into_iter().filter(|(command, _)| *command != WRITE);
        let long = long.flat_map(|(command, _)| [1 << 32, 1 << 62].map(|length| one(command, 0, 0, length)));
        script("each command over 2^32 and 2^62 bytes", Disk::Writable, long.collect());
    }
    script(
        "every byte of 1000",
        Disk::Odd,
        vec![
            one(WRITE, 0, 0, 1000),
            one(WRITE, 0, 999, 1),
            one(WRITE, 0, 999, 2),
            one(WRITE, 0, 1000, 1),
            one(READ, 0, 999, 1),
            one(READ, 0, 1000, 1),
            one(READ, 0, 0, 1024),
            one(WRITE_ZEROES, 0, 512, 488),
            one(READ, 0, 0, 1000),
        ],
    );
    let many = |command: u16| -> Vec<Request> {
        (0..16).map(|number| Request { cookie: number, ..request(command, 0, number * 4096, 4096) }).collect()
    };
    script("the form of an error", Disk::Writable, vec![Step::ErrorForm(request(TRIM, 0, SIZE, 512))]);
    script("16 requests at once", Disk::Writable, vec![Step::Requests(many(WRITE)), Step::Requests(many(READ))]);
    let equal = |command| many(command).into_iter().map(|request| Request { cookie: 7, ..request }).collect();
    script("16 requests with one cookie", Disk::Writable, vec![Step::Requests(equal(TRIM)), one(READ, 0, 4096, 512)]);
    script("DISC", Disk::Writable, vec![Step::Disconnect(Vec::new(), request(DISC, 0, 0, 0))]);
    script(
        "DISC with flags and a range",
        Disk::Writable,
        vec![Step::Disconnect(Vec::new(), request(DISC, 0xffff, 5, 123))],
    );
    script(
        "a request with the wrong magic",
        Disk::Writable,
        vec![Step::Last({
            let mut bytes = vec![0x12, 0x56, 0x09, 0x53];
            bytes.resize(if form == Form::Extended { 32 } else { 28 }, 0);
            bytes
        })],
    );
    if form == Form::Extended {
        scripts.push(filters(enter));
    }
    scripts
}

/// Questions for some of two contexts, about a range with data.
fn filters(mut enter: Vec<Step>) -> Script {
    const BASE: &str = "base:allocation";
    const DEPTH: &str = "qemu:allocation-depth";
    let go = enter.pop();
    enter.push(option(option::SET_META_CONTEXT, &meta(NAME, &[BASE, DEPTH])));
    enter.extend(go);
    enter.push(one(command::WRITE, flag::PAYLOAD_LEN, 0, 65536));
    enter.push(one(command::BLOCK_STATUS, 0, 0, 65536));
    let names: [&[&str]; 6] = [&[BASE], &[DEPTH], &[DEPTH, BASE], &[], &[BASE, BASE], &[BASE, "nosuch"]];
    enter.extend(names.map(|names| Step::Filter(names, 65536)));
    enter.extend([SIZE + 1, 0].map(|length| Step::Filter(&[BASE], length)));
    enter.extend([0, 7, 9].map(|length| one(command::BLOCK_STATUS, flag::PAYLOAD_LEN, 0, length)));
    Script {
        name: "extended: BLOCK_STATUS for some contexts".to_owned(),
        disk: Disk::Writable,
        facts: false,
        writes: true,
        extended: true,
        steps: enter,
    }
}
