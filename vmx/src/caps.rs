//! What this CPU's VMX can do, and the controls that follow; a refusal names the bit that is missing.
//!
//! Spec: \[SDM3\] "VMX Capability Reporting Facility", "Enabling and Entering VMX Operation".

use core::fmt;

use hv::io::Msr;
use hv::vcpu::Role;

use crate::defs::{CR4_SMXE, CR4_VMXE, entry, exit, msr, pin, primary, secondary};

/// Why this CPU cannot run the MLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Firmware locked IA32_FEATURE_CONTROL without the bit that VMXON needs here.
    Locked {
        /// The register.
        value: u64,
        /// In SMX operation, that is after SENTER.
        smx: bool,
    },
    /// A control that the MLE needs cannot be 1.
    Missing {
        /// Number of the capability MSR.
        msr: u32,
        /// Number of the bit.
        bit: u32,
    },
    /// A control that would make exits without end cannot be 0.
    Forced {
        /// Number of the capability MSR.
        msr: u32,
        /// Number of the bit.
        bit: u32,
    },
    /// A VMX instruction failed.
    Instruction(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked { value, smx } => {
                let place = if *smx { "inside" } else { "outside" };
                write!(f, "IA32_FEATURE_CONTROL is locked at {value:#x}: no VMXON {place} SMX")
            }
            Self::Missing { msr, bit } => {
                write!(f, "VMX lacks bit {bit} of MSR {msr:#x}{}", Name(*msr, *bit))
            }
            Self::Forced { msr, bit } => {
                write!(f, "VMX has bit {bit} of MSR {msr:#x} fixed to 1{}", Name(*msr, *bit))
            }
            Self::Instruction(name) => write!(f, "{name} failed"),
        }
    }
}

/// What a capability bit is for.
struct Name(u32, u32);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.0, self.1) {
            (msr::BASIC, 55) => "TRUE controls",
            (msr::TRUE_PIN, 3) => "NMI exiting",
            (msr::TRUE_PIN, 5) => "virtual NMIs",
            (msr::TRUE_PRIMARY, 15) => "CR3-load exiting",
            (msr::TRUE_PRIMARY, 28) => "MSR bitmaps",
            (msr::TRUE_PRIMARY, 31) => "secondary controls",
            (msr::SECONDARY, 1) => "EPT",
            (msr::SECONDARY, 5) => "VPID",
            (msr::SECONDARY, 7) => "unrestricted guest",
            (msr::MISC, 8) => "wait-for-SIPI",
            (msr::EPT_VPID, 6) => "4-level EPT",
            (msr::EPT_VPID, 14) => "write-back EPT",
            (msr::EPT_VPID, 16) => "2 MiB EPT pages",
            (msr::EPT_VPID, 20 | 26) => "INVEPT",
            (msr::EPT_VPID, 32 | 42) => "INVVPID",
            (msr::TRUE_EXIT | msr::TRUE_ENTRY, _) => "PAT, EFER or debug state",
            _ => return Ok(()),
        };
        write!(f, " ({name})")
    }
}

/// A 32-bit control field: which bits must be 1 and which may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Allowed {
    msr: u32,
    must: u32,
    may: u32,
}

impl Allowed {
    fn read(from: &impl Msr, msr: u32) -> Self {
        let value = from.rdmsr(msr);
        Self { msr, must: value as u32, may: (value >> 32) as u32 }
    }

    /// The field with `needed` and whatever there is of `wanted`; `reserved` are bits without a meaning.
    fn choose(&self, needed: u32, wanted: u32, reserved: u32) -> Result<u32, Refusal> {
        let missing = needed & !self.may;
        if missing != 0 {
            return Err(Refusal::Missing { msr: self.msr, bit: missing.trailing_zeros() });
        }
        let forced = self.must & !(needed | wanted | reserved);
        if forced != 0 {
            return Err(Refusal::Forced { msr: self.msr, bit: forced.trailing_zeros() });
        }
        Ok(needed | self.must | (wanted & self.may))
    }
}

/// The control fields of a virtual CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: u32,
    /// Primary processor-based.
    pub primary: u32,
    /// Secondary processor-based.
    pub secondary: u32,
    /// Exit.
    pub exit: u32,
    /// Entry, without the mode bit.
    pub entry: u32,
}

/// The capabilities that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Goes into the first word of VMXON and VMCS regions.
    pub revision: u32,
    /// CR0 bits that are 1 in VMX operation.
    pub cr0_fixed: u64,
    /// CR4 bits that are 1 in VMX operation.
    pub cr4_fixed: u64,
    /// EPT leaves of 1 GiB.
    pub pages_1g: bool,
    /// The monitor trap flag: a guest can be made to exit after one instruction.
    pub monitor_trap: bool,
    guest: Controls,
    sandbox: Controls,
}

/// The control fields' capabilities.
struct Fields {
    pin: Allowed,
    primary: Allowed,
    secondary: Allowed,
    exit: Allowed,
    entry: Allowed,
}

impl Caps {
    /// Reads them on a CPU whose CPUID shows VMX.
    pub fn read(from: &impl Msr) -> Result<Self, Refusal> {
        let basic = from.rdmsr(msr::BASIC);
        let need = |msr, value: u64, bits: &[u32]| {
            let absent = bits.iter().find(|bit| value.checked_shr(**bit).unwrap_or(0) & 1 == 0);
            absent.map_or(Ok(()), |bit| Err(Refusal::Missing { msr, bit: *bit }))
        };
        need(msr::BASIC, basic, &[55])?;
        // Activity state wait-for-SIPI.
        need(msr::MISC, from.rdmsr(msr::MISC), &[8])?;
        let primary = Allowed::read(from, msr::TRUE_PRIMARY);
        primary.choose(primary::SECONDARY, u32::MAX, 0)?;
        let secondary = Allowed::read(from, msr::SECONDARY);
        // The register of EPT exists where EPT or VPID can be switched on.
        secondary.choose(secondary::EPT, u32::MAX, 0)?;
        let ept = from.rdmsr(msr::EPT_VPID);
        // Four levels, write-back, 2 MiB pages, INVEPT and INVVPID of all contexts.
        need(msr::EPT_VPID, ept, &[6, 14, 16, 20, 26, 32, 42])?;
        let fields = Fields {
            pin: Allowed::read(from, msr::TRUE_PIN),
            primary,
            secondary,
            exit: Allowed::read(from, msr::TRUE_EXIT),
            entry: Allowed::read(from, msr::TRUE_ENTRY),
        };
        Ok(Self {
            revision: basic as u32 & 0x7fff_ffff,
            cr0_fixed: from.rdmsr(msr::CR0_FIXED0),
            cr4_fixed: from.rdmsr(msr::CR4_FIXED0),
            pages_1g: ept & 1 << 17 != 0,
            monitor_trap: fields.primary.may & primary::MONITOR_TRAP != 0,
            guest: fields.controls(Role::Guest)?,
            sandbox: fields.controls(Role::Sandbox)?,
        })
    }

    /// The controls for a virtual CPU of `role`.
    pub fn controls(&self, role: Role) -> Controls {
        match role {
            Role::Guest => self.guest,
            Role::Sandbox => self.sandbox,
        }
    }

    /// CR0 bits that stay the MLE's: those that VMX fixes, without the two that an unrestricted guest has.
    pub fn cr0_mask(&self) -> u64 {
        self.cr0_fixed & !(crate::defs::CR0_PE | crate::defs::CR0_PG)
    }

    /// CR4 bits that stay the MLE's: those that VMX fixes, and what would show VMX and SMX.
    pub fn cr4_mask(&self) -> u64 {
        self.cr4_fixed | CR4_VMXE | CR4_SMXE
    }
}

impl Fields {
    fn controls(&self, role: Role) -> Result<Controls, Refusal> {
        // What CPUID offers works in the guest without an exit. Wanted: not every CPU has it.
        let both = secondary::RDTSCP | secondary::INVPCID;
        let (pin, primary, wanted) = match role {
            Role::Guest => (0, 0, both | secondary::XSAVES | secondary::USER_WAIT),
            Role::Sandbox => (
                pin::INTERRUPT,
                primary::HLT
                    | primary::MWAIT
                    | primary::MONITOR
                    | primary::CR3_LOAD
                    | primary::CR8_LOAD
                    | primary::CR8_STORE
                    | primary::MOV_DR,
                both,
            ),
        };
        let primary =
            primary | primary::TSC_OFFSET | primary::IO_BITMAPS | primary::MSR_BITMAP | primary::SECONDARY;
        let exit = exit::HOST_64
            | exit::SAVE_DEBUG
            | exit::SAVE_PAT
            | exit::LOAD_PAT
            | exit::SAVE_EFER
            | exit::LOAD_EFER;
        let entry = entry::LOAD_DEBUG | entry::LOAD_PAT | entry::LOAD_EFER;
        Ok(Controls {
            pin: self.pin.choose(pin | pin::NMI | pin::VIRTUAL_NMIS, 0, pin::DEFAULT)?,
            primary: self.primary.choose(primary, 0, primary::DEFAULT)?,
            secondary: self.secondary.choose(
                secondary::EPT | secondary::VPID | secondary::UNRESTRICTED,
                wanted,
                0,
            )?,
            exit: self.exit.choose(exit, 0, exit::DEFAULT)?,
            entry: self.entry.choose(entry, 0, entry::DEFAULT)?,
        })
    }
}

/// Sees to it that IA32_FEATURE_CONTROL allows VMXON. Firmware that left it unlocked left it to us: the bits for VMXON inside
/// and outside SMX are set and it is locked, so that nobody after us decides otherwise.
///
/// Spec: \[SDM3\] "Enabling and Entering VMX Operation": bit 0 lock, bit 1 inside SMX, bit 2 outside SMX.
pub fn allow_vmxon(on: &impl Msr, smx: bool, cpu_has_smx: bool) -> Result<(), Refusal> {
    const LOCK: u64 = 1 << 0;
    const INSIDE: u64 = 1 << 1;
    const OUTSIDE: u64 = 1 << 2;
    let value = on.rdmsr(msr::FEATURE_CONTROL);
    let needed = if smx { INSIDE } else { OUTSIDE };
    if value & LOCK == 0 {
        let inside = if smx || cpu_has_smx { INSIDE } else { 0 };
        on.wrmsr(msr::FEATURE_CONTROL, value | LOCK | OUTSIDE | inside);
        return Ok(());
    }
    if value & needed == 0 { Err(Refusal::Locked { value, smx }) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::format;

    pub struct Fake(pub RefCell<BTreeMap<u32, u64>>);
    impl Msr for Fake {
        fn rdmsr(&self, index: u32) -> u64 {
            self.0.borrow()[&index]
        }
        fn wrmsr(&self, index: u32, value: u64) {
            self.0.borrow_mut().insert(index, value);
        }
    }

    /// The registers of Bochs' corei5_arrandale_m520, the oldest CPU that will do; secondary controls, EPT and basic as read
    /// from it, the others as the manual's defaults with everything allowed that Nehalem has.
    pub fn arrandale() -> Fake {
        Fake(RefCell::new(BTreeMap::from([
            (0x3a, 5),
            (0x480, 0x00d8_1000_0000_002b),
            (0x485, 0x0000_01e5 | 1 << 8),
            (0x486, 0x8000_0021),
            (0x487, 0xffff_ffff),
            (0x488, 0x2000),
            (0x489, 0x27ff),
            (0x48b, 0x0000_00ff << 32),
            (0x48c, 0x0000_0f01_0611_4141),
            (0x48d, 0x0000_007f << 32 | 0x16),
            (0x48e, 0xfff9_fffe << 32 | 0x0400_6172),
            (0x48f, 0x007f_ffff << 32 | 0x0003_6dfb),
            (0x490, 0x0000_ffff << 32 | 0x11fb),
        ])))
    }

    #[test]
    fn controls_on_the_oldest_cpu() {
        let caps = Caps::read(&arrandale()).unwrap();
        assert!(!caps.pages_1g);
        assert_eq!(caps.revision, 0x2b);
        let guest = caps.controls(Role::Guest);
        assert_eq!(guest.pin, 0x16 | 0x28);
        assert_eq!(guest.primary, 0x9200_0008 | 0x0400_6172);
        assert_eq!(guest.secondary, 0xaa, "EPT, RDTSCP, VPID, unrestricted guest");
        assert_eq!(guest.exit & 0x3c_0204, 0x3c_0204);
        assert_eq!(guest.entry & 0xc004, 0xc004);
        let sandbox = caps.controls(Role::Sandbox);
        assert_eq!(sandbox.pin & 1, 1);
        assert_eq!(sandbox.primary & 0x2098_8480, 0x2098_8480);
    }

    #[test]
    fn a_missing_control_is_named() {
        let msrs = arrandale();
        msrs.wrmsr(0x48b, 0x7f << 32);
        let refusal = Caps::read(&msrs).unwrap_err();
        assert_eq!(refusal, Refusal::Missing { msr: 0x48b, bit: 7 });
        assert_eq!(format!("{refusal}"), "VMX lacks bit 7 of MSR 0x48b (unrestricted guest)");
        let msrs = arrandale();
        msrs.wrmsr(0x48c, 0x0000_0f01_0611_4141 & !(1 << 20));
        assert_eq!(Caps::read(&msrs).unwrap_err(), Refusal::Missing { msr: 0x48c, bit: 20 });
        let msrs = arrandale();
        msrs.wrmsr(0x48b, 0);
        assert_eq!(Caps::read(&msrs).unwrap_err(), Refusal::Missing { msr: 0x48b, bit: 1 });
        let msrs = arrandale();
        msrs.wrmsr(0x480, 0x0058_1000_0000_002b);
        assert_eq!(Caps::read(&msrs).unwrap_err(), Refusal::Missing { msr: 0x480, bit: 55 });
    }

    #[test]
    fn a_forced_exit_is_named() {
        let msrs = arrandale();
        msrs.wrmsr(0x48e, 0xfff9_fffe << 32 | 0x0401_e172);
        let refusal = Caps::read(&msrs).unwrap_err();
        assert_eq!(refusal, Refusal::Forced { msr: 0x48e, bit: 15 });
    }

    #[test]
    fn feature_control_decides_inside_and_outside_smx() {
        let with = |value, smx| {
            let msrs = arrandale();
            msrs.wrmsr(0x3a, value);
            let result = allow_vmxon(&msrs, smx, true);
            (result, msrs.rdmsr(0x3a))
        };
        assert_eq!(with(5, false), (Ok(()), 5));
        assert_eq!(with(5, true).0, Err(Refusal::Locked { value: 5, smx: true }));
        assert_eq!(with(3, true), (Ok(()), 3));
        assert_eq!(with(3, false).0, Err(Refusal::Locked { value: 3, smx: false }));
        assert_eq!(with(0xff00, false), (Ok(()), 0xff07), "unlocked: ours to set and to lock");
        assert_eq!(with(1, true).0, Err(Refusal::Locked { value: 1, smx: true }));
        let msrs = arrandale();
        msrs.wrmsr(0x3a, 0);
        assert_eq!((allow_vmxon(&msrs, false, false), msrs.rdmsr(0x3a)), (Ok(()), 5), "no SMX in this CPU");
    }

    #[test]
    fn vmx_and_smx_stay_hidden() {
        let caps = Caps::read(&arrandale()).unwrap();
        assert_eq!((caps.cr0_mask(), caps.cr4_mask()), (0x20, 0x6000));
    }
}
