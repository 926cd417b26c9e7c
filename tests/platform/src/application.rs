//! The application.

use core::arch::asm;
use core::ffi::c_void;

use platform::{files, record, start_next};
use uefi::boot::{AllocateType, MemoryType};
use uefi::proto::acpi::AcpiTable;
use uefi::proto::loaded_image::LoadedImage;
use uefi::proto::pi::mp::MpServices;
use uefi::{Status, boot, cstr16, entry};

#[entry]
fn main() -> Status {
    let device = {
        let image = boot::open_protocol_exclusive::<LoadedImage>(boot::image_handle()).expect("own image");
        image.device().expect("own device")
    };
    let board = files().read(cstr16!("\\board.bin")).expect("board.bin");
    let mut announce = None;
    let mut rest = board.as_slice();
    while let Some((header, after)) = rest.split_first_chunk::<{ record::HEADER }>() {
        let ([kind, length], _) = header.as_chunks::<4>().0.split_first_chunk().expect("words");
        let address = u64::from_le_bytes(*header.last_chunk().expect("address"));
        let (data, next) = after.split_at(u32::from_le_bytes(*length) as usize);
        let word = || u64::from_le_bytes(data.try_into().expect("64-bit data"));
        match u32::from_le_bytes(*kind) {
            record::ACPI => install(data),
            record::TAKE => take(address, data),
            record::WRITE => write(address, data),
            record::MSR => set_everywhere(Register { number: address as u32, value: word() }),
            record::ANNOUNCE => announce = Some(address),
            kind => panic!("board.bin: record {kind}"),
        }
        rest = next;
    }
    start_next(device, |base, size| {
        if let Some(address) = announce {
            // The base last, in one access: a watcher then has both.
            write(address + 8, &size.to_le_bytes());
            // SAFETY: as in `write`.
            unsafe { (address as *mut u64).write_volatile(base) };
        }
    })
}

fn install(table: &[u8]) {
    let handle = boot::get_handle_for_protocol::<AcpiTable>().expect("ACPI table protocol");
    let firmware = boot::open_protocol_exclusive::<AcpiTable>(handle).expect("ACPI table protocol");
    // SAFETY: the table is all there, with its length; the firmware copies it.
    unsafe { firmware.install_acpi_table(table.as_ptr().cast(), table.len()) }.expect("table");
}

fn take(address: u64, data: &[u8]) {
    let (&[length, ty], []) = data.as_chunks() else { panic!("board.bin: memory") };
    let pages = (u64::from_le_bytes(length) as usize).div_ceil(boot::PAGE_SIZE);
    let ty = MemoryType(u64::from_le_bytes(ty) as u32);
    boot::allocate_pages(AllocateType::Address(address), ty, pages).expect("memory to take");
}

fn write(address: u64, data: &[u8]) {
    for (at, byte) in (address..).zip(data) {
        // SAFETY: the board's own addresses, or memory reserved before; the firmware maps them one to one.
        unsafe { (at as *mut u8).write_volatile(*byte) };
    }
}

/// A model-specific register and what it is to hold.
struct Register {
    number: u32,
    value: u64,
}

fn set_everywhere(register: Register) {
    extern "efiapi" fn set(register: *mut c_void) {
        // SAFETY: the caller's register lives until all CPUs have been here.
        let Register { number, value } = unsafe { &*register.cast::<Register>() };
        // SAFETY: CPL 0; the board's own firmware may set it.
        unsafe {
            asm!("wrmsr", in("ecx") *number, in("eax") *value as u32, in("edx") (*value >> 32) as u32);
        }
    }
    let argument = (&raw const register).cast_mut().cast::<c_void>();
    set(argument);
    let handle = boot::get_handle_for_protocol::<MpServices>().expect("MP services");
    let firmware = boot::open_protocol_exclusive::<MpServices>(handle).expect("MP services");
    if firmware.get_number_of_processors().expect("processors").enabled > 1 {
        firmware.startup_all_aps(false, set, argument, None, None).expect("other CPUs");
    }
}
