//! The boot-time part.

use alloc::vec::Vec;
use core::ffi::c_void;

use uefi::boot::{self, LoadImageSource, MemoryType};
use uefi::fs::FileSystem;
use uefi::proto::BootPolicy;
use uefi::proto::device_path::DevicePath;
use uefi::proto::device_path::build::{self, DevicePathBuilder};
use uefi::proto::loaded_image::LoadedImage;
use uefi::{CString16, Handle, Status, cstr16, entry};

use crate::driver;

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
    start_next(device.expect("own device"))
}

fn files() -> FileSystem {
    FileSystem::new(boot::get_image_file_system(boot::image_handle()).expect("own volume"))
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

/// Starts what was to boot, from the same volume.
fn start_next(device: Handle) -> Status {
    let options = files().read_to_string(cstr16!("\\next.txt")).expect("next.txt");
    let options = CString16::try_from(options.as_str()).expect("options");
    let mut path = Vec::new();
    let mut builder = DevicePathBuilder::with_vec(&mut path);
    {
        // Given back before anybody else starts.
        let device = boot::open_protocol_exclusive::<DevicePath>(device).expect("device path");
        for node in device.node_iter() {
            builder = builder.push(&node).expect("node");
        }
    }
    let name = build::media::FilePath { path_name: cstr16!("\\next.efi") };
    let path = builder.push(&name).and_then(DevicePathBuilder::finalize).expect("path");
    let source = LoadImageSource::FromDevicePath { device_path: path, boot_policy: BootPolicy::ExactMatch };
    let next = boot::load_image(boot::image_handle(), source).expect("next.efi");
    {
        let mut image = boot::open_protocol_exclusive::<LoadedImage>(next).expect("next image");
        let size = u32::try_from(options.num_bytes()).expect("size");
        // SAFETY: the options live on this stack until the image ends, and it gets their size.
        unsafe { image.set_load_options(options.as_ptr().cast::<u8>(), size) };
    }
    let _ = boot::start_image(next);
    Status::LOAD_ERROR
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
