//! What `cordon predict` says of a machine's launch.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::machine::{Board, Spec};
use crate::paths;

/// SHA-256 values of PCR 17 and 18 for the files and the command line of `spec`, by the PCRs' numbers.
pub fn pcrs(spec: &Spec) -> Result<serde_json::Value> {
    let (root, file) = match spec.board {
        Board::Amd => ("--slb", spec.slb.clone()),
        Board::Intel => ("--sinit", paths::sinit()),
    };
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "-p", "audit", "--bin", "cordon", "--", "predict", "--json", root])
        .arg(file)
        .arg("--mle")
        .arg(&spec.mle)
        .arg("--kernel")
        .arg(&spec.kernel)
        .arg("--initrd")
        .arg(&spec.initrd)
        .args(["--cmdline", &spec.full_cmdline()])
        .current_dir(paths::root())
        .output()
        .context("cordon predict")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut all: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(all["banks"]["sha256"]["pcrs"].take())
}
