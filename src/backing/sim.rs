//! A simulated machine of any shape: any number of CPUs and nodes, any geometry, with real memory behind it, a record
//! of the backing's calls, and faults on demand.
//!
//! What the tests and the trace tools run on is the allocator itself; only this backing differs. Memory that was given
//! back stays with the simulated machine and is handed out dirty, like frames of a real one.

use std::alloc::{GlobalAlloc, System};
use std::boxed::Box;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::vec::Vec;

use core::alloc::Layout;
use core::ops::Range;

use parking_lot::Mutex;

use super::mmap::{Geometry, Mmap, Placement};
use super::{Backing, BackingError, ChunkSpace, Context, CpuArea, PageSpan, Window};
use crate::allocator::PerCpuAllocator;
use crate::embed::{AreaRequest, EarlyMemory};
use crate::page::PageMemory;
use crate::unit::{Contents, CpuId, NodeId, UnitPlan};

use frames::Frames;
pub use machine::{Machine, MachineError};

mod frames;
mod machine;

/// An allocator on a simulated machine.
pub type SimAllocator = PerCpuAllocator<Sim, parking_lot::RawMutex>;

/// What sets one simulated machine's memory apart from another's.
#[derive(Debug, Clone, Copy)]
struct SimConfig {
    contents: Contents,
    checks: Checks,
    reserve: Context,
    /// The most metadata that may be out, in bytes.
    metadata_bytes: usize,
    nodes: u32,
    /// The frames of each node; `None` where they do not run out.
    node_frames: Option<u64>,
}

/// Whether a simulated machine checks its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checks {
    Off,
    On,
}

/// A call of the backing, as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Call {
    /// Metadata was allocated.
    AllocateMetadata {
        /// Its size.
        bytes: usize,
        /// Whether the call could sleep.
        context: Context,
    },
    /// Metadata was freed.
    FreeMetadata {
        /// Its size.
        bytes: usize,
    },
    /// A chunk was reserved.
    Reserve {
        /// Its place.
        chunk: u32,
        /// Whether the call could sleep.
        context: Context,
    },
    /// A chunk was released.
    Release {
        /// Its place.
        chunk: u32,
    },
    /// Pages were populated.
    Populate {
        /// The chunk's place.
        chunk: u32,
        /// Which pages, as runs of neighbours, counted in the unit.
        pages: Vec<Range<u32>>,
        /// On which CPUs.
        cpus: Vec<CpuId>,
        /// Whether the call could sleep.
        context: Context,
    },
    /// Pages were given back.
    Depopulate {
        /// The chunk's place.
        chunk: u32,
        /// Which pages, as runs of neighbours, counted in the unit.
        pages: Vec<Range<u32>>,
        /// On which CPUs.
        cpus: Vec<CpuId>,
    },
    /// A CPU was about to be brought up.
    BeginCpu {
        /// The CPU.
        cpu: CpuId,
    },
    /// It was.
    FinishCpu {
        /// The CPU.
        cpu: CpuId,
    },
    /// It was not after all.
    CancelCpu {
        /// The CPU.
        cpu: CpuId,
    },
}

/// Decides which calls fail.
type Faults = Box<dyn Fn(u64) -> bool + Send>;

/// The backing of a simulated machine.
pub struct Sim {
    memory: Mmap,
    config: SimConfig,
    state: Mutex<SimState>,
}

struct SimState {
    fails: Faults,
    /// Calls so far that may fail.
    fallible_calls: u64,
    log: Option<Vec<Call>>,
    /// Pages that have held something, by chunk: a bit per page.
    used: BTreeMap<u32, Vec<u64>>,
    /// Blocks of metadata out, by address.
    metadata: BTreeMap<usize, Layout>,
    /// With checks on: chunks reserved, and the populated pages by (chunk, CPU).
    reserved: BTreeSet<u32>,
    populated: BTreeMap<(u32, u32), BTreeSet<u32>>,
    /// The CPU that is being brought up.
    coming: Option<CpuId>,
    frames: Frames,
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim")
            .field("memory", &self.memory)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Sim {
    fn new(plan: &UnitPlan<'_>, chunks: u32, config: SimConfig) -> io::Result<Self> {
        let sizes = plan.sizes();
        let window_bytes = (chunks as usize)
            .checked_mul(sizes.unit_bytes())
            .and_then(|bytes| bytes.checked_next_multiple_of(sizes.area_align_bytes()))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            memory: Mmap::reserve(plan, Geometry::side_by_side(window_bytes), Placement::Any)?,
            config,
            state: Mutex::new(SimState {
                fails: Box::new(|_| false),
                fallible_calls: 0,
                log: None,
                used: BTreeMap::new(),
                metadata: BTreeMap::new(),
                reserved: BTreeSet::new(),
                populated: BTreeMap::new(),
                coming: None,
                frames: Frames::new(config.nodes, config.node_frames),
            }),
        })
    }

    /// From now on, the calls fail for which `fails` is true; it is given the number of the call, from 0, counting
    /// those that can fail.
    pub fn set_faults(&self, fails: impl Fn(u64) -> bool + Send + 'static) {
        let mut state = self.state.lock();
        state.fails = Box::new(fails);
        state.fallible_calls = 0;
    }

    /// Calls that can fail, since the faults were set last.
    pub fn fallible_calls(&self) -> u64 {
        self.state.lock().fallible_calls
    }

    /// Starts recording calls, or starts anew.
    pub fn record(&self) {
        self.state.lock().log = Some(Vec::new());
    }

    /// The calls recorded since, or none if nothing is recorded.
    pub fn recorded(&self) -> Vec<Call> {
        self.state.lock().log.clone().unwrap_or_default()
    }

    /// Bytes of metadata that are out.
    pub fn metadata_bytes(&self) -> usize {
        self.state.lock().metadata.values().map(Layout::size).sum()
    }

    /// The populated pages of a chunk on a CPU, counted in the unit. Only a [checked](Machine::checked) machine knows.
    pub fn populated_pages(&self, chunk: u32, cpu: CpuId) -> Vec<u32> {
        let state = self.state.lock();
        state
            .populated
            .get(&(chunk, cpu.get()))
            .map(|pages| pages.iter().copied().collect())
            .unwrap_or_default()
    }

    /// The chunks that are reserved, the first not included. Only a [checked](Machine::checked) machine knows.
    pub fn reserved_chunks(&self) -> Vec<u32> {
        self.state.lock().reserved.iter().copied().collect()
    }

    /// Frames that lie on another node than their CPU's, because that had none left when they were taken.
    pub fn frames_from_afar(&self) -> usize {
        self.state.lock().frames.borrowed()
    }

    /// Frames that a node has left; `None` if they [do not run out](Machine::node_frames), or there is no such node.
    pub fn frames_left(&self, node: NodeId) -> Option<u64> {
        self.state.lock().frames.left(node)
    }

    fn is_checked(&self) -> bool {
        self.config.checks == Checks::On
    }

    /// Counts a call that can fail; whether it does.
    fn fails(&self) -> bool {
        let mut state = self.state.lock();
        let number = state.fallible_calls;
        state.fallible_calls += 1;
        (state.fails)(number)
    }

    fn log(&self, call: impl FnOnce() -> Call) {
        if let Some(log) = &mut self.state.lock().log {
            log.push(call());
        }
    }

    fn fill(span: PageSpan<'_>, byte: u8) {
        span.areas().for_each(|area| Self::fill_area(area, byte));
    }

    fn fill_area(area: CpuArea, byte: u8) {
        // SAFETY: callers fill pages that belong to the backing at this moment.
        unsafe {
            std::ptr::with_exposed_provenance_mut::<u8>(area.address).write_bytes(byte, area.bytes)
        };
    }
}

impl Drop for SimState {
    fn drop(&mut self) {
        // The allocator has given everything back by now; a panic on the way here has a better message.
        if !std::thread::panicking() {
            assert!(
                self.metadata.is_empty(),
                "metadata left: {:?}",
                self.metadata
            );
            assert!(self.reserved.is_empty(), "chunks left: {:?}", self.reserved);
        }
    }
}

// SAFETY: all memory is that of `Mmap`.
unsafe impl EarlyMemory for Sim {
    type Error = io::Error;

    fn unit_stride_bytes(&self, unit_bytes: usize) -> usize {
        EarlyMemory::unit_stride_bytes(&self.memory, unit_bytes)
    }

    fn contents(&self) -> Contents {
        EarlyMemory::contents(&self.memory)
    }

    fn vm_space_bytes(&self) -> usize {
        self.memory.vm_space_bytes()
    }

    fn alloc_area(&mut self, request: AreaRequest) -> io::Result<NonNull<u8>> {
        if self.fails() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.memory.alloc_area(request)
    }

    unsafe fn free(&mut self, start: NonNull<u8>, bytes: usize) {
        // SAFETY: the promise of the caller.
        unsafe { self.memory.free(start, bytes) };
    }
}

// SAFETY: all memory is that of `Mmap`.
unsafe impl PageMemory for Sim {
    type Error = io::Error;

    fn page_bytes(&self) -> usize {
        PageMemory::page_bytes(&self.memory)
    }

    fn unit_stride_bytes(&self, unit_bytes: usize) -> usize {
        PageMemory::unit_stride_bytes(&self.memory, unit_bytes)
    }

    fn contents(&self) -> Contents {
        PageMemory::contents(&self.memory)
    }

    fn reserve_window(&mut self, bytes: usize) -> io::Result<NonNull<u8>> {
        if self.fails() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.memory.reserve_window(bytes)
    }

    unsafe fn map_new_page(&mut self, node: NodeId, address: NonNull<u8>) -> io::Result<()> {
        if self.fails() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        // SAFETY: the promise of the caller.
        unsafe { self.memory.map_new_page(node, address) }
    }

    unsafe fn unmap_page(&mut self, address: NonNull<u8>) {
        // SAFETY: the promise of the caller.
        unsafe { self.memory.unmap_page(address) };
    }

    unsafe fn release_window(&mut self, base: NonNull<u8>, bytes: usize) {
        // SAFETY: the promise of the caller.
        unsafe { self.memory.release_window(base, bytes) };
    }
}

// SAFETY: address space is that of `Mmap`; pages read as zero until they are first given back, and are called dirty
// from then on. Metadata comes from the system's allocator.
unsafe impl Backing for Sim {
    fn window(&self) -> Window {
        self.memory.window()
    }

    fn allocate_metadata(
        &self,
        layout: Layout,
        context: Context,
    ) -> Result<NonNull<u8>, BackingError> {
        if self.fails() || self.metadata_bytes() + layout.size() > self.config.metadata_bytes {
            return Err(BackingError::OutOfMetadata);
        }
        // SAFETY: the allocator asks for blocks of a size above zero only.
        let block =
            NonNull::new(unsafe { System.alloc(layout) }).ok_or(BackingError::OutOfMetadata)?;
        if self.is_checked() {
            // SAFETY: the block is that long, and nobody else's yet.
            unsafe { block.write_bytes(0xa5, layout.size()) };
        }
        self.state
            .lock()
            .metadata
            .insert(block.as_ptr().addr(), layout);
        self.log(|| Call::AllocateMetadata {
            bytes: layout.size(),
            context,
        });
        Ok(block)
    }

    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout) {
        let out = self.state.lock().metadata.remove(&block.as_ptr().addr());
        assert_eq!(out, Some(layout), "metadata freed that is not out");
        self.log(|| Call::FreeMetadata {
            bytes: layout.size(),
        });
        // SAFETY: allocated above with this layout.
        unsafe { System.dealloc(block.as_ptr(), layout) };
    }

    unsafe fn reserve(&self, space: ChunkSpace<'_>, context: Context) -> Result<(), BackingError> {
        if context == Context::Atomic && self.config.reserve == Context::MaySleep {
            return Err(BackingError::WouldSleep);
        }
        if self.fails() {
            return Err(BackingError::OutOfAddressSpace);
        }
        // SAFETY: the promise of the caller.
        unsafe { self.memory.reserve(space, context)? };
        if self.is_checked() {
            assert!(
                self.state.lock().reserved.insert(space.chunk()),
                "chunk {} is reserved",
                space.chunk()
            );
        }
        self.log(|| Call::Reserve {
            chunk: space.chunk(),
            context,
        });
        Ok(())
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        if self.is_checked() {
            let mut state = self.state.lock();
            assert!(
                state.reserved.remove(&space.chunk()),
                "chunk {} is not reserved",
                space.chunk()
            );
            let left = state
                .populated
                .iter()
                .find(|((chunk, _), pages)| *chunk == space.chunk() && !pages.is_empty());
            assert!(
                left.is_none(),
                "chunk {} still has pages: {left:?}",
                space.chunk()
            );
        }
        self.state.lock().used.remove(&space.chunk());
        // SAFETY: the promise of the caller.
        unsafe { self.memory.release(space) };
        self.log(|| Call::Release {
            chunk: space.chunk(),
        });
    }

    unsafe fn populate(
        &self,
        span: PageSpan<'_>,
        context: Context,
    ) -> Result<Contents, BackingError> {
        if self.fails() || !self.state.lock().frames.take(span) {
            return Err(BackingError::OutOfFrames);
        }
        if self.is_checked() {
            let mut state = self.state.lock();
            assert!(
                state.reserved.contains(&span.chunk()),
                "chunk {} is not reserved",
                span.chunk()
            );
            for cpu in span.cpus().iter() {
                let pages = state
                    .populated
                    .entry((span.chunk(), cpu.get()))
                    .or_default();
                for page in span.runs().flatten() {
                    let is_new = pages.insert(page);
                    assert!(
                        is_new || matches!(span.cpus(), super::Cpus::One(_)),
                        "page {page} is populated"
                    );
                }
            }
        }
        if self.config.contents == Contents::Dirty {
            Self::fill(span, 0xa5);
        }
        let contents = self.mark_used(span);
        self.log(|| Call::Populate {
            chunk: span.chunk(),
            pages: span.runs().collect(),
            cpus: span.cpus().iter().collect(),
            context,
        });
        Ok(contents)
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        if self.is_checked() {
            let mut state = self.state.lock();
            for cpu in span.cpus().iter() {
                let pages = state
                    .populated
                    .entry((span.chunk(), cpu.get()))
                    .or_default();
                for page in span.runs().flatten() {
                    let was_there = pages.remove(&page);
                    assert!(
                        was_there || matches!(span.cpus(), super::Cpus::One(_)),
                        "page {page} is not populated on CPU {cpu}"
                    );
                }
            }
            drop(state);
            for area in span.areas() {
                // The copies of a CPU that did not come up after all read as zero again.
                let is_used = span.units().materialised().contains(area.cpu);
                Self::fill_area(area, if is_used { 0xdb } else { 0 });
            }
        }
        self.state.lock().frames.give_back(span);
        self.log(|| Call::Depopulate {
            chunk: span.chunk(),
            pages: span.runs().collect(),
            cpus: span.cpus().iter().collect(),
        });
    }

    unsafe fn begin_cpu(&self, unit: CpuArea) -> Result<(), BackingError> {
        if self.fails() {
            return Err(BackingError::OutOfFrames);
        }
        let before = self.state.lock().coming.replace(unit.cpu);
        assert_eq!(before, None, "two CPUs are brought up at once");
        self.log(|| Call::BeginCpu { cpu: unit.cpu });
        Ok(())
    }

    unsafe fn finish_cpu(&self, unit: CpuArea) {
        self.end_cpu(unit);
        self.log(|| Call::FinishCpu { cpu: unit.cpu });
    }

    unsafe fn cancel_cpu(&self, unit: CpuArea) {
        self.end_cpu(unit);
        let state = self.state.lock();
        let of_cpu = |key: &&(u32, u32)| key.1 == unit.cpu.get();
        let left = state
            .populated
            .keys()
            .filter(of_cpu)
            .find(|key| !state.populated[key].is_empty());
        assert!(left.is_none(), "CPU {} still has pages: {left:?}", unit.cpu);
        drop(state);
        self.log(|| Call::CancelCpu { cpu: unit.cpu });
    }

    fn physical_address(&self, address: usize) -> Option<u64> {
        self.memory.physical_address(address)
    }

    fn relax(&self) {
        self.memory.relax();
    }
}

impl Sim {
    fn end_cpu(&self, unit: CpuArea) {
        let coming = self.state.lock().coming.take();
        assert_eq!(coming, Some(unit.cpu), "the CPU has not begun");
    }

    /// Notes that the pages of `span` are used from now on; what they hold.
    fn mark_used(&self, span: PageSpan<'_>) -> Contents {
        let mut state = self.state.lock();
        let words = state.used.entry(span.chunk()).or_default();
        let mut contents = self.config.contents;
        for page in span.runs().flatten() {
            let (word, bit) = (page as usize / 64, 1 << (page % 64));
            if words.len() <= word {
                words.resize(word + 1, 0);
            }
            if words[word] & bit != 0 {
                contents = Contents::Dirty;
            }
            words[word] |= bit;
        }
        contents
    }
}
