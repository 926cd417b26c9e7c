//! What the MLE itself wants to know from ACPI. The tables are hostile: a lie costs the launch, or the guest its devices.

use firmware::acpi::Tables;
use firmware::memmap::{MemoryMap, MemoryType};
use firmware::prm::{self, Prmt};
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use log::warn;

/// Most windows of PCI configuration space: one may be the CPU's own.
pub const MAX_ECAM: usize = 16;

/// Bytes of table `signature` behind its header of `header` bytes, copied into `out`.
fn body<'a>(
    mem: &impl PhysMem,
    tables: &Tables,
    signature: [u8; 4],
    header: usize,
    out: &'a mut [u8],
) -> &'a [u8] {
    let Some(table) = tables.find(signature) else { return &[] };
    let len = usize::try_from(table.range.len()).unwrap_or(usize::MAX);
    let Some(copy) = out.get_mut(..len) else { return &[] };
    if mem.read(table.range.start(), copy) { copy.get(header..).unwrap_or_default() } else { &[] }
}

/// CPUs that the MADT lists as enabled. Too few leave CPUs in INIT state, too many fail the launch.
///
/// Spec: \[ACPI\] "Multiple APIC Description Table", type 0.
pub fn count_cpus(mem: &impl PhysMem, tables: &Tables) -> usize {
    const LOCAL_APIC: u8 = 0;
    const ENABLED: u8 = 1;
    let mut copy = [0; 8192];
    let mut rest = body(mem, tables, *b"APIC", 44, &mut copy);
    let mut count = 0usize;
    while let [kind, size, entry @ ..] = rest {
        if *kind == LOCAL_APIC && entry.get(2).is_some_and(|flags| flags & ENABLED != 0) {
            count = count.saturating_add(1);
        }
        rest = rest.get(usize::from(*size).max(2)..).unwrap_or_default();
    }
    count.max(1)
}

/// The handlers of the Platform Runtime Mechanism. A table that cannot be used is as none, with a warning.
pub fn prmt(mem: &impl PhysMem, tables: &Tables, map: &MemoryMap) -> Option<Prmt> {
    // Buffers in regions beyond these are refused.
    const REGIONS_MAX: usize = 64;
    tables.find(prm::SIGNATURE)?;
    let regions = |ty| -> heapless::Vec<PhysRange, REGIONS_MAX> {
        map.runtime().filter(|r| r.ty == ty).map(|r| r.range).take(REGIONS_MAX).collect()
    };
    let (code, data) =
        (regions(MemoryType::RUNTIME_SERVICES_CODE), regions(MemoryType::RUNTIME_SERVICES_DATA));
    let mut copy = [0; prm::TABLE_MAX];
    let table = body(mem, tables, prm::SIGNATURE, 0, &mut copy);
    if table.is_empty() {
        warn!("PRMT: longer than {} bytes, or not memory; not passed on", prm::TABLE_MAX);
        return None;
    }
    Prmt::parse(table, &code, &data).inspect_err(|error| warn!("{error}; not passed on")).ok()
}

/// Bytes of a bus in PCI configuration space in memory.
const BUS_SIZE: u64 = 1 << 20;

/// PCI configuration space in memory, of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// PCI segment.
    pub segment: u16,
    /// Where bus 0 is, or would be.
    base: u64,
    /// All buses that it has.
    pub range: PhysRange,
}

impl Ecam {
    /// Segment 0 from bus 0 on, as an AMD CPU decodes it by itself; none when it does not.
    ///
    /// Spec: \[PPR\] "MMIO Configuration Base Address": bit 0 enable, bits 5:2 log2 of the buses.
    pub fn of_cpu(mmio_config: u64) -> Option<Self> {
        const BASE: u64 = 0x000f_ffff_fff0_0000;
        let (base, log2) = (mmio_config & BASE, mmio_config >> 2 & 0xf);
        let range = PhysRange::new(base, BUS_SIZE << log2)?;
        (mmio_config & 1 != 0).then_some(Self { segment: 0, base, range })
    }

    /// The page of a function: bus in bits 15:8 of `id`, device in 7:3, function in 2:0.
    pub fn page(&self, id: u16) -> Option<PhysRange> {
        let start = self.base.checked_add(u64::from(id).saturating_mul(PAGE_SIZE))?;
        PhysRange::new(start, PAGE_SIZE).filter(|page| self.range.contains(page))
    }
}

/// PCI configuration space in memory: the guest's, also where the firmware wants it at runtime.
///
/// Spec: \[PCIFW\] "MCFG Table Description".
pub fn ecam(mem: &impl PhysMem, tables: &Tables) -> heapless::Vec<Ecam, MAX_ECAM> {
    let mut copy = [0; 44 + 16 * (MAX_ECAM - 1)];
    let entries = body(mem, tables, *b"MCFG", 44, &mut copy);
    let (entries, _) = entries.as_chunks::<16>();
    entries
        .iter()
        .filter_map(|e| {
            let [b0, b1, b2, b3, b4, b5, b6, b7, s0, s1, first, last, ..] = *e;
            let (base, segment) =
                (u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]), u16::from_le_bytes([s0, s1]));
            let buses = u64::from(last.checked_sub(first)?).saturating_add(1);
            let start = base.checked_add(u64::from(first).saturating_mul(BUS_SIZE))?;
            let range = PhysRange::new(start, buses.saturating_mul(BUS_SIZE))?;
            Some(Ecam { segment, base, range })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An RSDP at 1000h, an RSDT, a MADT and an MCFG behind it.
    struct Memory(Vec<u8>);
    impl PhysMem for Memory {
        fn read(&self, addr: u64, out: &mut [u8]) -> bool {
            let at = (addr as usize).wrapping_sub(0x1000);
            self.0.get(at..at.wrapping_add(out.len())).map(|b| out.copy_from_slice(b)).is_some()
        }
        fn write(&self, _: u64, _: &[u8]) -> bool {
            false
        }
    }

    fn memory(madt: &[u8], mcfg: &[u8]) -> Memory {
        let mut m = vec![0; 0x1000];
        m[..8].copy_from_slice(b"RSD PTR ");
        m[16..20].copy_from_slice(&0x1100u32.to_le_bytes());
        let mut table = |at: usize, signature: &[u8; 4], fixed: usize, body: &[u8]| {
            m[at..at + 4].copy_from_slice(signature);
            m[at + 4..at + 8].copy_from_slice(&((fixed + body.len()) as u32).to_le_bytes());
            m[at + fixed..at + fixed + body.len()].copy_from_slice(body);
        };
        let pointers = [0x1200u32.to_le_bytes(), 0x1400u32.to_le_bytes()].concat();
        table(0x100, b"RSDT", 36, &pointers);
        table(0x200, b"APIC", 44, madt);
        table(0x400, b"MCFG", 44, mcfg);
        Memory(m)
    }

    #[test]
    fn enabled_cpus_count_and_a_zero_length_entry_does_not_hang() {
        let cpu = |id, flags| [0, 8, id, id, flags, 0, 0, 0];
        let io_apic = [1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let madt = [&cpu(0, 1)[..], &io_apic, &cpu(1, 0), &cpu(2, 1), &[0, 0, 0, 0]].concat();
        let mem = memory(&madt, &[]);
        let tables = Tables::read(&mem, 0x1000).unwrap();
        assert_eq!(count_cpus(&mem, &tables), 2);
    }

    #[test]
    fn the_page_of_a_function_is_its_buses() {
        let range = PhysRange::new(0xb010_0000, 2 << 20).unwrap();
        let ecam = Ecam { segment: 0, base: 0xb000_0000, range };
        assert_eq!(ecam.page(0x0110), PhysRange::new(0xb011_0000, 0x1000));
        assert_eq!((ecam.page(0x0010), ecam.page(0x0300)), (None, None), "buses 1 and 2 alone are there");
    }

    #[test]
    fn the_cpus_own_window_is_read() {
        let ecam = Ecam::of_cpu(0xe000_0000 | 8 << 2 | 1).unwrap();
        assert_eq!(ecam.range, PhysRange::new(0xe000_0000, 256 << 20).unwrap());
        assert_eq!(Ecam::of_cpu(0xe000_0000 | 8 << 2), None);
    }

    #[test]
    fn configuration_space_is_found() {
        let mut entry = [0u8; 16];
        entry[..8].copy_from_slice(&0xb000_0000u64.to_le_bytes());
        entry[11] = 0xff;
        let mem = memory(&[], &entry);
        let tables = Tables::read(&mem, 0x1000).unwrap();
        let range = PhysRange::new(0xb000_0000, 256 << 20).unwrap();
        let found = Ecam { segment: 0, base: 0xb000_0000, range };
        assert_eq!(ecam(&mem, &tables).as_slice(), &[found]);
        assert_eq!(count_cpus(&mem, &tables), 1, "a MADT without CPUs: this one");
    }
}
