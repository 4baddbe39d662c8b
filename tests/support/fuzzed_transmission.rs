//! What the fuzz target of the transmission phase does with its bytes, so that an ordinary test can do the same with the
//! corpus: any bytes as the requests of a connection, with a qcow2 image behind it. A finding is a panic.
//!
//! The image is in memory and every call of it ends at once, so requests take effect in the order sent and a byte array
//! knows what each READ has to bring. For the same reason replies come in the order of their requests, so that equal cookies
//! can be told apart.
#![allow(dead_code, reason = "the target uses one function")]
#![allow(unreachable_pub, clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a finding is a panic")]

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use blockyard_nbd as nbd;
use blockyard_qcow2 as qcow2;
use nbd::transmission::Mode;
use nbd::wire::option::{InfoRequest, MetaRequest, OptionCode, WantedInfo, encode_option};
use nbd::wire::reply::{ChunkType, ErrorChunk, ReplyHeader};
use nbd::wire::request::{Request, StatusFilter};
use nbd::wire::{Command, CommandFlags, MAX_PAYLOAD};
use nbd::{Buffer, Content, Context, ContextSet, Device, Durability, Export, Extent, Space};
use qcow2::storage::MemoryStorage;
use qcow2::{Access, CreateOptions, ExtentKind, Image, ZeroMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

/// 24 clusters and a bit.
const SIZE: u64 = 24 * CLUSTER + 512;
const CLUSTER: u64 = 4096;

/// An image without threads of its own in the way: each call is one call of the engine.
struct Disk {
    image: Image,
    file: Arc<MemoryStorage>,
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: qcow2::Error) -> nbd::Error {
    panic!("the engine failed: {error}")
}

fn durability_of(durability: Durability) -> qcow2::Durability {
    match durability {
        Durability::OnFlush => qcow2::Durability::OnFlush,
        Durability::BeforeReply => qcow2::Durability::BeforeReply,
    }
}

#[async_trait]
impl Device for Disk {
    fn buffer(&self, _: u64, length: usize) -> Buffer {
        Box::new(vec![0xee; length])
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Content, nbd::Error> {
        let holes = self.image.read_sparse(offset, (*buffer).as_mut()).map_err(failed)?;
        Ok(Content { buffer, holes })
    }

    async fn write(&self, offset: u64, buffer: Buffer, durability: Durability) -> Result<(), nbd::Error> {
        self.image.write(offset, (*buffer).as_ref(), durability_of(durability)).map_err(failed)
    }

    async fn zero(&self, offset: u64, length: u64, space: Space, durability: Durability) -> Result<(), nbd::Error> {
        let mode = match space {
            Space::Keep => ZeroMode::Keep,
            Space::Release => ZeroMode::Unmap,
        };
        self.image.zero(offset, length, mode, durability_of(durability)).map_err(failed)
    }

    async fn fast_zero(&self, offset: u64, length: u64) -> bool {
        self.image.zero_is_fast(offset, length)
    }

    async fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), nbd::Error> {
        self.image.discard(offset, length, durability_of(durability)).map_err(failed)
    }

    async fn flush(&self) -> Result<(), nbd::Error> {
        self.image.flush().map_err(failed)
    }

    async fn extents(&self, context: Context, offset: u64, length: u64, max: usize) -> Result<Vec<Extent>, nbd::Error> {
        let found = self.image.map(offset, length, max).map_err(failed)?;
        let status = |extent: &qcow2::Extent| match (context, extent.kind) {
            (Context::AllocationDepth, _) => u64::from(extent.depth),
            (Context::BaseAllocation, ExtentKind::Data) => 0,
            (Context::BaseAllocation, ExtentKind::ZeroAllocated) => 2,
            (Context::BaseAllocation, ExtentKind::Zero) => 3,
        };
        Ok(found.iter().map(|extent| Extent { length: extent.length, status: status(extent) }).collect())
    }
}

/// Makes a new image for each connection.
struct Fresh {
    name: &'static str,
    access: Access,
    last: Arc<Mutex<Option<Arc<Disk>>>>,
}

#[async_trait]
impl Export for Fresh {
    fn name(&self) -> &str {
        self.name
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn contexts(&self) -> ContextSet {
        ContextSet::ALL
    }

    async fn open(&self) -> Result<Arc<dyn Device>, nbd::Error> {
        let file = Arc::new(MemoryStorage::with_limit(4 << 20));
        let options = CreateOptions { cluster_size: CLUSTER as u32, ..CreateOptions::new(SIZE) };
        qcow2::create_on(&*file, &options).map_err(failed)?;
        let image = Image::open_on(file.clone(), self.access, None, 1 << 16).map_err(failed)?;
        let disk = Arc::new(Disk { image, file });
        *self.last.lock().unwrap() = Some(disk.clone());
        Ok(disk)
    }
}

struct Served {
    runtime: Runtime,
    handle: nbd::Handle,
    budget: Arc<nbd::Budget>,
    last: Arc<Mutex<Option<Arc<Disk>>>>,
}

thread_local! {
    /// Made once: a server costs more than a conversation. The clock stands still unless everybody waits for it.
    static SERVED: Served = {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let last = Arc::default();
        let export = |name, access| -> Arc<dyn Export> { Arc::new(Fresh { name, access, last: Arc::clone(&last) }) };
        let exports = [export("disk", Access::ReadWrite), export("frozen", Access::ReadOnly)];
        let budget = nbd::Budget::new(&nbd::BudgetLimits::default());
        let handle = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let exports = nbd::Exports::new(exports).unwrap();
            nbd::Server::start(listener, exports, nbd::Options::new(budget.clone())).unwrap()
        });
        Served { runtime, handle, budget, last }
    };
}

/// What was negotiated.
#[derive(Clone, Copy, Debug)]
struct Terms {
    mode: Mode,
    access: Access,
    contexts: ContextSet,
}

impl Terms {
    fn of(first: u8) -> Self {
        let mode = [Mode::Simple, Mode::Structured, Mode::Extended, Mode::Extended][usize::from(first & 3)];
        let access = if first & 4 == 0 { Access::ReadWrite } else { Access::ReadOnly };
        let wanted = ContextSet { base_allocation: first & 8 == 0, allocation_depth: first & 16 != 0 };
        let contexts = if mode == Mode::Simple { ContextSet::NONE } else { wanted };
        Self { mode, access, contexts }
    }

    fn name(self) -> &'static str {
        if self.access == Access::ReadOnly { "frozen" } else { "disk" }
    }

    /// The bytes of the client up to GO.
    fn handshake(self) -> Vec<u8> {
        let names: Vec<&str> = self.contexts.iter().map(Context::name).collect();
        let set = MetaRequest::encode(self.name(), &names);
        let go = InfoRequest { name: self.name(), wanted: WantedInfo::default() }.encode();
        let form = match self.mode {
            Mode::Simple => Vec::new(),
            Mode::Structured => encode_option(OptionCode::STRUCTURED_REPLY, b""),
            Mode::Extended => encode_option(OptionCode::EXTENDED_HEADERS, b""),
        };
        let set = if names.is_empty() { Vec::new() } else { encode_option(OptionCode::SET_META_CONTEXT, &set) };
        [&3u32.to_be_bytes()[..], &form, &set, &encode_option(OptionCode::GO, &go)].concat()
    }

    fn encode(self, request: Request) -> Vec<u8> {
        match self.mode {
            Mode::Extended => request.encode_extended(),
            _ => request.encode_compact().unwrap(),
        }
    }

    /// The request at the front of `bytes`, and the length of its header.
    fn decode(self, bytes: &[u8]) -> Option<(Request, usize)> {
        match self.mode {
            Mode::Extended => Some((Request::decode_extended(bytes.first_chunk()?)?, 32)),
            _ => Some((Request::decode_compact(bytes.first_chunk()?)?, 28)),
        }
    }
}

/// A request with its payload.
type Asked = (Request, Vec<u8>);

/// The requests in a stream, and whether all of them have to be answered: a client that goes away in the middle of one, or
/// sends what is none, may miss replies.
fn requests(terms: Terms, stream: &[u8]) -> (Vec<Asked>, bool) {
    let mut asked = Vec::new();
    let mut left = stream;
    while !left.is_empty() {
        let Some((request, header)) = terms.decode(left) else { return (asked, false) };
        left = &left[header..];
        if request.command == Command::DISC {
            return (asked, true);
        }
        let announced = terms.mode == Mode::Extended && request.flags.contains(CommandFlags::PAYLOAD_LEN);
        let length = if request.command == Command::WRITE || announced { request.length } else { 0 };
        if length > u64::from(MAX_PAYLOAD) {
            asked.push((request, Vec::new()));
            return (asked, true);
        }
        let Some((payload, rest)) = left.split_at_checked(length as usize) else { return (asked, false) };
        asked.push((request, payload.to_vec()));
        left = rest;
    }
    (asked, true)
}

/// One reply, put together.
#[derive(Debug, Default)]
struct Reply {
    errno: u32,
    /// Content by offset; `None` is a hole.
    content: Vec<(u64, u64, Option<Vec<u8>>)>,
    /// Context, and lengths of its extents.
    status: Vec<(u32, Vec<u64>)>,
}

/// The replies in what the server sent, each with its cookie; half of one at the end only if `partial`.
fn replies(terms: Terms, mut bytes: &[u8], asked: &[Asked], partial: bool) -> Vec<(u64, Reply)> {
    let mut known: Known<'_> = HashMap::new();
    asked.iter().for_each(|(request, _)| known.entry(request.cookie).or_default().push_back(request));
    let mut open: HashMap<u64, Reply> = HashMap::new();
    let mut done = Vec::new();
    while !bytes.is_empty() {
        let Some(whole) = message(terms, bytes, &known) else { break };
        let (header, payload) = &whole;
        bytes = &bytes[header.len() + payload.len()..];
        match ReplyHeader::decode(header).unwrap() {
            ReplyHeader::Simple { errno, cookie } => {
                let request = known.get_mut(&cookie).and_then(VecDeque::pop_front).expect("a reply to nobody");
                let is_read = request.command == Command::READ;
                assert!(terms.mode == Mode::Simple || (terms.mode == Mode::Structured && !is_read), "{request:?}");
                let content = vec![(request.offset, payload.len() as u64, Some(payload.clone()))];
                let content = if payload.is_empty() { Vec::new() } else { content };
                done.push((cookie, Reply { errno, content, status: Vec::new() }));
            }
            ReplyHeader::Chunk { flags, kind, cookie, offset, .. } => {
                assert!(terms.mode != Mode::Simple && flags & !1 == 0, "a chunk with flags {flags}");
                let request = front(&known, cookie);
                assert_eq!(offset, (terms.mode == Mode::Extended).then_some(request.offset), "the echoed offset");
                let reply = open.entry(cookie).or_default();
                chunk(terms, kind, payload, reply);
                assert!(kind != ChunkType::NONE || flags == 1, "an empty chunk that is not the last");
                if flags == 1 {
                    done.push((cookie, open.remove(&cookie).unwrap()));
                    known.entry(cookie).or_default().pop_front();
                }
            }
        }
    }
    assert!(partial || (bytes.is_empty() && open.is_empty()), "half a reply: {} bytes, {open:?}", bytes.len());
    done
}

/// The requests that have no whole reply yet, by cookie and in order.
type Known<'a> = HashMap<u64, VecDeque<&'a Request>>;

/// The request that the next reply with this cookie is for.
fn front<'a>(known: &Known<'a>, cookie: u64) -> &'a Request {
    known.get(&cookie).and_then(|requests| requests.front()).expect("a reply to nobody")
}

/// Header and payload of the message at the front of `bytes`, if it is there as a whole.
fn message(terms: Terms, bytes: &[u8], known: &Known<'_>) -> Option<(Vec<u8>, Vec<u8>)> {
    let magic = u32::from_be_bytes(*bytes.first_chunk()?);
    let length = ReplyHeader::length_for(magic).unwrap_or_else(|| panic!("{magic:#010x} is no reply"));
    let header = bytes.get(..length)?;
    let payload = match ReplyHeader::decode(header).unwrap() {
        ReplyHeader::Simple { errno: 0, cookie } => {
            let request = front(known, cookie);
            let is_read = terms.mode == Mode::Simple && request.command == Command::READ;
            if is_read { request.length as usize } else { 0 }
        }
        ReplyHeader::Simple { cookie, .. } => {
            let _ = front(known, cookie);
            0
        }
        ReplyHeader::Chunk { length, .. } => {
            assert!(length <= u64::from(MAX_PAYLOAD) + 8, "a chunk of {length} bytes");
            length as usize
        }
    };
    Some((header.to_vec(), bytes.get(length..length + payload)?.to_vec()))
}

fn chunk(terms: Terms, kind: ChunkType, payload: &[u8], reply: &mut Reply) {
    assert_eq!(reply.errno, 0, "a chunk behind an error");
    let offset = || u64::from_be_bytes(*payload.first_chunk().unwrap());
    match kind {
        ChunkType::NONE => assert!(payload.is_empty()),
        ChunkType::OFFSET_DATA => {
            assert!(payload.len() > 8, "an empty data chunk");
            reply.content.push((offset(), payload.len() as u64 - 8, Some(payload[8..].to_vec())));
        }
        ChunkType::OFFSET_HOLE => {
            assert_eq!(payload.len(), 12);
            let length = u32::from_be_bytes(*payload[8..].first_chunk().unwrap());
            assert!(length > 0, "an empty hole");
            reply.content.push((offset(), u64::from(length), None));
        }
        ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => {
            let wide = terms.mode == Mode::Extended;
            assert_eq!(wide, kind == ChunkType::BLOCK_STATUS_EXT, "a status of the other form");
            let context = u32::from_be_bytes(*payload.first_chunk().unwrap());
            let lengths: Vec<u64> = if wide {
                assert_eq!(u32::from_be_bytes(*payload[4..].first_chunk().unwrap()) as usize, payload.len() / 16);
                payload[8..].chunks_exact(16).map(|one| u64::from_be_bytes(*one.first_chunk().unwrap())).collect()
            } else {
                let words = payload[4..].chunks_exact(8).map(|one| u32::from_be_bytes(*one.first_chunk().unwrap()));
                words.map(u64::from).collect()
            };
            assert!(!lengths.is_empty() && lengths.iter().all(|length| *length > 0), "{lengths:?}");
            reply.status.push((context, lengths));
        }
        ChunkType::ERROR | ChunkType::ERROR_OFFSET => {
            let error = ErrorChunk::decode(kind, payload).expect("an error chunk that is none");
            assert!([1, 5, 22, 28, 75, 95, 108].contains(&error.errno), "error {}", error.errno);
            reply.errno = error.errno;
        }
        other => panic!("a chunk of type {other:?}"),
    }
}

/// Whether a reply is a legal one to its request, which the model then does. Errors have to be those of the request: the
/// engine does not fail.
fn judge(terms: Terms, (request, payload): &Asked, reply: &Reply, model: &mut [u8]) {
    let Request { command, flags, offset, length, .. } = *request;
    assert!(reply.content.is_empty() || command == Command::READ, "content for {request:?}");
    assert!(reply.status.is_empty() || command == Command::BLOCK_STATUS, "a status for {request:?}");
    if reply.errno != 0 {
        assert!(reply.content.is_empty() && reply.status.is_empty(), "the engine failed: {request:?} {reply:?}");
        assert!(reply.errno != 5 && reply.errno != 108, "nothing is broken or stopping: {request:?} {reply:?}");
        return;
    }
    let range = || {
        assert!(offset.checked_add(length).is_some_and(|end| end <= SIZE), "a success past the end: {request:?}");
        offset as usize..(offset + length) as usize
    };
    let changes = matches!(command, Command::WRITE | Command::WRITE_ZEROES | Command::TRIM);
    assert!(!changes || terms.access == Access::ReadWrite, "a change of a frozen disk: {request:?}");
    match command {
        Command::READ => {
            let expected = &model[range()];
            let unfragmented = flags.contains(CommandFlags::DF) && length > 0;
            assert!(!unfragmented || reply.content.len() == 1, "{} chunks in spite of DF", reply.content.len());
            let mut at = offset;
            for (start, length, data) in &reply.content {
                assert_eq!(*start, at, "content in order and without gaps: {request:?}");
                let part = &expected[(start - offset) as usize..][..*length as usize];
                match data {
                    Some(data) => assert!(data == part, "other bytes than were written: {request:?}"),
                    None => assert!(part.iter().all(|byte| *byte == 0), "a hole over data: {request:?}"),
                }
                at += length;
            }
            assert_eq!(at, offset + length, "a success without every byte: {request:?}");
        }
        Command::WRITE => model[range()].copy_from_slice(payload),
        Command::WRITE_ZEROES => model[range()].fill(0),
        Command::TRIM => {
            let _ = range();
            let end = if offset + length == SIZE { SIZE } else { (offset + length) / CLUSTER * CLUSTER };
            let start = offset.next_multiple_of(CLUSTER).min(end);
            model[start as usize..end as usize].fill(0);
        }
        Command::BLOCK_STATUS => {
            let filtered = flags.contains(CommandFlags::PAYLOAD_LEN);
            let filter = filtered.then(|| StatusFilter::decode(payload).expect("a filter that was taken"));
            let length = filter.map_or(length, |filter| filter.length);
            assert!(length > 0 && offset.checked_add(length).is_some_and(|end| end <= SIZE), "{request:?}");
            let mut told: Vec<u32> = reply.status.iter().map(|(context, _)| *context).collect();
            let mut due: Vec<u32> = match filter {
                Some(filter) => filter.ids().collect(),
                None => terms.contexts.iter().map(Context::id).collect(),
            };
            told.sort_unstable();
            due.sort_unstable();
            assert_eq!(told, due, "one status for each context: {request:?}");
            for (_, lengths) in &reply.status {
                let (last, others) = lengths.split_last().unwrap();
                let before: u64 = others.iter().sum();
                assert!(before < length && offset + before + last <= SIZE, "{request:?} {lengths:?}");
                assert!(others.is_empty() || !flags.contains(CommandFlags::REQ_ONE), "{request:?} {lengths:?}");
            }
        }
        Command::FLUSH => {}
        Command::CACHE => _ = range(),
        _ => panic!("a success for {request:?}"),
    }
}

/// Any bytes as requests: what comes back are replies, each request has exactly one, reads bring what was written, and the
/// image is clean afterwards.
pub fn transmission(bytes: &[u8]) {
    let Some((first, stream)) = bytes.split_first() else { return };
    let terms = Terms::of(*first);
    let (asked, complete) = requests(terms, stream);
    let goodbye = Request { flags: CommandFlags(0), command: Command::DISC, cookie: 0, offset: 0, length: 0 };
    // Behind half a request it would be taken for the other half.
    let goodbye = if complete { terms.encode(goodbye) } else { Vec::new() };
    let sent = [&terms.handshake()[..], stream, &goodbye].concat();
    SERVED.with(|served| {
        let said = served.runtime.block_on(async {
            let (ours, theirs) = tokio::io::duplex(1 << 16);
            served.handle.serve(theirs);
            let (mut reader, mut writer) = tokio::io::split(ours);
            let mut said = Vec::new();
            let sending = async {
                let _ = writer.write_all(&sent).await;
                let _ = writer.shutdown().await;
            };
            let receiving = async {
                let _ = reader.read_to_end(&mut said).await;
            };
            let both = async { tokio::join!(sending, receiving) };
            tokio::time::timeout(Duration::from_secs(3600), both).await.expect("it hangs");
            let stats = served.handle.stats(terms.name()).unwrap();
            let _ = stats.connections().wait_for(|connections| *connections == 0).await;
            said
        });
        let disk = served.last.lock().unwrap().take().expect("an open image");
        let usage = served.budget.usage();
        assert_eq!((usage.input, usage.output), (0, 0), "memory is held for nobody");
        let replies = replies(terms, &said[greeting_length(&said)..], &asked, !complete);
        compare(terms, &asked, replies, complete, &disk);
        disk.image.close().unwrap();
        let report = qcow2::check_on(&*disk.file).unwrap();
        assert!(report.is_clean(), "{report:?}");
    });
}

/// The length of the handshake in what the server sent: up to the ACK of GO.
fn greeting_length(said: &[u8]) -> usize {
    let ack = [&0x0003_e889_0455_65a9u64.to_be_bytes()[..], &[0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0]].concat();
    let at = said.windows(ack.len()).position(|window| window == ack).expect("the handshake succeeds");
    at + ack.len()
}

fn compare(terms: Terms, asked: &[Asked], replies: Vec<(u64, Reply)>, complete: bool, disk: &Disk) {
    let (mut told, mut due) = (HashMap::<u64, usize>::new(), HashMap::<u64, usize>::new());
    replies.iter().for_each(|(cookie, _)| *told.entry(*cookie).or_default() += 1);
    asked.iter().for_each(|(request, _)| *due.entry(request.cookie).or_default() += 1);
    if !complete {
        for (cookie, count) in told {
            assert!(count <= due[&cookie], "{count} replies with cookie {cookie:#x}");
        }
        return;
    }
    assert_eq!(told, due, "one reply for each request");
    let mut sorted = HashMap::<u64, VecDeque<Reply>>::new();
    replies.into_iter().for_each(|(cookie, reply)| sorted.entry(cookie).or_default().push_back(reply));
    let mut model = vec![0; SIZE as usize];
    for one in asked {
        let reply = sorted.get_mut(&one.0.cookie).and_then(VecDeque::pop_front).unwrap();
        judge(terms, one, &reply, &mut model);
    }
    let mut content = vec![0; SIZE as usize];
    disk.image.read(0, &mut content).unwrap();
    assert!(content == model, "the disk differs from the model");
}

/// Requests that the seeds are made of, behind the byte that says what is negotiated.
pub fn seed(first: u8) -> Vec<u8> {
    let terms = Terms::of(first);
    let mut out = vec![first];
    let mut cookie = 0;
    let mut ask = |flags, command, offset, length, payload: &[u8]| {
        cookie += 1;
        out.extend(terms.encode(Request { flags: CommandFlags(flags), command, cookie, offset, length }));
        out.extend(payload);
    };
    ask(0, Command::WRITE, 1000, 300, &[7; 300]);
    ask(1, Command::WRITE, CLUSTER * 2, 512, &[8; 512]);
    ask(0, Command::READ, 0, SIZE, b"");
    ask(0, Command::BLOCK_STATUS, 0, SIZE, b"");
    ask(8, Command::BLOCK_STATUS, 512, CLUSTER, b"");
    ask(4, Command::READ, 100, 2 * CLUSTER, b"");
    ask(0, Command::TRIM, 0, 3 * CLUSTER, b"");
    ask(2, Command::WRITE_ZEROES, CLUSTER * 5, CLUSTER, b"");
    ask(0x10, Command::WRITE_ZEROES, CLUSTER * 6, CLUSTER, b"");
    ask(0, Command::CACHE, 0, CLUSTER, b"");
    ask(0, Command::FLUSH, 0, 0, b"");
    ask(0, Command::READ, SIZE - 512, 513, b"");
    ask(0, Command::WRITE, SIZE, 10, &[9; 10]);
    ask(0x8000, Command::READ, 0, 512, b"");
    ask(0, Command(8), 0, 512, b"");
    if terms.mode == Mode::Extended {
        ask(0x20, Command::WRITE, 5000, 64, &[3; 64]);
        let filter = StatusFilter::encode(CLUSTER, &[1]);
        ask(0x20, Command::BLOCK_STATUS, 0, filter.len() as u64, &filter);
        ask(0x20, Command::TRIM, 0, 10, &[0; 10]);
        ask(0, Command::TRIM, 0, u64::MAX, b"");
    }
    ask(0, Command::READ, 0, 512, b"");
    out
}
