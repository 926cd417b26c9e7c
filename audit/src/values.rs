//! PCR values from where they are at hand: the command line, `tpm2_pcrread`, the kernel's sysfs.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tpm::{Digest, HashAlg};

/// The algorithms whose PCRs can be replayed.
pub const ALGS: [HashAlg; 4] = [HashAlg::SHA1, HashAlg::SHA256, HashAlg::SHA384, HashAlg::SHA512];
/// The PCRs of a PC.
const PCRS: u32 = 24;

/// [`Value::source`] of a value on the command line.
pub const BY_HAND: &str = "--pcr";

/// One value, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// The PCR.
    pub pcr: u32,
    /// Its value in one bank.
    pub digest: Digest,
    /// For the reader of a report.
    pub source: String,
}

/// The bank of a name as public tools write it.
pub fn alg(name: &str) -> Result<HashAlg> {
    ALGS.into_iter()
        .find(|alg| alg.name() == Some(name))
        .ok_or_else(|| anyhow!("bank {name} is none of sha1, sha256, sha384, sha512"))
}

/// The name of an algorithm.
pub fn name(alg: HashAlg) -> String {
    alg.name().map_or_else(|| format!("{:#06x}", alg.0), str::to_owned)
}

fn pcr(text: &str) -> Result<u32> {
    let pcr: u32 = text.trim().parse().with_context(|| format!("PCR {text:?} is no number"))?;
    ensure!(pcr < PCRS, "PCR {pcr} is not below {PCRS}");
    Ok(pcr)
}

/// A digest in hexadecimal; its length tells the bank unless it is given.
fn digest(text: &str, alg: Option<HashAlg>) -> Result<Digest> {
    let text = text.trim();
    let text = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    let bytes = hex::decode(text).with_context(|| format!("digest {text:?}"))?;
    let of_length = |alg: &HashAlg| alg.computed_size().map(usize::from) == Some(bytes.len());
    let alg = match alg {
        None => ALGS.into_iter().find(of_length),
        given => given.filter(of_length),
    };
    let alg =
        alg.ok_or_else(|| anyhow!("digest {text:?} has {} bytes, as none of this bank", bytes.len()))?;
    Digest::new(alg, &bytes).ok_or_else(|| anyhow!("digest {text:?} is empty"))
}

/// `17=HEX` or `sha256:17=HEX`.
pub fn argument(text: &str) -> Result<Value> {
    let (left, value) = text.split_once('=').context("expected [BANK:]PCR=HEX")?;
    let (bank, number) = match left.split_once(':') {
        Some((bank, number)) => (Some(alg(bank)?), number),
        None => (None, left),
    };
    Ok(Value { pcr: pcr(number)?, digest: digest(value, bank)?, source: BY_HAND.to_owned() })
}

/// What `tpm2_pcrread` and `cordon predict` print: the name of a bank and a colon, then lines of
/// `PCR : 0xHEX`. Banks that cannot be replayed are skipped.
pub fn pcrread(text: &str, source: &str) -> Result<Vec<Value>> {
    let mut bank = None;
    let mut values = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (left, right) =
            line.split_once(':').with_context(|| format!("{source}:{number}: no colon in {line:?}"))?;
        if right.trim().is_empty() {
            bank = alg(left.trim()).ok();
            continue;
        }
        let value = || -> Result<Option<Value>> {
            let pcr = pcr(left)?;
            let Some(bank) = bank else { return Ok(None) };
            Ok(Some(Value { pcr, digest: digest(right, Some(bank))?, source: source.to_owned() }))
        };
        values.extend(value().with_context(|| format!("{source}:{number}"))?);
    }
    ensure!(!values.is_empty(), "{source}: no PCR value of a bank that can be replayed");
    Ok(values)
}

/// A TPM's folder in sysfs, with files `pcr-sha256/17`.
pub fn sysfs(folder: &Path) -> Result<Vec<Value>> {
    let mut values = Vec::new();
    for alg in ALGS {
        let bank = folder.join(format!("pcr-{}", name(alg)));
        if !bank.is_dir() {
            continue;
        }
        for pcr in 0..PCRS {
            let path = bank.join(pcr.to_string());
            let source = path.display().to_string();
            let text = match std::fs::read_to_string(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                text => text.with_context(|| format!("cannot read {source}"))?,
            };
            let digest = digest(&text, Some(alg)).with_context(|| source.clone())?;
            values.push(Value { pcr, digest, source });
        }
    }
    if values.is_empty() {
        bail!("{}: no pcr-BANK folder with PCR values", folder.display());
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONES: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

    #[test]
    fn pcrread_output_is_understood() {
        let text = format!(
            "  sha1:\n    0 : 0x{}\n  sm3_256:\n    0 : 0x00\n  sha256:\n    9 : 0x{}\n    17: 0x{}\n",
            &ONES[..40],
            ONES.to_uppercase(),
            ONES
        );
        let values = pcrread(&text, "file").unwrap();
        let found: Vec<_> = values.iter().map(|v| (v.digest.alg(), v.pcr)).collect();
        assert_eq!(found, [(HashAlg::SHA1, 0), (HashAlg::SHA256, 9), (HashAlg::SHA256, 17)]);
        assert_eq!(values[2].digest.to_string(), ONES);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let message = |text: &str| format!("{:#}", pcrread(text, "f").unwrap_err());
        assert_eq!(message("sha256:\n17 0x00"), "f:2: no colon in \"17 0x00\"");
        assert_eq!(message("sha256:\n24 : 0x00"), "f:2: PCR 24 is not below 24");
        assert!(message("sha256:\n17 : 0x0").starts_with("f:2: digest \"0\""));
        assert_eq!(message("sha256:\n17 : 0x00"), "f:2: digest \"00\" has 1 bytes, as none of this bank");
        assert_eq!(message("# nothing"), "f: no PCR value of a bank that can be replayed");
    }

    #[test]
    fn an_argument_tells_its_bank_by_name_or_length() {
        assert_eq!(argument(&format!("17={ONES}")).unwrap().digest.alg(), HashAlg::SHA256);
        assert_eq!(argument(&format!("sha1:17=0x{}", &ONES[..40])).unwrap().pcr, 17);
        for wrong in ["17", "x=00", "17=", "17=zz", "sha1:17=00", "md5:1=00", &format!("sha1:17={ONES}")] {
            assert!(argument(wrong).is_err(), "{wrong}");
        }
    }
}
