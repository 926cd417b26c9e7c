//! The end of a launch that cannot go on: say why, cap the dynamic PCRs, reset the machine.
//!
//! UNSAFETY: takes the serial port and the reset port from wherever the failure happened; nothing runs afterwards.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use hv::io::PortIo;

use crate::metal::{Ports, Serial};
use crate::trap::Frame;

/// A second failure while the first is being handled resets at once.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// Ends the launch: logs `why`, caps PCR 17 to 19 and 22 so that nothing later can claim to be this launch, resets.
pub fn stop(why: fmt::Arguments<'_>) -> ! {
    // SAFETY: only images call this, at CPL 0; whoever used the ports is not coming back.
    let ports = unsafe { Ports::new() };
    if !STOPPING.swap(true, Ordering::AcqRel) {
        let _ = writeln!(Serial(ports), "cordon: FATAL: {why}");
        crate::measure::cap();
    }
    reset(ports)
}

/// Handler of the MLE's own exceptions.
pub fn exception(frame: &Frame) -> ! {
    let cr2: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
    stop(format_args!(
        "exception {} error {:#x} at rip {:#x}, rsp {:#x}, rflags {:#x}, cr2 {:#x}",
        frame.vector, frame.error, frame.rip, frame.rsp, frame.rflags, cr2
    ))
}

/// Resets the machine: the reset control register, then the keyboard controller, then a triple fault.
pub fn reset(ports: Ports) -> ! {
    const RESET_CONTROL: u16 = 0xcf9;
    const KEYBOARD: u16 = 0x64;
    ports.out8(RESET_CONTROL, 0x02);
    ports.out8(RESET_CONTROL, 0x06);
    wait(ports);
    ports.out8(KEYBOARD, 0xfe);
    wait(ports);
    let nowhere = [0u8; 10];
    // SAFETY: an empty IDT makes the next exception a shutdown, which is the wish.
    unsafe { core::arch::asm!("lidt [{}]", "ud2", in(reg) nowhere.as_ptr(), options(noreturn)) }
}

/// Some milliseconds, without a clock: port 80h takes about a microsecond.
fn wait(ports: Ports) {
    for _ in 0..50_000 {
        ports.out8(0x80, 0);
    }
}
