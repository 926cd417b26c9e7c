//! What a firmware tries that goes on living: calls that come back with lies, or with more than they may do.

use firmware::sandbox::Reason;
use firmware::service::{Service, Target as Called};
use serde_json::Value;
use tests::machine::{Boot, Machine};
use tests::tally;

use super::super::guest::{self, Ring0};
use super::super::hypercalls::hypercall_at;
use super::super::smis::{SMI_COUNT, measured_at_most, smi_storm, smis_by_port};
use super::super::{SCRATCH, last_record, recorded, ring0, seen, write};
use super::{
    EINVAL, EIO, HOST_BRIDGE, Outcome, Port, RET, VARIABLES, code, config, config_file, hostile, in_place,
    lives, names, order, ports, rdmsr_low, run, start, status,
};

/// Places in the implant's plan: `tests/hostile/src/driver.rs`.
mod plan {
    pub const SET_STATUS: u8 = 0;
    pub const GET_LIES: u8 = 8;
    pub const GET_STATUS: u8 = 16;
    pub const GET_SIZE: u8 = 24;
    pub const NEXT_LIES: u8 = 32;
    pub const NEXT_STATUS: u8 = 40;
    pub const NEXT_SIZE: u8 = 48;
    pub const NEXT_LENGTH: u8 = 56;
    pub const NEXT_VENDOR: u8 = 64;
}

/// Writes to the SMI command port, and leaves how many SMIs the CPU has counted meanwhile.
fn storm_of_smis(count: u32) -> Vec<u8> {
    let counted = rdmsr_low(SMI_COUNT);
    // mov esi, eax; …; sub eax, esi
    code(&[&counted, &[0x89, 0xc6], &smis_by_port(count), &counted, &[0x29, 0xf0]])
}

/// Has the services tell lies.
fn lies(lies: &[(u8, u64)]) -> Vec<u8> {
    // mov rax, value; mov [rcx + place], rax
    let parts =
        lies.iter().map(|&(place, value)| [guest::rax(value), vec![0x48, 0x89, 0x41, place]].concat());
    code(&[&parts.collect::<Vec<_>>().concat()])
}

const PERMITTED_SMIS: &str = "firmware: drown the log in SMIs that it may raise";

/// Firmware may read the CPU's count of SMIs.
const COUNTS_SMIS: &str = "sandbox.msr.0x34 = read";

/// Has Linux ask for all variables anew, and gives their names.
fn listed(machine: &mut Machine) -> String {
    machine
        .check(&format!("umount {VARIABLES} && mount -t efivarfs efivarfs {VARIABLES} && ls {VARIABLES}"))
        .unwrap()
}

/// A guest's kernel that has interrupts off gets its CPU back all the same.
/// It costs the sandbox.
fn loops_under_a_guest_with_interrupts_off(machine: &mut Machine) {
    /// `VENDOR`, in two words.
    const GUID: [u64; 2] = [0x4bad_5eed_0bad_f00d, 0xdec0_ad0b_dec0_ad8b];
    const NAME: u32 = 0x800;
    const LOOP: u32 = 0x820;
    for (at, word) in
        [(NAME, u64::from(b'L')), (NAME + 0x10, GUID[0]), (NAME + 0x18, GUID[1]), (LOOP, 0xfeeb)]
    {
        write(machine, SCRATCH + u64::from(at), word);
    }
    let service = Called::Service(Service::SetVariable);
    let mut call = vec![0x48, 0x83, 0xec, 0x30, 0xb8]; // sub rsp, 30h; mov eax, data
    call.extend((guest::MAPPED + LOOP).to_le_bytes());
    call.extend([0x48, 0x89, 0x44, 0x24, 0x28]); // mov [rsp + 28h], rax
    for (register, value) in [
        (&[0xb9][..], guest::MAPPED + NAME),  // ecx
        (&[0xba], guest::MAPPED + NAME + 16), // edx
        (&[0x41, 0xb8], 7),                   // r8d
        (&[0x41, 0xb9], 2),                   // r9d
        (&[0xb8], service.hypercall()),       // eax
    ] {
        call.extend(register);
        call.extend(value.to_le_bytes());
    }
    call.resize(hypercall_at(service) - 8, 0x90);
    call.extend(guest::VMMCALL);
    call.extend([0x48, 0x83, 0xc4, 0x30]); // add rsp, 30h
    call.extend([0x48, 0x0f, 0xba, 0xf8, 63]); // btc rax, 63: what is left of an error is its number
    assert_eq!(ring0(machine, SCRATCH, &call), Ring0::Ran(7));
    lives(machine, "a loop");
    let status = status(machine);
    assert!(names(&status, &Reason::Budget { used_us: 0, limit_us: 0 }), "{status}");
    assert_ne!(last_record(machine, &["sandbox died"]), "");
    seen("firmware: loop under a guest with interrupts off", true);
    recorded("firmware: loop under a guest with interrupts off");
}

/// Calls that come back: from the sandbox with nothing gained, and with lies, of which the guest gets none.
fn harmless(machine: &mut Machine, protected: bool) {
    /// Cordon's vendor GUID, in two words.
    const CORDON: [u64; 2] = [0x4210_f9e9_a720_b6bf, 0x1fdf_7d1c_2130_63b1];
    const BUFFER_TOO_SMALL: u64 = 1 << 63 | 5;
    const NOT_FOUND: u64 = 1 << 63 | 14;
    const UNDEFINED: u64 = 1 << 63 | 0xdead;
    let said = |what: &str| seen(&format!("firmware: {what}"), protected);
    let fails = |outcome: &Outcome, alone: &str, what: &str| {
        let expected = if protected { EIO } else { alone };
        assert!(outcome.failed_with(expected), "{what}: {outcome:x?}");
        said(what);
    };

    // The first device's identity.
    let identity = run(machine, &ports(&[(0xcf8, Port::Out32(1 << 31)), (0xcfc, Port::In32)])).unwrap();
    assert_eq!(
        identity,
        Outcome::Ran(if protected { u32::MAX } else { HOST_BRIDGE }.into()),
        "PCI configuration"
    );
    said("PCI configuration by ports");

    // All that the implant runs for the tests is code that was not there at launch, in runtime code.
    if protected {
        machine.check("cordon verify").unwrap();
        assert_ne!(last_record(machine, &["region changed"]), "");
        recorded("firmware: run other code than was measured, unseen");
    }
    said("run other code than was measured, unseen");

    // CMOS memory behind the clock, where Cordon keeps the reason of a failed launch.
    // The clock's own register first: from then on the sandbox reads and writes it without an exit.
    let change = [
        (0x70, Port::Out8(0x0a)),
        (0x71, Port::In8),
        (0x70, Port::Out8(0x74)),
        (0x71, Port::Out8(0x5a)),
        (0x71, Port::In8),
    ];
    let cmos = run(machine, &ports(&change)).unwrap();
    let Outcome::Ran(value) = cmos else { panic!("CMOS: {cmos:x?}") };
    assert_eq!(value as u8 == 0x5a, !protected, "CMOS: {value:#x}");
    said("CMOS memory behind the clock");

    let outcome = run(machine, &lies(&[(plan::SET_STATUS, UNDEFINED)])).unwrap();
    fails(&outcome, EINVAL, "undefined status");

    // A size that no buffer has, and one larger than the buffer with success.
    let giant = lies(&[(plan::GET_SIZE, 1 << 62), (plan::GET_STATUS, BUFFER_TOO_SMALL), (plan::GET_LIES, 1)]);
    fails(&run(machine, &giant).unwrap(), "Cannot allocate memory", "giant variable");
    let (order, file) = order(&lies(&[(plan::GET_SIZE, 0x400), (plan::GET_LIES, 1)]));
    let read =
        machine.run(&format!("{order} && cat {file} 2>/tmp/error | wc -c; cat /tmp/error")).unwrap().text();
    if protected {
        assert!(read.starts_with("0\n") && read.contains(EIO), "success beyond the buffer: {read}");
    } else {
        // The attributes, and as much of the kernel's memory.
        assert_eq!(read, "1028");
    }
    said("success with more bytes than there is room");

    // A variable under Cordon's GUID that firmware makes up.
    let forged = [
        (plan::NEXT_SIZE, 10),
        (plan::NEXT_LENGTH, 4),
        (plan::NEXT_VENDOR, CORDON[0]),
        (plan::NEXT_VENDOR + 8, CORDON[1]),
        (plan::NEXT_LIES, 1),
    ];
    run(machine, &lies(&forged)).unwrap();
    let names = listed(machine);
    assert_eq!(names.contains("AAAA-a720b6bf"), !protected, "forged variable: {names}");
    assert_eq!(names.contains("Status-a720b6bf"), protected, "forged variable: {names}");
    said("variable under Cordon's GUID");

    // A name without an end.
    let endless =
        [(plan::NEXT_SIZE, 1024), (plan::NEXT_LENGTH, 10_000), (plan::NEXT_VENDOR, 1), (plan::NEXT_LIES, 1)];
    run(machine, &lies(&endless)).unwrap();
    let names = listed(machine);
    assert_eq!(names.contains("AAAAAAAA"), !protected, "endless name: {names}");
    said("name without an end");

    // An end of the list at its beginning. Cordon's variables come before it.
    run(machine, &lies(&[(plan::NEXT_STATUS, NOT_FOUND), (plan::NEXT_LIES, 1)])).unwrap();
    let names = listed(machine);
    assert!(!names.contains("BootOrder-"), "{names}");
    assert_eq!(names.contains("Status-a720b6bf"), protected, "{names}");
    said("end the list of variables before Cordon's");

    // Honest again, all variables are there.
    run(machine, &lies(&[])).unwrap();
    let names = listed(machine);
    assert!(names.contains("BootOrder-"), "{names}");
    assert_eq!(names.contains("Status-a720b6bf"), protected, "{names}");

    // SMIs without a request to SMM.
    let before = protected.then(|| tally::measured(machine).unwrap());
    let storm = smi_storm(protected);
    let raised = run(machine, &storm_of_smis(storm)).unwrap();
    assert_eq!(raised, Outcome::Ran(if protected { 0 } else { storm.into() }), "SMIs");
    if let Some(before) = before {
        let refused = |record: &Value| record["kind"] == "SMI" && record["decision"] == "denied";
        let told = tally::of(machine, "SMIs refused to firmware", refused).unwrap();
        assert_eq!(told.counted, u64::from(storm));
        // Those of the call and of the question what came of it.
        measured_at_most(machine, before, told.records() + 2);
        recorded("firmware: SMIs that ask for nothing, and drown the log");
    } else {
        seen(PERMITTED_SMIS, false);
    }
    said("SMIs that ask for nothing, and drown the log");

    // A reset of the machine, last: without Cordon it is one.
    let reset = run(machine, &ports(&[(0xcf9, Port::Out8(2)), (0xcf9, Port::Out8(6))]));
    if protected {
        assert!(matches!(reset, Ok(Outcome::Ran(_))), "{reset:x?}");
        let status = status(machine);
        assert!(status.contains("sandbox: Ready") && !status.contains("denied ports: 0"), "{status}");
        lives(machine, "lies");
        in_place(machine);
        // A sandbox that died stays dead if the configuration says nothing else.
        loops_under_a_guest_with_interrupts_off(machine);
        let outcome = run(machine, &[RET]).unwrap();
        assert!(outcome.failed_with(EIO), "{outcome:x?}");
        lives(machine, "a dead sandbox");
    } else {
        let error = reset.expect_err("reset").to_string();
        assert!(error.contains("guest-reset"), "{error}");
    }
    said("reset by port CF9h");
}

#[test]
fn firmware_that_lies_is_not_believed() {
    let config = config(COUNTS_SMIS);
    harmless(&mut start(&hostile(Boot::Cordon, &[], Some(&config))), true);
    harmless(&mut start(&hostile(Boot::Native, &[], None)), false);
}

/// However many SMIs firmware raises where it may, all records are there.
#[test]
fn firmware_that_may_raise_smis_hides_no_records() {
    let storm = smi_storm(false);
    let config = config_file(&format!("smm.handlers = any\n{COUNTS_SMIS}"));
    let mut machine = start(&hostile(Boot::Cordon, &[], Some(&config)));
    let before = tally::measured(&mut machine).unwrap();
    let number = |machine: &mut Machine| tally::records(machine).unwrap().len();
    let records = number(&mut machine);
    assert_eq!(run(&mut machine, &storm_of_smis(storm)).unwrap(), Outcome::Ran(storm.into()));
    let told = tally::records(&mut machine).unwrap().split_off(records);
    let of_call = |record: &&Value, kind| record["service"] == "SetVariable" && record["kind"] == kind;
    assert_eq!(told.iter().filter(|record| of_call(record, "SMI")).count(), 16, "{told:?}");
    let call = told.iter().find(|record| of_call(record, "call"));
    assert_eq!(call.expect("the call's record")["smis"], storm, "{told:?}");
    measured_at_most(&mut machine, before, told.len());
    assert_eq!(number(&mut machine), records + told.len());
    machine.check("cordon verify").unwrap();
    seen(PERMITTED_SMIS, true);
    recorded(PERMITTED_SMIS);
}
