//! The same code against QEMU's `amd-iommu` and its `edu` device.

use hv::addr::PhysRange;
use hv::io::{Mmio, PhysMem};

use super::defs::{Dte, control, dte, reg};
use super::{AmdVi, DmaArea, Error, Interrupts, Root, area, deny_all};
use crate::fault::Reason;
use crate::ivrs::{DeviceEntry, Ivrs};
use crate::model::Table;
use crate::qemu::{AMD_BASE as BASE, EDU, Handle, Window};
use crate::{Platform, pci};

const REGION: u64 = 128 << 20;
const CANARY: u64 = REGION + 0x1000;
const GAP_TABLE: u64 = 64 << 20;
const GUEST: u64 = 32 << 20;
const OPEN: Dte = [dte::VALID | dte::TRANSLATION_VALID | dte::READ | dte::WRITE, 0, 0, 0];

fn region() -> PhysRange {
    PhysRange::new(REGION, 16 << 20).unwrap()
}

fn dma_area() -> DmaArea {
    DmaArea::at_top_of(&region()).unwrap()
}

impl Handle {
    fn own_ivrs(&self) -> Vec<u8> {
        self.table(*b"IVRS")
    }

    fn entry(&self, table: u64, device: u16, entry: Dte) {
        self.write(table + 32 * u64::from(device), &super::dte_bytes(entry));
    }

    fn window(&self) -> Window {
        self.map(BASE, 0x4000).unwrap()
    }

    fn iommu(&self) -> u16 {
        pci::functions(self).find(|function| function.class() == 0x0806).unwrap().id
    }

    fn launch(&self) -> Result<AmdVi<Window>, Error> {
        deny_all(self, &self.own_ivrs(), dma_area(), &[region()])
    }

    /// The gap turned the IOMMU on, let `edu` through, and had it use that.
    fn gap_left_it_on(&self) {
        self.entry(GAP_TABLE, EDU, OPEN);
        self.window().write64(reg::DEVICE_TABLE, GAP_TABLE | 0x1ff);
        self.window().write64(reg::CONTROL, control::ENABLE);
        assert!(self.dma(CANARY));
    }
}

#[test]
fn qemu_is_closed_whatever_the_gap_left() {
    let qemu = Handle::start("amd-iommu,intremap=on", &[]);
    assert!(qemu.dma(CANARY), "open after reset");
    qemu.gap_left_it_on();

    let all = qemu.launch().unwrap();
    assert_eq!(all.devices().collect::<Vec<_>>(), [qemu.iommu()]);
    for address in [CANARY, CANARY + 0x1000, GAP_TABLE, dma_area().entry(EDU.into())] {
        assert!(!qemu.dma(address), "{address:#x}");
    }

    let mut all = AmdVi::take_over(&qemu, &qemu.own_ivrs(), dma_area(), &[region()], 1).unwrap();
    let table = qemu.own_ivrs();
    let choice = Interrupts::for_machine(&Ivrs::new(&table).unwrap());
    assert_eq!(choice, Interrupts::Ordinary);
    // Two levels reach 1 GiB; one leaf of 2 MiB.
    let leaf = GUEST | 1 | dte::READ | dte::WRITE;
    qemu.write(REGION + 0x2000 + 8 * (GUEST >> 21), &leaf.to_le_bytes());
    all.open_guest(&qemu, Root { table: REGION + 0x2000, levels: 2 }, choice).unwrap();
    assert!(qemu.dma(GUEST) && qemu.dma(GUEST + 0x1f_fff8));
    assert!(!qemu.dma(GUEST - 8) && !qemu.dma(GUEST + 0x20_0000) && !qemu.dma(CANARY));

    // QEMU logs a level that is not present, but not an entry of all zeros; 7.2 takes its log for overflowed always,
    // and logs nothing.
    let absent = GUEST + 0x40_0000;
    qemu.write(REGION + 0x2000 + 8 * (absent >> 21), &u64::to_le_bytes(1 << 9));
    assert!(!qemu.dma(absent));
    let mut events = vec![];
    all.drain(&qemu, |fault| events.push((fault.reason, fault.source, fault.address))).unwrap();
    assert!(events.is_empty() || events == [(Reason::Denied, EDU.into(), absent)], "{events:x?}");

    all.close(&qemu).unwrap();
    assert!(!qemu.dma(GUEST) && !qemu.dma(GUEST + 0x1000));
}

#[test]
fn qemu_blocks_by_a_table_that_is_nowhere_and_remembers_what_it_cached() {
    let qemu = Handle::start("amd-iommu,intremap=off", &[]);
    qemu.gap_left_it_on();
    for random in [0, 1, 4095] {
        qemu.window().write64(reg::DEVICE_TABLE, area::nowhere(random));
        assert!(!qemu.dma(CANARY + 0x1000), "nothing is readable there, so nothing passes");
        assert!(qemu.dma(CANARY), "but for what is cached: step 2 is needed");
    }
    qemu.launch().unwrap();
    assert!(!qemu.dma(CANARY));
    // Without interrupt remapping QEMU lists no I/O APIC.
    let table = qemu.own_ivrs();
    assert_eq!(Interrupts::for_machine(&Ivrs::new(&table).unwrap()), Interrupts::Unchecked);
}

#[test]
fn qemu_lets_a_bar_answer_for_the_table_so_bars_are_checked() {
    let memory = "memory-backend-memfd,id=bar,size=8G,share=on";
    let qemu = Handle::start("amd-iommu", &["-object", memory, "-device", "ivshmem-plain,memdev=bar,addr=5"]);
    let shared = pci::Function::new(&qemu, 5 << 3);
    shared.write(0x18, 0);
    shared.write(0x1c, 0x000f_fffe);
    shared.write(4, 2);
    qemu.window().write64(reg::DEVICE_TABLE, area::nowhere(0));
    qemu.window().write64(reg::CONTROL, control::ENABLE);
    assert!(qemu.dma(CANARY), "the region holds zeros, and a zero entry lets pass");
    assert_eq!(qemu.launch().err(), Some(Error::Claimed { device: 5 << 3, register: 0x18 }));
    shared.write(0x1c, 0x0000_0010);
    assert!(qemu.launch().is_ok());
}

#[test]
fn qemu_says_the_same_by_ivrs_and_by_pci() {
    let qemu = Handle::start("amd-iommu,intremap=on", &["-device", "pcie-root-port,addr=6"]);
    let table = qemu.own_ivrs();
    let ivrs = Ivrs::new(&table).unwrap();
    let units: Vec<_> = ivrs.units().map(|unit| (unit.kind(), unit.device(), unit.base())).collect();
    assert_eq!(units, [(0x10, qemu.iommu(), BASE)]);
    let io_apic = DeviceEntry::Special { device: 0xa0, handle: 0, variety: 1, flags: 0 };
    assert!(ivrs.units().all(|unit| unit.entries().any(|entry| entry == io_apic)));

    let hidden = deny_all(&qemu, &Table::new().finish(), dma_area(), &[]);
    assert_eq!(hidden.err(), Some(Error::Unlisted { device: qemu.iommu() }));
    let moved = Table::new().unit(0x10, qemu.iommu(), GAP_TABLE, 0, &[]).finish();
    let error = deny_all(&qemu, &moved, dma_area(), &[]).err().unwrap();
    assert!(matches!(error, Error::BaseDiffers { capability: BASE, .. }), "{error}");
}
