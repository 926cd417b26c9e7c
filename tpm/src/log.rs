//! The crypto-agile event log: writing, reading, replaying.
//!
//! Spec: \[PFP\] "TCG_PCClientPCREvent Structure", "TCG_EfiSpecIDEvent", "TCG_PCR_EVENT2"; all fields
//! little-endian.

use crate::bank::{Bank, Banks, Digest, Digests, HashAlg, MAX_BANKS, MAX_DIGEST};
use crate::error::Error;
use crate::hash::digest_of;
use crate::reader::Reader;

/// Event type that is logged and never extended.
pub const EV_NO_ACTION: u32 = 3;
/// Event type of data that begins with an identifier of its format and its size.
pub const EV_EVENT_TAG: u32 = 6;

const SIGNATURE: [u8; 16] = *b"Spec ID Event03\0";
/// The PCR, type, SHA-1 digest (of nothing: zeros) of the first record.
const FIRST_RECORD: [u8; 28] = {
    let mut record = [0; 28];
    record[4] = EV_NO_ACTION as u8;
    record
};
/// Platform class 0 (client), version 2.0, errata 0, UINTN of 8 bytes.
const SPEC_VERSION: [u8; 8] = [0, 0, 0, 0, 0, 2, 0, 2];

/// Why a log was refused. Offsets are bytes from the log's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogError {
    /// The log being continued begins with other banks, or is longer than its buffer.
    Resume,
    /// The log ends in the middle of a field.
    Truncated {
        /// The field.
        field: &'static str,
        /// Where its record starts.
        record: usize,
    },
    /// A field has a value that cannot be.
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u32,
        /// Where its record starts.
        record: usize,
    },
    /// The algorithm is not among the log's banks, or this crate cannot compute it.
    NoSuchBank {
        /// The algorithm.
        alg: u16,
    },
}

impl core::fmt::Display for LogError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Resume => write!(f, "event log: cannot be continued, its start is not the expected one"),
            Self::Truncated { field, record } => {
                write!(f, "event log: record at offset {record:#x} ends before its field {field}")
            }
            Self::Field { field, value, record } => {
                write!(f, "event log: record at offset {record:#x}: field {field} has value {value:#x}")
            }
            Self::NoSuchBank { alg } => write!(f, "event log: no bank {alg:#x} that could be computed"),
        }
    }
}

impl core::error::Error for LogError {}

/// Appends bytes to a buffer that it never overruns.
struct Cursor<'a> {
    buffer: &'a mut [u8],
    used: usize,
}

impl Cursor<'_> {
    fn left(&self) -> usize {
        self.buffer.len().saturating_sub(self.used)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let full = full(bytes.len(), self.left());
        let end = self.used.checked_add(bytes.len()).ok_or(full)?;
        self.buffer.get_mut(self.used..end).ok_or(full)?.copy_from_slice(bytes);
        self.used = end;
        Ok(())
    }

    fn put32(&mut self, value: u32) -> Result<(), Error> {
        self.put(&value.to_le_bytes())
    }
}

fn full(need: usize, have: usize) -> Error {
    let cut = |bytes| u32::try_from(bytes).unwrap_or(u32::MAX);
    Error::LogFull { need: cut(need), have: cut(have) }
}

/// Most bytes of [`event_head`]: PCR, type, digest count, digests, event size.
pub const EVENT_HEAD_MAX: usize = 16 + MAX_BANKS * (2 + MAX_DIGEST);

/// See [`event_head`].
pub type EventHead = heapless::Vec<u8, EVENT_HEAD_MAX>;

/// A TCG_PCR_EVENT2 up to its event data, of which there are `event_size` bytes.
pub fn event_head(pcr: u32, event_type: u32, digests: &Digests, event_size: u32) -> EventHead {
    let mut head = EventHead::new();
    // All of it fits: there are no more digests than banks, and no longer ones.
    let mut put = |bytes: &[u8]| drop(head.extend_from_slice(bytes));
    put(&pcr.to_le_bytes());
    put(&event_type.to_le_bytes());
    put(&(digests.as_slice().len() as u32).to_le_bytes());
    for digest in digests.as_slice() {
        put(&digest.alg().0.to_le_bytes());
        put(digest.as_bytes());
    }
    put(&event_size.to_le_bytes());
    head
}

/// Writes a log into the caller's buffer.
pub struct LogWriter<'a> {
    out: Cursor<'a>,
    banks: Banks,
}

impl<'a> LogWriter<'a> {
    /// Begins a log for `banks` in an empty buffer.
    pub fn create(buffer: &'a mut [u8], banks: &Banks) -> Result<Self, Error> {
        let mut log = Self { out: Cursor { buffer, used: 0 }, banks: banks.clone() };
        log.write_spec_id()?;
        Ok(log)
    }

    /// Continues a log for `banks`, of which `used` bytes are written. Neither the records so far nor
    /// `buffer` need to be trusted: only the first record, which says how to read the rest, is checked.
    pub fn resume(buffer: &'a mut [u8], used: usize, banks: &Banks) -> Result<Self, LogError> {
        let written = buffer.get(..used).ok_or(LogError::Resume)?;
        let start = Log::parse(written).map_err(|_| LogError::Resume)?;
        if start.banks() != banks {
            return Err(LogError::Resume);
        }
        Ok(Self { out: Cursor { buffer, used }, banks: banks.clone() })
    }

    /// Bytes written.
    pub fn used(&self) -> usize {
        self.out.used
    }

    /// Whether [`LogWriter::append`] would take the event.
    pub fn check(&self, digests: &Digests, event: &[u8]) -> Result<(), Error> {
        if !digests.are_of(&self.banks) {
            return Err(Error::Digests);
        }
        // PCR, type, digest count, event size; algorithm identifier and digest of each bank.
        let need = self
            .banks
            .iter()
            .map(|bank| usize::from(bank.size).saturating_add(2))
            .fold(16_usize.saturating_add(event.len()), usize::saturating_add);
        let have = self.out.left();
        if need > have || u32::try_from(need).is_err() { Err(full(need, have)) } else { Ok(()) }
    }

    /// Appends a TCG_PCR_EVENT2; on an error the log is as it was.
    pub fn append(
        &mut self,
        pcr: u32,
        event_type: u32,
        digests: &Digests,
        event: &[u8],
    ) -> Result<(), Error> {
        self.check(digests, event)?;
        // `check` bounds the length.
        self.out.put(&event_head(pcr, event_type, digests, event.len() as u32))?;
        self.out.put(event)
    }

    /// Appends an event of a log for other banks: a digest that it does not have is [`Digest::cap`], with which those are
    /// said to extend a PCR who cannot compute the bank's.
    pub fn adopt(&mut self, event: &Event<'_>) -> Result<(), Error> {
        let of = |bank: &Bank| {
            let has = event.digests.get(bank.alg).filter(|digest| digest.bank() == *bank);
            has.copied().unwrap_or_else(|| Digest::cap(*bank))
        };
        let digests = Digests(self.banks.iter().map(of).collect());
        self.append(event.pcr, event.event_type, &digests, event.data)
    }

    fn write_spec_id(&mut self) -> Result<(), Error> {
        let (out, banks) = (&mut self.out, &self.banks);
        let count = banks.len() as u32;
        // Signature, version, count, banks, empty vendor information.
        let size = count.saturating_mul(4).saturating_add(16 + 8 + 4 + 1);
        out.put(&FIRST_RECORD)?;
        out.put32(size)?;
        out.put(&SIGNATURE)?;
        out.put(&SPEC_VERSION)?;
        out.put32(count)?;
        for bank in banks {
            out.put(&bank.alg.0.to_le_bytes())?;
            out.put(&u16::from(bank.size).to_le_bytes())?;
        }
        out.put(&[0])
    }
}

/// One TCG_PCR_EVENT2.
#[derive(Clone, Debug)]
pub struct Event<'a> {
    /// Offset of the record in the log.
    pub offset: usize,
    /// The PCR.
    pub pcr: u32,
    /// The type; [`EV_NO_ACTION`] is not extended.
    pub event_type: u32,
    /// One digest per bank, in the record's order.
    pub digests: Digests,
    /// The event's data.
    pub data: &'a [u8],
}

/// A log to read. Only its first record has been checked.
#[derive(Clone)]
pub struct Log<'a> {
    bytes: &'a [u8],
    events_at: usize,
    banks: Banks,
}

impl<'a> Log<'a> {
    /// Checks the first record and learns the banks from it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, LogError> {
        let mut record = Record { reader: Reader(bytes), start: 0 };
        let first = record.get("first record", |r| r.array::<28>())?;
        if first != FIRST_RECORD {
            return Err(record.bad("PCR, type or digest of the first record", 0));
        }
        let size = record.get("eventSize", Reader::le32)?;
        let data = record.get("Spec ID event", |r| r.bytes(usize::try_from(size).ok()?))?;
        let events_at = bytes.len().saturating_sub(record.reader.0.len());
        let mut record = Record { reader: Reader(data), start: 0 };
        if record.get("signature", |r| r.array())? != SIGNATURE {
            return Err(record.bad("signature", 0));
        }
        let _version = record.get("version", |r| r.array::<8>())?;
        let count = record.get("numberOfAlgorithms", Reader::le32)?;
        let mut banks = Banks::new();
        for _ in 0..count {
            let alg = HashAlg(record.get("algorithmId", Reader::le16)?);
            let size = record.get("digestSize", Reader::le16)?;
            let fits = size != 0
                && usize::from(size) <= MAX_DIGEST
                && alg.computed_size().is_none_or(|known| u16::from(known) == size);
            if !fits {
                return Err(record.bad("digestSize", size.into()));
            }
            if banks.iter().any(|bank| bank.alg == alg) {
                return Err(record.bad("algorithmId", alg.0.into()));
            }
            let bank = Bank { alg, size: u8::try_from(size).unwrap_or(u8::MAX) };
            banks.push(bank).map_err(|_| record.bad("numberOfAlgorithms", count))?;
        }
        if banks.is_empty() {
            return Err(record.bad("numberOfAlgorithms", 0));
        }
        let vendor = record.get("vendorInfoSize", Reader::u8)?;
        record.get("vendorInfo", |r| r.bytes(vendor.into()))?;
        Ok(Self { bytes, events_at, banks })
    }

    /// The banks, in the order of the first record.
    pub fn banks(&self) -> &Banks {
        &self.banks
    }

    /// The events; ends at the log's end, where nothing but zeros follows, or after the first error.
    pub fn events(&self) -> impl Iterator<Item = Result<Event<'a>, LogError>> + use<'a, '_> {
        let mut next = Some(self.events_at);
        core::iter::from_fn(move || {
            let at = next.take()?;
            let rest = self.bytes.get(at..).unwrap_or_default();
            if rest.iter().all(|byte| *byte == 0) {
                return None;
            }
            let event = self.event(at, rest);
            if let Ok((_, end)) = &event {
                next = Some(*end);
            }
            Some(event.map(|(event, _)| event))
        })
    }

    /// The event at `offset`, which is where `rest` starts, and where it ends.
    fn event(&self, offset: usize, rest: &'a [u8]) -> Result<(Event<'a>, usize), LogError> {
        let mut record = Record { reader: Reader(rest), start: offset };
        let pcr = record.get("pcrIndex", Reader::le32)?;
        if pcr > 23 {
            return Err(record.bad("pcrIndex", pcr));
        }
        let event_type = record.get("eventType", Reader::le32)?;
        let count = record.get("digest count", Reader::le32)?;
        if usize::try_from(count) != Ok(self.banks.len()) {
            return Err(record.bad("digest count", count));
        }
        let mut digests = Digests::default();
        for _ in 0..count.min(MAX_BANKS as u32) {
            let alg = HashAlg(record.get("hashAlg", Reader::le16)?);
            let bank = self.banks.iter().find(|bank| bank.alg == alg);
            let Some(bank) = bank.filter(|_| digests.get(alg).is_none()) else {
                return Err(record.bad("hashAlg", alg.0.into()));
            };
            let digest = record.get("digest", |r| Digest::new(alg, r.bytes(bank.size.into())?))?;
            digests.0.push(digest).map_err(|_| record.bad("digest count", count))?;
        }
        let size = record.get("eventSize", Reader::le32)?;
        let data = record.get("event", |r| r.bytes(usize::try_from(size).ok()?))?;
        let end = self.bytes.len().saturating_sub(record.reader.0.len());
        Ok((Event { offset, pcr, event_type, digests, data }, end))
    }

    /// The value that `pcr` has in the bank of `alg` if it was zero before the log's first event, as a
    /// dynamic PCR is after the DRTM event. Every record of the log is checked.
    pub fn replay(&self, alg: HashAlg, pcr: u32) -> Result<Digest, LogError> {
        let no_bank = LogError::NoSuchBank { alg: alg.0 };
        let bank = self.banks.iter().find(|bank| bank.alg == alg).ok_or(no_bank)?;
        let mut value = Digest::zero(*bank);
        for event in self.events() {
            let event = event?;
            if event.pcr == pcr && event.event_type != EV_NO_ACTION {
                let digest = event.digests.get(alg).ok_or(no_bank)?;
                value = extended(&value, digest).ok_or(no_bank)?;
            }
        }
        Ok(value)
    }
}

/// What a PCR becomes, in each bank of `pcr`, by an extend with `digests`. A bank whose algorithm this crate cannot
/// compute keeps its value.
pub fn extended_all(pcr: &Digests, digests: &Digests) -> Digests {
    let next = |old: &Digest| digests.get(old.alg()).and_then(|by| extended(old, by)).unwrap_or(*old);
    Digests(pcr.as_slice().iter().map(next).collect())
}

/// What a PCR of value `pcr` becomes by an extend with `digest`; none for an algorithm that this crate
/// cannot compute.
///
/// Spec: \[TPM2\] "Extend of a PCR": H(old value ‖ digest).
pub fn extended(pcr: &Digest, digest: &Digest) -> Option<Digest> {
    digest_of(pcr.alg(), &[pcr.as_bytes(), digest.as_bytes()])
}

/// Reads the fields of one record, and says which one is at fault.
struct Record<'a> {
    reader: Reader<'a>,
    start: usize,
}

impl<'a> Record<'a> {
    fn get<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&mut Reader<'a>) -> Option<T>,
    ) -> Result<T, LogError> {
        read(&mut self.reader).ok_or(LogError::Truncated { field, record: self.start })
    }

    fn bad(&self, field: &'static str, value: u32) -> LogError {
        LogError::Field { field, value, record: self.start }
    }
}

#[cfg(test)]
mod tests;
