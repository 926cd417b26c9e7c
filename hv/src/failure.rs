//! The record of a failed launch: written before the machine is reset, shown by the loader on the next boot.
//!
//! Eight bytes of the RTC's battery-backed RAM, [`CMOS_FIRST`] and up: the one storage that every PC has, that a
//! reset of any kind leaves alone and that needs no driver. They lie above what the IBM AT layout, SeaBIOS,
//! OVMF and QEMU use, and outside the area the AT checksum covers. What is read there proves nothing: the gap can
//! write it too.
//!
//! | byte | content |
//! |---|---|
//! | 0, 1 | `Cn` |
//! | 2 | [`Stage`] |
//! | 3, 4 | code, little endian |
//! | 5, 6 | detail, little endian |
//! | 7 | complement of the sum of bytes 0 to 6 |

use core::fmt;

use crate::io::PortIo;

/// First byte of the record in the RTC's RAM.
pub const CMOS_FIRST: u8 = 0x70;
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
/// Bits of TXT.ERRORCODE: valid, by software, by an MLE.
const ERRORCODE_OF_MLE: u32 = 0xc000_8000;
const LEN: usize = 8;
const MAGIC: [u8; 2] = *b"Cn";

/// Who gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// The SLB stage; the code is an [`SlbError`].
    Slb = 1,
    /// The MLE; the code is an [`MleError`].
    Mle = 2,
    /// Nobody gave up, but firmware did not take all writes that waited for a reset: the code is how many, the detail the
    /// low half of the first EFI status.
    Deferred = 3,
    /// The MLE's first stage after SENTER; the code is a [`SenterError`].
    Senter = 4,
}

/// What is kept of a failed launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who gave up.
    pub stage: Stage,
    /// Why: a number of that stage's list.
    pub code: u16,
    /// What the code's description says, cut to 16 bits.
    pub detail: u16,
}

impl Record {
    fn to_bytes(self) -> [u8; LEN] {
        let [m0, m1] = MAGIC;
        let [c0, c1] = self.code.to_le_bytes();
        let [d0, d1] = self.detail.to_le_bytes();
        let mut bytes = [m0, m1, self.stage as u8, c0, c1, d0, d1, 0];
        bytes[LEN - 1] = check(&bytes);
        bytes
    }

    fn from_bytes(bytes: [u8; LEN]) -> Option<Self> {
        let [m0, m1, stage, c0, c1, d0, d1, sum] = bytes;
        if [m0, m1] != MAGIC || sum != check(&bytes) {
            return None;
        }
        let stage = match stage {
            1 => Stage::Slb,
            2 => Stage::Mle,
            3 => Stage::Deferred,
            4 => Stage::Senter,
            _ => return None,
        };
        Some(Self { stage, code: u16::from_le_bytes([c0, c1]), detail: u16::from_le_bytes([d0, d1]) })
    }

    /// What the record is in TXT.ERRORCODE, which a reset of the platform leaves alone: valid, by software, by an MLE, and then
    /// ours: detail in bits 29:16 (its low 14 bits), stage in 14:12, code in 11:0.
    ///
    /// Spec: \[TXT\] "TXT.ERRORCODE".
    pub const fn errorcode(self) -> u32 {
        let detail = (self.detail & 0x3fff) as u32;
        ERRORCODE_OF_MLE | detail << 16 | (self.stage as u32 & 7) << 12 | self.code as u32 & 0xfff
    }

    /// The record that TXT.ERRORCODE holds; `None` when it holds something else.
    pub fn from_errorcode(errorcode: u32) -> Option<Self> {
        let stage = [Stage::Mle, Stage::Senter].into_iter().find(|s| *s as u32 == errorcode >> 12 & 7)?;
        let record =
            Self { stage, code: (errorcode & 0xfff) as u16, detail: (errorcode >> 16 & 0x3fff) as u16 };
        (record.errorcode() == errorcode).then_some(record)
    }

    /// Keeps the record over a reset.
    pub fn save(self, ports: &impl PortIo) {
        put(ports, self.to_bytes());
    }

    /// The record of an earlier boot, if there is one.
    pub fn load(ports: &impl PortIo) -> Option<Self> {
        let mut bytes = [0; LEN];
        for (index, byte) in (CMOS_FIRST..).zip(&mut bytes) {
            ports.out8(CMOS_INDEX, index);
            *byte = ports.in8(CMOS_DATA);
        }
        Self::from_bytes(bytes)
    }

    /// Forgets the record, so that it is shown once.
    pub fn clear(ports: &impl PortIo) {
        put(ports, [0; LEN]);
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stage, code, detail } = *self;
        let (who, text) = match stage {
            Stage::Slb => ("SLB stage", SlbError::from_code(code).map(SlbError::text)),
            Stage::Mle => ("MLE", MleError::from_code(code).map(MleError::text)),
            Stage::Senter => ("MLE after SENTER", SenterError::from_code(code).map(SenterError::text)),
            Stage::Deferred => {
                return write!(
                    f,
                    "firmware refused {code} deferred write(s) of variables, EFI status {detail}"
                );
            }
        };
        match text {
            Some(text) => write!(f, "{who}, error {code}: {text} (detail {detail:#06x})"),
            None => write!(f, "{who}, unknown error {code} (detail {detail:#06x})"),
        }
    }
}

fn check(bytes: &[u8; LEN]) -> u8 {
    !bytes.iter().take(LEN - 1).fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn put(ports: &impl PortIo, bytes: [u8; LEN]) {
    for (index, byte) in (CMOS_FIRST..).zip(bytes) {
        ports.out8(CMOS_INDEX, index);
        ports.out8(CMOS_DATA, byte);
    }
}

macro_rules! errors {
    ($(#[$doc:meta])* $of:ident: $($name:ident = $code:literal, $text:literal;)*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum $of {
            $(#[doc = $text] $name = $code,)*
        }

        impl $of {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// What happened, in a few words, and what the detail is.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// The error with this number.
            pub fn from_code(code: u16) -> Option<Self> {
                Self::ALL.iter().copied().find(|e| *e as u16 == code)
            }
        }
    };
}

errors! {
    /// Why the MLE gave up. Append, never renumber.
    MleError:
    Launch = 1, "the launch could not go on; the reason is on the serial line alone";
    Exception = 2, "CPU exception in the MLE; detail: vector";
    Panic = 3, "a check of the program itself failed";
    GuestExit = 4, "the guest's CPU stopped for a cause that nobody asked for";
    Damage = 5, "SMM changed memory of the MLE; detail: low half of the page's number";
    Cpu = 6, "a processor came up that was not expected; detail: its number";
    Interrupts = 7, "an IOMMU did not take what devices of the guest may send";
}

errors! {
    /// Why the MLE's first stage after SENTER gave up. Append, never renumber.
    SenterError:
    NotSenter = 1, "TXT.STS does not say that SENTER is done and the private registers are open";
    Heap = 2, "a table of the TXT heap does not fit; detail: which, from 1, or 0 for all of it";
    Region = 3, "the low protected range does not cover the MLE region";
    PageTables = 4, "the MLE page tables do not have the image in one piece";
    ErrorCode = 5, "TXT.ERRORCODE does not say that SINIT succeeded; detail: its low half";
    OsMleData = 6, "OsMleData is not the loader's; detail: see the table of fields after SENTER";
    OsSinitData = 7, "OsSinitData has a value that we do not accept; detail: see the table of fields after SENTER";
    SinitMleData = 8, "SinitMleData has a value that we do not accept; detail: see the table of fields after SENTER";
    Slrt = 9, "the SLRT has a value that we do not accept; detail: see the table of fields after SENTER";
    Dmar = 10, "SINIT's copy of the DMAR is unusable; detail: its length";
    Memory = 11, "memory of the launch is not RAM by SINIT's list; detail: address / 1 MiB";
    Unprotected = 12, "memory of the launch is outside the protected ranges; detail: address / 1 MiB";
    Log = 13, "SINIT's event log is not where the loader has the event log";
    Saved = 14, "a memory type register or IA32_MISC_ENABLE cannot be restored; detail: low half of the value";
    Missing = 15, "processors did not join the MLE; detail: how many did";
    Timer = 16, "the time-stamp counter's frequency is absurd; detail: MHz";
    Unreadable = 17, "memory to be read is not there; detail: address / 1 MiB";
}

errors! {
    /// Why the SLB stage gave up. Append, never renumber: the numbers are in `docs/slb-errors.md` and in people's notes.
    SlbError:
    Exception = 1, "CPU exception; detail: offset of the instruction in the SLB";
    Panic = 2, "a check of the program itself failed";
    SlbBase = 3, "the SLB is not at a 64 KiB boundary in RAM between 1 MiB and 4 GiB; detail: base / 64 KiB";
    NoGibPages = 4, "the CPU has no 1 GiB pages";
    ApicMoved = 5, "the local APIC is not at its reset address; detail: address / 64 KiB";
    AddressMap = 6, "an MSR that redirects memory holds a value we do not understand; detail: low half of its number";
    Timer = 7, "the interval timer did not end in time, or the time-stamp counter's frequency is absurd; detail: MHz";
    SlrtAddress = 8, "the SLRT is not in RAM between 1 MiB and 4 GiB clear of the SLB; detail: address / 64 KiB";
    SlrtFormat = 9, "the SLRT is malformed; detail: low half of the entry tag, or of the header field's value";
    SlrtField = 10, "an SLRT field has a value we do not accept; detail: see the table of fields";
    Policy = 11, "the SLRT policy is not the one we measure by; detail: index of the entry, or their number";
    Region = 12, "the MLE region is misplaced; detail: see the table of places";
    Log = 13, "the event log area is misplaced or too small; detail: see the table of places";
    MemoryMap = 14, "the EFI memory map is unreadable or does not list the region or the log; detail: see the table of places";
    Ivrs = 15, "no usable ACPI table IVRS, by which DMA would be blocked; detail: see the table of ACPI errors";
    Dma = 16, "DMA could not be blocked; detail: number of the IOMMU error";
    SlrtChanged = 17, "the SLRT changed before DMA was blocked; detail: offset";
    MleHeader = 18, "the MLE image's header is not ours or disagrees with the SLRT; detail: see the table of fields";
    Tpm = 19, "the TPM does not answer as it should; detail: number of the TPM error";
    NoLocality2 = 20, "the TPM has no locality 2 and the configuration insists on it";
    NotLaunched = 21, "PCR 17 does not hold the measurement of this SLB: no SKINIT, or CPUs were not parked; detail: hash algorithm, 0 when none is known";
    Unreadable = 22, "memory to be read is not RAM; detail: address / 64 KiB";
    Extend = 23, "a PCR could not be extended; detail: number of the TPM error";
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;
    use proptest::prelude::*;

    struct Rtc(RefCell<(u8, [u8; 128])>);
    impl PortIo for Rtc {
        fn in8(&self, port: u16) -> u8 {
            assert_eq!(port, 0x71);
            let rtc = self.0.borrow();
            rtc.1[usize::from(rtc.0)]
        }
        fn out8(&self, port: u16, value: u8) {
            let rtc = &mut *self.0.borrow_mut();
            match port {
                0x70 => rtc.0 = value & 0x7f,
                0x71 => rtc.1[usize::from(rtc.0)] = value,
                _ => panic!("port {port:#x}"),
            }
        }
        fn in16(&self, _: u16) -> u16 {
            panic!()
        }
        fn in32(&self, _: u16) -> u32 {
            panic!()
        }
        fn out16(&self, _: u16, _: u16) {
            panic!()
        }
        fn out32(&self, _: u16, _: u32) {
            panic!()
        }
    }

    #[test]
    fn a_record_is_shown_once_and_touches_its_own_bytes_alone() {
        let rtc = Rtc(RefCell::new((0, [0x5a; 128])));
        assert_eq!(Record::load(&rtc), None);
        let record = Record { stage: Stage::Slb, code: 15, detail: 0xbeef };
        record.save(&rtc);
        assert_eq!(Record::load(&rtc), Some(record));
        Record::clear(&rtc);
        assert_eq!(Record::load(&rtc), None);
        let rtc = rtc.0.into_inner().1;
        assert!(rtc[..0x70].iter().chain(&rtc[0x78..]).all(|byte| *byte == 0x5a));
    }

    #[test]
    fn numbers_are_unique_and_listed_in_the_document() {
        let document = include_str!("../../docs/slb-errors.md");
        let slb = SlbError::ALL.iter().map(|e| (*e as u16, e.text()));
        let mle = MleError::ALL.iter().map(|e| (*e as u16, e.text()));
        let senter = SenterError::ALL.iter().map(|e| (*e as u16, e.text()));
        for (code, text) in slb.chain(mle).chain(senter) {
            let row = format!("| {code} | {text} |");
            assert!(document.contains(&row), "docs/slb-errors.md lacks: {row}");
        }
        assert!(SlbError::ALL.iter().all(|e| SlbError::from_code(*e as u16) == Some(*e)));
        assert!(MleError::ALL.iter().all(|e| MleError::from_code(*e as u16) == Some(*e)));
    }

    #[test]
    fn txt_keeps_the_record_too() {
        let record = Record { stage: Stage::Senter, code: SenterError::Region as u16, detail: 0x1234 };
        assert_eq!(record.errorcode(), 0xd234_c003);
        assert_eq!(Record::from_errorcode(0xd234_c003), Some(record));
        let mle = Record { stage: Stage::Mle, code: MleError::Exception as u16, detail: 14 };
        assert_eq!(Record::from_errorcode(0xc00e_a002), Some(mle));
        // SINIT's success, a CPU's, an ACM's, Linux's.
        for other in [0xc000_0001, 0x8000_000d, 0xc000_0041, 0xc000_8001, 0] {
            assert_eq!(Record::from_errorcode(other), None, "{other:#x}");
        }
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_noticed(code: u16, detail: u16, bit in 0usize..64) {
            let mut bytes = Record { stage: Stage::Mle, code, detail }.to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::from_bytes(bytes), None);
        }
    }
}
