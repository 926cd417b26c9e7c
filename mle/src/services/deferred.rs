//! Writes that wait for the end of the guest.

use firmware::call::{Pending, Status};
use firmware::deferred::{Base, Wanted};
use firmware::exposure::Decision;
use firmware::service::{Service, Target};
use hv::failure::{Record as Failure, Stage};

use super::sandboxed::{Direction, End, buffer_at, copy_buffer};
use super::{Call, Parts, Phase, Services};
use crate::apic::Xapic;
use crate::cpu::Cpu;
use crate::metal::{PhysWindow, Ports};
use crate::{exposure, measure};

impl Services {
    /// Takes a write that waits. `found` is the lookup and its answer, if one had to be made.
    pub(super) fn defer(&mut self, call: &Call, found: Option<(&Pending, u64)>, write: &Pending) -> Phase {
        let Parts { overlay, buffer, scratch, area, mem, .. } = &mut self.parts;
        let base = match found {
            Some((lookup, rax)) => {
                copy_buffer(*area, scratch, mem, lookup.results(), Direction::FromSandbox);
                Pending::base(rax, scratch)
            }
            None => Ok(Base::Absent),
        };
        let status = match (buffer.key(), write.write(buffer), base) {
            (Some(key), Some((attributes, data)), Ok(base)) => overlay.set(key, attributes, data, base),
            (_, _, Err(status)) => status,
            _ => Status::INVALID_PARAMETER,
        };
        exposure::record(&self.record_of(call, Decision::DEFERRED, status.0 as u64));
        Phase::Answered(status)
    }

    /// What the overlay answers in firmware's place, as firmware's RAX. `asked`: the answer of firmware to the call, if it
    /// was asked.
    pub(super) fn overlaid(&mut self, pending: &Pending, asked: Option<u64>) -> Option<u64> {
        let Parts { overlay, buffer, .. } = &mut self.parts;
        if overlay.count() == 0 {
            return None;
        }
        match (pending.service(), asked) {
            (Service::GetVariable, None) => {
                let wanted = overlay.get(buffer.key()?)?;
                Some(pending.answer_variable(wanted, buffer))
            }
            // The guest asks for the one after a variable that firmware does not know.
            (Service::GetNextVariableName, None) => {
                let key = buffer.key().filter(|key| overlay.is_new(*key))?;
                Some(match overlay.next_new(Some(key)) {
                    Some(next) => pending.answer_name(next, buffer),
                    None => Status::NOT_FOUND.0 as u64,
                })
            }
            // After firmware's last variable come those that wait.
            (Service::GetNextVariableName, Some(rax)) if rax == Status::NOT_FOUND.0 as u64 => {
                Some(pending.answer_name(overlay.next_new(None)?, buffer))
            }
            _ => None,
        }
    }

    /// Whether firmware's answer to a GetNextVariableName is a variable that is to be gone.
    pub(super) fn is_hidden(&self, pending: &Pending, rax: u64) -> bool {
        let Parts { overlay, buffer, .. } = &self.parts;
        pending.service() == Service::GetNextVariableName
            && rax == Status::SUCCESS.0 as u64
            && buffer.key().and_then(|key| overlay.get(key)) == Some(Wanted::Deleted)
    }

    /// The guest is at its end: caps the dynamic PCRs, and then carries out what waited for it.
    pub(super) fn end(&mut self, cpu: &mut Cpu, local: &Xapic<PhysWindow>, ports: Ports) {
        if self.parts.overlay.count() != 0 {
            measure::cap();
            self.commit(cpu, local, ports);
        }
    }

    /// Has firmware carry out all writes that waited. The guest does not run any more on this CPU, and the dynamic PCRs
    /// are capped: what firmware does now is no part of the launched system. How many firmware did not take, and its first
    /// answer, are shown on the next boot.
    fn commit(&mut self, cpu: &mut Cpu, local: &Xapic<PhysWindow>, ports: Ports) {
        let mut failed = 0u16;
        let mut first = 0;
        for index in 0..self.parts.overlay.count() {
            let Parts { overlay, buffer, .. } = &mut self.parts;
            let Some((key, wanted)) = overlay.at(index) else { break };
            let pending = Pending::commit(key, wanted, buffer);
            let call = self.new_call(Target::Service(Service::SetVariable), local.id());
            self.hand_over(pending.arguments(self.parts.buffer));
            let registers = pending.call(buffer_at(self.parts.area));
            let mut status = Status::DEVICE_ERROR.0 as u64;
            if self.enter(&call, &registers).is_ok() {
                let mut end = End::Preempted;
                while end == End::Preempted {
                    end = self.run(&call, cpu, false, local, ports);
                }
                if end == End::Returned {
                    status = self.parts.vcpu.vcpu.gprs().rax;
                }
            }
            if status != Status::SUCCESS.0 as u64 {
                failed = failed.saturating_add(1);
                first = if first == 0 { status } else { first };
            }
        }
        self.parts.overlay.clear();
        if failed != 0 {
            Failure { stage: Stage::Deferred, code: failed, detail: first as u16 }.save(&ports);
        }
    }
}
