//! The slb image.
fn main() {}
