//! Where things are in the source tree.

use std::path::{Path, PathBuf};

use crate::machine::Board;

/// The source tree.
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// All that the bench makes.
pub fn build() -> PathBuf {
    root().join("build")
}

/// The distribution's kernel.
pub fn kernel() -> PathBuf {
    build().join("kernel/vmlinuz")
}

/// The distribution's kernel modules.
pub fn modules() -> PathBuf {
    build().join("kernel/modules")
}

/// The distribution's kernel for machines in the cloud: the same sources with fewer drivers, packed so that it unpacks fast.
pub fn cloud_kernel() -> PathBuf {
    build().join("kernel-cloud/vmlinuz")
}

/// The distribution's fwupd, unpacked, with libraries that this machine lacks.
pub fn fwupd() -> PathBuf {
    build().join("fwupd")
}

/// That kernel's modules.
pub fn cloud_modules() -> PathBuf {
    build().join("kernel-cloud/modules")
}

/// The bench's RAM disk with that kernel's modules.
pub fn cloud_initrd() -> PathBuf {
    build().join("initrd-cloud.img")
}

/// Kernel and RAM disk that a board's machine boots: an emulator that interprets takes three minutes to unpack the other one.
pub fn kernel_of(board: Board) -> (PathBuf, PathBuf) {
    match board {
        Board::Amd => (kernel(), initrd()),
        Board::Intel => (cloud_kernel(), cloud_initrd()),
    }
}

/// The bench's RAM disk.
pub fn initrd() -> PathBuf {
    build().join("initrd.img")
}

/// The guest's tool.
pub fn tool() -> PathBuf {
    build().join("cordon")
}

/// The loader, a UEFI application.
pub fn loader() -> PathBuf {
    build().join("loader.efi")
}

/// The part of a board's firmware that Bochs' lacks.
pub fn platform() -> PathBuf {
    build().join("platform.efi")
}

/// The loader that executes SENTER at once, for tests.
pub fn senter() -> PathBuf {
    build().join("senter.efi")
}

/// The bench's own SINIT module.
pub fn sinit() -> PathBuf {
    build().join("sinit.bin")
}

/// Firmware's implant, for tests.
pub fn hostile() -> PathBuf {
    build().join("hostile.efi")
}

/// The bare machine's program, for tests.
pub fn bare() -> PathBuf {
    build().join("bare.img")
}

/// The secure loader block.
pub fn slb() -> PathBuf {
    build().join("slb.bin")
}

/// The MLE image.
pub fn mle() -> PathBuf {
    build().join("mle.bin")
}

/// A path that is good in any working folder.
pub fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).to_string_lossy().into_owned()
}
