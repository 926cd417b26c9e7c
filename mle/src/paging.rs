//! The MLE's own address space: physical memory one to one, nothing both writable and executable, no page 0.
//!
//! UNSAFETY: switching CR3, and the control bits that give the tables their meaning.
#![expect(unsafe_code, reason = "the hardware edge")]

use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::radix::{Error, MemoryType, NPT, PageSize, Rights, STAGE1, TablePool, Tables};
use x86::controlregs::{Cr0, Cr4};

use crate::launch::Image;
use crate::pool::PagePool;

/// Read and write.
const DATA: Rights = Rights::READ.union(Rights::WRITE);

/// Builds the tables. `ram_end` is the first address past RAM; `constant` is memory that is
/// only read, `devices` are register windows, mapped uncached.
pub fn build(
    pool: &mut PagePool,
    image: &Image,
    ram_end: u64,
    largest: PageSize,
    constant: &[PhysRange],
    devices: &[PhysRange],
) -> Result<Tables, Error> {
    let tables = Tables::new(&STAGE1, 4, largest, pool)?;
    let last = ram_end.max(FOUR_GIB).saturating_sub(1) | (PAGE_SIZE - 1);
    if let Some(all) = PhysRange::from_last(PAGE_SIZE, last) {
        tables.map_identity(pool, all, DATA, MemoryType::WriteBack)?;
    }
    let pieces = [
        (image.start, image.rodata, Rights::READ.union(Rights::EXEC)),
        (image.rodata, image.data, Rights::READ),
    ];
    for (start, end, rights) in pieces {
        if let Some(range) = PhysRange::from_last(start, end.saturating_sub(1)) {
            tables.protect(pool, range, rights)?;
        }
    }
    for range in constant {
        tables.protect(pool, range.page_outward(), Rights::READ)?;
    }
    for range in devices {
        let range = range.page_outward();
        tables.unmap(pool, range)?;
        tables.map_identity(pool, range, DATA, MemoryType::Device)?;
    }
    Ok(tables)
}

/// Tables for a virtual machine's own use, at its addresses: the first 4 GiB one to one with all rights, in 2 MiB pages;
/// the nested tables decide what is behind. Gives the root. Six pages.
pub fn open_identity<P: TablePool>(pool: &mut P) -> Result<u64, Error> {
    open_to(pool, FOUR_GIB, PageSize::Size2M)
}

/// The same for memory below `end`, in pages of at most `largest`.
pub fn open_to<P: TablePool>(pool: &mut P, end: u64, largest: PageSize) -> Result<u64, Error> {
    // The nested format is the long-mode format with the user bit, which does not matter to code at CPL 0.
    let tables = Tables::new(&NPT, 4, largest, pool)?;
    if let Some(all) = PhysRange::from_last(0, end.saturating_sub(1)) {
        tables.map_identity(pool, all, Rights::all(), MemoryType::WriteBack)?;
    }
    Ok(tables.root())
}

/// Takes one page out of the live tables (a guard page). The caller has not used it.
pub fn guard(pool: &mut PagePool, tables: &Tables, page: u64) -> Result<(), Error> {
    if let Some(range) = PhysRange::new(page, PAGE_SIZE) {
        tables.unmap(pool, range)?;
        // SAFETY: INVLPG of a page that nothing uses.
        unsafe { x86::tlb::flush(usize::try_from(page).unwrap_or(0)) };
    }
    Ok(())
}

/// Switches this CPU to `root`, with write protection, SMEP where the CPU has it, and PAT entries as after reset:
/// the gap may have changed them, and with them what "uncached" means.
///
/// # Safety
/// `root` maps the running code, stack and data as they are mapped now; EFER.NXE can be set.
pub unsafe fn activate(root: u64, smep: bool) {
    const PAT_RESET: u64 = 0x0007_0406_0007_0406;
    const EFER_NXE: u64 = 1 << 11;
    // SSE for the SHA instructions, which save what they change.
    let mut cr4 = Cr4::CR4_ENABLE_PAE | Cr4::CR4_ENABLE_MACHINE_CHECK | Cr4::CR4_ENABLE_SSE;
    if smep {
        cr4 |= Cr4::CR4_ENABLE_SMEP;
    }
    let cr0 = Cr0::CR0_PROTECTED_MODE
        | Cr0::CR0_EXTENSION_TYPE
        | Cr0::CR0_NUMERIC_ERROR
        | Cr0::CR0_WRITE_PROTECT
        | Cr0::CR0_ENABLE_PAGING;
    // SAFETY: the caller's promise about `root`; the bits set only restrict what the MLE does not do anyway.
    unsafe {
        let efer = x86::msr::rdmsr(x86::msr::IA32_EFER);
        x86::msr::wrmsr(x86::msr::IA32_EFER, efer | EFER_NXE);
        x86::msr::wrmsr(x86::msr::IA32_PAT, PAT_RESET);
        x86::controlregs::cr4_write(cr4);
        x86::controlregs::cr3_write(root);
        x86::controlregs::cr0_write(cr0);
    }
}
