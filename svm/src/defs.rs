//! Layouts and numbers of SVM.
//!
//! Spec: \[APM2\] "Layout of VMCB" (control area, state-save area), "SVM Intercept Codes".

use core::mem::offset_of;

use hv::vcpu::Segment;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A segment register in the state-save area.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VmcbSegment {
    /// Selector.
    pub selector: u16,
    /// Descriptor bits 55:52 and 47:40.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

impl From<Segment> for VmcbSegment {
    fn from(s: Segment) -> Self {
        Self { selector: s.selector, attributes: s.attributes, limit: s.limit, base: s.base }
    }
}

/// The VMCB: control area in the first 1 KiB, state-save area after it.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct Vmcb {
    /// Intercepts of CR reads (15:0) and writes (31:16).
    pub intercept_cr: u32,
    /// Intercepts of DR reads and writes.
    pub intercept_dr: u32,
    /// Intercepts of exceptions, a bit a vector.
    pub intercept_exceptions: u32,
    /// Intercept word 3: [`Intercept3`].
    pub intercept3: u32,
    /// Intercept word 4: [`Intercept4`].
    pub intercept4: u32,
    /// Intercept word 5.
    pub intercept5: u32,
    reserved_018: [u8; 0x24],
    /// PAUSE filter threshold.
    pub pause_threshold: u16,
    /// PAUSE filter count.
    pub pause_count: u16,
    /// Physical address of the I/O permission map.
    pub iopm_base: u64,
    /// Physical address of the MSR permission map.
    pub msrpm_base: u64,
    /// Added to the TSC the guest reads.
    pub tsc_offset: u64,
    /// Address space identifier; 0 is the host's.
    pub asid: u32,
    /// [`TLB_FLUSH_ALL`] or [`TLB_KEEP`].
    pub tlb_control: u32,
    /// Virtual interrupt control word.
    pub int_control: u64,
    /// Bit 0: interrupt shadow.
    pub interrupt_shadow: u64,
    /// [`exit_code`].
    pub exit_code: u64,
    /// First information word.
    pub exit_info1: u64,
    /// Second information word.
    pub exit_info2: u64,
    /// The event whose delivery the exit interrupted.
    pub exit_int_info: u64,
    /// Bit 0: nested paging.
    pub nested_control: u64,
    reserved_098: [u8; 0x10],
    /// The event to inject: vector 7:0, type 10:8, error code valid 11, valid 31, error code 63:32.
    pub event_injection: u64,
    /// Root of the nested tables.
    pub nested_cr3: u64,
    /// Bit 0: LBR virtualization.
    pub lbr_control: u64,
    /// Clean bits; 0: the CPU reloads everything.
    pub clean: u32,
    reserved_0c4: u32,
    /// Next RIP, where the CPU saves it.
    pub next_rip: u64,
    reserved_0d0: [u8; 0x330],
    /// Segment registers and descriptor tables.
    pub es: VmcbSegment,
    /// CS.
    pub cs: VmcbSegment,
    /// SS.
    pub ss: VmcbSegment,
    /// DS.
    pub ds: VmcbSegment,
    /// FS.
    pub fs: VmcbSegment,
    /// GS.
    pub gs: VmcbSegment,
    /// GDTR.
    pub gdtr: VmcbSegment,
    /// LDTR.
    pub ldtr: VmcbSegment,
    /// IDTR.
    pub idtr: VmcbSegment,
    /// TR.
    pub tr: VmcbSegment,
    reserved_4a0: [u8; 0x2b],
    /// CPL: rules, not CS.DPL.
    pub cpl: u8,
    reserved_4cc: u32,
    /// EFER, with SVME set.
    pub efer: u64,
    reserved_4d8: [u8; 0x70],
    /// CR4.
    pub cr4: u64,
    /// CR3.
    pub cr3: u64,
    /// CR0.
    pub cr0: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6.
    pub dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    reserved_580: [u8; 0x58],
    /// RSP.
    pub rsp: u64,
    reserved_5e0: [u8; 0x18],
    /// RAX.
    pub rax: u64,
    /// STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP.
    pub syscall: [u64; 8],
    /// CR2.
    pub cr2: u64,
    reserved_648: [u8; 0x20],
    /// PAT of the guest.
    pub g_pat: u64,
    reserved_670: [u8; 0x990],
}

const _: () = {
    assert!(size_of::<Vmcb>() == 0x1000);
    assert!(offset_of!(Vmcb, pause_threshold) == 0x3c);
    assert!(offset_of!(Vmcb, iopm_base) == 0x40);
    assert!(offset_of!(Vmcb, msrpm_base) == 0x48);
    assert!(offset_of!(Vmcb, tsc_offset) == 0x50);
    assert!(offset_of!(Vmcb, asid) == 0x58);
    assert!(offset_of!(Vmcb, tlb_control) == 0x5c);
    assert!(offset_of!(Vmcb, int_control) == 0x60);
    assert!(offset_of!(Vmcb, interrupt_shadow) == 0x68);
    assert!(offset_of!(Vmcb, exit_code) == 0x70);
    assert!(offset_of!(Vmcb, exit_info1) == 0x78);
    assert!(offset_of!(Vmcb, exit_info2) == 0x80);
    assert!(offset_of!(Vmcb, exit_int_info) == 0x88);
    assert!(offset_of!(Vmcb, nested_control) == 0x90);
    assert!(offset_of!(Vmcb, event_injection) == 0xa8);
    assert!(offset_of!(Vmcb, nested_cr3) == 0xb0);
    assert!(offset_of!(Vmcb, lbr_control) == 0xb8);
    assert!(offset_of!(Vmcb, clean) == 0xc0);
    assert!(offset_of!(Vmcb, next_rip) == 0xc8);
    assert!(offset_of!(Vmcb, es) == 0x400);
    assert!(offset_of!(Vmcb, cs) == 0x410);
    assert!(offset_of!(Vmcb, gdtr) == 0x460);
    assert!(offset_of!(Vmcb, tr) == 0x490);
    assert!(offset_of!(Vmcb, cpl) == 0x4cb);
    assert!(offset_of!(Vmcb, efer) == 0x4d0);
    assert!(offset_of!(Vmcb, cr4) == 0x548);
    assert!(offset_of!(Vmcb, cr3) == 0x550);
    assert!(offset_of!(Vmcb, cr0) == 0x558);
    assert!(offset_of!(Vmcb, dr7) == 0x560);
    assert!(offset_of!(Vmcb, dr6) == 0x568);
    assert!(offset_of!(Vmcb, rflags) == 0x570);
    assert!(offset_of!(Vmcb, rip) == 0x578);
    assert!(offset_of!(Vmcb, rsp) == 0x5d8);
    assert!(offset_of!(Vmcb, rax) == 0x5f8);
    assert!(offset_of!(Vmcb, syscall) == 0x600);
    assert!(offset_of!(Vmcb, cr2) == 0x640);
    assert!(offset_of!(Vmcb, g_pat) == 0x668);
};

/// [`Vmcb::intercept3`] bits.
pub struct Intercept3;
impl Intercept3 {
    /// Physical interrupt.
    pub const INTR: u32 = 1 << 0;
    /// Non-maskable interrupt.
    pub const NMI: u32 = 1 << 1;
    /// SMI.
    pub const SMI: u32 = 1 << 2;
    /// INIT.
    pub const INIT: u32 = 1 << 3;
    /// CPUID.
    pub const CPUID: u32 = 1 << 18;
    /// INVD: would drop dirty lines of ours.
    pub const INVD: u32 = 1 << 22;
    /// HLT.
    pub const HLT: u32 = 1 << 24;
    /// INVLPGA.
    pub const INVLPGA: u32 = 1 << 26;
    /// I/O by permission map.
    pub const IOIO: u32 = 1 << 27;
    /// MSRs by permission map.
    pub const MSR: u32 = 1 << 28;
    /// Task switches.
    pub const TASK_SWITCH: u32 = 1 << 29;
    /// Shutdown.
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// [`Vmcb::intercept4`] bits.
pub struct Intercept4;
impl Intercept4 {
    /// VMRUN; must be set.
    pub const VMRUN: u32 = 1 << 0;
    /// VMMCALL.
    pub const VMMCALL: u32 = 1 << 1;
    /// VMLOAD, VMSAVE, STGI, CLGI, SKINIT.
    pub const SVM_INSTRUCTIONS: u32 = 0b0111_1100;
    /// WBINVD.
    pub const WBINVD: u32 = 1 << 9;
    /// MONITOR, MWAIT, MWAIT when armed.
    pub const MONITOR_MWAIT: u32 = 0b111 << 10;
    /// XSETBV.
    pub const XSETBV: u32 = 1 << 13;
}

/// [`Vmcb::tlb_control`]: nothing.
pub const TLB_KEEP: u32 = 0;
/// [`Vmcb::tlb_control`]: drop all entries of all ASIDs; every CPU with SVM has it.
pub const TLB_FLUSH_ALL: u32 = 1;

/// [`Vmcb::int_control`]: physical interrupts obey the host's IF while the guest runs.
pub const V_INTR_MASKING: u64 = 1 << 24;

/// EFER.SVME.
pub const EFER_SVME: u64 = 1 << 12;

/// Exit codes.
pub mod exit_code {
    /// First exception: code is this plus the vector.
    pub const EXCEPTION: u64 = 0x40;
    /// Last exception.
    pub const EXCEPTION_LAST: u64 = 0x5f;
    /// Physical interrupt.
    pub const INTR: u64 = 0x60;
    /// NMI.
    pub const NMI: u64 = 0x61;
    /// SMI.
    pub const SMI: u64 = 0x62;
    /// INIT.
    pub const INIT: u64 = 0x63;
    /// CPUID.
    pub const CPUID: u64 = 0x72;
    /// INVD.
    pub const INVD: u64 = 0x76;
    /// HLT.
    pub const HLT: u64 = 0x78;
    /// INVLPGA.
    pub const INVLPGA: u64 = 0x7a;
    /// IN, OUT.
    pub const IOIO: u64 = 0x7b;
    /// RDMSR, WRMSR.
    pub const MSR: u64 = 0x7c;
    /// Shutdown.
    pub const SHUTDOWN: u64 = 0x7f;
    /// VMRUN.
    pub const VMRUN: u64 = 0x80;
    /// VMMCALL.
    pub const VMMCALL: u64 = 0x81;
    /// VMLOAD.
    pub const VMLOAD: u64 = 0x82;
    /// SKINIT; the codes from VMLOAD to it are SVM's own instructions.
    pub const SKINIT: u64 = 0x86;
    /// WBINVD.
    pub const WBINVD: u64 = 0x89;
    /// Nested page fault.
    pub const NPF: u64 = 0x400;
    /// State that VMRUN refuses; some CPUs store it in 32 bits.
    pub const INVALID: u64 = 0xffff_ffff;
}
