//! The guest's table: the same modules and handlers, which lead to thunks.

use zerocopy::IntoBytes;

use super::{HANDLERS_MAX, MODULES_MAX, Prmt, RawHandler, RawModule, RawTable, SIGNATURE};
use crate::service::Target;
use crate::tables::{checksum, thunk_address};

/// Bytes that [`Prmt::write_shown`] may need.
pub const SHOWN_MAX: usize = size_of::<RawTable>()
    .saturating_add(MODULES_MAX.saturating_mul(size_of::<RawModule>()))
    .saturating_add(HANDLERS_MAX.saturating_mul(size_of::<RawHandler>()));
/// Where checksums are in ACPI tables.
const CHECKSUM_AT: usize = 9;

impl Prmt {
    /// Writes to `out` the table for a guest whose thunks are at `thunks`; gives its bytes, if `out` has room. Buffers and device memory are left out: the MLE
    /// gives handlers what they need of these.
    ///
    /// Modules without handlers are left out as well: Linux takes what follows the module for its first handler.
    pub fn write_shown(&self, thunks: u64, out: &mut [u8]) -> Option<usize> {
        let out = out.first_chunk_mut::<SHOWN_MAX>()?;
        let mut used = 0usize;
        let mut put = |bytes: &[u8]| {
            let free = out.get_mut(used..).unwrap_or_default();
            free.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            used = used.saturating_add(bytes.len()).min(SHOWN_MAX);
        };
        let of = |module: usize| {
            self.handlers.iter().zip(0u8..).filter(move |(h, _)| usize::from(h.module) == module)
        };
        let modules = || self.modules.iter().enumerate().filter(|(index, _)| of(*index).next().is_some());
        let mut table = RawTable {
            signature: SIGNATURE,
            length: 0.into(),
            header: self.header,
            platform: self.platform.to_bytes(),
            modules_at: (size_of::<RawTable>() as u32).into(),
            modules: (modules().count() as u32).into(),
        };
        put(table.as_bytes());
        for (index, module) in modules() {
            let handlers = of(index).count();
            let length =
                size_of::<RawModule>().saturating_add(handlers.saturating_mul(size_of::<RawHandler>()));
            let (major, minor) = module.version;
            put(RawModule {
                revision: 0.into(),
                length: (length as u16).into(),
                guid: module.guid.to_bytes(),
                major: major.into(),
                minor: minor.into(),
                handlers: (handlers as u16).into(),
                handlers_at: (size_of::<RawModule>() as u32).into(),
                mmio: 0.into(),
            }
            .as_bytes());
            for (handler, n) in of(index) {
                put(RawHandler {
                    revision: 0.into(),
                    length: (size_of::<RawHandler>() as u16).into(),
                    guid: handler.guid.to_bytes(),
                    entry: thunk_address(thunks, Target::Handler(n)).into(),
                    static_data: 0.into(),
                    acpi_parameters: 0.into(),
                }
                .as_bytes());
            }
        }
        table.length.set(used as u32);
        out.iter_mut().zip(table.as_bytes()).for_each(|(to, from)| *to = *from);
        let sum = checksum(out.get(..used).unwrap_or_default());
        if let Some(byte) = out.get_mut(CHECKSUM_AT) {
            *byte = byte.wrapping_add(sum);
        }
        Some(used)
    }
}
