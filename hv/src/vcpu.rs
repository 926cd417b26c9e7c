//! What a CPU back end shows the MLE: a virtual CPU's registers and the reasons why it stopped.
//!
//! The MLE's decisions are written against [`Vcpu`], so they run on the host against a fake.

use core::fmt;
use core::mem::offset_of;

/// General registers that the world switch saves, in the order of their x86 encodings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Gprs {
    /// RAX.
    pub rax: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RBX.
    pub rbx: u64,
    /// RSP.
    pub rsp: u64,
    /// RBP.
    pub rbp: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// R8 to R15.
    pub r8_to_15: [u64; 8],
}

impl Gprs {
    /// The register with encoding `index` (0 to 15, as ModRM and REX name them); `None` beyond.
    pub fn by_encoding(&self, index: u8) -> Option<u64> {
        Some(match index {
            0 => self.rax,
            1 => self.rcx,
            2 => self.rdx,
            3 => self.rbx,
            4 => self.rsp,
            5 => self.rbp,
            6 => self.rsi,
            7 => self.rdi,
            _ => *self.r8_to_15.get(usize::from(index.checked_sub(8)?))?,
        })
    }

    /// Sets the register with encoding `index`; nothing happens beyond 15.
    pub fn set_by_encoding(&mut self, index: u8, value: u64) {
        let reg = match index {
            0 => &mut self.rax,
            1 => &mut self.rcx,
            2 => &mut self.rdx,
            3 => &mut self.rbx,
            4 => &mut self.rsp,
            5 => &mut self.rbp,
            6 => &mut self.rsi,
            7 => &mut self.rdi,
            _ => match index.checked_sub(8).and_then(|i| self.r8_to_15.get_mut(usize::from(i))) {
                Some(reg) => reg,
                None => return,
            },
        };
        *reg = value;
    }
}

/// Assembly of a world switch: loads all general registers but RAX and RSP from the [`Gprs`] at RDI, RDI last.
///
/// Without operands, so that both back ends can use it: an offset is the register's encoding times 8.
#[macro_export]
macro_rules! load_gprs {
    () => {
        "mov rcx, [rdi + 0x08]
         mov rdx, [rdi + 0x10]
         mov rbx, [rdi + 0x18]
         mov rbp, [rdi + 0x28]
         mov rsi, [rdi + 0x30]
         mov r8, [rdi + 0x40]
         mov r9, [rdi + 0x48]
         mov r10, [rdi + 0x50]
         mov r11, [rdi + 0x58]
         mov r12, [rdi + 0x60]
         mov r13, [rdi + 0x68]
         mov r14, [rdi + 0x70]
         mov r15, [rdi + 0x78]
         mov rdi, [rdi + 0x38]"
    };
}

/// Assembly of a world switch: stores all general registers but RAX and RSP into the [`Gprs`] at RAX.
#[macro_export]
macro_rules! store_gprs {
    () => {
        "mov [rax + 0x08], rcx
         mov [rax + 0x10], rdx
         mov [rax + 0x18], rbx
         mov [rax + 0x28], rbp
         mov [rax + 0x30], rsi
         mov [rax + 0x38], rdi
         mov [rax + 0x40], r8
         mov [rax + 0x48], r9
         mov [rax + 0x50], r10
         mov [rax + 0x58], r11
         mov [rax + 0x60], r12
         mov [rax + 0x68], r13
         mov [rax + 0x70], r14
         mov [rax + 0x78], r15"
    };
}

/// Assembly: pushes the registers that a function must preserve.
///
/// Of the System V convention for x86-64.
#[macro_export]
macro_rules! push_preserved {
    () => {
        "push rbx
         push rbp
         push r12
         push r13
         push r14
         push r15"
    };
}

/// Assembly: pops what [`push_preserved`] pushed.
#[macro_export]
macro_rules! pop_preserved {
    () => {
        "pop r15
         pop r14
         pop r13
         pop r12
         pop rbp
         pop rbx"
    };
}

// The offsets that the first two have as numbers.
const _: () = {
    assert!(offset_of!(Gprs, rcx) == 0x08 && offset_of!(Gprs, rdx) == 0x10 && offset_of!(Gprs, rbx) == 0x18);
    assert!(offset_of!(Gprs, rbp) == 0x28 && offset_of!(Gprs, rsi) == 0x30 && offset_of!(Gprs, rdi) == 0x38);
    assert!(offset_of!(Gprs, r8_to_15) == 0x40);
};

/// Which virtual machine a virtual CPU belongs to; decides what it is stopped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Linux: as few exits as the architecture allows.
    Guest,
    /// Firmware: everything but computation exits.
    Sandbox,
}

/// How a single step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The instruction was carried out; otherwise it will be tried again.
    pub executed: bool,
    /// The exit needs no further answer.
    pub answered: bool,
}

/// How an access met the nested tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Why a virtual CPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// CPUID.
    Cpuid,
    /// RDMSR of an intercepted register.
    MsrRead {
        /// Register number.
        index: u32,
    },
    /// WRMSR of an intercepted register.
    MsrWrite {
        /// Register number.
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// An access that the nested tables do not allow.
    Memory {
        /// Guest-physical address.
        gpa: u64,
        /// What was tried.
        access: Access,
        /// The CPU was reading or writing the guest's own page tables.
        table_walk: bool,
    },
    /// IN or OUT of an intercepted port.
    Port {
        /// Port number.
        port: u16,
        /// Operand bytes: 1, 2 or 4.
        size: u8,
        /// IN rather than OUT.
        input: bool,
        /// A string instruction (INS, OUTS), with or without REP.
        string: bool,
        /// Address of the next instruction.
        next_rip: u64,
    },
    /// The back end's hypercall instruction.
    Hypercall,
    /// An instruction of the virtualization extension that the guest does not have.
    VirtualizationInstruction,
    /// INVD: would drop modified cache lines, the MLE's too.
    InvalidateCaches,
    /// HLT, where it is intercepted (the sandbox; a CPU that the guest stops).
    Halt,
    /// A physical interrupt is pending, where it is intercepted (the sandbox).
    Interrupt,
    /// A non-maskable interrupt is pending, where it is intercepted.
    Nmi,
    /// An SMI is pending.
    Smi,
    /// An INIT signal is pending.
    Init,
    /// A Startup IPI came to a virtual CPU that waits for one.
    Startup {
        /// It starts at this page.
        vector: u8,
    },
    /// XSETBV.
    SetXcr {
        /// Register number.
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// The back end has answered it: the guest goes on.
    Absorbed,
    /// Shutdown: a triple fault.
    Shutdown,
    /// An intercepted exception (the sandbox).
    Exception {
        /// Vector.
        vector: u8,
        /// Error code, or 0.
        error: u64,
    },
    /// The CPU refused the virtual CPU's state: our fault.
    InvalidState,
    /// A code never asked for.
    Unexpected {
        /// The back end's raw exit code.
        code: u64,
        /// First information word.
        info1: u64,
        /// Second information word.
        info2: u64,
    },
}

impl Exit {
    /// Number of [`Exit::kind`]s.
    pub const KINDS: usize = 20;

    /// Index of the kind, for counters; below [`Exit::KINDS`].
    pub fn kind(&self) -> usize {
        match self {
            Self::Cpuid => 0,
            Self::MsrRead { .. } => 1,
            Self::MsrWrite { .. } => 2,
            Self::Memory { .. } => 3,
            Self::Port { .. } => 4,
            Self::Hypercall => 5,
            Self::VirtualizationInstruction => 6,
            Self::Halt => 7,
            Self::Interrupt => 8,
            Self::Nmi => 9,
            Self::Smi => 10,
            Self::Init => 11,
            Self::Shutdown => 12,
            Self::Exception { .. } => 13,
            Self::InvalidState => 14,
            Self::Unexpected { .. } => 15,
            Self::InvalidateCaches => 16,
            Self::Startup { .. } => 17,
            Self::SetXcr { .. } => 18,
            Self::Absorbed => 19,
        }
    }

    /// Name of the kind with this index.
    pub fn kind_name(kind: usize) -> &'static str {
        const NAMES: [&str; Exit::KINDS] = [
            "cpuid",
            "rdmsr",
            "wrmsr",
            "memory",
            "port",
            "hypercall",
            "virt-insn",
            "halt",
            "interrupt",
            "nmi",
            "smi",
            "init",
            "shutdown",
            "exception",
            "invalid",
            "unexpected",
            "invd",
            "startup",
            "xsetbv",
            "absorbed",
        ];
        NAMES.get(kind).copied().unwrap_or("?")
    }
}

/// An exception to raise in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// #DB, vector 1.
    Debug,
    /// #UD, vector 6.
    InvalidOpcode,
    /// #GP(0), vector 13.
    GeneralProtection,
    /// #PF with error code and faulting address, vector 14.
    PageFault {
        /// Error code.
        error: u32,
        /// CR2.
        address: u64,
    },
}

/// A segment register's hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Descriptor bits 55:52 and 47:40, as the VMCB packs them.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

/// Control registers that address translation and mode depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER as the hardware holds it.
    pub efer: u64,
}

/// A stopped virtual CPU.
pub trait Vcpu {
    /// General registers.
    fn gprs(&self) -> &Gprs;
    /// General registers, to change.
    fn gprs_mut(&mut self) -> &mut Gprs;
    /// Instruction pointer.
    fn rip(&self) -> u64;
    /// Goes on after the instruction that made the exit: `length` bytes, where the CPU does not say itself. An
    /// interrupt shadow ends, a single-step trap is raised where the guest asked for one.
    fn advance(&mut self, length: u64);
    /// Control registers.
    fn control(&self) -> Control;
    /// Sets EFER as the guest sees it (the back end keeps its own bits).
    fn set_efer(&mut self, efer: u64);
    /// Current privilege level.
    fn cpl(&self) -> u8;
    /// Base of the code segment, and whether it is 64-bit code.
    fn code(&self) -> (u64, bool);
    /// Raises an exception on the next run.
    fn inject(&mut self, exception: Exception);
    /// What the guest's TSC is ahead of the CPU's.
    fn tsc_offset(&self) -> u64;
    /// Sets it.
    fn set_tsc_offset(&mut self, offset: u64);
    /// Nested tables have changed: nothing cached may be used on the next run.
    fn flush_nested(&mut self);
    /// Goes on at `rip`, which an intercepted IN or OUT names as the next instruction.
    fn skip_to(&mut self, rip: u64);
    /// Whether a pending interrupt would be delivered at once.
    fn takes_interrupts(&self) -> bool;
    /// The state after a Startup IPI with `vector`: real mode at `vector` × 1000h.
    fn start_at(&mut self, vector: u8);
    /// 64-bit mode at `rip` with flat segments (CS 10h, others 18h), tables at `cr3`, interrupts off.
    ///
    /// `gdt` is (base, limit) of a table that holds those descriptors, for code that reloads them.
    fn start_long_mode(&mut self, rip: u64, rsp: u64, cr3: u64, gdt: (u64, u32));
    /// Has the virtual CPU wait for a Startup IPI, which makes it exit. For the back end that sees one.
    fn wait_for_startup(&mut self) {}
    /// Makes the next run end after one instruction, or after the delivery of an event that comes before or in place of it.
    fn begin_step(&mut self);
    /// Ends a step, whatever ended the run; `None` when there was none.
    fn end_step(&mut self, exit: Exit) -> Option<Step>;
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unexpected { code, info1, info2 } => {
                write!(f, "unexpected exit {code:#x}, info {info1:#x} {info2:#x}")
            }
            Self::Memory { gpa, access, table_walk } => {
                write!(f, "{access:?} of {gpa:#x}{}", if table_walk { " by a page-table walk" } else { "" })
            }
            ref other => fmt::Debug::fmt(other, f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_name_each_register_once() {
        let mut g = Gprs::default();
        for i in 0..16 {
            g.set_by_encoding(i, 100 + u64::from(i));
        }
        for i in 0..16 {
            assert_eq!(g.by_encoding(i), Some(100 + u64::from(i)));
        }
        assert_eq!((g.rsp, g.r8_to_15[0]), (104, 108));
        assert_eq!(g.by_encoding(16), None);
    }
}
