//! Firmware with handlers of the Platform Runtime Mechanism, which OVMF lacks: code and data in runtime memory, the table that
//! names them, and ACPI code that calls them when a file of the ACPI device is read.
//!
//! | file of `/sys/bus/acpi/devices/CRDN0001:00` | handler | what it gives |
//! |---|---|---|
//! | `sun` | [`SUM`] | 1000 + 200 + 30 + 4: two parameters, static data, the number of MMIO ranges |
//! | `hrv` | [`ACCESS`] | what [`POKE`] says is read or written; 0 |
//!
//! Where the handler was not carried out, the file gives what the operating system answered in bits 31:16: 1 and, in bits 31:24, the number of
//! the EFI error. QEMU's tables make integers 32 bits wide.
//! Spec: \[PRM\] "PRM Module and Handler", "ACPI Interface".

use std::arch::global_asm;

use acpi_tables::aml::{
    Add, Arg, BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, Local,
    Method, MethodCall, Name, ONE, OpRegion, OpRegionSpace, Path, Return, Scope, ShiftLeft, Store, ToInteger,
    ZERO,
};
use acpi_tables::{Aml, AmlSink};
use uefi_raw::{Guid, guid};

use crate::acpi::{HEADER, finish, table};
use crate::board::Board;

/// The handler that adds.
pub const SUM: Guid = guid!("3f1b2c4d-0001-4a5e-9c7d-c0de0badc0de");
/// The handler that accesses any memory.
pub const ACCESS: Guid = guid!("3f1b2c4d-0002-4a5e-9c7d-c0de0badc0de");
/// What `sun` gives.
pub const TOTAL: u64 = 1234;
/// The parameters of [`ACCESS`]: linear address, value, and whether to write it, as 64-bit words. To be set by the guest's
/// kernel, in firmware's memory.
pub const POKE: u64 = DATA + 0x180;

const MODULE: Guid = guid!("3f1b2c4d-0000-4a5e-9c7d-c0de0badc0de");
/// Memory that the firmware does not use on emulated boards with 2 GiB.
const CODE: u64 = 0x3000_0000;
const DATA: u64 = 0x3010_0000;
const PAGE: u64 = 0x1000;
/// The parameters of [`SUM`].
const ADD: u64 = DATA + 0x100;
const STATIC: u64 = DATA + 0x20;
const RANGES: u64 = DATA + 0x40;

// RCX: the parameters; RDX: the context. At any address.
global_asm!(
    ".pushsection .rodata.prm_handlers, \"a\"",
    "prm_handlers:",
    "   mov eax, 5", //                     as it leaves: EFI_INVALID_PARAMETER
    "   cmp dword ptr [rdx], 0x434d5250", // PRMC
    "   jne 2f",
    "   mov rax, [rdx + 24]", //            static data: signature, length, 30
    "   mov eax, [rax + 8]",
    "   add eax, [rcx]",
    "   add eax, [rcx + 4]",
    "   mov rdx, [rdx + 32]", //            MMIO ranges
    "   add eax, [rdx]",
    "   mov [rcx + 8], eax",
    "   xor eax, eax",
    "2: ror rax, 1",
    "   ret",
    "   .balign 16",
    "prm_access:",
    "   mov r8, [rcx]",
    "   mov rdx, [rcx + 8]",
    "   xor eax, eax",
    "   cmp [rcx + 16], rax",
    "   jne 3f",
    "   mov rdx, [r8]",
    "   mov [rcx + 8], rdx",
    "   ret",
    "3: mov [r8], rdx",
    "   ret",
    "prm_handlers_end:",
    ".popsection",
);

unsafe extern "C" {
    safe static prm_handlers: u8;
    safe static prm_access: u8;
    safe static prm_handlers_end: u8;
}

fn offset(label: &'static u8) -> usize {
    std::ptr::from_ref(label).addr() - (&raw const prm_handlers).addr()
}

fn code() -> Vec<u8> {
    // SAFETY: the block above places all bytes from the first label to the last one, which `offset` measures, in one
    // read-only section of this program.
    let code = unsafe { std::slice::from_raw_parts(&raw const prm_handlers, offset(&prm_handlers_end)) };
    code.to_vec()
}

/// Puts handlers, data and tables in place.
pub fn firmware(board: &mut Board) {
    board.runtime_code(CODE, PAGE);
    board.runtime_data(DATA, PAGE);
    board.write(CODE + 0x10, &code());
    board.write(DATA, &vec![0; PAGE as usize]);
    let mut data = b"PRMD\x0c\0\0\0".to_vec();
    data.extend(30u32.to_le_bytes());
    board.write(STATIC, &data);
    // One range: the timer's, by its physical address alone.
    let range = [4u64.to_le_bytes(), 0xfed0_0000u64.to_le_bytes(), [0; 8]].concat();
    board.write(RANGES, &[range, 0x400u32.to_le_bytes().to_vec()].concat());
    board.acpi(&[prmt(), ssdt()].concat());
}

/// Spec: \[PRM\] "Platform Runtime Mechanism Table (PRMT)".
fn prmt() -> Vec<u8> {
    let mut table = table(*b"PRMT", HEADER, 0);
    table.append_slice(&MODULE.to_bytes());
    table.append_slice(&[60u32.to_le_bytes(), 1u32.to_le_bytes()].concat());
    let handlers = [(SUM, 0, STATIC, ADD), (ACCESS, offset(&prm_access), 0, POKE)];
    let length = 38 + 44 * handlers.len() as u16;
    table.append_slice(&[0u16.to_le_bytes(), u16::to_le_bytes(length)].concat());
    table.append_slice(&MODULE.to_bytes());
    table.append_slice(&[1u16, 0, handlers.len() as u16].map(u16::to_le_bytes).concat());
    table.append(38u32);
    table.append(RANGES);
    for (guid, at, data, parameters) in handlers {
        table.append_slice(&[0u16.to_le_bytes(), 44u16.to_le_bytes()].concat());
        table.append_slice(&guid.to_bytes());
        for address in [CODE + 0x10 + at as u64, data, parameters] {
            table.append(address);
        }
    }
    finish(table)
}

/// The operation region whose one byte takes requests.
struct Requests;

impl Aml for Requests {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        // OperationRegion (RGN_, PlatformRtMechanism, 0, 1)
        sink.vec(&[0x5b, 0x80]);
        sink.vec(b"RGN_\x0b\0\x01");
    }
}

fn ssdt() -> Vec<u8> {
    let path = Path::new;
    let fields = |of, access, entries| {
        Field::new(path(of), access, FieldLockRule::NoLock, FieldUpdateRule::Preserve, entries)
    };
    let call = fields("RGN_", FieldAccessType::Buffer, vec![FieldEntry::Named(*b"CALL", 8)]);
    let region = OpRegion::new(path("PARM"), OpRegionSpace::SystemMemory, &(ADD as u32), &16u32);
    let parameters = fields(
        "PARM",
        FieldAccessType::DWord,
        vec![
            FieldEntry::Named(*b"ONE_", 32),
            FieldEntry::Named(*b"TWO_", 32),
            FieldEntry::Named(*b"SUM_", 32),
        ],
    );
    // A request: two answers of nine bytes, the command to run, the handler.
    let request = |guid: Guid| BufferData::new([vec![0; 10], guid.to_bytes().to_vec()].concat());
    let (local, argument) = (Local(0), Arg(0));
    let (field, one, two, sum) = (path("CALL"), path("ONE_"), path("TWO_"), path("SUM_"));
    // The answer, in bits 31:16: its first byte, and the EFI status behind it.
    let asked = Store::new(&field, &argument);
    let (answer, answered) = (Store::new(&local, &asked), ToInteger::new(&local, &local));
    let shifted = ShiftLeft::new(&local, &local, &16u8);
    let result = Return::new(&local);
    let run = Method::new(path("RUN_"), 1, true, vec![&answer, &answered, &shifted, &result]);
    let (add, access) = (request(SUM), request(ACCESS));
    let set = [Store::new(&one, &1000u16), Store::new(&two, &200u8), Store::new(&sum, &ZERO)];
    let ran = MethodCall::new(path("RUN_"), vec![&add]);
    let (ran, total) = (Store::new(&local, &ran), Add::new(&local, &local, &sum));
    let sun = Method::new(path("_SUN"), 0, true, vec![&set[0], &set[1], &set[2], &ran, &total, &result]);
    let ran = MethodCall::new(path("RUN_"), vec![&access]);
    let given = Return::new(&ran);
    let hrv = Method::new(path("_HRV"), 0, true, vec![&given]);
    let names: [&dyn Aml; 9] = [
        &Name::new(path("_HID"), &"CRDN0001"),
        &Name::new(path("_UID"), &ONE),
        &Requests,
        &call,
        &region,
        &parameters,
        &run,
        &sun,
        &hrv,
    ];
    let device = Device::new(path("PRMT"), names.to_vec());
    let mut table = table(*b"SSDT", HEADER, 2);
    Scope::new(path("\\_SB_"), vec![&device]).to_aml_bytes(&mut table);
    finish(table)
}
