//! A small blocking NBD client that keeps so many requests in flight and does nothing beside: one thread, one call of the
//! system for all requests that may go out, one for all replies that are there. It must not be what is measured.

use std::io::{BufReader, IoSlice, Read, Write};

use blockyard_nbd::wire::option::{
    GREETING_LENGTH, InfoRequest, OPTION_REPLY_LENGTH, OptionCode, OptionReplyHeader, ReplyType, WantedInfo,
    encode_option,
};
use blockyard_nbd::wire::reply::{CHUNK_LENGTH, ChunkType, ReplyHeader, SIMPLE_LENGTH};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};

/// Replies to eight READs of 4 KiB fit; the content of large ones goes around it.
const BUFFER_BYTES: usize = 36 << 10;

/// A connection to an export, with structured replies.
pub(crate) struct Client<S> {
    stream: BufReader<S>,
    /// Content of a chunk.
    content: Vec<u8>,
}

impl<S: Read + Write> Client<S> {
    /// Enters the export without a name.
    pub(crate) fn enter(stream: S) -> Self {
        let mut client = Self { stream: BufReader::with_capacity(BUFFER_BYTES, stream), content: Vec::new() };
        client.stream.read_exact(&mut [0; GREETING_LENGTH]).unwrap();
        // Fixed newstyle, no zeroes.
        client.stream.get_mut().write_all(&3u32.to_be_bytes()).unwrap();
        client.option(OptionCode::STRUCTURED_REPLY, &[]);
        client.option(OptionCode::GO, &InfoRequest { name: "", wanted: WantedInfo::default() }.encode());
        client
    }

    fn option(&mut self, code: OptionCode, data: &[u8]) {
        self.stream.get_mut().write_all(&encode_option(code, data)).unwrap();
        loop {
            let mut header = [0; OPTION_REPLY_LENGTH];
            self.stream.read_exact(&mut header).unwrap();
            let OptionReplyHeader { reply, length, .. } = OptionReplyHeader::decode(header).unwrap();
            assert!(!reply.is_error(), "{code:?}: {reply:?}");
            self.stream.read_exact(&mut vec![0; length as usize]).unwrap();
            if reply == ReplyType::ACK {
                return;
            }
        }
    }

    /// Writes the payloads, in turn, at these offsets, with so many requests in flight.
    pub(crate) fn write(&mut self, offsets: &[u64], payloads: &[Vec<u8>], depth: usize) {
        let requests = offsets.iter().zip(payloads.iter().cycle());
        let requests =
            requests.map(|(offset, payload)| (request(Command::WRITE, *offset, payload.len()), &payload[..]));
        self.run(requests, depth, SIMPLE_LENGTH, |_, _| {});
    }

    /// Reads so many bytes at each offset, with so many requests in flight. `content` gets offset and bytes of what comes, in
    /// no order.
    pub(crate) fn read(&mut self, offsets: &[u64], length: usize, depth: usize, mut content: impl FnMut(u64, &[u8])) {
        let requests = offsets.iter().map(|offset| (request(Command::READ, *offset, length), &[][..]));
        let mut bytes = 0;
        self.run(requests, depth, CHUNK_LENGTH + 8 + length, |offset, chunk| {
            bytes += chunk.len();
            content(offset, chunk);
        });
        assert_eq!(bytes, offsets.len() * length, "bytes read");
    }

    /// Waits until what was written is on stable storage.
    pub(crate) fn flush(&mut self) {
        self.run([(request(Command::FLUSH, 0, 0), &[][..])].into_iter(), 1, SIMPLE_LENGTH, |_, _| {});
    }

    /// Sends requests with their payloads and takes the replies, which are `reply_bytes` long. All are of one kind: a
    /// single thread that sends much while it is sent much would wait for ever.
    fn run<'a>(
        &mut self,
        mut requests: impl Iterator<Item = (Request, &'a [u8])>,
        depth: usize,
        reply_bytes: usize,
        mut content: impl FnMut(u64, &[u8]),
    ) {
        let mut in_flight = 0;
        loop {
            let next = requests.by_ref().take(depth - in_flight);
            let next: Vec<_> = next.map(|(request, payload)| (request.encode_compact().unwrap(), payload)).collect();
            in_flight += next.len();
            if in_flight == 0 {
                return;
            }
            let slices = next.iter().flat_map(|(header, payload)| [IoSlice::new(header), IoSlice::new(payload)]);
            self.send(&mut slices.collect::<Vec<_>>());
            // The first is waited for, others are taken that are here already.
            in_flight -= self.reply(&mut content);
            while in_flight > 0 && self.stream.buffer().len() >= reply_bytes {
                in_flight -= self.reply(&mut content);
            }
        }
    }

    fn send(&mut self, mut slices: &mut [IoSlice<'_>]) {
        while !slices.is_empty() {
            let sent = self.stream.get_mut().write_vectored(slices).unwrap();
            IoSlice::advance_slices(&mut slices, sent);
        }
    }

    /// Takes a simple reply or a chunk; the number of requests that it ends.
    fn reply(&mut self, content: &mut impl FnMut(u64, &[u8])) -> usize {
        let mut header = [0; CHUNK_LENGTH];
        let (magic, rest) = header.split_at_mut(4);
        self.stream.read_exact(magic).unwrap();
        let length = ReplyHeader::length_for(u32::from_be_bytes(magic.try_into().unwrap())).unwrap();
        self.stream.read_exact(&mut rest[..length - 4]).unwrap();
        match ReplyHeader::decode(&header[..length]).unwrap() {
            ReplyHeader::Simple { errno: 0, .. } => 1,
            ReplyHeader::Chunk { flags, kind: ChunkType::OFFSET_DATA, length, .. } => {
                let mut offset = [0; 8];
                self.stream.read_exact(&mut offset).unwrap();
                self.content.resize(length as usize - offset.len(), 0);
                self.stream.read_exact(&mut self.content).unwrap();
                content(u64::from_be_bytes(offset), &self.content);
                usize::from(flags & 1)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn request(command: Command, offset: u64, length: usize) -> Request {
    Request { flags: CommandFlags(0), command, cookie: offset, offset, length: length as u64 }
}
