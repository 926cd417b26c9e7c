//! The Secure Launch Resource Table that the loader hands to the SLB stage.

use hv::launch::{
    Blob, CordonEntry, FLAG_LOCALITY0_ALLOWED, FLAG_REGIONS_OPTIONAL, MLE_VERSION, MleHeader, SlbHeader,
    policy_entries,
};
use hv::slrt::{
    ARCH_SKINIT, ARCH_TXT, Builder, DlInfo, Header, IntelInfo, LOG_FORMAT_TPM2, LogInfo, MAX_SIZE, SlrtError,
    TAG_CORDON, TAG_DL_INFO, TAG_LOG_INFO, entry_header,
};

/// Bytes of the event log's area.
pub const LOG_SIZE: u32 = 64 << 10;

/// Where in the launch page SKINIT is: after what may once be there for the APs, and known to test benches.
pub const SKINIT_OFFSET: u64 = 0xf0;
/// What is there: SKINIT, and UD2 for a CPU that would go on behind it.
pub const SKINIT_CODE: [u8; 5] = [0x0f, 0x01, 0xde, 0x0f, 0x0b];

/// Where in the launch page GETSEC is: the same place.
pub const SENTER_OFFSET: u64 = SKINIT_OFFSET;
/// What is there: GETSEC, and UD2 for a CPU that would go on behind it.
pub const SENTER_CODE: [u8; 4] = [0x0f, 0x37, 0x0f, 0x0b];

/// What differs between the ways to launch.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one, and it is copied once")]
pub enum Technology {
    /// SKINIT.
    Skinit {
        /// Address of the SLB.
        base: u64,
        /// Its header.
        slb: SlbHeader,
    },
    /// GETSEC\[SENTER\].
    Senter {
        /// Address and bytes of SINIT.
        sinit: Blob,
        /// The MLE's entry point after SENTER, bytes from its start.
        entry: u32,
        /// What SENTER changes.
        info: IntelInfo,
    },
}

/// Where in the table of a launch by SENTER its entry for Intel is: it comes first.
pub const INTEL_OFFSET: u64 = size_of::<Header>() as u64;

/// A launch as the table describes it. Addresses are physical; an absent blob is the default one.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// How.
    pub technology: Technology,
    /// Address of the MLE region.
    pub mle_base: u64,
    /// The MLE's header.
    pub mle: MleHeader,
    /// Address of the event log's area of [`LOG_SIZE`] bytes.
    pub log: u64,
    /// The kernel file.
    pub kernel: Blob,
    /// The initrds.
    pub initrd: Blob,
    /// The command line.
    pub cmdline: Blob,
    /// The configuration file.
    pub config: Blob,
    /// The EFI memory map.
    pub memory_map: Blob,
    /// Bytes of a memory descriptor.
    pub descriptor_size: u32,
    /// Version of the descriptors.
    pub descriptor_version: u32,
    /// Address of the EFI system table.
    pub system_table: u64,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
    /// Address of the launch pages.
    pub launch_page: u64,
    /// Linux' `screen_info`.
    pub screen_info: [u8; 64],
    /// Memory for launches under policy `relaunch`.
    pub relaunch: Blob,
    /// Whether the launch may go on without TPM locality 2.
    pub allow_locality0: bool,
    /// Whether the launch may go on with IOMMUs that have no protected memory regions.
    pub optional_regions: bool,
}

/// The table and its length in bytes.
///
/// # Errors
/// [`SlrtError::Full`], which the contents leave no way to: they have a fixed size.
pub fn build(launch: &Launch) -> Result<([u8; MAX_SIZE], usize), SlrtError> {
    let (architecture, dce, entry, header) = match launch.technology {
        Technology::Skinit { base, slb } => {
            let slb = Blob { base: base.into(), size: u64::from(slb.length.get()).into() };
            (ARCH_SKINIT, slb, launch.mle.entry.get(), 0)
        }
        Technology::Senter { sinit, entry, .. } => (ARCH_TXT, sinit, entry, launch.mle.txt_header.get()),
    };
    let mut builder = Builder::new(architecture);
    if let Technology::Senter { info, .. } = &launch.technology {
        builder.entry(info)?;
    }
    let mut flags = 0;
    if launch.allow_locality0 {
        flags |= FLAG_LOCALITY0_ALLOWED;
    }
    if launch.optional_regions {
        flags |= FLAG_REGIONS_OPTIONAL;
    }
    builder.entry(&DlInfo {
        hdr: entry_header::<DlInfo>(TAG_DL_INFO),
        dce_size: dce.size,
        dce_base: dce.base,
        dlme_size: launch.mle.image_size,
        dlme_base: launch.mle_base.into(),
        dlme_entry: u64::from(entry).into(),
        dlme_header_offset: u64::from(header).into(),
        dlme_config_table: 0.into(),
        bootloader: 0.into(),
        reserved: Default::default(),
        context: 0.into(),
        dl_launch: 0.into(),
    })?;
    builder.entry(&LogInfo {
        hdr: entry_header::<LogInfo>(TAG_LOG_INFO),
        format: LOG_FORMAT_TPM2.into(),
        reserved: 0.into(),
        size: LOG_SIZE.into(),
        addr: launch.log.into(),
    })?;
    builder.policy(&policy_entries([launch.config, launch.kernel, launch.initrd, launch.cmdline]))?;
    builder.entry(&CordonEntry {
        hdr: entry_header::<CordonEntry>(TAG_CORDON),
        version: MLE_VERSION.into(),
        flags: flags.into(),
        mle_region: Blob { base: launch.mle_base.into(), size: launch.mle.region_size },
        kernel: launch.kernel,
        initrd: launch.initrd,
        cmdline: launch.cmdline,
        config: launch.config,
        efi_memory_map: launch.memory_map,
        efi_descriptor_size: launch.descriptor_size.into(),
        efi_descriptor_version: launch.descriptor_version.into(),
        efi_system_table: launch.system_table.into(),
        acpi_rsdp: launch.rsdp.into(),
        launch_page: launch.launch_page.into(),
        screen_info: launch.screen_info,
        relaunch: launch.relaunch,
    })?;
    builder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv::launch::policy_difference;
    use hv::launch::{MLE_MAGIC, SLB_MAGIC};
    use hv::slrt::{Slrt, TAG_INTEL};
    use zerocopy::{FromBytes, FromZeros};

    fn blob(base: u64, size: u64) -> Blob {
        Blob { base: base.into(), size: size.into() }
    }

    fn sample() -> Launch {
        Launch {
            technology: Technology::Skinit {
                base: 0x7000_0000,
                slb: SlbHeader {
                    entry: 16.into(),
                    length: 0x6000.into(),
                    magic: SLB_MAGIC,
                    reserved: 0.into(),
                },
            },
            mle_base: 0x6000_0000,
            mle: MleHeader {
                magic: MLE_MAGIC,
                version: MLE_VERSION.into(),
                entry: 0x1000.into(),
                image_size: 0x2_3000.into(),
                region_size: (16 << 20).into(),
                txt_header: 0.into(),
            },
            log: 0x5000_0000,
            kernel: blob(0x4000_0000, 8_000_001),
            initrd: blob(0x3000_0000, 12),
            cmdline: blob(0x2000_0000, 5),
            config: Blob::default(),
            memory_map: blob(0x1000_0000, 48 * 100),
            descriptor_size: 48,
            descriptor_version: 1,
            system_table: 0x7fff_0018,
            rsdp: 0x7ffe_0014,
            launch_page: 0x9e000,
            screen_info: [7; 64],
            relaunch: Blob::default(),
            allow_locality0: false,
            optional_regions: false,
        }
    }

    #[test]
    fn the_reader_of_the_launch_finds_what_the_loader_wrote() {
        let launch = sample();
        let (bytes, used) = build(&launch).unwrap();
        let table = Slrt::parse(&bytes[..used]).unwrap();
        let dl: DlInfo = table.entry(TAG_DL_INFO).unwrap();
        assert_eq!((dl.dce_base.get(), dl.dce_size.get()), (0x7000_0000, 0x6000));
        assert_eq!((dl.dlme_base.get(), dl.dlme_size.get()), (0x6000_0000, 0x2_3000));
        assert_eq!((dl.dlme_entry.get(), dl.dl_launch.get()), (0x1000, 0));
        let log: LogInfo = table.entry(TAG_LOG_INFO).unwrap();
        assert_eq!((log.addr.get(), log.size.get(), log.format.get()), (0x5000_0000, 0x1_0000, 2));
        let cordon: CordonEntry = table.entry(TAG_CORDON).unwrap();
        assert_eq!((cordon.version.get(), cordon.flags.get()), (MLE_VERSION, 0));
        assert_eq!(cordon.mle_region, blob(0x6000_0000, 16 << 20));
        assert_eq!((cordon.kernel, cordon.initrd), (launch.kernel, launch.initrd));
        assert_eq!((cordon.cmdline, cordon.config), (launch.cmdline, Blob::default()));
        assert_eq!(cordon.efi_memory_map, launch.memory_map);
        assert_eq!((cordon.efi_descriptor_size.get(), cordon.efi_descriptor_version.get()), (48, 1));
        assert_eq!((cordon.efi_system_table.get(), cordon.acpi_rsdp.get()), (0x7fff_0018, 0x7ffe_0014));
        assert_eq!((cordon.launch_page.get(), cordon.screen_info), (0x9e000, [7; 64]));
    }

    #[test]
    fn the_policy_is_the_fixed_one_with_the_entities_filled_in() {
        let launch = sample();
        let (bytes, used) = build(&launch).unwrap();
        let policy = Slrt::parse(&bytes[..used]).unwrap().policy().unwrap();
        let blobs = [launch.config, launch.kernel, launch.initrd, launch.cmdline];
        assert_eq!(policy_difference(policy), None);
        for (entry, blob) in policy.iter().zip(blobs) {
            assert_eq!((entry.entity, entry.size), (blob.base, blob.size));
        }
    }

    #[test]
    fn after_senter_the_table_has_what_senter_changed() {
        let mut info = IntelInfo::new_zeroed();
        info.hdr = entry_header::<IntelInfo>(TAG_INTEL);
        info.saved_misc_enable = 0x85_0089.into();
        let technology = Technology::Senter { sinit: blob(0x7fd0_0000, 0x1_8000), entry: 0x1054, info };
        let mut launch = Launch { technology, optional_regions: true, ..sample() };
        launch.mle.txt_header = 0x1020.into();
        let (bytes, used) = build(&launch).unwrap();
        let (header, _) = Header::read_from_prefix(&bytes).unwrap();
        assert_eq!(header.architecture.get(), ARCH_TXT);
        let table = Slrt::parse(&bytes[..used]).unwrap();
        let found: IntelInfo = table.entry(TAG_INTEL).unwrap();
        assert_eq!(found.saved_misc_enable.get(), 0x85_0089);
        assert_eq!(bytes[INTEL_OFFSET as usize..][..4], TAG_INTEL.to_le_bytes());
        let dl: DlInfo = table.entry(TAG_DL_INFO).unwrap();
        assert_eq!((dl.dce_base.get(), dl.dce_size.get()), (0x7fd0_0000, 0x1_8000));
        assert_eq!((dl.dlme_entry.get(), dl.dlme_header_offset.get()), (0x1054, 0x1020));
        let cordon: CordonEntry = table.entry(TAG_CORDON).unwrap();
        assert_eq!(cordon.flags.get(), FLAG_REGIONS_OPTIONAL);
    }

    #[test]
    fn locality_0_is_allowed_only_when_asked_for() {
        let (bytes, used) = build(&Launch { allow_locality0: true, ..sample() }).unwrap();
        let cordon: CordonEntry = Slrt::parse(&bytes[..used]).unwrap().entry(TAG_CORDON).unwrap();
        assert_eq!(cordon.flags.get(), FLAG_LOCALITY0_ALLOWED);
    }
}
