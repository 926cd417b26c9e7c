//! The firmware's sandbox, put together.
//!
//! UNSAFETY: memory that the launch set aside for the sandbox becomes its page tables.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::fmt;

use firmware::acpi::Ports;
use firmware::call::{CALL_BUFFER_SIZE, Gate};
use firmware::config::{Config, OnDeath};
use firmware::deferred::Overlay;
use firmware::memmap::{MemoryMap, MemoryType, Region};
use firmware::policy::Policy;
use firmware::prm::Handlers;
use firmware::sandbox::{RTC_DATA, SMI_DATA, Sandbox};
use firmware::service::Service;
use firmware::smm::communicate::find_core_private;
use firmware::tables::FirmwareTables;
use heapless::{String, Vec};
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::radix::{self, PageSize, Tables};
use hv::space::{AddressSpace, View};
use hv::vcpu::Role;
use log::{info, warn};
use spin::Mutex;

use crate::backend::{MsrMap, PortMap, Vcpu, VcpuPage, Vm};
use crate::boot::Layout;
use crate::cpu::FpuArea;
use crate::memory::{MemoryError, RegisterPages};
use crate::metal::{Identity, TscClock};
use crate::pool::PagePool;
use crate::services::{self, PRISTINE_MAX, Parts, Runner, STATUS_MAX};
use crate::smi::{self, SmiGate};
use crate::watch::Watch;

/// Its code, watched for changes.
static WATCH: Mutex<Watch> = Mutex::new(Watch::EMPTY);

/// Why there is no sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxError {
    /// Its page tables.
    Tables(radix::Error),
    /// Its view of the guest's memory.
    Memory(MemoryError),
    /// The MLE region has no room for it.
    OutOfMemory {
        /// Bytes wanted.
        bytes: u64,
        /// What for.
        what: &'static str,
    },
    /// More runtime regions than Cordon keeps copies of.
    Regions {
        /// The limit.
        limit: usize,
    },
    /// Runtime memory that cannot be read.
    Unreadable(PhysRange),
}

impl fmt::Display for SandboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tables(e) => write!(f, "sandbox: {e}"),
            Self::Memory(e) => write!(f, "sandbox: {e}"),
            Self::OutOfMemory { bytes, what } => {
                write!(f, "sandbox: the MLE region has no {bytes} bytes left for {what}")
            }
            Self::Regions { limit } => {
                write!(f, "sandbox: more than {limit} runtime regions to keep copies of")
            }
            Self::Unreadable(range) => write!(f, "sandbox: cannot read runtime memory {range}"),
        }
    }
}

impl From<radix::Error> for SandboxError {
    fn from(e: radix::Error) -> Self {
        Self::Tables(e)
    }
}

impl From<MemoryError> for SandboxError {
    fn from(e: MemoryError) -> Self {
        Self::Memory(e)
    }
}

/// Maps what the guest's CPUs reach.
pub type MapGuest<'a> = dyn Fn(&AddressSpace, &Tables, &mut PagePool) -> Result<(), MemoryError> + 'a;

/// What a sandbox is made from.
pub struct Input<'a> {
    /// The guest: the back end, and the ports and registers that firmware has when it runs natively.
    pub guest: Vm,
    /// What the guest reaches of memory.
    pub map_guest: &'a MapGuest<'a>,
    /// The configuration in force.
    pub config: &'a Config,
    /// Where things of the guest and the sandbox lie.
    pub layout: &'a Layout,
    /// The firmware's memory map.
    pub map: &'a MemoryMap,
    /// The firmware's EFI tables.
    pub tables: &'a FirmwareTables,
    /// Its PRM handlers, where the guest may call them.
    pub handlers: Option<Handlers>,
    /// Ports that the FADT names.
    pub acpi: Ports,
    /// Largest page of nested tables.
    pub largest: PageSize,
    /// An address of the MLE's: firmware returns to it.
    pub return_to: u64,
    /// Who may reach what.
    pub space: AddressSpace,
    /// Physical memory.
    pub mem: Identity,
    /// Time.
    pub clock: TscClock,
    /// The DRTM event log's buffer, and bytes of it that are used.
    pub log: (&'static mut [u8], usize),
    /// What is in force, for the guest to read.
    pub status: String<STATUS_MAX>,
}

/// What of a sandbox stays as it is while it runs.
pub struct Constant {
    /// Nested tables, of which [`watch`] changes bits alone.
    pub nested: Tables,
    /// Those of native calls, if there are to be any.
    pub native: Option<Tables>,
    /// From where to where the permission maps lie, but for a word of eight bytes.
    pub maps: [(u64, u64); 2],
    /// That word, and bits of it that stay: the port of the clock's data opens and closes.
    pub clock: (Option<PhysRange>, u64),
}

/// Puts the sandbox together and opens the services.
pub fn set_up(pool: &mut PagePool, input: Input<'_>) -> Result<Constant, SandboxError> {
    let Input { config, layout, map, tables, mem, .. } = input;
    let none = |what, bytes| SandboxError::OutOfMemory { what, bytes };
    let vendor = input.guest.vendor;
    let nested = Tables::new(vendor.nested_format(), 4, input.largest, pool)?;
    input.space.map_view(View::Sandbox, &nested, pool)?;
    let maps_from = pool.mark();
    let mut msrs = MsrMap::new(vendor, pool).ok_or(none("the MSR map", PAGE_SIZE))?;
    msrs.close();
    config.sandbox.msrs.iter().for_each(|&index| msrs.allow_read(index));
    let ports: &'static mut PortMap =
        pool.object().ok_or(none("the port map", size_of::<PortMap>() as u64))?;
    ports.close();
    // EDK2 writes it before each SMI.
    ports.allow(SMI_DATA);
    let (offset, bit) = PortMap::place(RTC_DATA);
    let word = (&raw const *ports as u64).saturating_add(offset);
    let maps = [(maps_from, word), (word.saturating_add(8), pool.mark())];
    let vm = Vm {
        vendor,
        msrs: msrs.address(),
        ports: &raw const *ports as u64,
        nested_root: nested.root(),
        tag: 2,
    };
    let page = VcpuPage::new(pool).ok_or(none("a virtual CPU", PAGE_SIZE))?;
    let native = if config.policies.any(Policy::Native) { Some(native_tables(pool, &input)?) } else { None };
    let native_vcpu = match &native {
        Some(tables) => {
            let page = VcpuPage::new(pool).ok_or(none("a virtual CPU", PAGE_SIZE))?;
            let vm = Vm { nested_root: tables.root(), tag: 3, ..input.guest };
            // SAFETY: a fresh page.
            let vcpu = smi::with_vcpu(page, vendor, || unsafe { Vcpu::new(page, Role::Sandbox, &vm) });
            Some(Runner { vcpu, on: None })
        }
        None => None,
    };
    // SAFETY: a fresh page.
    let vcpu = smi::with_vcpu(page, vendor, || unsafe { Vcpu::new(page, Role::Sandbox, &vm) });
    let (core, runtime) = communication(map, &mem);
    let mut parts = Parts {
        gate: Gate::new(config, layout.thunks, layout.tables),
        state: Sandbox::new(config, input.acpi),
        vcpu: Runner { vcpu, on: None },
        native: native_vcpu,
        entries: Service::TABLE.map(|s| tables.entry(s, map)),
        handlers: input.handlers,
        area: layout.sandbox,
        staging: layout.staging,
        buffer: pool.object().ok_or(none("the call buffer", CALL_BUFFER_SIZE as u64))?,
        fpu: FpuArea::new(pool).ok_or(none("FPU registers", PAGE_SIZE))?,
        return_to: input.return_to,
        space: input.space,
        overlay: pool.object().ok_or(none("writes that wait", size_of::<Overlay>() as u64))?,
        scratch: pool.object().ok_or(none("a call buffer", CALL_BUFFER_SIZE as u64))?,
        watch: &WATCH,
        smi: SmiGate { core, runtime, policy: config.smm.clone() },
        pristine: Vec::new(),
        unlock_pcr: config.unlock_pcr,
        mem,
        clock: input.clock,
        log: input.log.0,
        log_used: input.log.1,
        status: input.status,
        ports,
        relaunched: None,
    };
    // SAFETY: the area was chosen for the sandbox and is nobody else's; its first pages are for these tables.
    let (root, own_tables) = services::own_tables(&layout.sandbox, |area| unsafe { PagePool::new(area) })?;
    if config.sandbox.on_death == OnDeath::Restart {
        let firmware = map.runtime().filter(|r| is_ram(r)).map(|r| r.range);
        for range in firmware.chain([own_tables]) {
            let room = none("a copy of firmware memory", range.len());
            let copy = usize::try_from(range.len()).ok().and_then(|len| pool.bytes(len)).ok_or(room)?;
            if !mem.read(range.start(), copy) {
                return Err(SandboxError::Unreadable(range));
            }
            let room = parts.pristine.push((range, copy));
            room.map_err(|_| SandboxError::Regions { limit: PRISTINE_MAX })?;
        }
    }
    let mut watch = WATCH.lock();
    watch.begin(map, &nested, native.as_ref(), pool, &mem);
    if watch.unwatched != 0 {
        warn!("{} bytes of runtime code are not watched for changes", watch.unwatched);
    }
    drop(watch);
    services::open(parts, root);
    Ok(Constant { nested, native, maps, clock: (PhysRange::new(word, 8), !bit) })
}

/// Nested tables of native calls: all that the sandbox reaches and all that the guest does, and so nothing of the MLE's (I1).
/// The APIC page is left out, where a Startup IPI would start a parked CPU past the MLE.
fn native_tables(pool: &mut PagePool, input: &Input<'_>) -> Result<Tables, SandboxError> {
    let tables = Tables::new(input.guest.vendor.nested_format(), 4, input.largest, pool)?;
    // First, so that the watched pages are mapped by leaves like the sandbox's.
    input.space.map_view(View::Sandbox, &tables, pool)?;
    (input.map_guest)(&input.space, &tables, pool)?;
    tables.unmap(pool, RegisterPages::APIC)?;
    Ok(tables)
}

/// Runtime memory, not a window of a device.
fn is_ram(region: &Region) -> bool {
    !matches!(region.ty, MemoryType::MMIO | MemoryType::MMIO_PORT_SPACE)
}

/// Where firmware keeps its requests of SMM, and where they may lie.
fn communication(
    map: &MemoryMap,
    mem: &Identity,
) -> (Option<firmware::smm::communicate::CorePrivate>, Vec<PhysRange, PRISTINE_MAX>) {
    let ram = || map.runtime().filter(|r| is_ram(r));
    // Regions that find no room hold no request: they are refused. The structure is static data of an image, which the
    // memory map calls code.
    let all: Vec<_, PRISTINE_MAX> = ram().map(|r| r.range).take(PRISTINE_MAX).collect();
    let data = ram().filter(|r| r.ty == MemoryType::RUNTIME_SERVICES_DATA);
    let runtime = data.map(|r| r.range).take(PRISTINE_MAX).collect();
    let core = find_core_private(mem, &all).unwrap_or_else(|error| {
        warn!("requests of firmware to SMM cannot be told apart: {error}");
        None
    });
    info!(
        "requests of firmware to SMM: {}",
        if core.is_some() { "found by their structure" } else { "none known" }
    );
    (core, runtime)
}
