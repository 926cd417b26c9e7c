//! The MLE image: a thin shell around [`mle::launch`].
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod image;

/// The image exists for `x86_64-unknown-none` alone; here it is a name that says so.
#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("mle is not a program: build it with --target x86_64-unknown-none");
    std::process::exit(1);
}
