//! What a discovery answered: the disks of one VM, out of a body that may hold anything.
//!
//! Pure. The body is read twice: for where the VM is, and for its disks. So what is odd about the disks of other VMs is in
//! nobody's way, and what is kept of a body does not grow with it.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::store::vms::{DEVICE_KEY_MAX, DISK_SIZE_MAX, SECTOR_BYTES, UNIT_MAX};

/// The most disks that are taken for those of a VM; vSphere has 256.
const DISKS_MAX: usize = 1024;
/// Longest path of a VMDK, in characters; the same as in a request.
const PATH_MAX: usize = 1000;

/// Which VM is looked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its inventory path.
    pub path: String,
    /// The last segment of that. It decides among VMs that the answer has no path of.
    pub name: String,
}

/// A disk as the answer has it, with a key, size and path that a disk can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveredDisk {
    /// VMware's number, from `disk-<device key>`.
    pub device_key: u32,
    /// Its capacity.
    pub size_bytes: u64,
    /// The file that it writes to now: that of a snapshot while there is one.
    pub vmdk_path: Option<String>,
    /// Its unit; nothing where the answer has none, or one that no controller has.
    pub unit_number: Option<u32>,
}

/// Why the answer does not say which disks the VM has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// It is not in the form of an answer.
    #[error("the node's answer cannot be read: {text}")]
    Malformed {
        /// Where and why.
        text: String,
    },
    /// The VM is not in it.
    #[error("the node finds no VM at {path}{}", elsewhere.as_ref().map(|other| format!("; it finds one of this name at {other}")).unwrap_or_default())]
    NoSuchVm {
        /// Where it was looked for.
        path: String,
        /// Where another one of the same name is.
        elsewhere: Option<String>,
    },
    /// Several of its VMs may be the one.
    #[error("the node's answer has more than one VM at {path}")]
    SeveralVms {
        /// Where it was looked for.
        path: String,
    },
    /// The VM has none. A VM without disks cannot be told from one that could not be read.
    #[error("the node's answer names no disk of the VM")]
    NoDisks,
    /// An id without a device key in it.
    #[error("the node's answer has a disk with the id {id:?}, which is not disk-<device key>")]
    DiskId {
        /// The id.
        id: String,
    },
    /// Two disks with one key.
    #[error("the node's answer has two disks with the device key {device_key}")]
    SameKey {
        /// The key.
        device_key: u32,
    },
    /// A capacity that no disk has.
    #[error(
        "the node's answer says that disk {device_key} has {capacity_bytes} bytes; a disk has a positive multiple of 512"
    )]
    Capacity {
        /// Its key.
        device_key: u32,
        /// What the answer says.
        capacity_bytes: u64,
    },
    /// A path that is too long, or not one line.
    #[error("the node's answer has a VMDK path of disk {device_key} that is none")]
    VmdkPath {
        /// Its key.
        device_key: u32,
    },
}

impl AnswerError {
    /// The same error with what it holds of the answer made fit to be told.
    pub(super) fn map_texts(self, map: impl Fn(&str) -> String) -> Self {
        match self {
            Self::Malformed { text } => Self::Malformed { text: map(&text) },
            Self::NoSuchVm { path, elsewhere } => {
                Self::NoSuchVm { path, elsewhere: elsewhere.map(|other| map(&other)) }
            }
            Self::DiskId { id } => Self::DiskId { id: map(&id) },
            other => other,
        }
    }
}

/// The disks of the wanted VM: at least one, no two with the same key, in the order of the answer.
///
/// # Errors
/// The answer is none, does not have the VM, has it twice, or has something that cannot be of its disks.
pub(super) fn disks(body: &[u8], wanted: &Wanted) -> Result<Vec<DiscoveredDisk>, AnswerError> {
    let mut search = Search { wanted, by_path: Hits::None, by_name: Hits::None, elsewhere: None };
    read(body, &mut search)?;
    let mut disks = DisksOf { index: search.found()?, disks: Vec::new() };
    read(body, &mut disks)?;
    if disks.disks.is_empty() {
        return Err(AnswerError::NoDisks);
    }
    let mut keys = BTreeSet::new();
    let judged = disks.disks.into_iter().map(|disk| {
        let disk = judge(disk)?;
        if keys.insert(disk.device_key) { Ok(disk) } else { Err(AnswerError::SameKey { device_key: disk.device_key }) }
    });
    judged.collect()
}

fn read(body: &[u8], reader: &mut impl Reader) -> Result<(), AnswerError> {
    let malformed = |error: serde_json::Error| AnswerError::Malformed { text: error.to_string() };
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    deserializer.deserialize_map(Document(reader)).map_err(malformed)?;
    deserializer.end().map_err(malformed)
}

/// One reading of all VMs.
trait Reader {
    /// Reads the next VM, which is the one at this index. Says whether there was one.
    fn next<'de, A: SeqAccess<'de>>(&mut self, index: usize, vms: &mut A) -> Result<bool, A::Error>;
}

/// The whole answer.
struct Document<'r, R>(&'r mut R);

impl<'de, R: Reader> Visitor<'de> for Document<'_, R> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with vms")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut has_vms = false;
        while let Some(key) = map.next_key::<String>()? {
            if key != "vms" {
                map.next_value::<IgnoredAny>()?;
            } else if std::mem::replace(&mut has_vms, true) {
                return Err(A::Error::duplicate_field("vms"));
            } else {
                map.next_value_seed(Vms(&mut *self.0))?;
            }
        }
        if has_vms { Ok(()) } else { Err(A::Error::missing_field("vms")) }
    }
}

/// Its list. `null` is how some write an empty one.
struct Vms<'r, R>(&'r mut R);

impl<'de, R: Reader> DeserializeSeed<'de> for Vms<'_, R> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, R: Reader> Visitor<'de> for Vms<'_, R> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of VMs")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut vms: A) -> Result<(), A::Error> {
        let mut index = 0;
        while self.0.next(index, &mut vms)? {
            index += 1;
        }
        Ok(())
    }
}

/// How many VMs may be the one.
enum Hits {
    None,
    One(usize),
    Several,
}

impl Hits {
    fn add(&mut self, index: usize) {
        *self = match self {
            Self::None => Self::One(index),
            Self::One(_) | Self::Several => Self::Several,
        };
    }
}

/// The first reading: where the VM is.
struct Search<'w> {
    wanted: &'w Wanted,
    by_path: Hits,
    /// Of the name, and without a path that would say whether it is the one.
    by_name: Hits,
    elsewhere: Option<String>,
}

#[derive(Deserialize)]
struct Head {
    name: Option<String>,
    path: Option<String>,
}

impl Reader for Search<'_> {
    fn next<'de, A: SeqAccess<'de>>(&mut self, index: usize, vms: &mut A) -> Result<bool, A::Error> {
        let Some(Head { name, path }) = vms.next_element()? else { return Ok(false) };
        let named = name.as_ref() == Some(&self.wanted.name);
        match path.filter(|path| !path.is_empty()) {
            Some(path) if path == self.wanted.path => self.by_path.add(index),
            Some(path) if named => self.elsewhere = Some(path),
            None if named => self.by_name.add(index),
            Some(_) | None => {}
        }
        Ok(true)
    }
}

impl Search<'_> {
    fn found(self) -> Result<usize, AnswerError> {
        let path = self.wanted.path.clone();
        match (self.by_path, self.by_name) {
            (Hits::One(index), _) | (Hits::None, Hits::One(index)) => Ok(index),
            (Hits::Several, _) | (Hits::None, Hits::Several) => Err(AnswerError::SeveralVms { path }),
            (Hits::None, Hits::None) => Err(AnswerError::NoSuchVm { path, elsewhere: self.elsewhere }),
        }
    }
}

/// The second reading: its disks.
struct DisksOf {
    index: usize,
    disks: Vec<WireDisk>,
}

#[derive(Deserialize)]
struct Body {
    disks: Option<WireDisks>,
}

/// No more than a VM can have, so that nothing is kept of a list without end.
struct WireDisks(Vec<WireDisk>);

#[derive(Deserialize)]
struct WireDisk {
    id: String,
    capacity_bytes: u64,
    vmdk_path: Option<String>,
    unit_number: Option<i64>,
}

impl Reader for DisksOf {
    fn next<'de, A: SeqAccess<'de>>(&mut self, index: usize, vms: &mut A) -> Result<bool, A::Error> {
        if index != self.index {
            return Ok(vms.next_element::<IgnoredAny>()?.is_some());
        }
        let Some(body) = vms.next_element::<Body>()? else { return Ok(false) };
        self.disks = body.disks.map(|WireDisks(disks)| disks).unwrap_or_default();
        Ok(true)
    }
}

impl<'de> Deserialize<'de> for WireDisks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = WireDisks;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {DISKS_MAX} disks")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<WireDisks, A::Error> {
                let mut disks = Vec::new();
                while let Some(disk) = seq.next_element()? {
                    if disks.len() == DISKS_MAX {
                        return Err(A::Error::invalid_length(DISKS_MAX + 1, &self));
                    }
                    disks.push(disk);
                }
                Ok(WireDisks(disks))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

fn judge(disk: WireDisk) -> Result<DiscoveredDisk, AnswerError> {
    let Some(device_key) = device_key(&disk.id) else { return Err(AnswerError::DiskId { id: disk.id }) };
    let size_bytes = disk.capacity_bytes;
    if size_bytes == 0 || size_bytes > DISK_SIZE_MAX || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(AnswerError::Capacity { device_key, capacity_bytes: size_bytes });
    }
    let vmdk_path = disk.vmdk_path.filter(|path| !path.is_empty());
    let is_line = |path: &String| path.chars().count() <= PATH_MAX && !path.chars().any(char::is_control);
    if vmdk_path.as_ref().is_some_and(|path| !is_line(path) || path.trim().is_empty()) {
        return Err(AnswerError::VmdkPath { device_key });
    }
    // It is for display: the key says which disk it is.
    let unit_number = disk.unit_number.and_then(|unit| u32::try_from(unit).ok()).filter(|unit| *unit <= UNIT_MAX);
    Ok(DiscoveredDisk { device_key, size_bytes, vmdk_path, unit_number })
}

/// The key in `disk-<device key>`, in its one spelling.
fn device_key(id: &str) -> Option<u32> {
    let digits = id.strip_prefix("disk-")?;
    let key: u32 = digits.parse().ok()?;
    ((1..=DEVICE_KEY_MAX).contains(&key) && key.to_string() == digits).then_some(key)
}

#[cfg(test)]
mod tests;
