//! The guest's memory by virtual address: its own page tables, read as the CPU reads them.

use core::cell::{Cell, RefCell};

use firmware::call::GuestMem;
use firmware::capsule::GuestRam;
use heapless::HistoryBuf;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::space::{AddressSpace, Kind};
use hv::vcpu::Control;

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The memory of a guest that runs in 64-bit mode. Reaches the guest's RAM, and no more: table and data addresses are checked
/// against the address space.
pub struct GuestView<'a, M> {
    control: Control,
    space: &'a AddressSpace,
    mem: &'a M,
    /// By the low bits of the page's number.
    known: [Cell<Option<Translated>>; 4],
    /// Where tables and arguments were last, and so are next, most of the time.
    ram: RefCell<HistoryBuf<PhysRange, 4>>,
}

/// A page's translation, as a CPU's TLB keeps it: arguments lie on few pages.
#[derive(Clone, Copy)]
struct Translated {
    page: u64,
    to: u64,
    write: bool,
}

impl<'a, M: PhysMem> GuestView<'a, M> {
    /// The memory that `space` gives to the guest whose registers, as far as translation depends on them, are `control`.
    pub fn new(control: Control, space: &'a AddressSpace, mem: &'a M) -> Self {
        Self { control, space, mem, known: Default::default(), ram: RefCell::new(HistoryBuf::new()) }
    }

    /// The physical address of `va`, for a read or a write by the guest's kernel; `None` for what would fault.
    fn translate(&self, va: u64, write: bool) -> Option<u64> {
        const OFFSET: u64 = PAGE_SIZE - 1;
        let page = va & !OFFSET;
        let [a, b, c, d] = &self.known;
        let known = match va / PAGE_SIZE % 4 {
            0 => a,
            1 => b,
            2 => c,
            _ => d,
        };
        let found = match known.get() {
            Some(found) if found.page == page => found,
            _ => {
                let found = self.walk(page)?;
                known.set(Some(found));
                found
            }
        };
        (found.write || !write).then_some(found.to | va & OFFSET)
    }

    /// The same of a page, by the guest's tables.
    ///
    /// Spec: \[APM2\] "Long-Mode Page Translation".
    fn walk(&self, page: u64) -> Option<Translated> {
        let c = &self.control;
        if c.cr0 & CR0_PG == 0 || c.cr4 & CR4_PAE == 0 || c.efer & EFER_LMA == 0 {
            return None;
        }
        let levels = if c.cr4 & CR4_LA57 != 0 { 5 } else { 4u32 };
        let unused = 64u32.saturating_sub(levels.saturating_mul(9).saturating_add(12));
        let canonical = (page << unused) as i64 >> unused;
        if canonical as u64 != page {
            return None;
        }
        let mut table = c.cr3 & ADDRESS;
        let mut write = true;
        for level in (1..=levels).rev() {
            let shift = level.saturating_mul(9).saturating_add(3);
            let index = page.wrapping_shr(shift) & 511;
            let at = table.wrapping_add(index.wrapping_mul(8));
            let entry = self.is_ram(at, 8).then(|| self.mem.read64(at))??;
            if entry & PRESENT == 0 {
                return None;
            }
            write &= entry & WRITE != 0;
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                let offset = 1u64.wrapping_shl(shift).wrapping_sub(1);
                return Some(Translated { page, to: (entry & ADDRESS & !offset) | (page & offset), write });
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Whether there is the guest's RAM at `at`. Not any memory that it has: it finds copies, or views of its own, in the place of
    /// some registers (configuration space, the local APIC), and the MLE would reach what these keep from it.
    fn is_ram(&self, at: u64, len: usize) -> bool {
        let Some(range) = PhysRange::new(at, len as u64) else { return false };
        let mut known = self.ram.borrow_mut();
        if known.iter().any(|ram| ram.contains(&range)) {
            return true;
        }
        match self.space.find(at) {
            Some(region) if region.kind == Kind::Ram && region.range.contains(&range) => {
                known.write(region.range);
                true
            }
            _ => false,
        }
    }

    fn read_phys(&self, at: u64, out: &mut [u8]) -> bool {
        self.is_ram(at, out.len()) && self.mem.read(at, out)
    }
}

impl<M: PhysMem> GuestRam for GuestView<'_, M> {
    fn read_ram(&self, gpa: u64, out: &mut [u8]) -> bool {
        self.read_phys(gpa, out)
    }
}

/// Bytes from `va` to the end of its page, at most `len`.
fn in_page(va: u64, len: usize) -> usize {
    let left = PAGE_SIZE.wrapping_sub(va & (PAGE_SIZE - 1));
    usize::try_from(left).unwrap_or(len).min(len)
}

impl<M: PhysMem> GuestMem for GuestView<'_, M> {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let mut va = addr;
        let mut rest = out;
        while !rest.is_empty() {
            let (now, later) = rest.split_at_mut(in_page(va, rest.len()));
            if !self.translate(va, false).is_some_and(|at| self.read_phys(at, now)) {
                return false;
            }
            va = va.wrapping_add(now.len() as u64);
            rest = later;
        }
        true
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        let mut va = addr;
        let mut rest = data;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(in_page(va, rest.len()));
            let Some(at) = self.translate(va, true) else { return false };
            if !self.is_ram(at, now.len()) || !self.mem.write(at, now) {
                return false;
            }
            va = va.wrapping_add(now.len() as u64);
            rest = later;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use hv::radix::Rights;
    use hv::space::View;

    use super::*;
    use crate::fake::Ram;

    const MLE: u64 = 0x8_0000;

    /// Tables at 1000h: 4 KiB pages at va 40_0000h, the first writable, the second not, the third the MLE's; a large
    /// page at va 60_0000h.
    fn bench() -> (Ram, AddressSpace) {
        let ram = Ram::new(0x10_0000);
        ram.set(0x1000, 0x2003);
        ram.set(0x2000, 0x3003);
        ram.set(0x3000 + 2 * 8, 0x4003);
        ram.set(0x3000 + 3 * 8, 0x83);
        ram.set(0x4000, 0x1_0003);
        ram.set(0x4008, 0x1_1001);
        ram.set(0x4010, MLE | 3);
        let region = PhysRange::new(MLE, 0x1000).unwrap();
        let mut space = AddressSpace::new(40, region, None).unwrap();
        space.assign(PhysRange::new(0, MLE).unwrap(), Kind::Ram).unwrap();
        (ram, space)
    }

    fn view<'a>(ram: &'a Ram, space: &'a AddressSpace) -> GuestView<'a, Ram> {
        let control = Control { cr0: 0x8000_0031, cr3: 0x1000, cr4: 0x20, efer: 0x500 };
        GuestView::new(control, space, ram)
    }

    #[test]
    fn a_copy_crosses_pages() {
        let (ram, space) = bench();
        ram.write(0x1_0ffe, &[1, 2]);
        ram.write(0x1_1000, &[3, 4]);
        let mut out = [0; 4];
        assert!(view(&ram, &space).read(0x40_0ffe, &mut out));
        assert_eq!(out, [1, 2, 3, 4]);
    }

    #[test]
    fn read_only_unmapped_and_not_canonical_addresses_fault() {
        let (ram, space) = bench();
        let v = view(&ram, &space);
        assert!(v.write(0x40_0000, &[9]) && !v.write(0x40_1000, &[9]));
        assert!(!v.read(0x40_3000, &mut [0]) && !v.read(1 << 50, &mut [0]));
        assert!(v.read(0x60_1000, &mut [0]), "a large page");
        assert!(!v.read(u64::MAX, &mut [0; 2]));
    }

    #[test]
    fn a_page_that_was_read_is_not_written_for_that() {
        let (ram, space) = bench();
        let v = view(&ram, &space);
        assert!(v.read(0x40_1000, &mut [0]) && !v.write(0x40_1000, &[0]));
        assert!(v.write(0x40_0008, &[7]) && v.read(0x40_0000, &mut [0; 9]));
        assert_eq!(
            (v.translate(0x40_0ff0, true), v.translate(0x40_1ff0, false)),
            (Some(0x1_0ff0), Some(0x1_1ff0))
        );
    }

    #[test]
    fn the_guests_tables_lead_to_no_page_of_the_mle() {
        let (ram, space) = bench();
        let v = view(&ram, &space);
        assert!(v.translate(0x40_2000, false).is_some(), "the table says so");
        assert!(!v.read(0x40_2000, &mut [0]) && !v.write(0x40_2000, &[0]));
        ram.set(0x2000, MLE | 3);
        assert!(!view(&ram, &space).read(0x40_0000, &mut [0]), "nor is a table read there");
    }

    #[test]
    fn the_guests_tables_lead_to_its_ram_and_to_no_registers() {
        const REGISTERS: u64 = MLE + 0x1000;
        let (ram, space) = bench();
        ram.set(0x4010, REGISTERS | 3);
        let v = view(&ram, &space);
        let range = PhysRange::new(REGISTERS, 0x1000).unwrap();
        assert!(space.permits(View::Guest, range, Rights::all()), "the guest has them");
        assert!(!v.read(0x40_2000, &mut [0]) && !v.write(0x40_2000, &[0]));
        assert!(!v.write(0x40_1fff, &[0; 2]) && !v.read_ram(REGISTERS, &mut [0]));
        ram.set(0x2000, REGISTERS | 3);
        assert!(!view(&ram, &space).read(0x40_0000, &mut [0]), "nor is a table read there");
    }
}
