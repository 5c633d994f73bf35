//! Interrupts and NMIs at every instruction of allocating and freeing past the caches, and of a user's way into the kernel and
//! back: nothing is lost, whatever they do there themselves. Operations on a copy: `op_sweeps.rs`; caches: `cache_sweeps.rs`.

use core::sync::atomic::{AtomicU64, Ordering};

use pcpu::{
    AllocError, AllocFlags, CpuCell, Domain, FreeFlags, LocalCell, Request, alloc_percpu_bytes,
    define_per_cpu_in, free_percpu, free_percpu_with,
};

use super::sweep::{at_every_instruction, interrupted};
use super::{Test, Why, copy_of};
use crate::cpus::local_apic::TimerKind;
use crate::interrupts::{Frame, Hook};
use crate::percpu::{Kernel, current_cpu};
use crate::user::{self, CALLS, TICKS_IN_USER};
use crate::{ensure, println};

pub const TESTS: &[Test] = &[
    Test::new(
        "an interrupt allocates and frees at every instruction of both",
        allocate_within,
    ),
    Test::new("an NMI tries to, at every instruction of both", try_within),
    Test::new(
        "a user is interrupted at every instruction",
        user_interrupted,
    ),
    Test::new(
        "an NMI at every instruction of a system call finds the right copy",
        user_nmi,
    ),
];

/// What a handler counts besides interrupts.
static SEEN: AtomicU64 = AtomicU64::new(0);

define_per_cpu_in! {
    in Kernel;

    static NMIS: CpuCell<u64> = CpuCell::new(0);
}

/// What would be longer by more than a third as a multiple of its alignment is in no cache.
const OWN: Request = Request::new(20, 16);
const BY_HANDLER: Request = Request::new(36, 32);

fn allocate_and_free() {
    let variable = alloc_percpu_bytes::<Kernel>(&OWN);
    // SAFETY: nobody else knows of it.
    let freed = variable.map(|variable| unsafe { free_percpu(variable) });
    assert!(matches!(freed, Ok(Ok(()))), "{freed:?}");
}

fn allocate_within() -> Result<(), Why> {
    let before = Kernel::allocator().stats();
    let handler = |_: &Frame| {
        interrupted();
        let variable = alloc_percpu_bytes::<Kernel>(&BY_HANDLER.with_flags(AllocFlags::ATOMIC));
        // SAFETY: nobody else knows of it.
        let freed = variable.map(|it| unsafe { free_percpu_with(it, FreeFlags::ATOMIC) });
        assert!(matches!(freed, Ok(Ok(()))), "{freed:?}");
    };
    let sweep = at_every_instruction(TimerKind::Once, handler, allocate_and_free);
    let after = Kernel::allocator().stats();
    let served = after.allocs - before.allocs;
    ensure!(
        served == sweep.runs + sweep.interrupts,
        "{served} by {} runs and {} interrupts",
        sweep.runs,
        sweep.interrupts
    );
    ensure!(after.live == before.live, "{} live", after.live);
    println!("   {} interrupts", sweep.interrupts);
    Ok(())
}

/// An NMI comes also while the lock is held by what it interrupts.
fn try_within() -> Result<(), Why> {
    SEEN.store(0, Ordering::Relaxed);
    let before = Kernel::allocator().stats();
    let handler = |_: &Frame| {
        interrupted();
        match alloc_percpu_bytes::<Kernel>(&BY_HANDLER.with_flags(AllocFlags::TRY)) {
            Ok(variable) => {
                // SAFETY: nobody else knows of it.
                let freed = unsafe { free_percpu_with(variable, FreeFlags::TRY) };
                assert_eq!(freed, Ok(()));
            }
            Err(AllocError::Busy) => {
                SEEN.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => panic!("{error}"),
        }
    };
    let sweep = at_every_instruction(TimerKind::OnceNmi, handler, allocate_and_free);
    let after = Kernel::allocator().stats();
    let (busy, served) = (SEEN.load(Ordering::Relaxed), after.allocs - before.allocs);
    ensure!(
        served + busy == sweep.runs + sweep.interrupts,
        "{served} served and {busy} busy, by {} runs and {} interrupts",
        sweep.runs,
        sweep.interrupts
    );
    ensure!(
        busy > 0 && busy < sweep.interrupts,
        "{busy} busy of {}",
        sweep.interrupts
    );
    ensure!(after.live == before.live, "{} live", after.live);
    println!("   {} NMIs, {busy} of them refused", sweep.interrupts);
    Ok(())
}

fn user_interrupted() -> Result<(), Why> {
    let handler = |frame: &Frame| {
        interrupted();
        super::user::tick(frame);
    };
    user_under(TimerKind::Once, handler, || {
        copy_of(&TICKS_IN_USER, current_cpu())
    })
}

fn user_nmi() -> Result<(), Why> {
    SEEN.store(0, Ordering::Relaxed);
    let handler = |frame: &Frame| {
        interrupted();
        NMIS.inc();
        let in_window = user::is_in_window(frame.rip);
        SEEN.fetch_add(u64::from(in_window), Ordering::Relaxed);
    };
    user_under(TimerKind::OnceNmi, handler, || {
        copy_of(&NMIS, current_cpu())
    })?;
    let in_window = SEEN.load(Ordering::Relaxed);
    // Two calls and the exit come in, and two calls and the start go out.
    ensure!(in_window == 6, "{in_window} NMIs in the windows, not 6");
    Ok(())
}

/// Sweeps over a user that makes one call. `counted` says how often the handler counted on this CPU's copy.
fn user_under(kind: TimerKind, handler: Hook, counted: impl Fn() -> u64) -> Result<(), Why> {
    let cpu = current_cpu();
    let (before, calls) = (counted(), copy_of(&CALLS, cpu));
    let mut lost = 0;
    let sweep = at_every_instruction(kind, handler, || {
        let ended = user::run(cpu, 1, 0);
        lost += u64::from(ended.status != 0 || ended.calls != 1);
    });
    let (counted, calls) = (counted() - before, copy_of(&CALLS, cpu) - calls);
    ensure!(lost == 0, "{lost} users lost their GS base");
    ensure!(calls == sweep.runs, "{calls} calls of {}", sweep.runs);
    // An NMI can come everywhere, a timer's interrupt is counted in the user only.
    let right = match kind {
        TimerKind::OnceNmi => counted == sweep.interrupts,
        _ => counted > 20 && counted < sweep.interrupts,
    };
    ensure!(right, "{counted} counted of {}", sweep.interrupts);
    println!("   {counted} of {} interrupts counted", sweep.interrupts);
    Ok(())
}
