//! Hands the linker script of the flat image to the linker.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed={here}/bare.ld");
    println!("cargo:rustc-link-arg-bin=bare=-T{here}/bare.ld");
    println!("cargo:rustc-link-arg-bin=bare=--no-pie");
}
