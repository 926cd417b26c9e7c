//! The Platform Runtime Mechanism table: firmware's handlers that the operating system calls by GUID where it
//! once raised SMIs. The table is copied and checked; each address must lie in firmware's runtime regions, so a
//! handler is nothing that the sandbox does not hold.
//!
//! Spec: \[PRM\] "Platform Runtime Mechanism Table (PRMT)".

use core::fmt;

use heapless::Vec;
use hv::addr::PhysRange;
use uefi_raw::Guid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Signature of the table.
pub const SIGNATURE: [u8; 4] = *b"PRMT";
/// Most modules.
pub const MODULES_MAX: usize = 16;
/// Most handlers of all modules.
pub const HANDLERS_MAX: usize = 32;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTable {
    signature: [u8; 4],
    length: U32,
    header: [u8; 28],
    platform: [u8; 16],
    modules_at: U32,
    modules: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
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

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
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
    /// Buffer for the parameters of calls from ACPI code, in runtime regions.
    pub acpi_parameters: Option<u64>,
    module: u8,
}

/// The checked table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prmt {
    /// Name of the platform.
    pub platform: Guid,
    modules: Vec<Module, MODULES_MAX>,
    handlers: Vec<Handler, HANDLERS_MAX>,
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
    let inside = regions.iter().copied().flatten().any(|r| r.contains_addr(value));
    match value {
        0 => Ok(None),
        _ if inside => Ok(Some(value)),
        _ => Err(PrmError::Address { what, value }),
    }
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
        let mut prmt =
            Self { platform: Guid::from_bytes(raw.platform), modules: Vec::new(), handlers: Vec::new() };
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
        Ok(prmt)
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
                acpi_parameters: address("AcpiParameterBuffer", raw.acpi_parameters.get(), &[code, data])?,
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

    /// The handler with this name.
    pub fn find(&self, guid: &Guid) -> Option<&Handler> {
        self.handlers.iter().find(|h| h.guid == *guid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn regions() -> ([PhysRange; 1], [PhysRange; 1]) {
        let range = |start| [PhysRange::new(start, 0x10_0000).unwrap()];
        (range(0x7e00_0000), range(0x7f00_0000))
    }

    fn parse(table: &[u8]) -> Result<Prmt, PrmError> {
        let (code, data) = regions();
        Prmt::parse(table, &code, &data)
    }

    fn error(table: &[u8]) -> String {
        parse(table).unwrap_err().to_string()
    }

    fn handler(name: u8, entry: u64, data: u64, parameters: u64) -> std::vec::Vec<u8> {
        let mut bytes = std::vec![0, 0, 44, 0];
        bytes.extend([name; 16]);
        [entry, data, parameters].iter().for_each(|a| bytes.extend(a.to_le_bytes()));
        bytes
    }

    fn module(name: u8, handlers: &[std::vec::Vec<u8>]) -> std::vec::Vec<u8> {
        let mut bytes = std::vec![0, 0];
        bytes.extend((38 + 44 * handlers.len() as u16).to_le_bytes());
        bytes.extend([name; 16]);
        bytes.extend([2, 0, 1, 0]);
        bytes.extend((handlers.len() as u16).to_le_bytes());
        bytes.extend([38, 0, 0, 0]);
        bytes.extend(0x7f00_2000u64.to_le_bytes());
        bytes.extend(handlers.concat());
        bytes
    }

    fn table(modules: &[std::vec::Vec<u8>]) -> std::vec::Vec<u8> {
        let body = modules.concat();
        let mut bytes = b"PRMT".to_vec();
        bytes.extend((60 + body.len() as u32).to_le_bytes());
        bytes.extend([0; 28]);
        bytes.extend([0x99; 16]);
        bytes.extend([60, 0, 0, 0]);
        bytes.extend((modules.len() as u32).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn two_modules() -> std::vec::Vec<u8> {
        let first = handler(1, 0x7e00_1000, 0x7f00_0100, 0x7f00_0200);
        let second = handler(2, 0x7e0f_ffff, 0, 0);
        table(&[
            module(0xaa, &[first, second]),
            module(0xbb, &[]),
            module(0xcc, &[handler(3, 0x7e00_0000, 0, 0)]),
        ])
    }

    fn put(mut table: std::vec::Vec<u8>, at: usize, bytes: &[u8]) -> std::vec::Vec<u8> {
        table[at..at + bytes.len()].copy_from_slice(bytes);
        table
    }

    /// Every offset as the specification's tables give it.
    #[test]
    fn bytes_from_the_specification_are_read() {
        #[rustfmt::skip]
        let bytes = [
            b'P', b'R', b'M', b'T', 142, 0, 0, 0,   0, 0x55, b'M', b'S', b'F', b'T', b' ', b' ', // signature, length
            b'T', b'E', b'S', b'T', b'P', b'R', b'M', b'T', 1, 0, 0, 0, b'M', b'S', b'F', b'T',
            1, 0, 1, 0,
            0xdc, 0x2a, 0x58, 0x34, 0x2a, 0x8a, 0x4e, 0x7c, 0xa2, 0x2f, 0xb6, 0x6a, 0x2e, 0x5a, 0x9f, 0x1c, // 36 platform
            60, 0, 0, 0,                            // 52 PrmModuleInfoOffset
            1, 0, 0, 0,                             // 56 PrmModuleInfoCount
            0, 0, 82, 0,                            // module: 0 StructureRevision, 2 StructureLength
            0xdc, 0x2a, 0xd8, 0xdc, 0x15, 0x77, 0x43, 0x4b, 0xbb, 0x2a, 0x38, 0x08, 0xcf, 0x67, 0xd4, 0x4e, // 4 Identifier
            3, 0, 7, 0,                             // 20 MajorRevision, 22 MinorRevision
            1, 0,                                   // 24 HandlerCount
            38, 0, 0, 0,                            // 26 HandlerInfoOffset
            0x00, 0x20, 0x00, 0x7f, 0, 0, 0, 0,     // 30 RuntimeMmioRanges
            0, 0, 44, 0,                            // handler: 0 StructureRevision, 2 StructureLength
            0x68, 0x3a, 0x5a, 0xd5, 0x6d, 0x31, 0x7e, 0x4e, 0x8e, 0x9a, 0x2d, 0x8b, 0x2c, 0x17, 0x5b, 0xcf, // 4 Identifier
            0x00, 0x10, 0x00, 0x7e, 0, 0, 0, 0,     // 20 PhysicalAddress
            0x00, 0x01, 0x00, 0x7f, 0, 0, 0, 0,     // 28 StaticDataBuffer
            0x00, 0x02, 0x00, 0x7f, 0, 0, 0, 0,     // 36 AcpiParameterBuffer
        ];
        assert_eq!(bytes.len(), 142);
        let prmt = parse(&bytes).unwrap();
        assert_eq!(prmt.platform.to_string(), "34582adc-8a2a-7c4e-a22f-b66a2e5a9f1c");
        let (module, handler) = prmt.handlers().next().unwrap();
        assert_eq!(module.guid.to_string(), "dcd82adc-7715-4b43-bb2a-3808cf67d44e");
        assert_eq!((module.version, module.mmio_list), ((3, 7), Some(0x7f00_2000)));
        assert_eq!(handler.guid.to_string(), "d55a3a68-316d-4e7e-8e9a-2d8b2c175bcf");
        assert_eq!(handler.entry, 0x7e00_1000);
        assert_eq!((handler.static_data, handler.acpi_parameters), (Some(0x7f00_0100), Some(0x7f00_0200)));
        assert_eq!(prmt.find(&handler.guid), Some(handler));
    }

    #[test]
    fn handlers_know_their_module() {
        let prmt = parse(&two_modules()).unwrap();
        let names: std::vec::Vec<_> =
            prmt.handlers().map(|(m, h)| (m.guid.to_bytes()[0], h.guid.to_bytes()[0])).collect();
        assert_eq!(names, [(0xaa, 1), (0xaa, 2), (0xcc, 3)]);
        assert_eq!(prmt.handlers().nth(1).unwrap().1.static_data, None);
        assert_eq!(prmt.find(&Guid::from_bytes([4; 16])), None);
        assert_eq!(parse(&table(&[])).unwrap().handlers().count(), 0);
    }

    #[test]
    fn every_part_must_lie_in_what_holds_it() {
        let good = two_modules();
        for cut in 0..good.len() {
            assert!(parse(&good[..cut]).is_err(), "{cut}");
        }
        let cases: [(usize, &[u8], &str); 9] = [
            (0, b"X", "PRMT: signature 1414353496, expected 1414353488"),
            (4, &[0xff, 0xff], "PRMT: end at 0xffff goes past 0x132 bytes"),
            (4, &[61, 0], "PRMT: module at 0x3c goes past 0x3d bytes"),
            (52, &[59], "PRMT: header over module at 0x3b goes past 0x3c bytes"),
            (52, &[0xff; 4], "PRMT: module at 0xffffffff goes past 0x132 bytes"),
            (62, &[37], "PRMT: module at 0x3c goes past 0x61 bytes"),
            (62, &[0, 0], "PRMT: module at 0x3c goes past 0x3c bytes"),
            (62, &[0xff], "PRMT: module's end at 0x13b goes past 0x132 bytes"),
            (86, &[83], "PRMT: handler at 0x8f goes past 0xba bytes"),
        ];
        for (at, bytes, text) in cases {
            assert_eq!(error(&put(good.clone(), at, bytes)), text);
        }
        assert_eq!(error(&put(good.clone(), 56, &[0xff; 4])), "PRMT: module at 0x132 goes past 0x132 bytes");
    }

    #[test]
    fn other_versions_are_not_guessed_at() {
        let good = two_modules();
        assert_eq!(error(&put(good.clone(), 60, &[1])), "PRMT: module's StructureRevision 1, expected 0");
        assert_eq!(error(&put(good.clone(), 98, &[1])), "PRMT: handler's StructureRevision 1, expected 0");
        assert_eq!(error(&put(good, 100, &[45])), "PRMT: handler's StructureLength 45, expected 44");
    }

    #[test]
    fn addresses_outside_of_the_runtimes_regions_are_refused() {
        let with = |h: std::vec::Vec<u8>| error(&table(&[module(0xaa, &[h])]));
        // In runtime data; behind the code; nowhere.
        assert_eq!(
            with(handler(1, 0x7f00_0000, 0, 0)),
            "PRMT: handler at 0x7f000000 is not in a runtime region"
        );
        assert_eq!(
            with(handler(1, 0x7e10_0000, 0, 0)),
            "PRMT: handler at 0x7e100000 is not in a runtime region"
        );
        assert_eq!(with(handler(1, 0, 0, 0)), "PRMT: handler at 0x0 is not in a runtime region");
        let text = "PRMT: StaticDataBuffer at 0x1000 is not in a runtime region";
        assert_eq!(with(handler(1, 0x7e00_0000, 0x1000, 0)), text);
        let text = "PRMT: AcpiParameterBuffer at 0xffffffffffffffff is not in a runtime region";
        assert_eq!(with(handler(1, 0x7e00_0000, 0, u64::MAX)), text);
        let text = "PRMT: RuntimeMmioRanges at 0x2000 is not in a runtime region";
        assert_eq!(error(&put(two_modules(), 90, &0x2000u64.to_le_bytes())), text);
        assert_eq!(
            parse(&put(two_modules(), 90, &[0; 8])).unwrap().handlers().next().unwrap().0.mmio_list,
            None
        );
    }

    #[test]
    fn limits_and_names_used_twice_are_errors() {
        let many = |n: u8| (0..n).map(|i| handler(i, 0x7e00_0000, 0, 0)).collect::<std::vec::Vec<_>>();
        assert_eq!(parse(&table(&[module(0xaa, &many(32))])).unwrap().handlers().count(), 32);
        assert_eq!(error(&table(&[module(0xaa, &many(33))])), "PRMT: more than 32 handlers");
        let modules: std::vec::Vec<_> = (0..17).map(|i| module(i, &[])).collect();
        assert!(parse(&table(&modules[..16])).is_ok());
        assert_eq!(error(&table(&modules)), "PRMT: more than 16 modules");
        let twice = table(&[module(0xaa, &many(1)), module(0xbb, &many(1))]);
        assert_eq!(error(&twice), "PRMT: two handlers 00000000-0000-0000-0000-000000000000");
    }

    proptest! {
        #[test]
        fn no_table_panics_and_no_address_escapes(
            changes in proptest::collection::vec((0usize..306, any::<u8>()), 0..6),
            small in proptest::collection::vec((0usize..306, 0u8..60), 0..3),
        ) {
            let mut bytes = two_modules();
            changes.into_iter().chain(small).for_each(|(at, byte)| bytes[at] = byte);
            let (code, data) = regions();
            if let Ok(prmt) = parse(&bytes) {
                for (module, handler) in prmt.handlers() {
                    prop_assert!(code[0].contains_addr(handler.entry));
                    for buffer in [handler.static_data, handler.acpi_parameters, module.mmio_list].into_iter().flatten() {
                        prop_assert!(code[0].contains_addr(buffer) || data[0].contains_addr(buffer));
                    }
                }
            }
        }
    }
}
