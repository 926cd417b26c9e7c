//! Where tables and queues lie.

use hv::addr::PAGE_SIZE;

use super::MAX_UNITS;
use super::defs::ENTRY_SIZE;
use crate::area::DmaArea;

/// Entries of a full interrupt table.
pub(super) const INTERRUPTS: u64 = 1 << 16;
/// Offset of the tables of one page each, behind the interrupt table.
const PAGES: u64 = INTERRUPTS * ENTRY_SIZE;
const DENY_ROOT: u64 = PAGES;
const GUEST_ROOT: u64 = PAGES + PAGE_SIZE;
const GUEST_CONTEXT: u64 = PAGES + 2 * PAGE_SIZE;
const STATUS: u64 = PAGES + 3 * PAGE_SIZE;
const QUEUES: u64 = PAGES + 4 * PAGE_SIZE;
/// Distance of two units' status words: a cache line.
const STATUS_STRIDE: u64 = 64;

const _: () = assert!(MAX_UNITS as u64 * STATUS_STRIDE <= PAGE_SIZE);
const _: () = assert!(QUEUES + MAX_UNITS as u64 * PAGE_SIZE <= hv::launch::DMA_AREA_SIZE);

/// An interrupt table of all indices in the first MiB, then root tables, the guest's context table, the words in which
/// units say that they are done, and a queue for each.
impl DmaArea {
    /// The interrupt table.
    pub(super) fn interrupt_table(&self) -> u64 {
        self.at(0)
    }

    /// A root table of zeros.
    pub(super) fn deny_root(&self) -> u64 {
        self.at(DENY_ROOT)
    }

    /// The root table that gives every device the guest's memory.
    pub(super) fn guest_root(&self) -> u64 {
        self.at(GUEST_ROOT)
    }

    /// The one context table of all buses.
    pub(super) fn guest_context(&self) -> u64 {
        self.at(GUEST_CONTEXT)
    }

    /// Where a unit says that it is done.
    pub(super) fn status(&self, unit: usize) -> u64 {
        self.at((unit as u64).wrapping_mul(STATUS_STRIDE).wrapping_add(STATUS))
    }

    /// A unit's queue: one page.
    pub(super) fn queue(&self, unit: usize) -> u64 {
        self.at((unit as u64).wrapping_mul(PAGE_SIZE).wrapping_add(QUEUES))
    }
}
