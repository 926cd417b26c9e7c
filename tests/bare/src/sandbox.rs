//! The sandbox: pieces of code that each try one thing, and end by it.

use core::arch::global_asm;

use firmware::memmap::{MemoryMap, MemoryType};
use firmware::service::Service;
use heapless::Vec;
use hv::addr::FOUR_GIB;
use hv::io::{Mmio, Msr, PortIo};
use hv::radix::{PageSize, Tables};
use hv::space::{AddressSpace, View};
use hv::vcpu::{Access, Exit, Role};
use mle::backend::{MsrMap, PortMap, Vcpu, VcpuPage, Vendor, Vm};
use mle::cpu::Cpu;
use mle::metal::{Identity, Msrs, PhysWindow, Ports, TscClock};
use mle::pool::PagePool;
use mle::trap::WAKE_VECTOR;
use mle::watch::Watch;

/// Its memory.
pub const AREA: u64 = 0x180_0000;
/// Bytes of it.
pub const SIZE: u64 = 0x1_0000;
const STACK: u64 = AREA + 0x8000;
/// Its own page tables.
pub const TABLES: u64 = AREA + 0x9000;
const PIECE: u64 = 16;
/// Code that changes the page behind it, and that page.
const CHANGER: u64 = AREA + 0x3000;
const CHANGED: u64 = AREA + 0x4000;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

unsafe extern "C" {
    static sandbox_start: u8;
    static sandbox_end: u8;
}

macro_rules! pieces {
    ($($($line:literal),+;)*) => {
        global_asm!(
            ".pushsection .rodata.sandbox, \"a\"",
            "sandbox_start:",
            $(".balign 16", $($line,)+)*
            ".balign 16",
            "sandbox_end:",
            ".popsection",
        );
    };
}
pieces! {
    "cpuid";
    "hlt";
    "in al, 0x70";
    "rdmsr";
    "ud2";
    "mov rax, cr4", "or eax, 4", "mov cr4, rax";
    "mov rax, cr3", "mov cr3, rax";
    "mov dr0, rax";
    "mov rax, cr8";
    "vmcall";
    "mov ebx, 0x1100000", "mov [rbx], eax";
    "monitor";
    // Changes what no exit exchanges.
    "mov eax, 0x5555", "mov cr2, rax", "swapgs", "hlt";
    // Ends by an interrupt. Bochs 2.7 looks at IF once more where it changes, and not at an entry.
    "sti", "2: jmp 2b";
    // Has one pending that it does not notice.
    "mov ecx, 100000", "2: loop 2b", "cpuid";
}

/// Runs each piece; gives how it ended. Says also whether the guest's registers came through.
pub fn run(
    vendor: Vendor,
    space: &AddressSpace,
    pool: &mut PagePool,
    cpu: &mut Cpu,
    msrs: &Msrs,
    local: &PhysWindow,
    cr3: u64,
) -> (Vec<Exit, 32>, bool) {
    let (start, end) = (&raw const sandbox_start, &raw const sandbox_end);
    let len = (end as usize).wrapping_sub(start as usize);
    // SAFETY: code of this image, to the sandbox's memory.
    unsafe { core::ptr::copy_nonoverlapping(start, AREA as *mut u8, len) };
    let nested = Tables::new(vendor.nested_format(), 4, PageSize::Size2M, pool).unwrap();
    space.map_view(View::Sandbox, &nested, pool).unwrap();
    let mut msr_map = MsrMap::new(vendor, pool).unwrap();
    msr_map.close();
    let ports: &mut PortMap = pool.object().unwrap();
    ports.close();
    let vm = Vm {
        vendor,
        msrs: msr_map.address(),
        ports: &raw const *ports as u64,
        nested_root: nested.root(),
        tag: 2,
    };
    // SAFETY: a fresh page.
    let mut vcpu = unsafe { Vcpu::new(VcpuPage::new(pool).unwrap(), Role::Sandbox, &vm) };
    let entries: Vec<u64, 32> = (AREA..AREA + len as u64).step_by(PIECE as usize).collect();
    let last_two = entries.len() - 2;
    let mut ends = Vec::new();
    const MARK: u64 = 0x1234_5000;
    msrs.wrmsr(KERNEL_GS_BASE, MARK);
    for (index, entry) in entries.into_iter().enumerate() {
        if index >= last_two {
            start_timer(local);
        }
        vcpu.start_long_mode(entry, STACK, cr3, (0, 0));
        ends.push(cpu.run_sandbox(&mut vcpu, index <= last_two)).unwrap();
        cpu.take_interrupts();
    }
    let cr2: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
    (ends, msrs.rdmsr(KERNEL_GS_BASE) == MARK && cr2 != 0x5555)
}

/// Firmware that changes its code: writes to a page of it, and runs that. Gives the accesses that the watch answered; the end
/// must be the changed page's.
pub fn change_code(
    vendor: Vendor,
    space: &AddressSpace,
    pool: &mut PagePool,
    cpu: &mut Cpu,
    cr3: u64,
) -> (Vec<Access, 8>, Exit) {
    static WATCH: spin::Mutex<Watch> = spin::Mutex::new(Watch::EMPTY);
    const VERSION: u32 = 1;
    const DESCRIPTOR: u32 = 40;
    // mov dword ptr [CHANGED], nop; cpuid; nop. mov eax, CHANGED; jmp rax.
    let [a, b, c, d] = (CHANGED as u32).to_le_bytes();
    let code = [0xc7, 4, 0x25, a, b, c, d, 0x90, 0x0f, 0xa2, 0x90, 0xb8, a, b, c, d, 0xff, 0xe0];
    // SAFETY: the sandbox's memory.
    unsafe { (CHANGER as *mut [u8; 18]).write(code) };
    let nested = Tables::new(vendor.nested_format(), 4, PageSize::Size2M, pool).unwrap();
    space.map_view(View::Sandbox, &nested, pool).unwrap();
    let mut descriptor = [0u8; DESCRIPTOR as usize];
    descriptor[..4].copy_from_slice(&MemoryType::RUNTIME_SERVICES_CODE.0.to_le_bytes());
    descriptor[8..16].copy_from_slice(&AREA.to_le_bytes());
    descriptor[24..32].copy_from_slice(&((STACK - AREA) / 0x1000).to_le_bytes());
    let map = MemoryMap::parse(&descriptor, DESCRIPTOR, VERSION).unwrap();
    // SAFETY: all of it is mapped; nothing writes by it.
    let mem = unsafe { Identity::new(FOUR_GIB, (0, FOUR_GIB)) };
    let mut watch = WATCH.lock();
    watch.begin(&map, &nested, None, pool, &mem);
    let mut msr_map = MsrMap::new(vendor, pool).unwrap();
    msr_map.close();
    let ports: &mut PortMap = pool.object().unwrap();
    ports.close();
    let (msrs, ports) = (msr_map.address(), &raw const *ports as u64);
    let vm = Vm { vendor, msrs, ports, nested_root: nested.root(), tag: 3 };
    // SAFETY: a fresh page.
    let mut vcpu = unsafe { Vcpu::new(VcpuPage::new(pool).unwrap(), Role::Sandbox, &vm) };
    vcpu.start_long_mode(CHANGER, STACK, cr3, (0, 0));
    let mut answered = Vec::new();
    loop {
        let exit = cpu.run_sandbox(&mut vcpu, false);
        let Exit::Memory { gpa, access, .. } = exit else { return (answered, exit) };
        let clock = TscClock { khz: 50_000 };
        if !watch.fault(gpa, access, &mem, (0, Service::ALL[0]), &clock) || answered.push(access).is_err() {
            return (answered, exit);
        }
        vcpu.flush_nested();
    }
}

/// Lets the interval timer interrupt the MLE by the BIOS's vector, that of a double fault; gives what was lost.
pub fn lose_interrupt(cpu: &mut Cpu, ports: Ports) -> Option<u8> {
    const MASK: u16 = 0x21;
    ports.out8(MASK, 0xfe);
    let lost = (0..1_000_000).find_map(|_| {
        cpu.take_interrupts();
        cpu.lost_interrupt()
    });
    ports.out8(MASK, 0xff);
    lost
}

/// One interrupt, soon.
fn start_timer(local: &PhysWindow) {
    const SPURIOUS: u32 = 0xf0;
    const TIMER: u32 = 0x320;
    const COUNT: u32 = 0x380;
    const DIVIDE: u32 = 0x3e0;
    local.write32(SPURIOUS, 0x1ff);
    local.write32(DIVIDE, 0xb);
    local.write32(TIMER, WAKE_VECTOR.into());
    local.write32(COUNT, 1000);
}
