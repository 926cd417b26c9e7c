//! The loader: a UEFI application, thin around the library.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
extern crate alloc;

#[cfg(target_os = "uefi")]
mod app;

/// The application exists for `x86_64-unknown-uefi` alone; here it is a name that says so.
#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("loader is not a program: build it with --target x86_64-unknown-uefi");
    std::process::exit(1);
}
