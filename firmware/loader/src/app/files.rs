//! Files of the volume that the loader came from.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use uefi::boot::{self, ScopedProtocol};
use uefi::proto::media::file::{
    Directory, File as _, FileAttribute, FileInfo, FileMode, FileType, RegularFile,
};
use uefi::proto::media::fs::SimpleFileSystem;
use uefi::{CString16, Status};

use super::error::FileError;

/// A volume.
pub struct Volume {
    root: Directory,
    /// Open as long as its files are.
    _file_system: ScopedProtocol<SimpleFileSystem>,
}

impl Volume {
    /// The volume that this image was loaded from.
    pub fn of_this_image() -> Result<Self, Status> {
        let mut file_system = boot::get_image_file_system(boot::image_handle()).map_err(|e| e.status())?;
        let root = file_system.open_volume().map_err(|e| e.status())?;
        Ok(Self { root, _file_system: file_system })
    }

    fn open_any(&mut self, path: &str) -> Result<FileType, FileError> {
        // The entry parser takes only paths that EFI can name; a path it can't name is no file.
        let path = CString16::try_from(path).map_err(|_| FileError::Firmware(Status::NOT_FOUND))?;
        Ok(self.root.open(&path, FileMode::Read, FileAttribute::empty())?.into_type()?)
    }

    /// Opens a file by its path from the root.
    pub fn open(&mut self, path: &str) -> Result<File, FileError> {
        let FileType::Regular(mut handle) = self.open_any(path)? else { return Err(FileError::Directory) };
        let size = handle.get_boxed_info::<FileInfo>()?.file_size();
        Ok(File { handle, size })
    }

    /// Names of the files in a directory.
    pub fn list(&mut self, path: &str) -> Result<Vec<String>, FileError> {
        let FileType::Dir(mut directory) = self.open_any(path)? else {
            return Err(FileError::Firmware(Status::NOT_FOUND));
        };
        let mut names = Vec::new();
        while let Some(info) = directory.read_entry_boxed()? {
            if !info.attribute().contains(FileAttribute::DIRECTORY) {
                names.push(info.file_name().to_string());
            }
        }
        Ok(names)
    }
}

/// An open file.
pub struct File {
    handle: RegularFile,
    size: u64,
}

impl File {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads the whole file to the beginning of `to`, which has room for it.
    pub fn read(&mut self, to: &mut [u8]) -> Result<(), FileError> {
        let room = to.len() as u64;
        let to = usize::try_from(self.size).ok().and_then(|size| to.get_mut(..size));
        self.fill(to.ok_or(FileError::TooLarge { size: self.size, limit: room })?)
    }

    /// The first bytes; zeros where the file has less.
    pub fn start<const N: usize>(&mut self) -> Result<[u8; N], FileError> {
        let mut start = [0; N];
        let there = usize::try_from(self.size).unwrap_or(usize::MAX).min(N);
        self.fill(start.get_mut(..there).unwrap_or_default())?;
        Ok(start)
    }

    /// The whole of a small file.
    pub fn contents(&mut self, limit: u64) -> Result<Vec<u8>, FileError> {
        let size = usize::try_from(self.size).ok().filter(|_| self.size <= limit);
        let mut bytes = alloc::vec![0; size.ok_or(FileError::TooLarge { size: self.size, limit })?];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Fills `to` from the file's beginning.
    fn fill(&mut self, to: &mut [u8]) -> Result<(), FileError> {
        self.handle.set_position(0)?;
        let read = self.handle.read(to)?;
        if read == to.len() { Ok(()) } else { Err(FileError::Short { read, size: self.size }) }
    }
}
