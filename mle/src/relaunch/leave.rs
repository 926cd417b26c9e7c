//! The old MLE's half: out of the launch and back.
//!
//! UNSAFETY: gives the machine to firmware, and takes it again from a launch that vouches for what it put back.
#![expect(unsafe_code, reason = "gives up the machine and takes it back")]

use core::fmt;

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::{Clock, Mmio, Msr, PhysMem};
use hv::launch::{
    Blob, CordonEntry, FLAG_RESUME, MLE_VERSION, MleHeader, PCR_CODE, PCR_CONFIG, PCR_EXPOSURE, PCR_FIRMWARE,
    SLB_IMAGE_MAX, SLB_SLRT_POINTER_OFFSET, policy_entries,
};
use hv::radix::PageSize;
use hv::slrt::{
    ARCH_SKINIT, Builder, DlInfo, LOG_FORMAT_TPM2, LogInfo, SlrtError, TAG_CORDON, TAG_DL_INFO, TAG_LOG_INFO,
    entry_header,
};
use sha256::Sha256Blocks;
use tpm::{Contention, Locality, Ticket, Tpm};
use zerocopy::{FromZeros, IntoBytes};

use super::digest::{Digest, Hash};
use super::edge::{self, Context};
use super::{Answer, Block, Error, Header, MAGIC, RAM_MAX, Step, Took, at, ticks};
use crate::apic::{self, Xapic};
use crate::inputs::Inputs;
use crate::metal::{Identity, Msrs, PhysWindow, TscClock};
use crate::pool::PagePool;
use crate::services::GapCall;
use crate::{memory, paging, smp};

/// Where in the launch page SKINIT is issued, as by the loader.
const SKINIT_OFFSET: u64 = 0xf0;
/// SKINIT, and UD2 behind it.
const SKINIT: [u8; 5] = [0x0f, 0x01, 0xde, 0x0f, 0x0b];
const EFER: u32 = 0xc000_0080;
const EFER_SVME: u64 = 1 << 12;

/// What rounds need, prepared while there is still only this launch.
pub struct Plan {
    block: Block,
    header: Header,
    /// The SLB, and bytes of it that SKINIT measures.
    slb: PhysRange,
    slb_image: u64,
    /// The MLE's file.
    mle_image: u64,
    launch_page: u64,
    /// The SLRT of the next launch.
    slrt: ([u8; hv::slrt::MAX_SIZE], usize),
    /// Root of tables that map all memory with all rights.
    open_tables: u64,
    mem: Identity,
    clock: TscClock,
    hash: Hash,
}

/// With what rounds are made.
pub struct Means<'a> {
    /// Physical memory.
    pub mem: Identity,
    /// The first address past it.
    pub ram_end: u64,
    /// Time.
    pub clock: TscClock,
    /// The CPU's own way of hashing.
    pub sha256: Option<Sha256Blocks>,
    /// Pages of the region.
    pub pool: &'a mut PagePool,
}

/// Why there can be no rounds.
#[derive(Clone, Copy, Debug)]
pub enum PlanError {
    /// The boot entry does not keep memory for them.
    NoMemory,
    /// The TPM's PCRs 17 and 18 do not hold the launch.
    NoPcrs,
    /// Only a launch by SKINIT can be done again.
    NoSkinit,
    /// Too many ranges of memory.
    TooMany,
    /// The event log is longer than there is room for.
    LogSize(u64),
    /// Memory that is not there.
    Unreadable(u64),
    /// The table of the next launch.
    Slrt(SlrtError),
    /// Page tables.
    Tables(hv::radix::Error),
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("policy relaunch: ")?;
        match self {
            Self::NoMemory => f.write_str("the boot entry has no `cordon-relaunch allow`"),
            Self::NoPcrs => f.write_str("PCRs 17 and 18 do not hold this launch (no TPM locality 2)"),
            Self::NoSkinit => f.write_str("only a launch by SKINIT can be done again"),
            Self::TooMany => write!(f, "guest memory has more than {RAM_MAX} ranges"),
            Self::LogSize(size) => write!(f, "the event log's area has {size} bytes, limit {}", at::LOG_SIZE),
            Self::Unreadable(at) => write!(f, "{at:#x} cannot be read or written"),
            Self::Slrt(e) => write!(f, "{e}"),
            Self::Tables(e) => write!(f, "page tables: {e}"),
        }
    }
}

impl Plan {
    /// Prepares rounds. `guest` is all that the guest has of memory, `code` the bytes of this image's code, `slb_image` what SKINIT
    /// measured, `pcr` the one that counts rounds.
    pub fn new(
        inputs: &Inputs,
        guest: impl Iterator<Item = PhysRange>,
        code: u64,
        slb_image: &PhysRange,
        pcr: u32,
        means: Means<'_>,
    ) -> Result<Self, PlanError> {
        let Means { mem, ram_end, clock, sha256, pool } = means;
        let block = inputs.relaunch.ok_or(PlanError::NoMemory)?;
        let slb = inputs.slb.ok_or(PlanError::NoSkinit)?;
        if inputs.tpm_degraded {
            return Err(PlanError::NoPcrs);
        }
        if inputs.log.len() > at::LOG_SIZE {
            return Err(PlanError::LogSize(inputs.log.len()));
        }
        let mut header = Header::new_zeroed();
        header.magic = MAGIC;
        header.pcr = pcr.into();
        header.region = inputs.region.start();
        header.code = code;
        header.launch_page = inputs.launch_page.start();
        header.entry = edge::resume_entry as *const () as u64;
        for range in guest.map(|range| range.page_outward()) {
            let slot = usize::try_from(header.count).ok().and_then(|index| header.ram.get_mut(index));
            *slot.ok_or(PlanError::TooMany)? = [range.start(), range.last()];
            header.count = header.count.saturating_add(1);
        }
        let map = PhysRange::new(block.at(at::MAP), inputs.memory_map.len()).ok_or(PlanError::NoMemory)?;
        memory::copy(&mem, inputs.memory_map.start(), &map).map_err(|r| PlanError::Unreadable(r.start()))?;
        let slb_copy = PhysRange::new(block.at(at::SLB), slb_image.len().min(SLB_IMAGE_MAX));
        let slb_copy = slb_copy.ok_or(PlanError::NoMemory)?;
        memory::copy(&mem, slb_image.start(), &slb_copy).map_err(|r| PlanError::Unreadable(r.start()))?;
        // In the region, not in the block: the gap must not choose what the next round runs on. CPUs with SKINIT have pages of
        // 1 GiB; the SLB stage needs them too.
        let open_tables = paging::open_to(pool, ram_end, PageSize::Size1G).map_err(PlanError::Tables)?;
        let mut mle = MleHeader::new_zeroed();
        if !mem.read(inputs.region.start(), mle.as_mut_bytes()) {
            return Err(PlanError::Unreadable(inputs.region.start()));
        }
        let slrt = slrt(inputs, &block, &slb, slb_image.len(), &mle, map).map_err(PlanError::Slrt)?;
        Ok(Self {
            block,
            header,
            slb,
            slb_image: slb_image.len(),
            mle_image: mle.image_size.get(),
            launch_page: inputs.launch_page.start(),
            slrt,
            open_tables,
            mem,
            clock,
            hash: Hash::new(sha256),
        })
    }
}

/// The table for the next launch.
fn slrt(
    inputs: &Inputs,
    block: &Block,
    slb: &PhysRange,
    slb_image: u64,
    mle: &MleHeader,
    map: PhysRange,
) -> Result<([u8; hv::slrt::MAX_SIZE], usize), SlrtError> {
    let blob = |range: PhysRange| Blob { base: range.start().into(), size: range.len().into() };
    let mut builder = Builder::new(ARCH_SKINIT);
    builder.entry(&DlInfo {
        hdr: entry_header::<DlInfo>(TAG_DL_INFO),
        dce_size: slb_image.into(),
        dce_base: slb.start().into(),
        dlme_size: mle.image_size,
        dlme_base: block.fresh.start().into(),
        dlme_entry: u64::from(mle.entry.get()).into(),
        ..DlInfo::new_zeroed()
    })?;
    builder.entry(&LogInfo {
        hdr: entry_header::<LogInfo>(TAG_LOG_INFO),
        format: LOG_FORMAT_TPM2.into(),
        reserved: 0.into(),
        size: (inputs.log.len() as u32).into(),
        addr: inputs.log.start().into(),
    })?;
    builder.policy(&policy_entries([Blob::default(); 4]))?;
    let (size, version) = inputs.descriptor;
    builder.entry(&CordonEntry {
        hdr: entry_header::<CordonEntry>(TAG_CORDON),
        version: MLE_VERSION.into(),
        flags: FLAG_RESUME.into(),
        mle_region: blob(block.fresh),
        efi_memory_map: blob(map),
        efi_descriptor_size: size.into(),
        efi_descriptor_version: version.into(),
        efi_system_table: inputs.efi_system_table.into(),
        acpi_rsdp: inputs.acpi_rsdp.into(),
        launch_page: inputs.launch_page.start().into(),
        relaunch: blob(block.whole),
        ..CordonEntry::new_zeroed()
    })?;
    builder.finish()
}

/// What a round brought.
pub struct Round {
    /// Firmware's RAX.
    pub rax: u64,
    /// Its number, from 1.
    pub number: u64,
    /// Where the new launch's event log is, until the next round.
    pub log: u64,
    /// Bytes of it.
    pub log_size: usize,
    /// How long it took.
    pub took: Took,
}

/// A round under way, on the stack of the MLE that goes and comes back.
#[repr(C)]
struct Leaving<'a> {
    context: Context,
    plan: &'a mut Plan,
    call: GapCall,
    log: &'a [u8],
    failed: Option<Error>,
}

impl Plan {
    /// Has firmware carry out `call` between this launch and the next. The CPU's state is in memory, DMA of the guest's devices is
    /// off, and nobody else uses the TPM. `log` is this launch's event log.
    ///
    /// # Errors
    /// [`Error::Cap`]: there is no going on. Any other: nothing happened.
    pub fn round(&mut self, call: GapCall, log: &[u8]) -> Result<Round, Error> {
        let mut leaving = Leaving { context: Context::default(), plan: self, call, log, failed: None };
        let (root, stack) = (leaving.plan.open_tables, leaving.plan.block.at(at::STACK_TOP));
        let context = &raw mut leaving.context;
        // SAFETY: these tables map all of memory with all rights: image, region, block. The stack in the block is nobody
        // else's. Whoever resumes has put all memory back as `leave` copied it, and `leave` copies while it runs.
        unsafe { edge::suspend(context, &raw mut leaving, leave, root, stack) };
        if let Some(error) = leaving.failed {
            return Err(error);
        }
        let Self { block, mem, .. } = self;
        let answer = Answer::read(block, mem);
        let header = Header::read(block, mem)?;
        self.header.round = header.round;
        // The new launch wrote where its log is after it had verified all else.
        let log_size = usize::try_from(answer.log_size).unwrap_or(0);
        let (rax, log) = (answer.rax, answer.log);
        let took = Took::of(&answer, self.clock.khz);
        Ok(Round { rax, number: header.round, log, log_size, took })
    }
}

/// Copies, makes digests, has the TPM vouch; then the gap. Goes back at once if something fails before the launch is given up.
unsafe extern "sysv64" fn leave(leaving: *mut Leaving<'_>) -> ! {
    // SAFETY: `Plan::round` gave its own, and waits.
    let this = unsafe { &mut *leaving };
    if let Err(error) = this.prepare() {
        this.failed = Some(error);
        // SAFETY: nothing was given up: memory is as it was but for that word.
        unsafe { edge::resume_entry(&raw const this.context) }
    }
    // SAFETY: SVM is on; what is pending may come now, and interrupts are off. From here on no virtual CPU runs.
    unsafe {
        svm::insn::stgi();
        let msrs = Msrs::new();
        msrs.wrmsr(EFER, msrs.rdmsr(EFER) & !EFER_SVME);
    }
    this.gap()
}

impl Leaving<'_> {
    fn prepare(&mut self) -> Result<(), Error> {
        let Plan { block, mem, hash, slrt: (slrt, slrt_used), .. } = &*self.plan;
        let mut answer = Answer::new_zeroed();
        answer.note(Step::Start, ticks());
        let mut header = self.plan.header;
        header.round = header.round.saturating_add(1);
        header.context = &raw const self.context as u64;
        header.log = self.log.len() as u64;
        let write = |offset, bytes: &[u8]| {
            let address = block.at(offset);
            if mem.write(address, bytes) { Ok(()) } else { Err(Error::Unreadable { address }) }
        };
        write(at::SLRT, slrt.get(..*slrt_used).unwrap_or_default())?;
        write(at::LOG, self.log)?;
        if let Some(copy) = block.launch_page() {
            memory::copy(mem, header.launch_page, &copy)
                .map_err(|range| Error::Unreadable { address: range.start() })?;
        }
        // SAFETY: the tables in force map all; the page in the block is nobody else's.
        unsafe { edge::copy_page(0, block.at(at::PAGE_0)) };
        memory::copy(mem, header.region, &block.copy)
            .map_err(|range| Error::Unreadable { address: range.start() })?;
        hash.write(&header, block, mem)?;
        let root = hash.root(&header, block, mem)?;
        answer.note(Step::Digests, ticks());

        // SAFETY: the TPM's pages are mapped; its other user, the exposure log, has released it and does not run.
        let window = unsafe { PhysWindow::new(tpm::BASE, tpm::WINDOW_SIZE) };
        let mut tpm = Tpm::open(window, self.plan.clock, Locality::Two, Contention::SHARED)?;
        let ticket = end_launch(&mut tpm, &header, &root);
        tpm.release();
        let ticket = ticket?;
        (answer.ticket_size, answer.ticket) = (ticket.size, ticket.digest);
        answer.note(Step::Vouched, ticks());
        write(at::HEADER, header.as_bytes())?;
        answer.write(block, mem);
        Ok(())
    }
}

/// Has the TPM note `root` as this launch's word, and ends the launch's PCRs.
///
/// # Errors
/// [`Error::Cap`]: some of them may have ended. Any other: none has.
pub(super) fn end_launch<M: Mmio, C: Clock>(
    tpm: &mut Tpm<M, C>,
    header: &Header,
    root: &Digest,
) -> Result<Ticket, Error> {
    // From now on nothing that was vouched for in an earlier round is good.
    tpm.extend(header.pcr as u32, &tpm.digests_of(header.round.as_bytes()))?;
    let ticket = tpm.vouch(&header.pcrs(), root)?;
    tpm.cap(&[PCR_CODE, PCR_CONFIG, PCR_FIRMWARE, PCR_EXPOSURE]).map_err(Error::Cap)?;
    Ok(ticket)
}

impl Leaving<'_> {
    /// The gap: firmware may do what it likes; what the next launch is told is its word alone.
    fn gap(&mut self) -> ! {
        let Self { plan, call, .. } = self;
        let Plan { block, mem, slb, .. } = &**plan;
        let mut answer = Answer::read(block, mem);
        // SAFETY: the frame is on firmware's own stack, and everything is mapped with all rights. What firmware does to this
        // program is found out, or else the next launch is another.
        answer.rax = unsafe { edge::call_firmware(call) };
        answer.note(Step::Firmware, ticks());
        answer.write(block, mem);
        for (from, to, size) in [
            (block.at(at::SLB), slb.start(), plan.slb_image),
            (block.mle_file(), block.fresh.start(), plan.mle_image),
        ] {
            if let Some(to) = PhysRange::new(to, size) {
                // What cannot be copied is not measured as what it should be.
                let _ = memory::copy(mem, from, &to);
            }
        }
        let pointer = slb.start().saturating_add(SLB_SLRT_POINTER_OFFSET);
        mem.write(pointer, &block.at(at::SLRT).to_le_bytes());
        let code = plan.launch_page.saturating_add(SKINIT_OFFSET);
        mem.write(code, &SKINIT);
        if smp::count() > 1 {
            // SAFETY: the APIC's page is mapped; its memory type is the MTRRs'.
            let local = Xapic(unsafe { PhysWindow::new(apic::XAPIC_BASE, PAGE_SIZE as u32) });
            smp::reset_others(&local, &plan.clock);
        }
        // SAFETY: the launch page is mapped with all rights and holds SKINIT.
        unsafe { edge::skinit(code, slb.start() as u32) }
    }
}
