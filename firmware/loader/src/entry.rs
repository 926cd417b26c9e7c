//! Boot entries: Boot Loader Specification type 1, with Cordon's own keys.
//!
//! Spec: \[BLS\] "Type #1 Boot Loader Entry Keys". `docs/boot-entry.md` describes our keys.

use alloc::borrow::ToOwned;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// Longest entry file read, bytes.
pub const ENTRY_MAX: u64 = 64 << 10;

/// Keys that begin so are ours: an unknown one is a mistake, not somebody else's extension.
const OUR_PREFIX: &str = "cordon-";

/// A value and where it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// The key it was given for.
    pub key: &'static str,
    /// Line in the entry file, from 1.
    pub line: u32,
    /// The value, without the white space around it.
    pub text: String,
}

impl Value {
    /// The value as a path on the entry's own volume, as EFI writes paths: from the root, with backslashes.
    pub fn efi_path(&self) -> String {
        let mut path = String::from("\\");
        path.extend(
            self.text.trim_start_matches(['/', '\\']).chars().map(|c| if c == '/' { '\\' } else { c }),
        );
        path
    }
}

/// A value with the entry file it stands in: `FILE:LINE: KEY VALUE`, how messages about it begin.
pub struct Place<'a> {
    /// Path of the entry file.
    pub file: &'a str,
    /// The value.
    pub value: &'a Value,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} {}", self.file, self.value.line, self.value.key, self.value.text)
    }
}

/// How a launch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Technology {
    /// By SKINIT.
    Skinit,
    /// By GETSEC\[SENTER\].
    Senter,
}

/// One entry that boots through Cordon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `title`: a name for people.
    pub title: Option<Value>,
    /// `linux`: the kernel.
    pub linux: Value,
    /// `initrd`, in the order given.
    pub initrd: Vec<Value>,
    /// `options`, in the order given.
    pub options: Vec<Value>,
    /// `cordon-launch`: how, where the CPU's vendor is not to decide.
    pub technology: Option<Technology>,
    /// `cordon-slb`: the secure loader block. Not given only where `technology` is SENTER.
    pub slb: Option<Value>,
    /// `cordon-sinit`, in the order given.
    pub sinit: Vec<Value>,
    /// `cordon-mle`: the hypervisor.
    pub mle: Value,
    /// `cordon-config`: Cordon's configuration.
    pub config: Option<Value>,
    /// `cordon-skinit insist`: issue SKINIT although CPUID does not offer it.
    pub insist_skinit: bool,
    /// `cordon-txt insist`: execute GETSEC\[SENTER\] without asking the CPU whether it can.
    pub insist_txt: bool,
    /// `cordon-regions optional`: go on with IOMMUs that have no protected memory regions.
    pub optional_regions: bool,
    /// `cordon-relaunch allow`: keep memory for policy `relaunch`.
    pub relaunch: bool,
    /// `cordon-locality0 allow`: go on without TPM locality 2.
    pub allow_locality0: bool,
}

/// Why an entry can't be used. Displays as `FILE:LINE: reason`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryError {
    /// Path of the entry file.
    pub file: String,
    /// Line, from 1; `None` when something is missing.
    pub line: Option<u32>,
    /// What is wrong.
    pub reason: Reason,
}

/// See [`EntryError`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The line is not UTF-8.
    NotUtf8,
    /// A key stands alone.
    NoValue(&'static str),
    /// A key that may be given once is given again.
    Twice {
        /// The key.
        key: &'static str,
        /// Line of the first one.
        first: u32,
    },
    /// A key that must be there is not.
    Missing(&'static str),
    /// A key that begins like ours but is none of ours.
    UnknownKey(String),
    /// Not a word that the key knows.
    Word {
        /// The key.
        key: &'static str,
        /// The word given.
        value: String,
        /// What it knows.
        known: &'static str,
    },
    /// A character that can't be part of the value.
    Character {
        /// The key.
        key: &'static str,
        /// The character's code.
        code: u32,
    },
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file)?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        match &self.reason {
            Reason::NotUtf8 => write!(f, " not UTF-8 text"),
            Reason::NoValue(key) => write!(f, " key {key} has no value"),
            Reason::Twice { key, first } => write!(f, " key {key} was given before, on line {first}"),
            Reason::Missing(key) => write!(f, " key {key} is missing"),
            Reason::UnknownKey(key) => write!(f, " unknown key {key}"),
            Reason::Word { key, value, known } => {
                write!(f, " key {key} has value {value:?}, which is not one it knows, as {known:?} is")
            }
            Reason::Character { key, code } => write!(f, " key {key} has character {code:#x} in its value"),
        }
    }
}

impl core::error::Error for EntryError {}

/// A key and its value as they stand in the file. Without a value, the second is empty.
fn split_line(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    Some(line.split_once(char::is_whitespace).map_or((line, ""), |(key, value)| (key, value.trim_start())))
}

/// Whether some line's key begins with [`OUR_PREFIX`]; works on bytes, since another's entry need not be text.
fn is_ours(bytes: &[u8]) -> bool {
    bytes.split(|&b| b == b'\n').any(|line| line.trim_ascii_start().starts_with(OUR_PREFIX.as_bytes()))
}

/// What the lines seen so far gave.
#[derive(Default)]
struct Draft {
    title: Option<Value>,
    architecture: Option<Value>,
    linux: Option<Value>,
    slb: Option<Value>,
    mle: Option<Value>,
    config: Option<Value>,
    technology: Option<Value>,
    skinit: Option<Value>,
    txt: Option<Value>,
    regions: Option<Value>,
    locality0: Option<Value>,
    relaunch: Option<Value>,
    sinit: Vec<Value>,
    initrd: Vec<Value>,
    options: Vec<Value>,
}

impl Draft {
    /// Takes one line; keys of others are passed over, as the specification asks.
    fn take(&mut self, line: u32, key: &str, text: &str) -> Result<(), Reason> {
        let value = |key| Value { key, line, text: text.to_owned() };
        let (slot, value) = match key {
            "title" => (&mut self.title, value("title")),
            "architecture" => (&mut self.architecture, value("architecture")),
            "linux" => (&mut self.linux, path(value("linux"))?),
            "cordon-slb" => (&mut self.slb, path(value("cordon-slb"))?),
            "cordon-mle" => (&mut self.mle, path(value("cordon-mle"))?),
            "cordon-config" => (&mut self.config, path(value("cordon-config"))?),
            "cordon-launch" => (&mut self.technology, one_of(value("cordon-launch"), &["skinit", "senter"])?),
            "cordon-skinit" => (&mut self.skinit, one_of(value("cordon-skinit"), &["insist"])?),
            "cordon-txt" => (&mut self.txt, one_of(value("cordon-txt"), &["insist"])?),
            "cordon-regions" => (&mut self.regions, one_of(value("cordon-regions"), &["optional"])?),
            "cordon-sinit" => {
                self.sinit.push(path(value("cordon-sinit"))?);
                return Ok(());
            }
            "cordon-relaunch" => (&mut self.relaunch, one_of(value("cordon-relaunch"), &["allow"])?),
            "cordon-locality0" => (&mut self.locality0, one_of(value("cordon-locality0"), &["allow"])?),
            "initrd" => {
                self.initrd.push(path(value("initrd"))?);
                return Ok(());
            }
            "options" => {
                self.options.push(printable(value("options"))?);
                return Ok(());
            }
            other if other.starts_with(OUR_PREFIX) => return Err(Reason::UnknownKey(other.to_owned())),
            _ => return Ok(()),
        };
        if let Some(first) = slot {
            return Err(Reason::Twice { key: value.key, first: first.line });
        }
        *slot = Some(value);
        Ok(())
    }
}

/// The value, when it can be handed on as text: no control characters (a zero would end a command line early).
fn printable(value: Value) -> Result<Value, Reason> {
    if value.text.is_empty() {
        return Err(Reason::NoValue(value.key));
    }
    match value.text.chars().find(|c| c.is_control() && *c != '\t') {
        Some(c) => Err(Reason::Character { key: value.key, code: c.into() }),
        None => Ok(value),
    }
}

/// The value, when it can be a path: EFI file names are UCS-2.
fn path(value: Value) -> Result<Value, Reason> {
    let value = printable(value)?;
    match value.text.chars().find(|&c| u32::from(c) > 0xffff || c == '\t') {
        Some(c) => Err(Reason::Character { key: value.key, code: c.into() }),
        None => Ok(value),
    }
}

/// The value, when it is one of `known`, of which there is at least one.
fn one_of(value: Value, known: &[&'static str]) -> Result<Value, Reason> {
    if value.text.is_empty() {
        return Err(Reason::NoValue(value.key));
    }
    if known.contains(&value.text.as_str()) {
        return Ok(value);
    }
    Err(Reason::Word { key: value.key, value: value.text, known: known.first().unwrap_or(&"") })
}

impl Entry {
    /// Reads an entry file; `file` is its path, for messages. `None` when it is not for Cordon: it has none of our keys,
    /// or it is for another architecture.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Option<Self>, EntryError> {
        if !is_ours(bytes) {
            return Ok(None);
        }
        let fail = |line, reason| EntryError { file: file.to_string(), line, reason };
        let mut draft = Draft::default();
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        for (line, number) in bytes.split(|&b| b == b'\n').zip(1..) {
            let text = core::str::from_utf8(line).map_err(|_| fail(Some(number), Reason::NotUtf8))?;
            if let Some((key, value)) = split_line(text) {
                draft.take(number, key, value).map_err(|reason| fail(Some(number), reason))?;
            }
        }
        if draft.architecture.is_some_and(|a| !a.text.eq_ignore_ascii_case("x64")) {
            return Ok(None);
        }
        let need = |value: Option<Value>, key| value.ok_or_else(|| fail(None, Reason::Missing(key)));
        let technology = draft.technology.map(|value| match value.text.as_str() {
            "senter" => Technology::Senter,
            _ => Technology::Skinit,
        });
        let linux = need(draft.linux, "linux")?;
        if technology != Some(Technology::Senter) && draft.slb.is_none() {
            return Err(fail(None, Reason::Missing("cordon-slb")));
        }
        Ok(Some(Self {
            title: draft.title,
            linux,
            technology,
            slb: draft.slb,
            sinit: draft.sinit,
            mle: need(draft.mle, "cordon-mle")?,
            config: draft.config,
            initrd: draft.initrd,
            options: draft.options,
            insist_skinit: draft.skinit.is_some(),
            insist_txt: draft.txt.is_some(),
            optional_regions: draft.regions.is_some(),
            allow_locality0: draft.locality0.is_some(),
            relaunch: draft.relaunch.is_some(),
        }))
    }

    /// The kernel command line: all options, joined by a space.
    pub fn command_line(&self) -> String {
        let options: Vec<&str> = self.options.iter().map(|o| o.text.as_str()).collect();
        options.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FULL: &str = "# Debian through Cordon\n\
        title   Debian GNU/Linux\n\
        version 6.1.0\n\
        architecture x64\n\
        linux /debian/vmlinuz\n\
        initrd /ucode.img\r\n\
        initrd\t/debian/initrd.img\n\
        options root=/dev/sda1  quiet\n\
        options console=ttyS0\n\
        devicetree /ignored\n\
        \n\
        cordon-slb cordon/slb.bin\n\
        cordon-mle /cordon/mle.bin\n\
        cordon-config /cordon/cordon.conf\n\
        cordon-skinit insist\n\
        cordon-locality0 allow";

    fn parse(text: &str) -> Result<Option<Entry>, EntryError> {
        Entry::parse("\\loader\\entries\\a.conf", text.as_bytes())
    }

    #[test]
    fn every_key_is_read() {
        let e = parse(FULL).unwrap().unwrap();
        assert_eq!(e.title.as_ref().unwrap().text, "Debian GNU/Linux");
        assert_eq!((e.linux.line, e.linux.text.as_str()), (5, "/debian/vmlinuz"));
        assert_eq!(e.linux.efi_path(), "\\debian\\vmlinuz");
        assert_eq!(e.slb.as_ref().unwrap().efi_path(), "\\cordon\\slb.bin");
        let initrds: Vec<_> = e.initrd.iter().map(|v| (v.line, v.text.as_str())).collect();
        assert_eq!(initrds, [(6, "/ucode.img"), (7, "/debian/initrd.img")]);
        assert_eq!(e.command_line(), "root=/dev/sda1  quiet console=ttyS0");
        assert_eq!(e.config.unwrap().line, 14);
        assert!(e.insist_skinit && e.allow_locality0);
    }

    #[test]
    fn the_small_entry_has_nothing_switched_on() {
        let e = parse("linux v\ncordon-slb s\ncordon-mle m\n").unwrap().unwrap();
        assert!(!e.insist_skinit && !e.allow_locality0 && e.config.is_none() && e.initrd.is_empty());
        assert_eq!(e.command_line(), "");
    }

    #[test]
    fn senter_takes_modules_and_no_slb() {
        let e = parse(
            "linux v\ncordon-mle m\ncordon-launch senter\ncordon-sinit a\ncordon-sinit b\ncordon-txt insist\ncordon-regions optional\ncordon-relaunch allow\n",
        );
        let e = e.unwrap().unwrap();
        assert_eq!((e.technology, e.slb), (Some(Technology::Senter), None));
        assert_eq!(e.sinit.iter().map(|v| v.text.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(e.insist_txt && e.optional_regions && e.relaunch);
        let error = parse("linux v\ncordon-mle m\ncordon-launch skinit\n").unwrap_err().to_string();
        assert_eq!(error, "\\loader\\entries\\a.conf: key cordon-slb is missing");
    }

    #[test]
    fn entries_of_others_are_not_ours_to_judge() {
        assert_eq!(parse("title x\nlinux /a\nlinux /b\n"), Ok(None));
        assert_eq!(Entry::parse("f", b"title \xff\n"), Ok(None));
        assert_eq!(parse("architecture aa64\nlinux v\ncordon-slb s\n"), Ok(None));
    }

    #[test]
    fn errors_name_file_line_and_reason() {
        let base = "linux v\ncordon-slb s\ncordon-mle m\n";
        for (more, message) in [
            ("cordon-sbl x", ":4: unknown key cordon-sbl"),
            ("linux w", ":4: key linux was given before, on line 1"),
            ("initrd", ":4: key initrd has no value"),
            ("cordon-skinit", ":4: key cordon-skinit has no value"),
            (
                "\ncordon-skinit maybe",
                ":5: key cordon-skinit has value \"maybe\", which is not one it knows, as \"insist\" is",
            ),
            ("options a\0b", ":4: key options has character 0x0 in its value"),
            ("initrd /\u{1f427}", ":4: key initrd has character 0x1f427 in its value"),
        ] {
            let error = parse(&alloc::format!("{base}{more}")).unwrap_err().to_string();
            assert_eq!(error, alloc::format!("\\loader\\entries\\a.conf{message}"));
        }
        for (text, key) in [
            ("cordon-slb s\ncordon-mle m", "linux"),
            ("linux v\ncordon-mle m", "cordon-slb"),
            ("linux v\ncordon-config c", "cordon-slb"),
            ("linux v\ncordon-slb s", "cordon-mle"),
        ] {
            assert_eq!(
                parse(text).unwrap_err().to_string(),
                alloc::format!("\\loader\\entries\\a.conf: key {key} is missing")
            );
        }
        let error = Entry::parse("f", b"cordon-slb s\n\nlinux \xff\n").unwrap_err();
        assert_eq!(error.to_string(), "f:3: not UTF-8 text");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut ours = b"cordon-slb s\n".to_vec();
            ours.extend_from_slice(&bytes);
            let _ = Entry::parse("f", &ours);
            let _ = Entry::parse("f", &bytes);
        }

        #[test]
        fn an_error_in_a_line_names_that_line(before in 0usize..50, junk in "[a-z]{1,8}") {
            let text = alloc::format!("{}cordon-no-{junk} x\n", "# nothing\n".repeat(before));
            let error = parse(&text).unwrap_err();
            prop_assert_eq!(error.line, Some(before as u32 + 1));
        }

        #[test]
        fn lines_of_keys_and_junk(lines in proptest::collection::vec(
            "(linux|initrd|options|title|cordon-slb|cordon-mle|cordon-skinit|x)[ \t]{0,2}.{0,12}", 0..12))
        {
            if let Ok(Some(e)) = parse(&lines.join("\n")) {
                prop_assert!(!e.linux.text.is_empty() && e.linux.efi_path().starts_with('\\'));
                prop_assert!(!e.command_line().contains('\0'));
            }
        }
    }
}
