//! Who said it: creation tickets, by which a launch recognises what an earlier launch of the same code left behind.
//!
//! The TPM notes with each object that it creates the PCR values and the locality of that moment, and 32 bytes of the creator's choice,
//! and signs the note with a secret of its own: the ticket. So a ticket for these PCR values at locality 2 can only come from
//! code that was launched when the PCRs had them. The object itself is of no use here: a primary of the NULL hierarchy, the same
//! whenever it is created, until a reset of the TPM gives that hierarchy another seed. With it all tickets of before lapse.
//!
//! Nothing of what the ticket's keeper says is parsed: the verifier makes the note from what it sees itself, and the TPM compares.
//!
//! Spec: \[TPM2\] part 1 "Ticket Definition", part 3 "TPM2_CreatePrimary", "TPM2_CertifyCreation".

use hv::io::{Clock, Mmio};

use crate::bank::HashAlg;
use crate::command;
use crate::error::Error;
use crate::hash::digest_of;
use crate::transport::Locality;
use crate::{MAX_DIGEST, Tpm};

/// What [`Tpm::vouch`] gives and [`Tpm::vouched`] takes: may be kept anywhere, and be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Ticket {
    /// Bytes of `digest` that count; more than its length are taken for all of it.
    pub size: u64,
    /// The TPM's HMAC.
    pub digest: [u8; MAX_DIGEST],
}

impl Ticket {
    pub(crate) fn new(digest: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_DIGEST];
        bytes.get_mut(..digest.len())?.copy_from_slice(digest);
        Some(Self { size: digest.len() as u64, digest: bytes })
    }

    fn bytes(&self) -> &[u8] {
        usize::try_from(self.size).ok().and_then(|size| self.digest.get(..size)).unwrap_or(&self.digest)
    }
}

impl<M: Mmio, C: Clock> Tpm<M, C> {
    /// Has the TPM note that the holder of its locality said `data` while `pcrs` of the SHA-256 bank had their present values.
    ///
    /// # Errors
    /// What the TPM refuses; among that that it has no room for an object. No object is left in it.
    pub fn vouch(&mut self, pcrs: &[u32], data: &[u8; 32]) -> Result<Ticket, Error> {
        let selection = command::selection_of(HashAlg::SHA256, pcrs)?;
        let create = command::create_primary(&selection, data)?;
        let (object, ticket) =
            self.run(command::CC_CREATE_PRIMARY, &create, command::parse_create_primary)?;
        self.flush(object)?;
        Ok(ticket)
    }

    /// Whether `ticket` is for `data`, the present values of `pcrs` and the locality that is held now, of this TPM since its last
    /// reset.
    ///
    /// # Errors
    /// What the TPM refuses, but for a ticket that is none.
    pub fn vouched(&mut self, pcrs: &[u32], data: &[u8; 32], ticket: &Ticket) -> Result<bool, Error> {
        let selection = command::selection_of(HashAlg::SHA256, pcrs)?;
        let locality = self.locality().ok_or(Error::LocalityNotHeld)?;
        let mut values = command::Command::new();
        for pcr in (0..24).filter(|pcr| pcrs.contains(pcr)) {
            let value = self.read_pcr(HashAlg::SHA256, pcr)?.ok_or(Error::NoBanks)?;
            values.extend_from_slice(value.as_bytes()).map_err(|_| Error::TooManyBanks)?;
        }
        let sha256 = |parts: &[&[u8]]| digest_of(HashAlg::SHA256, parts).ok_or(Error::NoBanks);
        let values = sha256(&[&values])?;
        let note = command::creation_data(&selection, values.as_bytes(), locality as u8, data)?;
        let note = sha256(&[&note])?;

        let create = command::create_primary(&selection, data)?;
        let (object, _) = self.run(command::CC_CREATE_PRIMARY, &create, command::parse_create_primary)?;
        let certify = command::certify_creation(object, note.as_bytes(), ticket.bytes())?;
        let answer = self.run(command::CC_CERTIFY_CREATION, &certify, |_| Ok(()));
        self.flush(object)?;
        match answer {
            Ok(()) => Ok(true),
            Err(Error::Refused { rc: command::RC_TICKET, .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    fn flush(&mut self, object: u32) -> Result<(), Error> {
        self.run(command::CC_FLUSH_CONTEXT, &command::flush_context(object)?, |_| Ok(()))
    }
}

/// The bit of a locality in TPMA_LOCALITY.
///
/// Spec: \[TPM2\] part 2 "TPMA_LOCALITY".
pub(crate) const fn locality_bit(locality: u8) -> u8 {
    1 << (locality & 7)
}

const _: () = assert!(locality_bit(Locality::Two as u8) == 4);
