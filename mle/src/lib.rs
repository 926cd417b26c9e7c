//! The hypervisor as a library: everything of it that runs on the host under test.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

pub mod acpi;
pub mod apic;
pub mod backend;
pub mod boot;
pub mod bus_masters;
pub mod cpu;
pub mod devices;
pub mod dma;
pub mod exposure;
#[cfg(test)]
mod fake;
pub mod fatal;
pub mod guest;
pub mod inputs;
pub mod kept_apic;
pub mod launch;
pub mod legacy_pic;
pub mod lent_timer;
pub mod logger;
pub mod measure;
pub mod memory;
pub mod metal;
pub mod paging;
pub mod platform;
pub mod pool;
pub mod relaunch;
pub mod run;
pub mod sandbox;
pub mod senter;
pub mod services;
pub mod slb;
pub mod smi;
pub mod smp;
pub mod trap;
pub mod watch;
