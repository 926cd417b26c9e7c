//! The guest: code that tries what exits, and says what it saw in [`Results`].

use core::arch::global_asm;
use core::mem::offset_of;

/// What the guest saw, at a fixed place in its memory.
#[derive(Debug)]
#[repr(C)]
pub struct Results {
    /// CPUID leaf 1, ECX.
    pub cpuid: u32,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u32,
    /// #UD, #GP and NMIs that were handled.
    pub undefined: u32,
    pub protection: u32,
    pub nmis: u32,
    /// CR0 and CR4 as read.
    pub cr0: u32,
    pub cr4: u32,
    /// XCR0.
    pub xcr0: u32,
    /// What the hypercall gave.
    pub answer: u32,
}

/// Where things of the guest are.
pub const RESULTS: u64 = 0x110_0000;
pub const IDT: u64 = 0x110_1000;
pub const GDT: u64 = 0x110_2000;
pub const CODE: u64 = 0x120_0000;
pub const STACK: u64 = 0x130_0000;
/// Page of the other CPUs' code; they count at its offset 800h.
pub const AP_PAGE: u64 = 0x8_0000 + 0x1_2000;
pub const AP_COUNT: u64 = AP_PAGE + 0x800;
/// Memory of the MLE.
pub const HOLE: u64 = 0x20_0000;
/// EAX of its hypercalls.
pub const CALL: u32 = 0x1234;
pub const END: u32 = 0x9999;
pub const ANSWER: u32 = 0x4242;

unsafe extern "C" {
    pub static guest_start: u8;
    pub static guest_end: u8;
    pub static guest_ud: u8;
    pub static guest_gp: u8;
    pub static guest_nmi: u8;
    pub static guest_ap: u8;
    pub static guest_ap_end: u8;
}

// RBX holds the results, R15 the address after an instruction that faults.
global_asm!(
    ".pushsection .rodata.guest, \"a\"",
    "guest_start:",
    "mov word ptr [rsp - 16], 511",
    "mov dword ptr [rsp - 14], {idt}",
    "mov dword ptr [rsp - 10], 0",
    "lidt [rsp - 16]",
    "mov ebx, {results}",
    "mov eax, 1",
    "xor ecx, ecx",
    "push rbx",
    "cpuid",
    "pop rbx",
    "mov [rbx + {cpuid}], ecx",
    "mov r14d, ecx",
    "mov ecx, 0x3a",
    "rdmsr",
    "mov [rbx + {feature_control}], eax",
    // Registers and bits that are not there: #GP.
    "mov ecx, 0x480",
    "lea r15, [rip + 2f]",
    "rdmsr",
    "2: mov rax, cr4",
    "or eax, 0x2000",
    "lea r15, [rip + 2f]",
    "mov cr4, rax",
    "2: mov rax, cr4",
    "mov [rbx + {cr4}], eax",
    // Instructions that are not there: #UD.
    "lea r15, [rip + 2f]",
    "vmxon [rbx]",
    "2: lea r15, [rip + 2f]",
    "vmptrst [rbx]",
    "2: lea r15, [rip + 2f]",
    "getsec",
    // CR0.NE is the guest's as far as it can see.
    "2: mov rax, cr0",
    "and eax, ~0x20",
    "mov cr0, rax",
    "mov rax, cr0",
    "mov [rbx + {cr0}], eax",
    "or eax, 0x20",
    "mov cr0, rax",
    // A guarded port, memory of the MLE, the hypercall.
    "mov al, 0x17",
    "out 0xb2, al",
    "mov ecx, {hole}",
    "lea r15, [rip + 2f]",
    "mov [rcx], eax",
    "2: mov eax, {call}",
    "vmcall",
    "mov [rbx + {answer}], eax",
    // XSETBV where there is XSAVE: a valid value, and one that is not.
    "test r14d, 1 << 26",
    "jz 3f",
    "mov rax, cr4",
    "or eax, 1 << 18",
    "mov cr4, rax",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov eax, 3",
    "xsetbv",
    "lea r15, [rip + 2f]",
    "mov eax, 4",
    "xsetbv",
    "2: xor ecx, ecx",
    "xgetbv",
    "mov [rbx + {xcr0}], eax",
    // An NMI to itself.
    "3: mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0x310], 0",
    "mov dword ptr [rdi + 0x300], 0x4400",
    "2: pause",
    "cmp dword ptr [rbx + {nmis}], 0",
    "je 2b",
    // A Startup IPI to all others, which wait for one; INIT, and another. Bochs 2.7 keeps an INIT pending that a guest's exit
    // has taken: the CPU exits again and again after that.
    "mov r13d, {ap_count}",
    "mov dword ptr [rdi + 0x300], 0xc4600 + ({ap_page} >> 12)",
    "mov ecx, 100000",
    "2: cmp dword ptr [r13], 1",
    "je 3f",
    "pause",
    "loop 2b",
    "3: mov dword ptr [rdi + 0x300], 0xc4500",
    "mov ecx, 10000",
    "2: pause",
    "loop 2b",
    "mov dword ptr [rdi + 0x300], 0xc4600 + ({ap_page} >> 12)",
    "mov ecx, 10000",
    "2: pause",
    "loop 2b",
    "mov eax, {end}",
    "vmcall",
    "ud2",
    "guest_ud: inc dword ptr [rbx + {undefined}]",
    "mov [rsp], r15",
    "iretq",
    "guest_gp: inc dword ptr [rbx + {protection}]",
    "add rsp, 8",
    "mov [rsp], r15",
    "iretq",
    "guest_nmi: inc dword ptr [rbx + {nmis}]",
    "iretq",
    "guest_end:",
    // The other CPUs': real mode, a write of CR0.NE, a count.
    ".code16",
    "guest_ap:",
    "mov ax, cs",
    "mov ds, ax",
    "mov eax, cr0",
    "or al, 0x20",
    "mov cr0, eax",
    "inc dword ptr [0x800]",
    "2: hlt",
    "jmp 2b",
    "guest_ap_end:",
    ".code64",
    ".popsection",
    results = const RESULTS,
    idt = const IDT,
    hole = const HOLE,
    call = const CALL,
    end = const END,
    ap_page = const AP_PAGE,
    ap_count = const AP_COUNT,
    cpuid = const offset_of!(Results, cpuid),
    feature_control = const offset_of!(Results, feature_control),
    undefined = const offset_of!(Results, undefined),
    protection = const offset_of!(Results, protection),
    nmis = const offset_of!(Results, nmis),
    cr0 = const offset_of!(Results, cr0),
    cr4 = const offset_of!(Results, cr4),
    xcr0 = const offset_of!(Results, xcr0),
    answer = const offset_of!(Results, answer),
);
