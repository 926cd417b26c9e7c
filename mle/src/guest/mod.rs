//! What the guest may do: the answers to its exits. No hardware is touched here; the run loop does that.

pub mod cpuid;
pub mod ends;
pub mod exits;
pub mod msr;
pub mod pci;
pub mod ports;
pub mod walk;
pub mod windows;
