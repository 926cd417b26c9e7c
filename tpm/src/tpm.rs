//! The TPM as the SLB stage and the MLE use it.

use hv::io::{Clock, Mmio};

use crate::bank::{Banks, Digest, Digests, HashAlg};
use crate::command::{
    self, CC_GET_CAPABILITY, CC_PCR_EVENT, CC_PCR_EXTEND, CC_PCR_READ, Command, RESPONSE_MAX,
};
use crate::error::{Error, Field};
use sha256::Sha256Blocks;

use crate::hash::BankHasher;
use crate::log::LogWriter;
use crate::transport::{Chip, Contention, Locality, Sent};

/// A PCR that every allocated bank has, for a look at its digest size.
const PCR_OF_EVERY_BANK: u32 = 0;

/// A TPM 2.0 and its active PCR banks.
pub struct Tpm<M, C> {
    chip: Chip<M, C>,
    banks: Banks,
    sha256: Sha256Blocks,
}

/// An extend that the TPM works on.
pub struct Extending {
    command: Command,
    sent: Sent,
}

impl<M: Mmio, C: Clock> Tpm<M, C> {
    /// Finds the TPM behind `mmio`, a window of [`crate::WINDOW_SIZE`] bytes at [`crate::BASE`], takes
    /// `locality` and asks for the active banks.
    ///
    /// # Errors
    /// [`Error::LocalityUnavailable`] when the interface lacks the locality: the caller decides whether
    /// another will do. Otherwise whatever went wrong; the locality is not held then.
    pub fn open(mmio: M, clock: C, locality: Locality, contention: Contention) -> Result<Self, Error> {
        let mut tpm = Self::attach(mmio, clock, locality, contention)?;
        match tpm.read_banks() {
            Ok(banks) => tpm.banks = banks,
            Err(error) => {
                tpm.release();
                return Err(error);
            }
        }
        Ok(tpm)
    }

    /// [`Tpm::open`] for a caller that lets the TPM hash ([`Tpm::event`]): the banks are not asked for and taken to be
    /// none.
    pub fn attach(mmio: M, clock: C, locality: Locality, contention: Contention) -> Result<Self, Error> {
        let chip = Chip::attach(mmio, clock)?;
        let mut tpm = Self { chip, banks: Banks::new(), sha256: sha256::software };
        tpm.acquire(locality, contention)?;
        Ok(tpm)
    }

    /// Extends `pcr` in every active bank with the digest of `data`, at most 512 bytes, that the TPM itself computes.
    ///
    /// # Errors
    /// As for [`Tpm::extend`].
    pub fn event(&mut self, pcr: u32, data: &[u8]) -> Result<(), Error> {
        let command = command::pcr_event(pcr, data)?;
        self.run(CC_PCR_EVENT, &command, |_| Ok(()))
    }

    /// Hashes SHA-256 with `blocks` from now on.
    pub fn use_sha256(&mut self, blocks: Sha256Blocks) {
        self.sha256 = blocks;
    }

    /// The active banks.
    pub fn banks(&self) -> &Banks {
        &self.banks
    }

    /// The locality held.
    pub fn locality(&self) -> Option<Locality> {
        self.chip.held()
    }

    /// Takes `locality` again after [`Tpm::release`], or changes to it.
    pub fn acquire(&mut self, locality: Locality, contention: Contention) -> Result<(), Error> {
        self.chip.acquire(locality, contention)
    }

    /// Gives the TPM to whoever wants it next.
    pub fn release(&mut self) {
        self.chip.release();
    }

    /// A hasher for the active banks.
    pub fn hasher(&self) -> BankHasher {
        BankHasher::with_sha256(&self.banks, self.sha256)
    }

    /// The digests of `data` in the active banks.
    pub fn digests_of(&self, data: &[u8]) -> Digests {
        let mut hasher = self.hasher();
        hasher.update(data);
        hasher.finish()
    }

    /// Extends `pcr` in all active banks by one command.
    ///
    /// # Errors
    /// [`Error::Digests`] when `digests` are not those of the active banks. After a
    /// [`Error::Timeout`] or [`Error::Flow`] the PCR may or may not have been extended.
    pub fn extend(&mut self, pcr: u32, digests: &Digests) -> Result<(), Error> {
        let mut extending = self.begin_extend(pcr, digests)?;
        while !self.is_extended(&mut extending)? {
            self.chip.clock.relax();
        }
        Ok(())
    }

    /// Begins what [`Tpm::extend`] does, for a caller with other things to do until [`Tpm::is_extended`] says that it is done. The
    /// locality has to be held all the time, and no other command sent.
    ///
    /// # Errors
    /// As for [`Tpm::extend`].
    pub fn begin_extend(&mut self, pcr: u32, digests: &Digests) -> Result<Extending, Error> {
        if !digests.are_of(&self.banks) {
            return Err(Error::Digests);
        }
        let command = command::pcr_extend(pcr, digests.as_slice())?;
        let sent = self.chip.send(&command)?;
        Ok(Extending { command, sent })
    }

    /// Whether the TPM has extended; it works on it otherwise.
    ///
    /// # Errors
    /// As for [`Tpm::extend`]; it is over then.
    pub fn is_extended(&mut self, extending: &mut Extending) -> Result<bool, Error> {
        let Extending { command, sent } = extending;
        match self.chip.poll(sent, command, &mut [0; RESPONSE_MAX])? {
            None => Ok(false),
            Some((_, 0)) => Ok(true),
            Some((_, rc)) => Err(Error::Refused { command: CC_PCR_EXTEND, rc }),
        }
    }

    /// Extends `pcr` with `digests` and appends the event to `log`.
    ///
    /// The log's room is checked first, the TPM is extended next, the event is written last: an error
    /// leaves no event in the log that is not in the PCR. A PCR value that the log does not explain is
    /// possible only after a transport failure in mid-command, and fails verification.
    pub fn measure(
        &mut self,
        log: &mut LogWriter<'_>,
        pcr: u32,
        event_type: u32,
        event: &[u8],
        digests: &Digests,
    ) -> Result<(), Error> {
        log.check(digests, event)?;
        self.extend(pcr, digests)?;
        log.append(pcr, event_type, digests, event)?;
        Ok(())
    }

    /// Extends each of `pcrs` with [`Digest::cap`] in all banks, so that nothing later can claim their
    /// present values. Goes on after a failure, so that as many as possible are capped.
    ///
    /// # Errors
    /// The first failure.
    pub fn cap(&mut self, pcrs: &[u32]) -> Result<(), Error> {
        let digests = Digests::cap(&self.banks);
        pcrs.iter().map(|pcr| self.extend(*pcr, &digests)).fold(Ok(()), Result::and)
    }

    /// Reads one PCR of one bank; none when the bank does not have that PCR.
    pub fn read_pcr(&mut self, alg: HashAlg, pcr: u32) -> Result<Option<Digest>, Error> {
        let command = command::pcr_read(alg, pcr)?;
        self.run(CC_PCR_READ, &command, |response| command::parse_pcr_read(response, alg, pcr))
    }

    fn read_banks(&mut self) -> Result<Banks, Error> {
        let command = command::get_pcr_banks()?;
        let mut banks = self.run(CC_GET_CAPABILITY, &command, command::parse_pcr_banks)?;
        for bank in &mut banks {
            if bank.size == 0 {
                let digest = self.read_pcr(bank.alg, PCR_OF_EVERY_BANK)?;
                let unknown = Error::Response { field: Field::Hash, value: bank.alg.0.into() };
                bank.size = digest.ok_or(unknown)?.bank().size;
            }
        }
        Ok(banks)
    }

    pub(crate) fn run<T>(
        &mut self,
        code: u32,
        command: &Command,
        parse: impl FnOnce(&[u8]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut response = [0; RESPONSE_MAX];
        match self.chip.transact(command, &mut response)? {
            (size, 0) => parse(response.get(..size).unwrap_or_default()),
            (_, rc) => Err(Error::Refused { command: code, rc }),
        }
    }
}
