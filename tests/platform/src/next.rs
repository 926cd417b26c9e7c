//! `next.efi`, with `next.txt` as its options.

use alloc::vec::Vec;

use uefi::boot::{self, LoadImageSource};
use uefi::fs::FileSystem;
use uefi::proto::BootPolicy;
use uefi::proto::device_path::DevicePath;
use uefi::proto::device_path::build::{self, DevicePathBuilder};
use uefi::proto::loaded_image::LoadedImage;
use uefi::{CString16, Handle, Status, cstr16};

/// The volume that this application was loaded from.
pub fn files() -> FileSystem {
    FileSystem::new(boot::get_image_file_system(boot::image_handle()).expect("own volume"))
}

/// Starts what was to boot, from the same volume, on `device`; tells `loaded` before where it lies and how long it is.
pub fn start_next(device: Handle, loaded: impl FnOnce(u64, u64)) -> Status {
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
        let (base, size) = image.info();
        loaded(base as u64, size);
    }
    let _ = boot::start_image(next);
    Status::LOAD_ERROR
}
