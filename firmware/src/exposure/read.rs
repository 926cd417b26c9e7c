//! Reading an exposure log. Its bytes may be anyone's.

use core::fmt;

use tpm::log::{EV_EVENT_TAG, EV_NO_ACTION};
use tpm::{Banks, Digest, Digests, Event, HashAlg, Log, LogError, digest_of};
use zerocopy::Ref;

use super::record::Record;
use super::{ANCHOR_SIGNATURE, AnchorData, BATCH_TAG, BatchHeader, PCR_REMARK, PENDING_SIGNATURE, VERSION};
use hv::launch::PCR_EXPOSURE;

/// PCR and type of anchor and pending records.
const REMARK: (u32, u32) = (PCR_REMARK, EV_NO_ACTION);
/// Fewest bytes of a record.
const RECORD_MIN: u64 = 46;

/// Why a log was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatError {
    /// It is no event log.
    Log(LogError),
    /// Something ends before its field.
    Truncated {
        /// The field.
        field: &'static str,
        /// Bytes of the field.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// A field has a value that cannot be.
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The highest that it can have, or the only one.
        limit: u64,
    },
    /// The first event is not an anchor.
    NoAnchor,
    /// An event that is no measurement does not hold pending records.
    Signature,
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("exposure log: ")?;
        match *self {
            Self::Log(error) => write!(f, "{error}"),
            Self::Truncated { field, need, have } => {
                write!(f, "{field} needs {need} bytes, there are {have}")
            }
            Self::Field { field, value, limit } => {
                write!(f, "{field} is {value:#x}, limit {limit:#x}")
            }
            Self::NoAnchor => f.write_str("the first event is no anchor"),
            Self::Signature => f.write_str("an event that is not extended holds no pending records"),
        }
    }
}

impl core::error::Error for FormatError {}

impl From<LogError> for FormatError {
    fn from(error: LogError) -> Self {
        Self::Log(error)
    }
}

/// Some records, in the order in which they were made.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// What is said about them.
    pub header: BatchHeader,
    records: &'a [u8],
}

impl<'a> Batch<'a> {
    /// The batch that is the whole of `bytes`. Its records have not been looked at.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let (need, have) = (size_of::<BatchHeader>(), bytes.len());
        let short = FormatError::Truncated { field: "batch", need, have };
        let (header, records) = Ref::<_, BatchHeader>::from_prefix(bytes).map_err(|_| short)?;
        let header = *header;
        let same = |field, value: u64, limit| {
            if value == limit { Ok(()) } else { Err(FormatError::Field { field, value, limit }) }
        };
        same("batch.tag", header.tag.get().into(), BATCH_TAG.into())?;
        same("batch.size", header.size.get().into(), have.saturating_sub(8) as u64)?;
        same("batch.version", header.version.get().into(), VERSION.into())?;
        let most = u64::try_from(records.len()).unwrap_or(u64::MAX) / RECORD_MIN;
        let count = u64::from(header.count.get());
        if count > most {
            return Err(FormatError::Field { field: "batch.count", value: count, limit: most });
        }
        Ok(Self { header, records })
    }

    /// The records with their sequence numbers; ends after the first error.
    pub fn records(&self) -> impl Iterator<Item = Result<(u64, Record), FormatError>> + use<'a> {
        let mut rest = self.records;
        let mut left = self.header.count.get();
        core::iter::from_fn(move || {
            let Some(next) = left.checked_sub(1) else {
                let beyond = core::mem::take(&mut rest).len();
                let error = FormatError::Field {
                    field: "bytes after a batch's records",
                    value: beyond as u64,
                    limit: 0,
                };
                return (beyond != 0).then_some(Err(error));
            };
            left = next;
            let parsed = Record::parse(rest);
            match parsed {
                Ok((sequence, record, after)) => {
                    rest = after;
                    Some(Ok((sequence, record)))
                }
                Err(error) => {
                    (left, rest) = (0, &[]);
                    Some(Err(error))
                }
            }
        })
    }
}

/// Records after the log's anchor, and the event that they are the data of.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// The event.
    pub event: Event<'a>,
    /// The records.
    pub batch: Batch<'a>,
    /// They are not in the PCR yet. An [`EV_NO_ACTION`] that is not pending was measured as far as a TPM without a locality
    /// for PCR 22 allows: not at all.
    pub pending: bool,
}

impl<'a> Entry<'a> {
    fn parse(event: Event<'a>) -> Result<Self, FormatError> {
        if (event.pcr, event.event_type) == REMARK {
            let records = event.data.strip_prefix(&PENDING_SIGNATURE).ok_or(FormatError::Signature)?;
            return Ok(Self { batch: Batch::parse(records)?, event, pending: true });
        }
        if event.pcr != PCR_EXPOSURE {
            let (value, limit) = (event.pcr.into(), PCR_EXPOSURE.into());
            return Err(FormatError::Field { field: "pcrIndex", value, limit });
        }
        if !matches!(event.event_type, EV_EVENT_TAG | EV_NO_ACTION) {
            let (value, limit) = (event.event_type.into(), EV_EVENT_TAG.into());
            return Err(FormatError::Field { field: "eventType", value, limit });
        }
        Ok(Self { batch: Batch::parse(event.data)?, event, pending: false })
    }

    /// The first bank in which the batch's digest is not that of its bytes: what such a batch says is not what was
    /// measured. Banks whose algorithm cannot be computed are not looked at.
    pub fn false_digest(&self) -> Option<HashAlg> {
        let data = self.event.data;
        let differs = |d: &&Digest| digest_of(d.alg(), &[data]).is_some_and(|real| real != **d);
        let digests = if self.pending { &[] } else { self.event.digests.as_slice() };
        digests.iter().find(differs).map(Digest::alg)
    }
}

/// An exposure log to read.
pub struct Exposure<'a> {
    log: Log<'a>,
    anchor: AnchorData,
    start: Digests,
}

impl<'a> Exposure<'a> {
    /// Checks the first record and the anchor. Zeros after the log's end are no part of it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let log = Log::parse(bytes)?;
        let event = log.events().next().ok_or(FormatError::NoAnchor)??;
        let anchor = Ref::<_, AnchorData>::from_bytes(event.data).map_err(|_| FormatError::NoAnchor)?;
        if anchor.signature != ANCHOR_SIGNATURE || (event.pcr, event.event_type) != REMARK {
            return Err(FormatError::NoAnchor);
        }
        let (value, limit) = (anchor.version.get().into(), VERSION.into());
        if value != limit {
            return Err(FormatError::Field { field: "anchor.version", value, limit });
        }
        let (anchor, start) = (*anchor, event.digests);
        Ok(Self { log, anchor, start })
    }

    /// The banks that were extended.
    pub fn banks(&self) -> &Banks {
        self.log.banks()
    }

    /// What was dropped.
    pub fn anchor(&self) -> &AnchorData {
        &self.anchor
    }

    /// The value of PCR 22 after what was dropped, as the log says. A wrong value does not lead to the PCR's value.
    pub fn start(&self) -> &Digests {
        &self.start
    }

    /// What follows the anchor; ends after the first error. Records inside the batches have not been looked at.
    pub fn entries(&self) -> impl Iterator<Item = Result<Entry<'a>, FormatError>> + use<'a, '_> {
        self.log.events().skip(1).map(|event| Entry::parse(event?))
    }

    /// The value that PCR 22 should have in the bank of `alg`.
    pub fn replay(&self, alg: HashAlg) -> Result<Digest, FormatError> {
        let start = self.start.get(alg).ok_or(LogError::NoSuchBank { alg: alg.0 })?;
        Ok(self.log.replay_from(*start, PCR_EXPOSURE)?)
    }
}
