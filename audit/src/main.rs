//! `cordon`: predict and verify what a launch measures.

mod predict;
mod values;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Predicts and verifies what a Cordon launch measures.
#[derive(Parser)]
#[command(name = "cordon", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the PCR values that a launch of these files gives
    Predict(predict::Arguments),
    /// Replay an event log and compare it with PCR values; exit status 1 when they differ
    Verify(verify::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Predict(arguments) => predict::run(&arguments).map(|()| true),
        Command::Verify(arguments) => verify::run(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cordon: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Reads a file whole.
fn read(path: &PathBuf) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
