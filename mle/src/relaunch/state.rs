//! What of the guest is in the CPU alone while the MLE runs: it is kept in memory during a round.
//!
//! UNSAFETY: debug registers and XCR0.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::asm;

use heapless::Vec;
use hv::io::Msr;

use crate::cpu::native_cpuid;
use crate::metal::Msrs;

const MTRRS_MAX: usize = 32;
const MTRR_CAP: u32 = 0xfe;
const MTRR_BASE: u32 = 0x200;
const MTRRS: [u32; 12] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
    /* default type */ 0x2ff,
];
const TSC_AUX: u32 = 0xc000_0103;
const TSC_ADJUST: u32 = 0x3b;
const SPEC_CTRL: u32 = 0x48;
const XSS: u32 = 0xda0;
const DEBUGCTL: u32 = 0x1d9;
const CR4_OSXSAVE: u64 = 1 << 18;

/// Registers that a world switch leaves in the CPU, but for those of XSAVE (`docs/msrs.md`). Performance counters are lost.
pub struct CpuState {
    debug: [u64; 4],
    xcr0: Option<u64>,
    msrs: Vec<(u32, u64), { MTRRS_MAX + MTRRS.len() + 5 }>,
}

impl CpuState {
    /// As they are now.
    pub fn save(msrs: &Msrs) -> Self {
        let [_, _, features_c, features_d] = native_cpuid(1, 0);
        let [_, structured, ..] = native_cpuid(7, 0);
        let [xsave, ..] = native_cpuid(0xd, 1);
        let [.., extended] = native_cpuid(0x8000_0001, 0);
        let [_, speculation, ..] = native_cpuid(0x8000_0008, 0);
        // Bit of CPUID: IBRS, STIBP or SSBD.
        let has_spec_ctrl = speculation & (1 << 14 | 1 << 15 | 1 << 24) != 0;
        let single = [
            (DEBUGCTL, true),
            (TSC_AUX, extended & 1 << 27 != 0),
            (TSC_ADJUST, structured & 1 << 1 != 0),
            (SPEC_CTRL, has_spec_ctrl),
            (XSS, features_c & 1 << 26 != 0 && xsave & 1 << 3 != 0),
        ];
        let single = single.into_iter().filter(|(_, there)| *there).map(|(index, _)| index);
        let count = if features_d & 1 << 12 != 0 { msrs.rdmsr(MTRR_CAP) as u32 & 0xff } else { 0 };
        let variable = MTRR_BASE..MTRR_BASE.saturating_add(count.saturating_mul(2).min(MTRRS_MAX as u32));
        let fixed = MTRRS.into_iter().filter(|_| count != 0);
        let all = single.chain(variable).chain(fixed).map(|index| (index, msrs.rdmsr(index))).collect();
        let mut debug = [0; 4];
        let [d0, d1, d2, d3] = &mut debug;
        // SAFETY: reads of registers, at CPL 0.
        unsafe {
            asm!(
                "mov {}, dr0",
                "mov {}, dr1",
                "mov {}, dr2",
                "mov {}, dr3",
                out(reg) * d0,
                out(reg) * d1,
                out(reg) * d2,
                out(reg) * d3,
                options(nomem, nostack)
            );
        }
        Self { debug, xcr0: (features_c & 1 << 26 != 0).then(xcr0), msrs: all }
    }

    /// Sets them again.
    pub fn restore(&self, msrs: &Msrs) {
        for (index, value) in &self.msrs {
            msrs.wrmsr(*index, *value);
        }
        let [d0, d1, d2, d3] = self.debug;
        // SAFETY: the guest's values; no breakpoint is enabled in DR7 while the MLE runs.
        unsafe {
            asm!(
                "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                in(reg) d0, in(reg) d1, in(reg) d2, in(reg) d3, options(nomem, nostack)
            );
        }
        if let Some(value) = self.xcr0 {
            crate::cpu::set_xcr0(value);
        }
    }
}

fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the CPU has XSAVE, and CR4 allows XGETBV while it is executed.
    unsafe {
        let cr4 = x86::controlregs::cr4().bits() as u64;
        asm!(
            "mov cr4, {with}", "xgetbv", "mov cr4, {cr4}",
            with = in(reg) cr4 | CR4_OSXSAVE, cr4 = in(reg) cr4,
            in("ecx") 0, out("eax") low, out("edx") high, options(nostack)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}
