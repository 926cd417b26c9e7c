//! The exposure log of the running system: records of all CPUs, measured into PCR 22 beside a guest that uses the same TPM.
//!
//! The guest's TPM commands are never broken: while the guest holds locality 0 the MLE waits, and the guest goes on at the
//! instruction that made it wait. That wait has a bound, because a guest with one CPU may need that CPU to give the TPM back.
//! What could not be measured in time is marked as late, in the log and in what is measured.
//!
//! A measurement is made in parts, and the guest takes its interrupts in between where an exit comes again by itself: ADR 0018.

pub mod told;

use core::mem::replace;
use core::sync::atomic::{AtomicU64, Ordering};

use firmware::exposure::{Counters, DEFAULT_SIZE, ExposureLog, Record, Urgency};
use hv::io::{Clock, Mmio};
use hv::launch::PCR_EXPOSURE;
use log::warn;
use spin::{Mutex, Once};
use tpm::{BankHasher, Contention, Digests, Extending, Locality, Tpm};

use crate::metal::{PhysWindow, TscClock};

/// How long the guest waits for its own release of the TPM, in microseconds.
const BOUND_US: u64 = 1_000_000;
/// How long after a failure what was late is not tried again: all who wait for it hear of the failure meanwhile.
const LATE_US: u64 = 100_000;
/// Bytes that are hashed in one part: some 30 000 instructions for a bank.
const PART: usize = 512;
/// [`NEXT_LOOK`] when nothing is pending.
const NEVER: u64 = u64::MAX;

static LOG: Mutex<ExposureLog<DEFAULT_SIZE>> = Mutex::new(ExposureLog::new());
static LINK: Once<Mutex<Link<PhysWindow, TscClock>>> = Once::new();
/// When pending records are to be measured at the latest, since the MLE's start: what each exit looks at.
static NEXT_LOOK: AtomicU64 = AtomicU64::new(NEVER);
/// The MLE's start by the clock, in microseconds: records count from it.
static START_US: AtomicU64 = AtomicU64::new(0);

/// The way to the TPM.
struct Link<M, C> {
    tpm: Tpm<M, C>,
    /// It has no locality that extends PCR 22: batches are kept, and marked as not measured.
    degraded: bool,
    /// Since when the guest has kept the TPM from us.
    refused_since: Option<u64>,
    /// So many records are late, and are not tried again before this time.
    late: (u64, u64),
    work: Work,
}

/// How far the measurement of the sealed batch is.
#[expect(clippy::large_enum_variant, reason = "there is one, and no heap")]
enum Work {
    /// No batch is sealed.
    None,
    /// So many of its bytes are hashed.
    Hashing(BankHasher, usize),
    /// These are its digests.
    Hashed(Digests),
    /// The TPM extends these, at locality 2.
    Extending(Digests, Extending),
}

/// What became of the records that were due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// They are in the PCR.
    Measured,
    /// They wait for the TPM longer than the guest does, and are marked so.
    Late,
    /// The guest has the TPM, or another CPU is at it: try again after the guest ran a little.
    Wait,
    /// A part is done: come again for the next. The guest may run meanwhile, and must not see what waits for this.
    Working,
}

/// Marks the MLE's start.
pub fn start_clock(clock: &TscClock) {
    START_US.store(clock.now_us(), Ordering::Relaxed);
}

/// Time since the MLE's start, in microseconds.
pub fn now_us(clock: &TscClock) -> u64 {
    clock.now_us().saturating_sub(START_US.load(Ordering::Relaxed))
}

/// Begins to measure. `tpm` is released; `degraded`: it cannot extend PCR 22, and records are only kept.
pub fn begin(tpm: Tpm<PhysWindow, TscClock>, degraded: bool) -> Result<(), tpm::Error> {
    LOG.lock().begin(tpm.banks(), !degraded)?;
    LINK.call_once(|| Mutex::new(Link::new(tpm, degraded)));
    Ok(())
}

/// Keeps a record.
pub fn record(record: &Record) {
    let mut log = LOG.lock();
    let look = match log.record(record) {
        // Due at once, or because there are so many.
        _ if log.due(record.time_us) => 0,
        Urgency::AtOnce => 0,
        Urgency::Batch { deadline_us } => deadline_us,
    };
    NEXT_LOOK.fetch_min(look, Ordering::Relaxed);
}

/// Whether records wait to be measured.
pub fn any_waits() -> bool {
    LOG.lock().counters().pending != 0
}

/// PCR 22 is that of another launch, the `round`th after the first: its chain begins, see [`ExposureLog::relaunched`].
pub fn relaunched(round: u64, cpu: u32, clock: &TscClock) -> Result<(), tpm::Error> {
    LOG.lock().relaunched(round, cpu, now_us(clock))?;
    NEXT_LOOK.store(0, Ordering::Relaxed);
    Ok(())
}

/// Whether all records of a call have room. Nothing that leaves any may begin without.
pub fn has_room() -> bool {
    LOG.lock().has_room()
}

/// Measures what is due, at an exit that does not come again. Cheap when nothing is.
pub fn settle(clock: &TscClock) {
    if !is_due(clock) {
        return;
    }
    // This CPU need not wait for what another has begun. What it begins it ends: the guest may want the TPM.
    let others = LINK.get().and_then(Mutex::try_lock).is_some_and(|link| link.is_at_work());
    if others {
        flush_on(clock)
    } else {
        flush(clock)
    };
}

/// Does a part of measuring what is due, for a caller that comes again. Cheap when nothing is.
pub fn settle_on(clock: &TscClock) -> Settled {
    if is_due(clock) { flush_on(clock) } else { Settled::Measured }
}

fn is_due(clock: &TscClock) -> bool {
    NEXT_LOOK.load(Ordering::Relaxed) <= now_us(clock) || !has_room()
}

/// Measures all that is pending.
pub fn flush(clock: &TscClock) -> Settled {
    // Not what other CPUs add meanwhile: there may be no end to it.
    let through = counters().records;
    loop {
        match step(clock, through) {
            Settled::Working => clock.relax(),
            settled => return settled,
        }
    }
}

/// The same in parts, of which it does one.
pub fn flush_on(clock: &TscClock) -> Settled {
    step(clock, counters().records)
}

/// Does a part of measuring the first `through` records.
fn step(clock: &TscClock, through: u64) -> Settled {
    let Some(link) = LINK.get() else { return Settled::Late };
    // Another CPU is at it: what it measures may not have our record yet.
    let Some(mut link) = link.try_lock() else { return Settled::Wait };
    let settled = link.step(&LOG, through, now_us(clock));
    let log = LOG.lock();
    match settled {
        // Whoever exits next goes on with it: the guest may want the TPM.
        Settled::Working => NEXT_LOOK.store(0, Ordering::Relaxed),
        // What came meanwhile is looked at soon.
        Settled::Measured => {
            NEXT_LOOK.store(if log.counters().pending == 0 { NEVER } else { 0 }, Ordering::Relaxed);
        }
        Settled::Late | Settled::Wait => {}
    }
    settled
}

/// Extends another PCR than the exposure log's, for the one who reads that PCR alone.
pub fn extend(pcr: u32, data: &[u8]) -> Settled {
    let Some(link) = LINK.get() else { return Settled::Late };
    let Some(mut link) = link.try_lock() else { return Settled::Wait };
    let Link { tpm, degraded: false, work, .. } = &mut *link else { return Settled::Late };
    if matches!(work, Work::Extending(..)) {
        return Settled::Wait;
    }
    let digests = tpm.digests_of(data);
    match with_tpm(tpm, |tpm| tpm.extend(pcr, &digests)) {
        Ok(()) => Settled::Measured,
        Err(tpm::Error::LocalityBusy { .. }) => Settled::Wait,
        Err(_) => Settled::Late,
    }
}

/// Whether PCR 22 is extended at all.
pub fn measures() -> bool {
    LINK.get().is_some_and(|link| !link.lock().degraded)
}

/// Writes the log as the guest reads it.
pub fn write_log(out: &mut [u8]) -> usize {
    LOG.lock().write_to(out, 0)
}

/// What the log holds and lost.
pub fn counters() -> Counters {
    *LOG.lock().counters()
}

impl<M: Mmio, C: Clock> Link<M, C> {
    fn new(tpm: Tpm<M, C>, degraded: bool) -> Self {
        Self { tpm, degraded, refused_since: None, late: (0, 0), work: Work::None }
    }

    /// Does a part of measuring the first `through` records of `log`.
    fn step<const N: usize>(&mut self, log: &Mutex<ExposureLog<N>>, through: u64, now_us: u64) -> Settled {
        let is_through = |log: &ExposureLog<N>| log.counters().settled() >= through;
        if is_through(&log.lock()) {
            return Settled::Measured;
        }
        if matches!(self.work, Work::None) {
            let (late, until_us) = self.late;
            if through <= late && now_us < until_us {
                return Settled::Late;
            }
            let mut log = log.lock();
            if log.make_room() {
                return Settled::Working;
            }
            // Nothing is sealed for a TPM without banks.
            if log.seal(now_us).is_none() {
                return Settled::Measured;
            }
            self.work = Work::Hashing(self.tpm.hasher(), 0);
            return Settled::Working;
        }
        match self.part(log) {
            Ok(false) => return Settled::Working,
            Ok(true) => {
                self.refused_since = None;
                return if is_through(&log.lock()) { Settled::Measured } else { Settled::Working };
            }
            Err(tpm::Error::LocalityBusy { .. }) if self.may_wait(now_us) => return Settled::Wait,
            Err(error) => warn!("exposure records are late: {error}"),
        }
        self.refused_since.get_or_insert(now_us);
        // They are sealed anew, as late ones.
        self.work = Work::None;
        let mut log = log.lock();
        log.mark_late();
        self.late = (log.counters().records, now_us.saturating_add(LATE_US));
        Settled::Late
    }

    /// Whether somebody goes on with a batch when he comes again.
    fn is_at_work(&self) -> bool {
        matches!(self.work, Work::Hashing(..) | Work::Extending(..))
    }

    /// Whether the guest has kept the TPM for less than it may.
    fn may_wait(&mut self, now_us: u64) -> bool {
        now_us.saturating_sub(*self.refused_since.get_or_insert(now_us)) < BOUND_US
    }

    /// Goes on with the sealed batch of `log`; true when it is in the PCR.
    fn part<const N: usize>(&mut self, log: &Mutex<ExposureLog<N>>) -> Result<bool, tpm::Error> {
        if let Work::Hashing(hasher, done) = &mut self.work {
            let log = log.lock();
            let rest = log.sealed().get(*done..).unwrap_or_default();
            let (now, later) = rest.split_at(rest.len().min(PART));
            hasher.update(now);
            *done = done.saturating_add(now.len());
            if later.is_empty() {
                self.work = Work::Hashed(hasher.clone().finish());
            }
            return Ok(false);
        }
        if let (Work::Hashed(digests), false) = (&self.work, self.degraded) {
            self.tpm.acquire(Locality::Two, Contention::SHARED)?;
            let begun = self.tpm.begin_extend(PCR_EXPOSURE, digests);
            if begun.is_err() {
                self.tpm.release();
            }
            self.work = Work::Extending(digests.clone(), begun?);
            return Ok(false);
        }
        if let Work::Extending(_, extending) = &mut self.work {
            let extended = self.tpm.is_extended(extending);
            if extended == Ok(false) {
                return extended;
            }
            self.tpm.release();
            extended?;
        }
        if let Work::Hashed(digests) | Work::Extending(digests, _) = replace(&mut self.work, Work::None) {
            // The digests are those of the TPM's banks, and something was sealed: no error is left.
            let _ = log.lock().extended(&digests);
        }
        Ok(true)
    }
}

/// Takes locality 2, without breaking a command of the guest's, for one thing.
fn with_tpm(
    tpm: &mut Tpm<PhysWindow, TscClock>,
    act: impl FnOnce(&mut Tpm<PhysWindow, TscClock>) -> Result<(), tpm::Error>,
) -> Result<(), tpm::Error> {
    tpm.acquire(Locality::Two, Contention::SHARED)?;
    let done = act(tpm);
    tpm.release();
    done
}

#[cfg(test)]
mod tests;
