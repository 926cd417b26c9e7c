//! Why nothing was launched, in words for people.

use alloc::string::String;
use core::fmt;

use loader::entry::EntryError;
use loader::image::ImageError;
use loader::machine::Refusal;
use loader::senter;
use uefi::Status;

use super::memory::NoMemory;

/// Why nothing was launched.
#[derive(Debug)]
pub enum Error {
    /// The file system that the loader came from can't be opened.
    Volume(Status),
    /// There is no entry for Cordon.
    NoEntry,
    /// The entry is wrong.
    Entry(EntryError),
    /// A file is wrong.
    File {
        /// Its path, or the line of the entry that names it.
        place: String,
        /// What is wrong.
        error: FileError,
    },
    /// The machine can't be launched.
    Machine(Refusal),
    /// It can't be launched by SENTER.
    Senter(senter::Refusal),
    /// There is no memory.
    Memory {
        /// What for.
        what: &'static str,
        /// How much.
        error: NoMemory,
    },
    /// The firmware does not give its memory map.
    MemoryMap(Status),
}

/// What is wrong with a file.
#[derive(Debug)]
pub enum FileError {
    /// The firmware can't open or read it.
    Firmware(Status),
    /// It is a directory.
    Directory,
    /// It has no bytes.
    Empty,
    /// It ended before its size.
    Short {
        /// Bytes read.
        read: usize,
        /// Its size.
        size: u64,
    },
    /// It is too large.
    TooLarge {
        /// Its size.
        size: u64,
        /// The largest accepted.
        limit: u64,
    },
    /// It is not what it should be.
    Image(ImageError),
    /// There is no memory for it.
    Memory(NoMemory),
}

impl Error {
    /// A failure of the file at `place`.
    pub fn file(place: &str, error: FileError) -> Self {
        Self::File { place: place.into(), error }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::Machine(refusal)
    }
}

impl From<senter::Refusal> for Error {
    fn from(refusal: senter::Refusal) -> Self {
        Self::Senter(refusal)
    }
}

impl From<uefi::Error> for FileError {
    fn from(error: uefi::Error) -> Self {
        Self::Firmware(error.status())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(status) => write!(f, "the loader's own file system: {status:?}"),
            Self::NoEntry => write!(f, "{}: no entry (*.conf) has Cordon's keys", super::ENTRIES),
            Self::Entry(error) => error.fmt(f),
            Self::File { place, error } => write!(f, "{place}: {error}"),
            Self::Machine(refusal) => write!(f, "this machine can't be launched: {refusal}"),
            Self::Senter(refusal) => write!(f, "this machine can't be launched: {refusal}"),
            Self::Memory { what, error } => write!(f, "{what}: {error}"),
            Self::MemoryMap(status) => write!(f, "the firmware's memory map: {status:?}"),
        }
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Firmware(Status::NOT_FOUND) => write!(f, "no such file"),
            Self::Firmware(status) => write!(f, "can't be read: {status:?}"),
            Self::Directory => write!(f, "is a directory"),
            Self::Empty => write!(f, "is empty"),
            Self::Short { read, size } => write!(f, "ended after {read} of {size} bytes"),
            Self::TooLarge { size, limit } => write!(f, "has {size} bytes, limit {limit}"),
            Self::Image(error) => error.fmt(f),
            Self::Memory(error) => error.fmt(f),
        }
    }
}
