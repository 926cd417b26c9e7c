//! The commands that Cordon sends, and their responses.
//!
//! Spec: \[TPM2\] "TPM2_GetCapability", "TPM2_PCR_Event", "TPM2_PCR_Extend", "TPM2_PCR_Read", "TPM2_CreatePrimary",
//! "TPM2_CertifyCreation", "TPM2_FlushContext", "TPM2_ReadClock"; all fields big-endian.

use heapless::Vec;

use crate::bank::{Bank, Banks, Digest, HashAlg};
use crate::creation::{Counts, Ticket, locality_bit};
use crate::error::{Error, Field};
use crate::reader::Reader;

/// Longest command, in bytes: an extend of [`crate::MAX_BANKS`] banks of 64 bytes takes 559.
const COMMAND_MAX: usize = 576;
pub(crate) type Command = Vec<u8, COMMAND_MAX>;
/// Longest response: an event's digests for [`crate::MAX_BANKS`] banks of 64 bytes take 551.
pub(crate) const RESPONSE_MAX: usize = 576;

pub(crate) const CC_CREATE_PRIMARY: u32 = 0x131;
pub(crate) const CC_PCR_EVENT: u32 = 0x13c;
pub(crate) const CC_CERTIFY_CREATION: u32 = 0x14a;
pub(crate) const CC_FLUSH_CONTEXT: u32 = 0x165;
pub(crate) const CC_GET_CAPABILITY: u32 = 0x17a;
pub(crate) const CC_PCR_READ: u32 = 0x17e;
pub(crate) const CC_READ_CLOCK: u32 = 0x181;
pub(crate) const CC_PCR_EXTEND: u32 = 0x182;

const ST_NO_SESSIONS: u16 = 0x8001;
const ST_SESSIONS: u16 = 0x8002;
/// TPM_RC_TICKET of the fourth parameter.
pub(crate) const RC_TICKET: u32 = 0x4e0;
const ST_CREATION: u16 = 0x8021;
const RH_NULL: u32 = 0x4000_0007;
const ALG_NULL: u16 = 0x10;
const CAP_PCRS: u32 = 5;
/// No password for the object and no data in it.
const NO_SENSITIVE: [u8; 6] = [0, 4, 0, 0, 0, 0];
/// An object that nobody uses, of a kind that every TPM makes at once: an HMAC key. fixedTPM, fixedParent, sensitiveDataOrigin,
/// userWithAuth, noDA, sign; no policy; HMAC with SHA-256.
const OBJECT: [u8; 18] = [0, 16, 0, 0x08, 0, 0x0b, 0, 0x04, 0x04, 0x72, 0, 0, 0, 0x05, 0, 0x0b, 0, 0];
/// Authorization area: its size 9, TPM_RS_PW, empty nonce, no attributes, empty password.
const EMPTY_PASSWORD: [u8; 13] = [0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0];
/// Bytes of a PCR selection's bitmap: 24 PCRs.
const SELECT_SIZE: u8 = 3;

/// A command of several parts, with its header.
fn command(tag: u16, code: u32, parts: &[&[u8]]) -> Result<Command, Error> {
    let size = parts.iter().fold(10_u32, |size, part| size.saturating_add(part.len() as u32));
    let mut bytes = Command::new();
    let too_long = |_| Error::CommandSize { size, limit: COMMAND_MAX as u32 };
    for part in [&tag.to_be_bytes()[..], &size.to_be_bytes(), &code.to_be_bytes()] {
        bytes.extend_from_slice(part).map_err(too_long)?;
    }
    for part in parts {
        bytes.extend_from_slice(part).map_err(too_long)?;
    }
    Ok(bytes)
}

/// Asks for all PCR banks.
pub(crate) fn get_pcr_banks() -> Result<Command, Error> {
    let (property, count) = (0_u32, 1_u32);
    command(
        ST_NO_SESSIONS,
        CC_GET_CAPABILITY,
        &[&CAP_PCRS.to_be_bytes(), &property.to_be_bytes(), &count.to_be_bytes()],
    )
}

/// Extends `pcr` with every one of `digests`.
pub(crate) fn pcr_extend(pcr: u32, digests: &[Digest]) -> Result<Command, Error> {
    let mut list = Command::new();
    let mut append = |bytes: &[u8]| list.extend_from_slice(bytes).map_err(|_| Error::TooManyBanks);
    append(&(digests.len() as u32).to_be_bytes())?;
    for digest in digests {
        append(&digest.alg().0.to_be_bytes())?;
        append(digest.as_bytes())?;
    }
    command(ST_SESSIONS, CC_PCR_EXTEND, &[&pcr.to_be_bytes(), &EMPTY_PASSWORD, &list])
}

/// Extends `pcr` in all banks with the TPM's own digests of `data`.
pub(crate) fn pcr_event(pcr: u32, data: &[u8]) -> Result<Command, Error> {
    let length = data.len() as u16;
    command(ST_SESSIONS, CC_PCR_EVENT, &[&pcr.to_be_bytes(), &EMPTY_PASSWORD, &length.to_be_bytes(), data])
}

/// The bit of `pcr` in a selection's bitmap; none beyond PCR 23.
fn selection(alg: HashAlg, pcr: u32) -> Option<[u8; 6]> {
    let [low, middle, high, beyond] = 1_u32.checked_shl(pcr)?.to_le_bytes();
    let [a, b] = alg.0.to_be_bytes();
    (beyond == 0).then_some([a, b, SELECT_SIZE, low, middle, high])
}

/// Reads `pcr` of one bank.
pub(crate) fn pcr_read(alg: HashAlg, pcr: u32) -> Result<Command, Error> {
    let selection = selection(alg, pcr).ok_or(Error::Response { field: Field::Pcr, value: pcr })?;
    command(ST_NO_SESSIONS, CC_PCR_READ, &[&1_u32.to_be_bytes(), &selection])
}

/// A list of one selection: `pcrs` of one bank.
pub(crate) fn selection_of(alg: HashAlg, pcrs: &[u32]) -> Result<[u8; 10], Error> {
    let mut list = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for pcr in pcrs {
        let one = selection(alg, *pcr).ok_or(Error::Response { field: Field::Pcr, value: *pcr })?;
        for (byte, more) in list.iter_mut().skip(4).zip(one) {
            *byte |= more;
        }
    }
    Ok(list)
}

/// Creates the primary object of the NULL hierarchy and notes `said` and the PCRs of `selection`.
pub(crate) fn create_primary(selection: &[u8], said: &Digest) -> Result<Command, Error> {
    let said = said.as_bytes();
    let (hierarchy, size) = (RH_NULL.to_be_bytes(), (said.len() as u16).to_be_bytes());
    command(
        ST_SESSIONS,
        CC_CREATE_PRIMARY,
        &[&hierarchy, &EMPTY_PASSWORD, &NO_SENSITIVE, &OBJECT, &size, said, selection],
    )
}

/// What the TPM notes of a [`create_primary`] (TPMS_CREATION_DATA): the hash of this is what a ticket is for.
pub(crate) fn creation_data(
    selection: &[u8],
    pcr_digest: &[u8],
    locality: u8,
    said: &Digest,
) -> Result<Command, Error> {
    let said = said.as_bytes();
    let [hierarchy, none] = [&RH_NULL.to_be_bytes()[..], &ALG_NULL.to_be_bytes()];
    let parts: [&[u8]; 11] = [
        selection,
        &(pcr_digest.len() as u16).to_be_bytes(),
        pcr_digest,
        &[locality_bit(locality)],
        none,
        &[0, 4],
        hierarchy,
        &[0, 4],
        hierarchy,
        &(said.len() as u16).to_be_bytes(),
        said,
    ];
    let mut bytes = Command::new();
    for part in parts {
        bytes.extend_from_slice(part).map_err(|_| Error::TooManyBanks)?;
    }
    Ok(bytes)
}

/// Asks whether `ticket` says that `object` was created with a note of which `note` is the hash. No key signs the answer.
pub(crate) fn certify_creation(object: u32, note: &[u8], ticket: &[u8]) -> Result<Command, Error> {
    let size = |bytes: &[u8]| (bytes.len() as u16).to_be_bytes();
    command(
        ST_SESSIONS,
        CC_CERTIFY_CREATION,
        &[
            &RH_NULL.to_be_bytes(),
            &object.to_be_bytes(),
            &EMPTY_PASSWORD,
            &[0, 0],
            &size(note),
            note,
            &ALG_NULL.to_be_bytes(),
            &ST_CREATION.to_be_bytes(),
            &RH_NULL.to_be_bytes(),
            &size(ticket),
            ticket,
        ],
    )
}

/// Takes an object out of the TPM.
pub(crate) fn flush_context(object: u32) -> Result<Command, Error> {
    command(ST_NO_SESSIONS, CC_FLUSH_CONTEXT, &[&object.to_be_bytes()])
}

/// Reads the clock and what is counted with it.
pub(crate) fn read_clock() -> Result<Command, Error> {
    command(ST_NO_SESSIONS, CC_READ_CLOCK, &[])
}

/// The response code, after a check of the header.
pub(crate) fn response_code(response: &[u8]) -> Result<u32, Error> {
    let mut reader = Reader(response);
    let (Some(tag), Some(size), Some(rc)) = (reader.be16(), reader.be32(), reader.be32()) else {
        return Err(Error::Response { field: Field::Header, value: 0 });
    };
    if tag != ST_NO_SESSIONS && tag != ST_SESSIONS {
        // TPM_ST_RSP_COMMAND, 00C4h, is how a TPM 1.2 answers.
        return Err(Error::Response { field: Field::Tag, value: tag.into() });
    }
    if usize::try_from(size) != Ok(response.len()) {
        return Err(Error::Response { field: Field::ResponseSize, value: size });
    }
    Ok(rc)
}

/// Reads fields of a response's parameters, naming the one that is missing.
struct Fields<'a>(Reader<'a>);

impl<'a> Fields<'a> {
    fn of(response: &'a [u8]) -> Self {
        Self(Reader(response.get(10..).unwrap_or_default()))
    }

    fn get<T>(&mut self, field: Field, read: impl FnOnce(&mut Reader<'a>) -> Option<T>) -> Result<T, Error> {
        read(&mut self.0).ok_or(Error::Response { field, value: 0 })
    }

    fn expect(&mut self, field: Field, wanted: u32) -> Result<(), Error> {
        let value = self.get(field, Reader::be32)?;
        if value == wanted { Ok(()) } else { Err(Error::Response { field, value }) }
    }

    /// A TPM2B.
    fn sized(&mut self, field: Field) -> Result<&'a [u8], Error> {
        let size = self.get(field, Reader::be16)?;
        self.get(field, |r| r.bytes(size.into()))
    }

    fn end(self) -> Result<(), Error> {
        if self.0.0.is_empty() {
            Ok(())
        } else {
            Err(Error::Response { field: Field::Trailing, value: self.0.0.len() as u32 })
        }
    }
}

/// The active banks of a [`get_pcr_banks`] response. The size of a bank whose algorithm this crate
/// cannot compute is 0: [`pcr_read`] tells it.
pub(crate) fn parse_pcr_banks(response: &[u8]) -> Result<Banks, Error> {
    let mut fields = Fields::of(response);
    let more = fields.get(Field::MoreData, Reader::u8)?;
    if more != 0 {
        return Err(Error::Response { field: Field::MoreData, value: more.into() });
    }
    fields.expect(Field::Capability, CAP_PCRS)?;
    let count = fields.get(Field::Count, Reader::be32)?;
    let mut banks = Banks::new();
    for _ in 0..count {
        let alg = HashAlg(fields.get(Field::Hash, Reader::be16)?);
        let size = fields.get(Field::SelectSize, Reader::u8)?;
        let select = fields.get(Field::Select, |r| r.bytes(size.into()))?;
        // A bank that is not allocated has an empty selection.
        if select.iter().all(|byte| *byte == 0) {
            continue;
        }
        if banks.iter().any(|bank| bank.alg == alg) {
            return Err(Error::Response { field: Field::Hash, value: alg.0.into() });
        }
        let bank = Bank { alg, size: alg.computed_size().unwrap_or(0) };
        banks.push(bank).map_err(|_| Error::TooManyBanks)?;
    }
    fields.end()?;
    if banks.is_empty() { Err(Error::NoBanks) } else { Ok(banks) }
}

/// The digest in a [`pcr_read`] response; none when the bank does not have the PCR.
pub(crate) fn parse_pcr_read(response: &[u8], alg: HashAlg, pcr: u32) -> Result<Option<Digest>, Error> {
    let mut fields = Fields::of(response);
    let _update_counter = fields.get(Field::UpdateCounter, Reader::be32)?;
    fields.expect(Field::SelectionCount, 1)?;
    let echo = fields.get(Field::Hash, Reader::be16)?;
    if echo != alg.0 {
        return Err(Error::Response { field: Field::Hash, value: echo.into() });
    }
    let size = fields.get(Field::SelectSize, Reader::u8)?;
    let select = fields.get(Field::Select, |r| r.bytes(size.into()))?;
    let values = fields.get(Field::DigestCount, Reader::be32)?;
    if values == 0 {
        fields.end()?;
        return Ok(None);
    }
    let wanted = selection(alg, pcr);
    if values != 1 || !wanted.as_ref().and_then(|wanted| wanted.get(3..)).is_some_and(|w| w.iter().eq(select))
    {
        return Err(Error::Response { field: Field::DigestCount, value: values });
    }
    let size = fields.get(Field::DigestSize, Reader::be16)?;
    let digest = fields.get(Field::Digest, |r| r.bytes(size.into()))?;
    fields.end()?;
    let digest = Digest::new(alg, digest)
        .filter(|digest| alg.computed_size().is_none_or(|size| size == digest.bank().size))
        .ok_or(Error::Response { field: Field::DigestSize, value: size.into() })?;
    Ok(Some(digest))
}

/// Handle and ticket of a [`create_primary`] response.
pub(crate) fn parse_create_primary(response: &[u8]) -> Result<(u32, Ticket), Error> {
    let mut fields = Fields::of(response);
    let object = fields.get(Field::Handle, Reader::be32)?;
    let _parameter_size = fields.get(Field::Created, Reader::be32)?;
    for _public_data_hash in 0..3 {
        fields.sized(Field::Created)?;
    }
    let tag = fields.get(Field::Ticket, Reader::be16)?;
    if tag != ST_CREATION {
        return Err(Error::Response { field: Field::Ticket, value: tag.into() });
    }
    fields.expect(Field::Ticket, RH_NULL)?;
    let digest = fields.sized(Field::Ticket)?;
    let ticket =
        Ticket::new(digest).ok_or(Error::Response { field: Field::Ticket, value: digest.len() as u32 })?;
    Ok((object, ticket))
}

/// What a [`read_clock`] response has counted.
pub(crate) fn parse_counts(response: &[u8]) -> Result<Counts, Error> {
    let mut fields = Fields::of(response);
    let _time_and_clock = fields.get(Field::Clock, |r| r.bytes(16))?;
    let resets = fields.get(Field::Clock, Reader::be32)?;
    let restarts = fields.get(Field::Clock, Reader::be32)?;
    let _safe = fields.get(Field::Clock, Reader::u8)?;
    fields.end()?;
    Ok(Counts { resets, restarts })
}
