//! A VT-d unit as registers in plain memory, with the bench behind them. It translates nothing, for no device of this board asks
//! it; it answers as software expects, and keeps what it was told.
//!
//! Spec: \[VT-d\] "Register Descriptions", "Queued Invalidation Interface".

use anyhow::Result;

use super::Target;

/// Where the unit is.
pub const BASE: u64 = 0xfed9_0000;
/// Bytes of its registers.
pub const SIZE: u64 = 0x1000;

const VER: u64 = 0x00;
const CAP: u64 = 0x08;
const ECAP: u64 = 0x10;
const GCMD: u64 = 0x18;
const GSTS: u64 = 0x1c;
const CCMD: u64 = 0x28;
const FSTS: u64 = 0x34;
const PMEN: u64 = 0x64;
const PLMBASE: u64 = 0x68;
const PLMLIMIT: u64 = 0x6c;
const PHMBASE: u64 = 0x70;
const PHMLIMIT: u64 = 0x78;
const IQH: u64 = 0x80;
const IQT: u64 = 0x88;
const IQA: u64 = 0x90;
/// Translation, queue: bits that last.
const LASTING: u32 = 1 << 31 | 1 << 26;
const SET_ROOT: u32 = 1 << 30;
const PROTECT: u32 = 1 << 31;
/// Three and four levels; 2 MiB pages; protected regions; 39 bits; one fault record at 200h; page-selective invalidation.
const CAP_VALUE: u64 =
    1 << 5 | 1 << 6 | 0b110 << 8 | 38 << 16 | 0x20 << 24 | 1 << 34 | 1 << 39 | 9 << 48 | 3 << 54;
/// Coherent, with a queue; no interrupt remapping, which the emulator does not have.
const ECAP_VALUE: u64 = 1 | 1 << 1 | 0x10 << 8;

/// ACPI's table about it, without OEM's names: a unit for all devices.
///
/// Spec: \[VT-d\] "DMA Remapping Reporting Structure".
pub fn structures() -> Vec<u8> {
    const WIDTH: u8 = 38;
    let mut bytes = vec![WIDTH, 0];
    bytes.extend([0; 10]);
    // DRHD: type, length, INCLUDE_PCI_ALL, segment 0.
    bytes.extend([0, 0, 16, 0, 1, 0, 0, 0]);
    bytes.extend(BASE.to_le_bytes());
    bytes
}

/// Turns the unit on.
pub fn begin(machine: &mut impl Target) -> Result<()> {
    machine.write(BASE, &[0; 0x100])?;
    machine.write32(BASE + VER, 0x10)?;
    machine.write(BASE + CAP, &CAP_VALUE.to_le_bytes())?;
    machine.write(BASE + ECAP, &ECAP_VALUE.to_le_bytes())
}

/// What SINIT does with it: memory protected, base and size of the low and of the high region.
pub fn protect(machine: &mut impl Target, [low, high]: [(u64, u64); 2]) -> Result<()> {
    let last = |(base, size): (u64, u64)| base + size.saturating_sub(1);
    machine.write32(BASE + PLMBASE, low.0 as u32)?;
    machine.write32(BASE + PLMLIMIT, last(low) as u32)?;
    machine.write(BASE + PHMBASE, &high.0.to_le_bytes())?;
    machine.write(BASE + PHMLIMIT, &last(high).to_le_bytes())?;
    machine.write32(BASE + PMEN, PROTECT | 1)
}

/// The machine has written to the register at `at`.
pub fn written(machine: &mut impl Target, at: u64) -> Result<()> {
    let register = (at - BASE) & !3;
    let value = machine.read32(BASE + register)?;
    match register {
        GCMD => {
            let before = machine.read32(BASE + GSTS)?;
            let status = before & SET_ROOT | value & (LASTING | SET_ROOT);
            machine.write32(BASE + GSTS, status)?;
            machine.write32(BASE + GCMD, 0)
        }
        CAP..GCMD | GSTS => {
            machine.write(BASE + CAP, &CAP_VALUE.to_le_bytes())?;
            machine.write(BASE + ECAP, &ECAP_VALUE.to_le_bytes())
        }
        // Nothing is cached.
        _ if register & !7 == CCMD => machine.write32(BASE + CCMD + 4, 0),
        FSTS => machine.write32(BASE + FSTS, 0),
        PMEN => machine.write32(BASE + PMEN, value & PROTECT | value >> 31),
        _ if register & !7 == IQA => machine.write(BASE + IQH, &[0; 16]),
        IQT => run_queue(machine),
        _ => Ok(()),
    }
}

fn run_queue(machine: &mut impl Target) -> Result<()> {
    const WAIT: u64 = 5;
    const STATUS_WRITE: u64 = 1 << 5;
    let queue = machine.read64(BASE + IQA)?;
    let (base, size) = (queue & !0xfff, 0x1000 << (queue & 7));
    let end = machine.read64(BASE + IQT)? & 0x7_fff0;
    let mut at = machine.read64(BASE + IQH)? & 0x7_fff0;
    // Every descriptor but a wait asks to forget what was never kept.
    for _ in 0..size / 16 {
        if at == end {
            break;
        }
        let (low, high) = (machine.read64(base + at)?, machine.read64(base + at + 8)?);
        if low & 15 == WAIT && low & STATUS_WRITE != 0 {
            machine.write32(high & !3, (low >> 32) as u32)?;
        }
        at = (at + 16) % size;
    }
    machine.write(BASE + IQH, &at.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::super::fake::Memory;
    use super::*;

    #[test]
    fn a_wait_is_answered_and_the_queue_is_empty() {
        let mut memory = Memory::default();
        begin(&mut memory).unwrap();
        memory.write(BASE + IQA, &0x5000u64.to_le_bytes()).unwrap();
        written(&mut memory, BASE + IQA).unwrap();
        memory.write(0x5000, &[1; 16]).unwrap();
        memory.write(0x5010, &(5 | STATUS | 0x77 << 32).to_le_bytes()).unwrap();
        memory.write(0x5018, &0x6000u64.to_le_bytes()).unwrap();
        memory.write(BASE + IQT, &0x20u64.to_le_bytes()).unwrap();
        written(&mut memory, BASE + IQT).unwrap();
        assert_eq!(memory.read32(0x6000).unwrap(), 0x77);
        assert_eq!(memory.read64(BASE + IQH).unwrap(), 0x20);
    }
    const STATUS: u64 = 1 << 5;

    #[test]
    fn commands_show_in_the_status() {
        let mut memory = Memory::default();
        begin(&mut memory).unwrap();
        protect(&mut memory, [(0, 0xc000_0000), (0, 0)]).unwrap();
        assert_eq!(memory.read32(BASE + PMEN).unwrap(), 0x8000_0001);
        for (command, status) in [(1 << 30, 1 << 30), (1 << 31, 3 << 30), (0, 1 << 30)] {
            memory.write32(BASE + GCMD, command).unwrap();
            written(&mut memory, BASE + GCMD).unwrap();
            assert_eq!(memory.read32(BASE + GSTS).unwrap(), status);
        }
        memory.write32(BASE + PMEN, 0).unwrap();
        written(&mut memory, BASE + PMEN).unwrap();
        assert_eq!(memory.read32(BASE + PMEN).unwrap(), 0);
    }
}
