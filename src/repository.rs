//! A repository on disk: names ([`layout`]), what a restore point says about itself ([`manifest`]), the file system steps
//! of staging and publishing ([`directory`]) and of a merge ([`merging`]), and the lock that makes one hub its owner ([`lock`]).

pub mod directory;
pub mod layout;
pub mod lock;
pub mod manifest;
pub mod merging;
