use super::*;
use crate::testmem::Ram;
use core::cell::Cell;
use proptest::prelude::*;

const STAGING: u64 = 0x4000_0000;
const RAM: u64 = 0x10_0000;
const RAM_LEN: usize = 0x10_0000;
/// The guest's virtual addresses are its physical ones plus this.
const OFFSET: u64 = 0xffff_8000_0000_0000;

/// A guest with one megabyte of RAM.
struct Guest {
    ram: Ram,
    read: Cell<u64>,
}

impl GuestRam for Guest {
    fn read_ram(&self, gpa: u64, out: &mut [u8]) -> bool {
        self.read.set(self.read.get() + out.len() as u64);
        PhysMem::read(&self.ram, gpa, out)
    }
}

impl GuestMem for Guest {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        addr.checked_sub(OFFSET).is_some_and(|gpa| PhysMem::read(&self.ram, gpa, out))
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        addr.checked_sub(OFFSET).is_some_and(|gpa| PhysMem::write(&self.ram, gpa, data))
    }
}

struct Bench {
    guest: Guest,
    memory: Ram,
}

const PERSISTS: u32 = 0x1_0000;

/// A capsule as it is typed in the specification; its bytes count up.
fn capsule(flags: u32, size: u32) -> std::vec::Vec<u8> {
    let mut bytes = std::vec![];
    // EFI_FIRMWARE_MANAGEMENT_CAPSULE_ID_GUID
    bytes.extend([
        0xed, 0xd5, 0xcb, 0x6d, 0x2d, 0xe8, 0x44, 0x4c, 0xbd, 0xa1, 0x71, 0x94, 0x19, 0x9a, 0xd9, 0x2a,
    ]);
    bytes.extend(28u32.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend((28..size).map(|i| i as u8 ^ (i >> 8) as u8));
    bytes
}

impl Bench {
    fn new() -> Self {
        let guest = Guest { ram: Ram::new(RAM, RAM_LEN), read: Cell::new(0) };
        Self { guest, memory: Ram::new(STAGING, STAGING_MIN as usize) }
    }

    fn staging(&self) -> Staging<'_, Ram> {
        Staging::new(&self.memory, PhysRange::new(STAGING, STAGING_MIN).unwrap()).unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        assert!(PhysMem::write(&self.guest.ram, at, bytes));
    }

    fn words(&self, at: u64, words: &[u64]) {
        words.iter().enumerate().for_each(|(i, w)| self.put(at + 8 * i as u64, &w.to_le_bytes()));
    }

    fn staged(&self, at: u64, len: usize) -> std::vec::Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(PhysMem::read(&self.memory, at, &mut bytes));
        bytes
    }

    fn staged_words(&self, at: u64, count: usize) -> std::vec::Vec<u64> {
        let bytes = self.staged(at, 8 * count);
        bytes.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
    }

    fn update(&self, args: &Args) -> Result<StagedCall, CapsuleError> {
        stage_update(args, &self.guest, &self.guest, &self.staging())
    }

    /// Pointers at 1_0000h above the start, headers behind them; one capsule of `size` in blocks as Linux makes them,
    /// a page each from `+2_0000h` down to a page of descriptors that leads to the next.
    fn linux(&self, bytes: &[u8]) -> Args {
        self.put(RAM + 0x100, &bytes[..28]);
        self.words(RAM, &[OFFSET + RAM + 0x100]);
        let mut list = RAM + 0x1000;
        for (index, page) in bytes.chunks(4096).enumerate() {
            if index % 3 == 2 {
                let next = (list + 0x1000) & !0xfff;
                self.words(list, &[0, next]);
                list = next;
            }
            // Downwards, so that no two blocks are neighbours.
            let at = RAM + 0xf_0000 - 0x1000 * index as u64;
            self.put(at, page);
            self.words(list, &[page.len() as u64, at]);
            list += 16;
        }
        self.words(list, &[0, 0]);
        Args { rcx: OFFSET + RAM, rdx: 1, r8: RAM + 0x1000, ..Args::default() }
    }

    /// One capsule whose block list is these descriptors, at `RAM + 1000h`.
    fn listed(&self, size: u32, blocks: &[u64]) -> Result<StagedCall, CapsuleError> {
        self.put(RAM + 0x100, &capsule(PERSISTS, size)[..28]);
        self.words(RAM, &[OFFSET + RAM + 0x100]);
        self.words(RAM + 0x1000, blocks);
        self.update(&Args { rcx: OFFSET + RAM, rdx: 1, r8: RAM + 0x1000, ..Args::default() })
    }
}

#[test]
fn a_capsule_of_linux_arrives_whole_with_a_list_of_its_own() {
    let bench = Bench::new();
    let bytes = capsule(PERSISTS, 7 * 4096 + 100);
    let args = bench.linux(&bytes);
    let staged = bench.update(&args).unwrap();
    let (call, image) = (staged.call, STAGING + 0x1000);
    assert_eq!(call.target, Target::Service(Service::UpdateCapsule));
    assert_eq!((call.rcx, call.rdx, call.r8, call.r9), (STAGING, 1, STAGING + 0x200, 0));
    assert_eq!(bench.staged_words(call.rcx, 1), [image]);
    assert_eq!(bench.staged_words(call.r8, 4), [bytes.len() as u64, image, 0, 0]);
    assert_eq!(bench.staged(image, bytes.len()), bytes);
    assert_eq!(staged.capsules[0].guid.to_string(), "6dcbd5ed-e82d-4c44-bda1-7194199ad92a");
    assert_eq!((staged.capsules[0].flags, staged.capsules[0].size), (PERSISTS, bytes.len() as u32));
    assert!(!staged.initiate_reset);
}

#[test]
fn several_capsules_are_cut_apart_at_their_sizes() {
    let bench = Bench::new();
    let parts = [capsule(PERSISTS, 29), capsule(PERSISTS | 0x4_0000, 5000), capsule(PERSISTS, 28)];
    bench.words(RAM, &[0, 1, 2].map(|i| OFFSET + RAM + 0x100 + 0x40 * i));
    parts.iter().zip(0..).for_each(|(p, i)| bench.put(RAM + 0x100 + 0x40 * i, &p[..28]));
    let all = parts.concat();
    bench.put(RAM + 0x2000, &all);
    bench.words(RAM + 0x1000, &[100, RAM + 0x2000, all.len() as u64 - 100, RAM + 0x2064, 0, 0]);
    let args = Args { rcx: OFFSET + RAM, rdx: 3, r8: RAM + 0x1000, ..Args::default() };
    let staged = bench.update(&args).unwrap();
    let at = [0x1000, 0x1020, 0x23b0].map(|o| STAGING + o);
    assert_eq!(bench.staged_words(STAGING, 3), at);
    let list = bench.staged_words(STAGING + 0x200, 8);
    assert_eq!(list, [29, at[0], 5000, at[1], 28, at[2], 0, 0]);
    assert_eq!(bench.staged(at[0], 29), parts[0]);
    // The wish for a reset is for the MLE to grant.
    assert_eq!(bench.staged(at[1], 5000), capsule(PERSISTS, 5000));
    assert_eq!(bench.staged(at[2], 28), parts[2]);
    assert!(staged.initiate_reset);
    assert_eq!(staged.capsules[1].flags, PERSISTS | 0x4_0000);
}

#[test]
fn the_header_that_was_checked_is_the_one_that_firmware_gets() {
    let bench = Bench::new();
    let bytes = capsule(PERSISTS, 64);
    // In the blocks the same capsule claims another size and other flags.
    bench.put(RAM + 0x2000, &capsule(0xffff_ffff, 0x7000)[..64]);
    assert!(bench.listed(64, &[64, RAM + 0x2000, 0, 0]).is_ok());
    assert_eq!(bench.staged(STAGING + 0x1000, 28), bytes[..28]);
}

#[test]
fn without_a_list_capsules_come_by_their_pointers() {
    let bench = Bench::new();
    let bytes = capsule(0, 9000);
    bench.put(RAM + 0x3456, &bytes);
    bench.words(RAM, &[OFFSET + RAM + 0x3456]);
    let args = Args { rcx: OFFSET + RAM, rdx: 1, ..Args::default() };
    assert_eq!(bench.update(&args).unwrap().call.r8, 0);
    assert_eq!(bench.staged(STAGING + 0x1000, 9000), bytes);
    bench.put(RAM + 0x3456, &capsule(PERSISTS, 9000)[..28]);
    assert_eq!(bench.update(&args), Err(CapsuleError::NoList));
}

#[test]
fn headers_are_held_to_the_specification() {
    let bench = Bench::new();
    let args = Args { rcx: OFFSET + RAM, rdx: 1, ..Args::default() };
    let with = |offset: u64, value: u32| {
        bench.put(RAM + 0x100, &capsule(0, 64));
        bench.put(RAM + 0x100 + offset, &value.to_le_bytes());
        bench.words(RAM, &[OFFSET + RAM + 0x100]);
        bench.update(&args).map_err(|e| (e.to_string(), e.status()))
    };
    let invalid = |text: &str| Err((format!("capsule: {text}"), Status::INVALID_PARAMETER));
    assert!(with(20, 0).is_ok());
    assert_eq!(with(16, 27), invalid("HeaderSize 27, limit 28 to 64"));
    assert_eq!(with(16, 65), invalid("HeaderSize 65, limit 28 to 64"));
    assert_eq!(with(24, 27), invalid("CapsuleImageSize 27, limit 28 to 4294967295"));
    assert_eq!(with(20, 0x2_0000), invalid("flags 0x20000 lack the one for a reset"));
    assert_eq!(with(20, 0x4_0000), invalid("flags 0x40000 lack the one for a reset"));
    let large = (String::from("capsule: 1044496 bytes, room for 1044480"), Status::OUT_OF_RESOURCES);
    assert_eq!(with(24, 1_044_481), Err(large));
    assert!(with(24, u32::MAX).is_err());

    let call = |rcx, rdx| bench.update(&Args { rcx, rdx, ..args }).map_err(|e| (e.to_string(), e.status()));
    assert_eq!(call(OFFSET + RAM, 0), invalid("none given"));
    assert_eq!(call(0, 1), invalid("pointer to capsules 0x0 leads nowhere"));
    assert_eq!(call(7, 1), invalid("pointer to capsules 0x7 leads nowhere"));
    let many = |n: u64| (format!("capsule: {n} given, limit 16"), Status::OUT_OF_RESOURCES);
    assert_eq!(call(OFFSET + RAM, 17), Err(many(17)));
    assert_eq!(call(OFFSET + RAM, u64::MAX), Err(many(u64::MAX)));
    bench.words(RAM, &[0]);
    assert_eq!(call(OFFSET + RAM, 1), invalid("pointer to a capsule 0x0 leads nowhere"));
}

#[test]
fn block_lists_must_hold_exactly_the_capsules() {
    let bench = Bench::new();
    let (block, end) = (RAM + 0x2000, RAM + RAM_LEN as u64);
    let text = |size: u32, blocks: &[u64]| match bench.listed(size, blocks) {
        Ok(_) => String::new(),
        Err(e) => {
            assert_eq!(e.status(), Status::INVALID_PARAMETER);
            e.to_string().replace("capsule: ", "")
        }
    };
    assert_eq!(text(64, &[40, block, 24, block, 0, 0]), "");
    assert_eq!(text(64, &[63, block, 0, 0]), "blocks hold less than 64 bytes");
    assert_eq!(text(64, &[65, block, 0, 0]), "blocks hold more than 64 bytes");
    assert_eq!(text(64, &[64, block, 1, block, 0, 0]), "blocks hold more than 64 bytes");
    assert_eq!(text(64, &[0, 0]), "blocks hold less than 64 bytes");
    assert_eq!(text(64, &[u64::MAX, 1, 0, 0]), "block of 0xffffffffffffffff bytes at 0x1 is not the guest's");
    assert_eq!(
        text(64, &[64, u64::MAX, 0, 0]),
        "block of 0x40 bytes at 0xffffffffffffffff is not the guest's"
    );
    assert_eq!(
        text(64, &[64, end - 63, 0, 0]),
        format!("block of 0x40 bytes at {:#x} is not the guest's", end - 63)
    );
    assert_eq!(text(64, &[64, STAGING, 0, 0]), "block of 0x40 bytes at 0x40000000 is not the guest's");
    assert_eq!(text(64, &[0, RAM + 0x1001]), "no block descriptor at 0x101001");
    assert_eq!(text(64, &[0, end]), format!("no block descriptor at {end:#x}"));
    assert_eq!(text(64, &[0, !7]), "no block descriptor at 0xfffffffffffffff8");
}

#[test]
fn lists_that_run_in_circles_end() {
    let bench = Bench::new();
    // A descriptor that leads to itself; a block again and again; the list goes on after the capsule's end.
    assert_eq!(bench.listed(64, &[0, RAM + 0x1000]), Err(CapsuleError::ListTooLong));
    assert!(bench.guest.read.get() <= 16 * DESCRIPTORS_MAX as u64);
    assert_eq!(bench.listed(100_000, &[1, RAM, 0, RAM + 0x1000]), Err(CapsuleError::ListTooLong));
    assert_eq!(bench.listed(64, &[64, RAM, 0, RAM + 0x1000]), Err(CapsuleError::ListLong(64)));
    assert_eq!(bench.listed(64, &[64, RAM, 0, RAM + 0x1010]), Err(CapsuleError::ListTooLong));
}

#[test]
fn a_query_hands_over_headers_alone() {
    let bench = Bench::new();
    let mut bytes = capsule(PERSISTS, 6000);
    bytes[16] = 40;
    bench.put(RAM + 0x100, &bytes);
    bench.words(RAM, &[OFFSET + RAM + 0x100]);
    let (size_to, reset_to) = (OFFSET + RAM + 0x40, OFFSET + RAM + 0x48);
    let args = Args { rcx: OFFSET + RAM, rdx: 1, r8: size_to, r9: reset_to, rsp: 0 };
    assert!(PhysMem::write(&bench.memory, STAGING + 0x1000, &[0xee; 8192]));
    let staging = bench.staging();
    let query = stage_query(&args, &bench.guest, &staging).unwrap();
    let call = query.call;
    assert_eq!((call.target, call.rdx), (Target::Service(Service::QueryCapsuleCapabilities), 1));
    assert_eq!((call.rcx, call.r8, call.r9), (STAGING, STAGING + 0x100, STAGING + 0x108));
    assert_eq!(bench.staged(STAGING + 0x1000, 40), bytes[..40]);
    assert_eq!(bench.staged(STAGING + 0x1028, 5960), [0; 5960]);

    for (said, given) in [(0x8000, 0x8000), (u64::MAX, staging.room())] {
        assert!(PhysMem::write(&bench.memory, call.r8, &said.to_le_bytes()));
        assert!(PhysMem::write(&bench.memory, call.r9, &1u32.to_le_bytes()));
        query.finish(&bench.guest, &staging).unwrap();
        let mut answer = [0; 12];
        assert!(PhysMem::read(&bench.guest.ram, RAM + 0x40, &mut answer));
        assert_eq!(answer[..8], given.to_le_bytes());
        assert_eq!(answer[8..], [1, 0, 0, 0]);
    }
    assert!(PhysMem::write(&bench.memory, call.r9, &4u32.to_le_bytes()));
    let error = query.finish(&bench.guest, &staging).unwrap_err();
    assert_eq!((error, error.status()), (CapsuleError::ResetType(4), Status::DEVICE_ERROR));
    for bad in [Args { r8: 0, ..args }, Args { r9: 0, ..args }, Args { rdx: 0, ..args }] {
        assert_eq!(
            stage_query(&bad, &bench.guest, &staging).unwrap_err().status(),
            Status::INVALID_PARAMETER
        );
    }
    let nowhere = StagedQuery { size_to: 8, ..query };
    assert!(PhysMem::write(&bench.memory, call.r9, &[0; 4]));
    assert!(matches!(nowhere.finish(&bench.guest, &staging), Err(CapsuleError::Pointer { .. })));
}

#[test]
fn staging_memory_is_whole_pages_and_enough() {
    let ram = Ram::new(STAGING, 0);
    for (start, len, good) in [
        (STAGING, STAGING_MIN, true),
        (STAGING, STAGING_MIN - 0x1000, false),
        (STAGING + 8, STAGING_MIN, false),
        (STAGING, STAGING_MIN + 8, false),
    ] {
        assert_eq!(Staging::new(&ram, PhysRange::new(start, len).unwrap()).is_ok(), good);
    }
    // Memory beside it is never written.
    let beside = Ram::new(STAGING - 0x1000, STAGING_MIN as usize + 0x2000);
    let staging = Staging::new(&beside, PhysRange::new(STAGING, STAGING_MIN).unwrap()).unwrap();
    assert!(
        staging.write(STAGING, &[1]).is_ok() && staging.write(STAGING + STAGING_MIN - 8, &[1; 8]).is_ok()
    );
    for at in [STAGING - 1, STAGING + STAGING_MIN - 7, u64::MAX - 3] {
        assert_eq!(staging.write(at, &[1; 8]), Err(CapsuleError::Staging(staging.range)));
    }
    // Memory that is not there is our fault, not the guest's.
    let bench = Bench { memory: Ram::new(0, 0), ..Bench::new() };
    let error = bench.update(&bench.linux(&capsule(PERSISTS, 64))).unwrap_err();
    assert_eq!(error.status(), Status::DEVICE_ERROR);
}

proptest! {
    #[test]
    fn any_cut_of_the_blocks_gives_the_same_capsules(
        sizes in proptest::collection::vec(28u32..3000, 1..=CAPSULES_MAX),
        cuts in proptest::collection::vec(1usize..5000, 0..40),
        hops in proptest::collection::vec(any::<bool>(), 60),
    ) {
        let bench = Bench::new();
        let parts: std::vec::Vec<_> = sizes.iter().map(|s| capsule(PERSISTS, *s)).collect();
        let pointers: std::vec::Vec<_> = (0..parts.len() as u64).map(|i| OFFSET + RAM + 0x100 + 28 * i).collect();
        bench.words(RAM, &pointers);
        parts.iter().zip(0..).for_each(|(p, i)| bench.put(RAM + 0x100 + 28 * i, &p[..28]));
        let all = parts.concat();
        let data = RAM + 0x2_0000;
        bench.put(data, &all);
        let (mut list, mut from) = (RAM + 0x1000, 0);
        for (length, hop) in cuts.into_iter().chain([usize::MAX]).zip(hops) {
            let length = length.min(all.len() - from);
            if length == 0 {
                break;
            }
            bench.words(list, &[length as u64, data + from as u64]);
            list += 16;
            if hop {
                bench.words(list, &[0, list + 0x100]);
                list += 0x100;
            }
            from += length;
        }
        bench.words(list, &[0, 0]);
        let args = Args { rcx: OFFSET + RAM, rdx: parts.len() as u64, r8: RAM + 0x1000, ..Args::default() };
        let staged = bench.update(&args).unwrap();
        let list = bench.staged_words(staged.call.r8, 2 * parts.len() + 2);
        for (index, part) in parts.iter().enumerate() {
            let at = bench.staged_words(STAGING + 8 * index as u64, 1)[0];
            prop_assert_eq!(&list[2 * index..2 * index + 2], &[part.len() as u64, at]);
            prop_assert_eq!(&bench.staged(at, part.len()), part);
        }
        prop_assert_eq!(&list[2 * parts.len()..], &[0, 0]);
    }

    #[test]
    fn no_list_makes_firmware_see_a_foreign_page(
        noise in proptest::collection::vec((0u64..0x400, any::<u64>()), 0..40),
        near in proptest::collection::vec((0u64..0x400, 0u64..0x2000), 0..60),
        flags: u32, size: u32, header: u32, small in any::<bool>(), count in 0u64..18, list: bool,
    ) {
        let bench = Bench::new();
        let size = if small { 28 + size % 0x2000 } else { size };
        for i in 0..16 {
            bench.words(RAM + 8 * i, &[OFFSET + RAM + 0x100]);
        }
        bench.put(RAM + 0x100, &capsule(if small { flags | PERSISTS } else { flags }, 28));
        bench.put(RAM + 0x118, &size.to_le_bytes());
        bench.put(RAM + 0x110, &if small { 28 } else { header }.to_le_bytes());
        for (slot, value) in noise {
            bench.words(RAM + 0x1000 + 8 * slot, &[value]);
        }
        for (slot, value) in near {
            bench.words(RAM + 0x1000 + 8 * slot, &[if slot % 2 == 1 { RAM + value } else { value }]);
        }
        let r8 = if list { RAM + 0x1000 } else { 0 };
        let args = Args { rcx: OFFSET + RAM, rdx: count, r8, r9: 0, rsp: 0 };
        let range = PhysRange::new(STAGING, STAGING_MIN).unwrap();
        if let Ok(staged) = bench.update(&args) {
            prop_assert_eq!(staged.capsules.len() as u64, count);
            prop_assert_eq!(staged.call.r8 != 0, list);
            for i in 0..count {
                let at = bench.staged_words(STAGING + 8 * i, 1)[0];
                prop_assert!(range.contains(&PhysRange::new(at, size.into()).unwrap()));
                prop_assert_eq!(bench.staged(at + 24, 4), size.to_le_bytes());
                if list {
                    let block = bench.staged_words(STAGING + 0x200 + 16 * i, 2);
                    prop_assert_eq!(block, [size.into(), at]);
                }
            }
        }
        prop_assert!(bench.guest.read.get() <= 16 * DESCRIPTORS_MAX as u64 + STAGING_MIN);
    }
}
