//! The whole launch against models of IOMMU and TPM, with devices that try their DMA after every access.

use std::cell::Cell;

use super::*;
use crate::slb::fake::Msrs;
use crate::slb::request::Field;
use crate::slb::stop;
use hv::io::PortIo;
use hv::launch::{
    Blob, CordonEntry, DMA_AREA_SIZE, FLAG_LOCALITY0_ALLOWED, MLE_MAGIC, MLE_VERSION, SLB_SIZE,
    policy_entries,
};
use hv::slrt::{
    ARCH_SKINIT, Builder, DlInfo, LOG_FORMAT_TPM2, LogInfo, TAG_CORDON, TAG_DL_INFO, TAG_LOG_INFO,
    entry_header,
};
use iommu::model::{self, Defect, Table};
use proptest::prelude::*;
use tpm::log::extended;
use tpm::model::{Crb, FakeTpm, Fifo, Ticks};
use tpm::{Digest as TpmDigest, digest_of};

const SLRT: u64 = 0x1000_0000;
const SLB: u64 = 0x1001_0000;
const LOG: u64 = 0x1002_0000;
const MAP: u64 = 0x1003_0000;
const RSDP: u64 = 0x1004_0000;
const REGION: u64 = 0x2000_0000;
const REGION_SIZE: u64 = 16 << 20;
const IMAGE_SIZE: usize = 0x3_0000;
const ENTRY: u32 = 0x1000;

const UNIT: u16 = 2;
const UNIT_BASE: u64 = 0xfeb8_0000;
const ATTACKER: u16 = 0x310;
const KHZ: u64 = 3_000_000;
const MEASURED: &[u8] = b"the measured part of the SLB";
const ALL: [HashAlg; 4] = [HashAlg::SHA1, HashAlg::SHA256, HashAlg::SHA384, HashAlg::SHA512];

/// A machine with one IOMMU and a TPM interface.
struct Bench<T> {
    machine: model::Machine,
    chip: T,
    clock: Ticks,
}

/// A window of either.
enum Window<T> {
    Iommu(model::Window),
    Tpm(T),
}

macro_rules! forward {
    ($($read:ident $write:ident $ty:ty;)*) => {$(
        fn $read(&self, offset: u32) -> $ty {
            match self {
                Self::Iommu(window) => window.$read(offset),
                Self::Tpm(window) => window.$read(offset),
            }
        }
        fn $write(&self, offset: u32, value: $ty) {
            match self {
                Self::Iommu(window) => window.$write(offset, value),
                Self::Tpm(window) => window.$write(offset, value),
            }
        }
    )*};
}

impl<T: Mmio> Mmio for Window<T> {
    forward! {
        read8 write8 u8;
        read32 write32 u32;
        read64 write64 u64;
    }
}

impl<T> PortIo for Bench<T> {
    fn in8(&self, port: u16) -> u8 {
        self.machine.in8(port)
    }
    fn in16(&self, port: u16) -> u16 {
        self.machine.in16(port)
    }
    fn in32(&self, port: u16) -> u32 {
        self.machine.in32(port)
    }
    fn out8(&self, port: u16, value: u8) {
        self.machine.out8(port, value);
    }
    fn out16(&self, port: u16, value: u16) {
        self.machine.out16(port, value);
    }
    fn out32(&self, port: u16, value: u32) {
        self.machine.out32(port, value);
    }
}

impl<T> Clock for Bench<T> {
    fn now_us(&self) -> u64 {
        self.machine.now_us()
    }
}

impl<T> PhysMem for Bench<T> {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        self.machine.read(addr, out)
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.machine.write(addr, data)
    }
}

impl<T: Mmio + Clone> Platform for Bench<T> {
    type Window = Window<T>;

    fn map(&self, base: u64, len: u32) -> Option<Window<T>> {
        match base {
            tpm::BASE => Some(Window::Tpm(self.chip.clone())),
            _ => self.machine.map(base, len).map(Window::Iommu),
        }
    }
    fn random(&self) -> u64 {
        self.machine.random()
    }
}

fn blob(base: u64, size: u64) -> Blob {
    Blob { base: base.into(), size: size.into() }
}

fn slrt(flags: u32) -> [u8; MAX_SIZE] {
    let mut dl = DlInfo::new_zeroed();
    dl.hdr = entry_header::<DlInfo>(TAG_DL_INFO);
    dl.dce_base.set(SLB);
    dl.dlme_base.set(REGION);
    dl.dlme_size.set(IMAGE_SIZE as u64);
    dl.dlme_entry.set(ENTRY.into());
    let log = LogInfo {
        hdr: entry_header::<LogInfo>(TAG_LOG_INFO),
        format: LOG_FORMAT_TPM2.into(),
        reserved: 0.into(),
        size: 0x1_0000.into(),
        addr: LOG.into(),
    };
    let mut cordon = CordonEntry::new_zeroed();
    cordon.hdr = entry_header::<CordonEntry>(TAG_CORDON);
    cordon.version.set(MLE_VERSION);
    cordon.flags.set(flags);
    cordon.mle_region = blob(REGION, REGION_SIZE);
    cordon.efi_memory_map = blob(MAP, 80);
    cordon.efi_descriptor_size.set(40);
    cordon.acpi_rsdp.set(RSDP);
    let mut table = Builder::new(ARCH_SKINIT);
    table.entry(&dl).unwrap();
    table.entry(&log).unwrap();
    table.policy(&policy_entries([Blob::default(); 4])).unwrap();
    table.entry(&cordon).unwrap();
    table.finish().unwrap().0
}

fn image() -> Vec<u8> {
    let mut image: Vec<u8> = (0..IMAGE_SIZE).map(|i| (i * 7) as u8).collect();
    let header = MleHeader {
        magic: MLE_MAGIC,
        version: MLE_VERSION.into(),
        entry: ENTRY.into(),
        image_size: (IMAGE_SIZE as u64).into(),
        region_size: REGION_SIZE.into(),
        txt_header: 0.into(),
    };
    image[..size_of::<MleHeader>()].copy_from_slice(header.as_bytes());
    image
}

fn checksum(bytes: &mut [u8], at: usize) {
    bytes[at] = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
}

/// Two descriptors: the region, reserved; RAM around the log.
fn memory_map() -> Vec<u8> {
    [(0_u64, REGION, REGION_SIZE >> 12), (4, SLRT, 0x1000)]
        .into_iter()
        .flat_map(|(kind, start, pages)| [kind, start, 0, pages, 0])
        .flat_map(u64::to_le_bytes)
        .collect()
}

fn bench<T>(chip: T, flags: u32) -> Bench<T> {
    let machine = model::Machine::new();
    machine.add_unit(UNIT, UNIT_BASE, 0..=u16::MAX, true);
    let mut rsdp = [0; 20];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[16..].copy_from_slice(&(RSDP as u32 + 0x100).to_le_bytes());
    checksum(&mut rsdp, 8);
    let mut rsdt = [0; 40];
    rsdt[..4].copy_from_slice(b"RSDT");
    rsdt[4] = 40;
    rsdt[36..].copy_from_slice(&(RSDP as u32 + 0x200).to_le_bytes());
    checksum(&mut rsdt, 9);
    let ivrs = Table::new().unit(0x10, UNIT, UNIT_BASE, 0, &[1, 0, 0, 0]).finish();
    for (at, bytes) in [
        (SLRT, &slrt(flags)[..]),
        (MAP, &memory_map()),
        (RSDP, &rsdp),
        (RSDP + 0x100, &rsdt),
        (RSDP + 0x200, &ivrs),
        (REGION, &image()),
    ] {
        assert!(machine.write(at, bytes));
    }
    Bench { machine, chip, clock: Ticks::default() }
}

fn launched() -> FakeTpm {
    let mut tpm = FakeTpm::with(&ALL);
    tpm.drtm(MEASURED);
    tpm
}

fn on_fifo() -> Bench<Fifo> {
    bench(Fifo::new(launched()), 0)
}

impl<T: Mmio + Clone> Bench<T> {
    fn launch(&self) -> Result<Launch, Failure> {
        let space = Space::read(&Msrs::with(&[(0xc001_001a, 0x8000_0000)])).unwrap();
        let range = PhysRange::new(SLB, SLB_SIZE).unwrap();
        let slb = Slb { range, measured: MEASURED, slrt_pointer: SLRT };
        let (mut slrt, mut ivrs) = ([0; MAX_SIZE], [0; IVRS_MAX]);
        let buffers = Buffers { slrt: &mut slrt, ivrs: &mut ivrs };
        launch(self, &self.clock, &space, &slb, KHZ, buffers)
    }

    fn image(&self) -> Vec<u8> {
        let mut image = vec![0; IMAGE_SIZE];
        assert!(self.machine.read(REGION, &mut image));
        image
    }
}

impl Bench<Fifo> {
    fn fails(&self) -> Failure {
        let failure = self.launch().unwrap_err();
        assert!(self.is_unextended(), "nothing was extended before {failure:?}");
        failure
    }

    /// PCR 17 and 18 are as SKINIT left them.
    fn is_unextended(&self) -> bool {
        let state = self.chip.state();
        let launched = launched();
        ALL.iter().all(|alg| [17, 18].iter().all(|pcr| state.tpm.pcr(*alg, *pcr) == launched.pcr(*alg, *pcr)))
    }
}

/// A PCR extended with the digest of `data`.
fn extend(alg: HashAlg, value: &TpmDigest, data: &[u8]) -> TpmDigest {
    extended(value, &digest_of(alg, &[data]).unwrap()).unwrap()
}

#[test]
fn image_and_policy_are_in_the_pcrs_of_every_bank_and_the_handoff_says_where_all_is() {
    let bench = on_fifo();
    let launch = bench.launch().unwrap();
    let sha256 = Sha256::digest(sha256::software, &[&image()]);
    let state = bench.chip.state();
    for alg in ALL {
        let zero = TpmDigest::zero(launched().pcr(alg, 17).bank());
        let code = extend(alg, &extend(alg, &zero, MEASURED), &sha256);
        assert_eq!(state.tpm.pcr(alg, 17), code);
        assert_eq!(state.tpm.pcr(alg, 18), extend(alg, &zero, POLICY.as_bytes()));
    }
    assert!(state.tpm.seen.iter().all(|(locality, _)| *locality == 2));
    assert_eq!(state.active, None, "the locality is given back");

    assert_eq!(launch.entry, REGION + u64::from(ENTRY));
    assert_eq!(launch.image, PhysRange::new(REGION, IMAGE_SIZE as u64).unwrap());
    let Handoff { magic, slb_base, slrt_base, log_base, log_size, mle_sha256, .. } = launch.handoff;
    assert_eq!((magic, slb_base, slrt_base), (HANDOFF_MAGIC, SLB, SLRT));
    assert_eq!((log_base, log_size, mle_sha256), (LOG, 0x1_0000, sha256));
    let Handoff { region_base, region_size, tsc_khz, tpm_degraded, iommu_count, .. } = launch.handoff;
    assert_eq!((region_base, region_size), (REGION, REGION_SIZE));
    assert_eq!((tsc_khz, tpm_degraded, iommu_count), (KHZ, 0, 1));
    assert!(!bench.machine.dma_write(ATTACKER, REGION, b"late"));
    assert!(!bench.machine.dma_read(ATTACKER, REGION));
}

#[test]
fn an_iommu_that_does_not_block_ends_the_launch_before_the_tpm_is_touched() {
    for defect in [Defect::CommandsStuck, Defect::StatusStuck, Defect::Ignores(0)] {
        let bench = on_fifo();
        bench.machine.with_unit(0, |unit| unit.defect = Some(defect));
        assert_eq!(bench.fails().error, SlbError::Dma, "{defect:?}");
        assert!(bench.chip.state().tpm.seen.is_empty());
    }
}

#[test]
fn without_a_usable_ivrs_there_is_no_launch() {
    for (at, detail) in [(RSDP, 2), (RSDP + 17, 3), (RSDP + 0x200, 5), (RSDP + 0x220, 3)] {
        let bench = on_fifo();
        bench.machine.write(at, b"?");
        assert_eq!(bench.fails(), Failure { error: SlbError::Ivrs, detail }, "{at:#x}");
    }
}

#[test]
fn an_slrt_that_a_device_changes_after_it_was_copied_ends_the_launch() {
    // The loader's context field, which nothing looks at: only the comparison can notice.
    let bench = on_fifo();
    let copied = Cell::new(false);
    bench.machine.attack(move |machine| {
        if copied.replace(true) {
            machine.dma_write(ATTACKER, SLRT + 0x58, b"?");
        }
    });
    assert_eq!(bench.fails(), Failure { error: SlbError::SlrtChanged, detail: 0 });
}

#[test]
fn a_region_or_log_that_the_memory_map_does_not_list_is_refused() {
    for (at, place) in [(MAP, Place::RegionUnlisted), (MAP + 40, Place::LogUnlisted)] {
        let bench = on_fifo();
        bench.machine.write(at, &[11]);
        assert_eq!(bench.fails(), Failure { error: SlbError::MemoryMap, detail: place as u16 });
    }
}

#[test]
fn an_image_whose_header_disagrees_is_not_measured() {
    let bench = on_fifo();
    bench.machine.write(REGION + 12, &(ENTRY + 1).to_le_bytes());
    assert_eq!(bench.fails(), Failure { error: SlbError::MleHeader, detail: Field::Entry as u16 });
}

#[test]
fn a_pcr_17_that_skinit_did_not_make_ends_the_launch() {
    let mut other = FakeTpm::with(&ALL);
    other.drtm(b"another SLB");
    let without_sha256 = FakeTpm::with(&[HashAlg::SHA1]);
    for tpm in [FakeTpm::with(&ALL), other, without_sha256] {
        let bench = bench(Fifo::new(tpm), 0);
        let failure = bench.launch().unwrap_err();
        assert_eq!(failure, Failure { error: SlbError::NotLaunched, detail: HashAlg::SHA256.0 });
        let seen = &bench.chip.state().tpm.seen;
        assert!(seen.iter().all(|(_, command)| command[6..10] == [0, 0, 1, 0x7e]), "only read");
    }
}

#[test]
fn a_refused_extend_ends_the_launch() {
    let bench = on_fifo();
    // TPM_RC_LOCALITY is put up with at locality 0 alone. The first command is the read of PCR 17.
    let read = {
        let mut tpm = launched();
        let command = [0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 11, 3, 0, 0, 2];
        tpm.execute(2, &command)
    };
    bench.chip.state().tpm.answer.extend([read, vec![0x80, 1, 0, 0, 0, 10, 0, 0, 9, 7]]);
    assert_eq!(bench.fails().error, SlbError::Extend);
}

#[test]
fn a_tpm_without_locality_2_is_taken_only_if_the_configuration_allows_it() {
    let on_crb = |flags| {
        let crb = Crb::new(launched());
        crb.state().localities = false;
        bench(crb, flags)
    };
    assert_eq!(on_crb(0).launch().unwrap_err().error, SlbError::NoLocality2);
    let bench = on_crb(FLAG_LOCALITY0_ALLOWED);
    let launch = bench.launch().unwrap();
    assert_eq!(launch.handoff.tpm_degraded, 1);
    let (state, before) = (bench.chip.state(), launched());
    assert_eq!(state.tpm.pcr(HashAlg::SHA256, 17), before.pcr(HashAlg::SHA256, 17));
}

#[test]
fn giving_up_caps_the_pcrs_also_when_the_launch_holds_the_tpm() {
    let bench = on_fifo();
    let mut tpm = take_tpm(bench.chip.clone(), bench.clock.clone(), Locality::Two).unwrap();
    stop::cap(bench.chip.clone(), bench.clock.clone());
    let (mut state, before) = (bench.chip.state(), launched());
    for alg in ALL {
        for pcr in [17, 18, 19, 22] {
            assert_ne!(state.tpm.pcr(alg, pcr), before.pcr(alg, pcr), "PCR {pcr}");
        }
    }
    state.tpm.seen.clear();
    drop(state);
    tpm.release();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// A device that writes everywhere it can, from the first access on: either the launch ends, or what was
    /// measured is what is in memory at its end.
    #[test]
    fn whatever_a_device_writes_the_measured_image_is_the_one_that_runs(
        seed: u64,
        targets in prop::collection::vec((0usize..5, 0u64..0x2000, any::<u64>()), 1..4),
    ) {
        let bench = on_fifo();
        bench.machine.seed(seed);
        let places = [SLRT, RSDP, MAP, REGION, REGION + REGION_SIZE - DMA_AREA_SIZE];
        bench.machine.attack(move |machine| {
            for (place, offset, value) in &targets {
                machine.dma_write(ATTACKER, places[*place] + offset, &value.to_le_bytes());
            }
        });
        let result = bench.launch();
        bench.machine.peace();
        if let Ok(launch) = result {
            let sha256 = Sha256::digest(sha256::software, &[&bench.image()]);
            prop_assert_eq!(launch.handoff.mle_sha256, sha256);
            prop_assert!(!bench.machine.dma_write(ATTACKER, REGION, b"late"));
        }
    }

    /// Bytes of the SLRT changed by the loader: an error or a launch within what was asked for, never a panic.
    #[test]
    fn no_slrt_makes_it_panic(changes in prop::collection::vec((0u64..700, any::<u8>()), 1..5)) {
        let bench = on_fifo();
        for (offset, value) in changes {
            bench.machine.write(SLRT + offset, &[value]);
        }
        if let Ok(launch) = bench.launch() {
            prop_assert!(launch.image.contains_addr(launch.entry));
        }
    }
}
