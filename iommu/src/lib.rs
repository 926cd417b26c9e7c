//! DMA remapping: AMD-Vi and VT-d, and the ACPI tables that describe them.
//!
//! The SLB stage calls [`acpi::copy_table`] and [`amd_vi::deny_all`]; the MLE goes on with
//! [`amd_vi::AmdVi::take_over`]. On Intel it is [`vt_d::deny_all`] and [`vt_d::VtD`]. Why the order of the register
//! writes is what it is: `docs/adr/0001-closing-the-dma-window.md`, `docs/adr/0013-vt-d-bring-up.md`.
#![cfg_attr(not(any(test, feature = "model")), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
#![forbid(unsafe_code)]

pub mod acpi;
pub mod amd_vi;
mod area;
#[cfg(test)]
mod corpus_tests;
pub mod dmar;
pub mod fault;
pub mod ivrs;
pub mod malformed;
#[cfg(any(test, feature = "model"))]
pub mod model;
pub mod pci;
#[cfg(test)]
mod qemu;
pub mod reserved;
pub mod vt_d;

pub use area::DmaArea;

use hv::io::{Clock, Mmio, PhysMem, PortIo};

/// The machine as this crate needs it: ports (PCI configuration), time, memory, device registers, chance.
pub trait Platform: PortIo + Clock + PhysMem {
    /// A window of device registers.
    type Window: Mmio;

    /// Maps `len` bytes of device registers at physical `base`, uncached (PAT UC, so that no MTRR the gap left
    /// makes them cacheable); `None` when the platform can't reach them.
    fn map(&self, base: u64, len: u32) -> Option<Self::Window>;

    /// A value that devices can't foresee: RDRAND where there is one, the time-stamp counter mixed in.
    fn random(&self) -> u64;
}

/// The little-endian field of `N` bytes at `at`; `None` when it does not lie inside.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}
