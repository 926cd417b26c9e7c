//! `cordon status`, `cordon log`, `cordon exposure`, `cordon unlock`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use firmware::service::Service;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::exposures::{self, Batch, Exposures, Sum, milliseconds, seconds, sums};
use crate::source::{ATTRIBUTES, EXPOSURE, Efivars, UNLOCK};
use crate::text::printable_lines;

/// How often `--follow` looks.
const POLL: Duration = Duration::from_secs(1);

/// Arguments of `cordon status`.
#[derive(clap::Args)]
pub struct StatusArguments {
    /// The text in a file instead
    file: Option<PathBuf>,
    #[command(flatten)]
    efivars: Efivars,
}

/// Prints what is in force.
pub fn status(arguments: &StatusArguments) -> Result<()> {
    let text = arguments.efivars.status(arguments.file.as_deref())?;
    println!("{}", printable_lines(&text).trim_end());
    Ok(())
}

/// Arguments of `cordon log`.
#[derive(clap::Args)]
pub struct LogArguments {
    /// An exposure log in a file instead
    file: Option<PathBuf>,
    /// One JSON object for each record, on a line of its own
    #[arg(long)]
    json: bool,
    /// Go on with the records to come
    #[arg(long, conflicts_with_all = ["file", "save"])]
    follow: bool,
    /// Write the log as it is to this file, without the zeros at its end, as public tools like it
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    save: Option<PathBuf>,
    #[command(flatten)]
    efivars: Efivars,
}

/// Prints the records; false when the log is inconsistent.
pub fn log(arguments: &LogArguments) -> Result<bool> {
    let bytes = arguments.efivars.read_or(EXPOSURE, arguments.file.as_deref())?;
    if let Some(to) = &arguments.save {
        let log = bytes.get(..end_of_last(&bytes)?).unwrap_or_default();
        std::fs::write(to, log).with_context(|| format!("cannot write {}", to.display()))?;
        return Ok(true);
    }
    let log = Exposures::parse(&bytes)?;
    let mut next = print_from(&log, 0, arguments.json);
    if arguments.follow {
        loop {
            std::thread::sleep(POLL);
            let log = Exposures::parse(&arguments.efivars.read(EXPOSURE)?)?;
            next = print_from(&log, next, arguments.json);
        }
    }
    if !arguments.json {
        println!("{}", log.summary());
    }
    for finding in &log.findings {
        eprintln!("cordon: exposure log: {finding}");
    }
    Ok(log.findings.is_empty())
}

/// Where the last event of a log ends.
fn end_of_last(bytes: &[u8]) -> Result<usize> {
    let log = tpm::Log::parse(bytes)?;
    let mut end = 0;
    for event in log.events() {
        let event = event?;
        let head = tpm::log::event_head(event.pcr, event.event_type, &event.digests, 0).len();
        end = event.offset.saturating_add(head).saturating_add(event.data.len());
    }
    Ok(end)
}

/// Prints the records from `next` on; the number after the last one.
fn print_from(log: &Exposures, next: u64, as_json: bool) -> u64 {
    let mut after = next;
    for batch in &log.batches {
        let mut new = batch.records.iter().filter(|(sequence, _)| *sequence >= next).peekable();
        if let Some((first, _)) = new.peek()
            && !as_json
        {
            if *first != after {
                println!("        {} records are not in the log", first.saturating_sub(after));
            }
            println!("{}", title(batch));
        }
        for (sequence, record) in new {
            match as_json {
                true => println!("{}", exposures::json(*sequence, record, batch)),
                false => println!("{}", exposures::line(*sequence, record, batch)),
            }
            after = sequence.saturating_add(1);
        }
    }
    after
}

fn title(batch: &Batch) -> String {
    let header = &batch.header;
    if batch.pending {
        return "not measured yet:".to_owned();
    }
    let late = if batch.late() { ", late" } else { "" };
    let round = batch.relaunch().map(|round| format!(", first after relaunch {round}")).unwrap_or_default();
    format!("batch {}, measured after {} s{late}{round}:", header.number, seconds(header.sealed_us.get()))
}

/// Arguments of `cordon exposure`.
#[derive(clap::Args)]
pub struct ExposureArguments {
    /// An exposure log in a file instead
    file: Option<PathBuf>,
    #[command(flatten)]
    efivars: Efivars,
}

/// Prints how often firmware ran and what for.
pub fn exposure(arguments: &ExposureArguments) -> Result<()> {
    let log = Exposures::parse(&arguments.efivars.read_or(EXPOSURE, arguments.file.as_deref())?)?;
    println!(
        "{:<25} {:>6} {:>6} {:>14} {:>12} {:>8} {:>6} {:>6}",
        "what", "count", "errors", "time", "longest", "exits", "SMIs", "denied"
    );
    for (what, Sum { count, errors, total_us, longest_us, exits, smis, denied }) in sums(&log) {
        println!(
            "{what:<25} {count:>6} {errors:>6} {:>14} {:>12} {exits:>8} {smis:>6} {denied:>6}",
            milliseconds(total_us),
            milliseconds(longest_us),
        );
    }
    println!("{}", log.summary());
    Ok(())
}

/// Arguments of `cordon unlock`.
#[derive(clap::Args)]
pub struct UnlockArguments {
    /// Name of a runtime service, such as SetVariable, or `all`
    #[arg(value_parser = service)]
    service: &'static str,
    #[command(flatten)]
    efivars: Efivars,
}

fn service(text: &str) -> Result<&'static str> {
    let names = Service::ALL.into_iter().map(Service::name).chain(["all"]);
    names.clone().find(|name| name.eq_ignore_ascii_case(text)).ok_or_else(|| {
        anyhow!("{text} is neither a runtime service nor `all`: {}", names.collect::<Vec<_>>().join(", "))
    })
}

/// Asks the MLE to unlock a service.
pub fn unlock(arguments: &UnlockArguments) -> Result<()> {
    let path = arguments.efivars.path(UNLOCK);
    let request = [&ATTRIBUTES[..], arguments.service.as_bytes()].concat();
    let write = || -> std::io::Result<()> {
        unprotect(&path)?;
        // One write is one SetVariable.
        OpenOptions::new().write(true).create(true).truncate(false).open(&path)?.write_all(&request)
    };
    write().with_context(|| format!("{} was not unlocked: {}", arguments.service, path.display()))?;
    println!(
        "{} is unlocked until the machine is reset; the exposure log has a record of it",
        arguments.service
    );
    Ok(())
}

/// Linux protects the files of variables it does not know from being written by mistake. A request that is taken leaves no
/// file; one that is refused leaves such a file, and the next one must get past it.
fn unprotect(path: &Path) -> std::io::Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let Ok(flags) = ioctl_getflags(&file) else { return Ok(()) };
    if flags.contains(IFlags::IMMUTABLE) {
        ioctl_setflags(&file, flags.difference(IFlags::IMMUTABLE))?;
    }
    Ok(())
}
