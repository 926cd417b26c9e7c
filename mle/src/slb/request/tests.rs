use super::*;
use crate::slb::fake::Msrs;
use hv::launch::{MLE_MAGIC, SLB_SIZE, policy_entries};
use hv::slrt::{Builder, entry_header};
use proptest::prelude::*;
use zerocopy::{FromZeros, IntoBytes};

const SLRT: u64 = 0x1000_0000;
const SLB: u64 = 0x1001_0000;
const LOG: u64 = 0x1002_0000;
const MAP: u64 = 0x1003_0000;
const KERNEL: u64 = 0x1100_0000;
const REGION: u64 = 0x2000_0000;
const REGION_SIZE: u64 = 16 << 20;
const TOP: u64 = 0x8000_0000;

fn slb() -> PhysRange {
    PhysRange::new(SLB, SLB_SIZE).unwrap()
}

fn space() -> Space {
    Space::read(&Msrs::with(&[(0xc001_001a, TOP)])).unwrap()
}

fn blob(base: u64, size: u64) -> Blob {
    Blob { base: base.into(), size: size.into() }
}

/// A table's entries, to be changed before it is built.
struct Parts {
    architecture: u16,
    dl: DlInfo,
    log: LogInfo,
    policy: Vec<PolicyEntry>,
    cordon: CordonEntry,
}

/// What an honest loader writes.
fn good() -> Parts {
    let mut dl = DlInfo::new_zeroed();
    dl.hdr = entry_header::<DlInfo>(TAG_DL_INFO);
    dl.dce_base.set(SLB);
    dl.dlme_base.set(REGION);
    dl.dlme_size.set(0x3_0000);
    dl.dlme_entry.set(0x1000);
    let mut cordon = CordonEntry::new_zeroed();
    cordon.hdr = entry_header::<CordonEntry>(TAG_CORDON);
    cordon.version.set(MLE_VERSION);
    cordon.mle_region = blob(REGION, REGION_SIZE);
    cordon.kernel = blob(KERNEL, 0x80_0000);
    cordon.efi_memory_map = blob(MAP, 0x1000);
    cordon.efi_descriptor_size.set(48);
    let log = LogInfo {
        hdr: entry_header::<LogInfo>(TAG_LOG_INFO),
        format: LOG_FORMAT_TPM2.into(),
        reserved: 0.into(),
        size: 0x1_0000.into(),
        addr: LOG.into(),
    };
    let policy = policy_entries([Blob::default(); 4]).to_vec();
    Parts { architecture: ARCH_SKINIT, dl, log, policy, cordon }
}

impl Parts {
    fn build(&self) -> [u8; MAX_SIZE] {
        let mut table = Builder::new(self.architecture);
        table.entry(&self.dl).unwrap();
        table.entry(&self.log).unwrap();
        table.policy(&self.policy).unwrap();
        table.entry(&self.cordon).unwrap();
        table.finish().unwrap().0
    }
}

fn check(table: &[u8; MAX_SIZE]) -> Result<Request, Failure> {
    let slrt = slrt_range(SLRT, &slb(), &space())?;
    Request::check(table, slrt, &slb(), &space())
}

fn refused(change: impl FnOnce(&mut Parts)) -> Failure {
    let mut parts = good();
    change(&mut parts);
    check(&parts.build()).unwrap_err()
}

#[test]
fn an_honest_table_is_taken_as_it_is() {
    let request = check(&good().build()).unwrap();
    assert_eq!(request.region, PhysRange::new(REGION, REGION_SIZE).unwrap());
    assert_eq!(request.image, PhysRange::new(REGION, 0x3_0000).unwrap());
    assert_eq!(request.dma_area, PhysRange::new(REGION + REGION_SIZE - (4 << 20), 4 << 20).unwrap());
    assert_eq!(request.log, PhysRange::new(LOG, 0x1_0000).unwrap());
    assert!(!request.locality0_allowed);
}

#[test]
fn each_field_has_its_refusal() {
    let field = |field: Field| Failure { error: SlbError::SlrtField, detail: field as u16 };
    assert_eq!(refused(|p| p.architecture = 1), field(Field::Architecture));
    assert_eq!(refused(|p| p.dl.dce_base.set(SLB + 1)), field(Field::DceBase));
    assert_eq!(refused(|p| p.dl.dlme_base.set(REGION + 1)), field(Field::DlmeBase));
    assert_eq!(refused(|p| p.log.format.set(1)), field(Field::LogFormat));
    assert_eq!(refused(|p| p.cordon.version.set(MLE_VERSION + 1)), field(Field::Version));
    assert_eq!(refused(|p| p.cordon.flags.set(2)), field(Field::Flags));
}

#[test]
fn each_misplaced_region_has_its_refusal() {
    let at = |base: u64, size: u64| {
        refused(|p| {
            p.cordon.mle_region = blob(base, size);
            p.dl.dlme_base.set(base);
        })
    };
    let region = |place: Place| Failure { error: SlbError::Region, detail: place as u16 };
    assert_eq!(at(REGION, 0), region(Place::Wraps));
    assert_eq!(at(0xffff_ffff_ffe0_0000, 16 << 20), region(Place::Wraps));
    assert_eq!(at(REGION + 0x10_0000, REGION_SIZE), region(Place::Alignment));
    assert_eq!(at(REGION, REGION_SIZE + 0x10_0000), region(Place::Alignment));
    assert_eq!(at(REGION, 6 << 20), region(Place::Size));
    assert_eq!(at(REGION, 258 << 20), region(Place::Size));
    assert_eq!(at(TOP - (8 << 20), 16 << 20), region(Place::NotRam));
    assert_eq!(at(1 << 32, REGION_SIZE), region(Place::NotRam));
    assert_eq!(at(0, REGION_SIZE), region(Place::NotRam));
    assert_eq!(at(0x1000_0000, REGION_SIZE), region(Place::Slb));
    assert_eq!(at(KERNEL, REGION_SIZE), region(Place::Blob));
    assert_eq!(refused(|p| p.dl.dlme_size.set(0)), region(Place::Image));
    assert_eq!(refused(|p| p.dl.dlme_size.set(u64::MAX)), region(Place::Image));
    assert_eq!(refused(|p| p.dl.dlme_size.set(REGION_SIZE - DMA_AREA_SIZE + 1)), region(Place::Image));
}

#[test]
fn each_misplaced_log_has_its_refusal() {
    let at = |base: u64, size: u32| {
        refused(|p| {
            p.log.addr.set(base);
            p.log.size.set(size);
        })
    };
    let log = |place: Place| Failure { error: SlbError::Log, detail: place as u16 };
    assert_eq!(at(LOG, 0), log(Place::Wraps));
    assert_eq!(at(u64::MAX - 0xfff, 0x2000), log(Place::Wraps));
    assert_eq!(at(LOG, 4095), log(Place::Size));
    assert_eq!(at(0, 4096), log(Place::NotRam));
    assert_eq!(at(0xfed4_0000, 4096), log(Place::NotRam));
    assert_eq!(at(1 << 32, 4096), log(Place::NotRam));
    assert_eq!(at(SLB + 0xffff, 4096), log(Place::Slb));
    assert_eq!(at(SLRT + MAX_SIZE as u64 - 1, 4096), log(Place::Slrt));
    assert_eq!(at(MAP, 4096), log(Place::Blob));
    assert_eq!(at(REGION + REGION_SIZE - 1, 4096), log(Place::Region));
}

#[test]
fn a_blob_that_wraps_touches_everything() {
    let failure = refused(|p| p.cordon.initrd = blob(u64::MAX, 2));
    assert_eq!(failure, Failure { error: SlbError::Region, detail: Place::Blob as u16 });
}

#[test]
fn any_other_policy_is_refused() {
    let entry = |detail| Failure { error: SlbError::Policy, detail };
    assert_eq!(refused(|p| p.policy[1].pcr.set(17)), entry(1));
    assert_eq!(refused(|p| p.policy[2].entity_type.set(0)), entry(2));
    assert_eq!(refused(|p| p.policy[3].flags.set(1)), entry(3));
    assert_eq!(refused(|p| p.policy[0].reserved.set(1)), entry(0));
    assert_eq!(refused(|p| p.policy[0].info[31] = 1), entry(0));
    assert_eq!(refused(|p| p.policy.truncate(3)), entry(3));
    assert_eq!(refused(|p| p.policy.swap(0, 1)), entry(0));
}

#[test]
fn an_slrt_is_read_only_from_ram_clear_of_the_slb() {
    for address in [
        0,
        0xf_f001,
        SLB,
        SLB - MAX_SIZE as u64 + 1,
        SLB + 0xffff,
        TOP - MAX_SIZE as u64 + 1,
        0xfed4_0000,
        1 << 32,
        u64::MAX,
    ] {
        let failure = slrt_range(address, &slb(), &space()).unwrap_err();
        assert_eq!(failure.error, SlbError::SlrtAddress, "{address:#x}");
    }
    assert!(slrt_range(SLB - MAX_SIZE as u64, &slb(), &space()).is_ok());
}

#[test]
fn the_header_must_agree_with_the_table() {
    let request = check(&good().build()).unwrap();
    let header = |change: fn(&mut MleHeader)| {
        let mut header = MleHeader {
            magic: MLE_MAGIC,
            version: MLE_VERSION.into(),
            entry: 0x1000.into(),
            image_size: 0x3_0000.into(),
            region_size: REGION_SIZE.into(),
            txt_header: 0.into(),
        };
        change(&mut header);
        request.entry_point(&header)
    };
    let field = |field: Field| Err(Failure { error: SlbError::MleHeader, detail: field as u16 });
    assert_eq!(header(|_| ()), Ok(REGION + 0x1000));
    assert_eq!(header(|h| h.magic[7] ^= 1), field(Field::Magic));
    assert_eq!(header(|h| h.version.set(0)), field(Field::Version));
    assert_eq!(header(|h| h.image_size.set(0x2_ffff)), field(Field::ImageSize));
    assert_eq!(header(|h| h.region_size.set(REGION_SIZE + 1)), field(Field::RegionSize));
    assert_eq!(header(|h| h.entry.set(0x1001)), field(Field::Entry));
}

#[test]
fn an_entry_point_outside_the_image_or_in_its_header_is_refused() {
    for entry in [0, size_of::<MleHeader>() as u32 - 1, 0x3_0000, u32::MAX] {
        let mut parts = good();
        parts.dl.dlme_entry.set(entry.into());
        let request = check(&parts.build()).unwrap();
        let header = MleHeader {
            magic: MLE_MAGIC,
            version: MLE_VERSION.into(),
            entry: entry.into(),
            image_size: 0x3_0000.into(),
            region_size: REGION_SIZE.into(),
            txt_header: 0.into(),
        };
        assert_eq!(request.entry_point(&header).unwrap_err().detail, Field::Entry as u16, "{entry:#x}");
    }
}

/// What a table that was taken promises.
fn promises(request: &Request) -> Result<(), TestCaseError> {
    let Request { region, image, dma_area, log, slrt, .. } = request;
    let ranges = [slb(), *slrt, *region, *log];
    for (i, one) in ranges.iter().enumerate() {
        prop_assert!(space().is_ram(one));
        for other in &ranges[i + 1..] {
            prop_assert!(!one.overlaps(other), "{one} and {other}");
        }
    }
    prop_assert!(region.contains(image) && region.contains(dma_area) && !image.overlaps(dma_area));
    prop_assert_eq!(region.start() % MLE_REGION_ALIGN, 0);
    prop_assert_eq!(region.last(), dma_area.last());
    Ok(())
}

/// Addresses where things are, and just beside them.
fn address() -> impl Strategy<Value = u64> {
    let places = [0, 1 << 20, SLRT, SLB, LOG, MAP, KERNEL, REGION, TOP, 0xfec0_0000, 1 << 32, u64::MAX];
    let near = (prop::sample::select(places.to_vec()), -0x1_0000i64..0x1_0000);
    prop_oneof![
        near.prop_map(|(place, offset)| place.wrapping_add_signed(offset)),
        (0u64..0x800).prop_map(|i| i << 21),
        any::<u64>(),
    ]
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..0x2_0000, (0u64..0x90).prop_map(|i| i << 21), any::<u64>()]
}

proptest! {
    #[test]
    fn no_place_is_accepted_that_overlaps_another(
        (region, region_size) in (address(), size()),
        (log, log_size) in (address(), size()),
        (kernel, kernel_size) in (address(), size()),
        image in size(),
    ) {
        let mut parts = good();
        parts.cordon.mle_region = blob(region, region_size);
        parts.dl.dlme_base.set(region);
        parts.dl.dlme_size.set(image);
        parts.log.addr.set(log);
        parts.log.size.set(log_size as u32);
        parts.cordon.kernel = blob(kernel, kernel_size);
        if let Ok(request) = check(&parts.build()) {
            promises(&request)?;
        }
    }

    #[test]
    fn bytes_changed_at_will_never_panic_and_never_break_a_promise(
        changes in prop::collection::vec((0usize..700, any::<u8>()), 1..6),
    ) {
        let mut table = good().build();
        for (at, value) in changes {
            table[at] = value;
        }
        if let Ok(request) = check(&table) {
            promises(&request)?;
        }
    }

    #[test]
    fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), MAX_SIZE)) {
        let mut table = [0; MAX_SIZE];
        table.copy_from_slice(&noise);
        prop_assert!(check(&table).is_err());
    }

    #[test]
    fn no_header_makes_it_jump_out_of_the_image(bytes: [u8; size_of::<MleHeader>()]) {
        let request = check(&good().build()).unwrap();
        let mut header = MleHeader::new_zeroed();
        header.as_mut_bytes().copy_from_slice(&bytes);
        if let Ok(entry) = request.entry_point(&header) {
            prop_assert!(request.image.contains_addr(entry));
        }
    }
}
