//! The FIFO interface, that of TIS too.
//!
//! Spec: \[PTP\] "FIFO Interface"; \[TIS\] "TPM Interface Specification".

use hv::io::{Clock, Mmio, TimedOut, poll_until};

use crate::error::{Error, Flow, Wait};
use crate::transport::{
    Chip, Contention, Locality, TIMEOUT_A, TIMEOUT_B, TIMEOUT_C, TIMEOUT_D, response_size,
};

const ACCESS: u32 = 0x00;
const STS: u32 = 0x18;
const DATA: u32 = 0x24;

const ACCESS_VALID: u8 = 1 << 7;
const ACCESS_ACTIVE: u8 = 1 << 5;
const ACCESS_SEIZE: u8 = 1 << 3;
const ACCESS_REQUEST: u8 = 1 << 1;
/// What a page that is closed, or not there, reads as.
const CLOSED: u8 = 0xff;

const STS_VALID: u32 = 1 << 7;
const STS_READY: u32 = 1 << 6;
const STS_GO: u32 = 1 << 5;
const STS_DATA: u32 = 1 << 4;
const STS_EXPECT: u32 = 1 << 3;

/// STS.burstCount: bytes that may be moved without looking again.
const fn burst(sts: u32) -> usize {
    ((sts >> 8) & 0xffff) as usize
}

impl<M: Mmio, C: Clock> Chip<M, C> {
    fn access(&self, locality: Locality) -> u8 {
        self.mmio.read8(locality.page() | ACCESS)
    }

    fn active(&self, locality: Locality) -> bool {
        let access = self.access(locality);
        access != CLOSED && access & ACCESS_ACTIVE != 0
    }

    /// Polls ACCESS, the one register that is a byte wide, until `bit` is set.
    #[inline(never)]
    fn wait_access(&self, locality: Locality, bit: u8, limit: u64) -> Result<(), TimedOut> {
        poll_until(&self.clock, limit, || {
            let access = self.access(locality);
            access != CLOSED && access & bit != 0
        })
    }

    pub(crate) fn fifo_request(&self, locality: Locality, contention: Contention) -> Result<(), Error> {
        let number = locality as u8;
        if self.access(locality) == CLOSED {
            return Err(Error::LocalityUnavailable { locality: number });
        }
        self.wait_access(locality, ACCESS_VALID, TIMEOUT_A)
            .map_err(|TimedOut| Error::Timeout(Wait::Valid))?;
        if self.active(locality) {
            return Ok(());
        }
        let ask = |how, limit| {
            self.mmio.write8(locality.page() | ACCESS, how);
            self.wait_access(locality, ACCESS_ACTIVE, limit)
        };
        let holder = Locality::ALL.into_iter().find(|other| self.active(*other));
        if ask(ACCESS_REQUEST, contention.limit(holder.is_some())).is_ok() {
            return Ok(());
        }
        // A seize by a lower locality would be ignored.
        let may_seize = contention.seize && holder.is_some_and(|holder| holder < locality);
        if may_seize && ask(ACCESS_SEIZE, TIMEOUT_A).is_ok() {
            return Ok(());
        }
        // Withdraw the request: granted later, it would keep the others out for good.
        self.fifo_relinquish(locality);
        Err(Error::LocalityBusy { locality: number, holder: holder.map(|holder| holder as u8) })
    }

    pub(crate) fn fifo_relinquish(&self, locality: Locality) {
        self.mmio.write8(locality.page() | ACCESS, ACCESS_ACTIVE);
    }

    pub(crate) fn fifo_start(&self, locality: Locality, command: &[u8]) -> Result<(), Error> {
        let page = locality.page();
        let started = self.fifo_ready(page).and_then(|()| self.fifo_send(page, command));
        // The command ends if it did not begin.
        self.fifo_write_sts(page, if started.is_ok() { STS_GO } else { STS_READY });
        started
    }

    /// Whether there is a response.
    pub(crate) fn fifo_ended(&self, locality: Locality) -> bool {
        let sts = self.mmio.read32(locality.page() | STS);
        sts & STS_VALID != 0 && sts & STS_DATA != 0
    }

    /// Reads the response if the command has `ended`, and gives it up otherwise.
    pub(crate) fn fifo_end(
        &self,
        locality: Locality,
        ended: bool,
        response: &mut [u8],
    ) -> Result<usize, Error> {
        let page = locality.page();
        let result =
            if ended { self.fifo_receive(page, response) } else { Err(Error::Timeout(Wait::Response)) };
        // Ends the command, also one that hangs: the next user finds the TPM idle.
        self.fifo_write_sts(page, STS_READY);
        result
    }

    /// The low byte alone: the others hold cancel and resetEstablishment.
    fn fifo_write_sts(&self, page: u32, bit: u32) {
        self.mmio.write8(page | STS, (bit & 0xff) as u8);
    }

    /// STS once it is valid.
    fn fifo_valid_sts(&self, page: u32) -> Result<u32, Error> {
        self.wait(Wait::Status, TIMEOUT_C, page | STS, |sts| sts & STS_VALID != 0)
    }

    /// Brings the TPM from any state to Ready.
    fn fifo_ready(&self, page: u32) -> Result<(), Error> {
        let attempt = || {
            self.fifo_write_sts(page, STS_READY);
            self.wait(Wait::Ready, TIMEOUT_B, page | STS, |sts| sts & STS_READY != 0)
        };
        // A response that nobody read: the first write leads to Idle only, the second to Ready.
        attempt().or_else(|_| attempt()).map(|_| ())
    }

    fn fifo_send(&self, page: u32, command: &[u8]) -> Result<(), Error> {
        let Some((last, body)) = command.split_last() else { return Ok(()) };
        self.fifo_write(page, body)?;
        if self.fifo_valid_sts(page)? & STS_EXPECT == 0 {
            return Err(Error::Flow(Flow::ExpectsTooFew));
        }
        self.fifo_write(page, core::slice::from_ref(last))?;
        if self.fifo_valid_sts(page)? & STS_EXPECT != 0 {
            return Err(Error::Flow(Flow::ExpectsTooMany));
        }
        Ok(())
    }

    fn fifo_write(&self, page: u32, mut data: &[u8]) -> Result<(), Error> {
        while !data.is_empty() {
            let sts = self.wait(Wait::Burst, TIMEOUT_D, page | STS, |sts| burst(sts) != 0)?;
            let (now, later) = data.split_at(burst(sts).min(data.len()));
            for byte in now {
                self.mmio.write8(page | DATA, *byte);
            }
            data = later;
        }
        Ok(())
    }

    fn fifo_receive(&self, page: u32, response: &mut [u8]) -> Result<usize, Error> {
        let mut header = [0; 10];
        self.fifo_read(page, &mut header)?;
        let size = response_size(&header, response.len())?;
        // Cannot fail: `response_size` checked both bounds.
        if let Some((head, body)) = response.get_mut(..size).and_then(|r| r.split_first_chunk_mut()) {
            *head = header;
            self.fifo_read(page, body)?;
        }
        if self.fifo_valid_sts(page)? & STS_DATA != 0 {
            return Err(Error::Flow(Flow::ResponseLong));
        }
        Ok(size)
    }

    fn fifo_read(&self, page: u32, mut data: &mut [u8]) -> Result<(), Error> {
        while !data.is_empty() {
            let sts = self.wait(Wait::Burst, TIMEOUT_D, page | STS, |sts| {
                sts & STS_VALID != 0 && (sts & STS_DATA == 0 || burst(sts) != 0)
            })?;
            if sts & STS_DATA == 0 {
                return Err(Error::Flow(Flow::ResponseShort));
            }
            let (now, later) = data.split_at_mut(burst(sts).min(data.len()));
            for byte in now {
                *byte = self.mmio.read8(page | DATA);
            }
            data = later;
        }
        Ok(())
    }
}
