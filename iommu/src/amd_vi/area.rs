//! Where tables and rings lie.

use hv::launch::DMA_AREA_SIZE;

use super::MAX_UNITS;
use super::defs::{DTE_SIZE, FULL_TABLE};
use crate::area::DmaArea;

const PAGE: u64 = hv::addr::PAGE_SIZE;
/// Bytes of a full device table, and offset of the buffers behind it.
const TABLE_SIZE: u64 = 2 << 20;
const PAGES: u64 = (DMA_AREA_SIZE - TABLE_SIZE) / PAGE;
/// Buffer pages that belong to one IOMMU for good: commands, events, the rest spare.
const PAGES_PER_UNIT: u64 = PAGES / MAX_UNITS as u64;

/// A device table of all ids in the first 2 MiB, command buffers and event logs in the second.
impl DmaArea {
    /// Value of the device table register.
    pub(super) fn table_register(&self) -> u64 {
        self.at(0) | FULL_TABLE
    }

    /// Address of a device's table entry.
    pub(super) fn entry(&self, device: u32) -> u64 {
        self.at(u64::from(device).wrapping_mul(DTE_SIZE))
    }

    /// Some buffer page, chosen by `random`.
    pub(super) fn any_page(&self, random: u64) -> u64 {
        self.page(random % PAGES)
    }

    /// The command buffer of an IOMMU.
    pub(super) fn command_page(&self, unit: usize) -> u64 {
        self.page((unit as u64).wrapping_mul(PAGES_PER_UNIT))
    }

    /// The event log of an IOMMU.
    pub(super) fn event_page(&self, unit: usize) -> u64 {
        self.command_page(unit).wrapping_add(PAGE)
    }

    fn page(&self, index: u64) -> u64 {
        self.at(index.wrapping_mul(PAGE).wrapping_add(TABLE_SIZE))
    }
}

/// Value of the device table register for a table that can't be read: one of 4096 places in the topmost 8 GiB of the
/// 52-bit space. Cut to fewer bits, they fall into the 12 GiB below the top that AMD reserves for HyperTransport.
pub(super) fn nowhere(random: u64) -> u64 {
    const TOP: u64 = 1 << 52;
    const PLACES: u64 = 4096;
    let place = (random % PLACES).wrapping_add(1).wrapping_mul(TABLE_SIZE);
    TOP.wrapping_sub(place) | FULL_TABLE
}
