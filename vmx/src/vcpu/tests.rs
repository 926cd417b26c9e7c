use super::*;
use crate::caps::tests::arrandale;
use crate::vmcs::fake::FakeVmcs;

fn machine() -> Machine {
    Machine { msr_bitmap: 0x1000, io_bitmaps: 0x2000, nested_root: 0x6000, vpid: 1 }
}

fn new(role: Role) -> (VmxVcpu, FakeVmcs) {
    let caps = Caps::read(&arrandale()).unwrap();
    (VmxVcpu::new(&caps, role, machine()), FakeVmcs::default())
}

/// A guest that runs 64-bit code.
fn running() -> (VmxVcpu, FakeVmcs) {
    let (mut v, mut f) = new(Role::Guest);
    v.start_long_mode(0x10_0000, 0x8000, 0x9000, (0, 31));
    assert_eq!(v.enter(&mut f, false), Ok(false));
    f.writes.clear();
    (v, f)
}

fn exit_with(v: &mut VmxVcpu, f: &mut FakeVmcs, reason: u32, qualification: u64) -> Exit {
    f.set(EXIT_REASON, reason.into());
    f.set(QUALIFICATION, qualification);
    v.exit(f).unwrap()
}

#[test]
fn a_guest_runs_without_interrupt_exits_and_a_sandbox_with() {
    let (mut v, mut f) = new(Role::Guest);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(PIN_CONTROLS) & 0x29, f.get(EXCEPTION_BITMAP)), (0x28, 0));
    assert_eq!((f.get(EPT_POINTER), f.get(VPID), f.get(LINK_POINTER)), (0x601e, 1, u64::MAX));
    assert_eq!((f.get(IO_BITMAP_A), f.get(IO_BITMAP_B), f.get(MSR_BITMAP)), (0x2000, 0x3000, 0x1000));
    let (mut v, mut f) = new(Role::Sandbox);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(PIN_CONTROLS) & 0x29, f.get(EXCEPTION_BITMAP)), (0x29, 0xffff_ffff));
    assert_eq!((f.get(CR0_MASK), f.get(CR4_MASK)), (u64::MAX, u64::MAX));
    v.exit_on_interrupts(&mut f, false).unwrap();
    assert_eq!(f.get(PIN_CONTROLS) & 0x29, 0x28);
}

#[test]
fn the_state_after_a_startup_ipi_is_real_mode_at_its_page() {
    let (mut v, mut f) = new(Role::Guest);
    v.start_at(0x9a);
    v.enter(&mut f, false).unwrap();
    let (selector, limit, rights, base) = SegmentName::Cs.fields();
    assert_eq!((f.get(selector), f.get(base), f.get(limit)), (0x9a00, 0x9_a000, 0xffff));
    assert_eq!((f.get(rights), f.get(GUEST_RIP), f.get(GUEST_RFLAGS)), (0x9b, 0, 2));
    assert_eq!((f.get(GUEST_CR0), f.get(CR0_SHADOW)), (0x6000_0030, 0x6000_0010), "NE is not the guest's");
    assert_eq!((f.get(GUEST_CR4), f.get(CR4_SHADOW)), (0x2000, 0));
    assert_eq!((f.get(ENTRY_CONTROLS) & 0x200, f.get(ACTIVITY)), (0, 0));
    assert_eq!((v.control().cr0, v.control().cr4, v.code()), (0x6000_0010, 0, (0x9_a000, false)));
}

#[test]
fn the_state_of_long_mode() {
    let (v, f) = running();
    assert_eq!((f.get(GUEST_CR0), f.get(GUEST_CR3), f.get(GUEST_CR4)), (0x8000_0033, 0x9000, 0x2620));
    assert_eq!((f.get(GUEST_EFER), f.get(ENTRY_CONTROLS) & 0x200), (0xd00, 0x200));
    let (.., rights, _) = SegmentName::Cs.fields();
    assert_eq!((f.get(rights), f.get(GUEST_RIP), f.get(GUEST_RSP)), (0xa09b, 0x10_0000, 0x8000));
    let (.., rights, _) = SegmentName::Tr.fields();
    assert_eq!(f.get(rights), 0x8b);
    assert_eq!((v.control().cr4, v.code(), v.cpl()), (0x620, (0, true), 0));
}

#[test]
fn an_entry_after_an_exit_writes_only_what_changed() {
    let (mut v, mut f) = running();
    f.set(EXIT_LENGTH, 2);
    assert_eq!(exit_with(&mut v, &mut f, 10, 0), Exit::Cpuid);
    v.gprs_mut().rax = 7;
    v.advance(2);
    v.enter(&mut f, false).unwrap();
    assert_eq!(f.writes, [GUEST_RIP.encoding()]);
    assert_eq!(f.get(GUEST_RIP), 0x10_0002);
}

#[test]
fn exit_reasons_mean_what_the_manual_says() {
    let (mut v, mut f) = running();
    v.gprs_mut().rcx = 0xc000_0080;
    v.gprs_mut().rax = 0x1_2345_6789;
    v.gprs_mut().rdx = 0xab;
    f.set(EXIT_LENGTH, 1);
    f.set(GUEST_PHYSICAL, 0xfee0_0300);
    let wrmsr = Exit::MsrWrite { index: 0xc000_0080, value: 0xab_2345_6789 };
    for (reason, qualification, exit) in [
        (1, 0, Exit::Interrupt),
        (2, 0, Exit::Shutdown),
        (3, 0, Exit::Init),
        (4, 0x9a, Exit::Startup { vector: 0x9a }),
        (12, 0, Exit::Halt),
        (13, 0, Exit::InvalidateCaches),
        (18, 0, Exit::Hypercall),
        (11, 0, Exit::VirtualizationInstruction),
        (19, 0, Exit::VirtualizationInstruction),
        (27, 0, Exit::VirtualizationInstruction),
        (50, 0, Exit::VirtualizationInstruction),
        (53, 0, Exit::VirtualizationInstruction),
        (31, 0, Exit::MsrRead { index: 0xc000_0080 }),
        (32, 0, wrmsr),
        (55, 0, Exit::SetXcr { index: 0xc000_0080, value: 0xab_2345_6789 }),
        (48, 0x182, Exit::Memory { gpa: 0xfee0_0300, access: Access::Write, table_walk: false }),
        (48, 0x081, Exit::Memory { gpa: 0xfee0_0300, access: Access::Read, table_walk: true }),
        (48, 0x184, Exit::Memory { gpa: 0xfee0_0300, access: Access::Fetch, table_walk: false }),
        (
            30,
            0x00b2_0000,
            Exit::Port { port: 0xb2, size: 1, input: false, string: false, next_rip: 0x10_0001 },
        ),
        (
            30,
            0x0cfc_001b,
            Exit::Port { port: 0xcfc, size: 4, input: true, string: true, next_rip: 0x10_0001 },
        ),
        (49, 5, Exit::Unexpected { code: 49, info1: 5, info2: 0x10_0000 }),
        (0x8000_0021, 4, Exit::Unexpected { code: 0x8000_0021, info1: 4, info2: 0x10_0000 }),
    ] {
        assert_eq!(exit_with(&mut v, &mut f, reason, qualification), exit, "reason {reason}");
    }
}

#[test]
fn an_exception_exit_has_vector_and_error_and_an_nmi_is_none() {
    let (mut v, mut f) = running();
    f.set(EXIT_EVENT, 14 | 3 << 8 | 1 << 11 | 1 << 31);
    f.set(EXIT_ERROR, 2);
    assert_eq!(exit_with(&mut v, &mut f, 0, 0x1234), Exit::Exception { vector: 14, error: 2 });
    f.set(EXIT_EVENT, 2 | 2 << 8 | 1 << 31);
    assert_eq!(exit_with(&mut v, &mut f, 0, 0), Exit::Nmi);
}

#[test]
fn an_event_under_way_is_delivered_again() {
    let (mut v, mut f) = running();
    f.set(IDT_EVENT, 13 | 3 << 8 | 1 << 11 | 1 << 12 | 1 << 31);
    f.set(IDT_ERROR, 0x18);
    exit_with(&mut v, &mut f, 48, 0x182);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(ENTRY_EVENT), f.get(ENTRY_ERROR)), (13 | 3 << 8 | 1 << 11 | 1 << 31, 0x18));
    // INT n: its length goes with it.
    f.set(IDT_EVENT, 0x80 | 4 << 8 | 1 << 31);
    f.set(EXIT_LENGTH, 2);
    exit_with(&mut v, &mut f, 48, 0x182);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(ENTRY_EVENT), f.get(ENTRY_LENGTH)), (0x80 | 4 << 8 | 1 << 31, 2));
    // An NMI: the blocking that its delivery began is taken back.
    f.set(IDT_EVENT, 2 | 2 << 8 | 1 << 31);
    f.set(INTERRUPTIBILITY, 8);
    exit_with(&mut v, &mut f, 48, 0x182);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(ENTRY_EVENT), f.get(INTERRUPTIBILITY)), (2 | 2 << 8 | 1 << 31, 0));
}

#[test]
fn an_nmi_is_delivered_or_its_window_awaited() {
    let (mut v, mut f) = running();
    exit_with(&mut v, &mut f, 0, 0);
    assert_eq!(v.enter(&mut f, true), Ok(true));
    assert_eq!(f.get(ENTRY_EVENT), 2 | 2 << 8 | 1 << 31);
    // The guest handles one: the next waits for its IRET.
    f.set(INTERRUPTIBILITY, 8);
    exit_with(&mut v, &mut f, 0, 0);
    f.set(ENTRY_EVENT, 0);
    assert_eq!(v.enter(&mut f, true), Ok(false));
    assert_eq!((f.get(ENTRY_EVENT), f.get(PRIMARY_CONTROLS) >> 22 & 1), (0, 1));
    f.set(INTERRUPTIBILITY, 0);
    assert_eq!(exit_with(&mut v, &mut f, 8, 0), Exit::Nmi);
    assert_eq!(v.enter(&mut f, true), Ok(true));
    assert_eq!(f.get(PRIMARY_CONTROLS) >> 22 & 1, 0);
}

#[test]
fn a_window_that_the_nmi_handler_opened_is_closed() {
    let (mut v, mut f) = running();
    let primary = f.get(PRIMARY_CONTROLS);
    f.set(PRIMARY_CONTROLS, primary | 1 << 22);
    exit_with(&mut v, &mut f, 8, 0);
    v.enter(&mut f, false).unwrap();
    assert_eq!(f.get(PRIMARY_CONTROLS), primary);
}

#[test]
fn an_iret_that_is_tried_again_blocks_nmis_again() {
    let (mut v, mut f) = running();
    exit_with(&mut v, &mut f, 48, 0x1182);
    assert_eq!(v.enter(&mut f, true), Ok(false));
    assert_eq!(f.get(INTERRUPTIBILITY), 8);
}

#[test]
fn a_stepped_instruction_traps_and_others_do_not() {
    let (mut v, mut f) = running();
    f.set(EXIT_LENGTH, 2);
    f.set(INTERRUPTIBILITY, 1);
    exit_with(&mut v, &mut f, 10, 0);
    assert!(!v.takes_interrupts());
    v.advance(9);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(GUEST_RIP), f.get(INTERRUPTIBILITY), f.get(PENDING_DEBUG)), (0x10_0002, 0, 0));
    f.set(GUEST_RFLAGS, 0x302);
    exit_with(&mut v, &mut f, 10, 0);
    v.advance(2);
    assert!(v.takes_interrupts());
    v.enter(&mut f, false).unwrap();
    assert_eq!(f.get(PENDING_DEBUG), 1 << 14);
}

#[test]
fn exceptions_of_real_mode_have_no_error_code() {
    let (mut v, mut f) = running();
    v.inject(Exception::GeneralProtection);
    v.enter(&mut f, false).unwrap();
    assert_eq!(f.get(ENTRY_EVENT), 13 | 3 << 8 | 1 << 11 | 1 << 31);
    v.start_at(1);
    v.inject(Exception::GeneralProtection);
    v.enter(&mut f, false).unwrap();
    assert_eq!(f.get(ENTRY_EVENT), 13 | 3 << 8 | 1 << 31);
    v.inject(Exception::PageFault { error: 2, address: 0x5000 });
    assert_eq!((v.take_cr2(), v.take_cr2()), (Some(0x5000), None));
}

#[test]
fn a_write_of_cr0_changes_the_shadow_and_is_executed_again() {
    let (mut v, mut f) = new(Role::Guest);
    v.start_at(0x10);
    v.enter(&mut f, false).unwrap();
    exit_with(&mut v, &mut f, 10, 0);
    // MOV CR0, RBX with NE set.
    v.gprs_mut().rbx = 0x6000_0031;
    assert_eq!(exit_with(&mut v, &mut f, 28, 0x300), Exit::Absorbed);
    f.set(ENTRY_EVENT, 0);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(CR0_SHADOW) & 0x20, f.get(GUEST_RIP), f.get(ENTRY_EVENT)), (0x20, 0, 0));
    assert_eq!(f.get(GUEST_CR0) & 0x20, 0x20);
    v.gprs_mut().rbx = 0x6000_0011;
    exit_with(&mut v, &mut f, 28, 0x300);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(CR0_SHADOW) & 0x20, f.get(GUEST_CR0) & 0x20), (0, 0x20), "NE stays set in truth");
}

#[test]
fn vmxe_and_smxe_do_not_exist() {
    for bit in [1 << 13, 1 << 14] {
        let (mut v, mut f) = running();
        v.gprs_mut().rax = 0x620 | bit;
        assert_eq!(exit_with(&mut v, &mut f, 28, 0x004), Exit::Absorbed);
        v.enter(&mut f, false).unwrap();
        assert_eq!(f.get(ENTRY_EVENT), 13 | 3 << 8 | 1 << 11 | 1 << 31);
        assert_eq!(v.control().cr4 & 0x6000, 0);
    }
}

#[test]
fn a_sandbox_that_changes_a_control_register_or_switches_tasks_is_at_its_end() {
    let (mut v, mut f) = new(Role::Sandbox);
    v.start_long_mode(0, 0, 0, (0, 0));
    v.enter(&mut f, false).unwrap();
    for reason in [9, 28, 29, 36, 39] {
        assert!(matches!(exit_with(&mut v, &mut f, reason, 0), Exit::Unexpected { .. }), "{reason}");
    }
    let (mut v, mut f) = running();
    assert_eq!(exit_with(&mut v, &mut f, 9, 0), Exit::Absorbed);
    v.enter(&mut f, false).unwrap();
    assert_eq!(f.get(ENTRY_EVENT) & 0xff, 13);
}

#[test]
fn init_makes_a_cpu_wait_and_the_startup_ipi_start_it() {
    let (mut v, mut f) = running();
    f.set(INTERRUPTIBILITY, 1);
    f.set(ACTIVITY, 1);
    assert_eq!(exit_with(&mut v, &mut f, 3, 0), Exit::Init);
    v.wait_for_startup();
    assert_eq!(v.enter(&mut f, true), Ok(false), "NMIs are blocked there");
    assert_eq!((f.get(ACTIVITY), f.get(INTERRUPTIBILITY), f.get(ENTRY_EVENT)), (3, 0, 0));
    assert_eq!(f.get(PRIMARY_CONTROLS) >> 22 & 1, 0);
    assert_eq!(exit_with(&mut v, &mut f, 4, 0x20), Exit::Startup { vector: 0x20 });
    v.start_at(0x20);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.get(ACTIVITY), f.get(GUEST_CS_BASE)), (0, 0x2_0000));
    assert!(v.take_flush() && !v.take_flush());
}

#[test]
fn time_of_the_guest_moves_without_touching_the_rest() {
    let (mut v, mut f) = running();
    exit_with(&mut v, &mut f, 32, 0);
    f.set(GUEST_PAT, 0x0407_0506_0007_0406);
    v.set_tsc_offset(5);
    v.enter(&mut f, false).unwrap();
    assert_eq!((f.writes.as_slice(), f.get(TSC_OFFSET)), (&[TSC_OFFSET.encoding()][..], 5));
}

#[test]
fn a_field_that_the_cpu_lacks_is_an_error_that_names_it() {
    let (mut v, mut f) = new(Role::Guest);
    f.missing.push(GUEST_EFER.encoding());
    assert_eq!(v.enter(&mut f, false), Err(FieldError { encoding: 0x2806 }));
}

#[test]
fn the_host_state_is_this_cpus() {
    let (v, mut f) = new(Role::Guest);
    let host =
        HostState { cr3: 0x5000, gs_base: 0x7000, cs: 8, data: 0x10, tr: 0x18, ..HostState::default() };
    v.set_host(&mut f, &host).unwrap();
    assert_eq!(
        (f.get(HOST_CR3), f.get(HOST_GS_BASE), f.get(HOST_TR), f.get(HOST_SS)),
        (0x5000, 0x7000, 0x18, 0x10)
    );
    assert!(!f.writes.contains(&HOST_RSP.encoding()), "the world switch writes it");
}

#[test]
fn an_entry_never_says_that_smis_are_blocked() {
    let (mut v, mut f) = running();
    f.set(INTERRUPTIBILITY, 5);
    exit_with(&mut v, &mut f, 0, 0);
    v.enter(&mut f, false).unwrap();
    assert_eq!(f.get(INTERRUPTIBILITY), 1);
}

#[test]
fn a_step_is_one_run_with_the_monitor_trap_flag() {
    let (mut v, mut f) = running();
    let trap = |f: &FakeVmcs| f.get(PRIMARY_CONTROLS) >> 27 & 1;
    exit_with(&mut v, &mut f, 48, 0x182);
    assert_eq!(v.end_step(Exit::Smi), None, "no step, nothing to end");
    v.begin_step();
    v.enter(&mut f, true).unwrap();
    assert_eq!(trap(&f), 1);
    f.set(GUEST_RIP, 0x10_0007);
    let exit = exit_with(&mut v, &mut f, 37, 0);
    assert_eq!(v.end_step(exit), Some(Step { executed: true, answered: true }));
    v.enter(&mut f, false).unwrap();
    assert_eq!(trap(&f), 0);

    // Another exit before the instruction: that one is still to be answered.
    exit_with(&mut v, &mut f, 48, 0x182);
    v.begin_step();
    v.enter(&mut f, false).unwrap();
    let exit = exit_with(&mut v, &mut f, 3, 0);
    assert_eq!(v.end_step(exit), Some(Step { executed: false, answered: false }));
    v.enter(&mut f, false).unwrap();
    assert_eq!(trap(&f), 0);
}
