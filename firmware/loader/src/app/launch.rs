//! From ExitBootServices to SKINIT. There is no way back: whatever fails here is said on the serial line, and the
//! machine is reset.
//!
//! UNSAFETY: leaving the firmware, and jumping to code that was written as bytes.
#![expect(unsafe_code, reason = "leaves the firmware and this program")]

use core::fmt::{self, Write};

use hv::launch::{Blob, SLB_SLRT_POINTER_OFFSET};
use loader::park::{self, Apic};
use loader::{paging, table, tpm};
use uefi::boot;
use uefi::mem::memory_map::MemoryMap;

use super::metal::{self, Identity, Msrs, Page, Serial};
use super::{Prepared, say};

/// Bytes of a gate.
const GATE_SIZE: usize = 16;
/// Bytes of the exception table: the 32 architectural vectors.
pub const IDT_SIZE: u64 = 32 * GATE_SIZE as u64;

/// Says why, resets the machine.
fn stop(why: fmt::Arguments<'_>) -> ! {
    let _ = write!(Serial, "cordon: {why}; resetting\r\n");
    metal::reset()
}

extern "sysv64" fn invalid_opcode() -> ! {
    stop(format_args!("SKINIT failed: invalid opcode, this CPU has no SKINIT"))
}
extern "sysv64" fn general_protection() -> ! {
    stop(format_args!("SKINIT failed: general protection fault"))
}
extern "sysv64" fn other_exception() -> ! {
    stop(format_args!("SKINIT failed: exception on the way to it"))
}

/// Spec: \[APM2\] "Exceptions and Interrupts".
const INVALID_OPCODE: usize = 6;
const GENERAL_PROTECTION: usize = 13;

/// An interrupt gate of long mode. Spec: \[APM2\] "Gate Descriptors".
fn gate(handler: extern "sysv64" fn() -> !, code_segment: u16) -> [u8; GATE_SIZE] {
    const PRESENT_INTERRUPT_GATE: u8 = 0x8e;
    let [a, b, c, d, e, f, g, h] = (handler as usize as u64).to_le_bytes();
    let [s, t] = code_segment.to_le_bytes();
    [a, b, s, t, 0, PRESENT_INTERRUPT_GATE, c, d, e, f, g, h, 0, 0, 0, 0]
}

/// Leaves the firmware and launches. An exception from here on resets the machine: nothing runs unmeasured.
pub fn launch(mut p: Prepared) -> ! {
    for (vector, to) in p.idt.bytes_mut().chunks_exact_mut(GATE_SIZE).enumerate() {
        let handler = match vector {
            INVALID_OPCODE => invalid_opcode,
            GENERAL_PROTECTION => general_protection,
            _ => other_exception,
        };
        to.copy_from_slice(&gate(handler, metal::code_segment()));
    }
    let code = p.table.launch_page.saturating_add(table::SKINIT_OFFSET);
    let slrt = p.slrt.base().to_le_bytes();
    if !p.launch_page.write(table::SKINIT_OFFSET, &table::SKINIT_CODE)
        || !p.slb.write(SLB_SLRT_POINTER_OFFSET, &slrt)
    {
        stop(format_args!("launch page or SLB is too small"));
    }
    say!("cordon: leaving the firmware");

    // SAFETY: the volume and its files are closed, the graphics protocol too: no reference to boot services is left,
    // and from here on the serial line is the console.
    let map = unsafe { boot::exit_boot_services(None) };
    metal::disable_interrupts();
    // SAFETY: the gates lead to functions of this image; it and the table are loader memory, which nobody takes now.
    unsafe { metal::load_idt(p.idt.bytes()) };

    let meta = map.meta();
    let Some(map) = map.buffer().get(..meta.map_size).filter(|map| p.memory_map.write(0, map)) else {
        stop(format_args!("the memory map grew to {} bytes", meta.map_size));
    };
    p.table.memory_map = Blob { base: p.memory_map.base().into(), size: (map.len() as u64).into() };
    p.table.descriptor_size = u32::try_from(meta.desc_size).unwrap_or(u32::MAX);
    p.table.descriptor_version = meta.desc_version;
    match table::build(&p.table) {
        Ok((bytes, used)) => {
            let fits = bytes.get(..used).is_some_and(|bytes| p.slrt.write(0, bytes));
            if !fits {
                stop(format_args!("the SLRT does not fit"));
            }
        }
        Err(error) => stop(format_args!("{error}")),
    }
    tpm::relinquish(&p.tpm, p.tpm_interface);

    let apic_page = match p.apic {
        Apic::Page => Some(Page::new(park::APIC_PAGE)),
        Apic::X2 => None,
    };
    if park::park_others(apic_page.as_ref(), &Msrs, &p.clock).is_err() {
        stop(format_args!("INIT to the other processors did not leave the APIC"));
    }

    metal::lift_write_protection();
    let (root, levels) = metal::page_tables();
    if paging::make_executable(&Identity, root, levels, code).is_err() {
        stop(format_args!("the launch page {code:#x} is not mapped"));
    }
    metal::forget_mapping(code);

    let slb = p.table.slb_base;
    let _ = write!(Serial, "cordon: SKINIT at {code:#x}, SLB at {slb:#x}\r\n");
    let Ok(slb) = u32::try_from(slb) else { stop(format_args!("the SLB is not below 4 GiB")) };
    // SAFETY: the page was made executable, holds SKINIT and then an invalid opcode, and every exception resets.
    unsafe { metal::skinit(code, slb) }
}
