//! Registers of TXT.
//!
//! Spec: \[TXT\] "TXT Configuration Registers". They show twice: at [`PRIVATE`] until the private space is closed, and at
//! [`PUBLIC`].

/// The private space.
pub const PRIVATE: u64 = 0xfed2_0000;
/// The public space.
pub const PUBLIC: u64 = 0xfed3_0000;
/// Bytes of each.
pub const SPACE: u32 = 0x1_0000;

/// TXT.STS.
pub const STS: u32 = 0x000;
/// TXT.STS: a launch is in force.
pub const STS_SENTER_DONE: u64 = 1 << 0;
/// TXT.ESTS.
pub const ESTS: u32 = 0x008;
/// TXT.ESTS: TXT.RESET.STS, an error that only a power cycle clears.
pub const ESTS_RESET: u64 = 1 << 0;
/// TXT.ERRORCODE.
pub const ERRORCODE: u32 = 0x030;
/// TXT.VER.FSBIF.
pub const VER_FSBIF: u32 = 0x100;
/// TXT.DIDVID.
pub const DIDVID: u32 = 0x110;
/// TXT.VER.EMIF, in later manuals TXT.VER.QPIIF.
pub const VER_EMIF: u32 = 0x200;
/// TXT.VER.*: production fuses, which refuse modules signed for debugging.
pub const VER_PRODUCTION: u64 = 1 << 31;
/// TXT.SINIT.BASE.
pub const SINIT_BASE: u32 = 0x270;
/// TXT.SINIT.SIZE.
pub const SINIT_SIZE: u32 = 0x278;
/// TXT.HEAP.BASE.
pub const HEAP_BASE: u32 = 0x300;
/// TXT.HEAP.SIZE.
pub const HEAP_SIZE: u32 = 0x308;
