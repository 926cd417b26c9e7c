//! Numbers of VMX: VMCS fields, controls, exit reasons, capability registers.
//!
//! Spec: \[SDM3\] "Field Encoding in VMCS", "VMX Basic Exit Reasons", "VM-Execution Control Fields", "VMX Capability Reporting
//! Facility".

use core::marker::PhantomData;

/// The width of a VMCS field.
pub trait Width {
    /// Bits 14:13 of the encoding.
    const BITS: u32;
    /// What it holds.
    type Value: Into<u64> + Copy;
    /// The low bits of what VMREAD gave.
    fn of(raw: u64) -> Self::Value;
}

macro_rules! width {
    ($(#[$doc:meta] $name:ident, $bits:literal, $value:ty;)*) => {$(
        #[$doc]
        pub struct $name;
        impl Width for $name {
            const BITS: u32 = $bits;
            type Value = $value;
            fn of(raw: u64) -> $value {
                raw as $value
            }
        }
    )*};
}
width! {
    /// 16 bits.
    W16, 0, u16;
    /// 64 bits.
    W64, 1, u64;
    /// 32 bits.
    W32, 2, u32;
    /// As wide as the CPU's registers.
    Natural, 3, u64;
}

/// Access: what VMREAD alone reaches.
pub struct ReadOnly;
/// Access: VMREAD and VMWRITE.
pub struct ReadWrite;

/// A VMCS field. `new` checks `W` against the encoding's own width bits, so a wrong width fails the build, and `A` against its
/// type bits: exit information is read-only.
///
/// Spec: \[SDM3\] "Field Encoding in VMCS": bits 14:13 width, 11:10 type, bit 0 the high half.
pub struct Field<W, A>(u32, PhantomData<(W, A)>);

impl<W, A> Clone for Field<W, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W, A> Copy for Field<W, A> {}

const EXIT_INFORMATION: u32 = 1;

impl<W: Width> Field<W, ReadWrite> {
    const fn new(encoding: u32) -> Self {
        assert!(
            (encoding >> 13) & 3 == W::BITS && encoding & 1 == 0 && (encoding >> 10) & 3 != EXIT_INFORMATION
        );
        Self(encoding, PhantomData)
    }
}

impl<W: Width> Field<W, ReadOnly> {
    const fn read_only(encoding: u32) -> Self {
        assert!(
            (encoding >> 13) & 3 == W::BITS && encoding & 1 == 0 && (encoding >> 10) & 3 == EXIT_INFORMATION
        );
        Self(encoding, PhantomData)
    }
}

impl<W, A> Field<W, A> {
    /// The encoding.
    pub const fn encoding(self) -> u32 {
        self.0
    }
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident: $w:ident = $encoding:literal;)*) => {$(
        $(#[$doc])*
        pub const $name: Field<$w, ReadWrite> = Field::<$w, ReadWrite>::new($encoding);
    )*};
}
macro_rules! read_only {
    ($($(#[$doc:meta])* $name:ident: $w:ident = $encoding:literal;)*) => {$(
        $(#[$doc])*
        pub const $name: Field<$w, ReadOnly> = Field::<$w, ReadOnly>::read_only($encoding);
    )*};
}

fields! {
    /// Virtual-processor identifier.
    VPID: W16 = 0x0000;
    /// Host selectors: ES, CS, SS, DS, FS, GS, TR.
    HOST_ES: W16 = 0x0c00;
    /// CS.
    HOST_CS: W16 = 0x0c02;
    /// SS.
    HOST_SS: W16 = 0x0c04;
    /// DS.
    HOST_DS: W16 = 0x0c06;
    /// FS.
    HOST_FS: W16 = 0x0c08;
    /// GS.
    HOST_GS: W16 = 0x0c0a;
    /// TR.
    HOST_TR: W16 = 0x0c0c;
    /// I/O bitmap of ports 0 to 7FFFh.
    IO_BITMAP_A: W64 = 0x2000;
    /// I/O bitmap of ports from 8000h.
    IO_BITMAP_B: W64 = 0x2002;
    /// MSR bitmap.
    MSR_BITMAP: W64 = 0x2004;
    /// Added to the TSC that the guest reads.
    TSC_OFFSET: W64 = 0x2010;
    /// EPT pointer.
    EPT_POINTER: W64 = 0x201a;
    /// XSAVES components that exit; exists with the control for XSAVES.
    XSS_EXITING_BITMAP: W64 = 0x202c;
    /// All ones: no shadow VMCS.
    LINK_POINTER: W64 = 0x2800;
    /// Guest IA32_DEBUGCTL.
    GUEST_DEBUGCTL: W64 = 0x2802;
    /// Guest IA32_PAT.
    GUEST_PAT: W64 = 0x2804;
    /// Guest IA32_EFER.
    GUEST_EFER: W64 = 0x2806;
    /// Host IA32_PAT.
    HOST_PAT: W64 = 0x2c00;
    /// Host IA32_EFER.
    HOST_EFER: W64 = 0x2c02;
    /// Pin-based controls.
    PIN_CONTROLS: W32 = 0x4000;
    /// Primary processor-based controls.
    PRIMARY_CONTROLS: W32 = 0x4002;
    /// Exceptions that exit, a bit a vector.
    EXCEPTION_BITMAP: W32 = 0x4004;
    /// Mask of the page-fault error code.
    PF_MASK: W32 = 0x4006;
    /// What is compared with it.
    PF_MATCH: W32 = 0x4008;
    /// CR3 targets.
    CR3_TARGETS: W32 = 0x400a;
    /// Exit controls.
    EXIT_CONTROLS: W32 = 0x400c;
    /// MSRs stored at an exit.
    EXIT_MSR_STORES: W32 = 0x400e;
    /// MSRs loaded at an exit.
    EXIT_MSR_LOADS: W32 = 0x4010;
    /// Entry controls.
    ENTRY_CONTROLS: W32 = 0x4012;
    /// MSRs loaded at an entry.
    ENTRY_MSR_LOADS: W32 = 0x4014;
    /// The event to inject.
    ENTRY_EVENT: W32 = 0x4016;
    /// Its error code.
    ENTRY_ERROR: W32 = 0x4018;
    /// Length of the instruction that raises it.
    ENTRY_LENGTH: W32 = 0x401a;
    /// Secondary processor-based controls.
    SECONDARY_CONTROLS: W32 = 0x401e;
    /// GDTR limit.
    GUEST_GDTR_LIMIT: W32 = 0x4810;
    /// IDTR limit.
    GUEST_IDTR_LIMIT: W32 = 0x4812;
    /// CS access rights.
    GUEST_CS_RIGHTS: W32 = 0x4816;
    /// SS access rights.
    GUEST_SS_RIGHTS: W32 = 0x4818;
    /// Interruptibility state.
    INTERRUPTIBILITY: W32 = 0x4824;
    /// Activity state.
    ACTIVITY: W32 = 0x4826;
    /// SYSENTER_CS.
    GUEST_SYSENTER_CS: W32 = 0x482a;
    /// Host SYSENTER_CS.
    HOST_SYSENTER_CS: W32 = 0x4c00;
    /// CR0 bits that the guest does not own.
    CR0_MASK: Natural = 0x6000;
    /// CR4 bits that the guest does not own.
    CR4_MASK: Natural = 0x6002;
    /// What the guest reads of them.
    CR0_SHADOW: Natural = 0x6004;
    /// What the guest reads of them.
    CR4_SHADOW: Natural = 0x6006;
    /// CR0.
    GUEST_CR0: Natural = 0x6800;
    /// CR3.
    GUEST_CR3: Natural = 0x6802;
    /// CR4.
    GUEST_CR4: Natural = 0x6804;
    /// CS base.
    GUEST_CS_BASE: Natural = 0x6808;
    /// GDTR base.
    GUEST_GDTR_BASE: Natural = 0x6816;
    /// IDTR base.
    GUEST_IDTR_BASE: Natural = 0x6818;
    /// DR7.
    GUEST_DR7: Natural = 0x681a;
    /// RSP.
    GUEST_RSP: Natural = 0x681c;
    /// RIP.
    GUEST_RIP: Natural = 0x681e;
    /// RFLAGS.
    GUEST_RFLAGS: Natural = 0x6820;
    /// Pending debug exceptions.
    PENDING_DEBUG: Natural = 0x6822;
    /// SYSENTER_ESP.
    GUEST_SYSENTER_ESP: Natural = 0x6824;
    /// SYSENTER_EIP.
    GUEST_SYSENTER_EIP: Natural = 0x6826;
    /// Host CR0.
    HOST_CR0: Natural = 0x6c00;
    /// Host CR3.
    HOST_CR3: Natural = 0x6c02;
    /// Host CR4.
    HOST_CR4: Natural = 0x6c04;
    /// Host FS base.
    HOST_FS_BASE: Natural = 0x6c06;
    /// Host GS base.
    HOST_GS_BASE: Natural = 0x6c08;
    /// Host TR base.
    HOST_TR_BASE: Natural = 0x6c0a;
    /// Host GDTR base.
    HOST_GDTR_BASE: Natural = 0x6c0c;
    /// Host IDTR base.
    HOST_IDTR_BASE: Natural = 0x6c0e;
    /// Host SYSENTER_ESP.
    HOST_SYSENTER_ESP: Natural = 0x6c10;
    /// Host SYSENTER_EIP.
    HOST_SYSENTER_EIP: Natural = 0x6c12;
    /// Host RSP: written by the world switch.
    HOST_RSP: Natural = 0x6c14;
    /// Host RIP: written by the world switch.
    HOST_RIP: Natural = 0x6c16;
}

read_only! {
    /// Guest-physical address of an EPT violation.
    GUEST_PHYSICAL: W64 = 0x2400;
    /// Why a VMX instruction failed.
    INSTRUCTION_ERROR: W32 = 0x4400;
    /// Exit reason.
    EXIT_REASON: W32 = 0x4402;
    /// The exception or NMI that made the exit.
    EXIT_EVENT: W32 = 0x4404;
    /// Its error code.
    EXIT_ERROR: W32 = 0x4406;
    /// The event whose delivery the exit interrupted.
    IDT_EVENT: W32 = 0x4408;
    /// Its error code.
    IDT_ERROR: W32 = 0x440a;
    /// Length of the instruction that exited.
    EXIT_LENGTH: W32 = 0x440c;
    /// Exit qualification.
    QUALIFICATION: Natural = 0x6400;
}

/// Fields of a segment register: selector, limit, access rights, base.
pub type SegmentFields =
    (Field<W16, ReadWrite>, Field<W32, ReadWrite>, Field<W32, ReadWrite>, Field<Natural, ReadWrite>);

/// Guest segment registers in the order of their fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentName {
    /// ES.
    Es = 0,
    /// CS.
    Cs = 1,
    /// SS.
    Ss = 2,
    /// DS.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
    /// LDTR.
    Ldtr = 6,
    /// TR.
    Tr = 7,
}

impl SegmentName {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Es, Self::Cs, Self::Ss, Self::Ds, Self::Fs, Self::Gs, Self::Ldtr, Self::Tr];

    /// Fields of selector, limit, access rights and base.
    pub fn fields(self) -> SegmentFields {
        let at = |first: u32| first.wrapping_add((self as u32).wrapping_mul(2));
        (
            Field(at(0x0800), PhantomData),
            Field(at(0x4800), PhantomData),
            Field(at(0x4814), PhantomData),
            Field(at(0x6806), PhantomData),
        )
    }
}

/// Pin-based controls.
pub mod pin {
    /// External interrupts exit.
    pub const INTERRUPT: u32 = 1 << 0;
    /// NMIs exit.
    pub const NMI: u32 = 1 << 3;
    /// NMI blocking is virtual.
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    /// Reserved bits that are 1.
    pub const DEFAULT: u32 = 0x16;
}

/// Primary processor-based controls.
pub mod primary {
    /// TSC offset.
    pub const TSC_OFFSET: u32 = 1 << 3;
    /// HLT exits.
    pub const HLT: u32 = 1 << 7;
    /// MWAIT exits.
    pub const MWAIT: u32 = 1 << 10;
    /// MOV to CR3 exits.
    pub const CR3_LOAD: u32 = 1 << 15;
    /// MOV to CR8 exits.
    pub const CR8_LOAD: u32 = 1 << 19;
    /// MOV from CR8 exits.
    pub const CR8_STORE: u32 = 1 << 20;
    /// Exit once an NMI can be injected.
    pub const NMI_WINDOW: u32 = 1 << 22;
    /// MOV DR exits.
    pub const MOV_DR: u32 = 1 << 23;
    /// I/O bitmaps.
    pub const IO_BITMAPS: u32 = 1 << 25;
    /// Exit after one instruction.
    pub const MONITOR_TRAP: u32 = 1 << 27;
    /// MSR bitmap.
    pub const MSR_BITMAP: u32 = 1 << 28;
    /// MONITOR exits.
    pub const MONITOR: u32 = 1 << 29;
    /// There are secondary controls.
    pub const SECONDARY: u32 = 1 << 31;
    /// Reserved bits that are 1.
    pub const DEFAULT: u32 = 0x0400_6172;
}

/// Secondary processor-based controls.
pub mod secondary {
    /// Extended page tables.
    pub const EPT: u32 = 1 << 1;
    /// RDTSCP is there.
    pub const RDTSCP: u32 = 1 << 3;
    /// Virtual-processor identifiers.
    pub const VPID: u32 = 1 << 5;
    /// CR0.PE and CR0.PG are the guest's.
    pub const UNRESTRICTED: u32 = 1 << 7;
    /// INVPCID is there.
    pub const INVPCID: u32 = 1 << 12;
    /// XSAVES and XRSTORS are there.
    pub const XSAVES: u32 = 1 << 20;
    /// UMONITOR, UMWAIT and TPAUSE are there.
    pub const USER_WAIT: u32 = 1 << 26;
}

/// Exit controls.
pub mod exit {
    /// Save DR7 and IA32_DEBUGCTL.
    pub const SAVE_DEBUG: u32 = 1 << 2;
    /// The host runs in 64-bit mode.
    pub const HOST_64: u32 = 1 << 9;
    /// Save IA32_PAT.
    pub const SAVE_PAT: u32 = 1 << 18;
    /// Load IA32_PAT.
    pub const LOAD_PAT: u32 = 1 << 19;
    /// Save IA32_EFER.
    pub const SAVE_EFER: u32 = 1 << 20;
    /// Load IA32_EFER.
    pub const LOAD_EFER: u32 = 1 << 21;
    /// Reserved bits that are 1.
    pub const DEFAULT: u32 = 0x3_6dff;
}

/// Entry controls.
pub mod entry {
    /// Load DR7 and IA32_DEBUGCTL.
    pub const LOAD_DEBUG: u32 = 1 << 2;
    /// The guest is in IA-32e mode.
    pub const IA32E: u32 = 1 << 9;
    /// Load IA32_PAT.
    pub const LOAD_PAT: u32 = 1 << 14;
    /// Load IA32_EFER.
    pub const LOAD_EFER: u32 = 1 << 15;
    /// Reserved bits that are 1.
    pub const DEFAULT: u32 = 0x11ff;
}

/// Exit reasons.
pub mod reason {
    /// Exception or NMI.
    pub const EXCEPTION: u32 = 0;
    /// External interrupt.
    pub const INTERRUPT: u32 = 1;
    /// Triple fault.
    pub const TRIPLE_FAULT: u32 = 2;
    /// INIT signal.
    pub const INIT: u32 = 3;
    /// Startup IPI.
    pub const STARTUP: u32 = 4;
    /// NMI window.
    pub const NMI_WINDOW: u32 = 8;
    /// Task switch.
    pub const TASK_SWITCH: u32 = 9;
    /// CPUID.
    pub const CPUID: u32 = 10;
    /// GETSEC.
    pub const GETSEC: u32 = 11;
    /// HLT.
    pub const HLT: u32 = 12;
    /// INVD.
    pub const INVD: u32 = 13;
    /// VMCALL.
    pub const VMCALL: u32 = 18;
    /// VMCLEAR; the reasons up to VMXON are instructions of VMX.
    pub const VMCLEAR: u32 = 19;
    /// VMXON.
    pub const VMXON: u32 = 27;
    /// Control register.
    pub const CONTROL_REGISTER: u32 = 28;
    /// IN, OUT, INS, OUTS.
    pub const IO: u32 = 30;
    /// RDMSR.
    pub const RDMSR: u32 = 31;
    /// WRMSR.
    pub const WRMSR: u32 = 32;
    /// The monitor trap flag.
    pub const MONITOR_TRAP: u32 = 37;
    /// EPT violation.
    pub const EPT_VIOLATION: u32 = 48;
    /// INVEPT.
    pub const INVEPT: u32 = 50;
    /// INVVPID.
    pub const INVVPID: u32 = 53;
    /// XSETBV.
    pub const XSETBV: u32 = 55;
    /// SEAMCALL.
    pub const SEAMCALL: u32 = 76;
    /// TDCALL.
    pub const TDCALL: u32 = 77;
    /// Bit 31: the entry failed.
    pub const ENTRY_FAILED: u32 = 1 << 31;
}

/// Event fields: entry, exit and IDT-vectoring.
pub mod event {
    /// There is one.
    pub const VALID: u32 = 1 << 31;
    /// It has an error code.
    pub const ERROR: u32 = 1 << 11;
    /// IRET had unblocked NMIs (exit events).
    pub const NMI_UNBLOCKED: u32 = 1 << 12;
    /// Mask of the type.
    pub const TYPE: u32 = 7 << 8;
    /// NMI.
    pub const NMI: u32 = 2 << 8;
    /// Hardware exception.
    pub const EXCEPTION: u32 = 3 << 8;
    /// Software interrupt; this type and higher ones come from an instruction.
    pub const SOFTWARE: u32 = 4 << 8;
}

/// Interruptibility state.
pub mod interruptibility {
    /// Blocking by STI.
    pub const STI: u32 = 1 << 0;
    /// Blocking by MOV SS.
    pub const MOV_SS: u32 = 1 << 1;
    /// Blocking by NMI; virtual with virtual NMIs.
    pub const NMI: u32 = 1 << 3;
}

/// Activity state.
pub mod activity {
    /// Executing.
    pub const ACTIVE: u32 = 0;
    /// HLT.
    pub const HLT: u32 = 1;
    /// Waiting for a Startup IPI.
    pub const WAIT_FOR_SIPI: u32 = 3;
}

/// Capability and control MSRs.
pub mod msr {
    /// IA32_FEATURE_CONTROL.
    pub const FEATURE_CONTROL: u32 = 0x3a;
    /// Revision, region size, TRUE controls.
    pub const BASIC: u32 = 0x480;
    /// Activity states and more.
    pub const MISC: u32 = 0x485;
    /// CR0 bits that are 1.
    pub const CR0_FIXED0: u32 = 0x486;
    /// CR0 bits that may be 1.
    pub const CR0_FIXED1: u32 = 0x487;
    /// CR4 bits that are 1.
    pub const CR4_FIXED0: u32 = 0x488;
    /// CR4 bits that may be 1.
    pub const CR4_FIXED1: u32 = 0x489;
    /// Secondary controls.
    pub const SECONDARY: u32 = 0x48b;
    /// EPT and VPID.
    pub const EPT_VPID: u32 = 0x48c;
    /// Pin-based controls, TRUE.
    pub const TRUE_PIN: u32 = 0x48d;
    /// Primary controls, TRUE.
    pub const TRUE_PRIMARY: u32 = 0x48e;
    /// Exit controls, TRUE.
    pub const TRUE_EXIT: u32 = 0x48f;
    /// Entry controls, TRUE.
    pub const TRUE_ENTRY: u32 = 0x490;
}

/// CR0.PE.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.PG.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;
/// CR4.SMXE.
pub const CR4_SMXE: u64 = 1 << 14;
/// EFER.LME.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA.
pub const EFER_LMA: u64 = 1 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// Typed a second time from \[SDM3\] "Field Encoding in VMCS".
    #[test]
    fn encodings_are_the_manuals() {
        let all: &[(u32, u32)] = &[
            (VPID.encoding(), 0x0000),
            (HOST_CS.encoding(), 0x0c02),
            (HOST_TR.encoding(), 0x0c0c),
            (IO_BITMAP_A.encoding(), 0x2000),
            (IO_BITMAP_B.encoding(), 0x2002),
            (MSR_BITMAP.encoding(), 0x2004),
            (TSC_OFFSET.encoding(), 0x2010),
            (EPT_POINTER.encoding(), 0x201a),
            (XSS_EXITING_BITMAP.encoding(), 0x202c),
            (GUEST_PHYSICAL.encoding(), 0x2400),
            (LINK_POINTER.encoding(), 0x2800),
            (GUEST_PAT.encoding(), 0x2804),
            (GUEST_EFER.encoding(), 0x2806),
            (HOST_PAT.encoding(), 0x2c00),
            (HOST_EFER.encoding(), 0x2c02),
            (PIN_CONTROLS.encoding(), 0x4000),
            (PRIMARY_CONTROLS.encoding(), 0x4002),
            (EXCEPTION_BITMAP.encoding(), 0x4004),
            (EXIT_CONTROLS.encoding(), 0x400c),
            (ENTRY_CONTROLS.encoding(), 0x4012),
            (ENTRY_EVENT.encoding(), 0x4016),
            (SECONDARY_CONTROLS.encoding(), 0x401e),
            (INSTRUCTION_ERROR.encoding(), 0x4400),
            (EXIT_REASON.encoding(), 0x4402),
            (IDT_EVENT.encoding(), 0x4408),
            (EXIT_LENGTH.encoding(), 0x440c),
            (INTERRUPTIBILITY.encoding(), 0x4824),
            (ACTIVITY.encoding(), 0x4826),
            (CR0_MASK.encoding(), 0x6000),
            (CR4_SHADOW.encoding(), 0x6006),
            (QUALIFICATION.encoding(), 0x6400),
            (GUEST_CR0.encoding(), 0x6800),
            (GUEST_RIP.encoding(), 0x681e),
            (PENDING_DEBUG.encoding(), 0x6822),
            (HOST_RSP.encoding(), 0x6c14),
            (HOST_RIP.encoding(), 0x6c16),
        ];
        for (ours, manual) in all {
            assert_eq!(ours, manual);
        }
        let (selector, limit, rights, base) = SegmentName::Cs.fields();
        assert_eq!(selector.encoding(), 0x0802);
        assert_eq!((limit.encoding(), rights.encoding(), base.encoding()), (0x4802, 0x4816, 0x6808));
        let (selector, limit, rights, base) = SegmentName::Tr.fields();
        assert_eq!(selector.encoding(), 0x080e);
        assert_eq!((limit.encoding(), rights.encoding(), base.encoding()), (0x480e, 0x4822, 0x6814));
    }
}
