//! The run of a call in the sandbox: entry, exits, end.

use firmware::call::{CALL_BUFFER_SIZE, CallBuffer, FirmwareCall, Pieces};
use firmware::exposure::{Decision, Kind, Record, Text};
use firmware::sandbox::{NotReady, RTC_DATA, RTC_INDEX, Reason, RtcIndex, State, Verdict, is_clock};
use firmware::service::Target;
use hv::addr::PhysRange;
use hv::io::{Clock, PhysMem, PortIo};
use hv::vcpu::{Access, Exit};
use log::warn;
use zerocopy::IntoBytes;

use super::{Call, Parts, Services};
use crate::apic::Xapic;
use crate::backend::PortMap;
use crate::cpu::Cpu;
use crate::exposure::told;
use crate::guest::exits::TWO_BYTES;
use crate::guest::ports::{finish_port, guarded_access, port_access};
use crate::guest::{cpuid, ends, ports};
use crate::legacy_pic::Silenced;
use crate::lent_timer::LentTimer;
use crate::metal::{Identity, PhysWindow, Ports};
use crate::{exposure, smi};

impl Parts {
    /// Where firmware is entered for this.
    pub(super) fn entry(&self, target: Target) -> Option<u64> {
        match target {
            Target::Service(service) => self.entries.get(service.index()).copied().flatten(),
            Target::Handler(n) => self.handlers.as_ref()?.get(n).map(|handler| handler.entry),
        }
    }

    /// Does the access if it is one that [`Sandbox::rtc_index`](firmware::sandbox::Sandbox::rtc_index) decides about; false if not.
    fn rtc_index(&mut self, exit: &Exit, ports: &Ports) -> bool {
        let Exit::Port { port: RTC_INDEX, size: 1, input, string: false, next_rip } = *exit else {
            return false;
        };
        let vcpu: &mut dyn hv::vcpu::Vcpu = &mut *self.vcpu.vcpu;
        let rax = &mut vcpu.gprs_mut().rax;
        match self.state.rtc_index(input, *rax as u8) {
            None => return false,
            Some(RtcIndex::Read) => *rax = *rax & !0xff | u64::from(ports.in8(RTC_INDEX)),
            Some(RtcIndex::Select(index)) => select_rtc(self.ports, ports, index),
        }
        vcpu.skip_to(next_rip);
        true
    }
}

/// Selects a register for firmware. Accesses of the clock's own do not exit from then on, until the guest runs: each is one exit
/// less of the many that reading the time takes.
fn select_rtc(map: &mut PortMap, ports: &Ports, index: u8) {
    ports.out8(RTC_INDEX, index);
    if is_clock(index) { map.allow(RTC_DATA) } else { map.intercept(RTC_DATA) }
}

impl Services {
    /// Gives the sandbox `pieces` of the MLE's call buffer.
    pub(super) fn hand_over(&mut self, pieces: Pieces) {
        let parts = &mut self.parts;
        copy_buffer(parts.area, parts.buffer, &parts.mem, pieces, Direction::ToSandbox);
    }

    /// Prepares the sandbox for a call. What the call needs of memory is in place.
    pub(super) fn enter(&mut self, call: &Call, registers: &FirmwareCall) -> Result<(), NotReady> {
        self.revive(call);
        let parts = &mut self.parts;
        let Some(entry) = parts.entry(registers.target) else {
            parts.state.kill(Reason::NoEntry);
            self.died(call, Reason::NoEntry);
            return Err(NotReady::Dead(Reason::NoEntry));
        };
        parts.state.start(parts.clock.now_us(), call.place)?;
        let rsp = parts.put_frame(registers);
        let runner = parts.runner(call.place);
        if runner.on.replace(call.owner) != Some(call.owner) {
            runner.vcpu.flush_nested();
        }
        runner.vcpu.start_long_mode(entry, rsp, self.root, (0, 0));
        let g = runner.vcpu.gprs_mut();
        (g.rcx, g.rdx) = (registers.rcx, registers.rdx);
        g.set_by_encoding(8, registers.r8);
        g.set_by_encoding(9, registers.r9);
        g.rsp = rsp;
        Ok(())
    }

    /// Makes a dead sandbox anew from what it was at launch, if the configuration wants that.
    pub(super) fn revive(&mut self, call: &Call) {
        let parts = &mut self.parts;
        let State::Dead(reason) = parts.state.state() else { return };
        if reason == Reason::NoEntry || !parts.state.revive() {
            return;
        }
        let failed = parts.pristine.iter().find(|(range, copy)| !parts.mem.write(range.start(), copy));
        if let Some((range, _)) = failed {
            warn!("firmware memory {range} cannot be restored");
            parts.state.kill(reason);
            return;
        }
        warn!("sandbox is made anew as it was at launch");
        let record = Record::new(Kind::SANDBOX_RESTARTED, call.owner, exposure::now_us(&parts.clock));
        exposure::record(&record);
    }

    /// Runs the sandbox until the call ends or has to wait. A guest that takes no interrupts does not wait: its time is
    /// watched by a timer of the MLE's.
    pub(super) fn run(
        &mut self,
        call: &Call,
        cpu: &mut Cpu,
        interruptible: bool,
        local: &Xapic<PhysWindow>,
        ports: Ports,
    ) -> End {
        if interruptible {
            return self.run_with(call, cpu, true, ports, &mut |_| Some(End::Preempted));
        }
        let Some(mut timer) = LentTimer::borrow(local) else {
            return self.run_with(call, cpu, false, ports, &mut |_| None);
        };
        let pics = Silenced::begin(&ports);
        let end = self.run_with(call, cpu, true, ports, &mut |cpu| {
            cpu.take_interrupts();
            timer.go_on(local);
            None
        });
        timer.give_back(local, || {
            cpu.take_interrupts();
            cpu.held_interrupts()
        });
        pics.end(&ports);
        if let Some(vector) = cpu.lost_interrupt() {
            let text = Some(Text::new(format_args!("interrupt {vector:#x} lost: ExtINT")));
            let record = Record::new(Kind::REFUSED, call.owner, exposure::now_us(&self.parts.clock));
            exposure::record(&Record { text, service: call.service as u8, ..record });
        }
        end
    }

    /// Runs the sandbox until the call ends, or until `interrupted` says that it has to wait.
    fn run_with(
        &mut self,
        call: &Call,
        cpu: &mut Cpu,
        interruptible: bool,
        ports: Ports,
        interrupted: &mut dyn FnMut(&mut Cpu) -> Option<End>,
    ) -> End {
        let parts = &mut self.parts;
        // The guest ran, and may have selected another register.
        parts.ports.intercept(RTC_DATA);
        loop {
            let exit = cpu.run_sandbox(&mut parts.runner(call.place).vcpu, interruptible);
            if parts.rtc_index(&exit, &ports) {
                continue;
            }
            let at_return =
                matches!(exit, Exit::Memory { gpa, access: Access::Fetch, .. } if gpa == parts.return_to);
            let answered = match exit {
                Exit::Memory { gpa, access, .. } if !at_return => {
                    let by = (call.owner, call.service);
                    parts.watch.lock().fault(gpa, access, &parts.mem, by, &parts.clock)
                }
                _ => false,
            };
            let judged = match exit {
                _ if at_return => Exit::Hypercall,
                // It counts for the budgets, as all exits do.
                _ if answered => Exit::Interrupt,
                exit => exit,
            };
            let al = parts.runner(call.place).vcpu.gprs().rax as u8;
            match parts.state.exit(&judged, at_return, al, parts.clock.now_us()) {
                Verdict::Resume => match exit {
                    _ if answered => parts.flush_nested(),
                    Exit::Interrupt => {
                        if let Some(end) = interrupted(cpu) {
                            return end;
                        }
                    }
                    _ => {
                        parts.smi.withdraw_unasked(&parts.mem, call.service, call.owner, &parts.clock);
                        cpu.let_pending_in();
                    }
                },
                Verdict::Cpuid => {
                    let v = &mut parts.runner(call.place).vcpu;
                    let (leaf, subleaf) = (v.gprs().rax as u32, v.gprs().rcx as u32);
                    let [a, b, c, d] = cpuid::cpuid(leaf, subleaf, &v.control(), crate::cpu::native_cpuid);
                    let g = v.gprs_mut();
                    (g.rax, g.rbx, g.rcx, g.rdx) = (a.into(), b.into(), c.into(), d.into());
                    v.advance(TWO_BYTES);
                }
                Verdict::PassPort => port_access(&mut parts.runner(call.place).vcpu, exit, Some(ports)),
                Verdict::GuardedPort => {
                    let clock = parts.clock;
                    let vcpu = &mut parts.runner(call.place).vcpu;
                    // Ends of the machine, and SMIs by wider writes, are not firmware's to ask for in this way.
                    guarded_access(vcpu, exit, call.owner, &ports, &clock, |port, size, value| {
                        if ends::is_end(port, size, value) {
                            let text = Some(Text::new(format_args!("end of the machine by port {port:#x}")));
                            let record = Record::new(Kind::REFUSED, call.owner, exposure::now_us(&clock));
                            let (service, decision) = (call.service as u8, Decision::DENIED);
                            told::REFUSED_ENDS.record(Record { text, service, decision, ..record });
                        } else {
                            ports::write(&ports, port, size, value, |_, _| ());
                        }
                    });
                }
                Verdict::SelectRtc { index } => {
                    select_rtc(parts.ports, &ports, index);
                    finish_port(&mut parts.runner(call.place).vcpu, exit);
                }
                Verdict::RtcData { index } => {
                    select_rtc(parts.ports, &ports, index);
                    port_access(&mut parts.runner(call.place).vcpu, exit, Some(ports));
                }
                Verdict::DenyPort => port_access(&mut parts.runner(call.place).vcpu, exit, None),
                Verdict::DenyMsr => {
                    let v = &mut parts.runner(call.place).vcpu;
                    if matches!(exit, Exit::MsrRead { .. }) {
                        let all_ones = u64::from(u32::MAX);
                        (v.gprs_mut().rax, v.gprs_mut().rdx) = (all_ones, all_ones);
                    }
                    v.advance(TWO_BYTES);
                }
                Verdict::RaiseSmi { port, command } => {
                    let raise = || {
                        ports.out8(port, command);
                        cpu.let_pending_in();
                    };
                    let nth = parts.state.counters().smis.saturating_sub(self.told.before.smis);
                    let answer = parts.smi.of_sandbox(
                        (command, nth),
                        &parts.mem,
                        call.service,
                        call.owner,
                        &parts.clock,
                        raise,
                    );
                    if answer == smi::Answer::Refused {
                        let reason = Reason::Smi { command };
                        parts.state.kill(reason);
                        return End::Dead(reason);
                    }
                    finish_port(&mut parts.runner(call.place).vcpu, exit);
                }
                Verdict::Return => return End::Returned,
                Verdict::Stop(reason) => return End::Dead(reason),
            }
        }
    }
}

/// How a run of the sandbox ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Returned,
    Preempted,
    Dead(Reason),
}

/// Where the sandbox sees the call buffer: at the end of its area.
pub(super) fn buffer_at(area: PhysRange) -> u64 {
    area.last().wrapping_sub(CALL_BUFFER_SIZE as u64).wrapping_add(1)
}

pub(super) enum Direction {
    ToSandbox,
    FromSandbox,
}

/// Copies what a call uses of the call buffer between the MLE and the sandbox: each side works on its own.
pub(super) fn copy_buffer(
    area: PhysRange,
    own: &mut CallBuffer,
    mem: &Identity,
    pieces: Pieces,
    direction: Direction,
) {
    for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
        let at = buffer_at(area).wrapping_add(piece.start as u64);
        match direction {
            Direction::ToSandbox => mem.write(at, own.as_bytes().get(piece).unwrap_or_default()),
            Direction::FromSandbox => mem.read(at, own.as_mut_bytes().get_mut(piece).unwrap_or_default()),
        };
    }
}
