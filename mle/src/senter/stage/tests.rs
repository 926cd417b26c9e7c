use std::cell::RefCell;

use hv::launch::{Blob, DMA_AREA_SIZE, MLE_VERSION, MleHeader, POLICY, policy_entries};
use hv::slrt::{ARCH_SKINIT, ARCH_TXT, Builder, MtrrPair, entry_header};
use iommu::model::dmar;
use proptest::prelude::*;
use zerocopy::FromZeros;

use super::super::regs::tests::Chipset;
use super::*;

const MIB: u64 = 1 << 20;
const HEAP: u64 = 0x3000_0000;
const HEAP_SIZE: u64 = 0x2_0000;
const SINIT: u64 = 0x2ff0_0000;
const REGION: u64 = 0x2000_0000;
const REGION_SIZE: u64 = 32 * MIB;
const SLRT: u64 = 0x1f00_0000;
const LOG: u64 = 0x1f10_0000;
const TABLES: u64 = 0x1f20_0000;
const LAUNCH_PAGE: u64 = 0x9_0000;
const WAKEUP: u64 = SINIT + 0x100;

/// Memory of 1 GiB, of which what was written is kept.
#[derive(Default)]
struct Memory(RefCell<std::collections::BTreeMap<u64, u8>>);

impl PhysMem for Memory {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let memory = self.0.borrow();
        if addr < PAGE_SIZE || addr.checked_add(out.len() as u64).is_none_or(|end| end > 1 << 30) {
            return false;
        }
        for (at, byte) in (addr..).zip(out) {
            *byte = memory.get(&at).copied().unwrap_or(0);
        }
        true
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.0.borrow_mut().extend((addr..).zip(data.iter().copied()));
        true
    }
}

/// What SINIT and the loader leave, one field each.
#[derive(Clone)]
struct Left {
    errorcode: u64,
    heap: (u64, u64),
    /// What each size word says beyond what the table has.
    size_error: [i64; 4],
    processors: u32,
    os_mle_version: u32,
    slrt: u64,
    ap_wake: u32,
    os_sinit_version: u32,
    pmr: [u64; 4],
    capabilities: u32,
    elements: Vec<u8>,
    sinit_mle_version: u32,
    wakeup: u32,
    ranges: Vec<(u64, u64, u8)>,
    range_count: Option<u32>,
    dmar: Vec<u8>,
    dmar_offset: Option<u32>,
    architecture: u16,
    dlme_base: u64,
    region: (u64, u64),
    flags: u32,
    log: (u64, u32, u16),
}

fn log_element(base: u64, room: u32, first: u32, next: u32) -> Vec<u8> {
    let mut element: Vec<u8> = [8u32, 28].iter().flat_map(|word| word.to_le_bytes()).collect();
    element.extend(base.to_le_bytes());
    element.extend([room, first, next].iter().flat_map(|word| word.to_le_bytes()));
    element
}

/// As a machine of 1 GiB should be.
fn right() -> Left {
    let mut elements: Vec<u8> = [4u32, 12, 7].iter().flat_map(|word| word.to_le_bytes()).collect();
    elements.extend(log_element(LOG, 0x1_0000, 0, 5));
    elements.extend([0, 0, 0, 0, 8, 0, 0, 0]);
    Left {
        errorcode: 0xc000_0001,
        heap: (HEAP, HEAP_SIZE),
        size_error: [0; 4],
        processors: 2,
        os_mle_version: 1,
        slrt: SLRT,
        ap_wake: LAUNCH_PAGE as u32,
        os_sinit_version: 7,
        pmr: [0, 0x4000_0000, 0, 0],
        capabilities: 0x2,
        elements,
        sinit_mle_version: 9,
        wakeup: WAKEUP as u32,
        ranges: vec![(0, 0xa_0000, 0), (MIB, 0x2fe0_0000, 0)],
        range_count: None,
        dmar: dmar::Table::new(39).unit(1, 0, 0xfed9_0000, &[]).finish(),
        dmar_offset: None,
        architecture: ARCH_TXT,
        dlme_base: REGION,
        region: (REGION, REGION_SIZE),
        flags: 0,
        log: (LOG, 0x1_0000, LOG_FORMAT_TPM2),
    }
}

impl Left {
    fn slrt(&self) -> Vec<u8> {
        let mut builder = Builder::new(self.architecture);
        let mut image = DlInfo::new_zeroed();
        image.hdr = entry_header::<DlInfo>(slrt::TAG_DL_INFO);
        image.dlme_base = self.dlme_base.into();
        let mut log = LogInfo::new_zeroed();
        log.hdr = entry_header::<LogInfo>(slrt::TAG_LOG_INFO);
        (log.addr, log.size, log.format) = (self.log.0.into(), self.log.1.into(), self.log.2.into());
        let mut intel = IntelInfo::new_zeroed();
        intel.hdr = entry_header::<IntelInfo>(slrt::TAG_INTEL);
        (intel.saved_misc_enable, intel.mtrr_default_type) = (0x85_0089.into(), 0xc06.into());
        intel.mtrr_count = 1.into();
        intel.mtrr_pairs[0] = MtrrPair { base: 0x8000_0000.into(), mask: 0xff_8000_0800.into() };
        let mut cordon = CordonEntry::new_zeroed();
        cordon.hdr = entry_header::<CordonEntry>(slrt::TAG_CORDON);
        cordon.version = MLE_VERSION.into();
        cordon.flags = self.flags.into();
        cordon.mle_region = Blob { base: self.region.0.into(), size: self.region.1.into() };
        cordon.launch_page = LAUNCH_PAGE.into();
        builder.entry(&image).unwrap();
        builder.entry(&log).unwrap();
        builder.policy(&policy_entries([Blob::default(); POLICY.len()])).unwrap();
        builder.entry(&intel).unwrap();
        builder.entry(&cordon).unwrap();
        builder.finish().unwrap().0.to_vec()
    }

    fn heap(&self) -> Vec<u8> {
        let put = |table: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            let end = at + bytes.len();
            table.resize(table.len().max(end), 0);
            table[at..end].copy_from_slice(bytes);
        };
        let mut tables = [const { vec![] }; 4];
        let [bios, os_mle, os_sinit, sinit_mle] = &mut tables;
        put(bios, 24, &self.processors.to_le_bytes());
        put(bios, 36, &[0; 4]);
        put(os_mle, 0, &self.os_mle_version.to_le_bytes());
        put(os_mle, 8, &self.slrt.to_le_bytes());
        put(os_mle, 24, &self.ap_wake.to_le_bytes());
        put(os_mle, 32, &[0; 64]);
        put(os_sinit, 0, &self.os_sinit_version.to_le_bytes());
        put(os_sinit, 8, &TABLES.to_le_bytes());
        self.pmr
            .iter()
            .zip((32..).step_by(8))
            .for_each(|(value, at)| put(os_sinit, at, &value.to_le_bytes()));
        put(os_sinit, 80, &self.capabilities.to_le_bytes());
        put(os_sinit, 92, &self.elements);
        put(sinit_mle, 0, &self.sinit_mle_version.to_le_bytes());
        put(sinit_mle, 120, &self.wakeup.to_le_bytes());
        let count = self.range_count.unwrap_or(self.ranges.len() as u32);
        put(sinit_mle, 128, &count.to_le_bytes());
        // Both offsets count from the size word.
        put(sinit_mle, 132, &168u32.to_le_bytes());
        put(sinit_mle, 136, &(self.dmar.len() as u32).to_le_bytes());
        let mut at = 160;
        for (base, length, kind) in &self.ranges {
            put(sinit_mle, at, &base.to_le_bytes());
            put(sinit_mle, at + 8, &length.to_le_bytes());
            put(sinit_mle, at + 16, &[*kind, 0, 0, 0, 0, 0, 0, 0]);
            at += 24;
        }
        put(sinit_mle, 140, &self.dmar_offset.unwrap_or(at as u32 + 8).to_le_bytes());
        put(sinit_mle, at, &self.dmar);
        let mut heap = vec![];
        for (table, error) in tables.iter().zip(self.size_error) {
            heap.extend((table.len() as u64 + 8).wrapping_add_signed(error).to_le_bytes());
            heap.extend(table);
        }
        heap
    }

    fn run(&self) -> Result<Found, Error> {
        self.run_on(&self.heap(), &self.slrt())
    }

    fn run_on(&self, heap: &[u8], slrt: &[u8]) -> Result<Found, Error> {
        let memory = Memory::default();
        memory.write(HEAP, heap);
        memory.write(SLRT, slrt);
        memory.write(LOG, b"event");
        memory.write(TABLES, &(TABLES + 0x1001).to_le_bytes());
        memory.write(TABLES + 0x1000, &(TABLES + 0x2001).to_le_bytes());
        let chipset = Chipset::new();
        chipset.set(regs::ERRORCODE, self.errorcode);
        chipset.set(regs::HEAP_BASE, self.heap.0);
        chipset.set(regs::HEAP_SIZE, self.heap.1);
        chipset.set(regs::SINIT_BASE, SINIT);
        chipset.set(regs::SINIT_SIZE, 0x1_0000);
        let image = PhysRange::new(REGION, 2 * MIB).unwrap();
        // Two of them a case are what a test may lose.
        let buffers =
            Buffers { dmar: Box::leak(Box::new([0; DMAR_MAX])), log: Box::leak(Box::new([0; LOG_MAX])) };
        check(&chipset.registers(), &memory, image, REGION_SIZE, buffers)
    }
}

/// The error of a machine that is right but for one thing.
fn error(change: impl FnOnce(&mut Left)) -> (SenterError, u16) {
    let mut left = right();
    change(&mut left);
    match left.run() {
        Err(Error::Checked(error, detail)) => (error, detail),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_honest_launch_is_taken() {
    let found = right().run().unwrap();
    assert_eq!((found.others, found.wake), (1, Wake::Monitor(WAKEUP)));
    assert_eq!(found.handoff.region_size - DMA_AREA_SIZE, 28 * MIB);
    assert_eq!((found.handoff.slrt_base, found.handoff.log_base), (SLRT, LOG));
    assert_eq!((found.txt.log, found.txt.dmar), (b"event".as_slice(), right().dmar.as_slice()));
    assert_eq!(found.txt.page_tables, PhysRange::new(TABLES, 3 * PAGE_SIZE).unwrap());
    assert_eq!(found.txt.protection, Protection::InForce);
    assert_eq!((found.saved.count, found.saved.pairs[0]), (1, [0x8000_0000, 0xff_8000_0800]));
    let optional = Left { flags: FLAG_REGIONS_OPTIONAL, capabilities: 1, ..right() }.run().unwrap();
    assert_eq!((optional.txt.protection, optional.wake), (Protection::InForceIfAny, Wake::Getsec));
}

/// The tables as the product's loader builds them, with SINIT's in place of the empty one.
#[test]
fn what_the_loader_builds_is_taken() {
    use loader::table::{INTEL_OFFSET, LOG_SIZE, Launch, Technology, build};
    let right = right();
    let mut info = IntelInfo::new_zeroed();
    info.hdr = entry_header::<IntelInfo>(slrt::TAG_INTEL);
    info.mtrr_count = 1.into();
    info.mtrr_pairs[0] = MtrrPair { base: 6.into(), mask: 0x800.into() };
    let mut mle = MleHeader::new_zeroed();
    mle.image_size = (2 * MIB).into();
    mle.region_size = REGION_SIZE.into();
    let (slrt, _) = build(&Launch {
        technology: Technology::Senter { sinit: Blob::default(), entry: 0x74, info },
        mle_base: REGION,
        mle,
        log: LOG,
        kernel: Blob::default(),
        initrd: Blob::default(),
        cmdline: Blob::default(),
        config: Blob::default(),
        memory_map: Blob::default(),
        descriptor_size: 48,
        descriptor_version: 1,
        system_table: 0,
        rsdp: 0,
        launch_page: LAUNCH_PAGE,
        screen_info: [0; 64],
        relaunch: Blob::default(),
        allow_locality0: false,
        optional_regions: true,
    })
    .unwrap();
    let mut built = heap::build(&heap::Contents {
        slrt: SLRT,
        info: SLRT + INTEL_OFFSET,
        launch_page: (LAUNCH_PAGE as u32, 0x2000),
        page_tables: TABLES,
        mle_size: 2 * MIB,
        mle_header: 0x40,
        pmr: [0, 0x3000_0000, 0, 0],
        capabilities: capability::WAKE_MONITOR,
        rsdp: 0,
        log: (LOG, LOG_SIZE),
    })
    .to_vec();
    // SINIT logs five bytes, and writes its own table.
    let next = (SIZE_WORD + heap::os_mle::SIZE + SIZE_WORD + heap::os_sinit::ELEMENTS + 24) as usize;
    built[next..next + 4].copy_from_slice(&5_u32.to_le_bytes());
    built.truncate(built.len() - SIZE_WORD as usize);
    let ours = right.heap();
    let sizes = |index: usize| {
        (0..index).fold(0, |at, _| at + u64::from_le_bytes(ours[at..at + 8].try_into().unwrap()) as usize)
    };
    let heap = [&ours[..sizes(1)], &built, &ours[sizes(3)..]].concat();
    let found = right.run_on(&heap, &slrt).unwrap();
    assert_eq!((found.saved.count, found.saved.pairs[0]), (1, [6, 0x800]));
    assert_eq!((found.txt.log, found.wake), (b"event".as_slice(), Wake::Monitor(WAKEUP)));
    assert_eq!(found.txt.protection, Protection::InForceIfAny);
}

#[test]
fn each_size_of_the_heap_is_looked_at() {
    for (table, number) in [(0, 2), (1, 3), (2, 4)] {
        // What follows a table of the wrong size is read at the wrong place.
        let shifted = error(|left| left.size_error[table] = 0x1_0000_0000);
        assert_eq!(shifted, (SenterError::Heap, number - 1), "table {table}");
        let negative = error(|left| left.size_error[table] = -0x1_0000);
        assert_eq!(negative, (SenterError::Heap, number - 1), "table {table}");
    }
    assert_eq!(error(|left| left.size_error[3] = 0x10_0000), (SenterError::Heap, 4));
    assert_eq!(error(|left| left.size_error[3] = -8), (SenterError::SinitMleData, FIELD_DMAR));
    assert_eq!(error(|left| left.heap = (HEAP, 4)), (SenterError::Heap, 1));
    assert_eq!(error(|left| left.heap = (HEAP, u64::MAX)), (SenterError::Heap, 0));
    assert_eq!(error(|left| left.heap = (0x5_0000_0000, HEAP_SIZE)), (SenterError::Heap, 0));
    assert_eq!(error(|left| left.heap = (0, 0x1000)), (SenterError::Heap, 0));
}

#[test]
fn each_lie_is_named() {
    use SenterError::*;
    type Lie<'a> = (&'a dyn Fn(&mut Left), (SenterError, u16));
    let lies: &[Lie<'_>] = &[
        (&|l| l.errorcode = 0xc000_0021, (ErrorCode, 0x21)),
        (&|l| l.processors = 0, (Heap, 1)),
        (&|l| l.os_mle_version = 2, (OsMleData, FIELD_VERSION)),
        (&|l| l.os_sinit_version = 6, (OsSinitData, FIELD_VERSION)),
        (&|l| l.sinit_mle_version = 7, (SinitMleData, FIELD_VERSION)),
        (&|l| l.slrt = REGION + 0x1000, (OsMleData, FIELD_SLRT)),
        (&|l| l.slrt = u64::MAX - 5, (OsMleData, FIELD_SLRT)),
        (&|l| l.ap_wake = 0x8000, (OsMleData, FIELD_LAUNCH_PAGE)),
        (&|l| l.wakeup = 0, (SinitMleData, FIELD_WAKEUP)),
        (&|l| l.wakeup = REGION as u32, (SinitMleData, FIELD_WAKEUP)),
        (&|l| l.architecture = ARCH_SKINIT, (Slrt, FIELD_TECHNOLOGY)),
        (&|l| l.dlme_base = REGION + 0x1000, (Slrt, FIELD_IMAGE)),
        (&|l| l.region.1 = REGION_SIZE - 2 * MIB, (Slrt, FIELD_IMAGE)),
        (&|l| l.region.0 = REGION - 2 * MIB, (Slrt, FIELD_IMAGE)),
        (&|l| l.flags = 4, (Slrt, FIELD_FLAGS)),
        (&|l| l.log.2 = 1, (Slrt, FIELD_LOG_FORMAT)),
    ];
    for (change, wanted) in lies {
        assert_eq!(error(change), *wanted);
    }
}

#[test]
fn what_devices_could_write_is_refused() {
    use SenterError::Unprotected;
    let pmr = |base, size| error(|left| left.pmr = [base, size, 0, 0]);
    assert_eq!(pmr(0, SLRT), (Unprotected, (SLRT / MIB) as u16));
    assert_eq!(pmr(0, REGION + REGION_SIZE - 1), (Unprotected, (REGION / MIB) as u16));
    assert_eq!(pmr(2 * MIB + SLRT, 0x4000_0000), (Unprotected, (SLRT / MIB) as u16));
    assert_eq!(pmr(0, 0), (Unprotected, (SLRT / MIB) as u16));
    assert_eq!(pmr(u64::MAX, 2), (Unprotected, (SLRT / MIB) as u16));
}

#[test]
fn what_is_no_memory_by_sinits_list_is_refused() {
    use SenterError::{Memory, SinitMleData};
    let ranges = |ranges: Vec<_>| error(|left| left.ranges = ranges);
    let missing = (Memory, (REGION / MIB) as u16);
    assert_eq!(ranges(vec![(0, REGION, 0), (REGION + REGION_SIZE, MIB, 0)]), missing);
    // A hole of one page, a range of another type, one that wraps.
    let split = [(0, REGION + MIB, 0), (REGION + MIB + PAGE_SIZE, 64 * MIB, 0)];
    assert_eq!(ranges(split.to_vec()), missing);
    assert_eq!(ranges(vec![(0, REGION, 0), (REGION, 64 * MIB, 3)]), missing);
    assert_eq!(ranges(vec![(0, REGION, 0), (REGION, u64::MAX, 0)]), missing);
    assert_eq!(ranges(vec![]), (SinitMleData, FIELD_RANGES));
    assert_eq!(error(|left| left.range_count = Some(1 << 31)), (SinitMleData, FIELD_RANGES));
    // Neighbours, in whatever order, are one.
    let neighbours = vec![(REGION + MIB, 64 * MIB, 0), (0, REGION + MIB, 0)];
    assert!(Left { ranges: neighbours, ..right() }.run().is_ok());
}

#[test]
fn sinits_dmar_is_the_one_that_counts() {
    use SenterError::{Dmar, SinitMleData};
    let length = right().dmar.len() as u16;
    // There is no ACPI in this memory at all: a table there, the same or not, is nothing that is asked.
    assert!(right().run().is_ok());
    assert_eq!(error(|left| left.dmar[0] = b'X'), (Dmar, length));
    assert_eq!(error(|left| left.dmar.push(0)), (Dmar, length + 1));
    assert_eq!(error(|left| left.dmar = vec![0; 5000]), (Dmar, 5000));
    assert_eq!(error(|left| left.dmar_offset = Some(4)), (SinitMleData, FIELD_DMAR));
    assert_eq!(error(|left| left.dmar_offset = Some(u32::MAX)), (SinitMleData, FIELD_DMAR));
}

#[test]
fn sinits_log_lies_where_the_loader_has_the_log() {
    use SenterError::{Log, OsSinitData};
    let end = [0, 0, 0, 0, 8, 0, 0, 0];
    let elements = |element: &[u8]| error(|left| left.elements = [element, &end].concat());
    assert_eq!(elements(&[]), (OsSinitData, FIELD_LOG));
    assert_eq!(elements(&log_element(LOG + 1, 0x1_0000, 0, 5)), (Log, 0));
    assert_eq!(elements(&log_element(REGION, 0x1000, 0, 5)), (Log, 0));
    assert_eq!(elements(&log_element(LOG, 0x1_0000, 6, 5)), (Log, 0));
    assert_eq!(elements(&log_element(LOG, 0x1000, 0, 0x1001)), (Log, 0));
    assert_eq!(elements(&log_element(LOG, 0x1_0000, 0, 0xf000)), (OsSinitData, FIELD_LOG));
    // An element of no length does not hang, one without an end does not lead out of the table.
    assert_eq!(elements(&[4, 0, 0, 0, 0, 0, 0, 0]), (OsSinitData, FIELD_LOG));
    assert_eq!(elements(&[4, 0, 0, 0, 255, 255, 255, 255]), (OsSinitData, 1));
}

proptest! {
    #[test]
    fn no_heap_makes_it_panic(at in 0usize..700, bytes in prop::collection::vec(any::<u8>(), 1..40)) {
        let left = right();
        let mut heap = left.heap();
        let end = (at + bytes.len()).min(heap.len());
        if at < end {
            heap[at..end].copy_from_slice(&bytes[..end - at]);
        }
        let memory = Memory::default();
        memory.write(HEAP, &heap);
        memory.write(SLRT, &left.slrt());
        let range = PhysRange::new(HEAP, HEAP_SIZE).unwrap();
        for which in [Which::Bios, Which::OsMle, Which::OsSinit, Which::SinitMle] {
            if let Ok(table) = Table::find(&memory, &range, which) {
                let _ = (Protected::read(&memory, &table), page_tables(&memory, &table));
                if let Ok(ranges) = Ranges::new(&memory, &table) {
                    let _ = ranges.has(&PhysRange::new(REGION, REGION_SIZE).unwrap());
                }
            }
        }
    }
}

/// The fuzz target's input for what a machine leaves: see `mle/fuzz`.
fn fuzz_input(left: &Left) -> Vec<u8> {
    let slrt = left.slrt();
    [(slrt.len() as u16).to_le_bytes().as_slice(), &slrt, &left.heap()].concat()
}

fn corpus() -> [(&'static str, Left); 3] {
    [
        ("monitor", right()),
        ("getsec", Left { flags: FLAG_REGIONS_OPTIONAL, capabilities: 1, ..right() }),
        ("table-too-long", Left { size_error: [0, 0, 8, 0], ..right() }),
    ]
}

#[test]
fn the_fuzz_target_begins_with_what_is_taken() {
    for (name, left) in corpus() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/heap").join(name);
        assert_eq!(std::fs::read(path).unwrap(), fuzz_input(&left), "{name}: write it again, see below");
    }
}

/// Writes the corpus: `cargo test -p mle -- --ignored the_corpus`.
#[test]
#[ignore = "writes files of the repository"]
fn the_corpus_is_written() {
    for (name, left) in corpus() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/heap").join(name);
        std::fs::write(path, fuzz_input(&left)).unwrap();
    }
}
