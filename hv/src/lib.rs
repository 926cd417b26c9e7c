//! Contracts between Cordon's parts: addresses, device access, launch hand-over, page tables.
//!
//! Nothing here touches hardware, so all of it runs under `cargo test` on any machine.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
#![forbid(unsafe_code)]

pub mod addr;
pub mod failure;
pub mod io;
pub mod launch;
pub mod radix;
pub mod slrt;
pub mod space;
pub mod vcpu;
