//! Records, as values and as bytes.

use core::fmt::{self, Write};

pub use uefi_raw::Guid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Ref, Unaligned};

use super::read::FormatError;
use super::ring::BATCH_DELAY_US;
use crate::call::Status;
use crate::service::Service;

/// Most bytes of a record.
pub const RECORD_MAX: usize = 255;
/// Most bytes kept of a variable's name.
pub const NAME_MAX: usize = 64;
/// Most bytes of [`Record::text`].
pub const TEXT_MAX: usize = 45;
/// [`Record::service`] of what no service asked for.
pub const SERVICE_NONE: u8 = 0xff;

/// What happened. Values that have no name are a later version's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind(pub u8);

macro_rules! named_values {
    ($of:ident: $($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl $of {
            $($(#[$doc])* pub const $name: Self = Self($value);)*
            /// All that have a name.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The name, for people; `None` for a value of a later version.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

// The values are in measured logs: append, never renumber.
named_values! { Kind:
    /// The guest called a runtime service.
    CALL = 1, "call";
    /// An SMI was raised for firmware, or seen.
    SMI = 2, "SMI";
    /// The guest wrote the SMI command port.
    GUEST_SMI = 3, "guest SMI";
    /// Somebody other than firmware in a call was denied a port.
    DENIED_PORT = 4, "denied port";
    /// The same for a model-specific register.
    DENIED_MSR = 5, "denied MSR";
    /// The same for memory.
    DENIED_MEMORY = 6, "denied memory";
    /// Memory that is measured has changed.
    REGION_CHANGED = 7, "region changed";
    /// The sandbox was given up.
    SANDBOX_DIED = 8, "sandbox died";
    /// The sandbox was set up again.
    SANDBOX_RESTARTED = 9, "sandbox restarted";
    /// The guest unlocked a service.
    UNLOCKED = 10, "unlocked";
    /// Something was refused by policy, or an interrupt that the guest would have a device send.
    REFUSED = 11, "refused";
    /// The machine is about to be reset or turned off.
    RESET = 12, "reset";
    /// A device's access was stopped by the IOMMU.
    IOMMU_FAULT = 13, "IOMMU fault";
    /// The MLE runs; the first record.
    LAUNCH = 14, "launch";
    /// Something stays open on this machine, or was open while it was launched.
    LEFT_OPEN = 15, "left open";
    /// The MLE was launched again, and with it PCR 22 begins anew: the first record of the first batch after that. See
    /// [`Record::relaunched`].
    RELAUNCHED = 16, "relaunched";
    /// Something that stayed open is closed from now on.
    CLOSED = 17, "closed";
}

/// What was decided about it. Values that have no name are a later version's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decision(pub u8);

named_values! { Decision:
    /// There was nothing to decide.
    NONE = 0, "-";
    /// Firmware ran in the sandbox.
    SANDBOX = 1, "sandbox";
    /// Denied.
    DENIED = 2, "denied";
    /// Denied because the service is locked.
    LOCKED = 3, "locked";
    /// The MLE answered itself.
    OWN = 4, "own";
    /// Queued until the machine is reset.
    DEFERRED = 5, "deferred";
    /// Firmware ran between two launches.
    RELAUNCH = 6, "relaunch";
    /// Firmware ran natively.
    NATIVE = 7, "native";
    /// Let through as it was.
    PASSED = 8, "passed";
}

/// The first bytes, at most `N`, of a text.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Bytes<const N: usize> {
    length: u8,
    // Zero beyond `length`, so that equality is plain.
    bytes: [u8; N],
}

impl<const N: usize> Bytes<N> {
    const EMPTY: Self = Self { length: 0, bytes: [0; N] };

    fn push(&mut self, bytes: &[u8]) {
        self.extend(bytes.iter().copied());
    }

    fn extend(&mut self, bytes: impl Iterator<Item = u8>) {
        let free = self.bytes.get_mut(self.length.into()..).unwrap_or_default();
        let mut taken = 0u8;
        for (to, from) in free.iter_mut().zip(bytes) {
            *to = from;
            // No `N` in use is above 255.
            taken = taken.wrapping_add(1);
        }
        self.length = self.length.saturating_add(taken);
    }

    fn cut(bytes: &[u8]) -> Self {
        let mut kept = Self::EMPTY;
        kept.push(bytes);
        kept
    }

    fn get(&self) -> &[u8] {
        self.bytes.get(..self.length.into()).unwrap_or_default()
    }
}

impl<const N: usize> fmt::Debug for Bytes<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.get().escape_ascii())
    }
}

/// A short remark of the MLE, cut to [`TEXT_MAX`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text(Bytes<TEXT_MAX>);

impl Text {
    /// What `remark` displays.
    pub fn new(remark: impl fmt::Display) -> Self {
        let mut text = Self(Bytes::EMPTY);
        // Writing never fails.
        let _ = write!(text, "{remark}");
        text
    }

    /// Adds as much of `other` as there is room for, after a semicolon.
    pub fn append(&mut self, other: &Self) {
        self.0.push(b"; ");
        self.0.push(other.as_bytes());
    }

    /// Its bytes: ASCII, unless the log is not Cordon's.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.get()
    }
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.0.push(s.as_bytes());
        Ok(())
    }
}

/// A variable's name: its first bytes in UTF-8, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    full: u16,
    kept: Bytes<NAME_MAX>,
}

impl Name {
    /// The name in `utf16`, little-endian, up to its terminating zero or to the end. Surrogates without their pair become
    /// U+FFFD.
    pub fn new(utf16: &[u8]) -> Self {
        let mut name = Self { full: 0, kept: Bytes::EMPTY };
        let units = utf16.as_chunks().0;
        // Nearly all of nearly all names; the general way takes twenty times as long.
        let ascii = units.iter().take_while(|unit| matches!(unit, [1..=0x7f, 0])).count();
        let (ascii, rest) = units.split_at(ascii);
        name.full = u16::try_from(ascii.len()).unwrap_or(u16::MAX);
        name.kept.extend(ascii.iter().map(|[low, _]| *low));
        let units = rest.iter().map(|c| u16::from_le_bytes(*c)).take_while(|unit| *unit != 0);
        for character in char::decode_utf16(units) {
            let mut utf8 = [0; 4];
            let utf8 = character.unwrap_or(char::REPLACEMENT_CHARACTER).encode_utf8(&mut utf8);
            name.full = name.full.saturating_add(utf8.len() as u16);
            name.kept.push(utf8.as_bytes());
        }
        name
    }

    /// Bytes of the whole name in UTF-8.
    pub fn full_length(&self) -> u16 {
        self.full
    }

    /// Its first [`NAME_MAX`] bytes; the last character may be cut.
    pub fn as_bytes(&self) -> &[u8] {
        self.kept.get()
    }

    fn parse(full: u16, bytes: &[u8]) -> Self {
        Self { full, kept: Bytes::cut(bytes) }
    }
}

/// Which variable a call was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Vendor GUID.
    pub guid: Guid,
    /// Name.
    pub name: Name,
}

/// What firmware was denied during a call. Counts saturate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Denied {
    /// Port accesses.
    pub ports: u16,
    /// Accesses to model-specific registers.
    pub msrs: u16,
    /// Memory accesses.
    pub memory: u16,
    /// The last port.
    pub last_port: u16,
    /// The last model-specific register.
    pub last_msr: u32,
    /// The last memory address.
    pub last_address: u64,
}

/// Memory that changed, and what it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the new content.
    pub sha256: [u8; 32],
}

/// One access that did not happen: whose, where, of what sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The device (segment << 16 | bus << 8 | device << 3 | function), or the CPU's APIC ID.
    pub source: u32,
    /// Address, port or number of the register.
    pub address: u64,
    /// [`Access::READ`], [`Access::WRITE`], [`Access::EXECUTE`].
    pub how: u8,
}

impl Access {
    /// [`Access::how`]: a read.
    pub const READ: u8 = 1;
    /// [`Access::how`]: a write.
    pub const WRITE: u8 = 2;
    /// [`Access::how`]: an instruction fetch.
    pub const EXECUTE: u8 = 4;
}

/// One thing that happened. Times are in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What.
    pub kind: Kind,
    /// [`Service::index`] of the service that was called, or [`SERVICE_NONE`].
    pub service: u8,
    /// Command byte of the SMI, or 0.
    pub smi_command: u8,
    /// What was decided about it.
    pub decision: Decision,
    /// APIC ID of the CPU.
    pub cpu: u32,
    /// When it began, since the MLE's start.
    pub time_us: u64,
    /// EFI status that the guest got, or 0.
    pub status: u64,
    /// How long it took.
    pub duration_us: u32,
    /// Exits of the sandbox.
    pub exits: u32,
    /// SMIs raised.
    pub smis: u32,
    /// The variable concerned.
    pub variable: Option<Variable>,
    /// What firmware was denied.
    pub denied: Option<Denied>,
    /// Memory that changed.
    pub region: Option<Region>,
    /// An access that did not happen.
    pub access: Option<Access>,
    /// A remark.
    pub text: Option<Text>,
}

/// When a record must be in the PCR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Before the guest sees what it led to.
    AtOnce,
    /// By this time, in microseconds since the MLE's start.
    Batch {
        /// The time.
        deadline_us: u64,
    },
}

/// [`Record::service`] has no service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoService(pub u8);

impl TryFrom<u8> for Service {
    type Error = NoService;

    fn try_from(index: u8) -> Result<Self, NoService> {
        Self::ALL.get(usize::from(index)).copied().ok_or(NoService(index))
    }
}

impl Record {
    /// A record with nothing but what every record has.
    pub const fn new(kind: Kind, cpu: u32, time_us: u64) -> Self {
        Self {
            kind,
            service: SERVICE_NONE,
            smi_command: 0,
            decision: Decision::NONE,
            cpu,
            time_us,
            status: 0,
            duration_us: 0,
            exits: 0,
            smis: 0,
            variable: None,
            denied: None,
            region: None,
            access: None,
            text: None,
        }
    }

    /// A call of `service`.
    pub const fn call(service: Service, decision: Decision, cpu: u32, time_us: u64) -> Self {
        Self { service: service as u8, decision, ..Self::new(Kind::CALL, cpu, time_us) }
    }

    /// The MLE was launched again for the `round`th time. PCR 22 of the SHA-256 bank was `before` when the chain of the launch
    /// before ended.
    pub const fn relaunched(round: u64, before: [u8; 32], cpu: u32, time_us: u64) -> Self {
        let region = Some(Region { base: 0, size: round, sha256: before });
        Self { region, ..Self::new(Kind::RELAUNCHED, cpu, time_us) }
    }

    /// Round and value of a [`Record::relaunched`].
    pub fn relaunch(&self) -> Option<(u64, [u8; 32])> {
        self.region.filter(|_| self.kind == Kind::RELAUNCHED).map(|region| (region.size, region.sha256))
    }

    /// Only a plain read may wait: a call that reads, with an answer that reads commonly have, in which firmware was
    /// denied nothing; and an SMI that such a call raised and that was let through.
    pub fn urgency(&self) -> Urgency {
        let read = matches!(
            Service::try_from(self.service),
            Ok(Service::GetVariable
                | Service::GetNextVariableName
                | Service::QueryVariableInfo
                | Service::GetTime
                | Service::GetWakeupTime
                | Service::QueryCapsuleCapabilities)
        );
        let answers = [Status::SUCCESS, Status::BUFFER_TOO_SMALL, Status::NOT_FOUND];
        let plain = match self.kind {
            Kind::CALL => {
                matches!(self.decision, Decision::SANDBOX | Decision::OWN)
                    && answers.iter().any(|status| status.0 as u64 == self.status)
            }
            Kind::SMI => self.decision == Decision::PASSED,
            _ => false,
        };
        let nothing_else = self.denied.is_none() && self.region.is_none() && self.access.is_none();
        if read && plain && nothing_else {
            let ended = self.time_us.saturating_add(self.duration_us.into());
            Urgency::Batch { deadline_us: ended.saturating_add(BATCH_DELAY_US) }
        } else {
            Urgency::AtOnce
        }
    }

    /// Writes the record, with its sequence number, to the start of `out`; its length, or `None` where there is no room for it.
    pub(super) fn encode(&self, sequence: u64, out: &mut [u8]) -> Option<usize> {
        let (head, mut rest) = out.split_at_mut_checked(size_of::<Fixed>())?;
        let mut size = size_of::<Fixed>();
        let mut fixed = Fixed {
            size: 0,
            kind: self.kind.0,
            service: self.service,
            smi_command: self.smi_command,
            decision: self.decision.0,
            tails: 0,
            cpu: self.cpu.into(),
            sequence: sequence.into(),
            time_us: self.time_us.into(),
            status: self.status.into(),
            duration_us: self.duration_us.into(),
            exits: self.exits.into(),
            smis: self.smis.into(),
        };
        let mut put = |bytes: &[u8]| -> Option<()> {
            let (to, after) = core::mem::take(&mut rest).split_at_mut_checked(bytes.len())?;
            to.copy_from_slice(bytes);
            rest = after;
            size = size.saturating_add(bytes.len());
            Some(())
        };
        if let Some(Variable { guid, name }) = &self.variable {
            fixed.tails |= TAIL_VARIABLE;
            put(VariableTail { guid: guid.to_bytes(), name_length: name.full.into() }.as_bytes())?;
            put(name.as_bytes())?;
        }
        if let Some(d) = &self.denied {
            fixed.tails |= TAIL_DENIED;
            let tail = DeniedTail {
                ports: d.ports.into(),
                msrs: d.msrs.into(),
                memory: d.memory.into(),
                last_port: d.last_port.into(),
                last_msr: d.last_msr.into(),
                last_address: d.last_address.into(),
            };
            put(tail.as_bytes())?;
        }
        if let Some(r) = &self.region {
            fixed.tails |= TAIL_REGION;
            put(RegionTail { base: r.base.into(), size: r.size.into(), sha256: r.sha256 }.as_bytes())?;
        }
        if let Some(a) = &self.access {
            fixed.tails |= TAIL_ACCESS;
            put(AccessTail { source: a.source.into(), address: a.address.into(), how: a.how }.as_bytes())?;
        }
        if let Some(text) = &self.text {
            fixed.tails |= TAIL_TEXT;
            put(&[text.0.length])?;
            put(text.as_bytes())?;
        }
        // RECORD_MAX is the size of a record with every tail at its longest: see the assertion below.
        fixed.size = size as u8;
        head.copy_from_slice(fixed.as_bytes());
        Some(size)
    }

    /// The record at the start of `bytes`, its sequence number, and the bytes after it.
    pub(super) fn parse(bytes: &[u8]) -> Result<(u64, Self, &[u8]), FormatError> {
        let size = usize::from(*bytes.first().ok_or(truncated("record.size", 1, 0))?);
        let (whole, rest) =
            bytes.split_at_checked(size).ok_or(truncated("record.size", size, bytes.len()))?;
        let mut left = Fields(whole);
        let fixed: &Fixed = left.take("record")?;
        let mut record = Self {
            service: fixed.service,
            smi_command: fixed.smi_command,
            decision: Decision(fixed.decision),
            status: fixed.status.get(),
            duration_us: fixed.duration_us.get(),
            exits: fixed.exits.get(),
            smis: fixed.smis.get(),
            ..Self::new(Kind(fixed.kind), fixed.cpu.get(), fixed.time_us.get())
        };
        if fixed.tails & !TAILS != 0 {
            return Err(FormatError::Field {
                field: "record.tails",
                value: fixed.tails.into(),
                limit: TAILS.into(),
            });
        }
        let has = |tail| fixed.tails & tail != 0;
        if record.kind == Kind::RELAUNCHED && !has(TAIL_REGION) {
            let (value, limit) = (fixed.tails.into(), TAIL_REGION.into());
            return Err(FormatError::Field { field: "record.tails of a relaunch", value, limit });
        }
        if has(TAIL_VARIABLE) {
            let tail: &VariableTail = left.take("record.variable")?;
            let full = tail.name_length.get();
            let name = left.bytes("record.variable.name", usize::from(full).min(NAME_MAX))?;
            let variable = Variable { guid: Guid::from_bytes(tail.guid), name: Name::parse(full, name) };
            record.variable = Some(variable);
        }
        if has(TAIL_DENIED) {
            let tail: &DeniedTail = left.take("record.denied")?;
            record.denied = Some(Denied {
                ports: tail.ports.get(),
                msrs: tail.msrs.get(),
                memory: tail.memory.get(),
                last_port: tail.last_port.get(),
                last_msr: tail.last_msr.get(),
                last_address: tail.last_address.get(),
            });
        }
        if has(TAIL_REGION) {
            let tail: &RegionTail = left.take("record.region")?;
            let (base, size) = (tail.base.get(), tail.size.get());
            record.region = Some(Region { base, size, sha256: tail.sha256 });
        }
        if has(TAIL_ACCESS) {
            let tail: &AccessTail = left.take("record.access")?;
            let (source, address) = (tail.source.get(), tail.address.get());
            record.access = Some(Access { source, address, how: tail.how });
        }
        if has(TAIL_TEXT) {
            let [length] = *left.take::<[u8; 1]>("record.text")?;
            if usize::from(length) > TEXT_MAX {
                let (value, limit) = (length.into(), TEXT_MAX as u64);
                return Err(FormatError::Field { field: "record.text.length", value, limit });
            }
            record.text = Some(Text(Bytes::cut(left.bytes("record.text", length.into())?)));
        }
        if !left.0.is_empty() {
            let limit = size.saturating_sub(left.0.len()) as u64;
            return Err(FormatError::Field { field: "record.size", value: size as u64, limit });
        }
        Ok((fixed.sequence.get(), record, rest))
    }
}

/// Reads one record's fields.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &mut self,
        field: &'static str,
    ) -> Result<&'a T, FormatError> {
        let short = truncated(field, size_of::<T>(), self.0.len());
        let (value, rest) = Ref::<_, T>::from_prefix(self.0).map_err(|_| short)?;
        self.0 = rest;
        Ok(Ref::into_ref(value))
    }

    fn bytes(&mut self, field: &'static str, count: usize) -> Result<&'a [u8], FormatError> {
        let short = truncated(field, count, self.0.len());
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(short)?;
        self.0 = rest;
        Ok(bytes)
    }
}

fn truncated(field: &'static str, need: usize, have: usize) -> FormatError {
    FormatError::Truncated { field, need, have }
}

const TAIL_VARIABLE: u8 = 1;
const TAIL_DENIED: u8 = 2;
const TAIL_REGION: u8 = 4;
const TAIL_ACCESS: u8 = 8;
const TAIL_TEXT: u8 = 16;
const TAILS: u8 = TAIL_VARIABLE | TAIL_DENIED | TAIL_REGION | TAIL_ACCESS | TAIL_TEXT;

/// What every record has. The tails of which the bits are set follow in the bits' order.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    size: u8,
    kind: u8,
    service: u8,
    smi_command: u8,
    decision: u8,
    tails: u8,
    cpu: U32,
    sequence: U64,
    time_us: U64,
    status: U64,
    duration_us: U32,
    exits: U32,
    smis: U32,
}
const _: () = assert!(size_of::<Fixed>() == 46);

/// The name follows, at most [`NAME_MAX`] bytes of it.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct VariableTail {
    guid: [u8; 16],
    name_length: U16,
}
// What is logged most fits in 128 bytes.
const _: () = assert!(size_of::<Fixed>() + size_of::<VariableTail>() + NAME_MAX <= 128);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DeniedTail {
    ports: U16,
    msrs: U16,
    memory: U16,
    last_port: U16,
    last_msr: U32,
    last_address: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RegionTail {
    base: U64,
    size: U64,
    sha256: [u8; 32],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AccessTail {
    source: U32,
    address: U64,
    how: u8,
}

/// Bytes of the longest record of an SMI.
pub(super) const SMI_RECORD_MAX: usize =
    size_of::<Fixed>() + size_of::<VariableTail>() + NAME_MAX + 1 + TEXT_MAX;

const _: () = assert!(
    SMI_RECORD_MAX + size_of::<DeniedTail>() + size_of::<RegionTail>() + size_of::<AccessTail>()
        == RECORD_MAX
);
