//! Where the memory of DMA protection lies.

use hv::addr::PhysRange;
use hv::launch::DMA_AREA_SIZE;

/// Alignment of the area.
const ALIGN: u64 = 2 << 20;

/// The memory that belongs to DMA protection: [`DMA_AREA_SIZE`] bytes. Each vendor's module says what lies where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaArea {
    range: PhysRange,
}

impl DmaArea {
    /// The area at the top of the MLE region; `None` when it does not fit, is not aligned to 2 MiB, or lies beyond
    /// the 52 bits of a physical address.
    pub fn at_top_of(region: &PhysRange) -> Option<Self> {
        let start = region.end()?.checked_sub(DMA_AREA_SIZE)?;
        let range = PhysRange::new(start, DMA_AREA_SIZE)?;
        let fits = region.contains(&range) && region.last() >> 52 == 0;
        (fits && start.is_multiple_of(ALIGN)).then_some(Self { range })
    }

    /// The whole area.
    pub fn range(&self) -> PhysRange {
        self.range
    }

    /// Address of byte `offset` of the area.
    pub(crate) fn at(&self, offset: u64) -> u64 {
        self.range.start().wrapping_add(offset)
    }
}
