//! What is memory: the physical address space as this CPU's own registers describe it.
//!
//! Everything here was set by the gap, so it is not believed but used against the gap: an address that a register
//! sends elsewhere than to DRAM is refused, because what is measured there need not be what is read there later.

use hv::addr::PhysRange;
use hv::failure::SlbError;
use hv::io::Msr;

use super::{Failure, fail};

/// Below this the PC has its legacy areas, and the fixed-range MTRRs may split reads from writes.
const LEGACY_END: u64 = MIB;
const MIB: u64 = 1 << 20;
/// Video memory, or SMM's.
const LEGACY_VIDEO: PhysRange = match PhysRange::from_last(0xa_0000, 0xb_ffff) {
    Some(range) => range,
    None => unreachable!(),
};
/// From here to 4 GiB: I/O APIC, HPET, TPM, local APIC, firmware flash.
const FIXED_MMIO: u64 = 0xfec0_0000;

const MSR_APIC_BASE: u32 = 0x1b;
const APIC_RESET: u64 = 0xfee0_0000;
/// Bits that hold an address in the MSRs read here.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Spec: \[APM2\] "Top of Memory Registers".
const MSR_TOP_MEM: u32 = 0xc001_001a;
/// Base of the window in which the CPU turns memory accesses into PCI configuration cycles.
///
/// Spec: \[PPR\] "MMIO Configuration Base Address": bit 0 enable, bits 5:2 log2 of the MiB.
pub const MSR_MMIO_CONFIG: u32 = 0xc001_0058;
/// Base and mask MSRs that redirect a naturally aligned range, and the mask's valid bit: the two I/O range
/// registers and the SMM area TSeg.
///
/// Spec: \[APM2\] "IORRs", "SMRAM Protection".
const MASKED: [(u32, u32, u64); 3] = [
    (0xc001_0016, 0xc001_0017, 1 << 11),
    (0xc001_0018, 0xc001_0019, 1 << 11),
    (0xc001_0112, 0xc001_0113, 1 << 1),
];
const REDIRECTS: usize = MASKED.len() + 1;

/// The address space below 4 GiB.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// End of DRAM below 4 GiB, or where the fixed device registers begin.
    top: u64,
    redirected: [Option<PhysRange>; REDIRECTS],
}

impl Space {
    /// Reads the registers. All exist on every CPU with SKINIT.
    pub fn read(msr: &impl Msr) -> Result<Self, Failure> {
        let apic = msr.rdmsr(MSR_APIC_BASE) & ADDRESS;
        if apic != APIC_RESET {
            return fail(SlbError::ApicMoved, apic >> 16);
        }
        let mut redirected = [None; REDIRECTS];
        let mut add = |slot: usize, base: u64, size: u64, register: u32| {
            let range = PhysRange::new(base & ADDRESS & size.wrapping_neg(), size);
            match (range, redirected.get_mut(slot)) {
                (Some(range), Some(slot)) => *slot = Some(range),
                _ => return fail(SlbError::AddressMap, register),
            }
            Ok(())
        };
        let config = msr.rdmsr(MSR_MMIO_CONFIG);
        if config & 1 != 0 {
            add(MASKED.len(), config, MIB << (config >> 2 & 15), MSR_MMIO_CONFIG)?;
        }
        for (slot, (base, mask, valid)) in MASKED.into_iter().enumerate() {
            let selects = msr.rdmsr(mask);
            if selects & valid == 0 {
                continue;
            }
            // Ones from some bit down to the size of the range. A mask with holes selects many ranges: refused.
            let size = 1 << (selects & ADDRESS).trailing_zeros().min(63);
            if !(selects & ADDRESS).wrapping_add(size).is_power_of_two() {
                return fail(SlbError::AddressMap, mask);
            }
            add(slot, msr.rdmsr(base), size, base)?;
        }
        let top = match top_of_memory(msr) {
            0 => FIXED_MMIO,
            top => top.min(FIXED_MMIO),
        };
        Ok(Self { top, redirected })
    }

    /// Whether all of `range` is DRAM from 1 MiB up to the fixed device registers, as far as the CPU says.
    pub fn is_ram(&self, range: &PhysRange) -> bool {
        range.start() >= LEGACY_END && self.is_readable(range)
    }

    /// Whether reading `range` disturbs no device: RAM, or the parts of the first MiB that hold firmware tables.
    pub fn is_readable(&self, range: &PhysRange) -> bool {
        range.last() < self.top
            && !LEGACY_VIDEO.overlaps(range)
            && !self.redirected.iter().flatten().any(|elsewhere| elsewhere.overlaps(range))
    }
}

/// End of DRAM below 4 GiB; 0 when the CPU does not say.
pub fn top_of_memory(msr: &impl Msr) -> u64 {
    msr.rdmsr(MSR_TOP_MEM) & ADDRESS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slb::fake::Msrs;
    use proptest::prelude::*;

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    fn space(msrs: &[(u32, u64)]) -> Result<Space, Failure> {
        Space::read(&Msrs::with(msrs))
    }

    #[test]
    fn ram_ends_at_the_top_of_memory_and_begins_at_1_mib() {
        let space = space(&[(MSR_TOP_MEM, 0x8000_0000)]).unwrap();
        assert!(space.is_ram(&range(0x10_0000, 0x7ff0_0000)));
        assert!(!space.is_ram(&range(0x10_0000, 0x7ff0_0001)));
        assert!(!space.is_ram(&range(0xf_ffff, 2)));
        assert!(space.is_readable(&range(0xe_0000, 0x1000)));
        assert!(!space.is_readable(&range(0x9_ffff, 2)));
    }

    #[test]
    fn the_fixed_devices_are_no_ram_whatever_the_top_of_memory_says() {
        for top in [0, 1 << 32, ADDRESS] {
            let space = space(&[(MSR_TOP_MEM, top)]).unwrap();
            assert!(space.is_ram(&range(0xfebf_f000, 0x1000)));
            assert!(!space.is_ram(&range(0xfebf_f000, 0x1001)));
        }
    }

    #[test]
    fn a_moved_apic_is_refused() {
        let failure = space(&[(MSR_APIC_BASE, 0x1234_0900)]).unwrap_err();
        assert_eq!(failure, Failure { error: SlbError::ApicMoved, detail: 0x1234 });
    }

    #[test]
    fn what_an_msr_sends_elsewhere_is_no_ram() {
        // Two MiB of configuration space; 8 MiB of TSeg; 4 KiB of an I/O range.
        for (msrs, start, len) in [
            (&[(MSR_MMIO_CONFIG, 0x4000_0000 | 1 << 2 | 1)][..], 0x4000_0000, 0x20_0000),
            (&[(0xc001_0112, 0x7f80_0000), (0xc001_0113, 0xffff_ff80_0002)], 0x7f80_0000, 0x80_0000),
            (&[(0xc001_0018, 0x5000_0000), (0xc001_0019, 0xffff_ffff_f800)], 0x5000_0000, 0x1000),
        ] {
            let space = space(msrs).unwrap();
            assert!(space.is_ram(&range(start - 0x1000, 0x1000)));
            assert!(!space.is_ram(&range(start - 0x1000, 0x1001)));
            assert!(!space.is_ram(&range(start + len - 1, 1)));
            assert!(space.is_ram(&range(start + len, 0x1000)));
        }
    }

    #[test]
    fn a_window_that_is_off_redirects_nothing() {
        let space = space(&[(MSR_MMIO_CONFIG, 0x4000_0000), (0xc001_0016, 0x5000_0000)]).unwrap();
        assert!(space.is_ram(&range(0x4000_0000, 0x1000)));
    }

    #[test]
    fn a_mask_with_holes_is_refused() {
        let failure = space(&[(0xc001_0113, 0xff0f_ff00_0002)]).unwrap_err();
        assert_eq!(failure, Failure { error: SlbError::AddressMap, detail: 0x113 });
    }

    proptest! {
        #[test]
        fn no_msr_value_makes_it_panic(
            values in prop::collection::vec(any::<u64>(), 8), start: u64, len in 1u64..,
        ) {
            let indices = [MSR_TOP_MEM, MSR_MMIO_CONFIG, 0xc001_0016, 0xc001_0017, 0xc001_0018, 0xc001_0019, 0xc001_0112, 0xc001_0113];
            let msrs: Vec<_> = indices.into_iter().zip(values).collect();
            if let (Ok(space), Some(range)) = (space(&msrs), PhysRange::new(start, len)) {
                prop_assert!(!space.is_ram(&range) || range.last() < FIXED_MMIO);
            }
        }
    }
}
