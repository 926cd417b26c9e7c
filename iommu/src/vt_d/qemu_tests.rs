//! The same code against QEMU's `intel-iommu` and its `edu` device. This model has no protected regions, no
//! compatibility format bit (it lets that format pass always) and sees all caches.

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::{Mmio, PhysMem};
use hv::radix::{MemoryType, Rights, TablePool};

use super::defs::{global, reg};
use super::{DmaArea, Error, Interrupt, Interrupts, Need, Protection, Sender, VtD, deny_all};
use crate::Platform;
use crate::dmar::Dmar;
use crate::fault::{Access, Drained, Fault, Reason};
use crate::qemu::{EDU, Handle, INTEL_BASE as BASE, Window};

const REGION: u64 = 128 << 20;
const CANARY: u64 = REGION + 0x1000;
const GAP: u64 = 64 << 20;
const GUEST: u64 = 32 << 20;

fn region() -> PhysRange {
    PhysRange::new(REGION, 16 << 20).unwrap()
}

fn dma_area() -> DmaArea {
    DmaArea::at_top_of(&region()).unwrap()
}

impl Handle {
    fn deny_all(&self, protection: Protection) -> Result<VtD<Window>, Error> {
        deny_all(self, &self.table(*b"DMAR"), dma_area(), &[region()], protection)
    }

    /// The gap turned the unit on, let `edu` through, and had it use that.
    fn gap_turned_it_on(&self) {
        let window = self.map(BASE, PAGE_SIZE as u32).unwrap();
        // Pass-through, for which QEMU wants the widest table it knows.
        self.write(GAP, &((GAP + 0x1000) | 1).to_le_bytes());
        self.write(GAP + 0x1000 + 16 * u64::from(EDU), &[9, 0, 0, 0, 0, 0, 0, 0, 1]);
        window.write64(reg::RTADDR, GAP);
        window.write32(reg::GCMD, global::ROOT_POINTER);
        window.write32(reg::GCMD, global::TRANSLATION);
        assert_ne!(window.read32(reg::GSTS) & global::TRANSLATION, 0);
        assert!(self.dma(CANARY), "open by the gap's table");
    }
}

/// Pages for tables in the region.
struct Pages<'a>(&'a Handle, u64);

impl TablePool for Pages<'_> {
    fn alloc(&mut self) -> Option<u64> {
        let page = self.1;
        self.1 += PAGE_SIZE;
        self.0.write(page, &[0; PAGE_SIZE as usize]);
        Some(page)
    }
    fn read(&self, table: u64, index: usize) -> u64 {
        let mut bytes = [0; 8];
        PhysMem::read(self.0, table + 8 * index as u64, &mut bytes);
        u64::from_le_bytes(bytes)
    }
    fn write(&mut self, table: u64, index: usize, entry: u64) {
        PhysMem::write(self.0, table + 8 * index as u64, &entry.to_le_bytes());
    }
}

#[test]
fn qemu_is_closed_whatever_the_gap_left() {
    let qemu = Handle::start("intel-iommu,intremap=on,aw-bits=48", &[]);
    assert!(qemu.dma(CANARY), "open after reset");
    qemu.gap_turned_it_on();
    assert_eq!(
        qemu.deny_all(Protection::Set).err(),
        Some(Error::Lacks { base: BASE, need: Need::LowRegion })
    );

    let mut all = qemu.deny_all(Protection::IfAny).unwrap();
    assert_eq!((all.count(), all.unguarded()), (1, 1));
    for address in [CANARY, CANARY + 0x1000, GAP, dma_area().deny_root()] {
        assert!(!qemu.dma(address), "{address:#x}");
    }
    let mut faults = vec![];
    let drained = all.drain(|fault| faults.push(fault));
    // One record, and QEMU leaves out what repeats.
    assert_eq!(drained.events, 1);
    let denied = Fault { source: EDU.into(), address: CANARY, access: Access::Write, reason: Reason::Denied };
    assert_eq!(faults, [denied]);
    while all.drain(|_| {}) != Drained::default() {}

    let taken = VtD::take_over(&qemu, &qemu.table(*b"DMAR"), dma_area(), &[region()], Protection::IfAny, 1);
    assert!(taken.is_ok());

    let mut pool = Pages(&qemu, REGION + 0x10_0000);
    let tables = all.new_tables(39, &mut pool).unwrap();
    let rights = Rights::READ | Rights::WRITE;
    let guest = PhysRange::new(GUEST, (2 << 20) + 0x3000).unwrap();
    tables.map_identity(&mut pool, guest, rights, MemoryType::WriteBack).unwrap();
    all.open_guest(&qemu, &tables, &pool, &[region()], Interrupts::Granted).unwrap();
    for (address, reached) in [
        (GUEST, true),
        (guest.last() - 7, true),
        (GUEST - 8, false),
        (guest.last() + 1, false),
        (CANARY, false),
        (dma_area().guest_context(), false),
    ] {
        assert_eq!(qemu.dma(address), reached, "{address:#x}");
    }

    // A page that goes away is gone after the flush of that page.
    let page = PhysRange::new(GUEST, PAGE_SIZE).unwrap();
    tables.unmap(&mut pool, page).unwrap();
    assert!(qemu.dma(GUEST), "cached");
    all.flush(&qemu, Some(page)).unwrap();
    assert!(!qemu.dma(GUEST) && qemu.dma(GUEST + PAGE_SIZE));

    let interrupt = Interrupt {
        sender: Sender::Device { source: EDU, functions: 0 },
        vector: 0x41,
        destination: 0,
        logical: false,
        one_of: false,
        lowest_priority: false,
        level: false,
    };
    all.grant(&qemu, 3, Some(&interrupt)).unwrap();
    all.verify(&qemu).unwrap();
    all.grant(&qemu, 3, None).unwrap();

    all.close(&qemu).unwrap();
    assert!(!qemu.dma(GUEST + PAGE_SIZE) && !qemu.dma(GUEST + 0x2000));
}

#[test]
fn qemus_dmar_names_its_devices() {
    // Behind a root port, where numbers of buses are firmware's to give.
    let qemu = Handle::start("intel-iommu", &["-device", "pcie-root-port,addr=6"]);
    let table = qemu.table(*b"DMAR");
    let dmar = Dmar::new(&table).unwrap();
    let unit = dmar.units().next().unwrap();
    let found: Vec<_> = unit.scopes().filter_map(|scope| scope.resolve(&qemu).ok()).collect();
    assert!(found.contains(&EDU) && found.contains(&(6 << 3)), "{found:x?}");
    // Its tables have three levels, unless told otherwise.
    let all = qemu.deny_all(Protection::IfAny).unwrap();
    assert!(all.common().walks(3) && !all.common().walks(4));
    assert!(!qemu.dma(CANARY));
}
