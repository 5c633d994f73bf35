//! Interrupts and NMIs at every instruction of every kind of operation: whatever came in between, nothing is lost and
//! nothing is done twice.
//!
//! A handler works on the same variable as the operation that it interrupts; a cell it finds by the handle in [`TARGET`]. What
//! it adds ([`BY_INTERRUPT`]) can be told from what the operation adds.

use core::arch::asm;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pcpu::this_cpu;
use pcpu::{
    CpuBuffer, CpuCell, CpuPair, CpuStack, Handle, LocalBuffer, LocalCell, LocalPair, LocalStack,
    PerCpu, PerCpuPtr, define_per_cpu_in,
};

use super::ops::Item;
use super::sweep::{Sweep, at_every_instruction, interrupted};
use super::{Test, Why};
use crate::cpus::local_apic::TimerKind;
use crate::ensure;
use crate::interrupts::Frame;
use crate::memory::areas;
use crate::percpu::Kernel;

pub const TESTS: &[Test] = &[
    Test::new(
        "a torn add loses at its two inner borders and nowhere else",
        torn_add_loses,
    ),
    Test::new("inc, interrupted anywhere", inc),
    Test::new("add, interrupted anywhere", add),
    Test::new("add_return, interrupted anywhere", add_return),
    Test::new("xchg, interrupted anywhere", xchg),
    Test::new("cmpxchg, interrupted anywhere", cmpxchg),
    Test::new("a change of a pair, interrupted anywhere", pair),
    Test::new("push and pop, interrupted anywhere", stack),
    Test::new("append and take, interrupted anywhere", buffer),
];

/// What an interrupt adds, so that it can be told from the operation's own.
const BY_INTERRUPT: u64 = 1 << 32;

const BUFFER_ITEMS: usize = 8;

/// Which variable a handler works on.
static TARGET: AtomicUsize = AtomicUsize::new(0);

/// How often a handler found what it should not have.
static WRONG: AtomicU64 = AtomicU64::new(0);

/// What the last interrupts made of the number: the one of an even number, and the one of an odd number.
static SUMS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

define_per_cpu_in! {
    in Kernel;

    static NUMBER: CpuCell<u64> = CpuCell::new(0);
    static PAIR: CpuPair<u64> = CpuPair::new(0, 0);
    static STACK: CpuStack<&'static mut Item> = CpuStack::new();
    static BUFFER: CpuBuffer<u64, BUFFER_ITEMS> = CpuBuffer::new();
}

/// The two kinds of interrupts.
const KINDS: [TimerKind; 2] = [TimerKind::Once, TimerKind::OnceNmi];

fn aim_at(variable: &impl Handle) {
    TARGET.store(variable.handle().neutral(), Ordering::Relaxed);
}

fn target<T>() -> PerCpuPtr<T, Kernel> {
    PerCpuPtr::from_neutral(TARGET.load(Ordering::Relaxed)).expect("aimed before the sweep")
}

/// What an operation did in a sweep, by its own account.
#[derive(Default)]
struct Account {
    /// How often it ran.
    runs: u64,
    /// What it added.
    added: u64,
    /// What it took out, additions of interrupts among it.
    taken: u64,
    /// How often it found something else than it had just read.
    outrun: u64,
    /// What it returned last.
    sum: u64,
    /// How often it returned what cannot be.
    wrong: u64,
}

/// What the other tests would see of an operation that is not one step.
fn torn_add_loses() -> Result<(), Why> {
    NUMBER.write(0);
    aim_at(&NUMBER);
    let number = NUMBER.handle().neutral();
    let sweep = at_every_instruction(TimerKind::Once, add_to_target, || {
        // SAFETY: changes this CPU's copy of a number, which is the point.
        unsafe {
            asm!("mov {word}, gs:[{number}]", "inc {word}", "mov gs:[{number}], {word}",
                number = in(reg) number, word = out(reg) _, options(nostack));
        }
    });
    let (own, by_interrupt) = (NUMBER.read() % BY_INTERRUPT, NUMBER.read() / BY_INTERRUPT);
    let lost = sweep.interrupts - by_interrupt;
    ensure!(own == sweep.runs, "{own} of {} adds", sweep.runs);
    ensure!(lost == 2, "{lost} of {} lost", sweep.interrupts);
    Ok(())
}

fn add_to_target(_: &Frame) {
    interrupted();
    // SAFETY: the test keeps the variable while the timer runs.
    let sum = unsafe { this_cpu::add_return(target::<CpuCell<u64>>(), BY_INTERRUPT) };
    SUMS[(sum / BY_INTERRUPT % 2) as usize].store(sum, Ordering::Relaxed);
}

/// Sweeps over an operation on a static and on a dynamic cell, with both kinds of interrupts; how often it was outrun.
macro_rules! swept {
    ($operation:ident) => {{
        let dynamic = PerCpu::<CpuCell<u64>, Kernel>::new()?;
        let mut outrun = 0;
        for kind in KINDS {
            outrun += sweep_of(&NUMBER, kind, $operation)?;
            outrun += sweep_of(&dynamic, kind, $operation)?;
        }
        outrun
    }};
}

fn sweep_of<V: LocalCell<u64>>(
    cell: &V,
    kind: TimerKind,
    operation: impl Fn(&V, &mut Account),
) -> Result<u64, Why> {
    cell.write(0);
    aim_at(cell);
    let mut account = Account::default();
    let sweep = at_every_instruction(kind, add_to_target, || {
        account.runs += 1;
        operation(cell, &mut account);
    });
    let sum = cell.read() + account.taken;
    let expected = account.added + sweep.interrupts * BY_INTERRUPT;
    let wrong = account.wrong;
    ensure!(wrong == 0, "{kind:?}: {wrong} results that cannot be");
    ensure!(sum == expected, "{kind:?}: {sum:#x}, not {expected:#x}");
    Ok(account.outrun)
}

fn inc() -> Result<(), Why> {
    fn step(cell: &impl LocalCell<u64>, account: &mut Account) {
        cell.inc();
        account.added += 1;
    }
    swept!(step);
    Ok(())
}

fn add() -> Result<(), Why> {
    fn step(cell: &impl LocalCell<u64>, account: &mut Account) {
        cell.add(3);
        account.added += 3;
    }
    swept!(step);
    Ok(())
}

fn add_return() -> Result<(), Why> {
    fn step(cell: &impl LocalCell<u64>, account: &mut Account) {
        // One of two steps is the first, and the second sees it: of the run before and of the interrupt that came in it.
        let interrupts = account.runs - 1;
        if interrupts > 0 {
            let by_interrupt = SUMS[(interrupts % 2) as usize].load(Ordering::Relaxed);
            let is_second = account.sum / BY_INTERRUPT == interrupts;
            let is_first = by_interrupt % BY_INTERRUPT == account.added;
            account.wrong += u64::from(is_first == is_second);
        }
        account.sum = cell.add_return(1);
        account.added += 1;
        // Nobody else adds ones.
        account.wrong += u64::from(account.sum % BY_INTERRUPT != account.added);
    }
    swept!(step);
    Ok(())
}

fn xchg() -> Result<(), Why> {
    fn step(cell: &impl LocalCell<u64>, account: &mut Account) {
        account.taken += cell.xchg(1);
        account.added += 1;
    }
    swept!(step);
    Ok(())
}

fn cmpxchg() -> Result<(), Why> {
    fn step(cell: &impl LocalCell<u64>, account: &mut Account) {
        let old = cell.read();
        match cell.cmpxchg(old, old + 1) {
            Ok(before) => {
                account.added += 1;
                account.wrong += u64::from(before != old);
            }
            Err(found) => {
                account.outrun += 1;
                account.wrong += u64::from(found != old + BY_INTERRUPT);
            }
        }
        // It does one or the other.
        account.wrong += u64::from(account.added + account.outrun != account.runs);
    }
    let outrun: u64 = swept!(step);
    ensure!(outrun >= 4, "outrun {outrun} times in 4 sweeps");
    Ok(())
}

/// What was swept over was interrupted, and not only before and after it.
fn ensure_inside(sweep: &Sweep, inside: u64) -> Result<(), Why> {
    ensure!(
        inside > 0 && inside < sweep.interrupts,
        "{inside} of {} inside",
        sweep.interrupts
    );
    Ok(())
}

fn pair() -> Result<(), Why> {
    for kind in KINDS {
        PAIR.xchg((0, 0));
        WRONG.store(0, Ordering::Relaxed);
        let handler = |_: &Frame| {
            interrupted();
            let (one, two) = PAIR.update(|(one, two)| (one + BY_INTERRUPT, two + 2 * BY_INTERRUPT));
            WRONG.fetch_add(u64::from(two != 2 * one), Ordering::Relaxed);
        };
        let mut again = 0;
        let sweep = at_every_instruction(kind, handler, || {
            let mut tries = 0;
            PAIR.update(|(one, two)| {
                tries += 1;
                (one + 1, two + 2)
            });
            again += tries - 1;
        });
        let sum = sweep.runs + sweep.interrupts * BY_INTERRUPT;
        let (found, torn) = (PAIR.read(), WRONG.load(Ordering::Relaxed));
        ensure!(found == (sum, 2 * sum), "{kind:?}: {found:x?}, not {sum:x}");
        ensure!(torn == 0, "{kind:?}: torn {torn} times");
        ensure_inside(&sweep, again)?;
    }
    Ok(())
}

/// The handler takes a node off and puts it back, so that the first node may be the same and its link another.
fn stack() -> Result<(), Why> {
    const ITEMS: usize = 3;
    STACK.pop_all().for_each(drop);
    let items = areas::made(ITEMS + 1, |index| Item::new(index as u64));
    let (spare, kept) = items.split_first_mut().expect("there are some");
    kept.iter_mut().for_each(|item| STACK.push(item));
    let mut own = Some(spare);
    WRONG.store(0, Ordering::Relaxed);
    let handler = |_: &Frame| {
        interrupted();
        match (STACK.pop(), STACK.pop()) {
            (Some(first), Some(second)) => {
                // The other way round.
                STACK.push(first);
                STACK.push(second);
            }
            (first, _) => {
                WRONG.fetch_add(1, Ordering::Relaxed);
                first.into_iter().for_each(|item| STACK.push(item));
            }
        }
    };
    let mut empty = 0;
    let sweep = at_every_instruction(TimerKind::Once, handler, || {
        if let Some(item) = own.take() {
            STACK.push(item);
        }
        own = STACK.pop();
        empty += u64::from(own.is_none());
    });
    let wrong = WRONG.load(Ordering::Relaxed);
    ensure!(wrong + empty == 0, "empty {wrong} and {empty} times");
    // Each item is there once.
    let mut seen = [0; ITEMS + 1];
    STACK
        .pop_all()
        .chain(own)
        .take(2 * ITEMS)
        .for_each(|item| seen[item.number as usize] += 1);
    ensure!(seen == [1; ITEMS + 1], "{seen:?} after {} runs", sweep.runs);
    Ok(())
}

/// What was taken is counted: the operation's items come in the order of their numbers, and so do the handler's.
fn buffer() -> Result<(), Why> {
    static APPENDED: AtomicU64 = AtomicU64::new(0);
    APPENDED.store(0, Ordering::Relaxed);
    WRONG.store(0, Ordering::Relaxed);
    let handler = |_: &Frame| {
        interrupted();
        let number = APPENDED.fetch_add(1, Ordering::Relaxed);
        let appended = BUFFER.append(number * BY_INTERRUPT);
        WRONG.fetch_add(u64::from(appended.is_err()), Ordering::Relaxed);
    };
    let (mut own, mut own_taken, mut by_interrupt, mut wrong) = (0, 0, 0, 0);
    let mut room = [MaybeUninit::uninit(); BUFFER_ITEMS];
    let mut check = |items: &[u64]| {
        for &item in items {
            if item != 0 && item % BY_INTERRUPT == 0 || item == 0 && by_interrupt == 0 {
                wrong += u64::from(item != by_interrupt * BY_INTERRUPT);
                by_interrupt += 1;
            } else {
                own_taken += 1;
                wrong += u64::from(item != own_taken);
            }
        }
    };
    let sweep = at_every_instruction(TimerKind::Once, handler, || {
        own += 1;
        let appended = BUFFER.append(own);
        WRONG.fetch_add(u64::from(appended.is_err()), Ordering::Relaxed);
        check(BUFFER.take(&mut room));
    });
    let mut room = [MaybeUninit::uninit(); BUFFER_ITEMS];
    check(BUFFER.take(&mut room));
    wrong += WRONG.load(Ordering::Relaxed);
    ensure!(wrong == 0, "{wrong} items were refused or are wrong");
    ensure!(
        own_taken == sweep.runs && by_interrupt == sweep.interrupts,
        "{own_taken} of {} and {by_interrupt} of {}",
        sweep.runs,
        sweep.interrupts
    );
    Ok(())
}
