//! The event log: who tried what, where.
//!
//! QEMU 7.2 never writes one: it takes the log for overflowed always, and does not say so. Later versions do.
//!
//! Spec: \[IOMMU\] "Event Log Entries".

use crate::fault::{Access, Fault, Reason};

/// Event codes: bits 63:60 of an entry.
const PAGE_FAULT: u8 = 2;
const INVALID_REQUEST: u8 = 8;
/// Flag of a page fault: the request was a write.
const WRITE: u64 = 1 << 53;

/// What an entry says. The device of QEMU's page faults lacks its bus.
pub(super) const fn decode([low, address]: [u64; 2]) -> Fault {
    let (access, reason) = match (low >> 60) as u8 {
        PAGE_FAULT | INVALID_REQUEST if is_interrupt(address) => (Access::Write, Reason::Interrupt),
        PAGE_FAULT if low & WRITE != 0 => (Access::Write, Reason::Denied),
        PAGE_FAULT => (Access::Read, Reason::Denied),
        INVALID_REQUEST => (Access::Unknown, Reason::Denied),
        code => (Access::Unknown, Reason::Broken(code)),
    };
    Fault { source: (low & 0xffff) as u32, address, access, reason }
}

/// Whether a request to `address` is an interrupt: by PCI's address, or by HyperTransport's.
const fn is_interrupt(address: u64) -> bool {
    matches!(address, 0xfee0_0000..=0xfeef_ffff | 0xfd_f800_0000..=0xfd_f8ff_ffff)
}
