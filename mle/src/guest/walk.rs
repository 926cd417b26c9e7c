//! The guest's memory by virtual address: its own page tables, read as the CPU reads them.

use core::cell::Cell;

use firmware::call::GuestMem;
use firmware::capsule::GuestRam;
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
/// How much of each sort a [`Tlb`] has.
const KNOWN: usize = 4;
/// Offset in a page.
const OFFSET: u64 = PAGE_SIZE - 1;
/// By how much an address is shifted for the index into a table of the last level; into one of 1 GiB pages.
const LAST_SHIFT: u32 = 12;
const LARGEST_SHIFT: u32 = 30;

/// What is known of a guest's memory, so that not each argument is looked up from the root: arguments lie on few pages.
///
/// Translations are good as those in the CPU's own TLB are: until the guest runs on that CPU again. A guest that changes an entry
/// has to make its other CPUs forget it, by an interrupt that each of them takes, and waits for that.
#[derive(Default)]
pub struct Tlb {
    /// By the low bits of the page's number.
    pages: [Cell<Option<Translated>>; KNOWN],
    /// Where tables and arguments were, and so are next, most of the time. Who has what memory does not change.
    ram: [Cell<Option<PhysRange>>; KNOWN],
    /// Whose place the next such region takes.
    next: Cell<usize>,
}

impl Tlb {
    /// Forgets all translations: the guest has run.
    pub fn flush(&self) {
        self.pages.iter().for_each(|page| page.set(None));
    }

    /// Whether all from `start` to `last` is known to be RAM.
    fn has_ram(&self, start: u64, last: u64) -> bool {
        let is_in = |ram: PhysRange| ram.start() <= start && last <= ram.last();
        self.ram.iter().any(|ram| ram.get().is_some_and(is_in))
    }

    fn add_ram(&self, ram: PhysRange) {
        let next = self.next.get();
        if let Some(oldest) = self.ram.get(next) {
            oldest.set(Some(ram));
        }
        self.next.set(next.wrapping_add(1) % KNOWN);
    }
}

/// A page of the guest's RAM, by a virtual address.
#[derive(Clone, Copy)]
struct Translated {
    page: u64,
    to: u64,
    write: bool,
}

/// The memory of a guest that runs in 64-bit mode. Reaches the guest's RAM, and no more: table and data addresses are checked
/// against the address space.
pub struct GuestView<'a, M> {
    control: Control,
    space: &'a AddressSpace,
    mem: &'a M,
    tlb: &'a Tlb,
}

impl<'a, M: PhysMem> GuestView<'a, M> {
    /// The memory that `space` gives to the guest whose registers, as far as translation depends on them, are `control`. `tlb` knows
    /// of no other guest and no other space.
    pub fn new(control: Control, space: &'a AddressSpace, mem: &'a M, tlb: &'a Tlb) -> Self {
        Self { control, space, mem, tlb }
    }

    /// The physical address of `va`, for a read or a write by the guest's kernel; `None` for what would fault, or is no RAM.
    fn translate(&self, va: u64, write: bool) -> Option<u64> {
        let page = va & !OFFSET;
        let known = self.tlb.pages.get((va / PAGE_SIZE) as usize % KNOWN)?;
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
        let mut shift = levels.wrapping_mul(9).wrapping_add(3);
        let unused = 55u32.wrapping_sub(shift);
        let canonical = (page << unused) as i64 >> unused;
        if canonical as u64 != page {
            return None;
        }
        let mut table = c.cr3 & ADDRESS;
        let mut write = true;
        loop {
            let at = table | page.wrapping_shr(shift) << 3 & OFFSET;
            let entry = self.is_ram(table, table | OFFSET).then(|| self.mem.read64(at))??;
            if entry & PRESENT == 0 {
                return None;
            }
            write &= entry & WRITE != 0;
            let to = entry & ADDRESS;
            if shift == LAST_SHIFT || (shift <= LARGEST_SHIFT && entry & LARGE != 0) {
                let within = 1u64.wrapping_shl(shift).wrapping_sub(1);
                let to = to & !within | page & within;
                return self.is_ram(to, to | OFFSET).then_some(Translated { page, to, write });
            }
            table = to;
            shift = shift.wrapping_sub(9);
        }
    }

    /// Whether all from `start` to `last` is the guest's RAM. Not any memory that it has: it finds copies, or views of its own, in
    /// the place of some registers (configuration space, the local APIC), and the MLE would reach what these keep from it.
    fn is_ram(&self, start: u64, last: u64) -> bool {
        if self.tlb.has_ram(start, last) {
            return true;
        }
        match self.space.find(start) {
            Some(region) if region.kind == Kind::Ram && last <= region.range.last() => {
                self.tlb.add_ram(region.range);
                true
            }
            _ => false,
        }
    }
}

impl<M: PhysMem> GuestRam for GuestView<'_, M> {
    fn read_ram(&self, gpa: u64, out: &mut [u8]) -> bool {
        let range = PhysRange::new(gpa, out.len() as u64);
        range.is_some_and(|range| self.is_ram(range.start(), range.last())) && self.mem.read(gpa, out)
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
            if !self.translate(va, false).is_some_and(|at| self.mem.read(at, now)) {
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
            if !self.translate(va, true).is_some_and(|at| self.mem.write(at, now)) {
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

    const CONTROL: Control = Control { cr0: 0x8000_0031, cr3: 0x1000, cr4: 0x20, efer: 0x500 };

    /// A view that knows nothing yet.
    fn view<'a>(ram: &'a Ram, space: &'a AddressSpace) -> GuestView<'a, Ram> {
        GuestView::new(CONTROL, space, ram, Box::leak(Box::default()))
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
    fn a_translation_is_forgotten_when_the_guest_has_run() {
        let (ram, space) = bench();
        let tlb = Tlb::default();
        let read = |va| {
            let mut byte = [0xff];
            GuestView::new(CONTROL, &space, &ram, &tlb).read(va, &mut byte).then_some(byte)
        };
        assert_eq!((read(0x40_0000), read(0x40_1000)), (Some([0]), Some([0])));
        ram.set(0x4000, 0x1_2003);
        ram.set(0x4008, 0);
        ram.write(0x1_2000, &[5]);
        assert_eq!((read(0x40_0000), read(0x40_1000)), (Some([0]), Some([0])), "as the CPU's own TLB has it");
        tlb.flush();
        assert_eq!((read(0x40_0000), read(0x40_1000)), (Some([5]), None));
    }

    #[test]
    fn tables_and_arguments_may_be_in_any_part_of_the_ram() {
        let (ram, mut space) = bench();
        for hole in [0x1_1000, 0x2_0000] {
            space.assign(PhysRange::new(hole, 0x1000).unwrap(), Kind::SharedMmio).unwrap();
        }
        ram.set(0x4018, 0x3_0003);
        let v = view(&ram, &space);
        for _ in 0..2 {
            assert!(
                v.read(0x40_0000, &mut [0]) && v.read(0x40_3000, &mut [0]) && !v.read(0x40_1000, &mut [0])
            );
            assert!(v.read_ram(0x1_2000, &mut [0; 0x2000]) && !v.read_ram(0x1_0fff, &mut [0; 2]));
            assert!(!v.read_ram(u64::MAX, &mut [0; 2]));
            v.tlb.flush();
        }
    }

    #[test]
    fn the_guests_tables_lead_to_no_page_of_the_mle() {
        let (ram, space) = bench();
        let v = view(&ram, &space);
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
