//! What a launch stands on: what was handed over, memory, and tables of the MLE's own.
//!
//! UNSAFETY: here the promises of the hardware edge are given: what is mapped, what belongs to whom.
#![expect(unsafe_code, reason = "makes the pool, the accessors and the tables in force")]

use firmware::memmap::MemoryMap;
use heapless::Vec;
use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::launch::Handoff;
use hv::radix::Tables;
use iommu::DmaArea;
use log::info;

use super::{Features, Image, LaunchError};
use crate::cpu::{CpuMemory, Loaded};
use crate::dma::Listed;
use crate::inputs::{self, Inputs, TXT_REGISTERS, Txt};
use crate::metal::{Identity, Ports, TscClock};
use crate::platform::Machine;
use crate::pool::PagePool;
use crate::{apic, paging};

/// What the rest of the launch works with.
pub struct Ground<'a> {
    /// What was handed over.
    pub inputs: Inputs,
    /// The firmware's memory map.
    pub map: MemoryMap,
    /// Pages of the region that nobody has yet.
    pub pool: PagePool,
    /// What the CPU offers.
    pub features: Features,
    /// The MLE's own tables, in force.
    pub own: Tables,
    /// Ports, time, and all memory but the MLE's own.
    pub machine: Machine,
    /// First address past all RAM.
    pub ram_end: u64,
    /// Where the parts of the running image are.
    pub image: Image,
    /// What the first CPU has of memory.
    pub memory: CpuMemory,
    /// The IOMMUs there are to be.
    pub listed: Listed<'a>,
    /// Memory for tables that IOMMUs read.
    pub area: DmaArea,
    /// What no device ever reaches.
    pub closed: Vec<PhysRange, 2>,
}

impl<'a> Ground<'a> {
    /// Reads what was handed over, builds tables and puts them in force; `ivrs` becomes a copy of that table. Gives the first
    /// CPU, too, whose descriptor tables are loaded.
    ///
    /// # Safety
    /// As of [`super::start`].
    #[inline(never)]
    pub unsafe fn take(
        handoff: &Handoff,
        txt: Option<Txt>,
        image: Image,
        clock: TscClock,
        ivrs: &'a mut [u8],
    ) -> Result<(Self, Loaded), LaunchError<'static>> {
        // SAFETY: the SLB stage's tables map 0 to 4 GiB; everything of ours lies in the region.
        let mem = unsafe { Identity::new(FOUR_GIB, (handoff.region_base, handoff.region_size)) };
        let image_range = PhysRange::from_last(image.start, image.end.saturating_sub(1))
            .ok_or(LaunchError::OutOfMemory("the image"))?;
        let inputs = inputs::read(handoff, txt, image_range, &mem)?;
        let map = read_memory_map(&inputs, &mem)?;
        let ram = map.regions().iter().filter(|r| r.is_reusable() || r.is_runtime());
        let ram_end = ram.map(|r| r.range.last().saturating_add(1)).fold(FOUR_GIB, u64::max);

        let free = PhysRange::from_last(image.end, inputs.dma_area.start().saturating_sub(1))
            .ok_or(LaunchError::OutOfMemory("pages"))?;
        // SAFETY: the region beyond the image, up to the DMA area, is nobody else's and mapped, now and later.
        let mut pool = unsafe { PagePool::new(free) };
        let listed = match &inputs.txt {
            Some(txt) => Listed::Dmar(txt.dmar, txt.protection),
            None => {
                let used = iommu::acpi::copy_table(&mem, inputs.acpi_rsdp, *b"IVRS", ivrs)?;
                Listed::Ivrs(ivrs.get(..used).unwrap_or_default(), handoff.iommu_count)
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
        let closed = inputs.slb.into_iter().chain([inputs.region]).collect();
        let ground =
            Self { inputs, map, pool, features, own, machine, ram_end, image, memory, listed, area, closed };
        Ok((ground, loaded))
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
    let mut devices = Vec::<PhysRange, 16>::new();
    let fixed =
        [PhysRange::new(tpm::BASE, tpm::WINDOW_SIZE.into()), PhysRange::new(apic::XAPIC_BASE, PAGE_SIZE)];
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
