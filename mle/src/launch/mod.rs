//! The launch, in order: inputs, own tables, DMA, measurements, guest.
//!
//! Each stage is a function of its own in the image too (`inline(never)`): what it had on the stack is gone when the guest runs, and
//! its code is found in a disassembly.
//!
//! UNSAFETY: the first CPU's virtualization and the guest's virtual CPU begin here.
#![expect(unsafe_code, reason = "the hardware edge")]

mod account;
mod cpus;
mod error;
mod features;
mod ground;
mod guest_memory;
mod measured;

use core::convert::Infallible;

use firmware::acpi;
use firmware::config::Config;
use firmware::policy::Policy;
use hv::failure::MleError;
use hv::io::PhysMem;
use hv::launch::Handoff;
use hv::vcpu::Role;
use log::info;

use self::cpus::Cpus;
pub use self::error::LaunchError;
use self::features::Features;
use self::ground::Ground;
use self::guest_memory::GuestMemory;
use self::measured::{Measured, measure, measured_slb};
use crate::backend::Vcpu;
use crate::cpu::{Cpu, Loaded};
use crate::dma::{self, Iommus};
use crate::inputs::{self, Txt};
use crate::measure::MeasureError;
use crate::metal::{PhysWindow, TscClock};
use crate::relaunch::{self, CpuState, Plan, PlanError, Round};
use crate::services::{self, GapCall};
use crate::{bus_masters, exposure, fatal, logger, run, sandbox, senter, smi, smp, trap};

/// Where the parts of the running image are.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// First byte: header and code.
    pub start: u64,
    /// First byte of read-only data.
    pub rodata: u64,
    /// First byte of writable data.
    pub data: u64,
    /// End of what the file holds.
    pub file_end: u64,
    /// End of the memory that the image uses.
    pub end: u64,
    /// Lowest page of the stack that it runs on: taken out of the tables.
    pub stack_guard: u64,
}

/// Runs the launch; the end of it is the run loop.
///
/// # Safety
/// Called once, by the image's entry code, on the BSP at CPL 0 with nothing unmasked, in an identity map of 0 to 4 GiB; `txt` is
/// there after SENTER.
pub unsafe fn start(handoff: &Handoff, txt: Option<Txt>, image: Image) -> ! {
    trap::on_fatal(fatal::exception);
    let mut config = [0; inputs::MAX_CONFIG as usize];
    match launch(handoff, txt, image, &mut config) {
        Ok(never) => match never {},
        Err(error) => fatal::stop(MleError::Launch, 0, format_args!("launch: {error}")),
    }
}

fn launch<'a>(
    handoff: &Handoff,
    txt: Option<Txt>,
    image: Image,
    config: &'a mut [u8],
) -> Result<Infallible, LaunchError<'a>> {
    let clock = TscClock { khz: handoff.tsc_khz.max(1) };
    logger::init(clock);
    exposure::start_clock(&clock);
    info!("Cordon {} in control", env!("CARGO_PKG_VERSION"));

    let mut ivrs = [0; 4096];
    // SAFETY: `start` has one caller, and its promise.
    let (mut ground, loaded) = unsafe { Ground::take(handoff, txt, image, clock, &mut ivrs) }?;
    let (machine, mem, ports) = (ground.machine, ground.machine.mem, ground.machine.ports);
    let mut iommus = Iommus::take(&machine, ground.listed, ground.area, &ground.closed)?;
    let unguarded = iommus.unguarded();
    info!("{} IOMMU(s) deny all DMA", iommus.count());

    let Measured { log, log_used, tpm, sha256, config, acpi, smm } = measure(&mut ground, config)?;
    let config = Config::parse(config).map_err(LaunchError::Config)?;
    log::set_max_level(config.log);
    let (mut guest, space) = GuestMemory::build(&mut ground, &config, &iommus, &acpi)?;

    // Devices that the gap set to work stop before their requests are let through to what was just measured and
    // copied; their drivers start them again.
    bus_masters::stop(&ports);
    let left = ground.open_dma(&mut iommus, &guest)?;
    dma::keep(iommus, machine);
    if guest.unit_shown {
        dma::shown::begin(space.clone());
    }
    info!("guest: {} MiB of RAM, DMA open to it alone", guest.layout.map.ram_bytes() >> 20);

    exposure::begin(tpm, ground.inputs.tpm_degraded).map_err(MeasureError::Tpm)?;
    if let Some(records) = log.get(..log_used) {
        // For whoever reads the guest's memory; the MLE's own copy is the one it serves.
        mem.write(ground.inputs.log.start(), records);
    }

    // SAFETY: the ground's tables are in force.
    let (mut cpu, page) = unsafe { loaded.enable(ground.features.vendor) }?;
    smi::compare_with(&smm);
    let mut cpus = Cpus::start(&mut ground, (&guest, &space), &config, &acpi, &cpu)?;
    let relaunch = config.policies.any(Policy::Relaunch);
    let mut plan = match ground.inputs.slb.filter(|_| relaunch) {
        Some(slb) => {
            let Ground { inputs, map, pool, ram_end, image, .. } = &mut ground;
            let code = image.rodata.saturating_sub(image.start);
            let slb = measured_slb(&slb, &mem)?;
            let means = relaunch::Means { mem, ram_end: *ram_end, clock, sha256, pool };
            Some(Plan::new(inputs, guest.seen(map), code, &slb, config.relaunch_pcr, means)?)
        }
        None if relaunch => return Err(PlanError::NoSkinit.into()),
        None => None,
    };
    let Ground { inputs, map, pool, features, .. } = &mut ground;
    let constant = sandbox::set_up(
        pool,
        sandbox::Input {
            guest: cpus.vm,
            map_guest: &|space, nested, pool| guest.config_space.map_guest(features, space, nested, pool),
            config: &config,
            layout: &guest.layout,
            map,
            tables: &guest.efi,
            handlers: guest.handlers.take(),
            acpi: acpi::Ports {
                pm_timer: acpi::pm_timer(&mem, &acpi),
                smi_command: cpus.smi_command.unwrap_or_default(),
            },
            largest: features.largest_nested,
            return_to: inputs.region.start(),
            space,
            mem,
            clock,
            log: (log, log_used),
            status: account::status(inputs, &cpu, cpus.count, &smm),
        },
    )?;
    account::guard(&ground, &guest, &cpus, &constant);
    account::record(&ground, &guest, &cpus, &config, (left, unguarded));

    senter::end::begin_secrets();
    senter::unmask();
    let bsp = &cpus.bsp;
    // SAFETY: this CPU's page, used here for the first time.
    let mut vcpu = smi::with_vcpu(page, bsp.vendor, || unsafe { Vcpu::new(page, Role::Guest, bsp) });
    let start = guest.start;
    vcpu.start_long_mode(start.rip, start.rsp, start.cr3, start.gdt);
    vcpu.gprs_mut().rsi = start.zero_page;
    info!(
        "starting the guest at {:#x} on {} CPU(s), {} KiB of the region left",
        start.rip,
        cpus.count,
        ground.pool.left() / 1024
    );
    logger::guest_has_the_port();
    loop {
        run::guest(&mut cpu, &mut vcpu, &mut cpus.windows, &cpus.local, &clock, ports, 0);
        let Some(plan) = &mut plan else { continue };
        services::relaunch(&mut cpu, |cpu, call, log| ground.round(plan, &guest, cpu, call, log))?;
        smp::scatter(&cpus.local, &clock);
        vcpu.flush_nested();
    }
}

impl Ground<'_> {
    /// Lets the guest's devices do DMA to its memory.
    fn open_dma(
        &self,
        iommus: &mut Iommus<PhysWindow>,
        guest: &GuestMemory,
    ) -> Result<dma::Left, dma::Error> {
        let tables = (&guest.device, &self.pool);
        iommus.open_guest(&self.machine, tables, guest.device_pages, self.listed, &self.closed)
    }

    /// Has firmware carry out `call` between this launch and another. Of the inner errors, [`relaunch::Error::Cap`] ends the
    /// launch; the outer ones do.
    fn round(
        &self,
        plan: &mut Plan,
        guest: &GuestMemory,
        cpu: &mut Cpu,
        call: GapCall,
        log: &[u8],
    ) -> Result<Result<Round, relaunch::Error>, LaunchError<'static>> {
        let Self { machine, features, .. } = self;
        let state = CpuState::save(&features.msrs);
        let masters = bus_masters::stop(&machine.ports);
        let round = plan.round(call, log);
        if round.is_ok() {
            // SAFETY: as at the launch: another one has had this CPU, and came back to these page tables.
            let loaded = unsafe { Loaded::new(self.memory, true) };
            // SAFETY: the same.
            *cpu = unsafe { loaded.enable(features.vendor) }?.0;
            let mut iommus = Iommus::take_again(machine, self.listed, self.area, &self.closed)?;
            self.open_dma(&mut iommus, guest)?;
            dma::keep_again(iommus);
        }
        bus_masters::start(&machine.ports, &masters);
        state.restore(&features.msrs);
        Ok(round)
    }
}
