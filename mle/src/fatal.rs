//! The end of a launch that cannot go on: say why, cap the dynamic PCRs, reset the machine.
//!
//! UNSAFETY: takes the serial port and the reset port from wherever the failure happened; nothing runs afterwards.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use hv::failure::{MleError, Record, Stage};
use hv::io::Clock;

use crate::guest::ends;
use crate::metal::{Ports, Serial};
use crate::senter;
use crate::smp::Met;
use crate::trap::Frame;

/// A second failure while the first is being handled resets at once.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// Ends the launch: keeps `error` and its detail for the next boot, logs `why`, caps PCR 17 to 19 and 22 so that nothing later can claim to be this launch, resets.
pub fn stop(error: MleError, detail: u16, why: fmt::Arguments<'_>) -> ! {
    give_up(Record { stage: Stage::Mle, code: error as u16, detail }, why)
}

/// The same for any record.
pub fn give_up(record: Record, why: fmt::Arguments<'_>) -> ! {
    // SAFETY: only images call this, at CPL 0; whoever used the ports is not coming back.
    let ports = unsafe { Ports::new() };
    if !STOPPING.swap(true, Ordering::AcqRel) {
        // First, because what follows talks to devices that may be the reason.
        record.save(&ports);
        senter::end::keep(record);
        let _ = writeln!(Serial(ports), "cordon: FATAL: {why}");
        crate::measure::cap();
    }
    reset(ports)
}

/// Ends the launch as the guest wants it, or has it coming: says `why`, caps the PCRs, has all CPUs `meet` after SENTER, resets.
pub fn end_by_guest(
    ports: Ports,
    clock: &impl Clock,
    why: fmt::Arguments<'_>,
    meet: impl FnOnce() -> Option<Met>,
) -> ! {
    if STOPPING.swap(true, Ordering::AcqRel) {
        reset(ports)
    }
    let _ = writeln!(Serial(ports), "cordon: guest ends: {why}");
    crate::measure::cap();
    end(if senter::launched() { meet() } else { None }, clock)
}

/// Ends a launch whose PCRs are capped: in order, if all CPUs have met. Then the machine, as the guest does if it does by a port, and by
/// a reset in any other case.
pub fn end(met: Option<Met>, clock: &impl Clock) -> ! {
    if let Some(met) = met {
        senter::end::leave(met);
    }
    // SAFETY: only images call this, at CPL 0; whoever used the ports is not coming back.
    let ports = unsafe { Ports::new() };
    ends::carry_out(&ports, clock);
    reset(ports)
}

/// Handler of the MLE's own exceptions.
pub fn exception(frame: &Frame) -> ! {
    let cr2: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
    let why = format_args!(
        "exception {} error {:#x} at rip {:#x}, rsp {:#x}, rflags {:#x}, cr2 {:#x}",
        frame.vector, frame.error, frame.rip, frame.rsp, frame.rflags, cr2
    );
    stop(MleError::Exception, frame.vector as u16, why)
}

/// Resets the machine: by the ports that do so, or else by a triple fault.
pub fn reset(ports: Ports) -> ! {
    senter::end::reset();
    crate::slb::stop::reset(&ports);
    let nowhere = [0u8; 10];
    // SAFETY: an empty IDT makes the next exception a shutdown, which is the wish.
    unsafe { core::arch::asm!("lidt [{}]", "ud2", in(reg) nowhere.as_ptr(), options(noreturn)) }
}
