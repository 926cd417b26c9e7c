//! What a software SMI asks of SMM: the communicate buffer that runtime code of an EDK2 firmware leaves
//! for the SMM core, found, copied, decoded and judged before the SMI is raised.
//!
//! The runtime driver writes a buffer's physical address and size into a structure of the SMM loader
//! (`SMM_CORE_PRIVATE_DATA`), whose address SMM knows, and writes to the SMI command port. Any SMI makes SMM
//! look there, so what was not let through must also be taken out: [`CorePrivate::withdraw`].
//!
//! Nothing but the sandbox writes this memory, and the sandbox is stopped while its SMI is judged and raised.
//!
//! Spec: \[EDK2\] `PiSmmCorePrivateData.h`, `SmmVariableCommon.h`; \[PI\] "EFI_MM_COMMUNICATION_PROTOCOL",
//! "EFI_MM_COMMUNICATE_HEADER_V3".

use core::fmt;

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use uefi_raw::{Guid, guid};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::call::NAME_MAX;
use crate::exposure;
use crate::service::Service;

/// Largest communicate buffer, in bytes.
pub const BUFFER_MAX: u64 = 1 << 20;
/// Most handlers that a policy names.
pub const LISTED_MAX: usize = 8;

/// EDK2's variable handler, `gEfiSmmVariableProtocolGuid`.
pub const VARIABLE_HANDLER: Guid = guid!("ed32d533-99e6-4209-9cc0-2d72cdd998a7");
/// In place of a handler's GUID: the buffer has the third version of the header.
const HEADER_V3: Guid = guid!("68e8c853-2ba9-4dd7-9ac0-91e16155c935");

/// Handlers with a name of their own in the log.
const NAMED: [(Guid, &str); 4] = [
    (VARIABLE_HANDLER, "variables"),
    (guid!("3868fc3b-7e45-43a7-906c-4ba47de1754d"), "fault-tolerant write"),
    (guid!("d326d041-bd31-4c01-b5a8-628be87f0653"), "firmware volume"),
    (guid!("2a3cfebd-27e8-4d0a-8b79-d688c2a3e1c0"), "lock box"),
];

/// The name of a handler that is known.
pub fn handler_name(handler: &Guid) -> Option<&'static str> {
    NAMED.iter().find(|(guid, _)| guid == handler).map(|(_, name)| *name)
}

/// `SMM_CORE_PRIVATE_DATA` on x86-64 up to `ReturnStatus`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PrivateData {
    signature: U64,
    image_handle: U64,
    smram_count: U64,
    smram_ranges: U64,
    entry_point: U64,
    entry_registered: u8,
    in_smm: u8,
    padding: [u8; 6],
    system_table: U64,
    buffer: U64,
    buffer_size: U64,
    status: U64,
}

const BUFFER_AT: u64 = 56;
const STATUS_AT: u64 = 72;
const _: () = assert!(core::mem::offset_of!(PrivateData, entry_registered) == 40);
const _: () = assert!(core::mem::offset_of!(PrivateData, buffer) == BUFFER_AT as usize);
const _: () = assert!(core::mem::offset_of!(PrivateData, status) == STATUS_AT as usize);

/// "smmc" as a UINTN.
const SIGNATURE: u64 = 0x636d_6d73;
/// Bytes of the whole structure: the fields above and three about the SMM core's image.
const PRIVATE_LEN: u64 = 104;
/// EFI_ACCESS_DENIED.
const ACCESS_DENIED: u64 = 1 << 63 | 15;

impl PrivateData {
    /// Whether an SMM core that runs has filled this in: what only has the signature is not it.
    fn is_live(&self) -> bool {
        self.signature.get() == SIGNATURE
            && self.image_handle.get() != 0
            && (1..=64).contains(&self.smram_count.get())
            && self.smram_ranges.get() != 0
            && self.entry_point.get() != 0
            && self.system_table.get() != 0
            && (self.entry_registered, self.in_smm) == (1, 0)
    }
}

/// `EFI_MM_COMMUNICATE_HEADER`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    handler: [u8; 16],
    /// Bytes of the message; with [`HEADER_V3`], of the whole buffer.
    length: U64,
}

/// What follows a [`Header`] in the third version.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeaderV3Rest {
    reserved: U64,
    handler: [u8; 16],
    length: U64,
}

/// `SMM_VARIABLE_COMMUNICATE_HEADER`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct VariableHeader {
    function: U64,
    status: U64,
}

/// `SMM_VARIABLE_COMMUNICATE_ACCESS_VARIABLE` up to its name.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Access {
    guid: [u8; 16],
    data_size: U64,
    name_size: U64,
    attributes: U32,
}

/// The payloads that have a name behind a GUID and the name's size.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Named {
    guid: [u8; 16],
    name_size: U64,
}

/// `VAR_CHECK_VARIABLE_PROPERTY`, between [`Named`] and the name.
const PROPERTY_LEN: u64 = 24;

/// What the variable handler is asked to do; the value is EDK2's function number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "EDK2's names, SMM_VARIABLE_FUNCTION_")]
pub enum VariableFunction {
    GetVariable = 1,
    GetNextVariableName = 2,
    SetVariable = 3,
    QueryVariableInfo = 4,
    ReadyToBoot = 5,
    ExitBootServices = 6,
    GetStatistics = 7,
    LockVariable = 8,
    PropertySet = 9,
    PropertyGet = 10,
    GetPayloadSize = 11,
    InitRuntimeCache = 12,
    SyncRuntimeCache = 13,
    GetRuntimeCacheInfo = 14,
}

impl VariableFunction {
    const ALL: [Self; 14] = [
        Self::GetVariable,
        Self::GetNextVariableName,
        Self::SetVariable,
        Self::QueryVariableInfo,
        Self::ReadyToBoot,
        Self::ExitBootServices,
        Self::GetStatistics,
        Self::LockVariable,
        Self::PropertySet,
        Self::PropertyGet,
        Self::GetPayloadSize,
        Self::InitRuntimeCache,
        Self::SyncRuntimeCache,
        Self::GetRuntimeCacheInfo,
    ];

    /// The function with this number.
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|f| *f as u64 == number)
    }
}

/// A variable's name: UTF-16, without its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name(Vec<u8, NAME_MAX>);

impl Name {
    /// UTF-16 units.
    pub fn units(&self) -> impl Iterator<Item = u16> {
        self.0.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit))
    }
}

/// The variable that a call is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable<'a> {
    /// Its vendor.
    pub guid: Guid,
    /// Its name.
    pub name: &'a Name,
    /// Bytes of content, or of room for it; only GetVariable and SetVariable have one.
    pub data_size: u64,
    /// Attributes to set; only with SetVariable.
    pub attributes: u32,
}

/// A request to the variable handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VariableCall<'a> {
    /// What is to be done.
    pub function: VariableFunction,
    /// With which variable; some functions have none.
    pub variable: Option<Variable<'a>>,
}

impl VariableCall<'_> {
    /// Whether this is what firmware asks of SMM to carry out the guest's call of `service`, on the variable with
    /// this vendor and name (UTF-16 bytes; what follows a zero character does not count). Other requests may be
    /// sound (EDK2 keeps the time zone of SetTime in a variable), yet they are firmware's own idea.
    pub fn answers(&self, service: Service, guid: &[u8; 16], name: &[u8]) -> bool {
        use VariableFunction as F;
        let same = |v: &Variable<'_>| {
            let name = name.as_chunks::<2>().0.iter().map(|c| u16::from_le_bytes(*c));
            v.guid.to_bytes() == *guid && v.name.units().eq(name.take_while(|unit| *unit != 0))
        };
        let wanted = match service {
            Service::GetVariable => F::GetVariable,
            Service::SetVariable => F::SetVariable,
            Service::GetNextVariableName => F::GetNextVariableName,
            Service::QueryVariableInfo => return self.function == F::QueryVariableInfo,
            _ => return false,
        };
        self.function == wanted && self.variable.as_ref().is_some_and(same)
    }
}

/// What a pending communicate buffer asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The buffer.
    pub buffer: PhysRange,
    /// The SMM handler it is for.
    pub handler: Guid,
    /// Bytes that the handler is given.
    pub length: u64,
    /// The call, when it is for [`VARIABLE_HANDLER`].
    pub call: Option<VariableCall<'a>>,
}

impl Request<'_> {
    /// The variable that it is about, as records have it.
    pub fn variable(&self) -> Option<exposure::Variable> {
        let variable = self.call.as_ref()?.variable.as_ref()?;
        Some(exposure::Variable { guid: variable.guid, name: exposure::Name::new(&variable.name.0) })
    }
}

/// What for; not with which variable.
impl fmt::Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(call) = &self.call else {
            return match handler_name(&self.handler) {
                Some(name) => write!(f, "SMM handler \"{name}\", {} bytes", self.length),
                None => write!(f, "SMM handler {}, {} bytes", self.handler, self.length),
            };
        };
        write!(f, "SMM {:?}", call.function)
    }
}

/// What is wrong with what the sandbox left for SMM, or with the search for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommunicateError {
    /// Memory that cannot be read.
    Unreadable {
        /// What was to be read.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// A value beyond what it may be.
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Largest value accepted.
        limit: u64,
    },
    /// A value below what it must be.
    TooSmall {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Least value accepted.
        limit: u64,
    },
    /// The buffer does not lie in one region of runtime data, or lies over the SMM loader's structure.
    Misplaced {
        /// Its address.
        at: u64,
        /// Its size.
        size: u64,
    },
    /// A variable's name without an end within its size.
    Name,
    /// More than one structure that could be the SMM loader's, at these two addresses.
    Ambiguous {
        /// The first.
        first: u64,
        /// Another one.
        second: u64,
    },
}

impl fmt::Display for CommunicateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SMM communication: ")?;
        match *self {
            Self::Unreadable { what, at } => write!(f, "{what} at {at:#x} cannot be read"),
            Self::Field { field, value, limit } => write!(f, "{field} {value:#x}, at most {limit:#x}"),
            Self::TooSmall { field, value, limit } => write!(f, "{field} {value:#x}, at least {limit:#x}"),
            Self::Misplaced { at, size } => {
                write!(f, "buffer of {size:#x} bytes at {at:#x} is not in runtime data")
            }
            Self::Name => f.write_str("variable name without an end"),
            Self::Ambiguous { first, second } => {
                write!(f, "private data at {first:#x} and again at {second:#x}")
            }
        }
    }
}

type Result<T> = core::result::Result<T, CommunicateError>;

fn read<T: FromBytes + IntoBytes>(mem: &impl PhysMem, at: u64, what: &'static str) -> Result<T> {
    let mut value = T::new_zeroed();
    read_into(mem, at, value.as_mut_bytes(), what)?;
    Ok(value)
}

fn read_into(mem: &impl PhysMem, at: u64, out: &mut [u8], what: &'static str) -> Result<()> {
    if mem.read(at, out) { Ok(()) } else { Err(CommunicateError::Unreadable { what, at }) }
}

/// Looks for the SMM loader's structure in firmware's runtime regions: those of code too, where EDK2 has the
/// data of its runtime drivers. `None` when the firmware does not communicate this way. To be called once, at
/// launch, before the sandbox runs.
pub fn find_core_private(mem: &impl PhysMem, runtime: &[PhysRange]) -> Result<Option<CorePrivate>> {
    const WORD: u64 = size_of::<U64>() as u64;
    let mut found = None;
    let mut page = [U64::ZERO; PAGE_SIZE as usize / size_of::<U64>()];
    for region in runtime {
        let Some(mut at) = region.start().checked_next_multiple_of(WORD) else { continue };
        while let Some(piece) =
            PhysRange::from_last(at, at | (PAGE_SIZE - 1)).and_then(|p| p.intersection(region))
        {
            let words = usize::try_from(piece.len() / WORD).unwrap_or(0).min(page.len());
            let chunk = page.get_mut(..words).unwrap_or_default();
            read_into(mem, at, chunk.as_mut_bytes(), "runtime region")?;
            for (index, word) in chunk.iter().enumerate() {
                let here = at.saturating_add((index as u64).saturating_mul(WORD));
                if word.get() != SIGNATURE || !fits(region, here) {
                    continue;
                }
                if !read::<PrivateData>(mem, here, "private data")?.is_live() {
                    continue;
                }
                if let Some(CorePrivate { at: first }) = found.replace(CorePrivate { at: here }) {
                    return Err(CommunicateError::Ambiguous { first, second: here });
                }
            }
            match piece.end() {
                Some(next) => at = next,
                None => break,
            }
        }
    }
    Ok(found)
}

fn fits(region: &PhysRange, at: u64) -> bool {
    PhysRange::new(at, PRIVATE_LEN).is_some_and(|structure| region.contains(&structure))
}

/// The SMM loader's structure, by which runtime code and SMM find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorePrivate {
    at: u64,
}

impl CorePrivate {
    /// Its physical address.
    pub const fn address(&self) -> u64 {
        self.at
    }

    /// What SMM would be asked if an SMI came now; `None` when nothing is pending. `runtime_data` is where a
    /// buffer may lie. Each byte is read once; `name` gets the variable's name, which is too long to be moved about.
    pub fn pending<'a>(
        &self,
        mem: &impl PhysMem,
        runtime_data: &[PhysRange],
        name: &'a mut Name,
    ) -> Result<Option<Request<'a>>> {
        let private: PrivateData = read(mem, self.at, "private data")?;
        let (at, size) = (private.buffer.get(), private.buffer_size.get());
        if at == 0 {
            return Ok(None);
        }
        at_least("buffer size", size, size_of::<Header>() as u64)?;
        at_most("buffer size", size, BUFFER_MAX)?;
        let own = PhysRange::new(self.at, PRIVATE_LEN);
        let buffer = PhysRange::new(at, size)
            .filter(|b| runtime_data.iter().any(|r| r.contains(b)) && own.is_some_and(|own| !own.overlaps(b)))
            .ok_or(CommunicateError::Misplaced { at, size })?;
        decode(mem, buffer, name).map(Some)
    }

    /// Answers a request in SMM's place with EFI_ACCESS_DENIED: no later SMI, of whatever source, will carry it
    /// out. False when the structure cannot be written.
    pub fn withdraw(&self, mem: &impl PhysMem) -> bool {
        mem.write(self.at.saturating_add(BUFFER_AT), U64::ZERO.as_bytes())
            && mem.write(self.at.saturating_add(STATUS_AT), U64::new(ACCESS_DENIED).as_bytes())
    }
}

fn at_least(field: &'static str, value: u64, limit: u64) -> Result<()> {
    if value >= limit { Ok(()) } else { Err(CommunicateError::TooSmall { field, value, limit }) }
}

fn at_most(field: &'static str, value: u64, limit: u64) -> Result<()> {
    if value <= limit { Ok(()) } else { Err(CommunicateError::Field { field, value, limit }) }
}

fn decode<'a>(mem: &impl PhysMem, buffer: PhysRange, name: &'a mut Name) -> Result<Request<'a>> {
    let mut message = Message { at: buffer.start(), left: buffer.len() };
    let header: Header = message.take(mem, "message header")?;
    let mut handler = Guid::from_bytes(header.handler);
    if handler == HEADER_V3 {
        let total = header.length.get();
        at_most("buffer size in the header", total, buffer.len())?;
        let header: HeaderV3Rest = message.take(mem, "message header")?;
        handler = Guid::from_bytes(header.handler);
        at_most("message size", header.length.get(), message.left)?;
        message.left = header.length.get();
    } else {
        // SMM gives the handler all of the buffer, whatever the header says.
        at_most("message length", header.length.get(), message.left)?;
    }
    let length = message.left;
    let call = if handler == VARIABLE_HANDLER { Some(variable_call(mem, message, name)?) } else { None };
    Ok(Request { buffer, handler, length, call })
}

/// The part of a message that has not been read yet.
struct Message {
    at: u64,
    left: u64,
}

impl Message {
    fn skip(&mut self, length: u64) -> Result<()> {
        at_least("message length left", self.left, length)?;
        self.at = self.at.saturating_add(length);
        self.left = self.left.saturating_sub(length);
        Ok(())
    }

    fn take<T: FromBytes + IntoBytes>(&mut self, mem: &impl PhysMem, what: &'static str) -> Result<T> {
        let at = self.at;
        self.skip(size_of::<T>() as u64)?;
        read(mem, at, what)
    }

    /// Gives `to` a name that ends within `size` bytes.
    fn name<'a>(&mut self, mem: &impl PhysMem, size: u64, to: &'a mut Name) -> Result<&'a Name> {
        at_most("name size", size, NAME_MAX as u64)?;
        let at = self.at;
        self.skip(size)?;
        let name = &mut to.0;
        name.clear();
        let _ = name.resize(usize::try_from(size).unwrap_or(0), 0u8); // at most its capacity, tested above
        read_into(mem, at, name, "variable name")?;
        let units = name.chunks_exact(2).position(|c| c == [0, 0]).ok_or(CommunicateError::Name)?;
        name.truncate(units.saturating_mul(2));
        Ok(to)
    }
}

fn variable_call<'a>(
    mem: &impl PhysMem,
    mut message: Message,
    name: &'a mut Name,
) -> Result<VariableCall<'a>> {
    use VariableFunction as F;
    let header: VariableHeader = message.take(mem, "variable message")?;
    let number = header.function.get();
    let function = F::from_number(number).ok_or(CommunicateError::Field {
        field: "variable function",
        value: number,
        limit: F::GetRuntimeCacheInfo as u64,
    })?;
    let variable = match function {
        F::GetVariable | F::SetVariable => {
            let access: Access = message.take(mem, "variable message")?;
            let name = message.name(mem, access.name_size.get(), name)?;
            let data_size = access.data_size.get();
            at_most("variable data size", data_size, message.left)?;
            let attributes = if function == F::SetVariable { access.attributes.get() } else { 0 };
            Some(Variable { guid: Guid::from_bytes(access.guid), name, data_size, attributes })
        }
        F::GetNextVariableName | F::LockVariable | F::PropertySet | F::PropertyGet => {
            let named: Named = message.take(mem, "variable message")?;
            if matches!(function, F::PropertySet | F::PropertyGet) {
                message.skip(PROPERTY_LEN)?;
            }
            let name = message.name(mem, named.name_size.get(), name)?;
            Some(Variable { guid: Guid::from_bytes(named.guid), name, data_size: 0, attributes: 0 })
        }
        _ => None,
    };
    Ok(VariableCall { function, variable })
}

/// Which SMM handlers the sandbox may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handlers {
    /// Any SMI is raised, whatever it is for.
    Any,
    /// Those with these GUIDs, by the communicate buffer.
    Only(Vec<Guid, LISTED_MAX>),
}

/// Which software SMIs of the sandbox are raised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmmPolicy {
    /// Whom they may be for.
    pub handlers: Handlers,
    /// The command byte that a listed request must come with: another one would have SMM run the handler of that
    /// byte along with it. `None` for any byte.
    pub command: Option<u8>,
}

impl Default for SmmPolicy {
    /// The variable handler alone, with command 0: what EDK2's communication uses.
    fn default() -> Self {
        Self { handlers: Handlers::Only(Vec::from_iter([VARIABLE_HANDLER])), command: Some(0) }
    }
}

/// Why an SMI is not raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// What is pending is malformed.
    Malformed(CommunicateError),
    /// Nothing is pending: the SMI's command byte alone would say what it is for.
    NoRequest,
    /// The handler is not listed.
    Handler(Guid),
    /// The command byte is not the one that goes with communication.
    Command(u8),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(error) => error.fmt(f),
            Self::NoRequest => f.write_str("SMI without a request"),
            Self::Handler(guid) => match handler_name(guid) {
                Some(name) => write!(f, "SMM handler \"{name}\" is not allowed"),
                None => write!(f, "SMM handler {guid} is not allowed"),
            },
            Self::Command(byte) => write!(f, "SMI command {byte:#04x} is not allowed"),
        }
    }
}

/// What becomes of an SMI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is raised.
    Allow,
    /// It is not, and the request is to be withdrawn: [`CorePrivate::withdraw`].
    Refuse(Refusal),
}

/// Decides about a software SMI of the sandbox: `command` is the byte for the SMI command port, `pending` what
/// [`CorePrivate::pending`] gave (`Ok(None)` on a firmware without that structure).
pub fn judge(policy: &SmmPolicy, command: u8, pending: &Result<Option<Request<'_>>>) -> Decision {
    let Handlers::Only(listed) = &policy.handlers else { return Decision::Allow };
    match pending {
        Err(error) => Decision::Refuse(Refusal::Malformed(*error)),
        Ok(None) => Decision::Refuse(Refusal::NoRequest),
        Ok(Some(request)) if !listed.contains(&request.handler) => {
            Decision::Refuse(Refusal::Handler(request.handler))
        }
        Ok(Some(_)) if policy.command.is_some_and(|only| only != command) => {
            Decision::Refuse(Refusal::Command(command))
        }
        Ok(Some(_)) => Decision::Allow,
    }
}

#[cfg(test)]
mod tests;
