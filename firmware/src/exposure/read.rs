//! Reading an exposure log. Its bytes may be anyone's.

use core::fmt;

use tpm::log::{EV_EVENT_TAG, EV_NO_ACTION, extended_all};
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

    /// Round and old value of PCR 22, if this is the first batch after a relaunch: a chain that begins with zeros.
    pub fn relaunch(&self) -> Option<(u64, [u8; 32])> {
        self.records().next()?.ok()?.1.relaunch()
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

    /// What follows the anchor; ends after the first error. Records inside the batches have not been looked at.
    pub fn entries(&self) -> impl Iterator<Item = Result<Entry<'a>, FormatError>> + use<'a, '_> {
        self.log.events().skip(1).map(|event| Entry::parse(event?))
    }

    /// PCR 22 after what was dropped, as the log says. A wrong value does not lead to the PCR's value.
    pub fn chain(&self) -> Chain {
        let whole = self.anchor.batches.get() == 0;
        Chain { values: self.start.clone(), round: whole.then_some(0) }
    }

    /// The values that PCR 22 should have.
    ///
    /// # Errors
    /// Those of the log up to its last event. Whether its parts fit together, [`Chain::follow`] tells.
    pub fn replay(&self) -> Result<Digests, FormatError> {
        let mut chain = self.chain();
        for entry in self.entries() {
            // A broken link shows in no value: the PCR forgot what was before it.
            let _ = chain.follow(&entry?);
        }
        Ok(chain.values)
    }
}

/// PCR 22 on its way through a log, by [`Exposure::chain`]. A bank whose algorithm cannot be computed keeps its value.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Its values so far.
    pub values: Digests,
    /// The last relaunch there was, 0 before the first; none while that is not known.
    pub round: Option<u64>,
}

/// A chain that does not go on from the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkError {
    /// It says that PCR 22 had another value.
    Value {
        /// The relaunch.
        round: u64,
        /// What it says, SHA-256.
        said: [u8; 32],
    },
    /// It does not count on from the relaunch before.
    Round {
        /// What it says.
        round: u64,
        /// What it should say.
        wanted: u64,
    },
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value { round, said } => {
                write!(f, "relaunch {round} followed on the value ")?;
                said.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
                f.write_str(" of PCR 22, to which the log before does not lead")
            }
            Self::Round { round, wanted } => write!(f, "relaunch {round} should be relaunch {wanted}"),
        }
    }
}

impl Chain {
    /// Takes the next entry. After an error it has been taken too.
    ///
    /// # Errors
    /// [`LinkError`] of a batch that begins a chain.
    pub fn follow(&mut self, entry: &Entry<'_>) -> Result<(), LinkError> {
        let link = entry.batch.relaunch().map_or(Ok(()), |link| self.relaunched(link));
        if !entry.pending && entry.event.event_type != EV_NO_ACTION {
            self.values = extended_all(&self.values, &entry.event.digests);
        }
        link
    }

    fn relaunched(&mut self, (round, said): (u64, [u8; 32])) -> Result<(), LinkError> {
        let before = core::mem::take(&mut self.values);
        let banks: Banks = before.as_slice().iter().map(Digest::bank).collect();
        self.values = Digests::zero(&banks);
        let last = self.round.replace(round);
        if before.get(HashAlg::SHA256).is_none_or(|value| *value.as_bytes() != said) {
            return Err(LinkError::Value { round, said });
        }
        // Rounds of before the log's start are not known.
        let wanted = last.map_or(round, |last| last.saturating_add(1));
        if round == wanted { Ok(()) } else { Err(LinkError::Round { round, wanted }) }
    }
}
