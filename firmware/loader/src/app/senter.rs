//! What a launch by GETSEC\[SENTER\] needs beside what every launch does.
//!
//! UNSAFETY: asking the CPU by GETSEC.
#![expect(unsafe_code, reason = "executes GETSEC")]

use alloc::string::ToString;
use alloc::vec::Vec;

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::launch::{Blob, LAUNCH_PAGE_SIZE, MleHeader};
use loader::entry::{Entry, Place};
use loader::senter::{self, Refusal, Txt};
use loader::table::{INTEL_OFFSET, LOG_SIZE, Technology};
use raw_cpuid::CpuId;
use uefi::boot::{self, MemoryType};
use uefi::mem::memory_map::MemoryMap;
use vmx::txt::acm::Sinit;
use vmx::txt::{getsec, heap, pages, regs};

use super::error::Error;
use super::files::Volume;
use super::memory::Pages;
use super::metal::{self, Identity, Msrs, Page};
use super::say;

/// All that is written where SINIT looks for it, once the firmware is left.
pub struct Senter {
    /// What the firmware set aside.
    pub txt: Txt,
    /// The module.
    pub module: Pages,
    /// By what SINIT finds the MLE. Kept for its memory, which the heap names.
    _page_tables: Pages,
    /// OsMleData and OsSinitData.
    pub heap: heap::Contents,
    /// Memory types while SENTER runs.
    pub mtrrs: Vec<(u64, u64)>,
    /// Registers of the IOMMUs, which must not translate.
    pub iommus: Vec<u64>,
    /// CPUID offers SMX.
    pub smx: bool,
}

/// The addresses of what is loaded already.
pub struct Loaded<'a> {
    /// The MLE region.
    pub mle: &'a Pages,
    /// The MLE's header.
    pub header: &'a MleHeader,
    /// The event log.
    pub log: &'a Pages,
    /// The SLRT.
    pub slrt: &'a Pages,
    /// The launch pages.
    pub launch_page: &'a Pages,
    /// ACPI's root pointer.
    pub rsdp: u64,
}

/// Checks what the CPU says of itself.
pub fn check_cpu(insist: bool) -> Result<(), Refusal> {
    senter::check_cpu(&CpuId::new(), &Msrs, insist)?;
    if insist {
        return Ok(());
    }
    // SAFETY: `check_cpu` found SMX.
    senter::check_capabilities(unsafe { metal::getsec(getsec::CAPABILITIES, 0) })
}

/// Checks the platform, chooses a module, and works out what SINIT is to be told.
pub fn prepare(
    volume: &mut Volume,
    file: &str,
    entry: &Entry,
    loaded: &Loaded<'_>,
) -> Result<(Senter, Technology), Error> {
    let cpuid = CpuId::new();
    let smx = cpuid.get_feature_info().is_some_and(|f| f.has_smx());
    let txt = senter::check_txt(&Page::new(regs::PUBLIC), &Identity)?;
    if let Some(why) = senter::earlier_failure(txt.errorcode) {
        say!("cordon: an earlier launch failed: {why}");
        super::pause();
    }
    let iommus = senter::iommus(&Identity, loaded.rsdp)?;
    let mle = senter::mle_header(loaded.mle.bytes(), loaded.header.txt_header.get())?;

    let platform = senter::platform(&cpuid, &Msrs, &txt, entry.insist_txt);
    let mut tried = Vec::new();
    let mut chosen = None;
    for value in &entry.sinit {
        let module = super::load(volume, file, value)?;
        let fits = Sinit::parse(module.bytes()).and_then(|sinit| sinit.check(&platform));
        let room = txt.sinit.len();
        match fits {
            Ok(()) if module.bytes().len() as u64 <= room => {
                chosen = Some(module);
                break;
            }
            Ok(()) => tried.push((
                Place { file, value }.to_string(),
                alloc::format!("{} bytes, SINIT's memory has {room}", module.bytes().len()),
            )),
            Err(why) => tried.push((Place { file, value }.to_string(), why.to_string())),
        }
    }
    let module = chosen.ok_or(Refusal::NoSinit(tried))?;
    let sinit = Sinit::parse(module.bytes()).map_err(|_| Refusal::NoSinit(Vec::new()))?;
    if !entry.insist_txt {
        check_module_size(module.bytes().len() as u64)?;
    }
    let capabilities = senter::capabilities(&sinit, &mle)?;

    let image_size = loaded.header.image_size.get().next_multiple_of(PAGE_SIZE);
    let tables = Pages::new(MemoryType::RESERVED, pages::size(image_size), PAGE_SIZE, loaded.mle.base());
    let mut page_tables = tables.map_err(|error| Error::Memory { what: "MLE page tables", error })?;
    let at = page_tables.base();
    if pages::build(page_tables.bytes_mut(), at, loaded.mle.base(), image_size).is_none() {
        return Err(Refusal::MleHeader(loaded.header.txt_header.get()).into());
    }

    let last = |pages: &Pages| pages.base().saturating_add(pages.bytes().len() as u64).saturating_sub(1);
    let pmr = senter::pmrs(
        memory()?.into_iter(),
        &[
            ("the MLE region", last(loaded.mle)),
            ("the event log", last(loaded.log)),
            ("the SLRT", last(loaded.slrt)),
            ("the MLE's page tables", last(&page_tables)),
        ],
    )?;
    let size = module.bytes().len() as u64;
    let phys_bits = cpuid.get_processor_capacity_feature_info().map_or(36, |c| c.physical_address_bits());
    let mtrrs = senter::module_mtrrs(txt.sinit.start(), size, phys_bits.into(), senter::mtrr_count(&Msrs))?;
    let slrt = loaded.slrt.base();
    let heap = heap::Contents {
        slrt,
        info: slrt.saturating_add(INTEL_OFFSET),
        // Below 1 MiB.
        launch_page: (loaded.launch_page.base() as u32, LAUNCH_PAGE_SIZE as u32),
        page_tables: at,
        mle_size: image_size,
        mle_header: loaded.header.txt_header.get().into(),
        pmr,
        capabilities,
        rsdp: loaded.rsdp,
        log: (loaded.log.base(), LOG_SIZE),
    };
    let technology = Technology::Senter {
        sinit: Blob { base: txt.sinit.start().into(), size: size.into() },
        entry: mle.entry.get(),
        info: senter::saved(&Msrs, &txt.heap),
    };
    Ok((Senter { txt, module, _page_tables: page_tables, heap, mtrrs, iommus, smx }, technology))
}

/// Whether the CPU takes a module of this size.
fn check_module_size(size: u64) -> Result<(), Refusal> {
    /// Kinds of parameters there are, and some.
    const INDICES: u32 = 32;
    for index in 0..INDICES {
        // SAFETY: `check_cpu` found SMX, and CAPABILITIES the leaf.
        let eax = unsafe { metal::getsec(getsec::PARAMETERS, index) };
        if eax & 0x1f == 0 {
            break;
        }
        if let Some(most) = getsec::module_max(eax).filter(|most| size > u64::from(*most)) {
            return Err(Refusal::ModuleSize { size, most });
        }
    }
    Ok(())
}

/// What is RAM.
fn memory() -> Result<Vec<PhysRange>, Error> {
    let map = boot::memory_map(MemoryType::LOADER_DATA).map_err(|e| Error::MemoryMap(e.status()))?;
    let is_ram = |ty| {
        matches!(
            ty,
            MemoryType::CONVENTIONAL
                | MemoryType::LOADER_CODE
                | MemoryType::LOADER_DATA
                | MemoryType::BOOT_SERVICES_CODE
                | MemoryType::BOOT_SERVICES_DATA
                | MemoryType::ACPI_RECLAIM
        )
    };
    let ram = map.entries().filter(|d| is_ram(d.ty));
    Ok(ram.filter_map(|d| PhysRange::new(d.phys_start, d.page_count.saturating_mul(PAGE_SIZE))).collect())
}
