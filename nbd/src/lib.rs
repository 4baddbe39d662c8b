//! An NBD server and a small client for tokio.
//!
//! [`Server::start`] serves [`Export`]s on a bound listener; [`client`] talks to any NBD server; [`tls`] is what both need to
//! do so encrypted. Memory is bounded over the whole process by one [`Budget`]. [`wire`], [`handshake`] and [`transmission`]
//! are the protocol without I/O.
#![forbid(unsafe_code)]

pub mod budget;
pub mod client;
pub mod error;
pub mod export;
mod half_open;
pub mod handshake;
pub mod limits;
pub mod server;
mod session;
pub mod stats;
pub mod tls;
pub mod transmission;
pub mod wire;

pub use budget::Budget;
pub use error::{Error, ErrorKind};
pub use export::{Buffer, Content, Context, ContextSet, Device, Durability, Export, Extent, Space, ZeroFlags};
pub use limits::{BudgetLimits, Limits};
pub use server::{Exports, Handle, ListPolicy, Options, Server, Stopped};
pub use tls::{ServerTls, Tls};
