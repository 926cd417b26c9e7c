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
/// TXT.STS: the private space is open.
pub const STS_PRIVATE_OPEN: u64 = 1 << 7;
/// TXT.ESTS.
pub const ESTS: u32 = 0x008;
/// TXT.ESTS: TXT.RESET.STS, an error that only a power cycle clears.
pub const ESTS_RESET: u64 = 1 << 0;
/// TXT.ERRORCODE.
pub const ERRORCODE: u32 = 0x030;
/// TXT.ERRORCODE: SINIT succeeded.
pub const ERRORCODE_SUCCESS: u64 = 0xc000_0001;
/// TXT.CMD.RESET.
pub const CMD_RESET: u32 = 0x038;
/// TXT.CMD.CLOSE-PRIVATE.
pub const CMD_CLOSE_PRIVATE: u32 = 0x048;
/// TXT.VER.FSBIF.
pub const VER_FSBIF: u32 = 0x100;
/// TXT.DIDVID.
pub const DIDVID: u32 = 0x110;
/// TXT.VER.EMIF, in later manuals TXT.VER.QPIIF.
pub const VER_EMIF: u32 = 0x200;
/// TXT.VER.*: production fuses, which refuse modules signed for debugging.
pub const VER_PRODUCTION: u64 = 1 << 31;
/// TXT.CMD.UNLOCK-MEM-CONFIG.
pub const CMD_UNLOCK_MEM_CONFIG: u32 = 0x218;
/// TXT.SINIT.BASE.
pub const SINIT_BASE: u32 = 0x270;
/// TXT.SINIT.SIZE.
pub const SINIT_SIZE: u32 = 0x278;
/// TXT.MLE.JOIN.
pub const MLE_JOIN: u32 = 0x290;
/// TXT.HEAP.BASE.
pub const HEAP_BASE: u32 = 0x300;
/// TXT.HEAP.SIZE.
pub const HEAP_SIZE: u32 = 0x308;
/// TXT.CMD.OPEN.LOCALITY1.
pub const CMD_OPEN_LOCALITY1: u32 = 0x380;
/// TXT.CMD.CLOSE.LOCALITY1.
pub const CMD_CLOSE_LOCALITY1: u32 = 0x388;
/// TXT.CMD.SECRETS.
pub const CMD_SECRETS: u32 = 0x8e0;
/// TXT.CMD.NO-SECRETS.
pub const CMD_NO_SECRETS: u32 = 0x8e8;
/// TXT.E2STS: what was written before is done when it has been read.
pub const E2STS: u32 = 0x8f0;
