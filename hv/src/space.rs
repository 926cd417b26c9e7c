//! Who may reach which physical page: the one description from which all nested and device tables are made (I1).
//!
//! The space says of every page what it is, never what may be done with it: the rights of the guest, the
//! sandbox and the devices follow from the [`Kind`] by one table, [`Kind::access`]. It cannot be made without
//! the MLE's memory in it, and what is closed or has an owner stays so, whoever claims it later.

use core::fmt;
use core::iter::once;

use heapless::Vec;

use crate::addr::PhysRange;
use crate::radix::{self, MemoryType, Rights, TablePool, Tables};

/// Most regions of a space. Neighbours of one kind count as one.
pub const MAX_REGIONS: usize = 512;

/// Address bits that 4-level tables translate: memory above is out of everyone's reach.
const TABLE_BITS: u32 = 48;
/// Physical address bits of the architecture. Spec: \[APM2\] "Long-Mode Page Translation".
const ARCH_BITS: u32 = 52;

/// Who looks at memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// The guest's CPUs.
    Guest,
    /// The sandbox that runs firmware.
    Sandbox,
    /// DMA of the guest's devices.
    Device,
}

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Anything not named: device registers, ROM, memory that the firmware calls reserved. The guest's, not
    /// for DMA.
    Other,
    /// The guest's memory.
    Ram,
    /// Reserved memory that a device uses on its own: RMRR, IVMD unity range. The guest's, open to DMA.
    DmaReserved,
    /// Device registers that guest and firmware both use.
    SharedMmio,
    /// Device registers that only the firmware uses.
    FirmwareMmio,
    /// EFI runtime code that the memory attributes table calls read-only.
    FirmwareCode,
    /// EFI runtime data, or data of a runtime driver.
    FirmwareData,
    /// EFI runtime drivers of a firmware that does not say which of their pages are code.
    FirmwareImage,
    /// Where the MLE puts a call's arguments and takes the results from.
    CallBuffer,
    /// Nobody's but the MLE's.
    Closed(Hole),
}

/// Why a page is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hole {
    /// The MLE's memory.
    Mle,
    /// The secure loader block.
    Slb,
    /// Registers of TPM localities 2 and up (I4).
    TpmLocality,
    /// Registers of an IOMMU.
    IommuRegisters,
    /// The pages from which CPUs are started.
    LaunchPage,
    /// Registers, heap, module and page tables of a launch by SENTER.
    Txt,
}

/// What a view may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Rights; not empty.
    pub rights: Rights,
    /// Caching.
    pub memory: MemoryType,
}

impl Kind {
    /// What `view` may do with such a page; `None`: nothing, it is not mapped.
    ///
    /// What MLE and sandbox both use is [`MemoryType::Coherent`]: the sandbox must not be able to keep two
    /// versions of it, one in the cache and one in memory (I2).
    pub const fn access(self, view: View) -> Option<Access> {
        const RW: Rights = Rights::READ.union(Rights::WRITE);
        const RX: Rights = Rights::READ.union(Rights::EXEC);
        let (rights, memory) = match (self, view) {
            (Self::Ram, View::Guest) => (Rights::all(), MemoryType::WriteBack),
            (Self::Other | Self::DmaReserved, View::Guest) => (Rights::all(), MemoryType::Device),
            (Self::SharedMmio, View::Guest) => (RW, MemoryType::Device),
            (Self::Ram | Self::DmaReserved, View::Device) => (RW, MemoryType::WriteBack),
            (Self::SharedMmio | Self::FirmwareMmio, View::Sandbox) => (RW, MemoryType::Device),
            (Self::FirmwareCode, View::Sandbox) => (RX, MemoryType::Coherent),
            (Self::FirmwareData | Self::CallBuffer, View::Sandbox) => (RW, MemoryType::Coherent),
            (Self::FirmwareImage, View::Sandbox) => (Rights::all(), MemoryType::Coherent),
            _ => return None,
        };
        Some(Access { rights, memory })
    }

    /// Whether such a page may become something else: what belongs to nobody in particular may.
    const fn yields(self) -> bool {
        matches!(self, Self::Other | Self::Ram)
    }
}

/// A stretch of pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Whole pages.
    pub range: PhysRange,
    /// What they are.
    pub kind: Kind,
}

/// A stretch of pages to which a view has one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Whole pages.
    pub range: PhysRange,
    /// What the view may do there.
    pub access: Access,
}

/// Why an assignment was refused. Nothing was changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// More than [`MAX_REGIONS`] regions.
    Full,
    /// Part of the range has an owner that does not give way.
    Overlap {
        /// What was to be assigned.
        wanted: Kind,
        /// The first such part, as it is.
        held: Region,
    },
    /// The range is not whole pages, and only closed ranges may be rounded.
    Misaligned {
        /// The range.
        range: PhysRange,
    },
    /// The range ends past the physical address space.
    BeyondLimit {
        /// The range.
        range: PhysRange,
        /// First address that does not exist.
        limit: u64,
    },
    /// No CPU has so few or so many physical address bits.
    PhysBits {
        /// The bits.
        bits: u32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => write!(f, "more than {MAX_REGIONS} regions of memory"),
            Self::Overlap { wanted, held } => {
                write!(f, "{wanted:?} claims memory of {:?} at {}", held.kind, held.range)
            }
            Self::Misaligned { range } => write!(f, "range {range} is not whole pages"),
            Self::BeyondLimit { range, limit } => write!(f, "range {range} is not below {limit:#x}"),
            Self::PhysBits { bits } => write!(f, "{bits} physical address bits, not 32 to {ARCH_BITS}"),
        }
    }
}

/// A region's first page; it ends where the next begins, so there can be neither gap nor overlap.
#[derive(Clone, Copy, Debug)]
struct Edge {
    start: u64,
    kind: Kind,
}

/// The physical address space, from 0 to its limit. About 8 KiB.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    /// Rising; the first starts at 0; neighbours differ in kind.
    edges: Vec<Edge, MAX_REGIONS>,
    limit: u64,
}

impl AddressSpace {
    /// The space of a CPU with `phys_bits` physical address bits (those that are addresses: memory
    /// encryption takes some away): all of it [`Kind::Other`], but for the memory of the MLE and of the
    /// SLB where there is one.
    ///
    /// Spec: \[APM2\] "Processor Physical Address Width" (CPUID Fn8000_0008 EAX).
    pub fn new(phys_bits: u32, mle: PhysRange, slb: Option<PhysRange>) -> Result<Self, Error> {
        if !(32..=ARCH_BITS).contains(&phys_bits) {
            return Err(Error::PhysBits { bits: phys_bits });
        }
        let limit = 1u64.wrapping_shl(phys_bits.min(TABLE_BITS));
        let mut space = Self { edges: Vec::new(), limit };
        space.insert(0, Edge { start: 0, kind: Kind::Other })?;
        space.assign(mle, Kind::Closed(Hole::Mle))?;
        if let Some(slb) = slb {
            space.assign(slb, Kind::Closed(Hole::Slb))?;
        }
        Ok(space)
    }

    /// First address that nobody can reach.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Says what `range` is. A closed range is rounded outward to whole pages, any other must consist of
    /// them. [`Kind::Other`] and [`Kind::Ram`] give way; the rest only "becomes" what it is.
    pub fn assign(&mut self, range: PhysRange, kind: Kind) -> Result<(), Error> {
        let pages = range.page_outward();
        if pages != range && !matches!(kind, Kind::Closed(_)) {
            return Err(Error::Misaligned { range });
        }
        let end = match pages.end() {
            Some(end) if end <= self.limit => end,
            _ => return Err(Error::BeyondLimit { range, limit: self.limit }),
        };
        for held in self.regions().filter(|r| r.range.overlaps(&pages)) {
            if !held.kind.yields() && held.kind != kind {
                return Err(Error::Overlap { wanted: kind, held });
            }
        }
        let start = pages.start();
        let kind_at = |addr| self.find(addr).map(|r| r.kind);
        let before = start.checked_sub(1).and_then(kind_at);
        let after = kind_at(end).unwrap_or(kind);

        // Edges from `start` to `end` go; one comes back at each side where the kind changes.
        let first = self.edges.partition_point(|e| e.start < start);
        let gone = self.edges.partition_point(|e| e.start <= end).saturating_sub(first);
        let new_start = (before != Some(kind)).then_some(Edge { start, kind });
        let new_end = (after != kind).then_some(Edge { start: end, kind: after });
        let kept = self.edges.len().saturating_sub(gone);
        let added = usize::from(new_start.is_some()).saturating_add(usize::from(new_end.is_some()));
        if kept.saturating_add(added) > MAX_REGIONS {
            return Err(Error::Full);
        }
        for _ in 0..gone {
            self.edges.remove(first);
        }
        for edge in [new_end, new_start].into_iter().flatten() {
            self.insert(first, edge)?;
        }
        Ok(())
    }

    fn insert(&mut self, index: usize, edge: Edge) -> Result<(), Error> {
        self.edges.insert(index, edge).map_err(|_| Error::Full)
    }

    /// All regions by rising address, without gap from 0 to the limit.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        let ends = self.edges.iter().skip(1).map(|e| e.start).chain(once(self.limit));
        self.edges.iter().zip(ends).filter_map(|(edge, end)| {
            let range = PhysRange::from_last(edge.start, end.saturating_sub(1))?;
            Some(Region { range, kind: edge.kind })
        })
    }

    /// The region that holds `addr`; `None` at and past the limit.
    pub fn find(&self, addr: u64) -> Option<Region> {
        // By bisection: each level of a guest's page tables asks, for each argument of a firmware call.
        let next = self.edges.partition_point(|e| e.start <= addr);
        let edge = self.edges.get(next.checked_sub(1)?)?;
        let end = self.edges.get(next).map_or(self.limit, |e| e.start);
        let range = PhysRange::from_last(edge.start, end.checked_sub(1)?)?;
        range.contains_addr(addr).then_some(Region { range, kind: edge.kind })
    }

    /// Whether `view` has all of `rights` in all of `range`. Who accesses memory for a guest asks [`Self::find`] for RAM: the
    /// guest has the registers of devices as well, but what it finds there need not be what is there.
    pub fn permits(&self, view: View, range: PhysRange, rights: Rights) -> bool {
        let permitted = |edge: &Edge| edge.kind.access(view).is_some_and(|a| a.rights.contains(rights));
        let first = self.edges.partition_point(|e| e.start <= range.start()).saturating_sub(1);
        range.last() < self.limit
            && self.edges.iter().skip(first).take_while(|e| e.start <= range.last()).all(permitted)
    }

    /// What `view` can reach, by rising address; neighbours with one access are one run.
    pub fn runs(&self, view: View) -> impl Iterator<Item = Run> + '_ {
        let mut regions = self.regions().peekable();
        core::iter::from_fn(move || {
            loop {
                let Region { mut range, kind } = regions.next()?;
                let Some(access) = kind.access(view) else { continue };
                while let Some(next) = regions.next_if(|r| r.kind.access(view) == Some(access)) {
                    range = PhysRange::from_last(range.start(), next.range.last())?;
                }
                return Some(Run { range, access });
            }
        })
    }

    /// Maps all that `view` can reach into `tables`, which must be empty, each page at its own address. On
    /// an error the tables are incomplete and not to be used.
    pub fn map_view<P: TablePool>(
        &self,
        view: View,
        tables: &Tables,
        pool: &mut P,
    ) -> Result<(), radix::Error> {
        match PhysRange::new(0, self.limit) {
            Some(all) => self.map_part(view, all, tables, pool),
            None => Ok(()),
        }
    }

    /// [`Self::map_view`] with the memory types that `types` gives: the type of the page at an address, and the last address
    /// for which it is the same. What guest and MLE share keeps its own.
    pub fn map_view_typed<P: TablePool>(
        &self,
        view: View,
        tables: &Tables,
        pool: &mut P,
        types: impl Fn(u64) -> (MemoryType, u64),
    ) -> Result<(), radix::Error> {
        self.runs(view).try_for_each(|run| {
            let Access { rights, memory } = run.access;
            let mut rest = Some(run.range);
            while let Some(range) = rest {
                let (by_page, last) = types(range.start());
                let memory = if memory == MemoryType::Coherent { memory } else { by_page };
                let last = last.max(range.start()).min(range.last());
                if let Some(part) = PhysRange::from_last(range.start(), last) {
                    tables.map_identity(pool, part, rights, memory)?;
                }
                rest = last.checked_add(1).and_then(|next| PhysRange::from_last(next, range.last()));
            }
            Ok(())
        })
    }

    /// [`Self::map_view`] for the pages of `part`, none of which may be mapped: how a page that was taken out
    /// for a time comes back, with no more rights than it had.
    pub fn map_part<P: TablePool>(
        &self,
        view: View,
        part: PhysRange,
        tables: &Tables,
        pool: &mut P,
    ) -> Result<(), radix::Error> {
        self.runs(view).try_for_each(|run| match run.range.intersection(&part) {
            Some(range) => tables.map_identity(pool, range, run.access.rights, run.access.memory),
            None => Ok(()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::addr::PAGE_SIZE;
    use crate::radix::tests::Pool;
    use crate::radix::{AMD_VI, EPT, Format, NPT, PageSize, VT_D};

    const VIEWS: [View; 3] = [View::Guest, View::Sandbox, View::Device];
    const HOLES: [Hole; 6] =
        [Hole::Mle, Hole::Slb, Hole::TpmLocality, Hole::IommuRegisters, Hole::LaunchPage, Hole::Txt];
    const OPEN: [Kind; 9] = [
        Kind::Other,
        Kind::Ram,
        Kind::DmaReserved,
        Kind::SharedMmio,
        Kind::FirmwareMmio,
        Kind::FirmwareCode,
        Kind::FirmwareData,
        Kind::FirmwareImage,
        Kind::CallBuffer,
    ];
    const MIB: u64 = 1 << 20;

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    fn mle() -> PhysRange {
        range(0x4000_0000, 32 * MIB)
    }

    fn slb() -> PhysRange {
        range(0x3fe0_0000, 0x1_0000)
    }

    fn space() -> AddressSpace {
        AddressSpace::new(40, mle(), Some(slb())).unwrap()
    }

    #[test]
    fn nobody_reaches_a_hole() {
        for hole in HOLES {
            for view in VIEWS {
                assert_eq!(Kind::Closed(hole).access(view), None);
            }
        }
    }

    /// The trust table of the design, typed a second time: g, s, d for guest, sandbox, device.
    #[test]
    fn each_view_has_what_the_design_gives_it() {
        let expected = ["g", "gd", "gd", "gs", "s", "s", "s", "s", "s"];
        for (kind, expected) in OPEN.into_iter().zip(expected) {
            for (view, letter) in VIEWS.into_iter().zip(['g', 's', 'd']) {
                assert_eq!(kind.access(view).is_some(), expected.contains(letter), "{kind:?} {view:?}");
            }
            let exec = |view| kind.access(view).is_some_and(|a| a.rights.contains(Rights::EXEC));
            assert!(!exec(View::Device));
            assert_eq!(exec(View::Sandbox), matches!(kind, Kind::FirmwareCode | Kind::FirmwareImage));
        }
        let code = Kind::FirmwareCode.access(View::Sandbox).unwrap();
        assert!(!code.rights.contains(Rights::WRITE));
    }

    #[test]
    fn what_has_an_owner_does_not_give_way() {
        let mut s = space();
        let before: Vec<Region> = s.regions().collect();
        for wanted in OPEN {
            for claim in [mle(), range(mle().start() - PAGE_SIZE, 2 * PAGE_SIZE), range(0, 1 << 40)] {
                assert!(matches!(s.assign(claim, wanted), Err(Error::Overlap { .. })));
            }
        }
        assert_eq!(
            s.assign(range(0x4100_0000, PAGE_SIZE), Kind::Ram),
            Err(Error::Overlap {
                wanted: Kind::Ram,
                held: Region { range: mle(), kind: Kind::Closed(Hole::Mle) }
            })
        );
        assert_eq!(s.regions().collect::<Vec<_>>(), before);
        assert_eq!(s.assign(mle(), Kind::Closed(Hole::Mle)), Ok(()));
        assert!(matches!(AddressSpace::new(40, mle(), Some(mle())), Err(Error::Overlap { .. })));
    }

    #[test]
    fn holes_grow_to_whole_pages_and_nothing_else_does() {
        let mut s = space();
        let odd = range(0xfed4_2010, 0x20);
        assert_eq!(s.assign(odd, Kind::Ram), Err(Error::Misaligned { range: odd }));
        s.assign(odd, Kind::Closed(Hole::TpmLocality)).unwrap();
        assert_eq!(s.find(0xfed4_2fff).unwrap().range, range(0xfed4_2000, PAGE_SIZE));
    }

    #[test]
    fn the_space_ends_where_the_cpu_says() {
        let mut s = space();
        let (last, past) =
            (range((1 << 40) - PAGE_SIZE, PAGE_SIZE), range((1 << 40) - PAGE_SIZE, PAGE_SIZE + 1));
        let hole = Kind::Closed(Hole::IommuRegisters);
        assert_eq!(s.assign(past, hole), Err(Error::BeyondLimit { range: past, limit: 1 << 40 }));
        let top = range(u64::MAX - 5, 6);
        assert_eq!(s.assign(top, hole), Err(Error::BeyondLimit { range: top, limit: 1 << 40 }));
        assert_eq!(s.assign(last, hole), Ok(()));
        assert_eq!(s.find(1 << 40), None);
        assert!(!s.permits(View::Guest, range(1 << 40, 1), Rights::READ));
        for bits in [0, 31, 53, u32::MAX] {
            assert_eq!(AddressSpace::new(bits, mle(), None).unwrap_err(), Error::PhysBits { bits });
        }
        assert_eq!(AddressSpace::new(52, mle(), None).unwrap().limit(), 1 << 48);
    }

    #[test]
    fn a_range_is_permitted_only_as_a_whole() {
        let mut s = space();
        s.assign(range(MIB, MIB), Kind::Ram).unwrap();
        s.assign(range(2 * MIB, MIB), Kind::CallBuffer).unwrap();
        assert!(s.permits(View::Guest, range(MIB, MIB), Rights::all()));
        assert!(!s.permits(View::Guest, range(MIB, MIB + 1), Rights::READ));
        assert!(!s.permits(View::Sandbox, range(2 * MIB - 1, 2), Rights::READ));
        assert!(!s.permits(View::Sandbox, range(2 * MIB, 1), Rights::EXEC));
        assert!(s.permits(View::Sandbox, range(2 * MIB, MIB), Rights::READ | Rights::WRITE));
    }

    #[test]
    fn a_full_space_refuses_and_stays_as_it_was() {
        let mut s = AddressSpace::new(40, mle(), None).unwrap();
        let page = |i: u64| range(i * 2 * PAGE_SIZE, PAGE_SIZE);
        // Each claimed page adds two regions, the first, at 0, one.
        let room = (MAX_REGIONS - s.regions().count()) as u64 / 2;
        for i in 0..=room {
            let before: Vec<Region> = s.regions().collect();
            match s.assign(page(i), Kind::CallBuffer) {
                Ok(()) => assert!(s.regions().count() <= MAX_REGIONS),
                Err(e) => {
                    assert_eq!((i, e), (room, Error::Full));
                    assert_eq!(s.regions().collect::<Vec<_>>(), before);
                }
            }
        }
        // What makes regions fewer still goes.
        assert_eq!(s.assign(range(PAGE_SIZE, PAGE_SIZE), Kind::CallBuffer), Ok(()));
    }

    #[test]
    fn a_page_comes_back_with_the_rights_it_had() {
        let mut s = space();
        s.assign(range(MIB, MIB), Kind::Ram).unwrap();
        let mut pool = Pool::new(32);
        let tables = Tables::new(&NPT, 4, PageSize::Size1G, &mut pool).unwrap();
        s.map_view(View::Guest, &tables, &mut pool).unwrap();
        let around = range(mle().start() - 2 * MIB, mle().len() + 4 * MIB);
        tables.unmap(&mut pool, around).unwrap();
        s.map_part(View::Guest, around, &tables, &mut pool).unwrap();
        assert_eq!(tables.walk(&pool, mle().start() - 1).unwrap().rights, Rights::all());
        assert_eq!(tables.walk(&pool, mle().start()), None);
        assert_eq!(tables.walk(&pool, mle().last()), None);
        assert_eq!(tables.walk(&pool, mle().last() + 1).unwrap().rights, Rights::all());
    }

    /// A page of tables for each GiB of memory, and one for each end of what devices may not have.
    #[test]
    fn devices_have_large_pages_where_memory_is_in_one_piece() {
        const GIB: u64 = 1 << 30;
        for gib in [1, 6, 64] {
            // As OVMF leaves a machine with 2 GiB below 4 GiB: pages of its own among the last 64 MiB.
            let low = (gib * GIB).min(2 * GIB);
            let region = range(low - 256 * MIB, 32 * MIB);
            let slb = range(low - 200 * MIB, 0x1_0000);
            let mut s = AddressSpace::new(40, region, Some(slb)).unwrap();
            s.assign(range(0x9_0000, 2 * PAGE_SIZE), Kind::Closed(Hole::LaunchPage)).unwrap();
            let firmware: Vec<_> =
                (0..12).map(|i| range(low - (60 - 5 * i) * MIB + 3 * PAGE_SIZE, 0x5_3000)).collect();
            let mut at = 0;
            let mut holes: Vec<_> =
                firmware.iter().copied().chain([region, slb, range(0x9_0000, 2 * PAGE_SIZE)]).collect();
            holes.sort_by_key(PhysRange::start);
            for range in &firmware {
                s.assign(*range, Kind::FirmwareData).unwrap();
            }
            for hole in holes.iter().copied().chain([range(low, PAGE_SIZE)]) {
                s.assign(range(at, hole.start() - at), Kind::Ram).unwrap();
                at = hole.last() + 1;
            }
            let rest = gib * GIB - low;
            if rest > 0 {
                s.assign(range(4 * GIB, rest), Kind::Ram).unwrap();
            }
            let pages = |format, largest| {
                let mut pool = Pool::new(1 << 16);
                let tables = Tables::new(format, 4, largest, &mut pool).unwrap();
                s.map_view(View::Device, &tables, &mut pool).unwrap();
                pool.used()
            };
            let amd = pages(&AMD_VI, PageSize::Size2M);
            let intel = pages(&VT_D, PageSize::Size1G);
            std::println!("{gib:>2} GiB: AMD-Vi {} KiB, VT-d with 1 GiB pages {} KiB", 4 * amd, 4 * intel);
            let ends = 2 * holes.len();
            assert!(intel <= amd && amd <= 2 + gib as usize + ends, "{amd} {intel}");
        }
    }

    /// Claims as a hostile memory map, DMAR or IVRS would make them: near the MLE and the SLB, and anywhere.
    fn claims() -> impl Strategy<Value = Vec<(PhysRange, Kind)>> {
        let near = prop_oneof![
            Just(0u64),
            Just(slb().start()),
            Just(slb().last() + 1),
            Just(mle().start()),
            Just(mle().start() + 5 * MIB),
            Just(mle().last() + 1),
            Just((1 << 40) - 16 * PAGE_SIZE),
        ];
        let place = (near, -3i64..3).prop_map(|(a, d)| a.saturating_add_signed(d * PAGE_SIZE as i64));
        let len = prop_oneof![3 => 1u64..40, 1 => 1u64..(1 << 20)];
        let kind = prop_oneof![
            4 => prop::sample::select(&OPEN[..]),
            1 => prop::sample::select(&HOLES[..]).prop_map(Kind::Closed),
        ];
        let claim =
            (place, len, kind).prop_map(|(start, pages, kind)| (range(start, pages * PAGE_SIZE), kind));
        prop::collection::vec(claim, 0..24)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// I1, and the rest of the description with it: in every view, in every format, exactly the pages
        /// are mapped that the accepted claims leave to it, and none of the MLE's or the SLB's.
        #[test]
        fn no_view_ever_maps_a_page_it_may_not_have(claims in claims()) {
            let mut s = space();
            let mut accepted = vec![(mle(), Kind::Closed(Hole::Mle)), (slb(), Kind::Closed(Hole::Slb))];
            for (range, kind) in claims {
                if s.assign(range, kind).is_ok() {
                    accepted.push((range, kind));
                }
            }
            // The naive model: the newest accepted claim on a page says what it is.
            let model = |addr: u64| {
                let newest = accepted.iter().rev().find(|(r, _)| r.contains_addr(addr));
                newest.map_or(Kind::Other, |(_, kind)| *kind)
            };
            let mut edges: Vec<u64> =
                accepted.iter().flat_map(|(r, _)| [r.start(), r.last() + 1]).chain([0, 1 << 40]).collect();
            edges.sort();
            edges.dedup();

            let mut end = 0;
            for (i, region) in s.regions().enumerate() {
                prop_assert_eq!(region.range.start(), end);
                prop_assert_eq!(region.kind, model(region.range.start()));
                prop_assert!(i == 0 || s.find(end - 1).unwrap().kind != region.kind);
                end = region.range.last() + 1;
            }
            prop_assert_eq!(end, 1 << 40);

            for view in [View::Guest, View::Sandbox, View::Device] {
                let readable = |addr: u64| model(addr).access(view).is_some_and(|a| a.rights.contains(Rights::READ));
                for (i, from) in edges.iter().enumerate() {
                    let found = s.find(*from);
                    prop_assert_eq!(found.is_some(), *from != 1 << 40);
                    prop_assert!(found.is_none_or(|f| f.range.contains_addr(*from) && f.kind == model(*from)));
                    let mut all = true;
                    for pair in edges[i..].windows(2) {
                        all &= readable(pair[0]);
                        let range = range(*from, pair[1] - from);
                        prop_assert_eq!(s.permits(view, range, Rights::READ), all, "{:?} of {}", view, range);
                    }
                }
            }

            let formats: [(&'static Format, View); 6] = [
                (&NPT, View::Guest), (&EPT, View::Guest), (&NPT, View::Sandbox), (&EPT, View::Sandbox),
                (&AMD_VI, View::Device), (&VT_D, View::Device),
            ];
            for (format, view) in formats {
                let mut pool = Pool::new(4096);
                let tables = Tables::new(format, 4, PageSize::Size1G, &mut pool).unwrap();
                s.map_view(view, &tables, &mut pool).unwrap();
                for leaf in tables.leaves(&pool) {
                    let page = range(leaf.addr, leaf.mapping.size.bytes());
                    prop_assert_eq!(leaf.mapping.phys, leaf.addr);
                    prop_assert!(!page.overlaps(&mle()) && !page.overlaps(&slb()), "{:?} reaches {}", view, page);
                    prop_assert!(s.permits(view, page, leaf.mapping.rights));
                }
                for pair in edges.windows(2) {
                    for addr in [pair[0], pair[1] - 1] {
                        let expected = model(addr).access(view).map(|a| (addr, a.rights));
                        prop_assert_eq!(tables.walk(&pool, addr).map(|m| (m.phys, m.rights)), expected);
                    }
                }
            }
        }
    }

    #[test]
    fn types_by_page_change_no_right_and_leave_shared_memory_coherent() {
        let mle = PhysRange::new(0x20_0000, 0x20_0000).unwrap();
        let mut space = AddressSpace::new(36, mle, None).unwrap();
        space.assign(PhysRange::new(0, 0x20_0000).unwrap(), Kind::Ram).unwrap();
        space.assign(PhysRange::new(0x40_0000, 0x1000).unwrap(), Kind::FirmwareData).unwrap();
        let types = |at: u64| {
            if at < 0xa_0000 { (MemoryType::WriteBack, 0x9_ffff) } else { (MemoryType::Device, u64::MAX) }
        };
        for view in [View::Guest, View::Sandbox] {
            let (mut plain, mut typed) = (Pool::new(256), Pool::new(256));
            let a = Tables::new(&EPT, 4, PageSize::Size2M, &mut plain).unwrap();
            let b = Tables::new(&EPT, 4, PageSize::Size2M, &mut typed).unwrap();
            space.map_view(view, &a, &mut plain).unwrap();
            space.map_view_typed(view, &b, &mut typed, types).unwrap();
            for at in [0, 0x9_f000, 0xa_0000, 0x1f_f000, 0x20_0000, 0x3f_f000, 0x40_0000, 0x8000_0000] {
                let to = |t: &Tables, p: &Pool| t.walk(p, at).map(|m| (m.phys, m.rights));
                assert_eq!(to(&a, &plain), to(&b, &typed), "{at:#x}");
            }
        }
    }
}
