//! Port leases: a bound socket is the only proof that a port is ours, so a lease is a number with its listening socket.
//!
//! The pool remembers what this process has leased. What a foreign process holds is found by binding, skipped, and never
//! announced to anyone. All ports of a VM are leased together or none is.
//!
//! A port that was given back is the last to be given out again: whoever comes late for the disk that was there finds nobody for
//! as long as the range allows.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::{TcpListener, TcpSocket};

/// Connections that may wait in the kernel until they are accepted: a guess, far above what a client opens at once.
const BACKLOG: u32 = 1024;

/// The ports from which listeners are made.
#[derive(Clone, Debug)]
pub struct PortPool {
    bind: IpAddr,
    leased: Arc<Mutex<Leases>>,
}

#[derive(Debug, Default)]
struct Leases {
    /// Port to the number of its lease.
    by_port: BTreeMap<u16, u64>,
    next_lease: u64,
    /// Port to the number of its last release: the higher, the later.
    released: BTreeMap<u16, u64>,
    next_release: u64,
}

/// A port that is ours until this value is dropped. Dropping gives back this lease and never a later one of the port.
#[derive(Debug)]
pub struct PortLease {
    port: u16,
    lease: u64,
    leased: Arc<Mutex<Leases>>,
}

/// A leased port and the socket that listens on it.
#[derive(Debug)]
pub struct BoundPort {
    /// Accepts connections from now on; nothing is answered until somebody serves it.
    pub listener: TcpListener,
    /// Keeps the number ours. Must outlive the listener.
    pub lease: PortLease,
}

/// Why there were not enough ports.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The range is used up, by us or by others.
    #[error("{wanted} ports are needed and {found} of {} are free", range.clone().count())]
    Exhausted {
        /// How many were asked for.
        wanted: usize,
        /// How many could be bound.
        found: usize,
        /// The configured range.
        range: RangeInclusive<u16>,
    },
    /// Binding fails for a reason that another port would not cure.
    #[error("no listener can be bound to {address}: {source}")]
    Bind {
        /// What was tried.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

impl PortPool {
    /// A pool of the ports of one address; ranges are named with each lease, since nodes may have their own.
    pub fn new(bind: IpAddr) -> Self {
        Self { bind, leased: Arc::default() }
    }

    /// Binds `count` free ports of `range`: those that nobody has had yet, from the lowest on, then those that have been free for
    /// longest. Must be called on a runtime.
    ///
    /// # Errors
    /// Fewer than `count` can be bound; nothing is kept then.
    pub fn lease(&self, range: &RangeInclusive<u16>, count: usize) -> Result<Vec<BoundPort>, PortError> {
        let mut bound = Vec::with_capacity(count);
        for port in self.in_turn(range) {
            if bound.len() == count {
                break;
            }
            let Some(lease) = self.reserve(port) else { continue };
            let address = SocketAddr::new(self.bind, port);
            match listen(address) {
                Ok(listener) => bound.push(BoundPort { listener, lease }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    tracing::debug!(port, "a foreign process holds the port; skipped");
                }
                Err(source) => return Err(PortError::Bind { address, source }),
            }
        }
        if bound.len() < count {
            return Err(PortError::Exhausted { wanted: count, found: bound.len(), range: range.clone() });
        }
        Ok(bound)
    }

    /// The ports that this process has leased.
    pub fn leased(&self) -> Vec<u16> {
        lock(&self.leased).by_port.keys().copied().collect()
    }

    /// The ports of a range in the order in which they are to be given out.
    fn in_turn(&self, range: &RangeInclusive<u16>) -> Vec<u16> {
        let leased = lock(&self.leased);
        let mut ports: Vec<u16> = range.clone().collect();
        ports.sort_by_key(|port| leased.released.get(port));
        ports
    }

    /// Claims a number before it is bound, so that two jobs never try the same one.
    fn reserve(&self, port: u16) -> Option<PortLease> {
        let mut leased = lock(&self.leased);
        if leased.by_port.contains_key(&port) {
            return None;
        }
        let lease = leased.next_lease;
        leased.next_lease += 1;
        leased.by_port.insert(port, lease);
        Some(PortLease { port, lease, leased: Arc::clone(&self.leased) })
    }
}

impl PortLease {
    /// The number.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for PortLease {
    fn drop(&mut self) {
        let mut leased = lock(&self.leased);
        if leased.by_port.get(&self.port) == Some(&self.lease) {
            leased.by_port.remove(&self.port);
            let release = leased.next_release;
            leased.next_release += 1;
            leased.released.insert(self.port, release);
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Without it the connections of the job before, waiting out their time in the kernel, would hold the port.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn lock(leased: &Mutex<Leases>) -> MutexGuard<'_, Leases> {
    leased.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// A range of ports of which at least the first is free now; the tests cope with others being taken.
    fn range(length: u16) -> RangeInclusive<u16> {
        let probe = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
        let first = probe.local_addr().unwrap().port().min(u16::MAX - length);
        first..=first + (length - 1)
    }

    #[tokio::test]
    async fn lowest_free_ports_come_first_and_are_free_again_when_dropped() {
        let pool = PortPool::new(LOOPBACK);
        let range = range(50);
        let first = pool.lease(&range, 3).unwrap();
        let ports: Vec<u16> = first.iter().map(|bound| bound.lease.port()).collect();
        assert!(ports.is_sorted());
        assert_eq!(pool.leased(), ports);
        let second = pool.lease(&range, 1).unwrap();
        assert!(second[0].lease.port() > ports[2]);
        drop((first, second));
        assert!(pool.leased().is_empty());
    }

    #[test]
    fn port_that_was_given_back_is_the_last_to_be_given_out_again() {
        let pool = PortPool::new(LOOPBACK);
        let range = 10..=15;
        for (given_back, expected) in [
            (&[][..], [10, 11, 12, 13, 14, 15]),
            (&[13, 10], [11, 12, 14, 15, 13, 10]),
            (&[12, 13], [11, 14, 15, 10, 12, 13]),
            (&[15, 14, 11], [10, 12, 13, 15, 14, 11]),
        ] {
            let leases: Vec<PortLease> = given_back.iter().map(|port| pool.reserve(*port).unwrap()).collect();
            leases.into_iter().for_each(drop);
            assert_eq!(pool.in_turn(&range), expected);
        }
        assert_eq!(pool.in_turn(&(13..=16)), [16, 13, 15, 14]);
    }

    #[tokio::test]
    async fn port_held_by_a_foreign_process_is_skipped() {
        let pool = PortPool::new(LOOPBACK);
        let foreign = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
        let held = foreign.local_addr().unwrap().port();
        let range = held..=held.saturating_add(50);
        let bound = pool.lease(&range, 1).unwrap();
        assert!(bound[0].lease.port() > held);
        assert_eq!(pool.leased(), [bound[0].lease.port()]);
    }

    #[tokio::test]
    async fn too_few_free_ports_lease_none() {
        let pool = PortPool::new(LOOPBACK);
        let range = range(3);
        let error = pool.lease(&range, 4).unwrap_err();
        assert!(matches!(error, PortError::Exhausted { wanted: 4, .. }), "{error}");
        assert!(pool.leased().is_empty());
    }

    #[tokio::test]
    async fn released_port_is_never_released_again_under_a_new_owner() {
        let pool = PortPool::new(LOOPBACK);
        let old = pool.reserve(10).unwrap();
        // What a second release of the old lease would do, should anybody manage to copy it.
        let copy = PortLease { port: old.port, lease: old.lease, leased: Arc::clone(&old.leased) };
        drop(old);
        let new = pool.reserve(10).unwrap();
        drop(copy);
        assert_eq!(pool.leased(), [10]);
        drop(new);
        assert!(pool.leased().is_empty());
    }
}
