//! How far System Management Mode is locked down, as the registers say at launch.
//!
//! A fact is what a register holds, not a proof: firmware that runs in SMM may have made it look like this, and
//! a register speaks for the CPU or chipset it belongs to alone. The facts are measured, so a verifier can tell
//! a machine that changed.
//!
//! A register is read only where CPUID or the chipset's identity says that it exists. For another chipset than
//! the known one, what its registers would say is unknown, and the facts say that.
//!
//! Spec: \[ICH9\] "LPC Interface Bridge Registers (D31:F0)", "Power Management I/O Registers"; \[Q35\] "SMRAMC",
//! "ESMRAMC"; \[APM2\] "System-Management Mode"; \[PPR\] "HWCR", "SMMAddr", "SMMMask"; \[SDM3\] "System-Management
//! Range Registers", "Memory Type Range Registers"; \[WSMT\].

use core::fmt;

use heapless::Vec;
use hv::io::{Msr, PortIo};

/// Name of the event that measures [`Facts::measured`].
pub const EVENT: &str = "SMM facts";
/// Most facts.
const MAX: usize = 11;
/// Most bytes of [`Facts::measured`].
pub const MEASURED_MAX: usize = MAX.saturating_mul(FACT_LEN).saturating_add(1);
/// Bytes of a fact: kind, state, two registers.
const FACT_LEN: usize = 18;
/// First byte of the measured form.
const FORM: u8 = 1;

/// Whether a protection is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Nothing can be said.
    Unknown = 0,
    /// It is in force.
    Protected = 1,
    /// It is not.
    Open = 2,
}

impl State {
    const fn of(protected: bool) -> Self {
        if protected { Self::Protected } else { Self::Open }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::Protected => "protected",
            Self::Open => "not protected",
        })
    }
}

/// What a fact is about. The number is measured: append, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// SMRAMC: D_LCK set and D_OPEN clear.
    SmramLock = 1,
    /// ESMRAMC under D_LCK: TSEG is enabled. The second register is its size in MiB, 0 when not known.
    Tseg = 2,
    /// SMI_EN: firmware has SMIs on (GBL_SMI_EN). The register says which sources raise them.
    SmiEnable = 3,
    /// GEN_PMCON_1: SMI_LOCK is set, so GBL_SMI_EN stays.
    SmiLock = 4,
    /// BIOS_CNTL: only SMM can write the flash (SMM_BWP and BLE set, BIOSWE clear).
    FlashLock = 5,
    /// AMD, HWCR: SmmLock is set.
    SmmLock = 6,
    /// AMD, SMM_ADDR and SMM_MASK: TSEG is protected by the CPU, and the registers are locked.
    AmdTseg = 7,
    /// SMRR base and mask: the range is valid.
    Smrr = 8,
    /// IA32_SMM_MONITOR_CTL: an SMI transfer monitor is there.
    Stm = 9,
    /// The ACPI table WSMT, all of its flags set: firmware's claim that its SMI handlers check what they are given.
    Wsmt = 10,
    /// SMIs make the CPU leave the guest, so the MLE sees them come.
    SmiIntercept = 11,
}

impl Kind {
    /// Title, and what its two registers are called.
    const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::SmramLock => ("SMRAM lock", "SMRAMC", ""),
            Self::Tseg => ("TSEG", "ESMRAMC", "MiB"),
            Self::SmiEnable => ("SMI enables", "SMI_EN", ""),
            Self::SmiLock => ("SMI lock", "GEN_PMCON_1", ""),
            Self::FlashLock => ("flash lock", "BIOS_CNTL", ""),
            Self::SmmLock => ("SmmLock", "HWCR", ""),
            Self::AmdTseg => ("TSEG (CPU)", "SMM_ADDR", "SMM_MASK"),
            Self::Smrr => ("SMRR", "base", "mask"),
            Self::Stm => ("transfer monitor", "SMM_MONITOR_CTL", ""),
            Self::Wsmt => ("WSMT claim", "flags", ""),
            Self::SmiIntercept => ("SMI intercept", "", ""),
        }
    }
}

/// One fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What it is about.
    pub kind: Kind,
    /// What it says.
    pub state: State,
    /// The registers it comes from, without bits that change at run time; 0 when they were not read.
    pub raw: [u64; 2],
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (title, first, second) = self.kind.names();
        write!(f, "SMM {title}: ")?;
        match (self.kind, self.state) {
            (Kind::SmiIntercept, State::Protected) => f.write_str("in force"),
            (Kind::SmiIntercept, State::Open) => f.write_str("not in force, SMIs run in guest context"),
            (_, State::Unknown) => self.state.fmt(f),
            (_, state) => {
                write!(f, "{state}, {first} {:#x}", self.raw[0])?;
                match second {
                    "" => Ok(()),
                    "MiB" => write!(f, ", {} MiB", self.raw[1]),
                    name => write!(f, ", {name} {:#x}", self.raw[1]),
                }
            }
        }
    }
}

/// Who made the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    /// AMD, or Hygon, whose registers are AMD's.
    Amd,
    Intel,
    Other,
}

/// What CPUID says about which registers exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    vendor: Vendor,
    mtrr: bool,
    vmx: bool,
    counts_smis: bool,
}

impl Cpu {
    /// Asks CPUID: leaf and subleaf to EAX, EBX, ECX, EDX.
    pub fn identify(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let name = |[_, b, c, d]: [u32; 4], order: [usize; 3]| {
            let words = [b, c, d].map(u32::to_le_bytes);
            order.map(|i| words.get(i).copied().unwrap_or_default())
        };
        let vendor = match name(cpuid(0, 0), [0, 2, 1]).as_flattened() {
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            b"GenuineIntel" => Vendor::Intel,
            _ => Vendor::Other,
        };
        let [version, _, c, d] = cpuid(1, 0);
        let family = version >> 8 & 0xf;
        let [last_extended, ..] = cpuid(0x8000_0000, 0);
        let steady_tsc = last_extended >= 0x8000_0007 && cpuid(0x8000_0007, 0)[3] & 1 << 8 != 0;
        // The counter came with Nehalem; no CPUID bit tells of it, but the constant TSC came along.
        let nehalem = vendor == Vendor::Intel && family >= 6 && steady_tsc;
        // QEMU's own CPU counts SMIs whatever model it plays.
        let emulated =
            c & 1 << 31 != 0 && name(cpuid(0x4000_0000, 0), [0, 1, 2]).as_flattened() == b"TCGTCGTCGTCG";
        Self { vendor, mtrr: d & 1 << 12 != 0, vmx: c & 1 << 5 != 0, counts_smis: nehalem || emulated }
    }
}

const MSR_SMI_COUNT: u32 = 0x34;
const MSR_SMM_MONITOR_CTL: u32 = 0x9b;
const MSR_MTRRCAP: u32 = 0xfe;
const MSR_SMRR_BASE: u32 = 0x1f2;
const MSR_SMRR_MASK: u32 = 0x1f3;
const MSR_VMX_BASIC: u32 = 0x480;
const MSR_HWCR: u32 = 0xc001_0015;
const MSR_SMM_ADDR: u32 = 0xc001_0112;
const MSR_SMM_MASK: u32 = 0xc001_0113;

impl Cpu {
    /// Whether it counts the SMIs that it takes.
    pub fn counts_smis(&self) -> bool {
        self.counts_smis
    }
}

/// How many SMIs this CPU has taken since reset; `None` where it does not count them. Two readings tell whether
/// SMM ran in between. Not measured: it differs from boot to boot.
pub fn smi_count(cpu: &Cpu, msr: &impl Msr) -> Option<u32> {
    cpu.counts_smis.then(|| msr.rdmsr(MSR_SMI_COUNT) as u32)
}

/// The host bridge of the Q35 chipset.
const Q35_HOST: u32 = 0x29c0_8086;
/// The LPC bridge of its ICH9.
const ICH9_LPC: u32 = 0x2918_8086;
/// Bus 0, device 0, function 0.
const HOST_BRIDGE: u16 = 0;
/// Bus 0, device 31, function 0.
const LPC_BRIDGE: u16 = 31 << 3;

/// All facts of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    list: Vec<Fact, MAX>,
    cpu_facts: usize,
}

impl Facts {
    /// Reads them. `pci` gives the aligned doubleword of PCI configuration space, segment 0, that holds a byte:
    /// function (bus in bits 15:8, device in 7:3, function in 2:0) and offset. `wsmt` is a copy of that ACPI table.
    pub fn read(
        cpu: &Cpu,
        msr: &impl Msr,
        ports: &impl PortIo,
        pci: impl Fn(u16, u8) -> u32,
        wsmt: Option<&[u8]>,
    ) -> Self {
        let mut list = Vec::new();
        let mut add = |kind, state, raw| {
            let _ = list.push(Fact { kind, state, raw }); // MAX counts the kinds, and each comes once
        };
        cpu_facts(cpu, msr, &mut add);
        host_bridge(&pci, &mut add);
        lpc_bridge(ports, &pci, &mut add);
        match wsmt.map(wsmt_flags) {
            Some(None) => add(Kind::Wsmt, State::Unknown, [0; 2]),
            Some(Some(flags)) => add(Kind::Wsmt, State::of(flags & 7 == 7), [flags.into(), 0]),
            None => add(Kind::Wsmt, State::Open, [0; 2]),
        }
        let cpu_facts = list.iter().position(|f| f.kind == Kind::SmramLock).unwrap_or(0);
        Self { list, cpu_facts }
    }

    /// All of them, in a fixed order.
    pub fn all(&self) -> &[Fact] {
        &self.list
    }

    /// What is known about `kind`; unknown where there is no such fact.
    pub fn state(&self, kind: Kind) -> State {
        self.list.iter().find(|f| f.kind == kind).map_or(State::Unknown, |f| f.state)
    }

    /// The first fact that this CPU tells otherwise: firmware must lock each CPU.
    pub fn contradiction(&self, cpu: &Cpu, msr: &impl Msr) -> Option<Fact> {
        let mut seen = self.list.iter().take(self.cpu_facts);
        let mut other = None;
        cpu_facts(cpu, msr, &mut |kind, state, raw| {
            let fact = Fact { kind, state, raw };
            if other.is_none() && seen.next() != Some(&fact) {
                other = Some(fact);
            }
        });
        other
    }

    /// The form that is measured: a version byte, then for each fact its kind, its state, and both registers,
    /// little endian.
    pub fn measured(&self) -> Vec<u8, MEASURED_MAX> {
        let mut out = Vec::from_iter([FORM]);
        for fact in &self.list {
            // MEASURED_MAX has room for all.
            let _ = out.extend_from_slice(&[fact.kind as u8, fact.state as u8]);
            for raw in fact.raw {
                let _ = out.extend_from_slice(&raw.to_le_bytes());
            }
        }
        out
    }
}

impl fmt::Display for Facts {
    /// One line each, with its end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.list.iter().try_for_each(|fact| writeln!(f, "{fact}"))
    }
}

fn cpu_facts(cpu: &Cpu, msr: &impl Msr, add: &mut impl FnMut(Kind, State, [u64; 2])) {
    const SMRR_PRESENT: u64 = 1 << 11;
    const SMRR_VALID: u64 = 1 << 11;
    let intercept = match cpu.vendor {
        Vendor::Amd => amd_facts(msr, add),
        // Without a transfer monitor there is no exit for an SMI.
        Vendor::Intel => State::Open,
        Vendor::Other => State::Unknown,
    };
    add(Kind::SmiIntercept, intercept, [0; 2]);
    if cpu.mtrr && msr.rdmsr(MSR_MTRRCAP) & SMRR_PRESENT != 0 {
        let (base, mask) = (msr.rdmsr(MSR_SMRR_BASE), msr.rdmsr(MSR_SMRR_MASK));
        add(Kind::Smrr, State::of(mask & SMRR_VALID != 0), [base, mask]);
    } else if cpu.vendor == Vendor::Intel {
        add(Kind::Smrr, State::Open, [0; 2]);
    }
    if cpu.vendor == Vendor::Intel && cpu.vmx {
        const DUAL_MONITOR: u64 = 1 << 49;
        let present = msr.rdmsr(MSR_VMX_BASIC) & DUAL_MONITOR != 0;
        let control = if present { msr.rdmsr(MSR_SMM_MONITOR_CTL) } else { 0 };
        add(Kind::Stm, State::of(control & 1 != 0), [control, 0]);
    }
}

/// Adds AMD's facts and says whether SMIs can be intercepted.
fn amd_facts(msr: &impl Msr, add: &mut impl FnMut(Kind, State, [u64; 2])) -> State {
    const SMM_LOCK: u64 = 1 << 0;
    const T_VALID: u64 = 1 << 1;
    let hwcr = msr.rdmsr(MSR_HWCR);
    let locked = hwcr & SMM_LOCK != 0;
    let tseg = [msr.rdmsr(MSR_SMM_ADDR), msr.rdmsr(MSR_SMM_MASK)];
    // All of HWCR zero is a register that an emulator does not have: the CPU sets some of its bits itself.
    let known = |protected| if hwcr == 0 { State::Unknown } else { State::of(protected) };
    add(Kind::SmmLock, known(locked), [hwcr & SMM_LOCK, 0]);
    add(Kind::AmdTseg, known(locked && tseg[1] & T_VALID != 0), tseg);
    State::of(!locked)
}

fn host_bridge(pci: &impl Fn(u16, u8) -> u32, add: &mut impl FnMut(Kind, State, [u64; 2])) {
    const D_OPEN_D_LCK: u8 = 0x50;
    const D_LCK: u8 = 0x10;
    const T_EN: u8 = 1;
    if pci(HOST_BRIDGE, 0) != Q35_HOST {
        add(Kind::SmramLock, State::Unknown, [0; 2]);
        add(Kind::Tseg, State::Unknown, [0; 2]);
        return;
    }
    let [_, smramc, esmramc, _] = pci(HOST_BRIDGE, 0x9c).to_le_bytes();
    let size = match esmramc >> 1 & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        // The emulator's own: a register with the size, all ones while it was not asked for.
        _ => Some(pci(HOST_BRIDGE, 0x50) & 0xffff).filter(|s| *s != 0xffff).unwrap_or(0),
    };
    add(Kind::SmramLock, State::of(smramc & D_OPEN_D_LCK == D_LCK), [smramc.into(), 0]);
    let tseg = smramc & D_LCK != 0 && esmramc & T_EN != 0;
    add(Kind::Tseg, State::of(tseg), [esmramc.into(), size.into()]);
}

fn lpc_bridge(
    ports: &impl PortIo,
    pci: &impl Fn(u16, u8) -> u32,
    add: &mut impl FnMut(Kind, State, [u64; 2]),
) {
    const ACPI_ENABLED: u32 = 1 << 7;
    const PMBASE: u32 = 0xff80;
    const SMI_EN: u16 = 0x30;
    const GBL_SMI_EN: u32 = 1 << 0;
    /// EOS, SWSMI_TMR_EN, BIOS_RLS: change at run time.
    const MOVING: u32 = 1 << 1 | 1 << 6 | 1 << 7;
    const SMI_LOCK: u32 = 1 << 4;
    const FLASH_BITS: u32 = 1 << 5 | 1 << 1 | 1 << 0;
    const ONLY_SMM_WRITES: u32 = 1 << 5 | 1 << 1;
    if pci(LPC_BRIDGE, 0) != ICH9_LPC {
        for kind in [Kind::SmiEnable, Kind::SmiLock, Kind::FlashLock] {
            add(kind, State::Unknown, [0; 2]);
        }
        return;
    }
    let base = (pci(LPC_BRIDGE, 0x40) & PMBASE) as u16;
    if pci(LPC_BRIDGE, 0x44) & ACPI_ENABLED != 0 && base != 0 {
        let enables = ports.in32(base | SMI_EN) & !MOVING;
        add(Kind::SmiEnable, State::of(enables & GBL_SMI_EN != 0), [enables.into(), 0]);
    } else {
        add(Kind::SmiEnable, State::Unknown, [0; 2]);
    }
    let lock = pci(LPC_BRIDGE, 0xa0) & SMI_LOCK;
    add(Kind::SmiLock, State::of(lock != 0), [lock.into(), 0]);
    let flash = pci(LPC_BRIDGE, 0xdc) & FLASH_BITS;
    add(Kind::FlashLock, State::of(flash == ONLY_SMM_WRITES), [flash.into(), 0]);
}

/// The flags of a WSMT; `None` when this is none.
fn wsmt_flags(table: &[u8]) -> Option<u32> {
    const FLAGS_AT: usize = 36;
    let length = u32::from_le_bytes(*table.get(4..)?.first_chunk()?);
    let whole = table.get(..usize::try_from(length).ok()?)?;
    whole.starts_with(b"WSMT").then_some(u32::from_le_bytes(*whole.get(FLAGS_AT..)?.first_chunk()?))
}

#[cfg(test)]
mod tests;
