//! A guest of a few instructions, for what happens to the machine when it ends: it stops a CPU by a triple fault, or turns the machine
//! off.

use std::arch::global_asm;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// The first CPU stops; the others were never started.
    FirstAlone = 0,
    /// The first CPU stops when it has started another, which runs.
    First = 1,
    /// The first CPU starts another, which stops.
    Other = 2,
    /// The first CPU turns the machine off when it has started another, which runs.
    FirstOff = 5,
    /// The first CPU starts another, which turns the machine off.
    OtherOff = 6,
}

/// Boot protocol: the code's offset from where the kernel is loaded, and in the file.
const ENTRY: usize = 0x200;
const CODE_AT: usize = 2 * 512 + ENTRY;
/// Size of the file.
const SIZE: usize = 4096;

global_asm!(
    ".pushsection .rodata.cordon_small_kernel, \"a\"",
    ".set other_size, cordon_small_kernel_nothing - cordon_small_kernel_other",
    "cordon_small_kernel:",
    "  mov ebp, [rip + cordon_small_kernel_course]",
    "  mov ebx, ebp",
    "  and ebx, 3",
    "  jz 3f",
    // 9000h: whether the other CPU runs; 9001h: whether it is to stop; 9002h: by what; 9008h: a table of no interrupts.
    "  mov edx, 0x9000",
    "  xor eax, eax",
    "  mov [rdx], rax",
    "  mov [rdx + 8], rax",
    "  shr ebx",
    "  mov [rdx + 1], bl",
    "  mov eax, ebp",
    "  shr eax, 2",
    "  mov [rdx + 2], al",
    "  mov edi, 0x8000",
    "  lea rsi, [rip + cordon_small_kernel_other]",
    "  mov ecx, offset other_size",
    "  rep movsb",
    // A Startup IPI to APIC 1, for page 8; it waits for one.
    "  mov esi, 0xfee00000",
    "  mov dword ptr [rsi + 0x310], 0x1000000",
    "  mov dword ptr [rsi + 0x300], 0x4608",
    "2: pause",
    "  cmp byte ptr [rdx], 0",
    "  je 2b",
    "  test ebx, ebx",
    "2: jnz 2b",
    "3: test ebp, 4",
    "  jz 4f",
    // PM1 control: SLP_EN, for the kind of sleep that is none to wake from.
    "  mov edx, 0xb004",
    "  mov eax, 0x2000",
    "  out dx, ax",
    "4: lidt [rip + cordon_small_kernel_nothing]",
    "  ud2",
    // The other CPU, in real mode, with addresses of 16 bits that the assembler would not give it. Its CPUID is an exit.
    "cordon_small_kernel_other:",
    "  cpuid",
    "  .byte 0x80, 0x3e, 0x01, 0x90, 0x00", // cmp byte ptr [0x9001], 0
    "  .byte 0xc6, 0x06, 0x00, 0x90, 0x01", // mov byte ptr [0x9000], 1
    "  .byte 0x74, 0xfe",                   // je to itself
    "  .byte 0x80, 0x3e, 0x02, 0x90, 0x00", // cmp byte ptr [0x9002], 0
    "  .byte 0x74, 0x07",                   // je behind the OUT
    "  .byte 0xba, 0x04, 0xb0",             // mov dx, 0xb004
    "  .byte 0xb8, 0x00, 0x20",             // mov ax, 0x2000
    "  .byte 0xef",                         // out dx, ax
    "  .byte 0x0f, 0x01, 0x1e, 0x08, 0x90", // lidt [0x9008]
    "  int3",
    "cordon_small_kernel_nothing:",
    "  .fill 10, 1, 0",
    "cordon_small_kernel_course:",
    "  .long 0",
    "cordon_small_kernel_end:",
    ".popsection",
);

unsafe extern "C" {
    safe static cordon_small_kernel: u8;
    safe static cordon_small_kernel_course: u8;
    safe static cordon_small_kernel_end: u8;
}

/// The file.
///
/// Spec: \[LINUX-BOOT\] "The Real-Mode Kernel Header".
pub fn image(course: Course) -> Vec<u8> {
    let start = &raw const cordon_small_kernel;
    let offset = |label: *const u8| label.addr() - start.addr();
    // SAFETY: the bytes between two labels of one section of this program.
    let code = unsafe { std::slice::from_raw_parts(start, offset(&raw const cordon_small_kernel_end)) };
    let mut file = vec![0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let word = |value: usize| (value as u32).to_le_bytes();
    put(0x1f1, &[1]); //                       setup_sects
    put(0x1f4, &word((SIZE - 2 * 512) / 16)); // syssize
    put(0x1fe, &[0x55, 0xaa]); //              boot_flag
    put(0x200, &[0xeb, 0x66]); //              jump, over the header
    put(0x202, b"HdrS");
    put(0x206, &[0x0f, 0x02]); //              version
    put(0x22c, &word(0xffff_ffff)); //         initrd_addr_max
    put(0x230, &word(0x20_0000)); //           kernel_alignment
    put(0x234, &[1]); //                       relocatable_kernel
    put(0x236, &[1]); //                       xloadflags: XLF_KERNEL_64
    put(0x238, &word(2047)); //                cmdline_size
    put(0x258, &word(0x100_0000)); //          pref_address
    put(0x260, &word(SIZE)); //                init_size
    put(CODE_AT, code);
    put(CODE_AT + offset(&raw const cordon_small_kernel_course), &word(course as usize));
    file
}
