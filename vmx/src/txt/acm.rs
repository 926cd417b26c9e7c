//! Authenticated code modules: is a file SINIT, and is it for this platform? Their signature is the CPU's to check.
//!
//! Spec: \[TXT\] "Authenticated Code Modules"; \[SDM2\] "Authenticated Code Module Format".

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Fixed part of the header.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    module_type: U16,
    module_subtype: U16,
    header_len: U32,
    header_version: U32,
    chipset_id: U16,
    flags: U16,
    vendor: U32,
    date: U32,
    size: U32,
    txt_svn: U16,
    se_svn: U16,
    code_control: U32,
    error_entry: U32,
    gdt_limit: U32,
    gdt_base: U32,
    seg_sel: U32,
    entry: U32,
    reserved: [u8; 64],
    key_size: U32,
    scratch_size: U32,
}
const _: () = assert!(size_of::<Header>() == 128);

/// Chipset ACM Information Table.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Info {
    uuid: [u8; 16],
    module_type: u8,
    version: u8,
    length: U16,
    chipset_ids: U32,
    os_sinit_version: U32,
    min_mle_header: U32,
    capabilities: U32,
    acm_version: u8,
    acm_revision: [u8; 3],
    processor_ids: U32,
}
const _: () = assert!(size_of::<Info>() == 44);

#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ChipsetId {
    flags: U32,
    vendor: U16,
    device: U16,
    revision: U16,
    reserved: U16,
    extended: U32,
}

#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProcessorId {
    fms: U32,
    fms_mask: U32,
    platform: U64,
    platform_mask: U64,
}

/// Header.ModuleType: of a chipset.
const TYPE_CHIPSET: u16 = 2;
/// Header.ModuleVendor: Intel.
const VENDOR_INTEL: u32 = 0x8086;
/// Header.Flags: signed for debugging.
const FLAG_DEBUG: u16 = 1 << 15;
/// Info.ChipsetACMType: SINIT. Bit 3 says that the module revokes others.
const INFO_SINIT: u8 = 1;
const INFO_TYPE_MASK: u8 = 7;
/// The first version with a list of processors.
const INFO_VERSION_MIN: u8 = 4;
/// Info.UUID.
const INFO_UUID: [u8; 16] =
    [0xaa, 0x3a, 0xc0, 0x7f, 0xa7, 0x46, 0xdb, 0x18, 0x2e, 0xac, 0x69, 0x8f, 0x8d, 0x41, 0x7f, 0x5a];
/// ChipsetId.flags: the revision is a mask.
const REVISION_MASK: u32 = 1;
/// Most entries of a list that are looked at.
const LIST_MAX: u32 = 256;

/// What a module is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Platform {
    /// TXT.DIDVID: vendor, device, revision in its low three words.
    pub didvid: u64,
    /// CPUID 1 EAX.
    pub fms: u32,
    /// IA32_PLATFORM_ID.
    pub platform_id: u64,
    /// The chipset takes production modules alone.
    pub production: bool,
}

/// Why a file is not the module for this platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// It ends before it may.
    Short {
        /// What does not fit.
        what: &'static str,
        /// Its end, bytes.
        end: u64,
        /// The module's size, bytes.
        size: u64,
    },
    /// A field has another value than it must.
    Field {
        /// Which one.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        wanted: u64,
    },
    /// A list is longer than accepted.
    List {
        /// Which one.
        what: &'static str,
        /// Its length.
        count: u32,
    },
    /// The module is for other chipsets; TXT.DIDVID.
    Chipset(u64),
    /// The module is for other processors: CPUID 1 EAX and IA32_PLATFORM_ID.
    Processor(u32, u64),
    /// The module is signed for debugging, and the chipset is not fused for that.
    Debug,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Short { what, end, size } => write!(f, "{what} ends at {end:#x}, the module at {size:#x}"),
            Self::Field { field, value, wanted } => write!(f, "{field} is {value:#x}, must be {wanted:#x}"),
            Self::List { what, count } => write!(f, "{what} has {count} entries, limit {LIST_MAX}"),
            Self::Chipset(didvid) => write!(f, "not for this chipset (TXT.DIDVID {didvid:#x})"),
            Self::Processor(fms, platform) => {
                write!(f, "not for this processor (CPUID 1 EAX {fms:#x}, IA32_PLATFORM_ID {platform:#x})")
            }
            Self::Debug => write!(f, "signed for debugging, and this chipset takes production modules alone"),
        }
    }
}

/// A module of the right kind.
#[derive(Clone, Copy, Debug)]
pub struct Sinit<'a> {
    module: &'a [u8],
    header: Header,
    info: Info,
}

fn dwords(count: u32) -> u64 {
    u64::from(count).saturating_mul(4)
}

impl<'a> Sinit<'a> {
    /// Reads a file.
    ///
    /// # Errors
    /// It is no SINIT module, or not as long as it says.
    pub fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let size = file.len() as u64;
        let short = |what, end| Error::Short { what, end, size };
        let (header, _) = Header::read_from_prefix(file).map_err(|_| short("header", 128))?;
        let wanted = |field, value: u64, wanted: u64| match value == wanted {
            true => Ok(()),
            false => Err(Error::Field { field, value, wanted }),
        };
        wanted("ModuleType", header.module_type.get().into(), TYPE_CHIPSET.into())?;
        wanted("ModuleVendor", header.vendor.get().into(), VENDOR_INTEL.into())?;
        wanted("Size", dwords(header.size.get()), size)?;
        let at = dwords(header.header_len.get()).saturating_add(dwords(header.scratch_size.get()));
        let info = read::<Info>(file, at).ok_or(short("information table", at.saturating_add(44)))?;
        if info.uuid != INFO_UUID {
            let value = u64::from_le_bytes(*info.uuid.as_chunks().0.first().unwrap_or(&[0; 8]));
            let wanted = u64::from_le_bytes(*INFO_UUID.as_chunks().0.first().unwrap_or(&[0; 8]));
            return Err(Error::Field { field: "UUID of the information table", value, wanted });
        }
        wanted("ChipsetACMType", (info.module_type & INFO_TYPE_MASK).into(), INFO_SINIT.into())?;
        if info.version < INFO_VERSION_MIN {
            let (value, wanted) = (info.version.into(), INFO_VERSION_MIN.into());
            return Err(Error::Field { field: "version of the information table", value, wanted });
        }
        Ok(Self { module: file, header, info })
    }

    /// What the signature covers, and so what GETSEC\[SENTER\] hashes for PCR 17: the header's fixed part, and all behind the
    /// scratch area. Key, signature and scratch area are left out.
    ///
    /// Spec: \[SDM2\] "Authenticated Code Module Format", RSASig.
    pub fn signed(&self) -> [&'a [u8]; 2] {
        let from =
            dwords(self.header.header_len.get()).saturating_add(dwords(self.header.scratch_size.get()));
        let body = usize::try_from(from).ok().and_then(|from| self.module.get(from..));
        // `parse` read a header and an information table there.
        [self.module.get(..size_of::<Header>()).unwrap_or_default(), body.unwrap_or_default()]
    }

    /// The key's modulus, as the file has it.
    ///
    /// # Errors
    /// The module ends before it.
    pub fn key(&self) -> Result<&'a [u8], Error> {
        let start = size_of::<Header>() as u64;
        let end = start.saturating_add(dwords(self.header.key_size.get()));
        let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
        let key = range.and_then(|(start, end)| self.module.get(start..end));
        key.ok_or(Error::Short { what: "RSAPubKey", end, size: self.module.len() as u64 })
    }

    /// Capabilities, as the MLE header and OsSinitData count them.
    pub fn capabilities(&self) -> u32 {
        self.info.capabilities.get()
    }

    /// The newest version of OsSinitData that it takes.
    pub fn os_sinit_version(&self) -> u32 {
        self.info.os_sinit_version.get()
    }

    /// The oldest version of MLE header that it takes.
    pub fn min_mle_header(&self) -> u32 {
        self.info.min_mle_header.get()
    }

    /// Whether it is for `platform`.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, platform: &Platform) -> Result<(), Error> {
        if platform.production && self.header.flags.get() & FLAG_DEBUG != 0 {
            return Err(Error::Debug);
        }
        let word = |shift: u32| (platform.didvid >> shift & 0xffff) as u16;
        let mut chipsets = self.list::<ChipsetId>("list of chipsets", self.info.chipset_ids.get())?;
        let chipset = chipsets.any(|id| {
            let revision = match id.flags.get() & REVISION_MASK != 0 {
                true => word(32) & id.revision.get() != 0,
                false => word(32) == id.revision.get(),
            };
            word(0) == id.vendor.get() && word(16) == id.device.get() && revision
        });
        if !chipset {
            return Err(Error::Chipset(platform.didvid));
        }
        let mut processors = self.list::<ProcessorId>("list of processors", self.info.processor_ids.get())?;
        let processor = processors.any(|id| {
            platform.fms & id.fms_mask.get() == id.fms.get()
                && platform.platform_id & id.platform_mask.get() == id.platform.get()
        });
        if processor { Ok(()) } else { Err(Error::Processor(platform.fms, platform.platform_id)) }
    }

    /// The entries of a list: their number, then themselves.
    fn list<T: FromBytes + Immutable + KnownLayout + Unaligned>(
        &self,
        what: &'static str,
        at: u32,
    ) -> Result<impl Iterator<Item = T> + use<'a, T>, Error> {
        let size = self.module.len() as u64;
        let first = u64::from(at).saturating_add(4);
        let count = read::<U32>(self.module, at.into()).ok_or(Error::Short { what, end: first, size })?.get();
        if count > LIST_MAX {
            return Err(Error::List { what, count });
        }
        let stride = size_of::<T>() as u64;
        let end = first.saturating_add(stride.saturating_mul(count.into()));
        if end > size {
            return Err(Error::Short { what, end, size });
        }
        let module = self.module;
        let place = move |index: u32| first.saturating_add(stride.saturating_mul(index.into()));
        Ok((0..count).filter_map(move |index| read::<T>(module, place(index))))
    }
}

fn read<T: FromBytes>(bytes: &[u8], at: u64) -> Option<T> {
    let rest = bytes.get(usize::try_from(at).ok()?..)?;
    T::read_from_prefix(rest).ok().map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A module, typed from the manual's tables: header of 161 double words, scratch area of 143, then the information table.
    fn module() -> Vec<u8> {
        let mut m = vec![0; 0x600];
        let mut put = |at: usize, bytes: &[u8]| m[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[2, 0, 0, 0, 161, 0, 0, 0]);
        put(16, &0x8086_u32.to_le_bytes());
        put(24, &(0x600_u32 / 4).to_le_bytes());
        put(120, &[64, 0, 0, 0, 143, 0, 0, 0]);
        let info = (161 + 143) * 4;
        // 7FC03AAA-46A7-18DB-AC2E-698F8D417F5A, as the manual writes it.
        put(
            info,
            &[0xaa, 0x3a, 0xc0, 0x7f, 0xa7, 0x46, 0xdb, 0x18, 0x2e, 0xac, 0x69, 0x8f, 0x8d, 0x41, 0x7f, 0x5a],
        );
        put(info + 16, &[1, 5, 48, 0]);
        put(info + 20, &0x500_u32.to_le_bytes());
        put(info + 24, &[7, 0, 0, 0, 1, 0, 2, 0, 0x2e, 2, 0, 0]);
        put(info + 40, &0x540_u32.to_le_bytes());
        put(0x500, &[2, 0, 0, 0]);
        put(0x504, &[0, 0, 0, 0, 0x86, 0x80, 0x01, 0xb0, 1, 0, 0, 0, 0, 0, 0, 0]);
        put(0x514, &[1, 0, 0, 0, 0x86, 0x80, 0x02, 0xb0, 6, 0, 0, 0, 0, 0, 0, 0]);
        put(0x540, &[1, 0, 0, 0, 0x50, 6, 2, 0, 0xf0, 0x3f, 0xff, 0x0f]);
        m
    }

    const HERE: Platform =
        Platform { didvid: 0x1_b001_8086, fms: 0x2_0652, platform_id: 1 << 50, production: true };

    #[test]
    fn a_module_is_for_its_platforms_alone() {
        let bytes = module();
        let sinit = Sinit::parse(&bytes).unwrap();
        assert_eq!(
            (sinit.os_sinit_version(), sinit.min_mle_header(), sinit.capabilities()),
            (7, 0x2_0001, 0x22e)
        );
        assert_eq!(sinit.check(&HERE), Ok(()));
        // A revision by mask, and one by value.
        assert_eq!(sinit.check(&Platform { didvid: 0x4_b002_8086, ..HERE }), Ok(()));
        for didvid in [0x2_b001_8086, 0x1_b002_8086, 0x1_b003_8086, 0x1_b001_8087] {
            assert_eq!(sinit.check(&Platform { didvid, ..HERE }), Err(Error::Chipset(didvid)));
        }
        assert_eq!(
            sinit.check(&Platform { fms: 0x3_0652, ..HERE }),
            Err(Error::Processor(0x3_0652, 1 << 50))
        );
        assert_eq!(sinit.signed().map(<[u8]>::len), [128, 0x600 - (161 + 143) * 4]);
        assert_eq!(sinit.key().unwrap().len(), 256);
        let mut debug = module();
        debug[15] = 0x80;
        let sinit = Sinit::parse(&debug).unwrap();
        assert_eq!(sinit.check(&HERE), Err(Error::Debug));
        assert_eq!(sinit.check(&Platform { production: false, ..HERE }), Ok(()));
    }

    #[test]
    fn what_is_no_module_is_refused_by_its_field() {
        let with = |at: usize, value: u8| {
            let mut m = module();
            m[at] = value;
            Sinit::parse(&m).map(|s| s.check(&HERE).map_err(|e| e.to_string())).map_err(|e| e.to_string())
        };
        assert_eq!(with(0, 1).unwrap_err(), "ModuleType is 0x1, must be 0x2");
        assert_eq!(with(16, 0).unwrap_err(), "ModuleVendor is 0x8000, must be 0x8086");
        assert_eq!(with(25, 2).unwrap_err(), "Size is 0xa00, must be 0x600");
        assert_eq!(with(5, 9).unwrap_err(), "information table ends at 0x28ec, the module at 0x600");
        assert!(with(0x4c0, 0).unwrap_err().starts_with("UUID of the information table"));
        assert_eq!(with(0x4d0, 0).unwrap_err(), "ChipsetACMType is 0x0, must be 0x1");
        assert_eq!(
            with(0x500, 100).unwrap().unwrap_err(),
            "list of chipsets ends at 0xb44, the module at 0x600"
        );
        assert_eq!(with(0x501, 9).unwrap().unwrap_err(), "list of chipsets has 2306 entries, limit 256");
        assert!(Sinit::parse(&module()[..100]).unwrap_err().to_string().starts_with("header ends at 0x80"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(changes in proptest::collection::vec((0usize..0x600, any::<u8>()), 0..20), cut in 0usize..0x601) {
            let mut m = module();
            for (at, value) in changes {
                m[at] = value;
            }
            if let Ok(sinit) = Sinit::parse(&m[..cut]) {
                let _ = (sinit.check(&HERE), sinit.signed(), sinit.key());
            }
        }
    }
}
