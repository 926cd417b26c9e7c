//! Policy `relaunch`: firmware is called between two launches, and the guest goes on behind the second if nothing of it changed.
//!
//! | step | by whom |
//! |---|---|
//! | 1. The state of the CPU goes into the MLE's memory, and a copy of the MLE's memory into the [`Block`] | old MLE, [`leave`] |
//! | 2. Digests of guest memory and of that copy; the TPM notes the root of all of them ([`tpm::Ticket`]); PCRs are capped | |
//! | 3. SVM off, firmware called on the bare machine, SKINIT | the gap |
//! | 4. DMA denied, MLE, policy, configuration and firmware measured, as in any launch | SLB stage and new MLE |
//! | 5. The TPM knows the root, the memory leads to it: the old MLE's memory is copied back | new MLE, [`verify`] |
//! | 6. The old MLE goes on where it left | |
//!
//! Nothing is serialised: what the old MLE knows comes back as the bytes that it was. `docs/adr/0016-relaunch.md`.
//!
//! UNSAFETY: reads the time-stamp counter.
#![expect(unsafe_code, reason = "RDTSC")]

mod digest;
mod edge;
mod leave;
mod state;
mod verify;

use core::fmt;

use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::launch::{LAUNCH_PAGE_SIZE, MLE_REGION_ALIGN, PCR_CODE, PCR_CONFIG, RELAUNCH_MLE, relaunch_size};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

pub use self::edge::{Context, resume_entry, suspend};
pub use self::leave::{Means, Plan, PlanError, Round};
pub use self::state::CpuState;
pub use self::verify::Waiting;
use crate::inputs::InputError;

/// Most ranges of guest RAM.
const RAM_MAX: usize = 128;
/// Most chunks: 128 GiB.
const CHUNKS_MAX: usize = 0x1_0000;

/// The memory that the loader keeps for this policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// All of it.
    pub whole: PhysRange,
    /// The MLE region of the next launch.
    pub fresh: PhysRange,
    /// Where the present MLE region is copied to.
    copy: PhysRange,
    /// What both launches hand over.
    rest: u64,
}

/// Places in [`Block::rest`].
mod at {
    pub const HEADER: u64 = 0;
    pub const ANSWER: u64 = 0x1000;
    pub const SLRT: u64 = 0x2000;
    /// The guest's first page, which no table of ours maps.
    pub const PAGE_0: u64 = 0x3000;
    /// Top of the stack on which firmware is called.
    pub const STACK_TOP: u64 = 0x1_4000;
    pub const LAUNCH_PAGE: u64 = 0x1_c000;
    pub const MAP: u64 = 0x2_0000;
    pub const LOG: u64 = 0x3_0000;
    pub const LOG_SIZE: u64 = 0x1_0000;
    pub const SLB: u64 = 0x4_0000;
    pub const DIGESTS: u64 = 0x20_0000;
}

impl Block {
    /// Divides `whole`, for a region like `region`.
    pub fn new(whole: PhysRange, region: PhysRange) -> Result<Self, InputError> {
        let what = "memory for relaunch";
        let (base, size) = (whole.start(), whole.len());
        let place = InputError::Place { what, base, size };
        let limit = relaunch_size(region.len());
        if size != limit {
            return Err(InputError::Size { what, size, limit });
        }
        let copy = base.saturating_add(region.len());
        let rest = copy.saturating_add(region.len());
        match (PhysRange::new(base, region.len()), PhysRange::new(copy, region.len())) {
            (Some(fresh), Some(copy)) if base.is_multiple_of(MLE_REGION_ALIGN) && whole.last() < FOUR_GIB => {
                Ok(Self { whole, fresh, copy, rest })
            }
            _ => Err(place),
        }
    }

    const fn at(&self, offset: u64) -> u64 {
        self.rest.wrapping_add(offset)
    }

    /// Where the MLE's file is.
    const fn mle_file(&self) -> u64 {
        self.at(RELAUNCH_MLE)
    }

    /// The copy of the launch page, by which the old MLE starts the other CPUs.
    fn launch_page(&self) -> Option<PhysRange> {
        PhysRange::new(self.at(at::LAUNCH_PAGE), LAUNCH_PAGE_SIZE)
    }

    fn log(&self) -> Option<PhysRange> {
        PhysRange::new(self.at(at::LOG), at::LOG_SIZE)
    }
}

/// What is vouched for, beside memory itself.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: u64,
    /// From 1.
    round: u64,
    /// The PCR that counts rounds.
    pcr: u64,
    /// The old MLE region.
    region: u64,
    /// Bytes of code at its start.
    code: u64,
    /// Where it goes on, and with what in RDI.
    entry: u64,
    context: u64,
    /// By what it starts the other CPUs.
    launch_page: u64,
    /// Bytes of its DRTM event log.
    log: u64,
    /// Ranges of guest RAM.
    count: u64,
    /// Their starts and last bytes.
    ram: [[u64; 2]; RAM_MAX],
}

const MAGIC: u64 = u64::from_le_bytes(*b"CORDNRLN");
const _: () = assert!(size_of::<Header>() as u64 <= at::ANSWER);

impl Header {
    fn read(block: &Block, mem: &impl PhysMem) -> Result<Self, Error> {
        let mut header = Self::new_zeroed();
        let address = block.at(at::HEADER);
        if !mem.read(address, header.as_mut_bytes()) {
            return Err(Error::Unreadable { address });
        }
        let field = |field, value| Err(Error::Header { field, value });
        let Self { magic, pcr, region, code, launch_page, log, count, .. } = header;
        let size = block.fresh.len();
        let of_region = |address| PhysRange::new(region, size).is_some_and(|r| r.contains_addr(address));
        match header {
            _ if magic != MAGIC => field("magic", magic),
            _ if u32::try_from(pcr).map_or(true, |pcr| !firmware::config::RELAUNCH_PCR.contains(&pcr)) => {
                field("PCR", pcr)
            }
            _ if !region.is_multiple_of(MLE_REGION_ALIGN) || region >= FOUR_GIB => field("region", region),
            _ if PhysRange::new(region, size).is_none_or(|r| r.overlaps(&block.whole)) => {
                field("region", region)
            }
            _ if code == 0 || code > size || !code.is_multiple_of(PAGE_SIZE) => field("code", code),
            Self { entry, .. } if !of_region(entry) => field("entry", entry),
            _ if !(PAGE_SIZE..0x10_0000).contains(&launch_page) => field("launch page", launch_page),
            _ if log > at::LOG_SIZE => field("log", log),
            _ if count > RAM_MAX as u64 => field("count", count),
            _ => Ok(header),
        }
    }

    /// All memory that has digests.
    fn pieces(&self, block: &Block) -> impl Iterator<Item = PhysRange> + use<> {
        let count = usize::try_from(self.count).unwrap_or(0).min(RAM_MAX);
        let ram = self.ram.into_iter().take(count);
        let ram = ram.filter_map(|[start, last]| PhysRange::from_last(start.max(PAGE_SIZE), last));
        let page_0 = PhysRange::new(block.at(at::PAGE_0), PAGE_SIZE);
        block.log().into_iter().chain(page_0).chain(block.launch_page()).chain([block.copy]).chain(ram)
    }

    /// The PCRs by whose values the TPM knows who spoke.
    fn pcrs(&self) -> [u32; 3] {
        [PCR_CODE, PCR_CONFIG, self.pcr as u32]
    }
}

/// What is not vouched for: the gap's word.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Answer {
    ticket_size: u64,
    ticket: [u8; tpm::MAX_DIGEST],
    /// Firmware's RAX.
    rax: u64,
    /// The new launch's DRTM event log: by the new MLE, after all else was verified.
    log: u64,
    log_size: u64,
    /// When each of [`Step`] ended, by the time-stamp counter.
    times: [u64; Step::COUNT],
}

/// What a round consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Began.
    Start,
    /// The MLE's memory was copied, all digests made.
    Digests,
    /// The TPM vouched, the PCRs were capped.
    Vouched,
    /// Firmware returned.
    Firmware,
    /// The new MLE runs and has measured.
    Launched,
    /// All was verified.
    Verified,
}

impl Step {
    const COUNT: usize = 6;
}

impl Answer {
    fn read(block: &Block, mem: &impl PhysMem) -> Self {
        let mut answer = Self::new_zeroed();
        mem.read(block.at(at::ANSWER), answer.as_mut_bytes());
        answer
    }

    fn write(&self, block: &Block, mem: &impl PhysMem) {
        mem.write(block.at(at::ANSWER), self.as_bytes());
    }

    fn note(&mut self, step: Step, ticks: u64) {
        if let Some(time) = self.times.get_mut(step as usize) {
            *time = ticks;
        }
    }
}

/// How long the steps of a round took, in milliseconds by the time-stamp counter, which goes on through SKINIT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Took([u64; Step::COUNT - 1]);

impl Took {
    fn of(answer: &Answer, khz: u64) -> Self {
        let mut took = Self::default();
        for (step, times) in took.0.iter_mut().zip(answer.times.array_windows()) {
            let [start, end] = times;
            *step = end.saturating_sub(*start).checked_div(khz).unwrap_or(0);
        }
        took
    }
}

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([digests, tpm, firmware, launch, verification]) = self;
        write!(
            f,
            "{digests} ms digests, {tpm} ms TPM, {firmware} ms firmware, {launch} ms launch, {verification} ms verification"
        )
    }
}

fn ticks() -> u64 {
    // SAFETY: RDTSC reads a counter.
    unsafe { x86::time::rdtsc() }
}

/// Why the guest does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Memory that cannot be.
    Unreadable {
        /// Where.
        address: u64,
    },
    /// A field of the hand-over has a value that is not accepted.
    Header {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// More memory than there is room for digests.
    TooMuch,
    /// No launch of this code, configuration and guest left this: the TPM does not know it.
    Unknown,
    /// Memory changed while the guest waited.
    Changed {
        /// Two MiB at most.
        range: PhysRange,
    },
    /// The TPM.
    Tpm(tpm::Error),
    /// The TPM, after it vouched: this launch's PCRs may have ended or not.
    Cap(tpm::Error),
    /// The event log of the old launch.
    Log(tpm::LogError),
    /// Page tables.
    Tables(hv::radix::Error),
}

impl Error {
    /// Whether the launch in which a round began cannot go on either: the TPM may not vouch for it any more.
    pub fn ends_launch(&self) -> bool {
        matches!(self, Self::Cap(_))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("relaunch: ")?;
        match self {
            Self::Unreadable { address } => write!(f, "{address:#x} cannot be read or written"),
            Self::Header { field, value } => write!(f, "hand-over: {field} is {value:#x}"),
            Self::TooMuch => write!(f, "more than {} GiB of guest memory", CHUNKS_MAX >> 9),
            Self::Unknown => {
                f.write_str("the TPM does not know this hand-over as one of the launch that it names")
            }
            Self::Changed { range } => write!(f, "memory changed while the guest waited: {range}"),
            Self::Tpm(e) => write!(f, "{e}"),
            Self::Cap(e) => write!(f, "PCRs could not be capped: {e}"),
            Self::Log(e) => write!(f, "event log of the old launch: {e}"),
            Self::Tables(e) => write!(f, "page tables: {e}"),
        }
    }
}

impl From<tpm::Error> for Error {
    fn from(e: tpm::Error) -> Self {
        Self::Tpm(e)
    }
}

impl From<tpm::LogError> for Error {
    fn from(e: tpm::LogError) -> Self {
        Self::Log(e)
    }
}

impl From<hv::radix::Error> for Error {
    fn from(e: hv::radix::Error) -> Self {
        Self::Tables(e)
    }
}

#[cfg(test)]
mod tests;
