//! Where logs come from: Cordon's variables in the guest, or files.

use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use firmware::call::VENDOR;

/// The DRTM event log's variable.
pub const DRTM_LOG: &str = "DrtmLog";
/// The exposure log's variable.
pub const EXPOSURE: &str = "Exposure";
/// The variable with what is in force.
const STATUS: &str = "Status";
/// The variable that takes a request to unlock.
pub const UNLOCK: &str = "Unlock";

/// BOOTSERVICE_ACCESS and RUNTIME_ACCESS, as efivarfs puts them before a variable's content.
pub const ATTRIBUTES: [u8; 4] = [6, 0, 0, 0];

/// More than any variable of Cordon's has, so that one read takes all of it: each read is a call of its own, and the next
/// one may see another content.
const READ: usize = 128 * 1024;
/// How often a variable is read until it did not change meanwhile.
const TRIES: u32 = 5;
/// A file with more is no log of Cordon's.
const MOST: usize = 16 << 20;

/// Where the running system shows EFI variables.
#[derive(clap::Args, Clone)]
pub struct Efivars {
    /// Folder where efivarfs is mounted
    #[arg(long = "efivars", value_name = "DIR", default_value = "/sys/firmware/efi/efivars")]
    folder: PathBuf,
}

impl Efivars {
    /// The file of one of Cordon's variables.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}-{VENDOR}"))
    }

    /// A variable's content.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name);
        read(&path).context("is this a guest of Cordon, and efivarfs mounted?")
    }

    /// A variable's content, or a file's.
    pub fn read_or(&self, name: &str, file: Option<&Path>) -> Result<Vec<u8>> {
        file.map_or_else(|| self.read(name), read)
    }

    /// What is in force, or what a file has of it, without the zeros that Cordon puts after the text.
    pub fn status(&self, file: Option<&Path>) -> Result<Vec<u8>> {
        let mut text = self.read_or(STATUS, file)?;
        text.truncate(text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last.saturating_add(1)));
        Ok(text)
    }
}

/// The content of a file. The attributes that efivarfs puts before a variable are left out: no log of Cordon's begins like
/// that.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let read = || -> Result<Vec<u8>, Error> {
        let mut file = File::open(path)?;
        let mut content = vec![0; READ];
        let mut used = 0;
        loop {
            let room = content.get_mut(used..).unwrap_or_default();
            match file.read(room)? {
                0 => break,
                more => used = used.saturating_add(more),
            }
            if used == content.len() && used <= MOST {
                content.resize(used.saturating_mul(2), 0);
            }
        }
        content.truncate(used);
        Ok(content)
    };
    // Linux asks for a variable's size before it reads it, and fails when it grew in between.
    let transient =
        |error: &Error| !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied);
    let mut content = read();
    for _ in 1..TRIES {
        if content.as_ref().is_err_and(transient) {
            content = read();
        }
    }
    let mut content = content.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        content.len() <= MOST,
        "{}: {} bytes, limit {MOST}: this is no log of Cordon's",
        path.display(),
        content.len()
    );
    if content.starts_with(&ATTRIBUTES) {
        content.drain(..ATTRIBUTES.len());
    }
    Ok(content)
}
