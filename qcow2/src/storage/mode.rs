//! Which of the ways to write a file is taken, and what keeps a faster one from being taken.

use std::io;

use rustix::io::Errno;

/// How payload reaches a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Around the page cache, with many writes under way from one thread (io_uring).
    Ring,
    /// Around the page cache where a write has at least [`Way::DIRECT_BYTES_MIN`], through it otherwise; a few threads that
    /// wait for one write each.
    Direct,
    /// Through the page cache; a few threads that wait for one write each.
    PageCache,
}

impl Way {
    /// The smallest write that goes around the page cache where each keeps a thread waiting. (Measured on a virtual disk with
    /// ext4: a copy of 1 GiB in requests of 256 KiB takes 0.9 s instead of 1.3 s, random writes of 4 KiB take twice as long as
    /// through the cache.)
    pub const DIRECT_BYTES_MIN: usize = 128 << 10;
}

/// What the system has for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// What direct writes (`O_DIRECT`) demand, or why there are none.
    pub direct: Result<Alignment, NoDirect>,
    /// Whether there is io_uring, or why not.
    pub ring: Result<(), NoRing>,
}

impl Mode {
    /// The way that is taken for payload in memory that begins at a page.
    pub fn way(&self) -> Way {
        match (&self.direct, &self.ring) {
            (Ok(_), Ok(())) => Way::Ring,
            (Ok(_), Err(_)) => Way::Direct,
            // The ring is for direct writes only.
            (Err(_), _) => Way::PageCache,
        }
    }
}

/// What a direct write must be a multiple of, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Offset and length.
    pub block: u64,
    /// The address of the memory.
    pub memory: usize,
}

/// Why a file is not written around the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoDirect {
    /// Nobody asked for it.
    #[error("it was not asked for")]
    NotAsked,
    /// No `STATX_DIOALIGN`: of what it demands, and of its coherence with the cache, nothing is known.
    #[error("the file system does not announce it (STATX_DIOALIGN: Linux 6.1 and a file system that takes part)")]
    NotAnnounced,
    /// The file system says that it has none for this file.
    #[error("the file system has none for this file")]
    None,
    /// It demands more than a page.
    #[error("the file system demands an alignment of more than a page ({} bytes, memory {})", .0.block, .0.memory)]
    Coarse(Alignment),
    /// The file cannot be opened with `O_DIRECT`.
    #[error("the file cannot be opened for it: {}", system(*errno))]
    Refused {
        /// The system's answer.
        errno: i32,
    },
    /// A direct write or read was refused when it came to it.
    #[error("a write or read was refused although the file system announces it")]
    RefusedLater,
}

/// Why there is no io_uring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRing {
    /// Nobody asked for it.
    #[error("it was not asked for")]
    NotAsked,
    /// `ENOSYS`.
    #[error("the kernel has none, or a seccomp filter hides it")]
    Missing,
    /// `EPERM` or `EACCES`.
    #[error("it is forbidden (kernel.io_uring_disabled, or a seccomp filter as containers have it)")]
    Forbidden,
    /// `EINVAL`: the ring is set up in a way that the kernel does not know.
    #[error("the kernel is too old for it (Linux 6.1)")]
    TooOld,
    /// Anything else, such as too little memory or too many open files.
    #[error("{}", system(*errno))]
    Failed {
        /// The system's answer.
        errno: i32,
    },
}

impl From<io::Error> for NoRing {
    fn from(error: io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        match Errno::from_raw_os_error(errno) {
            Errno::NOSYS => Self::Missing,
            Errno::PERM | Errno::ACCESS => Self::Forbidden,
            Errno::INVAL => Self::TooOld,
            _ => Self::Failed { errno },
        }
    }
}

fn system(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_direct_writes_there_is_no_ring_and_without_a_ring_large_writes_are_direct() {
        let direct = [Ok(Alignment { block: 512, memory: 512 }), Err(NoDirect::NotAnnounced)];
        let ring = [Ok(()), Err(NoRing::Forbidden)];
        let ways = direct.map(|direct| ring.map(|ring| Mode { direct, ring }.way()));
        assert_eq!(ways, [[Way::Ring, Way::Direct], [Way::PageCache, Way::PageCache]]);
    }

    #[test]
    fn what_the_system_says_of_a_ring_is_told_in_words() {
        let why = |errno: Errno| NoRing::from(io::Error::from(errno));
        assert_eq!(why(Errno::NOSYS), NoRing::Missing);
        assert_eq!(why(Errno::PERM), NoRing::Forbidden);
        assert_eq!(why(Errno::INVAL), NoRing::TooOld);
        let other = why(Errno::NOMEM);
        assert_eq!(other, NoRing::Failed { errno: Errno::NOMEM.raw_os_error() });
        assert!(other.to_string().contains("memory"), "{other}");
    }
}
