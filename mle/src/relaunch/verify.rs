//! The new MLE's half: whether the guest may go on.
//!
//! UNSAFETY: runs what it put back.
#![expect(unsafe_code, reason = "jumps into memory that was verified")]

use core::convert::Infallible;

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::launch::{LAUNCH_PAGE_SIZE, PCR_CONFIG};
use hv::radix::{MemoryType, Rights, Tables};
use log::info;
use sha256::Sha256Blocks;
use tpm::{Contention, Locality, Log, Ticket, Tpm};

use super::digest::Hash;
use super::{Answer, Block, Error, Header, Step, at, edge, ticks};
use crate::measure::{MeasureError, Measurer};
use crate::memory;
use crate::metal::{Identity, PhysWindow, TscClock};
use crate::pool::PagePool;

/// A guest that waits in memory, by the gap's word.
pub struct Waiting {
    block: Block,
    header: Header,
    hash: Hash,
    mem: Identity,
}

impl Waiting {
    /// Reads the hand-over. DMA is denied, so what is read stays as it is.
    ///
    /// # Errors
    /// [`Error::Header`] names a field that cannot be used.
    pub fn read(block: Block, mem: Identity, sha256: Option<Sha256Blocks>) -> Result<Self, Error> {
        info!("a guest waits in {}", block.whole);
        Ok(Self { block, header: Header::read(&block, &mem)?, hash: Hash::new(sha256), mem })
    }

    /// Extends PCR 18 with what its launch was measured as: kernel and initrd are not in memory any more. Whether that is
    /// true shows when the TPM is asked; until then nothing runs that the PCR could vouch for.
    ///
    /// # Errors
    /// The TPM's or the log's.
    pub fn measure(&self, measurer: &mut Measurer<'_>, pool: &mut PagePool) -> Result<(), MeasureError> {
        let size = usize::try_from(self.header.log).unwrap_or(0);
        let bytes = pool.bytes(size).unwrap_or_default();
        self.mem.read(self.block.at(at::LOG), bytes);
        let log = Log::parse(bytes)?;
        let mut of_guest = log.events().filter(|event| event.as_ref().map_or(true, |e| e.pcr == PCR_CONFIG));
        // The SLRT's policy, which was measured already.
        let _ = of_guest.next();
        of_guest.try_for_each(|event| measurer.repeat(&event?))
    }

    /// Verifies, puts the old MLE back and enters it. `log` is this launch's event log.
    ///
    /// # Errors
    /// [`Error`]: something is not as it was left, and the launch has to end.
    pub fn go_on(
        &self,
        tpm: &mut Tpm<PhysWindow, TscClock>,
        log: &[u8],
        (own, pool): (&Tables, &mut PagePool),
    ) -> Result<Infallible, Error> {
        let Self { block, header, hash, mem } = self;
        let mut answer = Answer::read(block, mem);
        answer.note(Step::Launched, ticks());
        let root = hash.root(header, block, mem)?;
        let ticket = Ticket { size: answer.ticket_size, digest: answer.ticket };
        tpm.acquire(Locality::Two, Contention::LAUNCH)?;
        let vouched = tpm.vouched(&header.pcrs(), &root, &ticket);
        tpm.release();
        if !vouched? {
            return Err(Error::Unknown);
        }
        hash.verify(header, block, mem)?;
        let region = PhysRange::new(header.region, block.copy.len())
            .ok_or(Error::Header { field: "region", value: header.region })?;
        memory::copy(mem, block.copy.start(), &region)
            .map_err(|range| Error::Unreadable { address: range.start() })?;
        let launch_page = PhysRange::new(header.launch_page, LAUNCH_PAGE_SIZE);
        if let (Some(copy), Some(page)) = (block.launch_page(), launch_page) {
            memory::copy(mem, copy.start(), &page)
                .map_err(|range| Error::Unreadable { address: range.start() })?;
        }
        if let Some(page_0) = PhysRange::new(0, PAGE_SIZE) {
            own.map_identity(pool, page_0, Rights::READ.union(Rights::WRITE), MemoryType::WriteBack)?;
            // SAFETY: mapped now, and the guest's.
            unsafe { edge::copy_page(block.at(at::PAGE_0), 0) };
        }
        let code = PhysRange::new(region.start(), header.code).unwrap_or(region);
        own.protect(pool, code, Rights::READ.union(Rights::EXEC))?;
        (answer.log, answer.log_size) = (log.as_ptr() as u64, log.len() as u64);
        answer.note(Step::Verified, ticks());
        answer.write(block, mem);
        info!("the guest's memory is as it was left: it goes on");
        // SAFETY: the code is what the old launch had there, by a root that the TPM knows from it, and is executable from the
        // flush on; entry and context are that launch's words too.
        unsafe {
            x86::tlb::flush_all();
            edge::jump(header.entry, header.context)
        }
    }
}
