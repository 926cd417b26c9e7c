//! What FIFO and CRB have in common: detection, localities, time limits, resending.

use hv::io::{Clock, Mmio, TimedOut, poll_until};

use crate::command::response_code;
use crate::error::{Error, Wait};

/// Physical address of the register window; one 4 KiB page for each locality.
///
/// Spec: \[PTP\] "TPM Register Space".
pub const BASE: u64 = 0xfed4_0000;
/// Bytes of the window: localities 0 to 4.
pub const WINDOW_SIZE: u32 = 0x5000;

/// INTERFACE_ID, the same offset in both interfaces.
const INTERFACE_ID: u32 = 0x30;
/// INTERFACE_ID: type, and whether localities beyond 0 exist.
const INTERFACE_TYPE: u32 = 0xf;
const INTERFACE_LOCALITIES: u32 = 1 << 8;

// Time limits, µs. Where TIS 1.2 gives more than PTP, its value: old chips are slower, none is hurt.
// Spec: [PTP] "Interface Timeouts", [TIS] "Timeouts".
pub(crate) const TIMEOUT_A: u64 = 750_000;
pub(crate) const TIMEOUT_B: u64 = 2_000_000;
pub(crate) const TIMEOUT_C: u64 = 750_000;
pub(crate) const TIMEOUT_D: u64 = 750_000;
/// A command, its resends included. Those sent here take milliseconds, but a firmware TPM may be busy
/// with its self test or its flash.
pub(crate) const TIMEOUT_COMMAND: u64 = 30_000_000;
/// Between two tries of a command.
const RETRY_PAUSE: u64 = 2_000;

const RC_INITIALIZE: u32 = 0x100;
/// TPM_RC_YIELDED, TPM_RC_TESTING, TPM_RC_RETRY: the command was not begun, send it again.
const RC_AGAIN: [u32; 3] = [0x908, 0x90a, 0x922];

/// A TPM locality that software may take; 4 is the CPU's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Locality {
    /// The operating system's.
    Zero = 0,
    /// A measured operating system's.
    One = 1,
    /// The MLE's: extends PCR 17–22.
    Two = 2,
    /// The launch stage's.
    Three = 3,
}

impl Locality {
    pub(crate) const ALL: [Self; 4] = [Self::Zero, Self::One, Self::Two, Self::Three];

    /// Offset of its page in the window.
    pub(crate) const fn page(self) -> u32 {
        (self as u32) << 12
    }
}

/// What to do while another locality has the TPM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contention {
    /// How long to wait for its release, µs.
    pub wait_us: u64,
    /// Take the TPM from a lower locality afterwards. The command it may be running is lost.
    pub seize: bool,
}

impl Contention {
    /// At launch: whoever left a locality active runs no longer.
    pub const LAUNCH: Self = Self { wait_us: TIMEOUT_A, seize: true };
    /// Beside a running guest, whose commands are never broken: the caller tries again while the guest runs on.
    pub const SHARED: Self = Self { wait_us: 0, seize: false };

    /// How long a request may take. A TPM that nobody has is granted within timeout A.
    pub(crate) fn limit(self, is_held: bool) -> u64 {
        if is_held { self.wait_us } else { TIMEOUT_A }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fifo,
    Crb,
}

/// A command that was sent.
pub(crate) struct Sent {
    /// When it was sent first.
    since_us: u64,
    /// When to send it again; 0 while the TPM works on it.
    again_us: u64,
}

/// The TPM's registers.
pub(crate) struct Chip<M, C> {
    pub(crate) mmio: M,
    pub(crate) clock: C,
    kind: Kind,
    /// INTERFACE_ID says that localities beyond 0 exist (CRB only).
    pub(crate) localities: bool,
    held: Option<Locality>,
}

impl<M: Mmio, C: Clock> Chip<M, C> {
    /// Finds out which interface the TPM has.
    ///
    /// Spec: \[PTP\] "Interface Identifier"; type Fh is the TIS 1.3 FIFO.
    pub(crate) fn attach(mmio: M, clock: C) -> Result<Self, Error> {
        // Both interfaces have a status byte at offset 0 that is never all ones.
        if mmio.read8(0) == 0xff {
            return Err(Error::Absent);
        }
        let id = mmio.read32(INTERFACE_ID);
        let kind = match id & INTERFACE_TYPE {
            0 | 0xf => Kind::Fifo,
            1 => Kind::Crb,
            _ => return Err(Error::Interface { id }),
        };
        Ok(Self { mmio, clock, kind, localities: id & INTERFACE_LOCALITIES != 0, held: None })
    }

    pub(crate) fn held(&self) -> Option<Locality> {
        self.held
    }

    /// Takes a locality; one held before is given back first.
    pub(crate) fn acquire(&mut self, locality: Locality, contention: Contention) -> Result<(), Error> {
        if self.held == Some(locality) {
            return Ok(());
        }
        self.release();
        match self.kind {
            Kind::Fifo => self.fifo_request(locality, contention)?,
            Kind::Crb => self.crb_request(locality, contention)?,
        }
        self.held = Some(locality);
        Ok(())
    }

    /// Gives the locality back; nothing happens when none is held.
    pub(crate) fn release(&mut self) {
        if let Some(locality) = self.held.take() {
            match self.kind {
                Kind::Fifo => self.fifo_relinquish(locality),
                Kind::Crb => self.crb_relinquish(locality),
            }
        }
    }

    /// Sends a command until the TPM gives it a final answer; that is in `response` then, `.0` bytes
    /// long, with response code `.1`.
    pub(crate) fn transact(&self, command: &[u8], response: &mut [u8]) -> Result<(usize, u32), Error> {
        let mut sent = self.send(command)?;
        loop {
            if let Some(answer) = self.poll(&mut sent, command, response)? {
                return Ok(answer);
            }
            self.clock.relax();
        }
    }

    /// Sends a command and does not wait: [`Chip::poll`] brings the answer. The locality stays held until then.
    pub(crate) fn send(&self, command: &[u8]) -> Result<Sent, Error> {
        let since_us = self.clock.now_us();
        self.start(command)?;
        Ok(Sent { since_us, again_us: 0 })
    }

    /// The final answer to a command, as of [`Chip::transact`]; none while the TPM works on it. It is sent again when the TPM asks
    /// for that. An error ends it.
    pub(crate) fn poll(
        &self,
        sent: &mut Sent,
        command: &[u8],
        response: &mut [u8],
    ) -> Result<Option<(usize, u32)>, Error> {
        let locality = self.held.ok_or(Error::LocalityNotHeld)?;
        // Before the look: a stalled CPU does not turn an answer into a timeout.
        let now_us = self.clock.now_us();
        let in_time = now_us.saturating_sub(sent.since_us) <= TIMEOUT_COMMAND;
        if sent.again_us != 0 {
            if now_us >= sent.again_us {
                sent.again_us = 0;
                self.start(command)?;
            }
            return Ok(None);
        }
        let ended = match self.kind {
            Kind::Fifo => self.fifo_ended(locality),
            Kind::Crb => self.crb_ended(locality),
        };
        let size = match self.kind {
            _ if !ended && in_time => return Ok(None),
            Kind::Fifo => self.fifo_end(locality, ended, response)?,
            Kind::Crb => self.crb_end(locality, ended, response)?,
        };
        match response_code(response.get(..size).unwrap_or_default())? {
            RC_INITIALIZE => Err(Error::NotStarted),
            rc if in_time && RC_AGAIN.contains(&rc) => {
                sent.again_us = now_us.saturating_add(RETRY_PAUSE);
                Ok(None)
            }
            rc => Ok(Some((size, rc))),
        }
    }

    /// One copy of it in an image: it is long, and there are two callers.
    #[inline(never)]
    fn start(&self, command: &[u8]) -> Result<(), Error> {
        let locality = self.held.ok_or(Error::LocalityNotHeld)?;
        match self.kind {
            Kind::Fifo => self.fifo_start(locality, command),
            Kind::Crb => self.crb_start(locality, command),
        }
    }

    /// Reads `register` until `done` says so of its value, which is returned, or the time limit. A plain
    /// function and a plain pointer: one copy of the loop in an image, and none of it in static data.
    #[inline(never)]
    pub(crate) fn wait(
        &self,
        what: Wait,
        limit: u64,
        register: u32,
        done: fn(u32) -> bool,
    ) -> Result<u32, Error> {
        let mut value = 0;
        let read = || {
            value = self.mmio.read32(register);
            done(value)
        };
        match poll_until(&self.clock, limit, read) {
            Ok(()) => Ok(value),
            Err(TimedOut) => Err(Error::Timeout(what)),
        }
    }
}

/// The size field of a response's header, if the response fits `limit`.
pub(crate) fn response_size(header: &[u8; 10], limit: usize) -> Result<usize, Error> {
    let [_, _, a, b, c, d, ..] = *header;
    let size = u32::from_be_bytes([a, b, c, d]);
    usize::try_from(size)
        .ok()
        .filter(|size| *size >= header.len() && *size <= limit)
        .ok_or(Error::ResponseSize { size, limit: u32::try_from(limit).unwrap_or(u32::MAX) })
}
