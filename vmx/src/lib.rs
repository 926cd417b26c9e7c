//! Intel back end: VMX, and definitions for TXT.
//!
//! [`vcpu::VmxVcpu`] is the virtual CPU; everything that decides what a guest may do is in the MLE, against
//! [`hv::vcpu::Vcpu`].
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod caps;
pub mod defs;
pub mod insn;
pub mod maps;
pub mod mtrr;
pub mod txt;
pub mod vcpu;
pub mod vmcs;
