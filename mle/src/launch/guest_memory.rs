//! The guest's memory: who reaches what, and what it finds there.
//!
//! UNSAFETY: page tables for the guest's start are made in its own memory.
#![expect(unsafe_code, reason = "the hardware edge")]

use firmware::config::Config;
use firmware::linux::{HEADER_BYTES, Kernel};
use firmware::memmap::MemoryType;
use firmware::policy::Policy;
use firmware::prm::Handlers;
use firmware::service::Service;
use firmware::tables::FirmwareTables;
use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::{Msr, PhysMem};
use hv::radix::Tables;
use hv::space::{AddressSpace, View};
use iommu::pci::Function;
use log::warn;

use super::{Features, Ground, LaunchError};
use crate::acpi::{self, Ecam, MAX_ECAM};
use crate::boot::{self, BootError, Layout, Start};
use crate::devices::{self, CLAIMS_MAX, Claim};
use crate::dma::Iommus;
use crate::dma::reserved::{self, RESERVED_MAX, Wanted};
use crate::guest::pci::{self, Guarded, MAX_GUARDED};
use crate::guest::windows::UNIT_BASE;
use crate::inputs::{self, InputError};
use crate::memory::{self, MemoryError};
use crate::metal::PhysWindow;
use crate::pool::PagePool;
use crate::services;
use crate::slb::space::MSR_MMIO_CONFIG;

/// Devices that firmware may not claim for its runtime; IOMMUs and the MLE's memory are refused by the address space.
const FIXED_DEVICES: [PhysRange; 2] = [
    match PhysRange::new(crate::apic::XAPIC_BASE, PAGE_SIZE) {
        Some(range) => range,
        None => unreachable!(),
    },
    match PhysRange::new(tpm::BASE, tpm::WINDOW_SIZE as u64) {
        Some(range) => range,
        None => unreachable!(),
    },
];

/// PCI configuration space in memory, as the guest has it.
pub struct ConfigSpace {
    windows: Vec<Ecam, MAX_ECAM>,
    /// Functions of which the guest has a copy.
    pub guarded: Vec<Guarded, MAX_GUARDED>,
    copies: Option<PhysRange>,
}

/// What was built.
pub struct GuestMemory {
    /// Where things lie.
    pub layout: Layout,
    /// The tables that all CPUs share.
    pub nested: Tables,
    /// The devices' tables.
    pub device: Tables,
    /// The pages of `device`.
    pub device_pages: Option<PhysRange>,
    /// From where to where all these tables lie in the region.
    pub tables_at: (u64, u64),
    /// Devices in firmware's memory map.
    pub claims: Vec<Claim, CLAIMS_MAX>,
    /// Memory that firmware reserves for devices.
    pub reserved: Vec<Wanted, RESERVED_MAX>,
    /// Configuration space.
    pub config_space: ConfigSpace,
    /// The firmware's EFI tables.
    pub efi: FirmwareTables,
    /// Its PRM handlers, where the guest may call them.
    pub handlers: Option<Handlers>,
    /// Where the guest begins.
    pub start: Start,
    /// It is shown a unit that remaps interrupts.
    pub unit_shown: bool,
}

impl GuestMemory {
    /// Plans, maps and fills it, and says who may reach what. Devices have no part in it yet.
    ///
    /// # Errors
    /// Firmware's description of the machine, or the kernel, is not what can be carried out.
    #[inline(never)]
    pub fn build(
        ground: &mut Ground<'_>,
        config: &Config,
        iommus: &Iommus<PhysWindow>,
        acpi_tables: &firmware::acpi::Tables,
    ) -> Result<(Self, AddressSpace), LaunchError<'static>> {
        let Ground { inputs, map, pool, features, machine, ram_end, listed, .. } = ground;
        let (mem, ports) = (machine.mem, machine.ports);
        let mut head = [0; HEADER_BYTES];
        let file =
            inputs.kernel.ok_or(InputError::Size { what: "kernel", size: 0, limit: inputs::MAX_FILE })?;
        mem.read(file.start(), &mut head);
        let kernel = Kernel::parse(&head, file.len())?;
        let guarded = pci::find(&ports)?;
        let (sandbox_size, capsules) = (services::SANDBOX_SIZE, config.capsule_room());
        let prmt = match config.policies.service(Service::PrmHandler) {
            Policy::Deny => None,
            _ => acpi::prmt(&mem, acpi_tables, map),
        };
        let copies = (guarded.len(), prmt.as_ref().map_or(0, |prmt| prmt.pages().len()));
        let layout = boot::plan(inputs, map, &kernel, sandbox_size, capsules, copies)?;
        let mut windows = acpi::ecam(&mem, acpi_tables);
        // A register of AMD's.
        let of_cpu = features.vendor.is_svm().then(|| features.msrs.rdmsr(MSR_MMIO_CONFIG));
        if let Some(window) = of_cpu.and_then(Ecam::of_cpu) {
            // There is room for one more than the table may have.
            let _ = windows.push(window);
        }
        map.check_runtime(&FIXED_DEVICES)?;
        let claims = devices::find(&ports, map, &config.sandbox.pci)?;
        for claim in &claims {
            warn!("{claim}: {}", if claim.allowed { "left to firmware" } else { "closed to it" });
        }
        let mut space =
            memory::describe(inputs, map, &claims, &layout, iommus.windows(), &windows, features.bits)?;
        let reserved = reserved::settle(*listed, &ports, &mut space, config.dma_reserved)?;
        for wanted in &reserved {
            warn!("{wanted}: {} devices", if wanted.open { "left to" } else { "closed to" });
        }
        let config_space = ConfigSpace { windows, guarded, copies: layout.config_space };
        let from = pool.mark();
        let nested = Tables::new(features.vendor.nested_format(), 4, features.largest_nested, pool)?;
        config_space.map_guest(features, &space, &nested, pool)?;
        if let Some(copies) = config_space.copies {
            for (function, at) in
                config_space.guarded.iter().zip((copies.start()..).step_by(PAGE_SIZE as usize))
            {
                pci::copy(&Function::new(&ports, function.id), at, &mem).map_err(BootError::Memory)?;
            }
        }
        let handlers = prmt.and_then(|prmt| {
            let handlers = Handlers::new(prmt, layout.parameters, &config.handlers, &mem);
            handlers.inspect_err(|error| warn!("{error}; no handler is passed on")).ok()
        });
        if let Some(handlers) = &handlers {
            memory::map_copies(handlers.pages(), &nested, pool)?;
        }
        let device_from = pool.mark();
        let device = iommus.new_tables(*ram_end, pool)?;
        space.map_view(View::Device, &device, pool)?;
        let to = pool.mark();

        let efi = FirmwareTables::read(&mem, inputs.efi_system_table)?;
        let scratch = usize::try_from(boot::SMBIOS_AREA).unwrap_or(0);
        let scratch_at =
            pool.pages(boot::SMBIOS_AREA / PAGE_SIZE).ok_or(LaunchError::OutOfMemory("SMBIOS"))?;
        // SAFETY: fresh pages of the pool, used as this buffer alone.
        let scratch: &mut [u8] = unsafe { core::slice::from_raw_parts_mut(scratch_at as *mut u8, scratch) };
        boot::write_thunks(&layout, features.vendor.hypercall(), &mem)?;
        let listed = Some(*listed).filter(|_| features.vendor.can_step());
        let mut dmar = |out: &mut [u8]| iommus.write_shown(listed?, UNIT_BASE, out);
        let mut prmt = |out: &mut [u8]| handlers.as_ref()?.table().write_shown(layout.thunks.start(), out);
        let [dmar, _] = boot::write_acpi(&layout, acpi_tables, [&mut dmar, &mut prmt], scratch, &mem)?;
        boot::write_efi(&layout, &efi, map, config.policies.rt_properties(), scratch, &mem)?;
        // SAFETY: the area is free guest memory that the layout chose for these tables; nothing else uses it yet.
        let start = boot::write(&layout, inputs, &kernel, &mem, |area| unsafe { PagePool::new(area) })?;
        let built = Self {
            layout,
            nested,
            device,
            device_pages: PhysRange::from_last(device_from, to.saturating_sub(1)),
            tables_at: (from, to),
            claims,
            reserved,
            config_space,
            efi,
            handlers,
            start,
            unit_shown: dmar.is_some(),
        };
        Ok((built, space))
    }

    /// What the guest runs and reads: its memory, and tables of firmware's and ours.
    pub fn seen<'a>(&'a self, map: &'a firmware::memmap::MemoryMap) -> impl Iterator<Item = PhysRange> + 'a {
        let acpi = map.regions().iter().filter(|r| r.ty == MemoryType::ACPI_RECLAIM).map(|r| r.range);
        let Layout { thunks, tables, config_space, parameters, .. } = &self.layout;
        let parts = [Some(*thunks), Some(*tables), *config_space, *parameters];
        self.layout.map.ram().chain(acpi).chain(parts.into_iter().flatten())
    }
}

impl ConfigSpace {
    /// Maps what the guest's CPUs reach of `space` into `nested`.
    ///
    /// # Errors
    /// The region has no page left, or two owners have one.
    pub fn map_guest(
        &self,
        features: &Features,
        space: &AddressSpace,
        nested: &Tables,
        pool: &mut PagePool,
    ) -> Result<(), MemoryError> {
        features.vendor.map_guest(space, nested, pool, &features.msrs, features.bits)?;
        match self.copies {
            Some(copies) => memory::replace_config_space(&self.windows, &self.guarded, copies, nested, pool),
            None => Ok(()),
        }
    }
}
