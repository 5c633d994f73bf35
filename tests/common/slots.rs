//! The operations on slots, on whatever home: against a plain model ([`check_model`]), and accounts of many threads' work
//! ([`Ledger`]), by which every slot is owned by one thread at most and none gets lost.

use std::cell::Cell;
use std::iter;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use pcpu::this_cpu::slots::{FRESH, FULL, MAP, ONE_TAKEN};
use pcpu::this_cpu::{LocalOps, Pair, Put, RemotePairs};

use crate::mix::{STEP, mix};

/// The class of a run is its low byte.
const CLASS_MASK: u64 = 0xff;

/// Whether a home's operations look at the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gates {
    Tested,
    Ignored,
}

fn next_random(state: &Cell<u64>) -> u64 {
    state.set(state.get().wrapping_add(STEP));
    mix(state.get())
}

/// A run as one would write it down.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    free: Vec<bool>,
    is_fresh: bool,
    taken: u64,
    is_full: bool,
    what: u64,
}

impl Run {
    fn new([slots, what]: Pair) -> Self {
        Self {
            free: (0..32).map(|slot| slots >> slot & 1 != 0).collect(),
            is_fresh: slots & FRESH != 0,
            taken: (slots & !FULL) >> 33,
            is_full: slots & FULL != 0,
            what,
        }
    }

    fn words(&self) -> Pair {
        let map = |(slot, &is_free)| u64::from(is_free) << slot;
        let map: u64 = self.free.iter().enumerate().map(map).sum();
        let flags = u64::from(self.is_fresh) << 32 | u64::from(self.is_full) << 63;
        [map | flags | self.taken << 33, self.what]
    }

    fn take(&mut self, class: u64, class_mask: u64) -> Option<Pair> {
        let before = self.words();
        let lowest = self.free.iter().position(|&is_free| is_free);
        let slot = lowest.filter(|_| self.what & class_mask == class && !self.is_full)?;
        self.free[slot] = false;
        self.taken += 1;
        if self.taken == 1 << 30 {
            (self.taken, self.is_full) = (0, true);
        }
        Some(before)
    }

    fn put(&mut self, what: u64, slot: usize) -> Put {
        if what != self.what {
            return Put::Elsewhere;
        }
        if self.free[slot] {
            return Put::WasFree;
        }
        (self.free[slot], self.is_fresh) = (true, false);
        Put::Done
    }
}

/// Tries `steps` random operations on the current CPU's pair at `at`, which nobody else uses meanwhile.
///
/// # Safety
/// A pair lives there, and the caller stays on its CPU.
pub unsafe fn check_model<O: LocalOps>(at: usize, seed: u64, steps: u64, gates: Gates) {
    let random = Cell::new(seed);
    let random = || next_random(&random);
    let (open, closed) = (AtomicU32::new(0), AtomicU32::new(1 << 31));
    // SAFETY: here and below the promise of the caller.
    let peek = || unsafe { O::peek_pair(at) }.expect("the thread has a copy");
    let mut model = Run::new(peek());
    let mut seen = [0_u64; 7];
    for step in 0..steps {
        let is_closed = random().is_multiple_of(8);
        let gate = if is_closed { &closed } else { &open };
        let is_refused = is_closed && gates == Gates::Tested;
        let before = model.clone();
        match random() % 8 {
            0 => {
                // As it is, or another in one word.
                let mut old = model.words();
                let word = (random() % 4) as usize;
                if let Some(word) = old.get_mut(word) {
                    *word ^= 1 << (random() % 64);
                }
                let map = match random() % 4 {
                    0 => 0,
                    1 => MAP,
                    _ => random() & MAP,
                };
                // The last but one that can be counted, or full already, among others.
                let taken = [0, (1 << 31) - 1, (1 << 30) - 2, 1 << 30, random() >> 34];
                let taken = taken[(random() % 5) as usize] << 33;
                let new = [
                    map | random() & FRESH | taken,
                    ((random() % 3) << 8) | (random() % 3),
                ];
                let is_old = old == model.words() && !is_refused;
                // SAFETY: as above.
                let is_replaced = unsafe { O::replace_pair_gated(at, old, new, gate) };
                assert_eq!(is_replaced, is_old, "step {step}: {old:x?} in {before:x?}");
                if is_old {
                    model = Run::new(new);
                }
                seen[0] += u64::from(is_old);
            }
            1..4 => {
                let class_mask = [CLASS_MASK, u64::MAX, 0][(random() % 3) as usize];
                let class = match random() % 4 {
                    0 => random() % 4,
                    _ => model.what & class_mask,
                };
                let expected = match is_refused {
                    true => None,
                    false => model.take(class, class_mask),
                };
                // SAFETY: as above.
                let found = unsafe { O::take_slot(at, class, class_mask, gate) };
                assert_eq!(found, expected, "step {step}: {class:x} of {before:x?}");
                seen[1] += u64::from(found.is_some());
                seen[2] += u64::from(before.is_full && found.is_none());
                seen[3] += u64::from(model.is_full && !before.is_full);
            }
            _ => {
                let run = model.what ^ u64::from(random().is_multiple_of(8)) << (random() % 64);
                let slot = (random() % 32) as usize;
                let expected = match is_refused {
                    true => Put::Elsewhere,
                    false => model.put(run, slot),
                };
                // SAFETY: as above.
                let found = unsafe { O::put_slot(at, run, 1 << slot, gate) };
                assert_eq!(
                    found, expected,
                    "step {step}: {slot} of {run:x} in {before:x?}"
                );
                seen[4 + found as usize] += 1;
            }
        }
        assert_eq!(peek(), model.words(), "step {step} of {before:x?}");
    }
    assert!(seen.iter().all(|&times| times > steps / 1000), "{seen:?}");
}

/// How many runs there are to be opened.
const RUNS: u64 = 12;

/// How many slots a thread holds at most.
const HELD: usize = 12;

/// Where a run's slots are while it is open on no CPU, and who says that they are taken.
#[derive(Debug, Default)]
struct Account {
    is_open: AtomicBool,
    /// The slots that are nobody's, and on no CPU.
    home: AtomicU64,
    /// The slots that somebody holds.
    held: AtomicU64,
}

/// The accounts of all runs.
#[derive(Debug)]
pub struct Ledger {
    runs: Vec<Account>,
    /// How many slots were taken of runs that were closed, as the runs themselves have counted.
    counted: AtomicU64,
    drains: AtomicU64,
    gate: AtomicU32,
    is_drained: AtomicBool,
}

/// What one thread holds, or the signal handler in one thread.
#[derive(Debug)]
pub struct Hand {
    /// (second word of the run, bit); no bit: none.
    held: [Cell<(u64, u64)>; HELD],
    taken: Cell<u64>,
    put: Cell<u64>,
    opened: Cell<u64>,
    random: Cell<u64>,
}

impl Hand {
    pub fn new(seed: usize) -> Self {
        Self {
            held: [const { Cell::new((0, 0)) }; HELD],
            taken: Cell::new(0),
            put: Cell::new(0),
            opened: Cell::new(0),
            random: Cell::new((seed as u64) << 40),
        }
    }

    /// A number that no other hand has now.
    pub fn random(&self) -> u64 {
        next_random(&self.random)
    }
}

fn count(cell: &Cell<u64>) {
    cell.set(cell.get() + 1);
}

/// The second word of a run, of class 0, 1 or 2.
fn word_of(index: u64) -> u64 {
    0xabcd << 48 | (index + 1) << 8 | (index % 3)
}

impl Ledger {
    /// All slots are at home.
    pub fn new() -> Self {
        let runs: Vec<Account> = iter::repeat_with(Account::default)
            .take(RUNS as usize)
            .collect();
        runs.iter().for_each(|run| run.home.store(MAP, SeqCst));
        Self {
            runs,
            counted: AtomicU64::new(0),
            drains: AtomicU64::new(0),
            gate: AtomicU32::new(0),
            is_drained: AtomicBool::new(false),
        }
    }

    fn run(&self, word: u64) -> &Account {
        let index = (word >> 8 & 0xff) - 1;
        assert_eq!(word, word_of(index), "the word of no run");
        &self.runs[index as usize]
    }

    fn bring_home(&self, word: u64, slots: u64) {
        let before = self.run(word).home.fetch_or(slots, SeqCst);
        assert_eq!(before & slots, 0, "at home already");
    }

    /// One random operation on the current CPU's pair.
    ///
    /// # Safety
    /// A pair lives at `at`, and only ledgers change it, this one.
    pub unsafe fn step<O: LocalOps>(&self, at: usize, hand: &Hand) {
        let random = hand.random();
        if self.gate.load(SeqCst) != 0 && !(random >> 50).is_multiple_of(8) {
            // Few operations would do anything until the thread that drains may go on.
            std::thread::yield_now();
        }
        let place = &hand.held[random as usize % HELD];
        let (word, slot) = place.get();
        if slot != 0 {
            place.set((0, 0));
            // SAFETY: the promise of the caller.
            unsafe { self.put::<O>(at, word, slot) };
            count(&hand.put);
            return;
        }
        let class = (random >> 32) % 3;
        // SAFETY: the promise of the caller.
        let taken = unsafe { O::take_slot(at, class, CLASS_MASK, &self.gate) };
        if let Some([slots, word]) = taken {
            let slot = slots & slots.wrapping_neg();
            assert!(word & CLASS_MASK == class && slots & MAP != 0 && slots & FULL == 0);
            let before = self.run(word).held.fetch_or(slot, SeqCst);
            assert_eq!(before & slot, 0, "a slot of two threads");
            place.set((word, slot));
            count(&hand.taken);
        } else if (random >> 40).is_multiple_of(16) {
            // SAFETY: the promise of the caller.
            unsafe { self.turn_over::<O>(at, hand) };
        }
    }

    unsafe fn put<O: LocalOps>(&self, at: usize, word: u64, slot: u64) {
        let before = self.run(word).held.fetch_and(!slot, SeqCst);
        assert_eq!(before & slot, slot, "a slot of nobody");
        // SAFETY: the promise of the caller.
        match unsafe { O::put_slot(at, word, slot, &self.gate) } {
            Put::Done => {}
            Put::WasFree => panic!("slot {slot:x} of {word:x} was free while it was held"),
            Put::Elsewhere => self.bring_home(word, slot),
        }
    }

    /// Closes the run that is open on the current CPU, or opens one if there is none.
    unsafe fn turn_over<O: LocalOps>(&self, at: usize, hand: &Hand) {
        // SAFETY: the promise of the caller.
        let Some(old) = (unsafe { O::peek_pair(at) }) else {
            return;
        };
        if old[1] != 0 {
            // SAFETY: the promise of the caller.
            let is_closed = unsafe { O::replace_pair_gated(at, old, [0; 2], &self.gate) };
            if is_closed {
                self.close(old);
            }
            return;
        }
        let index = hand.random() % RUNS;
        let run = &self.runs[index as usize];
        if run.is_open.swap(true, SeqCst) {
            return;
        }
        let slots = run.home.swap(0, SeqCst);
        let new = [slots | FRESH, word_of(index)];
        // SAFETY: the promise of the caller.
        let open = || unsafe { O::replace_pair_gated(at, [0; 2], new, &self.gate) };
        if slots != 0 && open() {
            count(&hand.opened);
            return;
        }
        self.bring_home(word_of(index), slots);
        run.is_open.store(false, SeqCst);
    }

    /// Books a run that is open no more.
    fn close(&self, [slots, word]: Pair) {
        self.counted.fetch_add(slots / ONE_TAKEN, SeqCst);
        self.bring_home(word, slots & MAP);
        self.run(word).is_open.store(false, SeqCst);
    }

    /// Takes the free slots of all these copies, from wherever the caller is, in the way that the home has; closes the runs
    /// of some. Does nothing if somebody is at it already.
    ///
    /// # Safety
    /// They are copies of a pair that only this ledger changes.
    pub unsafe fn drain<O: LocalOps>(&self, hand: &Hand, copies: impl Iterator<Item = *mut Pair>) {
        let way = O::remote_pairs();
        if way == RemotePairs::Never || self.is_drained.swap(true, SeqCst) {
            return;
        }
        let _draining = Draining(self);
        if way == RemotePairs::AfterFence {
            self.gate.store(1, SeqCst);
            O::wait_for_gated().expect("the system grants it");
        }
        for copy in copies {
            let is_closing = hand.random().is_multiple_of(2);
            let emptied = |[slots, word]: Pair| match is_closing {
                true => [0; 2],
                false => [slots & !MAP, word],
            };
            // SAFETY: live and aligned (promise of the caller).
            let words = unsafe {
                [
                    AtomicU64::from_ptr(copy.cast()),
                    AtomicU64::from_ptr(copy.cast::<u64>().add(1)),
                ]
            };
            let old = loop {
                let old = words.map(|word| word.load(SeqCst));
                if way == RemotePairs::AfterFence {
                    // Time for those that may not be there to come in between.
                    (0..hand.random() % 256).for_each(|_| std::hint::spin_loop());
                    let new = emptied(old);
                    words[0].store(new[0], SeqCst);
                    words[1].store(new[1], SeqCst);
                    break old;
                }
                // SAFETY: the home is such a one.
                if unsafe { O::replace_remote_pair(copy, old, emptied(old)) } {
                    break old;
                }
            };
            match old {
                [_, 0] => {}
                old if is_closing => self.close(old),
                [slots, word] => self.bring_home(word, slots & MAP),
            }
        }
        self.drains.fetch_add(1, SeqCst);
    }

    /// Panics unless every slot is in one place, now that nobody works any more.
    pub fn settle(self, hands: &[Hand], copies: impl Iterator<Item = Pair>) {
        let mut held = vec![0; RUNS as usize];
        for (word, slot) in hands.iter().flat_map(|hand| &hand.held).map(Cell::get) {
            if slot != 0 {
                let index = (word >> 8 & 0xff) as usize - 1;
                assert_eq!(held[index] & slot, 0, "a slot of two threads");
                held[index] |= slot;
            }
        }
        for (run, held) in self.runs.iter().zip(held) {
            assert_eq!(run.held.load(SeqCst), held, "held by those who say so");
        }
        for copy in copies {
            if copy[1] == 0 {
                assert_eq!(copy[0], 0, "half a run");
                continue;
            }
            assert!(self.run(copy[1]).is_open.load(SeqCst), "on two CPUs");
            self.close(copy);
        }
        for (index, run) in self.runs.iter().enumerate() {
            assert!(!run.is_open.load(SeqCst), "open nowhere");
            let (home, held) = (run.home.load(SeqCst), run.held.load(SeqCst));
            assert_eq!((home & held, home | held), (0, MAP), "slots of run {index}");
        }
        let sum =
            |of: fn(&Hand) -> &Cell<u64>| hands.iter().map(|hand| of(hand).get()).sum::<u64>();
        let taken = sum(|hand| &hand.taken);
        let (put, opened) = (sum(|hand| &hand.put), sum(|hand| &hand.opened));
        let drains = self.drains.into_inner();
        println!("{taken} taken, {put} put, {opened} runs opened, {drains} drains");
        assert_eq!(self.counted.into_inner(), taken, "as the runs have counted");
        assert!(taken > 0 && put > 0 && opened > 0);
    }
}

/// Somebody drains; others may go on afterwards, also if that failed.
struct Draining<'a>(&'a Ledger);

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        self.0.gate.store(0, SeqCst);
        self.0.is_drained.store(false, SeqCst);
    }
}
