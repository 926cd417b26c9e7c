//! SMM that changes what is the MLE's. The bench plays it: it changes memory past all protections, and an SMI comes after.

use super::dma::device_entry;
use super::{Boot, Places, boot, seen, spec};
use tests::machine::Machine;
use tests::region::Region;

fn region(machine: &mut Machine, places: &Places) -> Region {
    Region::of(machine, places.mle, places.mle_size).unwrap()
}

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
    let last = |machine: &mut Machine, _: &Places| device_entry(machine, 0xffff) + 8;
    ends_after_an_smi("device table", last, "DMA area: changed near");
}

#[test]
#[ignore = "the same for other memory; `make test-all` runs it"]
fn an_image_that_smm_changed_ends_the_launch() {
    // In the header, which nobody reads any more.
    ends_after_an_smi("MLE", |_, places| places.mle + 8, "memory of the MLE changed");
}

#[test]
fn a_vmcb_that_smm_changed_ends_the_launch() {
    // The intercept of reads of CR6, which no CPU has.
    let vmcb = |machine: &mut Machine, places: &Places| region(machine, places).vmcb(1).unwrap();
    ends_after_an_smi("VMCB of a CPU", vmcb, "memory of the MLE changed");
}

#[test]
#[ignore = "the same for other memory; `make test-all` runs it"]
fn page_tables_that_smm_changed_end_the_launch() {
    // In entries that are not present.
    let own = |machine: &mut Machine, places: &Places| region(machine, places).own_root().unwrap() + 0x900;
    ends_after_an_smi("MLE's page tables", own, "memory of the MLE changed");
    for (asid, what) in [(1, "nested tables of a CPU"), (2, "sandbox's nested tables")] {
        let nested =
            |machine: &mut Machine, places: &Places| region(machine, places).nested(asid).unwrap() + 0x900;
        ends_after_an_smi(what, nested, "memory of the MLE changed");
    }
}
