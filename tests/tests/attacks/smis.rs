//! SMIs that are raised by the port, to drown the exposure log in their records.

use tests::machine::Machine;
use tests::tally;

use super::guest::Ring0;
use super::{SCRATCH, Target, access_msrs, ring0, seen};

/// The MSR in which QEMU counts a CPU's SMIs, as Intel's CPUs do.
pub const SMI_COUNT: u32 = 0x34;

/// Code that writes `count` times to the SMI command port.
pub fn smis_by_port(count: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xb2, 0, 0xb0, 0, 0xb9]; // mov dx, b2h; mov al, 0; mov ecx, count
    code.extend(count.to_le_bytes());
    code.extend([0xee, 0xff, 0xc9, 0x75, 0xfb]); // out dx, al; dec ecx; jnz
    code
}

/// How many SMIs a storm is: many where they are dropped; few where they are raised, as each may stop both CPUs for 100 ms on a
/// loaded bench.
pub fn smi_storm(dropped: bool) -> u32 {
    if dropped { 1000 } else { 24 }
}

/// The TPM was not at work for more than `records` records, and none is missing of those that others made.
pub fn measured_at_most(machine: &mut Machine, before: (u64, u64), records: usize) {
    /// What was pending already, and reads of others meanwhile.
    const OTHERS: u64 = 2;
    let (batches, missing) = tally::measured(machine).unwrap();
    assert!(
        batches - before.0 <= records as u64 + OTHERS,
        "{batches} batches, {before:?} before, {records} records"
    );
    assert_eq!(missing, before.1, "records spilled or lost");
}

/// Has the SMI command port written without end: each is an SMI, each of which takes both CPUs away and would be on record.
pub fn of_guest(target: &mut Target) {
    let Target { machine, protected, .. } = target;
    let storm = smi_storm(*protected);
    let count = |machine: &mut Machine| access_msrs(machine, 0, &[(SMI_COUNT, None)])[0].expect("SMI count");
    let before = protected.then(|| tally::measured(machine).unwrap());
    let raised = count(machine);
    assert_eq!(ring0(machine, SCRATCH, &smis_by_port(storm)), Ring0::Ran(0));
    let raised = count(machine) - raised;
    if let Some(before) = before {
        assert_eq!(raised, 0);
        let told = tally::of(machine, "SMIs of the guest", |record| record["kind"] == "guest SMI").unwrap();
        assert_eq!(told.counted, u64::from(storm));
        measured_at_most(machine, before, told.records());
        machine.check("cordon verify").unwrap();
    } else {
        assert_eq!(raised, u64::from(storm));
    }
    seen("guest: raise SMIs, and drown the log in them", *protected);
}
