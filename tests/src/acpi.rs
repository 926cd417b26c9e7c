//! ACPI tables of emulated boards.

use acpi_tables::sdt::Sdt;

/// Length of a table's header.
pub const HEADER: u32 = 36;

/// A table of the bench's, `length` bytes of it zero but for the header.
pub fn table(signature: [u8; 4], length: u32, revision: u8) -> Sdt {
    Sdt::new(signature, length, revision, *b"CORDON", *b"BENCH   ", 1)
}

/// Its bytes, with the checksum made right.
pub fn finish(mut table: Sdt) -> Vec<u8> {
    table.update_checksum();
    table.as_slice().to_vec()
}
