//! The EFI System Resource Table: which firmware a capsule can update. The guest gets a checked copy where UpdateCapsule is
//! offered, and none where not: programs that update firmware take the table for an offer.
//!
//! Spec: \[UEFI\] "EFI System Resource Table".

use core::fmt;

use heapless::Vec;
use hv::io::PhysMem;
use uefi_raw::{Guid, guid};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::tables::{TablesError, read_at};

/// Configuration table: ESRT.
pub const ESRT: Guid = guid!("b122a263-3661-4f68-9929-78f8b0d62180");
/// Most entries.
pub const ENTRIES_MAX: usize = 32;
/// Bytes of the longest table.
pub const ESRT_MAX: usize =
    size_of::<Header>().saturating_add(ENTRIES_MAX.saturating_mul(size_of::<Entry>()));
const VERSION: u64 = 1;
/// Device driver of UEFI: the last type there is.
const TYPE_LAST: u32 = 3;
/// Flags of the capsule are 16 bits.
const FLAGS: u32 = 0xffff;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    count: U32,
    room: U32,
    version: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Entry {
    class: [u8; 16],
    ty: U32,
    version: U32,
    lowest_version: U32,
    capsule_flags: U32,
    last_version: U32,
    last_status: U32,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Entry>() == 40);

/// A copy of the table.
#[derive(Clone, Debug)]
pub struct Esrt(Vec<u8, ESRT_MAX>);

/// Why there is no copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EsrtError {
    /// Not readable, another version, or too many entries.
    Table(TablesError),
    /// An entry of a type, or with flags, that there are not.
    Entry {
        /// Its number.
        index: usize,
        /// Its type.
        ty: u32,
        /// Its flags.
        flags: u32,
    },
    /// Two entries for one firmware: Linux and programs name them by it.
    Twice(Guid),
}

impl fmt::Display for EsrtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(error) => write!(f, "{error}"),
            Self::Entry { index, ty, flags } => write!(f, "entry {index}: type {ty}, flags {flags:#x}"),
            Self::Twice(class) => write!(f, "two entries {class}"),
        }
    }
}

impl From<TablesError> for EsrtError {
    fn from(error: TablesError) -> Self {
        Self::Table(error)
    }
}

impl Esrt {
    /// Copies the table at `at` and checks the copy.
    pub fn read(mem: &impl PhysMem, at: u64) -> Result<Self, EsrtError> {
        let header: Header = read_at(mem, at, "ESRT")?;
        if header.version.get() != VERSION {
            return Err(TablesError::Field { field: "ESRT version", value: header.version.get() }.into());
        }
        let count = header.count.get();
        let limit = ENTRIES_MAX as u64;
        if u64::from(count) > limit {
            let value = count.into();
            return Err(TablesError::TooLarge { what: "ESRT entries", value, limit }.into());
        }
        let mut entries: Vec<Entry, ENTRIES_MAX> = Vec::new();
        let mut next = at.checked_add(size_of::<Header>() as u64);
        for index in 0..usize::try_from(count).unwrap_or(0) {
            let at = next.ok_or(TablesError::Unreadable { what: "ESRT entry", at })?;
            let entry: Entry = read_at(mem, at, "ESRT entry")?;
            let (ty, flags) = (entry.ty.get(), entry.capsule_flags.get());
            if ty > TYPE_LAST || flags & !FLAGS != 0 {
                return Err(EsrtError::Entry { index, ty, flags });
            }
            if entries.iter().any(|e| e.class == entry.class) {
                return Err(EsrtError::Twice(Guid::from_bytes(entry.class)));
            }
            // As many as there is room for: checked above.
            let _ = entries.push(entry);
            next = at.checked_add(size_of::<Entry>() as u64);
        }
        let header = Header { count: count.into(), room: count.into(), version: VERSION.into() };
        let mut bytes = Vec::new();
        // Room for the header and as many entries.
        let _ = bytes.extend_from_slice(header.as_bytes());
        let _ = bytes.extend_from_slice(entries.as_slice().as_bytes());
        Ok(Self(bytes))
    }

    /// The table.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testmem::Ram;
    use proptest::prelude::*;

    const AT: u64 = 0x10_0000;

    fn entry(class: u8) -> Entry {
        Entry {
            class: [class; 16],
            ty: 1.into(),
            version: 7.into(),
            lowest_version: 5.into(),
            capsule_flags: 0x8001.into(),
            last_version: 7.into(),
            last_status: 0.into(),
        }
    }

    fn ram(count: u32, version: u64, entries: &[Entry]) -> Ram {
        let ram = Ram::new(AT, 0x1000);
        let header = Header { count: count.into(), room: 64.into(), version: version.into() };
        assert!(ram.write(AT, header.as_bytes()) && ram.write(AT + 16, entries.as_bytes()));
        ram
    }

    #[test]
    fn a_good_table_is_copied_with_no_more_room_than_entries() {
        let entries = [entry(1), entry(2)];
        let copy = Esrt::read(&ram(2, 1, &entries), AT).unwrap();
        let (header, rest) = Header::read_from_prefix(copy.bytes()).unwrap();
        assert_eq!((header.count.get(), header.room.get(), header.version.get()), (2, 2, 1));
        assert_eq!(rest, entries.as_bytes());
        let full: std::vec::Vec<_> = (0..ENTRIES_MAX as u8).map(entry).collect();
        let copy = Esrt::read(&ram(ENTRIES_MAX as u32, 1, &full), AT).unwrap();
        assert_eq!(copy.bytes().len(), ESRT_MAX);
        assert_eq!(Esrt::read(&ram(0, 1, &[]), AT).unwrap().bytes().len(), 16);
    }

    #[test]
    fn bad_tables_are_refused_by_name() {
        let error = |ram: &Ram, at| Esrt::read(ram, at).unwrap_err();
        let version = TablesError::Field { field: "ESRT version", value: 2 };
        assert_eq!(error(&ram(1, 2, &[entry(1)]), AT), EsrtError::Table(version));
        let many = TablesError::TooLarge { what: "ESRT entries", value: 33, limit: 32 };
        assert_eq!(error(&ram(33, 1, &[]), AT), EsrtError::Table(many));
        let odd = Entry { ty: 4.into(), ..entry(2) };
        let expected = EsrtError::Entry { index: 1, ty: 4, flags: 0x8001 };
        assert_eq!(error(&ram(2, 1, &[entry(1), odd]), AT), expected);
        let flagged = Entry { capsule_flags: 0x1_0000.into(), ..entry(2) };
        let expected = EsrtError::Entry { index: 0, ty: 1, flags: 0x1_0000 };
        assert_eq!(error(&ram(1, 1, &[flagged]), AT), expected);
        let twice = EsrtError::Twice(Guid::from_bytes([1; 16]));
        assert_eq!(error(&ram(2, 1, &[entry(1), entry(1)]), AT), twice);
        let end = TablesError::Unreadable { what: "ESRT", at: AT + 0xff8 };
        assert_eq!(error(&ram(0, 1, &[]), AT + 0xff8), EsrtError::Table(end));
    }

    proptest! {
        #[test]
        fn no_table_panics(count in 0u32..40, bytes in proptest::collection::vec(any::<u8>(), 0..256), at in 0u64..0x1100) {
            let ram = ram(count, 1, &[entry(1), entry(2), entry(3)]);
            ram.write(AT + 32, &bytes);
            if let Ok(copy) = Esrt::read(&ram, AT + at) {
                prop_assert!(copy.bytes().len() <= ESRT_MAX);
            }
        }
    }
}
