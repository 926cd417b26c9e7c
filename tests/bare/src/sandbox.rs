//! The sandbox: pieces of code that each try one thing, and end by it.

use core::arch::global_asm;

use heapless::Vec;
use hv::io::{Mmio, Msr, PortIo};
use hv::radix::{PageSize, Tables};
use hv::space::{AddressSpace, View};
use hv::vcpu::{Exit, Role};
use mle::backend::{MsrMap, PortMap, Vcpu, VcpuPage, Vendor, Vm};
use mle::cpu::Cpu;
use mle::metal::{Msrs, PhysWindow, Ports};
use mle::pool::PagePool;
use mle::trap::WAKE_VECTOR;

/// Its memory.
pub const AREA: u64 = 0x180_0000;
/// Bytes of it.
pub const SIZE: u64 = 0x1_0000;
const STACK: u64 = AREA + 0x8000;
/// Its own page tables.
pub const TABLES: u64 = AREA + 0x9000;
const PIECE: u64 = 16;
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
