//! The Platform Runtime Mechanism: firmware's handlers that the operating system calls by GUID where it
//! once raised SMIs.
//!
//! The table that names them is copied and checked; each address must lie in firmware's runtime regions, so a
//! handler is nothing that the sandbox does not hold. The guest gets a table of its own, whose handlers are thunks.
//!
//! Spec: \[PRM\] "Platform Runtime Mechanism Table (PRMT)".

mod call;
mod shown;

use core::fmt;

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use uefi_raw::Guid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Signature of the table.
pub const SIGNATURE: [u8; 4] = *b"PRMT";
/// Most modules.
pub const MODULES_MAX: usize = 16;
/// Most handlers of all modules.
pub const HANDLERS_MAX: usize = 32;
/// Longest table that is read, in bytes.
pub const TABLE_MAX: usize = 4096;
/// Most bytes of a handler's parameters.
pub const PARAMETERS_MAX: usize = 1024;
/// Most pages that hold ACPI parameter buffers.
pub const PAGES_MAX: usize = 16;

pub use self::call::{CallError, Handlers, Length, Staged};
pub use self::shown::SHOWN_MAX;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTable {
    signature: [u8; 4],
    length: U32,
    /// Revision, checksum, identification, as in every ACPI table.
    header: [u8; 28],
    platform: [u8; 16],
    modules_at: U32,
    modules: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawModule {
    revision: U16,
    length: U16,
    guid: [u8; 16],
    major: U16,
    minor: U16,
    handlers: U16,
    handlers_at: U32,
    mmio: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHandler {
    revision: U16,
    length: U16,
    guid: [u8; 16],
    entry: U64,
    static_data: U64,
    acpi_parameters: U64,
}

const _: () = assert!(size_of::<RawTable>() == 60);
const _: () = assert!(size_of::<RawModule>() == 38);
const _: () = assert!(size_of::<RawHandler>() == 44);

/// A module: handlers that firmware loaded together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name.
    pub guid: Guid,
    /// Version, major and minor.
    pub version: (u16, u16),
    /// Where it lists the device memory it uses, in runtime regions; `None` when it uses none.
    pub mmio_list: Option<u64>,
}

/// A handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handler {
    /// Its name.
    pub guid: Guid,
    /// Entry point, in runtime code.
    pub entry: u64,
    /// Buffer with data of the firmware's, in runtime regions.
    pub static_data: Option<u64>,
    /// Buffer for the parameters of calls from ACPI code, in a runtime region. The table does not say how long it is: this is all that it
    /// can be, up to [`PARAMETERS_MAX`] bytes, the region's end, or the next such buffer.
    pub acpi_parameters: Option<PhysRange>,
    module: u8,
}

/// The checked table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prmt {
    /// Name of the platform.
    pub platform: Guid,
    header: [u8; 28],
    modules: Vec<Module, MODULES_MAX>,
    handlers: Vec<Handler, HANDLERS_MAX>,
    pages: Vec<u64, PAGES_MAX>,
}

/// Why the table is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrmError {
    /// A part that does not lie in what should hold it.
    Outside {
        /// Which.
        part: &'static str,
        /// Its offset in the table.
        at: usize,
        /// Bytes of what should hold it.
        limit: usize,
    },
    /// A field with another value than this version knows.
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u32,
        /// The value it must have.
        expected: u32,
    },
    /// More than there is room for.
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// An address outside of the runtime regions that it must be in.
    Address {
        /// Of what.
        what: &'static str,
        /// The address.
        value: u64,
    },
    /// Two handlers with this name.
    Twice(Guid),
}

impl fmt::Display for PrmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PRMT: ")?;
        match *self {
            Self::Outside { part, at, limit } => write!(f, "{part} at {at:#x} goes past {limit:#x} bytes"),
            Self::Field { field, value, expected } => write!(f, "{field} {value}, expected {expected}"),
            Self::TooMany { what, limit } => write!(f, "more than {limit} {what}"),
            Self::Address { what, value } => write!(f, "{what} at {value:#x} is not in a runtime region"),
            Self::Twice(guid) => write!(f, "two handlers {guid}"),
        }
    }
}

/// A part of `table` at `at`.
fn part<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    table: &'a [u8],
    at: usize,
    name: &'static str,
) -> Result<&'a T, PrmError> {
    let bytes = table.get(at..).and_then(|rest| T::ref_from_prefix(rest).ok());
    bytes.map(|(value, _)| value).ok_or(PrmError::Outside { part: name, at, limit: table.len() })
}

fn expect(field: &'static str, value: u32, expected: u32) -> Result<(), PrmError> {
    if value == expected { Ok(()) } else { Err(PrmError::Field { field, value, expected }) }
}

/// The address, if it lies in one of `regions`; `None` for the zero that stands for nothing.
fn address(what: &'static str, value: u64, regions: &[&[PhysRange]]) -> Result<Option<u64>, PrmError> {
    Ok(to_the_end(what, value, regions)?.map(|range| range.start()))
}

/// From the address on, up to the end of the one of `regions` that it lies in.
fn to_the_end(
    what: &'static str,
    value: u64,
    regions: &[&[PhysRange]],
) -> Result<Option<PhysRange>, PrmError> {
    if value == 0 {
        return Ok(None);
    }
    let region = regions.iter().copied().flatten().find(|r| r.contains_addr(value));
    let rest = region.and_then(|region| PhysRange::from_last(value, region.last()));
    rest.map(Some).ok_or(PrmError::Address { what, value })
}

/// Of `range` what lies below `limit`; at least its first byte.
fn cut(range: PhysRange, limit: u64) -> PhysRange {
    let last = range.last().min(limit.saturating_sub(1)).max(range.start());
    PhysRange::from_last(range.start(), last).unwrap_or(range)
}

fn offset(base: usize, by: U32) -> usize {
    base.saturating_add(usize::try_from(by.get()).unwrap_or(usize::MAX))
}

impl Prmt {
    /// Reads a copy of the table. `code` and `data` are the regions of runtime code and of runtime data.
    pub fn parse(table: &[u8], code: &[PhysRange], data: &[PhysRange]) -> Result<Self, PrmError> {
        let raw: &RawTable = part(table, 0, "header")?;
        expect("signature", u32::from_le_bytes(raw.signature), u32::from_le_bytes(SIGNATURE))?;
        let length = offset(0, raw.length);
        let limit = table.len();
        let table = table.get(..length).ok_or(PrmError::Outside { part: "end", at: length, limit })?;
        let mut prmt = Self {
            platform: Guid::from_bytes(raw.platform),
            header: raw.header,
            modules: Vec::new(),
            handlers: Vec::new(),
            pages: Vec::new(),
        };
        let mut at = offset(0, raw.modules_at);
        if at < size_of::<RawTable>() {
            return Err(PrmError::Outside { part: "header over module", at, limit: size_of::<RawTable>() });
        }
        for _ in 0..raw.modules.get() {
            let module: &RawModule = part(table, at, "module")?;
            let end = at.saturating_add(module.length.get().into());
            let limit = table.len();
            let whole = table.get(..end).ok_or(PrmError::Outside { part: "module's end", at: end, limit })?;
            // A length shorter than this would let modules lie in each other, or lead nowhere for ever.
            part::<RawModule>(whole, at, "module")?;
            prmt.add_module(whole, at, module, code, data)?;
            at = end;
        }
        prmt.bound_parameters()?;
        Ok(prmt)
    }

    /// Gives the ACPI parameter buffers their ends, and lists their pages.
    fn bound_parameters(&mut self) -> Result<(), PrmError> {
        let starts: Vec<u64, HANDLERS_MAX> =
            self.handlers.iter().filter_map(|h| Some(h.acpi_parameters?.start())).collect();
        for range in self.handlers.iter_mut().filter_map(|h| h.acpi_parameters.as_mut()) {
            let next = starts.iter().copied().filter(|start| *start > range.start()).min();
            let most = range.start().saturating_add(PARAMETERS_MAX as u64);
            *range = cut(*range, next.unwrap_or(most).min(most));
            let pages = range.page_outward();
            for page in (pages.start()..=pages.last()).step_by(PAGE_SIZE as usize) {
                if !self.pages.contains(&page) {
                    let many = PrmError::TooMany { what: "pages of parameters", limit: PAGES_MAX };
                    self.pages.push(page).map_err(|_| many)?;
                }
            }
        }
        Ok(())
    }

    /// `whole` ends with the module, which starts at `at`.
    fn add_module(
        &mut self,
        whole: &[u8],
        at: usize,
        raw: &RawModule,
        code: &[PhysRange],
        data: &[PhysRange],
    ) -> Result<(), PrmError> {
        expect("module's StructureRevision", raw.revision.get().into(), 0)?;
        let module = Module {
            guid: Guid::from_bytes(raw.guid),
            version: (raw.major.get(), raw.minor.get()),
            mmio_list: address("RuntimeMmioRanges", raw.mmio.get(), &[code, data])?,
        };
        let index = self.modules.len();
        self.modules.push(module).map_err(|_| PrmError::TooMany { what: "modules", limit: MODULES_MAX })?;
        let mut at = offset(at, raw.handlers_at);
        for _ in 0..raw.handlers.get() {
            let raw: &RawHandler = part(whole, at, "handler")?;
            expect("handler's StructureRevision", raw.revision.get().into(), 0)?;
            expect("handler's StructureLength", raw.length.get().into(), size_of::<RawHandler>() as u32)?;
            let entry = raw.entry.get();
            let handler = Handler {
                guid: Guid::from_bytes(raw.guid),
                entry: address("handler", entry, &[code])?
                    .ok_or(PrmError::Address { what: "handler", value: 0 })?,
                static_data: address("StaticDataBuffer", raw.static_data.get(), &[code, data])?,
                acpi_parameters: to_the_end("AcpiParameterBuffer", raw.acpi_parameters.get(), &[code, data])?,
                module: index as u8,
            };
            if self.find(&handler.guid).is_some() {
                return Err(PrmError::Twice(handler.guid));
            }
            self.handlers
                .push(handler)
                .map_err(|_| PrmError::TooMany { what: "handlers", limit: HANDLERS_MAX })?;
            at = at.saturating_add(size_of::<RawHandler>());
        }
        Ok(())
    }

    /// All handlers, in the table's order, each with its module.
    pub fn handlers(&self) -> impl Iterator<Item = (&Module, &Handler)> {
        self.handlers.iter().filter_map(|h| Some((self.modules.get(usize::from(h.module))?, h)))
    }

    /// The handler at this place.
    pub fn handler(&self, n: u8) -> Option<(&Module, &Handler)> {
        self.handlers().nth(n.into())
    }

    /// The pages that hold ACPI parameter buffers.
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// The handler with this name.
    pub fn find(&self, guid: &Guid) -> Option<&Handler> {
        self.handlers.iter().find(|h| h.guid == *guid)
    }
}

#[cfg(test)]
mod tests;
