//! Memory types and IA32_MISC_ENABLE, which SENTER changed: the loader says what they were, and is believed as far as the
//! CPU takes it and no further than SENTER's changes went.
//!
//! Spec: \[SDM3\] "Memory Type Range Registers (MTRRs)", "MTRR Considerations in MP Systems"; \[TXT\] "MLE Initialization
//! State".

use hv::io::Msr;

use super::{Error, Field};

/// Most pairs that the SLRT has room for.
pub const PAIRS_MAX: usize = 32;

pub(super) const MISC_ENABLE: u32 = 0x1a0;
const MTRRCAP: u32 = 0xfe;
pub(super) const DEF_TYPE: u32 = 0x2ff;
pub(super) const FIRST_PAIR: u32 = 0x200;
/// MTRRs are on.
pub(super) const ENABLED: u64 = 1 << 11;
const FIXED_ENABLED: u64 = 1 << 10;
const PAIR_VALID: u64 = 1 << 11;
/// What SENTER clears in IA32_MISC_ENABLE on the CPU that executes it: fast strings, thermal monitors, prefetchers and the
/// like. The rest is as it was.
pub(super) const MISC_CLEARED: u64 = !0xfff3_7cea & 0xffff_ffff;
/// What SENTER clears on the others.
pub(super) const MISC_CLEARED_RLP: u64 = !0xfee3_24a8 & 0xffff_ffff;

/// What is to be restored, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// IA32_MISC_ENABLE before SENTER.
    pub misc_enable: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub default_type: u64,
    /// How many pairs are used.
    pub count: usize,
    /// Bases and masks.
    pub pairs: [[u64; 2]; PAIRS_MAX],
}

const fn is_type(ty: u64) -> bool {
    matches!(ty, 0 | 1 | 4 | 5 | 6)
}

impl Saved {
    /// Checks that each value is one that the CPU takes: a reserved bit would be an exception. `phys_bits` is the width of its
    /// addresses. Pairs that the CPU has and that were not saved are off afterwards.
    ///
    /// # Errors
    /// [`Error::Saved`] with the first value that is not.
    pub fn check(self, msrs: &impl Msr, phys_bits: u32) -> Result<Self, Error> {
        let bad = |field, value| Err(Error::Saved(field, value));
        let has = msrs.rdmsr(MTRRCAP) & 0xff;
        let address = u64::MAX.checked_shl(phys_bits).map_or(u64::MAX, |above| !above) & !0xfff;
        if self.count > PAIRS_MAX || self.count as u64 > has {
            return bad(Field::MtrrCount, self.count as u64);
        }
        if self.default_type & !(ENABLED | FIXED_ENABLED | 7) != 0 || !is_type(self.default_type & 7) {
            return bad(Field::MtrrDefault, self.default_type);
        }
        for [base, mask] in self.pairs.iter().take(self.count) {
            if base & !(address | 7) != 0 || !is_type(base & 7) {
                return bad(Field::MtrrBase, *base);
            }
            // Ones from the top, then zeros: anything else is a range in pieces.
            let low = mask & address | !address & !0xfff;
            let in_pieces =
                mask & PAIR_VALID != 0 && low.leading_ones().saturating_add(low.trailing_zeros()) != 64;
            if mask & !(address | PAIR_VALID) != 0 || in_pieces {
                return bad(Field::MtrrMask, *mask);
            }
        }
        let count = PAIRS_MAX.min(has as usize);
        let saved = self.pairs.into_iter().take(self.count);
        let mut pairs = [[0; 2]; PAIRS_MAX];
        pairs.iter_mut().zip(saved).for_each(|(to, from)| *to = from);
        Ok(Self { count, pairs, ..self })
    }

    /// Writes the MTRRs; caches are off and empty.
    pub fn write(&self, msrs: &impl Msr) {
        let off = msrs.rdmsr(DEF_TYPE) & !ENABLED;
        msrs.wrmsr(DEF_TYPE, off);
        for (pair, [base, mask]) in (FIRST_PAIR..).step_by(2).zip(self.pairs.iter().take(self.count)) {
            msrs.wrmsr(pair, *base);
            msrs.wrmsr(pair.saturating_add(1), *mask);
        }
        msrs.wrmsr(DEF_TYPE, self.default_type);
    }

    /// What IA32_MISC_ENABLE is to be, of what it is now.
    pub const fn misc_enable(&self, now: u64) -> u64 {
        now & !MISC_CLEARED | self.misc_enable & MISC_CLEARED
    }

    /// Whether the registers hold what was written.
    ///
    /// # Errors
    /// [`Error::Saved`]: the CPU did not take a value.
    pub fn verify(&self, msrs: &impl Msr) -> Result<(), Error> {
        let pairs = self.pairs.iter().take(self.count);
        for (pair, [base, mask]) in (FIRST_PAIR..).step_by(2).zip(pairs) {
            if msrs.rdmsr(pair) != *base {
                return Err(Error::Saved(Field::MtrrBase, *base));
            }
            if msrs.rdmsr(pair.saturating_add(1)) != *mask {
                return Err(Error::Saved(Field::MtrrMask, *mask));
            }
        }
        match msrs.rdmsr(DEF_TYPE) == self.default_type {
            true => Ok(()),
            false => Err(Error::Saved(Field::MtrrDefault, self.default_type)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use super::*;

    struct Cpu(RefCell<HashMap<u32, u64>>);
    impl Msr for Cpu {
        fn rdmsr(&self, index: u32) -> u64 {
            self.0.borrow().get(&index).copied().unwrap_or(0)
        }
        fn wrmsr(&self, index: u32, value: u64) {
            let on = self.rdmsr(DEF_TYPE) & ENABLED != 0;
            assert!(index == DEF_TYPE || !on, "MTRR {index:#x} changed while on");
            self.0.borrow_mut().insert(index, value);
        }
    }

    fn cpu() -> Cpu {
        // SINIT's set-up: one pair on.
        Cpu(RefCell::new([(MTRRCAP, 8), (DEF_TYPE, ENABLED), (0x20e, 6), (0x20f, 0xff80_0800)].into()))
    }

    fn saved() -> Saved {
        let mut pairs = [[0; 2]; PAIRS_MAX];
        pairs[0] = [6, 0xff_8000_0800];
        pairs[1] = [0x8000_0000, 0xff_c000_0800];
        Saved { misc_enable: 0x85_0089, default_type: 0xc06, count: 2, pairs }
    }

    #[test]
    fn what_was_saved_is_restored_and_the_rest_is_off() {
        let cpu = cpu();
        let saved = saved().check(&cpu, 40).unwrap();
        saved.write(&cpu);
        assert_eq!((cpu.rdmsr(0x201), cpu.rdmsr(0x202), cpu.rdmsr(0x20f)), (0xff_8000_0800, 0x8000_0000, 0));
        assert_eq!(cpu.rdmsr(DEF_TYPE), 0xc06);
        saved.verify(&cpu).unwrap();
        cpu.0.borrow_mut().insert(0x202, 5);
        assert_eq!(saved.verify(&cpu), Err(Error::Saved(Field::MtrrBase, 0x8000_0000)));
    }

    #[test]
    fn what_a_cpu_would_not_take_is_refused() {
        let check = |change: fn(&mut Saved)| {
            let mut saved = saved();
            change(&mut saved);
            saved.check(&cpu(), 40).unwrap_err()
        };
        assert_eq!(check(|s| s.count = 9), Error::Saved(Field::MtrrCount, 9));
        assert_eq!(check(|s| s.count = 33), Error::Saved(Field::MtrrCount, 33));
        assert_eq!(check(|s| s.default_type = 2), Error::Saved(Field::MtrrDefault, 2));
        assert_eq!(check(|s| s.default_type |= 1 << 12), Error::Saved(Field::MtrrDefault, 0x1c06));
        assert_eq!(check(|s| s.pairs[0][0] = 7), Error::Saved(Field::MtrrBase, 7));
        assert_eq!(check(|s| s.pairs[0][0] = 1 << 40 | 6), Error::Saved(Field::MtrrBase, 1 << 40 | 6));
        assert_eq!(check(|s| s.pairs[1][1] = 0x1_8000_0800), Error::Saved(Field::MtrrMask, 0x1_8000_0800));
        assert_eq!(check(|s| s.pairs[1][1] |= 1 << 40), Error::Saved(Field::MtrrMask, 0x1ff_c000_0800));
        // A pair that is not used may hold anything of the right bits.
        let mut off = saved();
        off.pairs[1] = [0, 0x1000];
        assert!(off.check(&cpu(), 40).is_ok());
    }

    #[test]
    fn only_what_senter_changed_is_the_loaders_to_say() {
        assert_eq!(saved().misc_enable(0x40_0000), 0x40_0000 | 0x85_0089 & MISC_CLEARED);
        // Bit 34, which takes away no-execute, is not.
        let hostile = Saved { misc_enable: u64::MAX, ..saved() };
        assert_eq!(hostile.misc_enable(0) & 1 << 34, 0);
    }
}
