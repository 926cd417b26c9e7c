//! The boot disk: one EFI system partition, made with mtools and without root.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Where the partition starts.
const START: u64 = MIB;

/// A file on the partition, and where it comes from.
pub struct Item {
    /// Path on the partition, without the leading slash.
    pub path: &'static str,
    /// What is there.
    pub source: Source,
}

/// Where a file comes from.
pub enum Source {
    /// A file of the host.
    File(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// The Boot Loader Specification entry that the loader reads.
///
/// Spec: Boot Loader Specification, "Type #1 Boot Loader Specification Entries"; the `cordon-` keys are ours.
pub struct Entry<'a> {
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Whether there is a configuration file.
    pub config: bool,
    /// How the machine launches.
    pub launch: Launch,
    /// Whether a TPM without locality 2 will do.
    pub locality0: bool,
    /// Whether memory is kept for policy `relaunch`.
    pub relaunch: bool,
    /// Whether the CPU hides that it has SENTER.
    pub insist_txt: bool,
}

impl Entry<'_> {
    /// The file.
    pub fn text(&self) -> String {
        let mut text = format!(
            "title Cordon\nlinux /vmlinuz\ninitrd /initrd.img\noptions {}\ncordon-mle /cordon/mle.bin\n",
            self.cmdline
        );
        text.push_str(match self.launch {
            // The emulated CPU does not report SKINIT: the bench plays it.
            Launch::Skinit => "cordon-slb /cordon/slb.bin\ncordon-skinit insist\n",
            Launch::Senter => "cordon-launch senter\ncordon-sinit /cordon/sinit.bin\n",
        });
        let optional = [
            (self.config, "cordon-config /cordon/cordon.conf\n"),
            (self.locality0, "cordon-locality0 allow\n"),
            (self.relaunch, "cordon-relaunch allow\n"),
            (self.insist_txt, "cordon-txt insist\n"),
        ];
        text.extend(optional.iter().filter(|(wanted, _)| *wanted).map(|(_, line)| *line));
        text
    }
}

/// How a machine launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launch {
    /// By SKINIT.
    Skinit,
    /// By GETSEC\[SENTER\].
    Senter,
}

/// Makes the disk image `to` with `items` on it.
pub fn build(to: &Path, items: &[Item]) -> Result<()> {
    let folder = to.parent().context("a disk image without a folder")?;
    let staging = tempfile::tempdir_in(folder)?;
    let mut size = 34 * MIB;
    for (index, item) in items.iter().enumerate() {
        let host = staging.path().join(index.to_string());
        match &item.source {
            Source::File(path) => {
                let path = fs::canonicalize(path).with_context(|| format!("{}", path.display()))?;
                std::os::unix::fs::symlink(path, &host)?;
            }
            Source::Bytes(bytes) => fs::write(&host, bytes)?,
        }
        size += fs::metadata(&host)?.len().next_multiple_of(MIB);
    }
    let mut disk = File::create(to)?;
    disk.write_all(&partition_table(size)?)?;
    disk.set_len(START + size)?;
    // A fixed serial number: the same files give the same image, but for their times.
    let sectors = (size / SECTOR).to_string();
    mtools("mformat", to, &["-F", "-N", "c0d0c0d0", "-T", &sectors, "-h", "255", "-s", "63", "::"])?;
    let mut folders: Vec<&str> = Vec::new();
    for item in items {
        for (at, _) in item.path.match_indices('/') {
            let parent = &item.path[..at];
            if !folders.contains(&parent) {
                mtools("mmd", to, &[&format!("::/{parent}")])?;
                folders.push(parent);
            }
        }
    }
    for (index, item) in items.iter().enumerate() {
        let host = staging.path().join(index.to_string());
        mtools("mcopy", to, &[&host.to_string_lossy(), &format!("::/{}", item.path)])?;
    }
    Ok(())
}

/// A master boot record with one EFI system partition.
///
/// Spec: \[UEFI\] "Legacy Master Boot Record (MBR)".
fn partition_table(size: u64) -> Result<[u8; SECTOR as usize]> {
    const EFI_SYSTEM: u8 = 0xef;
    let mut record = [0; SECTOR as usize];
    // Status, no cylinders and heads, type, none again; first sector and count.
    record[446..454].copy_from_slice(&[0, 0xfe, 0xff, 0xff, EFI_SYSTEM, 0xfe, 0xff, 0xff]);
    record[454..458].copy_from_slice(&u32::try_from(START / SECTOR)?.to_le_bytes());
    record[458..462].copy_from_slice(&u32::try_from(size / SECTOR)?.to_le_bytes());
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(record)
}

fn mtools(tool: &str, image: &Path, args: &[&str]) -> Result<()> {
    let partition = format!("{}@@{START}", image.display());
    let output = Command::new(tool)
        .args(["-i", &partition])
        .args(args)
        .output()
        .with_context(|| format!("starting {tool}: is mtools installed?"))?;
    ensure!(output.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
