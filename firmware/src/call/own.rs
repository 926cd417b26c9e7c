//! Variables that the MLE serves itself.

use uefi_raw::{Guid, guid};

/// Vendor GUID of Cordon's own variables.
pub const VENDOR: Guid = guid!("a720b6bf-f9e9-4210-b163-30211c7ddf1f");
/// Attributes of Cordon's own variables: readable, also at runtime; not in any storage.
pub(super) const OWN_ATTRIBUTES: u32 = 0x6;

/// A variable that the MLE serves itself, under [`VENDOR`], readable and read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnVariable {
    /// The DRTM event log, TCG crypto-agile.
    DrtmLog,
    /// What is in force, as text.
    Status,
    /// Exit counters, as text.
    Exits,
    /// The exposure log.
    Exposure,
}

impl OwnVariable {
    /// What a list of variables begins with.
    pub(super) const FIRST: Self = Self::DrtmLog;

    /// All, in the order in which they are listed.
    pub const ALL: [Self; 4] = [Self::DrtmLog, Self::Status, Self::Exits, Self::Exposure];

    /// The variable's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DrtmLog => "DrtmLog",
            Self::Status => "Status",
            Self::Exits => "Exits",
            Self::Exposure => "Exposure",
        }
    }

    pub(super) fn by_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.wide_name().eq(name.iter().copied()))
    }

    pub(super) fn after(self) -> Option<Self> {
        Self::ALL.into_iter().skip_while(|v| *v != self).nth(1)
    }

    /// The name as UTF-16 bytes, terminated.
    pub(super) fn wide_name(self) -> impl Iterator<Item = u8> {
        wide(self.name())
    }
}

/// Writing this variable asks for services to be unlocked. It cannot be read, and is not listed.
const UNLOCK: &str = "Unlock";

/// Whether a terminated UTF-16 name is that of [`UNLOCK`].
pub(super) fn is_unlock(name: &[u8]) -> bool {
    wide(UNLOCK).eq(name.iter().copied())
}

/// An ASCII name as UTF-16 bytes, terminated.
fn wide(name: &str) -> impl Iterator<Item = u8> {
    name.bytes().chain([0]).flat_map(|c| [c, 0])
}

/// Where the contents of Cordon's own variables come from.
pub trait OwnVariables {
    /// Writes the content to the start of `out` (cut, if it is longer) and gives the bytes written.
    fn fill(&self, which: OwnVariable, out: &mut [u8]) -> usize;
}
