//! Registers, table entries and descriptors of a VT-d unit.
//!
//! Spec: \[VTD\] "Remapping Hardware Register Descriptions", "Invalidation Descriptors", "Translation Structure
//! Formats"; checked against Linux 6.12 `drivers/iommu/intel/iommu.h` and `include/linux/dmar.h`.

use hv::radix::PageSize;

/// Register offsets in the window; bits in the width that is used to access them.
pub mod reg {
    /// Capability, 64 bits: see [`super::Capabilities`].
    pub const CAP: u32 = 0x08;
    /// Extended Capability, 64 bits.
    pub const ECAP: u32 = 0x10;
    /// Global Command, 32 bits, write only: see [`super::global`].
    pub const GCMD: u32 = 0x18;
    /// Global Status, 32 bits, read only.
    pub const GSTS: u32 = 0x1c;
    /// Root Table Address, 64 bits; bits 11:10 zero: legacy mode.
    pub const RTADDR: u32 = 0x20;
    /// Fault Status, 32 bits: see [`super::fsts`].
    pub const FSTS: u32 = 0x34;
    /// Fault Event Control, 32 bits: bit 31 masks the interrupt.
    pub const FECTL: u32 = 0x38;
    /// Protected Memory Enable, 32 bits: bit 31 enable, bit 0 status.
    pub const PMEN: u32 = 0x64;
    /// Protected Low Memory Base, 32 bits.
    pub const PLMBASE: u32 = 0x68;
    /// Protected Low Memory Limit, 32 bits.
    pub const PLMLIMIT: u32 = 0x6c;
    /// Protected High Memory Base, 64 bits.
    pub const PHMBASE: u32 = 0x70;
    /// Protected High Memory Limit, 64 bits.
    pub const PHMLIMIT: u32 = 0x78;
    /// Invalidation Queue Head, 64 bits: bits 18:4.
    pub const IQH: u32 = 0x80;
    /// Invalidation Queue Tail, 64 bits; the write starts the unit.
    pub const IQT: u32 = 0x88;
    /// Invalidation Queue Address, 64 bits; bits 2:0 log2 of the pages, bit 11 zero: descriptors of 128 bits.
    pub const IQA: u32 = 0x90;
    /// Invalidation Event Control, 32 bits: as [`FECTL`].
    pub const IECTL: u32 = 0xa0;
    /// Page Request Event Control, 32 bits: as [`FECTL`].
    pub const PECTL: u32 = 0xe0;
    /// Interrupt Remapping Table Address, 64 bits; bits 3:0 log2 of the entries, less one; bit 11 x2APIC mode.
    pub const IRTA: u32 = 0xb8;
}

/// Bits of GCMD and GSTS.
pub mod global {
    /// Translation.
    pub const TRANSLATION: u32 = 1 << 31;
    /// Take the root table pointer.
    pub const ROOT_POINTER: u32 = 1 << 30;
    /// A log of faults in memory.
    pub const FAULT_LOG: u32 = 1 << 28;
    /// Flush the write buffer.
    pub const WRITE_BUFFER: u32 = 1 << 27;
    /// Queued invalidation.
    pub const QUEUE: u32 = 1 << 26;
    /// Interrupt remapping.
    pub const INTERRUPTS: u32 = 1 << 25;
    /// Take the interrupt table pointer.
    pub const INTERRUPT_POINTER: u32 = 1 << 24;
    /// Interrupts in compatibility format pass.
    pub const COMPATIBLE: u32 = 1 << 23;
    /// Bits of GSTS that stay as they are when written back to GCMD: all but those that start something once.
    pub const KEPT: u32 = !(ROOT_POINTER | 1 << 29 | WRITE_BUFFER | INTERRUPT_POINTER);
}

/// Bits of the fault status register.
pub mod fsts {
    /// Faults were lost; write one to clear.
    pub const OVERFLOW: u32 = 1 << 0;
    /// A fault is recorded.
    pub const PENDING: u32 = 1 << 1;
    /// The queue holds what the unit does not understand; write one to clear.
    pub const QUEUE_ERROR: u32 = 1 << 4;
    /// A device's answer to an invalidation was wrong; write one to clear.
    pub const COMPLETION_ERROR: u32 = 1 << 5;
    /// A device did not answer an invalidation; write one to clear.
    pub const TIMEOUT: u32 = 1 << 6;
    /// The errors of the queue.
    pub const QUEUE_ERRORS: u32 = QUEUE_ERROR | COMPLETION_ERROR | TIMEOUT;

    /// Index of the first fault recorded.
    pub const fn first(status: u32) -> u32 {
        status >> 8 & 0xff
    }
}

/// Bit of FECTL, IECTL and PECTL: no message for an event.
pub const MASKED: u32 = 1 << 31;
/// Bit of PMEN: protect.
pub const PMEN_ENABLE: u32 = 1 << 31;
/// Bit of PMEN: memory is protected.
pub const PMEN_STATUS: u32 = 1 << 0;

/// What a unit can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The capability register.
    pub cap: u64,
    /// The extended capability register.
    pub ecap: u64,
}

impl Capabilities {
    const fn cap_bit(self, bit: u32) -> bool {
        self.cap & 1u64.wrapping_shl(bit) != 0
    }

    const fn ecap_bit(self, bit: u32) -> bool {
        self.ecap & 1u64.wrapping_shl(bit) != 0
    }

    /// RWBF: the write buffer must be flushed before the unit sees new tables.
    pub const fn needs_write_buffer_flush(self) -> bool {
        self.cap_bit(4)
    }
    /// PLMR: there is a protected region below 4 GiB.
    pub const fn low_region(self) -> bool {
        self.cap_bit(5)
    }
    /// PHMR: there is a protected region above 4 GiB.
    pub const fn high_region(self) -> bool {
        self.cap_bit(6)
    }
    /// SAGAW: whether tables of this depth can be walked.
    pub const fn walks(self, levels: u32) -> bool {
        matches!(levels, 3..=5) && self.cap_bit(levels.wrapping_add(6))
    }
    /// FRO: offset of the fault records.
    pub const fn fault_offset(self) -> u32 {
        ((self.cap >> 24 & 0x3ff) as u32) << 4
    }
    /// SLLPS: the largest page.
    pub const fn largest_page(self) -> PageSize {
        match self.cap >> 34 & 0b11 {
            0b11 => PageSize::Size1G,
            0b01 => PageSize::Size2M,
            _ => PageSize::Size4K,
        }
    }
    /// PSI: single pages can be invalidated.
    pub const fn page_selective(self) -> bool {
        self.cap_bit(39)
    }
    /// NFR: number of fault records.
    pub const fn fault_records(self) -> u32 {
        ((self.cap >> 40 & 0xff) as u32).wrapping_add(1)
    }
    /// MAMV: log2 of the most pages that one page-selective invalidation covers.
    pub const fn most_pages(self) -> u32 {
        (self.cap >> 48 & 0x3f) as u32
    }
    /// DWD, DRD: an invalidation of translations can wait for writes and reads under way; as bits of its descriptor.
    pub const fn drains(self) -> u64 {
        (self.cap >> 54 & 1) << 6 | (self.cap >> 55 & 1) << 7
    }
    /// C: the unit's reads of tables see the CPU's caches.
    pub const fn coherent(self) -> bool {
        self.ecap_bit(0)
    }
    /// QI: there is an invalidation queue.
    pub const fn queue(self) -> bool {
        self.ecap_bit(1)
    }
    /// IR: interrupts can be remapped.
    pub const fn interrupts(self) -> bool {
        self.ecap_bit(3)
    }
    /// SC: a page can ask for requests to be snooped.
    pub const fn snoop(self) -> bool {
        self.ecap_bit(7)
    }
    /// PRS: devices may ask for pages; there is an event for that.
    pub const fn page_requests(self) -> bool {
        self.ecap_bit(29)
    }
    /// Bytes of the register window in which the unit has registers.
    pub fn window_size(self) -> u32 {
        let faults = self.fault_offset().saturating_add(self.fault_records().saturating_mul(16));
        // IRO: the registers of register-based invalidation.
        let invalidation = (self.ecap >> 8 & 0x3ff) as u32;
        let end = faults.max(invalidation.saturating_mul(16).saturating_add(16));
        end.saturating_add(0xfff) & !0xfff
    }
}

/// Bytes of a root entry, context entry, interrupt entry and descriptor.
pub const ENTRY_SIZE: u64 = 16;
/// An entry or descriptor.
pub type Entry = [u64; 2];

/// An entry from memory.
pub const fn entry_of(bytes: [u8; ENTRY_SIZE as usize]) -> Entry {
    let whole = u128::from_le_bytes(bytes);
    [whole as u64, (whole >> 64) as u64]
}

/// Root and context entries, legacy mode.
pub mod context {
    use super::Entry;

    /// The domain of the guest. Zero is reserved in units with caching mode.
    pub const GUEST_DOMAIN: u64 = 1;

    /// A root entry for the context table at `table`.
    pub const fn root(table: u64) -> Entry {
        [table | 1, 0]
    }

    /// A context entry: requests are translated by tables of `levels` at `table`, requests that claim to be
    /// translated are blocked, faults are recorded.
    pub const fn translated(table: u64, levels: u32) -> Entry {
        let width = levels.saturating_sub(2) as u64;
        [table | 1, GUEST_DOMAIN << 8 | width]
    }
}

/// Interrupt entries.
pub mod irte {
    /// Log2 of the entries of a full table, less one: for IRTA.
    pub const FULL_TABLE: u64 = 15;
    /// Present.
    pub const PRESENT: u64 = 1;
    /// The destination is logical.
    pub const LOGICAL: u64 = 1 << 2;
    /// One of the CPUs meant gets it.
    pub const ONE_OF: u64 = 1 << 3;
    /// Level triggered.
    pub const LEVEL: u64 = 1 << 4;
    /// The lowest bit of the delivery mode: lowest priority rather than fixed.
    pub const LOWEST_PRIORITY: u64 = 1 << 5;
    /// The delivery mode.
    pub const MODE: u64 = 7 << 5;
    /// What has no meaning in a remapped entry of xAPIC format: software's own, and no report of faults.
    pub const IGNORED: u64 = 0xf << 8 | 1 << 1;
    /// Reserved bits of the lower half, and those of posted entries and of x2APIC destinations.
    pub const REFUSED: u64 = 0xffff_00ff_ff00_f000;
    /// Reserved bits of the upper half.
    pub const REFUSED_HIGH: u64 = !0xf_ffff;
    /// Bits 83:82: how the sender is checked.
    pub const SENDER: u64 = 3 << 18;
    /// The source id is compared, but for as many function bits as bits 81:80 say.
    pub const SENDER_DEVICE: u64 = 1 << 18;
    /// The sender's bus is within bits 79:72 to 71:64.
    pub const SENDER_BUSES: u64 = 2 << 18;
}

/// Invalidation descriptors.
pub mod descriptor {
    use super::Entry;

    /// All context entries.
    pub const CONTEXT: Entry = [1 | 1 << 4, 0];
    /// All interrupt entries.
    pub const INTERRUPTS: Entry = [4, 0];

    /// All translations; `drains` as the capabilities say.
    pub const fn translations(drains: u64) -> Entry {
        [2 | 1 << 4 | drains, 0]
    }

    /// All translations of a domain.
    pub const fn domain(domain: u64, drains: u64) -> Entry {
        [2 | 2 << 4 | drains | domain << 16, 0]
    }

    /// Translations of 2^`order` pages at `address`, a multiple of them, in a domain; and the table entries on the way.
    pub const fn pages(domain: u64, address: u64, order: u32, drains: u64) -> Entry {
        [2 | 3 << 4 | drains | domain << 16, address | order as u64]
    }

    /// One interrupt entry.
    pub const fn interrupt(index: u16) -> Entry {
        [4 | 1 << 4 | (index as u64) << 32, 0]
    }

    /// Stores `data` at `address`, a multiple of 4, when all before it is done.
    pub const fn wait(address: u64, data: u32) -> Entry {
        [5 | 1 << 5 | (data as u64) << 32, address]
    }
}
