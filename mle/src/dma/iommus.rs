//! The IOMMUs of either vendor, as the launch and [`super`] need them.

use core::fmt;

use hv::addr::PhysRange;
use hv::io::{Mmio, PortIo};
use hv::radix::{self, AMD_VI, PageSize, TablePool, Tables};
use hv::space;
use iommu::amd_vi::{self, AmdVi, Root};
use iommu::dmar::Dmar;
use iommu::fault::{Drained, Fault};
use iommu::ivrs::Ivrs;
use iommu::reserved::Reserved;
use iommu::vt_d::{self, Need, Protection, VtD};
use iommu::{DmaArea, Platform};

use super::reserved::RESERVED_MAX;

/// Bytes of an AMD IOMMU's registers that are used.
const AMD_VI_WINDOW: u64 = 0x4000;
/// Most that a VT-d unit's registers take: the farthest that its capability registers can point to, and what lies there.
const VT_D_WINDOW: u64 = 0x5000;

/// Why DMA is not known to be ruled by our tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// AMD's.
    AmdVi(amd_vi::Error),
    /// Intel's.
    VtD(vt_d::Error),
    /// Tables for devices.
    Tables(radix::Error),
    /// More than [`RESERVED_MAX`](super::reserved::RESERVED_MAX) ranges of reserved memory.
    TooManyReserved,
    /// Reserved memory has another owner.
    Reserved(space::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AmdVi(e) => e.fmt(f),
            Self::VtD(e) => e.fmt(f),
            Self::Tables(e) => write!(f, "tables for devices: {e}"),
            Self::TooManyReserved => {
                write!(f, "more than {RESERVED_MAX} ranges of memory reserved for devices in IVRS or DMAR")
            }
            Self::Reserved(e) => write!(f, "memory reserved for devices: {e}"),
        }
    }
}

impl From<amd_vi::Error> for Error {
    fn from(e: amd_vi::Error) -> Self {
        Self::AmdVi(e)
    }
}

impl From<vt_d::Error> for Error {
    fn from(e: vt_d::Error) -> Self {
        Self::VtD(e)
    }
}

impl From<radix::Error> for Error {
    fn from(e: radix::Error) -> Self {
        Self::Tables(e)
    }
}

/// A private copy of the table that lists the IOMMUs, checked.
#[derive(Clone, Copy)]
pub enum Listed<'a> {
    /// AMD's, and how many IOMMUs the SLB stage has set to deny all DMA.
    Ivrs(&'a [u8], u64),
    /// Intel's, as SINIT checked it, and who is to protect memory until our tables are in force.
    Dmar(&'a [u8], Protection),
}

impl<'a> Listed<'a> {
    /// Register windows of all IOMMUs that the table lists, to be mapped before they are first read.
    ///
    /// # Errors
    /// The table is malformed.
    pub fn windows(self) -> Result<impl Iterator<Item = PhysRange> + use<'a>, Error> {
        let (ivrs, dmar) = self.parsed()?;
        let amd = ivrs.into_iter().flat_map(|ivrs| ivrs.units().map(|u| (u.base(), AMD_VI_WINDOW)));
        let intel =
            dmar.into_iter().flat_map(|dmar| dmar.units().map(|u| (u.base(), u.size().max(VT_D_WINDOW))));
        Ok(amd.chain(intel).filter_map(|(base, size)| PhysRange::new(base, size)))
    }

    /// Memory that firmware wants devices to go on reaching; a range may come several times. `ports` reach configuration space.
    ///
    /// # Errors
    /// The table is malformed.
    pub fn reserved<P: PortIo>(
        self,
        ports: &P,
    ) -> Result<impl Iterator<Item = Reserved> + use<'a, '_, P>, Error> {
        let (ivrs, dmar) = self.parsed()?;
        let amd = ivrs.into_iter().flat_map(|ivrs| ivrs.reserved());
        Ok(amd.chain(dmar.into_iter().flat_map(|dmar| dmar.reserved(ports))))
    }

    fn parsed(self) -> Result<(Option<Ivrs<'a>>, Option<Dmar<'a>>), Error> {
        Ok(match self {
            Self::Ivrs(table, _) => (Some(Ivrs::new(table).map_err(amd_vi::Error::from)?), None),
            Self::Dmar(table, _) => (None, Some(Dmar::new(table).map_err(vt_d::Error::from)?)),
        })
    }
}

/// All IOMMUs of the machine.
pub enum Iommus<W> {
    /// AMD's.
    AmdVi(AmdVi<W>),
    /// Intel's.
    VtD(VtD<W>),
}

/// What of the machine's interrupts is left to devices (ADR 0012).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Fixed and lowest-priority ones.
    Ordinary,
    /// All of compatibility format: SMI, NMI and INIT too.
    Compatible,
    /// All.
    Unchecked,
}

impl<W: Mmio> Iommus<W> {
    /// Takes the IOMMUs that `listed` names, which deny all DMA afterwards: AMD's as the SLB stage left them, Intel's from
    /// whatever state they are in. `closed` is what no device may ever reach, the MLE region, whose top is `area`, among it.
    ///
    /// # Errors
    /// Some IOMMU is not known to deny.
    pub fn take<P: Platform<Window = W> + vt_d::WriteBack>(
        platform: &P,
        listed: Listed<'_>,
        area: DmaArea,
        closed: &[PhysRange],
    ) -> Result<Self, Error> {
        Ok(match listed {
            Listed::Ivrs(table, count) => {
                Self::AmdVi(AmdVi::take_over(platform, table, area, closed, count)?)
            }
            Listed::Dmar(table, protection) => {
                Self::VtD(vt_d::deny_all(platform, table, area, closed, protection)?)
            }
        })
    }

    /// Takes them again, after another launch has set them to deny all DMA by its own tables: from whatever state they are in.
    ///
    /// # Errors
    /// Some IOMMU is not known to deny.
    pub fn take_again<P: Platform<Window = W> + vt_d::WriteBack>(
        platform: &P,
        listed: Listed<'_>,
        area: DmaArea,
        closed: &[PhysRange],
    ) -> Result<Self, Error> {
        match listed {
            Listed::Ivrs(table, _) => Ok(Self::AmdVi(amd_vi::deny_all(platform, table, area, closed)?)),
            Listed::Dmar(..) => Self::take(platform, listed, area, closed),
        }
    }

    /// IOMMUs handled.
    pub fn count(&self) -> usize {
        match self {
            Self::AmdVi(all) => all.count(),
            Self::VtD(all) => all.count(),
        }
    }

    /// Those that did not protect memory while they did not translate: devices could write everywhere.
    pub fn unguarded(&self) -> usize {
        match self {
            Self::AmdVi(_) => 0,
            Self::VtD(all) => all.unguarded(),
        }
    }

    /// Register windows of all: the guest must not reach them.
    pub fn windows(&self) -> impl Iterator<Item = PhysRange> + '_ {
        let (amd, intel) = match self {
            Self::AmdVi(all) => (Some(all), None),
            Self::VtD(all) => (None, Some(all)),
        };
        let amd = amd.into_iter().flat_map(AmdVi::windows);
        amd.chain(intel.into_iter().flat_map(VtD::windows))
    }

    /// Empty tables for [`Self::open_guest`], for memory below `end`.
    ///
    /// # Errors
    /// No depth that all IOMMUs walk reaches so far, or there is no page left.
    pub fn new_tables<T: TablePool>(&self, end: u64, pool: &mut T) -> Result<Tables, Error> {
        let bits = u64::BITS.saturating_sub(end.saturating_sub(1).leading_zeros());
        Ok(match self {
            Self::AmdVi(_) => Tables::new(&AMD_VI, 4, PageSize::Size2M, pool)?,
            Self::VtD(all) => all.new_tables(bits, pool)?,
        })
    }

    /// Writes a table that lists one unit with its registers at `base`, which the guest may be shown as one that remaps
    /// interrupts ([`super::shown`]). Gives the bytes used; `None` where there is no such unit to be shown.
    pub fn write_shown(&self, listed: Listed<'_>, base: u64, out: &mut [u8]) -> Option<usize> {
        match (self, listed) {
            (Self::VtD(all), Listed::Dmar(table, _)) if all.common().interrupts => {
                Dmar::new(table).ok()?.write_single(base, out)
            }
            _ => None,
        }
    }

    /// Gives all devices the memory that `tables` map; all pages of `tables` lie in `pages`.
    ///
    /// # Errors
    /// DMA may then be open in some IOMMUs and blocked in others, but never reaches beyond `tables`.
    pub fn open_guest<P: Platform<Window = W> + vt_d::WriteBack, T: TablePool>(
        &mut self,
        platform: &P,
        (tables, pool): (&Tables, &T),
        pages: Option<PhysRange>,
        listed: Listed<'_>,
        closed: &[PhysRange],
    ) -> Result<Left, Error> {
        match self {
            Self::AmdVi(all) => {
                let Listed::Ivrs(ivrs, _) = listed else { return Err(amd_vi::Error::None.into()) };
                let interrupts =
                    amd_vi::Interrupts::for_machine(&Ivrs::new(ivrs).map_err(amd_vi::Error::from)?);
                all.open_guest(platform, Root { table: tables.root(), levels: 4 }, interrupts)?;
                Ok(match interrupts {
                    amd_vi::Interrupts::Ordinary => Left::Ordinary,
                    amd_vi::Interrupts::Unchecked => Left::Unchecked,
                })
            }
            Self::VtD(all) => {
                if let Some(pages) = pages.filter(|_| !all.common().coherent) {
                    platform.write_back(pages);
                }
                let wanted = match all.common().interrupts {
                    true => vt_d::Interrupts::Compatible,
                    false => vt_d::Interrupts::Unchecked,
                };
                let mut open = |interrupts| {
                    all.open_guest(platform, tables, pool, closed, interrupts).map(|()| interrupts)
                };
                let opened = open(wanted).or_else(|error| match error {
                    vt_d::Error::Lacks { need: Need::Compatible, .. } => open(vt_d::Interrupts::Unchecked),
                    other => Err(other),
                })?;
                Ok(if opened == vt_d::Interrupts::Compatible { Left::Compatible } else { Left::Unchecked })
            }
        }
    }

    /// Compares registers with what was left there: a few reads for each IOMMU.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn verify_registers(&self) -> Result<(), Error> {
        match self {
            Self::AmdVi(all) => Ok(all.verify_registers()?),
            Self::VtD(all) => Ok(all.verify_registers()?),
        }
    }

    /// Compares registers and tables with what was left there.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn verify<P: Platform<Window = W> + vt_d::WriteBack>(&self, platform: &P) -> Result<(), Error> {
        match self {
            Self::AmdVi(all) => Ok(all.verify(platform)?),
            Self::VtD(all) => Ok(all.verify(platform)?),
        }
    }

    /// Compares a part of the tables from `from` on, which is 0 for the first. Gives where the next begins, or `None` when there is
    /// none.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn verify_part<P: Platform<Window = W> + vt_d::WriteBack>(
        &self,
        from: u32,
        platform: &P,
    ) -> Result<Option<u32>, Error> {
        match self {
            Self::AmdVi(all) => Ok(all.verify_part(from, platform)?),
            // Its tables are few.
            Self::VtD(all) => Ok(all.verify(platform).map(|()| None)?),
        }
    }

    /// Takes what was stopped out of the logs.
    ///
    /// # Errors
    /// A log can't be read.
    pub fn drain<P: Platform<Window = W>>(
        &self,
        platform: &P,
        sink: impl FnMut(Fault),
    ) -> Result<Drained, Error> {
        match self {
            Self::AmdVi(all) => Ok(all.drain(platform, sink)?),
            Self::VtD(all) => Ok(all.drain(sink)),
        }
    }
}

#[cfg(test)]
mod tests {
    use hv::radix::{MemoryType, Rights};
    use iommu::fault::Access;
    use iommu::model::vt_d::{Defect, Features, Unit};
    use iommu::model::{Machine, Pages, Table, Window, dmar};

    use super::*;

    const REGION: PhysRange = PhysRange::new(0x4000_0000, 16 << 20).unwrap();
    const GUEST: PhysRange = PhysRange::new(0x20_0000, 4 << 20).unwrap();
    const INTEL: u64 = 0xfed9_0000;
    const AMD: u64 = 0xfeb8_0000;
    const DEVICE: u16 = 0x0310;
    const SMI: [u8; 4] = 0x0200_u32.to_le_bytes();

    fn area() -> DmaArea {
        DmaArea::at_top_of(&REGION).unwrap()
    }

    /// Opens guest memory and checks that devices reach it and nothing else, in whoever's format.
    fn run(machine: &Machine, listed: Listed<'_>) -> (Iommus<Window>, usize, Left) {
        let window = listed.windows().unwrap().next().unwrap();
        let mut iommus = Iommus::take(machine, listed, area(), &[REGION]).unwrap();
        assert_eq!(iommus.count(), 1);
        let unguarded = iommus.unguarded();
        assert!(iommus.windows().all(|w| window.contains(&w)));
        assert!(!machine.dma_write(DEVICE, GUEST.start(), &[1]));

        let from = REGION.start() + (1 << 20);
        // The model does not see what is written before it is written back.
        let mut pool = Pages::new(machine, from, false);
        let tables = iommus.new_tables(1 << 32, &mut pool).unwrap();
        tables.map_identity(&mut pool, GUEST, Rights::READ | Rights::WRITE, MemoryType::WriteBack).unwrap();
        let pages = PhysRange::from_last(from, pool.next - 1);
        let left = iommus.open_guest(machine, (&tables, &pool), pages, listed, &[REGION]).unwrap();
        assert!(machine.dma_write(DEVICE, GUEST.start(), &[1]));
        for address in [REGION.start(), area().range().start(), GUEST.last() + 1, from] {
            assert!(!machine.dma_write(DEVICE, address, &[1]), "{address:#x}");
        }
        let mut faults = vec![];
        iommus.drain(machine, |fault| faults.push(fault)).unwrap();
        assert!(faults.iter().any(|f| f.source == DEVICE.into() && f.access == Access::Write), "{faults:?}");
        iommus.verify_registers().unwrap();
        iommus.verify(machine).unwrap();
        (iommus, unguarded, left)
    }

    fn vt_d(features: Features) -> (Machine, Vec<u8>) {
        let machine = Machine::new();
        machine.add_vt_d(Unit::new(INTEL, 0..=u16::MAX, features));
        (machine, dmar::Table::new(46).unit(1, 0, INTEL, &[]).finish())
    }

    /// As SINIT leaves the unit: memory up to 2 GiB protected.
    fn protect(machine: &Machine) {
        machine.with_vt_d(0, |unit| {
            unit.registers.extend([(0x68, 0), (0x6c, 0x7fe0_0000), (0x64, 1 << 31 | 1)])
        });
    }

    #[test]
    fn the_guests_devices_have_its_memory_and_no_more() {
        let machine = Machine::new();
        machine.add_unit(2, AMD, 0..=u16::MAX, true);
        let ivrs = Table::new().unit(0x10, 2, AMD, 0, &[]).finish();
        amd_vi::deny_all(&machine, &ivrs, area(), &[REGION]).unwrap();
        let (_, unguarded, left) = run(&machine, Listed::Ivrs(&ivrs, 1));
        // This IVRS has no I/O APIC, as QEMU's without interrupt remapping.
        assert_eq!((unguarded, left), (0, Left::Unchecked));

        for coherent in [true, false] {
            let (machine, dmar) = vt_d(Features { coherent, ..Features::full() });
            protect(&machine);
            let (_, unguarded, left) = run(&machine, Listed::Dmar(&dmar, Protection::InForce));
            assert_eq!((unguarded, left), (0, Left::Compatible));
            assert!(machine.dma_write(DEVICE, 0xfee0_0000, &SMI), "what is on record as open");
        }
        // A unit that can't have both formats, as QEMU's, and one that can't remap.
        let (machine, dmar) = vt_d(Features::full());
        protect(&machine);
        machine.with_vt_d(0, |unit| unit.defect = Some(Defect::NoCompatible));
        assert_eq!(run(&machine, Listed::Dmar(&dmar, Protection::InForce)).2, Left::Unchecked);
        let (machine, dmar) = vt_d(Features { interrupts: false, ..Features::full() });
        protect(&machine);
        assert_eq!(run(&machine, Listed::Dmar(&dmar, Protection::InForce)).2, Left::Unchecked);
    }

    #[test]
    fn memory_that_sinit_did_not_protect_ends_the_launch() {
        let take = |features, protected, protection| {
            let (machine, dmar) = vt_d(features);
            if protected {
                protect(&machine);
            }
            Iommus::take(&machine, Listed::Dmar(&dmar, protection), area(), &[REGION])
        };
        let none = Features { low_region: false, high_region: false, ..Features::full() };
        for (features, protected, protection, right) in [
            (Features::full(), true, Protection::InForce, true),
            (Features::full(), false, Protection::InForce, false),
            (none, false, Protection::InForce, false),
            (Features::full(), true, Protection::InForceIfAny, true),
            // What is allowed is that they are absent, not that they are off.
            (Features::full(), false, Protection::InForceIfAny, false),
            (none, false, Protection::InForceIfAny, true),
        ] {
            match take(features, protected, protection) {
                Ok(iommus) => {
                    assert!(right, "{protection:?}");
                    assert_eq!(iommus.unguarded(), usize::from(!protected));
                }
                Err(error) => {
                    assert!(!right, "{protection:?}: {error}");
                    assert!(matches!(error, Error::VtD(vt_d::Error::Uncovered { .. })), "{error}");
                }
            }
        }
    }

    #[test]
    fn what_smm_changes_is_noticed() {
        let (machine, dmar) = vt_d(Features::full());
        protect(&machine);
        let (iommus, ..) = run(&machine, Listed::Dmar(&dmar, Protection::InForce));
        machine.with_vt_d(0, |unit| unit.status &= !(1 << 31));
        assert!(iommus.verify_registers().is_err());
    }
}
