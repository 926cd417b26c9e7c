//! The MLE's measurements: TPM at locality 2, and the event log in the MLE's own memory.

use core::fmt;

use hv::addr::PhysRange;
use hv::launch::{EV_SLAUNCH, PCR_CODE, PCR_CONFIG, PCR_EXPOSURE, PCR_FIRMWARE, POLICY, event};
use sha256::Sha256Blocks;
use tpm::log::EV_NO_ACTION;
use tpm::{Contention, Digests, Event, Locality, Log, LogWriter, Tpm};
use zerocopy::IntoBytes;

use crate::inputs::Inputs;
use crate::logger;
use crate::memory::read_pieces;
use crate::metal::{Identity, PhysWindow, TscClock};

/// The localities that the guest does not get, and the pages' addresses.
pub const TPM_CLOSED: PhysRange =
    match PhysRange::from_last(tpm::BASE + 0x2000, tpm::BASE + tpm::WINDOW_SIZE as u64 - 1) {
        Some(range) => range,
        None => unreachable!(),
    };

/// Why a measurement could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MeasureError {
    /// The TPM refused or failed.
    Tpm(tpm::Error),
    /// The event log could not take the record.
    Log(tpm::LogError),
    /// The memory to measure cannot be read.
    Unreadable(PhysRange),
}

impl fmt::Display for MeasureError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tpm(e) => write!(f, "TPM: {e}"),
            Self::Log(e) => write!(f, "event log: {e}"),
            Self::Unreadable(r) => write!(f, "cannot read {r} to measure it"),
        }
    }
}

impl From<tpm::Error> for MeasureError {
    fn from(e: tpm::Error) -> Self {
        Self::Tpm(e)
    }
}

impl From<tpm::LogError> for MeasureError {
    fn from(e: tpm::LogError) -> Self {
        Self::Log(e)
    }
}

/// Takes measurements.
pub struct Measurer<'a> {
    tpm: Tpm<PhysWindow, TscClock>,
    log: LogWriter<'a>,
    /// The TPM has no locality 2 and the configuration allows that: records are logged, PCRs stay.
    degraded: bool,
}

impl<'a> Measurer<'a> {
    /// Opens the TPM at locality 2 and begins the log in `log`. `sha256` is the CPU's own way of hashing, if it has one.
    pub fn open(
        window: PhysWindow,
        clock: TscClock,
        degraded: bool,
        sha256: Option<Sha256Blocks>,
        log: &'a mut [u8],
    ) -> Result<Self, MeasureError> {
        let locality = if degraded { Locality::Zero } else { Locality::Two };
        let mut tpm = Tpm::open(window, clock, locality, Contention::LAUNCH)?;
        if let Some(blocks) = sha256 {
            tpm.use_sha256(blocks);
        }
        let log = LogWriter::create(log, tpm.banks())?;
        Ok(Self { tpm, log, degraded })
    }

    /// Logs what was extended before us: the CPU's measurement of `slb`, then what the SLB stage let the TPM hash.
    pub fn log_skinit(
        &mut self,
        slb: PhysRange,
        inputs: &Inputs,
        mem: &Identity,
    ) -> Result<(), MeasureError> {
        let digests = self.hash(Some(slb), mem)?;
        self.log.append(PCR_CODE, EV_SLAUNCH, &digests, event::SLB.as_bytes())?;
        let event_type = if self.degraded { EV_NO_ACTION } else { EV_SLAUNCH };
        let own: [(u32, &str, &[u8]); 2] =
            [(PCR_CODE, event::MLE, &inputs.mle_sha256), (PCR_CONFIG, event::POLICY, POLICY.as_bytes())];
        for (pcr, name, data) in own {
            self.log.append(pcr, event_type, &self.tpm.digests_of(data), name.as_bytes())?;
        }
        Ok(())
    }

    /// Logs what SENTER and SINIT extended, as SINIT's log has it, and measures the policy, for which there was nobody yet.
    pub fn log_senter(&mut self, log: &[u8]) -> Result<(), MeasureError> {
        for event in Log::parse(log)?.events() {
            self.log.adopt(&event?)?;
        }
        self.data(PCR_CONFIG, event::POLICY, POLICY.as_bytes())
    }

    /// Measures the bytes of `range`, or nothing at all, into `pcr` under `name`.
    pub fn memory(
        &mut self,
        pcr: u32,
        name: &str,
        range: Option<PhysRange>,
        mem: &Identity,
    ) -> Result<(), MeasureError> {
        let digests = self.hash(range, mem)?;
        self.digests(pcr, name, &digests)
    }

    /// The digests of the bytes of `range`, or of nothing at all.
    fn hash(&self, range: Option<PhysRange>, mem: &Identity) -> Result<Digests, MeasureError> {
        let mut hasher = self.tpm.hasher();
        match range.filter(|range| !read_pieces(mem, range, &mut |piece| hasher.update(piece))) {
            Some(range) => Err(MeasureError::Unreadable(range)),
            None => Ok(hasher.finish()),
        }
    }

    /// Measures `data` into `pcr` under `name`.
    pub fn data(&mut self, pcr: u32, name: &str, data: &[u8]) -> Result<(), MeasureError> {
        let digests = self.tpm.digests_of(data);
        self.digests(pcr, name, &digests)
    }

    /// Measures what an event of another launch's log says.
    pub fn repeat(&mut self, event: &Event<'_>) -> Result<(), MeasureError> {
        let Event { pcr, event_type, digests, data, .. } = event;
        Ok(self.tpm.measure(&mut self.log, *pcr, *event_type, data, digests)?)
    }

    fn digests(&mut self, pcr: u32, name: &str, digests: &Digests) -> Result<(), MeasureError> {
        if self.degraded {
            // Not an event that a replay extends: nor did we.
            return Ok(self.log.append(pcr, EV_NO_ACTION, digests, name.as_bytes())?);
        }
        Ok(self.tpm.measure(&mut self.log, pcr, EV_SLAUNCH, name.as_bytes(), digests)?)
    }

    /// Gives the TPM to the guest. The log's length, and the way to the TPM for what is measured later.
    pub fn finish(mut self) -> (usize, Tpm<PhysWindow, TscClock>) {
        self.tpm.release();
        (self.log.used(), self.tpm)
    }
}

/// Caps the dynamic PCRs of the launch, as well as the TPM lets us: the last act before a reset.
#[expect(unsafe_code, reason = "takes the TPM from whoever had it")]
pub fn cap() {
    // SAFETY: the window is mapped in the SLB's tables and in ours; whoever used it does not come back.
    let window = unsafe { PhysWindow::new(tpm::BASE, tpm::WINDOW_SIZE) };
    if let Ok(mut tpm) = Tpm::open(window, logger::clock(), Locality::Two, Contention::LAUNCH) {
        // A PCR that cannot be capped was capped by whatever made it so; the reset that follows clears all.
        let _ = tpm.cap(&[PCR_CODE, PCR_CONFIG, PCR_FIRMWARE, PCR_EXPOSURE]);
    }
}
