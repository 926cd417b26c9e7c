//! The virtual CPU: what of it the MLE looks at, kept in memory between exits, and what exits mean.
//!
//! All of it is logic over [`Vmcs`]: [`VmxVcpu::enter`] writes what has changed before the world switch, [`VmxVcpu::exit`]
//! reads what is needed after it. So another VMCS may be current in between, and the logic runs on the host under test.

use hv::vcpu::{Access, Control, Exception, Exit, Gprs, Role, Segment, Step, Vcpu};

use crate::caps::{Caps, Controls};
use crate::defs::*;
use crate::vmcs::{FieldError, Vmcs};

/// RFLAGS.TF.
const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF.
const RFLAGS_IF: u64 = 1 << 9;
/// Pending debug exceptions: a single step.
const PENDING_BS: u64 = 1 << 14;
/// PAT after reset. Spec: \[SDM3\] "Programming the PAT".
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Access rights of an unusable segment.
const UNUSABLE: u32 = 1 << 16;
/// EPT pointer: tables are write-back, four levels. Accessed and dirty bits stay off: the CPU never writes to the tables.
const EPTP_BITS: u64 = 6 | 3 << 3;

/// Permission maps, nested tables and tag of a virtual machine.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Physical address of the [`crate::maps::MsrBitmap`].
    pub msr_bitmap: u64,
    /// Physical address of the two I/O bitmaps.
    pub io_bitmaps: u64,
    /// Root of the nested tables.
    pub nested_root: u64,
    /// Virtual-processor identifier, not 0.
    pub vpid: u16,
}

/// The host's registers that an exit loads: this CPU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// PAT.
    pub pat: u64,
    /// CS selector.
    pub cs: u16,
    /// SS, DS and ES selector.
    pub data: u16,
    /// TR selector.
    pub tr: u16,
    /// GS base.
    pub gs_base: u64,
    /// TR base.
    pub tr_base: u64,
    /// GDTR base.
    pub gdtr_base: u64,
    /// IDTR base.
    pub idtr_base: u64,
}

/// Registers that the MLE looks at or changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    rip: u64,
    rsp: u64,
    rflags: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    cs_base: u64,
    cs_rights: u32,
    ss_rights: u32,
    interruptibility: u32,
    activity: u32,
}

/// All other registers, where a virtual CPU begins anew.
#[derive(Clone, Copy)]
struct Fresh {
    segments: [Segment; 8],
    gdt: (u64, u32),
}

/// What is to be delivered at the next entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Event {
    info: u32,
    error: u32,
    length: u32,
}

/// A virtual CPU of VMX.
pub struct VmxVcpu {
    gprs: Gprs,
    role: Role,
    controls: Controls,
    machine: Machine,
    /// CR0 and CR4 bits that are the MLE's, and what the guest reads of them.
    masks: [u64; 2],
    shadows: [u64; 2],
    /// What is 1 of them in truth.
    fixed: [u64; 2],
    now: State,
    /// As the VMCS has it.
    stored: State,
    stored_shadows: [u64; 2],
    fresh: Option<Fresh>,
    event: Event,
    single_step: bool,
    /// CR2 of a page fault that is injected.
    cr2: Option<u64>,
    tsc_offset: u64,
    stored_tsc_offset: Option<u64>,
    flush: bool,
    /// The control fields are written.
    initialized: bool,
    nmi_window: bool,
    /// The last exit was for it.
    window_exit: bool,
    /// Of the last exit.
    length: u32,
    /// Where the instruction is that the next run is to end after.
    step: Option<u64>,
    /// The monitor trap flag is on.
    trapping: bool,
}

impl VmxVcpu {
    /// A virtual CPU in the state after INIT.
    pub fn new(caps: &Caps, role: Role, machine: Machine) -> Self {
        // The sandbox may change no bit of either register; both keep what its start set.
        let masks = match role {
            Role::Guest => [caps.cr0_mask(), caps.cr4_mask()],
            Role::Sandbox => [u64::MAX; 2],
        };
        let mut vcpu = Self {
            gprs: Gprs::default(),
            role,
            controls: caps.controls(role),
            machine,
            masks,
            shadows: [0; 2],
            fixed: [caps.cr0_mask(), caps.cr4_fixed],
            now: State::default(),
            stored: State::default(),
            stored_shadows: [0; 2],
            fresh: None,
            event: Event::default(),
            single_step: false,
            cr2: None,
            tsc_offset: 0,
            stored_tsc_offset: None,
            flush: true,
            initialized: false,
            nmi_window: false,
            window_exit: false,
            length: 0,
            step: None,
            trapping: false,
        };
        vcpu.reset();
        vcpu
    }

    /// INIT: registers as after the signal; controls, tables and time stay.
    ///
    /// Spec: \[SDM3\] "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT".
    fn reset(&mut self) {
        let data = Segment { selector: 0, attributes: 0x93, limit: 0xffff, base: 0 };
        let mut segments = [data; 8];
        for (name, segment) in SegmentName::ALL.iter().zip(&mut segments) {
            segment.attributes = match name {
                SegmentName::Cs => 0x9b,
                SegmentName::Ldtr => 0x82,
                SegmentName::Tr => 0x8b,
                _ => 0x93,
            };
            if *name == SegmentName::Cs {
                (segment.selector, segment.base) = (0xf000, 0xffff_0000);
            }
        }
        self.gprs = Gprs { rdx: 0x600, ..Gprs::default() };
        self.begin(segments, (0, 0xffff));
        self.set_control_registers(0x6000_0010, 0, 0);
        self.now.rip = 0xfff0;
    }

    /// Begins with these segments.
    fn begin(&mut self, segments: [Segment; 8], gdt: (u64, u32)) {
        let [_, cs, ss, ..] = segments;
        self.now = State {
            rflags: 2,
            cs_base: cs.base,
            cs_rights: rights(cs),
            ss_rights: rights(ss),
            ..State::default()
        };
        self.fresh = Some(Fresh { segments, gdt });
        self.event = Event::default();
        self.single_step = false;
        self.cr2 = None;
        // A CPU that was reset has an empty TLB.
        self.flush = true;
    }

    /// Sets CR0, CR4 and EFER to what the guest is to see.
    fn set_control_registers(&mut self, cr0: u64, cr4: u64, efer: u64) {
        let [fixed0, fixed4] = self.fixed;
        self.shadows = [cr0, cr4];
        (self.now.cr0, self.now.cr4, self.now.efer) = (cr0 | fixed0, cr4 | fixed4, efer);
    }

    /// General registers, for the world switch.
    pub fn gprs_pointer(&mut self) -> *mut Gprs {
        &raw mut self.gprs
    }

    /// CR2 to be set before the next entry.
    pub fn take_cr2(&mut self) -> Option<u64> {
        self.cr2.take()
    }

    /// Whether the TLB is to be emptied before the next entry.
    pub fn take_flush(&mut self) -> bool {
        core::mem::take(&mut self.flush)
    }

    /// Whether the last exit says that an NMI can be delivered, not that one came.
    pub fn nmi_window_opened(&self) -> bool {
        self.window_exit
    }

    /// Lets interrupts exit or not (the sandbox).
    pub fn exit_on_interrupts(&mut self, vmcs: &mut impl Vmcs, exit: bool) -> Result<(), FieldError> {
        let bit = if exit { pin::INTERRUPT } else { 0 };
        vmcs.write(PIN_CONTROLS, self.controls.pin & !pin::INTERRUPT | bit)
    }

    /// Writes the host's part of the VMCS: where this CPU has not entered it yet.
    pub fn set_host(&self, vmcs: &mut impl Vmcs, host: &HostState) -> Result<(), FieldError> {
        vmcs.write(HOST_CR0, host.cr0)?;
        vmcs.write(HOST_CR3, host.cr3)?;
        vmcs.write(HOST_CR4, host.cr4)?;
        vmcs.write(HOST_EFER, host.efer)?;
        vmcs.write(HOST_PAT, host.pat)?;
        vmcs.write(HOST_CS, host.cs)?;
        for field in [HOST_SS, HOST_DS, HOST_ES] {
            vmcs.write(field, host.data)?;
        }
        for field in [HOST_FS, HOST_GS] {
            vmcs.write(field, 0)?;
        }
        vmcs.write(HOST_TR, host.tr)?;
        vmcs.write(HOST_FS_BASE, 0)?;
        vmcs.write(HOST_GS_BASE, host.gs_base)?;
        vmcs.write(HOST_TR_BASE, host.tr_base)?;
        vmcs.write(HOST_GDTR_BASE, host.gdtr_base)?;
        vmcs.write(HOST_IDTR_BASE, host.idtr_base)?;
        vmcs.write(HOST_SYSENTER_CS, 0)?;
        vmcs.write(HOST_SYSENTER_ESP, 0)?;
        vmcs.write(HOST_SYSENTER_EIP, 0)
    }

    /// Before the world switch: writes what has changed. `nmi` says that one waits for the guest; gives whether it is delivered
    /// now. If not, an exit follows as soon as it can be.
    pub fn enter(&mut self, vmcs: &mut impl Vmcs, nmi: bool) -> Result<bool, FieldError> {
        if !self.initialized {
            self.write_controls(vmcs)?;
            self.initialized = true;
        }
        let waits = self.now.activity == activity::WAIT_FOR_SIPI;
        // Blocked until the Startup IPI.
        let nmi = nmi && !waits;
        let blocking = interruptibility::STI | interruptibility::MOV_SS | interruptibility::NMI;
        let deliver = nmi && self.event.info == 0 && self.now.interruptibility & blocking == 0;
        if deliver {
            self.event = Event { info: 2 | event::NMI | event::VALID, ..Event::default() };
        }
        let window = nmi && !deliver;
        let step = self.step.is_some();
        if (window, step) != (self.nmi_window, self.trapping) {
            (self.nmi_window, self.trapping) = (window, step);
            let window = if window { primary::NMI_WINDOW } else { 0 };
            let trap = if step { primary::MONITOR_TRAP } else { 0 };
            vmcs.write(PRIMARY_CONTROLS, self.controls.primary | window | trap)?;
        }
        if let Some(fresh) = self.fresh.take() {
            self.write_fresh(vmcs, &fresh)?;
        }
        self.now.rsp = self.gprs.rsp;
        self.write_changed(vmcs)?;
        if self.single_step {
            vmcs.write(PENDING_DEBUG, PENDING_BS)?;
            self.single_step = false;
        }
        if self.event.info != 0 {
            vmcs.write(ENTRY_EVENT, self.event.info)?;
            vmcs.write(ENTRY_ERROR, self.event.error)?;
            vmcs.write(ENTRY_LENGTH, self.event.length)?;
            self.event = Event::default();
        }
        Ok(deliver)
    }

    fn write_controls(&self, vmcs: &mut impl Vmcs) -> Result<(), FieldError> {
        let Controls { pin, primary, secondary, exit, .. } = self.controls;
        vmcs.write(PIN_CONTROLS, pin)?;
        vmcs.write(PRIMARY_CONTROLS, primary)?;
        vmcs.write(SECONDARY_CONTROLS, secondary)?;
        vmcs.write(EXIT_CONTROLS, exit)?;
        let exceptions = if self.role == Role::Sandbox { u32::MAX } else { 0 };
        vmcs.write(EXCEPTION_BITMAP, exceptions)?;
        for field in [PF_MASK, PF_MATCH, CR3_TARGETS, EXIT_MSR_STORES, EXIT_MSR_LOADS, ENTRY_MSR_LOADS] {
            vmcs.write(field, 0)?;
        }
        vmcs.write(IO_BITMAP_A, self.machine.io_bitmaps)?;
        vmcs.write(IO_BITMAP_B, self.machine.io_bitmaps.wrapping_add(0x1000))?;
        vmcs.write(MSR_BITMAP, self.machine.msr_bitmap)?;
        vmcs.write(EPT_POINTER, self.machine.nested_root | EPTP_BITS)?;
        vmcs.write(VPID, self.machine.vpid)?;
        vmcs.write(LINK_POINTER, u64::MAX)?;
        if secondary & secondary::XSAVES != 0 {
            vmcs.write(XSS_EXITING_BITMAP, 0)?;
        }
        vmcs.write(GUEST_PAT, PAT_RESET)?;
        let [mask0, mask4] = self.masks;
        vmcs.write(CR0_MASK, mask0)?;
        vmcs.write(CR4_MASK, mask4)
    }

    fn write_fresh(&mut self, vmcs: &mut impl Vmcs, fresh: &Fresh) -> Result<(), FieldError> {
        for (name, segment) in SegmentName::ALL.iter().zip(fresh.segments) {
            let (selector, limit, rights_field, base) = name.fields();
            vmcs.write(selector, segment.selector)?;
            vmcs.write(limit, segment.limit)?;
            vmcs.write(rights_field, rights(segment))?;
            vmcs.write(base, segment.base)?;
        }
        let (base, limit) = fresh.gdt;
        vmcs.write(GUEST_GDTR_BASE, base)?;
        vmcs.write(GUEST_GDTR_LIMIT, limit)?;
        vmcs.write(GUEST_IDTR_BASE, 0)?;
        vmcs.write(GUEST_IDTR_LIMIT, 0xffff)?;
        vmcs.write(GUEST_DR7, 0x400)?;
        vmcs.write(GUEST_DEBUGCTL, 0)?;
        vmcs.write(PENDING_DEBUG, 0)?;
        vmcs.write(GUEST_SYSENTER_CS, 0)?;
        vmcs.write(GUEST_SYSENTER_ESP, 0)?;
        vmcs.write(GUEST_SYSENTER_EIP, 0)?;
        vmcs.write(ENTRY_EVENT, 0)?;
        // All that `write_changed` compares is to be written.
        let State { rip, rsp, rflags, cr0, cr3, cr4, efer, .. } = self.now;
        self.stored = State {
            rip: !rip,
            rsp: !rsp,
            rflags: !rflags,
            cr0: !cr0,
            cr3: !cr3,
            cr4: !cr4,
            efer: !efer,
            interruptibility: u32::MAX,
            activity: u32::MAX,
            ..self.now
        };
        self.stored_shadows = self.shadows.map(|shadow| !shadow);
        Ok(())
    }

    fn write_changed(&mut self, vmcs: &mut impl Vmcs) -> Result<(), FieldError> {
        let (now, stored) = (self.now, self.stored);
        for (field, value, old) in [
            (GUEST_RIP, now.rip, stored.rip),
            (GUEST_RSP, now.rsp, stored.rsp),
            (GUEST_RFLAGS, now.rflags, stored.rflags),
            (GUEST_CR0, now.cr0, stored.cr0),
            (GUEST_CR3, now.cr3, stored.cr3),
            (GUEST_CR4, now.cr4, stored.cr4),
        ] {
            if value != old {
                vmcs.write(field, value)?;
            }
        }
        if now.efer != stored.efer {
            vmcs.write(GUEST_EFER, now.efer)?;
            let mode = if now.efer & EFER_LMA != 0 { entry::IA32E } else { 0 };
            vmcs.write(ENTRY_CONTROLS, self.controls.entry | mode)?;
        }
        for (field, value, old) in [
            (INTERRUPTIBILITY, now.interruptibility, stored.interruptibility),
            (ACTIVITY, now.activity, stored.activity),
        ] {
            if value != old {
                vmcs.write(field, value)?;
            }
        }
        if self.stored_tsc_offset != Some(self.tsc_offset) {
            vmcs.write(TSC_OFFSET, self.tsc_offset)?;
            self.stored_tsc_offset = Some(self.tsc_offset);
        }
        let ([cr0, cr4], [old0, old4]) = (self.shadows, self.stored_shadows);
        if cr0 != old0 {
            vmcs.write(CR0_SHADOW, cr0)?;
        }
        if cr4 != old4 {
            vmcs.write(CR4_SHADOW, cr4)?;
        }
        self.stored = now;
        self.stored_shadows = self.shadows;
        Ok(())
    }

    /// After the world switch: why it came back.
    pub fn exit(&mut self, vmcs: &impl Vmcs) -> Result<Exit, FieldError> {
        self.window_exit = false;
        let reason = vmcs.read(EXIT_REASON)?;
        let qualification = vmcs.read(QUALIFICATION)?;
        if reason & reason::ENTRY_FAILED != 0 {
            return Ok(Exit::Unexpected {
                code: reason.into(),
                info1: qualification,
                info2: vmcs.read(GUEST_RIP)?,
            });
        }
        self.now = State {
            rip: vmcs.read(GUEST_RIP)?,
            rsp: vmcs.read(GUEST_RSP)?,
            rflags: vmcs.read(GUEST_RFLAGS)?,
            cr0: vmcs.read(GUEST_CR0)?,
            cr3: vmcs.read(GUEST_CR3)?,
            cr4: vmcs.read(GUEST_CR4)?,
            efer: vmcs.read(GUEST_EFER)?,
            cs_base: vmcs.read(GUEST_CS_BASE)?,
            cs_rights: vmcs.read(GUEST_CS_RIGHTS)?,
            ss_rights: vmcs.read(GUEST_SS_RIGHTS)?,
            interruptibility: vmcs.read(INTERRUPTIBILITY)?,
            activity: vmcs.read(ACTIVITY)?,
        };
        self.stored = self.now;
        // Blocking by SMI means nothing outside SMM, where an entry with it fails.
        self.now.interruptibility &= interruptibility::STI | interruptibility::MOV_SS | interruptibility::NMI;
        self.gprs.rsp = self.now.rsp;
        self.length = vmcs.read(EXIT_LENGTH)?;
        self.deliver_again(vmcs)?;
        self.decode(vmcs, reason, qualification)
    }

    /// An event whose delivery the exit interrupted is delivered at the next entry.
    ///
    /// Spec: \[SDM3\] "Information for VM Exits During Event Delivery".
    fn deliver_again(&mut self, vmcs: &impl Vmcs) -> Result<(), FieldError> {
        let info = vmcs.read(IDT_EVENT)?;
        if info & event::VALID == 0 {
            return Ok(());
        }
        let kind = info & event::TYPE;
        self.event = Event {
            info: info & (event::VALID | event::ERROR | event::TYPE | 0xff),
            error: if info & event::ERROR != 0 { vmcs.read(IDT_ERROR)? } else { 0 },
            length: if kind >= event::SOFTWARE { self.length } else { 0 },
        };
        if kind == event::NMI {
            // Its delivery had begun to block NMIs; an entry with that bit would refuse to inject one.
            self.now.interruptibility &= !interruptibility::NMI;
        }
        Ok(())
    }

    fn decode(&mut self, vmcs: &impl Vmcs, reason: u32, qualification: u64) -> Result<Exit, FieldError> {
        let g = &self.gprs;
        Ok(match reason {
            reason::EXCEPTION => {
                let info = vmcs.read(EXIT_EVENT)?;
                if info & event::TYPE == event::NMI {
                    return Ok(Exit::Nmi);
                }
                let error = if info & event::ERROR != 0 { vmcs.read(EXIT_ERROR)? } else { 0 };
                Exit::Exception { vector: info as u8, error: error.into() }
            }
            reason::INTERRUPT => Exit::Interrupt,
            reason::TRIPLE_FAULT => Exit::Shutdown,
            reason::INIT => Exit::Init,
            reason::STARTUP => Exit::Startup { vector: qualification as u8 },
            reason::NMI_WINDOW => {
                // Also where the MLE's NMI handler asked for it.
                (self.nmi_window, self.window_exit) = (true, true);
                Exit::Nmi
            }
            reason::MONITOR_TRAP => Exit::Absorbed,
            reason::CPUID => Exit::Cpuid,
            reason::HLT => Exit::Halt,
            reason::INVD => Exit::InvalidateCaches,
            reason::VMCALL => Exit::Hypercall,
            reason::GETSEC
            | reason::VMCLEAR..=reason::VMXON
            | reason::INVEPT
            | reason::INVVPID
            | reason::SEAMCALL
            | reason::TDCALL => Exit::VirtualizationInstruction,
            reason::IO => Exit::Port {
                port: (qualification >> 16) as u16,
                size: (qualification as u8 & 7).wrapping_add(1),
                input: qualification & 1 << 3 != 0,
                string: qualification & 1 << 4 != 0,
                next_rip: self.after(self.length.into()),
            },
            reason::RDMSR => Exit::MsrRead { index: g.rcx as u32 },
            reason::WRMSR => Exit::MsrWrite { index: g.rcx as u32, value: g.rdx << 32 | g.rax & 0xffff_ffff },
            reason::XSETBV => Exit::SetXcr { index: g.rcx as u32, value: g.rdx << 32 | g.rax & 0xffff_ffff },
            reason::EPT_VIOLATION => {
                if qualification & 1 << 12 != 0 && self.event.info == 0 {
                    // An IRET that had unblocked NMIs will be tried again.
                    self.now.interruptibility |= interruptibility::NMI;
                }
                Exit::Memory {
                    gpa: vmcs.read(GUEST_PHYSICAL)?,
                    access: match qualification & 7 {
                        q if q & 4 != 0 => Access::Fetch,
                        q if q & 2 != 0 => Access::Write,
                        _ => Access::Read,
                    },
                    table_walk: qualification & 0x180 == 0x80,
                }
            }
            reason::CONTROL_REGISTER if self.role == Role::Guest && self.moves_control(qualification) => {
                Exit::Absorbed
            }
            // Hardware task switching: no 64-bit system has it, and it is not emulated.
            reason::TASK_SWITCH if self.role == Role::Guest => {
                self.inject(Exception::GeneralProtection);
                Exit::Absorbed
            }
            _ => Exit::Unexpected { code: reason.into(), info1: qualification, info2: self.now.rip },
        })
    }

    /// Answers a MOV to CR0 or CR4 that touches a bit of the MLE's. The guest gets #GP for a bit that it does not have.
    /// Otherwise the read shadow takes what the guest wants to see there, and the instruction is executed again: it no longer
    /// exits then, and all that it does, mode switches too, is the CPU's work.
    fn moves_control(&mut self, qualification: u64) -> bool {
        let register = (qualification >> 8 & 0xf) as u8;
        let Some(value) = self.gprs.by_encoding(register) else { return false };
        let value = if self.is_64_bit() { value } else { value & 0xffff_ffff };
        let [mask0, mask4] = self.masks;
        let [shadow0, shadow4] = &mut self.shadows;
        match qualification & 0x3f {
            0 => *shadow0 = *shadow0 & !mask0 | value & mask0,
            4 if value & (CR4_VMXE | CR4_SMXE) != 0 => self.inject(Exception::GeneralProtection),
            4 => *shadow4 = *shadow4 & !mask4 | value & mask4,
            _ => return false,
        }
        true
    }

    fn is_64_bit(&self) -> bool {
        self.now.efer & EFER_LMA != 0 && self.now.cs_rights & 1 << 13 != 0
    }

    /// The address `length` bytes on.
    fn after(&self, length: u64) -> u64 {
        let rip = self.now.rip.wrapping_add(length);
        if self.is_64_bit() { rip } else { rip & 0xffff_ffff }
    }

    fn resume_after(&mut self, rip: u64) {
        self.now.rip = rip;
        self.now.interruptibility &= !(interruptibility::STI | interruptibility::MOV_SS);
        // A trap that the guest asked for.
        self.single_step = self.now.rflags & RFLAGS_TF != 0;
    }
}

/// Access rights as the VMCS has them. Spec: \[SDM3\] "Guest Register State", format of access rights.
fn rights(s: Segment) -> u32 {
    let attributes = u32::from(s.attributes);
    let present = attributes & 0x80 != 0;
    attributes & 0xff | (attributes & 0xf00) << 4 | if present { 0 } else { UNUSABLE }
}

impl Vcpu for VmxVcpu {
    fn gprs(&self) -> &Gprs {
        &self.gprs
    }
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }
    fn rip(&self) -> u64 {
        self.now.rip
    }
    fn advance(&mut self, length: u64) {
        let length = if self.length != 0 { self.length.into() } else { length };
        self.resume_after(self.after(length));
    }
    fn control(&self) -> Control {
        let ([mask0, mask4], [shadow0, shadow4]) = (self.masks, self.shadows);
        Control {
            cr0: self.now.cr0 & !mask0 | shadow0 & mask0,
            cr3: self.now.cr3,
            cr4: self.now.cr4 & !mask4 | shadow4 & mask4,
            efer: self.now.efer,
        }
    }
    fn set_efer(&mut self, efer: u64) {
        // LMA is the CPU's: it follows LME while paging is on.
        let lma = if self.now.cr0 & CR0_PG != 0 { self.now.efer & EFER_LMA } else { 0 };
        self.now.efer = efer & !EFER_LMA | lma;
    }
    fn cpl(&self) -> u8 {
        (self.now.ss_rights >> 5 & 3) as u8
    }
    fn code(&self) -> (u64, bool) {
        (self.now.cs_base, self.is_64_bit())
    }
    fn inject(&mut self, exception: Exception) {
        // Real mode knows no error codes, and an entry that has one there fails.
        let error_bit = if self.now.cr0 & CR0_PE != 0 { event::ERROR } else { 0 };
        let (vector, error) = match exception {
            Exception::Debug => (1, None),
            Exception::InvalidOpcode => (6, None),
            Exception::GeneralProtection => (13, Some(0)),
            Exception::PageFault { error, address } => {
                self.cr2 = Some(address);
                (14, Some(error))
            }
        };
        self.event = Event {
            info: vector | event::EXCEPTION | event::VALID | error.map_or(0, |_| error_bit),
            error: error.unwrap_or(0),
            length: 0,
        };
        self.now.activity = activity::ACTIVE;
    }
    fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
    }
    fn flush_nested(&mut self) {
        self.flush = true;
    }
    fn skip_to(&mut self, rip: u64) {
        self.resume_after(rip);
    }
    fn takes_interrupts(&self) -> bool {
        self.now.rflags & RFLAGS_IF != 0
            && self.now.interruptibility & (interruptibility::STI | interruptibility::MOV_SS) == 0
    }
    fn start_at(&mut self, vector: u8) {
        self.reset();
        if let Some(fresh) = &mut self.fresh {
            let [_, cs, ..] = &mut fresh.segments;
            (cs.selector, cs.base) = (u16::from(vector) << 8, u64::from(vector) << 12);
            self.now.cs_base = cs.base;
        }
        self.now.rip = 0;
    }
    fn start_long_mode(&mut self, rip: u64, rsp: u64, cr3: u64, gdt: (u64, u32)) {
        self.gprs = Gprs { rsp, ..Gprs::default() };
        let data = Segment { selector: 0x18, attributes: 0xc93, limit: u32::MAX, base: 0 };
        let mut segments = [data; 8];
        let [_, cs, _, _, _, _, ldtr, tr] = &mut segments;
        (cs.selector, cs.attributes) = (0x10, 0xa9b);
        *ldtr = Segment { selector: 0, attributes: 0x82, limit: 0xffff, base: 0 };
        *tr = Segment { attributes: 0x8b, ..*ldtr };
        self.begin(segments, gdt);
        self.set_control_registers(0x8000_0033, 0x20 | 0x600, EFER_LME | EFER_LMA | 0x800);
        (self.now.rip, self.now.cr3) = (rip, cr3);
    }
    fn begin_step(&mut self) {
        self.step = Some(self.now.rip);
    }
    fn end_step(&mut self, exit: Exit) -> Option<Step> {
        let before = self.step.take()?;
        Some(Step { executed: self.now.rip != before, answered: exit == Exit::Absorbed })
    }
    fn wait_for_startup(&mut self) {
        self.now.activity = activity::WAIT_FOR_SIPI;
        self.now.interruptibility = 0;
        (self.event, self.single_step) = (Event::default(), false);
    }
}

#[cfg(test)]
mod tests;
