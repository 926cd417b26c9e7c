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

use crate::esrt::{ESRT, ESRT_MAX, Esrt};
use crate::memmap::{Descriptor, MemoryAttribute, MemoryMap, MemoryType};
use crate::service::{Service, TABLE_COUNT, TARGETS, Target};

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
    services: [U64; TABLE_COUNT],
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
    esrt: [u8; ESRT_MAX],
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
    services: [u64; TABLE_COUNT],
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
    /// Copy of the firmware's ESRT, where UpdateCapsule is offered.
    pub esrt: Option<&'a Esrt>,
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
/// in memory that stays; SMBIOS and ESRT as copies of ours; our own RT_PROPERTIES and memory attributes. All
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
        (ESRT, input.esrt.map(|_| at(core::mem::offset_of!(GuestPage, esrt)))),
        (MEMORY_ATTRIBUTES, Some(at(core::mem::offset_of!(GuestPage, memory_attributes)))),
    ];
    let mut count = 0u64;
    let present = tables.into_iter().filter_map(|(guid, address)| Some((guid, address?)));
    for (slot, (guid, address)) in page.config.iter_mut().zip(present) {
        *slot = ConfigTable { guid: guid.to_bytes(), address: address.into() };
        count = count.saturating_add(1);
    }
    for (to, from) in page.esrt.iter_mut().zip(input.esrt.map_or(&[][..], Esrt::bytes)) {
        *to = *from;
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
        services: Service::TABLE.map(|s| thunk_address(input.thunks, Target::Service(s)).into()),
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

/// Address of a thunk on the page at `thunks`.
pub const fn thunk_address(thunks: u64, target: Target) -> u64 {
    thunks.wrapping_add(target.index().wrapping_mul(THUNK_STRIDE) as u64)
}

const _: () = assert!(TARGETS.saturating_mul(THUNK_STRIDE) <= PAGE_SIZE as usize);

/// Address of a thunk's hypercall instruction.
pub const fn hypercall_address(thunks: u64, target: Target) -> u64 {
    thunk_address(thunks, target).wrapping_add(THUNK_HYPERCALL_AT)
}

/// The page of thunks: per service and per handler of the PRMT, at 16 bytes each, `endbr64; mov eax, number; vmmcall; ret`.
///
/// RAX is free in the MS x64 calling convention, all other registers pass through as the caller set
/// them, and the status comes back in RAX. The rest of the page is INT3.
pub fn thunk_page(insn: HypercallInsn) -> [u8; PAGE_SIZE as usize] {
    let mut page = [0xcc; PAGE_SIZE as usize];
    let hypercall = match insn {
        HypercallInsn::Vmmcall => [0x0f, 0x01, 0xd9],
        HypercallInsn::Vmcall => [0x0f, 0x01, 0xc1],
    };
    for (thunk, target) in page.chunks_exact_mut(THUNK_STRIDE).zip(Target::all()) {
        let [a, b, c, d] = target.hypercall().to_le_bytes();
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
mod tests;
