//! PCI configuration space, but for the functions that decide about memory.
//!
//! Host bridges hold the registers of the memory controller, IOMMUs the base of their own register windows, an Intel LPC
//! bridge the base of a register block that hides memory. The guest may read these and not write them; all others are its
//! own. By ports CF8h and CFCh this is decided access by access; in memory (ECAM) a copy takes the function's page.
//!
//! Spec: \[PCI\] "Configuration Mechanism #1", \[PCIFW\] "MCFG Table Description". Choice: ADR 0014.

use core::fmt;

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::{PhysMem, PortIo};
use iommu::pci::{self, Function};
use spin::Mutex;

use super::ports::{forward, read};
use crate::backend::PortMap;

/// Most functions that can be guarded: a server has a host bridge for each root port and eight for its memory controllers.
pub const MAX_GUARDED: usize = 64;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const DATA_END: u16 = 0xd00;
/// Bit of the address register without which no configuration cycle is made.
const ENABLE: u32 = 1 << 31;
/// Bytes of a function that the ports reach.
const PORT_BYTES: usize = 256;

/// A function of segment 0 that the guest may not write, or not all of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guarded {
    /// Bus in bits 15:8, device in 7:3, function in 2:0.
    pub id: u16,
    /// First byte that is closed.
    first: u8,
    /// Last byte that is closed.
    last: u8,
}

impl Guarded {
    fn of(function: &Function<'_, impl PortIo>) -> Option<Self> {
        const HOST_BRIDGE: u16 = 0x0600;
        const ISA_BRIDGE: u16 = 0x0601;
        const IOMMU: u16 = 0x0806;
        const INTEL: u32 = 0x8086;
        let id = function.id;
        match function.class() {
            HOST_BRIDGE | IOMMU => Some(Self { id, first: 0, last: u8::MAX }),
            // RCBA. Spec: [ICH9] "Root Complex Base Address Register".
            ISA_BRIDGE if function.read(0) & 0xffff == INTEL => Some(Self { id, first: 0xf0, last: 0xf3 }),
            _ => None,
        }
    }

    fn closes(&self, at: u8, size: u8) -> bool {
        at <= self.last && u16::from(at).saturating_add(size.into()) > self.first.into()
    }
}

/// More functions than [`MAX_GUARDED`] would have to be guarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

impl fmt::Display for TooMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PCI: more than {MAX_GUARDED} host bridges and IOMMUs")
    }
}

/// Finds the functions to guard.
///
/// # Errors
/// [`TooMany`].
pub fn find(ports: &impl PortIo) -> Result<Vec<Guarded, MAX_GUARDED>, TooMany> {
    let mut found = Vec::new();
    pci::functions(ports)
        .filter_map(|function| Guarded::of(&function))
        .try_for_each(|guarded| found.push(guarded).map_err(|_| TooMany))?;
    Ok(found)
}

/// Writes at `to` what the guest is to find in memory in place of the function: its registers as they are now, without
/// extended ones.
pub fn copy(function: &Function<'_, impl PortIo>, to: u64, mem: &impl PhysMem) -> Result<(), PhysRange> {
    let mut page = [0; PAGE_SIZE as usize];
    for (offset, register) in (0..PORT_BYTES).step_by(4).zip(page.as_chunks_mut().0) {
        *register = function.read(offset as u8).to_le_bytes();
    }
    if mem.write(to, &page) { Ok(()) } else { PhysRange::new(to, PAGE_SIZE).map_or(Ok(()), Err) }
}

/// What became of a port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is not one of these ports.
    NotOurs,
    /// What an IN reads.
    Value(u32),
    /// The OUT was carried out.
    Written,
    /// The OUT was dropped.
    Dropped(Refusal),
}

/// A write that was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    id: u16,
    offset: u8,
    /// Whether it is the first of this function.
    pub first: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bus, device, function) = (self.id >> 8, self.id >> 3 & 0x1f, self.id & 7);
        write!(f, "write of register {:#x} of PCI {bus:02x}:{device:02x}.{function}", self.offset)
    }
}

/// The guest's configuration ports.
pub struct ConfigPorts {
    /// The guest's address register. The machine's own changes with each access: two CPUs of the guest cannot have one
    /// access judged and another made.
    address: u32,
    guarded: Vec<Guarded, MAX_GUARDED>,
    /// One bit for each of `guarded` that was written.
    told: u64,
    dropped: u64,
}

const _: () = assert!(MAX_GUARDED <= u64::BITS as usize);

static CONFIG: Mutex<ConfigPorts> = Mutex::new(ConfigPorts::new());

/// Guards `functions` from now on.
pub fn guard(map: &mut PortMap, ports: &impl PortIo, functions: Vec<Guarded, MAX_GUARDED>) {
    (DATA..DATA_END).chain([ADDRESS]).for_each(|port| map.intercept(port));
    ports.out32(ADDRESS, 0);
    CONFIG.lock().guarded = functions;
}

/// Does the guest's access to a port, or refuses it: an OUT of the low `size` bytes of `out`, an IN without it.
pub fn access(ports: &impl PortIo, port: u16, size: u8, out: Option<u32>) -> Answer {
    CONFIG.lock().access(ports, port, size, out)
}

/// Writes how many functions are guarded and how many writes were dropped.
pub fn write_dropped(out: &mut impl fmt::Write) {
    let config = CONFIG.lock();
    // A full buffer ends the report early.
    let _ = writeln!(
        out,
        "chipset: {} PCI functions guarded, {} writes dropped",
        config.guarded.len(),
        config.dropped
    );
}

impl ConfigPorts {
    const fn new() -> Self {
        Self { address: 0, guarded: Vec::new(), told: 0, dropped: 0 }
    }

    fn access(&mut self, ports: &impl PortIo, port: u16, size: u8, out: Option<u32>) -> Answer {
        if (port, size) == (ADDRESS, 4) {
            let Some(value) = out else { return Answer::Value(self.address) };
            self.address = value;
            return Answer::Written;
        }
        let end = port.saturating_add(size.into());
        if end <= DATA || port >= DATA_END {
            return Answer::NotOurs;
        }
        let offset = (self.address as u8 & 0xfc).wrapping_add(port as u8 & 3);
        if port < DATA || end > DATA_END {
            // The part of it that reaches these ports would go where the machine's address register happens to lead.
            return out.map_or(Answer::Value(u32::MAX), |_| self.refuse(None, offset));
        }
        let id = (self.address >> 8) as u16;
        let guarded = self.guarded.iter().position(|g| g.id == id && g.closes(offset, size));
        if out.is_some() && guarded.is_some() && self.address & ENABLE != 0 {
            return self.refuse(guarded, offset);
        }
        ports.out32(ADDRESS, self.address);
        let answer = match out {
            None => Answer::Value(read(ports, port, size)),
            Some(value) => {
                forward(ports, port, size, value);
                Answer::Written
            }
        };
        // Accesses that are no configuration accesses reach the machine as they are, and find no address here.
        ports.out32(ADDRESS, 0);
        answer
    }

    fn refuse(&mut self, guarded: Option<usize>, offset: u8) -> Answer {
        self.dropped = self.dropped.saturating_add(1);
        let bit = guarded.and_then(|index| 1u64.checked_shl(index as u32)).unwrap_or(0);
        let first = bit & !self.told != 0;
        self.told |= bit;
        Answer::Dropped(Refusal { id: (self.address >> 8) as u16, offset, first })
    }
}

#[cfg(test)]
mod tests {
    use core::cell::{Cell, RefCell};

    use proptest::prelude::*;

    use super::*;
    use crate::fake::Ram;

    const HOST: u16 = 0;
    const IOMMU: u16 = 0x10;
    const LPC: u16 = 0xf8;
    const DISK: u16 = 0xfa;

    /// Four functions of 256 bytes behind the two ports.
    struct Chipset {
        address: Cell<u32>,
        registers: RefCell<Vec<(u16, [u8; 256]), 4>>,
        others: RefCell<std::vec::Vec<(u16, u8, u32)>>,
    }

    impl Chipset {
        fn new() -> Self {
            let mut registers = Vec::new();
            for (id, class, vendor) in [
                (HOST, 0x0600, 0x8086),
                (IOMMU, 0x0806, 0x1022),
                (LPC, 0x0601, 0x8086),
                (DISK, 0x0106, 0x8086),
            ] {
                let mut bytes = [0; 256];
                bytes[..2].copy_from_slice(&u16::to_le_bytes(vendor));
                bytes[10..12].copy_from_slice(&u16::to_le_bytes(class));
                registers.push((id, bytes)).unwrap();
            }
            Self { address: Cell::new(0), registers: RefCell::new(registers), others: RefCell::default() }
        }

        fn with<T>(&self, port: u16, visit: impl FnOnce(&mut [u8]) -> T) -> Option<T> {
            let address = self.address.get();
            let mut registers = self.registers.borrow_mut();
            let (_, bytes) = registers.iter_mut().find(|(id, _)| *id == (address >> 8) as u16)?;
            let at = usize::from(address as u8 & 0xfc) + usize::from(port & 3);
            (address & ENABLE != 0).then(|| visit(&mut bytes[at..]))
        }

        fn input(&self, port: u16, size: usize) -> u32 {
            assert!((DATA..DATA_END).contains(&port));
            let value = self.with(port, |bytes| {
                let mut value = [0; 4];
                value[..size].copy_from_slice(&bytes[..size]);
                u32::from_le_bytes(value)
            });
            value.unwrap_or(u32::MAX)
        }

        fn output(&self, port: u16, size: usize, value: u32) {
            if (port, size) == (ADDRESS, 4) {
                self.address.set(value);
            } else if (DATA..DATA_END).contains(&port) {
                self.with(port, |bytes| bytes[..size].copy_from_slice(&value.to_le_bytes()[..size]));
            } else {
                self.others.borrow_mut().push((port, size as u8, value));
            }
        }
    }

    impl PortIo for Chipset {
        fn in8(&self, port: u16) -> u8 {
            self.input(port, 1) as u8
        }
        fn in16(&self, port: u16) -> u16 {
            self.input(port, 2) as u16
        }
        fn in32(&self, port: u16) -> u32 {
            self.input(port, 4)
        }
        fn out8(&self, port: u16, value: u8) {
            self.output(port, 1, value.into());
        }
        fn out16(&self, port: u16, value: u16) {
            self.output(port, 2, value.into());
        }
        fn out32(&self, port: u16, value: u32) {
            self.output(port, 4, value);
        }
    }

    fn address(id: u16, offset: u8) -> u32 {
        ENABLE | u32::from(id) << 8 | u32::from(offset)
    }

    fn guarding(chipset: &Chipset) -> ConfigPorts {
        let guarded = find(chipset).unwrap();
        chipset.address.set(0);
        ConfigPorts { guarded, ..ConfigPorts::new() }
    }

    #[test]
    fn what_decides_about_memory_is_found() {
        let found = find(&Chipset::new()).unwrap();
        let whole = |id| Guarded { id, first: 0, last: 255 };
        assert_eq!(
            found.as_slice(),
            [whole(HOST), whole(IOMMU), Guarded { id: LPC, first: 0xf0, last: 0xf3 }]
        );
    }

    #[test]
    fn guarded_registers_are_read_and_not_written_and_others_are_both() {
        let chipset = Chipset::new();
        let mut config = guarding(&chipset);
        let mut try_write = |id, offset: u8, size| {
            let port = DATA + u16::from(offset & 3);
            assert_eq!(
                config.access(&chipset, ADDRESS, 4, Some(address(id, offset & 0xfc))),
                Answer::Written
            );
            let written = config.access(&chipset, port, size, Some(0x5a5a_5a5a));
            let Answer::Value(read) = config.access(&chipset, port, size, None) else { panic!() };
            (written, read & 0xff)
        };
        let dropped = |id, offset, first| (Answer::Dropped(Refusal { id, offset, first }), 0);
        assert_eq!(try_write(HOST, 0x60, 4), dropped(HOST, 0x60, true));
        assert_eq!(try_write(HOST, 0x9d, 1), dropped(HOST, 0x9d, false));
        assert_eq!(try_write(IOMMU, 0xff, 1), dropped(IOMMU, 0xff, true));
        assert_eq!(try_write(LPC, 0xf2, 2), dropped(LPC, 0xf2, true));
        assert_eq!(try_write(LPC, 0x60, 4), (Answer::Written, 0x5a));
        assert_eq!(try_write(LPC, 0xf4, 4), (Answer::Written, 0x5a));
        assert_eq!(try_write(DISK, 0x10, 4), (Answer::Written, 0x5a));
        assert_eq!(config.dropped, 4);
    }

    #[test]
    fn accesses_beside_the_ports_pass_and_those_across_them_do_nothing() {
        let chipset = Chipset::new();
        let mut config = guarding(&chipset);
        for (port, size) in [(0xcf9, 1), (0xcf8, 1), (0xcfa, 2), (0xcf6, 4), (0xd00, 4)] {
            assert_eq!(config.access(&chipset, port, size, Some(6)), Answer::NotOurs, "{port:#x} {size}");
        }
        config.access(&chipset, ADDRESS, 4, Some(address(DISK, 0x40)));
        for (port, size) in [(0xcfa, 4), (0xcff, 2), (0xcfd, 4)] {
            let answer = config.access(&chipset, port, size, Some(u32::MAX));
            assert!(matches!(answer, Answer::Dropped(Refusal { first: false, .. })), "{port:#x} {size}");
            assert_eq!(config.access(&chipset, port, size, None), Answer::Value(u32::MAX));
        }
        assert_eq!(config.access(&chipset, ADDRESS, 4, None), Answer::Value(address(DISK, 0x40)));
    }

    #[test]
    fn the_map_lets_the_reset_port_through() {
        let mut map = PortMap::open();
        guard(&mut map, &Chipset::new(), Vec::new());
        assert!(map.intercepts(0xcf8, 4) && map.intercepts(0xcfc, 1) && map.intercepts(0xcff, 1));
        assert!(!map.intercepts(0xcf9, 1) && !map.intercepts(0xd00, 4));
    }

    #[test]
    fn the_copy_in_memory_has_the_registers() {
        let (chipset, ram) = (Chipset::new(), Ram::new(0x2000));
        ram.write(0x1000, &[0xff; 0x1000]);
        copy(&Function::new(&chipset, IOMMU), 0x1000, &ram).unwrap();
        let mut page = [0; 0x1000];
        ram.read(0x1000, &mut page);
        assert_eq!(page[..256], chipset.registers.borrow()[1].1);
        assert!(page[256..].iter().all(|byte| *byte == 0));
        assert!(copy(&Function::new(&chipset, IOMMU), 0x2000, &ram).is_err());
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_changes_what_is_guarded(
            accesses in prop::collection::vec((0xcf0u16..0xd08, 0usize..3, any::<Option<u32>>(), 0usize..4, any::<u8>()), 0..60),
        ) {
            let chipset = Chipset::new();
            let mut config = guarding(&chipset);
            let before = chipset.registers.borrow().clone();
            for (port, size, out, function, offset) in accesses {
                let target = address([HOST, IOMMU, LPC, DISK][function], offset);
                config.access(&chipset, ADDRESS, 4, Some(target));
                config.access(&chipset, port, [1, 2, 4][size], out);
                prop_assert_eq!(chipset.address.get() & ENABLE, 0, "nothing is selected between accesses");
            }
            let after = chipset.registers.borrow().clone();
            prop_assert_eq!(before[0], after[0]);
            prop_assert_eq!(before[1], after[1]);
            prop_assert_eq!(&before[2].1[0xf0..0xf4], &after[2].1[0xf0..0xf4]);
        }
    }
}
