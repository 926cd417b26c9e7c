//! Cordon's own variables, as the guest reads them.

use core::fmt::Write;

use firmware::call::{OwnVariable, OwnVariables};
use firmware::sandbox::Sandbox;
use heapless::String;

use crate::exposure::told;
use crate::guest::pci;
use crate::relaunch::Took;
use crate::{dma, exposure, run, smi};

/// Bytes of the variables that are text, zeros after it: Linux asks for a variable's size first, and fails when it has grown
/// before it reads it.
const TEXT: usize = 4096;

/// Contents of Cordon's own variables.
pub(super) struct Own<'a> {
    pub(super) log: &'a [u8],
    pub(super) status: &'a str,
    pub(super) sandbox: &'a Sandbox,
    pub(super) relaunched: Option<(u64, Took)>,
}

impl OwnVariables for Own<'_> {
    fn fill(&self, which: OwnVariable, out: &mut [u8]) -> usize {
        let mut text = String::<TEXT>::new();
        match which {
            OwnVariable::DrtmLog => return put(self.log, out),
            OwnVariable::Exposure => return exposure::write_log(out),
            OwnVariable::Status => {
                let c = self.sandbox.counters();
                // The room is enough for all of it.
                let _ = writeln!(text, "{}sandbox: {:?}", self.status, self.sandbox.state());
                let _ = writeln!(
                    text,
                    "calls: {}, {} of them native, exits {}, SMIs {}",
                    c.calls, c.native, c.exits, c.smis
                );
                let _ = writeln!(
                    text,
                    "denied ports: {}, denied MSRs: {}, restarts: {}, longest call {} us",
                    c.denied_ports, c.denied_msrs, c.restarts, c.longest_us
                );
                if let Some((round, took)) = &self.relaunched {
                    let _ = writeln!(text, "relaunches: {round}, of the last {took}");
                }
                let e = exposure::counters();
                let _ = writeln!(
                    text,
                    "exposure: {} records in {} batches, {} spilled, {} lost, {} batches late",
                    e.records, e.batches, e.spilled, e.lost, e.late
                );
                run::write_refusals(&mut text);
                pci::write_dropped(&mut text);
                dma::write_stopped(&mut text);
                told::write(&mut text);
                smi::write_guarded(&mut text);
            }
            OwnVariable::Exits => run::write_counts(&mut text),
        }
        let used = put(text.as_bytes(), out);
        let size = TEXT.min(out.len());
        out.get_mut(used..size).unwrap_or_default().fill(0);
        size
    }
}

/// Copies as much of `content` as there is room for.
fn put(content: &[u8], out: &mut [u8]) -> usize {
    let len = content.len().min(out.len());
    if let (Some(to), Some(from)) = (out.get_mut(..len), content.get(..len)) {
        to.copy_from_slice(from);
    }
    len
}
