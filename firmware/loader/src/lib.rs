//! What the loader knows without a machine: boot entries, the checks before a launch, the table it hands over.
//!
//! Nothing here is trusted by what is launched: a loader that errs, or lies, shows in PCR 17 and 18.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod choice;
pub mod entry;
pub mod image;
pub mod machine;
pub mod paging;
pub mod park;
pub mod screen;
pub mod senter;
pub mod table;
pub mod tpm;
