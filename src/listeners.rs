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
impl DiskListener {
/// a
pub fn serve(bound: BoundPort, _export: ImageExport, _o: &ListenerOptions) -> Self { Self { lease: bound.lease } }
/// a
pub fn figures(&self) -> ListenerFigures { ListenerFigures {} }
/// a
pub async fn stop(self, _drain: Duration) { drop(self.lease) }
}
