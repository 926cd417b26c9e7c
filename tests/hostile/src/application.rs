//! The boot-time part.

use core::ffi::c_void;

use platform::{files, start_next};
use uefi::boot::{self, LoadImageSource, MemoryType};
use uefi::proto::loaded_image::LoadedImage;
use uefi::{Status, cstr16, entry};

use crate::{dma, driver};

#[entry]
fn main() -> Status {
    let (kind, device) = {
        let image = boot::open_protocol_exclusive::<LoadedImage>(boot::image_handle()).expect("own image");
        (image.code_type(), image.device())
    };
    if kind == MemoryType::RUNTIME_SERVICES_CODE {
        driver::install();
        return Status::SUCCESS;
    }
    load_driver();
    dma::prepare();
    start_next(device.expect("own device"), |_, _| ())
}

/// Loads this file as a runtime driver, whose memory stays after boot services have ended.
fn load_driver() {
    /// Where the PE header's offset is, and in that header the subsystem. Spec: \[PE\] "Optional Header".
    const PE: usize = 0x3c;
    const SUBSYSTEM: usize = 0x5c;
    const RUNTIME_DRIVER: u8 = 12;
    let mut file = files().read(cstr16!("\\EFI\\BOOT\\BOOTX64.EFI")).expect("own file");
    let header = usize::from(u16::from_le_bytes([file[PE], file[PE + 1]]));
    file[header + SUBSYSTEM] = RUNTIME_DRIVER;
    let source = LoadImageSource::FromBuffer { buffer: &file, file_path: None };
    let driver = boot::load_image(boot::image_handle(), source).expect("driver");
    boot::start_image(driver).expect("driver");
}

/// Corrects a table's checksum. `table` starts with an EFI table header.
pub fn sign(table: *mut uefi_raw::table::Header) {
    let system = uefi::table::system_table_raw().expect("system table");
    // SAFETY: called at boot time, with a table of the firmware, whose header tells its size.
    unsafe {
        let services = (*system.as_ptr()).boot_services;
        (*table).crc = 0;
        let mut crc = 0;
        let status = ((*services).calculate_crc32)(table.cast::<c_void>(), (*table).size as usize, &mut crc);
        assert!(status.is_success());
        (*table).crc = crc;
    }
}
