//! VT-d: from units in whatever state they were found in to units that let no device through, and on to the guest's
//! own memory.
//!
//! [`deny_all`] closes, [`VtD::open_guest`] gives devices the guest's memory. While translation is off it is the units'
//! protected memory regions that keep devices from the MLE. The reasons for the order of steps are in
//! `docs/adr/0013-vt-d-bring-up.md`, those for what becomes of interrupts in `docs/adr/0012-intel-interrupts.md`.

mod area;
mod defs;
mod error;
mod fault;
mod interrupt;
pub mod shown;
mod unit;

pub use error::{BadTables, Error, Need};
pub use interrupt::{Interrupt, Refused, Sender};

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::Mmio;
use hv::radix::{self, PageSize, TablePool, Tables, VT_D};

use crate::Platform;
pub use crate::area::DmaArea;
use crate::dmar::Dmar;
use crate::fault::{Drained, Fault};
use area::INTERRUPTS;
use defs::{ENTRY_SIZE, Entry, context, entry_of, global};
use unit::{Unit, Wanted, hulls, write, write_entry};

/// Units that can be handled: a machine with more is refused.
pub const MAX_UNITS: usize = 64;
/// Records that one look takes out of a unit: what a device can cost a CPU at once.
const DRAIN_MAX: u32 = 64;
/// Bytes of a table that are written or compared at once.
const BLOCK: usize = 512;
/// Root entries, and context entries of a bus.
const BUS: u64 = 256;
/// Bytes that memory takes and gives as a whole: half an entry.
const WORD: u64 = 8;

/// Memory as units see it that do not snoop the CPU's caches.
pub trait WriteBack {
    /// Writes all cached lines of `range` back to memory (CLFLUSH, and a fence after).
    fn write_back(&self, range: PhysRange);
}

/// What this module needs of the machine.
pub trait Machine: Platform + WriteBack {}
impl<P: Platform + WriteBack> Machine for P {}

/// Who protects memory until our tables are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// It must be protected already (SINIT did it, before anything was measured): a unit that does not is refused.
    InForce,
    /// As [`Self::InForce`], but units without the means (emulators) are put up with: [`VtD::unguarded`] says so.
    InForceIfAny,
    /// We, now; units without the means are refused.
    Set,
    /// We, where units have the means. Without (emulators), devices can write everywhere until translation is on, and
    /// [`VtD::unguarded`] says so.
    IfAny,
}

impl Protection {
    /// Whether a unit that can do this must have its protected regions on.
    const fn needs(self, can: defs::Capabilities) -> bool {
        match self {
            Self::InForce | Self::Set => true,
            Self::InForceIfAny => can.low_region() || can.high_region(),
            Self::IfAny => false,
        }
    }
}

/// What becomes of interrupts that devices of the guest send (ADR 0012).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// Only those that [`VtD::grant`] handed out, in remappable format: the guest must program its devices so.
    Granted,
    /// Those too, and all in compatibility format as they are: any vector and delivery mode, so a device may send NMI,
    /// INIT or SMI. An exposure.
    Compatible,
    /// All, as they are: for units that can't remap. An exposure.
    Unchecked,
}

/// What all units of the machine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Common {
    /// Depths of tables that all walk: bit 0 three levels, 1 four, 2 five.
    depths: u8,
    /// Largest page that all know.
    pub largest: PageSize,
    /// Whether all see the CPU's caches. When not, a [`TablePool`] must write lines back.
    pub coherent: bool,
    /// Whether pages may ask for snooping ([`radix::MemoryType::Coherent`]).
    pub snoop: bool,
    /// Whether all can remap interrupts.
    pub interrupts: bool,
}

/// All VT-d units of the machine, set up by this crate.
pub struct VtD<W> {
    units: [Option<(u16, Unit<W>)>; MAX_UNITS],
    area: DmaArea,
    common: Common,
    /// What is in force.
    state: State,
}

/// What the tables and registers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    /// The guest's second-level table and its levels; `None` denies all.
    guest: Option<(u64, u32)>,
    /// Interrupt remapping and compatibility format, in units that have them.
    global: u32,
}

/// Blocks all DMA and all interrupts of all devices, whatever state the units were found in.
///
/// `dmar` is a private copy of the table, `area` memory that nothing else uses, `closed` what no device may ever reach
/// (the MLE region, which holds `area`): it is protected from the first step on, and no register window may cover it. On
/// `Ok` a root table of zeros is in force in every unit, and the protected regions are still on.
///
/// # Errors
/// [`Error`]: some unit is not known to block, so the launch must end.
pub fn deny_all<P: Machine>(
    platform: &P,
    dmar: &[u8],
    area: DmaArea,
    closed: &[PhysRange],
    protection: Protection,
) -> Result<VtD<P::Window>, Error> {
    let dmar = Dmar::new(dmar)?;
    let mut all = VtD::discover(platform, &dmar, area, closed)?;
    all.protect(platform, &dmar, closed, protection)?;
    all.stop(platform)?;
    all.write_tables(platform)?;
    all.start(platform)?;
    all.verify(platform)?;
    Ok(all)
}

impl<W: Mmio> VtD<W> {
    /// The units as [`deny_all`] left them: found anew, and every register and table entry compared. `count` is the
    /// number that was handed over; the other arguments are those of [`deny_all`].
    ///
    /// # Errors
    /// [`Error`] when anything is not as it was left.
    pub fn take_over<P: Machine<Window = W>>(
        platform: &P,
        dmar: &[u8],
        area: DmaArea,
        closed: &[PhysRange],
        protection: Protection,
        count: u64,
    ) -> Result<Self, Error> {
        let dmar = Dmar::new(dmar)?;
        let mut all = Self::discover(platform, &dmar, area, closed)?;
        if all.count() as u64 != count {
            return Err(Error::Count { found: all.count() as u64, wanted: count });
        }
        for (_, unit) in all.units.iter_mut().flatten() {
            unit.guarded = unit.read_protected();
            if !unit.guarded && protection.needs(unit.can) {
                let range = area.range();
                return Err(Error::Uncovered { base: unit.base, range });
            }
        }
        all.verify(platform)?;
        // Registers that were written by us need not show what they cover. To write them again is safe: all is denied.
        all.protect(platform, &dmar, closed, protection)?;
        all.verify(platform)?;
        Ok(all)
    }

    /// Units handled.
    pub fn count(&self) -> usize {
        self.units().count()
    }

    /// Register windows of all units: the guest must not reach them.
    pub fn windows(&self) -> impl Iterator<Item = PhysRange> + '_ {
        self.units().filter_map(Unit::window_range)
    }

    /// Units whose protected regions are not on.
    pub fn unguarded(&self) -> usize {
        self.units().filter(|unit| !unit.guarded).count()
    }

    /// What all units can do.
    pub fn common(&self) -> Common {
        self.common
    }

    /// Empty second-level tables for [`Self::open_guest`]: of the fewest levels that all units walk and that hold
    /// addresses of `bits` bits, with the largest pages that all know.
    ///
    /// # Errors
    /// [`radix::Error`]: no such depth, or no page.
    pub fn new_tables<T: TablePool>(&self, bits: u32, pool: &mut T) -> Result<Tables, radix::Error> {
        let walks = |levels: &u32| self.common.walks(*levels);
        let holds = |levels: &u32| levels.saturating_mul(9).saturating_add(12) >= bits;
        let levels = (3..=5).filter(walks).find(holds).unwrap_or(0);
        Tables::new(&VT_D, levels, self.common.largest, pool)
    }

    /// Gives all devices the memory that `tables` map, once it is checked that no page leads to anything of `closed` or to
    /// the tables of this module. Then, and only then, the protected regions are turned off.
    ///
    /// # Errors
    /// [`Error`]; DMA may then be open in some units and blocked in others, but never reaches beyond `tables`.
    pub fn open_guest<P: Machine<Window = W>, T: TablePool>(
        &mut self,
        platform: &P,
        tables: &Tables,
        pool: &T,
        closed: &[PhysRange],
        interrupts: Interrupts,
    ) -> Result<(), Error> {
        self.check_tables(tables, pool, closed)?;
        let global = match interrupts {
            Interrupts::Granted => global::INTERRUPTS,
            Interrupts::Compatible => global::INTERRUPTS | global::COMPATIBLE,
            Interrupts::Unchecked => 0,
        };
        if global != 0
            && let Some(unit) = self.units().find(|unit| !unit.can.interrupts())
        {
            return Err(Error::Lacks { base: unit.base, need: Need::Interrupts });
        }
        self.state = State { guest: Some((tables.root(), tables.levels())), global };
        self.write_guest_tables(platform)?;
        self.verify_tables(platform)?;
        let wanted = self.wanted();
        for unit in self.units() {
            unit.set_root(platform, wanted.root)?;
            unit.set_interrupts(platform, wanted.global)?;
        }
        self.verify(platform)?;
        for (_, unit) in self.units.iter_mut().flatten() {
            unit.release(platform)?;
        }
        self.verify(platform)
    }

    /// Blocks all devices again, at the end of the launch: the root table of zeros is still there. Interrupts are blocked
    /// as far as units can.
    ///
    /// # Errors
    /// [`Error`]: some device may still have access.
    pub fn close<P: Machine<Window = W>>(&mut self, platform: &P) -> Result<(), Error> {
        self.state = State { guest: None, global: global::INTERRUPTS };
        let wanted = self.wanted();
        for unit in self.units() {
            unit.set_root(platform, wanted.root)?;
            unit.set_interrupts(platform, wanted.global)?;
        }
        self.verify(platform)
    }

    /// Lets one device send one interrupt, by the index in its message; or takes that back.
    ///
    /// # Errors
    /// [`Error::Vector`]; others when a unit may still use what was there before.
    pub fn grant<P: Machine<Window = W>>(
        &self,
        platform: &P,
        index: u16,
        interrupt: Option<&Interrupt>,
    ) -> Result<(), Error> {
        let new = interrupt.map_or(Ok([0; 2]), Interrupt::entry)?;
        let address = self.area.interrupt_table().wrapping_add(u64::from(index).wrapping_mul(ENTRY_SIZE));
        let mut old = [0; ENTRY_SIZE as usize];
        if !platform.read(address, &mut old) {
            return Err(Error::Memory { address });
        }
        let old = entry_of(old);
        if old == new {
            return Ok(());
        }
        let put = |offset: u64, value: u64| -> Result<(), Error> {
            let at = address.wrapping_add(offset);
            if !platform.write64(at, value) {
                return Err(Error::Memory { address: at });
            }
            self.write_back(platform, address, ENTRY_SIZE);
            Ok(())
        };
        let ([_, old_high], [low, high]) = (old, new);
        // The unit reads both halves at once, when it likes. With one sender all that changes is in the low half, and no
        // message finds the entry absent; elsewhere it is absent until both halves are new.
        if old_high != high {
            put(0, 0)?;
            put(WORD, high)?;
        }
        put(0, low)?;
        self.units().try_for_each(|unit| unit.forget_interrupt(platform, index))
    }

    /// From now on interrupts of compatibility format are blocked, and those of [`Self::grant`] pass: the guest's driver has
    /// programmed its devices so.
    ///
    /// # Errors
    /// [`Error`]: some unit may still let others pass.
    pub fn block_compatible<P: Machine<Window = W>>(&mut self, platform: &P) -> Result<(), Error> {
        self.state.global = global::INTERRUPTS;
        self.units().try_for_each(|unit| unit.set_interrupts(platform, global::INTERRUPTS))?;
        self.verify_registers()
    }

    /// Drops cached translations of the guest: those of `range`, or all. After a change of the guest's page table.
    ///
    /// # Errors
    /// [`Error`]: the old translations may still be in use.
    pub fn flush<P: Machine<Window = W>>(&self, platform: &P, range: Option<PhysRange>) -> Result<(), Error> {
        self.units().try_for_each(|unit| unit.flush(platform, range))
    }

    /// Compares registers and tables with what was left there, e.g. after an SMI.
    ///
    /// # Errors
    /// [`Error`] names the first difference.
    pub fn verify<P: Machine<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        self.verify_registers()?;
        self.verify_tables(platform)
    }

    /// Compares the registers only: a few reads for each unit.
    ///
    /// # Errors
    /// [`Error::Register`] names the first difference.
    pub fn verify_registers(&self) -> Result<(), Error> {
        let wanted = self.wanted();
        self.units().try_for_each(|unit| unit.verify(&wanted))
    }

    /// Takes what was stopped out of the units' records, at most 64 faults of each; one register read for a unit that
    /// stopped nothing. Which faults to tell is the caller's choice. The source's segment is
    /// that of the unit.
    pub fn drain(&self, mut sink: impl FnMut(Fault)) -> Drained {
        let mut total = Drained::default();
        for (segment, unit) in self.units.iter().flatten() {
            total.add(unit.drain(*segment, DRAIN_MAX, &mut sink));
        }
        total
    }

    fn units(&self) -> impl Iterator<Item = &Unit<W>> {
        self.units.iter().flatten().map(|(_, unit)| unit)
    }

    /// Maps every unit of the DMAR, in all segments.
    fn discover<P: Machine<Window = W>>(
        platform: &P,
        dmar: &Dmar<'_>,
        area: DmaArea,
        closed: &[PhysRange],
    ) -> Result<Self, Error> {
        let mut all = Self {
            units: [const { None }; MAX_UNITS],
            area,
            common: Common::all(),
            state: State { guest: None, global: global::INTERRUPTS },
        };
        for (index, listed) in dmar.units().enumerate() {
            let base = listed.base();
            let (queue, status) = (area.queue(index), area.status(index));
            if index >= MAX_UNITS {
                return Err(Error::TooMany);
            }
            let unit = Unit::map(platform, base, listed.size(), queue, status)?;
            let window = unit.window_range().ok_or(Error::Base { base })?;
            let clash = |range: PhysRange| range.overlaps(&window);
            if clash(area.range()) || closed.iter().copied().any(clash) || all.windows().any(clash) {
                return Err(Error::Base { base });
            }
            all.common.restrict(unit.can);
            *all.units.get_mut(index).ok_or(Error::TooMany)? = Some((listed.segment(), unit));
        }
        if all.count() == 0 {
            return Err(Error::None);
        }
        Ok(all)
    }

    /// Step 1: what is closed is protected in every unit, for as long as it does not translate.
    fn protect<P: Machine<Window = W>>(
        &mut self,
        platform: &P,
        dmar: &Dmar<'_>,
        closed: &[PhysRange],
        protection: Protection,
    ) -> Result<(), Error> {
        let hulls = hulls(closed);
        let reserved = dmar.regions().filter_map(|region| region.range());
        for (_, unit) in self.units.iter_mut().flatten() {
            unit.protect(platform, hulls, reserved.clone(), protection)?;
        }
        Ok(())
    }

    /// Step 2: no unit translates, so the protected regions count in all of them.
    fn stop<P: Machine<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        self.units().try_for_each(|unit| unit.stop(platform))
    }

    /// Step 3: tables that say no, written and read back while no device can reach them.
    fn write_tables<P: Machine<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        let zeros = [0; BLOCK];
        for (address, len) in self.zeros() {
            for at in blocks(address, len) {
                write(platform, at, &zeros)?;
            }
            self.write_back(platform, address, len);
        }
        self.verify_tables(platform)
    }

    /// Step 4: those tables in force.
    fn start<P: Machine<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        let wanted = self.wanted();
        self.units().try_for_each(|unit| unit.start(platform, &wanted))
    }

    /// What is zero when all is denied.
    fn zeros(&self) -> [(u64, u64); 2] {
        [
            (self.area.interrupt_table(), INTERRUPTS.wrapping_mul(ENTRY_SIZE)),
            (self.area.deny_root(), PAGE_SIZE),
        ]
    }

    /// The guest's root and context table. All devices of all buses have one context table: what they may is the same.
    fn write_guest_tables<P: Machine<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        let coherent = self.common.coherent;
        for (table, entry) in self.guest_tables().into_iter().flatten() {
            for index in 0..BUS {
                let at = table.wrapping_add(index.wrapping_mul(ENTRY_SIZE));
                write_entry(platform, at, entry, coherent)?;
            }
        }
        Ok(())
    }

    /// The guest's tables, and what each of their entries is; nothing when all is denied.
    fn guest_tables(&self) -> Option<[(u64, Entry); 2]> {
        let (root, levels) = self.state.guest?;
        let (roots, contexts) = (self.area.guest_root(), self.area.guest_context());
        Some([(contexts, context::translated(root, levels)), (roots, context::root(contexts))])
    }

    fn wanted(&self) -> Wanted {
        let root = if self.state.guest.is_some() { self.area.guest_root() } else { self.area.deny_root() };
        Wanted { root, interrupts: self.area.interrupt_table(), global: self.state.global }
    }

    fn write_back<P: Machine<Window = W>>(&self, platform: &P, address: u64, len: u64) {
        if !self.common.coherent
            && let Some(range) = PhysRange::new(address, len)
        {
            platform.write_back(range);
        }
    }

    /// Every page that `tables` map is of a size that units know, and leads to nothing that is closed.
    fn check_tables<T: TablePool>(
        &self,
        tables: &Tables,
        pool: &T,
        closed: &[PhysRange],
    ) -> Result<(), Error> {
        if !core::ptr::eq(tables.format(), &VT_D) {
            return Err(Error::Tables(BadTables::Format));
        }
        if !self.common.walks(tables.levels()) {
            return Err(Error::Tables(BadTables::Levels(tables.levels())));
        }
        for leaf in tables.leaves(pool) {
            let size = leaf.mapping.size;
            if size > self.common.largest {
                return Err(Error::Tables(BadTables::PageSize(leaf.addr)));
            }
            let bad = Error::Tables(BadTables::Closed(leaf.addr));
            let page = PhysRange::new(leaf.mapping.phys, size.bytes()).ok_or(bad)?;
            let shut = |range: PhysRange| range.overlaps(&page);
            if shut(self.area.range()) || closed.iter().copied().any(shut) || self.windows().any(shut) {
                return Err(bad);
            }
        }
        Ok(())
    }

    /// Compares the tables: the root table of zeros, the guest's, and the interrupt table, whose entries are absent or of
    /// a kind that [`Self::grant`] makes.
    fn verify_tables<P: Machine<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        let [interrupts, root] = self.zeros();
        each_entry(platform, interrupts, interrupt::is_harmless)?;
        each_entry(platform, root, |entry| entry == [0; 2])?;
        for (table, wanted) in self.guest_tables().into_iter().flatten() {
            each_entry(platform, (table, PAGE_SIZE), |entry| entry == wanted)?;
        }
        Ok(())
    }
}

impl Common {
    const fn all() -> Self {
        Self { depths: 0b111, largest: PageSize::Size1G, coherent: true, snoop: true, interrupts: true }
    }

    fn restrict(&mut self, can: defs::Capabilities) {
        for levels in 3..=5u32 {
            if !can.walks(levels) {
                self.depths &= !Self::depth(levels);
            }
        }
        self.largest = self.largest.min(can.largest_page());
        self.coherent &= can.coherent();
        self.snoop &= can.snoop();
        self.interrupts &= can.interrupts();
    }

    const fn depth(levels: u32) -> u8 {
        match levels {
            3 => 0b001,
            4 => 0b010,
            5 => 0b100,
            _ => 0,
        }
    }

    /// Whether all units walk tables of so many levels.
    pub const fn walks(&self, levels: u32) -> bool {
        self.depths & Self::depth(levels) != 0
    }
}

/// The addresses of the blocks of a table.
fn blocks(address: u64, len: u64) -> impl Iterator<Item = u64> {
    (0..len).step_by(BLOCK).map(move |offset| address.wrapping_add(offset))
}

/// Reads all entries of a table of `len` bytes and insists that `right` accepts them.
fn each_entry<P: Machine>(
    platform: &P,
    (address, len): (u64, u64),
    right: impl Fn(Entry) -> bool,
) -> Result<(), Error> {
    for at in blocks(address, len) {
        let mut block = [0; BLOCK];
        if !platform.read(at, &mut block) {
            return Err(Error::Memory { address: at });
        }
        for bytes in block.as_chunks::<{ ENTRY_SIZE as usize }>().0 {
            if !right(entry_of(*bytes)) {
                return Err(Error::Tampered { address: at });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod qemu_tests;
#[cfg(test)]
mod tests;
