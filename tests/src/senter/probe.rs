//! An MLE that reports the state in which it is entered, wakes the other CPU, and stops: it holds the player of SENTER to the
//! specification. And all that a loader would prepare for it. It is no part of the product.

use std::arch::global_asm;
use std::collections::BTreeMap;

use super::layout as at;
use super::{acm, crb};
use crate::board::Board as Records;

/// Where it lies: header and code, then values; its page tables are in front of it.
pub const BASE: u64 = 0x2000_3000;
const PAGE_TABLES: u64 = BASE - 0x3000;
const PAGES: u64 = 2;
/// The event log, and its size.
const LOG: u64 = 0x2001_0000;
const LOG_SIZE: u32 = 0x1_0000;
/// Offset of the entry point.
const ENTRY: usize = 0x40;
const VALUES: u64 = BASE + 0x1000;
const JOIN: u64 = BASE + 0x1800;

global_asm!(
    ".pushsection .rodata.cordon_senter_probe, \"a\"",
    ".set probe_rlp, 6f - cordon_senter_probe + {base} + {entry}",
    ".set probe_text, 7f - cordon_senter_probe + {base} + {entry}",
    "cordon_senter_probe:",
    ".code32",
    "   mov ds:[{values}], eax",
    "   mov ds:[{values} + 4], ebx",
    "   mov ds:[{values} + 8], ecx",
    "   mov ds:[{values} + 12], esp",
    "   mov edi, {values} + 16",
    "   mov eax, cr0",
    "   mov [edi], eax",
    "   add edi, 4",
    "   mov eax, cr3",
    "   mov [edi], eax",
    "   mov eax, cr4",
    "   mov [edi + 4], eax",
    "   mov ecx, 0xc0000080",
    "   rdmsr",
    "   mov [edi + 8], eax",
    "   mov eax, cs",
    "   mov [edi + 12], eax",
    "   mov eax, dr7",
    "   mov [edi + 16], eax",
    "   mov eax, ds:[{private}]", //               TXT.STS
    "   mov [edi + 20], eax",
    "   mov eax, ds:[{private} + 0x30]", //        TXT.ERRORCODE
    "   mov [edi + 24], eax",
    // Can locality 2 be had?
    "   mov dword ptr ds:[{locality2} + 8], 1",
    "   mov eax, ds:[{locality2} + 12]",
    "   mov [edi + 28], eax",
    // SinitMleData is the heap's fourth table.
    "   mov esi, ds:[{private} + 0x300]",
    "   add esi, [esi]",
    "   add esi, [esi]",
    "   add esi, [esi]",
    "   mov eax, [esi + 8]", //                    version
    "   mov [edi + 32], eax",
    // The other CPU, by the JOIN block.
    "   mov dword ptr ds:[{join}], 23",
    "   mov dword ptr ds:[{join} + 4], {join} + 32",
    "   mov dword ptr ds:[{join} + 8], 8",
    "   mov dword ptr ds:[{join} + 12], offset probe_rlp",
    "   mov dword ptr ds:[{join} + 32], 0",
    "   mov dword ptr ds:[{join} + 36], 0",
    "   mov dword ptr ds:[{join} + 40], 0xffff",
    "   mov dword ptr ds:[{join} + 44], 0xcf9b00",
    "   mov dword ptr ds:[{join} + 48], 0xffff",
    "   mov dword ptr ds:[{join} + 52], 0xcf9300",
    "   mov dword ptr ds:[{private} + {mle_join}], {join}",
    "   mov eax, [esi + 8 + 120]", //              RlpWakeupAddr
    "   mov dword ptr [eax], 1",
    "   mov ecx, 0x100000",
    "2: pause",
    "   cmp dword ptr ds:[{values} + 56], 0",
    "   loope 2b",
    // The report, with a stack of our own: the GDT of the JOIN block serves this CPU too.
    "   mov word ptr ds:[{join} + 64], 23",
    "   mov dword ptr ds:[{join} + 66], {join} + 32",
    "   lgdt ds:[{join} + 64]",
    "   mov eax, 0x10",
    "   mov ss, eax",
    "   mov esp, {base} + 0x2000",
    "   mov esi, offset probe_text",
    "   mov edi, 6",
    "3: mov al, [esi]",
    "   call 5f",
    "   inc esi",
    "   dec edi",
    "   jnz 3b",
    "   mov esi, {values}",
    "4: mov ebp, [esi]",
    "   mov ecx, 8",
    "8: rol ebp, 4",
    "   mov eax, ebp",
    "   and al, 15",
    "   add al, 48",
    "   cmp al, 58",
    "   jb 9f",
    "   add al, 39",
    "9: call 5f",
    "   loop 8b",
    "   mov al, 32",
    "   call 5f",
    "   add esi, 4",
    "   cmp esi, {values} + 4 * {count}",
    "   jb 4b",
    "   mov al, 10",
    "   call 5f",
    // Then a reset, with an error of the MLE's own, once the last character has gone out.
    "   mov dx, 0x3fd",
    "2: in al, dx",
    "   test al, 0x40",
    "   jz 2b",
    "   mov dword ptr ds:[{private} + 0x30], 0xc0008123",
    "   mov dword ptr ds:[{private} + 0x38], 1",
    "2: hlt",
    "   jmp 2b",
    "5: mov bl, al", //                            one character; keeps all but EAX, EBX, EDX
    "2: mov dx, 0x3fd",
    "   in al, dx",
    "   test al, 0x20",
    "   jz 2b",
    "   mov al, bl",
    "   mov dx, 0x3f8",
    "   out dx, al",
    "   ret",
    "6: mov eax, cr0",
    "   mov ds:[{values} + 60], eax",
    "   mov eax, cs",
    "   mov ds:[{values} + 64], eax",
    "   mov eax, ss",
    "   mov ds:[{values} + 68], eax",
    "   lock inc dword ptr ds:[{values} + 56]",
    "2: hlt",
    "   jmp 2b",
    "7: .ascii \"PROBE \"",
    ".code64",
    "cordon_senter_probe_end:",
    ".popsection",
    values = const VALUES,
    private = const at::PRIVATE,
    locality2 = const crb::BASE + 0x2000,
    join = const JOIN,
    base = const BASE,
    entry = const ENTRY,
    count = const NAMES.len(),
    mle_join = const at::MLE_JOIN,
);

unsafe extern "C" {
    safe static cordon_senter_probe: u8;
    safe static cordon_senter_probe_end: u8;
}

/// What it reports, in its order.
const NAMES: [&str; 18] = [
    "eax",
    "ebx",
    "ecx",
    "esp",
    "cr0",
    "cr3",
    "cr4",
    "efer",
    "cs",
    "dr7",
    "sts",
    "errorcode",
    "locality 2",
    "sinit data",
    "joined",
    "rlp cr0",
    "rlp cs",
    "rlp ss",
];

/// The image.
fn image() -> Vec<u8> {
    let length = (&raw const cordon_senter_probe_end).addr() - (&raw const cordon_senter_probe).addr();
    // SAFETY: the block above places all bytes from the first label to the last in one read-only section.
    let code = unsafe { std::slice::from_raw_parts(&raw const cordon_senter_probe, length) };
    let mut image = vec![0; (PAGES << 12) as usize];
    let header = [
        0x9082_ac5a,
        0x74a7_476f,
        0xa255_5c0f,
        0x42b6_51cb,
        52,
        0x2_0001,
        ENTRY as u32,
        0,
        0,
        image.len() as u32,
        acm::CAPABILITIES,
    ];
    for (word, value) in image.chunks_exact_mut(4).zip(header) {
        word.copy_from_slice(&u32::to_le_bytes(value));
    }
    image[ENTRY..ENTRY + length].copy_from_slice(code);
    image
}

/// What a loader prepares: the module, OsMleData and OsSinitData, page tables, the image.
///
/// Spec: \[TXT\] "OS to SINIT Data Format", version 7.
pub fn prepare(records: &mut Records, bios_data: u64) {
    records.reserve(PAGE_TABLES, LOG + u64::from(LOG_SIZE) - PAGE_TABLES);
    records.write(at::SINIT_BASE, &acm::module());
    let mut os_sinit = vec![0; 92];
    let mut put = |offset: usize, value: u64| {
        os_sinit[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(0, 7);
    put(8, PAGE_TABLES);
    put(16, PAGES << 12);
    put(40, 0xc000_0000);
    put(80, u64::from(acm::CAPABILITIES & !0x30));
    os_sinit.extend([8, 0, 0, 0, 28, 0, 0, 0]);
    os_sinit.extend(LOG.to_le_bytes());
    os_sinit.extend(LOG_SIZE.to_le_bytes());
    os_sinit.extend([0; 8]);
    os_sinit.extend([0, 0, 0, 0, 8, 0, 0, 0]);
    os_sinit.resize(os_sinit.len().next_multiple_of(8), 0);
    let os_mle = [0; 96];
    let heap = [
        &(os_mle.len() as u64 + 8).to_le_bytes()[..],
        &os_mle,
        &(os_sinit.len() as u64 + 8).to_le_bytes(),
        &os_sinit,
    ];
    records.write(at::HEAP_BASE + bios_data, &heap.concat());
    let mut tables = vec![0; 0x3000];
    let mut entry = |at: usize, page: u64| tables[at..at + 8].copy_from_slice(&(page | 1).to_le_bytes());
    entry(0, PAGE_TABLES + 0x1000);
    entry(0x1000, PAGE_TABLES + 0x2000);
    for page in 0..PAGES {
        entry(0x2000 + 8 * page as usize, BASE + (page << 12));
    }
    records.write(PAGE_TABLES, &tables);
    records.write(BASE, &image());
}

/// The report in a console's output, once it is whole.
pub fn report(console: &str) -> Option<BTreeMap<&'static str, u32>> {
    let line = console.split_once("PROBE ")?.1.split_once('\n')?.0;
    let values: Option<Vec<_>> = line.split_whitespace().map(|v| u32::from_str_radix(v, 16).ok()).collect();
    let values = values.filter(|v| v.len() == NAMES.len())?;
    Some(NAMES.into_iter().zip(values).collect())
}
