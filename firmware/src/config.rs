//! Cordon's configuration file. It is measured before it is read, so its content is the owner's word;
//! its form is checked all the same, and a mistake stops the launch with the line that holds it.
//!
//! One `key = value` per line; `#` starts a comment line; empty lines are skipped; every key at most once.

use core::fmt;
use core::ops::RangeInclusive;

use heapless::Vec;
use log::LevelFilter;
use uefi_raw::Guid;

use crate::policy::{PATTERN_MAX, Policies, Policy, RULES_MAX, Rule};
use crate::prm::{HANDLERS_MAX, Length, PARAMETERS_MAX};
use crate::service::{COUNT, Service};
use crate::smm::communicate::{Handlers, LISTED_MAX, SmmPolicy};

/// Largest file, in bytes.
pub const FILE_MAX: usize = 16 * 1024;
/// Longest line, in bytes, its line end not counted.
pub const LINE_MAX: usize = 256;
/// Accepted values of `sandbox.budget-ms`.
pub const BUDGET_MS: RangeInclusive<u32> = 100..=60_000;
/// `sandbox.budget-ms` when the file does not say: flash erase takes seconds, Linux's soft-lockup
/// watchdog bites after twenty.
pub const BUDGET_MS_DEFAULT: u32 = 10_000;
/// Accepted values of `sandbox.budget-exits`.
pub const BUDGET_EXITS: RangeInclusive<u32> = 1_000..=100_000_000;
/// `sandbox.budget-exits` when the file does not say: waiting for flash reads a timer port some ten thousand times.
pub const BUDGET_EXITS_DEFAULT: u32 = 1_000_000;
/// Most lists of ports.
pub const PORTS_MAX: usize = 16;
/// Most MSRs that firmware may read.
pub const MSRS_MAX: usize = 16;
/// Most PCI functions that the configuration may leave to firmware.
pub const PCI_MAX: usize = 8;
/// Accepted values of `unlock.pcr`: those that locality 2 may extend and a dynamic launch resets.
pub const UNLOCK_PCR: RangeInclusive<u32> = 18..=22;
/// `unlock.pcr` when the file does not say: the exposure log's.
pub const UNLOCK_PCR_DEFAULT: u32 = 22;
/// PCRs that may count the launches of policy `relaunch`: those that only a reset of the TPM resets, and that are an operating
/// system's to extend.
pub const RELAUNCH_PCR: RangeInclusive<u32> = 8..=15;
/// The one when the file names none.
pub const RELAUNCH_PCR_DEFAULT: u32 = 8;

/// Accepted values of `prm.parameters.<GUID>`.
pub const PARAMETERS: RangeInclusive<u32> = 1..=PARAMETERS_MAX as u32;

/// Accepted values of `capsule.room-mib`.
pub const CAPSULE_MIB: RangeInclusive<u32> = 1..=256;
/// `capsule.room-mib` when the file does not say: a PC's firmware image.
pub const CAPSULE_MIB_DEFAULT: u32 = 16;

/// Ports that firmware may use beside those that it always may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// First to last port.
    pub ports: RangeInclusive<u16>,
    /// Bytes of an access: 1, 2 or 4.
    pub width: u8,
}

/// What becomes of an access that the sandbox may not make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Reads give all ones, writes are dropped; firmware goes on.
    Ignore,
    /// The call ends in an error, and the sandbox is dead.
    Stop,
}

/// What becomes of a dead sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDeath {
    /// It stays dead: all later calls fail.
    Stay,
    /// The next call finds it as it was at launch, by the copy that was measured.
    Restart,
}

/// What holds for the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxConfig {
    /// `sandbox.budget-ms`: longest time a firmware call may take, in milliseconds.
    pub budget_ms: u32,
    /// `sandbox.budget-exits`: most exits that a firmware call may make.
    pub budget_exits: u32,
    /// `sandbox.on-death`.
    pub on_death: OnDeath,
    /// `sandbox.denied-ports`.
    pub denied_ports: Denied,
    /// `sandbox.denied-msrs`.
    pub denied_msrs: Denied,
    /// `sandbox.port.<first>[-<last>]`.
    pub ports: Vec<PortRange, PORTS_MAX>,
    /// `sandbox.msr.<number>`: registers that firmware may read.
    pub msrs: Vec<u32, MSRS_MAX>,
    /// `sandbox.pci.<bus>:<device>.<function>`: functions of segment 0 whose memory firmware may have, by their ids: bus in
    /// bits 15:8, device in 7:3, function in 2:0.
    pub pci: Vec<u16, PCI_MAX>,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            budget_ms: BUDGET_MS_DEFAULT,
            budget_exits: BUDGET_EXITS_DEFAULT,
            on_death: OnDeath::Stay,
            denied_ports: Denied::Ignore,
            denied_msrs: Denied::Stop,
            ports: Vec::new(),
            msrs: Vec::new(),
            pci: Vec::new(),
        }
    }
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `log`: least severe level that is written.
    pub log: LevelFilter,
    /// `service.…`: what becomes of firmware calls.
    pub policies: Policies,
    /// `sandbox.…`.
    pub sandbox: SandboxConfig,
    /// `dma.reserved`: whether devices keep the memory that firmware reserves for them in IVRS or DMAR.
    pub dma_reserved: bool,
    /// `smm.handlers`: which software SMIs of the sandbox are raised.
    pub smm: SmmPolicy,
    /// `smm.guest`: whether the guest may raise software SMIs itself.
    pub guest_smi: bool,
    /// `unlock.pcr`: the PCR that shows what was unlocked.
    pub unlock_pcr: u32,
    /// `relaunch.pcr`: the PCR that counts the launches of policy `relaunch`. None of those that a DRTM event resets.
    pub relaunch_pcr: u32,
    /// `capsule.room-mib`: MiB of RAM kept from the guest to stage capsules in, while a service takes any.
    pub capsule_mib: u32,
    /// `prm.parameters.<GUID>`: how many bytes of parameters handlers take from drivers.
    pub handlers: Vec<Length, HANDLERS_MAX>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            log: LevelFilter::Info,
            policies: Policies::default(),
            sandbox: SandboxConfig::default(),
            dma_reserved: false,
            smm: SmmPolicy::default(),
            guest_smi: false,
            unlock_pcr: UNLOCK_PCR_DEFAULT,
            relaunch_pcr: RELAUNCH_PCR_DEFAULT,
            capsule_mib: CAPSULE_MIB_DEFAULT,
            handlers: Vec::new(),
        }
    }
}

/// Why a file was refused: the line, counted from 1, and what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigError<'a> {
    /// Line number from 1; 0 when it is about the whole file.
    pub line: usize,
    /// What is wrong.
    pub kind: ConfigErrorKind<'a>,
}

/// See [`ConfigError`]. Keys and values are printable ASCII.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigErrorKind<'a> {
    /// The file is larger than [`FILE_MAX`]; its size.
    FileTooLarge(usize),
    /// The line is longer than [`LINE_MAX`]; its length.
    LineTooLong(usize),
    /// Outside a comment there is something other than printable ASCII; the byte.
    NotPrintable(u8),
    /// No `=`, or nothing on one side of it.
    NotKeyValue(&'a str),
    /// No such key.
    UnknownKey(&'a str),
    /// The key was set before.
    Twice(&'a str),
    /// The value is none of those that the key takes.
    BadValue {
        /// The key.
        key: &'a str,
        /// Its value.
        value: &'a str,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A number that is too small or too large.
    OutOfRange {
        /// The key.
        key: &'a str,
        /// Its value.
        value: &'a str,
        /// Least value accepted.
        min: u32,
        /// Largest value accepted.
        max: u32,
    },
    /// No range of ports.
    BadPorts {
        /// The key.
        key: &'a str,
    },
    /// No PCI function.
    BadFunction {
        /// The key.
        key: &'a str,
    },
    /// No handler's GUID.
    BadHandler {
        /// The key.
        key: &'a str,
    },
    /// No vendor and pattern of variables.
    BadPattern {
        /// The key.
        key: &'a str,
    },
    /// One more of something than there is room for.
    TooMany {
        /// The key.
        key: &'a str,
        /// How many there may be.
        limit: usize,
    },
    /// Something the design has and this version does not.
    NotSupportedYet {
        /// The key.
        key: &'a str,
        /// Its value.
        value: &'a str,
        /// What would be accepted.
        expected: &'static str,
    },
}

impl fmt::Display for ConfigError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use ConfigErrorKind as Kind;
        f.write_str("configuration")?;
        if self.line != 0 {
            write!(f, " line {}", self.line)?;
        }
        f.write_str(": ")?;
        match self.kind {
            Kind::FileTooLarge(size) => write!(f, "{size} bytes, limit {FILE_MAX}"),
            Kind::LineTooLong(length) => write!(f, "{length} bytes long, limit {LINE_MAX}"),
            Kind::NotPrintable(byte) => write!(f, "byte {byte:#04x} is not printable ASCII"),
            Kind::NotKeyValue(text) => write!(f, "\"{text}\" is not \"key = value\""),
            Kind::UnknownKey(key) => write!(f, "unknown key \"{key}\""),
            Kind::Twice(key) => write!(f, "key \"{key}\" was set before"),
            Kind::BadValue { key, value, expected } => {
                write!(f, "{key} = \"{value}\": expected {expected}")
            }
            Kind::OutOfRange { key, value, min, max } => {
                write!(f, "{key} = {value}: limit {min} to {max}")
            }
            Kind::BadPorts { key } => write!(f, "\"{key}\": expected a port 0x0 to 0xffff, or first-last"),
            Kind::BadFunction { key } => {
                write!(f, "\"{key}\": expected bus:device.function, in hexadecimal, as 00:1f.5")
            }
            Kind::BadHandler { key } => write!(f, "\"{key}\": expected a handler's GUID"),
            Kind::BadPattern { key } => {
                write!(
                    f,
                    "\"{key}\": expected <GUID or *>:<name>, the name 1 to {PATTERN_MAX} characters long"
                )
            }
            Kind::TooMany { key, limit } => write!(f, "\"{key}\" is one too many, limit {limit}"),
            Kind::NotSupportedYet { key, value, expected } => {
                write!(f, "{key} = {value}: not supported yet; this version takes {expected}")
            }
        }
    }
}

impl Config {
    /// Bytes of RAM to stage capsules in; none when no service takes them.
    pub fn capsule_room(&self) -> Option<u64> {
        let taken = Service::ALL.into_iter().filter(|s| s.takes_capsules());
        let any = taken.map(|s| self.policies.service(s)).any(|policy| policy != Policy::Deny);
        any.then(|| u64::from(self.capsule_mib) << 20)
    }

    /// Reads a whole file. An empty one gives the defaults.
    pub fn parse(file: &[u8]) -> Result<Self, ConfigError<'_>> {
        if file.len() > FILE_MAX {
            return Err(ConfigError { line: 0, kind: ConfigErrorKind::FileTooLarge(file.len()) });
        }
        let mut config = Self::default();
        let mut seen = Seen::default();
        for (index, line) in file.split(|b| *b == b'\n').enumerate() {
            config
                .line(line, &mut seen)
                .map_err(|kind| ConfigError { line: index.saturating_add(1), kind })?;
        }
        Ok(config)
    }

    fn line<'a>(&mut self, line: &'a [u8], seen: &mut Seen) -> Result<(), ConfigErrorKind<'a>> {
        use ConfigErrorKind as Kind;
        if line.len() > LINE_MAX {
            return Err(Kind::LineTooLong(line.len()));
        }
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            return Ok(());
        }
        if let Some(bad) = line.iter().find(|b| !matches!(b, b' '..=b'~' | b'\t')) {
            return Err(Kind::NotPrintable(*bad));
        }
        let text = str::from_utf8(line).map_err(|_| Kind::NotPrintable(0))?;
        let (key, value) = text.split_once('=').ok_or(Kind::NotKeyValue(text))?;
        let (key, value) = (key.trim(), value.trim());
        if key.is_empty() || value.is_empty() {
            return Err(Kind::NotKeyValue(text));
        }
        let line = Line { key, value };
        if let Some(at) = KEYS.iter().position(|k| *k == key)
            && seen.keys.get_mut(at).is_some_and(|seen| core::mem::replace(seen, true))
        {
            return Err(Kind::Twice(key));
        }
        let sandbox = &mut self.sandbox;
        match key {
            "log" => self.log = line.one_of(&LEVELS, "error, warn, info, debug or trace")?,
            "sandbox.budget-ms" => sandbox.budget_ms = line.number("a number of milliseconds", BUDGET_MS)?,
            "sandbox.budget-exits" => {
                sandbox.budget_exits = line.number("a number of exits", BUDGET_EXITS)?
            }
            "sandbox.on-death" => {
                let words = [("stay", OnDeath::Stay), ("restart", OnDeath::Restart)];
                sandbox.on_death = line.one_of(&words, "stay or restart")?;
            }
            "sandbox.denied-ports" => sandbox.denied_ports = line.one_of(&DENIED, "ignore or stop")?,
            "sandbox.denied-msrs" => sandbox.denied_msrs = line.one_of(&DENIED, "ignore or stop")?,
            "smm.handlers" => self.smm = line.smm_policy()?,
            "smm.guest" => self.guest_smi = line.one_of(&ALLOWED, "deny or allow")?,
            "dma.reserved" => self.dma_reserved = line.one_of(&ALLOWED, "deny or allow")?,
            "capsule.room-mib" => self.capsule_mib = line.number("a number of MiB", CAPSULE_MIB)?,
            "unlock.pcr" => self.unlock_pcr = line.number("a PCR", UNLOCK_PCR)?,
            "relaunch.pcr" => self.relaunch_pcr = line.number("a PCR", RELAUNCH_PCR)?,
            _ => {
                if let Some(name) = key.strip_prefix("service.") {
                    return self.service(line, name, seen);
                }
                if let Some(range) = key.strip_prefix("sandbox.port.") {
                    let ports = port_range(range).ok_or(Kind::BadPorts { key })?;
                    let widths = [("byte", 1), ("word", 2), ("dword", 4)];
                    let width = line.one_of(&widths, "byte, word or dword")?;
                    let room = Kind::TooMany { key, limit: PORTS_MAX };
                    return sandbox.ports.push(PortRange { ports, width }).map_err(|_| room);
                }
                if let Some(number) = key.strip_prefix("sandbox.msr.") {
                    let number = hexadecimal(number).ok_or(Kind::UnknownKey(key))?;
                    line.one_of(&[("read", ())], "read")?;
                    return sandbox.msrs.push(number).map_err(|_| Kind::TooMany { key, limit: MSRS_MAX });
                }
                if let Some(function) = key.strip_prefix("sandbox.pci.") {
                    let function = pci_function(function).ok_or(Kind::BadFunction { key })?;
                    line.one_of(&[("allow", ())], "allow")?;
                    return sandbox.pci.push(function).map_err(|_| Kind::TooMany { key, limit: PCI_MAX });
                }
                if let Some(guid) = key.strip_prefix("prm.parameters.") {
                    let handler = Guid::try_parse(guid).map_err(|_| Kind::BadHandler { key })?;
                    let bytes = line.number("a number of bytes", PARAMETERS)? as u16;
                    if self.handlers.iter().any(|length| length.handler == handler) {
                        return Err(Kind::Twice(key));
                    }
                    let room = Kind::TooMany { key, limit: HANDLERS_MAX };
                    return self.handlers.push(Length { handler, bytes }).map_err(|_| room);
                }
                return Err(Kind::UnknownKey(key));
            }
        }
        Ok(())
    }

    /// `service.<Name>`, or `service.<Name>.<vendor>:<pattern>` for variables; `service.PrmHandler.<GUID>` for handlers.
    fn service<'a>(
        &mut self,
        line: Line<'a>,
        name: &'a str,
        seen: &mut Seen,
    ) -> Result<(), ConfigErrorKind<'a>> {
        use ConfigErrorKind as Kind;
        let key = line.key;
        let (name, variables) = name.split_once('.').map_or((name, None), |(name, rest)| (name, Some(rest)));
        let service = Service::ALL.into_iter().find(|s| s.name() == name).ok_or(Kind::UnknownKey(key))?;
        let policy = line.policy(service)?;
        let Some(variables) = variables else {
            if seen.services.get_mut(service.index()).is_some_and(|seen| core::mem::replace(seen, true)) {
                return Err(Kind::Twice(key));
            }
            self.policies.set(service, policy);
            return Ok(());
        };
        let (guid, pattern) = match service {
            Service::PrmHandler => {
                (Some(Guid::try_parse(variables).map_err(|_| Kind::BadHandler { key })?), "*")
            }
            service if service.has_guid() => {
                let (vendor, pattern) = variables.split_once(':').ok_or(Kind::BadPattern { key })?;
                let guid = match vendor {
                    "*" => None,
                    text => Some(Guid::try_parse(text).map_err(|_| Kind::BadPattern { key })?),
                };
                (guid, pattern)
            }
            _ => return Err(Kind::UnknownKey(key)),
        };
        let pattern = pattern.try_into().ok().filter(|_| !pattern.is_empty());
        let pattern = pattern.ok_or(Kind::BadPattern { key })?;
        if self.policies.add(Rule { service, guid, pattern, policy }) {
            Ok(())
        } else {
            Err(Kind::TooMany { key, limit: RULES_MAX })
        }
    }
}

/// Keys that may be set once.
const KEYS: [&str; 12] = [
    "log",
    "sandbox.budget-ms",
    "sandbox.budget-exits",
    "sandbox.on-death",
    "sandbox.denied-ports",
    "sandbox.denied-msrs",
    "dma.reserved",
    "smm.handlers",
    "smm.guest",
    "capsule.room-mib",
    "unlock.pcr",
    "relaunch.pcr",
];
const LEVELS: [(&str, LevelFilter); 5] = [
    ("error", LevelFilter::Error),
    ("warn", LevelFilter::Warn),
    ("info", LevelFilter::Info),
    ("debug", LevelFilter::Debug),
    ("trace", LevelFilter::Trace),
];
const ALLOWED: [(&str, bool); 2] = [("deny", false), ("allow", true)];
const DENIED: [(&str, Denied); 2] = [("ignore", Denied::Ignore), ("stop", Denied::Stop)];

/// What was set.
#[derive(Default)]
struct Seen {
    keys: [bool; KEYS.len()],
    services: [bool; COUNT],
}

/// A line that has both of its sides.
#[derive(Clone, Copy)]
struct Line<'a> {
    key: &'a str,
    value: &'a str,
}

impl<'a> Line<'a> {
    fn bad(self, expected: &'static str) -> ConfigErrorKind<'a> {
        ConfigErrorKind::BadValue { key: self.key, value: self.value, expected }
    }

    fn one_of<T: Copy>(self, words: &[(&str, T)], expected: &'static str) -> Result<T, ConfigErrorKind<'a>> {
        words.iter().find(|(word, _)| *word == self.value).map(|(_, t)| *t).ok_or(self.bad(expected))
    }

    fn number(self, expected: &'static str, limits: RangeInclusive<u32>) -> Result<u32, ConfigErrorKind<'a>> {
        let Self { key, value } = self;
        if !value.bytes().all(|b| b.is_ascii_digit()) {
            return Err(self.bad(expected));
        }
        let (min, max) = (*limits.start(), *limits.end());
        let number = value.parse().ok().filter(|n| limits.contains(n));
        number.ok_or(ConfigErrorKind::OutOfRange { key, value, min, max })
    }

    fn policy(self, service: Service) -> Result<Policy, ConfigErrorKind<'a>> {
        let Self { key, value } = self;
        // SetVirtualAddressMap is answered by the MLE, and no guest gets far without it; so is ResetSystem. Only writes
        // can wait.
        let expected = match service {
            Service::SetVariable => "sandbox, locked, deferred, native, relaunch or deny",
            Service::SetVirtualAddressMap => "sandbox or deny",
            Service::ResetSystem => "sandbox, locked or deny",
            _ if service.is_staged() => "sandbox, locked, native or deny",
            _ if service.supported() => "sandbox, locked, native, relaunch or deny",
            _ => "deny",
        };
        match value {
            "deny" => Ok(Policy::Deny),
            "sandbox" if service.supported() => Ok(Policy::Sandbox),
            "locked" if service.supported() && service != Service::SetVirtualAddressMap => Ok(Policy::Locked),
            "deferred" if service == Service::SetVariable => Ok(Policy::Deferred),
            "native" if service.runs_firmware() => Ok(Policy::Native),
            "relaunch" if service.runs_firmware() && !service.is_staged() => Ok(Policy::Relaunch),
            "sandbox" | "locked" | "deferred" | "native" | "relaunch" => {
                Err(ConfigErrorKind::NotSupportedYet { key, value, expected })
            }
            _ => Err(self.bad(expected)),
        }
    }

    /// `variables`, `any`, `none`, or GUIDs with commas between them.
    fn smm_policy(self) -> Result<SmmPolicy, ConfigErrorKind<'a>> {
        let default = SmmPolicy::default();
        let handlers = match self.value {
            "variables" => return Ok(default),
            "any" => return Ok(SmmPolicy { handlers: Handlers::Any, command: None }),
            "none" => Handlers::Only(Vec::new()),
            list => {
                let mut handlers = Vec::new();
                for guid in list.split(',') {
                    let expected = "variables, any, none, or GUIDs with commas between them";
                    let guid = Guid::try_parse(guid.trim()).map_err(|_| self.bad(expected))?;
                    let room = ConfigErrorKind::TooMany { key: self.key, limit: LISTED_MAX };
                    handlers.push(guid).map_err(|_| room)?;
                }
                Handlers::Only(handlers)
            }
        };
        Ok(SmmPolicy { handlers, ..default })
    }
}

/// `0x…`.
fn hexadecimal(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0x").filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u32::from_str_radix(digits, 16).ok()
}

/// `0x…` or `0x…-0x…`.
fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text| hexadecimal(text).and_then(|n| u16::try_from(n).ok());
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some(first..=last)
}

/// `bus:device.function`, as 00:1f.5.
fn pci_function(text: &str) -> Option<u16> {
    let part = |text: &str, limit: u16| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        digits.then(|| u16::from_str_radix(text, 16).ok()).flatten().filter(|n| *n < limit)
    };
    let (bus, rest) = text.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    Some(part(bus, 0x100)? << 8 | part(device, 0x20)? << 3 | part(function, 8)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(file: &str) -> String {
        Config::parse(file.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        for file in ["", "\n\n", "# nothing\r\n", " \t # nothing"] {
            assert_eq!(Config::parse(file.as_bytes()), Ok(Config::default()), "{file:?}");
        }
        let c = Config::default();
        assert_eq!((c.log, c.sandbox.budget_ms), (LevelFilter::Info, 10_000));
        assert_eq!(c.policies.service(Service::SetVariable), Policy::Sandbox);
        assert_eq!(c.policies.service(Service::ConvertPointer), Policy::Deny);
        assert_eq!(c.policies.rt_properties(), 0x3fff & !0x100);
        assert_eq!((c.guest_smi, c.unlock_pcr, c.capsule_room()), (false, 22, Some(16 << 20)));
        let none = b"service.UpdateCapsule = deny\nservice.QueryCapsuleCapabilities = deny";
        assert_eq!(Config::parse(none).unwrap().capsule_room(), None);
    }

    #[test]
    fn native_is_for_services_that_firmware_carries_out() {
        for service in Service::ALL {
            let file = format!("service.{} = native", service.name());
            let taken = Config::parse(file.as_bytes()).map(|c| c.policies.any(Policy::Native));
            assert_eq!(taken.is_ok(), service.runs_firmware(), "{file}");
            assert!(taken.unwrap_or(true));
        }
        assert!(!Config::default().policies.any(Policy::Native));
    }

    #[test]
    fn relaunch_is_for_services_whose_arguments_the_gate_copies() {
        for service in Service::ALL {
            let file = format!("service.{} = relaunch", service.name());
            let taken = Config::parse(file.as_bytes()).map(|c| c.policies.any(Policy::Relaunch));
            assert_eq!(taken.is_ok(), service.runs_firmware() && !service.is_staged(), "{file}");
            assert!(taken.unwrap_or(true));
        }
        assert_eq!(Config::parse(b"relaunch.pcr = 15").unwrap().relaunch_pcr, 15);
        assert_eq!(Config::default().relaunch_pcr, 8);
    }

    #[test]
    fn every_key_is_read() {
        let file = "log=debug\r\nsandbox.budget-ms = 500\nservice.SetTime = deny\n  # é in a comment\n\
                    service.GetTime =sandbox\nservice.SetVariable = locked\n\
                    service.SetVariable.8be4df61-93ca-11d2-aa0d-00e098032b8c:BootOrder = sandbox\n\
                    service.GetVariable.*:Secret? = deny\n\
                    sandbox.budget-exits = 5000\nsandbox.on-death = restart\nsandbox.denied-ports = stop\n\
                    sandbox.denied-msrs = ignore\nsandbox.port.0xcf9 = byte\nsandbox.port.0x400-0x47f = dword\n\
                    sandbox.msr.0x1b = read\nsandbox.pci.00:1f.5 = allow\nsmm.handlers = none\nsmm.guest = allow\nunlock.pcr = 20\n\
                    dma.reserved = allow\nprm.parameters.ed32d533-99e6-4209-9cc0-2d72cdd998a7 = 24";
        let c = Config::parse(file.as_bytes()).unwrap();
        assert_eq!((c.log, c.sandbox.budget_ms), (LevelFilter::Debug, 500));
        let p = &c.policies;
        assert_eq!(p.service(Service::SetTime), Policy::Deny);
        assert_eq!(p.service(Service::GetTime), Policy::Sandbox);
        assert_eq!(p.service(Service::SetVariable), Policy::Locked);
        assert_eq!(p.rt_properties() & 3, 1);
        let rules: std::vec::Vec<_> = p.rules().iter().map(|r| (r.pattern.as_str(), r.policy)).collect();
        assert_eq!(rules, [("BootOrder", Policy::Sandbox), ("Secret?", Policy::Deny)]);
        let s = &c.sandbox;
        assert_eq!((s.budget_exits, s.on_death), (5000, OnDeath::Restart));
        assert_eq!((s.denied_ports, s.denied_msrs), (Denied::Stop, Denied::Ignore));
        let ports =
            [PortRange { ports: 0xcf9..=0xcf9, width: 1 }, PortRange { ports: 0x400..=0x47f, width: 4 }];
        assert_eq!((s.ports.as_slice(), s.msrs.as_slice()), (ports.as_slice(), [0x1b].as_slice()));
        assert_eq!(s.pci.as_slice(), [0x00fd]);
        assert_eq!(c.smm.handlers, Handlers::Only(Vec::new()));
        assert_eq!((c.guest_smi, c.dma_reserved, c.unlock_pcr), (true, true, 20));
        assert_eq!(c.handlers.iter().map(|handler| handler.bytes).collect::<Vec<_, 1>>(), [24]);
        let list =
            b"smm.handlers = ed32d533-99e6-4209-9cc0-2d72cdd998a7, 68e8c853-2ba9-4dd7-9ac0-91e16155c935";
        let Handlers::Only(list) = Config::parse(list).unwrap().smm.handlers else { panic!("any") };
        assert_eq!(list.len(), 2);
    }

    #[test]
    fn errors_name_line_key_value_and_limit() {
        for (file, expected) in [
            (
                "\nlog = loud",
                "configuration line 2: log = \"loud\": expected error, warn, info, debug or trace",
            ),
            ("sandbox.budget-ms = 99", "configuration line 1: sandbox.budget-ms = 99: limit 100 to 60000"),
            (
                "sandbox.budget-ms = 99999999999999",
                "configuration line 1: sandbox.budget-ms = 99999999999999: limit 100 to 60000",
            ),
            (
                "sandbox.budget-ms = -1",
                "configuration line 1: sandbox.budget-ms = \"-1\": expected a number of milliseconds",
            ),
            (
                "service.SetTime = deferred",
                "configuration line 1: service.SetTime = deferred: not supported yet; \
                 this version takes sandbox, locked, native, relaunch or deny",
            ),
            (
                "service.ConvertPointer = sandbox",
                "configuration line 1: service.ConvertPointer = sandbox: not supported yet; \
                 this version takes deny",
            ),
            (
                "service.SetVariable.Boot = deny",
                "configuration line 1: \"service.SetVariable.Boot\": expected <GUID or *>:<name>, the name 1 to 64 \
                 characters long",
            ),
            ("service.GetTime.*:A = deny", "configuration line 1: unknown key \"service.GetTime.*:A\""),
            (
                "sandbox.port.0x10000 = byte",
                "configuration line 1: \"sandbox.port.0x10000\": expected a port 0x0 to 0xffff, or first-last",
            ),
            ("relaunch.pcr = 16", "configuration line 1: relaunch.pcr = 16: limit 8 to 15"),
            ("unlock.pcr = 17", "configuration line 1: unlock.pcr = 17: limit 18 to 22"),
            (
                "sandbox.pci.0:20.0 = allow",
                "configuration line 1: \"sandbox.pci.0:20.0\": expected bus:device.function, in hexadecimal, as 00:1f.5",
            ),
            ("sandbox.msr.0x1b = write", "configuration line 1: sandbox.msr.0x1b = \"write\": expected read"),
            ("service.Nothing = deny", "configuration line 1: unknown key \"service.Nothing\""),
            ("log", "configuration line 1: \"log\" is not \"key = value\""),
            ("log =", "configuration line 1: \"log =\" is not \"key = value\""),
            ("log = info\nlog = info", "configuration line 2: key \"log\" was set before"),
            ("log = \u{1b}[2J", "configuration line 1: byte 0x1b is not printable ASCII"),
        ] {
            assert_eq!(message(file), expected);
        }
        assert_eq!(message(&"x".repeat(257)), "configuration line 1: 257 bytes long, limit 256");
        assert_eq!(message(&"\n".repeat(16385)), "configuration: 16385 bytes, limit 16384");
    }

    proptest! {
        #[test]
        fn no_file_panics_and_messages_stay_printable(file: std::vec::Vec<u8>) {
            if let Err(e) = Config::parse(&file) {
                prop_assert!(e.to_string().bytes().all(|b| matches!(b, b' '..=b'~' | b'\t')));
            }
        }

        #[test]
        fn lines_of_the_right_words_never_panic(
            lines in proptest::collection::vec(
                "(log|service\\.(GetTime|SetTime)|sandbox\\.budget-ms) ?= ?(deny|info|[0-9]{1,12}|native)", 0..6)
        ) {
            let file = lines.join("\n");
            let _ = Config::parse(file.as_bytes());
        }
    }
}
