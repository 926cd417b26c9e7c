//! A loader that does nothing but GETSEC\[SENTER\], for the test of the bench's own player: all that a loader prepares in memory
//! the bench has had the firmware write ([`platform::record`]). Its options are the module's base and size.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
mod application {
    use core::arch::asm;

    use uefi::boot::MemoryType;
    use uefi::proto::loaded_image::LoadedImage;
    use uefi::{Status, boot, entry};

    #[entry]
    fn main() -> Status {
        let mut numbers = [0; 2];
        {
            let image =
                boot::open_protocol_exclusive::<LoadedImage>(boot::image_handle()).expect("own image");
            let options = image.load_options_as_cstr16().expect("options");
            let mut words = options.iter().map(|&c| u16::from(c)).chain([b' '.into()]);
            for number in &mut numbers {
                let digits = words.by_ref().take_while(|&c| c != b' '.into());
                *number = digits.fold(0u32, |n, c| n * 10 + u32::from(c - u16::from(b'0')));
            }
        }
        // SAFETY: nothing of the firmware is used from here on.
        let _ = unsafe { boot::exit_boot_services(Some(MemoryType::LOADER_DATA)) };
        let [base, size] = numbers;
        // SAFETY: CPL 0, and this program ends here. CR0.NE and CR4.SMXE are SENTER's conditions.
        unsafe {
            asm!(
                "cli",
                "mov rax, cr0",
                "or rax, 1 << 5",
                "mov cr0, rax",
                "mov rax, cr4",
                "or rax, 1 << 14",
                "mov cr4, rax",
                "xor edx, edx",
                "mov eax, 4",
                "mov ebx, edi",
                ".byte 0x0f, 0x37",
                "2: hlt",
                "jmp 2b",
                in("edi") base,
                in("ecx") size,
                options(noreturn),
            );
        }
    }
}

/// The application exists for `x86_64-unknown-uefi` alone; here it is a name that says so.
#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("senter is not a program: build it with --target x86_64-unknown-uefi");
    std::process::exit(1);
}
