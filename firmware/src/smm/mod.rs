//! System Management Mode: what can be known of it, what is asked of it, and what it left behind.
//!
//! SMM runs firmware with access to all memory, and common hardware lets nobody refuse it. What is done is to
//! say how far it is locked down ([`facts`]), to let the sandbox ask of it only what the policy allows
//! ([`communicate`]), and to look for damage after it ran ([`check`]). See `docs/smm.md`.

pub mod check;
pub mod communicate;
pub mod facts;
