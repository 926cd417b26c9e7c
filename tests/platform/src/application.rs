//! The application.

use platform::{files, start_next};
use uefi::proto::acpi::AcpiTable;
use uefi::proto::loaded_image::LoadedImage;
use uefi::{Status, boot, cstr16, entry};

#[entry]
fn main() -> Status {
    let device = {
        let image = boot::open_protocol_exclusive::<LoadedImage>(boot::image_handle()).expect("own image");
        image.device().expect("own device")
    };
    install(&files().read(cstr16!("\\acpi.bin")).expect("acpi.bin"));
    start_next(device)
}

/// Installs tables. Spec: \[ACPI\] "System Description Table Header": the length follows the signature.
fn install(mut tables: &[u8]) {
    let handle = boot::get_handle_for_protocol::<AcpiTable>().expect("ACPI table protocol");
    let firmware = boot::open_protocol_exclusive::<AcpiTable>(handle).expect("ACPI table protocol");
    while let [_, _, _, _, a, b, c, d, ..] = *tables {
        let length = u32::from_le_bytes([a, b, c, d]);
        let (table, rest) = tables.split_at_checked(length as usize).expect("a whole table");
        // SAFETY: the table is all there, with its length; the firmware copies it.
        unsafe { firmware.install_acpi_table(table.as_ptr().cast(), table.len()) }.expect("table");
        tables = rest;
    }
}
