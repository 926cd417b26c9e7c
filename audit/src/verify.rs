//! `cordon verify`: an event log against PCR values.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use hv::launch::{EV_SLAUNCH, PCR_CODE, PCR_CONFIG, PCR_EXPOSURE, PCR_FIRMWARE};
use tpm::log::EV_NO_ACTION;
use tpm::{Digest, Event, HashAlg, Log};

use crate::values::{self, ALGS, BY_HAND, Value, alg, name};

/// Longest event data shown, in characters.
const SHOWN: usize = 48;

/// PCRs that a launch accounts for: with no event in the log they must be zero.
const LAUNCH_PCRS: [u32; 4] = [PCR_CODE, PCR_CONFIG, PCR_FIRMWARE, PCR_EXPOSURE];

/// Arguments of `cordon verify`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Crypto-agile event log of the launch
    log: PathBuf,
    /// File with PCR values as `tpm2_pcrread` or `cordon predict` print them; may be given more than once
    #[arg(long, value_name = "FILE")]
    pcrs: Vec<PathBuf>,
    /// A PCR value; may be given more than once
    #[arg(long, value_name = "[BANK:]PCR=HEX", value_parser = values::argument)]
    pcr: Vec<Value>,
    /// Folder of the TPM in sysfs, such as /sys/class/tpm/tpm0
    #[arg(long, value_name = "DIR")]
    sysfs: Option<PathBuf>,
    /// Bank whose digests are shown; all banks are compared
    #[arg(long, value_name = "BANK", value_parser = alg)]
    bank: Option<HashAlg>,
}

/// Prints the log and the comparison; false when a value differs.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let path = arguments.log.display();
    let bytes = crate::read(&arguments.log)?;
    let log = Log::parse(&bytes).with_context(|| path.to_string())?;
    let events = log.events().collect::<Result<Vec<_>, _>>().with_context(|| path.to_string())?;
    ensure!(!events.is_empty(), "{path}: no events after the first record");
    let banks: Vec<_> =
        ALGS.into_iter().filter(|alg| log.banks().iter().any(|bank| bank.alg == *alg)).collect();
    let shown = match arguments.bank {
        Some(alg) if !banks.contains(&alg) => bail!("{path}: no bank {}", name(alg)),
        Some(alg) => alg,
        None if banks.contains(&HashAlg::SHA256) => HashAlg::SHA256,
        None => *banks.first().with_context(|| format!("{path}: no bank that can be replayed"))?,
    };
    print_events(&events, shown);
    let replayed = replay(&log, &events, &banks)?;
    let given = given(arguments)?;
    println!();
    for ((alg, pcr), value) in &replayed {
        let checked = given.iter().any(|g| g.pcr == *pcr && g.digest.alg() == *alg);
        let note = if checked { "" } else { "  as logged, not compared" };
        println!("{:<6} {pcr:>2}: 0x{value}{note}", name(*alg));
    }
    let matches = compare(&given, &replayed)?;
    if events.iter().any(|event| event.event_type == EV_NO_ACTION) {
        println!("note: events of type EV_NO_ACTION were logged but not extended: no PCR vouches for them");
    }
    Ok(matches)
}

/// All values given, from wherever.
fn given(arguments: &Arguments) -> Result<Vec<Value>> {
    let mut given = arguments.pcr.clone();
    for path in &arguments.pcrs {
        let text = String::from_utf8(crate::read(path)?).with_context(|| path.display().to_string())?;
        given.extend(values::pcrread(&text, &path.display().to_string())?);
    }
    if let Some(folder) = &arguments.sysfs {
        given.extend(values::sysfs(folder)?);
    }
    Ok(given)
}

fn print_events(events: &[Event<'_>], shown: HashAlg) {
    println!("{:>8}  PCR  {:<12}  {:<SHOWN$}  {} digest", "offset", "type", "event", name(shown));
    for event in events {
        let kind = match event.event_type {
            EV_SLAUNCH => "EV_SLAUNCH".to_owned(),
            EV_NO_ACTION => "EV_NO_ACTION".to_owned(),
            other => format!("{other:#x}"),
        };
        let digest = event.digests.get(shown).map(Digest::to_string).unwrap_or_default();
        println!(
            "{:#8x}  {:>3}  {kind:<12}  {:<SHOWN$}  {digest}",
            event.offset,
            event.pcr,
            text(event.data)
        );
    }
}

/// Event data fit for a terminal: the log may hold anything.
fn text(data: &[u8]) -> String {
    let text = data.escape_ascii().to_string();
    match text.char_indices().nth(SHOWN) {
        None => text,
        Some(_) => text.chars().take(SHOWN.saturating_sub(1)).chain(['…']).collect(),
    }
}

type Values = BTreeMap<(HashAlg, u32), Digest>;

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

/// Compares what can be compared and says what differs. A file's values of PCRs that are not a launch's
/// and that the log does not mention are no business of this log; a value given by hand always is.
fn compare(given: &[Value], replayed: &Values) -> Result<bool> {
    let mut compared = 0_u32;
    let mut differ = 0_u32;
    for Value { pcr, digest, source } in given {
        let bank = name(digest.alg());
        let verdict = match replayed.get(&(digest.alg(), *pcr)) {
            Some(value) if value == digest => None,
            Some(_) => Some("DIFFERS"),
            None if LAUNCH_PCRS.contains(pcr) => Some("IN A BANK THAT THE LOG LACKS"),
            None if source == BY_HAND => bail!("the log has no event of PCR {pcr} in bank {bank}"),
            None => continue,
        };
        compared = compared.saturating_add(1);
        if let Some(verdict) = verdict {
            differ = differ.saturating_add(1);
            println!("{bank:<6} {pcr:>2}: 0x{digest}  {verdict} ({source})");
        }
    }
    ensure!(given.is_empty() || compared != 0, "none of the values given is of a PCR and bank of the log");
    match (compared, differ) {
        (0, _) => println!("replayed; no PCR values were given to compare with"),
        (_, 0) => println!("the log explains all {compared} values compared"),
        _ => println!("{differ} of {compared} values differ: the log does not explain them"),
    }
    Ok(differ == 0)
}
