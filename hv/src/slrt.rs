//! Secure Launch Resource Table: TrenchBoot's hand-over format, written by the loader and read, as
//! hostile input, by the SLB stage and the MLE.
//!
//! Spec: Linux Secure Launch series v16, `include/linux/slr_table.h` (u32 tag, u32 size entries).
//! Cordon's own entry is [`crate::launch::CordonEntry`] under tag [`TAG_CORDON`].

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "MTRD", little endian: the table's first four bytes.
pub const MAGIC: u32 = 0x4452_544d;
/// Table revision this crate writes and accepts.
pub const REVISION: u16 = 1;
/// Header `architecture`: Intel TXT.
pub const ARCH_TXT: u16 = 1;
/// Header `architecture`: AMD SKINIT.
pub const ARCH_SKINIT: u16 = 2;
/// Largest table read, header included.
pub const MAX_SIZE: usize = 2048;

/// Entry tag: how the launch was made ([`DlInfo`]).
pub const TAG_DL_INFO: u32 = 1;
/// Entry tag: the DRTM event log ([`LogInfo`]).
pub const TAG_LOG_INFO: u32 = 2;
/// Entry tag: what is to be measured ([`PolicyHeader`] and [`PolicyEntry`]s).
pub const TAG_POLICY: u32 = 3;
/// Entry tag: what a launch by SENTER changes, as it was ([`IntelInfo`]).
pub const TAG_INTEL: u32 = 4;
/// Entry tag: Cordon's own entry; "CRDN". Outside the range TrenchBoot assigns.
pub const TAG_CORDON: u32 = 0x4e44_5243;
/// Entry tag that ends the table; it is 8 bytes long.
pub const TAG_END: u32 = 0xffff;

/// [`PolicyEntry::flags`]: the entity was measured already.
pub const POLICY_FLAG_MEASURED: u16 = 1;
/// [`PolicyEntry::entity_type`]: no kernel-defined type; `info` says what it is.
pub const ENTITY_UNSPECIFIED: u16 = 0;
/// [`PolicyEntry::entity_type`]: the SLRT itself.
pub const ENTITY_SLRT: u16 = 1;
/// [`PolicyEntry::entity_type`]: the kernel command line.
pub const ENTITY_CMDLINE: u16 = 4;
/// [`PolicyEntry::entity_type`]: the initial RAM disk.
pub const ENTITY_RAMDISK: u16 = 6;
/// [`LogInfo::format`]: crypto-agile TPM 2.0 log.
pub const LOG_FORMAT_TPM2: u16 = 2;

/// Table header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`REVISION`].
    pub revision: U16,
    /// [`ARCH_TXT`] or [`ARCH_SKINIT`].
    pub architecture: U16,
    /// Bytes used, header and end entry included.
    pub size: U32,
    /// Bytes the table may grow to.
    pub max_size: U32,
}

/// What every entry starts with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EntryHeader {
    /// One of the `TAG_` values.
    pub tag: U32,
    /// Bytes of the entry, this header included.
    pub size: U32,
}

/// DL_INFO: where the DCE (our SLB) and the DLME (our MLE) are.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DlInfo {
    /// Tag and size.
    pub hdr: EntryHeader,
    /// SLB length in bytes.
    pub dce_size: U64,
    /// SLB address.
    pub dce_base: U64,
    /// MLE image length in bytes.
    pub dlme_size: U64,
    /// MLE image address.
    pub dlme_base: U64,
    /// Entry point, bytes from `dlme_base`.
    pub dlme_entry: U64,
    /// MLE header, bytes from `dlme_base`.
    pub dlme_header_offset: U64,
    /// Unused by Cordon: 0.
    pub dlme_config_table: U64,
    /// Loader identity: 0, we are none of the assigned ones.
    pub bootloader: U16,
    /// Reserved.
    pub reserved: [U16; 3],
    /// Loader's own pointer: 0.
    pub context: U64,
    /// Address of a launch callback: 0.
    pub dl_launch: U64,
}

/// LOG_INFO: where the DRTM event log goes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LogInfo {
    /// Tag and size.
    pub hdr: EntryHeader,
    /// [`LOG_FORMAT_TPM2`].
    pub format: U16,
    /// Reserved.
    pub reserved: U16,
    /// Bytes of the log area.
    pub size: U32,
    /// Address of the log area.
    pub addr: U64,
}

/// One pair of variable MTRRs.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MtrrPair {
    /// IA32_MTRR_PHYSBASEn.
    pub base: U64,
    /// IA32_MTRR_PHYSMASKn.
    pub mask: U64,
}

/// INTEL: the state that SENTER changes, for the MLE to restore.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IntelInfo {
    /// Tag and size.
    pub hdr: EntryHeader,
    /// Linux's boot_params: 0.
    pub boot_params_addr: U64,
    /// The TXT heap.
    pub txt_heap: U64,
    /// IA32_MISC_ENABLE.
    pub saved_misc_enable: U64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_default_type: U64,
    /// How many of the pairs are used.
    pub mtrr_count: U64,
    /// The variable MTRRs.
    pub mtrr_pairs: [MtrrPair; 32],
}

/// POLICY: header before the entries.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PolicyHeader {
    /// Tag and size.
    pub hdr: EntryHeader,
    /// Reserved.
    pub reserved: [U16; 2],
    /// 1.
    pub revision: U16,
    /// Number of [`PolicyEntry`]s that follow.
    pub count: U16,
}

/// One entity to measure.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct PolicyEntry {
    /// PCR that takes the measurement.
    pub pcr: U16,
    /// One of the `ENTITY_` values.
    pub entity_type: U16,
    /// `POLICY_FLAG_` bits.
    pub flags: U16,
    /// Reserved.
    pub reserved: U16,
    /// Bytes of the entity.
    pub size: U64,
    /// Address of the entity.
    pub entity: U64,
    /// Name for the log, padded with zeros.
    pub info: [u8; 32],
}

/// Why a table was refused. Names the field, its value and the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlrtError {
    /// Shorter than its header.
    Truncated {
        /// Bytes there are.
        have: usize,
    },
    /// Header field with a value we do not accept.
    Header {
        /// Field name.
        field: &'static str,
        /// Value found.
        value: u32,
    },
    /// An entry's size does not fit.
    EntrySize {
        /// Its tag.
        tag: u32,
        /// Its size field.
        size: u32,
        /// Bytes left in the table, or the size the tag must have.
        limit: u32,
    },
    /// The end entry is missing.
    NoEnd,
    /// A tag that we need is missing.
    Missing(u32),
    /// A tag that may be there once is there twice.
    Twice(u32),
    /// The table being built has no room left.
    Full,
}

impl core::fmt::Display for SlrtError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Truncated { have } => write!(f, "SLRT: {have} bytes, shorter than its header"),
            Self::Header { field, value } => write!(f, "SLRT: header field {field} has value {value:#x}"),
            Self::EntrySize { tag, size, limit } => {
                write!(f, "SLRT: entry with tag {tag:#x} has size {size}, limit {limit}")
            }
            Self::NoEnd => write!(f, "SLRT: no end entry"),
            Self::Missing(tag) => write!(f, "SLRT: no entry with tag {tag:#x}"),
            Self::Twice(tag) => write!(f, "SLRT: two entries with tag {tag:#x}"),
            Self::Full => write!(f, "SLRT: no room left in {MAX_SIZE} bytes"),
        }
    }
}

/// A checked view of a private copy of the table.
#[derive(Clone, Copy)]
pub struct Slrt<'a> {
    entries: &'a [u8],
}

impl<'a> Slrt<'a> {
    /// Checks header, entry sizes and the end entry. `bytes` is the reader's own copy.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, SlrtError> {
        let (header, _) =
            Header::ref_from_prefix(bytes).map_err(|_| SlrtError::Truncated { have: bytes.len() })?;
        let bad = |field, value| Err(SlrtError::Header { field, value });
        if header.magic.get() != MAGIC {
            return bad("magic", header.magic.get());
        }
        if header.revision.get() != REVISION {
            return bad("revision", header.revision.get().into());
        }
        if header.architecture.get() != ARCH_SKINIT && header.architecture.get() != ARCH_TXT {
            return bad("architecture", header.architecture.get().into());
        }
        let entries = usize::try_from(header.size.get())
            .ok()
            .and_then(|size| bytes.get(size_of::<Header>()..size))
            .ok_or(SlrtError::Header { field: "size", value: header.size.get() })?;
        let table = Self { entries };
        let mut ended = false;
        for entry in table.iter() {
            ended = entry?.0 == TAG_END;
        }
        if ended { Ok(table) } else { Err(SlrtError::NoEnd) }
    }

    /// Entries in order, as (tag, whole entry); stops after the end entry or the first bad one.
    fn iter(&self) -> impl Iterator<Item = Result<(u32, &'a [u8]), SlrtError>> {
        let mut rest = Some(self.entries);
        core::iter::from_fn(move || {
            let bytes = rest.take()?;
            let (hdr, _) = EntryHeader::ref_from_prefix(bytes).ok()?;
            let (tag, size) = (hdr.tag.get(), hdr.size.get());
            let limit = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let split = usize::try_from(size).ok().and_then(|s| bytes.split_at_checked(s));
            match split {
                Some((entry, after)) if entry.len() >= size_of::<EntryHeader>() => {
                    if tag != TAG_END {
                        rest = Some(after);
                    }
                    Some(Ok((tag, entry)))
                }
                _ => Some(Err(SlrtError::EntrySize { tag, size, limit })),
            }
        })
    }

    /// The bytes of the only entry with `tag`.
    fn only(&self, tag: u32) -> Result<&'a [u8], SlrtError> {
        let mut found = None;
        for entry in self.iter() {
            let (t, bytes) = entry?;
            if t == tag && found.replace(bytes).is_some() {
                return Err(SlrtError::Twice(tag));
            }
        }
        found.ok_or(SlrtError::Missing(tag))
    }

    /// A copy of the only entry with `tag`, which must have `T`'s size.
    pub fn entry<T: FromBytes + Immutable>(&self, tag: u32) -> Result<T, SlrtError> {
        let bytes = self.only(tag)?;
        T::read_from_bytes(bytes).map_err(|_| SlrtError::EntrySize {
            tag,
            size: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            limit: u32::try_from(size_of::<T>()).unwrap_or(u32::MAX),
        })
    }

    /// The policy's entries.
    pub fn policy(&self) -> Result<&'a [PolicyEntry], SlrtError> {
        let bytes = self.only(TAG_POLICY)?;
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let wrong = |limit: usize| SlrtError::EntrySize {
            tag: TAG_POLICY,
            size,
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
        };
        let (header, rest) =
            PolicyHeader::ref_from_prefix(bytes).map_err(|_| wrong(size_of::<PolicyHeader>()))?;
        <[PolicyEntry]>::ref_from_bytes_with_elems(rest, header.count.get().into()).map_err(|_| {
            wrong(
                usize::from(header.count.get())
                    .saturating_mul(size_of::<PolicyEntry>())
                    .saturating_add(size_of::<PolicyHeader>()),
            )
        })
    }
}

impl PolicyEntry {
    /// The entry as it is measured: its address, which is another on each boot, and its size, which the entity's own
    /// digest implies, set to zero.
    pub const fn measured(&self) -> Self {
        Self { size: U64::new(0), entity: U64::new(0), ..*self }
    }
}

/// Writes a table into a buffer of its own; used by the loader.
pub struct Builder {
    bytes: [u8; MAX_SIZE],
    used: usize,
}

impl Builder {
    /// A table with no entries.
    pub fn new(architecture: u16) -> Self {
        let mut builder = Self { bytes: [0; MAX_SIZE], used: 0 };
        let header = Header {
            magic: MAGIC.into(),
            revision: REVISION.into(),
            architecture: architecture.into(),
            size: 0.into(),
            max_size: (MAX_SIZE as u32).into(),
        };
        // An empty table has room for its header.
        let _ = builder.append(header.as_bytes());
        builder
    }

    fn append(&mut self, data: &[u8]) -> Result<(), SlrtError> {
        let end = self.used.checked_add(data.len()).ok_or(SlrtError::Full)?;
        self.bytes.get_mut(self.used..end).ok_or(SlrtError::Full)?.copy_from_slice(data);
        self.used = end;
        Ok(())
    }

    /// Adds an entry whose header the caller filled in with [`entry_header`].
    pub fn entry<T: IntoBytes + Immutable>(&mut self, entry: &T) -> Result<(), SlrtError> {
        self.append(entry.as_bytes())
    }

    /// Adds the policy.
    pub fn policy(&mut self, entries: &[PolicyEntry]) -> Result<(), SlrtError> {
        let size = size_of::<PolicyHeader>()
            .checked_add(size_of_val(entries))
            .and_then(|s| u32::try_from(s).ok())
            .ok_or(SlrtError::Full)?;
        let header = PolicyHeader {
            hdr: EntryHeader { tag: TAG_POLICY.into(), size: size.into() },
            reserved: FromZeros::new_zeroed(),
            revision: 1.into(),
            count: u16::try_from(entries.len()).map_err(|_| SlrtError::Full)?.into(),
        };
        self.append(header.as_bytes())?;
        self.append(entries.as_bytes())
    }

    /// Adds the end entry and gives the finished table.
    pub fn finish(mut self) -> Result<([u8; MAX_SIZE], usize), SlrtError> {
        self.append(EntryHeader { tag: TAG_END.into(), size: 8.into() }.as_bytes())?;
        let size = u32::try_from(self.used).map_err(|_| SlrtError::Full)?;
        if let Ok((header, _)) = Header::mut_from_prefix(&mut self.bytes) {
            header.size.set(size);
        }
        Ok((self.bytes, self.used))
    }
}

/// The header of an entry of type `T`.
pub fn entry_header<T>(tag: u32) -> EntryHeader {
    EntryHeader { tag: tag.into(), size: u32::try_from(size_of::<T>()).unwrap_or(u32::MAX).into() }
}

/// A name as [`PolicyEntry::info`] holds it; cut at 31 bytes.
pub const fn policy_info(name: &str) -> [u8; 32] {
    let mut info = [0; 32];
    let (mut to, mut from) = (info.as_mut_slice(), name.as_bytes());
    while let ([first, more @ ..], [byte, rest @ ..]) = (to, from) {
        if more.is_empty() {
            break;
        }
        *first = *byte;
        (to, from) = (more, rest);
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    fn sample() -> ([u8; MAX_SIZE], usize) {
        let mut b = Builder::new(ARCH_SKINIT);
        b.entry(&LogInfo {
            hdr: entry_header::<LogInfo>(TAG_LOG_INFO),
            format: LOG_FORMAT_TPM2.into(),
            reserved: 0.into(),
            size: 0x8000.into(),
            addr: 0x1234_5000.into(),
        })
        .unwrap();
        b.policy(&[PolicyEntry {
            pcr: 18.into(),
            entity_type: ENTITY_CMDLINE.into(),
            flags: 0.into(),
            reserved: 0.into(),
            size: 5.into(),
            entity: 0x9000.into(),
            info: policy_info("command line"),
        }])
        .unwrap();
        b.finish().unwrap()
    }

    #[test]
    fn layout_is_the_published_one() {
        assert_eq!(size_of::<Header>(), 16);
        assert_eq!(size_of::<EntryHeader>(), 8);
        assert_eq!(offset_of!(DlInfo, dlme_entry), 40);
        assert_eq!(offset_of!(DlInfo, context), 72);
        assert_eq!(size_of::<DlInfo>(), 88);
        assert_eq!(offset_of!(LogInfo, addr), 16);
        assert_eq!(size_of::<PolicyHeader>(), 16);
        assert_eq!(size_of::<PolicyEntry>(), 56);
    }

    #[test]
    fn what_is_built_is_read_back() {
        let (bytes, used) = sample();
        let t = Slrt::parse(&bytes[..used]).unwrap();
        assert_eq!(t.entry::<LogInfo>(TAG_LOG_INFO).unwrap().addr.get(), 0x1234_5000);
        assert_eq!(t.policy().unwrap().len(), 1);
        assert_eq!(t.entry::<DlInfo>(TAG_DL_INFO).unwrap_err(), SlrtError::Missing(TAG_DL_INFO));
    }

    #[test]
    fn a_table_cut_anywhere_is_refused() {
        let (bytes, used) = sample();
        for n in 0..used {
            assert!(Slrt::parse(&bytes[..n]).is_err(), "cut at {n}");
        }
    }

    #[test]
    fn any_single_byte_changed_never_panics() {
        let (bytes, used) = sample();
        for i in 0..used {
            for v in [0, 1, 7, 0x7f, 0x80, 0xff] {
                let mut b = bytes;
                b[i] = v;
                if let Ok(t) = Slrt::parse(&b[..used]) {
                    let _ = t.policy();
                    let _ = t.entry::<LogInfo>(TAG_LOG_INFO);
                    let _ = t.entry::<DlInfo>(TAG_DL_INFO);
                }
            }
        }
    }

    #[test]
    fn addresses_and_sizes_are_not_measured() {
        let (bytes, used) = sample();
        let mut entry = Slrt::parse(&bytes[..used]).unwrap().policy().unwrap()[0];
        let measured = entry.measured();
        entry.entity.set(77);
        entry.size.set(1);
        assert_eq!(entry.measured(), measured);
        entry.pcr.set(17);
        assert_ne!(entry.measured(), measured);
    }

    #[test]
    fn a_long_name_is_cut_and_stays_terminated() {
        assert_eq!(&policy_info("ab")[..3], b"ab\0");
        assert_eq!(policy_info(&"x".repeat(40))[30..], [b'x', 0]);
    }
}
