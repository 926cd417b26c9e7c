//! Builds what the machines boot: Cordon's three images, the implant of hostile firmware, and the RAM disk.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::machine::Board;
use crate::senter::acm;
use crate::{initrd, paths};

/// Debian's compiler has no `core` for these targets built; it has the source.
const DEBIAN: [(&str, &str); 4] = [
    ("RUSTC", "/usr/bin/rustc"),
    ("RUSTC_BOOTSTRAP", "1"),
    ("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER", "ld.lld-19"),
    ("CARGO_TARGET_X86_64_UNKNOWN_UEFI_LINKER", "lld-link-19"),
];
const DEBIAN_ARGUMENTS: [&str; 2] =
    ["-Zbuild-std=core,alloc,compiler_builtins", "-Zbuild-std-features=compiler-builtins-mem"];

/// An image: how cargo makes it, and where it goes.
struct Image {
    target: &'static str,
    package: &'static str,
    binary: &'static str,
    output: &'static str,
    copy: fn() -> PathBuf,
}

const IMAGES: [Image; 3] = [
    Image { target: "x86_64-unknown-none", package: "mle", binary: "slb", output: "slb", copy: paths::slb },
    Image { target: "x86_64-unknown-none", package: "mle", binary: "mle", output: "mle", copy: paths::mle },
    uefi("loader", "loader.efi", paths::loader),
];

/// Has `tests/setup.sh` install what few need.
pub fn set_up(part: &str) -> Result<()> {
    let setup = paths::root().join("tests/setup.sh");
    let status = Command::new(&setup).arg(part).status().context("starting tests/setup.sh")?;
    ensure!(status.success(), "{} {part}: {status}", setup.display());
    Ok(())
}

/// Firmware's implant, which no user gets.
const HOSTILE: [Image; 1] = [uefi("hostile", "hostile.efi", paths::hostile)];
/// Firmware's part that emulated boards lack.
const PLATFORM: [Image; 2] = [
    uefi("platform", "platform.efi", paths::platform),
    Image { binary: "senter", ..uefi("platform", "senter.efi", paths::senter) },
];

/// A UEFI application with its package's name.
const fn uefi(package: &'static str, output: &'static str, copy: fn() -> PathBuf) -> Image {
    Image { target: "x86_64-unknown-uefi", package, binary: package, output, copy }
}

/// The machine's program that runs a guest by the MLE's back end.
const BARE: [Image; 1] = [Image {
    target: "x86_64-unknown-none",
    package: "bare",
    binary: "bare",
    output: "bare",
    copy: paths::bare,
}];

/// Builds Cordon's images into the build folder. Quiet when nothing changed.
pub fn build() -> Result<()> {
    build_all(&IMAGES)?;
    build_tool()
}

/// Builds the guest's tool: one file that needs no libraries.
fn build_tool() -> Result<()> {
    let made = target_dir().join("x86_64-unknown-linux-gnu/release/cordon");
    let mut cargo = Command::new("cargo");
    if made.exists() {
        cargo.arg("--quiet");
    }
    let status = cargo
        .current_dir(paths::root())
        .args(["build", "--release", "-p", "audit", "--bin", "cordon", "--target", "x86_64-unknown-linux-gnu"])
        .arg("--target-dir")
        .arg(target_dir())
        .arg("--config")
        .arg("target.x86_64-unknown-linux-gnu.rustflags=[\"-Ctarget-feature=+crt-static\", \"-Cstrip=symbols\"]")
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "cargo could not build the tool");
    let bytes = fs::read(&made).with_context(|| made.display().to_string())?;
    // The RAM disk that holds it is made again only when it changes.
    if fs::read(paths::tool()).ok().as_deref() != Some(&bytes) {
        initrd::write_whole(&paths::tool(), &bytes)?;
    }
    Ok(())
}

fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| paths::root().join("target"), PathBuf::from)
}

/// Builds the implant for hostile firmware into the build folder.
pub fn build_hostile() -> Result<()> {
    build_all(&HOSTILE)
}

/// Builds what plays more of a board's firmware than OVMF has into the build folder.
pub fn build_platform() -> Result<()> {
    build_all(&PLATFORM)
}

/// Builds all that a board's machine boots besides Cordon's images into the build folder.
pub fn build_for(board: Board) -> Result<()> {
    match board {
        Board::Amd => build_initrd(),
        Board::Intel => {
            build_platform()?;
            initrd::write_whole(&paths::sinit(), &acm::module())?;
            build_initrd_of(&paths::cloud_modules(), &paths::cloud_kernel(), &paths::cloud_initrd())
        }
    }
}

/// Builds the bare machine's program into the build folder.
pub fn build_bare() -> Result<()> {
    build_all(&BARE)
}

fn build_all(images: &[Image]) -> Result<()> {
    for (image, made) in images.iter().zip(make(images, &paths::root(), target_dir())?) {
        initrd::write_whole(&(image.copy)(), &fs::read(&made).with_context(|| made.display().to_string())?)?;
    }
    Ok(())
}

/// Builds Cordon's images from the source tree at `root` into `target_dir`. Gives their paths: SLB, MLE, loader.
pub fn build_from(root: &Path, target_dir: PathBuf) -> Result<Vec<PathBuf>> {
    make(&IMAGES, root, target_dir)
}

fn make(images: &[Image], root: &Path, mut target_dir: PathBuf) -> Result<Vec<PathBuf>> {
    let way = fs::read_to_string(paths::build().join("toolchain"))
        .context("no build/toolchain: run `make setup`")?;
    if way.trim() == "debian" {
        // Two compilers in one folder would each rebuild what the other left.
        target_dir.push("debian");
    }
    let mut all = Vec::new();
    for image in images {
        let mut cargo = match way.trim() {
            "rustup" => Command::new("cargo"),
            "debian" => {
                let mut cargo = Command::new("/usr/bin/cargo");
                cargo.envs(DEBIAN).args(DEBIAN_ARGUMENTS);
                cargo
            }
            other => bail!("build/toolchain names {other:?}: run `make setup`"),
        };
        let made = target_dir.join(image.target).join("release").join(image.output);
        if made.exists() {
            cargo.arg("--quiet");
        }
        let status = cargo
            .current_dir(root)
            .args(["build", "--release", "--target-dir"])
            .arg(&target_dir)
            .args(["--target", image.target, "-p", image.package, "--bin", image.binary])
            .arg("--config")
            .arg(without_paths(image.target, root)?)
            .status()
            .context("starting cargo")?;
        ensure!(status.success(), "cargo could not build {}", image.binary);
        all.push(made);
    }
    Ok(all)
}

/// Flags that keep the paths of this checkout and of cargo's sources out of the images, so that whoever builds them
/// anywhere gets the same bytes. They are added to those of the project's own configuration.
fn without_paths(target: &str, root: &Path) -> Result<String> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .context("no home folder")?;
    let flags = [(root, "/cordon"), (&cargo_home, "/cargo")]
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    Ok(format!("target.{target}.rustflags={flags:?}"))
}

/// Builds the RAM disk, if it is not there or older than the bench.
pub fn build_initrd() -> Result<()> {
    build_initrd_of(&paths::modules(), &paths::kernel(), &paths::initrd())
}

fn build_initrd_of(modules: &Path, kernel: &Path, to: &Path) -> Result<()> {
    if !paths::tool().exists() {
        build_tool()?;
    }
    let changed = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    let fresh = match (changed(to), env::current_exe().ok().and_then(|exe| changed(&exe))) {
        (Some(made), Some(bench)) => {
            made > bench && [kernel, &paths::tool()].iter().all(|p| changed(p).is_some_and(|p| made > p))
        }
        _ => false,
    };
    if fresh {
        return Ok(());
    }
    initrd::build(Path::new("/usr/bin/busybox"), &paths::tool(), modules, to)
}

/// Prints size and SHA-256 of what a launch measures.
pub fn measure() -> Result<()> {
    for (name, path) in [("SLB", paths::slb()), ("MLE", paths::mle())] {
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        // The CPU measures the length that the header states.
        let measured = match name {
            "SLB" => bytes.get(2..4).map_or(0, |l| usize::from(u16::from_le_bytes([l[0], l[1]]))),
            _ => bytes.len(),
        };
        let measured =
            bytes.get(..measured).with_context(|| format!("{name}: shorter than its header says"))?;
        println!("{name}  {:>8} bytes  sha256 {}", measured.len(), hex::encode(Sha256::digest(measured)));
    }
    Ok(())
}
