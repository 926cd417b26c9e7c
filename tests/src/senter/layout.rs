//! Where things of TXT are on the emulated boards, and what its registers are called.
//!
//! Spec: \[TXT\] "TXT Configuration Registers", "TXT Heap Memory". Numbers are the bench's own copy: it checks the product's.

/// Private register space; the public one has the same registers.
pub const PRIVATE: u64 = 0xfed2_0000;
/// Public register space.
pub const PUBLIC: u64 = 0xfed3_0000;
/// Where the firmware announces what it starts: beyond the registers, in the bench's own corner.
pub const MAILBOX: u64 = 0xfed3_f000;

/// Memory that devices do not reach (DPR): SINIT's, then the heap.
pub const DPR_BASE: u64 = 0x3000_0000;
/// Its size.
pub const DPR_SIZE: u64 = 0x30_0000;
/// Memory for SINIT.
pub const SINIT_BASE: u64 = DPR_BASE;
/// Its size.
pub const SINIT_SIZE: u64 = 0x4_0000;
/// The heap.
pub const HEAP_BASE: u64 = DPR_BASE + 0x10_0000;
/// Its size.
pub const HEAP_SIZE: u64 = 0x10_0000;

/// TXT.STS.
pub const STS: u64 = 0x000;
/// TXT.ESTS.
pub const ESTS: u64 = 0x008;
/// TXT.ERRORCODE.
pub const ERRORCODE: u64 = 0x030;
/// TXT.CMD.RESET.
pub const CMD_RESET: u64 = 0x038;
/// TXT.CMD.CLOSE-PRIVATE.
pub const CMD_CLOSE_PRIVATE: u64 = 0x048;
/// TXT.VER.FSBIF.
pub const VER_FSBIF: u64 = 0x100;
/// TXT.DIDVID.
pub const DIDVID: u64 = 0x110;
/// TXT.VER.EMIF.
pub const VER_EMIF: u64 = 0x200;
/// TXT.SINIT.BASE.
pub const SINIT_BASE_REG: u64 = 0x270;
/// TXT.SINIT.SIZE.
pub const SINIT_SIZE_REG: u64 = 0x278;
/// TXT.MLE.JOIN.
pub const MLE_JOIN: u64 = 0x290;
/// TXT.HEAP.BASE.
pub const HEAP_BASE_REG: u64 = 0x300;
/// TXT.HEAP.SIZE.
pub const HEAP_SIZE_REG: u64 = 0x308;
/// TXT.DPR.
pub const DPR: u64 = 0x330;
/// TXT.CMD.OPEN.LOCALITY1 and .CLOSE.LOCALITY1, then the same of locality 2.
pub const CMD_LOCALITIES: [u64; 4] = [0x380, 0x388, 0x390, 0x398];
/// TXT.PUBLIC.KEY.
pub const PUBLIC_KEY: u64 = 0x400;
/// TXT.CMD.SECRETS.
pub const CMD_SECRETS: u64 = 0x8e0;
/// TXT.CMD.NO-SECRETS.
pub const CMD_NO_SECRETS: u64 = 0x8e8;
/// TXT.E2STS.
pub const E2STS: u64 = 0x8f0;
/// All registers lie below.
pub const REGISTERS_END: u64 = 0x1000;

/// SENTER.DONE.STS.
pub const STS_SENTER_DONE: u32 = 1 << 0;
/// SEXIT.DONE.STS.
pub const STS_SEXIT_DONE: u32 = 1 << 1;
/// PRIVATE-OPEN.STS.
pub const STS_PRIVATE_OPEN: u32 = 1 << 7;
/// LOCALITY1.OPEN.STS.
pub const STS_LOCALITY1_OPEN: u32 = 1 << 15;
/// LOCALITY2.OPEN.STS.
pub const STS_LOCALITY2_OPEN: u32 = 1 << 16;
/// SECRETS.STS of TXT.E2STS.
pub const E2STS_SECRETS: u32 = 1 << 1;

/// The board's chipset: vendor, device, revision.
pub const CHIPSET: [u16; 3] = [0x8086, 0xb002, 0x0001];
/// IA32_FEATURE_CONTROL.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// Locked; VMX inside and outside of SMX; SENTER with all its parts.
pub const FEATURE_CONTROL_VALUE: u64 = 0xff07;
