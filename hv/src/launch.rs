//! What the loader, the SLB stage and the MLE hand to each other, and the names of what is measured.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::slrt::{
    ENTITY_CMDLINE, ENTITY_RAMDISK, ENTITY_UNSPECIFIED, EntryHeader, PolicyEntry, policy_info,
};

/// Bytes of the secure loader block, and its alignment.
///
/// Spec: \[APM2\] "Secure Loader Block".
pub const SLB_SIZE: u64 = 0x1_0000;
/// Longest measured part of our SLB; the rest of the 64 KiB is its page tables and stack.
pub const SLB_IMAGE_MAX: u64 = 0x8000;

/// First four bytes of the SLB, as the CPU reads them, then our identification.
///
/// Spec: \[APM2\] "Secure Loader Block", header fields; bytes 4.. are free.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SlbHeader {
    /// Entry point, bytes from the SLB's base.
    pub entry: U16,
    /// Bytes measured, from the SLB's base.
    pub length: U16,
    /// [`SLB_MAGIC`]: lets the loader and `cordon predict` refuse another file early.
    pub magic: [u8; 8],
    /// Zero.
    pub reserved: U32,
}
/// [`SlbHeader::magic`].
pub const SLB_MAGIC: [u8; 8] = *b"CORDNSLB";
/// Where in the SLB (unmeasured part: hostile input) the loader writes the SLRT's address, a u64.
pub const SLB_SLRT_POINTER_OFFSET: u64 = 0xfff0;

/// First bytes of the MLE image.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MleHeader {
    /// [`MLE_MAGIC`].
    pub magic: [u8; 8],
    /// [`MLE_VERSION`].
    pub version: U32,
    /// 64-bit entry point, bytes from the image's start.
    pub entry: U32,
    /// Bytes of the image: all of them are measured.
    pub image_size: U64,
    /// Bytes of the MLE region the image wants, a multiple of 2 MiB, [`DMA_AREA_SIZE`] included.
    pub region_size: U64,
    /// Where in the file the header lies by which SINIT knows the image: the entry point there is 32-bit code.
    pub txt_header: U32,
}
/// [`MleHeader::magic`].
pub const MLE_MAGIC: [u8; 8] = *b"CORDNMLE";
/// [`MleHeader::version`]: counts changes of [`CordonEntry`] and [`Handoff`] too.
pub const MLE_VERSION: u32 = 3;
/// Alignment of the MLE region and of its size, so that nested tables leave it out with few small pages.
pub const MLE_REGION_ALIGN: u64 = 2 << 20;
/// Smallest and largest region accepted.
pub const MLE_REGION_MIN: u64 = 8 << 20;
/// See [`MLE_REGION_MIN`].
pub const MLE_REGION_MAX: u64 = 256 << 20;

/// The top of the MLE region belongs to DMA protection: the SLB stage writes its deny-all device table
/// into the first 2 MiB of it and keeps command and event buffers in the second.
pub const DMA_AREA_SIZE: u64 = 4 << 20;

/// [`CordonEntry::flags`]: go on when the TPM interface offers no locality 2 (PCR 17–19 then lack what
/// Cordon measures and I4 does not hold; the log says so).
pub const FLAG_LOCALITY0_ALLOWED: u32 = 1;

/// [`CordonEntry::flags`]: after SENTER, go on with VT-d units that have no protected memory regions, so that devices could
/// write everywhere until the MLE's tables were in force (emulators; the exposure log says so).
pub const FLAG_REGIONS_OPTIONAL: u32 = 2;

/// [`CordonEntry::flags`]: this is no first launch. What goes on lies in [`CordonEntry::relaunch`], and there is no kernel.
pub const FLAG_RESUME: u32 = 4;

/// A piece of memory in an SLRT entry: address and length in bytes; an absent piece has length 0.
#[derive(
    Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq,
)]
#[repr(C)]
pub struct Blob {
    /// Physical address.
    pub base: U64,
    /// Bytes.
    pub size: U64,
}

/// Cordon's SLRT entry, under [`crate::slrt::TAG_CORDON`]: what the format has no place for. Written by the loader, so
/// every field is hostile input to whoever reads it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CordonEntry {
    /// Tag and size.
    pub hdr: EntryHeader,
    /// [`MLE_VERSION`].
    pub version: U32,
    /// `FLAG_` bits.
    pub flags: U32,
    /// Memory of the MLE: the image at its start, [`DMA_AREA_SIZE`] at its top. Below 4 GiB, EFI reserved memory.
    pub mle_region: Blob,
    /// The kernel: a bzImage, the whole file.
    pub kernel: Blob,
    /// All initrds, one after the other, each padded with zeros to 4 bytes. May be absent.
    pub initrd: Blob,
    /// Kernel command line, no terminating zero. May be absent.
    pub cmdline: Blob,
    /// Cordon's configuration, the whole file. May be absent.
    pub config: Blob,
    /// The EFI memory map of ExitBootServices.
    pub efi_memory_map: Blob,
    /// Bytes of a memory descriptor.
    pub efi_descriptor_size: U32,
    /// Descriptor version.
    pub efi_descriptor_version: U32,
    /// Physical address of the firmware's EFI system table.
    pub efi_system_table: U64,
    /// Physical address of the ACPI RSDP.
    pub acpi_rsdp: U64,
    /// Two pages below 1 MiB that start APs; SKINIT itself is issued there.
    pub launch_page: U64,
    /// Linux's `screen_info` for the guest (all zeros: no screen).
    pub screen_info: [u8; 64],
    /// Memory for launches under policy `relaunch`, of [`relaunch_size`], with the MLE's file at [`RELAUNCH_MLE`]. May be
    /// absent. Placed like the MLE region.
    pub relaunch: Blob,
}

/// Where in [`CordonEntry::relaunch`], past two regions' sizes, the loader puts the MLE's file.
pub const RELAUNCH_MLE: u64 = 0x8_0000;
/// Longest MLE file there.
pub const RELAUNCH_MLE_MAX: u64 = 0x8_0000;
/// What else has its place there, past two regions' sizes.
const RELAUNCH_REST: u64 = 4 << 20;

/// Bytes of [`CordonEntry::relaunch`] for an MLE region of `region_size` bytes: the region of the next launch, a copy of the present
/// one's, and what both launches hand over.
pub const fn relaunch_size(region_size: u64) -> u64 {
    region_size.saturating_mul(2).saturating_add(RELAUNCH_REST)
}

/// Bytes at [`CordonEntry::launch_page`].
pub const LAUNCH_PAGE_SIZE: u64 = 0x2000;

/// What the SLB stage tells the MLE; its address is in RDI at the MLE's entry. It lies in the SLB, so
/// the MLE may trust it: the MLE runs only because this SLB was measured.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Handoff {
    /// [`HANDOFF_MAGIC`].
    pub magic: u64,
    /// SLB base address; 0 after SENTER, which has no SLB.
    pub slb_base: u64,
    /// SLRT address: checked once by the SLB stage, still hostile.
    pub slrt_base: u64,
    /// SLRT bytes.
    pub slrt_size: u64,
    /// Event log address; checked to be clear of SLB and MLE region.
    pub log_base: u64,
    /// Event log bytes.
    pub log_size: u64,
    /// SHA-256 of the MLE image, whose digests the SLB stage has extended into PCR 17. The MLE begins the log with it; zeros
    /// after SENTER, where SINIT's log has it.
    pub mle_sha256: [u8; 32],
    /// MLE region base.
    pub region_base: u64,
    /// MLE region bytes.
    pub region_size: u64,
    /// Measured frequency of the time-stamp counter, kHz.
    pub tsc_khz: u64,
    /// 1 when the TPM offered no locality 2 and the configuration allowed to go on.
    pub tpm_degraded: u64,
    /// IOMMUs that the SLB stage has set to deny all DMA; 0 after SENTER.
    pub iommu_count: u64,
}
/// [`Handoff::magic`].
pub const HANDOFF_MAGIC: u64 = u64::from_le_bytes(*b"CORDNHND");

/// Event type of everything Cordon extends, as TrenchBoot uses it.
pub const EV_SLAUNCH: u32 = 0x502;

/// PCR of the SLB and the MLE image.
pub const PCR_CODE: u32 = 17;
/// PCR of SLRT policy, configuration, kernel, initrd, command line.
pub const PCR_CONFIG: u32 = 18;
/// PCR of the firmware's identity.
pub const PCR_FIRMWARE: u32 = 19;
/// PCR of the exposure log.
pub const PCR_EXPOSURE: u32 = 22;

/// Event data (ASCII, no terminator) of each measurement. `cordon predict` uses the same names.
pub mod event {
    /// PCR 17, by the CPU: the SLB's measured length.
    pub const SLB: &str = "SKINIT";
    /// PCR 17: the MLE image.
    pub const MLE: &str = "MLE";
    /// PCR 18: the policy entries of the SLRT, see [`crate::slrt::for_each_measured_policy_entry`].
    pub const POLICY: &str = "SLRT policy";
    /// PCR 18: the configuration file; empty when absent.
    pub const CONFIG: &str = "configuration";
    /// PCR 18: the kernel file.
    pub const KERNEL: &str = "kernel";
    /// PCR 18: the initrds as concatenated; empty when absent.
    pub const INITRD: &str = "initrd";
    /// PCR 18: the command line; empty when absent.
    pub const CMDLINE: &str = "command line";
    /// PCR 19: how far SMM is locked down.
    pub const SMM: &str = "SMM facts";
}

/// The one policy that the loader writes and that the SLB stage and the MLE accept, in the form in which it is
/// measured ([`PolicyEntry::measured`]): the entities of PCR 18 in the order in which the MLE measures them.
pub const POLICY: [PolicyEntry; 4] = [
    policy_entry(ENTITY_UNSPECIFIED, event::CONFIG),
    policy_entry(ENTITY_UNSPECIFIED, event::KERNEL),
    policy_entry(ENTITY_RAMDISK, event::INITRD),
    policy_entry(ENTITY_CMDLINE, event::CMDLINE),
];

const fn policy_entry(entity_type: u16, name: &str) -> PolicyEntry {
    PolicyEntry {
        pcr: U16::new(PCR_CONFIG as u16),
        entity_type: U16::new(entity_type),
        flags: U16::new(0),
        reserved: U16::new(0),
        size: U64::new(0),
        entity: U64::new(0),
        info: policy_info(name),
    }
}

/// Index of the first entry in which `policy` is not [`POLICY`]; `None` when it is the same.
pub fn policy_difference(policy: &[PolicyEntry]) -> Option<usize> {
    let different = policy.iter().zip(&POLICY).position(|(have, want)| have.measured() != *want);
    different.or_else(|| (policy.len() != POLICY.len()).then_some(policy.len().min(POLICY.len())))
}

/// The policy as the loader writes it: [`POLICY`] with the places of the entities, in its order.
pub fn policy_entries(places: [Blob; POLICY.len()]) -> [PolicyEntry; POLICY.len()] {
    let mut policy = POLICY;
    for (entry, place) in policy.iter_mut().zip(places) {
        (entry.entity, entry.size) = (place.base, place.size);
    }
    policy
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn the_cpu_finds_its_two_words_first() {
        assert_eq!(offset_of!(SlbHeader, entry), 0);
        assert_eq!(offset_of!(SlbHeader, length), 2);
    }

    #[test]
    fn a_full_table_fits_its_buffer() {
        use crate::slrt::{DlInfo, Header, LogInfo, MAX_SIZE, PolicyEntry, PolicyHeader};
        let used = size_of::<Header>()
            + size_of::<DlInfo>()
            + size_of::<LogInfo>()
            + size_of::<PolicyHeader>()
            + POLICY.len() * size_of::<PolicyEntry>()
            + size_of::<CordonEntry>()
            + size_of::<EntryHeader>();
        assert!(used < MAX_SIZE, "{used}");
    }
}
