//! The TXT heap: four tables, each after its size, which counts itself.
//!
//! Spec: \[TXT\] "TXT Heap Memory". Offsets count from behind the size.

/// Bytes of a table's size.
pub const SIZE_WORD: u64 = 8;

/// BiosData.
pub mod bios {
    /// NumLogProcs.
    pub const PROCESSORS: u64 = 24;
    /// Bytes of the fields that are used.
    pub const MIN: u64 = 36;
}

/// OsMleData, ours: TrenchBoot's layout, version 1.
pub mod os_mle {
    /// Version.
    pub const VERSION: u64 = 0;
    /// The value of [`VERSION`].
    pub const VERSION_1: u32 = 1;
    /// Address of the SLRT.
    pub const SLRT: u64 = 8;
    /// Address of the SLRT's entry for Intel.
    pub const INFO: u64 = 16;
    /// Where the other processors are to be started: address and bytes.
    pub const AP_WAKE: u64 = 24;
    /// Bytes.
    pub const SIZE: u64 = 96;
}

/// OsSinitData.
pub mod os_sinit {
    /// Version.
    pub const VERSION: u64 = 0;
    /// The version for TPM 2.0.
    pub const VERSION_TPM2: u32 = 7;
    /// MLE page table base, MLE size, MLE header's linear address.
    pub const MLE: u64 = 8;
    /// PMRs: low base, low size, high base, high size.
    pub const PMR: u64 = 32;
    /// Capabilities.
    pub const CAPABILITIES: u64 = 80;
    /// Address of the RSDP.
    pub const RSDP: u64 = 84;
    /// Extended elements.
    pub const ELEMENTS: u64 = 92;
    /// Bytes with the two elements that we write.
    pub const SIZE: u64 = ELEMENTS + 28 + 8;
    /// Unit of a PMR.
    pub const PMR_UNIT: u64 = 2 << 20;
}

/// SinitMleData.
pub mod sinit_mle {
    /// Version.
    pub const VERSION: u64 = 0;
    /// RlpWakeupAddr.
    pub const WAKEUP: u64 = 120;
    /// NumberOfSinitMdrs, SinitMdrTableOffset.
    pub const MDRS: u64 = 128;
    /// SinitVtdDmarTableSize, SinitVtdDmarTableOffset.
    pub const DMAR: u64 = 136;
}

/// HEAP_END_ELEMENT.
pub const ELEMENT_END: u32 = 0;
/// HEAP_EVENT_LOG_POINTER_ELEMENT2_1.
pub const ELEMENT_LOG: u32 = 8;

/// Capabilities, of SINIT, the MLE's header and OsSinitData.
pub mod capability {
    /// Other processors wait for GETSEC\[WAKEUP\].
    pub const WAKE_GETSEC: u32 = 1 << 0;
    /// Other processors wait by MONITOR.
    pub const WAKE_MONITOR: u32 = 1 << 1;
    /// ECX holds the MLE's page tables at its entry.
    pub const ECX_PAGE_TABLES: u32 = 1 << 2;
    /// The event log is TCG's.
    pub const TCG_LOG: u32 = 1 << 9;
}

/// What the loader fills in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Address of the SLRT.
    pub slrt: u64,
    /// Address of its entry for Intel.
    pub info: u64,
    /// The launch pages: address, bytes.
    pub launch_page: (u32, u32),
    /// MLE page tables.
    pub page_tables: u64,
    /// Bytes of the MLE, whole pages.
    pub mle_size: u64,
    /// Linear address of its header.
    pub mle_header: u64,
    /// PMRs: low base, low size, high base, high size.
    pub pmr: [u64; 4],
    /// See [`capability`].
    pub capabilities: u32,
    /// Address of the RSDP.
    pub rsdp: u64,
    /// The event log: address, bytes.
    pub log: (u64, u32),
}

/// Bytes of OsMleData and OsSinitData, and of the size of SinitMleData, which SINIT writes over.
pub const WRITTEN: usize = (SIZE_WORD + os_mle::SIZE + SIZE_WORD + os_sinit::SIZE + SIZE_WORD) as usize;

/// OsMleData, OsSinitData and an empty SinitMleData as they follow BiosData.
pub fn build(c: &Contents) -> [u8; WRITTEN] {
    let mut bytes = [0; WRITTEN];
    let mut put = |at: u64, value: &[u8]| {
        let to = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at..)?.get_mut(..value.len()));
        to.unwrap_or_default().copy_from_slice(value);
    };
    const MLE: u64 = SIZE_WORD;
    put(0, &(MLE + os_mle::SIZE).to_le_bytes());
    put(const { MLE + os_mle::VERSION }, &os_mle::VERSION_1.to_le_bytes());
    put(const { MLE + os_mle::SLRT }, &c.slrt.to_le_bytes());
    put(const { MLE + os_mle::INFO }, &c.info.to_le_bytes());
    put(const { MLE + os_mle::AP_WAKE }, &c.launch_page.0.to_le_bytes());
    put(const { MLE + os_mle::AP_WAKE + 4 }, &c.launch_page.1.to_le_bytes());

    const SINIT: u64 = MLE + os_mle::SIZE + SIZE_WORD;
    put(const { MLE + os_mle::SIZE }, &(SIZE_WORD + os_sinit::SIZE).to_le_bytes());
    put(const { SINIT + os_sinit::VERSION }, &os_sinit::VERSION_TPM2.to_le_bytes());
    for (at, value) in (SINIT + os_sinit::MLE..).step_by(8).zip([c.page_tables, c.mle_size, c.mle_header]) {
        put(at, &u64::to_le_bytes(value));
    }
    for (at, value) in (SINIT + os_sinit::PMR..).step_by(8).zip(c.pmr) {
        put(at, &u64::to_le_bytes(value));
    }
    put(const { SINIT + os_sinit::CAPABILITIES }, &c.capabilities.to_le_bytes());
    put(const { SINIT + os_sinit::RSDP }, &c.rsdp.to_le_bytes());
    const LOG: u64 = SINIT + os_sinit::ELEMENTS;
    put(LOG, &ELEMENT_LOG.to_le_bytes());
    put(const { LOG + 4 }, &28_u32.to_le_bytes());
    put(const { LOG + 8 }, &c.log.0.to_le_bytes());
    put(const { LOG + 16 }, &c.log.1.to_le_bytes());
    put(const { LOG + 28 }, &ELEMENT_END.to_le_bytes());
    put(const { LOG + 32 }, &8_u32.to_le_bytes());
    put(const { SINIT + os_sinit::SIZE }, &SIZE_WORD.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offsets are typed a second time, from the start of OsMleData's size.
    #[test]
    fn fields_lie_where_the_manual_has_them() {
        let bytes = build(&Contents {
            slrt: 0x11,
            info: 0x22,
            launch_page: (0x9_d000, 0x2000),
            page_tables: 0x33,
            mle_size: 0x4_1000,
            mle_header: 0x40,
            pmr: [0, 0x7fe0_0000, 1 << 32, 0x4000_0000],
            capabilities: 0x226,
            rsdp: 0x55,
            log: (0x66, 0x8000),
        });
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((u64_at(0), u32_at(8), u64_at(16), u64_at(24)), (104, 1, 0x11, 0x22));
        assert_eq!((u32_at(32), u32_at(36)), (0x9_d000, 0x2000));
        let sinit = 104;
        assert_eq!((u64_at(sinit), u32_at(sinit + 8), u32_at(sinit + 12)), (136, 7, 0));
        assert_eq!((u64_at(sinit + 16), u64_at(sinit + 24), u64_at(sinit + 32)), (0x33, 0x4_1000, 0x40));
        assert_eq!((u64_at(sinit + 40), u64_at(sinit + 48)), (0, 0x7fe0_0000));
        assert_eq!((u64_at(sinit + 56), u64_at(sinit + 64)), (1 << 32, 0x4000_0000));
        assert_eq!((u64_at(sinit + 72), u64_at(sinit + 80)), (0, 0), "no policy of the owner's");
        assert_eq!((u32_at(sinit + 88), u64_at(sinit + 92)), (0x226, 0x55));
        assert_eq!((u32_at(sinit + 100), u32_at(sinit + 104)), (8, 28));
        assert_eq!(
            (u64_at(sinit + 108), u32_at(sinit + 116), u32_at(sinit + 120), u32_at(sinit + 124)),
            (0x66, 0x8000, 0, 0)
        );
        assert_eq!((u32_at(sinit + 128), u32_at(sinit + 132)), (0, 8));
        assert_eq!((u64_at(sinit + 136), bytes.len()), (8, sinit + 144));
    }
}
