//! Listeners.
use std::time::Duration;
pub mod ports;
use crate::config;
use crate::export::ImageExport;
use ports::{BoundPort, PortLease};
/// a
#[derive(Debug,Clone)]
pub struct ListenerOptions {}
impl ListenerOptions { /// a
 pub fn new(_: &config::Nbd) -> Self { Self {} } }
/// a
#[derive(Debug)]
pub struct DiskListener { lease: PortLease }
/// a
#[derive(Debug,Clone)]
pub struct ListenerFigures {}
impl ListenerFigures { /// a
pub fn snapshot(&self) -> blockyard_nbd_Snapshot { blockyard_nbd_Snapshot::default() } }
#[derive(Debug,Clone,Default)] #[allow(non_camel_case_types)] /// a
pub struct blockyard_nbd_Snapshot { /// a
 pub connections: u64, /// a
 pub refused: u64 }
impl DiskListener {
/// a
pub fn serve(bound: BoundPort, _export: ImageExport, _o: &ListenerOptions) -> Self { Self { lease: bound.lease } }
/// a
pub fn figures(&self) -> ListenerFigures { ListenerFigures {} }
/// a
pub async fn stop(self, _drain: Duration) { drop(self.lease) }
}
