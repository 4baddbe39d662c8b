//! The client's connections to the export of a disk: two, of which one stays idle, and the requests on the other.

use std::io;
use std::time::Duration;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::client::{Client as NbdClient, Transport};
use blockyard_nbd::wire::option::{OptionCode, ReplyType};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};
use blockyard_nbd::{Durability, ZeroFlags};
use bytes::Bytes;
use tokio::net::TcpStream;

use super::FakeDisk;
use super::client::{Client, Target};
use super::faults::{Faults, PausePoint};
use super::log::Event;
use super::step::{Part, Step, StepFault};

/// How often a failed request is sent on the same socket, and the pauses in between: 1, 2 and 4 of these.
const ATTEMPTS: u32 = 4;
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// The two connections to one disk.
pub(super) struct Link {
    busy: NbdClient,
    /// Never asked for anything.
    pub(super) idle: NbdClient,
    /// What is sent as zeroes.
    is_zero: fn(&[u8]) -> bool,
}

impl Link {
    async fn connect(target: &Target, faults: &Faults) -> io::Result<Self> {
        let busy = NbdClient::connect(&target.uri).await.map_err(io::Error::other)?;
        let idle = NbdClient::connect(&target.uri).await.map_err(io::Error::other)?;
        let is_zero = if faults.sampled_zeroes { sampled_zero } else { is_zero };
        Ok(Self { busy, idle, is_zero })
    }

    async fn put(&self, offset: u64, data: Bytes) -> Result<(), blockyard_nbd::client::ClientError> {
        if (self.is_zero)(&data) {
            self.busy.zero(offset, data.len() as u64, ZeroFlags::default(), Durability::OnFlush).await
        } else {
            self.busy.write(offset, data, Durability::OnFlush).await
        }
    }
}

impl Client {
    /// Connects to a disk as it goes at this step.
    pub(super) async fn connect(&mut self, index: usize, target: &Target) -> io::Result<Link> {
        let fault = self.fault_at(Step::Connect(index));
        match fault {
            Some(StepFault::Refused) => return Err(io::ErrorKind::ConnectionRefused.into()),
            Some(StepFault::Hang) => std::future::pending().await,
            Some(StepFault::Late) => self.pause().await,
            Some(StepFault::Slow(pause)) => tokio::time::sleep(pause).await,
            Some(StepFault::Garbled) => {
                let mut raw = bare(target).await?;
                raw.send(b"GET / HTTP/1.1\r\n\r\n").await?;
                // Until it is hung up upon.
                raw.receive_all().await?;
            }
            _ => {}
        }
        let link = Link::connect(target, &self.config.faults).await?;
        match fault {
            Some(StepFault::Die) => Err(io::Error::other("the client died")),
            Some(StepFault::Twice | StepFault::Reconnect) => {
                drop(link);
                Link::connect(target, &self.config.faults).await
            }
            Some(StepFault::TwiceAtOnce) => Link::connect(target, &self.config.faults).await,
            _ => Ok(link),
        }
    }

    /// Sends one request of a copy, as it goes at this step.
    pub(super) async fn send(
        &mut self,
        link: &mut Link,
        target: &Target,
        disk: &FakeDisk,
        (offset, length): (u64, u64),
        step: Option<Step>,
    ) -> io::Result<()> {
        if let Some(PausePoint::AfterBytes(bytes)) = self.config.faults.pause
            && self.sent_bytes >= bytes
        {
            self.pause().await;
        }
        if self.config.faults.die_after_bytes.is_some_and(|bytes| self.sent_bytes >= bytes) {
            return Err(io::Error::other("the client died"));
        }
        let request = u32::try_from(length).map_err(io::Error::other)?;
        let data = Bytes::from(disk.source.read(offset, request as usize).await?);
        match step.and_then(|step| self.fault_at(step)) {
            Some(StepFault::Hang) => std::future::pending().await,
            Some(StepFault::Late) => self.pause().await,
            Some(StepFault::Slow(pause)) => tokio::time::sleep(pause).await,
            Some(StepFault::Die) => return Err(io::Error::other("the client died")),
            Some(StepFault::BrokenOff) => return break_off(target, offset, &data).await,
            Some(StepFault::Reconnect) => *link = Link::connect(target, &self.config.faults).await?,
            Some(StepFault::Twice) => link.put(offset, data.clone()).await.map_err(io::Error::other)?,
            Some(StepFault::TwiceAtOnce) => {
                let twice = tokio::join!(link.put(offset, data.clone()), link.put(offset, data.clone()));
                twice.0.and(twice.1).map_err(io::Error::other)?;
            }
            Some(StepFault::Lost) => {
                // Cut off before the answer is looked at.
                link.put(offset, data.clone()).await.map_err(io::Error::other)?;
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            Some(StepFault::Garbled) => {
                let beyond = link.put(disk.source.size_bytes(), data.clone()).await.err();
                let error = beyond.map_or_else(|| "none".to_owned(), |error| error.to_string());
                self.shared.log.push(Event::WriteFailed { disk_id: target.disk_id, error });
            }
            Some(StepFault::Refused | StepFault::Status(_) | StepFault::Malformed | StepFault::Truncated) | None => {}
        }
        let mut pause = RETRY_PAUSE;
        for attempt in 1..=ATTEMPTS {
            match link.put(offset, data.clone()).await {
                Ok(()) => break,
                Err(error) => {
                    let failed = Event::WriteFailed { disk_id: target.disk_id, error: error.to_string() };
                    self.shared.log.push(failed);
                    if attempt == ATTEMPTS {
                        return Err(io::Error::other(error));
                    }
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            }
        }
        self.sent_bytes += length;
        Ok(())
    }
}

fn is_zero(data: &[u8]) -> bool {
    data.iter().all(|&byte| byte == 0)
}

/// A large chunk judged by its beginning, its quarters and its end.
fn sampled_zero(data: &[u8]) -> bool {
    const SAMPLED: usize = 4 << 20;
    const SAMPLE: usize = 8 << 10;
    if data.len() < SAMPLED {
        return is_zero(data);
    }
    let last = data.len() - SAMPLE;
    (0..=4).all(|quarter| data.get(last / 4 * quarter..).is_some_and(|rest| is_zero(&rest[..SAMPLE.min(rest.len())])))
}

/// Which part of a copy the request of `length` bytes is that `copied` of `total` bytes were sent before.
pub(super) fn part(copied: u64, length: u64, total: u64) -> Option<Part> {
    match copied {
        0 => Some(Part::First),
        _ if copied + length >= total => Some(Part::Last),
        _ => (copied >= total / 2).then_some(Part::Middle),
    }
}

/// A connection that nothing has been said on.
async fn bare(target: &Target) -> io::Result<Raw<TcpStream>> {
    let Transport::Tcp { host, port } = &target.uri.transport else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    Ok(Raw(TcpStream::connect((host.as_str(), *port)).await?))
}

/// Announces a write, sends half of it, and is gone.
async fn break_off(target: &Target, offset: u64, data: &Bytes) -> io::Result<()> {
    let mut raw = bare(target).await?;
    raw.greet(3).await?;
    let name = target.uri.export.as_bytes();
    let length = u32::try_from(name.len()).map_err(io::Error::other)?;
    raw.option(OptionCode::GO, &[&length.to_be_bytes()[..], name, &[0, 0]].concat()).await?;
    while raw.option_reply().await?.0.reply != ReplyType::ACK {}
    let request =
        Request { flags: CommandFlags(0), command: Command::WRITE, cookie: 1, offset, length: data.len() as u64 };
    raw.request(request, &data.slice(..data.len() / 2)).await?;
    Err(io::Error::other("the client died in the middle of a write"))
}
