//! Models of the count, on [`crate::models`]' machine: its own code, with gated adds that are one step of their CPU.
//!
//! The copies themselves are plain memory, which is seen at once: a processor shows what a sequence has stored to whoever
//! has fenced.

use core::cell::Cell;
use core::mem::ManuallyDrop;
use core::ptr;
use std::boxed::Box;
use std::cell::RefCell;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread;

use super::{Kill, RefCount};
use crate::alloc_api::Domain;
use crate::allocator::PerCpuAllocator;
use crate::cpus::Units;
use crate::models::{Machine, ModelLock, Pages, explore, is_closed};
use crate::request::{AllocError, FreeError, FreeFlags, Request};
use crate::sync::AtomicU32;
use crate::this_cpu::{Change, FenceError, LocalOps, Pair, RemotePairs, Word};
use crate::unit::CpuId;

std::thread_local! {
    /// Not dropped where a model has failed, which could not be done outside of it.
    static MACHINE: RefCell<Option<ManuallyDrop<Arc<Machine>>>> = const { RefCell::new(None) };
}

loom::thread_local! {
    /// Where a thread of the model runs.
    static CPU: Cell<u32> = Cell::new(0);
}

/// The instance of the machine that the model runs on.
enum OnModel {}

/// Its operations.
enum ModelOps {}

fn machine() -> Arc<Machine> {
    MACHINE.with_borrow(|machine| machine.as_deref().cloned().expect("the model has begun"))
}

// SAFETY: all go to the one machine.
unsafe impl Domain for OnModel {
    type Backing = Pages;
    type Lock = ModelLock;
    type Ops = ModelOps;

    fn allocator() -> &'static PerCpuAllocator<Pages, ModelLock> {
        let machine = Arc::as_ptr(&machine());
        // SAFETY: the machine stays until the model has ended.
        unsafe { &(*machine).pcpu }
    }

    fn current_cpu() -> CpuId {
        CpuId::new(CPU.with(Cell::get))
    }

    fn units() -> &'static Units {
        Self::allocator().units()
    }

    fn allocate(request: &Request) -> Result<usize, AllocError> {
        Self::allocator().allocate(request)
    }

    unsafe fn free(address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        // SAFETY: the promise of the caller.
        unsafe { Self::allocator().free_with(address, flags) }
    }
}

// SAFETY: the one operation that there is runs under its CPU's token.
unsafe impl LocalOps for ModelOps {
    unsafe fn read<W: Word>(_: usize) -> W {
        unimplemented!("a count has no use for it")
    }

    unsafe fn change<W: Word>(_: usize, _: Change<W>) {
        unimplemented!("a count has no use for it")
    }

    unsafe fn fetch<W: Word>(_: usize, _: Change<W>) -> W {
        unimplemented!("a count has no use for it")
    }

    unsafe fn replace_pair(_: usize, _: Pair, _: Pair) -> Pair {
        unimplemented!("a count has no use for it")
    }

    unsafe fn append(_: usize, _: *const u8, _: usize, _: usize) -> bool {
        unimplemented!("a count has no use for it")
    }

    unsafe fn take(_: usize, _: *mut u8) -> usize {
        unimplemented!("a count has no use for it")
    }

    fn remote_pairs() -> RemotePairs {
        RemotePairs::AfterFence
    }

    unsafe fn add_gated(at: usize, value: u64, gate: &AtomicU32) -> bool {
        let cpu = OnModel::current_cpu();
        let machine = machine();
        let _token = machine.token(cpu);
        if is_closed(gate) {
            return false;
        }
        let copy = machine.pcpu.units().copy_of(at, cpu).expect("possible");
        let copy = ptr::with_exposed_provenance_mut::<u64>(copy);
        // SAFETY: the copy is live, and changed under the token.
        unsafe { copy.write(copy.read().wrapping_add(value)) };
        true
    }

    fn wait_for_gated() -> Result<(), FenceError> {
        machine().fence();
        Ok(())
    }
}

/// How often the last reference was put, and how many there are but for the owner's; what the holders of references write, each
/// its own.
#[derive(Default)]
struct Ends {
    ends: Cell<u32>,
    references: Cell<u32>,
    written: [UnsafeCell<u32>; 2],
}

// SAFETY: a model's threads take turns on one thread of the system.
unsafe impl Send for Ends {}
// SAFETY: as above.
unsafe impl Sync for Ends {}

impl Ends {
    fn change(&self, by: i32) {
        self.references
            .set(self.references.get().wrapping_add_signed(by));
    }

    /// Writes what `holder` may write while it has a reference.
    fn write(&self, holder: u32) {
        // SAFETY: the machine looks that nobody else is at it.
        self.written[holder as usize].with_mut(|written| unsafe { *written += 1 });
    }

    /// The end: all that was written with references is seen, and nobody writes any more.
    fn end(&self) {
        assert_eq!(self.references.get(), 0);
        (0..2).for_each(|holder| self.write(holder));
        self.ends.set(self.ends.get() + 1);
    }
}

/// Runs a model with a count, and looks that it ends once, when all references were put.
fn explore_count(
    preemptions: usize,
    act: impl Fn(&'static RefCount<Box<dyn Fn()>, OnModel>, &Arc<Ends>) + Send + Sync + 'static,
) {
    explore(preemptions, move || {
        MACHINE.set(Some(ManuallyDrop::new(Arc::new(Machine::new()))));
        let ends = Arc::new(Ends::default());
        let count = Box::into_raw(Box::new({
            let ends = ends.clone();
            let on_zero: Box<dyn Fn()> = Box::new(move || ends.end());
            RefCount::<_, OnModel>::new_in(on_zero).expect("room")
        }));
        // SAFETY: the threads of the model have ended before the box is taken back.
        act(unsafe { &*count }, &ends);
        // SAFETY: from `into_raw`, and used no more.
        let count = unsafe { Box::from_raw(count) };
        assert!(count.is_zero());
        assert_eq!(ends.ends.get(), 1);
        drop(count);
        drop(MACHINE.take().map(ManuallyDrop::into_inner));
    });
}

/// Takes a reference and puts it, on a CPU; passes if it was refused.
fn visit(count: &RefCount<Box<dyn Fn()>, OnModel>, ends: &Ends, cpu: u32) {
    CPU.with(|here| here.set(cpu));
    if let Some(reference) = count.try_get() {
        ends.change(1);
        ends.write(cpu);
        ends.change(-1);
        drop(reference);
    }
}

/// References are taken and put on two CPUs while the owner gives up its own.
#[test]
fn killed_while_references_come_and_go() {
    explore_count(3, |count, ends| {
        let threads = [0, 1].map(|cpu| {
            let ends = ends.clone();
            thread::spawn(move || visit(count, &ends, cpu))
        });
        assert_ne!(count.kill(), Ok(Kill::Again));
        assert!(count.try_get().is_none());
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// A reference that was taken on one CPU is put on another during the kill.
#[test]
fn put_elsewhere_while_killed() {
    explore_count(3, |count, ends| {
        let reference = count.try_get().expect("in service");
        ends.change(1);
        let thread = {
            let ends = ends.clone();
            thread::spawn(move || {
                CPU.with(|here| here.set(1));
                let other = reference.clone();
                drop(reference);
                ends.write(1);
                ends.change(-1);
                drop(other);
            })
        };
        assert_ne!(count.kill(), Ok(Kill::Again));
        thread.join().unwrap();
    });
}

/// Two owners' worth of kills: one of them is told that it came second.
#[test]
fn killed_twice() {
    explore_count(3, |count, _| {
        let thread = thread::spawn(move || count.kill().expect("fences work"));
        let mine = count.kill().expect("fences work");
        let theirs = thread.join().unwrap();
        assert_ne!(mine == Kill::Again, theirs == Kill::Again);
    });
}
