//! `cordon predict`: the PCR values of a launch, from the files alone.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use hv::launch::{MleHeader, PCR_CODE, PCR_CONFIG, POLICY, event};
use loader::image::{check_kernel, check_mle, check_slb};
use loader::senter;
use serde_json::json;
use tpm::log::extended;
use tpm::{Bank, Digest, HashAlg, digest_of};
use vmx::txt::acm::Sinit;
use zerocopy::{FromBytes, IntoBytes};

use crate::txt;
use crate::values::{alg, name};

/// Arguments of `cordon predict`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Secure loader block: a launch by SKINIT
    #[arg(long, value_name = "FILE", required_unless_present = "sinit", conflicts_with = "sinit")]
    slb: Option<PathBuf>,
    /// SINIT module: a launch by SENTER
    #[arg(long, value_name = "FILE")]
    sinit: Option<PathBuf>,
    #[command(flatten)]
    platform: PlatformArguments,
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

/// What SINIT measures and no file has. An earlier log of the platform shows each as an event's data.
#[derive(clap::Args)]
struct PlatformArguments {
    /// Data of the platform's BIOSAC_REG_DATA event; zeros if not given
    #[arg(long, value_name = "HEX", requires = "sinit", value_parser = bytes)]
    biosac: Option<Bytes>,
    /// S-CRTM status
    #[arg(long, value_name = "N", requires = "sinit", default_value_t = 0)]
    scrtm: u32,
    /// Control field of the launch control policy
    #[arg(long, value_name = "N", requires = "sinit", default_value_t = 0)]
    lcp_control: u32,
}

/// Not a `Vec`, which clap would take for an option that may be repeated.
type Bytes = std::sync::Arc<[u8]>;

fn bytes(text: &str) -> Result<Bytes> {
    hex::decode(text).map(Bytes::from).context("not hexadecimal digits in pairs")
}

/// What the CPU starts with.
enum Root {
    /// SKINIT: the secure loader block.
    Slb(Vec<u8>),
    /// SENTER: the data of SINIT's events.
    Sinit(Vec<txt::Event>),
}

/// What a launch measures, as bytes.
struct Inputs {
    root: Root,
    mle: Vec<u8>,
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    cmdline: Vec<u8>,
    config: Vec<u8>,
}

/// One measurement.
struct Measured {
    pcr: u32,
    event: String,
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
            println!("  # PCR {pcr} {event:<20} {digest}");
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
        let refused = |error, path: &PathBuf| anyhow!("{}: {error}", path.display());
        let mle = crate::read(&arguments.mle)?;
        // What the loader would refuse has no launch to predict.
        check_mle(&mle, mle.len() as u64).map_err(|e| refused(e, &arguments.mle))?;
        let root = match (&arguments.slb, &arguments.sinit) {
            (Some(path), _) => {
                let slb = crate::read(path)?;
                check_slb(&slb, slb.len() as u64).map_err(|e| refused(e, path))?;
                Root::Slb(slb)
            }
            (None, Some(path)) => {
                let file = crate::read(path)?;
                let events = sinits_events(&file, &mle, &arguments.platform);
                Root::Sinit(events.with_context(|| path.display().to_string())?)
            }
            (None, None) => bail!("neither --slb nor --sinit"),
        };
        let inputs = Self {
            root,
            mle,
            kernel: crate::read(&arguments.kernel)?,
            initrd,
            cmdline,
            config: optional(&arguments.config)?,
        };
        check_kernel(&inputs.kernel, inputs.cmdline.len() as u64)
            .map_err(|e| refused(e, &arguments.kernel))?;
        Ok(inputs)
    }
}

/// What SENTER and SINIT extend for this module and this image.
fn sinits_events(file: &[u8], mle: &[u8], platform: &PlatformArguments) -> Result<Vec<txt::Event>> {
    let sinit = Sinit::parse(file).map_err(|e| anyhow!("{e}"))?;
    let (header, _) = MleHeader::read_from_prefix(mle).map_err(|_| anyhow!("the MLE has no header"))?;
    let header = senter::mle_header(mle, header.txt_header.get())?;
    let platform = txt::Platform {
        biosac: platform.biosac.as_deref().unwrap_or(&[0; txt::BIOSAC_SIZE]).to_vec(),
        scrtm: platform.scrtm,
        lcp_control: platform.lcp_control,
    };
    txt::events(&sinit, senter::capabilities(&sinit, &header)?, mle, &platform)
}

/// What the CPU, the SLB stage or SINIT, and the MLE measure, in their order.
fn measurements(inputs: &Inputs, alg: HashAlg) -> Result<Vec<Measured>> {
    let hash = |data: &[u8]| digest_of(alg, &[data]).context("a bank that cannot be computed");
    let mut events = Vec::new();
    let mut measure = |pcr, event: &str, data: &[u8]| {
        events.push(Measured { pcr, event: event.to_owned(), digest: hash(data)? });
        anyhow::Ok(())
    };
    match &inputs.root {
        Root::Slb(slb) => {
            // The SLB stage hashes the image itself and lets the TPM hash that digest in all its banks.
            let mle = digest_of(HashAlg::SHA256, &[&inputs.mle]).context("SHA-256")?;
            measure(PCR_CODE, event::SLB, slb)?;
            measure(PCR_CODE, event::MLE, mle.as_bytes())?;
        }
        Root::Sinit(theirs) => {
            theirs
                .iter()
                .try_for_each(|e| measure(e.pcr, &txt::name(e.kind).unwrap_or_default(), &e.data))?;
        }
    }
    measure(PCR_CONFIG, event::POLICY, POLICY.as_bytes())?;
    for (event, data) in [
        (event::CONFIG, &inputs.config),
        (event::KERNEL, &inputs.kernel),
        (event::INITRD, &inputs.initrd),
        (event::CMDLINE, &inputs.cmdline),
    ] {
        measure(PCR_CONFIG, event, data)?;
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
