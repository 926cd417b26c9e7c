//! TXT's registers as plain memory, with the bench behind them: after each write of the machine it does what a chipset would.
//!
//! Spec: \[TXT\] "TXT Configuration Registers".

use anyhow::Result;

use super::crb::Crb;
use super::layout as at;
use super::{Target, layout};

/// The two register spaces.
pub struct Registers {
    /// What they hold, as 64-bit words.
    shadow: Vec<u64>,
    private_open: bool,
}

/// What a write led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The machine goes on.
    None,
    /// The platform is reset.
    Reset,
}

impl Registers {
    /// Takes the registers as the firmware set them up.
    pub fn new(machine: &mut impl Target) -> Result<Self> {
        let bytes = machine.read(at::PUBLIC, at::REGISTERS_END as usize)?;
        let words = bytes.chunks_exact(8).map(|b| b.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)));
        // Until SENTER the private space is closed; firmware that is no OS is not kept out.
        Ok(Self { shadow: words.collect(), private_open: true })
    }

    fn get(&self, register: u64) -> u64 {
        self.shadow[(register / 8) as usize]
    }

    /// Sets a register in both spaces.
    pub fn set(&mut self, machine: &mut impl Target, register: u64, value: u64) -> Result<()> {
        self.shadow[(register / 8) as usize] = value;
        machine.write(at::PUBLIC + register, &value.to_le_bytes())?;
        if self.private_open {
            machine.write(at::PRIVATE + register, &value.to_le_bytes())?;
        }
        Ok(())
    }

    /// TXT.ERRORCODE.
    pub fn errorcode(&self) -> u32 {
        self.get(at::ERRORCODE) as u32
    }

    /// Whether TXT.E2STS has SECRETS set.
    pub fn secrets(&self) -> bool {
        self.get(at::E2STS) & u64::from(at::E2STS_SECRETS) != 0
    }

    /// SINIT has set registers: what they hold now counts.
    pub fn renew(&mut self, machine: &mut impl Target) -> Result<()> {
        *self = Self::new(machine)?;
        Ok(())
    }

    /// The machine has written to the register at `address`.
    pub fn written(&mut self, machine: &mut impl Target, crb: &mut Crb, address: u64) -> Result<Effect> {
        let private = address < at::PUBLIC;
        let register = address & (at::REGISTERS_END - 1) & !7;
        if private && !self.private_open {
            machine.write(address & !7, &[0xff; 8])?;
            return Ok(Effect::None);
        }
        let before = self.get(register);
        let value = machine.read64(address & !7)?;
        let status = self.get(at::STS);
        let flag = |on: bool, bit: u32| if on { status | u64::from(bit) } else { status & !u64::from(bit) };
        match (private, register) {
            (_, layout::MLE_JOIN) | (true, at::ERRORCODE) => self.set(machine, register, value)?,
            (true, at::ESTS) => self.set(machine, register, before & !value)?,
            (true, at::CMD_RESET) => return Ok(Effect::Reset),
            (true, at::CMD_SECRETS | at::CMD_NO_SECRETS) => {
                let secrets = register == at::CMD_SECRETS;
                self.set(machine, at::E2STS, if secrets { at::E2STS_SECRETS.into() } else { 0 })?;
                self.set(machine, register, 0)?;
            }
            (true, at::CMD_CLOSE_PRIVATE) => {
                crb.open(machine, 2, false)?;
                let closed = flag(false, at::STS_PRIVATE_OPEN | at::STS_LOCALITY2_OPEN);
                self.set(machine, at::STS, closed)?;
                self.private_open = false;
                machine.write(at::PRIVATE, &[0xff; at::REGISTERS_END as usize])?;
            }
            (true, register) if at::CMD_LOCALITIES.contains(&register) => {
                let place = at::CMD_LOCALITIES.iter().position(|&r| r == register).unwrap_or(0);
                let (locality, open) = (1 + place as u64 / 2, place.is_multiple_of(2));
                crb.open(machine, locality, open)?;
                let bit = [at::STS_LOCALITY1_OPEN, at::STS_LOCALITY2_OPEN][place / 2];
                self.set(machine, at::STS, flag(open, bit))?;
                self.set(machine, register, 0)?;
            }
            _ => {
                // Not to be written, or without a use here.
                self.set(machine, register, before)?;
            }
        }
        Ok(Effect::None)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Memory;
    use super::*;

    fn write(
        registers: &mut Registers,
        memory: &mut Memory,
        crb: &mut Crb,
        address: u64,
        value: u64,
    ) -> Effect {
        memory.write(address, &value.to_le_bytes()).unwrap();
        registers.written(memory, crb, address).unwrap()
    }

    #[test]
    fn public_registers_cannot_be_written_but_for_the_join_block() {
        let (mut memory, mut crb) = (Memory::default(), Crb::default());
        memory.set_register(at::HEAP_BASE_REG, 0x1234).unwrap();
        let mut registers = Registers::new(&mut memory).unwrap();
        write(&mut registers, &mut memory, &mut crb, at::PUBLIC + at::HEAP_BASE_REG, 7);
        assert_eq!(memory.read64(at::PUBLIC + at::HEAP_BASE_REG).unwrap(), 0x1234);
        write(&mut registers, &mut memory, &mut crb, at::PUBLIC + at::MLE_JOIN, 7);
        assert_eq!(memory.read64(at::PRIVATE + at::MLE_JOIN).unwrap(), 7);
    }

    #[test]
    fn closing_the_private_space_closes_locality_2() {
        let (mut memory, mut crb) = (Memory::default(), Crb::default());
        let status = at::STS_PRIVATE_OPEN | at::STS_LOCALITY2_OPEN | at::STS_SENTER_DONE;
        memory.set_register(at::STS, status.into()).unwrap();
        let mut registers = Registers::new(&mut memory).unwrap();
        crb.open(&mut memory, 2, true).unwrap();
        write(&mut registers, &mut memory, &mut crb, at::PRIVATE + at::CMD_SECRETS, 1);
        assert_eq!(memory.read64(at::PUBLIC + at::E2STS).unwrap(), 2);
        write(&mut registers, &mut memory, &mut crb, at::PRIVATE + at::CMD_CLOSE_PRIVATE, 1);
        assert_eq!(memory.read32(at::PUBLIC + at::STS).unwrap(), at::STS_SENTER_DONE);
        assert_eq!(memory.read32(super::super::crb::BASE + 0x2000).unwrap(), u32::MAX);
        write(&mut registers, &mut memory, &mut crb, at::PRIVATE + at::ERRORCODE, 5);
        assert_eq!(registers.errorcode(), 0);
        let effect = write(&mut registers, &mut memory, &mut crb, at::PRIVATE + at::CMD_RESET, 1);
        assert_eq!(effect, Effect::None);
    }
}
