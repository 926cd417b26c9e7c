//! What GETSEC\[SENTER\] and SINIT extend, in the order of details and authorities, without a launch control policy.
//!
//! Spec: \[TXT\] "TPM 2.0 PCR Usage", "TPM Event Log".

use anyhow::{Context, Result, anyhow};
use hv::launch::{PCR_CODE, PCR_CONFIG};
use tpm::{HashAlg, digest_of};
use vmx::txt::acm::Sinit;

/// First of SINIT's event types.
const BASE: u32 = 0x400;
/// Length of BIOSAC_REG_DATA.
pub const BIOSAC_SIZE: usize = 20;

/// Types of SINIT's events, from [`BASE`] on, and their names.
const NAMES: [(u32, &str); 20] = [
    (0, "EVTYPE_BASE"),
    (1, "PCRMAPPING"),
    (2, "HASH_START"),
    (3, "COMBINED_HASH"),
    (4, "MLE_HASH"),
    (10, "BIOSAC_REG_DATA"),
    (11, "CPU_SCRTM_STAT"),
    (12, "LCP_CONTROL_HASH"),
    (13, "ELEMENTS_HASH"),
    (14, "STM_HASH"),
    (15, "OSSINITDATA_CAP_HASH"),
    (16, "SINIT_PUBKEY_HASH"),
    (17, "LCP_HASH"),
    (18, "LCP_DETAILS_HASH"),
    (19, "LCP_AUTHORITIES_HASH"),
    (20, "NV_INFO_HASH"),
    (21, "COLD_BOOT_BIOS_HASH"),
    (22, "KM_HASH"),
    (23, "BPM_HASH"),
    (255, "CAP_VALUE"),
];

const HASH_START: u32 = BASE + 2;
const MLE_HASH: u32 = BASE + 4;
const BIOSAC: u32 = BASE + 10;
const SCRTM: u32 = BASE + 11;
const LCP_CONTROL: u32 = BASE + 12;
const STM: u32 = BASE + 14;
const OSSINIT_CAP: u32 = BASE + 15;
const PUBKEY: u32 = BASE + 16;

/// The name of an event type of SINIT's, if it is one.
pub fn name(kind: u32) -> Option<String> {
    let number = kind.checked_sub(BASE).filter(|number| *number < 0x100)?;
    let known = NAMES.iter().find(|(n, _)| *n == number);
    Some(known.map_or_else(|| format!("{kind:#x}"), |(_, name)| (*name).to_owned()))
}

/// One measurement.
pub struct Event {
    /// Which PCR.
    pub pcr: u32,
    /// Its type.
    pub kind: u32,
    /// What is hashed, in each bank.
    pub data: Vec<u8>,
}

/// What the platform adds.
pub struct Platform {
    /// BIOSAC_REG_DATA.
    pub biosac: Vec<u8>,
    /// S-CRTM status.
    pub scrtm: u32,
    /// PolicyControl of the launch control policy.
    pub lcp_control: u32,
}

/// All of a launch of `image` by `sinit`, asked for with `capabilities`.
pub fn events(sinit: &Sinit<'_>, capabilities: u32, image: &[u8], platform: &Platform) -> Result<Vec<Event>> {
    // SENTER's parameters, which the loader leaves at zero.
    const EDX: [u8; 4] = [0; 4];
    // No STM.
    const NO_STM: [u8; 1] = [0];
    let sha256 = |data: &[&[u8]]| {
        let digest = digest_of(HashAlg::SHA256, data).context("SHA-256")?;
        anyhow::Ok(digest.as_bytes().to_vec())
    };
    let module = sha256(&sinit.signed())?;
    let key = sha256(&[sinit.key().map_err(|e| anyhow!("{e}"))?])?;
    let word = |value: u32| value.to_le_bytes().to_vec();
    let of = |pcr, kind, data| Event { pcr, kind, data };
    Ok(vec![
        of(PCR_CODE, HASH_START, [module, EDX.to_vec()].concat()),
        of(PCR_CODE, BIOSAC, platform.biosac.clone()),
        of(PCR_CODE, SCRTM, word(platform.scrtm)),
        of(PCR_CODE, LCP_CONTROL, word(platform.lcp_control)),
        of(PCR_CODE, STM, NO_STM.to_vec()),
        of(PCR_CODE, OSSINIT_CAP, word(capabilities)),
        of(PCR_CODE, MLE_HASH, image.to_vec()),
        of(PCR_CONFIG, PUBKEY, key),
        of(PCR_CONFIG, SCRTM, word(platform.scrtm)),
        of(PCR_CONFIG, OSSINIT_CAP, word(capabilities)),
        of(PCR_CONFIG, LCP_CONTROL, word(platform.lcp_control)),
    ])
}
