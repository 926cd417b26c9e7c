//! What the loader handed over, taken as hostile: copied, checked, and from then on only the copy used.

use core::fmt;

use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::launch::{
    Blob, CordonEntry, DMA_AREA_SIZE, FLAG_RESUME, HANDOFF_MAGIC, Handoff, LAUNCH_PAGE_SIZE, MLE_REGION_MAX,
    MLE_VERSION, SLB_SIZE, policy_difference, relaunch_size,
};
use hv::slrt::{self, Slrt, SlrtError};
use iommu::vt_d::Protection;
use vmx::txt::regs;

use crate::relaunch::Block;

/// Longest configuration file, in bytes.
pub const MAX_CONFIG: u64 = 0x1_0000;
/// Longest EFI memory map, in bytes.
pub const MAX_MEMORY_MAP: u64 = 0x8000;
/// Longest command line, in bytes.
pub const MAX_CMDLINE: u64 = 0x1_0000;
/// Largest kernel or initrd, in bytes.
pub const MAX_FILE: u64 = 1 << 31;

/// Why the launch data was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputError {
    /// The SLB stage's block is not one.
    Handoff {
        /// Field name.
        field: &'static str,
        /// Value.
        value: u64,
    },
    /// The SLRT cannot be read where the SLB stage says it is.
    Unreadable {
        /// Which piece.
        what: &'static str,
        /// Address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The SLRT is malformed.
    Slrt(SlrtError),
    /// Cordon's entry has another version than this image.
    Version(u32),
    /// A piece is longer than accepted, or empty where it must not be.
    Size {
        /// Which piece.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A piece is not wholly where it may be: below 4 GiB, off the first page.
    Place {
        /// Which piece.
        what: &'static str,
        /// Address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// Two pieces share memory.
    Overlap(&'static str, &'static str),
    /// The policy is not the one that Cordon measures by.
    Policy {
        /// Index of the first entry that differs.
        entry: usize,
    },
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Handoff { field, value } => write!(f, "hand-over from the SLB: {field} is {value:#x}"),
            Self::Unreadable { what, base, size } => {
                write!(f, "{what}: cannot read {size} bytes at {base:#x}")
            }
            Self::Slrt(e) => write!(f, "{e}"),
            Self::Version(v) => write!(f, "SLRT: Cordon entry version {v}, this MLE has {MLE_VERSION}"),
            Self::Size { what, size, limit } => write!(f, "{what}: size {size}, limit {limit}"),
            Self::Place { what, base, size } => {
                write!(f, "{what}: {size} bytes at {base:#x} are not wholly between 4 KiB and 4 GiB")
            }
            Self::Overlap(a, b) => write!(f, "{a} and {b} overlap"),
            Self::Policy { entry } => {
                write!(f, "SLRT: policy entry {entry} is not the one Cordon measures by")
            }
        }
    }
}

impl From<SlrtError> for InputError {
    fn from(e: SlrtError) -> Self {
        Self::Slrt(e)
    }
}

/// The checked launch data.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// The whole SLB; none after SENTER.
    pub slb: Option<PhysRange>,
    /// What belongs to a launch by SENTER; none after SKINIT.
    pub txt: Option<Txt>,
    /// The MLE region.
    pub region: PhysRange,
    /// The part of the region that DMA protection owns.
    pub dma_area: PhysRange,
    /// Start-up pages of the APs, below 1 MiB.
    pub launch_page: PhysRange,
    /// Where the event log goes.
    pub log: PhysRange,
    /// SHA-256 of this image's file, as the SLB stage measured it.
    pub mle_sha256: [u8; 32],
    /// Kernel file; none when a guest is there that goes on.
    pub kernel: Option<PhysRange>,
    /// Initrds, if any.
    pub initrd: Option<PhysRange>,
    /// Command line, if any.
    pub cmdline: Option<PhysRange>,
    /// Configuration, if any.
    pub config: Option<PhysRange>,
    /// EFI memory map.
    pub memory_map: PhysRange,
    /// Bytes of a descriptor of it, and their version.
    pub descriptor: (u32, u32),
    /// The firmware's EFI system table.
    pub efi_system_table: u64,
    /// ACPI RSDP.
    pub acpi_rsdp: u64,
    /// Linux's `screen_info`.
    pub screen_info: [u8; 64],
    /// Memory for policy `relaunch`.
    pub relaunch: Option<Block>,
    /// A guest is there that goes on: this is no first launch.
    pub resume: bool,
    /// The TPM has no locality 2, and the configuration allows that.
    pub tpm_degraded: bool,
    /// Ticks of the TSC per millisecond.
    pub tsc_khz: u64,
}

/// What belongs to a launch by SENTER, as the MLE's own first stage found and checked it.
#[derive(Clone, Copy, Debug)]
pub struct Txt {
    /// Where SINIT and the loader left their tables.
    pub heap: PhysRange,
    /// SINIT itself.
    pub sinit: PhysRange,
    /// By which SINIT found the MLE's pages.
    pub page_tables: PhysRange,
    /// The MLE's copy of the DMAR that SINIT checked.
    pub dmar: &'static [u8],
    /// The events that SINIT logged, in the MLE's copy.
    pub log: &'static [u8],
    /// What protects memory until the MLE's own tables for devices are in force.
    pub protection: Protection,
}

/// Registers of TXT, private and public: the guest must not reach TXT.MLE.JOIN, nor read where things are.
///
/// Spec: \[TXT\] "Intel TXT Configuration Registers".
pub const TXT_REGISTERS: PhysRange =
    match PhysRange::from_last(regs::PRIVATE, regs::PUBLIC + regs::SPACE as u64 - 1) {
        Some(range) => range,
        None => unreachable!(),
    };

/// Reads and checks everything. `image` is the running MLE image; `mem` reads what it may; `txt` is there after SENTER.
pub fn read(
    handoff: &Handoff,
    txt: Option<Txt>,
    image: PhysRange,
    mem: &impl PhysMem,
) -> Result<Inputs, InputError> {
    let bad = |field, value| Err(InputError::Handoff { field, value });
    if handoff.magic != HANDOFF_MAGIC {
        return bad("magic", handoff.magic);
    }
    if handoff.tsc_khz == 0 {
        return bad("tsc_khz", 0);
    }
    let slb = match txt {
        Some(_) => None,
        None => Some(place("SLB", handoff.slb_base, SLB_SIZE)?),
    };
    let region = place("MLE region", handoff.region_base, handoff.region_size)?;
    let dma_area = handoff
        .region_size
        .checked_sub(DMA_AREA_SIZE)
        .and_then(|below| handoff.region_base.checked_add(below))
        .and_then(|base| PhysRange::new(base, DMA_AREA_SIZE))
        .ok_or(InputError::Handoff { field: "region_size", value: handoff.region_size })?;
    if image.start() != region.start() || image.last() >= dma_area.start() {
        return bad("region_base", handoff.region_base);
    }
    if handoff.slrt_size > slrt::MAX_SIZE as u64 {
        return bad("slrt_size", handoff.slrt_size);
    }
    let mut copy = [0; slrt::MAX_SIZE];
    let bytes = usize::try_from(handoff.slrt_size)
        .ok()
        .and_then(|size| copy.get_mut(..size))
        .ok_or(InputError::Handoff { field: "slrt_size", value: handoff.slrt_size })?;
    if !mem.read(handoff.slrt_base, bytes) {
        return Err(InputError::Unreadable {
            what: "SLRT",
            base: handoff.slrt_base,
            size: handoff.slrt_size,
        });
    }
    let table = Slrt::parse(bytes)?;
    // A loader that could choose would choose to have less measured.
    if let Some(entry) = policy_difference(table.policy()?) {
        return Err(InputError::Policy { entry });
    }
    let entry: CordonEntry = table.entry(slrt::TAG_CORDON)?;
    if entry.version.get() != MLE_VERSION {
        return Err(InputError::Version(entry.version.get()));
    }
    let resume = entry.flags.get() & FLAG_RESUME != 0;
    let relaunch = optional("memory for relaunch", entry.relaunch, relaunch_size(MLE_REGION_MAX))?;
    let relaunch = relaunch.map(|range| Block::new(range, region)).transpose()?;
    let at_start = |block: &Block| block.fresh == region;
    if resume && !relaunch.as_ref().is_some_and(at_start) {
        let Blob { base, size } = entry.relaunch;
        return Err(InputError::Place { what: "memory for relaunch", base: base.get(), size: size.get() });
    }
    let inputs = Inputs {
        slb,
        txt,
        region,
        dma_area,
        launch_page: place("launch page", entry.launch_page.get(), LAUNCH_PAGE_SIZE)?,
        log: place("event log", handoff.log_base, handoff.log_size)?,
        mle_sha256: handoff.mle_sha256,
        kernel: if resume { None } else { Some(needed("kernel", entry.kernel, MAX_FILE)?) },
        initrd: optional("initrd", entry.initrd, MAX_FILE)?,
        cmdline: optional("command line", entry.cmdline, MAX_CMDLINE)?,
        config: optional("configuration", entry.config, MAX_CONFIG)?,
        memory_map: needed("EFI memory map", entry.efi_memory_map, MAX_MEMORY_MAP)?,
        descriptor: (entry.efi_descriptor_size.get(), entry.efi_descriptor_version.get()),
        efi_system_table: entry.efi_system_table.get(),
        acpi_rsdp: entry.acpi_rsdp.get(),
        screen_info: entry.screen_info,
        relaunch,
        resume,
        tpm_degraded: handoff.tpm_degraded != 0,
        tsc_khz: handoff.tsc_khz,
    };
    if inputs.launch_page.last() >= 0x10_0000 || !inputs.launch_page.start().is_multiple_of(PAGE_SIZE) {
        return Err(InputError::Place {
            what: "launch page",
            base: inputs.launch_page.start(),
            size: LAUNCH_PAGE_SIZE,
        });
    }
    inputs.check_overlaps()?;
    Ok(inputs)
}

impl Inputs {
    /// Memory that the loader took for the launch: the guest's maps call it reserved. (TXT's heap and SINIT are in no map of
    /// free memory, or the address space refuses the launch.)
    pub fn of_launch(&self) -> impl Iterator<Item = PhysRange> + use<> {
        let tables = self.txt.map(|txt| txt.page_tables);
        let always = [self.region, self.launch_page, self.log];
        let relaunch = self.relaunch.map(|block| block.whole);
        self.slb.into_iter().chain(tables).chain(always).chain(relaunch)
    }

    /// Memory that the guest must not get as RAM, or that is read later: nothing of it may share a byte.
    fn check_overlaps(&self) -> Result<(), InputError> {
        let pieces = [
            ("SLB", self.slb),
            ("TXT heap", self.txt.map(|txt| txt.heap)),
            ("SINIT", self.txt.map(|txt| txt.sinit)),
            ("MLE page tables", self.txt.map(|txt| txt.page_tables)),
            ("MLE region", Some(self.region)),
            ("launch page", Some(self.launch_page)),
            ("event log", Some(self.log)),
            // When a guest goes on, region and memory map are parts of it.
            ("memory for relaunch", self.relaunch.filter(|_| !self.resume).map(|block| block.whole)),
            ("kernel", self.kernel),
            ("initrd", self.initrd),
            ("command line", self.cmdline),
            ("configuration", self.config),
            ("EFI memory map", Some(self.memory_map)),
        ];
        for (i, (name, range)) in pieces.iter().enumerate() {
            let Some(range) = range else { continue };
            for (other_name, other) in pieces.iter().skip(i.saturating_add(1)) {
                if other.is_some_and(|o| o.overlaps(range)) {
                    return Err(InputError::Overlap(name, other_name));
                }
            }
        }
        Ok(())
    }
}

/// A range wholly inside what the entry tables map, off the first page.
fn place(what: &'static str, base: u64, size: u64) -> Result<PhysRange, InputError> {
    PhysRange::new(base, size)
        .filter(|r| r.start() >= PAGE_SIZE && r.last() < FOUR_GIB)
        .ok_or(InputError::Place { what, base, size })
}

fn needed(what: &'static str, blob: Blob, limit: u64) -> Result<PhysRange, InputError> {
    optional(what, blob, limit)?.ok_or(InputError::Size { what, size: 0, limit })
}

fn optional(what: &'static str, blob: Blob, limit: u64) -> Result<Option<PhysRange>, InputError> {
    let size = blob.size.get();
    if size > limit {
        return Err(InputError::Size { what, size, limit });
    }
    if size == 0 { Ok(None) } else { place(what, blob.base.get(), size).map(Some) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv::slrt::{ARCH_SKINIT, Builder, ENTITY_CMDLINE, PolicyEntry, entry_header};
    use zerocopy::{FromZeros, IntoBytes};

    const REGION: u64 = 0x4000_0000;

    struct Memory(Vec<u8>);
    impl PhysMem for Memory {
        fn read(&self, addr: u64, out: &mut [u8]) -> bool {
            let at = usize::try_from(addr).unwrap().wrapping_sub(0x20_0000);
            self.0.get(at..at.wrapping_add(out.len())).map(|b| out.copy_from_slice(b)).is_some()
        }
        fn write(&self, _: u64, _: &[u8]) -> bool {
            false
        }
    }

    fn blob(base: u64, size: u64) -> Blob {
        Blob { base: base.into(), size: size.into() }
    }

    fn entry() -> CordonEntry {
        let mut e = CordonEntry::new_zeroed();
        e.hdr = entry_header::<CordonEntry>(slrt::TAG_CORDON);
        e.version = MLE_VERSION.into();
        e.kernel = blob(0x100_0000, 0x80_0000);
        e.initrd = blob(0x200_0000, 0x10_0000);
        e.cmdline = blob(0x30_0000, 20);
        e.efi_memory_map = blob(0x31_0000, 0x1000);
        e.efi_descriptor_size = 48.into();
        e.efi_descriptor_version = 1.into();
        e.launch_page = 0x9_0000.into();
        e
    }

    fn policy() -> Vec<PolicyEntry> {
        hv::launch::policy_entries([blob(1, 2); 4]).to_vec()
    }

    fn run(
        change: impl FnOnce(&mut CordonEntry, &mut Vec<PolicyEntry>, &mut Handoff),
    ) -> Result<Inputs, InputError> {
        let (mut e, mut p) = (entry(), policy());
        let mut h = Handoff {
            magic: HANDOFF_MAGIC,
            slb_base: 0x3000_0000,
            slrt_base: 0x20_0000,
            slrt_size: 0,
            log_base: 0x3100_0000,
            log_size: 0x1_0000,
            mle_sha256: [7; 32],
            region_base: REGION,
            region_size: 32 << 20,
            tsc_khz: 1_000_000,
            tpm_degraded: 0,
            iommu_count: 1,
        };
        change(&mut e, &mut p, &mut h);
        let mut b = Builder::new(ARCH_SKINIT);
        b.policy(&p).unwrap();
        b.entry(&e).unwrap();
        let (bytes, used) = b.finish().unwrap();
        if h.slrt_size == 0 {
            h.slrt_size = used as u64;
        }
        read(&h, None, PhysRange::new(REGION, 0x4_0000).unwrap(), &Memory(bytes.to_vec()))
    }

    #[test]
    fn honest_data_is_taken() {
        let inputs = run(|_, _, _| ()).unwrap();
        assert_eq!(inputs.dma_area.start(), REGION + (28 << 20));
        assert_eq!(inputs.config, None);
    }

    #[test]
    fn each_lie_is_named() {
        let lie = |f: fn(&mut CordonEntry)| run(|e, _, _| f(e)).unwrap_err().to_string();
        assert_eq!(lie(|e| e.kernel = blob(0x3000_8000, 16)), "SLB and kernel overlap");
        assert_eq!(lie(|e| e.initrd = blob(REGION + 5, 16)), "MLE region and initrd overlap");
        assert_eq!(lie(|e| e.cmdline = blob(0x100_0000, 5)), "kernel and command line overlap");
        assert_eq!(lie(|e| e.kernel = blob(1, 0)), "kernel: size 0, limit 2147483648");
        assert!(lie(|e| e.cmdline = blob(u64::MAX - 3, 20)).contains("command line: 20 bytes at"));
        assert!(lie(|e| e.config = blob(0xffff_fff0, 0x20)).contains("configuration: 32 bytes"));
        assert!(lie(|e| e.config = blob(0x400_0000, 0x1_0001)).contains("limit 65536"));
        assert!(lie(|e| e.launch_page = 0xff000.into()).contains("launch page"));
        assert!(lie(|e| e.launch_page = 0x90010.into()).contains("launch page"));
        assert!(lie(|e| e.version = 9.into()).contains("version 9"));
    }

    #[test]
    fn a_policy_that_measures_less_is_refused() {
        assert_eq!(run(|_, p, _| p.truncate(3)).unwrap_err(), InputError::Policy { entry: 3 });
        assert_eq!(
            run(|_, p, _| p[1].flags = slrt::POLICY_FLAG_MEASURED.into()).unwrap_err(),
            InputError::Policy { entry: 1 }
        );
        assert_eq!(run(|_, p, _| p[0].pcr = 16.into()).unwrap_err(), InputError::Policy { entry: 0 });
        assert_eq!(
            run(|_, p, _| p[2].entity_type = ENTITY_CMDLINE.into()).unwrap_err(),
            InputError::Policy { entry: 2 }
        );
    }

    #[test]
    fn a_bad_handover_is_refused() {
        assert!(run(|_, _, h| h.magic = 0).is_err());
        assert!(run(|_, _, h| h.region_size = 1 << 20).is_err());
        assert!(run(|_, _, h| h.slrt_size = 0x1001).is_err());
        assert!(run(|_, _, h| h.slrt_base = 0x10).is_err());
        assert!(run(|_, _, h| h.log_base = REGION + 0x1000).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_entry_panics_and_what_is_taken_is_clear_of_the_mle(bytes in proptest::collection::vec(0u8.., size_of::<CordonEntry>())) {
            if let Ok(i) = run(|e, _, _| {
                let (hdr, version) = (e.hdr, e.version);
                e.as_mut_bytes().copy_from_slice(&bytes);
                (e.hdr, e.version) = (hdr, version);
            }) {
                proptest::prop_assert!(!i.kernel.is_some_and(|k| k.overlaps(&i.region)));
            }
        }
    }
}
