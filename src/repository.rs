//! A repository on disk: names ([`layout`]), what a restore point says about itself ([`manifest`]), the file system steps
//! of staging and publishing ([`directory`]) and of a merge ([`merging`]), a look at all that lies there ([`survey`]), and the
//! lock that makes one hub its owner ([`lock`]).

pub mod directory;
pub mod layout;
pub mod lock;
pub mod manifest;
pub mod merging;
pub mod survey;
