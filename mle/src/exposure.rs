//! The exposure log of the running system: records of all CPUs, measured into PCR 22 beside a guest that uses the same TPM.
//!
//! The guest's TPM commands are never broken: while the guest holds locality 0 the MLE waits, and the guest goes on at the
//! instruction that made it wait. That wait has a bound, because a guest with one CPU may need that CPU to give the TPM back.
//! What could not be measured in time is marked as late, in the log and in what is measured.

use core::sync::atomic::{AtomicU64, Ordering};

use firmware::exposure::{Counters, DEFAULT_SIZE, ExposureLog, Record, Urgency};
use hv::io::Clock;
use hv::launch::PCR_EXPOSURE;
use log::warn;
use spin::{Mutex, Once};
use tpm::{Contention, Locality, Tpm};

use crate::metal::{PhysWindow, TscClock};

/// How long the guest waits for its own release of the TPM, in microseconds.
const BOUND_US: u64 = 1_000_000;
/// [`NEXT_LOOK`] when nothing is pending.
const NEVER: u64 = u64::MAX;

static LOG: Mutex<ExposureLog<DEFAULT_SIZE>> = Mutex::new(ExposureLog::new());
static LINK: Once<Mutex<Link>> = Once::new();
/// When pending records are to be measured at the latest, since the MLE's start: what each exit looks at.
static NEXT_LOOK: AtomicU64 = AtomicU64::new(NEVER);
/// The MLE's start by the clock, in microseconds: records count from it.
static START_US: AtomicU64 = AtomicU64::new(0);

/// The way to the TPM.
struct Link {
    tpm: Tpm<PhysWindow, TscClock>,
    /// It has no locality that extends PCR 22: batches are kept, and marked as not measured.
    degraded: bool,
    /// Since when the guest has kept the TPM from us.
    refused_since: Option<u64>,
}

/// What became of the records that were due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// They are in the PCR.
    Measured,
    /// They wait for the TPM longer than the guest does, and are marked so.
    Late,
    /// The guest has the TPM: try again after it ran a little.
    Wait,
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
    LINK.call_once(|| Mutex::new(Link { tpm, degraded, refused_since: None }));
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

/// Whether one more record has room. Nothing that leaves one may begin without.
pub fn has_room() -> bool {
    LOG.lock().has_room()
}

/// Measures what is due. Cheap when nothing is.
pub fn settle(clock: &TscClock) -> Settled {
    if NEXT_LOOK.load(Ordering::Relaxed) > now_us(clock) && has_room() {
        return Settled::Measured;
    }
    flush(clock)
}

/// Measures all that is pending.
pub fn flush(clock: &TscClock) -> Settled {
    let Some(link) = LINK.get() else { return Settled::Late };
    // Another CPU is at it: what it measures may not have our record yet.
    let Some(mut link) = link.try_lock() else { return Settled::Wait };
    link.flush(now_us(clock))
}

/// Extends another PCR than the exposure log's, for the one who reads that PCR alone.
pub fn extend(pcr: u32, data: &[u8]) -> Settled {
    let Some(link) = LINK.get() else { return Settled::Late };
    let Some(mut link) = link.try_lock() else { return Settled::Wait };
    let Link { tpm, degraded: false, .. } = &mut *link else { return Settled::Late };
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

impl Link {
    fn flush(&mut self, now_us: u64) -> Settled {
        let digests = match LOG.lock().seal(now_us) {
            Some(batch) => self.tpm.digests_of(batch),
            None => return Settled::Measured,
        };
        let extended = match self.degraded {
            true => Ok(()),
            false => with_tpm(&mut self.tpm, |tpm| tpm.extend(PCR_EXPOSURE, &digests)),
        };
        let Err(error) = extended else {
            let mut log = LOG.lock();
            // The digests are those of the TPM's banks, and something was sealed: no error is left.
            let _ = log.extended(&digests);
            // What came meanwhile is looked at soon.
            NEXT_LOOK.store(if log.counters().pending == 0 { NEVER } else { 0 }, Ordering::Relaxed);
            self.refused_since = None;
            return Settled::Measured;
        };
        let since = *self.refused_since.get_or_insert(now_us);
        let busy = matches!(error, tpm::Error::LocalityBusy { .. });
        if busy && now_us.saturating_sub(since) < BOUND_US {
            return Settled::Wait;
        }
        warn!("exposure records are late: {error}");
        LOG.lock().mark_late();
        Settled::Late
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
