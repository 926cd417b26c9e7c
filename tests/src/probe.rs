//! A secure loader block that reports the state in which it is entered, and stops: it holds the player
//! of the DRTM event to the architecture. It is no part of the product.

use std::arch::global_asm;
use std::collections::BTreeMap;

use hv::launch::{MLE_MAGIC, MLE_REGION_MIN, MLE_VERSION, MleHeader};
use zerocopy::IntoBytes;

// Values go to a table below the stack and from there, in hexadecimal, to the first serial port.
global_asm!(
    ".pushsection .rodata.cordon_probe, \"a\"",
    "cordon_probe:",
    ".short cordon_probe_entry - cordon_probe",
    ".short cordon_probe_limit - cordon_probe",
    ".ascii \"CORDNSLB\"",
    ".long 0",
    ".set cordon_probe_text, . - cordon_probe",
    ".ascii \"PROBE \"",
    ".code32",
    "cordon_probe_entry:",
    "   push esp",
    "   pushfd",
    "   push eax",
    "   push ebx",
    "   push ecx",
    "   push edx",
    "   push esi",
    "   push edi",
    "   push ebp",
    "   mov ebx, eax", //                      SLB base
    "   mov eax, cr0",
    "   push eax",
    "   mov eax, cr3",
    "   push eax",
    "   mov eax, cr4",
    "   push eax",
    "   mov ecx, 0xc0000080",
    "   rdmsr",
    "   push eax",
    "   mov eax, cs",
    "   push eax",
    "   mov eax, ss",
    "   push eax",
    "   mov eax, dr7",
    "   push eax",
    "   sub esp, 8",
    "   sidt ss:[esp]",
    "   movzx eax, word ptr ss:[esp]",
    "   mov edx, ss:[esp + 2]",
    "   add esp, 8",
    "   push eax",
    "   push edx",
    "   sub esp, 8",
    "   sgdt ss:[esp]",
    "   movzx eax, word ptr ss:[esp]",
    "   mov edx, ss:[esp + 2]",
    "   add esp, 8",
    "   push eax",
    "   push edx",
    // Does DS reach the SLB? It must not.
    "   mov eax, ds:[ebx + 4]",
    "   push eax",
    // Is GIF clear? An interrupt to ourselves must stay pending, though IF is set. (With GIF set it would
    // go through an interrupt table at address 0: the end of this machine.)
    "   mov dword ptr ss:[0xfee000f0], 0x1ff",
    "   mov dword ptr ss:[0xfee00300], 0x44040",
    "   sti",
    "   nop",
    "   nop",
    "   cli",
    "   mov eax, ss:[0xfee00220]",
    "   push eax",
    // Can locality 2 be had?
    "   mov byte ptr ss:[0xfed42000], 2",
    "   movzx eax, byte ptr ss:[0xfed42000]",
    "   push eax",
    "   lea esi, [ebx + cordon_probe_text]",
    "   mov ecx, 6",
    "2: mov al, ss:[esi]",
    "   call 5f",
    "   inc esi",
    "   loop 2b",
    "   lea esi, [ebx + 0xfffc]",
    "3: mov ebp, ss:[esi]",
    "   mov ecx, 8",
    "4: rol ebp, 4",
    "   mov eax, ebp",
    "   and al, 15",
    "   add al, 48",
    "   cmp al, 58",
    "   jb 6f",
    "   add al, 39",
    "6: call 5f",
    "   loop 4b",
    "   mov al, 32",
    "   call 5f",
    "   sub esi, 4",
    "   cmp esi, esp",
    "   jae 3b",
    "   mov al, 10",
    "   call 5f",
    "7: cli",
    "   hlt",
    "   jmp 7b",
    "5: mov dx, 0x3f8", //                     one character; keeps all but EDX
    "   out dx, al",
    "   ret",
    ".code64",
    "cordon_probe_limit:",
    ".popsection",
);

unsafe extern "C" {
    safe static cordon_probe: u8;
    safe static cordon_probe_limit: u8;
}

/// What the block reports, in its order.
const NAMES: [&str; 23] = [
    "esp",
    "eflags",
    "eax",
    "ebx",
    "ecx",
    "edx",
    "esi",
    "edi",
    "ebp",
    "cr0",
    "cr3",
    "cr4",
    "efer",
    "cs",
    "ss",
    "dr7",
    "idt limit",
    "idt base",
    "gdt limit",
    "gdt base",
    "ds read",
    "pending",
    "tpm access",
];

/// The image.
pub fn slb() -> Vec<u8> {
    let length = (&raw const cordon_probe_limit).addr() - (&raw const cordon_probe).addr();
    // SAFETY: the block above places all bytes from the first label to the last in one read-only section.
    unsafe { std::slice::from_raw_parts(&raw const cordon_probe, length) }.to_vec()
}

/// An MLE that the loader accepts, and that never runs.
pub fn mle() -> Vec<u8> {
    let mut image = vec![0; 4096];
    let header = MleHeader {
        magic: MLE_MAGIC,
        version: MLE_VERSION.into(),
        entry: 0x800.into(),
        image_size: (image.len() as u64).into(),
        region_size: MLE_REGION_MIN.into(),
        txt_header: 0.into(),
    };
    image[..size_of::<MleHeader>()].copy_from_slice(header.as_bytes());
    image
}

/// The report in a console's output, once it is whole.
pub fn report(console: &str) -> Option<BTreeMap<&'static str, u32>> {
    let line = console.split_once("PROBE ")?.1.split_once('\n')?.0;
    let values: Option<Vec<_>> = line.split_whitespace().map(|v| u32::from_str_radix(v, 16).ok()).collect();
    let values = values.filter(|v| v.len() == NAMES.len())?;
    Some(NAMES.into_iter().zip(values).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_have_the_headers_that_the_loader_checks() {
        let slb = slb();
        assert_eq!(usize::from(u16::from_le_bytes([slb[2], slb[3]])), slb.len());
        assert_eq!(slb[4..12], hv::launch::SLB_MAGIC);
        assert_eq!(mle()[..8], MLE_MAGIC);
    }

    #[test]
    fn a_report_counts_when_it_is_whole() {
        let line = (0..NAMES.len()).map(|n| format!("{n:08x} ")).collect::<String>();
        assert_eq!(report(&format!("junk PROBE {line}")), None);
        assert_eq!(report(&format!("junk PROBE {line}\n")).unwrap()["tpm access"], 22);
        assert_eq!(report("PROBE 1 2\n"), None);
    }
}
