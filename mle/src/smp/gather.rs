//! The machine for the first CPU alone: for a call under policy `relaunch`, where all others leave the guest and come back, and for
//! the end of a launch by SENTER, where they do not.
//!
//! | stage | other CPUs |
//! |---|---|
//! | `Free` | run the guest, or are parked |
//! | `Hold` | as soon as nothing is in service in its APIC, each waits in the MLE. If not all come in time, they go on |
//! | `Leave` | each keeps its state on its stack, turns SVM off, and halts there, where SMIs find it |
//! | `Reset` | each waits for INIT |
//! | `End` | each turns VMX off and halts. So does one that ends the launch in the place of the first, which goes on to SEXIT |
//!
//! For a call the memory of the MLE is then put away, and put back by another launch. A Startup IPI starts each CPU as at the launch, and
//! its stack leads it to where it halted.
//!
//! UNSAFETY: gives a CPU up on its stack, and takes it again.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hv::failure::MleError;
use hv::io::{Clock, poll_until};

use super::{KICK_BUDGET_US, MAX_CPUS, NEXT, RESTART_BUDGET_US, ROOT, SETUPS, STACK_TABLE, START_VECTOR};
use super::{Slot, State, count, kick_each, send, slots};
use crate::apic::{Xapic, delivery};
use crate::cpu::{Cpu, Loaded};
use crate::kept_apic::KeptApic;
use crate::metal::{Msrs, PhysWindow, TscClock};
use crate::relaunch::{Context, CpuState, resume_entry, suspend};
use crate::{fatal, paging, smi, trap};

/// Longest wait for all CPUs to come out of the guest, in microseconds, before it goes on: it can be that one waits for another.
const GATHER_BUDGET_US: u64 = 100_000;
/// Longest wait for a CPU in the MLE's own code, in microseconds.
const LEAVE_BUDGET_US: u64 = 1_000_000;
/// Time for an INIT to be carried out, in microseconds, as the loader gives it.
const SETTLE_US: u64 = 20_000;
/// Below where a halted CPU's stack is in use: room for a start that is on its way there.
const STACK_ROOM: u64 = 0x400;
/// Startup IPIs before a CPU is given up.
const STARTUPS_MAX: usize = 100;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Stage {
    Free = 0,
    Hold = 1,
    Leave = 2,
    Reset = 3,
    End = 4,
}

static STAGE: AtomicU32 = AtomicU32::new(Stage::Free as u32);
/// The first CPU is wanted for a call that waits.
static WANTED: AtomicBool = AtomicBool::new(false);

fn is(stage: Stage) -> bool {
    STAGE.load(Ordering::SeqCst) == stage as u32
}

fn set(stage: Stage) {
    STAGE.store(stage as u32, Ordering::SeqCst);
}

/// How far one CPU is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Place {
    /// In the guest, or parked.
    Away = 0,
    /// It waits.
    Held = 1,
    /// It halted.
    Gone = 2,
    /// It will not halt again, and waits for INIT.
    Awake = 3,
}

struct Gathered {
    place: AtomicU32,
    /// Address of the [`Context`] by which it comes back.
    context: AtomicU64,
}

impl Gathered {
    fn is(&self, place: Place) -> bool {
        self.place.load(Ordering::SeqCst) == place as u32
    }

    fn set(&self, place: Place) {
        self.place.store(place as u32, Ordering::SeqCst);
    }
}

static GATHERED: [Gathered; MAX_CPUS] =
    [const { Gathered { place: AtomicU32::new(Place::Away as u32), context: AtomicU64::new(0) } }; MAX_CPUS];

/// All CPUs but the first that are not in INIT anyway.
fn others() -> impl Iterator<Item = (&'static Slot, &'static Gathered)> {
    let all = slots().zip(&GATHERED).skip(1);
    all.filter(|(slot, _)| !(slot.is(State::Absent) || slot.is(State::Reset)))
}

/// A call waits for the first CPU to be alone. Gives it some time to begin, if this is another one.
pub fn want(index: usize, cpu: &mut Cpu, local: &Xapic<PhysWindow>, clock: &TscClock) {
    WANTED.store(true, Ordering::SeqCst);
    if index != 0 && is(Stage::Free) {
        kick_each(slots().take(1), cpu.redirects_init(), local, clock);
        let _ = poll_until(clock, GATHER_BUDGET_US, || {
            cpu.let_pending_in();
            !is(Stage::Free)
        });
    }
}

/// Whether the first CPU is wanted alone, and is. For that CPU.
pub(super) fn alone(cpu: &mut Cpu, local: &Xapic<PhysWindow>, clock: &TscClock) -> bool {
    // If not all come, it is wanted again when the call is tried again.
    if !WANTED.swap(false, Ordering::SeqCst) {
        return false;
    }
    if count() > 1 {
        set(Stage::Hold);
        let guests = others().filter(|(slot, _)| slot.is(State::Running) || slot.is(State::Stopped));
        kick_each(guests.map(|(slot, _)| slot), cpu.redirects_init(), local, clock);
        wake(local, clock);
        let held = poll_until(clock, GATHER_BUDGET_US, || {
            cpu.let_pending_in();
            others().all(|(_, other)| other.is(Place::Held))
        });
        set(if held.is_ok() { Stage::Leave } else { Stage::Free });
        wake(local, clock);
        let place = if held.is_ok() { Place::Gone } else { Place::Away };
        if poll_until(clock, LEAVE_BUDGET_US, || others().all(|(_, other)| other.is(place))).is_err() {
            fatal::stop(MleError::Cpu, 0, format_args!("a CPU does not leave the MLE"));
        }
        if held.is_err() {
            return false;
        }
    }
    true
}

/// Wakes all that wait in the MLE.
fn wake(local: &Xapic<PhysWindow>, clock: &TscClock) {
    for (slot, _) in others().filter(|(slot, other)| other.is(Place::Held) || slot.is(State::Parked)) {
        send(local, clock, u32::from(trap::WAKE_VECTOR) | 1 << 14, slot.id());
    }
}

/// All CPUs are outside of VMX operation and none of them waits for a Startup IPI; this is the first.
pub struct Met(());

/// Whether the launch ends.
pub(super) fn ends() -> bool {
    is(Stage::End)
}

/// For the end of a launch by SENTER: brings all CPUs to where GETSEC\[SEXIT\], which the first alone can execute, finds them. It
/// waits for the others without a bound: a CPU that waits for a Startup IPI does not answer it, and to execute it VMX must be off.
///
/// Gives `None` when they do not all come in time. Elsewhere than on the first CPU that is so, too, if this one is still here when the
/// first should have ended the launch.
///
/// Spec: \[SDM2\] "GETSEC\[SEXIT\]"; \[TXT\] "Measured Environment Tear Down".
pub fn meet(index: usize, cpu: &mut Cpu, local: &Xapic<PhysWindow>, clock: &TscClock) -> Option<Met> {
    set(Stage::End);
    if !gone(GATHERED.get(index)?, cpu) {
        return None;
    }
    let others = || slots().zip(&GATHERED).enumerate().filter(|(other, _)| *other != index);
    let missing = || others().map(|(_, both)| both).filter(|(_, other)| !other.is(Place::Gone));
    let all = fetch(
        || missing().next().is_none(),
        || {
            for (slot, _) in missing() {
                // The one ends a guest's run, the other its wait for being started; neither does anything to whoever is not there.
                send(local, clock, delivery::NMI << 8 | 1 << 14, slot.id());
                let vector = START_VECTOR.load(Ordering::Relaxed);
                send(local, clock, delivery::STARTUP << 8 | 1 << 14 | vector, slot.id());
            }
        },
        clock,
    );
    if index == 0 {
        return all.then_some(Met(()));
    }
    let _ = poll_until(clock, LEAVE_BUDGET_US, || false);
    None
}

/// Calls until all have come, again and again: one that was between guest and MLE may not have heard it. False if they do not.
fn fetch(all: impl Fn() -> bool, mut call: impl FnMut(), clock: &impl Clock) -> bool {
    (0..STARTUPS_MAX).any(|_| {
        if !all() {
            call();
        }
        poll_until(clock, RESTART_BUDGET_US, &all).is_ok()
    })
}

/// Takes this CPU out of virtualization, for good, and says so; false if it did not come out.
fn gone(place: &Gathered, cpu: &mut Cpu) -> bool {
    let off = cpu.leave_virtualization();
    if off {
        place.set(Place::Gone);
    }
    off
}

/// Resets all CPUs but this one, which have halted: SKINIT wants them so.
///
/// One that is still in SMM must not be reset: its firmware would call this CPU into SMM, which would call the other, and an SMI
/// takes a CPU out of INIT. An NMI ends its halt as soon as it is out of SMM.
pub fn reset_others(local: &Xapic<PhysWindow>, clock: &TscClock) {
    const ALL_BUT_SELF: u32 = 3 << 18;
    set(Stage::Reset);
    for (slot, other) in others().filter(|(_, other)| other.is(Place::Gone)) {
        send(local, clock, delivery::NMI << 8 | 1 << 14, slot.id());
        let _ = poll_until(clock, LEAVE_BUDGET_US, || other.is(Place::Awake));
    }
    // If it does not leave, the TPM does not measure the launch, which then ends.
    let _ = local.send(clock, ALL_BUT_SELF | 1 << 14 | delivery::INIT << 8, 0);
    let _ = poll_until(clock, SETTLE_US, || false);
}

/// Has all others go on where they halted. The launch page has their start-up code.
pub fn scatter(local: &Xapic<PhysWindow>, clock: &TscClock) {
    set(Stage::Free);
    for (number, (slot, other)) in (0u32..).zip(slots().zip(&GATHERED).skip(1)) {
        if !other.is(Place::Gone) {
            continue;
        }
        let context = other.context.load(Ordering::SeqCst) as *const Context;
        // SAFETY: the CPU that halted keeps it on its stack until it goes on.
        let stack = unsafe { (*context).stack() }.wrapping_sub(STACK_ROOM) & !0xf;
        let entry = (STACK_TABLE.load(Ordering::Acquire) as *mut u64).wrapping_add(number as usize);
        // SAFETY: `super::start` made the table, of as many entries as there are APs; no other AP starts now.
        let first = unsafe { entry.replace(stack) };
        // They are in INIT already, but for one case: that the round did not begin.
        send(local, clock, 1 << 14 | delivery::INIT << 8, slot.id());
        let started = (0..STARTUPS_MAX).any(|_| {
            NEXT.store(number, Ordering::SeqCst);
            let command = 1 << 14 | delivery::STARTUP << 8 | START_VECTOR.load(Ordering::Relaxed);
            send(local, clock, command, slot.id());
            poll_until(clock, RESTART_BUDGET_US, || !other.is(Place::Gone)).is_ok()
        });
        // SAFETY: as above.
        unsafe { entry.write(first) };
        if !started {
            fatal::stop(MleError::Cpu, number as u16, format_args!("AP {number} does not come back"));
        }
    }
}

/// Where CPU `index`, which has just been started, goes on, if it halted before.
pub(super) fn halted(index: usize) -> Option<*const Context> {
    let other = GATHERED.get(index).filter(|other| other.is(Place::Gone))?;
    Some(other.context.load(Ordering::SeqCst) as *const Context)
}

/// If the first CPU is to be alone, waits until it has been. For any other, where it runs neither the guest nor a call.
pub(super) fn attend(index: usize, slot: &Slot, cpu: &mut Cpu, local: &Xapic<PhysWindow>, clock: &TscClock) {
    let Some(other) = GATHERED.get(index) else { return };
    if ends() {
        gone(other, cpu);
        loop {
            // SAFETY: interrupts are off; an NMI returns to here.
            unsafe { core::arch::asm!("cli", "hlt", options(nomem, nostack)) }
        }
    }
    // With an interrupt in service the guest runs on, and is asked again.
    if !is(Stage::Hold) || !local.can_be_reset() {
        return;
    }
    let held = local.hold();
    other.set(Place::Held);
    while !is(Stage::Free) {
        if is(Stage::Leave) {
            // One INIT of the MLE's may still be on its way, and must not reset the CPU before its time.
            if slot.kicked.swap(false, Ordering::SeqCst) && cpu.redirects_init() {
                let _ = poll_until(clock, KICK_BUDGET_US, || {
                    cpu.let_pending_in();
                    cpu.init_arrived()
                });
            }
            leave(index, other, cpu, local);
        } else {
            cpu.doze();
        }
    }
    cpu.take_interrupts();
    local.release(&held);
    local.send_to_self(0xe0, cpu.held_interrupts());
    other.set(Place::Away);
}

/// Stack of a CPU that halts.
#[repr(C, align(16))]
struct HaltStack([u8; 0x200]);

/// Leaves the CPU, and comes back to it.
fn leave(index: usize, other: &Gathered, cpu: &mut Cpu, local: &Xapic<PhysWindow>) {
    // SAFETY: bare metal, CPL 0.
    let msrs = unsafe { Msrs::new() };
    let (state, apic) = (CpuState::save(&msrs), KeptApic::of(local));
    cpu.leave_virtualization();
    let mut context = Context::default();
    other.context.store(&raw mut context as u64, Ordering::SeqCst);
    let argument = core::ptr::from_ref(other).cast_mut();
    let mut room = HaltStack([0; _]);
    let stack = (&raw mut room).wrapping_add(1) as u64;
    // SAFETY: the tables are those in force, which map what `halt` uses, and it keeps to its stack. Whoever resumes has put all memory back as it was while this CPU halted, stack and tables
    // included, or it was never away.
    unsafe { suspend(&raw mut context, argument, halt, ROOT.load(Ordering::Acquire), stack) };
    let setup = index.checked_sub(1).and_then(|number| SETUPS.lock().get(number).cloned());
    let Some(setup) = setup else {
        fatal::stop(MleError::Cpu, index as u16, format_args!("CPU {index} has no set-up"))
    };
    // SAFETY: as in `super::entry`: this CPU was reset.
    let loaded = smi::unlooked(|| unsafe { Loaded::new(setup.memory, false) });
    // SAFETY: the tables that the CPU runs on already.
    unsafe { paging::activate(ROOT.load(Ordering::Acquire), setup.smep) };
    // SAFETY: which are the MLE's.
    match unsafe { loaded.enable(setup.vm.vendor) } {
        Ok((enabled, _)) => *cpu = enabled,
        Err(refusal) => fatal::stop(MleError::Cpu, index as u16, format_args!("CPU {index}: {refusal}")),
    }
    state.restore(&msrs);
    apic.restore(local);
    other.set(Place::Held);
}

/// Halts, so that firmware and the other CPUs have the machine, and at last waits for INIT. SMIs are taken.
unsafe extern "sysv64" fn halt(other: *mut Gathered) -> ! {
    // SAFETY: `leave` passes a static, of atomics.
    let other = unsafe { &*other };
    other.set(Place::Gone);
    while !is(Stage::Reset) {
        // SAFETY: interrupts are off; an NMI returns to here.
        unsafe { core::arch::asm!("cli", "hlt", options(nomem, nostack)) }
    }
    other.set(Place::Awake);
    loop {
        core::hint::spin_loop();
    }
}

/// Goes on as `halted` says.
pub(super) fn go_on(context: *const Context) -> ! {
    // SAFETY: the CPU that halted kept it on its own stack, below which this one runs; the tables are in force.
    unsafe { resume_entry(context) }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::*;

    /// A clock, and a CPU that comes at a certain call, if ever.
    struct Late {
        now: Cell<u64>,
        calls: Cell<usize>,
        comes_at: usize,
    }

    impl Clock for Late {
        fn now_us(&self) -> u64 {
            self.now.set(self.now.get() + 1000);
            self.now.get()
        }
    }

    fn fetched(comes_at: usize) -> (bool, Late) {
        let late = Late { now: Cell::new(0), calls: Cell::new(0), comes_at };
        let all = fetch(|| late.calls.get() >= late.comes_at, || late.calls.set(late.calls.get() + 1), &late);
        (all, late)
    }

    #[test]
    fn cpus_are_called_until_all_have_come_and_no_longer() {
        for comes_at in [0, 1, 2, STARTUPS_MAX] {
            let (all, late) = fetched(comes_at);
            assert!(all);
            assert_eq!(late.calls.get(), comes_at);
        }
    }

    #[test]
    fn one_that_never_comes_ends_the_wait() {
        let (all, late) = fetched(usize::MAX);
        assert!(!all);
        assert!(late.now.get() < 2 * STARTUPS_MAX as u64 * RESTART_BUDGET_US);
    }
}
