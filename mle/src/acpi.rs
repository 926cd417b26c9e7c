//! What the MLE itself wants to know from ACPI. The tables are hostile: a lie costs the launch, or the guest its devices.

use firmware::acpi::Tables;
use hv::addr::PhysRange;
use hv::io::PhysMem;

/// Most segments of PCI configuration space.
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

/// PCI configuration space in memory: the guest's, also where the firmware wants it at runtime.
///
/// Spec: \[PCIFW\] "MCFG Table Description".
pub fn ecam(mem: &impl PhysMem, tables: &Tables) -> heapless::Vec<PhysRange, MAX_ECAM> {
    const BUS_SIZE: u64 = 1 << 20;
    let mut copy = [0; 44 + 16 * MAX_ECAM];
    let entries = body(mem, tables, *b"MCFG", 44, &mut copy);
    let (entries, _) = entries.as_chunks::<16>();
    entries
        .iter()
        .filter_map(|e| {
            let [b0, b1, b2, b3, b4, b5, b6, b7, _, _, first, last, ..] = *e;
            let base = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
            let buses = u64::from(last.checked_sub(first)?).saturating_add(1);
            let start = base.checked_add(u64::from(first).saturating_mul(BUS_SIZE))?;
            PhysRange::new(start, buses.saturating_mul(BUS_SIZE))
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
    fn configuration_space_is_found() {
        let mut entry = [0u8; 16];
        entry[..8].copy_from_slice(&0xb000_0000u64.to_le_bytes());
        entry[11] = 0xff;
        let mem = memory(&[], &entry);
        let tables = Tables::read(&mem, 0x1000).unwrap();
        assert_eq!(ecam(&mem, &tables).as_slice(), &[PhysRange::new(0xb000_0000, 256 << 20).unwrap()]);
        assert_eq!(count_cpus(&mem, &tables), 1, "a MADT without CPUs: this one");
    }
}
