//! SENTER, played by the bench: no emulator implements it.
//!
//! [`sinit`] is what the CPU and SINIT do with memory, TPM and registers, for any emulator that a [`Target`] stands for; [`acm`] is
//! the module, with the code that the emulated CPUs run.

pub mod acm;
pub mod crb;
pub mod layout;
pub mod probe;
pub mod registers;
pub mod sinit;
pub mod vt_d;

use anyhow::Result;
use clap::ValueEnum;

use crate::board::Board as Records;
use layout as at;

/// A machine that stands still.
pub trait Target {
    /// Physical memory and registers of devices.
    fn read(&mut self, at: u64, length: usize) -> Result<Vec<u8>>;

    /// Writes there.
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()>;

    /// A 32-bit word.
    fn read32(&mut self, at: u64) -> Result<u32> {
        Ok(u32::from_le_bytes(self.read(at, 4)?.as_slice().try_into()?))
    }

    /// A 64-bit word.
    fn read64(&mut self, at: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.read(at, 8)?.as_slice().try_into()?))
    }

    /// Writes a 32-bit word.
    fn write32(&mut self, at: u64, value: u32) -> Result<()> {
        self.write(at, &value.to_le_bytes())
    }

    /// Sets a TXT register, which both register spaces show.
    fn set_register(&mut self, register: u64, value: u64) -> Result<()> {
        self.write(at::PRIVATE + register, &value.to_le_bytes())?;
        self.write(at::PUBLIC + register, &value.to_le_bytes())
    }
}

/// What goes wrong at SENTER or around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// The MLE's page tables are not in rising order.
    MleTables,
    /// A page of the MLE lies where there is no memory.
    MleHole,
    /// OsMleData says that it is larger than the heap.
    HeapSize,
    /// The protected memory ends before the MLE.
    PmrUncovering,
    /// An earlier boot left its error.
    StaleError,
    /// The DMAR changes in ACPI's memory after SINIT has copied it.
    DmarChanged,
    /// The other CPUs never join.
    RlpMissing,
}

/// TXT.ERRORCODE of an earlier boot: SINIT's, class 9 (heap), major 2.
pub const STALE_ERROR: u32 = 0xc000_0891;

/// What the BIOS of a board with TXT does: `tests/platform` does it in its place.
pub fn firmware(records: &mut Records, cpus: u32, fault: Option<Fault>) {
    records.reserve(at::DPR_BASE, at::DPR_SIZE);
    let dpr = (at::DPR_BASE + at::DPR_SIZE) | ((at::DPR_SIZE >> 20) << 4) | 1;
    let chipset = at::CHIPSET.iter().rev().fold(0u64, |all, &id| all << 16 | u64::from(id));
    let error = if fault == Some(Fault::StaleError) { STALE_ERROR } else { 0 };
    let registers = [
        (at::ERRORCODE, error.into()),
        (at::VER_FSBIF, 0x8000_0001),
        (at::VER_EMIF, 0x8000_0001),
        (at::DIDVID, chipset),
        (at::SINIT_BASE_REG, at::SINIT_BASE),
        (at::SINIT_SIZE_REG, at::SINIT_SIZE),
        (at::HEAP_BASE_REG, at::HEAP_BASE),
        (at::HEAP_SIZE_REG, at::HEAP_SIZE),
        (at::DPR, dpr),
    ];
    for space in [at::PRIVATE, at::PUBLIC] {
        for (register, value) in registers {
            records.write(space + register, &value.to_le_bytes());
        }
        records.write(space + at::PUBLIC_KEY, &[0x4b; 32]);
    }
    records.write(at::HEAP_BASE, &bios_data(cpus));
    records.msr(at::FEATURE_CONTROL, at::FEATURE_CONTROL_VALUE);
    records.announce(at::MAILBOX);
}

/// Spec: \[TXT\] "BIOS Data Format", version 6.
pub fn bios_data(cpus: u32) -> Vec<u8> {
    let mut data = Vec::new();
    data.extend_from_slice(&6u32.to_le_bytes());
    // No SINIT of the BIOS's own, no launch control policy.
    data.extend_from_slice(&[0; 20]);
    data.extend_from_slice(&cpus.to_le_bytes());
    data.extend_from_slice(&[0; 8]);
    // The end of the extended elements.
    data.extend_from_slice(&[0, 0, 0, 0, 8, 0, 0, 0]);
    data.resize(data.len().next_multiple_of(8), 0);
    let size = data.len() as u64 + 8;
    [size.to_le_bytes().to_vec(), data].concat()
}

#[cfg(test)]
pub(crate) mod fake {
    use std::collections::BTreeMap;

    use super::*;

    /// Memory that is zero where nobody wrote.
    #[derive(Default)]
    pub struct Memory(BTreeMap<u64, u8>);

    impl Target for Memory {
        fn read(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
            Ok((at..at + length as u64).map(|at| self.0.get(&at).copied().unwrap_or(0)).collect())
        }
        fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
            self.0.extend((at..).zip(bytes.iter().copied()));
            Ok(())
        }
    }
}
