//! The command response buffer interface of a TPM.
//!
//! Spec: \[PTP\] "CRB Interface", state transition table.

use std::cell::{RefCell, RefMut};
use std::rc::Rc;

use hv::io::Mmio;

use super::FakeTpm;
use crate::transport::BASE;

/// What the interface does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrbFault {
    /// Nothing.
    None,
    /// LOC_STATE is never valid.
    NeverValid,
    /// No request and no seize is granted.
    NeverGrants,
    /// CTRL_REQ never clears.
    NeverReady,
    /// CTRL_STS shows a fatal error.
    Fatal,
    /// START never clears, CANCEL or not.
    NeverAnswers,
    /// START clears only when the command is cancelled.
    OnlyCancels,
    /// The command buffer's address.
    CommandAt(u64),
    /// The command buffer's size.
    CommandSize(u32),
    /// The response buffer's address.
    ResponseAt(u64),
    /// The response buffer's size.
    ResponseSize(u32),
}

/// The model's inside, for the test to set and look at.
pub struct CrbState {
    /// The TPM behind the interface.
    pub tpm: FakeTpm,
    /// What goes wrong.
    pub fault: CrbFault,
    /// The locality that has the TPM.
    pub active: Option<u8>,
    /// Whether there are localities beyond 0; the pages of QEMU's model read as zeros beyond it.
    pub localities: bool,
    /// Seizes that took place.
    pub seizes: u32,
    /// Commands cancelled.
    pub cancels: u32,
    /// Whether the TPM is idle.
    pub idle: bool,
    running: u32,
    buffer: Vec<u8>,
}

const BUFFER: u32 = 0x80;
const BUFFER_SIZE: u32 = 0xf80;

/// A CRB TPM; clones are the same device.
#[derive(Clone)]
pub struct Crb(Rc<RefCell<CrbState>>);

impl Crb {
    /// A working interface with five localities, none active, TPM idle.
    pub fn new(tpm: FakeTpm) -> Self {
        Self(Rc::new(RefCell::new(CrbState {
            tpm,
            fault: CrbFault::None,
            active: None,
            localities: true,
            seizes: 0,
            cancels: 0,
            idle: true,
            running: 0,
            buffer: vec![0; BUFFER_SIZE as usize],
        })))
    }

    /// The inside.
    pub fn state(&self) -> RefMut<'_, CrbState> {
        self.0.borrow_mut()
    }
}

impl CrbState {
    /// The locality that a register belongs to and its offset in the page; none where nothing answers.
    fn split(&self, offset: u32) -> Option<(u8, u32)> {
        let locality = (offset >> 12) as u8;
        (locality == 0 || self.localities).then_some((locality, offset & 0xfff))
    }

    fn read(&mut self, locality: u8, register: u32) -> u32 {
        let command_at = BASE + (u64::from(locality) << 12) + u64::from(BUFFER);
        match register {
            0x00 => {
                let (number, assigned) = self.active.map_or((0, 0), |active| (u32::from(active), 1));
                u32::from(self.fault != CrbFault::NeverValid) << 7 | number << 2 | assigned << 1
            }
            0x0c => u32::from(self.active == Some(locality)),
            0x30 => 1 | u32::from(self.localities) << 8,
            _ if self.active != Some(locality) => u32::MAX,
            0x40 => u32::from(self.fault == CrbFault::NeverReady) * 3,
            0x44 => u32::from(self.idle) << 1 | u32::from(self.fault == CrbFault::Fatal),
            0x4c => {
                if self.running == 1 && !matches!(self.fault, CrbFault::NeverAnswers | CrbFault::OnlyCancels)
                {
                    self.run(locality);
                }
                self.running = self.running.saturating_sub(u32::from(self.running > 1));
                u32::from(self.running != 0)
            }
            0x58 => {
                if let CrbFault::CommandSize(size) = self.fault {
                    size
                } else {
                    BUFFER_SIZE
                }
            }
            0x5c => (if let CrbFault::CommandAt(at) = self.fault { at } else { command_at }) as u32,
            0x60 => ((if let CrbFault::CommandAt(at) = self.fault { at } else { command_at }) >> 32) as u32,
            0x64 => {
                if let CrbFault::ResponseSize(size) = self.fault {
                    size
                } else {
                    BUFFER_SIZE
                }
            }
            0x68 => (if let CrbFault::ResponseAt(at) = self.fault { at } else { command_at }) as u32,
            0x6c => ((if let CrbFault::ResponseAt(at) = self.fault { at } else { command_at }) >> 32) as u32,
            _ => panic!("read32 of register {register:#x}"),
        }
    }

    fn run(&mut self, locality: u8) {
        let size = u32::from_be_bytes(self.buffer[2..6].try_into().unwrap()) as usize;
        let command = self.buffer[..size].to_vec();
        let response = self.tpm.execute(locality, &command);
        self.buffer[..response.len()].copy_from_slice(&response);
        self.running = 0;
    }

    fn write(&mut self, locality: u8, register: u32, value: u32) {
        let deaf = self.fault == CrbFault::NeverGrants;
        match (register, value) {
            (0x08, 1) if self.active.is_none() && !deaf => self.active = Some(locality),
            (0x08, 2) if self.active == Some(locality) => self.active = None,
            (0x08, 4) if !deaf && self.active.is_some_and(|active| active < locality) => {
                self.seizes += 1;
                self.active = Some(locality);
                self.idle = true;
            }
            (0x08, 1 | 2 | 4) => {}
            // Writes by a locality that is not active are ignored.
            _ if self.active != Some(locality) => {}
            (0x40, 1) => {
                assert!(self.idle, "cmdReady from Idle only: not every chip takes it elsewhere");
                self.idle = false;
            }
            (0x40, 2) => (self.idle, self.running) = (true, 0),
            (0x48, 1) => {
                self.cancels += 1;
                if self.fault == CrbFault::OnlyCancels {
                    self.running = 0;
                }
            }
            (0x48, 0) => {}
            (0x4c, 1) => {
                assert!(!self.idle, "START in Idle");
                self.running = 4;
            }
            _ => panic!("write32 of {value:#x} to register {register:#x}"),
        }
    }
}

impl Mmio for Crb {
    fn read8(&self, offset: u32) -> u8 {
        let mut state = self.state();
        match state.split(offset) {
            Some((_, register @ BUFFER..0x1000)) => state.buffer[(register - BUFFER) as usize],
            Some((locality, 0)) => state.read(locality, 0) as u8,
            other => panic!("read8 of {other:?}"),
        }
    }

    fn read32(&self, offset: u32) -> u32 {
        let mut state = self.state();
        state.split(offset).map_or(0, |(locality, register)| state.read(locality, register))
    }

    fn read64(&self, offset: u32) -> u64 {
        panic!("read64({offset:#x})")
    }

    fn write8(&self, offset: u32, value: u8) {
        let mut state = self.state();
        let (locality, register) = state.split(offset).expect("a page that exists");
        assert_eq!(state.active, Some(locality), "buffer written by the active locality");
        assert!(!state.idle && state.running == 0, "buffer written while the TPM does not take commands");
        state.buffer[(register - BUFFER) as usize] = value;
    }

    fn write32(&self, offset: u32, value: u32) {
        let mut state = self.state();
        let (locality, register) = state.split(offset).expect("a page that exists");
        state.write(locality, register, value);
    }

    fn write64(&self, offset: u32, value: u64) {
        panic!("write64({offset:#x}, {value:#x})")
    }
}
