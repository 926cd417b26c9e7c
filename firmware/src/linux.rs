//! The 64-bit Linux boot protocol: the setup header of a bzImage, where the kernel goes, and the zero
//! page it starts with.
//!
//! Spec: \[LINUX-BOOT\] "The Real-Mode Kernel Header", "64-bit Boot Protocol", "Zero Page".

use core::fmt;

use hv::addr::{FOUR_GIB, PhysRange};
use uefi_raw::table::boot::MemoryType;

use crate::memmap::{DESCRIPTOR_VERSION, Descriptor, E820Entry, GuestMap, MAX_E820};

/// Bytes of the zero page.
pub const ZERO_PAGE_SIZE: usize = 4096;
/// Bytes of the file's start that [`Kernel::parse`] needs.
pub const HEADER_BYTES: usize = HEADER_LIMIT;
/// Oldest protocol with `xloadflags`.
pub const PROTOCOL_MIN: u16 = 0x20c;
/// Lowest address chosen for a kernel whose preferred one is taken: below lies what old devices want.
pub const LOAD_MIN: u64 = 16 << 20;

const HEADER_START: usize = 0x1f1;
/// `edd_mbr_sig_buffer` follows the setup header in the zero page.
const HEADER_LIMIT: usize = 0x290;
/// Offset of the 64-bit entry point from the load address.
const ENTRY_64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 2;

/// Why a kernel cannot be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinuxError {
    /// The file is too short.
    Truncated {
        /// Bytes there are.
        have: u64,
        /// Bytes there must be.
        need: u64,
    },
    /// A header field with a value that cannot be used.
    Field {
        /// Its name in the boot protocol.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The command line is longer than the kernel takes.
    CmdlineTooLong {
        /// Its length.
        length: u64,
        /// The kernel's limit.
        limit: u64,
    },
    /// The initrd lies above what the kernel can reach.
    InitrdTooHigh {
        /// Its last byte.
        last: u64,
        /// The kernel's limit.
        limit: u64,
    },
    /// No free memory for the kernel.
    NoRoom {
        /// Bytes wanted.
        size: u64,
        /// Alignment wanted.
        align: u64,
    },
    /// Something the zero page points to is where its field cannot hold the address or length.
    TooLarge {
        /// The zero page's field.
        field: &'static str,
        /// The value.
        value: u64,
    },
}

impl fmt::Display for LinuxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("kernel: ")?;
        match *self {
            Self::Truncated { have, need } => write!(f, "{have} bytes, needs {need}"),
            Self::Field { field, value } => write!(f, "header field {field} has value {value:#x}"),
            Self::CmdlineTooLong { length, limit } => {
                write!(f, "command line of {length} bytes, limit {limit}")
            }
            Self::InitrdTooHigh { last, limit } => write!(f, "initrd ends at {last:#x}, limit {limit:#x}"),
            Self::NoRoom { size, align } => {
                write!(f, "no {size:#x} bytes of free memory aligned to {align:#x}")
            }
            Self::TooLarge { field, value } => write!(f, "{value:#x} does not fit into {field}"),
        }
    }
}

/// What the setup header says, checked.
#[derive(Clone, Debug)]
pub struct Kernel {
    header: [u8; HEADER_LIMIT],
    header_end: usize,
    file_offset: u64,
    code_size: u64,
    align: u64,
    relocatable: bool,
    above_4g: bool,
    preferred: u64,
    init_size: u64,
    cmdline_max: u64,
    initrd_max: u64,
}

/// Where the kernel goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Memory the kernel needs until it has read the memory map; its start is the load address.
    pub room: PhysRange,
    /// RIP at the start.
    pub entry: u64,
    /// First byte of the file that is copied to the load address.
    pub file_offset: u64,
    /// Bytes copied.
    pub file_len: u64,
}

/// What the zero page says beside the setup header.
#[derive(Clone, Copy, Debug)]
pub struct BootParams<'a> {
    /// The initrd, if any.
    pub initrd: Option<PhysRange>,
    /// Address of the command line, which ends with a zero byte.
    pub cmdline: u64,
    /// Length of the command line without that zero byte.
    pub cmdline_len: u64,
    /// The guest's memory.
    pub e820: &'a [E820Entry],
    /// Address of the guest's EFI system table.
    pub efi_system_table: u64,
    /// Where the guest's EFI memory map lies, as [`GuestMap::write_efi`] wrote it.
    pub efi_memory_map: PhysRange,
    /// Address of the ACPI RSDP.
    pub acpi_rsdp: u64,
    /// `screen_info`, as [`screen_info`] gives it.
    pub screen_info: &'a [u8; 64],
}

fn get<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    if let Some(to) = bytes.get_mut(offset..).and_then(|b| b.get_mut(..value.len())) {
        to.copy_from_slice(value);
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(get(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(get(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(get(bytes, offset))
}

impl Kernel {
    /// Reads the header from `start`, a private copy of the file's first bytes ([`HEADER_BYTES`] or
    /// more); the whole file has `file_len` bytes.
    pub fn parse(start: &[u8], file_len: u64) -> Result<Self, LinuxError> {
        let header: &[u8; HEADER_LIMIT] = start.first_chunk().ok_or(LinuxError::Truncated {
            have: u64::try_from(start.len()).unwrap_or(u64::MAX),
            need: HEADER_LIMIT as u64,
        })?;
        let bad = |field, value: u64| LinuxError::Field { field, value };
        let check = |ok: bool, field, value: u64| if ok { Ok(()) } else { Err(bad(field, value)) };
        let (boot_flag, magic) = (u16_at(header, 0x1fe), u32_at(header, 0x202));
        check(boot_flag == 0xaa55, "boot_flag", boot_flag.into())?;
        check(magic == u32::from_le_bytes(*b"HdrS"), "header", magic.into())?;
        let version = u16_at(header, 0x206);
        check(version >= PROTOCOL_MIN, "version", version.into())?;
        // The second byte of the jump at 0x200 is the header's length past 0x202.
        let [jump] = get(header, 0x201);
        let header_end = usize::from(jump).saturating_add(0x202);
        // `init_size` is the last field that is used.
        check((0x264..=HEADER_LIMIT).contains(&header_end), "jump", jump.into())?;

        let [setup_sects] = get(header, 0x1f1);
        let sectors = if setup_sects == 0 { 4 } else { u64::from(setup_sects) };
        let file_offset = sectors.saturating_add(1).saturating_mul(512);
        let code_size = u64::from(u32_at(header, 0x1f4)).saturating_mul(16);
        check(code_size > ENTRY_64, "syssize", code_size / 16)?;
        let need = file_offset.saturating_add(code_size);
        if file_len < need {
            return Err(LinuxError::Truncated { have: file_len, need });
        }
        let xloadflags = u16_at(header, 0x236);
        check(xloadflags & XLF_KERNEL_64 != 0, "xloadflags", xloadflags.into())?;
        let init_size = u64::from(u32_at(header, 0x260));
        check(init_size >= code_size, "init_size", init_size)?;
        let align = u64::from(u32_at(header, 0x230));
        check(align.is_power_of_two() && align >= 0x1000, "kernel_alignment", align)?;
        let preferred = u64_at(header, 0x258);
        check(PhysRange::new(preferred, init_size).is_some(), "pref_address", preferred)?;
        let [relocatable] = get(header, 0x234);
        let above_4g = xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
        Ok(Self {
            header: *header,
            header_end,
            file_offset,
            code_size,
            align,
            relocatable: relocatable != 0,
            above_4g,
            preferred,
            init_size,
            cmdline_max: u64::from(u32_at(header, 0x238)),
            initrd_max: if above_4g { u64::MAX } else { u64::from(u32_at(header, 0x22c)) },
        })
    }

    /// Chooses where the kernel goes: at its preferred address, or else, if it is relocatable, at the
    /// lowest aligned one from [`LOAD_MIN`] that is free in `map` and clear of `avoid`.
    pub fn place(&self, map: &GuestMap, avoid: &[PhysRange]) -> Result<Placement, LinuxError> {
        let no_room = LinuxError::NoRoom { size: self.init_size, align: self.align };
        let preferred = PhysRange::new(self.preferred, self.init_size)
            .filter(|r| map.is_free(r) && !avoid.iter().any(|a| a.overlaps(r)));
        let room = match preferred {
            Some(room) => room,
            None if self.relocatable => {
                let last = if self.above_4g { u64::MAX } else { FOUR_GIB.saturating_sub(1) };
                PhysRange::from_last(LOAD_MIN, last)
                    .and_then(|within| map.find_free(self.init_size, self.align, &within, avoid))
                    .ok_or(no_room)?
            }
            None => return Err(no_room),
        };
        Ok(Placement {
            room,
            entry: room.start().saturating_add(ENTRY_64),
            file_offset: self.file_offset,
            file_len: self.code_size,
        })
    }

    /// Makes the zero page.
    pub fn zero_page(&self, params: &BootParams<'_>) -> Result<[u8; ZERO_PAGE_SIZE], LinuxError> {
        if params.cmdline_len > self.cmdline_max {
            return Err(LinuxError::CmdlineTooLong { length: params.cmdline_len, limit: self.cmdline_max });
        }
        let mut page = [0; ZERO_PAGE_SIZE];
        put(&mut page, 0, params.screen_info);
        put(&mut page, 0x70, &params.acpi_rsdp.to_le_bytes());
        if let Some(header) = self.header.get(HEADER_START..self.header_end) {
            put(&mut page, HEADER_START, header);
        }
        put(&mut page, 0x210, &[0xff]); // type_of_loader: none of the assigned ones
        put(&mut page, 0x250, &[0; 8]); // setup_data: none, whatever the file says
        if let Some(initrd) = params.initrd {
            if initrd.last() > self.initrd_max {
                return Err(LinuxError::InitrdTooHigh { last: initrd.last(), limit: self.initrd_max });
            }
            put_split(&mut page, 0x218, 0xc0, initrd.start());
            put_split(&mut page, 0x21c, 0xc4, initrd.len());
        }
        put_split(&mut page, 0x228, 0xc8, params.cmdline);

        let map_size = u32::try_from(params.efi_memory_map.len()).map_err(|_| LinuxError::TooLarge {
            field: "efi_memmap_size",
            value: params.efi_memory_map.len(),
        })?;
        put(&mut page, 0x1c0, b"EL64");
        put_split(&mut page, 0x1c4, 0x1d8, params.efi_system_table);
        put(&mut page, 0x1c8, &(size_of::<Descriptor>() as u32).to_le_bytes());
        put(&mut page, 0x1cc, &DESCRIPTOR_VERSION.to_le_bytes());
        put_split(&mut page, 0x1d0, 0x1dc, params.efi_memory_map.start());
        put(&mut page, 0x1d4, &map_size.to_le_bytes());

        let count = u8::try_from(params.e820.len()).ok().filter(|n| usize::from(*n) <= MAX_E820).ok_or(
            LinuxError::TooLarge {
                field: "e820_entries",
                value: u64::try_from(params.e820.len()).unwrap_or(u64::MAX),
            },
        )?;
        put(&mut page, 0x1e8, &[count]);
        for (entry, offset) in params.e820.iter().zip((0x2d0..).step_by(20)) {
            let slot = page.get_mut(offset..).unwrap_or_default();
            put(slot, 0, &entry.range.start().to_le_bytes());
            put(slot, 8, &entry.range.len().to_le_bytes());
            put(slot, 16, &(entry.ty as u32).to_le_bytes());
        }
        Ok(page)
    }
}

/// Writes the low and the high half of a value to its two places.
fn put_split(page: &mut [u8], low: usize, high: usize, value: u64) {
    let bytes = value.to_le_bytes();
    let (l, h) = bytes.split_at(4);
    put(page, low, l);
    put(page, high, h);
}

/// `orig_video_isVGA` of a linear EFI frame buffer.
const VIDEO_TYPE_EFI: u8 = 0x70;
/// `capabilities`: the frame buffer's address has a high half.
const CAPABILITY_64BIT_BASE: u32 = 2;

/// The loader's `screen_info` as the guest may have it: a linear frame buffer outside all of the guest's
/// memory, or all zeros (no screen). The loader is not trusted: a "frame buffer" in RAM would make the
/// guest's console write over the guest.
pub fn screen_info(hostile: &[u8; 64], map: &GuestMap) -> [u8; 64] {
    let none = [0; 64];
    let [video] = get(hostile, 0x0f);
    if video != VIDEO_TYPE_EFI {
        return none;
    }
    let capabilities = u32_at(hostile, 0x36);
    let high = if capabilities & CAPABILITY_64BIT_BASE != 0 { u32_at(hostile, 0x3a) } else { 0 };
    let base = (u64::from(high) << 32) | u64::from(u32_at(hostile, 0x18));
    let lines = u64::from(u16_at(hostile, 0x14)).saturating_mul(u64::from(u16_at(hostile, 0x24)));
    let Some(extent) = PhysRange::new(base, lines.max(u32_at(hostile, 0x1c).into())) else {
        return none;
    };
    // Reserved memory and MMIO may hold a frame buffer; whatever else is in the map may not. (Reserved
    // memory that is the MLE's or the sandbox's is not in the guest's nested tables at all.)
    let fit = |ty| matches!(ty, MemoryType::RESERVED | MemoryType::MMIO);
    if map.regions().iter().any(|r| !fit(r.ty) && r.range.overlaps(&extent)) {
        return none;
    }
    let mut out = none;
    // Type; width, height, depth; base and size; line length; colour layout; capabilities and high base.
    // What is left out serves VGA and VESA.
    for (offset, len) in [(0x0f, 1), (0x12, 6), (0x18, 8), (0x24, 2), (0x26, 8), (0x36, 8)] {
        if let Some(field) = hostile.get(offset..).and_then(|b| b.get(..len)) {
            put(&mut out, offset, field);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memmap::tests::{descriptor, map_of};
    use crate::memmap::{CarveOut, E820Type, Use};
    use proptest::prelude::*;

    /// A header with the values of a Debian 6.1 kernel.
    fn header() -> [u8; HEADER_BYTES] {
        let mut h = [0; HEADER_BYTES];
        put(&mut h, 0x1f1, &[39]);
        put(&mut h, 0x1f4, &0x7_d000u32.to_le_bytes());
        put(&mut h, 0x1fe, &0xaa55u16.to_le_bytes());
        put(&mut h, 0x200, &[0xeb, 0x6a]);
        put(&mut h, 0x202, b"HdrS");
        put(&mut h, 0x206, &0x20fu16.to_le_bytes());
        put(&mut h, 0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(&mut h, 0x230, &0x20_0000u32.to_le_bytes());
        put(&mut h, 0x234, &[1]);
        put(&mut h, 0x236, &0x3fu16.to_le_bytes());
        put(&mut h, 0x238, &2047u32.to_le_bytes());
        put(&mut h, 0x250, &0xdead_0000u64.to_le_bytes());
        put(&mut h, 0x258, &0x100_0000u64.to_le_bytes());
        put(&mut h, 0x260, &0x2c6_f000u32.to_le_bytes());
        h
    }

    const FILE: u64 = 0x80_0000;

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    fn guest(list: &[crate::memmap::Descriptor]) -> GuestMap {
        map_of(list).unwrap().guest(&[]).unwrap()
    }

    #[test]
    fn the_preferred_address_is_used_when_free() {
        let k = Kernel::parse(&header(), FILE).unwrap();
        let map = guest(&[descriptor(7, 0x10_0000, 0x3_ff00, 8)]);
        let p = k.place(&map, &[]).unwrap();
        assert_eq!(p.room, range(0x100_0000, 0x2c6_f000));
        assert_eq!((p.entry, p.file_offset, p.file_len), (0x100_0200, 40 * 512, 0x7d_0000));
        let p = k.place(&map, &[range(0x180_0000, 1)]).unwrap();
        assert_eq!(p.room.start(), 0x1a0_0000);
    }

    #[test]
    fn a_fixed_or_low_kernel_goes_nowhere_else() {
        let mut h = header();
        let high = guest(&[descriptor(7, 0x1_0000_0000, 0x4_0000, 8)]);
        assert!(Kernel::parse(&h, FILE).unwrap().place(&high, &[]).is_ok());
        put(&mut h, 0x236, &[1]);
        let low_only = Kernel::parse(&h, FILE).unwrap();
        let no_room = LinuxError::NoRoom { size: 0x2c6_f000, align: 0x20_0000 };
        assert_eq!(low_only.place(&high, &[]), Err(no_room));
        put(&mut h, 0x234, &[0]);
        let fixed = Kernel::parse(&h, FILE).unwrap();
        let map = guest(&[descriptor(7, 0x200_0000, 0x4_0000, 8)]);
        assert_eq!(fixed.place(&map, &[]), Err(no_room));
    }

    #[test]
    fn bad_headers_are_refused_by_field() {
        let cases: [(usize, &[u8], &str); 9] = [
            (0x1fe, &[0], "boot_flag"),
            (0x202, b"X", "header"),
            (0x206, &[0x0b, 2], "version"),
            (0x201, &[0x61], "jump"),
            (0x201, &[0x8f], "jump"),
            (0x1f4, &[0; 4], "syssize"),
            (0x236, &[0x3e], "xloadflags"),
            (0x230, &[0, 0, 0x30, 0], "kernel_alignment"),
            (0x260, &[0, 0, 1, 0], "init_size"),
        ];
        for (offset, bytes, name) in cases {
            let mut h = header();
            put(&mut h, offset, bytes);
            match Kernel::parse(&h, FILE) {
                Err(LinuxError::Field { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        assert!(matches!(Kernel::parse(&header()[..0x28f], FILE), Err(LinuxError::Truncated { .. })));
        assert_eq!(
            Kernel::parse(&header(), 0x1000).unwrap_err(),
            LinuxError::Truncated { have: 0x1000, need: 0x7d_0000 + 40 * 512 }
        );
    }

    fn params<'a>(e820: &'a [E820Entry], screen: &'a [u8; 64]) -> BootParams<'a> {
        BootParams {
            initrd: Some(range(0x1_2345_6000, 0x2_0000_1000)),
            cmdline: 0x3_0000_2000,
            cmdline_len: 2047,
            e820,
            efi_system_table: 0x4_0000_3000,
            efi_memory_map: range(0x5_0000_4000, 400),
            acpi_rsdp: 0x6_0000_5014,
            screen_info: screen,
        }
    }

    #[test]
    fn the_zero_page_has_every_field_in_its_place() {
        let k = Kernel::parse(&header(), FILE).unwrap();
        let e820 = [
            E820Entry { range: range(0, 0xa_0000), ty: E820Type::Ram },
            E820Entry { range: range(0x10_0000, 0x1000), ty: E820Type::Nvs },
        ];
        let screen = [0x5a; 64];
        let p = k.zero_page(&params(&e820, &screen)).unwrap();
        assert_eq!(p[..0x40], screen);
        assert_eq!(u64_at(&p, 0x70), 0x6_0000_5014);
        assert_eq!((u32_at(&p, 0x218), u32_at(&p, 0xc0)), (0x2345_6000, 1));
        assert_eq!((u32_at(&p, 0x21c), u32_at(&p, 0xc4)), (0x1000, 2));
        assert_eq!((u32_at(&p, 0x228), u32_at(&p, 0xc8)), (0x2000, 3));
        assert_eq!(&p[0x1c0..0x1c4], b"EL64");
        assert_eq!((u32_at(&p, 0x1c4), u32_at(&p, 0x1d8)), (0x3000, 4));
        assert_eq!((u32_at(&p, 0x1c8), u32_at(&p, 0x1cc)), (40, 1));
        assert_eq!((u32_at(&p, 0x1d0), u32_at(&p, 0x1dc), u32_at(&p, 0x1d4)), (0x4000, 5, 400));
        assert_eq!((p[0x1e8], p[0x1ef], p[0x210]), (2, 0, 0xff));
        assert_eq!(u64_at(&p, 0x250), 0, "setup_data of the file is not followed");
        assert_eq!((u64_at(&p, 0x2d0), u64_at(&p, 0x2d8), u32_at(&p, 0x2e0)), (0, 0xa_0000, 1));
        assert_eq!((u64_at(&p, 0x2e4), u64_at(&p, 0x2ec), u32_at(&p, 0x2f4)), (0x10_0000, 0x1000, 4));
        assert_eq!(u64_at(&p, 0x13c), 0);
        // The header arrives as it is in the file, from 0x1f1 to its end.
        assert_eq!(p[0x202..0x210], header()[0x202..0x210]);
        assert_eq!(p[0x254..0x26c], header()[0x254..0x26c]);
    }

    #[test]
    fn limits_of_the_zero_page_are_errors() {
        let k = Kernel::parse(&header(), FILE).unwrap();
        let many = [E820Entry { range: range(0, 1), ty: E820Type::Ram }; 129];
        let screen = [0; 64];
        assert!(k.zero_page(&params(&many[..128], &screen)).is_ok());
        assert!(matches!(k.zero_page(&params(&many, &screen)), Err(LinuxError::TooLarge { .. })));
        let long = BootParams { cmdline_len: 2048, ..params(&[], &screen) };
        assert!(matches!(k.zero_page(&long), Err(LinuxError::CmdlineTooLong { limit: 2047, .. })));
        let mut h = header();
        put(&mut h, 0x236, &[1]);
        let low = Kernel::parse(&h, FILE).unwrap();
        assert!(matches!(low.zero_page(&params(&[], &screen)), Err(LinuxError::InitrdTooHigh { .. })));
    }

    #[test]
    fn a_screen_over_guest_memory_is_no_screen() {
        let map = map_of(&[descriptor(7, 0, 0x1000, 8), descriptor(0, 0x8000_0000, 0x1000, 8)])
            .unwrap()
            .guest(&[CarveOut { range: range(0x8000, 0x1000), usage: Use::Reserved }])
            .unwrap();
        let at = |base: u64, size: u32, height: u16, kind: u8| {
            let mut s = [0; 64];
            put(&mut s, 0x0f, &[kind]);
            put(&mut s, 0x14, &height.to_le_bytes());
            put(&mut s, 0x18, &(base as u32).to_le_bytes());
            put(&mut s, 0x1c, &size.to_le_bytes());
            put(&mut s, 0x24, &4096u16.to_le_bytes());
            put(&mut s, 0x2e, &[7, 7]);
            put(&mut s, 0x36, &2u32.to_le_bytes());
            put(&mut s, 0x3a, &((base >> 32) as u32).to_le_bytes());
            screen_info(&s, &map)
        };
        let good = at(0x8000_0000, 0x1000, 600, 0x70);
        assert_eq!((good[0x0f], u32_at(&good, 0x18)), (0x70, 0x8000_0000));
        assert_eq!(good[0x2e], 0, "the VESA protected-mode interface is not passed on");
        assert_ne!(at(0x10_8000_0000, 0x1000, 600, 0x70), [0; 64]);
        for bad in [
            at(0x1000, 0x1000, 1, 0x70),
            at(0x8000_0000, 0x1000, 600, 0x23),
            at(0x0, u32::MAX, 1, 0x70),
            at(u64::MAX, 0x1000, 1, 0x70),
        ] {
            assert_eq!(bad, [0; 64]);
        }
        assert_eq!(at(0x0ff_f000, 0x1000, 2, 0x70), [0; 64]);
    }

    proptest! {
        #[test]
        fn no_header_panics(
            changes in proptest::collection::vec((0x1f1usize..0x290, any::<u8>()), 0..8),
            len in 0u64..0x100_0000,
        ) {
            let mut h = header();
            for (at, byte) in changes {
                h[at] = byte;
            }
            if let Ok(k) = Kernel::parse(&h, len) {
                let map = guest(&[descriptor(7, 0x10_0000, 0x3_ff00, 8)]);
                let busy = range(0x140_0000, 0x1000);
                if let Ok(p) = k.place(&map, &[busy]) {
                    prop_assert!(map.is_free(&p.room) && !p.room.overlaps(&busy));
                    prop_assert!(p.file_offset + p.file_len <= len && p.file_len <= p.room.len());
                }
                let _ = k.zero_page(&params(&[], &[0; 64]));
            }
        }

        #[test]
        fn no_screen_reaches_guest_memory(s in proptest::array::uniform32(any::<u8>())) {
            let mut screen = [0; 64];
            screen[..32].copy_from_slice(&s);
            screen[0x0f] = 0x70;
            let map = guest(&[descriptor(7, 0, 1 << 19, 8)]);
            let out = screen_info(&screen, &map);
            prop_assert!(out == [0; 64] || u32_at(&out, 0x18) >= 0x8000_0000);
        }
    }
}
