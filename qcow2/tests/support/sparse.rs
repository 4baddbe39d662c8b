//! Storage in memory that holds only the pages that were written: files of many TiB for the price of their content.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "part of the tests that include it")]

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::sync::Mutex;

use blockyard_qcow2::storage::{Reservation, Storage};

const PAGE: u64 = 4096;

#[derive(Debug, Default)]
struct State {
    pages: BTreeMap<u64, Box<[u8]>>,
    length: u64,
}

#[derive(Debug, Default)]
pub struct Sparse {
    state: Mutex<State>,
}

impl Sparse {
    /// Bytes held in memory.
    pub fn held(&self) -> u64 {
        self.state.lock().unwrap().pages.len() as u64 * PAGE
    }

    /// Offset and bytes of every page that holds anything, for a copy on a real file system.
    pub fn each_page(&self, mut visit: impl FnMut(u64, &[u8])) {
        self.state.lock().unwrap().pages.iter().for_each(|(number, page)| visit(number * PAGE, page));
    }
}

/// Cuts a range at page borders: page, offset in it, length.
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = offset;
    std::iter::from_fn(move || {
        let piece = (PAGE - at % PAGE).min(offset + length - at);
        let found = (at / PAGE, (at % PAGE) as usize, piece as usize);
        at += piece;
        (piece > 0).then_some(found)
    })
}

impl Storage for Sparse {
    fn read(&self, offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        for (page, within, length) in pieces(offset, buffer.len() as u64) {
            let (part, rest) = buffer.split_at_mut(length);
            buffer = rest;
            match state.pages.get(&page) {
                Some(bytes) => part.copy_from_slice(&bytes[within..within + length]),
                None => part.fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let mut state = self.state.lock().unwrap();
        let mut rest = bytes.as_slice();
        for (page, within, length) in pieces(offset, bytes.len() as u64) {
            let (part, behind) = rest.split_at(length);
            rest = behind;
            let page = state.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            page[within..within + length].copy_from_slice(part);
        }
        state.length = state.length.max(offset + bytes.len() as u64);
        Ok(())
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.write(offset, slices)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().length)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let old = self.length()?;
        if length < old {
            self.punch(length, old - length)?;
        }
        self.state.lock().unwrap().length = length;
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        let mut state = self.state.lock().unwrap();
        state.length = state.length.max(offset + length);
        Ok(Reservation::Done)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let numbers: Vec<u64> =
            state.pages.range(offset / PAGE..(offset + length).div_ceil(PAGE)).map(|(number, _)| *number).collect();
        for number in numbers {
            let (start, end) = (offset.max(number * PAGE), (offset + length).min((number + 1) * PAGE));
            if end - start == PAGE {
                state.pages.remove(&number);
            } else if let Some(page) = state.pages.get_mut(&number) {
                page[(start % PAGE) as usize..][..(end - start) as usize].fill(0);
            }
        }
        Ok(())
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}
