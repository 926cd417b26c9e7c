//! Hands the linker scripts of the two flat images to the linker. On the host the binaries are ordinary
//! programs and need none.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for image in ["slb", "mle"] {
        let script = format!("{here}/src/bin/{image}/{image}.ld");
        println!("cargo:rerun-if-changed={script}");
        println!("cargo:rustc-link-arg-bin={image}=-T{script}");
    }
    // A word for 63 places instead of three words for one.
    println!("cargo:rustc-link-arg-bin=mle=--pack-dyn-relocs=relr");
}
