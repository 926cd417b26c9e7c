//! A TPM's command response buffer as registers in plain memory, behind which the bench puts a real TPM: after each write of the
//! machine to a register the bench does what the write asks for.
//!
//! Spec: \[PTP\] "CRB Interface".

use anyhow::Result;

use super::Target;

/// Locality 0's page; the others follow.
pub const BASE: u64 = 0xfed4_0000;
/// Registers of a page; behind them is the buffer, which nobody needs to watch.
pub const REGISTERS: u64 = 0x80;
/// Localities that software may have.
pub const LOCALITIES: u64 = 4;
const PAGE: u64 = 0x1000;
const BUFFER: u64 = 0x80;
const BUFFER_SIZE: u32 = 0xf80;

const LOC_STATE: u64 = 0x00;
/// TPM_LOC_CTRL_0.
pub const LOC_CTRL: u64 = 0x08;
const LOC_STS: u64 = 0x0c;
const INTERFACE_ID: u64 = 0x30;
const CTRL_REQ: u64 = 0x40;
const CTRL_STS: u64 = 0x44;
const CTRL_START: u64 = 0x4c;
const CMD_SIZE: u64 = 0x58;
const CMD_ADDRESS: u64 = 0x5c;
const RSP_SIZE: u64 = 0x64;
const RSP_ADDRESS: u64 = 0x68;
/// CRB, version 1; localities 0 to 4; CRB is offered and chosen.
const ID: u32 = 1 | 1 << 4 | 1 << 8 | 1 << 14 | 1 << 17;
const VALID_ESTABLISHED: u32 = 0x81;
const ASSIGNED: u32 = 1 << 1;
const IDLE: u32 = 1 << 1;

/// The interface.
#[derive(Default)]
pub struct Crb {
    active: Option<u64>,
    open: [bool; LOCALITIES as usize],
}

/// Runs one command at a locality.
pub trait Chip {
    /// Gives the response.
    fn command(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>>;
}

impl Crb {
    /// Shows or hides a locality's page. Hidden it reads as all ones.
    pub fn open(&mut self, machine: &mut impl Target, locality: u64, open: bool) -> Result<()> {
        let page = BASE + locality * PAGE;
        self.open[locality as usize] = open;
        if !open {
            if self.active == Some(locality) {
                self.active = None;
                self.show(machine)?;
            }
            return machine.write(page, &[0xff; REGISTERS as usize]);
        }
        machine.write(page, &[0; REGISTERS as usize])?;
        let address = (page + BUFFER).to_le_bytes();
        machine.write32(page + INTERFACE_ID, ID)?;
        machine.write32(page + CTRL_STS, IDLE)?;
        machine.write32(page + CMD_SIZE, BUFFER_SIZE)?;
        machine.write(page + CMD_ADDRESS, &address)?;
        machine.write32(page + RSP_SIZE, BUFFER_SIZE)?;
        machine.write(page + RSP_ADDRESS, &address)?;
        self.show(machine)
    }

    /// All localities see who has the TPM.
    fn show(&self, machine: &mut impl Target) -> Result<()> {
        for locality in (0..LOCALITIES).filter(|&l| self.open[l as usize]) {
            let page = BASE + locality * PAGE;
            let holder = self.active.map_or(0, |active| ASSIGNED | (active as u32) << 2);
            machine.write32(page + LOC_STATE, VALID_ESTABLISHED | holder)?;
            machine.write32(page + LOC_STS, u32::from(self.active == Some(locality)))?;
        }
        Ok(())
    }

    /// The machine has written to the register at `at`.
    pub fn written(&mut self, machine: &mut impl Target, chip: &mut impl Chip, at: u64) -> Result<()> {
        let locality = (at - BASE) / PAGE;
        let page = BASE + locality * PAGE;
        if !self.open.get(locality as usize).copied().unwrap_or(false) {
            return machine.write(page, &[0xff; REGISTERS as usize]);
        }
        let register = (at - page) & !3;
        let value = machine.read32(page + register)?;
        let active = self.active == Some(locality);
        match register {
            LOC_CTRL => {
                machine.write32(page + LOC_CTRL, 0)?;
                let seize = value & 4 != 0 && self.active.is_none_or(|active| active < locality);
                if value & 2 != 0 && active {
                    self.active = None;
                } else if seize || value & 1 != 0 && self.active.is_none() {
                    self.active = Some(locality);
                }
                self.show(machine)?;
            }
            CTRL_REQ => {
                machine.write32(page + CTRL_REQ, 0)?;
                if active && value & 3 != 0 {
                    machine.write32(page + CTRL_STS, if value & 2 != 0 { IDLE } else { 0 })?;
                }
            }
            CTRL_START if value & 1 != 0 => {
                if active {
                    let size = machine.read(page + BUFFER + 2, 4)?;
                    let size = u32::from_be_bytes(size.as_slice().try_into()?).clamp(10, BUFFER_SIZE);
                    let command = machine.read(page + BUFFER, size as usize)?;
                    let response = chip.command(locality as u8, &command)?;
                    machine.write(page + BUFFER, &response)?;
                }
                machine.write32(page + CTRL_START, 0)?;
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Memory;
    use super::*;

    struct Echo;
    impl Chip for Echo {
        fn command(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>> {
            Ok([&[locality], command].concat())
        }
    }

    #[test]
    fn a_command_goes_to_the_tpm_at_the_locality_that_was_granted() {
        let (mut memory, mut crb) = (Memory::default(), Crb::default());
        crb.open(&mut memory, 0, true).unwrap();
        crb.open(&mut memory, 2, true).unwrap();
        let two = BASE + 2 * PAGE;
        let mut write = |memory: &mut Memory, register, value| {
            memory.write32(two + register, value).unwrap();
            crb.written(memory, &mut Echo, two + register).unwrap();
        };
        write(&mut memory, CTRL_START, 1);
        assert_eq!(memory.read32(two + BUFFER).unwrap(), 0);
        write(&mut memory, LOC_CTRL, 1);
        assert_eq!(memory.read32(two + LOC_STS).unwrap(), 1);
        assert_eq!(memory.read32(BASE + LOC_STATE).unwrap(), 0x8b);
        write(&mut memory, CTRL_REQ, 1);
        let command = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7e, 5, 6];
        memory.write(two + BUFFER, &command).unwrap();
        write(&mut memory, CTRL_START, 1);
        assert_eq!(memory.read(two + BUFFER, 13).unwrap(), [&[2], &command[..]].concat());
        assert_eq!(memory.read32(two + CTRL_START).unwrap(), 0);
    }

    #[test]
    fn a_closed_locality_is_not_there() {
        let (mut memory, mut crb) = (Memory::default(), Crb::default());
        crb.open(&mut memory, 0, true).unwrap();
        crb.open(&mut memory, 2, false).unwrap();
        memory.write32(BASE + 2 * PAGE + LOC_CTRL, 1).unwrap();
        crb.written(&mut memory, &mut Echo, BASE + 2 * PAGE + LOC_CTRL).unwrap();
        assert_eq!(memory.read32(BASE + 2 * PAGE + LOC_STS).unwrap(), u32::MAX);
        assert_eq!(memory.read32(BASE + LOC_STATE).unwrap(), 0x81);
    }
}
