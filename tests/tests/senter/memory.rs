//! Memory as loader and SINIT leave it, without either: a machine of one GiB.

use std::mem::offset_of;

use hv::launch::{Blob, CordonEntry, FLAG_REGIONS_OPTIONAL, MLE_VERSION, MleHeader, policy_entries};
use hv::slrt::{
    ARCH_TXT, Builder, DlInfo, EntryHeader, IntelInfo, LOG_FORMAT_TPM2, LogInfo, TAG_CORDON, TAG_DL_INFO,
    TAG_INTEL, TAG_LOG_INFO, entry_header,
};
use vmx::txt::heap::{self, Contents, SIZE_WORD, capability, sinit_mle};
use vmx::txt::pages;
use zerocopy::{FromBytes, FromZeros};

use super::stub::{self, Parameters};

pub const SIZE: u64 = 1 << 30;
pub const REGION: u64 = 0x2000_0000;
pub const REGION_SIZE: u64 = 32 << 20;
const KERNEL: u64 = 0x1000_0000;
const INITRD: u64 = 0x1200_0000;
const SLRT: u64 = 0x1f00_0000;
const LOG: u64 = 0x1f10_0000;
const LOG_SIZE: u64 = 0x1_0000;
const TABLES: u64 = 0x1f20_0000;
const FIRMWARE: u64 = 0x1f30_0000;
const MAP: u64 = 0x1f40_0000;
const CMDLINE: u64 = 0x1f50_0000;
/// A page that firmware reserves for devices.
pub const KEPT: u64 = 0x1f60_0000;
const CONFIG: u64 = 0x1f70_0000;
pub const SINIT: u64 = 0x2ff0_0000;
pub const HEAP: u64 = 0x3000_0000;
pub const HEAP_SIZE: u64 = 0x2_0000;
const WAKEUP: u64 = SINIT + 0x100;
const LAUNCH_PAGE: u64 = 0x9_0000;
/// SeaBIOS's ACPI tables are from here on.
const ACPI: u64 = 0x3ffd_0000;
const PAGE: u64 = 4096;
/// Room for SINIT's copy of the DMAR.
const DMAR_ROOM: usize = 0x1000;

/// What may be wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    Nothing,
    /// Two pages of the image have changed places in the page tables.
    PageTables,
    /// The protected range ends inside the MLE region.
    Protected,
    /// OsMleData's size says more than the heap has.
    HeapSize,
    /// SINIT's list of memory ends before the region.
    Ranges,
    /// The other processor does not react.
    Silent,
}

/// Pieces of memory.
pub type Pieces = Vec<(u64, Vec<u8>)>;

fn blob(base: u64, bytes: &[u8]) -> Blob {
    // Nothing lies nowhere.
    let base = if bytes.is_empty() { 0 } else { base };
    Blob { base: base.into(), size: (bytes.len() as u64).into() }
}

fn put(bytes: &mut Vec<u8>, at: u64, value: &[u8]) {
    let at = at as usize;
    bytes.resize(bytes.len().max(at + value.len()), 0);
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// With its size word.
fn table(body: &[u8]) -> Vec<u8> {
    [(body.len() as u64 + SIZE_WORD).to_le_bytes().as_slice(), body].concat()
}

/// An EFI memory map, runtime services that find nothing, and a system table.
fn firmware() -> Pieces {
    /// EFI_NOT_FOUND.
    const NO: u64 = 0x8000_0000_0000_000e;
    let descriptor = |kind: u32, start: u64, end: u64| {
        let attributes = 0xf | if matches!(kind, 5 | 6) { 1 << 63 } else { 0 };
        [u64::from(kind), start, 0, (end - start) / PAGE, attributes].map(u64::to_le_bytes).concat()
    };
    let map: Vec<u8> = [
        (7, PAGE, LAUNCH_PAGE),
        (0, LAUNCH_PAGE, LAUNCH_PAGE + 2 * PAGE),
        (7, 0x10_0000, KERNEL),
        (2, KERNEL, LOG),
        (0, LOG, LOG + LOG_SIZE),
        (7, LOG + LOG_SIZE, TABLES),
        (0, TABLES, TABLES + 3 * PAGE),
        (7, TABLES + 3 * PAGE, FIRMWARE),
        (5, FIRMWARE, FIRMWARE + PAGE),
        (6, FIRMWARE + PAGE, FIRMWARE + 2 * PAGE),
        (7, FIRMWARE + 2 * PAGE, MAP),
        (2, MAP, KEPT),
        (0, KEPT, KEPT + PAGE),
        (2, KEPT + PAGE, REGION),
        (0, REGION, REGION + REGION_SIZE),
        (7, REGION + REGION_SIZE, SINIT),
        (0, SINIT, HEAP + HEAP_SIZE),
        (7, HEAP + HEAP_SIZE, ACPI),
        (9, ACPI, SIZE),
    ]
    .into_iter()
    .flat_map(|(kind, start, end)| descriptor(kind, start, end))
    .collect();
    // MOV RAX, imm64; RET
    let code = [&[0x48, 0xb8][..], &NO.to_le_bytes(), &[0xc3]].concat();
    let header = |signature: &[u8; 8], size: u32| {
        [signature.as_slice(), &0x2_0046_u32.to_le_bytes(), &size.to_le_bytes(), &[0; 8]].concat()
    };
    let mut data = header(b"IBI SYST", 0x78);
    put(&mut data, 88, &(FIRMWARE + PAGE + 0x100).to_le_bytes());
    put(&mut data, 112, &[0; 8]);
    put(&mut data, 0x100, &header(b"RUNTSERV", 24 + 14 * 8));
    for service in 0..14 {
        put(&mut data, 0x100 + 24 + service * 8, &FIRMWARE.to_le_bytes());
    }
    vec![(FIRMWARE, code), (FIRMWARE + PAGE, data), (MAP, map)]
}

/// SINIT's log: which banks, and one event.
fn log() -> Vec<u8> {
    const SHA256: [u8; 4] = [0x0b, 0, 32, 0];
    // Platform class, minor, major, errata, UINTN of 8 bytes.
    let version = [0, 0, 0, 0, 0, 2, 0, 2];
    let spec = [b"Spec ID Event03\0".as_slice(), &version, &1_u32.to_le_bytes(), &SHA256, &[0]].concat();
    let size = (spec.len() as u32).to_le_bytes();
    let mut log = [[0, 0, 0, 0, 3, 0, 0, 0].as_slice(), &[0; 20], &size, &spec].concat();
    for word in [17_u32, 0x402, 1] {
        log.extend(word.to_le_bytes());
    }
    log.extend(&SHA256[..2]);
    log.extend([0x11; 32]);
    log.extend([&5_u32.to_le_bytes()[..], b"SINIT"].concat());
    log
}

/// Everything, for so many processors.
pub fn pieces(
    mle: &[u8],
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    (cmdline, config): (&str, &str),
    cpus: u32,
    wrong: Wrong,
) -> Pieces {
    let (header, _) = MleHeader::read_from_prefix(mle).unwrap();
    let entry = header.txt_header.get() + 52;
    let firmware = firmware();
    let map = &firmware[2].1;

    let mut builder = Builder::new(ARCH_TXT);
    let mut image = DlInfo::new_zeroed();
    image.hdr = entry_header::<DlInfo>(TAG_DL_INFO);
    (image.dlme_base, image.dlme_size) = (REGION.into(), (mle.len() as u64).into());
    image.dlme_entry = u64::from(entry).into();
    builder.entry(&image).unwrap();
    let mut info = LogInfo::new_zeroed();
    info.hdr = entry_header::<LogInfo>(TAG_LOG_INFO);
    (info.format, info.size, info.addr) = (LOG_FORMAT_TPM2.into(), (LOG_SIZE as u32).into(), LOG.into());
    builder.entry(&info).unwrap();
    let [cmdline, config] = [cmdline, config].map(|text| text.as_bytes().to_vec());
    let places =
        [blob(CONFIG, &config), blob(KERNEL, &kernel), blob(INITRD, &initrd), blob(CMDLINE, &cmdline)];
    builder.policy(&policy_entries(places)).unwrap();
    let mut intel = IntelInfo::new_zeroed();
    intel.hdr = entry_header::<IntelInfo>(TAG_INTEL);
    intel.mtrr_default_type = 0xc06.into();
    builder.entry(&intel).unwrap();
    let mut cordon = CordonEntry::new_zeroed();
    cordon.hdr = entry_header::<CordonEntry>(TAG_CORDON);
    cordon.version = MLE_VERSION.into();
    // QEMU's VT-d has no protected regions.
    cordon.flags = FLAG_REGIONS_OPTIONAL.into();
    cordon.mle_region = Blob { base: REGION.into(), size: header.region_size };
    [cordon.config, cordon.kernel, cordon.initrd, cordon.cmdline] = places;
    cordon.efi_memory_map = blob(MAP, map);
    (cordon.efi_descriptor_size, cordon.efi_descriptor_version) = (40.into(), 1.into());
    cordon.efi_system_table = (FIRMWARE + PAGE).into();
    cordon.launch_page = LAUNCH_PAGE.into();
    builder.entry(&cordon).unwrap();
    let (slrt, used) = builder.finish().unwrap();
    // Cordon's entry is the last but for the end.
    let entry_at = used - size_of::<EntryHeader>() - size_of::<CordonEntry>();
    let rsdp_at = SLRT + (entry_at + offset_of!(CordonEntry, acpi_rsdp)) as u64;

    let mut tables = vec![0; pages::size(mle.len() as u64) as usize];
    pages::build(&mut tables, TABLES, REGION, mle.len() as u64).unwrap();
    if wrong == Wrong::PageTables {
        let (first, second) = tables[2 * PAGE as usize + 5 * 8..].split_at_mut(8);
        first.swap_with_slice(&mut second[..8]);
    }
    let protected = if wrong == Wrong::Protected { REGION + (16 << 20) } else { SIZE };
    let log = log();
    let mut os = heap::build(&Contents {
        slrt: SLRT,
        info: 0,
        launch_page: (LAUNCH_PAGE as u32, 2 * PAGE as u32),
        page_tables: TABLES,
        mle_size: mle.len() as u64,
        mle_header: header.txt_header.get().into(),
        pmr: [0, protected, 0, 0],
        capabilities: capability::WAKE_MONITOR,
        rsdp: 0,
        log: (LOG, LOG_SIZE as u32),
    })
    .to_vec();
    // What SINIT would do: say where its log ends, and its own table in place of the empty one.
    let element = SIZE_WORD + heap::os_mle::SIZE + SIZE_WORD + heap::os_sinit::ELEMENTS;
    put(&mut os, element + 24, &(log.len() as u32).to_le_bytes());
    os.truncate(heap::WRITTEN - SIZE_WORD as usize);
    if wrong == Wrong::HeapSize {
        os[..8].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    }
    let mut bios = vec![];
    put(&mut bios, heap::bios::PROCESSORS, &cpus.to_le_bytes());
    put(&mut bios, heap::bios::MIN - 4, &[0; 12]);
    let mut sinit = vec![];
    put(&mut sinit, sinit_mle::VERSION, &9_u32.to_le_bytes());
    put(&mut sinit, sinit_mle::WAKEUP, &(WAKEUP as u32).to_le_bytes());
    let end = if wrong == Wrong::Ranges { REGION } else { ACPI };
    let ranges = [(0, 0xa_0000_u64), (0x10_0000, end - 0x10_0000)];
    let mut at = 160_u64;
    put(&mut sinit, sinit_mle::MDRS, &(ranges.len() as u32).to_le_bytes());
    put(&mut sinit, sinit_mle::MDRS + 4, &(at as u32 + SIZE_WORD as u32).to_le_bytes());
    for (base, size) in ranges {
        put(&mut sinit, at, &[base, size, 0].map(u64::to_le_bytes).concat());
        at += 24;
    }
    put(&mut sinit, sinit_mle::DMAR + 4, &(at as u32 + SIZE_WORD as u32).to_le_bytes());
    let dmar_at = at;
    put(&mut sinit, at, &[0; DMAR_ROOM]);
    let heap = [table(&bios), os, table(&sinit)].concat();
    let sinit_at = HEAP + (heap.len() - sinit.len()) as u64;

    let stub = stub::image(&Parameters {
        entry: REGION as u32 + entry,
        wakeup: WAKEUP as u32,
        rsdp_to: rsdp_at as u32,
        dmar_to: (sinit_at + dmar_at) as u32,
        dmar_size_to: (sinit_at + sinit_mle::DMAR) as u32,
        others: cpus > 1 && wrong != Wrong::Silent,
    });
    let mut pieces = vec![
        (stub::BASE.into(), stub),
        (REGION, mle.to_vec()),
        (KERNEL, kernel),
        (INITRD, initrd),
        (CMDLINE, cmdline),
        (CONFIG, config),
        (KEPT, b"reserved".to_vec()),
        (SLRT, slrt.to_vec()),
        (LOG, log),
        (TABLES, tables),
        (HEAP, heap),
    ];
    pieces.extend(firmware);
    pieces.retain(|(_, bytes)| !bytes.is_empty());
    pieces
}
