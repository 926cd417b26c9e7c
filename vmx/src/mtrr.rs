//! Memory types by the MTRRs, as nested tables are to repeat them: under EPT the CPU looks at the tables and the guest's PAT
//! alone.
//!
//! Spec: \[SDM3\] "Memory Type Range Registers (MTRRs)", "EPT and Memory Typing".

use hv::io::Msr;
use hv::radix::MemoryType;

const MTRRCAP: u32 = 0xfe;
const DEF_TYPE: u32 = 0x2ff;
const FIRST_PAIR: u32 = 0x200;
/// Registers of fixed ranges: number, first address, log2 of the bytes that each of their eight types is for.
const FIXED: [(u32, u64, u32); 11] = [
    (0x250, 0x0, 16),
    (0x258, 0x8_0000, 14),
    (0x259, 0xa_0000, 14),
    (0x268, 0xc_0000, 12),
    (0x269, 0xc_8000, 12),
    (0x26a, 0xd_0000, 12),
    (0x26b, 0xd_8000, 12),
    (0x26c, 0xe_0000, 12),
    (0x26d, 0xe_8000, 12),
    (0x26e, 0xf_0000, 12),
    (0x26f, 0xf_8000, 12),
];
const FIXED_END: u64 = 1 << 20;
/// Most pairs of variable ranges: what IA32_MTRRCAP counts beyond this is not looked at, which costs speed.
const PAIRS: usize = 16;
const WRITE_BACK: u8 = 6;
const UNCACHED: u8 = 0;

/// A variable range.
#[derive(Clone, Copy, Debug)]
struct Variable {
    first: u64,
    last: u64,
    memory: u8,
}

/// The MTRRs of a CPU.
#[derive(Clone, Debug)]
pub struct Types {
    default: u8,
    fixed: Option<[u64; FIXED.len()]>,
    variable: [Option<Variable>; PAIRS],
}

impl Types {
    /// Reads them. `bits` are the physical address bits.
    pub fn read(msr: &impl Msr, bits: u32) -> Self {
        const ENABLED: u64 = 1 << 11;
        const FIXED_ENABLED: u64 = 1 << 10;
        const HAS_FIXED: u64 = 1 << 8;
        const VALID: u64 = 1 << 11;
        let (capabilities, control) = (msr.rdmsr(MTRRCAP), msr.rdmsr(DEF_TYPE));
        let mut types = Self { default: UNCACHED, fixed: None, variable: [None; PAIRS] };
        if control & ENABLED == 0 {
            return types;
        }
        types.default = control as u8;
        if control & FIXED_ENABLED != 0 && capabilities & HAS_FIXED != 0 {
            types.fixed = Some(FIXED.map(|(register, ..)| msr.rdmsr(register)));
        }
        let all = 1u64.checked_shl(bits).map_or(u64::MAX, |end| end.wrapping_sub(1));
        let pairs = (FIRST_PAIR..).step_by(2).zip(&mut types.variable);
        for (register, place) in pairs.take((capabilities & 0xff) as usize) {
            let (base, mask) = (msr.rdmsr(register), msr.rdmsr(register.wrapping_add(1)));
            if mask & VALID != 0 {
                let first = base & !0xfff & all;
                // A mask with holes is for more than one range: the whole of it is taken, from its base on.
                let last = first | !(mask & !0xfff) & all;
                *place = Some(Variable { first, last, memory: base as u8 });
            }
        }
        types
    }

    /// The type of the page at `at`, and the last address up to which it is the same. Only write-back and the rest are told
    /// apart: on uncached memory the guest's PAT still makes write-combining.
    pub fn at(&self, at: u64) -> (MemoryType, u64) {
        let (memory, last) = match &self.fixed {
            Some(registers) if at < FIXED_END => Self::fixed_at(registers, at),
            _ => self.variable_at(at),
        };
        (if memory == WRITE_BACK { MemoryType::WriteBack } else { MemoryType::Device }, last)
    }

    fn fixed_at(registers: &[u64; FIXED.len()], at: u64) -> (u8, u64) {
        let found = FIXED.iter().zip(registers).rev().find(|((_, first, _), _)| *first <= at);
        let Some(((_, first, log2), value)) = found else { return (UNCACHED, at | 0xfff) };
        let index = at.wrapping_sub(*first).wrapping_shr(*log2) & 7;
        let memory = value.wrapping_shr((index as u32).wrapping_mul(8)) as u8;
        (memory, at | 1u64.wrapping_shl(*log2).wrapping_sub(1))
    }

    fn variable_at(&self, at: u64) -> (u8, u64) {
        let mut last = if at < FIXED_END && self.fixed.is_none() { FIXED_END - 1 } else { u64::MAX };
        let mut memory = None;
        for range in self.variable.iter().flatten() {
            if range.first > at {
                last = last.min(range.first.wrapping_sub(1));
            } else if range.last >= at {
                last = last.min(range.last);
                // Where ranges overlap: the same type, or anything but write-back.
                memory = Some(match memory {
                    None => range.memory,
                    Some(other) if other == range.memory => other,
                    Some(_) => UNCACHED,
                });
            }
        }
        (memory.unwrap_or(self.default), last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    struct Cpu(BTreeMap<u32, u64>);
    impl Msr for Cpu {
        fn rdmsr(&self, index: u32) -> u64 {
            self.0.get(&index).copied().unwrap_or(0)
        }
        fn wrmsr(&self, _: u32, _: u64) {
            panic!("nothing is written");
        }
    }

    fn runs(types: &Types, end: u64) -> Vec<(u64, MemoryType)> {
        let mut found: Vec<(u64, MemoryType)> = Vec::new();
        let mut at = 0;
        while at < end {
            let (memory, last) = types.at(at);
            if found.last().is_none_or(|(_, m)| *m != memory) {
                found.push((at, memory));
            }
            at = last.saturating_add(1);
        }
        found
    }

    use MemoryType::{Device, WriteBack};

    #[test]
    fn a_pc_with_a_hole_below_4_gib() {
        // As OVMF leaves them: default write-back, 2 GiB from 2 GiB uncached, VGA window uncached.
        let cpu = Cpu(BTreeMap::from([
            (0xfe, 0x508),
            (0x2ff, 0xc06),
            (0x200, 0x8000_0000),
            (0x201, 0xf_8000_0800),
            (0x250, 0x0606_0606_0606_0606),
            (0x258, 0x0606_0606_0606_0606),
            (0x268, 0x0505_0505_0505_0505),
            (0x269, 0x0606_0606_0606_0606),
            (0x26a, 0x0606_0606_0606_0606),
            (0x26b, 0x0606_0606_0606_0606),
            (0x26c, 0x0606_0606_0606_0606),
            (0x26d, 0x0606_0606_0606_0606),
            (0x26e, 0x0606_0606_0606_0606),
            (0x26f, 0x0006_0606_0606_0606),
        ]));
        let expected = [
            (0, WriteBack),
            (0xa_0000, Device),
            (0xc_8000, WriteBack),
            (0xf_f000, Device),
            (0x10_0000, WriteBack),
            (0x8000_0000, Device),
            (0x1_0000_0000, WriteBack),
        ];
        assert_eq!(runs(&Types::read(&cpu, 36), 1 << 36), expected);
    }

    #[test]
    fn uncached_wins_and_so_does_anything_unclear() {
        // Default uncached; 4 GiB write-back, in it 256 MiB uncached, in it 1 MiB write-combining.
        let cpu = Cpu(BTreeMap::from([
            (0xfe, 3),
            (0x2ff, 0x800),
            (0x200, 6),
            (0x201, 0xf_0000_0800),
            (0x202, 0xf000_0000),
            (0x203, 0xf_f000_0800),
            (0x204, 0xf800_0001),
            (0x205, 0xf_fff0_0800),
            // Not counted by the capabilities.
            (0x206, 0x1_0000_0006),
            (0x207, 0xf_0000_0800),
        ]));
        let expected = [(0, WriteBack), (0xf000_0000, Device)];
        assert_eq!(runs(&Types::read(&cpu, 36), 1 << 36), expected);
    }

    #[test]
    fn mtrrs_that_are_off_make_everything_uncached() {
        let cpu = Cpu(BTreeMap::from([(0xfe, 0x508), (0x2ff, 6)]));
        assert_eq!(runs(&Types::read(&cpu, 36), 1 << 36), [(0, Device)]);
    }
}
