//! `cordon`: predicts and verifies what a launch measures, and shows what firmware did since.

mod exposures;
mod predict;
mod report;
mod show;
mod source;
mod text;
mod txt;
mod values;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Predicts and verifies what a Cordon launch measures, and shows what firmware did since.
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
    /// Replay the event logs and compare them with PCR values; exit status 1 when they differ
    Verify(verify::Arguments),
    /// Print what is in force
    Status(show::StatusArguments),
    /// Print the exposure log: each record of what firmware did
    Log(show::LogArguments),
    /// Print how often firmware ran, what for, and what it cost
    Exposure(show::ExposureArguments),
    /// Ask for a service that the configuration has locked
    Unlock(show::UnlockArguments),
    /// Write all of it as one page for a browser; exit status 1 when PCR values differ
    Report(report::Arguments),
}

fn main() -> ExitCode {
    // `cordon log | head` ends as other tools do, and not by a panic at a closed pipe.
    sigpipe::reset();
    let outcome = match Arguments::parse().command {
        Command::Predict(arguments) => predict::run(&arguments).map(|()| true),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Status(arguments) => show::status(&arguments).map(|()| true),
        Command::Log(arguments) => show::log(&arguments),
        Command::Exposure(arguments) => show::exposure(&arguments).map(|()| true),
        Command::Unlock(arguments) => show::unlock(&arguments).map(|()| true),
        Command::Report(arguments) => report::run(&arguments),
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
