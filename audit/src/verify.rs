//! `cordon verify`: event logs against PCR values.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use hv::launch::{EV_SLAUNCH, PCR_CODE, PCR_CONFIG, PCR_EXPOSURE, PCR_FIRMWARE};
use tpm::log::EV_NO_ACTION;
use tpm::{Digest, Event, HashAlg, Log};

use crate::exposures::Exposures;
use crate::source::{self, DRTM_LOG, EXPOSURE, Efivars};
use crate::txt;
use crate::values::{self, ALGS, BY_HAND, Value, alg, name};

/// Longest event data shown, in characters.
const SHOWN: usize = 48;
/// How often the exposure log and the PCRs are read until no batch came between.
const TRIES: u32 = 10;
/// The TPM of the running system.
const SYSFS: &str = "/sys/class/tpm/tpm0";

/// PCRs that a launch accounts for: with no event in the log they must be zero.
const LAUNCH_PCRS: [u32; 4] = [PCR_CODE, PCR_CONFIG, PCR_FIRMWARE, PCR_EXPOSURE];

/// Where logs and PCR values come from.
#[derive(clap::Args)]
pub struct Sources {
    /// Crypto-agile event log of the launch. Without it, logs and PCR values are those of the running system
    log: Option<PathBuf>,
    /// Exposure log, which accounts for PCR 22
    #[arg(long, value_name = "FILE", requires = "log")]
    exposure: Option<PathBuf>,
    /// File with PCR values as `tpm2_pcrread` or `cordon predict` print them; may be given more than once
    #[arg(long, value_name = "FILE")]
    pcrs: Vec<PathBuf>,
    /// A PCR value; may be given more than once
    #[arg(long, value_name = "[BANK:]PCR=HEX", value_parser = values::argument)]
    pcr: Vec<Value>,
    /// Folder of the TPM in sysfs; that of the running system is /sys/class/tpm/tpm0
    #[arg(long, value_name = "DIR")]
    sysfs: Option<PathBuf>,
    #[command(flatten)]
    pub efivars: Efivars,
}

/// Arguments of `cordon verify`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// Bank whose digests are shown; all banks are compared
    #[arg(long, value_name = "BANK", value_parser = alg)]
    bank: Option<HashAlg>,
}

/// What is to be verified.
pub struct Evidence {
    /// Where the log comes from.
    pub place: String,
    /// The log of the launch.
    pub log: Vec<u8>,
    /// The exposure log.
    pub exposure: Option<Exposures>,
    /// They are those of the running system.
    pub from_running_system: bool,
    /// PCR values to compare with.
    given: Vec<Value>,
}

/// How a value that was given compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The logs lead to it.
    Matches,
    /// They lead to another one.
    Differs,
    /// Nothing was logged in its bank.
    NoBank,
}

/// A value that was given, and how it compares.
pub struct Compared {
    /// The value.
    pub value: Value,
    /// The result.
    pub verdict: Verdict,
}

/// What came of it.
pub struct Outcome<'a> {
    /// The events of the launch.
    pub events: Vec<Event<'a>>,
    /// The banks that can be replayed.
    pub banks: Vec<HashAlg>,
    /// Where the logs lead to.
    pub replayed: Values,
    /// The values given.
    pub compared: Vec<Compared>,
    /// What is wrong with the exposure log.
    pub findings: Vec<String>,
}

impl Outcome<'_> {
    /// Whether nothing differs.
    pub fn good(&self) -> bool {
        self.findings.is_empty() && self.compared.iter().all(|c| c.verdict == Verdict::Matches)
    }
}

/// Prints the logs and the comparison; false when a value differs.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let evidence = collect(&arguments.sources)?;
    let path = &evidence.place;
    let outcome = check(&evidence)?;
    let shown = match arguments.bank {
        Some(alg) if !outcome.banks.contains(&alg) => bail!("{path}: no bank {}", name(alg)),
        Some(alg) => alg,
        None => outcome.shown(),
    };
    print_events(&outcome.events, shown);
    if let Some(exposure) = &evidence.exposure {
        println!("\nexposure log: {}", exposure.summary());
    }
    println!();
    for ((alg, pcr), value) in &outcome.replayed {
        let checked = outcome.compared.iter().any(|c| c.value.pcr == *pcr && c.value.digest.alg() == *alg);
        let note = if checked { "" } else { "  as logged, not compared" };
        println!("{:<6} {pcr:>2}: 0x{value}{note}", name(*alg));
    }
    print_comparison(&outcome, evidence.exposure.is_some());
    let unextended = evidence.exposure.as_ref().is_some_and(|exposure| exposure.unextended);
    if unextended || outcome.events.iter().any(|event| event.event_type == EV_NO_ACTION) {
        println!("note: events of type EV_NO_ACTION were logged but not extended: no PCR vouches for them");
    }
    Ok(outcome.good())
}

/// Reads logs and values.
pub fn collect(sources: &Sources) -> Result<Evidence> {
    let mut given = sources.pcr.clone();
    for path in &sources.pcrs {
        let text = String::from_utf8(crate::read(path)?).with_context(|| path.display().to_string())?;
        given.extend(values::pcrread(&text, &path.display().to_string())?);
    }
    if let Some(path) = &sources.log {
        let exposure = sources.exposure.as_deref().map(source::read).transpose()?;
        let exposure = exposure.map(|bytes| Exposures::parse(&bytes)).transpose()?;
        if let Some(folder) = &sources.sysfs {
            given.extend(values::sysfs(folder)?);
        }
        let (place, log) = (path.display().to_string(), source::read(path)?);
        return Ok(Evidence { place, log, exposure, from_running_system: false, given });
    }
    let log = sources.efivars.read(DRTM_LOG)?;
    let folder = sources.sysfs.clone().unwrap_or_else(|| SYSFS.into());
    let mut exposure = Exposures::parse(&sources.efivars.read(EXPOSURE)?)?;
    for _ in 0..TRIES {
        let values = values::sysfs(&folder)?;
        let after = Exposures::parse(&sources.efivars.read(EXPOSURE)?)?;
        if after.values == exposure.values {
            given.extend(values);
            let place = sources.efivars.path(DRTM_LOG).display().to_string();
            return Ok(Evidence { place, log, exposure: Some(exposure), from_running_system: true, given });
        }
        // A batch was measured meanwhile: those values may be of before or after it.
        exposure = after;
    }
    bail!("the exposure log grew each of {TRIES} times that PCR 22 was read: firmware is too busy to verify")
}

/// Replays and compares.
pub fn check(evidence: &Evidence) -> Result<Outcome<'_>> {
    let path = &evidence.place;
    let log = Log::parse(&evidence.log).with_context(|| path.clone())?;
    let events = log.events().collect::<Result<Vec<_>, _>>().with_context(|| path.clone())?;
    ensure!(!events.is_empty(), "{path}: no events after the first record");
    let banks: Vec<_> =
        ALGS.into_iter().filter(|alg| log.banks().iter().any(|bank| bank.alg == *alg)).collect();
    ensure!(!banks.is_empty(), "{path}: no bank that can be replayed");
    let mut replayed = replay(&log, &events, &banks)?;
    let mut findings = Vec::new();
    if let Some(exposure) = &evidence.exposure {
        findings.extend(exposure.findings.iter().cloned());
        if !exposure.values.keys().eq(&banks) {
            findings.push("its banks are not those of the launch's log".to_owned());
        }
        if events.iter().any(|event| event.pcr == PCR_EXPOSURE && event.event_type != EV_NO_ACTION) {
            findings.push(format!("{path} has events of PCR {PCR_EXPOSURE} too"));
        }
        for (alg, value) in &exposure.values {
            replayed.insert((*alg, PCR_EXPOSURE), *value);
        }
    }
    let compared = compare(&evidence.given, &replayed)?;
    Ok(Outcome { events, banks, replayed, compared, findings })
}

impl Outcome<'_> {
    /// The bank to show: SHA-256 if there is one.
    pub fn shown(&self) -> HashAlg {
        self.banks
            .iter()
            .copied()
            .find(|alg| *alg == HashAlg::SHA256)
            .or(self.banks.first().copied())
            .unwrap_or(HashAlg::SHA256)
    }
}

fn print_events(events: &[Event<'_>], shown: HashAlg) {
    println!("{:>8}  PCR  {:<20}  {:<SHOWN$}  {} digest", "offset", "type", "event", name(shown));
    for event in events {
        let kind = match event.event_type {
            EV_SLAUNCH => "EV_SLAUNCH".to_owned(),
            EV_NO_ACTION => "EV_NO_ACTION".to_owned(),
            other => txt::name(other).unwrap_or_else(|| format!("{other:#x}")),
        };
        let digest = event.digests.get(shown).map(Digest::to_string).unwrap_or_default();
        println!(
            "{:#8x}  {:>3}  {kind:<20}  {:<SHOWN$}  {digest}",
            event.offset,
            event.pcr,
            text(event.data)
        );
    }
}

/// Event data fit for a terminal: the log may hold anything.
pub fn text(data: &[u8]) -> String {
    let text = data.escape_ascii().to_string();
    match text.char_indices().nth(SHOWN) {
        None => text,
        Some(_) => text.chars().take(SHOWN.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// PCR values by bank and PCR.
pub type Values = BTreeMap<(HashAlg, u32), Digest>;

/// The final values, in each bank, of the PCRs of a launch and of those that the log has events of.
fn replay(log: &Log<'_>, events: &[Event<'_>], banks: &[HashAlg]) -> Result<Values> {
    let pcrs: BTreeSet<u32> = LAUNCH_PCRS.into_iter().chain(events.iter().map(|event| event.pcr)).collect();
    let mut values = Values::new();
    for alg in banks {
        for pcr in &pcrs {
            values.insert((*alg, *pcr), log.replay(*alg, *pcr)?);
        }
    }
    Ok(values)
}

/// Compares what can be compared. A file's values of PCRs that are not a launch's and that the logs do not mention are no
/// business of these logs; a value given by hand always is.
fn compare(given: &[Value], replayed: &Values) -> Result<Vec<Compared>> {
    let mut compared = Vec::new();
    for value in given {
        let bank = name(value.digest.alg());
        let verdict = match replayed.get(&(value.digest.alg(), value.pcr)) {
            Some(replayed) if *replayed == value.digest => Verdict::Matches,
            Some(_) => Verdict::Differs,
            None if LAUNCH_PCRS.contains(&value.pcr) => Verdict::NoBank,
            None if value.source == BY_HAND => {
                bail!("the log has no event of PCR {} in bank {bank}", value.pcr)
            }
            None => continue,
        };
        compared.push(Compared { value: value.clone(), verdict });
    }
    let none = given.is_empty() || !compared.is_empty();
    ensure!(none, "none of the values given is of a PCR and bank of the log");
    Ok(compared)
}

/// Says what differs.
fn print_comparison(outcome: &Outcome<'_>, with_exposure: bool) {
    let mut differ = 0_u32;
    let mut unexplained = false;
    for Compared { value: Value { pcr, digest, source }, verdict } in &outcome.compared {
        let verdict = match verdict {
            Verdict::Matches => continue,
            Verdict::Differs => "DIFFERS",
            Verdict::NoBank => "IN A BANK THAT THE LOG LACKS",
        };
        differ = differ.saturating_add(1);
        unexplained |= *pcr == PCR_EXPOSURE && !with_exposure;
        println!("{:<6} {pcr:>2}: 0x{digest}  {verdict} ({source})", name(digest.alg()));
    }
    for finding in &outcome.findings {
        println!("exposure log: {finding}");
    }
    match (outcome.compared.len(), differ) {
        (0, _) => println!("replayed; no PCR values were given to compare with"),
        (compared, 0) => println!("the log explains all {compared} values compared"),
        (compared, _) => println!("{differ} of {compared} values differ: the log does not explain them"),
    }
    if unexplained {
        println!("note: PCR {PCR_EXPOSURE} is the exposure log's, see --exposure");
    }
}
