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
