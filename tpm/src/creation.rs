//! Who said it: creation tickets, by which a launch recognises what an earlier launch of the same code left behind.
//!
//! The TPM notes with each object that it creates the PCR values and the locality of that moment, and 32 bytes of the creator's choice,
//! and signs the note with a secret of its own: the ticket. So a ticket for these PCR values at locality 2 can only come from
//! code that was launched when the PCRs had them. The object itself is of no use here: a primary of the NULL hierarchy, the same
//! whenever it is created, until a reset of the TPM gives that hierarchy another seed. With it all tickets of before lapse.
//!
//! A *restart* of the TPM (TPM2_Shutdown of the state, then a reset of the machine) leaves that seed, but sets the PCRs back to
//! where whoever likes extends them as was done before. So the 32 bytes are over restartCount too, which a restart counts as well as a
//! DRTM event: a ticket is good after exactly one of them, the launch that asks.
//!
//! TPM2_Clear sets restartCount and resetCount to 0 and leaves the seed too. Only a reset counts resetCount up again, and it ends the
//! seed. So that is noted as well, and where it is 0 nothing is: no ticket outlives a TPM2_Clear.
//!
//! Nothing of what the ticket's keeper says is parsed: the verifier makes the note from what it sees itself, and the TPM compares.
//!
//! Spec: \[TPM2\] part 1 "Ticket Definition", part 2 "TPMS_CLOCK_INFO", part 3 "TPM2_CreatePrimary", "TPM2_CertifyCreation",
//! "TPM2_ReadClock", "TPM2_Clear".

use hv::io::{Clock, Mmio};

use crate::bank::{Digest, HashAlg};
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

/// Of TPMS_CLOCK_INFO: what tells one life of the TPM from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    /// resetCount.
    pub resets: u32,
    /// restartCount: restarts and DRTM events since the last reset.
    pub restarts: u32,
}

impl<M: Mmio, C: Clock> Tpm<M, C> {
    /// Has the TPM note that the holder of its locality said `data` while `pcrs` of the SHA-256 bank had their present values.
    ///
    /// # Errors
    /// What the TPM refuses; among that that it has no room for an object. No object is left in it. [`Error::Cleared`].
    pub fn vouch(&mut self, pcrs: &[u32], data: &[u8; 32]) -> Result<Ticket, Error> {
        let selection = command::selection_of(HashAlg::SHA256, pcrs)?;
        let counts = self.counts()?;
        if counts.resets == 0 {
            return Err(Error::Cleared);
        }
        let create = command::create_primary(&selection, &said(data, counts)?)?;
        let (object, ticket) =
            self.run(command::CC_CREATE_PRIMARY, &create, command::parse_create_primary)?;
        self.flush(object)?;
        Ok(ticket)
    }

    /// Whether `ticket` is for `data`, the present values of `pcrs` and the locality that is held now, of this TPM one DRTM event
    /// ago.
    ///
    /// # Errors
    /// What the TPM refuses, but for a ticket that is none.
    pub fn vouched(&mut self, pcrs: &[u32], data: &[u8; 32], ticket: &Ticket) -> Result<bool, Error> {
        let Counts { resets, restarts } = self.counts()?;
        match restarts.checked_sub(1) {
            Some(restarts) => self.vouched_at(pcrs, data, ticket, Counts { resets, restarts }),
            None => Ok(false),
        }
    }

    /// [`Tpm::vouched`] when the TPM had counted `counts`.
    pub(crate) fn vouched_at(
        &mut self,
        pcrs: &[u32],
        data: &[u8; 32],
        ticket: &Ticket,
        counts: Counts,
    ) -> Result<bool, Error> {
        let selection = command::selection_of(HashAlg::SHA256, pcrs)?;
        let locality = self.locality().ok_or(Error::LocalityNotHeld)?;
        let said = said(data, counts)?;
        let mut values = command::Command::new();
        for pcr in (0..24).filter(|pcr| pcrs.contains(pcr)) {
            let value = self.read_pcr(HashAlg::SHA256, pcr)?.ok_or(Error::NoBanks)?;
            values.extend_from_slice(value.as_bytes()).map_err(|_| Error::TooManyBanks)?;
        }
        let values = sha256(&[&values])?;
        let note = command::creation_data(&selection, values.as_bytes(), locality as u8, &said)?;
        let note = sha256(&[&note])?;

        let create = command::create_primary(&selection, &said)?;
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

    pub(crate) fn counts(&mut self) -> Result<Counts, Error> {
        self.run(command::CC_READ_CLOCK, &command::read_clock()?, command::parse_counts)
    }

    fn flush(&mut self, object: u32) -> Result<(), Error> {
        self.run(command::CC_FLUSH_CONTEXT, &command::flush_context(object)?, |_| Ok(()))
    }
}

/// What the creator has the TPM note: `data` was said when the TPM had counted `counts`.
fn said(data: &[u8; 32], counts: Counts) -> Result<Digest, Error> {
    sha256(&[data, &counts.resets.to_be_bytes(), &counts.restarts.to_be_bytes()])
}

fn sha256(parts: &[&[u8]]) -> Result<Digest, Error> {
    // The crate computes SHA-256, so there always is a digest.
    digest_of(HashAlg::SHA256, parts).ok_or(Error::NoBanks)
}

/// The bit of a locality in TPMA_LOCALITY.
///
/// Spec: \[TPM2\] part 2 "TPMA_LOCALITY".
pub(crate) const fn locality_bit(locality: u8) -> u8 {
    1 << (locality & 7)
}

const _: () = assert!(locality_bit(Locality::Two as u8) == 4);
