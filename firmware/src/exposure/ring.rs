//! The log as the MLE keeps it: batches that are in the PCR, and records that wait to be.

use hv::launch::PCR_EXPOSURE;
use tpm::log::{EV_EVENT_TAG, EV_NO_ACTION, EVENT_HEAD_MAX, event_head};
use tpm::{Banks, Digests, Error, HashAlg, LogWriter, MAX_BANKS};
use zerocopy::IntoBytes;

use super::record::{RECORD_MAX, Record, SMI_RECORD_MAX, Urgency};
use super::{
    ANCHOR_SIGNATURE, AnchorData, BATCH_TAG, BatchHeader, Exposure, FLAG_LATE, PCR_REMARK, PENDING_SIGNATURE,
    VERSION,
};
use crate::call::DATA_MAX;

/// Most records of reads that wait for each other.
pub const BATCH_RECORDS: u32 = 64;
/// Longest time that a read's record waits, in microseconds.
pub const BATCH_DELAY_US: u64 = 1_000_000;
/// Bytes of records that wait. Many more than reads need: those of a TPM that is busy wait here too.
pub const PENDING_SIZE: usize = 12 * 1024;

/// Most SMIs of one call that are on record one by one: so many that are let through, and as many that are refused.
pub const CALL_SMIS: usize = 16;
/// What the records of a call take at most: its SMIs, its own, and that the sandbox died, was made anew, gave a strange result.
const CALL_ROOM: usize = 2 * CALL_SMIS * SMI_RECORD_MAX + 4 * RECORD_MAX;

/// Most batches that are dropped in one part of [`ExposureLog::make_room`]. Each takes a hash in every bank.
const DROPPED_AT_ONCE: usize = 4;

/// Bytes that a log usually has for what was measured: all of it can be read as one variable.
pub const DEFAULT_SIZE: usize = 48 * 1024;
const _: () = assert!(ExposureLog::<DEFAULT_SIZE>::SIZE <= DATA_MAX);

const HEADER: usize = size_of::<BatchHeader>();
/// A record of the Spec ID event with every bank there can be.
const SPEC_ID_MAX: usize = 28 + 4 + 29 + 4 * MAX_BANKS;
const ANCHOR_MAX: usize = EVENT_HEAD_MAX + size_of::<AnchorData>();
/// What a batch of all that may wait takes.
const ENTRY_MAX: usize = EVENT_HEAD_MAX + HEADER + PENDING_SIZE;
const TRAILER_MAX: usize = ENTRY_MAX + PENDING_SIGNATURE.len();

/// How many records and batches there were. All counts are since the launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records made. They are in the log, `spilled`, `lost` or `pending`.
    pub records: u64,
    /// Records that wait for their batch.
    pub pending: u64,
    /// Batches measured.
    pub batches: u64,
    /// Records that were measured and had to leave the log.
    pub spilled: u64,
    /// Batches that had to leave the log.
    pub spilled_batches: u64,
    /// Records that had no room and were not measured.
    pub lost: u64,
    /// Batches that were measured late.
    pub late: u64,
}

impl Counters {
    /// The first so many records wait no more: they are measured or lost.
    pub fn settled(&self) -> u64 {
        self.records.saturating_sub(self.pending)
    }
}

/// The exposure log, of which `N` bytes are for what was measured. Made to be a `static`: it is large, and empty it is all
/// zeros, which take no room in an image.
pub struct ExposureLog<const N: usize = DEFAULT_SIZE> {
    /// Spec ID event, anchor, batches.
    log: [u8; N],
    used: usize,
    /// Where the anchor starts.
    anchor_at: usize,
    /// Where the batches start.
    batches_at: usize,
    banks: Banks,
    /// PCR 22 before the first batch in the log.
    anchor: Digests,
    extends: bool,
    /// Room for a batch header, then records.
    pending: [u8; HEADER + PENDING_SIZE],
    /// Bytes of the records.
    filled: usize,
    sealed: Sealed,
    counters: Counters,
    at_once: bool,
    deadline_us: Option<u64>,
    late: bool,
}

/// The part of the pending records that is being measured: none when there are no records in it.
#[derive(Clone, Copy)]
struct Sealed {
    records: u32,
    bytes: usize,
    late: bool,
}

impl Sealed {
    const NONE: Self = Self { records: 0, bytes: 0, late: false };
}

impl<const N: usize> Default for ExposureLog<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> ExposureLog<N> {
    /// Bytes of the log as it is read, see [`ExposureLog::write_to`].
    pub const SIZE: usize = N + TRAILER_MAX;

    /// An empty log, which takes records. Nothing can be sealed before [`ExposureLog::begin`].
    pub const fn new() -> Self {
        const { assert!(N >= SPEC_ID_MAX + ANCHOR_MAX + ENTRY_MAX, "no room for a batch") }
        Self {
            log: [0; N],
            used: 0,
            anchor_at: 0,
            batches_at: 0,
            banks: Banks::new(),
            anchor: Digests::new(),
            extends: false,
            pending: [0; HEADER + PENDING_SIZE],
            filled: 0,
            sealed: Sealed::NONE,
            counters: ZERO,
            at_once: false,
            deadline_us: None,
            late: false,
        }
    }

    /// Begins to measure, into PCR 22 of `banks`, which has to be zero. Without `extends` the TPM has no locality for it:
    /// batches are then logged as events that no replay extends.
    pub fn begin(&mut self, banks: &Banks, extends: bool) -> Result<(), Error> {
        self.banks = banks.clone();
        self.anchor = Digests::zero(banks);
        self.extends = extends;
        self.anchor_at = LogWriter::create(&mut self.log, banks)?.used();
        self.batches_at = self.write_anchor()?;
        self.used = self.batches_at;
        Ok(())
    }

    /// Adds a record, and says when it has to be in the PCR.
    pub fn record(&mut self, record: &Record) -> Urgency {
        let room = self.pending.get_mut(HEADER.saturating_add(self.filled)..).unwrap_or_default();
        let size = record.encode(self.counters.records, room);
        bump(&mut self.counters.records, 1);
        let urgency = record.urgency();
        let Some(size) = size else {
            bump(&mut self.counters.lost, 1);
            return Urgency::AtOnce;
        };
        self.filled = self.filled.saturating_add(size);
        bump(&mut self.counters.pending, 1);
        match urgency {
            Urgency::AtOnce => self.at_once = true,
            Urgency::Batch { deadline_us } => {
                self.deadline_us = Some(self.deadline_us.map_or(deadline_us, |d| d.min(deadline_us)));
            }
        }
        urgency
    }

    /// The MLE was launched again, for the `round`th time: PCR 22 is zero, and a new chain begins, with a record that binds it to
    /// the old one.
    ///
    /// # Errors
    /// [`Error::Digests`] when records are pending, with which the chain would begin, or there is no SHA-256 bank to bind it by.
    pub fn relaunched(&mut self, round: u64, cpu: u32, time_us: u64) -> Result<Urgency, Error> {
        let log = self.log.get(..self.used).unwrap_or_default();
        let value = Exposure::parse(log).and_then(|log| log.replay()).unwrap_or_default();
        let before = value.get(HashAlg::SHA256).and_then(|value| value.as_bytes().try_into().ok());
        match before.filter(|_| self.counters.pending == 0) {
            Some(before) => Ok(self.record(&Record::relaunched(round, before, cpu, time_us))),
            None => Err(Error::Digests),
        }
    }

    /// Whether all records of a call will have room. Without it nothing should be done that leaves a record: a call is better
    /// refused than lost.
    pub fn has_room(&self) -> bool {
        PENDING_SIZE.saturating_sub(self.filled) >= CALL_ROOM
    }

    /// Whether what is pending has to be measured now.
    pub fn due(&self, now_us: u64) -> bool {
        self.at_once
            || !self.has_room()
            || self.counters.pending >= BATCH_RECORDS.into()
            || self.deadline_us.is_some_and(|deadline| now_us >= deadline)
    }

    /// Says that what is pending was due and could not be measured: the guest got a result before, or time ran out.
    pub fn mark_late(&mut self) {
        self.late = self.counters.pending != 0;
    }

    /// Closes the pending records to a batch: the bytes of which the digests go into PCR 22, and then to
    /// [`ExposureLog::extended`]. `None` when nothing is pending. Called again it makes a new batch of the same
    /// records and those that came since.
    pub fn seal(&mut self, now_us: u64) -> Option<&[u8]> {
        let records =
            u32::try_from(self.counters.pending).ok().filter(|n| *n != 0 && !self.banks.is_empty())?;
        while self.make_room() {}
        let header = self.header(now_us);
        self.sealed = Sealed { records, bytes: self.filled, late: self.late };
        // The buffer begins with room for it.
        let _ = header.write_to_prefix(&mut self.pending);
        Some(self.sealed())
    }

    /// The bytes of the batch that was sealed last and is not in the PCR. Records that come meanwhile change nothing of it.
    pub fn sealed(&self) -> &[u8] {
        self.pending.get(..HEADER.saturating_add(self.sealed.bytes)).unwrap_or_default()
    }

    /// The sealed batch is in the PCR with these digests: it goes into the log, and its records wait no more.
    ///
    /// # Errors
    /// [`Error::Digests`] when nothing is sealed or the digests are not those of the active banks; nothing changes then.
    pub fn extended(&mut self, digests: &Digests) -> Result<(), Error> {
        let sealed = self.sealed;
        if sealed.records == 0 || !digests.are_of(&self.banks) {
            return Err(Error::Digests);
        }
        let end = HEADER.saturating_add(sealed.bytes);
        let batch = self.pending.get(..end).unwrap_or_default();
        let event_type = self.event_type();
        // As it was made by us, its start is the expected one.
        let resumed = LogWriter::resume(&mut self.log, self.used, &self.banks);
        let mut writer = resumed.map_err(|_| Error::Digests)?;
        writer.append(PCR_EXPOSURE, event_type, digests, batch)?;
        self.used = writer.used();
        self.sealed = Sealed::NONE;
        bump(&mut self.counters.batches, 1);
        bump(&mut self.counters.late, sealed.late.into());
        self.counters.pending = self.counters.pending.saturating_sub(sealed.records.into());
        self.pending.copy_within(end..HEADER.saturating_add(self.filled), HEADER);
        self.filled = self.filled.saturating_sub(sealed.bytes);
        // Records that came while the TPM was at work do not wait any longer.
        self.at_once = self.counters.pending != 0;
        self.deadline_us = None;
        // What was said of the batch may have been meant for them too: rather one late batch too many.
        self.late &= self.at_once;
        Ok(())
    }

    /// How many records and batches there were.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Writes the log's bytes from `offset` on and gives how many: as many as `out` takes of [`ExposureLog::SIZE`]. The log
    /// is followed by zeros: its size is always the same, so that a reader who asks for the size first does not race with
    /// new records.
    pub fn write_to(&self, out: &mut [u8], offset: usize) -> usize {
        let length = Self::SIZE.saturating_sub(offset).min(out.len());
        let out = out.get_mut(..length).unwrap_or_default();
        out.fill(0);
        let header = self.header(0);
        let records = self.queue();
        let size = PENDING_SIGNATURE.len().saturating_add(HEADER).saturating_add(records.len());
        let head = event_head(PCR_REMARK, EV_NO_ACTION, &Digests::zero(&self.banks), size as u32);
        let log = self.log.get(..self.used).unwrap_or_default();
        let trailer: [&[u8]; 4] = [&head, &PENDING_SIGNATURE, header.as_bytes(), records];
        let shown = if records.is_empty() || log.is_empty() { 0 } else { trailer.len() };
        let (mut skip, mut at) = (offset, 0_usize);
        for piece in [log].into_iter().chain(trailer.into_iter().take(shown)) {
            let wanted = piece.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(piece.len());
            let room = out.get_mut(at..).unwrap_or_default();
            let fitting = wanted.len().min(room.len());
            for (to, from) in room.iter_mut().zip(wanted) {
                *to = *from;
            }
            at = at.saturating_add(fitting);
        }
        length
    }

    fn event_type(&self) -> u32 {
        if self.extends { EV_EVENT_TAG } else { EV_NO_ACTION }
    }

    /// The pending records.
    fn queue(&self) -> &[u8] {
        self.pending.get(HEADER..HEADER.saturating_add(self.filled)).unwrap_or_default()
    }

    /// The header of a batch of all that is pending.
    fn header(&self, sealed_us: u64) -> BatchHeader {
        let records = self.queue();
        let first = Record::parse(records).map_or(self.counters.records, |(sequence, ..)| sequence);
        let size = HEADER.saturating_sub(8).saturating_add(records.len());
        BatchHeader {
            tag: BATCH_TAG.into(),
            size: (size as u32).into(),
            version: VERSION.into(),
            flags: if self.late { FLAG_LATE } else { 0 }.into(),
            count: (self.counters.pending as u32).into(),
            number: self.counters.batches.into(),
            first: first.into(),
            sealed_us: sealed_us.into(),
            spilled: self.counters.spilled.into(),
            lost: self.counters.lost.into(),
            late: self.counters.late.saturating_add(self.late.into()).into(),
        }
    }

    /// Drops some of the oldest batches if what is pending would have no room; true while that is not enough. [`ExposureLog::seal`] does
    /// what is left of it at once.
    pub fn make_room(&mut self) -> bool {
        let head = event_head(PCR_EXPOSURE, self.event_type(), &Digests::zero(&self.banks), 0);
        let need = head.len().saturating_add(HEADER).saturating_add(self.filled);
        let over = self.used.saturating_add(need).saturating_sub(N);
        if over == 0 {
            return false;
        }
        let from = self.fold_oldest(over);
        let dropped = from.saturating_sub(self.batches_at);
        self.log.copy_within(from..self.used, self.batches_at);
        self.used = self.used.saturating_sub(dropped);
        // It has been written before, with the same size.
        let _ = self.write_anchor();
        dropped != 0 && dropped < over
    }

    /// Takes the oldest batches, of `bytes` together or somewhat more, but not more than [`DROPPED_AT_ONCE`], into anchor and counters;
    /// where the next starts.
    fn fold_oldest(&mut self, bytes: usize) -> usize {
        let Self { log, used, counters, batches_at, .. } = self;
        let mut from = *batches_at;
        let Ok(log) = Exposure::parse(log.get(..*used).unwrap_or_default()) else { return from };
        let mut chain = log.chain();
        // The end of a batch is the start of the next one, or of nothing.
        let mut entries = log.entries().map_while(Result::ok).peekable();
        for _ in 0..DROPPED_AT_ONCE {
            let Some(entry) = entries.next_if(|_| from.saturating_sub(*batches_at) < bytes) else { break };
            // Chains are linked as we linked them.
            let _ = chain.follow(&entry);
            bump(&mut counters.spilled, entry.batch.header.count.get().into());
            bump(&mut counters.spilled_batches, 1);
            from = entries.peek().map_or(*used, |next| next.event.offset);
        }
        drop(entries);
        self.anchor = chain.values;
        from
    }

    /// Writes the anchor and gives where it ends.
    fn write_anchor(&mut self) -> Result<usize, Error> {
        let data = AnchorData {
            signature: ANCHOR_SIGNATURE,
            version: VERSION.into(),
            reserved: 0.into(),
            batches: self.counters.spilled_batches.into(),
            records: self.counters.spilled.into(),
        };
        let resumed = LogWriter::resume(&mut self.log, self.anchor_at, &self.banks);
        let mut writer = resumed.map_err(|_| Error::Digests)?;
        writer.append(PCR_REMARK, EV_NO_ACTION, &self.anchor, data.as_bytes())?;
        Ok(writer.used())
    }
}

const ZERO: Counters =
    Counters { records: 0, pending: 0, batches: 0, spilled: 0, spilled_batches: 0, lost: 0, late: 0 };

fn bump(counter: &mut u64, by: u64) {
    *counter = counter.saturating_add(by);
}
