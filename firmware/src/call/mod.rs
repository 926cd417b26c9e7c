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

mod arguments;
mod buffer;
mod deferring;
mod own;
mod results;

use arguments::{Decoded, copy_in, pointer, terminated};
use buffer::Slots;
pub use buffer::{CALL_BUFFER_SIZE, CallBuffer, DATA_MAX, NAME_MAX, Pieces};
use hv::addr::{PAGE_SIZE, PhysRange};
pub use own::{OwnVariable, OwnVariables, VENDOR};
use results::give;
pub use results::status;
pub use uefi_raw::{Guid, Status, guid};
use zerocopy::{FromZeros, IntoBytes};

use crate::config::Config;
use crate::exposure::Decision;
use crate::memmap::{DESCRIPTOR_VERSION, Descriptor, MAX_DESCRIPTOR_SIZE, MAX_GUEST_DESCRIPTORS};
use crate::policy::{Policies, Policy};
use crate::sandbox::Place;
use crate::service::{Service, Target};

/// A guest's memory by virtual address, translated by the page tables in force when it called.
pub trait GuestMem {
    /// Copies from guest memory; false when any byte of it cannot be read. `out` is unspecified then.
    fn read(&self, addr: u64, out: &mut [u8]) -> bool;
    /// Copies to guest memory; false when any byte of it cannot be written. Those before it may have been.
    fn write(&self, addr: u64, data: &[u8]) -> bool;
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

/// A firmware call ready to run: what the sandbox's CPU starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirmwareCall {
    /// What: its entry point is RIP.
    pub target: Target,
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
    /// It is answered.
    Done(Answer),
    /// The firmware is to run; then [`Gate::end`], if it returns.
    Run(Pending),
    /// A write that waits until the machine is reset: see [`crate::deferred`] and [`Pending::lookup`].
    Defer(Pending),
    /// The guest wants the machine reset; the MLE does that.
    Reset(ResetKind),
    /// Capsules are to be staged for the firmware: see [`crate::capsule`].
    Capsules,
    /// The call of the handler at this place of the PRMT is to be staged: see [`crate::prm`].
    Handler(u8),
    /// The guest wants services unlocked: once a PCR shows that, [`Gate::unlock`].
    Unlock(Services),
}

/// A call that needs no firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// For the guest's RAX.
    pub status: Status,
    /// Why firmware has nothing to do with it.
    pub decision: Decision,
}

impl Answer {
    /// What policy refuses. The specification has no status for it; Linux makes this one "permission denied".
    fn refused(decision: Decision) -> Self {
        Self { status: Status::SECURITY_VIOLATION, decision }
    }
}

/// A set of services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Services(u16);

impl Services {
    /// The service that `name` names, or with `all` each of them; `None` for other names.
    fn named(name: &[u8]) -> Option<Self> {
        let name = name.trim_ascii();
        let one = |service: &Service| service.name().as_bytes() == name || name == b"all";
        let set = Service::ALL.iter().filter(|s| one(s)).fold(0, |set, s| set | Self::bit(*s));
        (set != 0).then_some(Self(set))
    }

    fn bit(service: Service) -> u16 {
        1u16.checked_shl(service as u32).unwrap_or(0)
    }

    /// Whether `service` is in the set.
    pub fn contains(self, service: Service) -> bool {
        self.0 & Self::bit(service) != 0
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for service in Service::ALL.into_iter().filter(|s| self.contains(*s)) {
            write!(f, "{separator}{}", service.name())?;
            separator = " ";
        }
        Ok(())
    }
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
    policies: Policies,
    unlocked: Services,
    ours: [PhysRange; 2],
    virtual_mode: bool,
}

impl Gate {
    /// `thunks` and `tables` are our runtime regions in the guest's memory map.
    pub fn new(config: &Config, thunks: PhysRange, tables: PhysRange) -> Self {
        let (policies, unlocked) = (config.policies.clone(), Services::default());
        Self { policies, unlocked, ours: [thunks, tables], virtual_mode: false }
    }

    /// What becomes of a call. `variable` is its vendor and name, if it is about one.
    fn policy(&self, service: Service, variable: Option<(&[u8; 16], &[u8])>) -> Policy {
        let policy = match variable {
            Some((guid, name)) => self.policies.variable(service, guid, name),
            None => self.policies.service(service),
        };
        match policy {
            Policy::Locked if self.unlocked.contains(service) => Policy::Sandbox,
            policy => policy,
        }
    }

    /// Where firmware runs for the call of `service` whose arguments are in `buffer`.
    pub fn place(&self, service: Service, buffer: &CallBuffer) -> Place {
        match self.policy(service, buffer.variable(service)) {
            Policy::Native => Place::Native,
            Policy::Relaunch => Place::Gap,
            _ => Place::Sandbox,
        }
    }

    /// Opens services that are locked. A PCR shows it already.
    pub fn unlock(&mut self, services: Services) {
        self.unlocked.0 |= services.0;
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
        let whole = self.policies.service(service);
        if whole == Policy::Deny {
            return Begin::Done(Answer { status: Status::UNSUPPORTED, decision: Decision::DENIED });
        }
        buffer.clear_arguments();
        let decoded = match service {
            Service::GetTime => arguments::get_time(args),
            Service::SetTime => arguments::set_time(args, mem, buffer),
            Service::GetWakeupTime => arguments::get_wakeup_time(args),
            Service::SetWakeupTime => arguments::set_wakeup_time(args, mem, buffer),
            Service::GetVariable => arguments::get_variable(args, mem, own, buffer),
            Service::GetNextVariableName => arguments::next_name(args, mem, buffer),
            Service::SetVariable => arguments::set_variable(args, mem, buffer),
            Service::GetNextHighMonotonicCount => {
                pointer(args.rcx).map(|at| Decoded::Run(Results::Count(at)))
            }
            Service::QueryVariableInfo => arguments::query_variable_info(args),
            Service::ResetSystem => arguments::reset(args),
            Service::SetVirtualAddressMap => self.set_virtual_address_map(args, mem),
            Service::UpdateCapsule | Service::QueryCapsuleCapabilities => Ok(Decoded::Capsules),
            // Handlers are asked for by Gate::begin_handler.
            Service::ConvertPointer | Service::PrmHandler => Err(Status::UNSUPPORTED),
        };
        let own = |status| Begin::Done(Answer { status, decision: Decision::OWN });
        match decoded {
            Ok(Decoded::Run(results)) => match self.policy(service, buffer.variable(service)) {
                Policy::Sandbox | Policy::Native | Policy::Relaunch => {
                    Begin::Run(Pending { service, results })
                }
                Policy::Deferred => Begin::Defer(Pending { service, results }),
                Policy::Locked => Begin::Done(Answer::refused(Decision::LOCKED)),
                Policy::Deny => Begin::Done(Answer::refused(Decision::DENIED)),
            },
            Ok(Decoded::Reset(_) | Decoded::Capsules) if self.policy(service, None) == Policy::Locked => {
                Begin::Done(Answer::refused(Decision::LOCKED))
            }
            Ok(Decoded::Reset(kind)) => Begin::Reset(kind),
            Ok(Decoded::Capsules) => Begin::Capsules,
            Ok(Decoded::Unlock(services)) => Begin::Unlock(services),
            Ok(Decoded::Done(status)) | Err(status) => own(status),
        }
    }

    /// What becomes of a call of the handler `guid`, at place `n` of the PRMT. `buffer` says from then on whom the call is about.
    pub fn begin_handler(&self, n: u8, guid: Guid, buffer: &mut CallBuffer) -> Begin {
        const SERVICE: Service = Service::PrmHandler;
        buffer.clear_arguments();
        buffer.slots.guid = guid.to_bytes();
        match self.policy(SERVICE, buffer.variable(SERVICE)) {
            Policy::Sandbox | Policy::Native => Begin::Handler(n),
            Policy::Locked => Begin::Done(Answer::refused(Decision::LOCKED)),
            Policy::Deny | Policy::Deferred | Policy::Relaunch => {
                Begin::Done(Answer::refused(Decision::DENIED))
            }
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

impl Pending {
    /// The service that is to run.
    pub fn service(&self) -> Service {
        self.service
    }

    /// What of `buffer` firmware gets: the rest need not be copied to the sandbox.
    pub fn arguments(&self, buffer: &CallBuffer) -> Pieces {
        let name = match self.results {
            Results::Variable { .. } | Results::SetVariable { .. } => {
                terminated(&buffer.name).unwrap_or(NAME_MAX)
            }
            Results::NextName { size, .. } => size,
            _ => 0,
        };
        let data = match self.results {
            Results::Variable { size, .. } | Results::SetVariable { size, .. } => size,
            _ => 0,
        };
        Pieces::new(name, data)
    }

    /// What of the sandbox's call buffer has results: the rest need not be copied from there.
    pub fn results(&self) -> Pieces {
        match self.results {
            Results::NextName { size, .. } => Pieces::new(size, 0),
            Results::Variable { size, .. } => Pieces::new(0, size),
            _ => Pieces::new(0, 0),
        }
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
        FirmwareCall { target: Target::Service(self.service), rcx, rdx, r8, r9, fifth }
    }
}

#[cfg(test)]
mod tests;
