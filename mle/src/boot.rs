//! The guest's first moment: where its kernel, boot data and tables go, and the registers it starts with.

use core::fmt;

use firmware::acpi;
use firmware::esrt::{self, Esrt};
use firmware::linux::{self, BootParams, Kernel, LinuxError, Placement};
use firmware::memmap::{CarveOut, GuestMap, MapError, MemoryMap, Use};
use firmware::prm;
use firmware::service::Service;
use firmware::tables::{self, FirmwareTables, GuestInput, HypercallInsn, TablesError, thunk_page};
use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::radix::{self, TablePool};

use crate::inputs::Inputs;
use crate::memory::copy;
use crate::paging;

/// Why the guest cannot be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootError {
    /// The EFI memory map.
    Map(MapError),
    /// The kernel.
    Linux(LinuxError),
    /// Page tables for the guest's first instructions.
    Tables(radix::Error),
    /// No free memory for the guest's boot data.
    NoRoom {
        /// Bytes wanted.
        size: u64,
    },
    /// ACPI or EFI tables.
    Firmware(TablesError),
    /// Memory that the map calls RAM cannot be accessed.
    Memory(PhysRange),
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(e) => write!(f, "{e}"),
            Self::Linux(e) => write!(f, "{e}"),
            Self::Tables(e) => write!(f, "guest boot tables: {e}"),
            Self::Firmware(e) => write!(f, "{e}"),
            Self::NoRoom { size } => write!(f, "no {size} bytes of free memory for the guest's boot data"),
            Self::Memory(r) => write!(f, "cannot access {r}, which the memory map calls RAM"),
        }
    }
}

impl From<MapError> for BootError {
    fn from(e: MapError) -> Self {
        Self::Map(e)
    }
}
impl From<LinuxError> for BootError {
    fn from(e: LinuxError) -> Self {
        Self::Linux(e)
    }
}
impl From<TablesError> for BootError {
    fn from(e: TablesError) -> Self {
        Self::Firmware(e)
    }
}
impl From<radix::Error> for BootError {
    fn from(e: radix::Error) -> Self {
        Self::Tables(e)
    }
}

/// Bytes for the guest's EFI memory map.
const MAP_AREA: u64 = (firmware::memmap::MAX_GUEST_DESCRIPTORS * 40) as u64;
/// Page tables for the first 4 GiB in 2 MiB pages.
const BOOT_TABLES: u64 = 6 * PAGE_SIZE;
/// Stack for the guest's first instructions.
const BOOT_STACK: u64 = PAGE_SIZE;
/// All of the boot area but the command line.
const FIXED_AREA: u64 = 2 * PAGE_SIZE + BOOT_STACK + BOOT_TABLES + MAP_AREA.next_multiple_of(PAGE_SIZE);
/// Bytes for the guest's EFI tables and what they point to.
///
/// One page of tables, the RSDP, the guest's own ACPI tables, and both kinds of SMBIOS copies.
pub const TABLES_AREA: u64 = PAGE_SIZE + ACPI_AREA + OWN_AREAS + 2 * SMBIOS_AREA;
/// Bytes for RSDP and root table.
const ACPI_AREA: u64 = (acpi::FILTERED_MAX as u64).next_multiple_of(PAGE_SIZE);
/// ACPI tables that the guest may get in place of firmware's: DMAR and PRMT.
const OWN_TABLES: usize = 2;
/// Bytes for all of them.
const OWN_AREAS: u64 = OWN_TABLES as u64 * OWN_AREA;
/// Bytes for one of them.
const OWN_AREA: u64 = PAGE_SIZE;
/// The IOMMUs are the MLE's: the guest does not learn of them. Nor of handlers where they lie in firmware's memory, which it does
/// not have: older kernels jump to address 0 for one, and give up the runtime services for that.
const HIDDEN_TABLES: [[u8; 4]; 3] = [*b"IVRS", *b"DMAR", prm::SIGNATURE];
/// Bytes for one SMBIOS copy.
pub const SMBIOS_AREA: u64 = (firmware::tables::SMBIOS_COPY_MAX as u64).next_multiple_of(PAGE_SIZE);

/// Where the guest's boot data lies.
pub struct Layout {
    placement: Placement,
    /// Zero page, GDT, stack, page tables, command line, EFI memory map, in this order.
    boot: PhysRange,
    /// Thunk page.
    pub thunks: PhysRange,
    /// EFI tables.
    pub tables: PhysRange,
    /// Memory that the sandbox works in: not the guest's.
    pub sandbox: PhysRange,
    /// Memory in which capsules are staged for the sandbox: not the guest's.
    pub staging: Option<PhysRange>,
    /// What the guest finds in memory as configuration space of guarded PCI functions, a page each.
    pub config_space: Option<PhysRange>,
    /// What the guest finds in memory as ACPI parameter buffers of PRM handlers, in whole pages.
    pub parameters: Option<PhysRange>,
    /// The guest's memory.
    pub map: GuestMap,
}

impl Layout {
    /// Address of the guest's RSDP, behind its page of EFI tables.
    fn rsdp(&self) -> u64 {
        self.tables.start().saturating_add(PAGE_SIZE)
    }
}

/// Registers at the guest's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Root of the identity map.
    pub cr3: u64,
    /// Base and limit of the GDT.
    pub gdt: (u64, u32),
    /// RSI: the zero page.
    pub zero_page: u64,
}

/// Chooses places for everything in memory that the firmware's map says is free, clear of what was loaded.
///
/// `sandbox` is how many bytes the sandbox works in, `staging` how many are for capsules, `guarded` how many PCI functions
/// have a copy of their configuration space, `parameters` how many pages hold ACPI parameter buffers.
pub fn plan(
    inputs: &Inputs,
    firmware_map: &MemoryMap,
    kernel: &Kernel,
    sandbox: u64,
    staging: Option<u64>,
    (guarded, parameters): (usize, usize),
) -> Result<Layout, BootError> {
    let reserved: heapless::Vec<_, 8> =
        inputs.of_launch().map(|range| CarveOut { range, usage: Use::Reserved }).collect();
    let free = firmware_map.guest(&reserved)?;
    let mut taken = heapless::Vec::<PhysRange, 16>::new();
    for range in [inputs.kernel, inputs.initrd, inputs.cmdline, inputs.config, Some(inputs.memory_map)] {
        // Five of sixteen places; at most eight are taken below.
        let _ = range.map(|r| taken.push(r.page_outward()));
    }
    let placement = kernel.place(&free, &taken)?;
    let _ = taken.push(placement.room);
    let mut find = |size: u64| {
        let within = PhysRange::from_last(linux::LOAD_MIN, FOUR_GIB.saturating_sub(1));
        let range = within
            .and_then(|within| free.find_free(size, PAGE_SIZE, &within, &taken))
            .ok_or(BootError::NoRoom { size })?;
        taken.push(range).map_err(|_| BootError::NoRoom { size })?;
        Ok::<_, BootError>(range)
    };
    let cmdline = inputs.cmdline.map_or(0, |c| c.len()).saturating_add(1).next_multiple_of(PAGE_SIZE);
    let boot = find(FIXED_AREA.saturating_add(cmdline))?;
    let thunks = find(PAGE_SIZE)?;
    let tables = find(TABLES_AREA)?;
    let sandbox = find(sandbox)?;
    let staging = staging.map(&mut find).transpose()?;
    let mut pages = |count: usize| match count {
        0 => Ok(None),
        _ => find((count as u64).saturating_mul(PAGE_SIZE)).map(Some),
    };
    let (config_space, parameters) = (pages(guarded)?, pages(parameters)?);

    let mut carve_outs = heapless::Vec::<CarveOut, 16>::new();
    let loaded = [Some(placement.room), inputs.initrd, Some(boot)];
    let all = reserved
        .into_iter()
        .chain(loaded.into_iter().flatten().map(|range| CarveOut { range, usage: Use::Loaded }))
        .chain([
            CarveOut { range: thunks, usage: Use::Thunks },
            CarveOut { range: tables, usage: Use::Tables },
            CarveOut { range: sandbox, usage: Use::Reserved },
        ])
        .chain(
            [staging, config_space, parameters]
                .into_iter()
                .flatten()
                .map(|range| CarveOut { range, usage: Use::Reserved }),
        );
    for carve_out in all {
        // Four, three, three and three: fewer than sixteen.
        let _ = carve_outs.push(carve_out);
    }
    let map = firmware_map.guest(&carve_outs)?;
    Ok(Layout { placement, boot, thunks, tables, sandbox, staging, config_space, parameters, map })
}

/// Copies the kernel to its place and writes the boot data. `pool` gives pages of the layout's own boot area.
pub fn write<P: TablePool>(
    layout: &Layout,
    inputs: &Inputs,
    kernel: &Kernel,
    mem: &impl PhysMem,
    pool: impl FnOnce(PhysRange) -> P,
) -> Result<Start, BootError> {
    let mut next = layout.boot.start();
    let mut take = |size: u64| {
        let at = next;
        next = next.saturating_add(size.next_multiple_of(PAGE_SIZE));
        at
    };
    let zero_page = take(PAGE_SIZE);
    let gdt = take(PAGE_SIZE);
    let stack = take(BOOT_STACK);
    let tables = take(BOOT_TABLES);
    let map = take(MAP_AREA);
    let cmdline = take(0);

    if let Some(file) = inputs.kernel {
        let from = file.start().saturating_add(layout.placement.file_offset);
        copy_to(mem, from, layout.placement.room.start(), layout.placement.file_len)?;
    }
    let mut cmdline_len = 0;
    if let Some(source) = inputs.cmdline {
        cmdline_len = source.len();
        copy_to(mem, source.start(), cmdline, cmdline_len)?;
    }
    put(mem, cmdline.saturating_add(cmdline_len), &[0])?;

    let mut efi_map = [0; MAP_AREA as usize];
    let efi_size = layout.map.write_efi(&mut efi_map).unwrap_or(0);
    put(mem, map, efi_map.get(..efi_size).unwrap_or_default())?;

    let e820 = layout.map.e820()?;
    let page = kernel.zero_page(&BootParams {
        initrd: inputs.initrd,
        cmdline,
        cmdline_len,
        e820: &e820,
        efi_system_table: layout.tables.start(),
        efi_memory_map: PhysRange::new(map, efi_size as u64).ok_or(BootError::NoRoom { size: 0 })?,
        acpi_rsdp: layout.rsdp(),
        screen_info: &linux::screen_info(&inputs.screen_info, &layout.map),
    })?;
    put(mem, zero_page, &page)?;

    // Null, null, 64-bit code at 10h, data at 18h, as the boot protocol wants them.
    let descriptors: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (at, descriptor) in (gdt..).step_by(8).zip(descriptors) {
        put(mem, at, &descriptor.to_le_bytes())?;
    }

    let area = PhysRange::new(tables, BOOT_TABLES).ok_or(BootError::NoRoom { size: BOOT_TABLES })?;
    let mut pool = pool(area);
    let cr3 = paging::open_identity(&mut pool)?;
    Ok(Start {
        rip: layout.placement.entry,
        rsp: stack.saturating_add(BOOT_STACK),
        cr3,
        gdt: (gdt, 31),
        zero_page,
    })
}

/// Writes the page of thunks, which call by `insn`.
pub fn write_thunks(layout: &Layout, insn: HypercallInsn, mem: &impl PhysMem) -> Result<(), BootError> {
    put(mem, layout.thunks.start(), &thunk_page(insn))
}

/// Writes a table of the guest's own into the room it is given; gives its length, where there is one.
pub type MakeTable<'a> = dyn FnMut(&mut [u8]) -> Option<usize> + 'a;

/// Writes the guest's ACPI root, and the tables of its own for which `own` give a length. Gives their addresses. `scratch` has
/// room for a page.
pub fn write_acpi(
    layout: &Layout,
    firmwares: &acpi::Tables,
    own: [&mut MakeTable<'_>; OWN_TABLES],
    scratch: &mut [u8],
    mem: &impl PhysMem,
) -> Result<[Option<u64>; OWN_TABLES], BootError> {
    let rsdp = layout.rsdp();
    let areas = (rsdp.saturating_add(ACPI_AREA)..).step_by(OWN_AREA as usize);
    let mut written = [None; OWN_TABLES];
    for ((make, at), written) in own.into_iter().zip(areas).zip(&mut written) {
        let Some(used) = scratch.get_mut(..OWN_AREA as usize).and_then(make) else { continue };
        put(mem, at, scratch.get(..used).unwrap_or_default())?;
        *written = Some(at);
    }
    let used = firmwares.write_filtered(&HIDDEN_TABLES, written.into_iter().flatten(), rsdp, scratch)?;
    put(mem, rsdp, scratch.get(..used).unwrap_or_default())?;
    Ok(written)
}

/// Writes the guest's EFI tables and its copies of SMBIOS, with what [`write_acpi`] wrote. `scratch` has room for one copy.
///
/// A firmware whose SMBIOS tables cannot be copied costs the guest those tables, with a warning.
pub fn write_efi(
    layout: &Layout,
    firmware: &FirmwareTables,
    firmware_map: &MemoryMap,
    rt_properties: u32,
    scratch: &mut [u8],
    mem: &impl PhysMem,
) -> Result<(), BootError> {
    let rsdp = layout.rsdp();
    let mut next = rsdp.saturating_add(ACPI_AREA).saturating_add(OWN_AREAS);
    let mut copy_of = |guid| -> Result<Option<u64>, BootError> {
        let Some(entry) = firmware.config(guid) else { return Ok(None) };
        let at = next;
        match tables::copy_smbios(mem, entry, at, scratch) {
            Ok(used) => {
                put(mem, at, scratch.get(..used).unwrap_or_default())?;
                next = next.saturating_add(SMBIOS_AREA);
                Ok(Some(at))
            }
            Err(error) => {
                log::warn!("SMBIOS is not passed on: {error}");
                Ok(None)
            }
        }
    };
    let smbios = copy_of(tables::SMBIOS)?;
    let smbios3 = copy_of(tables::SMBIOS3)?;
    let update = rt_properties & Service::UpdateCapsule.rt_properties_bit() != 0;
    let esrt = firmware.config(esrt::ESRT).filter(|_| update).and_then(|at| {
        Esrt::read(mem, at).inspect_err(|error| log::warn!("the ESRT is not passed on: {error}")).ok()
    });
    let page = tables::guest_tables(&GuestInput {
        firmware,
        map: firmware_map,
        at: layout.tables.start(),
        data: layout.tables,
        thunks: layout.thunks.start(),
        rt_properties,
        esrt: esrt.as_ref(),
        rsdp: Some(rsdp),
        smbios,
        smbios3,
    });
    put(mem, layout.tables.start(), &page)
}

fn put(mem: &impl PhysMem, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    if bytes.is_empty() || mem.write(at, bytes) {
        return Ok(());
    }
    let range = PhysRange::new(at, bytes.len() as u64);
    Err(range.map_or(BootError::NoRoom { size: 0 }, BootError::Memory))
}

/// Copies `len` bytes, which may be none.
fn copy_to(mem: &impl PhysMem, from: u64, to: u64, len: u64) -> Result<(), BootError> {
    match PhysRange::new(to, len) {
        Some(to) => copy(mem, from, &to).map_err(BootError::Memory),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firmware::linux::HEADER_BYTES;
    use hv::radix::{ENTRIES, Rights};
    use hv::space::View;
    use proptest::prelude::*;

    use crate::fake::Ram;
    use crate::measure::TPM_CLOSED;
    use crate::memory;

    const MIB: u64 = 1 << 20;
    const RAM: usize = 64 << 20;

    struct Pool<'a>(&'a Ram, u64);
    impl TablePool for Pool<'_> {
        fn alloc(&mut self) -> Option<u64> {
            self.1 += PAGE_SIZE;
            Some(self.1 - PAGE_SIZE)
        }
        fn read(&self, table: u64, index: usize) -> u64 {
            assert!(index < ENTRIES);
            let mut bytes = [0; 8];
            assert!(self.0.read(table + index as u64 * 8, &mut bytes));
            u64::from_le_bytes(bytes)
        }
        fn write(&mut self, table: u64, index: usize, entry: u64) {
            assert!(self.0.write(table + index as u64 * 8, &entry.to_le_bytes()));
        }
    }

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    fn inputs() -> Inputs {
        Inputs {
            slb: Some(range(40 * MIB, 0x1_0000)),
            txt: None,
            region: range(42 * MIB, 8 * MIB),
            dma_area: range(46 * MIB, 4 * MIB),
            launch_page: range(0x9_0000, 0x2000),
            log: range(41 * MIB, 0x1_0000),
            mle_sha256: [0; 32],
            kernel: Some(range(52 * MIB, MIB)),
            relaunch: None,
            resume: false,
            initrd: Some(range(54 * MIB, 0x1234)),
            cmdline: Some(range(55 * MIB, 7)),
            config: None,
            memory_map: range(56 * MIB, 0x1000),
            descriptor: (40, 1),
            efi_system_table: 0,
            acpi_rsdp: 0,
            screen_info: [0; 64],
            tpm_degraded: false,
            tsc_khz: 1,
        }
    }

    /// All of the 64 MiB as conventional memory, but for a runtime region right where a kernel likes to be.
    fn map() -> MemoryMap {
        let descriptor = |ty: u32, start: u64, end: u64, attributes: u64| {
            let mut d = Vec::new();
            d.extend_from_slice(&u64::from(ty).to_le_bytes());
            for word in [start, 0, (end - start) / PAGE_SIZE, attributes] {
                d.extend_from_slice(&word.to_le_bytes());
            }
            d
        };
        let runtime = 8 << 60;
        let bytes = [
            descriptor(7, 0, 16 * MIB, 8),
            descriptor(6, 16 * MIB, 17 * MIB, 8 | runtime),
            descriptor(7, 17 * MIB, 64 * MIB, 8),
        ]
        .concat();
        MemoryMap::parse(&bytes, 40, 1).unwrap()
    }

    fn kernel() -> Kernel {
        let mut h = vec![0u8; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[4]);
        put(0x1f4, &((MIB as u32 - 5 * 512) / 16).to_le_bytes());
        put(0x1fe, &0xaa55u16.to_le_bytes());
        put(0x200, &[0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes());
        put(0x211, &[1]);
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x230, &(2u32 << 20).to_le_bytes());
        put(0x234, &[1, 21]);
        put(0x236, &3u16.to_le_bytes());
        put(0x238, &2047u32.to_le_bytes());
        put(0x258, &(16 * MIB).to_le_bytes());
        put(0x260, &(4 * MIB as u32).to_le_bytes());
        Kernel::parse(&h, MIB).unwrap()
    }

    #[test]
    fn nothing_of_the_guest_lies_on_what_is_not_its() {
        let (inputs, map) = (Inputs { config: Some(range(57 * MIB, 9)), ..inputs() }, map());
        let layout = plan(&inputs, &map, &kernel(), 64 * PAGE_SIZE, Some(MIB), (3, 2)).unwrap();
        let guests = [layout.placement.room, layout.boot, layout.thunks, layout.tables];
        let others = [
            inputs.slb.unwrap(),
            inputs.region,
            inputs.log,
            inputs.kernel.unwrap(),
            inputs.initrd.unwrap(),
            inputs.cmdline.unwrap(),
            layout.sandbox,
            layout.config_space.unwrap(),
            layout.parameters.unwrap(),
            range(16 * MIB, MIB),
        ];
        for (i, a) in guests.iter().enumerate() {
            assert!(others.iter().chain(&guests[i + 1..]).all(|b| !a.overlaps(b)), "{a}");
        }
        for ram in layout.map.ram() {
            for closed in [
                inputs.slb.unwrap(),
                inputs.region,
                inputs.launch_page,
                layout.sandbox,
                layout.staging.unwrap(),
                layout.config_space.unwrap(),
                layout.parameters.unwrap(),
                range(16 * MIB, MIB),
            ] {
                assert!(!ram.overlaps(&closed), "{ram} {closed}");
            }
        }
        // The preferred address is the firmware's: the kernel went to the next aligned place.
        assert_eq!(layout.placement.room.start(), 18 * MIB);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// I1 for the product's own layouts: whatever the memory map and wherever loader and firmware put things, either the
        /// launch ends, or no view reaches what is not its.
        #[test]
        fn no_layout_gives_anybody_what_is_anothers(
            pieces in prop::collection::vec((1u64..20_000, 0usize..12), 4..24),
            at in [0u64..31, 0..31, 0..31, 0..31, 0..31, 0..31],
            window in prop::sample::select(vec![0xfed8_0000u64, 0xfed9_0000, 50 * MIB]),
            smm in any::<bool>(),
        ) {
            // Mostly memory; the rest is firmware's, somebody's, or a device's.
            const TYPES: [(u32, u64); 12] = [
                (7, 8), (7, 8), (7, 8), (7, 8), (2, 8), (3, 8), (4, 8), (0, 8), (5, 8 << 60 | 8), (6, 8 << 60 | 8), (11, 8 << 60), (9, 8),
            ];
            let mut map = vec![];
            let mut start = 0;
            // The launch page is always in memory.
            for (pages, ty) in [(256, 0)].into_iter().chain(pieces) {
                let (ty, attributes) = TYPES[ty];
                let pages = if attributes == 8 { pages } else { pages % 600 + 1 };
                map.extend([u64::from(ty), start, 0, pages, attributes].map(u64::to_le_bytes).concat());
                start += pages * PAGE_SIZE;
            }
            let Ok(map) = MemoryMap::parse(&map, 40, 1) else { return Ok(()) };
            let [region, slb, log, kernel_at, initrd, cmdline] = at.map(|at| 2 * MIB * (at + 1));
            let inputs = Inputs {
                slb: Some(range(slb, 0x1_0000)),
                region: range(region, 8 * MIB),
                dma_area: range(region + 4 * MIB, 4 * MIB),
                log: range(log, 0x1_0000),
                kernel: Some(range(kernel_at, MIB)),
                initrd: Some(range(initrd, 0x1234)),
                cmdline: Some(range(cmdline, 7)),
                ..inputs()
            };
            let Ok(layout) = plan(&inputs, &map, &kernel(), 64 * PAGE_SIZE, smm.then_some(MIB), (3, 2)) else { return Ok(()) };
            let window = range(window, 0x4000);
            let Ok(space) = memory::describe(&inputs, &map, &[], &layout, [window].into_iter(), &[], 40) else { return Ok(()) };
            let of_nobody = [inputs.region, inputs.slb.unwrap(), inputs.launch_page, window, TPM_CLOSED];
            let of_firmware: Vec<_> =
                map.runtime().map(|r| r.range).chain([layout.sandbox]).chain(layout.staging).collect();
            for view in [View::Guest, View::Sandbox, View::Device] {
                for run in space.runs(view) {
                    prop_assert!(!of_nobody.iter().any(|r| r.overlaps(&run.range)), "{:?} reaches {}", view, run.range);
                    let firmwares = of_firmware.iter().any(|r| r.overlaps(&run.range));
                    prop_assert!(view == View::Sandbox || !firmwares, "{:?} reaches {}", view, run.range);
                    let guests = layout.map.ram().any(|r| r.overlaps(&run.range));
                    prop_assert!(view != View::Sandbox || !guests, "the sandbox reaches {}", run.range);
                    prop_assert!(view != View::Device || guests, "devices reach {}", run.range);
                }
            }
            for own in [layout.placement.room, layout.boot, layout.thunks, layout.tables] {
                prop_assert!(space.permits(View::Guest, own, Rights::READ | Rights::WRITE), "{}", own);
            }
        }
    }

    #[test]
    fn the_guest_starts_with_what_was_loaded() {
        let (inputs, map, kernel) = (inputs(), map(), kernel());
        let ram = Ram::new(RAM);
        ram.write(inputs.cmdline.unwrap().start(), b"quiet x");
        ram.write(inputs.kernel.unwrap().start() + 5 * 512, b"first byte of the protected-mode code");
        let layout = plan(&inputs, &map, &kernel, 64 * PAGE_SIZE, Some(MIB), (3, 2)).unwrap();
        let start = write(&layout, &inputs, &kernel, &ram, |area| Pool(&ram, area.start())).unwrap();
        let mut code = [0; 5];
        ram.read(layout.placement.room.start(), &mut code);
        assert_eq!(&code, b"first");
        assert_eq!(start.rip, layout.placement.room.start() + 0x200);
        let mut pointer = [0; 4];
        ram.read(start.zero_page + 0x228, &mut pointer);
        let mut cmdline = [0xff; 8];
        ram.read(u32::from_le_bytes(pointer).into(), &mut cmdline);
        assert_eq!(&cmdline, b"quiet x\0");
        let tables = start.cr3;
        assert!(layout.boot.contains_addr(tables) && layout.boot.contains_addr(tables + BOOT_TABLES - 1));
        assert!(layout.boot.contains_addr(start.rsp - 1));
    }

    #[test]
    fn a_machine_without_room_is_an_error() {
        let (inputs, map, kernel) = (inputs(), map(), kernel());
        let error = plan(&inputs, &map, &kernel, 1 << 40, None, (0, 0)).err();
        assert_eq!(error, Some(BootError::NoRoom { size: 1 << 40 }));
    }
}
