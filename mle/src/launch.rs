//! The launch, in order: inputs, own tables, measurements, DMA, guest.
//!
//! UNSAFETY: here the promises of the hardware edge are given: what is mapped, what belongs to whom.
#![expect(unsafe_code, reason = "makes the windows, pools and accessors that the rest uses safely")]

use core::convert::Infallible;
use core::fmt;

use firmware::acpi;
use firmware::config::{Config, ConfigError};
use firmware::exposure::{Kind, Record, Text};
use firmware::linux::{HEADER_BYTES, Kernel, LinuxError};
use firmware::measure::{self, Kind as Measured};
use firmware::memmap::{MapError, MemoryMap, MemoryType};
use firmware::policy::Policy;
use firmware::smm::facts::Facts;
use firmware::tables::{FirmwareTables, TablesError};
use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::failure::MleError;
use hv::io::{Msr, PhysMem};
use hv::launch::{Handoff, PCR_CONFIG, PCR_FIRMWARE, SlbHeader, event};
use hv::radix::{self, PageSize, Tables};
use hv::space::{self, AddressSpace, View};
use hv::vcpu::Role;
use iommu::DmaArea;
use iommu::pci::Function;
use log::{info, warn};
use zerocopy::{FromZeros, IntoBytes};

use crate::acpi::Ecam;
use crate::apic::Xapic;
use crate::backend::{MsrMap, PortMap, Refusal, Vcpu, Vendor, Vm};
use crate::boot::{self, BootError};
use crate::cpu::{Cpu, CpuMemory, Loaded};
use crate::dma::{Iommus, Left, Listed};
use crate::guest::apic_window::View as ApicView;
use crate::guest::pci;
use crate::inputs::{self, InputError, Inputs, TXT_REGISTERS, Txt};
use crate::measure::{MeasureError, Measurer};
use crate::memory::{self, ApicPage, MemoryError};
use crate::metal::{Identity, Msrs, PhysWindow, Ports, TscClock};
use crate::platform::Machine;
use crate::pool::PagePool;
use crate::relaunch::{self, CpuState, Plan, PlanError, Waiting};
use crate::sandbox::{self, SandboxError};
use crate::services::{self, STATUS_MAX};
use crate::slb::space::MSR_MMIO_CONFIG;
use crate::smp::{Setup, SmpError};
use crate::{
    apic as local_apic, devices, dma, exposure, fatal, guest, logger, paging, run, senter, smi, smp, trap,
    watch,
};

/// Devices that firmware may not claim for its runtime; IOMMUs and the MLE's memory are refused by the address space.
const FIXED_DEVICES: [PhysRange; 2] = [
    match PhysRange::new(local_apic::XAPIC_BASE, PAGE_SIZE) {
        Some(range) => range,
        None => unreachable!(),
    },
    match PhysRange::new(tpm::BASE, tpm::WINDOW_SIZE as u64) {
        Some(range) => range,
        None => unreachable!(),
    },
];

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

/// Why the launch failed.
#[derive(Debug)]
pub enum LaunchError<'a> {
    /// What the loader handed over.
    Input(InputError),
    /// The EFI memory map.
    Map(MapError),
    /// The configuration.
    Config(ConfigError<'a>),
    /// The kernel.
    Linux(LinuxError),
    /// Guest set-up.
    Boot(BootError),
    /// Policy `relaunch` cannot be had.
    Plan(PlanError),
    /// The guest that waited does not go on.
    Relaunch(relaunch::Error),
    /// PCI functions that are to be guarded.
    Pci(pci::TooMany),
    /// More devices in firmware's memory map than Cordon keeps account of.
    Devices(devices::TooMany),
    /// A measurement.
    Measure(MeasureError),
    /// An ACPI table.
    Acpi(iommu::acpi::Error),
    /// DMA protection.
    Iommu(dma::Error),
    /// Page tables.
    Tables(radix::Error),
    /// Two owners of one page.
    Space(space::Error),
    /// The firmware's EFI tables.
    Efi(TablesError),
    /// The MLE region is used up.
    OutOfMemory(&'static str),
    /// Nested tables.
    Memory(MemoryError),
    /// The other CPUs.
    Smp(SmpError),
    /// The firmware's sandbox.
    Sandbox(SandboxError),
    /// The CPU's virtualization.
    Backend(Refusal),
    /// The CPU lacks something.
    Cpu(&'static str),
}

impl fmt::Display for LaunchError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(e) => write!(f, "{e}"),
            Self::Map(e) => write!(f, "{e}"),
            Self::Config(e) => write!(f, "configuration: {e}"),
            Self::Linux(e) => write!(f, "{e}"),
            Self::Boot(e) => write!(f, "{e}"),
            Self::Plan(e) => write!(f, "{e}"),
            Self::Relaunch(e) => write!(f, "{e}"),
            Self::Pci(e) => write!(f, "{e}"),
            Self::Devices(e) => write!(f, "{e}"),
            Self::Measure(e) => write!(f, "{e}"),
            Self::Acpi(e) => write!(f, "{e}"),
            Self::Iommu(e) => write!(f, "IOMMU: {e}"),
            Self::Tables(e) => write!(f, "page tables: {e}"),
            Self::Space(e) => write!(f, "address space: {e}"),
            Self::Efi(e) => write!(f, "{e}"),
            Self::OutOfMemory(what) => write!(f, "the MLE region has no room left for {what}"),
            Self::Memory(e) => write!(f, "{e}"),
            Self::Smp(e) => write!(f, "{e}"),
            Self::Sandbox(e) => write!(f, "{e}"),
            Self::Backend(e) => write!(f, "{e}"),
            Self::Cpu(what) => write!(f, "this CPU {what}"),
        }
    }
}

macro_rules! from_error {
    ($($ty:ty => $variant:ident;)*) => {$(
        impl From<$ty> for LaunchError<'_> {
            fn from(e: $ty) -> Self {
                Self::$variant(e)
            }
        }
    )*};
}
from_error! {
    InputError => Input;
    MapError => Map;
    LinuxError => Linux;
    BootError => Boot;
    PlanError => Plan;
    relaunch::Error => Relaunch;
    pci::TooMany => Pci;
    devices::TooMany => Devices;
    MeasureError => Measure;
    iommu::acpi::Error => Acpi;
    dma::Error => Iommu;
    radix::Error => Tables;
    space::Error => Space;
    SmpError => Smp;
    Refusal => Backend;
    SandboxError => Sandbox;
    MemoryError => Memory;
    TablesError => Efi;
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

    // SAFETY: the SLB stage's tables map 0 to 4 GiB; everything of ours lies in the region.
    let mem = unsafe { Identity::new(FOUR_GIB, (handoff.region_base, handoff.region_size)) };
    let image_range = PhysRange::from_last(image.start, image.end.saturating_sub(1))
        .ok_or(LaunchError::OutOfMemory("the image"))?;
    let inputs = inputs::read(handoff, txt, image_range, &mem)?;
    let map = read_memory_map(&inputs, &mem)?;
    let ram_end = map
        .regions()
        .iter()
        .filter(|r| r.is_reusable() || r.is_runtime())
        .map(|r| r.range.last().saturating_add(1))
        .fold(FOUR_GIB, u64::max);

    let free = PhysRange::from_last(image.end, inputs.dma_area.start().saturating_sub(1))
        .ok_or(LaunchError::OutOfMemory("pages"))?;
    // SAFETY: the region beyond the image, up to the DMA area, is nobody else's and mapped, now and later.
    let mut pool = unsafe { PagePool::new(free) };

    let mut table = [0; 4096];
    let listed = match &inputs.txt {
        Some(txt) => Listed::Dmar(txt.dmar, txt.protection),
        None => {
            let used = iommu::acpi::copy_table(&mem, inputs.acpi_rsdp, *b"IVRS", &mut table)?;
            Listed::Ivrs(table.get(..used).unwrap_or_default(), handoff.iommu_count)
        }
    };

    // Own tables: descriptor tables first, so that a fault while paging changes is reported.
    let features = Features::read(inputs.txt.is_some())?;
    let memory = CpuMemory::new(&mut pool).ok_or(LaunchError::OutOfMemory("the first CPU"))?;
    let own = own_tables(&mut pool, &image, &inputs, listed, ram_end, &features, &memory)?;
    // SAFETY: bare metal, CPL 0, GIF clear, the first CPU, once.
    let loaded = unsafe { Loaded::new(memory, true) };
    // SAFETY: the tables map image, stack, region and all RAM as the SLB's did, with fewer rights.
    unsafe { paging::activate(own.root(), features.smep) };
    info!("own page tables active, {} KiB of the region left", pool.left() / 1024);

    let below_dma = inputs.dma_area.start().saturating_sub(inputs.region.start());
    // SAFETY: our tables map all RAM one to one for good; the DMA area, whose tables are written through this, holds no
    // object of ours.
    let mem = unsafe { Identity::new(ram_end, (inputs.region.start(), below_dma)) };
    // SAFETY: bare metal, CPL 0.
    let ports = unsafe { Ports::new() };
    let machine = Machine { ports, clock, mem, mapped: FOUR_GIB };

    let area = DmaArea::at_top_of(&inputs.region).ok_or(LaunchError::OutOfMemory("DMA protection"))?;
    let closed: heapless::Vec<_, 2> = inputs.slb.into_iter().chain([inputs.region]).collect();
    let mut iommus = Iommus::take(&machine, listed, area, &closed)?;
    let unguarded = iommus.unguarded();
    info!("{} IOMMU(s) deny all DMA", iommus.count());

    // Measurements, before anything measured is used.
    let log_pages = inputs.log.len().div_ceil(PAGE_SIZE);
    let log_at = pool.pages(log_pages).ok_or(LaunchError::OutOfMemory("the event log"))?;
    let log_size = usize::try_from(inputs.log.len()).unwrap_or(0);
    // SAFETY: fresh pages of the pool, as many as the log has, used as the log alone.
    let log: &'static mut [u8] = unsafe { core::slice::from_raw_parts_mut(log_at as *mut u8, log_size) };
    // SAFETY: the TPM's pages are mapped uncached; the MLE drives it alone until the guest runs.
    let window = unsafe { PhysWindow::new(tpm::BASE, tpm::WINDOW_SIZE) };
    // SAFETY: `paging::activate` made SSE usable, and measurements end before anything changes that.
    let sha256 = unsafe { sha_ni::sha256_blocks() };
    let mut measurer = Measurer::open(window, clock, inputs.tpm_degraded, sha256, &mut *log)?;
    match inputs.slb {
        Some(slb) => measurer.log_skinit(measured_slb(&slb, &mem)?, &inputs, &mem)?,
        None => measurer.log_senter(inputs.txt.map_or(&[], |txt| txt.log))?,
    }
    let config_len = usize::try_from(inputs.config.map_or(0, |c| c.len())).unwrap_or(0);
    let config = config.get_mut(..config_len).unwrap_or_default();
    if let Some(range) = inputs.config {
        mem.read(range.start(), config);
    }
    let waiting = match inputs.relaunch.filter(|_| inputs.resume) {
        Some(block) => {
            let waiting = Waiting::read(block, mem, sha256)?;
            waiting.measure(&mut measurer, &mut pool)?;
            Some(waiting)
        }
        None => {
            measurer.data(PCR_CONFIG, event::CONFIG, config)?;
            measurer.memory(PCR_CONFIG, event::KERNEL, inputs.kernel, &mem)?;
            measurer.memory(PCR_CONFIG, event::INITRD, inputs.initrd, &mem)?;
            measurer.memory(PCR_CONFIG, event::CMDLINE, inputs.cmdline, &mem)?;
            None
        }
    };
    let acpi = acpi::Tables::read(&mem, inputs.acpi_rsdp)?;
    for item in measure::items(&map, Some(&acpi))? {
        let name = item.name();
        match item.kind {
            Measured::RuntimeDevice => measurer.data(PCR_FIRMWARE, &name, name.as_bytes())?,
            _ => measurer.memory(PCR_FIRMWARE, &name, Some(item.range), &mem)?,
        }
    }
    // SAFETY: bare metal, CPL 0; read only.
    let msrs = unsafe { Msrs::new() };
    let smm = smi::facts(&msrs, &ports, &mem, inputs.acpi_rsdp);
    measurer.data(PCR_FIRMWARE, event::SMM, &smm.measured())?;
    info!("configuration, kernel, initrd, command line, firmware and SMM facts measured");
    if let Some(waiting) = waiting {
        let (used, mut tpm) = measurer.finish();
        match waiting.go_on(&mut tpm, log.get(..used).unwrap_or_default(), (&own, &mut pool))? {}
    }
    let config = Config::parse(config).map_err(LaunchError::Config)?;
    log::set_max_level(config.log);

    // The guest's memory.
    let mut head = [0; HEADER_BYTES];
    let file = inputs.kernel.ok_or(InputError::Size { what: "kernel", size: 0, limit: inputs::MAX_FILE })?;
    mem.read(file.start(), &mut head);
    let kernel = Kernel::parse(&head, file.len())?;
    let guarded = pci::find(&ports)?;
    let (sandbox_size, capsules) = (services::SANDBOX_SIZE, config.capsule_room());
    let layout = boot::plan(&inputs, &map, &kernel, sandbox_size, capsules, guarded.len())?;
    let cpus = crate::acpi::count_cpus(&mem, &acpi);
    let mut ecam = crate::acpi::ecam(&mem, &acpi);
    // A register of AMD's.
    let of_cpu = features.vendor.is_svm().then(|| msrs.rdmsr(MSR_MMIO_CONFIG));
    if let Some(window) = of_cpu.and_then(Ecam::of_cpu) {
        // There is room for one more than the table may have.
        let _ = ecam.push(window);
    }
    map.check_runtime(&FIXED_DEVICES)?;
    // What the guest runs and reads: its memory, and tables of firmware's and ours.
    let acpi_tables = map.regions().iter().filter(|r| r.ty == MemoryType::ACPI_RECLAIM).map(|r| r.range);
    let parts = [Some(layout.thunks), Some(layout.tables), layout.config_space];
    let guests: heapless::Vec<PhysRange, 128> =
        layout.map.ram().chain(acpi_tables).chain(parts.into_iter().flatten()).collect();
    let claims = devices::find(&ports, &map, &config.sandbox.pci)?;
    for claim in &claims {
        warn!("{claim}: {}", if claim.allowed { "left to firmware" } else { "closed to it" });
    }
    let space = memory::describe(&inputs, &map, &claims, &layout, iommus.windows(), &ecam, features.bits)?;
    let tables_from = pool.mark();
    let nested = Tables::new(features.vendor.nested_format(), 4, features.largest_nested, &mut pool)?;
    let map_guest = |space: &AddressSpace, nested: &Tables, pool: &mut PagePool| -> Result<(), MemoryError> {
        features.vendor.map_guest(space, nested, pool, &msrs, features.bits)?;
        match layout.config_space {
            Some(copies) => memory::replace_config_space(&ecam, &guarded, copies, nested, pool),
            None => Ok(()),
        }
    };
    map_guest(&space, &nested, &mut pool)?;
    if let Some(copies) = layout.config_space {
        for (function, at) in guarded.iter().zip((copies.start()..).step_by(PAGE_SIZE as usize)) {
            pci::copy(&Function::new(&ports, function.id), at, &mem).map_err(BootError::Memory)?;
        }
    }
    let device_from = pool.mark();
    let device = iommus.new_tables(ram_end, &mut pool)?;
    space.map_view(View::Device, &device, &mut pool)?;
    let tables_to = pool.mark();
    let tables = FirmwareTables::read(&mem, inputs.efi_system_table)?;
    let scratch = usize::try_from(boot::SMBIOS_AREA).unwrap_or(0);
    let scratch_at = pool.pages(boot::SMBIOS_AREA / PAGE_SIZE).ok_or(LaunchError::OutOfMemory("SMBIOS"))?;
    // SAFETY: fresh pages of the pool, used as this buffer alone.
    let scratch: &mut [u8] = unsafe { core::slice::from_raw_parts_mut(scratch_at as *mut u8, scratch) };
    boot::write_thunks(&layout, features.vendor.hypercall(), &mem)?;
    boot::write_efi(&layout, &tables, &map, &acpi, config.policies.rt_properties(), scratch, &mem)?;
    // SAFETY: the area is free guest memory that the layout chose for these tables; nothing else uses it yet.
    let start = boot::write(&layout, &inputs, &kernel, &mem, |area| unsafe { PagePool::new(area) })?;

    // Devices that the gap set to work stop before their requests are let through to what was just measured and
    // copied; their drivers start them again.
    stop_bus_masters(&ports);
    let pages = PhysRange::from_last(device_from, tables_to.saturating_sub(1));
    let left = iommus.open_guest(&machine, (&device, &pool), pages, listed, &closed)?;
    dma::keep(iommus, machine);
    info!("guest: {} MiB of RAM, DMA open to it alone", layout.map.ram_bytes() >> 20);

    let (log_used, tpm) = measurer.finish();
    exposure::begin(tpm, inputs.tpm_degraded).map_err(MeasureError::Tpm)?;
    if let Some(records) = log.get(..log_used) {
        // For whoever reads the guest's memory; the MLE's own copy is the one it serves.
        mem.write(inputs.log.start(), records);
    }

    // SAFETY: `paging::activate` above.
    let (mut cpu, page) = unsafe { loaded.enable(features.vendor) }?;
    let maps_from = pool.mark();
    let mut msr_map =
        MsrMap::new(features.vendor, &mut pool).ok_or(LaunchError::OutOfMemory("the MSR map"))?;
    guest::msr::Guards::of(features.vendor).intercept(|index, what| msr_map.intercept(index, what));
    let port_map: &mut PortMap = pool.object().ok_or(LaunchError::OutOfMemory("the port map"))?;
    let smi_command = acpi::smi_command(&mem, &acpi);
    guest::ports::guard_smi(port_map, smi_command.unwrap_or_default());
    pci::guard(port_map, &ports, guarded.clone());
    if !cpu.ignores_a20_mask() {
        guest::ports::guard_a20(port_map, &ports);
    }
    if config.policies.any(Policy::Deferred) || senter::launched() {
        guest::ends::guard(port_map, acpi::end_ports(&mem, &acpi));
    }
    let maps_to = pool.mark();
    smi::set_guest_policy(config.guest_smi);
    let vm = Vm {
        vendor: features.vendor,
        msrs: msr_map.address(),
        ports: &raw const *port_map as u64,
        nested_root: nested.root(),
        tag: 1,
    };
    // SAFETY: the APIC page is mapped uncached.
    let local = Xapic(unsafe { PhysWindow::new(local_apic::XAPIC_BASE, PAGE_SIZE as u32) });
    if !Xapic::<PhysWindow>::usable(&msrs) {
        return Err(LaunchError::Cpu("has its APIC moved, disabled or in x2APIC mode"));
    }
    let apic_page = ApicPage::take(&space, &nested, &mut pool)?;
    let (root, mut window) = apic_page.window(&mut pool)?;
    if cpu.sees_startup() {
        window.set(ApicView::Device);
    }
    let bsp = Vm { nested_root: root, ..vm };
    let mut setups = heapless::Vec::new();
    for _ in 1..cpus {
        let (nested_root, window) = apic_page.window(&mut pool)?;
        let memory = CpuMemory::new(&mut pool).ok_or(LaunchError::OutOfMemory("a CPU"))?;
        memory.guard(&mut pool, &own)?;
        let vm = Vm { nested_root, ..vm };
        let setup = Setup { memory, vm, window, clock, smep: features.smep };
        setups.push(setup).map_err(|_| LaunchError::Cpu("has more CPUs beside it than Cordon can start"))?;
    }
    smi::guard(mem);
    smp::start(setups, inputs.launch_page, &own, &mut pool, &local, &clock)?;

    let relaunch = config.policies.any(Policy::Relaunch);
    let mut plan = match inputs.slb.filter(|_| relaunch) {
        Some(slb) => {
            let code = image.rodata.saturating_sub(image.start);
            let pcr = config.relaunch_pcr;
            Some(Plan::new(
                &inputs,
                guests.iter().copied(),
                code,
                &measured_slb(&slb, &mem)?,
                pcr,
                relaunch::Means { mem, ram_end, clock, sha256, pool: &mut pool },
            )?)
        }
        None if relaunch => return Err(PlanError::NoSkinit.into()),
        None => None,
    };
    let sandboxed = sandbox::set_up(
        &mut pool,
        sandbox::Input {
            guest: vm,
            map_guest: &map_guest,
            config: &config,
            layout: &layout,
            map: &map,
            tables: &tables,
            acpi: acpi::Ports {
                pm_timer: acpi::pm_timer(&mem, &acpi),
                smi_command: smi_command.unwrap_or_default(),
            },
            largest: features.largest_nested,
            return_to: inputs.region.start(),
            space,
            mem,
            clock,
            log: (log, log_used),
            status: status(&inputs, &cpu, cpus, &smm),
        },
    )?;
    let mut looked_at = smi::looked_at(mem);
    for (from, to) in
        [(image.start, image.data), (tables_from, tables_to), (maps_from, maps_to), sandboxed.maps]
    {
        looked_at.range(from, to);
    }
    looked_at.tables(&own, &pool, u64::MAX);
    for tables in [Some(&sandboxed.nested), sandboxed.native.as_ref()].into_iter().flatten() {
        looked_at.tables(tables, &pool, watch::constant(tables.format()));
    }
    looked_at.bits(trap::idt(), u64::MAX);
    looked_at.bits(memory.constant(), u64::MAX);
    looked_at.path(bsp.nested_root, &window);
    smp::each_setup(|setup| {
        looked_at.bits(setup.memory.constant(), u64::MAX);
        looked_at.path(setup.vm.nested_root, &setup.window);
    });
    drop(looked_at);
    let record = Record::new(Kind::LAUNCH, local.id(), exposure::now_us(&clock));
    exposure::record(&Record { text: Some(Text::new(env!("CARGO_PKG_VERSION"))), ..record });
    let open = |text: &str| {
        let record = Record::new(Kind::LEFT_OPEN, local.id(), exposure::now_us(&clock));
        exposure::record(&Record { text: Some(Text::new(text)), ..record });
    };
    for claim in &claims {
        exposure::record(&claim.on_record(local.id(), exposure::now_us(&clock)));
    }
    if left != Left::Ordinary {
        open("devices may send SMI, NMI and INIT");
    }
    if smi_command.is_err() {
        open("the FADT's SMI command port");
    }
    if config.policies.any(Policy::Native) {
        open("firmware may reach the guest: policy native");
    }
    if unguarded != 0 {
        open("no protected regions before IOMMU tables");
    }
    exposure::flush(&clock);

    senter::end::begin_secrets();
    senter::unmask();
    // SAFETY: this CPU's page, used here for the first time.
    let mut vcpu = smi::with_vcpu(page, bsp.vendor, || unsafe { Vcpu::new(page, Role::Guest, &bsp) });
    vcpu.start_long_mode(start.rip, start.rsp, start.cr3, start.gdt);
    vcpu.gprs_mut().rsi = start.zero_page;
    info!(
        "starting the guest at {:#x} on {cpus} CPU(s), {} KiB of the region left",
        start.rip,
        pool.left() / 1024
    );
    logger::guest_has_the_port();
    loop {
        run::guest(&mut cpu, &mut vcpu, &mut window, &local, &clock, ports, 0);
        let Some(plan) = &mut plan else { continue };
        services::relaunch(&mut cpu, |cpu, call, log| -> Result<_, LaunchError<'_>> {
            let state = CpuState::save(&msrs);
            let masters = stop_bus_masters(&ports);
            let round = plan.round(call, log);
            if round.is_ok() {
                // SAFETY: as at the launch: another one has had this CPU, and came back to these page tables.
                let loaded = unsafe { Loaded::new(memory, true) };
                // SAFETY: the same.
                *cpu = unsafe { loaded.enable(features.vendor) }?.0;
                let mut iommus = Iommus::take_again(&machine, listed, area, &closed)?;
                iommus.open_guest(&machine, (&device, &pool), pages, listed, &closed)?;
                dma::keep_again(iommus);
            }
            start_bus_masters(&ports, &masters);
            state.restore(&msrs);
            Ok(round)
        })?;
        smp::scatter(&local, &clock);
        vcpu.flush_nested();
    }
}

/// The part of the SLB that the CPU measured, as the SLB's own header has it.
fn measured_slb(slb: &PhysRange, mem: &impl PhysMem) -> Result<PhysRange, InputError> {
    let mut header = SlbHeader::new_zeroed();
    let start = slb.start();
    mem.read(start, header.as_mut_bytes());
    PhysRange::new(start, header.length.get().into())
        .ok_or(InputError::Handoff { field: "slb_base", value: start })
}

/// Clears Bus Master Enable of all PCI functions but bridges and IOMMUs.
///
/// Spec: \[PCI\] "Command Register", bit 2.
///
/// Gives the ids of those where it was set; of more than there is room for it stays cleared.
fn stop_bus_masters(ports: &Ports) -> heapless::Vec<u16, 64> {
    const BRIDGE: u16 = 0x06;
    const IOMMU: u16 = 0x0806;
    let mut stopped = heapless::Vec::new();
    for function in iommu::pci::functions(ports) {
        if function.class() >> 8 != BRIDGE && function.class() != IOMMU {
            let command = function.read(COMMAND) & COMMAND_BITS;
            function.write(COMMAND, command & !BUS_MASTER);
            if command & BUS_MASTER != 0 {
                let _ = stopped.push(function.id);
            }
        }
    }
    stopped
}

/// Sets Bus Master Enable again.
fn start_bus_masters(ports: &Ports, stopped: &[u16]) {
    for id in stopped {
        let function = Function::new(ports, *id);
        let command = function.read(COMMAND) & COMMAND_BITS;
        function.write(COMMAND, command | BUS_MASTER);
    }
}

const COMMAND: u8 = 4;
/// The upper half is the status register, whose bits are cleared by ones.
const COMMAND_BITS: u32 = 0xffff;
const BUS_MASTER: u32 = 1 << 2;

/// What is in force, for the guest to read.
fn status(inputs: &Inputs, cpu: &Cpu, cpus: usize, smm: &Facts) -> heapless::String<STATUS_MAX> {
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
            if cpu.sees_startup() { "SMIs are not intercepted: VMX cannot\n" } else { "" },
        ),
    );
    text
}

/// What of the CPU decides about tables.
struct Features {
    vendor: Vendor,
    smep: bool,
    largest: PageSize,
    /// Of nested tables.
    largest_nested: PageSize,
    /// Physical address bits in use.
    bits: u32,
}

impl Features {
    fn read(smx: bool) -> Result<Self, LaunchError<'static>> {
        use crate::cpu::native_cpuid;
        let [_, b7, ..] = native_cpuid(7, 0);
        let [.., d_ext] = native_cpuid(0x8000_0001, 0);
        let [a_addr, ..] = native_cpuid(0x8000_0008, 0);
        // SAFETY: bare metal, CPL 0; read only.
        let msrs = unsafe { Msrs::new() };
        let vendor = Vendor::of_cpu(native_cpuid, &msrs, smx)?;
        let largest = if d_ext & 1 << 26 != 0 { PageSize::Size1G } else { PageSize::Size2M };
        // With 2 MiB pages, tables for more than 512 GiB would not fit the region.
        let largest_nested = vendor.largest_nested(largest);
        let bits = (a_addr & 0xff).min(if largest_nested.min(largest) == PageSize::Size1G { 48 } else { 39 });
        Ok(Self { vendor, smep: b7 & 1 << 7 != 0, largest, largest_nested, bits })
    }
}

fn read_memory_map(inputs: &Inputs, mem: &impl PhysMem) -> Result<MemoryMap, LaunchError<'static>> {
    let mut bytes = [0; inputs::MAX_MEMORY_MAP as usize];
    let len = usize::try_from(inputs.memory_map.len()).unwrap_or(usize::MAX);
    let bytes = bytes.get_mut(..len).unwrap_or_default();
    mem.read(inputs.memory_map.start(), bytes);
    let (size, version) = inputs.descriptor;
    Ok(MemoryMap::parse(bytes, size, version)?)
}

/// The MLE's own tables; see [`paging::build`].
fn own_tables(
    pool: &mut PagePool,
    image: &Image,
    inputs: &Inputs,
    listed: Listed<'_>,
    ram_end: u64,
    features: &Features,
    memory: &CpuMemory,
) -> Result<Tables, LaunchError<'static>> {
    let mut devices = heapless::Vec::<PhysRange, 16>::new();
    let fixed = [
        PhysRange::new(tpm::BASE, tpm::WINDOW_SIZE.into()),
        PhysRange::new(local_apic::XAPIC_BASE, PAGE_SIZE),
    ];
    let txt = inputs.txt.map(|_| TXT_REGISTERS);
    let fixed = fixed.into_iter().flatten().chain(txt);
    for window in fixed.chain(listed.windows()?) {
        if window.last() < FOUR_GIB && !devices.contains(&window) {
            devices.push(window).map_err(|_| LaunchError::OutOfMemory("register windows"))?;
        }
    }
    let tables = paging::build(pool, image, ram_end, features.largest, inputs.slb.as_slice(), &devices)?;
    memory.guard(pool, &tables)?;
    paging::guard(pool, &tables, image.stack_guard)?;
    Ok(tables)
}
