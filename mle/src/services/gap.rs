//! Calls that firmware carries out between two launches: policy `relaunch`.

use firmware::call::FirmwareCall;
use firmware::exposure::{Decision, Kind, Record, Text};
use hv::io::PhysMem;
use zerocopy::IntoBytes;

use super::{Call, Job, Parts, Phase, SERVICES, Services, Status, buffer_at};
use crate::cpu::Cpu;
use crate::exposure;
use crate::relaunch::{Error, Round};

/// Longest that a call may wait for all CPUs to leave the guest, in microseconds.
const LEAVING_US: u64 = 10_000_000;

/// A call that firmware is to carry out on the bare machine.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct GapCall {
    /// The service's entry point.
    pub entry: u64,
    /// The stack pointer there, where the return address is.
    pub rsp: u64,
    /// First argument.
    pub rcx: u64,
    /// Second argument.
    pub rdx: u64,
    /// Third argument.
    pub r8: u64,
    /// Fourth argument.
    pub r9: u64,
}

impl Services {
    /// The call, if it can be made in this way at all, waits for its announcement to be measured, and then for the next launch.
    pub(super) fn leave(&self, call: &Call, job: Job) -> Phase {
        let can = self.parts.gap_call(&job).is_some();
        let (decision, status, text) = match can {
            true => (Decision::RELAUNCH, Status::SUCCESS, "this launch ends, to be done again"),
            false => (Decision::DENIED, Status::UNSUPPORTED, "no entry point in runtime code"),
        };
        let record = self.record_of(call, decision, status.0 as u64);
        exposure::record(&Record { text: Some(Text::new(text)), ..record });
        if can { Phase::Leaving(job) } else { Phase::Answered(status) }
    }
}

impl Services {
    /// Whether a call has waited for long that all CPUs leave the guest.
    pub(super) fn leaves_too_long(&self, call: &Call) -> bool {
        exposure::now_us(&self.parts.clock).saturating_sub(call.since_us) > LEAVING_US
    }

    /// This launch goes on.
    pub(super) fn stays(&self, call: &Call) -> Phase {
        let status = Status::DEVICE_ERROR;
        let text = Some(Text::new("not all CPUs leave the guest"));
        let record = self.record_of(call, Decision::DENIED, status.0 as u64);
        exposure::record(&Record { text, kind: Kind::REFUSED, ..record });
        Phase::Answered(status)
    }
}

impl Parts {
    /// What firmware is to be entered with. None without an entry point, or for a job that is not one call.
    fn gap_call(&self, job: &Job) -> Option<GapCall> {
        let Job::Call(pending) = job else { return None };
        let registers = pending.call(buffer_at(self.area));
        let entry = self.entry(registers.target)?;
        let FirmwareCall { rcx, rdx, r8, r9, .. } = registers;
        Some(GapCall { entry, rsp: self.put_frame(&registers), rcx, rdx, r8, r9 })
    }

    /// Puts what firmware finds on its stack there; where it begins.
    pub(super) fn put_frame(&self, registers: &FirmwareCall) -> u64 {
        let frame = registers.frame(self.return_to);
        // Aligned so that RSP is 8 modulo 16 at the entry point.
        let rsp = buffer_at(self.area).wrapping_sub(size_of_val(&frame) as u64).wrapping_sub(8) & !0xf | 8;
        self.mem.write(rsp, frame.as_bytes());
        rsp
    }
}

/// Has `round` carry out the call that waits for it, given the call and the event log of this launch, and takes what it brought. To be called
/// when [`super::call`] said so.
///
/// # Errors
/// Those of `round`, and of what it brought, after which there is no going on.
pub fn relaunch<E: From<Error>>(
    cpu: &mut Cpu,
    round: impl FnOnce(&mut Cpu, GapCall, &[u8]) -> Result<Result<Round, Error>, E>,
) -> Result<(), E> {
    let Some(mut services) = SERVICES.get().map(|services| services.lock()) else { return Ok(()) };
    let services = &mut *services;
    let Some((call, job)) = leaving(&mut services.under_way, exposure::any_waits()) else { return Ok(()) };
    // It had one when it was admitted.
    let Some(gap) = services.parts.gap_call(&job) else { return Ok(()) };
    cpu.swap_fpu(&mut services.parts.fpu);
    let log = services.parts.log.get(..services.parts.log_used).unwrap_or_default();
    let brought = round(cpu, gap, log)?;
    cpu.swap_fpu(&mut services.parts.fpu);
    let phase = match brought {
        Ok(round) => {
            services.resumed(&call, &round)?;
            exposure::record(&services.record_of(&call, Decision::RELAUNCH, round.rax));
            Phase::Returned(job, round.rax)
        }
        Err(error) if error.ends_launch() => return Err(error.into()),
        Err(error) => {
            let status = Status::DEVICE_ERROR;
            let record = services.record_of(&call, Decision::DENIED, status.0 as u64);
            exposure::record(&Record { text: Some(Text::new(error)), kind: Kind::REFUSED, ..record });
            Phase::Answered(status)
        }
    };
    services.under_way = Some((call, phase));
    Ok(())
}

/// The call that leaves now. With records that wait, none does: another CPU's came since the announcement was measured, and this
/// launch's PCR 22 has to have it. The call goes on, and leaves again.
fn leaving<C>(under_way: &mut Option<(C, Phase)>, records_wait: bool) -> Option<(C, Job)> {
    match under_way.take() {
        Some((call, Phase::Leaving(job))) if !records_wait => Some((call, job)),
        other => {
            *under_way = other;
            None
        }
    }
}

impl Services {
    /// Another launch has put everything back: what it measured is what counts now, and PCR 22 is zero.
    fn resumed(&mut self, call: &Call, round: &Round) -> Result<(), Error> {
        let parts = &mut self.parts;
        let room = parts.log.get_mut(..round.log_size).unwrap_or_default();
        parts.mem.read(round.log, room);
        parts.log_used = room.len();
        parts.watch.lock().distrust();
        parts.flush_nested();
        parts.relaunched = Some((round.number, round.took));
        Ok(exposure::relaunched(round.number, call.owner, &parts.clock)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_launch_ends_while_a_record_of_another_cpu_waits() {
        let mut call = Some(("of CPU 0", Phase::Leaving(Job::Update { initiate_reset: false })));
        exposure::record(&Record::new(Kind::DENIED_MEMORY, 1, 0));
        assert!(exposure::any_waits());
        assert!(leaving(&mut call, exposure::any_waits()).is_none());
        assert!(matches!(call, Some((_, Phase::Leaving(_)))), "it leaves again");
        // What would have left if nobody had looked.
        assert!(leaving(&mut call, false).is_some() && call.is_none());
    }

    #[test]
    fn only_a_call_that_leaves_ends_a_launch() {
        let mut call = Some(("of CPU 0", Phase::Answered(Status::SUCCESS)));
        assert!(leaving(&mut call, false).is_none() && call.is_some());
        assert!(leaving::<()>(&mut None, false).is_none());
    }
}
