//! The host: the MLE's page tables, CPU set-up, back end and run loop, and a report of each exit on port E9h.

use core::fmt::{self, Write};

use heapless::Vec;
use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::radix::{PageSize, Tables};
use hv::space::{AddressSpace, Kind};
use hv::vcpu::{Exit, Role};
use mle::apic::{XAPIC_BASE, Xapic, delivery};
use mle::backend::{MsrMap, PortMap, Vcpu, Vendor, Vm};
use mle::cpu::{CpuMemory, Loaded, native_cpuid};
use mle::guest::exits::{self, Next};
use mle::guest::{msr, ports, windows};
use mle::launch::Image;
use mle::memory::RegisterPages;
use mle::metal::{Msrs, PhysWindow, Ports, TscClock};
use mle::pool::PagePool;
use mle::smp::{self, Setup};
use mle::trap::{self, Frame};
use mle::{paging, run};

use crate::guest::{self, Results};
use crate::{linux, sandbox};

unsafe extern "C" {
    static bare_start: u8;
    static bare_rodata: u8;
    static bare_data: u8;
    static bare_file_end: u8;
    static bare_end: u8;
    static boot_cpus: u8;
    static boot_files: [u32; 2];
}

/// Port E9h.
struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the emulator's console.
            unsafe { x86::io::outb(0xe9, byte) };
        }
        Ok(())
    }
}

macro_rules! say {
    ($($arg:tt)*) => {{
        let _ = writeln!(Console, $($arg)*);
    }};
}

/// Ends the emulator.
fn shutdown() -> ! {
    for byte in *b"Shutdown" {
        // SAFETY: the emulator's own port.
        unsafe { x86::io::outb(0x8900, byte) };
    }
    loop {
        // SAFETY: the end.
        unsafe { x86::halt() }
    }
}

fn fault(frame: &Frame) -> ! {
    say!("fault of the host: {frame:x?}");
    shutdown()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    say!("{info}");
    shutdown()
}

fn range(start: u64, len: u64) -> PhysRange {
    PhysRange::new(start, len).unwrap()
}

/// Called by the boot code.
pub extern "sysv64" fn main() -> ! {
    trap::on_fatal(fault);
    // The BIOS left the old interrupt controller on.
    for port in [0x21, 0xa1] {
        // SAFETY: masks its inputs.
        unsafe { x86::io::outb(port, 0xff) };
    }
    let image = Image {
        start: &raw const bare_start as u64 & !0xfff,
        rodata: &raw const bare_rodata as u64,
        data: &raw const bare_data as u64,
        file_end: &raw const bare_file_end as u64,
        end: &raw const bare_end as u64,
        stack_guard: &raw const crate::boot::STACK as u64,
    };
    let region = range(guest::HOLE, 0xe0_0000);
    // SAFETY: memory that nothing else uses.
    let mut pool = unsafe { PagePool::new(region) };
    let apic = range(XAPIC_BASE, PAGE_SIZE);
    let memory = CpuMemory::new(&mut pool).unwrap();
    let own = paging::build(&mut pool, &image, FOUR_GIB, PageSize::Size2M, &[], &[apic]).unwrap();
    memory.guard(&mut pool, &own).unwrap();
    // SAFETY: bare metal, CPL 0, interrupts off, once.
    let loaded = unsafe { Loaded::new(memory, true) };
    // SAFETY: the tables map the image as it is mapped now, with fewer rights.
    unsafe { paging::activate(own.root(), false) };
    // SAFETY: bare metal.
    let msrs = unsafe { Msrs::new() };
    let vendor = match Vendor::of_cpu(native_cpuid, &msrs, false) {
        Ok(vendor) => vendor,
        Err(refusal) => {
            say!("refused: {refusal}");
            shutdown()
        }
    };
    // SAFETY: the MLE's tables are in force.
    let (mut cpu, page) = match unsafe { loaded.enable(vendor) } {
        Ok(enabled) => enabled,
        Err(refusal) => {
            say!("refused: {refusal}");
            shutdown()
        }
    };
    say!("root operation, nested pages of {:?}", vendor.largest_nested(PageSize::Size1G));

    let mut space = AddressSpace::new(36, region, None).unwrap();
    space.assign(range(0, guest::HOLE), Kind::Ram).unwrap();
    space.assign(range(0x100_0000, sandbox::AREA - 0x100_0000), Kind::Ram).unwrap();
    // SAFETY: words of the boot sector.
    let [kernel, initrd] = unsafe { (&raw const boot_files).read_volatile() };
    if kernel != 0 {
        space.assign(range(sandbox::AREA, 0x2000_0000 - sandbox::AREA), Kind::Ram).unwrap();
    } else {
        space.assign(range(sandbox::AREA, sandbox::SIZE), Kind::FirmwareImage).unwrap();
    }
    let largest = vendor.largest_nested(PageSize::Size1G);
    let nested = Tables::new(vendor.nested_format(), 4, largest, &mut pool).unwrap();
    vendor.map_guest(&space, &nested, &mut pool, &msrs, 36).unwrap();
    let mut msr_map = MsrMap::new(vendor, &mut pool).unwrap();
    msr::Guards::of(vendor).intercept(|index, what| msr_map.intercept(index, what));
    let port_map: &mut PortMap = pool.object().unwrap();
    ports::guard_smi(port_map, None);
    let vm = Vm {
        vendor,
        msrs: msr_map.address(),
        ports: &raw const *port_map as u64,
        nested_root: nested.root(),
        tag: 1,
    };
    let registers = RegisterPages::take(&space, &nested, &mut pool, false).unwrap();
    let (nested_root, mut windows) = registers.windows(&mut pool).unwrap();
    windows.apic.set(windows::View::Device);
    let bsp = Vm { nested_root, ..vm };
    // The CPU's time stamp counts instructions in this emulator.
    let clock = TscClock { khz: 50_000 };
    // SAFETY: mapped uncached.
    let local = Xapic(unsafe { PhysWindow::new(XAPIC_BASE, PAGE_SIZE as u32) });

    let mut setups = Vec::new();
    if cpus() > 1 {
        let (nested_root, windows) = registers.windows(&mut pool).unwrap();
        let memory = CpuMemory::new(&mut pool).unwrap();
        memory.guard(&mut pool, &own).unwrap();
        let setup = Setup { memory, vm: Vm { nested_root, ..vm }, windows, clock, smep: false };
        let _ = setups.push(setup);
    }
    let aps = setups.len();
    // The BIOS left them halted; a launch leaves them in INIT.
    local.send(&clock, 3 << 18 | 1 << 14 | delivery::INIT << 8, 0).unwrap();
    smp::start(setups, range(0x9_0000, 2 * PAGE_SIZE), &own, &mut pool, &local, &clock).unwrap();
    say!("{aps} other CPU(s) wait");

    if kernel != 0 {
        // SAFETY: a page of this CPU's.
        let mut vcpu = unsafe { Vcpu::new(page, Role::Guest, &bsp) };
        let cr3 = paging::open_identity(&mut PoolAt(0x9_8000)).unwrap();
        // SAFETY: memory of the guest's.
        unsafe { linux::load(&mut *vcpu, cr3, 0x9_7000, kernel, initrd) };
        // SAFETY: bare metal.
        let ports = unsafe { Ports::new() };
        loop {
            run::guest(&mut cpu, &mut vcpu, &mut windows, &local, &clock, ports, 0);
        }
    }
    load_guest();
    // SAFETY: a page of this CPU's.
    let mut vcpu = unsafe { Vcpu::new(page, Role::Guest, &bsp) };
    let cr3 = paging::open_identity(&mut PoolAt(0x140_0000)).unwrap();
    vcpu.start_long_mode(guest::CODE, guest::STACK, cr3, (guest::GDT, 31));
    loop {
        let exit = cpu.run(&mut vcpu);
        say!("exit: {exit}");
        match exits::answer(&mut *vcpu, exit, &cpu, |_| None) {
            Next::Resume | Next::Nmi | Next::Refused { .. } => {}
            Next::Port { .. } => ports::finish_port(&mut vcpu, exit),
            Next::Firmware if vcpu.gprs().rax as u32 == guest::CALL => {
                vcpu.gprs_mut().rax = guest::ANSWER.into();
                vcpu.advance(3);
            }
            Next::Firmware => break,
            _ => {
                say!("nobody asked for this: {}", mle::cpu::describe(&vcpu));
                shutdown()
            }
        }
        if let Exit::Unexpected { .. } = exit {
            shutdown();
        }
    }
    // SAFETY: the guest's memory, which it is done with.
    let results = unsafe { (guest::RESULTS as *const Results).read_volatile() };
    // SAFETY: as above.
    let started = unsafe { (guest::AP_COUNT as *const u32).read_volatile() };
    say!("{results:x?}");
    say!("the other CPU started {started} times");
    run::write_counts(&mut Console);
    let own_cr3 = paging::open_identity(&mut PoolAt(sandbox::TABLES)).unwrap();
    let (ends, kept) = sandbox::run(vendor, &space, &mut pool, &mut cpu, &msrs, &local.0, own_cr3);
    for end in ends {
        say!("sandbox: {end}");
    }
    let (answered, end) = sandbox::change_code(vendor, &space, &mut pool, &mut cpu, own_cr3);
    say!("changed code: {answered:?}, {end}");
    // SAFETY: CPL 0 on bare metal.
    let lost = sandbox::lose_interrupt(&mut cpu, unsafe { Ports::new() });
    say!("lost: {lost:?}");
    say!("{}", if kept { "done" } else { "the sandbox changed registers of the guest" });
    shutdown()
}

/// How many CPUs there are, by the bench.
fn cpus() -> u8 {
    // SAFETY: a byte of the boot sector.
    unsafe { (&raw const boot_cpus).read_volatile() }
}

/// Copies the guest's code and makes its tables.
fn load_guest() {
    let copy = |from: *const u8, to: *const u8, at: u64| {
        let len = (to as usize).wrapping_sub(from as usize);
        // SAFETY: code of this image, to memory of the guest's.
        unsafe { core::ptr::copy_nonoverlapping(from, at as *mut u8, len) };
    };
    let start = &raw const guest::guest_start;
    copy(start, &raw const guest::guest_end, guest::CODE);
    copy(&raw const guest::guest_ap, &raw const guest::guest_ap_end, guest::AP_PAGE);
    let at = |place: *const u8| guest::CODE.wrapping_add((place as u64).wrapping_sub(start as u64));
    for (vector, place) in
        [(2, &raw const guest::guest_nmi), (6, &raw const guest::guest_ud), (13, &raw const guest::guest_gp)]
    {
        let address = at(place);
        let gate =
            [address & 0xffff | 0x10 << 16 | 0x8e << 40 | (address >> 16 & 0xffff) << 48, address >> 32];
        // SAFETY: memory of the guest's.
        unsafe { ((guest::IDT + vector * 16) as *mut [u64; 2]).write(gate) };
    }
    // SAFETY: memory of the guest's.
    unsafe { (guest::GDT as *mut [u64; 4]).write([0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]) };
}

/// Pages for the guest's own tables.
struct PoolAt(u64);

impl hv::radix::TablePool for PoolAt {
    fn alloc(&mut self) -> Option<u64> {
        let page = self.0;
        self.0 += PAGE_SIZE;
        // SAFETY: memory of the guest's.
        unsafe { core::ptr::write_bytes(page as *mut u8, 0, PAGE_SIZE as usize) };
        Some(page)
    }
    fn read(&self, table: u64, index: usize) -> u64 {
        // SAFETY: a table that `alloc` gave.
        unsafe { (table as *const u64).add(index).read() }
    }
    fn write(&mut self, table: u64, index: usize, entry: u64) {
        // SAFETY: as above.
        unsafe { (table as *mut u64).add(index).write(entry) }
    }
}
