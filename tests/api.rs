//! Handles, domains, and the instance of a process as a user meets them.

#[path = "common/free.rs"]
mod free;
#[path = "common/small.rs"]
mod small;

use free::FreeArea;
use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};
use std::thread;

use pcpu::allocator::{PerCpuAllocator, Region};
use pcpu::backing::Backing;
use pcpu::backing::sim::{Machine, Sim, SimAllocator};
use pcpu::stats::{Event, EventHook};
use pcpu::unit::CpuId;
use pcpu::{
    AllocError, AllocFlags, CpuError, Domain, FreeError, FreeFlags, Global, Handle, Instance,
    PerCpuPtr, Request, SetupError, StaticVar, alloc_percpu, alloc_percpu_bytes, alloc_percpu_in,
    alloc_percpu_with, define_per_cpu, free_percpu, free_percpu_with, global, per_cpu_ptr,
    this_cpu_ptr,
};

use small::{UNIT_BYTES, small_machine};

type Lock = parking_lot::RawMutex;

/// A simulated machine of three CPUs, two of them up; the caller is on CPU 2.
enum Simulated {}

// SAFETY: it is always the same instance, and no other domain's.
unsafe impl Domain for Simulated {
    type Backing = Sim;
    type Lock = Lock;
    type Ops = pcpu::this_cpu::portable::Portable<Self>;

    fn allocator() -> &'static SimAllocator {
        static INSTANCE: OnceLock<SimAllocator> = OnceLock::new();
        INSTANCE.get_or_init(|| small_machine(3).online(2).build().unwrap())
    }

    fn current_cpu() -> CpuId {
        CpuId::new(2)
    }
}

define_per_cpu! {
    /// Never there: its type does not exist.
    #[cfg(any())]
    static NOT_HERE: Missing = Missing;
    /// Counts from a thousand.
    static HITS: AtomicU64 = AtomicU64::new(1000);
    static FLAG: AtomicU32 = AtomicU32::new(0x5a5a_5a5a);
    pub(crate) static NAMES: [&'static str; 2] = ["left", "right"];
}

#[test]
fn an_instance_is_set_up_once() {
    static PLACE: Instance<Sim, Lock> = Instance::new();
    assert!(PLACE.get().is_none());
    let first = small_machine(1).build().unwrap();
    let base = first.neutral_base();
    PLACE.set_up(first).unwrap();
    let second = small_machine(2).build().unwrap();
    assert_eq!(PLACE.set_up(second), Err(SetupError::Again));
    let instance = PLACE.get().unwrap();
    assert_eq!(instance.neutral_base(), base);
    assert_eq!(instance.units().possible().count(), 1);
    assert!(format!("{PLACE:?}").contains("PerCpuAllocator"));

    // One that is not in a static ends with its place; the machine then looks for leaks.
    let place = Instance::default();
    place
        .set_up(Machine::new(2).checked().build().unwrap())
        .unwrap();
    let used = place.get().unwrap().allocate(&Request::new(4000, 8));
    assert!(used.is_ok());
    drop(place);
    drop(Instance::<Sim, Lock>::new());
}

#[test]
fn an_instance_is_set_up_by_one_of_many() {
    static PLACE: Instance<Sim, Lock> = Instance::new();
    let done = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mine = small_machine(1).build().unwrap();
                done.fetch_add(u32::from(PLACE.set_up(mine).is_ok()), Relaxed);
            });
        }
    });
    assert_eq!(done.into_inner(), 1);
    assert!(PLACE.get().is_some());
}

#[test]
fn handles_go_anywhere_whatever_they_name() {
    fn goes_anywhere<T: Send + Sync + Copy + Eq + std::hash::Hash + Unpin + 'static>() {}
    goes_anywhere::<PerCpuPtr<u64>>();
    goes_anywhere::<PerCpuPtr<Rc<Cell<u8>>>>();
    goes_anywhere::<PerCpuPtr<*mut u8, Simulated>>();
    fn is_shared<T: Sync>() {}
    is_shared::<Instance<Sim, Lock>>();
    is_shared::<SimAllocator>();
    is_shared::<PerCpuAllocator<pcpu::backing::mmap::Mmap, Lock>>();
    // Room for a pointer, and `None` for free.
    assert_eq!(
        size_of::<Option<PerCpuPtr<[u8; 100]>>>(),
        size_of::<usize>()
    );
}

#[test]
fn handles_are_addresses() {
    assert_eq!(PerCpuPtr::<u8, Simulated>::from_neutral(0), None);
    let handle = PerCpuPtr::<u64, Simulated>::from_neutral(0x1000).unwrap();
    assert_eq!(handle.neutral(), 0x1000);
    let bytes: PerCpuPtr<u8, Simulated> = handle.cast();
    assert_eq!(bytes.neutral(), 0x1000);
    assert_eq!(bytes.byte_add(24).unwrap().neutral(), 0x1018);
    let last = PerCpuPtr::<u8, Simulated>::from_neutral(usize::MAX).unwrap();
    assert_eq!(last.byte_add(1), None);
    assert_eq!(handle.handle(), handle);
    assert_eq!((&&handle).handle(), handle);
    let all: HashSet<_> = [handle, handle, bytes.byte_add(8).unwrap().cast()].into();
    assert_eq!(all.len(), 2);
    assert_eq!(format!("{handle:?}"), "PerCpuPtr(0x1000)");
    const MADE_AT_COMPILE_TIME: Option<PerCpuPtr<u32>> = PerCpuPtr::from_neutral(64);
    assert!(MADE_AT_COMPILE_TIME.is_some());
}

#[test]
fn a_variable_has_a_zero_copy_per_cpu() {
    let pcpu = Simulated::allocator();
    for flags in [
        AllocFlags::empty(),
        AllocFlags::NO_ZERO,
        AllocFlags::NO_ZERO | AllocFlags::ATOMIC,
    ] {
        // Dirty what comes next.
        let dirty: PerCpuPtr<[u64; 5], Simulated> = alloc_percpu_in().unwrap();
        for cpu in [0, 1].map(CpuId::new) {
            // SAFETY: allocated above, used by nobody else; the CPU is materialised.
            unsafe { per_cpu_ptr(dirty, cpu).unwrap().write([u64::MAX; 5]) };
        }
        // SAFETY: not used any more.
        unsafe { free_percpu(dirty).unwrap() };
        let clean: PerCpuPtr<[u64; 5], Simulated> = alloc_percpu_with(flags).unwrap();
        for cpu in pcpu.units().possible().iter() {
            let copy = per_cpu_ptr(clean, cpu).unwrap();
            assert!(copy.is_aligned());
            // SAFETY: allocated above, and nobody writes to it.
            assert_eq!(unsafe { copy.read() }, [0; 5], "{flags:?}");
        }
        // SAFETY: not used any more.
        unsafe { free_percpu_with(clean, FreeFlags::ATOMIC).unwrap() };
    }
    assert_eq!(
        alloc_percpu_in::<(), Simulated>(),
        Err(AllocError::ZeroSize)
    );
    let too_large = alloc_percpu_in::<[u64; 5000], Simulated>();
    assert!(matches!(too_large, Err(AllocError::TooLarge { .. })));
    let handle = PerCpuPtr::<u8, Simulated>::from_neutral(64).unwrap();
    // SAFETY: it names nothing, so nobody uses it.
    let foreign = unsafe { free_percpu(handle) };
    assert_eq!(foreign, Err(FreeError::Foreign { address: 64 }));
}

/// The current CPU is brought up by its first use.
#[test]
fn the_current_cpu_comes_up_when_it_is_used() {
    let pcpu = Simulated::allocator();
    let here = Simulated::current_cpu();
    let variable: PerCpuPtr<u32, Simulated> = alloc_percpu_in().unwrap();
    assert!(!pcpu.units().materialised().contains(here));
    let copy = this_cpu_ptr(variable).unwrap();
    assert!(pcpu.units().materialised().contains(here));
    assert_eq!(copy, per_cpu_ptr(variable, here).unwrap());
    // SAFETY: not used any more.
    unsafe { free_percpu(variable).unwrap() };
    let nowhere = CpuId::new(3);
    let impossible = CpuError::NotPossible {
        cpu: nowhere,
        nr_cpu_ids: 3,
    };
    assert_eq!(per_cpu_ptr(variable, nowhere), Err(impossible));
}

/// One addition serves all: static and dynamic variables are shifted by the same offset.
#[test]
fn all_variables_shift_by_the_same_offset() {
    let dynamic = alloc_percpu::<[u64; 4]>().unwrap();
    let bytes = alloc_percpu_bytes::<Global>(&Request::new(3, 64)).unwrap();
    let shift = |handle: usize, copy: usize| copy.wrapping_sub(handle);
    for cpu in global().units().possible().iter() {
        let copies = [
            shift(
                dynamic.neutral(),
                per_cpu_ptr(dynamic, cpu).unwrap().as_ptr().addr(),
            ),
            shift(
                bytes.neutral(),
                per_cpu_ptr(bytes, cpu).unwrap().as_ptr().addr(),
            ),
            shift(
                HITS.handle().neutral(),
                per_cpu_ptr(HITS, cpu).unwrap().as_ptr().addr(),
            ),
            shift(
                NAMES.handle().neutral(),
                per_cpu_ptr(&NAMES, cpu).unwrap().as_ptr().addr(),
            ),
        ];
        assert_eq!(copies, [global().units().offset(cpu).unwrap(); 4]);
    }
    // SAFETY: not used any more.
    unsafe {
        free_percpu(dynamic).unwrap();
        free_percpu(bytes).unwrap();
    }
}

#[test]
fn static_variables_have_their_value_on_every_cpu() {
    let possible = || global().units().possible().iter();
    for cpu in possible() {
        assert_eq!(HITS.get(cpu).unwrap().load(Relaxed), 1000);
        assert_eq!(FLAG.get(cpu).unwrap().load(Relaxed), 0x5a5a_5a5a);
        assert_eq!(NAMES.get(cpu).unwrap(), &["left", "right"]);
    }
    for cpu in possible() {
        HITS.get(cpu)
            .unwrap()
            .fetch_add(1 + u64::from(cpu.get()), Relaxed);
    }
    for cpu in possible() {
        let hits = HITS.get(cpu).unwrap().load(Relaxed);
        assert_eq!(hits, 1001 + u64::from(cpu.get()), "copies are apart");
    }
    let nowhere = CpuId::new(global().units().nr_cpu_ids());
    assert!(matches!(
        HITS.get(nowhere),
        Err(CpuError::NotPossible { .. })
    ));
    // A static variable is nobody's to free.
    // SAFETY: it is refused.
    let freed = unsafe { free_percpu(HITS.handle()) };
    let address = HITS.handle().neutral();
    assert_eq!(freed, Err(FreeError::Static { address }));
    let cpu = possible().next().unwrap();
    let copy = per_cpu_ptr(HITS, cpu).unwrap().as_ptr().addr();
    assert_eq!(global().is_static_address(copy), Some(cpu));
    assert!(pcpu::global::boot_log().starts_with("percpu: "));
}

#[test]
fn the_current_cpu_of_a_process_is_one_of_its_own() {
    let variable = alloc_percpu::<AtomicU64>().unwrap();
    let copy = this_cpu_ptr(variable).unwrap().as_ptr();
    let mut cpus = global().units().possible().iter();
    assert!(cpus.any(|cpu| per_cpu_ptr(variable, cpu).unwrap().as_ptr() == copy));
    // SAFETY: not used any more.
    unsafe { free_percpu(variable).unwrap() };
}

#[test]
fn addresses_tell_what_they_are() {
    let pcpu = small_machine(3).nodes(3).build().unwrap();
    let base = pcpu.neutral_base();
    let regions = pcpu.sizes().regions();
    let reserved = Request::new(12, 4).with_flags(AllocFlags::RESERVED);
    let reserved = pcpu.allocate(&reserved).unwrap();
    let first = pcpu.allocate(&Request::new(100, 4)).unwrap();
    let later = pcpu.allocate(&Request::new(UNIT_BYTES, 4)).unwrap();
    for (neutral, region, place) in [
        (base, Region::Static, 0),
        (base + regions.static_vars.end, Region::Static, 0),
        (base + regions.reserved.start, Region::Reserved, 0),
        (reserved + 3, Region::Reserved, 0),
        (base + regions.dynamic.start, Region::Dynamic, 0),
        (first, Region::Dynamic, 0),
        (base + regions.dynamic.end - 1, Region::Dynamic, 0),
        (later, Region::Dynamic, 1),
        (later + UNIT_BYTES - 1, Region::Dynamic, 1),
    ] {
        let cpus = pcpu.units().possible().iter().map(Some);
        for cpu in cpus.chain([None]) {
            let address = match cpu {
                Some(cpu) => pcpu.per_cpu_address(neutral, cpu).unwrap(),
                None => neutral,
            };
            let info = pcpu.address_info(address).unwrap();
            assert_eq!((info.cpu, info.neutral), (cpu, neutral));
            assert_eq!((info.region, info.place), (region, place));
            assert_eq!(
                info.offset_bytes,
                neutral - base - place as usize * UNIT_BYTES
            );
            let (is_static, is_module) = (region == Region::Static, region == Region::Reserved);
            assert_eq!(pcpu.is_static_address(address), cpu.filter(|_| is_static));
            assert_eq!(pcpu.is_module_address(address), cpu.filter(|_| is_module));
            if cpu.is_none() {
                assert_eq!(pcpu.physical_address(address), None);
            }
        }
    }
    let on_the_stack = 0_u8;
    let window = pcpu.backing().window();
    let tail = base + regions.tail.start;
    let copy_of_tail = pcpu.per_cpu_address(tail, CpuId::new(1)).unwrap();
    for address in [
        0,
        usize::MAX,
        base - 1,
        tail,
        copy_of_tail,
        (&raw const on_the_stack).addr(),
        base + window.pitch_bytes * (window.chunks as usize) * 5,
    ] {
        assert_eq!(pcpu.address_info(address), None, "{address:#x}");
        assert_eq!(pcpu.is_static_address(address), None);
        assert_eq!(pcpu.physical_address(address), None);
    }
}

/// Every event, with all that a listener needs for an account.
#[test]
fn the_hook_is_told_of_everything() {
    struct Listener(Mutex<Vec<String>>);
    impl EventHook for Listener {
        fn event(&self, event: &Event) {
            let line = match *event {
                Event::Alloc {
                    bytes,
                    align,
                    flags,
                    owner,
                    at,
                    ..
                } => format!("alloc {bytes} {align} {flags:?} for {owner} at {at:?}"),
                Event::Failure {
                    bytes,
                    flags,
                    error,
                    ..
                } => format!("failure {bytes} {flags:?}: {error}"),
                Event::Free { at, .. } => format!("free {at:?}"),
                Event::ChunkCreated { place, .. } => format!("made {place}"),
                Event::ChunkDestroyed { place, .. } => format!("destroyed {place}"),
                _ => String::new(),
            };
            self.0.lock().unwrap().push(line);
        }
    }
    static LISTENER: Listener = Listener(Mutex::new(Vec::new()));
    let pcpu = small_machine(1).build().unwrap();
    pcpu.set_event_hook(Some(&LISTENER));
    let request = Request::new(UNIT_BYTES, 16).with_owner(7);
    let whole = pcpu
        .allocate(&request.with_flags(AllocFlags::ATOMIC))
        .unwrap();
    let quiet = Request::new(0, 1).with_flags(AllocFlags::NO_WARN);
    assert!(pcpu.allocate(&quiet).is_err());
    pcpu.free_area(whole, FreeFlags::empty()).unwrap();
    assert!(pcpu.free_area(whole, FreeFlags::empty()).is_err());
    pcpu.trim(0);
    pcpu.set_event_hook(None);
    assert!(pcpu.allocate(&Request::new(8, 8)).is_ok());
    let told = LISTENER.0.lock().unwrap();
    assert_eq!(
        *told,
        [
            "made 1",
            "alloc 32768 16 AllocFlags(ATOMIC) for 7 at (1, 0)",
            "failure 0 AllocFlags(NO_WARN): a size of 0 bytes",
            "free (1, 0)",
            "destroyed 1",
        ]
    );
}
