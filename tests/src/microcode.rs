//! What SKINIT does to the CPU beyond its general registers, as code that the emulated CPU runs itself:
//! the gdb stub reaches neither the global interrupt flag nor the hidden parts of segment registers.

use std::arch::global_asm;

use anyhow::{Context, Result};

// Entered in 64-bit mode at CODE, its address anywhere below 4 GiB with identity mapping, nothing written
// while paging is on (the page may be read-only). ESP holds the address of the first byte.
//
// Segments as the architecture leaves them, but for one: DS, ES, FS and GS are real-mode segments there,
// and an access beyond 64 KiB faults. TCG checks no limits; it does honour the base. So theirs is 2 GiB,
// where a machine with up to 2 GiB of RAM has none, and a use before their first load goes wrong here too.
global_asm!(
    ".pushsection .rodata.cordon_microcode, \"a\"",
    "cordon_microcode:",
    "2: .short 31", //                   0: GDT pointer, its base patched
    "   .quad 0",
    "   .balign 8",
    "3: .long 0", //                    16: far pointer to 32-bit code, patched
    "   .short 8",
    "   .balign 8",
    "4: .short 0xffff", //              24: GDTR and IDTR as after INIT
    "   .long 0",
    "   .balign 8",
    "   .quad 0",                  //                    32: GDT
    "   .quad 0x00cf9b000000ffff", //       08h: code, flat, 32 bits
    "   .quad 0x00cf93000000ffff", //       10h: data, flat
    "   .quad 0x800093000000ffff", //       18h: data, base 80000000h, 64 KiB, 16 bits
    ".code64",                     //                       64
    "   mov ecx, 0xc0000080",
    "   rdmsr",
    "   or eax, 0x1000", //                 EFER.SVME: without it TCG knows no CLGI
    "   wrmsr",
    "   clgi",
    "   mov eax, 1",
    "   cpuid",
    "   mov esi, eax", //                   kept for the bench, which puts it into EDX
    "   xor r8d, r8d",
    "   xor r9d, r9d",
    "   xor r10d, r10d",
    "   xor r11d, r11d",
    "   xor r12d, r12d",
    "   xor r13d, r13d",
    "   xor r14d, r14d",
    "   xor r15d, r15d",
    "   lgdt [rip + 2b]",
    "   jmp fword ptr [rip + 3b]",
    ".code32",
    "cordon_microcode_32:",
    "   mov eax, 0x11", //                  CR0: PE, ET
    "   mov cr0, eax",
    "   xor eax, eax",
    "   mov cr3, eax",
    "   mov cr4, eax",
    "   mov ecx, 0xc0000080", //            EFER: all clear
    "   xor edx, edx",
    "   wrmsr",
    "   mov dr7, eax",
    "   lldt ax",
    "   mov eax, 0x10",
    "   mov ss, eax",
    "   mov eax, 0x18",
    "   mov ds, eax",
    "   mov es, eax",
    "   mov fs, eax",
    "   mov gs, eax",
    "   lidt ss:[esp + 24]",
    "   lgdt ss:[esp + 24]",
    "cordon_microcode_end:",
    "   jmp cordon_microcode_end",
    ".code64",
    "cordon_microcode_limit:",
    ".popsection",
);

unsafe extern "C" {
    safe static cordon_microcode: u8;
    safe static cordon_microcode_32: u8;
    safe static cordon_microcode_end: u8;
    safe static cordon_microcode_limit: u8;
}

/// Where the 64-bit code starts.
pub const ENTRY: u64 = 64;
const GDT_POINTER_BASE: usize = 2;
const GDT: u64 = 32;
const FAR_POINTER: usize = 16;

fn offset(label: &'static u8) -> usize {
    std::ptr::from_ref(label).addr() - (&raw const cordon_microcode).addr()
}

/// The microcode to put at `at`, and the offset of its last instruction: there it waits to be stopped.
pub fn assemble(at: u64) -> Result<(Vec<u8>, u64)> {
    let length = offset(&cordon_microcode_limit);
    // SAFETY: the block above places all bytes from the first label to the last one, which `offset`
    // measures, in one read-only section of this program.
    let template = unsafe { std::slice::from_raw_parts(&raw const cordon_microcode, length) };
    let mut code = template.to_vec();
    let far = at + offset(&cordon_microcode_32) as u64;
    let far = u32::try_from(far).context("microcode above 4 GiB")?;
    code[GDT_POINTER_BASE..][..8].copy_from_slice(&(at + GDT).to_le_bytes());
    code[FAR_POINTER..][..4].copy_from_slice(&far.to_le_bytes());
    Ok((code, offset(&cordon_microcode_end) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_patched_in() {
        let (code, end) = assemble(0x9_e100).unwrap();
        assert_eq!(code[..2], [31, 0]);
        assert_eq!(code[2..10], 0x9_e120u64.to_le_bytes());
        let far = u32::from_le_bytes(code[16..20].try_into().unwrap());
        // The target is `mov eax, 11h` in 32-bit code.
        assert_eq!(code[far as usize - 0x9_e100..][..5], [0xb8, 0x11, 0, 0, 0]);
        // The entry is `mov ecx, EFER`, the end a jump to itself.
        assert_eq!(code[ENTRY as usize..][..5], [0xb9, 0x80, 0, 0, 0xc0]);
        assert_eq!(code[end as usize..], [0xeb, 0xfe]);
        assert!(code.len() < 0x200, "{}", code.len());
    }

    #[test]
    fn it_fits_nowhere_above_4_gib() {
        assert!(assemble(1 << 32).is_err());
    }
}
