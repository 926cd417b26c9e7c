//! `cordon predict`: the PCR values of a launch, from the files alone.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use hv::launch::{PCR_CODE, PCR_CONFIG, POLICY, event};
use loader::image::{check_kernel, check_mle, check_slb};
use serde_json::json;
use tpm::log::extended;
use tpm::{Bank, Digest, HashAlg, digest_of};
use zerocopy::IntoBytes;

use crate::values::{alg, name};

/// Arguments of `cordon predict`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Secure loader block
    #[arg(long, value_name = "FILE")]
    slb: PathBuf,
    /// MLE image
    #[arg(long, value_name = "FILE")]
    mle: PathBuf,
    /// Linux kernel, the whole bzImage
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk; may be given more than once, in the boot entry's order
    #[arg(long, value_name = "FILE")]
    initrd: Vec<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", conflicts_with = "cmdline_file")]
    cmdline: Option<String>,
    /// File with the kernel command line; a newline at its end is no part of it
    #[arg(long, value_name = "FILE")]
    cmdline_file: Option<PathBuf>,
    /// Cordon's configuration
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// PCR bank; may be given more than once
    #[arg(long, value_name = "BANK", value_parser = alg, default_value = "sha256")]
    bank: Vec<HashAlg>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a launch measures, as bytes.
struct Inputs {
    slb: Vec<u8>,
    mle: Vec<u8>,
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    cmdline: Vec<u8>,
    config: Vec<u8>,
}

/// One measurement.
struct Measured {
    pcr: u32,
    event: &'static str,
    digest: Digest,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let inputs = Inputs::read(arguments)?;
    let mut banks = serde_json::Map::new();
    for alg in &arguments.bank {
        let events = measurements(&inputs, *alg)?;
        let values = [PCR_CODE, PCR_CONFIG].map(|pcr| Ok((pcr, value(&events, *alg, pcr)?)));
        let values = values.into_iter().collect::<Result<Vec<_>>>()?;
        if arguments.json {
            let events: Vec<_> = events
                .iter()
                .map(|e| json!({ "pcr": e.pcr, "event": e.event, "digest": e.digest.to_string() }))
                .collect();
            let values: serde_json::Map<_, _> =
                values.iter().map(|(pcr, value)| (pcr.to_string(), value.to_string().into())).collect();
            banks.insert(name(*alg), json!({ "events": events, "pcrs": values }));
            continue;
        }
        println!("{}:", name(*alg));
        for Measured { pcr, event, digest } in &events {
            println!("  # PCR {pcr} {event:<14} {digest}");
        }
        for (pcr, value) in values {
            println!("  {pcr}: 0x{value}");
        }
    }
    if arguments.json {
        println!("{:#}", json!({ "banks": banks }));
    }
    Ok(())
}

impl Inputs {
    fn read(arguments: &Arguments) -> Result<Self> {
        let optional = |path: &Option<PathBuf>| path.as_ref().map_or(Ok(Vec::new()), crate::read);
        let mut initrd = Vec::new();
        for path in &arguments.initrd {
            initrd.append(&mut crate::read(path)?);
            // The loader pads each to 4 bytes.
            initrd.resize(initrd.len().next_multiple_of(4), 0);
        }
        let mut cmdline = optional(&arguments.cmdline_file)?;
        if cmdline.last() == Some(&b'\n') {
            cmdline.pop();
        }
        if let Some(text) = &arguments.cmdline {
            cmdline = text.clone().into_bytes();
        }
        let inputs = Self {
            slb: crate::read(&arguments.slb)?,
            mle: crate::read(&arguments.mle)?,
            kernel: crate::read(&arguments.kernel)?,
            initrd,
            cmdline,
            config: optional(&arguments.config)?,
        };
        // What the loader would refuse has no launch to predict.
        let refused = |error, path: &PathBuf| anyhow!("{}: {error}", path.display());
        check_slb(&inputs.slb, inputs.slb.len() as u64).map_err(|e| refused(e, &arguments.slb))?;
        check_mle(&inputs.mle, inputs.mle.len() as u64).map_err(|e| refused(e, &arguments.mle))?;
        check_kernel(&inputs.kernel, inputs.cmdline.len() as u64)
            .map_err(|e| refused(e, &arguments.kernel))?;
        Ok(inputs)
    }
}

/// What the CPU, the SLB stage and the MLE measure, in their order.
fn measurements(inputs: &Inputs, alg: HashAlg) -> Result<Vec<Measured>> {
    let hash = |data: &[u8]| digest_of(alg, &[data]).context("a bank that cannot be computed");
    // The SLB stage hashes the image itself and lets the TPM hash that digest in all its banks.
    let mle = digest_of(HashAlg::SHA256, &[&inputs.mle]).context("SHA-256")?;
    let mut events = vec![
        Measured { pcr: PCR_CODE, event: event::SLB, digest: hash(&inputs.slb)? },
        Measured { pcr: PCR_CODE, event: event::MLE, digest: hash(mle.as_bytes())? },
        Measured { pcr: PCR_CONFIG, event: event::POLICY, digest: hash(POLICY.as_bytes())? },
    ];
    for (event, data) in [
        (event::CONFIG, &inputs.config),
        (event::KERNEL, &inputs.kernel),
        (event::INITRD, &inputs.initrd),
        (event::CMDLINE, &inputs.cmdline),
    ] {
        events.push(Measured { pcr: PCR_CONFIG, event, digest: hash(data)? });
    }
    Ok(events)
}

/// The value of a dynamic PCR after `events`.
fn value(events: &[Measured], alg: HashAlg, pcr: u32) -> Result<Digest> {
    let zero = Bank::computed(alg).map(Digest::zero);
    let events = events.iter().filter(|event| event.pcr == pcr);
    events
        .fold(zero, |value, event| extended(&value?, &event.digest))
        .context("a bank that cannot be computed")
}
