//! Everything that can go wrong with a node and its client, as values.

use std::time::Duration;

use super::step::{Step, StepFault};

/// What goes wrong; nothing by default.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// How the start call is answered.
    pub start: StartFault,
    /// How the question whether a job is known is answered.
    pub status: StatusFault,
    /// How a discovery is answered.
    pub discover: DiscoverFault,
    /// A step of the client's conversation that goes wrong.
    pub step: Option<(Step, StepFault)>,
    /// Where the client waits until it is told to go on.
    pub pause: Option<PausePoint>,
    /// The client is launched and never connects nor calls.
    pub never_connect: bool,
    /// The client dies, with its connections, after this many bytes of a VM.
    pub die_after_bytes: Option<u64>,
    /// The client says in telemetry that it is done before it has begun.
    pub lie_in_telemetry: bool,
    /// The client copies only the first half of each disk, as if it were a delta.
    pub delta_instead_of_full: bool,
    /// The client copies the whole of each disk, whatever change id it is told.
    pub full_instead_of_delta: bool,
    /// The client judges chunks of 4 MiB and more by five samples, and sends zeroes where all of them are zero.
    pub sampled_zeroes: bool,
    /// How `/complete` goes wrong.
    pub complete: CompleteFault,
    /// One connection per disk stays open until the node is dropped.
    pub leak_connection: bool,
    /// After the last disk the client writes to the first one again.
    pub write_after_complete: bool,
}

/// How the start call is answered.
#[derive(Clone, Debug, Default)]
pub enum StartFault {
    /// As it should be: 200, client launched.
    #[default]
    None,
    /// With this status and a plain text; the client is launched all the same when `launch` says so.
    Status {
        /// The HTTP status.
        status: u16,
        /// Whether a client starts.
        launch: bool,
    },
    /// Never, while the connection stays open.
    Hang {
        /// Whether a client starts.
        launch: bool,
    },
    /// Rightly, but after the client was launched and this time has passed.
    Late(Duration),
    /// By closing the connection without a byte.
    Reset {
        /// Whether a client starts.
        launch: bool,
    },
    /// 200 with this body instead of the right one.
    Body {
        /// What is sent.
        body: String,
        /// Whether a client starts.
        launch: bool,
    },
    /// 200 with a body that breaks off.
    Truncated {
        /// Whether a client starts.
        launch: bool,
    },
    /// As it should be, but two clients are launched.
    LaunchTwice,
    /// 200 that says `"status": "failed"`; no client.
    StatusFailed,
    /// 307 to another address; no client.
    Redirect(String),
}

/// How the question whether a job is known is answered.
#[derive(Clone, Debug, Default)]
pub enum StatusFault {
    /// As it should be: 404 before the launch, `running` for ever after.
    #[default]
    None,
    /// With this status and a plain text.
    Status(u16),
    /// With 200 and this body.
    Body(String),
    /// Never, while the connection stays open.
    Hang,
    /// By closing the connection without a byte.
    Reset,
    /// With 200 and a body that breaks off.
    Truncated,
    /// Rightly, but after this time.
    Late(Duration),
}

/// How a discovery is answered.
#[derive(Clone, Debug, Default)]
pub enum DiscoverFault {
    /// As it should be.
    #[default]
    None,
    /// With this status, and a plain text that holds the login.
    Status(u16),
    /// With 200 and this body.
    Body(String),
    /// Never, while the connection stays open.
    Hang,
    /// By closing the connection without a byte.
    Reset,
    /// With 200 and a body that breaks off.
    Truncated,
    /// Rightly, but only after [`super::FakeNode::resume`].
    Wait,
    /// 307 to another address.
    Redirect(String),
}

/// Where a client waits for [`super::FakeNode::resume`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PausePoint {
    /// Before it connects to the disk with this index.
    BeforeConnect(usize),
    /// When both connections to the disk with this index stand, before the first byte.
    Connected(usize),
    /// After this many bytes of the VM.
    AfterBytes(u64),
    /// With the disk with this index copied, before its `/complete`.
    BeforeComplete(usize),
}

/// How `/complete` goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompleteFault {
    /// Not at all.
    #[default]
    None,
    /// Each disk is completed twice.
    Twice,
    /// Each disk is completed before its first byte.
    Early,
    /// Each disk is completed before anything connects to it.
    BeforeConnect,
    /// A disk with this number is completed instead of the right one.
    Disk(u32),
    /// Each disk is completed a second time with another change id.
    OtherChangeId,
    /// Never.
    Never,
}
