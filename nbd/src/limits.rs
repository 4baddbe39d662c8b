//! Every bound of the server with its default. A bound that is no number of the protocol is a choice of ours.

use std::time::Duration;

/// Bounds of one connection. All can be changed; the defaults suit a backup hub with a handful of busy clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From accept to the transmission phase. Guess: a hundred round trips to the far side of the world.
    pub handshake_deadline: Duration,
    /// Options per handshake, after which the connection closes. A real client sends fewer than 20.
    pub options: u32,
    /// Option data per handshake in bytes, after which the connection closes.
    pub option_bytes: u64,
    /// Requests being worked on or not yet answered; when reached, the socket is not read.
    pub requests_in_flight: usize,
    /// Payloads are received, handed to the device and sent in pieces of at most this many bytes; a power of two.
    /// Larger ones fall out of the processor's cache between the socket and the device.
    pub piece_bytes: u32,
    /// WRITE payload received and not yet let go of by the device, in bytes; at least one piece. A device that writes behind
    /// should reach its own bound first: waiting here costs more than waiting there.
    pub input_bytes: u32,
    /// READ data being read or not yet taken by the socket, in bytes; at least one piece. A simple or unfragmented reply
    /// larger than this takes all of it, so there is one of them at a time.
    pub output_bytes: u32,
    /// How long a started header or payload may bring no byte, or waiting output have no byte accepted.
    pub stall_deadline: Duration,
    /// How long the last reply may take to leave at a stop, and how long a refused or broken peer is listened to, so
    /// that the reset that closing unread input sends does not destroy that reply.
    pub linger: Duration,
    /// How many bytes are dropped during that time.
    pub linger_bytes: u64,
    /// How long a peer is heard that is only told that there are too many connections.
    pub refusal_deadline: Duration,
    /// Connections of one listener that have not reached the transmission phase; one more closes the oldest.
    pub half_open: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_deadline: Duration::from_secs(10),
            options: 256,
            option_bytes: 4 << 20,
            requests_in_flight: 64,
            piece_bytes: 1 << 20,
            input_bytes: 24 << 20,
            output_bytes: 8 << 20,
            stall_deadline: Duration::from_secs(60),
            linger: Duration::from_secs(2),
            refusal_deadline: Duration::from_secs(2),
            linger_bytes: 1 << 20,
            half_open: 128,
        }
    }
}

/// Bounds of a process, over all its listeners; see [`crate::Budget`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetLimits {
    /// Payload memory in bytes, half of it for WRITE payload and half for READ data.
    pub bytes: u64,
    /// The part of each half, in bytes, kept for connections that hold none of it, at most half of that half: 1 / (2 *
    /// `connections`) of it is what each can count on when all the rest is taken.
    pub kept_bytes: u64,
    /// Connections in all; above, a peer is told so and closed.
    pub connections: usize,
    /// Connections of all listeners that have not reached the transmission phase; one more closes the oldest. Well below
    /// `connections`, so that those who never finish a handshake keep nobody out.
    pub half_open: usize,
    /// How many peers are being told so at once; above, they are closed without a word.
    pub refusals: usize,
}

impl Default for BudgetLimits {
    fn default() -> Self {
        Self { bytes: 256 << 20, kept_bytes: 16 << 20, connections: 1024, half_open: 512, refusals: 32 }
    }
}
