//! Cordon's configuration file. It is measured before it is read, so its content is the owner's word;
//! its form is checked all the same, and a mistake stops the launch with the line that holds it.
//!
//! One `key = value` per line; `#` starts a comment line; empty lines are skipped; every key at most once.

use core::fmt;
use core::ops::RangeInclusive;

use log::LevelFilter;

use crate::service::{COUNT, Service};

/// Largest file, in bytes.
pub const FILE_MAX: usize = 16 * 1024;
/// Longest line, in bytes, its line end not counted.
pub const LINE_MAX: usize = 256;
/// Accepted values of `sandbox.budget-ms`.
pub const BUDGET_MS: RangeInclusive<u32> = 100..=60_000;
/// `sandbox.budget-ms` when the file does not say: flash erase takes seconds, Linux's soft-lockup
/// watchdog bites after twenty.
pub const BUDGET_MS_DEFAULT: u32 = 10_000;

/// What becomes of calls of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The call runs in the sandbox.
    Sandbox,
    /// EFI_UNSUPPORTED, and the service's bit is clear in EFI_RT_PROPERTIES_TABLE.
    Deny,
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `log`: least severe level that is written.
    pub log: LevelFilter,
    /// `sandbox.budget-ms`: longest time a firmware call may take, in milliseconds.
    pub budget_ms: u32,
    policies: [Policy; COUNT],
}

impl Default for Config {
    fn default() -> Self {
        let policies = Service::ALL.map(|s| if s.supported() { Policy::Sandbox } else { Policy::Deny });
        Self { log: LevelFilter::Info, budget_ms: BUDGET_MS_DEFAULT, policies }
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
    /// A number outside [`BUDGET_MS`].
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
            Kind::NotSupportedYet { key, value, expected } => {
                write!(f, "{key} = {value}: not supported yet; this version takes {expected}")
            }
        }
    }
}

const LOG_KEY: &str = "log";
const BUDGET_KEY: &str = "sandbox.budget-ms";
const SERVICE_PREFIX: &str = "service.";

impl Config {
    /// Reads a whole file. An empty one gives the defaults.
    pub fn parse(file: &[u8]) -> Result<Self, ConfigError<'_>> {
        if file.len() > FILE_MAX {
            return Err(ConfigError { line: 0, kind: ConfigErrorKind::FileTooLarge(file.len()) });
        }
        let mut config = Self::default();
        let mut seen = Seen { log: false, budget: false, services: [false; COUNT] };
        for (index, line) in file.split(|b| *b == b'\n').enumerate() {
            config
                .line(line, &mut seen)
                .map_err(|kind| ConfigError { line: index.saturating_add(1), kind })?;
        }
        Ok(config)
    }

    /// What becomes of calls of `service`.
    pub fn policy(&self, service: Service) -> Policy {
        self.policies.get(service.index()).copied().unwrap_or(Policy::Deny)
    }

    /// The mask for EFI_RT_PROPERTIES_TABLE: a bit for each service that is not denied.
    pub fn rt_properties(&self) -> u32 {
        Service::ALL
            .into_iter()
            .filter(|s| self.policy(*s) != Policy::Deny)
            .fold(0, |mask, s| mask | s.rt_properties_bit())
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
        let once = |flag: &mut bool| {
            if core::mem::replace(flag, true) { Err(Kind::Twice(key)) } else { Ok(()) }
        };
        match key {
            LOG_KEY => {
                once(&mut seen.log)?;
                self.log = level(value).ok_or(Kind::BadValue {
                    key,
                    value,
                    expected: "error, warn, info, debug or trace",
                })?;
            }
            BUDGET_KEY => {
                once(&mut seen.budget)?;
                let expected = "a number of milliseconds";
                let digits = value.bytes().all(|b| b.is_ascii_digit());
                let number = if digits { Some(value.parse().unwrap_or(u32::MAX)) } else { None };
                self.budget_ms = number.ok_or(Kind::BadValue { key, value, expected })?;
                if !BUDGET_MS.contains(&self.budget_ms) {
                    let (min, max) = (*BUDGET_MS.start(), *BUDGET_MS.end());
                    return Err(Kind::OutOfRange { key, value, min, max });
                }
            }
            _ => {
                let name = key.strip_prefix(SERVICE_PREFIX);
                let service =
                    Service::ALL.into_iter().find(|s| Some(s.name()) == name).ok_or(Kind::UnknownKey(key))?;
                if let Some(flag) = seen.services.get_mut(service.index()) {
                    once(flag)?;
                }
                let policy = policy(service, key, value)?;
                if let Some(slot) = self.policies.get_mut(service.index()) {
                    *slot = policy;
                }
            }
        }
        Ok(())
    }
}

/// The keys that were set.
struct Seen {
    log: bool,
    budget: bool,
    services: [bool; COUNT],
}

fn level(value: &str) -> Option<LevelFilter> {
    Some(match value {
        "error" => LevelFilter::Error,
        "warn" => LevelFilter::Warn,
        "info" => LevelFilter::Info,
        "debug" => LevelFilter::Debug,
        "trace" => LevelFilter::Trace,
        _ => return None,
    })
}

fn policy<'a>(service: Service, key: &'a str, value: &'a str) -> Result<Policy, ConfigErrorKind<'a>> {
    let expected = if service.supported() { "sandbox or deny" } else { "deny" };
    match value {
        "deny" => Ok(Policy::Deny),
        "sandbox" if service.supported() => Ok(Policy::Sandbox),
        "sandbox" | "deferred" | "locked" | "native" | "relaunch" => {
            Err(ConfigErrorKind::NotSupportedYet { key, value, expected })
        }
        _ => Err(ConfigErrorKind::BadValue { key, value, expected }),
    }
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
        assert_eq!((c.log, c.budget_ms), (LevelFilter::Info, 10_000));
        assert_eq!(c.policy(Service::SetVariable), Policy::Sandbox);
        assert_eq!(c.policy(Service::UpdateCapsule), Policy::Deny);
        assert_eq!(c.rt_properties(), 0x3fff & !0x100 & !0x800 & !0x1000);
    }

    #[test]
    fn every_key_is_read() {
        let file = "log=debug\r\nsandbox.budget-ms = 500\nservice.SetTime = deny\n  # é in a comment\n\
                    service.GetTime =sandbox";
        let c = Config::parse(file.as_bytes()).unwrap();
        assert_eq!((c.log, c.budget_ms), (LevelFilter::Debug, 500));
        assert_eq!(c.policy(Service::SetTime), Policy::Deny);
        assert_eq!(c.policy(Service::GetTime), Policy::Sandbox);
        assert_eq!(c.rt_properties() & 3, 1);
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
                "service.SetVariable = deferred",
                "configuration line 1: service.SetVariable = deferred: not supported yet; \
                 this version takes sandbox or deny",
            ),
            (
                "service.UpdateCapsule = sandbox",
                "configuration line 1: service.UpdateCapsule = sandbox: not supported yet; \
                 this version takes deny",
            ),
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
        fn no_file_panics_and_messages_stay_printable(file: Vec<u8>) {
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
