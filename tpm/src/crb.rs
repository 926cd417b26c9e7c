//! The command response buffer interface.
//!
//! Spec: \[PTP\] "CRB Interface".

use hv::io::{Clock, Mmio, TimedOut, poll_until};

use crate::error::{Error, Wait};
use crate::transport::{
    BASE, Chip, Contention, Locality, TIMEOUT_A, TIMEOUT_B, TIMEOUT_C, WINDOW_SIZE, response_size,
};

const LOC_STATE: u32 = 0x00;
const LOC_CTRL: u32 = 0x08;
const LOC_STS: u32 = 0x0c;
const CTRL_REQ: u32 = 0x40;
const CTRL_STS: u32 = 0x44;
const CTRL_CANCEL: u32 = 0x48;
const CTRL_START: u32 = 0x4c;
const CMD_SIZE: u32 = 0x58;
const CMD_ADDR_LOW: u32 = 0x5c;
const CMD_ADDR_HIGH: u32 = 0x60;
const RSP_SIZE: u32 = 0x64;
const RSP_ADDR_LOW: u32 = 0x68;
const RSP_ADDR_HIGH: u32 = 0x6c;

const STATE_VALID: u32 = 1 << 7;
const STATE_ASSIGNED: u32 = 1 << 1;
const LOC_REQUEST: u32 = 1;
const LOC_RELINQUISH: u32 = 1 << 1;
const LOC_SEIZE: u32 = 1 << 2;
const GRANTED: u32 = 1;
const REQ_READY: u32 = 1;
const REQ_IDLE: u32 = 1 << 1;
const STS_FATAL: u32 = 1;
const STS_IDLE: u32 = 1 << 1;
/// What a page that is closed, or not there, reads as.
const CLOSED: u32 = u32::MAX;

impl<M: Mmio, C: Clock> Chip<M, C> {
    fn crb(&self, locality: Locality, register: u32) -> u32 {
        self.mmio.read32(locality.page() | register)
    }

    fn set_crb(&self, locality: Locality, register: u32, value: u32) {
        self.mmio.write32(locality.page() | register, value);
    }

    pub(crate) fn crb_request(&self, locality: Locality, contention: Contention) -> Result<(), Error> {
        let unavailable = Err(Error::LocalityUnavailable { locality: locality as u8 });
        if locality != Locality::Zero && !self.localities {
            return unavailable;
        }
        let valid = |state| state != CLOSED && state & STATE_VALID != 0;
        if self.wait(Wait::Valid, TIMEOUT_A, locality.page() | LOC_STATE, valid).is_err() {
            return unavailable;
        }
        let ask = |how, limit| {
            self.set_crb(locality, LOC_CTRL, how);
            let granted = |status| status != CLOSED && status & GRANTED != 0;
            self.wait(Wait::Valid, limit, locality.page() | LOC_STS, granted)
        };
        let state = self.crb(locality, LOC_STATE);
        let holder = (state & STATE_ASSIGNED != 0).then_some((state >> 2 & 7) as u8);
        if ask(LOC_REQUEST, contention.limit(holder.is_some())).is_ok() {
            return Ok(());
        }
        let may_seize = contention.seize && holder.is_some_and(|holder| holder < locality as u8);
        if may_seize && ask(LOC_SEIZE, TIMEOUT_A).is_ok() {
            return Ok(());
        }
        // Withdraw the request: granted later, it would keep the others out for good.
        self.crb_relinquish(locality);
        Err(Error::LocalityBusy { locality: locality as u8, holder })
    }

    pub(crate) fn crb_relinquish(&self, locality: Locality) {
        self.set_crb(locality, LOC_CTRL, LOC_RELINQUISH);
    }

    pub(crate) fn crb_start(&self, locality: Locality, command: &[u8]) -> Result<(), Error> {
        if self.crb(locality, CTRL_STS) & STS_IDLE == 0 {
            // Somebody left the TPM between two commands; not every chip goes on from there.
            self.crb_go(locality, REQ_IDLE)?;
        }
        let started = self.crb_go(locality, REQ_READY).and_then(|()| self.crb_send(locality, command));
        if started.is_err() {
            self.crb_idle(locality);
        }
        started
    }

    /// Whether there is a response.
    pub(crate) fn crb_ended(&self, locality: Locality) -> bool {
        self.crb(locality, CTRL_START) & 1 == 0
    }

    /// Reads the response if the command has `ended`, and cancels it otherwise.
    pub(crate) fn crb_end(
        &self,
        locality: Locality,
        ended: bool,
        response: &mut [u8],
    ) -> Result<usize, Error> {
        let result = match ended {
            true => self.crb_receive(locality, response),
            false => {
                self.set_crb(locality, CTRL_CANCEL, 1);
                // Cancelled or not, the command has failed.
                let _: Result<(), TimedOut> = poll_until(&self.clock, TIMEOUT_B, || self.crb_ended(locality));
                self.set_crb(locality, CTRL_CANCEL, 0);
                Err(Error::Timeout(Wait::Response))
            }
        };
        self.crb_idle(locality);
        result
    }

    fn crb_idle(&self, locality: Locality) {
        // The command's own outcome counts; the next command's idle request reports a chip that hangs here.
        let _: Result<(), Error> = self.crb_go(locality, REQ_IDLE);
    }

    /// Asks for a change of state, which the TPM has made once it clears the bit.
    fn crb_go(&self, locality: Locality, request: u32) -> Result<(), Error> {
        self.set_crb(locality, CTRL_REQ, request);
        // No other request is under way, so the register is zero once this one is met.
        self.wait(Wait::Ready, TIMEOUT_C, locality.page() | CTRL_REQ, |requests| {
            requests & (REQ_READY | REQ_IDLE) == 0
        })?;
        self.crb_check(locality)
    }

    fn crb_check(&self, locality: Locality) -> Result<(), Error> {
        if self.crb(locality, CTRL_STS) & STS_FATAL != 0 { Err(Error::Fatal) } else { Ok(()) }
    }

    /// The window offset of a buffer that the TPM names; it must lie within the register window, which
    /// is all that was mapped and all that cannot be other people's memory.
    fn crb_buffer(&self, locality: Locality, low: u32, high: u32, size: u32) -> Result<u32, Error> {
        let address = u64::from(self.crb(locality, high)) << 32 | u64::from(self.crb(locality, low));
        let size = self.crb(locality, size);
        address
            .checked_sub(BASE)
            .and_then(|offset| u32::try_from(offset).ok())
            .filter(|offset| offset.checked_add(size).is_some_and(|end| end <= WINDOW_SIZE))
            .ok_or(Error::Buffer { address: u32::try_from(address).unwrap_or(u32::MAX), size })
    }

    fn crb_send(&self, locality: Locality, command: &[u8]) -> Result<(), Error> {
        let at = self.crb_buffer(locality, CMD_ADDR_LOW, CMD_ADDR_HIGH, CMD_SIZE)?;
        let limit = self.crb(locality, CMD_SIZE);
        let size = u32::try_from(command.len()).unwrap_or(u32::MAX);
        if size > limit {
            return Err(Error::CommandSize { size, limit });
        }
        for (offset, byte) in (at..).zip(command) {
            self.mmio.write8(offset, *byte);
        }
        self.set_crb(locality, CTRL_START, 1);
        Ok(())
    }

    fn crb_receive(&self, locality: Locality, response: &mut [u8]) -> Result<usize, Error> {
        self.crb_check(locality)?;
        let at = self.crb_buffer(locality, RSP_ADDR_LOW, RSP_ADDR_HIGH, RSP_SIZE)?;
        let limit = usize::try_from(self.crb(locality, RSP_SIZE)).unwrap_or(usize::MAX);
        let read = |offset: u32, out: &mut [u8]| {
            for (offset, byte) in (offset..).zip(out) {
                *byte = self.mmio.read8(offset);
            }
        };
        let mut header = [0; 10];
        if limit < header.len() {
            return Err(Error::Buffer { address: (BASE as u32).saturating_add(at), size: limit as u32 });
        }
        read(at, &mut header);
        let size = response_size(&header, response.len().min(limit))?;
        if let Some((head, body)) = response.get_mut(..size).and_then(|r| r.split_first_chunk_mut()) {
            *head = header;
            read(at.saturating_add(10), body);
        }
        Ok(size)
    }
}
