//! The one way out of a failed launch: keep the reason, cap the PCRs, reset the machine.

use hv::failure::{Record, Stage};
use hv::io::{Clock, Mmio, PortIo};
use hv::launch::{PCR_CODE, PCR_CONFIG, PCR_EXPOSURE, PCR_FIRMWARE};
use tpm::Locality;

use super::Failure;
use super::launch::take_tpm;
use crate::metal::Serial;

/// Keeps `failure` where it survives the reset, says it on the serial line, runs `cap`, and resets the machine by
/// the ports that do so. Returns only from a machine that none of them resets.
///
/// The reason is kept first, because what follows talks to devices that may be the reason.
pub fn stop(ports: &impl PortIo, failure: Failure, cap: impl FnOnce()) {
    Record { stage: Stage::Slb, code: failure.error as u16, detail: failure.detail }.save(ports);
    say(ports, failure);
    cap();
    reset(ports);
}

/// Caps the PCRs of the launch, so that nothing after us can claim its values, should the reset not work.
pub fn cap<M: Mmio>(window: M, clock: impl Clock) {
    // A TPM that does not answer leaves nothing to do but the reset, which clears the PCRs.
    if let Ok(mut tpm) = take_tpm(window, clock, Locality::Two) {
        for pcr in [PCR_CODE, PCR_CONFIG, PCR_FIRMWARE, PCR_EXPOSURE] {
            let _ = tpm.event(pcr, b"launch failed");
        }
        tpm.release();
    }
}

fn say(ports: &impl PortIo, failure: Failure) {
    let serial = Serial(ports);
    serial.text("slb: error ");
    decimal(&serial, failure.error as u16);
    serial.text(" detail ");
    decimal(&serial, failure.detail);
    serial.text(", resetting\n");
}

/// Five digits, without `core::fmt`, which would be a fifth of the image.
fn decimal<P: PortIo>(serial: &Serial<P>, value: u16) {
    for unit in [10_000, 1000, 100, 10, 1] {
        serial.byte(b'0'.wrapping_add(value.checked_div(unit).unwrap_or(0).wrapping_rem(10) as u8));
    }
}

/// Reset control register: hard reset, then with a power cycle. Keyboard controller: pulse the reset line.
const RESETS: [(u16, u8); 4] = [(0xcf9, 0x02), (0xcf9, 0x06), (0xcf9, 0x0e), (0x64, 0xfe)];

/// Tries the ports that reset a PC, the thorough ones first.
pub fn reset(ports: &impl PortIo) {
    for (port, value) in RESETS {
        ports.out8(port, value);
        // Some 50 ms without a clock: an access to this unused port takes a microsecond.
        for _ in 0..50_000 {
            ports.out8(0x80, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slb::fake::Ports;
    use hv::failure::SlbError;

    #[test]
    fn the_reason_is_kept_first_then_the_pcrs_are_capped_then_the_machine_is_reset() {
        let ports = Ports::default();
        let failure = Failure { error: SlbError::Tpm, detail: 6 };
        stop(&ports, failure, || {
            let record = Record { stage: Stage::Slb, code: SlbError::Tpm as u16, detail: 6 };
            assert_eq!(Record::load(&ports), Some(record));
            assert_eq!(*ports.serial.borrow(), "slb: error 00019 detail 00006, resetting\r\n");
            // Nothing but the record was written so far: no reset before the cap.
            assert!(ports.written.borrow().iter().all(|(port, _)| *port == 0x71));
            ports.written.borrow_mut().clear();
        });
        assert_eq!(*ports.written.borrow(), RESETS);
    }
}
