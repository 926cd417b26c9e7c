//! Registers, device table entries and commands of an AMD IOMMU.
//!
//! Spec: \[IOMMU\] "MMIO Registers", "Device Table Entry", "Commands"; checked against Linux 6.12
//! `drivers/iommu/amd/amd_iommu_types.h`.

/// Register offsets in the window.
pub mod reg {
    /// Device Table Base: address, bits 8:0 size in pages less one.
    pub const DEVICE_TABLE: u32 = 0x0000;
    /// Command Buffer Base: address, bits 59:56 log2 of the entries.
    pub const COMMAND_BASE: u32 = 0x0008;
    /// Event Log Base: as [`COMMAND_BASE`].
    pub const EVENT_BASE: u32 = 0x0010;
    /// Control: see [`super::control`].
    pub const CONTROL: u32 = 0x0018;
    /// Exclusion Base: bit 0 enable, bit 1 allow all.
    pub const EXCLUSION_BASE: u32 = 0x0020;
    /// Exclusion Limit.
    pub const EXCLUSION_LIMIT: u32 = 0x0028;
    /// Extended Feature Register: see [`super::feature`].
    pub const FEATURES: u32 = 0x0030;
    /// Command Buffer Head: bytes.
    pub const COMMAND_HEAD: u32 = 0x2000;
    /// Command Buffer Tail: bytes; the write starts the IOMMU.
    pub const COMMAND_TAIL: u32 = 0x2008;
    /// Event Log Head: bytes.
    pub const EVENT_HEAD: u32 = 0x2010;
    /// Event Log Tail: bytes.
    pub const EVENT_TAIL: u32 = 0x2018;
    /// Status: see [`super::status`].
    pub const STATUS: u32 = 0x2020;
}

/// Bytes of the register window.
pub const WINDOW_SIZE: u32 = 0x4000;

/// Bits of the control register.
pub mod control {
    /// Translation is on.
    pub const ENABLE: u64 = 1 << 0;
    /// Requests that arrive through the HyperTransport tunnel are translated too.
    pub const TUNNEL: u64 = 1 << 1;
    /// Events are logged.
    pub const EVENT_LOG: u64 = 1 << 2;
    /// The IOMMU's own reads of tables are coherent with the caches.
    pub const COHERENT: u64 = 1 << 10;
    /// Commands are taken.
    pub const COMMANDS: u64 = 1 << 12;
    /// Bits whose value is read back: all of the above, event and completion interrupts (3, 4), peripheral page
    /// requests (13-15), guest translation and virtual APIC (16, 17, 28), device table segments (34-36). Other
    /// bits change how requests are ordered, not what they reach.
    pub const CHECKED: u64 =
        ENABLE | EVENT_LOG | COMMANDS | 1 << 3 | 1 << 4 | 0x1f << 13 | 1 << 28 | 0b111 << 34;
}

/// Bits of the status register.
pub mod status {
    /// The event log ran over; write one to clear.
    pub const EVENT_OVERFLOW: u64 = 1 << 0;
    /// The event log runs.
    pub const EVENT_RUN: u64 = 1 << 3;
    /// Commands are being taken.
    pub const COMMAND_RUN: u64 = 1 << 4;
}

/// Bits of the extended feature register.
pub mod feature {
    /// INVALIDATE_IOMMU_ALL exists.
    pub const INVALIDATE_ALL: u64 = 1 << 6;

    /// Levels of page table that the IOMMU can walk. UNVERIFIED: field HATS, bits 11:10.
    pub const fn levels(features: u64) -> u8 {
        match features >> 10 & 0b11 {
            0 => 4,
            1 => 5,
            _ => 6,
        }
    }
}

/// The PCI capability.
pub mod capability {
    /// Whether a capability header is an IOMMU's: id 0Fh, type 3.
    pub const fn is_iommu(header: u32) -> bool {
        header & 0xff == 0x0f && header >> 16 & 0b111 == 3
    }
    /// Header bit: requests through the HyperTransport tunnel can be translated.
    pub const TUNNEL: u32 = 1 << 25;
    /// Header bit: the extended feature register exists.
    pub const FEATURES: u32 = 1 << 27;
    /// Offset of the base's low half: bits 31:14, and bit 0 that enables decoding until reset.
    pub const BASE_LOW: u8 = 4;
    /// Offset of the base's high half.
    pub const BASE_HIGH: u8 = 8;
    /// PCI class of an IOMMU function.
    pub const CLASS: u16 = 0x0806;
}

/// log2 of the entries of a one-page ring, in place for a base register: 256 of 16 bytes.
pub const RING_SIZE: u64 = 8 << 56;
/// Bytes of a ring entry.
pub const ENTRY_SIZE: u32 = 16;

/// A device table entry.
pub type Dte = [u64; 4];
/// Bytes of a device table entry.
pub const DTE_SIZE: u64 = 32;
/// Device ids, and entries of a full table.
pub const DEVICES: u32 = 1 << 16;
/// Size field of the device table register for a full table.
pub const FULL_TABLE: u64 = 0x1ff;

/// Bits of a device table entry.
pub mod dte {
    /// Quadword 0: the entry counts. An entry without it lets everything pass.
    pub const VALID: u64 = 1 << 0;
    /// Quadword 0: the translation fields count.
    pub const TRANSLATION_VALID: u64 = 1 << 1;
    /// Quadword 0: reads are allowed.
    pub const READ: u64 = 1 << 61;
    /// Quadword 0: writes are allowed.
    pub const WRITE: u64 = 1 << 62;
    /// Quadword 2: the interrupt fields count. Without it interrupts pass.
    pub const INTERRUPT_VALID: u64 = 1 << 0;
    /// Quadword 2, bits 61:60: fixed and arbitrated interrupts pass as they are (zero: they are blocked).
    pub const INTERRUPT_PASS: u64 = 1 << 60;

    /// No translation level, no right to read or write, no interrupt of any kind.
    pub const DENY: super::Dte = [VALID | TRANSLATION_VALID, 0, INTERRUPT_VALID, 0];
}

/// A command.
pub type Command = [u64; 2];

/// Commands.
pub mod command {
    use super::Command;

    /// Everything cached.
    pub const INVALIDATE_ALL: Command = [8 << 60, 0];

    /// Stores `data` at `address`, a multiple of 8, when all before it is done.
    pub const fn completion_wait(address: u64, data: u64) -> Command {
        [1 << 60 | address & 0x000f_ffff_ffff_fff8 | 1, data]
    }

    /// The cached device table entry of a device.
    pub const fn invalidate_device(device: u16) -> Command {
        [2 << 60 | device as u64, 0]
    }

    /// All cached translations of a domain, table levels included.
    pub const fn invalidate_domain(domain: u16) -> Command {
        [3 << 60 | (domain as u64) << 32, 0x7fff_ffff_ffff_f003]
    }

    /// The cached interrupt table of a device.
    pub const fn invalidate_interrupts(device: u16) -> Command {
        [5 << 60 | device as u64, 0]
    }
}
