//! The EFI tables: the firmware's, read as hostile input, and the guest's, which lead to thunks of ours.
//!
//! Spec: \[UEFI\] "EFI System Table", "EFI Runtime Services Table", "EFI Configuration Table & Properties
//! Table"; \[SMBIOS\] "SMBIOS structure table entry point".

use core::fmt;

use crc::{CRC_32_ISO_HDLC, Crc, NoTable};
use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
pub use uefi_raw::{Guid, guid};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::memmap::{Descriptor, MemoryAttribute, MemoryMap, MemoryType};
use crate::service::{COUNT, Service};

/// Configuration table: RSDP of ACPI 2.0 and later.
pub const ACPI_20: Guid = guid!("8868e871-e4f1-11d3-bc22-0080c73c8881");
/// Configuration table: RSDP of ACPI 1.0.
pub const ACPI_10: Guid = guid!("eb9d2d30-2d88-11d3-9a16-0090273fc14d");
/// Configuration table: SMBIOS entry point, 32 bit.
pub const SMBIOS: Guid = guid!("eb9d2d31-2d88-11d3-9a16-0090273fc14d");
/// Configuration table: SMBIOS entry point, 64 bit.
pub const SMBIOS3: Guid = guid!("f2fd1544-9794-4a2c-992e-e5bbcf20e394");
/// Configuration table: TPM events logged after the log was fetched.
pub const TPM_FINAL_EVENTS: Guid = guid!("1e2ed096-30e2-4254-bd89-863bbef82325");
/// Configuration table: which runtime services there are.
pub const RT_PROPERTIES: Guid = guid!("eb66918a-7eef-402a-842e-931d21c38ae9");
/// Configuration table: protection of the runtime regions.
pub const MEMORY_ATTRIBUTES: Guid = guid!("dcfa911d-26eb-469f-a220-38b7dc461220");

const SYSTEM_TABLE_SIGNATURE: u64 = u64::from_le_bytes(*b"IBI SYST");
const RUNTIME_SIGNATURE: u64 = u64::from_le_bytes(*b"RUNTSERV");
/// UEFI 2.0: the first with all fourteen services.
const REVISION_MIN: u32 = 0x0002_0000;
/// Most configuration tables read from the firmware.
pub const MAX_CONFIG: usize = 64;
/// Most characters of the firmware vendor's name.
pub const MAX_VENDOR: usize = 63;
/// Largest SMBIOS structure table.
pub const SMBIOS_TABLE_MAX: usize = 0x1_0000;
/// Bytes that [`copy_smbios`] may need.
pub const SMBIOS_COPY_MAX: usize = SMBIOS_TABLE_MAX.saturating_add(SMBIOS_TABLE_AT);
const SMBIOS_TABLE_AT: usize = 32;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct TableHeader {
    signature: U64,
    revision: U32,
    size: U32,
    crc: U32,
    reserved: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SystemTable {
    header: TableHeader,
    vendor: U64,
    firmware_revision: U32,
    padding: U32,
    /// Three handles and three protocols, all gone at runtime.
    consoles: [U64; 6],
    runtime: U64,
    boot: U64,
    config_count: U64,
    config: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RuntimeTable {
    header: TableHeader,
    services: [U64; COUNT],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ConfigTable {
    guid: [u8; 16],
    address: U64,
}

/// EFI_RT_PROPERTIES_TABLE: version, length (16 bits each), mask.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RtProperties {
    version_and_length: U32,
    supported: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MemoryAttributes {
    version: U32,
    count: U32,
    descriptor_size: U32,
    flags: U32,
    entries: [Descriptor; 2],
}

/// EFI_MEMORY_ATTRIBUTES_FLAGS_RT_FORWARD_CONTROL_FLOW_GUARD: the code has ENDBR64 where it is called.
const FORWARD_CONTROL_FLOW_GUARD: u32 = 1;
/// Room for the configuration tables of the guest.
const GUEST_CONFIG: usize = 8;

/// The page the guest's EFI system table starts.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GuestPage {
    system: SystemTable,
    padding: U64,
    runtime: RuntimeTable,
    rt_properties: RtProperties,
    memory_attributes: MemoryAttributes,
    vendor: [zerocopy::little_endian::U16; MAX_VENDOR + 1],
    config: [ConfigTable; GUEST_CONFIG],
}

/// Why tables were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TablesError {
    /// Not memory that may be read.
    Unreadable {
        /// What was to be read.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// A field with a value that cannot be used.
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// More than there is room for.
    TooLarge {
        /// What.
        what: &'static str,
        /// How much or how many.
        value: u64,
        /// The limit.
        limit: u64,
    },
}

impl fmt::Display for TablesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unreadable { what, at } => {
                write!(f, "EFI tables: {what} at {at:#x} is not readable memory")
            }
            Self::Field { field, value } => write!(f, "EFI tables: {field} has value {value:#x}"),
            Self::TooLarge { what, value, limit } => write!(f, "EFI tables: {what} {value}, limit {limit}"),
        }
    }
}

/// Copies a `T` from `at`.
pub(crate) fn read_at<T: FromBytes + IntoBytes>(
    mem: &impl PhysMem,
    at: u64,
    what: &'static str,
) -> Result<T, TablesError> {
    let mut value = T::new_zeroed();
    if mem.read(at, value.as_mut_bytes()) { Ok(value) } else { Err(TablesError::Unreadable { what, at }) }
}

/// What the firmware's tables say, copied and bounded.
#[derive(Clone, Debug)]
pub struct FirmwareTables {
    /// UEFI version: major in the high half, ten times minor plus patch in the low.
    pub revision: u32,
    /// The firmware's own version.
    pub firmware_revision: u32,
    vendor: Vec<u16, MAX_VENDOR>,
    services: [u64; COUNT],
    config: Vec<(Guid, u64), MAX_CONFIG>,
}

impl FirmwareTables {
    /// Reads the system table at `address` and what it points to.
    pub fn read(mem: &impl PhysMem, address: u64) -> Result<Self, TablesError> {
        let system: SystemTable = read_at(mem, address, "system table")?;
        check_header(&system.header, SYSTEM_TABLE_SIGNATURE, "system table signature")?;
        let revision = system.header.revision.get();
        if revision < REVISION_MIN {
            return Err(TablesError::Field { field: "system table revision", value: revision.into() });
        }
        let runtime: RuntimeTable = read_at(mem, system.runtime.get(), "runtime services table")?;
        check_header(&runtime.header, RUNTIME_SIGNATURE, "runtime services table signature")?;
        let size = runtime.header.size.get();
        if usize::try_from(size).unwrap_or(0) < size_of::<RuntimeTable>() {
            return Err(TablesError::Field { field: "runtime services table size", value: size.into() });
        }
        let count = system.config_count.get();
        if count > MAX_CONFIG as u64 {
            let limit = MAX_CONFIG as u64;
            return Err(TablesError::TooLarge { what: "configuration tables", value: count, limit });
        }
        let mut config = Vec::new();
        let stride = size_of::<ConfigTable>() as u64;
        for index in 0..count {
            let at = system.config.get().wrapping_add(index.wrapping_mul(stride));
            let entry: ConfigTable = read_at(mem, at, "configuration table")?;
            // Room for MAX_CONFIG: `count` was checked.
            let _ = config.push((Guid::from_bytes(entry.guid), entry.address.get()));
        }
        Ok(Self {
            revision,
            firmware_revision: system.firmware_revision.get(),
            vendor: read_vendor(mem, system.vendor.get()),
            services: runtime.services.map(U64::get),
            config,
        })
    }

    /// Address of the first configuration table under `guid`.
    pub fn config(&self, guid: Guid) -> Option<u64> {
        self.config.iter().find(|(g, _)| *g == guid).map(|(_, address)| *address)
    }

    /// Entry point of a service; `None` when it does not lie in the firmware's runtime code.
    pub fn entry(&self, service: Service, map: &MemoryMap) -> Option<u64> {
        let entry = *self.services.get(service.index())?;
        let region = map.runtime_at(entry)?;
        (region.ty == MemoryType::RUNTIME_SERVICES_CODE).then_some(entry)
    }
}

fn check_header(header: &TableHeader, signature: u64, field: &'static str) -> Result<(), TablesError> {
    let value = header.signature.get();
    if value == signature { Ok(()) } else { Err(TablesError::Field { field, value }) }
}

/// The vendor's name, cut at [`MAX_VENDOR`] and made printable ASCII. It is there to be shown; a firmware
/// without one loses nothing.
fn read_vendor(mem: &impl PhysMem, address: u64) -> Vec<u16, MAX_VENDOR> {
    let mut name = Vec::new();
    for index in 0..MAX_VENDOR as u64 {
        let at = address.wrapping_add(index.wrapping_mul(2));
        let mut c = [0; 2];
        if address == 0 || !mem.read(at, &mut c) || c == [0, 0] {
            break;
        }
        let c = u16::from_le_bytes(c);
        let _ = name.push(if (0x20..0x7f).contains(&c) { c } else { u16::from(b'?') });
    }
    name
}

/// What the guest's tables are made from.
#[derive(Clone, Copy)]
pub struct GuestInput<'a> {
    /// The firmware's.
    pub firmware: &'a FirmwareTables,
    /// The firmware's memory map: tables in memory that the guest takes over, or cannot see, are left out.
    pub map: &'a MemoryMap,
    /// Where the page of tables will lie.
    pub at: u64,
    /// All of our runtime data, that page included, as the guest's memory map has it.
    pub data: PhysRange,
    /// Where the page of thunks lies.
    pub thunks: u64,
    /// The services offered: [`crate::config::Config::rt_properties`].
    pub rt_properties: u32,
    /// Address of the RSDP to show, if it is a copy of ours; else the firmware's own are shown.
    pub rsdp: Option<u64>,
    /// Address of our copy of the 32-bit SMBIOS entry point.
    pub smbios: Option<u64>,
    /// Address of our copy of the 64-bit SMBIOS entry point.
    pub smbios3: Option<u64>,
}

/// The page that goes to [`GuestInput::at`]; the system table is at its start.
///
/// Of the firmware's configuration tables the guest sees ACPI and the TPM's final events, where they lie
/// in memory that stays; SMBIOS as copies of ours; our own RT_PROPERTIES and memory attributes. All
/// others are left out: nobody vouches for them.
pub fn guest_tables(input: &GuestInput<'_>) -> [u8; PAGE_SIZE as usize] {
    let at = |offset: usize| input.at.wrapping_add(offset as u64);
    let mut page = GuestPage::new_zeroed();

    let stays = |guid| input.firmware.config(guid).filter(|a| stays(input.map, *a));
    let tables = [
        (ACPI_20, input.rsdp.or_else(|| stays(ACPI_20))),
        (ACPI_10, if input.rsdp.is_some() { None } else { stays(ACPI_10) }),
        (SMBIOS, input.smbios),
        (SMBIOS3, input.smbios3),
        (TPM_FINAL_EVENTS, stays(TPM_FINAL_EVENTS)),
        (RT_PROPERTIES, Some(at(core::mem::offset_of!(GuestPage, rt_properties)))),
        (MEMORY_ATTRIBUTES, Some(at(core::mem::offset_of!(GuestPage, memory_attributes)))),
    ];
    let mut count = 0u64;
    let present = tables.into_iter().filter_map(|(guid, address)| Some((guid, address?)));
    for (slot, (guid, address)) in page.config.iter_mut().zip(present) {
        *slot = ConfigTable { guid: guid.to_bytes(), address: address.into() };
        count = count.saturating_add(1);
    }
    for (slot, c) in page.vendor.iter_mut().zip(&input.firmware.vendor) {
        slot.set(*c);
    }

    let header = |signature: u64, size: usize| TableHeader {
        signature: signature.into(),
        revision: input.firmware.revision.into(),
        size: (size as u32).into(),
        crc: 0.into(),
        reserved: 0.into(),
    };
    page.system = SystemTable {
        header: header(SYSTEM_TABLE_SIGNATURE, size_of::<SystemTable>()),
        vendor: at(core::mem::offset_of!(GuestPage, vendor)).into(),
        firmware_revision: input.firmware.firmware_revision.into(),
        padding: 0.into(),
        consoles: [0.into(); 6],
        runtime: at(core::mem::offset_of!(GuestPage, runtime)).into(),
        boot: 0.into(),
        config_count: count.into(),
        config: at(core::mem::offset_of!(GuestPage, config)).into(),
    };
    page.system.header.crc.set(crc32(page.system.as_bytes()));
    page.runtime = RuntimeTable {
        header: header(RUNTIME_SIGNATURE, size_of::<RuntimeTable>()),
        services: Service::ALL.map(|s| thunk_address(input.thunks, s).into()),
    };
    page.runtime.header.crc.set(crc32(page.runtime.as_bytes()));
    page.rt_properties =
        RtProperties { version_and_length: 0x0008_0001.into(), supported: input.rt_properties.into() };
    let entry = |ty: MemoryType, start: u64, pages: u64, protection: MemoryAttribute| Descriptor {
        ty: ty.0.into(),
        padding: 0.into(),
        phys_start: start.into(),
        virt_start: 0.into(),
        pages: pages.into(),
        attributes: (MemoryAttribute::RUNTIME | protection).bits().into(),
    };
    let data = input.data.page_outward();
    page.memory_attributes = MemoryAttributes {
        version: 2.into(),
        count: 2.into(),
        descriptor_size: (size_of::<Descriptor>() as u32).into(),
        flags: FORWARD_CONTROL_FLOW_GUARD.into(),
        entries: [
            entry(MemoryType::RUNTIME_SERVICES_CODE, input.thunks, 1, MemoryAttribute::READ_ONLY),
            entry(
                MemoryType::RUNTIME_SERVICES_DATA,
                data.start(),
                data.len() / PAGE_SIZE,
                MemoryAttribute::EXECUTE_PROTECT,
            ),
        ],
    };
    let mut bytes = [0; PAGE_SIZE as usize];
    // GuestPage is smaller than a page: asserted below.
    let _ = page.write_to_prefix(&mut bytes);
    bytes
}

const _: () = assert!(size_of::<GuestPage>() <= PAGE_SIZE as usize);

/// Whether what lies at `address` is still there, and visible, when the guest runs.
fn stays(map: &MemoryMap, address: u64) -> bool {
    match map.regions().iter().find(|r| r.range.contains_addr(address)) {
        Some(region) => !region.is_runtime() && !region.is_reusable(),
        // The BIOS area below 1 MiB is in no EFI memory map.
        None => true,
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    Crc::<u32, NoTable>::new(&CRC_32_ISO_HDLC).checksum(bytes)
}

/// The hypercall instruction of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallInsn {
    /// AMD.
    Vmmcall,
    /// Intel.
    Vmcall,
}

/// Bytes of the hypercall instruction: what RIP advances by when a call is answered.
pub const HYPERCALL_LENGTH: u64 = 3;
const THUNK_STRIDE: usize = 16;
/// From a thunk's start to its hypercall instruction: ENDBR64, then MOV EAX, imm32.
const THUNK_HYPERCALL_AT: u64 = 9;

/// Address of a service's thunk on the page at `thunks`.
pub const fn thunk_address(thunks: u64, service: Service) -> u64 {
    thunks.wrapping_add(service.index().wrapping_mul(THUNK_STRIDE) as u64)
}

/// The service whose thunk holds a hypercall instruction at page offset `offset`; `None` elsewhere.
pub fn service_at(offset: u64) -> Option<Service> {
    Service::ALL.into_iter().find(|s| thunk_address(0, *s).wrapping_add(THUNK_HYPERCALL_AT) == offset)
}

/// The page of thunks: per service, at 16 bytes each, `endbr64; mov eax, number; vmmcall; ret`.
///
/// RAX is free in the MS x64 calling convention, all other registers pass through as the caller set
/// them, and the status comes back in RAX. The rest of the page is INT3.
pub fn thunk_page(insn: HypercallInsn) -> [u8; PAGE_SIZE as usize] {
    let mut page = [0xcc; PAGE_SIZE as usize];
    let hypercall = match insn {
        HypercallInsn::Vmmcall => [0x0f, 0x01, 0xd9],
        HypercallInsn::Vmcall => [0x0f, 0x01, 0xc1],
    };
    for (thunk, service) in page.chunks_exact_mut(THUNK_STRIDE).zip(Service::ALL) {
        let [a, b, c, d] = service.hypercall().to_le_bytes();
        let [x, y, z] = hypercall;
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0xb8, a, b, c, d, x, y, z, 0xc3];
        for (to, from) in thunk.iter_mut().zip(code) {
            *to = from;
        }
    }
    page
}

/// Copies an SMBIOS entry point of either kind from `entry`, and its structure table, to `out`, which
/// will lie at `at`; gives the bytes used. The copy's entry point is at its start, with address and
/// checksums made right. At most [`SMBIOS_COPY_MAX`] bytes.
pub fn copy_smbios(mem: &impl PhysMem, entry: u64, at: u64, out: &mut [u8]) -> Result<usize, TablesError> {
    let start: [u8; 24] = read_at(mem, entry, "SMBIOS entry point")?;
    if start.starts_with(b"_SM3_") {
        let mut anchor = Anchor3::read_from_bytes(&start).unwrap_or_else(|_| Anchor3::new_zeroed());
        let length = anchor.length;
        if usize::from(length) != size_of::<Anchor3>() {
            return Err(TablesError::Field { field: "SMBIOS 3 entry point length", value: length.into() });
        }
        let used = copy_table(mem, anchor.address.get(), anchor.max_size.get(), out)?;
        anchor.address.set(at.wrapping_add(SMBIOS_TABLE_AT as u64));
        anchor.checksum = 0;
        anchor.checksum = checksum(anchor.as_bytes());
        put_anchor(out, anchor.as_bytes());
        return Ok(used);
    }
    let mut anchor: Anchor2 = read_at(mem, entry, "SMBIOS entry point")?;
    if anchor.signature != *b"_SM_" || anchor.intermediate != *b"_DMI_" {
        let value = u64::from(u32::from_le_bytes(anchor.signature));
        return Err(TablesError::Field { field: "SMBIOS signature", value });
    }
    if usize::from(anchor.length) != size_of::<Anchor2>() {
        let value = anchor.length.into();
        return Err(TablesError::Field { field: "SMBIOS entry point length", value });
    }
    let table = at.wrapping_add(SMBIOS_TABLE_AT as u64);
    let low = u32::try_from(table)
        .map_err(|_| TablesError::Field { field: "address of the SMBIOS copy", value: table })?;
    let used = copy_table(mem, anchor.address.get().into(), anchor.table_length.get().into(), out)?;
    anchor.address.set(low);
    anchor.intermediate_checksum = 0;
    let (_, intermediate) = anchor.as_bytes().split_at(core::mem::offset_of!(Anchor2, intermediate));
    anchor.intermediate_checksum = checksum(intermediate);
    anchor.checksum = 0;
    anchor.checksum = checksum(anchor.as_bytes());
    put_anchor(out, anchor.as_bytes());
    Ok(used)
}

/// SMBIOS 3 entry point.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Anchor3 {
    signature: [u8; 5],
    checksum: u8,
    length: u8,
    version: [u8; 5],
    max_size: U32,
    address: U64,
}

/// SMBIOS 2 entry point.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Anchor2 {
    signature: [u8; 4],
    checksum: u8,
    length: u8,
    version: [u8; 2],
    largest: [u8; 2],
    revision: u8,
    formatted: [u8; 5],
    intermediate: [u8; 5],
    intermediate_checksum: u8,
    table_length: zerocopy::little_endian::U16,
    address: U32,
    count: [u8; 2],
    bcd_revision: u8,
}

fn copy_table(mem: &impl PhysMem, from: u64, len: u32, out: &mut [u8]) -> Result<usize, TablesError> {
    let room = out.len().saturating_sub(SMBIOS_TABLE_AT).min(SMBIOS_TABLE_MAX);
    let table = usize::try_from(len)
        .ok()
        .filter(|l| *l <= room)
        .and_then(|l| out.get_mut(SMBIOS_TABLE_AT..)?.get_mut(..l))
        .ok_or(TablesError::TooLarge { what: "SMBIOS bytes", value: len.into(), limit: room as u64 })?;
    if !mem.read(from, table) {
        return Err(TablesError::Unreadable { what: "SMBIOS table", at: from });
    }
    Ok(table.len().saturating_add(SMBIOS_TABLE_AT))
}

fn put_anchor(out: &mut [u8], anchor: &[u8]) {
    let (head, _) = out.split_at_mut(out.len().min(SMBIOS_TABLE_AT));
    head.fill(0);
    for (to, from) in head.iter_mut().zip(anchor) {
        *to = *from;
    }
}

/// The byte that makes the sum of `bytes`, in which it counts as 0, zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memmap::tests::{descriptor, map_of};
    use crate::testmem::Ram;
    use core::mem::offset_of;
    use proptest::prelude::*;
    use uefi_raw::table::system::SystemTable as Efi;

    #[test]
    fn layouts_are_the_specifications() {
        assert_eq!(offset_of!(SystemTable, vendor), offset_of!(Efi, firmware_vendor));
        assert_eq!(offset_of!(SystemTable, firmware_revision), offset_of!(Efi, firmware_revision));
        assert_eq!(offset_of!(SystemTable, runtime), offset_of!(Efi, runtime_services));
        assert_eq!(
            offset_of!(SystemTable, config_count),
            offset_of!(Efi, number_of_configuration_table_entries)
        );
        assert_eq!(offset_of!(SystemTable, config), offset_of!(Efi, configuration_table));
        assert_eq!(size_of::<SystemTable>(), size_of::<Efi>());
        assert_eq!(size_of::<RuntimeTable>(), size_of::<uefi_raw::table::runtime::RuntimeServices>());
        assert_eq!((size_of::<Anchor3>(), offset_of!(Anchor3, address)), (24, 16));
        assert_eq!((size_of::<Anchor2>(), offset_of!(Anchor2, intermediate)), (31, 16));
        assert_eq!((offset_of!(Anchor2, table_length), offset_of!(Anchor2, address)), (22, 24));
    }

    const SYSTAB: u64 = 0x10_0000;
    const RUNTIME: u64 = 0x10_0100;
    const CONFIG: u64 = 0x10_0200;
    const VENDOR: u64 = 0x10_0400;

    /// Memory of a firmware: tables at 1 MiB (runtime data), code behind, ACPI, free memory.
    fn firmware(config: &[(Guid, u64)]) -> (Ram, MemoryMap) {
        let ram = Ram::new(0x10_0000, 0x8000);
        let header = |signature: u64, size: usize| TableHeader {
            signature: signature.into(),
            revision: 0x0002_0046.into(),
            size: (size as u32).into(),
            crc: 0.into(),
            reserved: 0.into(),
        };
        let system = SystemTable {
            header: header(SYSTEM_TABLE_SIGNATURE, 0x78),
            vendor: VENDOR.into(),
            firmware_revision: 0x1_0000.into(),
            padding: 0.into(),
            consoles: [1.into(); 6],
            runtime: RUNTIME.into(),
            boot: 0.into(),
            config_count: (config.len() as u64).into(),
            config: CONFIG.into(),
        };
        let runtime = RuntimeTable {
            header: header(RUNTIME_SIGNATURE, 0x88),
            services: core::array::from_fn(|i| (0x10_1000 + 16 * i as u64).into()),
        };
        assert!(ram.write(SYSTAB, system.as_bytes()) && ram.write(RUNTIME, runtime.as_bytes()));
        for (i, (guid, address)) in config.iter().enumerate() {
            let entry = ConfigTable { guid: guid.to_bytes(), address: (*address).into() };
            assert!(ram.write(CONFIG + 24 * i as u64, entry.as_bytes()));
        }
        let vendor: std::vec::Vec<u8> = "ED\u{1b}K".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(ram.write(VENDOR, &vendor));
        let map = map_of(&[
            descriptor(6, 0x10_0000, 1, 1 << 63),
            descriptor(5, 0x10_1000, 1, 1 << 63),
            descriptor(9, 0x10_2000, 1, 8),
            descriptor(10, 0x10_3000, 1, 8),
            descriptor(4, 0x10_4000, 4, 8),
        ])
        .unwrap();
        (ram, map)
    }

    fn build(config: &[(Guid, u64)], rsdp: Option<u64>) -> Ram {
        let (ram, map) = firmware(config);
        let fw = FirmwareTables::read(&ram, SYSTAB).unwrap();
        let at = 0x20_0000;
        let page = guest_tables(&GuestInput {
            firmware: &fw,
            map: &map,
            at,
            data: PhysRange::new(at, 0x3000).unwrap(),
            thunks: 0x20_4000,
            rt_properties: 0x26ff,
            rsdp,
            smbios: None,
            smbios3: Some(0x20_1000),
        });
        let guest = Ram::new(at, 0x5000);
        assert!(guest.write(at, &page) && guest.write(0x20_4000, &thunk_page(HypercallInsn::Vmmcall)));
        guest
    }

    #[test]
    fn the_guest_reads_back_tables_that_lead_to_thunks() {
        let guest = build(&[(ACPI_20, 0x10_2014), (SMBIOS, 0x10_0800)], None);
        let tables = FirmwareTables::read(&guest, 0x20_0000).unwrap();
        assert_eq!((tables.revision, tables.firmware_revision), (0x0002_0046, 0x1_0000));
        assert_eq!(String::from_utf16(&tables.vendor).unwrap(), "ED?K");
        assert_eq!(tables.config(ACPI_20), Some(0x10_2014));
        assert_eq!(tables.config(SMBIOS), None, "the firmware's own lies in a runtime region");
        assert_eq!(tables.config(SMBIOS3), Some(0x20_1000));
        let properties: RtProperties = read_at(&guest, tables.config(RT_PROPERTIES).unwrap(), "").unwrap();
        assert_eq!(properties.as_bytes(), [1, 0, 8, 0, 0xff, 0x26, 0, 0]);
        let attributes: MemoryAttributes =
            read_at(&guest, tables.config(MEMORY_ATTRIBUTES).unwrap(), "").unwrap();
        assert_eq!(attributes.entries[0].phys_start.get(), 0x20_4000);
        assert_eq!(attributes.entries[0].attributes.get(), (1 << 63) | 0x2_0000);
        assert_eq!((attributes.entries[1].pages.get(), attributes.entries[1].ty.get()), (3, 6));
        for service in Service::ALL {
            let thunk: [u8; 13] = read_at(&guest, tables.services[service.index()], "").unwrap();
            assert_eq!(thunk[..5], [0xf3, 0x0f, 0x1e, 0xfa, 0xb8]);
            let eax = u32::from_le_bytes(thunk[5..9].try_into().unwrap());
            assert_eq!(Service::from_hypercall(eax), Some(service));
            assert_eq!(thunk[9..], [0x0f, 0x01, 0xd9, 0xc3]);
            assert_eq!(service_at(tables.services[service.index()] - 0x20_4000 + 9), Some(service));
        }
        assert_eq!(service_at(0), None);
        // The CRCs, by the definition: over the table with the field zero. 0xcbf43926 is the check value.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        for (at, len) in [(0x20_0000, 0x78), (0x20_0080, 0x88)] {
            let mut bytes = vec![0; len];
            assert!(guest.read(at, &mut bytes));
            let stored = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
            bytes[16..20].fill(0);
            assert_eq!(stored, crc32(&bytes));
        }
    }

    #[test]
    fn tables_in_memory_the_guest_takes_over_are_left_out() {
        let acpi10 = (ACPI_10, 0x10_2000);
        let tables =
            |config: &[(Guid, u64)], rsdp| FirmwareTables::read(&build(config, rsdp), 0x20_0000).unwrap();
        let t = tables(&[(ACPI_20, 0x10_4000), (TPM_FINAL_EVENTS, 0x10_3000), acpi10], None);
        assert_eq!((t.config(ACPI_20), t.config(TPM_FINAL_EVENTS)), (None, Some(0x10_3000)));
        assert_eq!(t.config(ACPI_10), Some(0x10_2000));
        let t = tables(&[(ACPI_20, 0x10_2000), (TPM_FINAL_EVENTS, 0x10_5000), acpi10], Some(0x20_2000));
        assert_eq!((t.config(ACPI_20), t.config(TPM_FINAL_EVENTS)), (Some(0x20_2000), None));
        assert_eq!(t.config(ACPI_10), None);
    }

    #[test]
    fn only_entry_points_in_runtime_code_count() {
        let (ram, map) = firmware(&[]);
        let fw = FirmwareTables::read(&ram, SYSTAB).unwrap();
        assert_eq!(fw.entry(Service::SetTime, &map), Some(0x10_1010));
        for bad in [0u64, 0x10_0000, 0x10_4000, u64::MAX] {
            assert!(ram.write(RUNTIME + 24, &bad.to_le_bytes()));
            let fw = FirmwareTables::read(&ram, SYSTAB).unwrap();
            assert_eq!(fw.entry(Service::GetTime, &map), None, "{bad:#x}");
        }
    }

    #[test]
    fn bad_firmware_tables_are_refused_by_name() {
        type Check = fn(&TablesError) -> bool;
        let cases: [(u64, &[u8], Check); 6] = [
            (SYSTAB, b"x", |e| matches!(e, TablesError::Field { field: "system table signature", .. })),
            (SYSTAB + 8, &[0xff, 0xff, 1, 0], |e| {
                matches!(e, TablesError::Field { field: "system table revision", .. })
            }),
            (SYSTAB + 0x58, &[0xff; 8], |e| {
                matches!(e, TablesError::Unreadable { what: "runtime services table", .. })
            }),
            (RUNTIME + 12, &[0x87], |e| {
                matches!(e, TablesError::Field { field: "runtime services table size", .. })
            }),
            (SYSTAB + 0x68, &[65], |e| matches!(e, TablesError::TooLarge { limit: 64, .. })),
            (SYSTAB + 0x70, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], |e| {
                matches!(e, TablesError::Unreadable { what: "configuration table", .. })
            }),
        ];
        for (at, bytes, check) in cases {
            let (ram, _) = firmware(&[(ACPI_20, 0)]);
            assert!(ram.write(at, bytes));
            let error = FirmwareTables::read(&ram, SYSTAB).unwrap_err();
            assert!(check(&error), "{error}");
        }
    }

    #[test]
    fn a_vendor_name_at_the_top_of_the_address_space_is_no_name() {
        for address in [0, 1, u64::MAX, u64::MAX - 1] {
            let (ram, _) = firmware(&[]);
            assert!(ram.write(SYSTAB + 0x18, &address.to_le_bytes()));
            assert!(FirmwareTables::read(&ram, SYSTAB).unwrap().vendor.is_empty());
        }
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)) == 0
    }

    #[test]
    fn smbios_copies_point_to_themselves() {
        let ram = Ram::new(0x1000, 0x2000);
        let mut v3 = *b"_SM3_\0\x18\x03\x03\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0";
        v3[12..16].copy_from_slice(&100u32.to_le_bytes());
        v3[16..24].copy_from_slice(&0x1800u64.to_le_bytes());
        let mut v2 = *b"_SM_\0\x1f\x02\x08\0\0\0\0\0\0\0\0_DMI_\0\0\0\0\0\0\0\x05\0\x28";
        v2[22..24].copy_from_slice(&100u16.to_le_bytes());
        v2[24..28].copy_from_slice(&0x1800u32.to_le_bytes());
        let table: std::vec::Vec<u8> = (0..100).collect();
        assert!(ram.write(0x1000, &v3) && ram.write(0x1100, &v2) && ram.write(0x1800, &table));
        let mut out = [0xee; 256];
        assert_eq!(copy_smbios(&ram, 0x1000, 0x5_0000_0000, &mut out), Ok(132));
        assert_eq!(out[32..132], table);
        assert!(sums_to_zero(&out[..24]));
        assert_eq!(out[16..24], 0x5_0000_0020u64.to_le_bytes());
        assert_eq!(copy_smbios(&ram, 0x1100, 0x8000, &mut out), Ok(132));
        assert!(sums_to_zero(&out[..31]) && sums_to_zero(&out[16..31]));
        assert_eq!(out[24..28], 0x8020u32.to_le_bytes());
        assert!(copy_smbios(&ram, 0x1100, 0x5_0000_0000, &mut out).is_err());
        assert!(matches!(
            copy_smbios(&ram, 0x1000, 0, &mut out[..131]),
            Err(TablesError::TooLarge { value: 100, limit: 99, .. })
        ));
        assert!(copy_smbios(&ram, 0x1800, 0, &mut out).is_err());
        assert!(copy_smbios(&ram, 0xffff_0000, 0, &mut out).is_err());
    }

    proptest! {
        #[test]
        fn no_tables_panic(changes in proptest::collection::vec((0u64..0x500, any::<u8>()), 0..12)) {
            let (ram, map) = firmware(&[(ACPI_20, 0x10_2000)]);
            for (at, byte) in changes {
                ram.write(SYSTAB + at, &[byte]);
            }
            if let Ok(fw) = FirmwareTables::read(&ram, SYSTAB) {
                let _ = fw.entry(Service::GetTime, &map);
            }
        }

        #[test]
        fn no_smbios_panics(
            kind in prop_oneof![Just(&b"_SM3_"[..]), Just(&b"_SM_\0\x1f"[..])],
            mut bytes in proptest::collection::vec(any::<u8>(), 40),
            room in 0usize..300,
        ) {
            bytes[..kind.len()].copy_from_slice(kind);
            bytes[16..21].copy_from_slice(b"_DMI_");
            let ram = Ram::new(0, 0x100);
            ram.write(0, &bytes);
            let mut out = vec![0; room];
            if let Ok(used) = copy_smbios(&ram, 0, 0, &mut out) {
                prop_assert!(used <= room);
            }
        }
    }
}
