//! What the models of concurrent use are made of: in the unit tests of `tests/models`, which is the library built with
//! `cfg(loom)`.
//!
//! A model runs the allocator's own code on loom's atomic words, which try every order of steps, and every value that a load
//! may see, that the language allows and that needs no more preemptions than a bound. Here are the machine that it runs on,
//! and its CPUs.
//!
//! A restartable sequence is one step of its CPU: it runs under the CPU's *token*, a lock that nobody takes but sequences of
//! that CPU and the fence. So sequences order nothing between CPUs, which plain loads and stores do not, and the fence
//! waits for those that are under way and orders itself with them, which is what `membarrier` grants.

use core::alloc::Layout;
use core::cell::{OnceCell, UnsafeCell};
use core::mem::MaybeUninit;
use core::ptr::NonNull;
use std::boxed::Box;
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::thread_local;
use std::vec::Vec;

use lock_api::GuardNoSend;
use loom::sync::{Mutex, MutexGuard};

pub(crate) use core::sync::atomic::Ordering;
pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64};

use crate::allocator::{PerCpuAllocator, Policy};
use crate::backing::contig::Contig;
use crate::backing::{Backing, BackingError, ChunkSpace, Context, PageSpan, Window};
use crate::cache::Seat;
use crate::embed;
use crate::this_cpu::{FenceError, Pair, Put, RemotePairs};
use crate::unit::{
    Contents, CpuId, EvenNodes, FirstChunkSpec, MIN_UNIT_BYTES, Template, UnitPlan, storage_words,
};

/// CPUs of the machine.
pub(crate) const CPUS: u32 = 2;

const CHUNKS: usize = 3;
const REGION_BYTES: usize = CHUNKS * CPUS as usize * MIN_UNIT_BYTES;
const METADATA_BYTES: usize = 1 << 20;
const NEUTRAL_BASE: usize = 0x10_0000;

/// Runs a model in every order of steps that needs no more than `preemptions` of them.
pub(crate) fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    let orders = Arc::new(core::sync::atomic::AtomicU64::new(0));
    let counted = orders.clone();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    std::println!("{} orders of steps", orders.load(Ordering::Relaxed));
}

thread_local! {
    /// The words of runs, by their address in a CPU's unit: loom's have no room there.
    static WORDS: RefCell<HashMap<usize, Box<[AtomicU64; 2]>>> = RefCell::default();
    /// The memory of a machine, which the next one takes over.
    static MEMORY: RefCell<Option<Memory>> = const { RefCell::new(None) };
}

/// The words of loom's that stand for those at an address in a CPU's unit.
///
/// # Safety
/// The result is not used when the machine is gone.
pub(crate) unsafe fn words_at<'a>(address: usize) -> &'a [AtomicU64; 2] {
    WORDS.with_borrow_mut(|words| {
        let words = words
            .entry(address)
            .or_insert_with(|| Box::new([AtomicU64::new(0), AtomicU64::new(0)]));
        let words: *const [AtomicU64; 2] = &raw const **words;
        // SAFETY: they stay until the machine goes (promise of the caller), and a box stays where it is.
        unsafe { &*words }
    })
}

/// The same of one word: one of two that begin where 16 divides the address.
///
/// # Safety
/// As [`words_at`].
pub(crate) unsafe fn word_at<'a>(address: usize) -> &'a AtomicU64 {
    // SAFETY: the promise of the caller.
    let words = unsafe { words_at(address & !(size_of::<Pair>() - 1)) };
    &words[address / size_of::<u64>() % 2]
}

#[derive(Clone, Copy)]
struct Memory {
    region: *mut [MaybeUninit<u8>],
    metadata: *mut [MaybeUninit<u8>],
}

impl Memory {
    fn of(bytes: usize) -> *mut [MaybeUninit<u8>] {
        let layout = Layout::from_size_align(bytes, 4096).expect("a small size");
        // SAFETY: the size is not 0.
        let start = unsafe { std::alloc::alloc(layout) };
        assert!(!start.is_null());
        core::ptr::slice_from_raw_parts_mut(start.cast(), bytes)
    }

    /// That of this thread.
    fn get() -> Self {
        MEMORY.with_borrow_mut(|memory| {
            *memory.get_or_insert_with(|| Self {
                region: Self::of(REGION_BYTES),
                metadata: Self::of(METADATA_BYTES),
            })
        })
    }
}

/// A lock of loom's behind `lock_api`'s trait.
pub(crate) struct ModelLock(OnceCell<Box<Held>>);

struct Held {
    /// Declared before the lock: gone before it.
    guard: UnsafeCell<Option<MutexGuard<'static, ()>>>,
    lock: Mutex<()>,
}

// SAFETY: a model's threads take turns on one thread of the system, and the guard belongs to whoever holds the lock.
unsafe impl Send for ModelLock {}
// SAFETY: as above.
unsafe impl Sync for ModelLock {}

impl ModelLock {
    fn held(&self) -> &Held {
        self.0.get_or_init(|| {
            Box::new(Held {
                guard: UnsafeCell::new(None),
                lock: Mutex::new(()),
            })
        })
    }

    fn lock_of(held: &Held) -> &'static Mutex<()> {
        let lock: *const Mutex<()> = &raw const held.lock;
        // SAFETY: whoever holds the lock borrows it, and so the guard goes before the lock does.
        unsafe { &*lock }
    }
}

// SAFETY: a lock of loom's excludes.
unsafe impl lock_api::RawMutex for ModelLock {
    const INIT: Self = Self(OnceCell::new());

    type GuardMarker = GuardNoSend;

    fn lock(&self) {
        let held = self.held();
        let guard = Self::lock_of(held)
            .lock()
            .expect("no model goes on after a panic");
        // SAFETY: the lock is held.
        unsafe { *held.guard.get() = Some(guard) };
    }

    fn try_lock(&self) -> bool {
        let held = self.held();
        let Ok(guard) = Self::lock_of(held).try_lock() else {
            return false;
        };
        // SAFETY: the lock is held.
        unsafe { *held.guard.get() = Some(guard) };
        true
    }

    unsafe fn unlock(&self) {
        // SAFETY: the lock is held (promise of the caller).
        drop(unsafe { (*self.held().guard.get()).take() });
    }
}

/// The backing of the models: contiguous memory, of which is known what pages are populated.
pub(crate) struct Pages {
    contig: Contig<ModelLock>,
    /// (chunk, page of the unit).
    populated: RefCell<BTreeSet<(u32, u32)>>,
    /// Whatever takes time is a step, so that others come in between.
    steps: AtomicU64,
}

impl Pages {
    fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a page of a later chunk has memory.
    pub(crate) fn is_populated(&self, chunk: u32, page: u32) -> bool {
        self.populated.borrow().contains(&(chunk, page))
    }
}

// SAFETY: all memory is contiguous memory's, which is always there.
unsafe impl Backing for Pages {
    fn window(&self) -> Window {
        self.contig.window()
    }

    fn allocate_metadata(
        &self,
        layout: Layout,
        context: Context,
    ) -> Result<NonNull<u8>, BackingError> {
        self.contig.allocate_metadata(layout, context)
    }

    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the promise of the caller.
        unsafe { self.contig.free_metadata(block, layout) };
    }

    unsafe fn reserve(&self, _: ChunkSpace<'_>, _: Context) -> Result<(), BackingError> {
        self.step();
        Ok(())
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        let is_of_chunk = |&(chunk, _): &(u32, u32)| chunk == space.chunk();
        assert!(!self.populated.borrow().iter().any(is_of_chunk));
        self.step();
    }

    unsafe fn populate(&self, span: PageSpan<'_>, _: Context) -> Result<Contents, BackingError> {
        for page in span.runs().flatten() {
            assert!(self.populated.borrow_mut().insert((span.chunk(), page)));
            self.step();
        }
        Ok(Contents::Zeroed)
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        for page in span.runs().flatten() {
            assert!(self.populated.borrow_mut().remove(&(span.chunk(), page)));
            self.step();
        }
    }

    fn relax(&self) {
        loom::thread::yield_now();
    }
}

/// The allocator of the models.
pub(crate) type ModelAllocator = PerCpuAllocator<Pages, ModelLock>;

/// An instance on a machine of [`CPUS`] CPUs, with their tokens.
pub(crate) struct Machine {
    pub(crate) pcpu: ModelAllocator,
    tokens: Vec<Mutex<()>>,
}

// SAFETY: a model's threads take turns on one thread of the system.
unsafe impl Send for Machine {}
// SAFETY: as above.
unsafe impl Sync for Machine {}

impl Machine {
    /// A machine whose CPUs are all there, without caches.
    pub(crate) fn new() -> Self {
        Self::with_policy(Policy::default())
    }

    fn with_policy(policy: Policy) -> Self {
        WORDS.with_borrow_mut(HashMap::clear);
        let memory = Memory::get();
        let (mut words, mut offsets) = ([0; storage_words(CPUS)], [0; CPUS as usize]);
        let spec = FirstChunkSpec {
            static_bytes: 8,
            atom_bytes: 4096,
            ..FirstChunkSpec::default()
        };
        let topology = EvenNodes::new(CPUS, 1).expect("a node");
        let plan = UnitPlan::embed(&spec, &topology, &mut words).expect("a plan");
        assert_eq!(plan.sizes().unit_bytes(), MIN_UNIT_BYTES);
        let template = Template {
            bytes: &[0; 8],
            base: NEUTRAL_BASE,
        };
        // SAFETY: the machine before is gone: models of one thread of the system come one after the other.
        let (region, metadata) = unsafe { (&mut *memory.region, &mut *memory.metadata) };
        let mut contig =
            Contig::new(region, metadata, &plan, template.base).expect("enough memory");
        let first_chunk =
            embed::build(plan, template, &mut offsets, &mut contig).expect("a first chunk");
        let pages = Pages {
            contig,
            populated: RefCell::default(),
            steps: AtomicU64::new(0),
        };
        let policy = Policy {
            spare_chunks: 0,
            empty_pages_low: 0,
            empty_pages_high: 2,
            quiet_frees: 0,
            ..policy
        };
        // SAFETY: the first chunk lies in the region of `contig`, which the instance takes over.
        let pcpu =
            unsafe { PerCpuAllocator::new(pages, &first_chunk, policy) }.expect("an instance");
        for cpu in 0..CPUS {
            pcpu.bring_up(CpuId::new(cpu)).expect("a CPU");
        }
        Self {
            pcpu,
            tokens: (0..CPUS).map(|_| Mutex::new(())).collect(),
        }
    }

    /// The same with caches, whose stashes are named in the areas.
    pub(crate) fn with_caches() -> Self {
        Self::with_caches_and_rows(false)
    }

    /// The same with caches, and with rows for the names of what is stashed or without.
    pub(crate) fn with_caches_and_rows(has_rows: bool) -> Self {
        let mut machine = Self::with_policy(Policy {
            names_in_rows: has_rows,
            ..Policy::default()
        });
        machine.pcpu.enable_caches().expect("memory for caches");
        machine
    }

    /// What a sequence of `cpu` runs under.
    pub(crate) fn token(&self, cpu: CpuId) -> MutexGuard<'_, ()> {
        let token = self.tokens[cpu.index()].lock();
        token.expect("no model goes on after a panic")
    }

    /// Waits for the sequences that are under way.
    pub(crate) fn fence(&self) {
        (0..CPUS).for_each(|cpu| drop(self.token(CpuId::new(cpu))));
        loom::sync::atomic::fence(Ordering::SeqCst);
    }

    /// `cpu`'s seat.
    pub(crate) fn seat(self: Arc<Self>, cpu: u32, remote: RemotePairs) -> ModelSeat {
        let cpu = CpuId::new(cpu);
        ModelSeat {
            machine: self,
            cpu,
            remote,
        }
    }
}

/// A CPU of a model, on which one thread is at a time.
#[derive(Clone)]
pub(crate) struct ModelSeat {
    machine: Arc<Machine>,
    cpu: CpuId,
    /// How other CPUs' pairs may be changed.
    remote: RemotePairs,
}

/// Whether a sequence finds the gate closed. On x86 its other loads come after this one.
pub(crate) fn is_closed(gate: &AtomicU32) -> bool {
    gate.load(Ordering::Acquire) != 0
}

impl ModelSeat {
    fn copy(&self, at: usize) -> &[AtomicU64; 2] {
        let units = self.machine.pcpu.units();
        let address = units.copy_of(at, self.cpu).expect("a possible CPU");
        // SAFETY: the seat keeps the machine.
        unsafe { words_at(address) }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        let units = self.machine.pcpu.units();
        let address = units.copy_of(at, self.cpu).expect("a possible CPU");
        // SAFETY: the seat keeps the machine.
        unsafe { word_at(address) }
    }

    fn link(&self, at: usize) -> *mut u32 {
        let units = self.machine.pcpu.units();
        let address = units.copy_of(at, self.cpu).expect("a possible CPU");
        core::ptr::with_exposed_provenance_mut(address)
    }

    /// Runs a sequence, or a LOCKed step: it is given the words, and says what the pair becomes. A sequence looks at the gate,
    /// and does nothing if it is closed.
    fn step<R>(
        &self,
        at: usize,
        gate: &AtomicU32,
        closed: R,
        act: impl FnOnce(Pair) -> (Option<Pair>, R),
    ) -> R {
        let _token = self.machine.token(self.cpu);
        if self.remote != RemotePairs::ByLockedStep && is_closed(gate) {
            return closed;
        }
        let [slots, run] = self.copy(at);
        let old = [slots.load(Ordering::Relaxed), run.load(Ordering::Relaxed)];
        let (new, result) = act(old);
        if let Some(new) = new {
            // On x86 every store releases; that of the map is the only one but for runs that are opened and closed.
            if new[1] != old[1] {
                run.store(new[1], Ordering::Release);
            }
            slots.store(new[0], Ordering::Release);
        }
        result
    }
}

// SAFETY: all steps on a CPU's pair are made under its token, or where the fence has been.
unsafe impl Seat for ModelSeat {
    fn cpu(&self) -> CpuId {
        self.cpu
    }

    unsafe fn take_slot(
        &self,
        at: usize,
        class: u64,
        class_mask: u64,
        gate: &AtomicU32,
    ) -> Option<Pair> {
        self.step(at, gate, None, |pair| {
            let seen = core::cell::Cell::new(None);
            let taken = crate::this_cpu::slots::take_by_replacing(
                || Some(pair),
                |old, new| {
                    seen.set(Some(new));
                    old
                },
                class,
                class_mask,
            );
            (seen.get(), taken)
        })
    }

    unsafe fn put_slot(&self, at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put {
        self.step(at, gate, Put::Elsewhere, |pair| {
            let seen = core::cell::Cell::new(None);
            let put = crate::this_cpu::slots::put_by_replacing(
                || Some(pair),
                |old, new| {
                    seen.set(Some(new).filter(|&new| new != old));
                    old
                },
                run,
                slot,
            );
            (seen.get(), put)
        })
    }

    unsafe fn replace_pair_gated(&self, at: usize, old: Pair, new: Pair, gate: &AtomicU32) -> bool {
        self.step(at, gate, false, |pair| {
            ((pair == old).then_some(new), pair == old)
        })
    }

    unsafe fn peek_pair(&self, at: usize) -> Option<Pair> {
        Some(
            self.copy(at)
                .each_ref()
                .map(|word| word.load(Ordering::Acquire)),
        )
    }

    unsafe fn peek_word(&self, at: usize) -> Option<u64> {
        Some(self.word(at).load(Ordering::Acquire))
    }

    unsafe fn replace_word(&self, at: usize, old: u64, new: u64) -> bool {
        let _token = self.machine.token(self.cpu);
        let word = self.word(at);
        let is_old = word.load(Ordering::Relaxed) == old;
        if is_old {
            word.store(new, Ordering::Release);
        }
        is_old
    }

    unsafe fn read_link(&self, at: usize) -> u32 {
        let _token = self.machine.token(self.cpu);
        // SAFETY: the area is the caller's; in a row of names nobody is under the CPU's token but the caller.
        unsafe { self.link(at).read() }
    }

    unsafe fn write_link(&self, at: usize, link: u32) {
        let _token = self.machine.token(self.cpu);
        // SAFETY: as above.
        unsafe { self.link(at).write(link) }
    }

    fn remote_pairs(&self) -> RemotePairs {
        self.remote
    }

    unsafe fn replace_remote_pair(&self, copy: *mut Pair, old: Pair, new: Pair) -> bool {
        let cpus = (0..CPUS).map(CpuId::new);
        let tokens: Vec<_> = cpus.map(|cpu| self.machine.token(cpu)).collect();
        // SAFETY: the seat keeps the machine.
        let words = unsafe { words_at(copy.addr()) };
        let found = words.each_ref().map(|word| word.load(Ordering::Relaxed));
        if found == old {
            words[1].store(new[1], Ordering::Release);
            words[0].store(new[0], Ordering::Release);
        }
        drop(tokens);
        found == old
    }

    fn wait_for_gated(&self) -> Result<(), FenceError> {
        self.machine.fence();
        Ok(())
    }
}
