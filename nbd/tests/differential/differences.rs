//! Where servers differ, and who is right by the protocol text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::programs::version;
use crate::script::{self, Disk};
use crate::servers::{Kind, Running};

/// One point on which a server differs from ours.
struct Difference {
    what: &'static str,
    /// The section of the protocol text that decides, and what it says.
    clause: &'static str,
    right: Right,
    seen: &'static [Seen],
}

/// Who keeps to the text. `Both`: it leaves the choice, or says "SHOULD" or "MAY".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    Ours,
    Both,
}

/// What was heard from both, and where.
struct Seen {
    by: &'static [By],
    /// Names of conversations, each of which shows it. One that begins with `*: ` stands for one in each form of replies.
    conversations: &'static [&'static str],
    ours: &'static str,
    theirs: &'static str,
}

/// A server with the versions that showed a difference. Only these must show it.
struct By(Kind, &'static [(u32, u32)]);

const QEMU: By = By(Kind::QemuNbd, &[(7, 2), (10, 0)]);
const NBDKIT_MEMORY: By = By(Kind::NbdkitMemory, &[(1, 32), (1, 42)]);
const NBDKIT_FILE: By = By(Kind::NbdkitFile, &[(1, 32), (1, 42)]);
/// Not each time.
const NBDKIT_SOMETIMES: &[By] = &[By(Kind::NbdkitMemory, &[]), By(Kind::NbdkitFile, &[])];
const NBDKIT: &[By] = &[NBDKIT_MEMORY, NBDKIT_FILE];
const ALL: &[By] = &[QEMU, NBDKIT_MEMORY, NBDKIT_FILE];
/// Those with extended headers.
const EXTENDED: &[By] = &[By(Kind::QemuNbd, &[(10, 0)])];
/// Those without.
const COMPACT: &[By] = &[By(Kind::QemuNbd, &[(7, 2)]), NBDKIT_MEMORY, NBDKIT_FILE];

#[rustfmt::skip]
const TABLE: &[Difference] = &[
    Difference {
        what: "The empty name, where the only export has a name",
        clause: "Option types, EXPORT_NAME: it is reserved for a default export, if there is one",
        right: Right::Both,
        seen: &[
            Seen { by: ALL, ours: r#"EXPORT, NAME "disk0", ACK"#, theirs: "ERR_UNKNOWN",
                conversations: &["INFO with the empty name", "GO with the empty name"] },
            Seen { by: ALL, ours: "size 1048576, 0 zeroes", theirs: "closes",
                conversations: &["EXPORT_NAME with the empty name"] },
            Seen { by: &[QEMU], ours: "META_CONTEXT base:allocation, ACK", theirs: "ERR_UNKNOWN",
                conversations: &["contexts of the empty name, GO for the real one"] },
        ],
    },
    Difference {
        what: "Contexts set for the empty name, then GO for the real one",
        clause: "Metadata querying: contexts belong to the export of GO; that two names mean one export is not spoken of",
        right: Right::Both,
        seen: &[
            Seen { by: ALL, ours: "OK base:allocation 1048576:3", theirs: "EINVAL",
                conversations: &["contexts of the empty name, GO for the real one"] },
        ],
    },
    Difference {
        what: "Option data of more than 64 KiB",
        clause: "Option reply types, ERR_TOO_BIG: the request is too large to process",
        right: Right::Both,
        seen: &[
            Seen { by: ALL, ours: "ERR_TOO_BIG", theirs: "ERR_INVALID", conversations: &["INFO of 65544 bytes"] },
        ],
    },
    Difference {
        what: "A name that is not UTF-8",
        clause: "Conventions: a string is UTF-8; what becomes of another is left open",
        right: Right::Both,
        seen: &[
            Seen { by: ALL, ours: "ERR_INVALID", theirs: "ERR_UNKNOWN",
                conversations: &["INFO with a name that is not UTF-8"] },
        ],
    },
    Difference {
        what: "The same information asked for twice",
        clause: "Option types, INFO and GO: a client MUST NOT; the answer is left open",
        right: Right::Both,
        seen: &[
            Seen { by: NBDKIT, conversations: &["INFO for the same twice"],
                ours: r#"DESCRIPTION "a disk for tests", EXPORT, NAME "disk0", ACK"#,
                theirs: r#"DESCRIPTION "a disk for tests", EXPORT, NAME "disk0", NAME "disk0", NAME "disk0", ACK"# },
        ],
    },
    Difference {
        what: "Block sizes and abilities of the export",
        clause: "Size constraints, Transmission flags: the server's to choose; a missing flag is an ability less",
        right: Right::Both,
        seen: &[
            Seen { by: &[QEMU], conversations: &["what the export is"],
                ours: "BLOCK_SIZE 1 65536 67108864, EXPORT 1048576 0x0ded, ACK",
                theirs: "BLOCK_SIZE 1 4096 33554432, EXPORT 1048576 0x0ded, ACK" },
            Seen { by: &[QEMU], conversations: &["what the export is, read-only"],
                ours: "BLOCK_SIZE 1 65536 67108864, EXPORT 1048576 0x050f, ACK",
                theirs: "BLOCK_SIZE 1 4096 33554432, EXPORT 1048576 0x050f, ACK" },
            Seen { by: &[By(Kind::NbdkitMemory, &[(1, 32)])], conversations: &["what the export is"],
                ours: "BLOCK_SIZE 1 65536 67108864, EXPORT 1048576 0x0ded, ACK",
                theirs: "EXPORT 1048576 0x0ded, ACK" },
            Seen { by: &[By(Kind::NbdkitMemory, &[(1, 42)])], conversations: &["what the export is"],
                ours: "BLOCK_SIZE 1 65536 67108864, EXPORT 1048576 0x0ded, ACK",
                theirs: "BLOCK_SIZE 1 32768 4294967295, EXPORT 1048576 0x0ded, ACK" },
            Seen { by: &[NBDKIT_FILE], conversations: &["what the export is"],
                ours: "BLOCK_SIZE 1 65536 67108864, EXPORT 1048576 0x0ded, ACK",
                theirs: "EXPORT 1048576 0x05ed, ACK" },
            Seen { by: &[By(Kind::NbdkitMemory, &[(1, 42)])], conversations: &["what the export is, read-only"],
                ours: "BLOCK_SIZE 1 65536 67108864, EXPORT 1048576 0x050f, ACK",
                theirs: "BLOCK_SIZE 1 32768 4294967295, EXPORT 1048576 0x0507, ACK" },
            Seen { by: &[By(Kind::NbdkitMemory, &[(1, 32)]), NBDKIT_FILE], conversations: &["what the export is, read-only"],
                ours: "BLOCK_SIZE 1 65536 67108864, EXPORT 1048576 0x050f, ACK",
                theirs: "EXPORT 1048576 0x0507, ACK" },
        ],
    },
    Difference {
        what: "Options from a client that did not set FIXED_NEWSTYLE",
        clause: "Client flags: servers MAY choose to honour fixed newstyle from it",
        right: Right::Both,
        seen: &[
            Seen { by: NBDKIT, ours: "closes", theirs: "ERR_INVALID",
                conversations: &["client flags 0x0, then GO", "client flags 0x2, then GO"] },
        ],
    },
    Difference {
        what: "STRUCTURED_REPLY twice",
        clause: "Option types, STRUCTURED_REPLY: ACK or a permitted error; a repetition is not spoken of",
        right: Right::Both,
        seen: &[
            Seen { by: &[By(Kind::NbdkitMemory, &[(1, 32)]), By(Kind::NbdkitFile, &[(1, 32)])],
                ours: "ERR_INVALID", theirs: "ACK", conversations: &["STRUCTURED_REPLY twice"] },
        ],
    },
    Difference {
        what: "Extended headers",
        clause: "Option types, EXTENDED_HEADERS: an extension",
        right: Right::Both,
        seen: &[
            Seen { by: COMPACT, ours: "ACK", theirs: "ERR_UNSUP",
                conversations: &["EXTENDED_HEADERS", "EXTENDED_HEADERS after STRUCTURED_REPLY", "EXTENDED_HEADERS twice",
                    "STRUCTURED_REPLY after EXTENDED_HEADERS", "EXPORT_NAME after EXTENDED_HEADERS"] },
            Seen { by: COMPACT, ours: "ERR_INVALID", theirs: "ERR_UNSUP",
                conversations: &["EXTENDED_HEADERS with data", "EXTENDED_HEADERS twice"] },
            Seen { by: COMPACT, ours: "ERR_EXT_HEADER_REQD", theirs: "ACK",
                conversations: &["STRUCTURED_REPLY after EXTENDED_HEADERS"] },
            Seen { by: COMPACT, ours: "closes", theirs: "size 1048576, 0 zeroes",
                conversations: &["EXPORT_NAME after EXTENDED_HEADERS"] },
        ],
    },
    Difference {
        what: "The context `qemu:allocation-depth`",
        clause: "Metadata querying: a server has the contexts that it has",
        right: Right::Both,
        seen: &[
            Seen { by: NBDKIT, ours: "META_CONTEXT base:allocation, META_CONTEXT qemu:allocation-depth, ACK",
                theirs: "META_CONTEXT base:allocation, ACK",
                conversations: &["LIST_META_CONTEXT without queries", "two contexts, then BLOCK_STATUS"] },
            Seen { by: NBDKIT, ours: "META_CONTEXT qemu:allocation-depth, ACK", theirs: "ACK",
                conversations: &["LIST_META_CONTEXT for qemu:", "LIST_META_CONTEXT for qemu:allocation-depth",
                    "SET_META_CONTEXT for qemu:allocation-depth"] },
            Seen { by: NBDKIT, ours: "OK base:allocation 1048576:3 qemu:allocation-depth 1048576:0",
                theirs: "OK base:allocation 1048576:3", conversations: &["two contexts, then BLOCK_STATUS"] },
        ],
    },
    Difference {
        what: "The depth of a hole in the only layer",
        clause: "The registration of `qemu`: 0 is unallocated; whether a raw file has unallocated places is the server's view",
        right: Right::Both,
        seen: &[
            Seen { by: &[QEMU], ours: "OK base:allocation 1048576:3 qemu:allocation-depth 1048576:0",
                theirs: "OK base:allocation 1048576:3 qemu:allocation-depth 1048576:1",
                conversations: &["two contexts, then BLOCK_STATUS"] },
        ],
    },
    Difference {
        what: "A query without a namespace",
        clause: "Option types, LIST_META_CONTEXT: the server MAY fail it with ERR_INVALID",
        right: Right::Both,
        seen: &[
            Seen { by: ALL, ours: "ERR_INVALID", theirs: "ACK",
                conversations: &["LIST_META_CONTEXT for an empty query", "SET_META_CONTEXT for an empty query",
                    "LIST_META_CONTEXT for a query without a colon", "SET_META_CONTEXT for a query without a colon"] },
        ],
    },
    Difference {
        what: "The same query twice",
        clause: "Option types, SET_META_CONTEXT: one reply for each selected context, each with a unique id",
        right: Right::Ours,
        seen: &[
            Seen { by: NBDKIT, ours: "META_CONTEXT base:allocation, ACK",
                theirs: "META_CONTEXT base:allocation, META_CONTEXT base:allocation, ACK",
                conversations: &["LIST_META_CONTEXT for the same twice", "SET_META_CONTEXT for the same twice"] },
        ],
    },
    Difference {
        what: "Bytes behind the last query",
        clause: "Option types, LIST_META_CONTEXT: what is syntactically invalid MUST fail with ERR_INVALID; qemu-nbd takes them for the next option",
        right: Right::Ours,
        seen: &[
            Seen { by: ALL, ours: "ERR_INVALID", theirs: "META_CONTEXT base:allocation, ACK",
                conversations: &["LIST_META_CONTEXT with a byte left over", "SET_META_CONTEXT with a byte left over"] },
            Seen { by: &[QEMU], ours: "ACK", theirs: "closes",
                conversations: &["LIST_META_CONTEXT with a byte left over", "SET_META_CONTEXT with a byte left over"] },
        ],
    },
    Difference {
        what: "More queries counted than sent",
        clause: "Option types, LIST_META_CONTEXT: after an error the contexts before it mean nothing",
        right: Right::Both,
        seen: &[
            Seen { by: NBDKIT, ours: "ERR_INVALID", theirs: "META_CONTEXT base:allocation, ERR_INVALID",
                conversations: &["LIST_META_CONTEXT with a million queries counted",
                    "SET_META_CONTEXT with a million queries counted"] },
        ],
    },
    Difference {
        what: "Contexts of an export that is not there",
        clause: "Option types, LIST_META_CONTEXT: contexts available on the given export",
        right: Right::Ours,
        seen: &[
            Seen { by: NBDKIT, ours: "ERR_UNKNOWN", theirs: "META_CONTEXT base:allocation, ACK",
                conversations: &["LIST_META_CONTEXT for an unknown export", "SET_META_CONTEXT for an unknown export",
                    "a set for an unknown export, then BLOCK_STATUS"] },
        ],
    },
    Difference {
        what: "BLOCK_STATUS after a SET_META_CONTEXT that failed",
        clause: "Option types, SET_META_CONTEXT: it replaces what was set before, also when it fails",
        right: Right::Ours,
        seen: &[
            Seen { by: NBDKIT, ours: "EINVAL", theirs: "OK base:allocation 1048576:3",
                conversations: &["a failing set after base:allocation, then BLOCK_STATUS"] },
        ],
    },
    Difference {
        what: "FLUSH with an offset or a length",
        clause: "Request types, FLUSH: both are reserved; the client MUST set them to zero",
        right: Right::Both,
        seen: &[
            Seen { by: ALL, ours: "OK", theirs: "EINVAL",
                conversations: &["*: FLUSH at each edge", "*: each command over 4294967295 bytes",
                    "extended: each command over 2^32 and 2^62 bytes"] },
            Seen { by: NBDKIT, ours: "OK", theirs: "EINVAL", conversations: &["*: each command, read-only"] },
        ],
    },
    Difference {
        what: "WRITE and WRITE_ZEROES past the end",
        clause: "Error values, Request types: SHOULD be ENOSPC; Size constraints: SHOULD be EINVAL",
        right: Right::Both,
        seen: &[
            Seen { by: &[QEMU], ours: "ENOSPC", theirs: "EINVAL",
                conversations: &["*: WRITE at each edge", "*: WRITE_ZEROES at each edge",
                    "*: each command over 4294967295 bytes", "extended: each command over 2^32 and 2^62 bytes"] },
        ],
    },
    Difference {
        what: "WRITE, WRITE_ZEROES and TRIM on a read-only export",
        clause: "Error values, Request types: SHOULD be EPERM",
        right: Right::Ours,
        seen: &[
            Seen { by: &[QEMU], ours: "EPERM", theirs: "EINVAL", conversations: &["*: each command, read-only"] },
        ],
    },
    Difference {
        what: "READ of 2^32 bytes and more",
        clause: "Request types, READ: EOVERFLOW up front is permitted; Size constraints: past the end SHOULD be EINVAL",
        right: Right::Both,
        seen: &[
            Seen { by: EXTENDED, ours: "EOVERFLOW", theirs: "EINVAL",
                conversations: &["extended: each command over 2^32 and 2^62 bytes"] },
        ],
    },
    Difference {
        what: "Requests of length 0",
        clause: "Request types: unspecified; the server SHOULD NOT disconnect",
        right: Right::Both,
        seen: &[
            Seen { by: NBDKIT, ours: "OK", theirs: "EINVAL",
                conversations: &["*: READ at each edge", "*: TRIM at each edge", "*: CACHE at each edge"] },
            Seen { by: NBDKIT, ours: "OK", theirs: "ENOSPC",
                conversations: &["*: WRITE at each edge", "*: WRITE_ZEROES at each edge"] },
        ],
    },
    Difference {
        what: "FAST_ZERO, which we offer and nbdkit does not for a file",
        clause: "Request types, WRITE_ZEROES: SHOULD be EINVAL; nbdkit ends with SIGABRT, and all clients with it",
        right: Right::Ours,
        seen: &[
            Seen { by: &[NBDKIT_FILE], ours: "OK", theirs: "closes", conversations: &["*: WRITE_ZEROES with each flag"] },
        ],
    },
    Difference {
        what: "An export of 1000 bytes",
        clause: "Option reply types, INFO: the size of the export in bytes; qemu-nbd rounds it up to a sector",
        right: Right::Ours,
        seen: &[
            Seen { by: &[QEMU], ours: "ENOSPC", theirs: "OK", conversations: &["*: every byte of 1000"] },
            Seen { by: &[QEMU], ours: "EINVAL", theirs: "OK 1*57", conversations: &["*: every byte of 1000"] },
            Seen { by: &[QEMU], ours: "EINVAL", theirs: "OK 1001*57 23*00", conversations: &["*: every byte of 1000"] },
        ],
    },
    Difference {
        what: "The form of an error once structured replies are agreed on",
        clause: "Structured reply chunk message: SHOULD be a chunk, for the text in it",
        right: Right::Ours,
        seen: &[
            Seen { by: NBDKIT, ours: "EINVAL", theirs: "EINVAL in a simple reply",
                conversations: &["structured: the form of an error"] },
        ],
    },
    Difference {
        what: "The end of the connection after DISC (nbdkit 1.42, not each time)",
        clause: "Terminating the transmission phase: the server MUST then close the TCP connection",
        right: Right::Ours,
        seen: &[
            Seen { by: NBDKIT_SOMETIMES, ours: "answers 0 of 0, then closes", theirs: "answers 0 of 0, then says nothing",
                conversations: &["*: DISC", "*: DISC with flags and a range"] },
        ],
    },
    Difference {
        what: "A request with the wrong magic",
        clause: "Terminating the transmission phase: a hard disconnect MAY follow a broken rule",
        right: Right::Both,
        seen: &[
            Seen { by: &[QEMU], ours: "closes", theirs: "answers, then closes",
                conversations: &["*: a request with the wrong magic"] },
        ],
    },
];

impl Kind {
    fn program(self) -> &'static str {
        match self {
            Self::Ours => "blockyard",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdkitMemory | Self::NbdkitFile => "nbdkit",
        }
    }
}

impl Seen {
    fn is_in(&self, conversation: &str) -> bool {
        self.conversations.iter().any(|name| is_called(name, conversation))
    }
}

fn is_called(pattern: &str, conversation: &str) -> bool {
    match pattern.strip_prefix("*: ") {
        Some(rest) => conversation.split_once(": ").is_some_and(|(_, name)| name == rest),
        None => pattern == conversation,
    }
}

/// What a server says in each conversation, by its name. A conversation that does not fit the server is missing.
fn answers(kind: Kind) -> BTreeMap<String, Vec<String>> {
    let mut kept: Option<(Disk, Running)> = None;
    let mut all = BTreeMap::new();
    for script in script::all() {
        let lines = if script.writes {
            Running::start(kind, script.disk).play(&script)
        } else {
            let (disk, server) = kept.get_or_insert_with(|| (script.disk, Running::start(kind, script.disk)));
            if *disk != script.disk {
                (*disk, *server) = (script.disk, Running::start(kind, script.disk));
            }
            server.play(&script)
        };
        all.extend(lines.map(|lines| (script.name, lines)));
    }
    all
}

/// Conversation, what we say and what they say.
type Observation = (String, String, String);

fn observe(ours: &BTreeMap<String, Vec<String>>, theirs: &BTreeMap<String, Vec<String>>) -> Vec<Observation> {
    let mut observed = Vec::new();
    for (name, theirs) in theirs {
        let pairs = ours[name].iter().zip(theirs).filter(|(ours, theirs)| ours != theirs);
        observed.extend(pairs.map(|(ours, theirs)| (name.clone(), ours.clone(), theirs.clone())));
    }
    observed.dedup();
    observed
}

fn compare(kind: Kind) {
    let program = kind.program();
    let (ours, theirs) = (answers(Kind::Ours), answers(kind));
    let observed = observe(&ours, &theirs);
    let version = version(program);
    let mut complaints = String::new();
    let seen = || TABLE.iter().flat_map(|difference| difference.seen);
    for (name, ours, theirs) in &observed {
        let listed = seen().any(|seen| {
            let by = seen.by.iter().any(|by| by.0 == kind);
            by && seen.is_in(name) && seen.ours == ours && seen.theirs == theirs
        });
        if !listed {
            writeln!(complaints, "not in the table: {name}: we say {ours}, they say {theirs}").unwrap();
        }
    }
    for seen in seen().filter(|seen| seen.by.iter().any(|by| by.0 == kind && by.1.contains(&version))) {
        for pattern in seen.conversations {
            for name in theirs.keys().filter(|name| is_called(pattern, name)) {
                let there = observed
                    .iter()
                    .any(|(seen_in, ours, theirs)| seen_in == name && seen.ours == ours && seen.theirs == theirs);
                if !there {
                    let Seen { ours, theirs, .. } = seen;
                    writeln!(complaints, "not seen any more: {name}: we say {ours}, they say {theirs}").unwrap();
                }
            }
        }
    }
    assert!(complaints.is_empty(), "{program} {version:?}:\n{complaints}");
}

#[test]
fn qemu_nbd_differs_where_the_table_says() {
    compare(Kind::QemuNbd);
}

#[test]
fn nbdkit_with_memory_differs_where_the_table_says() {
    compare(Kind::NbdkitMemory);
}

#[test]
fn nbdkit_with_a_file_differs_where_the_table_says() {
    compare(Kind::NbdkitFile);
}

#[test]
fn the_support_page_shows_the_table() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/nbd-support.md")).unwrap();
    let rows: Vec<String> = TABLE.iter().map(row).collect();
    assert!(page.contains(&rows.join("\n")), "docs/nbd-support.md must hold these rows:\n{}", rows.join("\n"));
}

/// A point as a row of the page: what, who says what, clause, who is right.
fn row(difference: &Difference) -> String {
    let Difference { what, clause, right, seen } = difference;
    // What each server says and what we say to the same.
    let mut servers: Vec<(String, Vec<String>)> = Vec::new();
    for seen in *seen {
        let said = format!("`{}` for our `{}`", seen.theirs, seen.ours);
        for By(kind, versions) in seen.by {
            let versions: Vec<String> = versions.iter().map(|(major, minor)| format!("{major}.{minor}")).collect();
            let server = [kind.program(), &versions.join(", ")].join(" ").trim_end().to_owned();
            match servers.iter_mut().find(|(name, _)| *name == server) {
                Some((_, all)) if all.contains(&said) => {}
                Some((_, all)) => all.push(said.clone()),
                None => servers.push((server, vec![said.clone()])),
            }
        }
    }
    let said: Vec<String> = servers.iter().map(|(server, said)| format!("{server}: {}", said.join(", "))).collect();
    let right = if *right == Right::Ours { "ours" } else { "both" };
    format!("| {what} | {} | {clause} | {right} |", said.join("<br>"))
}
