//! SMM that changes what is the MLE's. The bench plays it: it changes memory past all protections, and an SMI comes after.

use super::{Boot, Places, boot, seen, spec};
use tests::machine::Machine;

/// Device table base of QEMU's `amd-iommu`; bits 8:0 are the table's size.
const DEVICE_TABLE: u64 = 0xfed8_0000;

/// Flips a bit of the byte that `place` chooses: nothing happens before an SMI, and the launch ends after it.
fn ends_after_an_smi(what: &str, place: impl Fn(&mut Machine, &Places) -> u64, reason: &str) {
    let mut machine = boot(&spec(Boot::Cordon, &[]));
    let places = Places::find(&mut machine);
    let at = place(&mut machine, &places);
    // One look with nothing changed; what is looked at later on, after SMIs that follow each other, is looked at by then.
    let read = "cat /sys/firmware/efi/efivars/BootOrder-* >/dev/null";
    machine.check(&format!("{read}; sleep 2; true")).unwrap();
    let before = machine.memory(at, 1).unwrap();
    machine.write_memory(at, &[before[0] ^ 0x40]).unwrap();
    machine.check("taskset 1 true && taskset 2 true").unwrap();
    assert!(!machine.console().contains("after an SMI"), "{}", machine.console());

    // The device table is compared once a second.
    let error = machine.check(&format!("for i in $(seq 50); do {read}; usleep 100000; done"));
    let error = error.expect_err("the guest runs on").to_string();
    assert!(error.contains("guest-reset") && !error.contains("triple"), "{error}");
    let console = machine.console();
    assert!(console.contains("after an SMI") && console.contains(reason), "{console}");
    seen(&format!("SMM: change the {what} unseen"), true);
}

#[test]
fn a_device_table_that_smm_changed_ends_the_launch() {
    // The last entry's: no device has it.
    let last = |machine: &mut Machine, _: &Places| {
        let base = machine.memory(DEVICE_TABLE, 8).unwrap();
        (u64::from_le_bytes(base.try_into().unwrap()) & !0xfff) + 0xffff * 32 + 8
    };
    ends_after_an_smi("device table", last, "DMA area: changed near");
}

#[test]
#[ignore = "the same for other memory; `make test-all` runs it"]
fn an_image_that_smm_changed_ends_the_launch() {
    // In the header, which nobody reads any more.
    ends_after_an_smi("MLE", |_, places| places.mle + 8, "memory of the MLE changed");
}

/// A part of the MLE region, to search.
struct Region {
    base: u64,
    bytes: Vec<u8>,
}

impl Region {
    fn of(machine: &mut Machine, places: &Places) -> Self {
        let bytes = machine.memory(places.mle, places.mle_size as usize).unwrap();
        Self { base: places.mle, bytes }
    }

    fn word(&self, at: u64) -> u64 {
        let at = (at - self.base) as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn pages(&self) -> impl Iterator<Item = u64> {
        (self.base..self.base + self.bytes.len() as u64).step_by(4096)
    }

    /// The VMCB of a virtual CPU with this address space identifier: nested paging is on, and CPUID and SMI are intercepted.
    fn vmcb(&self, asid: u64) -> u64 {
        let is_vmcb = |page: &u64| {
            let intercepts = self.word(page + 8) >> 32;
            self.word(page + 0x58) & 0xffff_ffff == asid
                && self.word(page + 0x90) == 1
                && intercepts & (1 << 18 | 1 << 2) == 1 << 18 | 1 << 2
        };
        self.pages().find(is_vmcb).expect("a VMCB")
    }

    /// The root of the MLE's own tables: one entry, not for users, that leads into the region.
    fn own_root(&self) -> u64 {
        let is_root = |page: &u64| {
            let first = self.word(*page);
            first & 7 == 3
                && self.pages().any(|to| to == first & 0x000f_ffff_ffff_f000)
                && (1..512).all(|index| self.word(page + index * 8) == 0)
        };
        self.pages().find(is_root).expect("page tables")
    }
}

#[test]
fn a_vmcb_that_smm_changed_ends_the_launch() {
    // The intercept of reads of CR6, which no CPU has.
    let vmcb = |machine: &mut Machine, places: &Places| Region::of(machine, places).vmcb(1);
    ends_after_an_smi("VMCB of a CPU", vmcb, "memory of the MLE changed");
}

#[test]
#[ignore = "the same for other memory; `make test-all` runs it"]
fn page_tables_that_smm_changed_end_the_launch() {
    // In entries that are not present.
    let own = |machine: &mut Machine, places: &Places| Region::of(machine, places).own_root() + 0x900;
    ends_after_an_smi("MLE's page tables", own, "memory of the MLE changed");
    for (asid, what) in [(1, "nested tables of a CPU"), (2, "sandbox's nested tables")] {
        let nested = |machine: &mut Machine, places: &Places| {
            let region = Region::of(machine, places);
            region.word(region.vmcb(asid) + 0xb0) + 0x900
        };
        ends_after_an_smi(what, nested, "memory of the MLE changed");
    }
}
