//! A bare machine's program that runs a guest by the MLE's own back end: see `metal`.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod guest;
#[cfg(target_os = "none")]
mod linux;
#[cfg(target_os = "none")]
mod metal;
#[cfg(target_os = "none")]
mod sandbox;

/// The image exists for `x86_64-unknown-none` alone; here it is a name that says so.
#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("bare is not a program: build it with --target x86_64-unknown-none");
    std::process::exit(1);
}
