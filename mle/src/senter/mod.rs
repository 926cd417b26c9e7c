//! A launch by SENTER: from the state that SINIT leaves to [`crate::launch`], and the end of such a launch.
//!
//! The CPU has measured SINIT, SINIT the pages of this image; both are trusted, and TXT's registers. The heap's first three tables,
//! the SLRT and all that it names are the loader's word. The order of the steps and what each relies on:
//! `docs/architecture.md`, "Launch by SENTER".

pub mod end;
pub mod heap;
pub mod insn;
pub mod mtrr;
pub mod regs;
pub mod rlp;
pub mod stage;

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use hv::addr::{FOUR_GIB, PhysRange};
use hv::failure::{Record, SenterError, Stage};
use hv::io::{Msr, PhysMem};
use hv::launch::MleHeader;
use zerocopy::{FromZeros, IntoBytes};

use crate::launch::Image;
use crate::metal::{Identity, Msrs, PhysWindow, Ports, TscClock};
use crate::{fatal, slb};
use regs::Registers;
use stage::{Buffers, DMAR_MAX, Found, LOG_MAX, Wake};

/// Details of errors: fields, as `docs/slb-errors.md` has them.
pub(crate) const FIELD_SHAPE: u16 = 1;
pub(crate) const FIELD_VERSION: u16 = 2;
pub(crate) const FIELD_SLRT: u16 = 3;
pub(crate) const FIELD_LAUNCH_PAGE: u16 = 4;
pub(crate) const FIELD_LOG: u16 = 6;
pub(crate) const FIELD_RANGES: u16 = 7;
pub(crate) const FIELD_DMAR: u16 = 8;
pub(crate) const FIELD_WAKEUP: u16 = 9;
pub(crate) const FIELD_TECHNOLOGY: u16 = 10;
pub(crate) const FIELD_IMAGE: u16 = 11;
pub(crate) const FIELD_FLAGS: u16 = 12;
pub(crate) const FIELD_LOG_FORMAT: u16 = 13;

/// SENTER entered, so TXT's registers are ours.
static LAUNCHED: AtomicBool = AtomicBool::new(false);

/// A register that is to be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// How many pairs.
    MtrrCount,
    /// IA32_MTRR_DEF_TYPE.
    MtrrDefault,
    /// IA32_MTRR_PHYSBASEn.
    MtrrBase,
    /// IA32_MTRR_PHYSMASKn.
    MtrrMask,
}

/// Why the launch ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// What was found, and the detail that its text speaks of.
    Checked(SenterError, u16),
    /// A register cannot be restored to this value.
    Saved(Field, u64),
    /// Other processors did not come.
    Missing {
        /// Came.
        have: u32,
        /// By BiosData.
        want: u32,
    },
}

fn fail<T>(error: SenterError, detail: u16) -> Result<T, Error> {
    Err(Error::Checked(error, detail))
}

impl Error {
    /// For the next boot.
    pub fn record(self) -> Record {
        let (error, detail) = match self {
            Self::Checked(error, detail) => (error, detail),
            Self::Saved(_, value) => (SenterError::Saved, value as u16),
            Self::Missing { have, .. } => (SenterError::Missing, have.min(u16::MAX.into()) as u16),
        };
        Record { stage: Stage::Senter, code: error as u16, detail }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checked(error, detail) => write!(f, "{} (detail {detail})", error.text()),
            Self::Saved(field, value) => write!(f, "{field:?} cannot be {value:#x}"),
            Self::Missing { have, want } => write!(f, "{have} of {want} processors joined the MLE"),
        }
    }
}

/// Whether SENTER launched this MLE.
pub fn launched() -> bool {
    LAUNCHED.load(Ordering::Acquire)
}

/// Lets SMIs and NMIs in on this CPU, which SENTER masked; nothing but after SENTER.
pub fn unmask() {
    /// GETSEC\[SMCTRL\].
    const SMCTRL: u32 = 7;
    if launched() {
        // SAFETY: CPL 0, not in a guest; this CPU has its IDT.
        #[expect(unsafe_code, reason = "GETSEC")]
        unsafe {
            insn::getsec(SMCTRL, 0);
        }
        insn::unmask_nmi();
    }
}

static mut DMAR: [u8; DMAR_MAX] = [0; DMAR_MAX];
static mut LOG: [u8; LOG_MAX] = [0; LOG_MAX];

/// Goes on after `senter.s`.
///
/// # Safety
/// Called once, by the image's entry code, on the BSP at CPL 0 with everything masked, in an identity map of 0 to 4 GiB.
#[expect(unsafe_code, reason = "the first Rust code after SENTER")]
pub unsafe fn start(image: Image) -> ! {
    LAUNCHED.store(true, Ordering::Release);
    // SAFETY: the caller's promise: mapped, and nothing of ours is there.
    let registers = unsafe { Registers::of_cpu() };
    // SAFETY: CPL 0 on bare metal.
    let (ports, msrs) = unsafe { (Ports::new(), Msrs::new()) };
    match prepare(&registers, &ports, &msrs, &image) {
        // SAFETY: once, in the caller's place.
        Ok(Found { handoff, txt, .. }) => unsafe { crate::launch::start(&handoff, Some(txt), image) },
        Err(error) => fatal::give_up(error.record(), format_args!("after SENTER: {error}")),
    }
}

#[expect(unsafe_code, reason = "memory as the entry code mapped it")]
fn prepare(
    registers: &Registers<PhysWindow>,
    ports: &Ports,
    msrs: &Msrs,
    image: &Image,
) -> Result<Found, Error> {
    let all = PhysRange::from_last(image.start, image.end.saturating_sub(1))
        .ok_or(Error::Checked(SenterError::Region, 0))?;
    // SAFETY: 0 to 4 GiB are mapped one to one; all objects of ours lie in the image.
    let mem = unsafe { Identity::new(FOUR_GIB, (all.start(), all.len())) };
    let mut header = MleHeader::new_zeroed();
    mem.read(all.start(), header.as_mut_bytes());
    let (dmar, log) = (&raw mut DMAR, &raw mut LOG);
    // SAFETY: this function runs once, and nobody else names the buffers.
    let buffers = unsafe { Buffers { dmar: &mut *dmar, log: &mut *log } };
    let mut found = stage::check(registers, &mem, all, header.region_size.get(), buffers)?;
    // It is ours from here on; so is what a later failure leaves there.
    registers.set_errorcode(0);
    registers.write(regs::ESTS, u64::MAX);

    // SAFETY: reads a counter.
    let ticks = || unsafe { x86::time::rdtsc() };
    found.handoff.tsc_khz = slb::timer::tsc_khz(ports, ticks)
        .map_err(|failure| Error::Checked(SenterError::Timer, failure.detail))?;
    let clock = TscClock { khz: found.handoff.tsc_khz };

    // The others come while memory types are SINIT's, and restore them by themselves; then this CPU does.
    let saved = found.saved.check(msrs, physical_bits())?;
    registers.write(regs::MLE_JOIN, rlp::prepare(&saved));
    if found.others != 0 {
        wake(found.wake, &mem);
        rlp::wait(found.others, &clock)?;
    }
    insn::without_caches(|| saved.write(msrs));
    msrs.wrmsr(mtrr::MISC_ENABLE, saved.misc_enable(msrs.rdmsr(mtrr::MISC_ENABLE)));
    saved.verify(msrs)?;
    Ok(found)
}

fn wake(how: Wake, mem: &impl PhysMem) {
    /// GETSEC\[WAKEUP\].
    const WAKEUP: u32 = 8;
    match how {
        // Below 4 GiB, so it is mapped.
        Wake::Monitor(address) => drop(mem.write(address, &1u32.to_le_bytes())),
        // SAFETY: CPL 0, after SENTER; TXT.MLE.JOIN names a block of ours.
        #[expect(unsafe_code, reason = "GETSEC")]
        Wake::Getsec => unsafe { insn::getsec(WAKEUP, 0) },
    }
}

fn physical_bits() -> u32 {
    let [a, ..] = crate::cpu::native_cpuid(0x8000_0008, 0);
    a & 0xff
}
