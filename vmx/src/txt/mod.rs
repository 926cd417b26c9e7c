//! Trusted Execution Technology: what loader, MLE and tools know of it, as data.

pub mod acm;
pub mod heap;
pub mod pages;
pub mod regs;

/// GETSEC leaves, in EAX.
///
/// Spec: \[SDM2\] "GETSEC Leaf Functions".
pub mod getsec {
    /// What there is, as a mask.
    pub const CAPABILITIES: u32 = 0;
    /// The launch.
    pub const SENTER: u32 = 4;
    /// Limits, one at a time.
    pub const PARAMETERS: u32 = 6;

    /// CAPABILITIES: the chipset has TXT.
    pub const CHIPSET: u32 = 1 << 0;
    /// CAPABILITIES: the leaves that a launch and its end need: SENTER, SEXIT, PARAMETERS, SMCTRL, WAKEUP.
    pub const LEAVES: u32 = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8;

    /// PARAMETERS: the largest authenticated code module, in bytes, when that is what EAX tells. Spec: \[SDM2\] "GETSEC\[PARAMETERS\]",
    /// parameter type 2.
    pub const fn module_max(eax: u32) -> Option<u32> {
        if eax & 0x1f == 2 { Some(eax & !0x1f) } else { None }
    }
}
