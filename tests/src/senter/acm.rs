//! A SINIT module of the bench's own: a header and an information table as real ones have them, no valid signature, and the code
//! that the emulated CPUs run in SINIT's place. Whatever a real module decides is decided in [`super::sinit`]; the code brings
//! the CPUs into the state that SINIT leaves, and holds the other CPUs until the MLE wakes them.
//!
//! Spec: \[TXT\] "Authenticated Code Module", "MLE Initialization State".

use std::arch::global_asm;

use sha2::{Digest, Sha256};

use super::layout::{CHIPSET, MLE_JOIN, PRIVATE};

// Entered in 64-bit mode, at page 1 of the module, identity mapped, all memory writable; parameters in page 2.
// Nothing here uses a stack.
global_asm!(
    ".pushsection .rodata.cordon_sinit, \"a\"",
    ".set sinit_gdt, cordon_sinit_gdt - cordon_sinit",
    ".set sinit_gdtr, cordon_sinit_gdtr - cordon_sinit",
    ".set sinit_gdtr_base, sinit_gdtr + 2",
    ".set sinit_32, cordon_sinit_32 - cordon_sinit",
    ".set sinit_far, cordon_sinit_far - cordon_sinit",
    ".set start_gdtr, cordon_sinit_start_gdtr - cordon_sinit_start",
    ".set start_far, cordon_sinit_start_far - cordon_sinit_start",
    ".set start_base, cordon_sinit_start_base - cordon_sinit_start",
    "cordon_sinit:",
    ".code64",
    "   cli",
    "   cld",
    "   lea rdi, [rip + cordon_sinit]", //            page 1; parameters are 1000h further
    "   lea eax, [rdi + sinit_gdt]",
    "   mov [rdi + sinit_gdtr_base], rax",
    "   lea eax, [rdi + sinit_32]",
    "   mov [rdi + sinit_far], eax",
    "   lgdt [rdi + sinit_gdtr]",
    "   jmp fword ptr [rdi + sinit_far]",
    ".code32",
    "cordon_sinit_32:",
    "   mov eax, 0x10",
    "   mov ds, eax",
    "   mov eax, 0x31", //                            CR0: PE, ET, NE
    "   mov cr0, eax",
    "   xor eax, eax",
    "   mov cr3, eax",
    "   mov eax, [edi + 0x1000]", //                  CR4: SMXE, where the emulator has it
    "   mov cr4, eax",
    "   mov ecx, 0xc0000080", //                      EFER
    "   xor eax, eax",
    "   xor edx, edx",
    "   wrmsr",
    "   lldt ax",
    "   mov eax, 0x400",
    "   mov dr7, eax",
    // The other CPUs, by INIT and Startup IPI to all of them: they come to `cordon_sinit_rlp`.
    "   cmp dword ptr [edi + 0x1004], 0", //          how many
    "   je 3f",
    "   mov dword ptr ds:[0xfee00300], 0xc4500",
    "   mov ecx, 0x10000",
    "2: pause",
    "   loop 2b",
    "   mov eax, [edi + 0x1008]", //                  page of the start-up code
    "   or eax, 0xc4600",
    "   mov ds:[0xfee00300], eax",
    "3: mov eax, [edi + 0x100c]", //                  how many have come
    "   cmp eax, [edi + 0x1004]",
    "   jne 3b",
    // What the specification leaves undefined is of no use: segments without bytes, registers with junk.
    "   mov eax, 0x18",
    "   mov es, eax",
    "   mov ss, eax",
    "   mov fs, eax",
    "   mov gs, eax",
    "   mov ebx, [edi + 0x1010]", //                  entry point of the MLE
    "   mov ecx, [edi + 0x1014]", //                  its page tables
    "   mov eax, 0xdead0001",
    "   mov edx, 0xdead0002",
    "   mov esi, 0xdead0003",
    "   mov edi, 0xdead0004",
    "   mov esp, 0xdead0005",
    "   mov ebp, 0xdead0006",
    "   jmp ebx",
    // Flat, and held until the MLE writes to RlpWakeupAddr.
    "cordon_sinit_rlp:",
    "   mov eax, 0x10",
    "   mov ds, eax",
    "   mov eax, 0x31",
    "   mov cr0, eax",
    "   mov eax, [edi + 0x1000]",
    "   mov cr4, eax",
    "   lock inc dword ptr [edi + 0x100c]",
    "4: pause",
    "   cmp dword ptr [edi + 0x1018], 0", //          RlpWakeupAddr
    "   je 4b",
    "   cmp dword ptr [edi + 0x101c], 0", //          a CPU that never joins
    "   jne 4b",
    "   mov esi, ds:[{join}]",
    // Several CPUs write the same here.
    "   mov eax, [esi]",
    "   mov [edi + 0x1020], ax",
    "   mov eax, [esi + 4]",
    "   mov [edi + 0x1022], eax",
    "   mov ecx, [esi + 8]",
    "   mov [edi + 0x102c], cx",
    "   mov eax, [esi + 12]",
    "   mov [edi + 0x1028], eax",
    "   lgdt [edi + 0x1020]",
    "   xor eax, eax",
    "   mov fs, eax",
    "   mov gs, eax",
    "   add ecx, 8",
    "   mov es, ecx",
    "   mov ss, ecx",
    "   mov ds, ecx",
    "   jmp fword ptr [edi + 0x1028]",
    // Copied to a page below 1 MiB, whose paragraph is in CS; the two words at its end are the bench's.
    ".code16",
    "cordon_sinit_start:",
    "   cli",
    "   .byte 0x66", //                               the base has 32 bits
    "   lgdt cs:[start_gdtr]",
    "   mov edi, cs:[start_base]",
    "   mov eax, 0x31",
    "   mov cr0, eax",
    "   jmp fword ptr cs:[start_far]",
    "   .balign 8",
    "cordon_sinit_start_gdtr:",
    "   .short 31",
    "   .long 0",
    "cordon_sinit_start_far:",
    "   .long 0",
    "   .short 8",
    "cordon_sinit_start_base:",
    "   .long 0",
    "cordon_sinit_start_end:",
    ".code32",
    "   .balign 8",
    "cordon_sinit_gdt:",
    "   .quad 0",
    "   .quad 0x00cf9b000000ffff", //                 08h: code, flat
    "   .quad 0x00cf93000000ffff", //                 10h: data, flat
    "   .quad 0x8000930000000000", //                 18h: data, base 2 GiB, one byte
    "cordon_sinit_gdtr:",
    "   .short 31",
    "   .quad 0",
    "cordon_sinit_far:",
    "   .long 0",
    "   .short 8",
    "cordon_sinit_end:",
    ".code64",
    ".popsection",
    join = const PRIVATE + MLE_JOIN,
);

unsafe extern "C" {
    safe static cordon_sinit: u8;
    safe static cordon_sinit_rlp: u8;
    safe static cordon_sinit_gdt: u8;
    safe static cordon_sinit_start: u8;
    safe static cordon_sinit_start_gdtr: u8;
    safe static cordon_sinit_start_far: u8;
    safe static cordon_sinit_start_base: u8;
    safe static cordon_sinit_start_end: u8;
    safe static cordon_sinit_end: u8;
}

/// Where the code is in the module.
pub const CODE: u64 = 0x1000;
/// Where the code's parameters are.
pub const PARAMETERS: u64 = 0x2000;
/// Where the word is, by its offset in the module, to which the MLE's store wakes the other CPUs.
pub const WAKEUP: u64 = PARAMETERS + 0x18;
/// The module's size.
const SIZE: usize = 0x3000;

/// Offset of the information table: behind header (161 words) and scratch area (143 words).
pub const INFO: usize = 304 * 4;
const CHIPSETS: usize = INFO + 0x40;
const PROCESSORS: usize = CHIPSETS + 0x20;
const TPMS: usize = PROCESSORS + 0x20;

/// What the module can: both ways to wake CPUs, ECX at entry, details/authorities, TCG's log.
pub const CAPABILITIES: u32 = 0x227;

fn offset(label: &'static u8) -> usize {
    std::ptr::from_ref(label).addr() - (&raw const cordon_sinit).addr()
}

fn code() -> &'static [u8] {
    // SAFETY: the block above places all bytes from the first label to the last in one read-only section.
    unsafe { std::slice::from_raw_parts(&raw const cordon_sinit, offset(&cordon_sinit_end)) }
}

/// The module's file.
pub fn module() -> Vec<u8> {
    let mut file = vec![0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let word = |value: u32| value.to_le_bytes();
    // Spec: [TXT] "Authenticated Code Module Format", header version 0.0 (RSA of 2048 bits).
    put(0, &2u16.to_le_bytes()); //  ModuleType: ACM
    put(4, &word(161)); //           HeaderLen
    put(12, &CHIPSET[1].to_le_bytes()); // ChipsetID
    put(16, &word(0x8086)); //       ModuleVendor
    put(20, &word(0x2026_1126)); //  Date
    put(24, &word((SIZE / 4) as u32)); // Size
    put(28, &2u16.to_le_bytes()); // TXT SVN
    put(40, &word(31)); //           GDTLimit
    put(44, &word(CODE as u32 + offset(&cordon_sinit_gdt) as u32)); // GDTBasePtr
    put(48, &word(8)); //            SegSel
    put(52, &word(CODE as u32)); //  EntryPoint
    put(120, &word(64)); //          KeySize
    put(124, &word(143)); //         ScratchSize
    put(128, &[0xc0; 256]); //       RSAPubKey
    put(128 + 256, &word(17)); //    RSAPubExp
    // Spec: [TXT] "Chipset AC Module Information Table", version 5.
    put(INFO, &[0xaa, 0x3a, 0xc0, 0x7f, 0xa7, 0x46, 0xdb, 0x18]);
    put(INFO + 8, &[0x2e, 0xac, 0x69, 0x8f, 0x8d, 0x41, 0x7f, 0x5a]);
    put(INFO + 16, &[1, 5]); //      SINIT, version
    put(INFO + 18, &48u16.to_le_bytes());
    put(INFO + 20, &word(CHIPSETS as u32));
    put(INFO + 24, &word(7)); //     OsSinitDataVer
    put(INFO + 28, &word(0x2_0000)); // MinMleHeaderVer
    put(INFO + 32, &word(CAPABILITIES));
    put(INFO + 36, &[1]); //         AcmVer
    put(INFO + 40, &word(PROCESSORS as u32));
    put(INFO + 44, &word(TPMS as u32));
    put(CHIPSETS, &word(1));
    put(CHIPSETS + 8, &CHIPSET[0].to_le_bytes());
    put(CHIPSETS + 10, &CHIPSET[1].to_le_bytes());
    put(CHIPSETS + 12, &CHIPSET[2].to_le_bytes());
    // Any processor: no bit of the signature counts, nor of the platform.
    put(PROCESSORS, &word(1));
    // TPM 2.0 by TIS and CRB, SHA-1 and SHA-256.
    put(TPMS, &word(0b1011));
    put(TPMS + 4, &[2, 0, 4, 0, 0x0b, 0]);
    put(CODE as usize, code());
    file
}

/// SHA-256 of what a module's signature covers: without key, exponent, signature and scratch area.
///
/// Spec: \[SDM2\] "Authenticated Code Module Format", RSASig.
pub fn digest(module: &[u8]) -> Vec<u8> {
    Sha256::digest([&module[..128], &module[INFO..]].concat()).to_vec()
}

/// What the code needs to know, as its parameters' page begins.
pub struct Parameters {
    /// CR4 at the MLE's entry.
    pub cr4: u32,
    /// CPUs beside the one that launches.
    pub others: u32,
    /// Number of the page below 1 MiB where they start.
    pub start_page: u8,
    /// The MLE's entry point.
    pub entry: u32,
    /// Its page tables.
    pub page_tables: u32,
    /// Whether the other CPUs stay away when woken.
    pub never_join: bool,
}

impl Parameters {
    /// For [`PARAMETERS`].
    pub fn bytes(&self) -> Vec<u8> {
        let words = [
            self.cr4,
            self.others,
            self.start_page.into(),
            0,
            self.entry,
            self.page_tables,
            0,
            self.never_join.into(),
        ];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// The start-up code of the other CPUs, for a page below 1 MiB. The module lies at `base`.
pub fn start_code(base: u64) -> Vec<u8> {
    let start = offset(&cordon_sinit_start);
    let mut bytes = code()[start..offset(&cordon_sinit_start_end)].to_vec();
    let code = (base + CODE) as u32;
    let mut put = |label: &'static u8, skip: usize, value: u32| {
        let at = offset(label) - start + skip;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    put(&cordon_sinit_start_gdtr, 2, code + offset(&cordon_sinit_gdt) as u32);
    put(&cordon_sinit_start_far, 0, code + offset(&cordon_sinit_rlp) as u32);
    put(&cordon_sinit_start_base, 0, code);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_module_do_not_overlap() {
        let module = module();
        assert!(code().len() < 0x1000 && TPMS + 16 < CODE as usize);
        assert_eq!(u32::from_le_bytes(module[24..28].try_into().unwrap()) as usize * 4, module.len());
        let scratch_end = 4 * (161 + 143);
        assert_eq!(scratch_end, INFO);
        // `cli` at the entry point.
        assert_eq!(module[CODE as usize], 0xfa);
    }

    #[test]
    fn start_code_leads_into_the_module() {
        let code = start_code(0x3000_0000);
        assert_eq!(code[0], 0xfa);
        assert_eq!(code[code.len() - 4..], 0x3000_1000u32.to_le_bytes());
        assert!(code.len() < 0x1000);
    }
}
