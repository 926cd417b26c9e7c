use proptest::prelude::*;

use super::*;

const KIB4: u64 = 1 << 12;
const MIB2: u64 = 1 << 21;
const GIB: u64 = 1 << 30;

/// Table pages from 16 MiB onward, as many as `left` says; anything the trait does not promise panics.
pub(crate) struct Pool {
    pages: Vec<[u64; ENTRIES]>,
    left: usize,
}

const POOL_BASE: u64 = 16 << 20;

impl Pool {
    pub(crate) fn new(left: usize) -> Self {
        Self { pages: Vec::new(), left }
    }

    /// Pages handed out.
    pub(crate) fn used(&self) -> usize {
        self.pages.len()
    }

    fn at(table: u64) -> usize {
        assert!(table >= POOL_BASE && table.is_multiple_of(KIB4), "{table:#x} is no table");
        usize::try_from((table - POOL_BASE) / KIB4).unwrap()
    }
}

impl TablePool for Pool {
    fn alloc(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        self.pages.push([0; ENTRIES]);
        Some(POOL_BASE + (self.pages.len() as u64 - 1) * KIB4)
    }
    fn read(&self, table: u64, index: usize) -> u64 {
        self.pages[Self::at(table)][index]
    }
    fn write(&mut self, table: u64, index: usize, entry: u64) {
        self.pages[Self::at(table)][index] = entry;
    }
}

const RW: Rights = Rights::READ.union(Rights::WRITE);
const RX: Rights = Rights::READ.union(Rights::EXEC);
const RWX: Rights = Rights::all();

fn range(start: u64, len: u64) -> PhysRange {
    PhysRange::new(start, len).unwrap()
}

/// What the hardware makes of the tables at `root`: physical address and rights.
type Walk = fn(&Pool, root: u64, levels: u32, addr: u64) -> Option<(u64, Rights)>;

/// A format under test, with the rules of the hardware that reads it, typed again from the manuals.
#[derive(Clone, Copy)]
struct Case {
    format: &'static Format,
    levels: u32,
    largest: PageSize,
    hardware: Walk,
    rights: &'static [Rights],
}

const CASES: [Case; 10] = [
    Case {
        format: &NPT,
        levels: 4,
        largest: PageSize::Size1G,
        hardware: npt,
        rights: &[Rights::READ, RW, RX, RWX],
    },
    Case {
        format: &NPT,
        levels: 4,
        largest: PageSize::Size2M,
        hardware: npt,
        rights: &[Rights::READ, RW, RX, RWX],
    },
    Case {
        format: &STAGE1,
        levels: 4,
        largest: PageSize::Size1G,
        hardware: stage1,
        rights: &[Rights::READ, RW, RX],
    },
    Case {
        format: &EPT,
        levels: 4,
        largest: PageSize::Size1G,
        hardware: ept,
        rights: &[Rights::READ, RW, RX, RWX],
    },
    Case {
        format: &EPT,
        levels: 4,
        largest: PageSize::Size4K,
        hardware: ept,
        rights: &[Rights::READ, RW, RX, RWX],
    },
    Case {
        format: &AMD_VI,
        levels: 4,
        largest: PageSize::Size1G,
        hardware: amd_vi,
        rights: &[Rights::READ, Rights::WRITE, RW],
    },
    Case {
        format: &AMD_VI,
        levels: 3,
        largest: PageSize::Size1G,
        hardware: amd_vi,
        rights: &[Rights::READ, Rights::WRITE, RW],
    },
    Case {
        format: &VT_D,
        levels: 4,
        largest: PageSize::Size2M,
        hardware: vt_d,
        rights: &[Rights::READ, Rights::WRITE, RW],
    },
    Case {
        format: &VT_D,
        levels: 5,
        largest: PageSize::Size1G,
        hardware: vt_d,
        rights: &[Rights::READ, Rights::WRITE, RW],
    },
    Case {
        format: &VT_D,
        levels: 3,
        largest: PageSize::Size1G,
        hardware: vt_d,
        rights: &[Rights::READ, Rights::WRITE, RW],
    },
];

/// The AMD64 walk: rights are ANDed along it, NX is ORed; bit 7 must be zero in a level 4 entry and means
/// PAT in a level 1 entry; bits 20:13 or 29:13 of a large page's entry are reserved.
fn amd64(pool: &Pool, root: u64, levels: u32, addr: u64, user: bool) -> Option<(u64, Rights)> {
    let mut table = root;
    let mut rights = RWX;
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * (level - 1);
        let entry = pool.read(table, ((addr >> shift) & 0x1ff) as usize);
        if entry & 1 == 0 {
            assert_eq!(entry, 0, "an unused entry is zero");
            return None;
        }
        assert_eq!(entry & 4 != 0, user);
        if entry & 2 == 0 {
            rights.remove(Rights::WRITE);
        }
        if entry & 0x8000_0000_0000_0000 != 0 {
            rights.remove(Rights::EXEC);
        }
        assert_eq!(entry & 0x7ff0_0000_0000_0e00, 0, "bits left to software stay zero");
        assert_ne!(entry & 0x20, 0, "accessed is set");
        assert!(level < 4 || entry & 0x80 == 0);
        if level == 1 || entry & 0x80 != 0 {
            let page = 1u64 << shift;
            assert!(level > 1 || entry & 0x80 == 0, "PAT bit stays zero");
            assert_eq!(entry & 0x000f_ffff_ffff_f000 & (page - 1), 0, "reserved bits of a large page");
            assert_ne!(entry & 0x40, 0, "dirty is set");
            return Some(((entry & 0x000f_ffff_ffff_f000) + (addr & (page - 1)), rights));
        }
        table = entry & 0x000f_ffff_ffff_f000;
    }
    unreachable!()
}

fn npt(pool: &Pool, root: u64, levels: u32, addr: u64) -> Option<(u64, Rights)> {
    amd64(pool, root, levels, addr, true)
}

fn stage1(pool: &Pool, root: u64, levels: u32, addr: u64) -> Option<(u64, Rights)> {
    amd64(pool, root, levels, addr, false)
}

/// EPT: an entry with bits 2:0 clear is not present; 2:0 = 010 or 110 is a misconfiguration, so is a type
/// in 5:3 other than 0, 1, 4, 5, 6 in a leaf, and any of 6:3 in a table entry.
fn ept(pool: &Pool, root: u64, levels: u32, addr: u64) -> Option<(u64, Rights)> {
    let mut table = root;
    let mut rights = RWX;
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * (level - 1);
        let entry = pool.read(table, ((addr >> shift) & 0x1ff) as usize);
        if entry & 7 == 0 {
            assert_eq!(entry, 0, "an unused entry is zero");
            return None;
        }
        assert!(entry & 7 != 2 && entry & 7 != 6, "misconfiguration");
        rights &= Rights::from_bits_truncate((entry & 7) as u8);
        assert_eq!(entry & 0xfff0_0000_0000_0f00, 0);
        if level == 1 || entry & 0x80 != 0 {
            let page = 1u64 << shift;
            assert!(level < 4 && [0, 1, 4, 5, 6].contains(&((entry >> 3) & 7)));
            assert_eq!(entry & 0x000f_ffff_ffff_f000 & (page - 1), 0, "reserved bits of a large page");
            return Some(((entry & 0x000f_ffff_ffff_f000) + (addr & (page - 1)), rights));
        }
        assert_eq!(entry & 0x78, 0, "misconfiguration");
        table = entry & 0x000f_ffff_ffff_f000;
    }
    unreachable!()
}

/// AMD-Vi: bits 11:9 give the level of the next table, which must be one below (levels may be skipped, ours
/// are not), 0 ends the walk; IR and IW are ANDed.
fn amd_vi(pool: &Pool, root: u64, levels: u32, addr: u64) -> Option<(u64, Rights)> {
    let mut table = root;
    let mut level = u64::from(levels);
    let mut rights = RW;
    loop {
        let shift = 12 + 9 * (level - 1);
        let entry = pool.read(table, ((addr >> shift) & 0x1ff) as usize);
        if entry & 1 == 0 {
            assert_eq!(entry, 0, "an unused entry is zero");
            return None;
        }
        if entry & 0x2000_0000_0000_0000 == 0 {
            rights.remove(Rights::READ);
        }
        if entry & 0x4000_0000_0000_0000 == 0 {
            rights.remove(Rights::WRITE);
        }
        assert_eq!(entry & 0x8ff0_0000_0000_01fe, 0);
        let next = (entry >> 9) & 7;
        if next == 0 {
            let page = 1u64 << shift;
            assert_eq!(entry & 0x000f_ffff_ffff_f000 & (page - 1), 0, "reserved bits of a large page");
            return Some(((entry & 0x000f_ffff_ffff_f000) + (addr & (page - 1)), rights));
        }
        assert_eq!(next, level - 1);
        level = next;
        table = entry & 0x000f_ffff_ffff_f000;
    }
}

/// VT-d second level: R and W are ANDed, present if either; bit 7 is the page size at levels 2 and 3.
fn vt_d(pool: &Pool, root: u64, levels: u32, addr: u64) -> Option<(u64, Rights)> {
    let mut table = root;
    let mut rights = RW;
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * (level - 1);
        let entry = pool.read(table, ((addr >> shift) & 0x1ff) as usize);
        if entry & 3 == 0 {
            assert_eq!(entry, 0, "an unused entry is zero");
            return None;
        }
        rights &= Rights::from_bits_truncate((entry & 3) as u8);
        assert_eq!(entry & 0xfff0_0000_0000_077c, 0);
        if level == 1 || entry & 0x80 != 0 {
            let page = 1u64 << shift;
            assert!(level < 4 && (level > 1 || entry & 0x80 == 0));
            assert_eq!(entry & 0x000f_ffff_ffff_f000 & (page - 1), 0, "reserved bits of a large page");
            return Some(((entry & 0x000f_ffff_ffff_f000) + (addr & (page - 1)), rights));
        }
        assert_eq!(entry & 0x800, 0, "snoop is for leaves");
        table = entry & 0x000f_ffff_ffff_f000;
    }
    unreachable!()
}

// One mapping of each kind, its entries typed from the manuals.

/// The entries on the way to `addr`, top down.
fn path(pool: &Pool, tables: &Tables, addr: u64) -> Vec<u64> {
    let mut table = tables.root();
    let mut entries = Vec::new();
    for level in (1..=tables.levels()).rev() {
        let entry = pool.read(table, ((addr >> (3 + 9 * level)) & 511) as usize);
        entries.push(entry);
        table = entry & 0x000f_ffff_ffff_f000;
        if table < POOL_BASE || Pool::at(table) >= pool.pages.len() {
            break;
        }
    }
    entries
}

/// Entries for 4 KiB at 0x5000 → 0x1_0000_6000 and 2 MiB at 0x20_0000 → 0x40_0000.
fn entries(format: &'static Format, levels: u32, rights: Rights, memory: MemoryType) -> (Vec<u64>, Vec<u64>) {
    let mut pool = Pool::new(8);
    let t = Tables::new(format, levels, PageSize::Size1G, &mut pool).unwrap();
    t.map(&mut pool, range(0x5000, KIB4), 0x1_0000_6000, rights, memory).unwrap();
    t.map(&mut pool, range(MIB2, MIB2), 0x40_0000, rights, memory).unwrap();
    (path(&pool, &t, 0x5000), path(&pool, &t, MIB2))
}

#[test]
fn npt_entries() {
    let (small, large) = entries(&NPT, 4, RWX, MemoryType::WriteBack);
    assert_eq!(small, [0x100_1027, 0x100_2027, 0x100_3027, 0x1_0000_6067]);
    assert_eq!(large, [0x100_1027, 0x100_2027, 0x40_00e7]);
    let (small, large) = entries(&NPT, 4, Rights::READ, MemoryType::Device);
    assert_eq!((small[3], large[2]), (0x8000_0001_0000_6065, 0x8000_0000_0040_00e5));
}

#[test]
fn stage1_entries() {
    let (small, large) = entries(&STAGE1, 4, RX, MemoryType::WriteBack);
    assert_eq!(small, [0x100_1023, 0x100_2023, 0x100_3023, 0x1_0000_6161]);
    assert_eq!(large[2], 0x40_01e1);
    let (small, large) = entries(&STAGE1, 4, RW, MemoryType::Device);
    assert_eq!((small[3], large[2]), (0x8000_0001_0000_617b, 0x8000_0000_0040_01fb));
}

#[test]
fn ept_entries() {
    let (small, large) = entries(&EPT, 4, RWX, MemoryType::WriteBack);
    assert_eq!(small, [0x100_1007, 0x100_2007, 0x100_3007, 0x1_0000_6037]);
    assert_eq!(large[2], 0x40_00b7);
    let (small, large) = entries(&EPT, 4, RW, MemoryType::Device);
    assert_eq!((small[3], large[2]), (0x1_0000_6003, 0x40_0083));
    let (small, large) = entries(&EPT, 4, RX, MemoryType::Coherent);
    assert_eq!((small[3], large[2]), (0x1_0000_6075, 0x40_00f5));
}

#[test]
fn amd_vi_entries() {
    let (small, large) = entries(&AMD_VI, 4, RW, MemoryType::WriteBack);
    assert_eq!(
        small,
        [0x6000_0000_0100_1601, 0x6000_0000_0100_2401, 0x6000_0000_0100_3201, 0x6000_0001_0000_6001]
    );
    assert_eq!(large[2], 0x6000_0000_0040_0001);
    let (small, large) = entries(&AMD_VI, 3, Rights::READ, MemoryType::Coherent);
    assert_eq!(small, [0x6000_0000_0100_1401, 0x6000_0000_0100_2201, 0x3000_0001_0000_6001]);
    assert_eq!(large[1], 0x3000_0000_0040_0001);
}

#[test]
fn vt_d_entries() {
    let (small, large) = entries(&VT_D, 3, RW, MemoryType::WriteBack);
    assert_eq!(small, [0x100_1003, 0x100_2003, 0x1_0000_6003]);
    assert_eq!(large[1], 0x40_0083);
    let (small, _) = entries(&VT_D, 5, RW, MemoryType::WriteBack);
    assert_eq!(small, [0x100_1003, 0x100_2003, 0x100_3003, 0x100_4003, 0x1_0000_6003]);
    let (small, large) = entries(&VT_D, 4, Rights::WRITE, MemoryType::Coherent);
    assert_eq!((small[3], large[2]), (0x1_0000_6802, 0x40_0882));
}

// Rules.

#[test]
fn rights_that_the_hardware_would_refuse_are_refused() {
    for (format, bad) in [
        (&NPT, &[Rights::empty(), Rights::WRITE, Rights::EXEC][..]),
        (&STAGE1, &[Rights::empty(), Rights::WRITE, RWX]),
        (&EPT, &[Rights::empty(), Rights::WRITE, Rights::EXEC]),
        (&AMD_VI, &[Rights::empty(), RX, RWX]),
        (&VT_D, &[Rights::empty(), RX, RWX]),
    ] {
        let mut pool = Pool::new(8);
        let t = Tables::new(format, 4, PageSize::Size1G, &mut pool).unwrap();
        t.map_identity(&mut pool, range(0, MIB2), Rights::READ, MemoryType::WriteBack).unwrap();
        for &rights in bad {
            let refused = Err(Error::Rights { rights, format: format.name() });
            assert_eq!(t.map_identity(&mut pool, range(MIB2, KIB4), rights, MemoryType::WriteBack), refused);
            assert_eq!(t.protect(&mut pool, range(0, KIB4), rights), refused);
        }
        assert_eq!(t.leaves(&pool).count(), 1);
    }
}

#[test]
fn addresses_beyond_the_tables_are_refused() {
    for (format, levels, limit) in [
        (&NPT, 4, 1u64 << 48),
        (&STAGE1, 4, 1 << 47),
        (&EPT, 4, 1 << 48),
        (&AMD_VI, 3, 1 << 39),
        (&VT_D, 3, 1 << 39),
    ] {
        let mut pool = Pool::new(8);
        let t = Tables::new(format, levels, PageSize::Size1G, &mut pool).unwrap();
        let last = range(limit - KIB4, KIB4);
        t.map_identity(&mut pool, last, Rights::READ, MemoryType::WriteBack).unwrap();
        assert_eq!(t.walk(&pool, limit - 1).unwrap().phys, limit - 1);
        assert_eq!(t.walk(&pool, limit), None);
        let beyond = Err(Error::BeyondLimit { value: limit + KIB4 - 1, limit });
        let across = range(limit - KIB4, 2 * KIB4);
        assert_eq!(t.map(&mut pool, across, 0, Rights::READ, MemoryType::WriteBack), beyond);
        assert_eq!(t.protect(&mut pool, across, Rights::READ), beyond);
        assert_eq!(t.unmap(&mut pool, across), beyond);
        t.unmap(&mut pool, last).unwrap();
        assert_eq!(t.leaves(&pool).count(), 0);

        let phys = (1 << 52) - KIB4;
        let map = |pool: &mut Pool, pages| {
            t.map(pool, range(0, pages * KIB4), phys, Rights::READ, MemoryType::WriteBack)
        };
        assert_eq!(
            map(&mut pool, 2),
            Err(Error::BeyondLimit { value: (1 << 52) + KIB4 - 1, limit: 1 << 52 })
        );
        assert_eq!(map(&mut pool, 1), Ok(()));
    }
    let levels = Tables::new(&NPT, 5, PageSize::Size1G, &mut Pool::new(1)).unwrap_err();
    assert_eq!(levels, Error::Levels { levels: 5, format: "NPT" });
}

#[test]
fn parts_of_pages_are_refused() {
    let mut pool = Pool::new(8);
    let t = Tables::new(&NPT, 4, PageSize::Size1G, &mut pool).unwrap();
    for (start, len, to, value) in
        [(0x10, KIB4, 0, 0x10), (KIB4, 0x10, 0, 0x10), (KIB4, KIB4, 0x800, 0x800), (0x1001, 0xfff, 0, 0x1001)]
    {
        let refused = Err(Error::Misaligned { value });
        assert_eq!(t.map(&mut pool, range(start, len), to, RW, MemoryType::WriteBack), refused);
        if to == 0 {
            assert_eq!(t.unmap(&mut pool, range(start, len)), refused);
            assert_eq!(t.protect(&mut pool, range(start, len), RW), refused);
        }
    }
}

/// A pool whose page is not one.
struct OddPool;
impl TablePool for OddPool {
    fn alloc(&mut self) -> Option<u64> {
        Some(0x1008)
    }
    fn read(&self, _: u64, _: usize) -> u64 {
        unreachable!()
    }
    fn write(&mut self, _: u64, _: usize, _: u64) {
        unreachable!()
    }
}

#[test]
fn a_pool_that_gives_no_page_is_refused() {
    let refused = Tables::new(&NPT, 4, PageSize::Size1G, &mut OddPool).unwrap_err();
    assert_eq!(refused, Error::Misaligned { value: 0x1008 });
}

#[test]
fn the_largest_pages_are_used_and_no_more_tables_than_needed() {
    let mut pool = Pool::new(8);
    let t = Tables::new(&NPT, 4, PageSize::Size1G, &mut pool).unwrap();
    // Everything up to 512 GiB but for one page: 511 large pages, 511 and 511 smaller ones.
    let hole = 5 * GIB + 3 * MIB2 + 7 * KIB4;
    t.map_identity(&mut pool, range(0, hole), RWX, MemoryType::WriteBack).unwrap();
    t.map_identity(&mut pool, range(hole + KIB4, 512 * GIB - hole - KIB4), RWX, MemoryType::WriteBack)
        .unwrap();
    assert_eq!(pool.pages.len(), 4);
    for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
        assert_eq!(t.leaves(&pool).filter(|l| l.mapping.size == size).count(), 511);
    }
}

#[test]
fn a_split_keeps_the_memory_type() {
    let mut pool = Pool::new(8);
    let t = Tables::new(&EPT, 4, PageSize::Size1G, &mut pool).unwrap();
    t.map_identity(&mut pool, range(0, GIB), RWX, MemoryType::Coherent).unwrap();
    t.protect(&mut pool, range(KIB4, KIB4), Rights::READ).unwrap();
    assert_eq!(path(&pool, &t, 0)[3], 0x77);
    assert_eq!(path(&pool, &t, KIB4)[3], 0x1071);
    assert_eq!(path(&pool, &t, MIB2)[2], 0x20_00f7);
}

// Properties.

#[derive(Clone, Copy, Debug)]
enum Op {
    Map { to: u64, rights: usize },
    Unmap,
    Protect { rights: usize },
}

/// The naive model: the list of what was done. The newest entry over an address decides.
#[derive(Default)]
struct Model(Vec<(PhysRange, Option<(u64, Rights)>)>);

impl Model {
    /// Offset and rights at `addr`.
    fn at(&self, addr: u64) -> Option<(u64, Rights)> {
        self.0.iter().rev().find(|(r, _)| r.contains_addr(addr)).and_then(|(_, to)| *to)
    }

    /// Between two neighbouring edges nothing changes.
    fn edges(&self, within: PhysRange) -> Vec<u64> {
        let all = self.0.iter().flat_map(|(r, _)| [r.start(), r.last() + 1]);
        let mut edges: Vec<u64> = all.chain([within.start()]).filter(|a| within.contains_addr(*a)).collect();
        edges.sort();
        edges.dedup();
        edges
    }

    fn apply(&mut self, range: PhysRange, op: Op, rights: &[Rights]) -> Result<(), Error> {
        let mut edges = self.edges(range);
        match op {
            Op::Map { to, rights: r } => {
                if let Some(&at) = edges.iter().find(|a| self.at(**a).is_some()) {
                    return Err(Error::AlreadyMapped { at });
                }
                self.0.push((range, Some((to.wrapping_sub(range.start()), rights[r % rights.len()]))));
            }
            Op::Unmap => self.0.push((range, None)),
            Op::Protect { rights: r } => {
                if let Some(&at) = edges.iter().find(|a| self.at(**a).is_none()) {
                    return Err(Error::NotMapped { at });
                }
                edges.push(range.last() + 1);
                for pair in edges.windows(2) {
                    let (offset, _) = self.at(pair[0]).unwrap();
                    let part = PhysRange::from_last(pair[0], pair[1] - 1).unwrap();
                    self.0.push((part, Some((offset, rights[r % rights.len()]))));
                }
            }
        }
        Ok(())
    }
}

/// Addresses near the boundaries that matter, in the first four gigabytes or the last ones below the limit.
fn place() -> impl Strategy<Value = u64> {
    (
        0u64..4,
        prop_oneof![Just(0u64), 0u64..4, Just(511)],
        prop_oneof![4 => Just(0u64), 1 => 0u64..4, 1 => Just(511)],
    )
        .prop_map(|(g, m, k)| g * GIB + m * MIB2 + k * KIB4)
}

fn ops() -> impl Strategy<Value = Vec<(bool, u64, u64, Op)>> {
    let op = prop_oneof![
        4 => (place(), 0usize..4).prop_map(|(to, rights)| Op::Map { to, rights }),
        // Identity: addresses agree and large pages fit.
        4 => (0usize..4).prop_map(|rights| Op::Map { to: u64::MAX, rights }),
        3 => Just(Op::Unmap),
        3 => (0usize..4).prop_map(|rights| Op::Protect { rights }),
    ];
    prop::collection::vec((any::<bool>(), place(), place(), op), 1..12)
}

fn run(case: &Case, ops: &[(bool, u64, u64, Op)], tables: usize) -> Result<(), TestCaseError> {
    let mut pool = Pool::new(tables);
    let t = Tables::new(case.format, case.levels, case.largest, &mut pool).unwrap();
    let mut model = Model::default();
    let base = t.limit().min(1 << 52) - 4 * GIB;
    for &(high, a, b, op) in ops {
        let base = if high { base } else { 0 };
        let range = PhysRange::from_last(base + a.min(b), base + (a.max(b)).max(KIB4) - 1)
            .unwrap_or(range(base, KIB4));
        // Where large pages cannot be used a gigabyte is a quarter of a million leaves: less will do.
        let small = case.largest == PageSize::Size4K
            || matches!(op, Op::Map { to, .. } if to != u64::MAX && !(to ^ range.start()).is_multiple_of(MIB2));
        let range =
            if small { PhysRange::new(range.start(), range.len().min(3 * MIB2)).unwrap() } else { range };
        let op = match op {
            Op::Map { to: u64::MAX, rights } => Op::Map { to: range.start(), rights },
            other => other,
        };
        let right = |r: usize| case.rights[r % case.rights.len()];
        let done = match op {
            Op::Map { to, rights } => t.map(&mut pool, range, to, right(rights), MemoryType::WriteBack),
            Op::Unmap => t.unmap(&mut pool, range),
            Op::Protect { rights } => t.protect(&mut pool, range, right(rights)),
        };
        // When tables ran out the model does not learn of the operation: nothing may have changed.
        if done != Err(Error::OutOfTables) {
            prop_assert_eq!(done, model.apply(range, op, case.rights));
        }
    }

    let everything = PhysRange::new(0, t.limit()).unwrap();
    for edge in model.edges(everything) {
        for addr in [edge.saturating_sub(1), edge, edge + 0xabc, edge + KIB4, edge + MIB2, edge + GIB] {
            let expected = model.at(addr).map(|(offset, rights)| (addr.wrapping_add(offset), rights));
            prop_assert_eq!(t.walk(&pool, addr).map(|m| (m.phys, m.rights)), expected, "walk {:#x}", addr);
            if addr < t.limit() {
                let seen = (case.hardware)(&pool, t.root(), case.levels, addr);
                prop_assert_eq!(seen, expected, "hardware {:#x}", addr);
            }
        }
    }

    // No leaf reaches over anything that the model has otherwise, and none is larger than allowed.
    let mut end = 0;
    let mut mapped = 0;
    for leaf in t.leaves(&pool) {
        let size = leaf.mapping.size;
        prop_assert!(size <= case.largest);
        prop_assert!(leaf.addr >= end && leaf.addr.is_multiple_of(size.bytes()));
        end = leaf.addr + size.bytes();
        mapped += size.bytes();
        let span = PhysRange::new(leaf.addr, size.bytes()).unwrap();
        for addr in model.edges(span) {
            let expected = model.at(addr).map(|(offset, rights)| (addr.wrapping_add(offset), rights));
            let m = leaf.mapping;
            prop_assert_eq!(Some((m.phys + (addr - leaf.addr), m.rights)), expected);
        }
    }
    let mut edges = model.edges(everything);
    edges.push(t.limit());
    let expected: u64 = edges.windows(2).filter(|e| model.at(e[0]).is_some()).map(|e| e[1] - e[0]).sum();
    prop_assert_eq!(mapped, expected);

    // At most one table per level over any address; four gigabytes at either end of the address space.
    let most = 2 * (1 + 4 + 4 * 512) + 1;
    prop_assert!(pool.pages.len() <= most);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_history_translates_as_the_model_says(ops in ops()) {
        for case in &CASES {
            run(case, &ops, 20_000)?;
        }
    }

    #[test]
    fn running_out_of_tables_changes_nothing(ops in ops(), tables in 1usize..12) {
        for case in &CASES {
            run(case, &ops, tables)?;
        }
    }

    /// Each run of a space that is covered from end to end costs at most two tables a level.
    #[test]
    fn tables_are_bounded_by_the_number_of_runs(cuts in prop::collection::btree_set(1u64..(1 << 28), 1..20)) {
        let mut pool = Pool::new(usize::MAX);
        let t = Tables::new(&NPT, 4, PageSize::Size1G, &mut pool).unwrap();
        let mut start = 0;
        for page in cuts.iter().copied().chain([1 << 28]) {
            let run = PhysRange::from_last(start, page * KIB4 - 1).unwrap();
            t.map_identity(&mut pool, run, RWX, MemoryType::WriteBack).unwrap();
            start = page * KIB4;
        }
        // A cut lies in one span of each size: one table below the root for 512 GiB, then two a cut.
        prop_assert!(pool.pages.len() <= 1 + 2 + 2 * cuts.len());
    }
}

#[test]
fn a_history_does_not_leak_tables() {
    let mut pool = Pool::new(64);
    let t = Tables::new(&NPT, 4, PageSize::Size1G, &mut pool).unwrap();
    t.map_identity(&mut pool, range(0, 4 * GIB), RWX, MemoryType::WriteBack).unwrap();
    let apic = range(0xfee0_0000, KIB4);
    for _ in 0..1000 {
        t.unmap(&mut pool, apic).unwrap();
        t.map_identity(&mut pool, apic, RWX, MemoryType::Device).unwrap();
        t.unmap(&mut pool, range(0xfee0_0000, MIB2)).unwrap();
        t.map_identity(&mut pool, range(0xfee0_0000, MIB2), RWX, MemoryType::WriteBack).unwrap();
    }
    assert_eq!(pool.pages.len(), 4);
}

#[test]
fn each_table_is_every_page_taken_from_the_pool() {
    for case in CASES {
        let mut pool = Pool::new(1024);
        let tables = Tables::new(case.format, case.levels, case.largest, &mut pool).unwrap();
        for (start, len) in [(0, 3 * KIB4), (GIB - KIB4, MIB2), (2 * GIB, MIB2), (5 * GIB, GIB)] {
            tables.map_identity(&mut pool, range(start, len), RW, MemoryType::WriteBack).unwrap();
        }
        tables.unmap(&mut pool, range(5 * GIB + MIB2, KIB4)).unwrap();
        let mut seen = Vec::new();
        tables.each_table(&pool, &mut |table| seen.push(table));
        assert_eq!(seen[0], tables.root());
        seen.sort_unstable();
        let all: Vec<u64> = (0..pool.pages.len() as u64).map(|n| POOL_BASE + n * KIB4).collect();
        assert_eq!(seen, all, "{}", case.format.name());
    }
}
