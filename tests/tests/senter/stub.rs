//! What plays the machine before the MLE's entry, as code that the emulated CPUs run: the chipset's part (where TXT's registers
//! show), SINIT's (its copy of the DMAR, with a reserved region more, where the RSDP is) and SENTER's with the other processors.

use std::arch::global_asm;

use super::memory::KEPT;

/// Where the stub is loaded and entered, by QEMU's multiboot, in flat 32-bit mode.
pub const BASE: u32 = 0x10_0000;
/// Where the other processors start.
const TRAMPOLINE: u32 = 0x8000;

global_asm!(
    ".pushsection .rodata.senter_stub, \"a\"",
    ".code32",
    ".globl senter_stub, senter_stub_parameters, senter_stub_end",
    "senter_stub:",
    ".set head, . - {base}",
    // Multiboot: the addresses of header, code, its end, the end of what is zeroed, the entry.
    "  .long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000)",
    "  .long senter_stub - head, senter_stub - head, senter_stub_end - head, senter_stub_end - head + 0x4000",
    "  .long 2f - head",
    // Patched: see `Parameters`.
    "senter_stub_parameters:",
    "  .long 0, 0, 0, 0, 0, 0",
    // A reserved region (RMRR) for no device in particular, which QEMU's table has none of.
    "  .short 1, 24, 0, 0",
    "  .quad {kept}, {kept} + 0xfff",
    ".set region, senter_stub_parameters - head + 24",
    ".set entry, senter_stub_parameters - head",
    ".set wakeup, senter_stub_parameters - head + 4",
    ".set rsdp_to, senter_stub_parameters - head + 8",
    ".set dmar_to, senter_stub_parameters - head + 12",
    ".set dmar_size_to, senter_stub_parameters - head + 16",
    ".set others, senter_stub_parameters - head + 20",
    ".set trampoline, senter_stub_16 - head",
    ".set trampoline_size, senter_stub_32 - senter_stub_16",
    ".set stack, senter_stub_end - head + 0x4000",
    "2: cli",
    "  mov esp, offset stack",
    // Shared memory with the bench becomes TXT's registers: BAR 2 of the device 1af4:1110.
    "  xor ebx, ebx",
    "3: mov eax, ebx",
    "  shl eax, 8",
    "  or eax, 0x80000000",
    "  call senter_stub_config",
    "  in eax, dx",
    "  cmp eax, 0x11101af4",
    "  je 4f",
    "  inc bl",
    "  jnz 3b",
    "  hlt",
    "4: shl ebx, 8",
    "  or ebx, 0x80000000",
    "  lea eax, [ebx + 0x18]",
    "  call senter_stub_config",
    "  mov eax, 0xfed20000",
    "  out dx, eax",
    "  lea eax, [ebx + 0x1c]",
    "  call senter_stub_config",
    "  xor eax, eax",
    "  out dx, eax",
    "  lea eax, [ebx + 4]",
    "  call senter_stub_config",
    "  mov eax, 2",
    "  out dx, eax",
    // The RSDP, RSDT, DMAR.
    "  mov esi, 0xf0000",
    "5: cmp dword ptr [esi], 0x20445352",
    "  jne 6f",
    "  cmp dword ptr [esi + 4], 0x20525450",
    "  je 7f",
    "6: add esi, 16",
    "  jmp 5b",
    "7: mov edi, [rsdp_to]",
    "  mov [edi], esi",
    "  mov ebx, [esi + 16]",
    "  mov ebp, [ebx + 4]",
    "  add ebp, ebx",
    "  add ebx, 36",
    "8: mov esi, [ebx]",
    "  cmp dword ptr [esi], 0x52414d44",
    "  je 9f",
    "  add ebx, 4",
    "  cmp ebx, ebp",
    "  jb 8b",
    "  hlt",
    "9: mov ecx, [esi + 4]",
    "  mov edi, [dmar_to]",
    "  rep movsb",
    "  mov esi, offset region",
    "  mov ecx, 24",
    "  rep movsb",
    "  mov edi, [dmar_to]",
    "  mov ecx, [edi + 4]",
    "  add ecx, 24",
    "  mov [edi + 4], ecx",
    "  mov ebx, [dmar_size_to]",
    "  mov [ebx], ecx",
    "  mov byte ptr [edi + 9], 0",
    "  xor eax, eax",
    "2: sub al, [edi]",
    "  inc edi",
    "  loop 2b",
    "  mov edi, [dmar_to]",
    "  mov [edi + 9], al",
    // The others, into the loop that waits for the MLE.
    "  cmp dword ptr [others], 0",
    "  je 4f",
    "  mov esi, offset trampoline",
    "  mov edi, {trampoline}",
    "  mov ecx, offset trampoline_size",
    "  rep movsb",
    "  mov eax, 0xfee00300",
    "  mov dword ptr [eax], 0xc4500",
    "  mov ecx, 1000000",
    "2: pause",
    "  loop 2b",
    "  mov dword ptr [eax], 0xc4600 + ({trampoline} >> 12)",
    "  mov ecx, 3000000",
    "3: pause",
    "  loop 3b",
    "4: mov ebx, [entry]",
    "  xor esp, esp",
    "  jmp ebx",
    "senter_stub_config:",
    "  mov dx, 0xcf8",
    "  out dx, eax",
    "  mov dx, 0xcfc",
    "  ret",
    ".code16",
    "senter_stub_16:",
    "  cli",
    "  xor ax, ax",
    "  mov ds, ax",
    "  .byte 0x66, 0x0f, 0x01, 0x16", // LGDT with a 32-bit base, at a 16-bit address
    "  .word {trampoline} + senter_stub_gdtr - senter_stub_16",
    "  mov eax, 1",
    "  mov cr0, eax",
    "  .byte 0x66, 0xea", // far jump to a 16:32 address
    "  .long senter_stub_32 - head",
    "  .word 8",
    "senter_stub_gdt:",
    "  .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff",
    "senter_stub_gdtr:",
    "  .word 23",
    "  .long {trampoline} + senter_stub_gdt - senter_stub_16",
    ".code32",
    "senter_stub_32:",
    "  mov ax, 16",
    "  mov ds, ax",
    "  mov es, ax",
    "  mov ss, ax",
    "  mov ebx, [wakeup]",
    "2: pause",
    "  cmp dword ptr [ebx], 0",
    "  je 2b",
    // The state of the JOIN block.
    "  mov esi, 0xfed20290",
    "  mov esi, [esi]",
    "  mov esp, offset stack - 0x2000",
    "  mov eax, [esi + 4]",
    "  push eax",
    "  mov eax, [esi]",
    "  shl eax, 16",
    "  push eax",
    "  lgdt [esp + 2]",
    "  mov eax, [esi + 8]",
    "  push eax",
    "  mov edx, [esi + 12]",
    "  push edx",
    "  add eax, 8",
    "  mov ds, eax",
    "  mov es, eax",
    "  mov ss, eax",
    "  retf",
    "senter_stub_end:",
    ".code64",
    ".popsection",
    base = const BASE,
    trampoline = const TRAMPOLINE,
    kept = const KEPT,
);

unsafe extern "C" {
    safe static senter_stub: u8;
    safe static senter_stub_parameters: u8;
    safe static senter_stub_end: u8;
}

/// What the stub needs to know; all are addresses.
pub struct Parameters {
    /// Of the MLE's entry point.
    pub entry: u32,
    /// Of the word by which the others are woken.
    pub wakeup: u32,
    /// Where the RSDP's address goes.
    pub rsdp_to: u32,
    /// Where the DMAR goes, and its size.
    pub dmar_to: u32,
    pub dmar_size_to: u32,
    /// Not an address: whether the others are to wait for the MLE.
    pub others: bool,
}

/// The stub, for [`BASE`].
pub fn image(parameters: &Parameters) -> Vec<u8> {
    let offset =
        |label: &'static u8| std::ptr::from_ref(label).addr() - std::ptr::from_ref(&senter_stub).addr();
    // SAFETY: the bytes between two labels of one section of this program.
    let mut bytes =
        unsafe { std::slice::from_raw_parts(&raw const senter_stub, offset(&senter_stub_end)) }.to_vec();
    let p = parameters;
    let words = [p.entry, p.wakeup, p.rsdp_to, p.dmar_to, p.dmar_size_to, p.others.into()];
    let at = offset(&senter_stub_parameters);
    for (to, word) in bytes[at..].as_chunks_mut().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    bytes
}
