//! Hypercalls that no kernel makes: of programs, with wrong numbers, and with memory of others' for their results.

use firmware::service::{HYPERCALL_BASE, Service, TARGETS, Target as Called};

use super::guest::{self, Ring0};
use super::{
    REGISTERS, SCRATCH, SIGILL, Target, UD, chipset, last_record, one_to_one, read, recorded, ring0,
    run_program, seen, send, write, write_code,
};

/// Page offset of a service's hypercall in Cordon's thunk page.
pub fn hypercall_at(called: Called) -> usize {
    firmware::tables::hypercall_address(0, called) as usize
}

/// A slot's code with a hypercall at the place of `called` behind it, which leaves the number of an error.
fn at_thunk(called: Called, mut code: Vec<u8>) -> Vec<u8> {
    code.resize(hypercall_at(called) - 8, 0x90);
    code.extend(guest::VMMCALL);
    code.extend([0x48, 0x0f, 0xba, 0xf8, 63]); // btc rax, 63
    code
}

/// Makes hypercalls from a program: right number, right page offset, but at CPL 3.
pub fn of_programs(target: &mut Target) {
    let service = Called::Service(Service::ResetSystem);
    let program = guest::hypercall(service.hypercall(), hypercall_at(service));
    // A CPU without SVM knows no such instruction either.
    assert_eq!(run_program(&mut target.machine, &program).0, SIGILL);
    // The same program, doing nothing instead.
    let at = program.windows(3).position(|w| w == guest::VMMCALL).unwrap();
    let mut harmless = program;
    harmless[at..at + 3].copy_from_slice(&[0x90; 3]);
    assert_eq!(run_program(&mut target.machine, &harmless).0, 0);
    if target.protected {
        seen("guest: hypercall of a program", true);
    }
}

/// Makes Cordon write for the guest: a runtime service whose results go to memory that is not the guest's.
pub fn of_kernels(target: &mut Target) {
    /// What a call's record says. Its status is firmware's, for it is made before the guest has results.
    const CALL: [&str; 1] = ["QueryVariableInfo"];
    let Target { machine, places, protected, .. } = target;
    if !*protected {
        // Nobody is there to call.
        assert_eq!(ring0(machine, SCRATCH, &guest::VMMCALL), UD);
        return;
    }
    let service = Called::Service(Service::QueryVariableInfo);
    let [p, q] = [0, 0x100].map(|offset| guest::MAPPED + offset);
    // QueryVariableInfo with one result at p and two at `results`.
    let call = |results: u32, number: u32| {
        let mut code = vec![0xb9, 7, 0, 0, 0, 0xba]; // mov ecx, 7; mov edx, p
        code.extend(p.to_le_bytes());
        code.extend([0x41, 0xb8]); // mov r8d, results
        code.extend(results.to_le_bytes());
        code.extend([0x41, 0xb9]); // mov r9d, results
        code.extend(results.to_le_bytes());
        code.push(0xb8); // mov eax, number
        code.extend(number.to_le_bytes());
        code
    };
    let there = at_thunk(service, call(q, service.hypercall()));
    let mut call_elsewhere = call(q, service.hypercall());
    // Elsewhere in its page it is no call.
    call_elsewhere.extend(guest::VMMCALL);
    assert_eq!(ring0(machine, SCRATCH, &call_elsewhere), UD);
    // Nor with another number.
    for (what, number) in [
        ("another service's number", Called::Service(Service::GetTime).hypercall()),
        ("a number beyond all", HYPERCALL_BASE + TARGETS as u32),
        ("no number of ours", u32::MAX),
    ] {
        assert_eq!(ring0(machine, SCRATCH, &at_thunk(service, call(q, number))), UD, "{what}");
        seen(&format!("guest: hypercall with {what}"), true);
    }
    // With results for the guest's own memory it works.
    write(machine, SCRATCH, 0);
    assert_eq!(ring0(machine, SCRATCH, &there), Ring0::Ran(0));
    assert_ne!(read(machine, SCRATCH), 0, "bytes for variables");
    // With results for anybody else's it does not: EFI_INVALID_PARAMETER.
    let (runtime, _) = places.runtime[0];
    for (what, page) in [
        ("MLE", places.mle),
        ("MLE's data", places.mle + 0x10_0000),
        ("SLB", places.slb),
        ("launch page", places.launch_page),
        ("EFI runtime data", runtime),
        ("TPM", 0xfed4_2000),
        ("host bridge's own configuration space", chipset::ecam(machine)),
        ("I/O APIC", 0xfec0_0000),
        ("local APIC, past the watched page", 0xfee0_0000),
    ] {
        let before = (page < REGISTERS).then(|| machine.memory(page, 0x200).unwrap());
        let record = last_record(machine, &CALL);
        assert_eq!(ring0(machine, page, &there), Ring0::Ran(2), "results at {page:#x}");
        assert_ne!(last_record(machine, &CALL), record, "results at {page:#x}");
        if let Some(before) = before {
            assert!(machine.memory(page, 0x200).unwrap() == before, "{page:#x} changed");
        }
        let attack = format!("guest: hypercall with results for the {what}");
        seen(&attack, true);
        recorded(&attack);
    }
    let nowhere = at_thunk(service, call(0x2000_0000, service.hypercall()));
    assert_eq!(ring0(machine, SCRATCH, &nowhere), Ring0::Ran(2));
    seen("guest: hypercall with results for addresses that lead nowhere", true);

    // SetVariable of more bytes than there are: a vendor and the name "a" at p, data behind them.
    let service = Called::Service(Service::SetVariable);
    write(machine, SCRATCH + 0x40, u64::from(b'a'));
    for size in [1 << 32, u64::MAX] {
        let mut code = vec![0x48, 0x83, 0xec, 0x40, 0x48, 0xc7, 0x44, 0x24, 0x28]; // sub rsp, 64; mov qword [rsp + 40], q
        code.extend(q.to_le_bytes());
        code.push(0xb9); // mov ecx, the name
        code.extend((p + 0x40).to_le_bytes());
        code.push(0xba); // mov edx, p
        code.extend(p.to_le_bytes());
        code.extend([0x41, 0xb8, 7, 0, 0, 0, 0x49, 0xb9]); // mov r8d, 7; mov r9, size
        code.extend(size.to_le_bytes());
        code.push(0xb8);
        code.extend(service.hypercall().to_le_bytes());
        let mut code = at_thunk(service, code);
        code.extend([0x48, 0x83, 0xc4, 0x40]); // add rsp, 64
        assert_eq!(ring0(machine, SCRATCH, &code), Ring0::Ran(2), "{size:#x} bytes");
    }
    seen("guest: hypercall with sizes of 2^32 and 2^64 - 1", true);
}

/// One CPU wants results on a page for which another changes the page table all the time: it leads to the guest's memory,
/// to the MLE's, and back. A call whose check looks at one and whose write goes to the other would write the MLE.
pub fn races(target: &mut Target) {
    /// Enough for both outcomes to come many times. Interrupts are off for so long, and Linux warns after 20 seconds.
    const CALLS: u64 = 60;
    /// Bits for statuses.
    const SUCCESS: u64 = 1;
    const INVALID_PARAMETER: u64 = 1 << 2;
    let Target { machine, places, protected, .. } = target;
    if !*protected {
        return;
    }
    let [table, own, thunks] = [0x4000, 0x5000, 0x6000].map(|offset| SCRATCH + offset);
    let service = Called::Service(Service::QueryVariableInfo);
    let thunk = thunks + hypercall_at(service) as u64;
    write_code(machine, SCRATCH, &guest::race(SCRATCH, thunk, service.hypercall(), CALLS));
    write_code(machine, thunk, &[guest::VMMCALL.as_slice(), &guest::JMP_RBX].concat());
    one_to_one(machine);
    write(machine, SCRATCH + 0x2008, (SCRATCH + 0x3000) | 3);
    write(machine, SCRATCH + 0x3000, table | 3);
    write(machine, own, 0);
    let before = machine.memory(places.mle, 0x1000).unwrap();
    send(machine, "/tmp/swap", &guest::swap(table, [own | 3, places.mle | 3]));
    machine.check("taskset 2 /tmp/swap >/dev/null 2>&1 & echo $! >/tmp/swap.pid").unwrap();
    assert!(matches!(ring0(machine, SCRATCH, &guest::call_mapped()), Ring0::Ran(_)));
    machine.check("kill $(cat /tmp/swap.pid)").unwrap();
    // Both came, and nothing else: the other CPU did change the table between calls, so within them as well.
    assert_eq!(read(machine, SCRATCH + guest::SEEN), SUCCESS | INVALID_PARAMETER);
    assert_ne!(read(machine, own), 0, "bytes for variables");
    assert!(machine.memory(places.mle, 0x1000).unwrap() == before, "the MLE changed");
    seen("guest: hypercall while another CPU remaps the page of its results", true);
}
