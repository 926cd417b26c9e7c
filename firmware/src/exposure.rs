//! The exposure log: a record of everything that code from before the launch could do after it.
//!
//! Every firmware call, SMI, denied access and policy decision leaves a [`Record`]. Records are gathered into
//! batches; the digest of a batch is extended into PCR 22, and the batch is kept as an event of a TCG crypto-agile
//! log, so that public tools replay it. A log that is full drops its oldest batches and says so in the next
//! batch, so nothing disappears without a measured trace. See `docs/exposure-log.md` for the bytes.
//!
//! What the MLE does: [`ExposureLog::record`], and when that says [`Urgency::AtOnce`] or [`ExposureLog::due`] says so,
//! [`ExposureLog::seal`], extend PCR 22 with the digests of those bytes, [`ExposureLog::extended`].

mod meter;
mod read;
mod record;
mod ring;
#[cfg(test)]
mod tests;

pub use meter::Meter;
pub use read::{Batch, Chain, Entry, Exposure, FormatError, LinkError};
pub use record::{
    Access, Decision, Denied, Guid, Kind, NAME_MAX, Name, NoService, RECORD_MAX, Record, Region,
    SERVICE_NONE, TEXT_MAX, Text, Urgency, Variable,
};
pub use ring::{BATCH_DELAY_US, BATCH_RECORDS, CALL_SMIS, Counters, DEFAULT_SIZE, ExposureLog, PENDING_SIZE};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// [`BatchHeader::version`], [`AnchorData::version`]: counts changes of all layouts here.
pub const VERSION: u16 = 1;
/// [`BatchHeader::tag`].
pub const BATCH_TAG: u32 = u32::from_le_bytes(*b"CXPB");
/// [`BatchHeader::flags`]: the batch was measured later than its records' urgency asks for.
pub const FLAG_LATE: u16 = 1;
/// PCR of the events that are no measurement, as the Spec ID event has it: there are tools that replay events of type
/// EV_NO_ACTION too, and then get a wrong value of this PCR only.
pub const PCR_REMARK: u32 = 0;
/// First bytes of the event data that says what came before the first batch of the log.
pub const ANCHOR_SIGNATURE: [u8; 16] = *b"Cordon Anchor\0\0\0";
/// First bytes of the event data with the records that are not measured yet.
pub const PENDING_SIGNATURE: [u8; 16] = *b"Cordon Pending\0\0";

/// What a batch begins with; [`BatchHeader::count`] records follow. The bytes of both are what PCR 22 is extended with
/// the digest of. The first two fields are those of a TCG_PCClientTaggedEvent.
///
/// Spec: \[PFP\] "EV_EVENT_TAG".
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct BatchHeader {
    /// [`BATCH_TAG`].
    pub tag: U32,
    /// Bytes after this field.
    pub size: U32,
    /// [`VERSION`].
    pub version: U16,
    /// `FLAG_` bits.
    pub flags: U16,
    /// Records.
    pub count: U32,
    /// This batch's number: as many batches were measured before it.
    pub number: U64,
    /// Sequence number of the first record.
    pub first: U64,
    /// When the batch was closed, microseconds since the MLE's start.
    pub sealed_us: U64,
    /// Records that were measured and are no longer in the log.
    pub spilled: U64,
    /// Records for which there was no room before they could be measured: nothing is known of them but how many.
    pub lost: U64,
    /// Batches so far that were measured late, this one included.
    pub late: U64,
}

/// Event data of the anchor; its event's digests are the values of PCR 22 after the batches that were dropped.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct AnchorData {
    /// [`ANCHOR_SIGNATURE`].
    pub signature: [u8; 16],
    /// [`VERSION`].
    pub version: U16,
    /// Zero.
    pub reserved: U16,
    /// Batches dropped.
    pub batches: U64,
    /// Records in them.
    pub records: U64,
}
