//! The mle image.
fn main() {}
