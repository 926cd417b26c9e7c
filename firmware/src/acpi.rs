//! ACPI tables as firmware left them: found, bounded, and shown to the guest without those that belong
//! to the MLE.
//!
//! Spec: \[ACPI\] "Root System Description Pointer", "System Description Table Header", "Fixed ACPI
//! Description Table".

use core::fmt;

use heapless::Vec;
use hv::addr::PhysRange;
use hv::io::PhysMem;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::sandbox::SMI_COMMAND;
use crate::tables::{TablesError, checksum, read_at};

/// Most tables that the root table may name, and the DSDT.
pub const MAX_TABLES: usize = 128;
/// Longest table accepted, in bytes.
pub const TABLE_MAX: u32 = 8 << 20;

/// Bytes that [`write_filtered`] may need, with two tables added.
pub const FILTERED_MAX: usize = XSDT_AT
    .saturating_add(size_of::<TableHeader>())
    .saturating_add(MAX_TABLES.saturating_add(2).saturating_mul(size_of::<U64>()));
/// The XSDT's place behind the RSDP.
const XSDT_AT: usize = 64;

const XSDT: [u8; 4] = *b"XSDT";
const RSDT: [u8; 4] = *b"RSDT";
const FADT: [u8; 4] = *b"FACP";
const DSDT: [u8; 4] = *b"DSDT";

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Rsdp {
    signature: [u8; 8],
    checksum: u8,
    oem: [u8; 6],
    revision: u8,
    rsdt: U32,
    length: U32,
    xsdt: U64,
    extended_checksum: u8,
    reserved: [u8; 3],
}

/// Bytes of the RSDP that its first checksum covers: all of an ACPI 1.0 one.
const RSDP_V1: usize = 20;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct TableHeader {
    signature: [u8; 4],
    length: U32,
    revision: u8,
    checksum: u8,
    oem: [u8; 14],
    oem_revision: [u8; 4],
    creator: [u8; 8],
}

/// A table: its signature and all of its bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// The signature as found; any bytes.
    pub signature: [u8; 4],
    /// Where it lies.
    pub range: PhysRange,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", Signature(self.signature), self.range)
    }
}

/// A signature for people: printable ASCII, anything else as `?`.
#[derive(Clone, Copy)]
pub struct Signature(pub [u8; 4]);

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for b in self.0 {
            write!(f, "{}", if b.is_ascii_graphic() { char::from(b) } else { '?' })?;
        }
        Ok(())
    }
}

/// The tables that an RSDP leads to: the root table, those it names, in its order, and the DSDT.
#[derive(Clone, Debug)]
pub struct Tables {
    rsdp: Rsdp,
    root: TableHeader,
    list: Vec<Table, MAX_TABLES>,
}

impl Tables {
    /// Follows the RSDP at `rsdp`. Checksums are not tested: what firmware wrote is measured as it is,
    /// and Linux tests them itself.
    pub fn read(mem: &impl PhysMem, rsdp: u64) -> Result<Self, TablesError> {
        let mut copy = Rsdp::new_zeroed();
        let (v1, _) = copy.as_mut_bytes().split_at_mut(RSDP_V1);
        if !mem.read(rsdp, v1) {
            return Err(TablesError::Unreadable { what: "RSDP", at: rsdp });
        }
        if copy.signature != *b"RSD PTR " {
            let value = u64::from_le_bytes(copy.signature);
            return Err(TablesError::Field { field: "RSDP signature", value });
        }
        if copy.revision >= 2 {
            copy = read_at(mem, rsdp, "RSDP")?;
        }
        let (address, signature, width) = if copy.xsdt.get() != 0 {
            (copy.xsdt.get(), XSDT, size_of::<U64>())
        } else {
            (copy.rsdt.get().into(), RSDT, size_of::<U32>())
        };
        let (root, table) = read_header(mem, address)?;
        if root.signature != signature {
            let value = u32::from_le_bytes(root.signature).into();
            return Err(TablesError::Field { field: "ACPI root table signature", value });
        }
        let mut tables = Self { rsdp: copy, root, list: Vec::new() };
        tables.push(table)?;
        let body = usize::try_from(root.length.get()).unwrap_or(0).saturating_sub(size_of::<TableHeader>());
        let count = body.checked_div(width).unwrap_or(0);
        if count > MAX_TABLES {
            return Err(too_many(count));
        }
        let first = address.wrapping_add(size_of::<TableHeader>() as u64);
        for index in 0..count as u64 {
            let at = first.wrapping_add(index.wrapping_mul(width as u64));
            let mut entry = [0; 8];
            let read = entry.get_mut(..width).is_some_and(|e| mem.read(at, e));
            if !read {
                return Err(TablesError::Unreadable { what: "ACPI root table", at });
            }
            // Firmware leaves entries empty where a table was withdrawn.
            let address = u64::from_le_bytes(entry);
            if address == 0 {
                continue;
            }
            let (_, table) = read_header(mem, address)?;
            tables.push(table)?;
            if table.signature == FADT {
                tables.push_dsdt(mem, &table)?;
            }
        }
        Ok(tables)
    }

    fn push(&mut self, table: Table) -> Result<(), TablesError> {
        if self.list.contains(&table) {
            return Ok(());
        }
        self.list.push(table).map_err(|_| too_many(MAX_TABLES.saturating_add(2)))
    }

    fn push_dsdt(&mut self, mem: &impl PhysMem, fadt: &Table) -> Result<(), TablesError> {
        let address = match fadt_field::<8>(mem, fadt, 140) {
            Some(wide) if wide != [0; 8] => u64::from_le_bytes(wide),
            _ => fadt_field::<4>(mem, fadt, 40).map_or(0, |low| u32::from_le_bytes(low).into()),
        };
        if address == 0 {
            return Ok(());
        }
        let (_, table) = read_header(mem, address)?;
        self.push(table)
    }

    /// All tables.
    pub fn all(&self) -> &[Table] {
        &self.list
    }

    /// The first table with this signature.
    pub fn find(&self, signature: [u8; 4]) -> Option<&Table> {
        self.list.iter().find(|t| t.signature == signature)
    }

    /// Writes to `out`, which will lie at `at`, an RSDP and a root table that name all tables but those
    /// with a signature in `hidden`, and then those at `added`; gives the bytes used. The guest's RSDP is at `at`.
    pub fn write_filtered(
        &self,
        hidden: &[[u8; 4]],
        added: impl Iterator<Item = u64> + Clone,
        at: u64,
        out: &mut [u8],
    ) -> Result<usize, TablesError> {
        let shown = |t: &&Table| ![XSDT, RSDT, DSDT].contains(&t.signature) && !hidden.contains(&t.signature);
        let all = self.list.iter().filter(shown).map(|table| table.range.start()).chain(added);
        let count = all.clone().count();
        let table_len = count.saturating_mul(size_of::<U64>()).saturating_add(size_of::<TableHeader>());
        let used = table_len.saturating_add(XSDT_AT);
        let limit = out.len() as u64;
        let out = out.get_mut(..used).ok_or(TablesError::TooLarge {
            what: "bytes of ACPI root tables",
            value: used as u64,
            limit,
        })?;
        out.fill(0);
        let (head, root) = out.split_at_mut(XSDT_AT);

        let mut header = self.root;
        header.signature = XSDT;
        header.revision = 1;
        header.length.set(table_len as u32);
        header.checksum = 0;
        let (header_bytes, entries) = root.split_at_mut(size_of::<TableHeader>());
        for (slot, table) in entries.chunks_exact_mut(8).zip(all) {
            slot.copy_from_slice(&table.to_le_bytes());
        }
        let entries_sum = checksum(entries).wrapping_neg();
        header.checksum = checksum(header.as_bytes()).wrapping_sub(entries_sum);
        header_bytes.copy_from_slice(header.as_bytes());

        let mut rsdp = self.rsdp;
        rsdp.revision = 2;
        rsdp.rsdt.set(0);
        rsdp.xsdt.set(at.wrapping_add(XSDT_AT as u64));
        rsdp.length.set(size_of::<Rsdp>() as u32);
        rsdp.reserved = [0; 3];
        rsdp.checksum = 0;
        rsdp.checksum = checksum(rsdp.as_bytes().split_at(RSDP_V1).0);
        rsdp.extended_checksum = 0;
        rsdp.extended_checksum = checksum(rsdp.as_bytes());
        for (to, from) in head.iter_mut().zip(rsdp.as_bytes()) {
            *to = *from;
        }
        Ok(used)
    }
}

fn too_many(count: usize) -> TablesError {
    TablesError::TooLarge { what: "ACPI tables", value: count as u64, limit: MAX_TABLES as u64 }
}

fn read_header(mem: &impl PhysMem, at: u64) -> Result<(TableHeader, Table), TablesError> {
    let header: TableHeader = read_at(mem, at, "ACPI table")?;
    let length = header.length.get();
    let range = PhysRange::new(at, length.into())
        .filter(|r| (size_of::<TableHeader>() as u64..=u64::from(TABLE_MAX)).contains(&r.len()))
        .ok_or(TablesError::TooLarge {
            what: "ACPI table length",
            value: length.into(),
            limit: TABLE_MAX.into(),
        })?;
    Ok((header, Table { signature: header.signature, range }))
}

/// A field of the FADT; `None` when the table is too short for it.
fn fadt_field<const N: usize>(mem: &impl PhysMem, fadt: &Table, offset: u64) -> Option<[u8; N]> {
    let field = PhysRange::new(fadt.range.start().checked_add(offset)?, N as u64)?;
    let mut bytes = [0; N];
    (fadt.range.contains(&field) && mem.read(field.start(), &mut bytes)).then_some(bytes)
}

/// The port of the ACPI timer, which firmware waits with. The FADT is firmware's own word, so only what a
/// timer can be counts: a multiple of 4 above the legacy devices, and not PCI configuration space.
pub fn pm_timer(mem: &impl PhysMem, tables: &Tables) -> Option<u16> {
    let fadt = tables.find(FADT)?;
    let block = u32::from_le_bytes(fadt_field(mem, fadt, 76)?);
    let port = u16::try_from(block).ok()?;
    (port >= 0x400 && port.is_multiple_of(4) && !(0xcf8..0xd00).contains(&port)).then_some(port)
}

/// Ports that the FADT names and that matter to the sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// See [`pm_timer`].
    pub pm_timer: Option<u16>,
    /// The SMI command port, where it is another than [`SMI_COMMAND`]: see [`smi_command`].
    pub smi_command: Option<u16>,
}

/// The FADT's SMI command port, where it is another than [`SMI_COMMAND`]. A port that other devices are known to have is an
/// error, the field's value: guarding it would take them from the guest.
///
/// Spec: \[ACPI\] "Fixed ACPI Description Table": SMI_CMD.
pub fn smi_command(mem: &impl PhysMem, tables: &Tables) -> Result<Option<u16>, u32> {
    // Interrupt controllers, timer, keyboard, clock, DMA, port 92h.
    const LEGACY_END: u16 = 0xa2;
    let field = tables.find(FADT).and_then(|fadt| fadt_field(mem, fadt, 48)).map_or(0, u32::from_le_bytes);
    match u16::try_from(field) {
        Ok(0 | SMI_COMMAND) => Ok(None),
        Ok(port) if port >= LEGACY_END && !(0xcf8..0xd00).contains(&port) => Ok(Some(port)),
        _ => Err(field),
    }
}

/// The ports by which the guest ends the machine, as the FADT has them: PM1 control (a, b), and the reset register with
/// the value that resets.
///
/// Spec: \[ACPI\] "Fixed ACPI Description Table": PM1a_CNT_BLK, PM1b_CNT_BLK, RESET_REG, RESET_VALUE.
pub fn end_ports(mem: &impl PhysMem, tables: &Tables) -> EndPorts {
    const SYSTEM_IO: u8 = 1;
    let fadt = tables.find(FADT);
    let field = |offset| fadt.and_then(|t| fadt_field(mem, t, offset)).map(u32::from_le_bytes);
    let port = |offset| field(offset).and_then(|n| u16::try_from(n).ok()).filter(|port| *port != 0);
    let byte = |offset| fadt.and_then(|t| fadt_field::<1>(mem, t, offset)).map(|[b]| b);
    let reset = port(120).zip(byte(128)).filter(|_| byte(116) == Some(SYSTEM_IO));
    EndPorts { pm1_control: [port(64), port(68)], reset }
}

/// See [`end_ports`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndPorts {
    /// PM1 control registers.
    pub pm1_control: [Option<u16>; 2],
    /// The reset register's port, and what is written there.
    pub reset: Option<(u16, u8)>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testmem::Ram;
    use proptest::prelude::*;

    pub(crate) const RSDP_AT: u64 = 0x1000;

    fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8, 512> {
        let mut bytes = Vec::from_slice(signature).unwrap();
        bytes.extend_from_slice(&(36 + body.len() as u32).to_le_bytes()).unwrap();
        bytes.extend_from_slice(&[0x77; 28]).unwrap();
        bytes.extend_from_slice(body).unwrap();
        bytes
    }

    /// An RSDP at 1000h, a root table at 1100h, FADT at 2000h, DSDT at 2400h, IVRS at 2800h, MCFG at 2c00h.
    pub(crate) fn machine(xsdt: bool) -> Ram {
        let ram = Ram::new(0x1000, 0x3000);
        let mut rsdp = *b"RSD PTR \0OEMOEM\x02\0\0\0\0\x24\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let tables = [0x2000u64, 0, 0x2800, 0x2c00];
        let mut body = std::vec::Vec::new();
        if xsdt {
            rsdp[24..32].copy_from_slice(&0x1100u64.to_le_bytes());
            tables.iter().for_each(|t| body.extend(t.to_le_bytes()));
        } else {
            rsdp[15] = 0;
            rsdp[16..20].copy_from_slice(&0x1100u32.to_le_bytes());
            tables.iter().for_each(|t| body.extend((*t as u32).to_le_bytes()));
        }
        let mut fadt = [0; 200];
        fadt[4..8].copy_from_slice(&0x2400u32.to_le_bytes());
        fadt[40..44].copy_from_slice(&0x608u32.to_le_bytes());
        for (at, bytes) in [
            (0x1000, &rsdp[..]),
            (0x1100, &table(if xsdt { b"XSDT" } else { b"RSDT" }, &body)),
            (0x2000, &table(b"FACP", &fadt)),
            (0x2400, &table(b"DSDT", &[1; 64])),
            (0x2800, &table(b"IVRS", &[2; 64])),
            (0x2c00, &table(b"MCFG", &[3; 64])),
        ] {
            assert!(ram.write(at, bytes));
        }
        ram
    }

    fn names(tables: &Tables) -> std::vec::Vec<String> {
        tables.all().iter().map(|t| Signature(t.signature).to_string()).collect()
    }

    #[test]
    fn tables_are_found_by_both_kinds_of_root() {
        assert_eq!((size_of::<Rsdp>(), size_of::<TableHeader>()), (36, 36));
        for (xsdt, root) in [(true, "XSDT"), (false, "RSDT")] {
            let ram = machine(xsdt);
            let tables = Tables::read(&ram, RSDP_AT).unwrap();
            assert_eq!(names(&tables), [root, "FACP", "DSDT", "IVRS", "MCFG"]);
            assert_eq!(tables.find(*b"DSDT").unwrap().range, PhysRange::new(0x2400, 100).unwrap());
            assert_eq!(pm_timer(&ram, &tables), Some(0x608));
        }
    }

    #[test]
    fn the_guests_root_leaves_out_what_is_hidden() {
        for xsdt in [true, false] {
            let ram = machine(xsdt);
            let tables = Tables::read(&ram, RSDP_AT).unwrap();
            let mut out = [0xee; FILTERED_MAX];
            let used =
                tables.write_filtered(&[*b"IVRS", *b"DMAR"], [0x3000].into_iter(), 0x3800, &mut out).unwrap();
            assert!(ram.write(0x3800, &out[..used]));
            assert!(ram.write(0x3000, &table(b"DMAR", &[4; 64])));
            let shown = Tables::read(&ram, 0x3800).unwrap();
            assert_eq!(names(&shown), ["XSDT", "FACP", "DSDT", "MCFG", "DMAR"]);
            let sum = |b: &[u8]| b.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            assert_eq!((sum(&out[..20]), sum(&out[..36]), sum(&out[XSDT_AT..used])), (0, 0, 0));
            assert!(tables.write_filtered(&[], [0].into_iter(), 0, &mut out[..used]).is_err());
        }
    }

    #[test]
    fn bad_tables_are_refused_by_name() {
        type Check = fn(&TablesError) -> bool;
        let cases: [(u64, &[u8], Check); 6] = [
            (0x1000, b"X", |e| matches!(e, TablesError::Field { field: "RSDP signature", .. })),
            (0x1100, b"Y", |e| matches!(e, TablesError::Field { field: "ACPI root table signature", .. })),
            (0x1104, &[36, 8, 0, 0], |e| matches!(e, TablesError::TooLarge { what: "ACPI tables", .. })),
            (0x2004, &[35, 0, 0, 0], |e| matches!(e, TablesError::TooLarge { value: 35, .. })),
            (0x2804, &[0, 0, 0, 1], |e| matches!(e, TablesError::TooLarge { value: 0x100_0000, .. })),
            (0x1124, &[0xff; 8], |e| matches!(e, TablesError::Unreadable { what: "ACPI table", .. })),
        ];
        for (at, bytes, check) in cases {
            let ram = machine(true);
            assert!(ram.write(at, bytes));
            let error = Tables::read(&ram, RSDP_AT).unwrap_err();
            assert!(check(&error), "{error}");
        }
    }

    #[test]
    fn only_what_can_be_a_timer_port_is_one() {
        for (value, expected) in [
            (0x60u32, None),
            (0x40a, None),
            (0xcf8, None),
            (0xcfc, None),
            (0x1_0608, None),
            (0, None),
            (0xb008, Some(0xb008)),
        ] {
            let ram = machine(true);
            assert!(ram.write(0x2000 + 76, &value.to_le_bytes()));
            let tables = Tables::read(&ram, RSDP_AT).unwrap();
            assert_eq!(pm_timer(&ram, &tables), expected, "{value:#x}");
        }
    }

    #[test]
    fn an_smi_command_port_is_guarded_unless_another_device_has_it() {
        for (value, expected) in [
            (0u32, Ok(None)),
            (0xb2, Ok(None)),
            (0xb0, Ok(Some(0xb0))),
            (0x1480, Ok(Some(0x1480))),
            (0x64, Err(0x64)),
            (0x92, Err(0x92)),
            (0xcfc, Err(0xcfc)),
            (0x1_00b2, Err(0x1_00b2)),
        ] {
            let ram = machine(true);
            assert!(ram.write(0x2000 + 48, &value.to_le_bytes()));
            let tables = Tables::read(&ram, RSDP_AT).unwrap();
            assert_eq!(smi_command(&ram, &tables), expected, "{value:#x}");
        }
    }

    proptest! {
        #[test]
        fn no_tables_panic(
            changes in proptest::collection::vec((0u64..0x3000, any::<u8>()), 0..6),
            more in proptest::collection::vec((prop_oneof![0u64..0x28, 0x100u64..0x150, 0x1000u64..0x1100], any::<u8>()), 0..6),
            xsdt: bool,
        ) {
            let ram = machine(xsdt);
            for (at, byte) in changes.into_iter().chain(more) {
                ram.write(0x1000 + at, &[byte]);
            }
            if let Ok(tables) = Tables::read(&ram, RSDP_AT) {
                let _ = (pm_timer(&ram, &tables), smi_command(&ram, &tables));
                let mut out = [0; FILTERED_MAX];
                prop_assert!(tables.write_filtered(&[*b"IVRS"], [0].into_iter(), 0, &mut out).is_ok());
            }
        }
    }
}
