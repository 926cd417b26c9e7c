//! CPUID as the guest sees it: the CPU's own, without virtualization and memory encryption, with Cordon's leaves.

use hv::vcpu::Control;

/// EAX, EBX, ECX, EDX.
pub type Leaf = [u32; 4];

/// First of Cordon's leaves, in the range that hypervisors use.
pub const BASE: u32 = 0x4000_0000;
/// Last of them.
pub const LAST: u32 = BASE + 1;
/// Leaf [`BASE`]: EBX, ECX, EDX.
pub const SIGNATURE: &[u8; 12] = b"CordonMLE   ";
/// Leaf [`BASE`] + 1, EAX: version of this interface.
pub const INTERFACE: u32 = 1;
/// Leaf [`BASE`] + 1, EBX bit 0: EFI runtime services are mediated.
pub const FEATURE_FIRMWARE: u32 = 1 << 0;

/// Leaf 1, ECX: DTES64, DS-CPL, VMX, SMX, x2APIC.
const HIDDEN_1C: u32 = 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 21;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;

/// The guest's view of `leaf`. `native` executes CPUID; `control` is the guest's: two leaves mirror CR4 bits, and
/// the CPU would show the MLE's.
///
/// Spec: \[APM3\] "Function 1h", "Function 7h", "Function 8000_0001h", "Function 8000_000Ah", "Function 8000_001Fh".
pub fn cpuid(leaf: u32, subleaf: u32, control: &Control, native: impl Fn(u32, u32) -> Leaf) -> Leaf {
    let mirror = |value: u32, bit: u32, on: bool| if on { value | bit } else { value & !bit };
    match leaf {
        BASE => {
            let word = |at: usize| {
                SIGNATURE
                    .get(at..)
                    .and_then(|s| s.first_chunk::<4>())
                    .map_or(0, |bytes| u32::from_le_bytes(*bytes))
            };
            [LAST, word(0), word(4), word(8)]
        }
        LAST => [INTERFACE, FEATURE_FIRMWARE, 0, 0],
        0x4000_0002..=0x4fff_ffff => [0; 4],
        // Hidden whole: SVM and memory encryption, which would let the guest re-key what the MLE measured.
        // Intel: enclaves and processor trace, whose output goes to physical addresses.
        0x8000_000a | 0x8000_001f | 0x12 | 0x14 => [0; 4],
        _ => {
            let [a, b, c, d] = native(leaf, subleaf);
            // Hardware feedback: written by physical address.
            let a = if leaf == 6 { a & !(1 << 19 | 1 << 23) } else { a };
            let c = match leaf {
                // No x2APIC: its ICR is an MSR, beside the page that is watched. No DTES64 (2), DS-CPL (4): the debug store
                // is written by linear address, in the MLE too. VMX (5), SMX (6).
                1 => mirror(c & !HIDDEN_1C | 1 << 31, 1 << 27, control.cr4 & CR4_OSXSAVE != 0),
                // No SGX launch configuration.
                7 if subleaf == 0 => mirror(c & !(1 << 30), 1 << 4, control.cr4 & CR4_PKE != 0),
                // SVM, SKINIT.
                0x8000_0001 => c & !(1 << 2 | 1 << 12),
                _ => c,
            };
            // No scalable machine check: its MSRs are beyond the permission map, so that each access would exit.
            let b = match leaf {
                0x8000_0007 => b & !(1 << 3),
                // SGX, processor trace.
                7 if subleaf == 0 => b & !(1 << 2 | 1 << 25),
                _ => b,
            };
            let d = match leaf {
                // Debug store.
                1 => d & !(1 << 21),
                // PCONFIG.
                7 if subleaf == 0 => d & !(1 << 18),
                _ => d,
            };
            [a, b, c, d]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: Control = Control { cr0: 0, cr3: 0, cr4: 0, efer: 0 };

    fn all_ones(_: u32, _: u32) -> Leaf {
        [u32::MAX; 4]
    }

    #[test]
    fn virtualization_is_hidden_and_the_hypervisor_is_announced() {
        assert_eq!(cpuid(0x8000_000a, 0, &CONTROL, all_ones), [0; 4]);
        assert_eq!(cpuid(0x8000_0001, 0, &CONTROL, all_ones)[2] & 0x1004, 0);
        assert_ne!(cpuid(1, 0, &CONTROL, |_, _| [0; 4])[2] & 1 << 31, 0);
        assert_eq!(cpuid(1, 0, &CONTROL, all_ones)[2] & 1 << 21, 0, "x2APIC");
        assert_eq!(cpuid(0x8000_0007, 0, &CONTROL, all_ones)[1] & 1 << 3, 0, "SMCA");
        assert_eq!(cpuid(1, 0, &CONTROL, all_ones)[2] & 0x60, 0, "VMX, SMX");
        assert_eq!(cpuid(1, 0, &CONTROL, all_ones)[3] & 1 << 21, 0, "debug store");
        assert_eq!(cpuid(7, 0, &CONTROL, all_ones)[1] & 0x0200_0004, 0, "processor trace, SGX");
        assert_eq!(
            (cpuid(0x12, 0, &CONTROL, all_ones), cpuid(0x14, 0, &CONTROL, all_ones)),
            ([0; 4], [0; 4])
        );
        let [last, b, c, d] = cpuid(BASE, 0, &CONTROL, all_ones);
        let name: Vec<u8> = [b, c, d].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!((last, name.as_slice()), (LAST, b"CordonMLE   ".as_slice()));
    }

    #[test]
    fn bits_that_mirror_cr4_are_the_guests() {
        let on = Control { cr4: CR4_OSXSAVE | CR4_PKE, ..CONTROL };
        assert_eq!(cpuid(1, 0, &CONTROL, all_ones)[2] & 1 << 27, 0);
        assert_ne!(cpuid(1, 0, &on, |_, _| [0; 4])[2] & 1 << 27, 0);
        assert_eq!(cpuid(7, 0, &CONTROL, all_ones)[2] & 1 << 4, 0);
        assert_ne!(cpuid(7, 0, &on, |_, _| [0; 4])[2] & 1 << 4, 0);
        assert_eq!(cpuid(7, 1, &CONTROL, all_ones)[2], u32::MAX);
    }
}
