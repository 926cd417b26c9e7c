//! Devices that firmware leaves at work: each `edu` of the machine writes eight bytes again and again, from the end of the
//! boot services on, without any CPU. When its DMA is done it sends an interrupt, and the interrupt's address is its own
//! command register. It goes on until something stops either.
//!
//! `dma.txt` says what: a line for each device, in the order of their buses, with address and value in hexadecimal. A first line
//! `iommu` has the IOMMU on, with a table that lets all pass and has it remember what these devices reached.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::asm;
use core::ffi::c_void;
use core::ptr::{self, NonNull};

use platform::files;
use uefi::boot::{self, AllocateType, EventType, MemoryType, Tpl};
use uefi::{Event, cstr16};

/// Registers of `edu`. Spec: QEMU "EDU device".
mod edu {
    pub const IDENTITY: u32 = 0x11e8_1234;
    pub const SOURCE: u64 = 0x80;
    pub const DESTINATION: u64 = 0x88;
    pub const COUNT: u64 = 0x90;
    pub const COMMAND: u64 = 0x98;
    /// Its own address of its buffer.
    pub const BUFFER: u64 = 0x4_0000;
    pub const TAKE: u64 = 1;
    /// From the buffer to memory, then an interrupt.
    pub const GIVE_AND_TELL: u64 = 7;
}

/// QEMU's `amd-iommu`, and its registers for the device table and control.
const IOMMU: u64 = 0xfed8_0000;
const DEVICE_TABLE: u64 = IOMMU;
const CONTROL: u64 = IOMMU + 0x18;
/// A device table of all ids, and an entry that lets its device reach everything. An entry of zeros does too, but of that
/// nothing is remembered. Spec: \[IOMMU\] "Device Table Entry".
const TABLE_PAGES: usize = 512;
const OPEN: u64 = 0b11 | 0b11 << 61;

/// A device and what it is to write to.
struct Order {
    registers: u64,
    target: u64,
}

/// Reads what devices are to do, and has them do it when the boot services end.
pub fn prepare() {
    let Ok(text) = files().read_to_string(cstr16!("\\dma.txt")) else { return };
    let mut lines = text.lines().peekable();
    let iommu = lines.next_if(|line| *line == "iommu").is_some();
    let devices: Vec<u32> = (0..0x1000).filter(|id| read(*id, 0) == edu::IDENTITY).collect();
    if iommu {
        leave_iommu_on(&devices);
    }
    let orders: Vec<_> = devices
        .into_iter()
        .zip(lines)
        .map(|(id, line)| {
            let mut numbers = line.split_whitespace().map(|n| u64::from_str_radix(n, 16).expect("number"));
            let (target, value) = (numbers.next().expect("target"), numbers.next().expect("value"));
            Order { registers: equip(id, value), target }
        })
        .collect();
    let context = NonNull::from(Box::leak(Box::new(orders))).cast::<c_void>();
    // SAFETY: `begin` gets what it expects, which is never freed.
    let event = unsafe {
        boot::create_event(EventType::SIGNAL_EXIT_BOOT_SERVICES, Tpl::NOTIFY, Some(begin), Some(context))
    };
    event.expect("event");
}

/// Gives a device the bytes, and the address of its own command register for interrupts. Returns where its registers are.
fn equip(id: u32, value: u64) -> u64 {
    /// Memory and bus master.
    const ON: u32 = 6;
    const CAPABILITY_MSI: u32 = 5;
    let registers = u64::from(read(id, 0x10) & !0xf);
    write(id, 4, read(id, 4) | ON);
    let word = Box::leak(Box::new(value));
    let steps = [
        (edu::SOURCE, ptr::from_mut(word) as u64),
        (edu::DESTINATION, edu::BUFFER),
        (edu::COUNT, 8),
        (edu::COMMAND, edu::TAKE),
    ];
    for (register, value) in steps {
        store(registers + register, value);
    }
    while load(registers + edu::COMMAND) & 1 != 0 {}
    let mut at = read(id, 0x34) & 0xfc;
    while at != 0 && read(id, at) & 0xff != CAPABILITY_MSI {
        at = read(id, at) >> 8 & 0xfc;
    }
    // Address, its upper half, data, and on.
    write(id, at + 4, (registers + edu::COMMAND) as u32);
    write(id, at + 8, 0);
    write(id, at + 12, edu::GIVE_AND_TELL as u32);
    write(id, at, read(id, at) | 1 << 16);
    registers
}

unsafe extern "efiapi" fn begin(_: Event, context: Option<NonNull<c_void>>) {
    /// So that they do not all write at the same time.
    const APART: u64 = 30_000_000;
    let Some(orders) = context else { return };
    // SAFETY: `prepare` made it of that type, for ever.
    for order in unsafe { orders.cast::<Vec<Order>>().as_ref() } {
        let steps = [
            (edu::SOURCE, edu::BUFFER),
            (edu::DESTINATION, order.target),
            (edu::COUNT, 8),
            (edu::COMMAND, edu::GIVE_AND_TELL),
        ];
        for (register, value) in steps {
            store(order.registers + register, value);
        }
        let from = cycles();
        while cycles() - from < APART {}
    }
}

fn leave_iommu_on(devices: &[u32]) {
    let low = AllocateType::MaxAddress(0xffff_ffff);
    let table = boot::allocate_pages(low, MemoryType::RESERVED, TABLE_PAGES).expect("memory").cast::<u64>();
    // SAFETY: the pages are this program's; an entry has four words, and there are entries for all ids.
    unsafe {
        table.write_bytes(0, TABLE_PAGES * boot::PAGE_SIZE / 8);
        for id in devices {
            table.add(*id as usize * 4).write(OPEN);
        }
    }
    store(DEVICE_TABLE, table.as_ptr() as u64 | 0x1ff);
    store(CONTROL, 1);
}

fn load(address: u64) -> u64 {
    // SAFETY: registers of a device, mapped one to one by the firmware, which has no driver for it.
    unsafe { (address as *const u64).read_volatile() }
}

fn store(address: u64, value: u64) {
    // SAFETY: as above.
    unsafe { (address as *mut u64).write_volatile(value) }
}

fn cycles() -> u64 {
    // SAFETY: every CPU that runs this has the instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn read(id: u32, register: u32) -> u32 {
    let value: u32;
    // SAFETY: PCI configuration mechanism #1; the firmware runs nothing meanwhile that uses it.
    unsafe {
        asm!("out dx, eax", in("dx") 0xcf8_u16, in("eax") 1 << 31 | id << 8 | register);
        asm!("in eax, dx", in("dx") 0xcfc_u16, out("eax") value);
    }
    value
}

fn write(id: u32, register: u32, value: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("out dx, eax", in("dx") 0xcf8_u16, in("eax") 1 << 31 | id << 8 | register);
        asm!("out dx, eax", in("dx") 0xcfc_u16, in("eax") value);
    }
}
