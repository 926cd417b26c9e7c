//! One exit of the guest, answered.

use hv::vcpu::{Access, Exception, Exit, Gprs, Vcpu};

use super::cpuid::{self, Leaf};
use super::msr::{Answer, Guards};
use super::windows::Registers;

/// What answers need of the CPU that the guest runs on.
pub trait Hardware {
    /// CPUID.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Leaf;
    /// RDMSR of a register that [`super::msr`] knows to exist.
    fn rdmsr(&self, index: u32) -> u64;
    /// WRMSR of such a register.
    fn wrmsr(&self, index: u32, value: u64);
    /// RDTSC.
    fn tsc(&self) -> u64;
    /// WBINVD.
    fn write_back_caches(&self);
    /// XSETBV of a value that is valid.
    fn set_xcr0(&self, value: u64);
    /// EFER bits of this CPU, see [`super::msr::efer_bits`].
    fn efer_bits(&self) -> u64;
    /// The MSRs that are guarded.
    fn guards(&self) -> Guards;
}

/// What the run loop does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run the guest again.
    Resume,
    /// The guest called a runtime service.
    Firmware,
    /// The guest touched registers that are watched.
    Registers {
        /// Which.
        of: Registers,
        /// Offset in the page.
        offset: u32,
        /// What was tried.
        access: Access,
    },
    /// Let a pending SMI be taken in the host.
    Smi,
    /// Let a pending NMI be taken in the host; the guest gets it.
    Nmi,
    /// The guest's CPU is to wait for a Startup IPI.
    Init,
    /// The guest's CPU starts at this page.
    Startup {
        /// Page number.
        vector: u8,
    },
    /// The guest used a port that is guarded.
    Port {
        /// Port number.
        port: u16,
        /// Operand bytes.
        size: u8,
        /// IN rather than OUT.
        input: bool,
        /// Address of the next instruction.
        next_rip: u64,
    },
    /// A CPU that the guest stops has halted.
    Halt,
    /// The guest shut down (triple fault).
    Shutdown,
    /// The guest touched what it may not have: recorded, and the guest took the exception.
    Refused {
        /// Guest-physical address.
        gpa: u64,
        /// What was tried.
        access: Access,
    },
    /// Nothing that this MLE asked for: the end of the launch.
    Fatal(Exit),
}

/// Length of CPUID, RDMSR, WRMSR and INVD without prefixes, where the CPU does not tell.
pub const TWO_BYTES: u64 = 2;

/// Length of XSETBV without prefixes.
const THREE_BYTES: u64 = 3;

/// Whether XSETBV of XCR0 would raise #GP for this value; the MLE executes it for the guest.
///
/// Spec: \[SDM1\] "Extended Control Register 0", "XSETBV" of \[SDM2\].
fn xcr0_is_valid(value: u64, hw: &impl Hardware) -> bool {
    const X87: u64 = 1 << 0;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const MPX: u64 = 3 << 3;
    const AVX512: u64 = 7 << 5;
    const AMX: u64 = 3 << 17;
    let [low, _, _, high] = hw.cpuid(0xd, 0);
    let supported = u64::from(high) << 32 | u64::from(low);
    let whole = |group: u64| value & group == 0 || value & group == group;
    value & !supported == 0
        && value & X87 != 0
        && (value & AVX == 0 || value & SSE != 0)
        && [MPX, AVX512, AMX].into_iter().all(whole)
        && (value & AVX512 == 0 || value & AVX != 0)
}

/// Answers `exit`. `watched` says what is watched at a page.
pub fn answer(
    vcpu: &mut dyn Vcpu,
    exit: Exit,
    hw: &impl Hardware,
    watched: impl Fn(u64) -> Option<Registers>,
) -> Next {
    match exit {
        Exit::Cpuid => {
            let (leaf, subleaf) = (vcpu.gprs().rax as u32, vcpu.gprs().rcx as u32);
            let [a, b, c, d] = cpuid::cpuid(leaf, subleaf, &vcpu.control(), |l, s| hw.cpuid(l, s));
            let g: &mut Gprs = vcpu.gprs_mut();
            (g.rax, g.rbx, g.rcx, g.rdx) = (a.into(), b.into(), c.into(), d.into());
            vcpu.advance(TWO_BYTES);
            Next::Resume
        }
        Exit::MsrRead { index } => finish_msr(hw.guards().read(vcpu, index), vcpu, || ()),
        Exit::MsrWrite { index, value } => {
            let answer = hw.guards().write(vcpu, index, value, || hw.rdmsr(index), hw.tsc(), hw.efer_bits());
            finish_msr(answer, vcpu, || hw.wrmsr(index, value))
        }
        Exit::Memory { gpa, access, .. } => match watched(gpa & !0xfff) {
            Some(of) if access != Access::Fetch => {
                Next::Registers { of, offset: (gpa & 0xfff) as u32, access }
            }
            _ => {
                // No device answers there, and for the guest's kernel it is a fault it can attribute.
                vcpu.inject(Exception::GeneralProtection);
                Next::Refused { gpa, access }
            }
        },
        Exit::Hypercall => Next::Firmware,
        Exit::VirtualizationInstruction => {
            vcpu.inject(Exception::InvalidOpcode);
            Next::Resume
        }
        Exit::InvalidateCaches => {
            hw.write_back_caches();
            vcpu.advance(TWO_BYTES);
            Next::Resume
        }
        Exit::SetXcr { index, value } => {
            if index == 0 && xcr0_is_valid(value, hw) {
                hw.set_xcr0(value);
                vcpu.advance(THREE_BYTES);
            } else {
                vcpu.inject(Exception::GeneralProtection);
            }
            Next::Resume
        }
        Exit::Absorbed => Next::Resume,
        Exit::Startup { vector } => Next::Startup { vector },
        Exit::Smi => Next::Smi,
        Exit::Nmi => Next::Nmi,
        Exit::Init => Next::Init,
        Exit::Halt => Next::Halt,
        Exit::Shutdown => Next::Shutdown,
        Exit::Port { string: true, .. } => {
            // No driver moves strings through these ports.
            vcpu.inject(Exception::GeneralProtection);
            Next::Resume
        }
        Exit::Port { port, size, input, next_rip, .. } => Next::Port { port, size, input, next_rip },
        Exit::Interrupt | Exit::Exception { .. } | Exit::InvalidState | Exit::Unexpected { .. } => {
            Next::Fatal(exit)
        }
    }
}

fn finish_msr(answer: Answer, vcpu: &mut dyn Vcpu, forward: impl FnOnce()) -> Next {
    match answer {
        Answer::Value(value) => {
            let g = vcpu.gprs_mut();
            (g.rax, g.rdx) = (value & 0xffff_ffff, value >> 32);
            vcpu.advance(TWO_BYTES);
        }
        Answer::Done => vcpu.advance(TWO_BYTES),
        Answer::Forward => {
            forward();
            vcpu.advance(TWO_BYTES);
        }
        Answer::Fault => vcpu.inject(Exception::GeneralProtection),
    }
    Next::Resume
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeVcpu;
    use core::cell::Cell;

    #[derive(Default)]
    struct FakeHardware {
        msr: Cell<(u32, u64)>,
    }
    impl Hardware for FakeHardware {
        fn cpuid(&self, leaf: u32, subleaf: u32) -> Leaf {
            [leaf, subleaf, 0, 0]
        }
        fn rdmsr(&self, _: u32) -> u64 {
            0
        }
        fn wrmsr(&self, index: u32, value: u64) {
            self.msr.set((index, value));
        }
        fn tsc(&self) -> u64 {
            0
        }
        fn write_back_caches(&self) {}
        fn set_xcr0(&self, value: u64) {
            self.msr.set((0, value));
        }
        fn efer_bits(&self) -> u64 {
            0xd01
        }
        fn guards(&self) -> Guards {
            Guards::AMD
        }
    }

    fn nothing(_: u64) -> Option<Registers> {
        None
    }

    fn apic(page: u64) -> Option<Registers> {
        (page == 0xfee0_0000).then_some(Registers::Apic)
    }

    #[test]
    fn every_exit_a_guest_can_cause_leaves_the_mle_running() {
        let memory = Exit::Memory { gpa: 0x1000, access: Access::Write, table_walk: true };
        let exits = [
            Exit::Cpuid,
            Exit::Port { port: 0x92, size: 1, input: false, string: false, next_rip: 0 },
            Exit::Port { port: 0x64, size: 4, input: true, string: true, next_rip: 0 },
            Exit::MsrRead { index: 0x4000_0000 },
            Exit::MsrWrite { index: 0xc001_0117, value: 1 },
            memory,
            Exit::Hypercall,
            Exit::VirtualizationInstruction,
            Exit::InvalidateCaches,
            Exit::Smi,
            Exit::Init,
            Exit::Halt,
            Exit::Shutdown,
        ];
        for exit in exits {
            let next = answer(&mut FakeVcpu::default(), exit, &FakeHardware::default(), nothing);
            assert!(!matches!(next, Next::Fatal(_)), "{exit}");
        }
    }

    #[test]
    fn a_hole_gives_the_guest_a_fault_and_the_log_a_record() {
        let mut v = FakeVcpu::default();
        let exit = Exit::Memory { gpa: 0xfed4_2000, access: Access::Read, table_walk: false };
        let next = answer(&mut v, exit, &FakeHardware::default(), apic);
        assert_eq!(next, Next::Refused { gpa: 0xfed4_2000, access: Access::Read });
        assert_eq!((v.injected, v.rip), (Some(Exception::GeneralProtection), 0x1000));
    }

    #[test]
    fn a_page_of_registers_is_special_only_while_it_is_watched() {
        let exit = Exit::Memory { gpa: 0xfee0_0300, access: Access::Write, table_walk: false };
        let hw = FakeHardware::default();
        let watched = answer(&mut FakeVcpu::default(), exit, &hw, apic);
        let right = Next::Registers { of: Registers::Apic, offset: 0x300, access: Access::Write };
        assert_eq!(watched, right);
        assert!(matches!(answer(&mut FakeVcpu::default(), exit, &hw, nothing), Next::Refused { .. }));
    }

    #[test]
    fn cpuid_advances_and_clears_the_high_halves() {
        let mut v = FakeVcpu::default();
        v.gprs.rax = 0xffff_ffff_0000_0005;
        answer(&mut v, Exit::Cpuid, &FakeHardware::default(), nothing);
        assert_eq!((v.gprs.rax, v.rip), (5, 0x1002));
    }

    #[test]
    fn xcr0_takes_what_the_cpu_takes() {
        struct Avx512;
        impl Hardware for Avx512 {
            fn cpuid(&self, _: u32, _: u32) -> Leaf {
                [0x6_00ff, 0, 0, 0]
            }
            fn rdmsr(&self, _: u32) -> u64 {
                0
            }
            fn wrmsr(&self, _: u32, _: u64) {}
            fn tsc(&self) -> u64 {
                0
            }
            fn write_back_caches(&self) {}
            fn set_xcr0(&self, _: u64) {}
            fn efer_bits(&self) -> u64 {
                0
            }
            fn guards(&self) -> Guards {
                Guards::AMD
            }
        }
        for value in [1, 3, 7, 0x1b, 0xe7, 0xff, 0x6_0003] {
            assert!(xcr0_is_valid(value, &Avx512), "{value:#x}");
        }
        for value in [0, 2, 5, 0xb, 0x27, 0xe3, 0x2_0003, 0x107, 1 << 63 | 1] {
            assert!(!xcr0_is_valid(value, &Avx512), "{value:#x}");
        }
        let mut v = FakeVcpu::default();
        let hw = FakeHardware::default();
        answer(&mut v, Exit::SetXcr { index: 1, value: 1 }, &hw, nothing);
        assert_eq!((v.injected, hw.msr.get()), (Some(Exception::GeneralProtection), (0, 0)));
    }

    #[test]
    fn a_forwarded_write_reaches_the_cpu_and_a_faulting_one_does_not() {
        let hw = FakeHardware::default();
        let mut v = FakeVcpu::default();
        answer(&mut v, Exit::MsrWrite { index: 0xc001_0015, value: 1 << 18 }, &hw, nothing);
        assert_eq!((hw.msr.get(), v.injected), ((0xc001_0015, 1 << 18), None));
        answer(&mut v, Exit::MsrWrite { index: 0xc001_0015, value: 1 }, &hw, nothing);
        assert_eq!(hw.msr.get(), (0xc001_0015, 1 << 18));
        assert_eq!(v.injected, Some(Exception::GeneralProtection));
    }
}
