//! Cordon's own variables, as the guest reads them.

use core::fmt::Write;

use firmware::call::{OwnVariable, OwnVariables};
use firmware::sandbox::Sandbox;
use heapless::String;

use crate::guest::pci;
use crate::{dma, exposure, run};

/// Contents of Cordon's own variables.
pub(super) struct Own<'a> {
    pub(super) log: &'a [u8],
    pub(super) status: &'a str,
    pub(super) sandbox: &'a Sandbox,
}

impl OwnVariables for Own<'_> {
    fn fill(&self, which: OwnVariable, out: &mut [u8]) -> usize {
        let mut text = String::<4096>::new();
        let content = match which {
            OwnVariable::DrtmLog => self.log,
            OwnVariable::Status => {
                let c = self.sandbox.counters();
                // 4096 bytes hold all of it.
                let _ = writeln!(text, "{}sandbox: {:?}", self.status, self.sandbox.state());
                let _ = writeln!(text, "calls: {}, exits {}, SMIs {}", c.calls, c.exits, c.smis);
                let _ = writeln!(
                    text,
                    "denied ports: {}, denied MSRs: {}, restarts: {}, longest call {} us",
                    c.denied_ports, c.denied_msrs, c.restarts, c.longest_us
                );
                let e = exposure::counters();
                let _ = writeln!(
                    text,
                    "exposure: {} records in {} batches, {} spilled, {} lost, {} batches late",
                    e.records, e.batches, e.spilled, e.lost, e.late
                );
                run::write_refusals(&mut text);
                pci::write_dropped(&mut text);
                dma::write_stopped(&mut text);
                text.as_bytes()
            }
            OwnVariable::Exits => {
                run::write_counts(&mut text);
                text.as_bytes()
            }
            OwnVariable::Exposure => return exposure::write_log(out),
        };
        let len = content.len().min(out.len());
        if let (Some(to), Some(from)) = (out.get_mut(..len), content.get(..len)) {
            to.copy_from_slice(from);
        }
        len
    }
}
