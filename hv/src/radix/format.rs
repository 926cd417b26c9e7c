//! Entry layouts: one constant table of bits per kind of page table.

use super::Error;

bitflags::bitflags! {
    /// What a mapping allows.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Rights: u8 {
        /// Read.
        const READ = 1;
        /// Write.
        const WRITE = 2;
        /// Fetch instructions. Device tables know no such right.
        const EXEC = 4;
    }
}

/// How accesses through a mapping are cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryType {
    /// Write-back; whoever uses the mapping may ask for less (guest PAT, no-snoop DMA).
    WriteBack,
    /// Device registers. EPT and the MLE's own tables say uncached. NPT says nothing: there the MTRRs
    /// have the last word, and the guest's PAT can still make a frame buffer write-combining.
    Device,
    /// Write-back, and the user of the mapping cannot weaken it where the format has a bit for that: EPT
    /// "ignore PAT", AMD-Vi force-coherent, VT-d snoop (a reserved bit unless ECAP.SC is set: the caller
    /// knows). NPT has none and takes it as write-back.
    Coherent,
}

/// Size of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PageSize {
    /// 4 KiB.
    Size4K = 1,
    /// 2 MiB.
    Size2M = 2,
    /// 1 GiB.
    Size1G = 3,
}

impl PageSize {
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        span(self.level())
    }

    /// Level of the table whose leaves have this size; 1 is the lowest.
    pub(super) const fn level(self) -> u32 {
        self as u32
    }

    pub(super) const fn of_level(level: u32) -> Self {
        match level {
            0 | 1 => Self::Size4K,
            2 => Self::Size2M,
            _ => Self::Size1G,
        }
    }
}

/// Address bits below those that a table of `level` decodes.
pub(super) const fn shift(level: u32) -> u32 {
    level.wrapping_mul(9).wrapping_add(3)
}

/// Bytes that one entry of a table of `level` covers.
pub(super) const fn span(level: u32) -> u64 {
    1u64.wrapping_shl(shift(level))
}

/// Bits 51:12, where every format keeps the address of a page or of the next table.
pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How an entry above the lowest level says that it maps memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeafMark {
    /// Bit 7 is set in a leaf.
    LargeBit,
    /// Bits 11:9 hold the level of the next table, 0 in a leaf.
    NextLevel,
}

const LARGE: u64 = 1 << 7;
const NEXT_LEVEL_SHIFT: u32 = 9;
const NEXT_LEVEL: u64 = 7 << NEXT_LEVEL_SHIFT;

/// The entry layout of one kind of radix table. The only values are the statics of this module.
///
/// Entries that point to a table carry all rights, so that the leaf alone decides.
#[derive(Debug)]
pub struct Format {
    /// For messages.
    name: &'static str,
    /// Table levels that may be asked for.
    levels: (u32, u32),
    /// Addresses end one bit early: the rest is the upper canonical half.
    low_half: bool,
    /// An entry with none of these bits is unused.
    present: u64,
    /// Bits of an entry that points to a table.
    table: u64,
    /// Bits of every leaf.
    leaf: u64,
    mark: LeafMark,
    /// Rights that can be told apart.
    known: Rights,
    /// Rights that every mapping has, or the CPU would refuse the entry.
    required: Rights,
    /// WRITE and EXEC never together.
    write_xor_exec: bool,
    /// Bits set when the right is given.
    read: u64,
    write: u64,
    exec: u64,
    /// Bit set when EXEC is not given.
    no_exec: u64,
    write_back: u64,
    device: u64,
    coherent: u64,
}

// The bits of the AMD64 format.
const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// AMD nested tables: the AMD64 long-mode format. Every access of a guest counts as a user access, so U
/// is set. Accessed and dirty are set beforehand: the CPU then never writes to the tables.
///
/// Spec: \[APM2\] "Nested Paging", "4-Kbyte Page Translation" and its 2-Mbyte and 1-Gbyte siblings.
pub static NPT: Format = Format {
    name: "NPT",
    levels: (4, 4),
    low_half: false,
    present: P,
    table: P | W | U | A,
    leaf: P | U | A | D,
    mark: LeafMark::LargeBit,
    known: Rights::all(),
    required: Rights::READ,
    write_xor_exec: false,
    read: 0,
    write: W,
    exec: 0,
    no_exec: NX,
    write_back: 0,
    device: 0,
    coherent: 0,
};

/// The MLE's own tables: supervisor, never both writable and executable, global (they are the same under every CR3 of the MLE; INVLPG drops
/// a global translation too), device memory by PAT entry 3, uncached after reset.
///
/// Spec: \[APM2\] "4-Kbyte Page Translation"; \[SDM3\] "4-Level Paging and 5-Level Paging".
pub static STAGE1: Format = Format {
    name: "stage 1",
    levels: (4, 4),
    low_half: true,
    present: P,
    table: P | W | A,
    leaf: P | A | D | G,
    mark: LeafMark::LargeBit,
    known: Rights::all(),
    required: Rights::READ,
    write_xor_exec: true,
    read: 0,
    write: W,
    exec: 0,
    no_exec: NX,
    write_back: 0,
    device: PWT | PCD,
    coherent: 0,
};

/// Intel extended page tables. Writable and not readable is a misconfiguration; execute-only needs a
/// capability: READ is required. The memory type is in bits 5:3 of a leaf (6 WB, 0 UC), bit 6 is
/// "ignore PAT".
///
/// Spec: \[SDM3\] "EPT Translation Mechanism", "EPT Misconfigurations".
pub static EPT: Format = Format {
    name: "EPT",
    levels: (4, 4),
    low_half: false,
    present: 7,
    table: 7,
    leaf: 0,
    mark: LeafMark::LargeBit,
    known: Rights::all(),
    required: Rights::READ,
    write_xor_exec: false,
    read: 1,
    write: 1 << 1,
    exec: 1 << 2,
    no_exec: 0,
    write_back: 6 << 3,
    device: 0,
    coherent: (6 << 3) | (1 << 6),
};

/// AMD I/O page tables: PR, next level in bits 11:9, FC bit 60, IR bit 61, IW bit 62.
///
/// Spec: \[AMDVI\] "I/O Page Tables for Host Translations".
pub static AMD_VI: Format = Format {
    name: "AMD-Vi",
    levels: (3, 4),
    low_half: false,
    present: 1,
    table: 1 | (3 << 61),
    leaf: 1,
    mark: LeafMark::NextLevel,
    known: Rights::READ.union(Rights::WRITE),
    required: Rights::empty(),
    write_xor_exec: false,
    read: 1 << 61,
    write: 1 << 62,
    exec: 0,
    no_exec: 0,
    write_back: 0,
    device: 0,
    coherent: 1 << 60,
};

/// Intel second-level (second-stage) tables: R, W, large bit 7, SNP bit 11.
///
/// Spec: \[VTD\] "Second-Stage Paging Entries".
pub static VT_D: Format = Format {
    name: "VT-d",
    levels: (3, 5),
    low_half: false,
    present: 3,
    table: 3,
    leaf: 0,
    mark: LeafMark::LargeBit,
    known: Rights::READ.union(Rights::WRITE),
    required: Rights::empty(),
    write_xor_exec: false,
    read: 1,
    write: 1 << 1,
    exec: 0,
    no_exec: 0,
    write_back: 0,
    device: 0,
    coherent: 1 << 11,
};

impl Format {
    /// First address past what `levels` of tables can map; `None` when the format has no such depth.
    pub(super) fn limit(&self, levels: u32) -> Option<u64> {
        let (least, most) = self.levels;
        let all = span(levels.saturating_add(1));
        (least..=most).contains(&levels).then_some(if self.low_half { all / 2 } else { all })
    }

    pub(super) fn is_present(&self, entry: u64) -> bool {
        entry & self.present != 0
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether a present entry of a table of `level` maps memory.
    pub(super) fn is_leaf(&self, entry: u64, level: u32) -> bool {
        level <= 1
            || match self.mark {
                LeafMark::LargeBit => entry & LARGE != 0,
                LeafMark::NextLevel => entry & NEXT_LEVEL == 0,
            }
    }

    /// The entry in a table of `level` that points to `table`, one level below.
    pub(super) fn table_entry(&self, table: u64, level: u32) -> u64 {
        let mark = match self.mark {
            LeafMark::LargeBit => 0,
            LeafMark::NextLevel => u64::from(level.saturating_sub(1)).wrapping_shl(NEXT_LEVEL_SHIFT),
        };
        table | self.table | mark
    }

    /// Bits of a leaf, without address and level.
    pub(super) fn leaf_bits(&self, rights: Rights, memory: MemoryType) -> Result<u64, Error> {
        let memory = match memory {
            MemoryType::WriteBack => self.write_back,
            MemoryType::Device => self.device,
            MemoryType::Coherent => self.coherent,
        };
        Ok(self.leaf | memory | self.rights_bits(rights)?)
    }

    /// Completes [`Self::leaf_bits`] with what depends on the place.
    pub(super) fn leaf_entry(&self, bits: u64, phys: u64, level: u32) -> u64 {
        phys | bits | if level > 1 { self.large_bit() } else { 0 }
    }

    /// Bits of a leaf that say what it allows.
    pub const fn rights_mask(&self) -> u64 {
        self.read | self.write | self.exec | self.no_exec
    }

    /// The same leaf with other rights.
    ///
    /// # Errors
    /// The format has no such rights.
    pub fn with_rights(&self, entry: u64, rights: Rights) -> Result<u64, Error> {
        Ok((entry & !self.rights_mask()) | self.rights_bits(rights)?)
    }

    /// The leaf for a part of a leaf of `level`, one level below.
    pub(super) fn part_of(&self, entry: u64, phys: u64, level: u32) -> u64 {
        self.leaf_entry(entry & !ADDRESS & !self.large_bit(), phys, level.saturating_sub(1))
    }

    fn large_bit(&self) -> u64 {
        if self.mark == LeafMark::LargeBit { LARGE } else { 0 }
    }

    fn rights_bits(&self, rights: Rights) -> Result<u64, Error> {
        if rights.is_empty()
            || !self.known.contains(rights)
            || !rights.contains(self.required)
            || (self.write_xor_exec && rights.contains(Rights::WRITE | Rights::EXEC))
        {
            return Err(Error::Rights { rights, format: self.name });
        }
        let set = |right, bits| if rights.contains(right) { bits } else { 0 };
        let no_exec = if rights.contains(Rights::EXEC) { 0 } else { self.no_exec };
        Ok(set(Rights::READ, self.read)
            | set(Rights::WRITE, self.write)
            | set(Rights::EXEC, self.exec)
            | no_exec)
    }

    /// What a leaf allows.
    pub fn rights(&self, entry: u64) -> Rights {
        let mut rights = Rights::empty();
        rights.set(Rights::READ, entry & self.read == self.read);
        rights.set(Rights::WRITE, entry & self.write == self.write);
        rights.set(Rights::EXEC, entry & self.exec == self.exec && entry & self.no_exec == 0);
        rights & self.known
    }
}
