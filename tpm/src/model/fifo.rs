//! The FIFO interface of a TPM.
//!
//! Spec: \[PTP\] "FIFO Interface", state transition table.

use std::cell::{RefCell, RefMut};
use std::rc::Rc;

use hv::io::Mmio;

use super::FakeTpm;

/// What the interface does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FifoFault {
    /// Nothing.
    None,
    /// No TPM: every read is all ones.
    Absent,
    /// This locality's page reads all ones.
    Closed(u8),
    /// ACCESS never becomes valid.
    NeverValid,
    /// No request and no seize is granted.
    NeverGrants,
    /// commandReady is never set.
    NeverReady,
    /// stsValid is never set again once bytes have been written.
    NeverStatus,
    /// burstCount is always zero.
    NoBurst,
    /// expect is never set.
    ExpectsNothing,
    /// expect is always set.
    ExpectsMore,
    /// A command never ends.
    NeverAnswers,
    /// dataAvail drops after so many bytes of a response.
    StopsAfter(usize),
    /// dataAvail stays after the last byte.
    GoesOn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Ready,
    Reception,
    /// Polls until it is done.
    Execution(u32),
    Completion,
}

/// The model's inside, for the test to set and look at.
pub struct FifoState {
    /// The TPM behind the interface.
    pub tpm: FakeTpm,
    /// What goes wrong.
    pub fault: FifoFault,
    /// The locality that has the TPM.
    pub active: Option<u8>,
    /// Localities that ask for it.
    pub requests: [bool; 5],
    /// Seizes that took place.
    pub seizes: u32,
    /// INTERFACE_ID.
    pub interface_id: u32,
    /// The holder gives the TPM back after so many more looks at ACCESS.
    pub holder_leaves_after: Option<u32>,
    phase: Phase,
    command: Vec<u8>,
    response: Vec<u8>,
    read: usize,
    burst: usize,
}

/// Bytes moved between two looks at burstCount.
const BURST: usize = 7;

/// A FIFO TPM; clones are the same device.
#[derive(Clone)]
pub struct Fifo(Rc<RefCell<FifoState>>);

impl Fifo {
    /// A working interface, no locality active, TPM idle.
    pub fn new(tpm: FakeTpm) -> Self {
        Self(Rc::new(RefCell::new(FifoState {
            tpm,
            fault: FifoFault::None,
            active: None,
            requests: [false; 5],
            seizes: 0,
            interface_id: 0x2100,
            holder_leaves_after: None,
            phase: Phase::Idle,
            command: Vec::new(),
            response: Vec::new(),
            read: 0,
            burst: 0,
        })))
    }

    /// The inside.
    pub fn state(&self) -> RefMut<'_, FifoState> {
        self.0.borrow_mut()
    }

    /// Leaves a response that nobody has read, as an interrupted driver does.
    pub fn leave_response(&self) {
        let mut state = self.state();
        state.phase = Phase::Completion;
        state.response = vec![0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0];
    }

    /// Whether the TPM waits for nobody.
    pub fn is_idle(&self) -> bool {
        matches!(self.state().phase, Phase::Idle | Phase::Ready)
    }
}

impl FifoState {
    fn access(&mut self, locality: u8) -> u8 {
        if let Some(left) = &mut self.holder_leaves_after {
            if *left == 0 {
                self.holder_leaves_after = None;
                self.relinquish();
            } else {
                *left -= 1;
            }
        }
        let mut access = 1;
        access |= u8::from(self.fault != FifoFault::NeverValid) << 7;
        access |= u8::from(self.active == Some(locality)) << 5;
        access | u8::from(self.requests[usize::from(locality)]) << 1
    }

    fn set_access(&mut self, locality: u8, value: u8) {
        assert_eq!(value.count_ones(), 1, "one bit at a time in ACCESS");
        let deaf = self.fault == FifoFault::NeverGrants;
        match value {
            0x20 if self.active == Some(locality) => self.relinquish(),
            0x20 => self.requests[usize::from(locality)] = false,
            0x08 if !deaf && self.active.is_some_and(|active| active < locality) => {
                self.seizes += 1;
                self.phase = Phase::Idle;
                self.active = Some(locality);
            }
            0x08 => {}
            0x02 if self.active.is_none() && !deaf => self.active = Some(locality),
            0x02 => self.requests[usize::from(locality)] = self.active != Some(locality),
            _ => panic!("ACCESS = {value:#x}"),
        }
    }

    /// The highest locality that asks is next.
    fn relinquish(&mut self) {
        self.phase = Phase::Idle;
        self.active = (0..5).rev().find(|locality| self.requests[usize::from(*locality)]);
        if let Some(next) = self.active {
            self.requests[usize::from(next)] = false;
        }
    }

    fn expects(&self) -> bool {
        match self.fault {
            FifoFault::ExpectsNothing => false,
            FifoFault::ExpectsMore => true,
            _ => {
                let size = self.command.get(2..6).map(|size| u32::from_be_bytes(size.try_into().unwrap()));
                size.is_none_or(|size| self.command.len() < size as usize)
            }
        }
    }

    /// Bytes of the response that the driver may still read.
    fn available(&self) -> usize {
        let end = match self.fault {
            FifoFault::StopsAfter(count) => count,
            FifoFault::GoesOn => usize::MAX,
            _ => self.response.len(),
        };
        if self.phase == Phase::Completion { end.saturating_sub(self.read) } else { 0 }
    }

    fn sts(&mut self) -> u32 {
        if let Phase::Execution(polls) = self.phase {
            if polls > 0 {
                self.phase = Phase::Execution(polls - 1);
            } else if self.fault != FifoFault::NeverAnswers {
                let (locality, command) = (self.active.unwrap(), std::mem::take(&mut self.command));
                self.response = self.tpm.execute(locality, &command);
                (self.read, self.burst, self.phase) = (0, 0, Phase::Completion);
            }
        }
        // After a burst the count is zero for one look, as the chip empties its buffer.
        let burst = if self.fault == FifoFault::NoBurst { 0 } else { self.burst };
        if self.burst == 0 {
            self.burst = if self.phase == Phase::Completion { BURST.min(self.available()) } else { BURST };
        }
        let valid = !(self.fault == FifoFault::NeverStatus && self.phase == Phase::Reception);
        let ready = self.phase == Phase::Ready && self.fault != FifoFault::NeverReady;
        (burst as u32) << 8
            | u32::from(valid) << 7
            | u32::from(ready) << 6
            | u32::from(self.available() != 0) << 4
            | u32::from(self.phase == Phase::Reception && self.expects()) << 3
    }

    fn set_sts(&mut self, value: u8) {
        match (value, self.phase) {
            (0x40, Phase::Idle) => self.phase = Phase::Ready,
            (0x40, Phase::Ready) => {}
            (0x40, _) => self.phase = Phase::Idle,
            (0x20, Phase::Reception) => {
                assert!(!self.expects(), "tpmGo before the command is complete");
                self.phase = Phase::Execution(3);
            }
            other => panic!("STS = {value:#x} in phase {:?}", other.1),
        }
        self.burst = 0;
        if value == 0x40 {
            self.command.clear();
        }
    }

    fn spend_burst(&mut self) {
        self.burst = self.burst.checked_sub(1).expect("no more bytes than burstCount");
    }
}

/// The locality's number and the offset in its page.
fn split(offset: u32) -> (u8, u32) {
    ((offset >> 12) as u8, offset & 0xfff)
}

impl Mmio for Fifo {
    fn read8(&self, offset: u32) -> u8 {
        let (locality, register) = split(offset);
        let mut state = self.state();
        if state.fault == FifoFault::Absent || state.fault == FifoFault::Closed(locality) {
            return 0xff;
        }
        match register {
            0 => state.access(locality),
            0x24 => {
                assert_eq!(state.active, Some(locality), "data read by the active locality");
                assert!(state.available() != 0, "data read without dataAvail");
                state.spend_burst();
                let byte = state.response.get(state.read).copied().unwrap_or(0xff);
                state.read += 1;
                byte
            }
            _ => panic!("read8({offset:#x})"),
        }
    }

    fn read32(&self, offset: u32) -> u32 {
        let (locality, register) = split(offset);
        let mut state = self.state();
        if state.fault == FifoFault::Absent || state.fault == FifoFault::Closed(locality) {
            return u32::MAX;
        }
        match register {
            0x30 => state.interface_id,
            // Registers of a locality that is not active read as ones.
            0x18 if state.active != Some(locality) => u32::MAX,
            0x18 => state.sts(),
            _ => panic!("read32({offset:#x})"),
        }
    }

    fn read64(&self, offset: u32) -> u64 {
        panic!("read64({offset:#x})")
    }

    fn write8(&self, offset: u32, value: u8) {
        let (locality, register) = split(offset);
        let mut state = self.state();
        match register {
            0 => state.set_access(locality, value),
            // Writes by a locality that is not active are ignored.
            _ if state.active != Some(locality) => {}
            0x18 => state.set_sts(value),
            0x24 => {
                assert!(matches!(state.phase, Phase::Ready | Phase::Reception), "data in {:?}", state.phase);
                state.phase = Phase::Reception;
                state.spend_burst();
                state.command.push(value);
            }
            _ => panic!("write8({offset:#x}, {value:#x})"),
        }
    }

    fn write32(&self, offset: u32, value: u32) {
        panic!("write32({offset:#x}, {value:#x})")
    }

    fn write64(&self, offset: u32, value: u64) {
        panic!("write64({offset:#x}, {value:#x})")
    }
}
