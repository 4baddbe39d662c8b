//! Devices that tests look through, and servers to reach them.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod certificates;
pub mod devices;
pub mod servers;

use std::time::Duration;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::reply::ReplyHeader;
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};
use tokio::io::{AsyncRead, AsyncWrite};

/// Tells served from hung; no test waits for it to pass.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A request with cookie and range.
pub fn request(command: Command, cookie: u64, offset: u64, length: u64) -> Request {
    Request { flags: CommandFlags(0), command, cookie, offset, length }
}

/// Sends a request with the header of the mode; in an extended one the payload of a WRITE is announced.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(raw: &mut Raw<S>, mode: Mode, request: Request, payload: &[u8]) {
    let sent = match mode {
        Mode::Simple | Mode::Structured => raw.request(request, payload).await,
        Mode::Extended if request.command == Command::WRITE => {
            let flags = request.flags.with(CommandFlags::PAYLOAD_LEN);
            raw.extended_request(Request { flags, ..request }, payload).await
        }
        Mode::Extended => raw.extended_request(request, payload).await,
    };
    sent.unwrap();
}

/// Error number of a reply, 0 for success, and the cookie.
pub fn verdict((header, payload): &(ReplyHeader, Vec<u8>)) -> (u32, u64) {
    match *header {
        ReplyHeader::Simple { errno, cookie } => (errno, cookie),
        ReplyHeader::Chunk { kind, cookie, .. } if kind.is_error() => {
            (u32::from_be_bytes(*payload.first_chunk().unwrap()), cookie)
        }
        ReplyHeader::Chunk { cookie, .. } => (0, cookie),
    }
}

/// The value, or a failure after [`PATIENCE`] with what was waited for.
#[track_caller]
pub fn soon<F: Future>(what: &'static str, future: F) -> impl Future<Output = F::Output> {
    let caller = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(PATIENCE, future).await {
            Ok(value) => value,
            Err(_) => panic!("waited in vain for {what} at {caller}"),
        }
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
