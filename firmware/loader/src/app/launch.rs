//! From ExitBootServices to SKINIT or SENTER. There is no way back: whatever fails here is said on the serial line, and the
//! machine is reset.
//!
//! UNSAFETY: leaving the firmware, and jumping to code that was written as bytes.
#![expect(unsafe_code, reason = "leaves the firmware and this program")]

use core::fmt::{self, Write};

use hv::io::PhysMem;
use hv::launch::{Blob, SLB_SLRT_POINTER_OFFSET};
use loader::park::{self, Apic};
use loader::{paging, senter, table, tpm};
use uefi::boot;
use uefi::mem::memory_map::MemoryMap;

use super::metal::{self, Identity, Msrs, Page, Serial};
use super::senter::Senter;
use super::{Means, Prepared, say};
use vmx::txt::heap;

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
    stop(format_args!("launch failed: invalid opcode, this CPU has no SKINIT or no GETSEC"))
}
extern "sysv64" fn general_protection() -> ! {
    stop(format_args!("launch failed: general protection fault"))
}
extern "sysv64" fn other_exception() -> ! {
    stop(format_args!("launch failed: exception on the way to it"))
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
    let slrt = p.slrt.base().to_le_bytes();
    let (offset, instruction, fits) = match &mut p.means {
        Means::Skinit(slb) => {
            (table::SKINIT_OFFSET, &table::SKINIT_CODE[..], slb.write(SLB_SLRT_POINTER_OFFSET, &slrt))
        }
        Means::Senter(_) => (table::SENTER_OFFSET, &table::SENTER_CODE[..], true),
    };
    let code = p.table.launch_page.saturating_add(offset);
    if !fits || !p.launch_page.write(offset, instruction) {
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

    match &p.means {
        Means::Skinit(_) => park_others(&p),
        // SINIT has them meet by themselves.
        Means::Senter(senter) => fill(senter),
    }

    metal::lift_write_protection();
    let (root, levels) = metal::page_tables();
    if paging::make_executable(&Identity, root, levels, code).is_err() {
        stop(format_args!("the launch page {code:#x} is not mapped"));
    }
    metal::forget_mapping(code);

    match p.means {
        Means::Skinit(slb) => {
            let slb = slb.base();
            let _ = write!(Serial, "cordon: SKINIT at {code:#x}, SLB at {slb:#x}\r\n");
            let Ok(slb) = u32::try_from(slb) else { stop(format_args!("the SLB is not below 4 GiB")) };
            // SAFETY: the page was made executable, holds SKINIT and then an invalid opcode, and every exception resets.
            unsafe { metal::skinit(code, slb) }
        }
        Means::Senter(senter) => {
            let (base, size) = (senter.txt.sinit.start(), senter.module.bytes().len());
            let _ = write!(Serial, "cordon: SENTER at {code:#x}, SINIT at {base:#x}\r\n");
            metal::with_caches_off(|| senter::set_mtrrs(&Msrs, &senter.mtrrs));
            // SINIT's memory lies below 4 GiB, and so does its end.
            // SAFETY: the page was made executable, holds GETSEC and then an invalid opcode, and every exception resets.
            unsafe { metal::senter(code, base as u32, size as u32, senter.smx) }
        }
    }
}

/// Sends the other processors where SKINIT needs them.
fn park_others(p: &Prepared) {
    let apic_page = match p.apic {
        Apic::Page => Some(Page::new(park::APIC_PAGE)),
        Apic::X2 => None,
    };
    if park::park_others(apic_page.as_ref(), &Msrs, &p.clock).is_err() {
        stop(format_args!("INIT to the other processors did not leave the APIC"));
    }
}

/// Puts everything where SINIT looks for it.
fn fill(senter: &Senter) {
    let heap = senter.txt.heap.start().saturating_add(senter.txt.bios);
    if !Identity.write(senter.txt.sinit.start(), senter.module.bytes())
        || !Identity.write(heap, &heap::build(&senter.heap))
    {
        stop(format_args!("TXT's memory is not where its registers say"));
    }
    if senter.smx {
        senter::clear_machine_checks(&Msrs);
    }
    for base in &senter.iommus {
        if !senter::quiet_iommu(&Page::new(*base)) {
            stop(format_args!("the IOMMU at {base:#x} does not stop translating"));
        }
    }
}
