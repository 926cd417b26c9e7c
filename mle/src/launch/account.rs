//! What a launch accounts for: what SMM may not have changed, what is on record, what the guest may read of it.

use core::fmt;

use firmware::config::Config;
use firmware::exposure::{Kind, Record, Text};
use firmware::policy::Policy;
use firmware::smm::facts::Facts;

use super::cpus::Cpus;
use super::{Ground, GuestMemory};
use crate::cpu::Cpu;
use crate::dma::{ALL_INTERRUPTS, Left};
use crate::inputs::Inputs;
use crate::sandbox::Constant;
use crate::services::STATUS_MAX;
use crate::{exposure, smi, smp, trap, watch};

/// Lists what is looked at after SMIs: all that stays as it is from here on.
pub fn guard(ground: &Ground<'_>, guest: &GuestMemory, cpus: &Cpus, sandbox: &Constant) {
    let Ground { pool, own, machine, image, memory, .. } = ground;
    let mut looked_at = smi::looked_at(machine.mem);
    for (from, to) in [(image.start, image.data), guest.tables_at, cpus.maps].into_iter().chain(sandbox.maps)
    {
        looked_at.range(from, to);
    }
    looked_at.bits(sandbox.clock.0, sandbox.clock.1);
    looked_at.tables(own, pool, u64::MAX);
    for tables in [Some(&sandbox.nested), sandbox.native.as_ref()].into_iter().flatten() {
        looked_at.tables(tables, pool, watch::constant(tables.format()));
    }
    looked_at.bits(trap::idt(), u64::MAX);
    looked_at.bits(memory.constant(), u64::MAX);
    looked_at.path(cpus.bsp.nested_root, &cpus.windows);
    smp::each_setup(|setup| {
        looked_at.bits(setup.memory.constant(), u64::MAX);
        looked_at.path(setup.vm.nested_root, &setup.windows);
    });
}

/// The launch's own records: that it took place, and what it leaves open.
pub fn record(
    ground: &Ground<'_>,
    guest: &GuestMemory,
    cpus: &Cpus,
    config: &Config,
    (left, unguarded): (Left, usize),
) {
    let clock = ground.machine.clock;
    let record = |kind, text: &str| {
        let record = Record::new(kind, cpus.local.id(), exposure::now_us(&clock));
        exposure::record(&Record { text: Some(Text::new(text)), ..record });
    };
    record(Kind::LAUNCH, env!("CARGO_PKG_VERSION"));
    for claim in &guest.claims {
        exposure::record(&claim.on_record(cpus.local.id(), exposure::now_us(&clock)));
    }
    for wanted in &guest.reserved {
        exposure::record(&wanted.on_record(cpus.local.id(), exposure::now_us(&clock)));
    }
    for (open, text) in [
        (left != Left::Ordinary, ALL_INTERRUPTS),
        (cpus.smi_command.is_err(), "the FADT's SMI command port"),
        (config.policies.any(Policy::Native), "firmware may reach the guest: policy native"),
        (unguarded != 0, "no protected regions before IOMMU tables"),
    ] {
        if open {
            record(Kind::LEFT_OPEN, text);
        }
    }
    smi::each_otherwise(exposure::now_us(&clock), exposure::record);
    exposure::flush(&clock);
}

/// What is in force, for the guest to read.
pub fn status(inputs: &Inputs, cpu: &Cpu, cpus: usize, smm: &Facts) -> heapless::String<STATUS_MAX> {
    let mut text = heapless::String::new();
    let say = |yes| if yes { "yes" } else { "no" };
    // Room for these lines and a line for each fact.
    let _ = fmt::write(
        &mut text,
        format_args!(
            "version: {}\nCPUs: {cpus}\nPCRs 17-19 hold the launch: {}\nTPM localities 2 and up: not in the guest's nested tables\n\
             INIT redirected (VM_CR.R_INIT): {}\n{}{smm}",
            env!("CARGO_PKG_VERSION"),
            say(!inputs.tpm_degraded),
            if cpu.sees_startup() { "by VMX" } else { say(cpu.redirects_init()) },
            match (cpu.sees_startup(), cpu.smi_count()) {
                (false, _) => "",
                (true, Some(_)) => "SMIs are not intercepted: VMX cannot; the CPU counts them\n",
                (true, None) => "SMIs are not intercepted: VMX cannot; nothing counts them\n",
            },
        ),
    );
    text
}
