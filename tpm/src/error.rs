//! What can go wrong, and who is to blame.

use crate::bank::MAX_BANKS;

/// What the driver was waiting for when a wait ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The locality's registers to become valid (timeout A).
    Valid,
    /// The TPM to take a command: FIFO commandReady, CRB cmdReady (timeout B or C).
    Ready,
    /// FIFO stsValid (timeout C).
    Status,
    /// FIFO burstCount to be non-zero (timeout D).
    Burst,
    /// The command's response.
    Response,
}

/// How the FIFO handshake was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The TPM wants no more bytes though the command is not complete.
    ExpectsTooFew,
    /// The TPM wants more bytes though the command is complete.
    ExpectsTooMany,
    /// The response ends before the length that its header says.
    ResponseShort,
    /// The response goes on after the length that its header says.
    ResponseLong,
}

/// A field of a response, or what it should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// A PCR beyond 23, asked for.
    Pcr,
    /// Tag, size and response code.
    Header,
    /// The tag.
    Tag,
    /// The size in the header.
    ResponseSize,
    /// Whatever follows the last parameter.
    Trailing,
    /// moreData of a capability.
    MoreData,
    /// The capability.
    Capability,
    /// The number of PCR selections of a capability.
    Count,
    /// A hash algorithm.
    Hash,
    /// sizeofSelect of a PCR selection.
    SelectSize,
    /// pcrSelect of a PCR selection.
    Select,
    /// pcrUpdateCounter.
    UpdateCounter,
    /// The number of PCR selections.
    SelectionCount,
    /// The number of digests, or which PCRs they are of.
    DigestCount,
    /// The size of a digest.
    DigestSize,
    /// A digest.
    Digest,
    /// The handle of a created object.
    Handle,
    /// What describes a created object.
    Created,
    /// A creation ticket.
    Ticket,
    /// Time, clock and counts.
    Clock,
}

/// Why a TPM operation failed.
///
/// Small enough for two registers: the SLB stage pays for every byte at each place that passes it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No TPM answers at the window.
    Absent,
    /// INTERFACE_ID names an interface this driver does not know.
    Interface {
        /// The register.
        id: u32,
    },
    /// The interface does not offer the locality: a CRB with locality 0 only, or a page closed by the chipset.
    LocalityUnavailable {
        /// The locality asked for.
        locality: u8,
    },
    /// The locality was not granted in time.
    LocalityBusy {
        /// The locality asked for.
        locality: u8,
        /// The one that has the TPM, if any admits it.
        holder: Option<u8>,
    },
    /// No locality is held: [`crate::Tpm::acquire`] comes first.
    LocalityNotHeld,
    /// The hardware did not answer in time.
    Timeout(Wait),
    /// The FIFO handshake was broken.
    Flow(Flow),
    /// The CRB reports a fatal error (CTRL_STS bit 0).
    Fatal,
    /// A CRB buffer is not within the register window.
    Buffer {
        /// Its physical address; all ones above 4 GiB.
        address: u32,
        /// Its bytes.
        size: u32,
    },
    /// A command is longer than the TPM takes.
    CommandSize {
        /// Its bytes.
        size: u32,
        /// The limit.
        limit: u32,
    },
    /// The size in a response's header is out of bounds.
    ResponseSize {
        /// The size.
        size: u32,
        /// The limit.
        limit: u32,
    },
    /// A response is not of the form its command asks for.
    Response {
        /// The field at fault.
        field: Field,
        /// Its value; 0 when the response ends before it.
        value: u32,
    },
    /// The TPM was not started (TPM_RC_INITIALIZE): only firmware may do that, so the launch is refused.
    NotStarted,
    /// The TPM refused a command.
    Refused {
        /// TPM_CC of the command.
        command: u32,
        /// TPM_RC of the response.
        rc: u32,
    },
    /// More active banks than [`MAX_BANKS`].
    TooManyBanks,
    /// No bank is active: nothing can be measured.
    NoBanks,
    /// The TPM was cleared since its last reset: resetCount is 0, so nothing that it notes could be told from what it noted before.
    Cleared,
    /// Digests are not those of the active banks, in order.
    Digests,
    /// The event log being written has no room.
    LogFull {
        /// Bytes that the event takes.
        need: u32,
        /// Bytes left.
        have: u32,
    },
}

impl Error {
    /// A small number for a port, a register or a screen without text. Never renumbered.
    pub const fn code(self) -> u8 {
        match self {
            Self::Absent => 1,
            Self::Interface { .. } => 2,
            Self::LocalityUnavailable { .. } => 3,
            Self::LocalityBusy { .. } => 4,
            Self::LocalityNotHeld => 5,
            Self::Timeout(Wait::Valid) => 6,
            Self::Timeout(Wait::Ready) => 7,
            Self::Timeout(Wait::Status) => 8,
            Self::Timeout(Wait::Burst) => 9,
            Self::Timeout(Wait::Response) => 10,
            Self::Flow(_) => 11,
            Self::Fatal => 12,
            Self::Buffer { .. } => 13,
            Self::CommandSize { .. } => 14,
            Self::ResponseSize { .. } => 15,
            Self::Response { .. } => 16,
            Self::NotStarted => 17,
            Self::Refused { .. } => 18,
            Self::TooManyBanks => 19,
            Self::NoBanks => 20,
            Self::Digests => 21,
            Self::LogFull { .. } => 22,
            Self::Cleared => 23,
        }
    }
}

const _: () = assert!(size_of::<Result<u32, Error>>() <= 16);

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Absent => write!(f, "TPM: none answers"),
            Self::Interface { id } => write!(f, "TPM: unknown interface, INTERFACE_ID {id:#010x}"),
            Self::LocalityUnavailable { locality } => {
                write!(f, "TPM: the interface offers no locality {locality}")
            }
            Self::LocalityBusy { locality, holder: Some(holder) } => {
                write!(f, "TPM: locality {locality} not granted, locality {holder} holds the TPM")
            }
            Self::LocalityBusy { locality, holder: None } => {
                write!(f, "TPM: locality {locality} not granted, though none holds the TPM")
            }
            Self::LocalityNotHeld => write!(f, "TPM: no locality is held"),
            Self::Timeout(wait) => write!(f, "TPM: timeout, waiting for {wait:?}"),
            Self::Flow(flow) => write!(f, "TPM: FIFO handshake broken: {flow:?}"),
            Self::Fatal => write!(f, "TPM: CRB reports a fatal error"),
            Self::Buffer { address, size } => {
                write!(f, "TPM: CRB buffer {address:#x}, {size:#x} bytes, is outside the register window")
            }
            Self::CommandSize { size, limit } => {
                write!(f, "TPM: command of {size} bytes, limit {limit}")
            }
            Self::ResponseSize { size, limit } => {
                write!(f, "TPM: response of {size} bytes, limits 10 and {limit}")
            }
            Self::Response { field, value } => {
                write!(f, "TPM: response field {field:?} has value {value:#x}")
            }
            Self::NotStarted => write!(f, "TPM: not started by the firmware"),
            Self::Refused { command, rc } => {
                write!(f, "TPM: command {command:#x} refused with {rc:#x}")
            }
            Self::TooManyBanks => write!(f, "TPM: more than {MAX_BANKS} PCR banks"),
            Self::NoBanks => write!(f, "TPM: no PCR bank is active"),
            Self::Cleared => write!(f, "TPM: cleared since its last reset, resetCount is 0"),
            Self::Digests => write!(f, "TPM: digests do not match the active PCR banks"),
            Self::LogFull { need, have } => write!(f, "event log: {need} bytes needed, {have} left"),
        }
    }
}

impl core::error::Error for Error {}
