//! The run loop of a guest CPU.

use hv::vcpu::{Access, Exit, Vcpu};
use svm::vcpu::SvmVcpu;

use crate::apic::{Command, ICR_HIGH, ICR_LOW, XAPIC_BASE, Xapic};
use crate::cpu::{self, Cpu};
use crate::guest::apic_window::{ApicWindow, View};
use crate::guest::exits::{self, Next};
use crate::metal::{PhysWindow, Ports, TscClock};
use crate::{fatal, smp};

/// Exits of a CPU, by kind.
#[derive(Default)]
pub struct Counters([u64; Exit::KINDS]);

impl Counters {
    fn count(&mut self, exit: &Exit) {
        if let Some(counter) = self.0.get_mut(exit.kind()) {
            *counter = counter.wrapping_add(1);
        }
    }
}

/// Runs the guest on this CPU for ever.
pub fn guest(
    cpu: &mut Cpu,
    vcpu: &mut SvmVcpu<'_>,
    window: &mut ApicWindow,
    local: &Xapic<PhysWindow>,
    clock: &TscClock,
    ports: Ports,
) -> ! {
    let mut counters = Counters::default();
    loop {
        let exit = cpu.run(vcpu);
        counters.count(&exit); // before it is handled: the exit that ends us is in the statistics
        let stepped = window.view();
        let mut handled = false;
        if stepped != View::Watched && smp::any_parked() || stepped == View::Shadow {
            handled = vcpu.end_step(exit);
            window.set(View::Watched);
            vcpu.flush_nested();
            if stepped == View::Shadow && handled {
                let destination = hv::io::Mmio::read32(&local.0, ICR_HIGH) >> 24;
                smp::command(Command { low: window.written(), destination }, local, clock);
            }
        }
        if handled {
            continue;
        }
        let watched = (window.view() == View::Watched).then_some(XAPIC_BASE);
        match exits::answer(vcpu, exit, cpu, watched) {
            Next::Resume | Next::Refused { .. } => {}
            Next::Apic { .. } if !smp::any_parked() => window.set(View::Device),
            Next::Apic { offset, access } => {
                let is_command = offset & !0xf == ICR_LOW && access == Access::Write;
                window.set(if is_command { View::Shadow } else { View::Device });
                vcpu.begin_step();
            }
            Next::Smi | Next::Nmi => cpu.let_pending_in(),
            Next::Init => {
                cpu.let_pending_in();
                cpu.init_arrived();
            }
            Next::Firmware => {
                vcpu.gprs_mut().rax = 0x8000_0000_0000_0003;
                vcpu.advance(3);
            }
            Next::Shutdown => fatal::reset(ports),
            Next::Fatal(exit) => {
                fatal::stop(format_args!("guest exit: {exit}; {}", cpu::describe(vcpu)));
            }
        }
    }
}
