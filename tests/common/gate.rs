//! A backing that a test stands in the way of: before each step it does what the test tells it to, and it may fail.
//!
//! No lock is held during a step, so that the test may use the instance there, from this or another thread: what
//! happens at the same time elsewhere happens at a chosen moment.

use std::alloc::Layout;
use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use pcpu::PerCpuAllocator;
use pcpu::allocator::Policy;
use pcpu::backing::mmap::{Geometry, Mmap, Placement};
use pcpu::backing::{Backing, BackingError, ChunkSpace, Context, PageSpan, Window};
use pcpu::cpus::Cpus;
use pcpu::embed;
use pcpu::stats::MapItem;
use pcpu::unit::{Contents, CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};

/// What the backing is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Make a chunk.
    Reserve,
    /// Populate pages, beginning with this one.
    Populate(u32),
    /// Populate pages for one CPU that is brought up.
    PopulateFor(CpuId),
    /// Give pages back.
    Depopulate,
}

/// Whether a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Pass,
    /// It fails.
    Fail,
}

type Guard = Arc<dyn Fn(Step) -> Verdict + Send + Sync>;

/// The backing.
pub struct Gate {
    memory: Mmap,
    guard: Mutex<Guard>,
    /// (chunk, CPU, page of the unit) of all pages that have memory.
    pages: Mutex<BTreeSet<(u32, u32, u32)>>,
}

/// An instance over it. Nothing ends it: guards use it as long as they like.
pub type Gated = &'static PerCpuAllocator<Gate, parking_lot::RawMutex>;

/// A machine with units of eight pages of 4 KiB, whose first chunk is full.
pub fn gated_machine(cpus: u32, online: u32) -> Gated {
    let spec = FirstChunkSpec {
        atom_bytes: 4096,
        ..FirstChunkSpec::default()
    };
    let topology = EvenNodes::new(cpus, 1).unwrap();
    let (mut words, mut offsets) = (vec![0; storage_words(cpus)], vec![0; cpus as usize]);
    let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
    let geometry = Geometry::pages(64 * plan.sizes().unit_bytes());
    let mut memory = Mmap::reserve(&plan, geometry, Placement::Any).unwrap();
    let template = Template {
        bytes: &[],
        base: memory.neutral_base(),
    };
    let first_chunk = embed::build(plan, template, &mut offsets, &mut memory).unwrap();
    let gate = Gate {
        memory,
        guard: Mutex::new(Arc::new(|_| Verdict::Pass)),
        pages: Mutex::new(BTreeSet::new()),
    };
    // SAFETY: the first chunk lies in the memory of `gate`, which the instance takes over.
    let pcpu = unsafe { PerCpuAllocator::new(gate, &first_chunk, Policy::default()) };
    let pcpu: Gated = Box::leak(Box::new(pcpu.unwrap()));
    for cpu in 0..online {
        pcpu.bring_up(CpuId::new(cpu)).unwrap();
    }
    let rest = pcpu::Request::new(pcpu.sizes().dyn_bytes(), 4);
    pcpu.allocate(&rest).unwrap();
    pcpu
}

impl Gate {
    /// From now on `guard` is asked before each step.
    pub fn set_guard(&self, guard: impl Fn(Step) -> Verdict + Send + Sync + 'static) {
        *self.guard.lock().unwrap() = Arc::new(guard);
    }

    fn ask(&self, step: Step) -> Verdict {
        let guard = self
            .guard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        guard(step)
    }

    fn each_page(span: PageSpan<'_>) -> impl Iterator<Item = (u32, u32, u32)> {
        span.cpus().iter().flat_map(move |cpu| {
            let pages = span.runs().flatten();
            pages.map(move |page| (span.chunk(), cpu.get(), page))
        })
    }
}

/// Panics unless every materialised CPU has the pages that the maps report, and no other CPU has any.
pub fn assert_pages_agree(pcpu: Gated) {
    let page_bytes = pcpu.sizes().page_bytes();
    let mut reported = BTreeSet::new();
    pcpu.visit_map(|place, item| {
        if let (1.., MapItem::Populated(range)) = (place, item) {
            let pages = range.start / page_bytes..range.end / page_bytes;
            for cpu in pcpu.units().materialised().iter() {
                let key = |page| (place, cpu.get(), page as u32);
                reported.extend(pages.clone().map(key));
            }
        }
    });
    assert_eq!(*pcpu.backing().pages.lock().unwrap(), reported);
}

// SAFETY: all memory is that of `Mmap`, whose promises hold for what is passed on; a step that fails does nothing.
unsafe impl Backing for Gate {
    fn window(&self) -> Window {
        self.memory.window()
    }

    fn allocate_metadata(
        &self,
        layout: Layout,
        context: Context,
    ) -> Result<NonNull<u8>, BackingError> {
        self.memory.allocate_metadata(layout, context)
    }

    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the promise of the caller.
        unsafe { self.memory.free_metadata(block, layout) };
    }

    unsafe fn reserve(&self, space: ChunkSpace<'_>, context: Context) -> Result<(), BackingError> {
        match self.ask(Step::Reserve) {
            // SAFETY: the promise of the caller.
            Verdict::Pass => unsafe { self.memory.reserve(space, context) },
            Verdict::Fail => Err(BackingError::OutOfAddressSpace),
        }
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        // SAFETY: the promise of the caller.
        unsafe { self.memory.release(space) };
    }

    unsafe fn populate(
        &self,
        span: PageSpan<'_>,
        context: Context,
    ) -> Result<Contents, BackingError> {
        let step = match span.cpus() {
            Cpus::One(cpu) => Step::PopulateFor(cpu),
            Cpus::Set(_) => Step::Populate(span.runs().next().map_or(0, |run| run.start)),
        };
        if self.ask(step) == Verdict::Fail {
            return Err(BackingError::OutOfFrames);
        }
        self.pages.lock().unwrap().extend(Self::each_page(span));
        // SAFETY: the promise of the caller.
        unsafe { self.memory.populate(span, context) }
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        self.ask(Step::Depopulate);
        let mut pages = self.pages.lock().unwrap();
        for page in Self::each_page(span) {
            pages.remove(&page);
        }
        // SAFETY: the promise of the caller.
        unsafe { self.memory.depopulate(span) };
    }

    fn relax(&self) {
        self.memory.relax();
    }
}
