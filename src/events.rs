//! What is told of what happens: the feed of stored events with live progress in between, and the end of old events.
//!
//! Events are written by whoever makes a change, in its transaction ([`store::events`](crate::store::events)). Here they are
//! only read. Webhooks read them too ([`webhooks`](crate::webhooks)), each at its own pace, like every stream.

pub mod expire;
pub mod feed;
