//! What `tests/platform` does before anything boots: the bench's end of `board.bin`.

use platform::record;
use uefi_raw::table::boot::MemoryType;

/// The records, in the order in which they are obeyed.
#[derive(Default)]
pub struct Board(Vec<u8>);

impl Board {
    fn record(&mut self, kind: u32, address: u64, data: &[u8]) {
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(&(data.len() as u32).to_le_bytes());
        self.0.extend_from_slice(&address.to_le_bytes());
        self.0.extend_from_slice(data);
    }

    /// Installs ACPI tables that lie one behind the other.
    pub fn acpi(&mut self, mut tables: &[u8]) {
        while let [_, _, _, _, a, b, c, d, ..] = *tables {
            let (table, rest) = tables.split_at(u32::from_le_bytes([a, b, c, d]) as usize);
            self.record(record::ACPI, 0, table);
            tables = rest;
        }
    }

    /// Keeps memory from every operating system.
    pub fn reserve(&mut self, base: u64, size: u64) {
        self.take(base, size, MemoryType::RESERVED);
    }

    /// Takes memory for code of the runtime services.
    pub fn runtime_code(&mut self, base: u64, size: u64) {
        self.take(base, size, MemoryType::RUNTIME_SERVICES_CODE);
    }

    /// Takes memory for data of the runtime services.
    pub fn runtime_data(&mut self, base: u64, size: u64) {
        self.take(base, size, MemoryType::RUNTIME_SERVICES_DATA);
    }

    fn take(&mut self, base: u64, size: u64, ty: MemoryType) {
        self.record(record::TAKE, base, &[size, ty.0.into()].map(u64::to_le_bytes).concat());
    }

    /// Writes memory or registers.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        self.record(record::WRITE, address, data);
    }

    /// Sets a model-specific register on every CPU.
    pub fn msr(&mut self, number: u32, value: u64) {
        self.record(record::MSR, number.into(), &value.to_le_bytes());
    }

    /// Has base and length of what is started written to `address`: length first, in the second word.
    pub fn announce(&mut self, address: u64) {
        self.record(record::ANNOUNCE, address, &[]);
    }

    /// Does in `memory` what records write, and nothing else.
    #[cfg(test)]
    pub(crate) fn apply(&self, memory: &mut impl crate::senter::Target) -> anyhow::Result<()> {
        let mut rest = self.0.as_slice();
        while let Some((header, after)) = rest.split_first_chunk::<{ record::HEADER }>() {
            let word =
                |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let (data, next) = after.split_at(word(4) as usize);
            if word(0) == record::WRITE {
                memory.write(u64::from(word(8)) | u64::from(word(12)) << 32, data)?;
            }
            rest = next;
        }
        Ok(())
    }

    /// The file.
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}
