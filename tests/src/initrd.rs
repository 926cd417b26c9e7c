//! The guest's initial RAM disk: a static busybox, Cordon's tool, an init, a few kernel modules. The same inputs give
//! the same bytes.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cpio::newc::{Builder, ModeFileType, trailer};
use flate2::{Compression, GzBuilder};

/// What init loads, in this order, each after what it depends on: EFI variables, then the disk and its file system.
const MODULES: [&str; 8] =
    ["efivarfs", "ahci", "sd_mod", "vfat", "nls_cp437", "nls_ascii", "msr", "capsule-loader"];
const INIT: &[u8] = include_bytes!("../guest/init");

/// Writes the RAM disk to `to`, with busybox from `busybox`, `cordon` from `tool`, and modules from the folder `modules`.
pub fn build(busybox: &Path, tool: &Path, modules: &Path, to: &Path) -> Result<()> {
    let order = load_order(modules, &MODULES)?;
    let mut archive = Archive::default();
    for folder in ["bin", "lib", "lib/modules"] {
        archive.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    archive.add("init", ModeFileType::Regular, 0o755, INIT)?;
    let busybox =
        fs::read(busybox).with_context(|| format!("{}: is busybox-static installed?", busybox.display()))?;
    archive.add("bin/busybox", ModeFileType::Regular, 0o755, &busybox)?;
    let tool = fs::read(tool).with_context(|| format!("{}: run `make build`", tool.display()))?;
    archive.add("bin/cordon", ModeFileType::Regular, 0o755, &tool)?;
    archive.add_modules(&order, &[])?;
    write_whole(to, &archive.packed()?)
}

/// Writes the RAM disk `base` and, behind it, one of the host's programs with the libraries that it needs, to `to`. The kernel
/// unpacks both.
pub fn add_program(base: &Path, program: &Path, to: &Path) -> Result<()> {
    let mut archive = Archive::default();
    for file in libraries(program, "")?.iter().map(PathBuf::as_path).chain([program]) {
        archive.add_file(file, file)?;
    }
    append(base, archive, to)
}

/// The same for `files`, of which the first is a program, of packages that are unpacked in `root`: they go to where they would be if
/// these were installed. A package's own libraries are in folders of the libraries' folder.
pub fn add_unpacked(base: &Path, root: &Path, files: &[&str], to: &Path) -> Result<()> {
    let common = root.join("usr/lib/x86_64-linux-gnu");
    let entries = fs::read_dir(&common).with_context(|| common.display().to_string())?;
    let mut folders: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    folders.retain(|path| path.is_dir());
    folders.push(common);
    let search: Vec<_> = folders.iter().map(|folder| folder.to_string_lossy()).collect();
    let files: Vec<_> = files.iter().map(|file| root.join(file)).collect();
    let program = files.first().context("no program")?;
    let mut archive = Archive::default();
    for file in libraries(program, &search.join(":"))?.iter().chain(&files) {
        let place = file.strip_prefix(root).map_or(file.clone(), |inside| Path::new("/").join(inside));
        archive.add_file(file, &place)?;
    }
    // Libraries of a large program are many megabytes to read and to measure.
    append_bytes(base, &archive.packed()?, to)
}

/// The libraries that a program needs, of the folders `search` first.
fn libraries(program: &Path, search: &str) -> Result<Vec<PathBuf>> {
    let output =
        Command::new("ldd").arg(program).env("LD_LIBRARY_PATH", search).output().context("starting ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let complete = output.status.success() && !text.contains("not found");
    ensure!(complete, "{}: is it installed? {text}", program.display());
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// Writes the RAM disk `base`, which [`build`] made of the folder `modules`, and behind it more modules of that folder, for init to
/// load after the others, to `to`. All of them must have files there.
pub fn add_modules(base: &Path, modules: &Path, names: &[&str], to: &Path) -> Result<()> {
    let there = load_order(modules, &MODULES)?;
    let all = load_order(modules, &[&MODULES, names].concat())?;
    for name in names {
        let found = all.iter().any(|file| module_name(file).as_deref() == Some(&name.replace('-', "_")));
        ensure!(found, "no module {name} in {}", modules.display());
    }
    let mut archive = Archive::default();
    archive.add_modules(&all, &there)?;
    append(base, archive, to)
}

fn append(base: &Path, archive: Archive, to: &Path) -> Result<()> {
    append_bytes(base, &trailer(archive.bytes)?, to)
}

fn append_bytes(base: &Path, archive: &[u8], to: &Path) -> Result<()> {
    let mut all = fs::read(base).with_context(|| base.display().to_string())?;
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend(archive);
    write_whole(to, &all)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, kind: ModeFileType, mode: u32, data: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(data.len()).context("a file of 4 GiB in the RAM disk")?;
        let mut entry = Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .set_mode_file_type(kind)
            .write(std::mem::take(&mut self.bytes), size);
        entry.write_all(data)?;
        self.bytes = entry.finish()?;
        Ok(())
    }

    /// The whole archive, packed.
    fn packed(self) -> Result<Vec<u8>> {
        let mut packed = GzBuilder::new().mtime(0).write(Vec::new(), Compression::fast());
        packed.write_all(&trailer(self.bytes)?)?;
        Ok(packed.finish()?)
    }

    /// The file `from`, as `to`, with the folders that it is in: a second entry for one changes nothing.
    fn add_file(&mut self, from: &Path, to: &Path) -> Result<()> {
        let path = to.to_string_lossy();
        for (at, _) in path.match_indices('/').skip(1) {
            self.add(&path[1..at], ModeFileType::Directory, 0o755, &[])?;
        }
        let bytes = fs::read(from).with_context(|| from.display().to_string())?;
        self.add(&path[1..], ModeFileType::Regular, 0o755, &bytes)
    }

    /// The modules `order` but those that are `there`, and for init the list of all.
    fn add_modules(&mut self, order: &[PathBuf], there: &[PathBuf]) -> Result<()> {
        let mut list = String::new();
        for module in order {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            list.push_str(&format!("{name}\n"));
            if !there.contains(module) {
                self.add(&format!("lib/modules/{name}"), ModeFileType::Regular, 0o644, &fs::read(module)?)?;
            }
        }
        self.add("lib/modules/order", ModeFileType::Regular, 0o644, list.as_bytes())
    }
}

/// The kernel's name for the module in a file.
fn module_name(file: &Path) -> Option<String> {
    Some(file.file_stem()?.to_string_lossy().replace('-', "_"))
}

/// The files of the modules `names` and of all they depend on. A module that the kernel has built in has no file.
fn load_order(modules: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(modules).with_context(|| modules.display().to_string())? {
        let path = entry?.path();
        if let Some(name) = module_name(&path) {
            files.insert(name, path.clone());
        }
    }
    let mut order = Vec::new();
    for module in names {
        add_with_dependencies(module, &files, &mut order)?;
    }
    Ok(order)
}

fn add_with_dependencies(
    module: &str,
    files: &BTreeMap<String, PathBuf>,
    order: &mut Vec<PathBuf>,
) -> Result<()> {
    let Some(path) = files.get(&module.replace('-', "_")) else { return Ok(()) };
    if order.contains(path) {
        return Ok(());
    }
    for dependency in dependencies(&fs::read(path)?) {
        add_with_dependencies(&dependency, files, order)?;
    }
    order.push(path.clone());
    Ok(())
}

/// The names in a module's `depends=` record, which its `.modinfo` section holds as a C string.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|&b| b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect()
}

/// Replaces a file in one step, so that nobody ever reads half of it.
pub(crate) fn write_whole(to: &Path, data: &[u8]) -> Result<()> {
    let folder = to.parent().context("a file without a folder")?;
    // Readable by all, as a file made the plain way would be: what `sudo make` made serves the user too.
    let mut file =
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o644)).tempfile_in(folder)?;
    file.write_all(data)?;
    file.persist(to).with_context(|| to.display().to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(dir: &Path, name: &str, depends: &str) {
        fs::write(dir.join(format!("{name}.ko")), format!("ELF\0license=GPL\0depends={depends}\0x=1\0"))
            .unwrap();
    }

    #[test]
    fn modules_come_after_what_they_need_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        module(dir.path(), "ahci", "libahci,libata");
        module(dir.path(), "libahci", "libata");
        module(dir.path(), "libata", "scsi_mod");
        module(dir.path(), "scsi_mod", "");
        module(dir.path(), "sd_mod", "scsi_mod,t10-pi");
        module(dir.path(), "t10-pi", "");
        let names: Vec<_> = load_order(dir.path(), &MODULES)
            .unwrap()
            .iter()
            .map(|p| p.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["scsi_mod", "libata", "libahci", "ahci", "t10-pi", "sd_mod"]);
    }

    #[test]
    fn more_modules_come_after_those_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let (base, to) = (dir.path().join("base"), dir.path().join("to"));
        module(dir.path(), "sd_mod", "scsi_mod");
        module(dir.path(), "scsi_mod", "");
        module(dir.path(), "usb-storage", "scsi_mod,usbcore");
        module(dir.path(), "usbcore", "");
        fs::write(&base, "base!").unwrap();
        add_modules(&base, dir.path(), &["usb-storage"], &to).unwrap();
        let all = String::from_utf8_lossy(&fs::read(to).unwrap()).into_owned();
        assert!(all.starts_with("base!\x00\x00\x00070701"), "{all}");
        assert!(all.contains("scsi_mod.ko\nsd_mod.ko\nusbcore.ko\nusb-storage.ko\n"), "{all}");
        assert!(all.contains("lib/modules/usbcore.ko") && !all.contains("lib/modules/scsi_mod.ko"), "{all}");
        let error = add_modules(&base, dir.path(), &["usb-storrage"], &dir.path().join("to")).unwrap_err();
        assert!(error.to_string().starts_with("no module usb-storrage in "), "{error}");
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        module(dir.path(), "efivarfs", "");
        let (busybox, a, b) = (dir.path().join("busybox"), dir.path().join("a"), dir.path().join("b"));
        fs::write(&busybox, "box").unwrap();
        build(&busybox, &busybox, dir.path(), &a).unwrap();
        build(&busybox, &busybox, dir.path(), &b).unwrap();
        assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
    }
}
