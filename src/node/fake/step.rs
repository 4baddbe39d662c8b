//! The single steps of a client's conversation with the hub, and how each of them can go wrong.

use std::time::Duration;

/// One step. Disks are counted in the order in which the client copies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The n-th question (1 to 3) for the change id of a disk.
    ChangeId(usize, u8),
    /// The two connections to a disk.
    Connect(usize),
    /// One request of the copy of a disk.
    Write(usize, Part),
    /// The telemetry after the copy of a disk.
    Telemetry(usize),
    /// The completion of a disk.
    Complete(usize),
}

/// Which request of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The first one.
    First,
    /// The first one behind half of the bytes, unless it is the last.
    Middle,
    /// The last one.
    Last,
}

/// How a step goes wrong, once per client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepFault {
    /// Nothing leaves, and the client is told that nobody listens.
    Refused,
    /// Nothing leaves, and the client waits for ever with its connections open.
    Hang,
    /// The client waits for [`super::FakeNode::resume`] and goes on as if nothing had been.
    Late,
    /// A short pause, then everything is right.
    Slow(Duration),
    /// The client ends there, with its connections.
    Die,
    /// Something in between answers with this status; the hub hears nothing. Callbacks only.
    Status(u16),
    /// The hub's answer arrives as bytes that are no JSON. Callbacks only.
    Malformed,
    /// The hub's answer breaks off. Callbacks only.
    Truncated,
    /// The hub does what it is told and its answer never arrives.
    Lost,
    /// Sent again after it was answered.
    Twice,
    /// Sent twice at the same time.
    TwiceAtOnce,
    /// What is sent makes no sense: bytes that are no JSON, no handshake, a range beyond the end; the right thing follows.
    Garbled,
    /// A request breaks off in the middle of its payload, and the client with it. Writes only.
    BrokenOff,
    /// Both connections are cut and made again before it. Writes only.
    Reconnect,
}
