//! Everything that a launch measures, before any of it is used.
//!
//! UNSAFETY: takes the TPM, and pages for the log.
#![expect(unsafe_code, reason = "the hardware edge")]

use firmware::measure::{self, Kind};
use firmware::smm::facts::Facts;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::launch::{PCR_CONFIG, PCR_FIRMWARE, SlbHeader, event};
use log::info;
use sha256::Sha256Blocks;
use tpm::Tpm;
use zerocopy::{FromZeros, IntoBytes};

use super::{Ground, LaunchError};
use crate::inputs::InputError;
use crate::measure::Measurer;
use crate::metal::{PhysWindow, TscClock};
use crate::relaunch::Waiting;
use crate::smi;

/// What came of it.
pub struct Measured<'a> {
    /// The DRTM event log's buffer.
    pub log: &'static mut [u8],
    /// Bytes of it that are used.
    pub log_used: usize,
    /// The way to the TPM for what is measured later; it is the guest's for now.
    pub tpm: Tpm<PhysWindow, TscClock>,
    /// The CPU's own way of hashing.
    pub sha256: Option<Sha256Blocks>,
    /// The configuration's bytes.
    pub config: &'a [u8],
    /// Firmware's ACPI tables.
    pub acpi: firmware::acpi::Tables,
    /// How SMM is locked down.
    pub smm: Facts,
}

/// Measures, with all DMA denied. `config` is room for the configuration. If a guest waits for this launch, it goes on, and
/// this does not come back.
#[inline(never)]
pub fn measure<'a>(
    ground: &mut Ground<'_>,
    config: &'a mut [u8],
) -> Result<Measured<'a>, LaunchError<'static>> {
    let Ground { inputs, map, pool, features, own, machine, .. } = ground;
    let (mem, ports) = (machine.mem, machine.ports);
    let log_pages = inputs.log.len().div_ceil(PAGE_SIZE);
    let log_at = pool.pages(log_pages).ok_or(LaunchError::OutOfMemory("the event log"))?;
    let log_size = usize::try_from(inputs.log.len()).unwrap_or(0);
    // SAFETY: fresh pages of the pool, as many as the log has, used as the log alone.
    let log: &'static mut [u8] = unsafe { core::slice::from_raw_parts_mut(log_at as *mut u8, log_size) };
    // SAFETY: the TPM's pages are mapped uncached; the MLE drives it alone until the guest runs.
    let window = unsafe { PhysWindow::new(tpm::BASE, tpm::WINDOW_SIZE) };
    // SAFETY: `paging::activate` made SSE usable, and measurements end before anything changes that.
    let sha256 = unsafe { sha256::instructions() };
    let mut measurer = Measurer::open(window, machine.clock, inputs.tpm_degraded, sha256, &mut *log)?;
    match inputs.slb {
        Some(slb) => measurer.log_skinit(measured_slb(&slb, &mem)?, inputs, &mem)?,
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
            waiting.measure(&mut measurer, pool)?;
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
    let acpi = firmware::acpi::Tables::read(&mem, inputs.acpi_rsdp)?;
    for item in measure::items(map, Some(&acpi))? {
        let name = item.name();
        match item.kind {
            Kind::RuntimeDevice => measurer.data(PCR_FIRMWARE, &name, name.as_bytes())?,
            _ => measurer.memory(PCR_FIRMWARE, &name, Some(item.range), &mem)?,
        }
    }
    let smm = smi::facts(&features.msrs, &ports, &mem, inputs.acpi_rsdp);
    measurer.data(PCR_FIRMWARE, event::SMM, &smm.measured())?;
    info!("configuration, kernel, initrd, command line, firmware and SMM facts measured");
    let (log_used, mut tpm) = measurer.finish();
    if let Some(waiting) = waiting {
        match waiting.go_on(&mut tpm, log.get(..log_used).unwrap_or_default(), (&*own, pool))? {}
    }
    Ok(Measured { log, log_used, tpm, sha256, config, acpi, smm })
}

/// The part of the SLB that the CPU measured, as the SLB's own header has it.
pub fn measured_slb(slb: &PhysRange, mem: &impl PhysMem) -> Result<PhysRange, InputError> {
    let mut header = SlbHeader::new_zeroed();
    let start = slb.start();
    mem.read(start, header.as_mut_bytes());
    PhysRange::new(start, header.length.get().into())
        .ok_or(InputError::Handoff { field: "slb_base", value: start })
}
