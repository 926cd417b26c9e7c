//! The secure loader block: a thin image around [`mle::slb`].
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod image;

/// The image exists for `x86_64-unknown-none` alone; here it is a name that says so.
#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("slb is not a program: build it with --target x86_64-unknown-none");
    std::process::exit(1);
}
