use core::cell::RefCell;
use std::collections::BTreeMap;

use proptest::prelude::*;
use raw_cpuid::CpuIdResult;

use super::*;

/// Registers by number: MSRs, or a register space. What is not there must not be asked for.
#[derive(Default)]
struct Registers(RefCell<BTreeMap<u32, u64>>);

impl Registers {
    fn new(values: &[(u32, u64)]) -> Self {
        Self(RefCell::new(values.iter().copied().collect()))
    }
    fn get(&self, index: u32) -> u64 {
        *self.0.borrow().get(&index).unwrap_or_else(|| panic!("register {index:#x} is not there"))
    }
}

impl Msr for Registers {
    fn rdmsr(&self, index: u32) -> u64 {
        self.get(index)
    }
    fn wrmsr(&self, index: u32, value: u64) {
        self.0.borrow_mut().insert(index, value);
    }
}

impl Mmio for Registers {
    fn read8(&self, _: u32) -> u8 {
        panic!("no byte is read")
    }
    fn read32(&self, offset: u32) -> u32 {
        self.get(offset) as u32
    }
    fn read64(&self, offset: u32) -> u64 {
        self.get(offset)
    }
    fn write8(&self, _: u32, _: u8) {
        panic!("no byte is written")
    }
    fn write32(&self, offset: u32, value: u32) {
        self.wrmsr(offset, value.into());
    }
    fn write64(&self, _: u32, _: u64) {
        panic!("no quadword is written")
    }
}

fn cpu(vendor: &'static [u8; 12], ecx: u32) -> CpuId<impl CpuIdReader> {
    let word = move |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
    CpuId::with_cpuid_reader(move |leaf: u32, _: u32| match leaf {
        0 => CpuIdResult { eax: 1, ebx: word(0), edx: word(4), ecx: word(8) },
        1 => CpuIdResult { eax: 0x2_0652, ebx: 0, ecx, edx: 0 },
        _ => CpuIdResult { eax: 0, ebx: 0, ecx: 0, edx: 0 },
    })
}

const INTEL: &[u8; 12] = b"GenuineIntel";
const BOTH: u32 = 1 << 6 | 1 << 5;

#[test]
fn each_cpu_that_cannot_is_refused_with_its_reason() {
    let msrs = |control, mcg| Registers::new(&[(0x3a, control), (0x17a, mcg)]);
    let check = |cpu: &CpuId<_>, control, mcg| check_cpu(cpu, &msrs(control, mcg), false);
    assert_eq!(check(&cpu(INTEL, BOTH), 0xff07, 0), Ok(()));
    assert_eq!(check_cpu(&cpu(b"AuthenticAMD", BOTH), &msrs(0xff07, 0), false), Err(Refusal::Vendor));
    for ecx in [1 << 6, 1 << 5] {
        assert_eq!(check_cpu(&cpu(INTEL, ecx), &msrs(0xff07, 0), false), Err(Refusal::NoSmx(ecx)));
    }
    for control in [0, 0xff05, 0xff06, 0x7f07, 0xfe07] {
        assert_eq!(check(&cpu(INTEL, BOTH), control, 0), Err(Refusal::FeatureControl(control)));
    }
    assert_eq!(check(&cpu(INTEL, BOTH), 0xff07, 4), Err(Refusal::MachineCheck));
    assert_eq!(check_capabilities(0x1ff), Ok(()));
    assert_eq!(
        check_capabilities(0x1fe).unwrap_err().to_string(),
        "CPU: GETSEC[CAPABILITIES] is 0x1fe, bits 0x1f1 are needed"
    );
}

#[test]
fn insisting_asks_the_cpu_nothing() {
    assert_eq!(check_cpu(&cpu(b"AuthenticAMD", 0), &Registers::default(), true), Ok(()));
}

/// The heap, at 1 MiB.
struct Heap(Vec<u8>);
impl PhysMem for Heap {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let at = (addr - 0x10_0000) as usize;
        out.copy_from_slice(&self.0[at..at + out.len()]);
        true
    }
    fn write(&self, _: u64, _: &[u8]) -> bool {
        panic!("a check writes nothing")
    }
}

#[test]
fn each_chipset_that_cannot_is_refused_with_its_reason() {
    let good = [
        (0x000, 0),
        (0x008, 0),
        (0x030, 0),
        (0x100, 0xffff_ffff),
        (0x110, 0x1_b001_8086),
        (0x200, 0x8000_0000),
        (0x270, 0x7fd0_0000),
        (0x278, 0x2_0000),
        (0x300, 0x10_0000),
        (0x308, 0x2_0000),
    ];
    let with = |register, value, bios: u64| {
        let txt = Registers::new(&good);
        txt.wrmsr(register, value);
        check_txt(&txt, &Heap(bios.to_le_bytes().to_vec()))
    };
    let txt = with(0x000, 0, 48).unwrap();
    assert_eq!((txt.heap.start(), txt.heap.len(), txt.bios), (0x10_0000, 0x2_0000, 48));
    assert_eq!((txt.sinit.start(), txt.didvid, txt.production), (0x7fd0_0000, 0x1_b001_8086, true));
    assert!(!with(0x100, 0, 48).unwrap().production, "the older register counts where it is there");
    assert_eq!(with(0x000, u64::MAX, 48), Err(Refusal::NoTxt));
    assert_eq!(with(0x110, u64::MAX, 48), Err(Refusal::NoTxt));
    assert_eq!(with(0x000, 1, 48), Err(Refusal::Launched(1)));
    assert_eq!(with(0x008, 1, 48), Err(Refusal::NeedsPowerCycle(1)));
    for (register, value) in [(0x300, 0), (0x300, 0x10_0001), (0x308, 0), (0x308, 1 << 32), (0x270, 1 << 32)]
    {
        assert!(matches!(with(register, value, 48), Err(Refusal::Range { .. })), "{register:#x} {value:#x}");
    }
    for bios in [0, 40, 50, 0x1_f000, u64::MAX] {
        assert_eq!(with(0x000, 0, bios), Err(Refusal::HeapFull { bios, size: 0x2_0000 }));
    }
}

#[test]
fn an_earlier_failure_is_told_by_who_and_what() {
    for quiet in [0, 0xc000_0001, 0x7fff_ffff] {
        assert_eq!(earlier_failure(quiet), None);
    }
    let told = |code| earlier_failure(code).unwrap();
    assert_eq!(
        told(0x8000_000d),
        "TXT.ERRORCODE 0x8000000d, by the CPU, class see the module's manual, major 0x0, minor 0x0"
    );
    assert_eq!(told(0xc000_0491), "TXT.ERRORCODE 0xc0000491, by SINIT, class heap, major 0x1, minor 0x0");
    assert_eq!(
        told(0xc000_8001),
        "TXT.ERRORCODE 0xc0008001, by software that was launched, class see the module's manual, major 0x0, minor 0x0"
    );
    // Ours.
    assert!(told(0xd234_c003).contains("does not cover the MLE region"), "{}", told(0xd234_c003));
}

#[test]
fn protected_ranges_cover_memory_in_whole_units() {
    let range = |start, last| PhysRange::from_last(start, last).unwrap();
    let ram = [range(0, 0x9_ffff), range(0x10_0000, 0x7fed_ffff), range(1 << 32, 0x1_7fff_ffff)];
    let all = pmrs(ram.into_iter(), &[("x", 0x7fdf_ffff)]);
    assert_eq!(all, Ok([0, 0x7fe0_0000, 1 << 32, 0x8000_0000]));
    let error = pmrs(ram.into_iter(), &[("x", 1), ("the MLE region", 0x7fe0_0000)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "TXT: the MLE region ends at 0x7fe00000, memory is protected from DMA up to 0x7fe00000"
    );
    assert_eq!(pmrs(ram[..2].iter().copied(), &[]), Ok([0, 0x7fe0_0000, 1 << 32, 0]));
}

#[test]
fn memory_types_are_saved_and_set() {
    let msrs = Registers::new(&[
        (0xfe, 0x502),
        (0x2ff, 0xc06),
        (0x1a0, 0x85),
        (0x200, 6),
        (0x201, 0xf_8000_0800),
        (0x202, 0),
        (0x203, 0),
    ]);
    let info = saved(&msrs, &PhysRange::new(0x10_0000, 0x2_0000).unwrap());
    assert_eq!(
        (info.mtrr_count.get(), info.mtrr_default_type.get(), info.saved_misc_enable.get()),
        (2, 0xc06, 0x85)
    );
    assert_eq!((info.mtrr_pairs[0].base.get(), info.mtrr_pairs[0].mask.get()), (6, 0xf_8000_0800));
    set_mtrrs(&msrs, &[(0x7fd0_0006, 0xf_ffff_0800)]);
    assert_eq!(
        [0x200, 0x201, 0x202, 0x203, 0x2ff].map(|i| msrs.get(i)),
        [0x7fd0_0006, 0xf_ffff_0800, 0, 0, 0x800]
    );
}

#[test]
fn no_bank_of_machine_checks_is_left_with_an_error() {
    let msrs = Registers::new(&[(0x179, 0x1c02), (0x401, 7), (0x405, 7), (0x409, 7)]);
    clear_machine_checks(&msrs);
    assert_eq!([0x401, 0x405, 0x409].map(|i| msrs.get(i)), [0, 0, 7]);
}

proptest! {
    #[test]
    fn the_module_alone_is_cached(page in 0x100u64..0xf_0000, size in 1u64..0x8_0000) {
        let base = page << 12;
        let pairs = module_mtrrs(base, size, 36, 64).unwrap();
        let cached = |at: u64| {
            let hits = pairs.iter().filter(|(b, m)| at & m & !0xfff == b & m & !0xfff).count();
            prop_assert!(hits < 2);
            Ok(hits == 1)
        };
        let end = (base + size).next_multiple_of(4096);
        for at in [base, base + size - 1, (base + end) / 2, end - 1] {
            prop_assert!(cached(at)?, "{:#x}", at);
        }
        for at in [base - 1, end, 0, 0xfee0_0000] {
            prop_assert!((base..end).contains(&at) || !cached(at)?, "{:#x}", at);
        }
        let need = pairs.len();
        prop_assert_eq!(module_mtrrs(base, size, 36, need - 1), Err(Refusal::Mtrrs { need, have: need - 1 }));
    }

    #[test]
    fn no_image_makes_it_panic(image in proptest::collection::vec(any::<u8>(), 0..200), at: u32) {
        let _ = mle_header(&image, at);
        let _ = mle_header(&image, at % 256);
    }
}

/// The header that the manual has for version 2.2, its UUID typed as four words.
#[test]
fn the_mles_header_is_found_by_its_uuid() {
    let words: [u32; 13] = [
        0x9082_ac5a,
        0x74a7_476f,
        0xa255_5c0f,
        0x42b6_51cb,
        0x34,
        0x2_0002,
        0x1054,
        0,
        0,
        0x4_0000,
        0x227,
        0,
        0,
    ];
    let mut image = vec![0; 64];
    image.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let header = mle_header(&image, 64).unwrap();
    assert_eq!(
        (header.entry.get(), header.version.get(), header.capabilities.get()),
        (0x1054, 0x2_0002, 0x227)
    );
    assert_eq!(mle_header(&image, 60).err(), Some(Refusal::MleHeader(60)));
    assert_eq!(mle_header(&image, 65).err(), Some(Refusal::MleHeader(65)));
}

#[test]
fn an_iommu_is_quiet_or_the_launch_ends() {
    struct Unit {
        status: core::cell::Cell<u32>,
        stuck: bool,
        commands: RefCell<Vec<u32>>,
    }
    impl Mmio for Unit {
        fn read8(&self, _: u32) -> u8 {
            panic!()
        }
        fn read32(&self, offset: u32) -> u32 {
            assert_eq!(offset, 0x1c);
            self.status.get()
        }
        fn read64(&self, _: u32) -> u64 {
            panic!()
        }
        fn write8(&self, _: u32, _: u8) {
            panic!()
        }
        fn write32(&self, offset: u32, value: u32) {
            assert_eq!(offset, 0x18);
            self.commands.borrow_mut().push(value);
            if !self.stuck {
                self.status.set(value);
            }
        }
        fn write64(&self, _: u32, _: u64) {
            panic!()
        }
    }
    let unit =
        |status, stuck| Unit { status: core::cell::Cell::new(status), stuck, commands: RefCell::default() };
    let translating = unit(0x8600_0000, false);
    assert!(quiet_iommu(&translating));
    assert_eq!(*translating.commands.borrow(), [0x0600_0000, 0x0400_0000, 0]);
    let idle = unit(0, true);
    assert!(quiet_iommu(&idle) && idle.commands.borrow().is_empty());
    assert!(!quiet_iommu(&unit(0x8000_0000, true)));
}
