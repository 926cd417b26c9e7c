//! Runtime-service calls as data: the guest's call is decoded, its arguments are copied into a call
//! buffer that the sandbox sees, the firmware runs on that, and what it leaves there is checked before
//! it reaches the guest.
//!
//! Neither side sees the other's memory. While the firmware runs the buffer is its own; before and
//! after, only the MLE touches it, because the sandbox runs on one CPU at a time and is stopped then.
//!
//! Spec: \[UEFI\] "Services - Runtime Services".

use core::fmt;
use core::mem::offset_of;

use hv::addr::{PAGE_SIZE, PhysRange};
use uefi_raw::time::{Daylight, Time};
pub use uefi_raw::{Guid, Status, guid};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::config::{Config, Policy};
use crate::memmap::{DESCRIPTOR_VERSION, Descriptor, MAX_DESCRIPTOR_SIZE, MAX_GUEST_DESCRIPTORS};
use crate::service::{COUNT, Service};

/// Longest variable name, in bytes, its terminating zero character included. Linux's own limit is 1024.
pub const NAME_MAX: usize = 2048;
/// Largest variable content in bytes.
pub const DATA_MAX: usize = 64 * 1024;

/// Vendor GUID of Cordon's own variables.
pub const VENDOR: Guid = guid!("a720b6bf-f9e9-4210-b163-30211c7ddf1f");
/// Attributes of Cordon's own variables: readable, also at runtime; not in any storage.
const OWN_ATTRIBUTES: u32 = 0x6;

/// A guest's memory by virtual address, translated by the page tables in force when it called.
pub trait GuestMem {
    /// Copies from guest memory; false when any byte of it cannot be read. `out` is unspecified then.
    fn read(&self, addr: u64, out: &mut [u8]) -> bool;
    /// Copies to guest memory; false when any byte of it cannot be written. Those before it may have been.
    fn write(&self, addr: u64, data: &[u8]) -> bool;
}

/// A variable that the MLE serves itself, under [`VENDOR`], readable and read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnVariable {
    /// The DRTM event log, TCG crypto-agile.
    DrtmLog,
    /// What is in force, as text.
    Status,
    /// Exit counters, as text.
    Exits,
}

impl OwnVariable {
    /// All, in the order in which they are listed.
    pub const ALL: [Self; 3] = [Self::DrtmLog, Self::Status, Self::Exits];

    /// The variable's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DrtmLog => "DrtmLog",
            Self::Status => "Status",
            Self::Exits => "Exits",
        }
    }

    fn by_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.wide_name().eq(name.iter().copied()))
    }

    fn after(self) -> Option<Self> {
        Self::ALL.into_iter().skip_while(|v| *v != self).nth(1)
    }

    /// The name as UTF-16 bytes, terminated.
    fn wide_name(self) -> impl Iterator<Item = u8> {
        self.name().bytes().chain([0]).flat_map(|c| [c, 0])
    }
}

/// Where the contents of Cordon's own variables come from.
pub trait OwnVariables {
    /// Writes the content to the start of `out` (cut, if it is longer) and gives the bytes written.
    fn fill(&self, which: OwnVariable, out: &mut [u8]) -> usize;
}

/// What the guest's registers held at the thunk's hypercall: the MS x64 calling convention.
#[derive(Clone, Copy, Debug, Default)]
pub struct Args {
    /// First argument.
    pub rcx: u64,
    /// Second argument.
    pub rdx: u64,
    /// Third argument.
    pub r8: u64,
    /// Fourth argument.
    pub r9: u64,
    /// Points at the return address; the fifth argument is 0x28 above.
    pub rsp: u64,
}

/// Distance from RSP to the fifth argument: return address and 32 bytes of shadow space.
const FIFTH_ARGUMENT: u64 = 0x28;

/// EFI_TIME.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct EfiTime {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    pad1: u8,
    nanosecond: u32,
    time_zone: i16,
    daylight: u8,
    pad2: u8,
}

impl EfiTime {
    /// The same time with unused bits zero; `None` when a field is out of its range.
    fn checked(mut self) -> Option<Self> {
        let time = Time {
            year: self.year,
            month: self.month,
            day: self.day,
            hour: self.hour,
            minute: self.minute,
            second: self.second,
            nanosecond: self.nanosecond,
            time_zone: self.time_zone,
            ..Time::invalid()
        };
        self.pad1 = 0;
        self.pad2 = 0;
        self.daylight &= Daylight::all().bits();
        time.is_valid().then_some(self)
    }
}

/// The small arguments of a call.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Slots {
    guid: [u8; 16],
    size: u64,
    storage: [u64; 3],
    time: EfiTime,
    /// EFI_TIME_CAPABILITIES: resolution, accuracy, and a boolean in the first byte of the last word.
    capabilities: [u32; 3],
    attributes: u32,
    count: u32,
    enabled: u8,
    pending: u8,
    padding: [u8; 2],
}

/// The memory through which arguments and results pass; the only memory that the sandbox shares with
/// the MLE. Whole pages, so that nothing else lies on them.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct CallBuffer {
    slots: Slots,
    rest: [u8; CallBuffer::REST],
    name: [u8; NAME_MAX],
    data: [u8; DATA_MAX],
}

impl CallBuffer {
    const REST: usize = 4096_usize.saturating_sub(NAME_MAX).saturating_sub(size_of::<Slots>());
}

/// Bytes of the call buffer, whole pages.
pub const CALL_BUFFER_SIZE: usize = size_of::<CallBuffer>();
const _: () = assert!(CALL_BUFFER_SIZE == 4096 + DATA_MAX);

/// A firmware call ready to run: what the sandbox's CPU starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirmwareCall {
    /// Which service: its entry point is RIP.
    pub service: Service,
    /// First argument.
    pub rcx: u64,
    /// Second argument.
    pub rdx: u64,
    /// Third argument.
    pub r8: u64,
    /// Fourth argument.
    pub r9: u64,
    /// Fifth argument; services with fewer ignore it.
    pub fifth: u64,
}

impl FirmwareCall {
    /// What lies at RSP when the service is entered: return address, shadow space, fifth argument.
    /// RSP is 8 modulo 16 then.
    pub const fn frame(&self, return_address: u64) -> [u64; 6] {
        [return_address, 0, 0, 0, 0, self.fifth]
    }
}

/// What becomes of a guest's call.
#[derive(Debug, PartialEq, Eq)]
pub enum Begin {
    /// It is answered: the status goes into the guest's RAX.
    Done(Status),
    /// The firmware is to run; then [`Gate::end`] or [`Gate::end_without_firmware`].
    Run(Pending),
    /// The guest wants the machine reset; the MLE does that.
    Reset(ResetKind),
}

/// EFI_RESET_TYPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// As after power-on.
    Cold,
    /// CPU initialised, power kept.
    Warm,
    /// Power off.
    Shutdown,
    /// The platform's own: the same as a cold reset here.
    Platform,
}

/// A call that the firmware is to carry out: where its results go.
#[derive(Debug, PartialEq, Eq)]
pub struct Pending {
    service: Service,
    results: Results,
}

/// Guest addresses of results, and the limits that the guest set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Results {
    SetTime,
    Time { time: u64, capabilities: u64 },
    SetWakeup { enable: u8, with_time: bool },
    Wakeup { enabled: u64, pending: u64, time: u64 },
    Variable { attributes: u64, size_at: u64, data: u64, size: usize },
    NextName { size_at: u64, name: u64, guid: u64, size: usize },
    SetVariable { attributes: u32, size: usize },
    Count(u64),
    Storage { attributes: u32, to: [u64; 3] },
}

/// Something firmware did that it must not, for the log. The guest got EFI_DEVICE_ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anomaly {
    /// A status that is neither success nor a defined error.
    Status(u64),
    /// More bytes than the caller's buffer holds, or more than any variable may have, or a buffer called
    /// too small that is not.
    Size {
        /// What firmware said.
        said: u64,
        /// The buffer's size.
        buffer: usize,
    },
    /// A name without an end.
    Name,
    /// A time with a field out of its range.
    Time,
    /// A variable under Cordon's own GUID; it is not shown.
    OwnGuid,
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("firmware returned ")?;
        match *self {
            Self::Status(raw) => write!(f, "an undefined status {raw:#x}"),
            Self::Size { said, buffer } => write!(f, "size {said} for a buffer of {buffer}"),
            Self::Name => f.write_str("a variable name without an end"),
            Self::Time => f.write_str("an impossible time"),
            Self::OwnGuid => f.write_str("a variable under Cordon's GUID"),
        }
    }
}

/// What the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// For the guest's RAX.
    pub status: Status,
    /// What is to be logged of firmware's behaviour.
    pub anomaly: Option<Anomaly>,
}

impl Outcome {
    fn of(status: Status) -> Self {
        Self { status, anomaly: None }
    }
}

/// Who is to blame that results did not arrive.
enum Fault {
    /// The guest's pointer.
    Guest,
    /// The firmware.
    Firmware(Anomaly),
}

/// The way of all calls of runtime services.
#[derive(Debug)]
pub struct Gate {
    allowed: [bool; COUNT],
    ours: [PhysRange; 2],
    virtual_mode: bool,
}

impl Gate {
    /// `thunks` and `tables` are our runtime regions in the guest's memory map.
    pub fn new(config: &Config, thunks: PhysRange, tables: PhysRange) -> Self {
        let allowed = Service::ALL.map(|s| s.supported() && config.policy(s) == Policy::Sandbox);
        Self { allowed, ours: [thunks, tables], virtual_mode: false }
    }

    /// Decodes a call: answers it, or copies its arguments into `buffer` for the firmware.
    pub fn begin(
        &mut self,
        service: Service,
        args: &Args,
        mem: &impl GuestMem,
        own: &impl OwnVariables,
        buffer: &mut CallBuffer,
    ) -> Begin {
        if !self.allowed.get(service.index()).copied().unwrap_or(false) {
            return Begin::Done(Status::UNSUPPORTED);
        }
        buffer.slots = Slots::new_zeroed();
        buffer.name = [0; NAME_MAX];
        let decoded = match service {
            Service::GetTime => get_time(args),
            Service::SetTime => set_time(args, mem, buffer),
            Service::GetWakeupTime => get_wakeup_time(args),
            Service::SetWakeupTime => set_wakeup_time(args, mem, buffer),
            Service::GetVariable => get_variable(args, mem, own, buffer),
            Service::GetNextVariableName => next_name(args, mem, buffer),
            Service::SetVariable => set_variable(args, mem, buffer),
            Service::GetNextHighMonotonicCount => {
                pointer(args.rcx).map(|at| Decoded::Run(Results::Count(at)))
            }
            Service::QueryVariableInfo => query_variable_info(args),
            Service::ResetSystem => reset(args),
            Service::SetVirtualAddressMap => self.set_virtual_address_map(args, mem),
            Service::ConvertPointer | Service::UpdateCapsule | Service::QueryCapsuleCapabilities => {
                Err(Status::UNSUPPORTED)
            }
        };
        match decoded {
            Ok(Decoded::Run(results)) => Begin::Run(Pending { service, results }),
            Ok(Decoded::Reset(kind)) => Begin::Reset(kind),
            Ok(Decoded::Done(status)) | Err(status) => Begin::Done(status),
        }
    }

    /// Checks what the firmware, which returned `rax`, left in `buffer`, and copies it to the guest.
    pub fn end(&self, pending: Pending, rax: u64, mem: &impl GuestMem, buffer: &mut CallBuffer) -> Outcome {
        let results = match status(rax) {
            Ok(status) => give(&pending, status, mem, buffer),
            Err(anomaly) => Err(Fault::Firmware(anomaly)),
        };
        match results {
            Ok(outcome) => outcome,
            Err(Fault::Guest) => Outcome::of(Status::INVALID_PARAMETER),
            Err(Fault::Firmware(anomaly)) => Outcome { status: Status::DEVICE_ERROR, anomaly: Some(anomaly) },
        }
    }

    /// Ends a call whose firmware did not return: the sandbox is dead. Cordon's own variables are still
    /// listed and readable.
    pub fn end_without_firmware(
        &self,
        pending: Pending,
        mem: &impl GuestMem,
        buffer: &mut CallBuffer,
    ) -> Outcome {
        if matches!(pending.results, Results::NextName { .. })
            && let Ok(outcome) = give(&pending, Status::NOT_FOUND, mem, buffer)
        {
            return outcome;
        }
        Outcome::of(Status::DEVICE_ERROR)
    }

    /// Our regions must be mapped. Nothing else is done: the tables keep physical addresses, which every
    /// guest that calls this keeps mapped one to one, and thunks run at any address.
    fn set_virtual_address_map(&mut self, args: &Args, mem: &impl GuestMem) -> Result<Decoded, Status> {
        if self.virtual_mode {
            return Err(Status::UNSUPPORTED);
        }
        let (size, stride, at) = (args.rcx, args.rdx, pointer(args.r9)?);
        let good = args.r8 as u32 == DESCRIPTOR_VERSION
            && (size_of::<Descriptor>() as u64..=MAX_DESCRIPTOR_SIZE as u64).contains(&stride)
            && size.is_multiple_of(stride);
        let count = size.checked_div(stride).filter(|n| good && *n <= MAX_GUEST_DESCRIPTORS as u64);
        let count = count.ok_or(Status::INVALID_PARAMETER)?;
        let mut mapped = [false; 2];
        for index in 0..count {
            let mut descriptor = Descriptor::new_zeroed();
            copy_in(mem, at.wrapping_add(index.wrapping_mul(stride)), descriptor.as_mut_bytes())?;
            let range = descriptor
                .pages
                .get()
                .checked_mul(PAGE_SIZE)
                .and_then(|len| PhysRange::new(descriptor.phys_start.get(), len))
                .ok_or(Status::INVALID_PARAMETER)?;
            for (mapped, ours) in mapped.iter_mut().zip(&self.ours) {
                *mapped |= range.contains(ours);
            }
        }
        if mapped != [true; 2] {
            return Err(Status::NO_MAPPING);
        }
        self.virtual_mode = true;
        Ok(Decoded::Done(Status::SUCCESS))
    }
}

/// A decoded call, before it has a service.
enum Decoded {
    Done(Status),
    Run(Results),
    Reset(ResetKind),
}

/// A pointer that the specification wants: NULL is EFI_INVALID_PARAMETER.
fn pointer(value: u64) -> Result<u64, Status> {
    if value == 0 { Err(Status::INVALID_PARAMETER) } else { Ok(value) }
}

fn copy_in(mem: &impl GuestMem, at: u64, out: &mut [u8]) -> Result<(), Status> {
    if mem.read(at, out) { Ok(()) } else { Err(Status::INVALID_PARAMETER) }
}

fn read_u64(mem: &impl GuestMem, at: u64) -> Result<u64, Status> {
    let mut bytes = [0; 8];
    copy_in(mem, at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn fifth_argument(args: &Args, mem: &impl GuestMem) -> Result<u64, Status> {
    read_u64(mem, args.rsp.wrapping_add(FIFTH_ARGUMENT))
}

/// Copies a name of at most `limit` bytes from the guest, reading no page past the one that holds its
/// end; `name` holds zeros after it. Gives its bytes, the terminating zero included.
fn copy_name(mem: &impl GuestMem, at: u64, limit: usize, name: &mut [u8; NAME_MAX]) -> Result<usize, Status> {
    let limit = limit.min(NAME_MAX);
    let mut len = 0usize;
    while len < limit {
        let from = at.checked_add(len as u64).ok_or(Status::INVALID_PARAMETER)?;
        let page_left = PAGE_SIZE.wrapping_sub(from & PAGE_SIZE.wrapping_sub(1));
        let chunk = limit.wrapping_sub(len).min(page_left as usize);
        let end = len.saturating_add(chunk);
        copy_in(mem, from, name.get_mut(len..end).unwrap_or_default())?;
        len = end;
        if let Some(used) = terminated(name.get(..len).unwrap_or_default()) {
            name.iter_mut().skip(used).for_each(|b| *b = 0);
            return Ok(used);
        }
    }
    Err(Status::INVALID_PARAMETER)
}

/// Bytes up to and with the first zero character.
fn terminated(name: &[u8]) -> Option<usize> {
    let at = name.chunks_exact(2).position(|c| c == [0, 0])?;
    Some(at.saturating_add(1).saturating_mul(2))
}

fn copy_time(mem: &impl GuestMem, at: u64, buffer: &mut CallBuffer) -> Result<(), Status> {
    copy_in(mem, at, buffer.slots.time.as_mut_bytes())?;
    buffer.slots.time = buffer.slots.time.checked().ok_or(Status::INVALID_PARAMETER)?;
    Ok(())
}

fn get_time(args: &Args) -> Result<Decoded, Status> {
    Ok(Decoded::Run(Results::Time { time: pointer(args.rcx)?, capabilities: args.rdx }))
}

fn set_time(args: &Args, mem: &impl GuestMem, buffer: &mut CallBuffer) -> Result<Decoded, Status> {
    copy_time(mem, pointer(args.rcx)?, buffer)?;
    Ok(Decoded::Run(Results::SetTime))
}

fn get_wakeup_time(args: &Args) -> Result<Decoded, Status> {
    let (enabled, pending, time) = (pointer(args.rcx)?, pointer(args.rdx)?, pointer(args.r8)?);
    Ok(Decoded::Run(Results::Wakeup { enabled, pending, time }))
}

fn set_wakeup_time(args: &Args, mem: &impl GuestMem, buffer: &mut CallBuffer) -> Result<Decoded, Status> {
    let enable = u8::from(args.rcx & 0xff != 0);
    // The time may be absent only when the alarm is switched off, and does not matter then.
    let with_time = enable != 0;
    if with_time {
        copy_time(mem, pointer(args.rdx)?, buffer)?;
    }
    Ok(Decoded::Run(Results::SetWakeup { enable, with_time }))
}

fn get_variable(
    args: &Args,
    mem: &impl GuestMem,
    own: &impl OwnVariables,
    buffer: &mut CallBuffer,
) -> Result<Decoded, Status> {
    let (name, guid, size_at) = (pointer(args.rcx)?, pointer(args.rdx)?, pointer(args.r9)?);
    let attributes = args.r8;
    let data = fifth_argument(args, mem)?;
    let used = copy_name(mem, name, NAME_MAX, &mut buffer.name)?;
    copy_in(mem, guid, &mut buffer.slots.guid)?;
    let size = usize::try_from(read_u64(mem, size_at)?).unwrap_or(usize::MAX).min(DATA_MAX);
    if attributes != 0 {
        // Older firmware leaves them alone when the buffer is too small; so must what the guest gets back.
        copy_in(mem, attributes, buffer.slots.attributes.as_mut_bytes())?;
    }
    let results = Results::Variable { attributes, size_at, data, size };
    if buffer.slots.guid == VENDOR.to_bytes() {
        let which = buffer.name.get(..used).and_then(OwnVariable::by_name).ok_or(Status::NOT_FOUND)?;
        let length = own.fill(which, &mut buffer.data).min(DATA_MAX);
        buffer.slots.size = length as u64;
        buffer.slots.attributes = OWN_ATTRIBUTES;
        let status = if length <= size { Status::SUCCESS } else { Status::BUFFER_TOO_SMALL };
        let pending = Pending { service: Service::GetVariable, results };
        let outcome = give(&pending, status, mem, buffer);
        return outcome.map(|o| Decoded::Done(o.status)).map_err(|_| Status::INVALID_PARAMETER);
    }
    buffer.slots.size = size as u64;
    // Firmware that claims to have written what it has not gives the guest zeros.
    buffer.data.iter_mut().take(size).for_each(|b| *b = 0);
    Ok(Decoded::Run(results))
}

fn next_name(args: &Args, mem: &impl GuestMem, buffer: &mut CallBuffer) -> Result<Decoded, Status> {
    let (size_at, name, guid) = (pointer(args.rcx)?, pointer(args.rdx)?, pointer(args.r8)?);
    let size = usize::try_from(read_u64(mem, size_at)?).unwrap_or(usize::MAX).min(NAME_MAX);
    let used = copy_name(mem, name, size, &mut buffer.name)?;
    copy_in(mem, guid, &mut buffer.slots.guid)?;
    buffer.slots.size = size as u64;
    let results = Results::NextName { size_at, name, guid, size };
    if buffer.slots.guid != VENDOR.to_bytes() {
        return Ok(Decoded::Run(results));
    }
    let which = buffer.name.get(..used).and_then(OwnVariable::by_name).ok_or(Status::INVALID_PARAMETER)?;
    let next = which.after().ok_or(Status::NOT_FOUND)?;
    give_own_name(next, &results, mem, buffer)
        .map(|outcome| Decoded::Done(outcome.status))
        .map_err(|_| Status::INVALID_PARAMETER)
}

fn set_variable(args: &Args, mem: &impl GuestMem, buffer: &mut CallBuffer) -> Result<Decoded, Status> {
    let (name, guid) = (pointer(args.rcx)?, pointer(args.rdx)?);
    let attributes = args.r8 as u32;
    copy_name(mem, name, NAME_MAX, &mut buffer.name)?;
    copy_in(mem, guid, &mut buffer.slots.guid)?;
    if buffer.slots.guid == VENDOR.to_bytes() {
        return Err(Status::WRITE_PROTECTED);
    }
    let size = usize::try_from(args.r9).ok().filter(|s| *s <= DATA_MAX).ok_or(Status::INVALID_PARAMETER)?;
    if size != 0 {
        let data = pointer(fifth_argument(args, mem)?)?;
        copy_in(mem, data, buffer.data.get_mut(..size).unwrap_or_default())?;
    }
    Ok(Decoded::Run(Results::SetVariable { attributes, size }))
}

fn query_variable_info(args: &Args) -> Result<Decoded, Status> {
    let to = [pointer(args.rdx)?, pointer(args.r8)?, pointer(args.r9)?];
    Ok(Decoded::Run(Results::Storage { attributes: args.rcx as u32, to }))
}

fn reset(args: &Args) -> Result<Decoded, Status> {
    Ok(Decoded::Reset(match args.rcx as u32 {
        0 => ResetKind::Cold,
        1 => ResetKind::Warm,
        2 => ResetKind::Shutdown,
        3 => ResetKind::Platform,
        _ => return Err(Status::INVALID_PARAMETER),
    }))
}

impl Pending {
    /// The service that is to run.
    pub fn service(&self) -> Service {
        self.service
    }

    /// Bytes from the call buffer's start that the call can make use of, in either direction: the rest need not be
    /// copied between MLE and sandbox.
    pub fn used_bytes(&self) -> usize {
        let data = match self.results {
            Results::Variable { size, .. } | Results::SetVariable { size, .. } => size,
            _ => 0,
        };
        offset_of!(CallBuffer, data).saturating_add(data).min(CALL_BUFFER_SIZE)
    }

    /// The call for a sandbox that sees the buffer at `buffer`.
    pub fn call(&self, buffer: u64) -> FirmwareCall {
        let at = |offset: usize| buffer.wrapping_add(offset as u64);
        let slot = |offset: usize| at(offset_of!(CallBuffer, slots).wrapping_add(offset));
        let (name, data) = (at(offset_of!(CallBuffer, name)), at(offset_of!(CallBuffer, data)));
        let (guid, size) = (slot(offset_of!(Slots, guid)), slot(offset_of!(Slots, size)));
        let time = slot(offset_of!(Slots, time));
        let (rcx, rdx, r8, r9, fifth) = match self.results {
            Results::SetTime => (time, 0, 0, 0, 0),
            Results::Time { capabilities, .. } => {
                let to = if capabilities == 0 { 0 } else { slot(offset_of!(Slots, capabilities)) };
                (time, to, 0, 0, 0)
            }
            Results::Wakeup { .. } => {
                (slot(offset_of!(Slots, enabled)), slot(offset_of!(Slots, pending)), time, 0, 0)
            }
            Results::SetWakeup { enable, with_time } => {
                (enable.into(), if with_time { time } else { 0 }, 0, 0, 0)
            }
            Results::Variable { data: wanted, .. } => {
                let to = if wanted == 0 { 0 } else { data };
                (name, guid, slot(offset_of!(Slots, attributes)), size, to)
            }
            Results::NextName { .. } => (size, name, guid, 0, 0),
            Results::SetVariable { attributes, size } => {
                (name, guid, attributes.into(), size as u64, if size == 0 { 0 } else { data })
            }
            Results::Count(_) => (slot(offset_of!(Slots, count)), 0, 0, 0, 0),
            Results::Storage { attributes, .. } => {
                let storage = slot(offset_of!(Slots, storage));
                (attributes.into(), storage, storage.wrapping_add(8), storage.wrapping_add(16), 0)
            }
        };
        FirmwareCall { service: self.service, rcx, rdx, r8, r9, fifth }
    }
}

/// Success or one of the specification's errors; no runtime service returns a warning.
///
/// Spec: \[UEFI\] "Status Codes".
fn status(rax: u64) -> Result<Status, Anomaly> {
    const ERROR: u64 = 1 << 63;
    let code = rax & !ERROR;
    let defined = rax == 0 || (rax & ERROR != 0 && (1..=35).contains(&code));
    if defined { Ok(Status(rax as usize)) } else { Err(Anomaly::Status(rax)) }
}

fn copy_out(mem: &impl GuestMem, to: u64, data: &[u8]) -> Result<(), Fault> {
    if mem.write(to, data) { Ok(()) } else { Err(Fault::Guest) }
}

/// Checks the results in `buffer` that go with `status` and copies them to the guest.
fn give(
    pending: &Pending,
    status: Status,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Outcome, Fault> {
    match pending.results {
        Results::Variable { attributes, size_at, data, size } => {
            return give_variable(status, attributes, size_at, data, size, mem, buffer);
        }
        Results::NextName { size_at, name, guid, size } => {
            return give_next_name(status, &pending.results, [size_at, name, guid], size, mem, buffer);
        }
        _ if status != Status::SUCCESS => {}
        Results::SetTime | Results::SetWakeup { .. } | Results::SetVariable { .. } => {}
        Results::Time { time, capabilities } => {
            give_time(time, mem, buffer)?;
            if capabilities != 0 {
                let [resolution, accuracy, sets_to_zero] = buffer.slots.capabilities;
                let flag = u32::from(sets_to_zero & 0xff != 0);
                copy_out(mem, capabilities, [resolution, accuracy, flag].as_bytes())?;
            }
        }
        Results::Wakeup { enabled, pending, time } => {
            give_time(time, mem, buffer)?;
            copy_out(mem, enabled, &[u8::from(buffer.slots.enabled != 0)])?;
            copy_out(mem, pending, &[u8::from(buffer.slots.pending != 0)])?;
        }
        Results::Count(to) => copy_out(mem, to, buffer.slots.count.as_bytes())?,
        Results::Storage { to, .. } => {
            for (to, value) in to.into_iter().zip(&buffer.slots.storage) {
                copy_out(mem, to, value.as_bytes())?;
            }
        }
    }
    Ok(Outcome::of(status))
}

fn give_time(to: u64, mem: &impl GuestMem, buffer: &CallBuffer) -> Result<(), Fault> {
    let time = buffer.slots.time.checked().ok_or(Fault::Firmware(Anomaly::Time))?;
    copy_out(mem, to, time.as_bytes())
}

fn give_variable(
    status: Status,
    attributes: u64,
    size_at: u64,
    data: u64,
    size: usize,
    mem: &impl GuestMem,
    buffer: &CallBuffer,
) -> Result<Outcome, Fault> {
    let said = buffer.slots.size;
    let lie = Fault::Firmware(Anomaly::Size { said, buffer: size });
    let found = usize::try_from(said).ok().filter(|n| *n <= DATA_MAX);
    match status {
        Status::SUCCESS => {
            let content = found.filter(|n| *n <= size).and_then(|n| buffer.data.get(..n)).ok_or(lie)?;
            if data == 0 && !content.is_empty() {
                return Ok(Outcome::of(Status::INVALID_PARAMETER));
            }
            if !content.is_empty() {
                copy_out(mem, data, content)?;
            }
        }
        // A size that would not help the guest would make it ask for ever.
        Status::BUFFER_TOO_SMALL if found.is_none_or(|n| n <= size) => return Err(lie),
        Status::BUFFER_TOO_SMALL => {}
        _ => return Ok(Outcome::of(status)),
    }
    copy_out(mem, size_at, said.as_bytes())?;
    if attributes != 0 {
        copy_out(mem, attributes, buffer.slots.attributes.as_bytes())?;
    }
    Ok(Outcome::of(status))
}

fn give_next_name(
    status: Status,
    results: &Results,
    [size_at, name, guid]: [u64; 3],
    size: usize,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Outcome, Fault> {
    let said = buffer.slots.size;
    let lie = Fault::Firmware(Anomaly::Size { said, buffer: size });
    let first = OwnVariable::DrtmLog;
    match status {
        Status::SUCCESS => {
            if usize::try_from(said).is_ok_and(|n| n > size) {
                return Err(lie);
            }
            if buffer.slots.guid == VENDOR.to_bytes() {
                let outcome = give_own_name(first, results, mem, buffer)?;
                return Ok(Outcome { anomaly: Some(Anomaly::OwnGuid), ..outcome });
            }
            // The name's own end counts, not the size: firmware is known to leave the size as it was.
            let used = buffer.name.get(..size).and_then(terminated).ok_or(Fault::Firmware(Anomaly::Name))?;
            copy_out(mem, name, buffer.name.get(..used).unwrap_or_default())?;
            copy_out(mem, guid, &buffer.slots.guid)?;
            copy_out(mem, size_at, (used as u64).as_bytes())?;
        }
        Status::BUFFER_TOO_SMALL => {
            if said <= size as u64 || said > NAME_MAX as u64 {
                return Err(lie);
            }
            copy_out(mem, size_at, said.as_bytes())?;
        }
        // After firmware's last come ours.
        Status::NOT_FOUND => return give_own_name(first, results, mem, buffer),
        _ => {}
    }
    Ok(Outcome::of(status))
}

fn give_own_name(
    which: OwnVariable,
    results: &Results,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Outcome, Fault> {
    let Results::NextName { size_at, name, guid, size } = *results else {
        return Ok(Outcome::of(Status::INVALID_PARAMETER));
    };
    let mut used = 0usize;
    for (to, from) in buffer.name.iter_mut().zip(which.wide_name()) {
        *to = from;
        used = used.saturating_add(1);
    }
    let fits = used <= size;
    if fits {
        copy_out(mem, name, buffer.name.get(..used).unwrap_or_default())?;
        copy_out(mem, guid, &VENDOR.to_bytes())?;
    }
    copy_out(mem, size_at, (used as u64).as_bytes())?;
    Ok(Outcome::of(if fits { Status::SUCCESS } else { Status::BUFFER_TOO_SMALL }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memmap::tests::descriptor;
    use crate::testmem::Ram;
    use hv::io::PhysMem;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    impl GuestMem for Ram {
        fn read(&self, addr: u64, out: &mut [u8]) -> bool {
            PhysMem::read(self, addr, out)
        }
        fn write(&self, addr: u64, data: &[u8]) -> bool {
            PhysMem::write(self, addr, data)
        }
    }

    /// Where the sandbox sees the buffer.
    const SEEN_AT: u64 = 0x7000_0000;
    const GUEST: u64 = 0x1_0000;
    const GUEST_SIZE: usize = 0x4_0000;
    const GLOBAL: [u8; 16] = [0x61; 16];

    struct Own;
    impl OwnVariables for Own {
        fn fill(&self, which: OwnVariable, out: &mut [u8]) -> usize {
            let text = which.name().as_bytes();
            out[..text.len()].copy_from_slice(text);
            text.len()
        }
    }

    type Key = (Vec<u8>, [u8; 16]);

    /// Firmware with a variable store, written from the specification; it reads and writes nothing but
    /// the call buffer.
    #[derive(Default)]
    struct Model {
        store: BTreeMap<Key, (u32, Vec<u8>)>,
        time: [u8; 16],
    }

    const ERR: u64 = 1 << 63;

    struct View<'a>(&'a mut [u8]);
    impl View<'_> {
        fn at(&mut self, addr: u64, len: usize) -> &mut [u8] {
            let start = usize::try_from(addr.checked_sub(SEEN_AT).expect("below the buffer")).unwrap();
            &mut self.0[start..start + len]
        }
        fn u64(&mut self, addr: u64) -> u64 {
            u64::from_le_bytes(self.at(addr, 8).try_into().unwrap())
        }
        fn name(&mut self, addr: u64) -> Vec<u8> {
            let mut name = Vec::new();
            for at in (addr..).step_by(2) {
                let c: [u8; 2] = self.at(at, 2).try_into().unwrap();
                if c == [0, 0] {
                    return name;
                }
                name.extend(c);
            }
            unreachable!()
        }
        fn guid(&mut self, addr: u64) -> [u8; 16] {
            self.at(addr, 16).try_into().unwrap()
        }
    }

    impl Model {
        fn run(&mut self, call: &FirmwareCall, buffer: &mut CallBuffer) -> u64 {
            let mut v = View(buffer.as_mut_bytes());
            match call.service {
                Service::GetVariable => {
                    let key = (v.name(call.rcx), v.guid(call.rdx));
                    let Some((attributes, data)) = self.store.get(&key) else { return ERR | 14 };
                    let room = v.u64(call.r9);
                    v.at(call.r9, 8).copy_from_slice(&(data.len() as u64).to_le_bytes());
                    v.at(call.r8, 4).copy_from_slice(&attributes.to_le_bytes());
                    if room < data.len() as u64 {
                        return ERR | 5;
                    }
                    if call.fifth == 0 {
                        return ERR | 2;
                    }
                    v.at(call.fifth, data.len()).copy_from_slice(data);
                }
                Service::SetVariable => {
                    let key = (v.name(call.rcx), v.guid(call.rdx));
                    if call.r9 == 0 {
                        return if self.store.remove(&key).is_some() { 0 } else { ERR | 14 };
                    }
                    let data = v.at(call.fifth, call.r9 as usize).to_vec();
                    self.store.insert(key, (call.r8 as u32, data));
                }
                Service::GetNextVariableName => {
                    let key = (v.name(call.rdx), v.guid(call.r8));
                    let next = if key.0.is_empty() {
                        self.store.keys().next()
                    } else {
                        self.store.range(key..).nth(1).map(|(k, _)| k)
                    };
                    let Some((name, guid)) = next else { return ERR | 14 };
                    let (room, need) = (v.u64(call.rcx), name.len() as u64 + 2);
                    v.at(call.rcx, 8).copy_from_slice(&need.to_le_bytes());
                    if room < need {
                        return ERR | 5;
                    }
                    v.at(call.rdx, name.len()).copy_from_slice(name);
                    v.at(call.rdx + name.len() as u64, 2).fill(0);
                    v.at(call.r8, 16).copy_from_slice(guid);
                }
                Service::GetTime => {
                    v.at(call.rcx, 16).copy_from_slice(&self.time);
                    if call.rdx != 0 {
                        v.at(call.rdx, 12).copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0, 9, 9, 9, 9]);
                    }
                }
                Service::SetTime => self.time = v.at(call.rcx, 16).try_into().unwrap(),
                Service::GetWakeupTime => {
                    v.at(call.rcx, 1)[0] = 7;
                    v.at(call.rdx, 1)[0] = 0;
                    v.at(call.r8, 16).copy_from_slice(&self.time);
                }
                Service::SetWakeupTime => assert_eq!(call.rcx == 0, call.rdx == 0),
                Service::GetNextHighMonotonicCount => v.at(call.rcx, 4).fill(0x11),
                Service::QueryVariableInfo => {
                    for (to, byte) in [(call.rdx, 1), (call.r8, 2), (call.r9, 3)] {
                        v.at(to, 8).copy_from_slice(&[byte, 0, 0, 0, 0, 0, 0, 0]);
                    }
                }
                other => panic!("{} never reaches firmware", other.name()),
            }
            0
        }
    }

    struct Bench {
        gate: Gate,
        guest: Ram,
        buffer: Box<CallBuffer>,
        model: Model,
    }

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    impl Bench {
        fn new() -> Self {
            Self::with(&Config::default())
        }

        fn with(config: &Config) -> Self {
            Self {
                gate: Gate::new(config, range(0x20_4000, 0x1000), range(0x20_0000, 0x3000)),
                guest: Ram::new(GUEST, GUEST_SIZE),
                buffer: Box::new(CallBuffer::new_zeroed()),
                model: Model::default(),
            }
        }

        fn put(&self, at: u64, data: &[u8]) {
            assert!(GuestMem::write(&self.guest, at, data));
        }

        fn get(&self, at: u64, len: usize) -> Vec<u8> {
            let mut out = vec![0; len];
            assert!(GuestMem::read(&self.guest, at, &mut out));
            out
        }

        fn begin(&mut self, service: Service, a: [u64; 5]) -> Begin {
            let rsp = GUEST + GUEST_SIZE as u64 - 0x100;
            self.put(rsp + 0x28, &a[4].to_le_bytes());
            let args = Args { rcx: a[0], rdx: a[1], r8: a[2], r9: a[3], rsp };
            self.gate.begin(service, &args, &self.guest, &Own, &mut self.buffer)
        }

        /// A call with well-behaved firmware.
        fn call(&mut self, service: Service, a: [u64; 5]) -> Status {
            match self.begin(service, a) {
                Begin::Done(status) => status,
                Begin::Run(pending) => {
                    let rax = self.model.run(&pending.call(SEEN_AT), &mut self.buffer);
                    let outcome = self.gate.end(pending, rax, &self.guest, &mut self.buffer);
                    assert_eq!(outcome.anomaly, None);
                    outcome.status
                }
                Begin::Reset(kind) => panic!("{kind:?}"),
            }
        }

        /// A call whose firmware does `act` to the buffer and returns `rax`.
        fn hostile(
            &mut self,
            service: Service,
            a: [u64; 5],
            rax: u64,
            act: impl Fn(&mut CallBuffer),
        ) -> Outcome {
            let Begin::Run(pending) = self.begin(service, a) else { panic!("not run") };
            act(&mut self.buffer);
            self.gate.end(pending, rax, &self.guest, &mut self.buffer)
        }

        fn put_name(&self, at: u64, name: &str) {
            let wide: Vec<u8> = name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
            self.put(at, &wide);
        }

        fn name_at(&self, at: u64, bytes: u64) -> String {
            let raw = self.get(at, bytes as usize - 2);
            String::from_utf16(&raw.chunks(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect::<Vec<_>>())
                .unwrap()
        }

        fn u64_at(&self, at: u64) -> u64 {
            u64::from_le_bytes(self.get(at, 8).try_into().unwrap())
        }
    }

    const NAME: u64 = GUEST;
    const VENDOR_AT: u64 = GUEST + 0x1000;
    const SIZE: u64 = GUEST + 0x1100;
    const ATTR: u64 = GUEST + 0x1200;
    const DATA: u64 = GUEST + 0x2000;
    const TIME: u64 = GUEST + 0x1300;
    const NOON: [u8; 16] = [0xe8, 7, 2, 29, 12, 30, 59, 0xaa, 0, 0, 0, 0, 0xff, 7, 0xff, 0xaa];

    fn variable_args() -> [u64; 5] {
        [NAME, VENDOR_AT, ATTR, SIZE, DATA]
    }

    fn ready(b: &Bench, name: &str, room: u64) {
        b.put_name(NAME, name);
        b.put(VENDOR_AT, &GLOBAL);
        b.put(SIZE, &room.to_le_bytes());
    }

    #[test]
    fn the_buffer_is_laid_out_in_whole_pages() {
        assert_eq!(offset_of!(CallBuffer, name), 2048);
        assert_eq!(offset_of!(CallBuffer, data), 4096);
        assert_eq!(CALL_BUFFER_SIZE, 17 * 4096);
        assert_eq!(size_of::<EfiTime>(), size_of::<Time>());
        assert_eq!(offset_of!(EfiTime, daylight), offset_of!(Time, daylight));
        let frame =
            FirmwareCall { service: Service::GetTime, rcx: 0, rdx: 0, r8: 0, r9: 0, fifth: 9 }.frame(8);
        assert_eq!((frame[0], frame[FIFTH_ARGUMENT as usize / 8]), (8, 9));
    }

    #[test]
    fn a_variable_is_written_read_and_deleted() {
        let mut b = Bench::new();
        ready(&b, "Boot0001", 0);
        b.put(DATA, b"hello");
        assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 5, DATA]), Status::SUCCESS);
        b.put(DATA, &[0xee; 8]);
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::BUFFER_TOO_SMALL);
        assert_eq!((b.u64_at(SIZE), b.get(ATTR, 4)), (5, vec![7, 0, 0, 0]));
        assert_eq!(b.get(DATA, 8), [0xee; 8]);
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::SUCCESS);
        assert_eq!(b.get(DATA, 8), b"hello\xee\xee\xee");
        // Attributes are optional.
        assert_eq!(b.call(Service::GetVariable, [NAME, VENDOR_AT, 0, SIZE, DATA]), Status::SUCCESS);
        assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 0, 0]), Status::SUCCESS);
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::NOT_FOUND);
    }

    #[test]
    fn sizes_up_to_the_limit_work_and_no_more() {
        let mut b = Bench::new();
        ready(&b, "Big", u64::MAX);
        let big = vec![0x5a; DATA_MAX];
        b.put(DATA, &big);
        let max = DATA_MAX as u64;
        assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, max, DATA]), Status::SUCCESS);
        for too_big in [max + 1, 1 << 32, u64::MAX] {
            let args = [NAME, VENDOR_AT, 7, too_big, DATA];
            assert_eq!(b.call(Service::SetVariable, args), Status::INVALID_PARAMETER);
        }
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::SUCCESS);
        assert_eq!(b.u64_at(SIZE), max);
        // A name that ends with the limit, then one character more.
        b.put_name(NAME, &"n".repeat(NAME_MAX / 2 - 1));
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::NOT_FOUND);
        b.put_name(NAME, &"n".repeat(NAME_MAX / 2));
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::INVALID_PARAMETER);
    }

    #[test]
    fn pointers_the_specification_wants_may_not_be_null_nor_bad() {
        use Service as S;
        let good: [(S, [u64; 5], &[usize]); 8] = [
            (S::GetVariable, variable_args(), &[0, 1, 3]),
            (S::SetVariable, [NAME, VENDOR_AT, 7, 4, DATA], &[0, 1, 4]),
            (S::GetNextVariableName, [SIZE, NAME, VENDOR_AT, 0, 0], &[0, 1, 2]),
            (S::QueryVariableInfo, [7, DATA, DATA + 8, DATA + 16, 0], &[1, 2, 3]),
            (S::GetTime, [TIME, ATTR, 0, 0, 0], &[0]),
            (S::SetTime, [TIME, 0, 0, 0, 0], &[0]),
            (S::GetWakeupTime, [DATA, DATA + 1, TIME, 0, 0], &[0, 1, 2]),
            (S::SetWakeupTime, [1, TIME, 0, 0, 0], &[1]),
        ];
        for (service, args, needed) in good {
            for i in needed {
                for bad in [0, GUEST - 4, 0xdead_0000, u64::MAX, u64::MAX - 3] {
                    let mut b = Bench::new();
                    ready(&b, "", 64);
                    b.put(TIME, &NOON);
                    b.model.time = NOON;
                    b.model.store.insert((b"V\0".to_vec(), GLOBAL), (7, vec![1; 4]));
                    if service == S::GetVariable {
                        b.put_name(NAME, "V");
                    }
                    assert_eq!(b.call(service, args), Status::SUCCESS, "{}", service.name());
                    ready(&b, if service == S::GetVariable { "V" } else { "" }, 64);
                    let mut broken = args;
                    broken[*i] = bad;
                    let status = b.call(service, broken);
                    assert_eq!(status, Status::INVALID_PARAMETER, "{} {i} {bad:#x}", service.name());
                }
            }
        }
        let mut b = Bench::new();
        assert_eq!(b.call(S::GetNextHighMonotonicCount, [0; 5]), Status::INVALID_PARAMETER);
        assert_eq!(b.call(S::GetNextHighMonotonicCount, [DATA, 0, 0, 0, 0]), Status::SUCCESS);
        assert_eq!(b.get(DATA, 5), [0x11, 0x11, 0x11, 0x11, 0]);
        assert_eq!(b.call(S::SetWakeupTime, [0x100, 0, 0, 0, 0]), Status::SUCCESS);
    }

    #[test]
    fn a_name_is_not_read_past_the_page_that_holds_its_end() {
        let mut b = Bench::new();
        ready(&b, "", 64);
        // The last bytes of guest memory; the name starts at an odd address, too.
        let end = GUEST + GUEST_SIZE as u64;
        for at in [end - 4, end - 5] {
            b.put_name(at, "x");
            assert_eq!(b.call(Service::GetVariable, [at, VENDOR_AT, 0, SIZE, DATA]), Status::NOT_FOUND);
        }
        b.put(end - 4, &[b'x', 0, b'y', 0]);
        let status = b.call(Service::GetVariable, [end - 4, VENDOR_AT, 0, SIZE, DATA]);
        assert_eq!(status, Status::INVALID_PARAMETER);
    }

    #[test]
    fn names_are_listed_firmwares_first_then_cordons() {
        let mut b = Bench::new();
        for name in ["a", "b", "c"] {
            let wide: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
            b.model.store.insert((wide, GLOBAL), (7, vec![1]));
        }
        ready(&b, "", 1024);
        let mut seen = Vec::new();
        loop {
            b.put(SIZE, &1024u64.to_le_bytes());
            match b.call(Service::GetNextVariableName, [SIZE, NAME, VENDOR_AT, 0, 0]) {
                Status::SUCCESS => seen.push(b.name_at(NAME, b.u64_at(SIZE))),
                status => {
                    assert_eq!(status, Status::NOT_FOUND);
                    break;
                }
            }
        }
        assert_eq!(seen, ["a", "b", "c", "DrtmLog", "Status", "Exits"]);
    }

    #[test]
    fn cordons_variables_are_readable_and_read_only() {
        let mut b = Bench::new();
        ready(&b, "Status", 3);
        b.put(VENDOR_AT, &VENDOR.to_bytes());
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::BUFFER_TOO_SMALL);
        assert_eq!(b.u64_at(SIZE), 6);
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::SUCCESS);
        assert_eq!((b.get(DATA, 6), b.get(ATTR, 4)), (b"Status".to_vec(), vec![6, 0, 0, 0]));
        for size in [0, 4, u64::MAX] {
            let args = [NAME, VENDOR_AT, 7, size, DATA];
            assert_eq!(b.call(Service::SetVariable, args), Status::WRITE_PROTECTED);
        }
        b.put_name(NAME, "Statu");
        assert_eq!(b.call(Service::GetVariable, variable_args()), Status::NOT_FOUND);
        let next = [SIZE, NAME, VENDOR_AT, 0, 0];
        b.put(SIZE, &64u64.to_le_bytes());
        assert_eq!(b.call(Service::GetNextVariableName, next), Status::INVALID_PARAMETER);
        b.put_name(NAME, "Status");
        b.put(SIZE, &14u64.to_le_bytes());
        assert_eq!(b.call(Service::GetNextVariableName, next), Status::SUCCESS);
        assert_eq!(b.name_at(NAME, 12), "Exits");
        b.put_name(NAME, "");
        b.put(VENDOR_AT, &GLOBAL);
        assert_eq!(b.call(Service::GetNextVariableName, next), Status::BUFFER_TOO_SMALL);
        assert_eq!(b.u64_at(SIZE), 16);
    }

    #[test]
    fn without_firmware_cordons_variables_are_still_listed() {
        let mut b = Bench::new();
        ready(&b, "x", 64);
        let Begin::Run(pending) = b.begin(Service::GetNextVariableName, [SIZE, NAME, VENDOR_AT, 0, 0]) else {
            panic!()
        };
        let outcome = b.gate.end_without_firmware(pending, &b.guest, &mut b.buffer);
        assert_eq!(outcome.status, Status::SUCCESS);
        assert_eq!(b.name_at(NAME, 16), "DrtmLog");
        b.put(VENDOR_AT, &GLOBAL);
        let Begin::Run(pending) = b.begin(Service::GetVariable, variable_args()) else { panic!() };
        let outcome = b.gate.end_without_firmware(pending, &b.guest, &mut b.buffer);
        assert_eq!(outcome, Outcome::of(Status::DEVICE_ERROR));
    }

    #[test]
    fn denied_and_missing_services_are_unsupported() {
        let config = Config::parse(b"service.GetTime = deny").unwrap();
        let mut b = Bench::with(&config);
        b.put(TIME, &NOON);
        assert_eq!(b.call(Service::GetTime, [TIME, 0, 0, 0, 0]), Status::UNSUPPORTED);
        assert_eq!(b.call(Service::SetTime, [TIME, 0, 0, 0, 0]), Status::SUCCESS);
        for s in [Service::ConvertPointer, Service::UpdateCapsule, Service::QueryCapsuleCapabilities] {
            assert_eq!(b.call(s, [NAME, 1, DATA, DATA, 0]), Status::UNSUPPORTED);
        }
    }

    #[test]
    fn times_are_checked_in_both_directions() {
        let mut b = Bench::new();
        b.put(TIME, &NOON);
        assert_eq!(b.call(Service::SetTime, [TIME, 0, 0, 0, 0]), Status::SUCCESS);
        let mut clean = NOON;
        (clean[7], clean[14], clean[15]) = (0, 3, 0);
        assert_eq!(b.model.time, clean, "unused bits do not reach firmware");
        assert_eq!(b.call(Service::GetTime, [TIME, ATTR, 0, 0, 0]), Status::SUCCESS);
        assert_eq!(b.get(ATTR, 12), [1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(b.call(Service::GetWakeupTime, [DATA, DATA + 1, TIME, 0, 0]), Status::SUCCESS);
        assert_eq!(b.get(DATA, 2), [1, 0]);
        let mut month = NOON;
        month[2] = 13;
        b.put(TIME, &month);
        assert_eq!(b.call(Service::SetTime, [TIME, 0, 0, 0, 0]), Status::INVALID_PARAMETER);
        assert_eq!(b.call(Service::SetWakeupTime, [1, TIME, 0, 0, 0]), Status::INVALID_PARAMETER);
        assert_eq!(b.call(Service::SetWakeupTime, [0, TIME, 0, 0, 0]), Status::SUCCESS);
        let outcome = b.hostile(Service::GetTime, [TIME, 0, 0, 0, 0], 0, |buffer| {
            buffer.slots.time.as_mut_bytes().copy_from_slice(&month);
        });
        assert_eq!(outcome, Outcome { status: Status::DEVICE_ERROR, anomaly: Some(Anomaly::Time) });
    }

    #[test]
    fn what_firmware_says_is_checked() {
        let refused = |anomaly| Outcome { status: Status::DEVICE_ERROR, anomaly: Some(anomaly) };
        let mut b = Bench::new();
        ready(&b, "x", 16);
        let size = |said| move |buffer: &mut CallBuffer| buffer.slots.size = said;
        for said in [17, DATA_MAX as u64, u64::MAX] {
            let outcome = b.hostile(Service::GetVariable, variable_args(), 0, size(said));
            assert_eq!(outcome, refused(Anomaly::Size { said, buffer: 16 }));
        }
        for said in [0, 16, DATA_MAX as u64 + 1, u64::MAX] {
            let outcome = b.hostile(Service::GetVariable, variable_args(), ERR | 5, size(said));
            assert_eq!(outcome, refused(Anomaly::Size { said, buffer: 16 }));
        }
        assert_eq!(b.u64_at(SIZE), 16, "nothing reached the guest");
        for raw in [1, 5, 0x8000_0000_0000_0024, ERR, 0xffff_ffff_ffff_ffff, 0xc000_0000_0000_0005] {
            let outcome = b.hostile(
                Service::SetTime,
                {
                    b.put(TIME, &NOON);
                    [TIME, 0, 0, 0, 0]
                },
                raw,
                |_| {},
            );
            assert_eq!(outcome, refused(Anomaly::Status(raw)));
        }
        let next = [SIZE, NAME, VENDOR_AT, 0, 0];
        let outcome = b.hostile(Service::GetNextVariableName, next, 0, |buffer| buffer.name = [1; NAME_MAX]);
        assert_eq!(outcome, refused(Anomaly::Name));
        let outcome = b.hostile(Service::GetNextVariableName, next, 0, size(17));
        assert_eq!(outcome, refused(Anomaly::Size { said: 17, buffer: 16 }));
        for said in [16, NAME_MAX as u64 + 1] {
            let outcome = b.hostile(Service::GetNextVariableName, next, ERR | 5, size(said));
            assert_eq!(outcome, refused(Anomaly::Size { said, buffer: 16 }));
        }
        let outcome = b.hostile(Service::GetNextVariableName, next, 0, |buffer| {
            buffer.slots.guid = VENDOR.to_bytes();
        });
        assert_eq!(outcome, Outcome { status: Status::SUCCESS, anomaly: Some(Anomaly::OwnGuid) });
        assert_eq!(b.name_at(NAME, 16), "DrtmLog");
    }

    #[test]
    fn firmware_cannot_hand_out_what_an_earlier_call_left() {
        let mut b = Bench::new();
        ready(&b, "x", 16);
        b.put(DATA, b"secret of another");
        assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 17, DATA]), Status::SUCCESS);
        let outcome = b.hostile(Service::GetVariable, variable_args(), 0, |_| {});
        assert_eq!(outcome.status, Status::SUCCESS);
        assert_eq!(b.get(DATA, 16), [0; 16]);
    }

    #[test]
    fn older_firmware_may_leave_the_attributes_alone() {
        let mut b = Bench::new();
        ready(&b, "x", 4);
        b.put(ATTR, &[9, 8, 7, 6]);
        let outcome =
            b.hostile(Service::GetVariable, variable_args(), ERR | 5, |buffer| buffer.slots.size = 5);
        assert_eq!(outcome, Outcome::of(Status::BUFFER_TOO_SMALL));
        assert_eq!((b.get(ATTR, 4), b.u64_at(SIZE)), (vec![9, 8, 7, 6], 5));
    }

    #[test]
    fn resets_are_decoded() {
        let mut b = Bench::new();
        for (raw, kind) in [(0, ResetKind::Cold), (1, ResetKind::Warm), (2, ResetKind::Shutdown)] {
            assert_eq!(b.begin(Service::ResetSystem, [raw, 0, 0, 0, 0]), Begin::Reset(kind));
        }
        assert_eq!(b.begin(Service::ResetSystem, [3, 0, 4, DATA, 0]), Begin::Reset(ResetKind::Platform));
        let done = Begin::Done(Status::INVALID_PARAMETER);
        assert_eq!(b.begin(Service::ResetSystem, [4, 0, 0, 0, 0]), done);
    }

    #[test]
    fn the_virtual_address_map_is_taken_once_and_must_hold_our_regions() {
        let mut b = Bench::new();
        let map = |list: &[Descriptor]| list.as_bytes().to_vec();
        let tables = descriptor(6, 0x20_0000, 3, 1 << 63);
        let thunks = descriptor(5, 0x20_4000, 1, 1 << 63);
        let svam = Service::SetVirtualAddressMap;
        b.put(DATA, &map(&[tables]));
        assert_eq!(b.call(svam, [40, 40, 1, DATA, 0]), Status::NO_MAPPING);
        b.put(DATA, &map(&[descriptor(6, 0x20_0000, 2, 0), thunks]));
        assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::NO_MAPPING);
        b.put(DATA, &map(&[descriptor(6, 0x20_0000, u64::MAX, 0), thunks]));
        assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::INVALID_PARAMETER);
        b.put(DATA, &map(&[thunks, tables]));
        for bad in [
            [80, 40, 2, DATA, 0],
            [80, 0, 1, DATA, 0],
            [80, 39, 1, DATA, 0],
            [81, 40, 1, DATA, 0],
            [u64::MAX - u64::MAX % 40, 40, 1, DATA, 0],
            [80, 40, 1, 0, 0],
            [80, 40, 1, 0xdead_0000, 0],
        ] {
            assert_eq!(b.call(svam, bad), Status::INVALID_PARAMETER, "{bad:x?}");
        }
        assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::SUCCESS);
        assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::UNSUPPORTED);
    }

    fn any_pointer() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0),
            GUEST..GUEST + GUEST_SIZE as u64,
            GUEST + GUEST_SIZE as u64 - 64..GUEST + GUEST_SIZE as u64 + 8,
            any::<u64>(),
            0u64..0x2_0000,
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]
        #[test]
        fn no_guest_and_no_firmware_panics_the_gate_or_reaches_past_its_buffer(
            service in 0usize..14,
            args in proptest::array::uniform5(any_pointer()),
            fill in any::<u8>(),
            head in proptest::collection::vec(any::<u8>(), 96),
            rax in prop_oneof![Just(0u64), Just(ERR | 5), Just(ERR | 14), any::<u64>()],
        ) {
            let mut b = Bench::new();
            b.put(GUEST, &vec![fill; GUEST_SIZE / 2]);
            let before = b.get(GUEST, GUEST_SIZE - 0x200);
            match b.begin(Service::ALL[service], args) {
                Begin::Run(pending) => {
                    prop_assert_eq!(
                        &b.get(GUEST, GUEST_SIZE - 0x200), &before,
                        "nothing is written before firmware has run"
                    );
                    let call = pending.call(SEEN_AT);
                    let results = pending.results;
                    b.buffer.as_mut_bytes()[..96].copy_from_slice(&head);
                    b.buffer.data.fill(0xa5);
                    let outcome = b.gate.end(pending, rax, &b.guest, &mut b.buffer);
                    prop_assert_eq!(call.service, Service::ALL[service]);
                    // Data is written only inside the buffer that the guest named.
                    if let Results::Variable { data, size, .. } = results {
                        let after = b.get(GUEST, GUEST_SIZE - 0x200);
                        let written = before.iter().zip(&after).enumerate();
                        for (at, _) in written.filter(|(_, (x, y))| x != y && **y == 0xa5) {
                            let at = GUEST + at as u64;
                            let small = [args[2], args[3]].iter().any(|p| at.wrapping_sub(*p) < 8);
                            prop_assert!(small || at.wrapping_sub(data) < size as u64);
                        }
                    }
                    prop_assert!(outcome.status.is_success() || outcome.status.is_error());
                }
                Begin::Done(status) => prop_assert!(!status.is_warning()),
                Begin::Reset(_) => {}
            }
        }

        #[test]
        fn calls_through_the_gate_do_what_calls_of_the_firmware_do(
            steps in proptest::collection::vec(
                (any::<bool>(), "[ab]{1,2}", proptest::collection::vec(any::<u8>(), 0..40), 0u64..48), 1..24)
        ) {
            let mut b = Bench::new();
            let mut reference = BTreeMap::<String, Vec<u8>>::new();
            for (write, name, data, room) in steps {
                ready(&b, &name, room);
                if write {
                    b.put(DATA, &data);
                    let status = b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, data.len() as u64, DATA]);
                    let existed = if data.is_empty() {
                        reference.remove(&name).is_some()
                    } else {
                        reference.insert(name, data);
                        true
                    };
                    prop_assert_eq!(status == Status::SUCCESS, existed);
                } else {
                    let status = b.call(Service::GetVariable, variable_args());
                    match reference.get(&name) {
                        None => prop_assert_eq!(status, Status::NOT_FOUND),
                        Some(data) => {
                            prop_assert_eq!(b.u64_at(SIZE), data.len() as u64);
                            if data.len() as u64 <= room {
                                prop_assert_eq!(status, Status::SUCCESS);
                                prop_assert_eq!(&b.get(DATA, data.len()), data);
                            } else {
                                prop_assert_eq!(status, Status::BUFFER_TOO_SMALL);
                            }
                        }
                    }
                }
            }
        }
    }
}
