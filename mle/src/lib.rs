//! The hypervisor as a library: everything of it that runs on the host under test.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod metal;
