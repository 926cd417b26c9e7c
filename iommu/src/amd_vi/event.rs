//! The event log: who tried what, where.
//!
//! QEMU 7.2 never writes one: it takes the log for overflowed always. Later versions do.

/// What an IOMMU logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A device table entry that it does not accept.
    IllegalEntry,
    /// A request that the tables do not allow.
    PageFault,
    /// The device table was not readable.
    TableHardware,
    /// A page table was not readable.
    PageTableHardware,
    /// A command that it does not accept.
    IllegalCommand,
    /// The command buffer was not readable.
    CommandHardware,
    /// A device did not answer an invalidation.
    DeviceTimeout,
    /// A request of a kind that the device may not make.
    InvalidRequest,
    /// Another code.
    Other(u8),
}

/// One entry of the log.
///
/// Spec: \[IOMMU\] "Event Log Entries".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Device id of the IOMMU.
    pub unit: u16,
    /// What happened.
    pub kind: EventKind,
    /// Device id of the device. QEMU's page faults leave the bus out.
    pub device: u16,
    /// Bits 27:16 of the second word; their meaning depends on the kind. QEMU sets other bits than hardware.
    pub flags: u16,
    /// The device's address, or the IOMMU's own, by kind.
    pub address: u64,
}

impl Event {
    pub(super) const fn decode(unit: u16, entry: [u64; 2]) -> Self {
        let [low, address] = entry;
        let kind = match (low >> 60) as u8 {
            1 => EventKind::IllegalEntry,
            2 => EventKind::PageFault,
            3 => EventKind::TableHardware,
            4 => EventKind::PageTableHardware,
            5 => EventKind::IllegalCommand,
            6 => EventKind::CommandHardware,
            7 => EventKind::DeviceTimeout,
            8 => EventKind::InvalidRequest,
            other => EventKind::Other(other),
        };
        Self { unit, kind, device: low as u16, flags: (low >> 48 & 0xfff) as u16, address }
    }

    /// Whether a page fault was a write (flag RW).
    pub fn is_write(&self) -> bool {
        self.kind == EventKind::PageFault && self.flags & 1 << 5 != 0
    }
}

/// What [`super::AmdVi::drain_events`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Events taken out.
    pub events: u32,
    /// Whether some log ran over: events were lost.
    pub overflowed: bool,
    /// Whether some log holds more.
    pub more: bool,
}

impl Drained {
    pub(super) fn add(&mut self, other: Self) {
        self.events = self.events.saturating_add(other.events);
        self.overflowed |= other.overflowed;
        self.more |= other.more;
    }
}
