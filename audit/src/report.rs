//! `cordon report`: all that is known about a launch and what firmware did since, on one page that needs nothing else.
//!
//! Names in it may be firmware's own, so nothing gets onto the page unescaped, and the page forbids scripts.

pub mod chart;

use std::fmt::{Display, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use hv::launch::{PCR_CODE, PCR_CONFIG, PCR_EXPOSURE, PCR_FIRMWARE};
use tpm::Digest;
use tpm::log::EV_NO_ACTION;

use crate::exposures::{Exposures, Sum, milliseconds, sums};
use crate::text::printable_lines;
use crate::txt;
use crate::values::name;
use crate::verify::{self, Evidence, Outcome, Sources, Verdict};

/// Arguments of `cordon report`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// The page to write
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
    /// Text of what is in force, in a file
    #[arg(long, value_name = "FILE")]
    status: Option<PathBuf>,
}

/// Writes the page; false when a value differs.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let evidence = verify::collect(&arguments.sources)?;
    let outcome = verify::check(&evidence)?;
    let running = evidence.from_running_system;
    let status = match (&arguments.status, running) {
        (None, false) => None,
        (file, _) => Some(arguments.sources.efivars.status(file.as_deref())?),
    };
    let page = page(&evidence, &outcome, status.as_deref());
    std::fs::write(&arguments.html, page)
        .with_context(|| format!("cannot write {}", arguments.html.display()))?;
    Ok(outcome.good())
}

/// Text on the page.
struct Escaped<T>(T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for character in self.0.to_string().chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                _ => f.write_char(character)?,
            }
        }
        Ok(())
    }
}

/// Adds to the page; writing to a string does not fail.
macro_rules! put {
    ($page:expr, $($argument:tt)*) => { { let _ = writeln!($page, $($argument)*); } };
}
use put;

fn page(evidence: &Evidence, outcome: &Outcome<'_>, status: Option<&[u8]>) -> String {
    let mut page = HEAD.to_owned();
    banner(&mut page, outcome);
    launch(&mut page, outcome);
    registers(&mut page, outcome);
    if let Some(exposure) = &evidence.exposure {
        exposures(&mut page, exposure);
    }
    if let Some(status) = status {
        put!(page, "<section><h2>In force</h2><table class=facts>");
        for line in printable_lines(status).lines() {
            match line.split_once(": ") {
                Some((what, value)) => {
                    put!(page, "<tr><th>{}</th><td>{}</td></tr>", Escaped(what), Escaped(value));
                }
                None => put!(page, "<tr><td colspan=2>{}</td></tr>", Escaped(line)),
            }
        }
        put!(page, "</table></section>");
    }
    put!(
        page,
        "<footer>cordon {}; {}</footer></body></html>",
        env!("CARGO_PKG_VERSION"),
        Escaped(&evidence.place)
    );
    page
}

fn banner(page: &mut String, outcome: &Outcome<'_>) {
    let (class, verdict) = match (outcome.compared.is_empty(), outcome.good()) {
        (true, true) => ("open", "The logs were replayed; there were no PCR values to compare with."),
        (false, true) => ("good", "The logs explain every PCR value."),
        (_, false) => ("bad", "The logs do not explain the PCR values."),
    };
    put!(page, "<p class=\"banner {class}\">{verdict}</p>");
    for finding in &outcome.findings {
        put!(page, "<p class=\"banner bad\">Exposure log: {}</p>", Escaped(finding));
    }
}

/// What was measured, in its order.
fn launch(page: &mut String, outcome: &Outcome<'_>) {
    let shown = outcome.shown();
    put!(
        page,
        "<section><h2>Launch</h2><p>What was measured, in this order. Digests are {}.</p><ol class=steps>",
        name(shown)
    );
    let by_sinit = outcome.events.iter().any(|event| txt::name(event.event_type).is_some());
    for event in &outcome.events {
        let sinits = txt::name(event.event_type);
        let by = match (&sinits, event.pcr, event.data) {
            (Some(_), ..) => "SENTER and SINIT",
            (None, PCR_CODE, b"SKINIT") => "CPU",
            (None, PCR_CODE, _) => "SLB stage",
            (None, PCR_CONFIG, b"SLRT policy") if !by_sinit => "SLB stage",
            _ => "MLE",
        };
        let logged = if event.event_type == EV_NO_ACTION { ", logged only" } else { "" };
        put!(
            page,
            "<li><b>{}</b><span class=by>PCR {} by {by}{logged}</span><code>{}</code></li>",
            Escaped(sinits.unwrap_or_else(|| verify::text(event.data))),
            event.pcr,
            event.digests.get(shown).map(Digest::to_string).unwrap_or_default(),
        );
    }
    put!(page, "</ol></section>");
}

/// The values that the logs lead to, and how they compare.
fn registers(page: &mut String, outcome: &Outcome<'_>) {
    put!(
        page,
        "<section><h2>PCR values</h2><table><tr><th>bank</th><th>PCR</th><th>of</th><th>value by the logs</th><th></th></tr>"
    );
    for ((alg, pcr), value) in &outcome.replayed {
        let of = match *pcr {
            PCR_CODE => "SLB or SINIT, MLE",
            PCR_CONFIG => "configuration, kernel",
            PCR_FIRMWARE => "firmware",
            PCR_EXPOSURE => "exposure",
            _ => "",
        };
        let own = outcome.compared.iter().filter(|c| c.value.pcr == *pcr && c.value.digest.alg() == *alg);
        let verdicts: Vec<_> = own.map(|c| c.verdict).collect();
        let (class, verdict) = match verdicts.as_slice() {
            [] => ("open", "not compared"),
            all if all.iter().all(|v| *v == Verdict::Matches) => ("good", "matches"),
            _ => ("bad", "differs"),
        };
        put!(
            page,
            "<tr><td>{}</td><td>{pcr}</td><td>{of}</td><td><code>{value}</code></td><td class={class}>{verdict}</td></tr>",
            name(*alg)
        );
    }
    for compared in outcome.compared.iter().filter(|c| c.verdict == Verdict::NoBank) {
        put!(
            page,
            "<tr><td>{}</td><td>{}</td><td></td><td></td><td class=bad>a bank that the log lacks</td></tr>",
            name(compared.value.digest.alg()),
            compared.value.pcr
        );
    }
    put!(page, "</table></section>");
}

/// What firmware did.
fn exposures(page: &mut String, log: &Exposures) {
    put!(page, "<section><h2>Exposure</h2><p>{}.</p>", Escaped(log.summary()));
    if log.unextended {
        put!(
            page,
            "<p class=\"banner bad\">The TPM has no locality for PCR 22: the records were logged, not measured.</p>"
        );
    }
    put!(
        page,
        "<table class=numbers><tr><th>what</th><th>count</th><th>errors</th><th>time</th><th>longest</th><th>exits</th>\
         <th>SMIs</th><th>denied</th></tr>"
    );
    for (what, Sum { count, errors, total_us, longest_us, exits, smis, denied }) in sums(log) {
        put!(
            page,
            "<tr><th>{}</th><td>{count}</td><td>{errors}</td><td>{}</td><td>{}</td><td>{exits}</td><td>{smis}</td>\
             <td{}>{denied}</td></tr>",
            Escaped(what),
            milliseconds(total_us),
            milliseconds(longest_us),
            if denied == 0 { "" } else { " class=bad" },
        );
    }
    put!(page, "</table>");
    chart::calls(page, log);
    put!(page, "</section>");
}

/// Everything before the first section. The policy in it lets nothing be loaded and nothing run.
const HEAD: &str = include_str!("report/head.html");
