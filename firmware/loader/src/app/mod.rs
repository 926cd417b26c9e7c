//! The application: picks an entry, checks the machine, loads everything, and hands over to [`launch`].
//!
//! Until `launch` leaves the firmware, whatever fails undoes what was done and returns to the boot manager.

mod error;
mod files;
mod launch;
mod memory;
mod metal;
mod senter;

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::convert::Infallible;
use core::time::Duration;

use hv::addr::{FOUR_GIB, PAGE_SIZE};
use hv::failure::Record;
use hv::launch::{
    Blob, LAUNCH_PAGE_SIZE, MLE_REGION_ALIGN, MleHeader, RELAUNCH_MLE, RELAUNCH_MLE_MAX, SLB_SIZE, SlbHeader,
    relaunch_size,
};
use hv::slrt::MAX_SIZE;
use loader::entry::{ENTRY_MAX, Entry, Place, Technology as Way, Value};
use loader::machine::{self, Refusal};
use loader::park::{self, Apic};
use loader::table::{LOG_SIZE, Launch, Technology};
use loader::{choice, image, screen, tpm};
use uefi::boot::{self, MemoryType};
use uefi::mem::memory_map::MemoryMap;
use uefi::proto::tcg::v2::Tcg;
use uefi::runtime::{self, VariableVendor};
use uefi::table::cfg::ConfigTableEntry;
use uefi::{CStr16, Status, cstr16, entry, guid, system};

use error::{Error, FileError};
use files::{File, Volume};
use memory::Pages;
use metal::{Identity, Msrs, Page, Ports, TscClock};

/// Prints a line on the firmware's console. A console that fails is no reason to stop.
macro_rules! say {
    ($($arg:tt)*) => {
        uefi::system::with_stdout(|out| {
            use core::fmt::Write as _;
            let _ = writeln!(out, $($arg)*);
        })
    };
}
pub(crate) use say;

/// Where entries are. Spec: \[BLS\] "The Partitions".
const ENTRIES: &str = "\\loader\\entries";
/// The boot loader's own settings; one of them names the default entry.
const LOADER_CONF: &str = "\\loader\\loader.conf";
/// Real-mode code of the APs can lie below this.
const LAUNCH_PAGE_LIMIT: u64 = 0x9_f000;
/// How long bad news stays on the screen, in tenths of a second.
const PAUSE_TENTHS: u32 = 50;

#[entry]
fn main() -> Status {
    say!("Cordon loader {}", env!("CARGO_PKG_VERSION"));
    report_earlier_failure();
    let Err(error) = run();
    say!("cordon: {error}");
    say!("cordon: nothing was started; returning to the boot manager");
    pause();
    Status::LOAD_ERROR
}

/// Shows why an earlier launch ended in a reset, once.
fn report_earlier_failure() {
    if let Some(record) = Record::load(&Ports) {
        say!("cordon: an earlier launch failed: {record}");
        Record::clear(&Ports);
        pause();
    }
}

/// Leaves people time to read, until a key is pressed.
fn pause() {
    for _ in 0..PAUSE_TENTHS {
        if matches!(system::with_stdin(|keys| keys.read_key()), Ok(Some(_))) {
            return;
        }
        boot::stall(Duration::from_millis(100));
    }
}

fn run() -> Result<Infallible, Error> {
    let prepared = prepare()?;
    ask_for_wiping();
    launch::launch(prepared)
}

/// Asks the firmware to wipe memory when the machine is next reset, in whatever way, so that nothing that runs afterwards reads
/// the guest's. Only firmware that can has the variable; the guest may take the request back, by writing 0.
///
/// Spec: \[TCG-MOR\] "MemoryOverwriteRequestControl".
fn ask_for_wiping() {
    const NAME: &CStr16 = cstr16!("MemoryOverwriteRequestControl");
    const VENDOR: VariableVendor = VariableVendor(guid!("e20939be-32d4-41be-a150-897f85d49829"));
    const CLEAR_MEMORY: u8 = 1;
    let mut value = [0];
    let Ok((_, attributes)) = runtime::get_variable(NAME, &VENDOR, &mut value) else { return };
    let wiped = runtime::set_variable(NAME, &VENDOR, attributes, &value.map(|bits| bits | CLEAR_MEMORY));
    if let Err(error) = wiped {
        say!("cordon: memory will not be wiped at the next reset: {}", error.status());
    }
}

/// What the one or the other way to launch needs.
enum Means {
    /// The SLB.
    Skinit(Pages),
    Senter(Box<senter::Senter>),
}

/// All that a launch needs. Dropping it gives the memory back.
struct Prepared {
    means: Means,
    slrt: Pages,
    launch_page: Pages,
    memory_map: Pages,
    idt: Pages,
    /// What the table will say; its memory map is not known yet.
    table: Launch,
    /// Kept for their memory, which `table` names.
    _named: [Option<Pages>; 7],
    apic: Apic,
    clock: TscClock,
    tpm: Page,
    tpm_interface: tpm::Interface,
}

fn prepare() -> Result<Prepared, Error> {
    let mut volume = Volume::of_this_image().map_err(Error::Volume)?;
    let (file, entry) = pick(&mut volume)?;
    let title = entry.title.as_ref().map_or("no title", |title| title.text.as_str());
    say!("cordon: booting {file} ({title})");

    let msrs = Msrs;
    let cpuid = raw_cpuid::CpuId::new();
    let intel = cpuid.get_vendor_info().is_some_and(|vendor| vendor.as_str() == "GenuineIntel");
    let way = entry.technology.unwrap_or(if intel { Way::Senter } else { Way::Skinit });
    match way {
        Way::Skinit => machine::check_cpu(&cpuid, &msrs, entry.insist_skinit)?,
        Way::Senter => senter::check_cpu(entry.insist_txt)?,
    }
    let apic = park::find(&msrs)?;
    let clock = TscClock::calibrate().ok_or(Refusal::Tsc)?;
    let tpm = Page::new(tpm::BASE);
    let tcg2 = boot::get_handle_for_protocol::<Tcg>().is_ok();
    let rsdp = rsdp().ok_or(Refusal::NoAcpi)?;
    if way == Way::Skinit {
        machine::check_iommu(&Identity, rsdp)?;
    }
    let tpm_interface = machine::check_tpm(&Identity, rsdp, &tpm, tcg2)?;

    let (mle_header, mle) = load_mle(&mut volume, &file, &entry.mle)?;
    let relaunch = match entry.relaunch {
        true => Some(relaunch_memory(&mle_header, &mle).map_err(at(&file, &entry.mle))?),
        false => None,
    };
    let command_line = entry.command_line();
    let kernel = load(&mut volume, &file, &entry.linux)?;
    image::check_kernel(kernel.bytes(), command_line.len() as u64)
        .map_err(|error| at(&file, &entry.linux)(FileError::Image(error)))?;
    let initrd = load_initrds(&mut volume, &file, &entry.initrd)?;
    let config = entry.config.as_ref().map(|value| load(&mut volume, &file, value)).transpose()?;
    let blob = |pages: &Option<Pages>| pages.as_ref().map_or(Blob::default(), Pages::blob);

    let buffer = |what, kind, size, limit| {
        Pages::new(kind, size, 1, limit).map_err(|error| Error::Memory { what, error })
    };
    let cmdline = if command_line.is_empty() {
        None
    } else {
        let mut pages = buffer("command line", MemoryType::LOADER_DATA, command_line.len() as u64, FOUR_GIB)?;
        pages.bytes_mut().copy_from_slice(command_line.as_bytes());
        Some(pages)
    };
    let log = buffer("event log", MemoryType::RESERVED, LOG_SIZE.into(), FOUR_GIB)?;
    let slrt = buffer("SLRT", MemoryType::LOADER_DATA, MAX_SIZE as u64, FOUR_GIB)?;
    let idt = buffer("exception handlers", MemoryType::LOADER_DATA, launch::IDT_SIZE, FOUR_GIB)?;
    let launch_page = buffer("launch page", MemoryType::RESERVED, LAUNCH_PAGE_SIZE, LAUNCH_PAGE_LIMIT)?;
    let memory_map = buffer("memory map", MemoryType::LOADER_DATA, memory_map_room()?, FOUR_GIB)?;

    let (means, technology) = match (way, &entry.slb) {
        (Way::Skinit, Some(slb)) => {
            let (header, pages) = load_slb(&mut volume, &file, slb)?;
            let technology = Technology::Skinit { base: pages.base(), slb: header };
            (Means::Skinit(pages), technology)
        }
        // The entry's parser wants an SLB for SKINIT.
        _ => {
            let header = &mle_header;
            let (mle, log, slrt, launch_page) = (&mle, &log, &slrt, &launch_page);
            let loaded = senter::Loaded { mle, header, log, slrt, launch_page, rsdp };
            let (senter, technology) = senter::prepare(&mut volume, &file, &entry, &loaded)?;
            (Means::Senter(Box::new(senter)), technology)
        }
    };

    let table = Launch {
        technology,
        mle_base: mle.base(),
        mle: mle_header,
        log: log.base(),
        kernel: kernel.blob(),
        initrd: blob(&initrd),
        cmdline: blob(&cmdline),
        config: blob(&config),
        memory_map: Blob::default(),
        descriptor_size: 0,
        descriptor_version: 0,
        system_table: uefi::table::system_table_raw().map_or(0, |table| table.as_ptr() as u64),
        rsdp,
        launch_page: launch_page.base(),
        relaunch: blob(&relaunch),
        screen_info: metal::graphics_mode().map_or([0; 64], |mode| screen::screen_info(&mode)),
        allow_locality0: entry.allow_locality0,
        optional_regions: entry.optional_regions,
    };
    let named = [Some(mle), Some(kernel), initrd, config, cmdline, Some(log), relaunch];
    Ok(Prepared {
        means,
        slrt,
        launch_page,
        memory_map,
        idt,
        table,
        _named: named,
        apic,
        clock,
        tpm,
        tpm_interface,
    })
}

/// The entry to boot, with its path: the highest one that the default of `loader.conf` names, else the highest.
fn pick(volume: &mut Volume) -> Result<(String, Entry), Error> {
    let default = volume.open(LOADER_CONF).and_then(|mut file| file.contents(ENTRY_MAX)).unwrap_or_default();
    let default = String::from_utf8_lossy(&default);
    let default = choice::default_pattern(&default);

    let mut candidates = Vec::new();
    for name in volume.list(ENTRIES).map_err(|e| Error::file(ENTRIES, e))? {
        if !name.to_ascii_lowercase().ends_with(".conf") {
            continue;
        }
        let path = alloc::format!("{ENTRIES}\\{name}");
        let entry = match volume.open(&path).and_then(|mut file| file.contents(ENTRY_MAX)) {
            Ok(bytes) => Entry::parse(&path, &bytes).map_err(Error::Entry).transpose(),
            Err(error) => Some(Err(Error::file(&path, error))),
        };
        candidates.extend(entry.map(|entry| (name, path, entry)));
    }
    let named = |name: &str| default.is_some_and(|pattern| choice::names(pattern, name));
    candidates.sort_by(|(a, ..), (b, ..)| named(a).cmp(&named(b)).then_with(|| choice::version_cmp(a, b)));
    let (_, path, entry) = candidates.pop().ok_or(Error::NoEntry)?;
    Ok((path, entry?))
}

/// Puts a failure of the file that `value` names in its place.
fn at(file: &str, value: &Value) -> impl Fn(FileError) -> Error {
    let place = Place { file, value }.to_string();
    move |error| Error::file(&place, error)
}

/// Opens the file that `value` names, which must not be empty.
fn open(volume: &mut Volume, value: &Value) -> Result<File, FileError> {
    let file = volume.open(&value.efi_path())?;
    if file.size() == 0 { Err(FileError::Empty) } else { Ok(file) }
}

/// Memory below 4 GiB for a file.
fn allocate(kind: MemoryType, size: u64, align: u64) -> Result<Pages, FileError> {
    Pages::new(kind, size, align, FOUR_GIB).map_err(FileError::Memory)
}

fn announce(value: &Value, size: u64, base: u64) {
    say!("  {:<13} {} ({size} bytes, at {base:#x})", value.key, value.text);
}

/// Loads a whole file below 4 GiB.
fn load(volume: &mut Volume, file: &str, value: &Value) -> Result<Pages, Error> {
    let at = at(file, value);
    let mut opened = open(volume, value).map_err(&at)?;
    let mut pages = allocate(MemoryType::LOADER_DATA, opened.size(), 1).map_err(&at)?;
    opened.read(pages.bytes_mut()).map_err(&at)?;
    announce(value, opened.size(), pages.base());
    Ok(pages)
}

fn load_slb(volume: &mut Volume, file: &str, value: &Value) -> Result<(SlbHeader, Pages), Error> {
    let at = at(file, value);
    let mut opened = open(volume, value).map_err(&at)?;
    let start = opened.start::<{ size_of::<SlbHeader>() }>().map_err(&at)?;
    let header = image::check_slb(&start, opened.size()).map_err(|e| at(FileError::Image(e)))?;
    let mut pages = allocate(MemoryType::RESERVED, SLB_SIZE, SLB_SIZE).map_err(&at)?;
    opened.read(pages.bytes_mut()).map_err(&at)?;
    announce(value, opened.size(), pages.base());
    Ok((header, pages))
}

fn load_mle(volume: &mut Volume, file: &str, value: &Value) -> Result<(MleHeader, Pages), Error> {
    let at = at(file, value);
    let mut opened = open(volume, value).map_err(&at)?;
    let start = opened.start::<{ size_of::<MleHeader>() }>().map_err(&at)?;
    let header = image::check_mle(&start, opened.size()).map_err(|e| at(FileError::Image(e)))?;
    let region = header.region_size.get();
    let mut pages = allocate(MemoryType::RESERVED, region, MLE_REGION_ALIGN).map_err(&at)?;
    opened.read(pages.bytes_mut()).map_err(&at)?;
    announce(value, opened.size(), pages.base());
    Ok((header, pages))
}

/// Memory for later launches of the same MLE, with its file as it is now.
fn relaunch_memory(header: &MleHeader, mle: &Pages) -> Result<Pages, FileError> {
    let (size, region) = (header.image_size.get(), header.region_size.get());
    let too_large = FileError::TooLarge { size, limit: RELAUNCH_MLE_MAX };
    let file = usize::try_from(size).ok().filter(|_| size <= RELAUNCH_MLE_MAX);
    let file = file.and_then(|size| mle.bytes().get(..size)).ok_or(too_large)?;
    let mut pages = allocate(MemoryType::RESERVED, relaunch_size(region), MLE_REGION_ALIGN)?;
    let _ = pages.write(region.saturating_mul(2).saturating_add(RELAUNCH_MLE), file);
    Ok(pages)
}

/// Loads all initrds one after the other, each padded with zeros to 4 bytes as Linux expects them.
fn load_initrds(volume: &mut Volume, file: &str, values: &[Value]) -> Result<Option<Pages>, Error> {
    let mut opened = Vec::new();
    let mut total = 0u64;
    for value in values {
        let initrd = open(volume, value).map_err(at(file, value))?;
        let padded = initrd.size().checked_next_multiple_of(4);
        total = padded
            .and_then(|size| total.checked_add(size))
            .ok_or_else(|| at(file, value)(FileError::TooLarge { size: initrd.size(), limit: u64::MAX }))?;
        opened.push((value, initrd));
    }
    let Some(last) = values.last() else { return Ok(None) };
    let mut pages = allocate(MemoryType::LOADER_DATA, total, 1).map_err(at(file, last))?;
    let mut base = pages.base();
    let mut rest = pages.bytes_mut();
    for (value, mut initrd) in opened {
        initrd.read(rest).map_err(at(file, value))?;
        announce(value, initrd.size(), base);
        let padded = initrd.size().next_multiple_of(4);
        base = base.saturating_add(padded);
        rest = usize::try_from(padded).ok().and_then(|size| rest.get_mut(size..)).unwrap_or_default();
    }
    Ok(Some(pages))
}

/// The ACPI root pointer, revision 2 or later.
fn rsdp() -> Option<u64> {
    system::with_config_table(|tables| {
        let acpi = tables.iter().find(|table| table.guid == ConfigTableEntry::ACPI2_GUID);
        acpi.map(|table| table.address as u64)
    })
}

/// Room for the memory map: twice what it takes now, since leaving the firmware may still change it.
fn memory_map_room() -> Result<u64, Error> {
    let map = boot::memory_map(MemoryType::LOADER_DATA).map_err(|e| Error::MemoryMap(e.status()))?;
    Ok((map.meta().map_size as u64).saturating_mul(2).next_multiple_of(PAGE_SIZE))
}
