//! The CPUs: what of the machine the guest has on each, and the start of those that wait.
//!
//! UNSAFETY: takes the APIC page.
#![expect(unsafe_code, reason = "the hardware edge")]

use firmware::config::Config;
use firmware::policy::Policy;
use heapless::Vec;
use hv::addr::PAGE_SIZE;
use hv::space::AddressSpace;

use super::{Ground, GuestMemory, LaunchError};
use crate::apic::{XAPIC_BASE, Xapic};
use crate::backend::{MsrMap, PortMap, Vm};
use crate::cpu::{Cpu, CpuMemory};
use crate::guest::windows::{View, Windows};
use crate::guest::{self, pci};
use crate::memory::RegisterPages;
use crate::metal::PhysWindow;
use crate::smp::{self, Setup};
use crate::{senter, smi};

/// What the guest has of the CPUs.
pub struct Cpus {
    /// How many there are.
    pub count: usize,
    /// What all of them share.
    pub vm: Vm,
    /// The same with the first CPU's nested root.
    pub bsp: Vm,
    /// The first CPU's view of registers.
    pub windows: Windows,
    /// The running CPU's local APIC.
    pub local: Xapic<PhysWindow>,
    /// From where to where the permission maps lie.
    pub maps: (u64, u64),
    /// The FADT's SMI command port, where it is another than B2h; or what it has that is none.
    pub smi_command: Result<Option<u16>, u32>,
}

impl Cpus {
    /// Makes the permission maps, and starts the other CPUs, which wait.
    ///
    /// # Errors
    /// The region has no room left, or some CPU does not come.
    #[inline(never)]
    pub fn start(
        ground: &mut Ground<'_>,
        (guest_memory, space): (&GuestMemory, &AddressSpace),
        config: &Config,
        acpi: &firmware::acpi::Tables,
        cpu: &Cpu,
    ) -> Result<Self, LaunchError<'static>> {
        let Ground { inputs, pool, features, own, machine, .. } = ground;
        let (mem, ports, clock) = (machine.mem, machine.ports, machine.clock);
        let maps_from = pool.mark();
        let mut msr_map =
            MsrMap::new(features.vendor, pool).ok_or(LaunchError::OutOfMemory("the MSR map"))?;
        guest::msr::Guards::of(features.vendor).intercept(|index, what| msr_map.intercept(index, what));
        let port_map: &mut PortMap = pool.object().ok_or(LaunchError::OutOfMemory("the port map"))?;
        let smi_command = firmware::acpi::smi_command(&mem, acpi);
        guest::ports::guard_smi(port_map, smi_command.unwrap_or_default());
        pci::guard(port_map, &ports, guest_memory.config_space.guarded.clone());
        if !cpu.ignores_a20_mask() {
            guest::ports::guard_a20(port_map, &ports);
        }
        if config.policies.any(Policy::Deferred) || senter::launched() {
            guest::ends::guard(port_map, firmware::acpi::end_ports(&mem, acpi));
        }
        let maps = (maps_from, pool.mark());
        smi::set_guest_policy(config.guest_smi);
        let vm = Vm {
            vendor: features.vendor,
            msrs: msr_map.address(),
            ports: &raw const *port_map as u64,
            nested_root: guest_memory.nested.root(),
            tag: 1,
        };
        // SAFETY: the APIC page is mapped uncached.
        let local = Xapic(unsafe { PhysWindow::new(XAPIC_BASE, PAGE_SIZE as u32) });
        if !Xapic::<PhysWindow>::usable(&features.msrs) {
            return Err(LaunchError::Cpu("has its APIC moved, disabled or in x2APIC mode"));
        }
        let registers = RegisterPages::take(space, &guest_memory.nested, pool, guest_memory.unit_shown)?;
        let (root, mut windows) = registers.windows(pool)?;
        if cpu.sees_startup() {
            windows.apic.set(View::Device);
        }
        let count = crate::acpi::count_cpus(&mem, acpi);
        let mut setups = Vec::new();
        for _ in 1..count {
            let (nested_root, windows) = registers.windows(pool)?;
            let memory = CpuMemory::new(pool).ok_or(LaunchError::OutOfMemory("a CPU"))?;
            memory.guard(pool, own)?;
            let setup = Setup { memory, vm: Vm { nested_root, ..vm }, windows, clock, smep: features.smep };
            setups
                .push(setup)
                .map_err(|_| LaunchError::Cpu("has more CPUs beside it than Cordon can start"))?;
        }
        smi::guard(mem, pool.object().ok_or(LaunchError::OutOfMemory("the sums of what is guarded"))?);
        smp::start(setups, inputs.launch_page, own, pool, &local, &clock)?;
        Ok(Self { count, vm, bsp: Vm { nested_root: root, ..vm }, windows, local, maps, smi_command })
    }
}
