//! The virtual CPU: a VMCB, the registers that VMRUN leaves to us, and what its exit codes mean.

use core::mem::offset_of;

use hv::vcpu::{Access, Control, Exception, Exit, Gprs, Role, Segment, Step, Vcpu};
use zerocopy::FromZeros;

use crate::defs::{
    EFER_SVME, Intercept3, Intercept4, TLB_FLUSH_ALL, TLB_KEEP, V_INTR_MASKING, Vmcb, exit_code,
};

/// EFER.LMA.
const EFER_LMA: u64 = 1 << 10;
/// CR0.PG.
const CR0_PG: u64 = 1 << 31;
/// RFLAGS.TF.
const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF.
const RFLAGS_IF: u64 = 1 << 9;
/// DR6.BS: a single step.
const DR6_BS: u64 = 1 << 14;
/// PAT after reset. Spec: \[APM2\] "PAT Register".
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// What of the VMCB stays as [`SvmVcpu::new`] sets it: byte offsets, and which bits of the 64-bit word there. Intercepts but for
/// those of a single step and HLT; maps; address space; what makes interrupts obey the host; nested paging and its root.
pub const CONSTANT: &[(u16, u64)] = &[
    (0x00, u64::MAX),
    (0x08, !(((Intercept3::NMI | Intercept3::HLT) as u64) << 32 | 0xffff_ffff)),
    (0x10, u64::MAX),
    (offset_of!(Vmcb, iopm_base) as u16, u64::MAX),
    (offset_of!(Vmcb, msrpm_base) as u16, u64::MAX),
    (offset_of!(Vmcb, asid) as u16, 0xffff_ffff),
    (offset_of!(Vmcb, int_control) as u16, V_INTR_MASKING),
    (offset_of!(Vmcb, nested_control) as u16, u64::MAX),
    (offset_of!(Vmcb, nested_cr3) as u16, u64::MAX),
    (offset_of!(Vmcb, lbr_control) as u16, u64::MAX),
];

/// Permission maps, nested tables and address space of a virtual machine.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Physical address of the [`crate::maps::Msrpm`].
    pub msrpm: u64,
    /// Physical address of the [`crate::maps::Iopm`].
    pub iopm: u64,
    /// Root of the nested tables.
    pub nested_root: u64,
    /// Address space identifier, not 0.
    pub asid: u32,
}

/// A virtual CPU of SVM.
pub struct SvmVcpu<'a> {
    vmcb: &'a mut Vmcb,
    gprs: Gprs,
    stepping: Option<BeforeStep>,
}

/// What a single step changes, as it was.
struct BeforeStep {
    flags: u64,
    rip: u64,
}

impl<'a> SvmVcpu<'a> {
    /// A virtual CPU in the state after INIT, on a page of its own.
    ///
    /// Spec: \[APM2\] "Processor Initialization State".
    pub fn new(vmcb: &'a mut Vmcb, role: Role, machine: &Machine) -> Self {
        vmcb.zero();
        vmcb.intercept3 = Intercept3::SMI
            | Intercept3::INIT
            | Intercept3::CPUID
            | Intercept3::INVD
            | Intercept3::INVLPGA
            | Intercept3::IOIO
            | Intercept3::MSR
            | Intercept3::SHUTDOWN;
        vmcb.intercept4 = Intercept4::VMRUN | Intercept4::VMMCALL | Intercept4::SVM_INSTRUCTIONS;
        if role == Role::Guest {
            vmcb.intercept4 |= Intercept4::WBINVD;
        }
        if role == Role::Sandbox {
            vmcb.intercept3 |= Intercept3::INTR | Intercept3::NMI | Intercept3::HLT | Intercept3::TASK_SWITCH;
            vmcb.intercept4 |= Intercept4::MONITOR_MWAIT | Intercept4::XSETBV;
            vmcb.intercept_exceptions = u32::MAX;
            // CR writes (CR8 too) and DR accesses: the sandbox's are ours to set.
            vmcb.intercept_cr = 0xffff_0000;
            vmcb.intercept_dr = u32::MAX;
            vmcb.int_control = V_INTR_MASKING;
        }
        vmcb.msrpm_base = machine.msrpm;
        vmcb.iopm_base = machine.iopm;
        vmcb.asid = machine.asid;
        vmcb.tlb_control = TLB_FLUSH_ALL;
        vmcb.nested_control = 1;
        vmcb.nested_cr3 = machine.nested_root;
        vmcb.g_pat = PAT_RESET;
        let mut vcpu = Self { vmcb, gprs: Gprs::default(), stepping: None };
        vcpu.reset();
        vcpu
    }

    /// INIT: registers as after the signal; intercepts, tables and time stay.
    pub fn reset(&mut self) {
        let data = Segment { selector: 0, attributes: 0x93, limit: 0xffff, base: 0 };
        let v = &mut self.vmcb;
        v.cs = Segment { selector: 0xf000, attributes: 0x9b, limit: 0xffff, base: 0xffff_0000 }.into();
        for segment in [&mut v.es, &mut v.ss, &mut v.ds, &mut v.fs, &mut v.gs] {
            *segment = data.into();
        }
        v.gdtr = Segment { attributes: 0, ..data }.into();
        v.idtr = v.gdtr;
        v.ldtr = Segment { attributes: 0x82, ..data }.into();
        v.tr = Segment { attributes: 0x8b, ..data }.into();
        v.cpl = 0;
        v.efer = EFER_SVME;
        v.cr0 = 0x6000_0010;
        v.cr2 = 0;
        v.cr3 = 0;
        v.cr4 = 0;
        v.dr6 = 0xffff_0ff0;
        v.dr7 = 0x400;
        v.rflags = 2;
        v.rip = 0xfff0;
        v.rsp = 0;
        v.interrupt_shadow = 0;
        v.event_injection = 0;
        self.gprs = Gprs { rdx: 0x0080_0f12, ..Gprs::default() };
    }

    /// What the world switch needs: where the registers and the VMCB are.
    pub fn parts(&mut self) -> (*mut Gprs, u64) {
        (&raw mut self.gprs, &raw mut *self.vmcb as u64)
    }

    /// Before VMRUN: the registers that live in the VMCB, and no clean bits: every field is reloaded, which
    /// costs little with as few exits as there are, and no handler can forget one.
    pub fn prepare(&mut self) {
        self.vmcb.rax = self.gprs.rax;
        self.vmcb.rsp = self.gprs.rsp;
        self.vmcb.clean = 0;
    }

    /// After VMRUN: why it stopped.
    pub fn exit(&mut self) -> Exit {
        let v = &mut self.vmcb;
        self.gprs.rax = v.rax;
        self.gprs.rsp = v.rsp;
        v.tlb_control = TLB_KEEP;
        let (info1, info2) = (v.exit_info1, v.exit_info2);
        // Delivered, unless the exit says that it was under way.
        v.event_injection = if v.exit_int_info & (1 << 31) != 0 { v.exit_int_info } else { 0 };
        decode(v.exit_code, info1, info2, &self.gprs)
    }

    /// The raw VMCB, for reports.
    pub fn vmcb(&self) -> &Vmcb {
        self.vmcb
    }

    /// The raw VMCB, as the CPU changes it.
    #[cfg(test)]
    fn vmcb_mut(&mut self) -> &mut Vmcb {
        self.vmcb
    }

    /// Whether HLT exits.
    pub fn exit_on_halt(&mut self, on: bool) {
        let others = self.vmcb.intercept3 & !Intercept3::HLT;
        self.vmcb.intercept3 = others | if on { Intercept3::HLT } else { 0 };
    }

    /// Raises an NMI on the next run.
    pub fn inject_nmi(&mut self) {
        self.vmcb.event_injection = 2 | 2 << 8 | 1 << 31;
    }
}

/// The meaning of an exit code.
fn decode(code: u64, info1: u64, info2: u64, gprs: &Gprs) -> Exit {
    match code {
        exit_code::CPUID => Exit::Cpuid,
        exit_code::MSR if info1 & 1 == 0 => Exit::MsrRead { index: gprs.rcx as u32 },
        exit_code::MSR => {
            Exit::MsrWrite { index: gprs.rcx as u32, value: (gprs.rdx << 32) | (gprs.rax & 0xffff_ffff) }
        }
        exit_code::NPF => Exit::Memory {
            gpa: info2,
            access: match info1 & 0x12 {
                0 => Access::Read,
                2 => Access::Write,
                _ => Access::Fetch,
            },
            table_walk: info1 & (1 << 33) != 0,
        },
        exit_code::IOIO => Exit::Port {
            port: (info1 >> 16) as u16,
            size: match info1 >> 4 & 7 {
                1 => 1,
                2 => 2,
                _ => 4,
            },
            input: info1 & 1 != 0,
            string: info1 & 4 != 0,
            next_rip: info2,
        },
        exit_code::VMMCALL => Exit::Hypercall,
        exit_code::VMRUN | exit_code::INVLPGA | exit_code::VMLOAD..=exit_code::SKINIT => {
            Exit::VirtualizationInstruction
        }
        exit_code::INVD | exit_code::WBINVD => Exit::InvalidateCaches,
        exit_code::HLT => Exit::Halt,
        exit_code::INTR => Exit::Interrupt,
        exit_code::NMI => Exit::Nmi,
        exit_code::SMI => Exit::Smi,
        exit_code::INIT => Exit::Init,
        exit_code::SHUTDOWN => Exit::Shutdown,
        exit_code::EXCEPTION..=exit_code::EXCEPTION_LAST => {
            Exit::Exception { vector: code.wrapping_sub(exit_code::EXCEPTION) as u8, error: info1 }
        }
        _ if code & exit_code::INVALID == exit_code::INVALID => Exit::InvalidState,
        _ => Exit::Unexpected { code, info1, info2 },
    }
}

impl Vcpu for SvmVcpu<'_> {
    fn gprs(&self) -> &Gprs {
        &self.gprs
    }
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }
    fn rip(&self) -> u64 {
        self.vmcb.rip
    }
    fn advance(&mut self, length: u64) {
        let v = &mut self.vmcb;
        // Zero where the CPU has no NRIPS.
        v.rip = if v.next_rip != 0 { v.next_rip } else { v.rip.wrapping_add(length) };
        v.interrupt_shadow &= !1;
        if v.rflags & RFLAGS_TF != 0 {
            v.dr6 |= DR6_BS;
            self.inject(Exception::Debug);
        }
    }
    fn control(&self) -> Control {
        Control { cr0: self.vmcb.cr0, cr3: self.vmcb.cr3, cr4: self.vmcb.cr4, efer: self.vmcb.efer }
    }
    fn set_efer(&mut self, efer: u64) {
        // LMA is the CPU's: it follows LME while paging is on.
        let lma = if self.vmcb.cr0 & CR0_PG != 0 { self.vmcb.efer & EFER_LMA } else { 0 };
        self.vmcb.efer = (efer & !EFER_LMA) | lma | EFER_SVME;
    }
    fn cpl(&self) -> u8 {
        self.vmcb.cpl
    }
    fn code(&self) -> (u64, bool) {
        (self.vmcb.cs.base, self.vmcb.efer & EFER_LMA != 0 && self.vmcb.cs.attributes & 0x200 != 0)
    }
    fn inject(&mut self, exception: Exception) {
        const EXCEPTION: u64 = 3 << 8 | 1 << 31;
        const HAS_ERROR: u64 = 1 << 11;
        self.vmcb.event_injection = match exception {
            Exception::Debug => 1 | EXCEPTION,
            Exception::InvalidOpcode => 6 | EXCEPTION,
            Exception::GeneralProtection => 13 | EXCEPTION | HAS_ERROR,
            Exception::PageFault { error, address } => {
                self.vmcb.cr2 = address;
                14 | EXCEPTION | HAS_ERROR | u64::from(error) << 32
            }
        };
    }
    fn tsc_offset(&self) -> u64 {
        self.vmcb.tsc_offset
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.vmcb.tsc_offset = offset;
    }
    fn flush_nested(&mut self) {
        self.vmcb.tlb_control = TLB_FLUSH_ALL;
    }
    fn start_at(&mut self, vector: u8) {
        self.reset();
        self.vmcb.cs = Segment {
            selector: u16::from(vector) << 8,
            attributes: 0x9b,
            limit: 0xffff,
            base: u64::from(vector) << 12,
        }
        .into();
        self.vmcb.rip = 0;
    }
    fn start_long_mode(&mut self, rip: u64, rsp: u64, cr3: u64, gdt: (u64, u32)) {
        self.reset();
        let v = &mut self.vmcb;
        v.cs = Segment { selector: 0x10, attributes: 0xa9b, limit: u32::MAX, base: 0 }.into();
        for segment in [&mut v.es, &mut v.ss, &mut v.ds, &mut v.fs, &mut v.gs] {
            *segment = Segment { selector: 0x18, attributes: 0xc93, limit: u32::MAX, base: 0 }.into();
        }
        v.gdtr = Segment { selector: 0, attributes: 0, limit: gdt.1, base: gdt.0 }.into();
        v.cr0 = 0x8000_0033;
        v.cr3 = cr3;
        v.cr4 = 0x20 | 0x600;
        v.efer = EFER_SVME | 0x100 | EFER_LMA | 0x800;
        v.rip = rip;
        v.rsp = rsp;
    }
    fn skip_to(&mut self, rip: u64) {
        self.vmcb.rip = rip;
        self.vmcb.interrupt_shadow &= !1;
    }
    fn takes_interrupts(&self) -> bool {
        self.vmcb.rflags & RFLAGS_IF != 0 && self.vmcb.interrupt_shadow & 1 == 0
    }
    /// Makes the next run end after one instruction, with interrupts and NMIs held and every exception an exit.
    ///
    /// Spec: \[APM2\] "Single-Stepping".
    fn begin_step(&mut self) {
        let v = &mut self.vmcb;
        self.stepping = Some(BeforeStep { flags: v.rflags & (RFLAGS_TF | RFLAGS_IF), rip: v.rip });
        v.rflags = (v.rflags | RFLAGS_TF) & !RFLAGS_IF;
        v.intercept_exceptions = u32::MAX;
        v.intercept3 |= Intercept3::NMI;
    }
    /// Ends a step, whatever ended the run; `None` when there was none. The trap that we asked for is swallowed
    /// unless the guest stepped too; any other exception goes to the guest.
    fn end_step(&mut self, exit: Exit) -> Option<Step> {
        let before = self.stepping.take()?;
        let v = &mut self.vmcb;
        v.rflags = (v.rflags & !(RFLAGS_TF | RFLAGS_IF)) | before.flags;
        v.intercept_exceptions = 0;
        v.intercept3 &= !Intercept3::NMI;
        let executed = v.rip != before.rip;
        if executed {
            // An interrupt shadow that the guest had before the instruction is over with it.
            v.interrupt_shadow &= !1;
        }
        let answered = match exit {
            Exit::Exception { vector: 1, .. } if v.dr6 & DR6_BS != 0 => {
                if before.flags & RFLAGS_TF != 0 {
                    self.inject(Exception::Debug);
                } else {
                    v.dr6 &= !DR6_BS;
                }
                true
            }
            Exit::Exception { vector, error } => {
                v.event_injection = u64::from(vector) | 3 << 8 | 1 << 31;
                if matches!(vector, 8 | 10..=14 | 17 | 21) {
                    v.event_injection |= 1 << 11 | error << 32;
                }
                if vector == 14 {
                    v.cr2 = v.exit_info2;
                }
                true
            }
            _ => false,
        };
        Some(Step { executed, answered })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn with_vcpu(role: Role, test: impl FnOnce(&mut SvmVcpu)) {
        let mut vmcb = Vmcb::new_zeroed();
        let machine = Machine { msrpm: 0x1000, iopm: 0x3000, nested_root: 0x6000, asid: 1 };
        test(&mut SvmVcpu::new(&mut vmcb, role, &machine));
    }

    #[test]
    fn a_guest_runs_without_interrupt_exits_and_a_sandbox_with() {
        with_vcpu(Role::Guest, |v| {
            assert_eq!(v.vmcb().intercept3 & (Intercept3::INTR | Intercept3::NMI | Intercept3::HLT), 0);
            assert_eq!(v.vmcb().intercept_exceptions, 0);
            assert_ne!(v.vmcb().intercept3 & Intercept3::SMI, 0);
            assert_eq!(v.vmcb().int_control & V_INTR_MASKING, 0);
        });
        with_vcpu(Role::Sandbox, |v| {
            assert_ne!(v.vmcb().intercept3 & Intercept3::INTR, 0);
            assert_eq!(v.vmcb().intercept_exceptions, u32::MAX);
        });
    }

    #[test]
    fn svme_cannot_be_cleared_and_lma_cannot_be_forged() {
        with_vcpu(Role::Guest, |v| {
            v.set_efer(EFER_LMA | 0x100);
            assert_eq!(v.control().efer, EFER_SVME | 0x100);
            v.start_long_mode(0, 0, 0, (0, 0));
            v.set_efer(0x100);
            assert_eq!(v.control().efer, EFER_SVME | 0x100 | EFER_LMA);
        });
    }

    #[test]
    fn an_event_under_way_is_delivered_again() {
        with_vcpu(Role::Guest, |v| {
            let event = 0xd | 3 << 8 | 1 << 11 | 1 << 31;
            v.vmcb_mut().exit_int_info = event;
            v.vmcb_mut().exit_code = exit_code::NPF;
            v.exit();
            assert_eq!(v.vmcb().event_injection, event);
            v.vmcb_mut().exit_int_info = 0;
            v.exit();
            assert_eq!(v.vmcb().event_injection, 0);
        });
    }

    #[test]
    fn a_stepped_instruction_traps_and_others_do_not() {
        with_vcpu(Role::Guest, |v| {
            v.vmcb_mut().rip = 0x100;
            v.advance(2);
            assert_eq!((v.rip(), v.vmcb().event_injection), (0x102, 0));
            v.vmcb_mut().rflags |= RFLAGS_TF;
            v.vmcb_mut().next_rip = 0x107;
            v.advance(2);
            assert_eq!((v.rip(), v.vmcb().event_injection & 0xff), (0x107, 1));
        });
    }

    #[test]
    fn a_step_leaves_no_trace_in_flags_and_intercepts() {
        with_vcpu(Role::Guest, |v| {
            v.vmcb_mut().rflags = 2 | RFLAGS_IF;
            let intercepts = v.vmcb().intercept3;
            v.begin_step();
            assert_eq!(v.vmcb().rflags & (RFLAGS_IF | RFLAGS_TF), RFLAGS_TF);
            v.vmcb_mut().dr6 |= DR6_BS;
            v.vmcb_mut().rip = 0x1002;
            let step = v.end_step(Exit::Exception { vector: 1, error: 0 });
            assert_eq!(step, Some(Step { executed: true, answered: true }));
            assert_eq!(v.vmcb().rflags, 2 | RFLAGS_IF);
            assert_eq!((v.vmcb().dr6 & DR6_BS, v.vmcb().event_injection), (0, 0));
            assert_eq!((v.vmcb().intercept3, v.vmcb().intercept_exceptions), (intercepts, 0));
            assert_eq!(v.end_step(Exit::Smi), None, "no step, nothing to end");
        });
    }

    #[test]
    fn neither_steps_nor_calls_nor_resets_change_what_is_constant() {
        fn constant(v: &SvmVcpu<'_>) -> Vec<u64> {
            let bytes = v.vmcb().as_bytes();
            let word = |at: u16| u64::from_le_bytes(bytes[at.into()..][..8].try_into().unwrap());
            CONSTANT.iter().map(|(at, mask)| word(*at) & mask).collect()
        }
        for role in [Role::Guest, Role::Sandbox] {
            with_vcpu(role, |v| {
                let before = constant(v);
                assert!(before.iter().filter(|word| **word != 0).count() >= 6, "{before:x?}");
                v.vmcb_mut().int_control |= 0x10f; // as the CPU saves it: V_TPR and V_IRQ
                v.set_tsc_offset(1);
                v.flush_nested();
                v.prepare();
                v.exit();
                v.inject(Exception::Debug);
                assert_eq!(constant(v), before);
                for on in [true, false] {
                    v.exit_on_halt(on);
                    assert_eq!(
                        (v.vmcb().intercept3 & Intercept3::HLT != 0, constant(v)),
                        (on, before.clone())
                    );
                }
                v.begin_step();
                assert_eq!(constant(v), before);
                v.end_step(Exit::Smi);
                v.reset();
                v.start_at(1);
                assert_eq!(constant(v), before);
                v.vmcb_mut().nested_cr3 ^= 0x1000;
                assert_ne!(constant(v), before);
            });
        }
    }

    #[test]
    fn a_fault_in_a_step_is_the_guests() {
        with_vcpu(Role::Guest, |v| {
            v.begin_step();
            v.vmcb_mut().exit_info2 = 0x1234;
            let step = v.end_step(Exit::Exception { vector: 14, error: 2 });
            assert_eq!(step, Some(Step { executed: false, answered: true }));
            assert_eq!(v.vmcb().event_injection, 14 | 3 << 8 | 1 << 11 | 1 << 31 | 2 << 32);
            assert_eq!(v.vmcb().cr2, 0x1234);
        });
    }

    #[test]
    fn exit_codes_mean_what_the_manual_says() {
        let g = Gprs { rax: 0x1_2345_6789, rcx: 0xc000_0080, rdx: 0xab, ..Gprs::default() };
        assert_eq!(decode(0x7c, 1, 0, &g), Exit::MsrWrite { index: 0xc000_0080, value: 0xab_2345_6789 });
        assert_eq!(decode(0x7c, 0, 0, &g), Exit::MsrRead { index: 0xc000_0080 });
        assert_eq!(
            decode(0x400, 1 << 33 | 6, 0xfee0_0000, &g),
            Exit::Memory { gpa: 0xfee0_0000, access: Access::Write, table_walk: true }
        );
        assert_eq!(
            decode(0x7b, 0x00b2_0010, 0x1234, &g),
            Exit::Port { port: 0xb2, size: 1, input: false, string: false, next_rip: 0x1234 }
        );
        assert_eq!(decode(0x4d, 7, 0, &g), Exit::Exception { vector: 13, error: 7 });
        // TCG and old CPUs store -1 in 32 bits.
        assert_eq!(decode(0xffff_ffff, 0, 0, &g), Exit::InvalidState);
        assert_eq!(decode(u64::MAX, 0, 0, &g), Exit::InvalidState);
        assert_eq!(decode(0x86, 0, 0, &g), Exit::VirtualizationInstruction);
        assert_eq!(decode(0x999, 1, 2, &g), Exit::Unexpected { code: 0x999, info1: 1, info2: 2 });
    }

    #[test]
    fn a_startup_ipi_starts_at_its_page() {
        with_vcpu(Role::Guest, |v| {
            v.start_at(0x9a);
            assert_eq!((v.code(), v.rip()), ((0x9a000, false), 0));
            assert_eq!(v.control().cr0 & 1, 0);
        });
    }
}
