//! The end of a launch by SENTER: what is left in TXT's registers, and the platform's reset.
//!
//! UNSAFETY: takes the register windows from whoever used them.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::sync::atomic::Ordering;

use hv::failure::Record;
use hv::io::Mmio;

use super::regs::{self, Registers};
use super::{LAUNCHED, insn};
use crate::metal::PhysWindow;
use crate::smp::Met;

/// GETSEC\[SEXIT\].
const SEXIT: u32 = 5;

fn registers() -> Option<Registers<PhysWindow>> {
    // SAFETY: after SENTER both windows are mapped, in the entry's tables and in ours; who had them before does not come back.
    LAUNCHED.load(Ordering::Acquire).then(|| unsafe { Registers::of_cpu() })
}

/// The guest is about to have memory with secrets: the platform wipes memory before anybody reads it, should the launch end in any
/// way but by [`leave`]. Locality 1 is the guest's.
pub fn begin_secrets() {
    if let Some(registers) = registers() {
        registers.command(regs::CMD_SECRETS);
        registers.command(regs::CMD_OPEN_LOCALITY1);
    }
}

/// Keeps `record` for the next boot.
pub fn keep(record: Record) {
    if let Some(registers) = registers() {
        registers.set_errorcode(record.errorcode());
    }
}

/// Ends the launch in order, as the guest wants it; PCRs are capped, and a reset follows. Where the CPUs have not met, that reset is
/// the chipset's, and memory is wiped.
///
/// Spec: \[TXT\] "Measured Environment Tear Down".
pub fn leave(_: Met) {
    let Some(registers) = registers() else { return };
    insn::write_back_caches();
    close(&registers);
    // They are not ours from now on.
    LAUNCHED.store(false, Ordering::Release);
    // SAFETY: CPL 0, on the first CPU; all are outside of VMX operation and none waits for a Startup IPI: they have met.
    unsafe { insn::getsec(SEXIT, 0) }
}

fn close<M: Mmio>(registers: &Registers<M>) {
    for command in [regs::CMD_NO_SECRETS, regs::CMD_UNLOCK_MEM_CONFIG, regs::CMD_CLOSE_LOCALITY1] {
        registers.command(command);
    }
    registers.close_private();
}

/// Has the chipset reset the platform; does nothing but after SENTER. With CMD.SECRETS given, what starts next finds memory wiped.
pub fn reset() {
    if let Some(registers) = registers() {
        registers.command(regs::CMD_RESET);
    }
}

#[cfg(test)]
mod tests {
    use super::super::regs::tests::{Chipset, PRIVATE_PAGE as PRIVATE, PUBLIC_PAGE as PUBLIC};
    use super::*;

    #[test]
    fn the_end_is_in_the_order_of_the_specification() {
        let chipset = Chipset::new();
        close(&chipset.registers());
        let written: Vec<u32> = chipset.writes().iter().map(|(at, _)| *at).collect();
        assert_eq!(
            written,
            [
                PRIVATE + regs::CMD_NO_SECRETS,
                PRIVATE + regs::CMD_UNLOCK_MEM_CONFIG,
                PRIVATE + regs::CMD_CLOSE_LOCALITY1,
                PRIVATE + regs::CMD_CLOSE_PRIVATE,
            ]
        );
        // Each was fenced by a read, the last one on the page that is still there.
        assert_eq!(chipset.fences(), [PRIVATE, PRIVATE, PRIVATE, PUBLIC].map(|page| page + regs::E2STS));
    }
}
