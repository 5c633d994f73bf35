//! Threads that hammer one variable with one kind of operation while another moves them from CPU to CPU and sends them
//! signals, whose handler does the same operation on the same variable. Everything is accounted for: whatever the
//! operations did in between, the copies of all CPUs together must hold exactly what the accounts say.
//!
//! Most phases are checked by their *chain*: every operation that tells what the word was takes one value out of a copy
//! and puts another in. Over all operations what went in must be what came out, but for the values that the copies
//! started with and those that they hold at the end. The values are summed up by a hash; a lost update would take a
//! value out twice.

use std::cell::Cell;
use std::fmt::Debug;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering, compiler_fence};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pcpu::global::method;
use pcpu::this_cpu::process::ProcessOps;
use pcpu::this_cpu::{Change, LocalOps, Scalar, Word};
use pcpu::{CpuCell, Handle, LocalCell, PerCpuPtr, alloc_percpu, define_per_cpu, free_percpu};

use crate::crew::Crew;
use crate::lane::{LANES, Lane, Lanes, snapshot};
use crate::mix::{STEP, mix};
use crate::system::{
    ThreadId, allowed_cpus, handle_interrupts, interrupt, keep_on, step_back, thread_id, unregister,
};

/// What the threads do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// `add` of any number; the sum.
    Add,
    /// `sub` of any number; the sum.
    Sub,
    /// `inc` and `dec` in a random order; the sum.
    IncDec,
    /// `xor`; all masks together.
    Xor,
    /// `or` in the upper half of the word while `xor` goes on in the lower half.
    Or,
    /// `and` in the upper half of the word while `xor` goes on in the lower half.
    And,
    /// `add_return` of any number; the sum and the chain.
    AddReturn,
    /// `xchg`; the chain: what is put in comes out once, or is still there.
    Xchg,
    /// `read` and `cmpxchg` until it succeeds; the sum and the chain.
    Cmpxchg,
    /// `and`, `or`, `xor` that tell what the word was; the chain.
    FetchBits,
    /// `write` and `read`: no other value than one written, and none torn.
    WriteRead,
    /// `add`, each thread to a lane of its own next to those of the others; the sums.
    Neighbours,
}

impl Phase {
    const ALL: [Self; 12] = [
        Self::Add,
        Self::Sub,
        Self::IncDec,
        Self::Xor,
        Self::Or,
        Self::And,
        Self::AddReturn,
        Self::Xchg,
        Self::Cmpxchg,
        Self::FetchBits,
        Self::WriteRead,
        Self::Neighbours,
    ];
}

/// An unsigned integer whose operations are hammered. The signed ones have the same machine code.
pub trait Wide: Scalar<Word = Self> + Word + Debug + From<bool> {}

impl<T: Scalar<Word = T> + Word + Debug + From<bool>> Wide for T {}

/// What one thread, or the signal handler in one thread, has done. One writer; read when the writer is through.
#[derive(Debug, Default)]
struct Account {
    operations: AtomicU64,
    /// What was added in all.
    sum: AtomicU64,
    /// All masks that were applied.
    flipped: AtomicU64,
    /// All bits that were set, or cleared.
    touched: AtomicU64,
    /// Hashes of what was put in, less hashes of what was taken out.
    chain: AtomicU64,
    random: AtomicU64,
}

impl Account {
    fn new(seed: u64) -> Self {
        let account = Self::default();
        account.random.store(seed << 40, Ordering::Relaxed);
        account
    }

    fn update(number: &AtomicU64, update: impl FnOnce(u64) -> u64) {
        number.store(update(number.load(Ordering::Relaxed)), Ordering::Relaxed);
    }

    fn random(&self) -> u64 {
        Self::update(&self.random, |state| state.wrapping_add(STEP));
        mix(self.random.load(Ordering::Relaxed))
    }

    fn count_operations(&self, more: u64) {
        Self::update(&self.operations, |operations| operations + more);
    }

    fn add(&self, value: u64) {
        Self::update(&self.sum, |sum| sum.wrapping_add(value));
    }

    fn flip(&self, mask: u64) {
        Self::update(&self.flipped, |flipped| flipped ^ mask);
    }

    fn touch(&self, bits: u64) {
        Self::update(&self.touched, |touched| touched | bits);
    }

    fn replace<T: Wide>(&self, before: T, after: T) {
        let step = link(after).wrapping_sub(link(before));
        Self::update(&self.chain, |chain| chain.wrapping_add(step));
    }
}

/// A value's part in a chain.
fn link(value: impl Word) -> u64 {
    mix(value.widen() ^ 0x6a09_e667_f3bc_c909)
}

fn wide(value: impl Word) -> u64 {
    value.widen()
}

/// The bits of the lower half of a word.
fn lower_half<T>() -> u64 {
    (1 << (4 * size_of::<T>())) - 1
}

/// A number whose bytes are all the same, so that a torn one shows.
fn stripes(number: u64) -> u64 {
    (number & 0xff) * 0x0101_0101_0101_0101
}

/// Does what the phase says, `times` times.
fn hammer<T: Wide>(phase: Phase, lane: Lane<T>, account: &Account, times: u64) {
    let at = lane.handle().neutral();
    let mut extra = 0;
    for _ in 0..times {
        let random = account.random();
        let value = T::narrow(random);
        match phase {
            Phase::Add | Phase::Neighbours => {
                lane.add(value);
                account.add(random);
            }
            Phase::Sub => {
                lane.sub(value);
                account.add(random.wrapping_neg());
            }
            Phase::IncDec => {
                // Rather up than down, or hardly anything would remain.
                if random.is_multiple_of(4) {
                    lane.dec();
                    account.add(u64::MAX);
                } else {
                    lane.inc();
                    account.add(1);
                }
            }
            Phase::Xor => {
                lane.xor(value);
                account.flip(random);
            }
            Phase::Or | Phase::And => {
                let lower = lower_half::<T>();
                let bit = (lower + 1) << ((random >> 32) % (4 * size_of::<T>() as u64));
                match (random >> 60).is_multiple_of(2) {
                    true => {
                        lane.xor(T::narrow(random & lower));
                        account.flip(random & lower);
                    }
                    false if phase == Phase::Or => {
                        lane.or(T::narrow(bit));
                        account.touch(bit);
                    }
                    false => {
                        lane.and(T::narrow(!bit));
                        account.touch(bit);
                    }
                }
            }
            Phase::AddReturn => {
                let after = lane.add_return(value);
                account.add(random);
                account.replace(T::narrow(wide(after).wrapping_sub(random)), after);
            }
            Phase::Xchg => account.replace(lane.xchg(value), value),
            Phase::Cmpxchg => {
                let mut old = lane.read();
                loop {
                    let new = T::narrow(wide(old).wrapping_add(random));
                    match lane.cmpxchg(old, new) {
                        Ok(before) => {
                            assert_eq!(before, old);
                            account.replace(old, new);
                            break;
                        }
                        Err(found) => {
                            assert_ne!(found, old);
                            old = found;
                            extra += 1;
                        }
                    }
                }
                account.add(random);
            }
            Phase::FetchBits => {
                let (change, after): (_, Join) = match random >> 62 {
                    0 => (Change::And(value), |before, value| before & value),
                    1 => (Change::Or(value), |before, value| before | value),
                    _ => (Change::Xor(value), |before, value| before ^ value),
                };
                // SAFETY: the variable is live, and changed by operations only.
                let before: T = unsafe { ProcessOps::fetch(at, change) };
                account.replace(before, T::narrow(after(wide(before), random)));
            }
            Phase::WriteRead => {
                lane.write(T::narrow(stripes(random)));
                let found = wide(lane.read());
                assert_eq!(T::narrow(stripes(found)), T::narrow(found), "torn");
            }
        }
    }
    account.count_operations(times + extra);
}

/// What the signal handler does in a thread.
struct Interrupted {
    hammer: fn(Phase, usize, &Account),
    phase: Phase,
    at: usize,
    account: Account,
}

thread_local! {
    /// For the signal handler; null: nothing.
    static INTERRUPTED: Cell<*const Interrupted> = const { Cell::new(ptr::null()) };
}

extern "C" fn on_signal(_signal: libc::c_int) {
    // SAFETY: not null only while the thread that is interrupted keeps it alive.
    if let Some(what) = unsafe { INTERRUPTED.get().as_ref() } {
        (what.hammer)(what.phase, what.at, &what.account);
    }
}

/// [`hammer`] without its type.
fn hammer_interrupting<T: Wide>(phase: Phase, at: usize, account: &Account) {
    const TIMES: u64 = 3;
    let lanes = PerCpuPtr::from_neutral(at).expect("made of a handle");
    // SAFETY: the thread that is interrupted hammers the same variable.
    hammer::<T>(phase, unsafe { Lane::of(lanes, 0) }, account, TIMES);
}

/// The tallies of a storm.
#[derive(Debug, Default)]
pub struct Tally {
    operations: AtomicU64,
    in_handlers: AtomicU64,
    signals: AtomicU64,
    moves: AtomicU64,
}

/// The accounts of a phase: one for each thread, one for the handler in each thread.
type Accounts = Vec<(usize, [Account; 2])>;

/// Moves and interrupts the threads until all are through.
pub fn disturb(threads: &[AtomicI32], finished: &AtomicUsize, tally: &Tally, seed: u64) {
    let cpus = allowed_cpus();
    let account = Account::new(seed);
    while finished.load(Ordering::Acquire) < threads.len() {
        let random = account.random();
        let thread: ThreadId = threads[random as usize % threads.len()].load(Ordering::Relaxed);
        match random >> 61 {
            0..3 => {
                let cpu = cpus[(random >> 32) as usize % cpus.len()];
                keep_on(thread, &[cpu]);
                tally.moves.fetch_add(1, Ordering::Relaxed);
            }
            3 => keep_on(thread, &cpus),
            _ => {
                interrupt(thread);
                tally.signals.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// One phase on one variable: `operations` by all threads of the crew. Returns the accounts, and the lane of each.
fn run_phase<T: Wide>(
    phase: Phase,
    lanes: PerCpuPtr<Lanes<T>>,
    crew: Crew,
    operations: u64,
    tally: &Tally,
) -> Accounts {
    let crew_size = crew.size();
    let own_lane = Phase::ALL.iter().position(|&other| other == phase);
    let lane_of = |worker| match phase {
        Phase::Neighbours => worker % LANES,
        _ => own_lane.expect("ALL has all"),
    };
    let threads: Vec<_> = (0..crew_size).map(|_| AtomicI32::new(0)).collect();
    let (begin, end) = (Barrier::new(crew_size + 1), Barrier::new(crew_size + 1));
    let finished = AtomicUsize::new(0);
    let accounts = Mutex::new(Vec::new());
    let work = |worker: usize| {
        step_back();
        // Not every system lets a thread do without.
        let _ = worker >= crew.threads && unregister();
        // SAFETY: the caller keeps the variable alive.
        let lane = unsafe { Lane::of(lanes, lane_of(worker)) };
        let seed = (worker as u64 + 1) * 2 + phase as u64 * 1000;
        let account = Account::new(seed);
        let interrupted = Interrupted {
            hammer: hammer_interrupting::<T>,
            phase,
            at: lane.handle().neutral(),
            account: Account::new(seed + 1),
        };
        INTERRUPTED.set(&interrupted);
        compiler_fence(Ordering::SeqCst);
        threads[worker].store(thread_id(), Ordering::Relaxed);
        begin.wait();
        hammer(phase, lane, &account, operations / crew_size as u64);
        finished.fetch_add(1, Ordering::Release);
        end.wait();
        INTERRUPTED.set(ptr::null());
        compiler_fence(Ordering::SeqCst);
        let both = [account, interrupted.account];
        let count = |account: &Account| account.operations.load(Ordering::Relaxed);
        tally
            .operations
            .fetch_add(both.iter().map(count).sum(), Ordering::Relaxed);
        tally
            .in_handlers
            .fetch_add(count(&both[1]), Ordering::Relaxed);
        accounts
            .lock()
            .expect("nobody panics with it")
            .push((lane_of(worker), both));
    };
    std::thread::scope(|scope| {
        for worker in 0..crew_size {
            let work = &work;
            scope.spawn(move || work(worker));
        }
        begin.wait();
        disturb(&threads, &finished, tally, phase as u64);
        end.wait();
    });
    accounts.into_inner().expect("nobody panics with it")
}

/// Puts two numbers together.
type Join = fn(u64, u64) -> u64;

/// Compares the copies with the accounts.
fn check_phase<T: Wide>(
    phase: Phase,
    before: &[[T; LANES]],
    after: &[[T; LANES]],
    accounts: &Accounts,
) {
    let what = std::any::type_name::<T>();
    for lane in 0..LANES {
        let is_on_it = |entry: &&(usize, [Account; 2])| entry.0 == lane;
        let of_lane = || accounts.iter().filter(is_on_it).flat_map(|entry| &entry.1);
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        // What the accounts say, summed up, and what the copies say.
        let accounted = |number: fn(&Account) -> &AtomicU64, join: Join| {
            of_lane().map(|account| load(number(account))).fold(0, join)
        };
        let found = |part: fn(T) -> u64, join: Join, less: Join| {
            let all = |copies: &[[T; LANES]]| {
                let parts = copies.iter().map(|copy| part(copy[lane]));
                parts.reduce(join).expect("there are CPUs")
            };
            less(all(after), all(before))
        };
        let same = |accounted: u64, found: u64, of: &str| {
            assert_eq!(
                T::narrow(accounted),
                T::narrow(found),
                "{phase:?} of {what}, lane {lane}: {of}"
            );
        };
        let (add, sub): (Join, Join) = (u64::wrapping_add, u64::wrapping_sub);
        let xor = |a, b| a ^ b;
        if of_lane().next().is_none() {
            let changed = before
                .iter()
                .zip(after)
                .position(|(b, a)| b[lane] != a[lane]);
            assert_eq!(
                changed, None,
                "{phase:?} of {what} changed lane {lane} next to it"
            );
            continue;
        }
        let check_sum = || {
            let sum = accounted(|account| &account.sum, add);
            same(sum, found(wide, add, sub), "the sum");
        };
        let check_chain = || {
            let chain = accounted(|account| &account.chain, add);
            let found = found(link, add, sub);
            assert_eq!(chain, found, "{phase:?} of {what}: the chain");
        };
        let flipped = || accounted(|account| &account.flipped, xor);
        let touched = || accounted(|account| &account.touched, |a, b| a | b);
        let upper = !lower_half::<T>();
        match phase {
            Phase::Add | Phase::Sub | Phase::IncDec | Phase::Neighbours => check_sum(),
            Phase::Xor => same(flipped(), found(wide, xor, xor), "the masks"),
            Phase::Or | Phase::And => {
                let lower = found(wide, xor, xor) & !upper;
                same(flipped(), lower, "the masks of the lower half");
            }
            Phase::AddReturn | Phase::Cmpxchg => {
                check_sum();
                check_chain();
            }
            Phase::Xchg | Phase::FetchBits => check_chain(),
            Phase::WriteRead => {
                let torn = |copy: &[T; LANES]| T::narrow(stripes(wide(copy[lane]))) != copy[lane];
                assert!(!after.iter().any(torn), "{phase:?} of {what}: torn");
            }
        }
        match phase {
            // A bit that was set anywhere is set on some CPU.
            Phase::Or => {
                let set = found(wide, |a, b| a | b, |after, _| after) & upper;
                let initial = found(wide, |a, b| a | b, |_, before| before) & upper;
                same(touched() | initial, set, "the bits set");
            }
            // A bit that was cleared anywhere is clear on some CPU.
            Phase::And => {
                let set = found(wide, |a, b| a & b, |after, _| after) & upper;
                let initial = found(wide, |a, b| a & b, |_, before| before) & upper;
                same(initial & !touched(), set, "the bits cleared");
            }
            _ => {}
        }
    }
}

/// All phases on one variable, `operations` each.
fn storm_on<T: Wide>(lanes: PerCpuPtr<Lanes<T>>, crew: Crew, operations: u64, tally: &Tally) {
    for phase in Phase::ALL {
        let before = snapshot(lanes);
        let accounts = run_phase(phase, lanes, crew, operations, tally);
        check_phase(phase, &before, &snapshot(lanes), &accounts);
    }
}

macro_rules! widths {
    ($($name:ident: $type:ident = $initial:expr;)+) => {
        define_per_cpu! {
            $(static $name: Lanes<$type> = [const { CpuCell::new($initial) }; LANES];)+
        }

        const VARIABLES: u64 = 2 * [$($initial as u64),+].len() as u64;

        fn on_every_variable(crew: Crew, operations: u64, tally: &Tally) {
            $(
                storm_on($name.handle(), crew, operations, tally);
                let lanes = alloc_percpu::<Lanes<$type>>().expect("there is memory");
                storm_on(lanes, crew, operations, tally);
                // SAFETY: all threads that used it are through.
                unsafe { free_percpu(lanes) }.expect("it is allocated");
            )+
        }
    };
}

// All bits set: `and` needs some to clear.
widths! {
    U8: u8 = u8::MAX;
    U16: u16 = u16::MAX;
    U32: u32 = u32::MAX;
    U64: u64 = u64::MAX;
}

/// One storm at a time: two would share the CPUs and the variables.
static STORM: Mutex<()> = Mutex::new(());

/// Waits until no other storm is on.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    // What a storm that failed leaves behind is as good as anything.
    STORM.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many operations a full storm has by default: more than 10^8 for every operation of every width.
const DEFAULT_OPERATIONS: u64 = 5_000_000_000;

/// Every operation of every width, on static and on dynamic variables: one `part`th of a full storm.
pub fn storm(crew: Crew, part: u64) {
    let _one = one_at_a_time();
    let operations = match std::env::var("PCPU_STORM_OPS") {
        Ok(operations) => operations.parse().expect("PCPU_STORM_OPS is a number"),
        Err(_) => DEFAULT_OPERATIONS,
    };
    let operations = operations / part;
    handle_interrupts(on_signal);
    let tally = Tally::default();
    let begin = Instant::now();
    let phases = VARIABLES * Phase::ALL.len() as u64;
    on_every_variable(crew, operations.div_ceil(phases), &tally);
    println!(
        "{} operations ({} in signal handlers), {} signals, {} moves, {} + {} threads, {:?}, {:.1?}",
        tally.operations.into_inner(),
        tally.in_handlers.into_inner(),
        tally.signals.into_inner(),
        tally.moves.into_inner(),
        crew.threads,
        crew.strays,
        method(),
        begin.elapsed()
    );
}

#[test]
fn nothing_is_lost() {
    storm(Crew::REGISTERED, 1);
}
