//! The table of `docs/misuse.md`, walked: every wrong call answers what its row says, and leaves everything as it was.
//!
//! What is compared before and after each call: the counters but those of failures, the map of areas, free runs and
//! populated pages of every chunk, and the contents of every live copy.

#[path = "misuse_table/batches.rs"]
mod batches;
#[path = "common/copies.rs"]
mod copies;
#[path = "common/free.rs"]
mod free;
#[path = "common/small.rs"]
mod small;

use std::cell::Cell;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use lock_api::RawMutex;
use pcpu::allocator::Policy;
use pcpu::backing::Backing;
use pcpu::backing::sim::{MachineError, Sim, SimAllocator};
use pcpu::hardened::{Finding, FindingHook, Hardening, MAX_GUARD_BYTES, MAX_QUARANTINE_AREAS};
use pcpu::stats::{MapItem, Stats};
use pcpu::unit::{CpuId, GRANULE_BYTES};
use pcpu::{
    AllocFlags, CpuCell, Domain, FreeFlags, Handle, Instance, PerCpu, PerCpuAllocator, PerCpuPtr,
    Request, alloc_percpu, alloc_percpu_bytes, alloc_percpu_in, alloc_percpu_with, define_per_cpu,
    free_percpu, free_percpu_with, global, per_cpu_ptr,
};

use copies::{assert_stamped, assert_zero, stamp};
use free::FreeArea;
use small::{UNIT_BYTES, small_machine};

type Lock = parking_lot::RawMutex;

const PLAIN: FreeFlags = FreeFlags::empty();
const RESERVED: FreeFlags = FreeFlags::RESERVED;
const CHUNKS: u32 = 4;

define_per_cpu! {
    static HITS: AtomicU64 = AtomicU64::new(7);
}

/// A simulated machine as a domain, on whose window nothing else lies.
enum Simulated {}

// SAFETY: it is always the same instance, and no other domain's.
unsafe impl Domain for Simulated {
    type Backing = Sim;
    type Lock = Lock;
    type Ops = pcpu::this_cpu::portable::Portable<Self>;

    fn allocator() -> &'static SimAllocator {
        static INSTANCE: OnceLock<SimAllocator> = OnceLock::new();
        INSTANCE.get_or_init(|| small_machine(2).build().unwrap())
    }

    fn current_cpu() -> CpuId {
        CpuId::new(0)
    }
}

/// Everything that a caller can see of an instance, the counters of failures aside.
#[derive(Debug, PartialEq)]
struct Digest {
    stats: Stats,
    map: Vec<(u32, MapItem)>,
    cpus: Vec<CpuId>,
}

fn digest<B: Backing, R: RawMutex>(pcpu: &PerCpuAllocator<B, R>) -> Digest {
    let mut stats = pcpu.stats();
    stats.failures = 0;
    stats.atomic_failures = 0;
    stats.spare_shortfalls = 0;
    let mut map = Vec::new();
    pcpu.visit_map(|place, item| map.push((place, item)));
    let cpus = pcpu.units().materialised().iter().collect();
    Digest { stats, map, cpus }
}

/// A full machine with an area in every region, and addresses of areas that are no more.
struct Areas {
    pcpu: SimAllocator,
    live: Vec<(usize, usize)>,
    first: usize,
    reserved: usize,
    later: usize,
    gone: usize,
    gone_reserved: usize,
    /// Freed; its page went back.
    without_page: usize,
    /// Freed; its chunk went back.
    without_chunk: usize,
}

impl Areas {
    fn new() -> Self {
        let pcpu = small_machine(2).online(1).chunks(CHUNKS).build().unwrap();
        let allocate = |bytes, flags| {
            let request = Request::new(bytes, 4).with_flags(flags);
            (pcpu.allocate(&request).unwrap(), bytes)
        };
        let dynamic = |bytes| allocate(bytes, AllocFlags::empty());
        let first = dynamic(24);
        let gone = dynamic(16);
        let reserved = allocate(100, AllocFlags::RESERVED);
        let gone_reserved = allocate(8, AllocFlags::RESERVED);
        let later = dynamic(18_000);
        let without_page = dynamic(10_000);
        let without_chunk = dynamic(UNIT_BYTES);
        for (area, flags) in [
            (gone, PLAIN),
            (gone_reserved, RESERVED),
            (without_page, PLAIN),
            (without_chunk, PLAIN),
        ] {
            pcpu.free_area(area.0, flags).unwrap();
        }
        pcpu.trim(0);
        let live = vec![first, reserved, later];
        live.iter().for_each(|&area| stamp(&pcpu, area));
        Self {
            live,
            first: first.0,
            reserved: reserved.0,
            later: later.0,
            gone: gone.0,
            gone_reserved: gone_reserved.0,
            without_page: without_page.0,
            without_chunk: without_chunk.0,
            pcpu,
        }
    }

    fn base(&self) -> usize {
        self.pcpu.neutral_base()
    }

    fn end(&self) -> usize {
        let window = self.pcpu.backing().window();
        window.base + window.pitch_bytes * window.chunks as usize
    }

    fn allocate(&self, bytes: usize, align: usize, flags: AllocFlags) -> String {
        let request = Request::new(bytes, align).with_flags(flags);
        answer("AllocError", self.pcpu.allocate(&request))
    }

    fn free(&self, address: usize, flags: FreeFlags) -> String {
        answer("FreeError", self.pcpu.free_area(address, flags))
    }
}

/// How the table writes an error: its type and variant.
fn answer<T: Debug, E: Debug>(kind: &str, result: Result<T, E>) -> String {
    match result {
        Ok(value) => format!("Ok({value:?})"),
        Err(error) => {
            let text = format!("{error:?}");
            let end = text.find([' ', '(', '{']).unwrap_or(text.len());
            format!("{kind}::{}", &text[..end])
        }
    }
}

fn none<T: Debug>(option: Option<T>) -> String {
    match option {
        None => "None".into(),
        some => format!("{some:?}"),
    }
}

type Row<'a> = (&'static str, &'a dyn Fn() -> String);

/// The rows of a section of the table: call and answer.
fn documented(section: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/misuse.md");
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().skip_while(|line| !line.contains(section));
    let lines = lines.skip(1).take_while(|line| !line.starts_with("## "));
    lines
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .filter(|line| !line.starts_with("call |"))
        .map(|line| {
            let (call, answer) = line.split_once(" | ").unwrap();
            let plain = |text: &str| text.replace('`', "");
            (plain(call), plain(answer))
        })
        .collect()
}

/// Makes the calls of a section; `check` looks that nothing has changed.
fn walk(section: &str, rows: &[Row<'_>], mut check: impl FnMut(&str)) {
    let documented = documented(section);
    let calls: Vec<_> = documented.iter().map(|(call, _)| call.as_str()).collect();
    let tested: Vec<_> = rows.iter().map(|(call, _)| *call).collect();
    assert_eq!(calls, tested, "the table and the test have the same rows");
    for ((call, expected), (_, run)) in documented.iter().zip(rows) {
        assert_eq!(run(), *expected, "{call}");
        check(call);
    }
}

#[test]
fn wrong_calls_of_an_instance_change_nothing() {
    let areas = Areas::new();
    let pcpu = &areas.pcpu;
    let regions = pcpu.sizes().regions();
    let on_the_stack = 0_u64;
    let copy = pcpu.per_cpu_address(areas.later, CpuId::new(0)).unwrap();
    let none_of = AllocFlags::empty();
    let info = |address| none(pcpu.address_info(address));
    let bring_up = |id| answer("CpuError", pcpu.bring_up(CpuId::new(id)));
    let rows: &[Row<'_>] = &[
        ("allocate of 0 bytes", &|| areas.allocate(0, 4, none_of)),
        ("allocate of more than Policy::max_alloc_bytes", &|| {
            areas.allocate((32 << 10) + 1, 4, none_of)
        }),
        ("allocate of usize::MAX bytes", &|| {
            areas.allocate(usize::MAX, 4, none_of)
        }),
        ("allocate aligned to 0", &|| areas.allocate(8, 0, none_of)),
        ("allocate aligned to 24", &|| areas.allocate(8, 24, none_of)),
        ("allocate aligned to two pages", &|| {
            areas.allocate(8, 8192, none_of)
        }),
        ("allocate aligned to half the address space", &|| {
            areas.allocate(8, 1 << (usize::BITS - 1), none_of)
        }),
        ("allocate with a flag that does not exist", &|| {
            areas.allocate(8, 8, AllocFlags::from_bits_retain(1 << 31))
        }),
        ("allocate of more than the reserved region has", &|| {
            areas.allocate(2000, 4, AllocFlags::RESERVED)
        }),
        ("allocate with TRY where pages have no memory", &|| {
            areas.allocate(20_000, 4, AllocFlags::TRY)
        }),
        // Not a row to itself: it takes a machine that is full.
        ("allocate in a full window", &|| full_window()),
        ("free of an area that was freed", &|| {
            areas.free(areas.gone, PLAIN)
        }),
        (
            "free of an area that was freed, whose pages went back",
            &|| areas.free(areas.without_page, PLAIN),
        ),
        (
            "free of an area that was freed, whose chunk is gone",
            &|| areas.free(areas.without_chunk, PLAIN),
        ),
        ("free of free memory behind an area", &|| {
            areas.free(areas.later + 18_000, PLAIN)
        }),
        ("free in a chunk that never was", &|| {
            areas.free(areas.end() - 4, PLAIN)
        }),
        ("free inside an area", &|| {
            areas.free(areas.later + 4, PLAIN)
        }),
        ("free of the last granule of an area", &|| {
            areas.free(areas.later + 17_996, PLAIN)
        }),
        ("free of an address between granules", &|| {
            areas.free(areas.first + 2, PLAIN)
        }),
        ("free of address 0", &|| areas.free(0, PLAIN)),
        ("free of the highest address", &|| {
            areas.free(usize::MAX, PLAIN)
        }),
        ("free below the window", &|| {
            areas.free(areas.base() - 4, PLAIN)
        }),
        ("free behind the window", &|| areas.free(areas.end(), PLAIN)),
        ("free of a CPU's own copy of an area", &|| {
            areas.free(copy, PLAIN)
        }),
        ("free of a variable on the stack", &|| {
            areas.free((&raw const on_the_stack).addr(), PLAIN)
        }),
        ("free in the tail of the first unit", &|| {
            areas.free(areas.base() + regions.tail.start, PLAIN)
        }),
        ("free of a static variable", &|| {
            areas.free(areas.base(), PLAIN)
        }),
        ("free of a static variable as reserved", &|| {
            areas.free(areas.base(), RESERVED)
        }),
        ("free of a reserved area without RESERVED", &|| {
            areas.free(areas.reserved, PLAIN)
        }),
        ("free of a dynamic area with RESERVED", &|| {
            areas.free(areas.first, RESERVED)
        }),
        ("free with a flag that does not exist", &|| {
            areas.free(areas.first, FreeFlags::from_bits_retain(1 << 31))
        }),
        ("free of a reserved area that was freed", &|| {
            areas.free(areas.gone_reserved, RESERVED)
        }),
        ("bring_up of a CPU behind the last", &|| bring_up(2)),
        ("bring_up of the highest CPU number", &|| bring_up(u32::MAX)),
        ("per_cpu_address for a CPU behind the last", &|| {
            answer("CpuError", pcpu.per_cpu_address(areas.first, CpuId::new(2)))
        }),
        ("area_bytes of anything but the start of an area", &|| {
            let others = [0, areas.first + 4, areas.gone, areas.base(), usize::MAX];
            none(others.into_iter().find_map(|other| pcpu.area_bytes(other)))
        }),
        ("address_info of an address that is not its own", &|| {
            info(8)
        }),
    ];
    let before = digest(pcpu);
    walk("Of an instance", rows, |call| {
        assert_eq!(before, digest(pcpu), "{call}");
        for &area in &areas.live {
            assert_stamped(pcpu, area, CpuId::new(0));
            assert_zero(pcpu, area, CpuId::new(1));
        }
    });
}

fn full_window() -> String {
    let pcpu = small_machine(1).chunks(2).build().unwrap();
    let whole = Request::new(UNIT_BYTES, 4);
    pcpu.allocate(&whole).unwrap();
    let before = digest(&pcpu);
    let result = pcpu.allocate(&whole);
    assert_eq!(before, digest(&pcpu));
    answer("AllocError", result)
}

#[repr(align(8192))]
#[derive(pcpu::FromZeros)]
#[zerocopy(crate = "pcpu::zerocopy")]
struct Aligned([u8; 8192]);

#[test]
fn wrong_calls_by_handles_change_nothing() {
    let pcpu = Simulated::allocator();
    let live: PerCpuPtr<[u32; 4], Simulated> = alloc_percpu_in().unwrap();
    let gone: PerCpuPtr<u64, Simulated> = alloc_percpu_in().unwrap();
    // SAFETY: nobody uses it.
    unsafe { free_percpu(gone) }.unwrap();
    let others = small_machine(1).build().unwrap();
    let other = others.allocate(&Request::new(8, 8)).unwrap();
    // SAFETY: no row frees what somebody uses: all of these calls are refused.
    let free =
        |handle: PerCpuPtr<u32, Simulated>| answer("FreeError", unsafe { free_percpu(handle) });
    let rows: &[Row<'_>] = &[
        ("alloc_percpu_in of a type without size", &|| {
            answer("AllocError", alloc_percpu_in::<(), Simulated>())
        }),
        ("alloc_percpu_in of a type aligned to two pages", &|| {
            answer("AllocError", alloc_percpu_in::<Aligned, Simulated>())
        }),
        ("alloc_percpu_with and a flag that does not exist", &|| {
            let flags = AllocFlags::from_bits_retain(1 << 20);
            answer("AllocError", alloc_percpu_with::<u32, Simulated>(flags))
        }),
        ("alloc_percpu_bytes of too many bytes", &|| {
            let request = Request::new(1 << 40, 8);
            answer("AllocError", alloc_percpu_bytes::<Simulated>(&request))
        }),
        ("PerCpuPtr::from_neutral of 0", &|| {
            none(PerCpuPtr::<u8, Simulated>::from_neutral(0))
        }),
        (
            "PerCpuPtr::byte_add over the end of the address space",
            &|| none(live.byte_add(usize::MAX)),
        ),
        ("free_percpu twice", &|| free(gone.cast())),
        ("free_percpu of a field", &|| {
            free(live.byte_add(8).unwrap().cast())
        }),
        (
            "free_percpu of another instance's handle by its number",
            &|| free(PerCpuPtr::from_neutral(other).unwrap()),
        ),
        ("free_percpu_with RESERVED of a dynamic variable", &|| {
            // SAFETY: refused.
            answer("FreeError", unsafe { free_percpu_with(live, RESERVED) })
        }),
        ("per_cpu_ptr for a CPU behind the last", &|| {
            answer("CpuError", per_cpu_ptr(live, CpuId::new(2)))
        }),
        ("Instance::get before it is set up", &|| {
            none(Instance::<Sim, Lock>::new().get())
        }),
        ("Instance::set_up of an instance that is set up", &|| {
            let place = Instance::new();
            place.set_up(small_machine(1).build().unwrap()).unwrap();
            let second = small_machine(1).build().unwrap();
            answer("SetupError", place.set_up(second))
        }),
    ];
    let before = digest(pcpu);
    walk("By handles", rows, |call| {
        assert_eq!(before, digest(pcpu), "{call}");
    });
}

#[test]
fn wrong_calls_of_the_process_change_nothing() {
    // No other test of this process uses its instance.
    let pcpu = global();
    // First, so that what is gone is not handed out again.
    let kept: PerCpuPtr<Cell<u64>> = alloc_percpu().unwrap();
    let gone = {
        let owner = PerCpu::<CpuCell<u64>>::new().unwrap();
        owner.as_ptr()
    };
    let copy = per_cpu_ptr(kept, CpuId::new(0)).unwrap().addr().get();
    let nr_cpus = pcpu.units().nr_cpu_ids();
    // SAFETY: all of these calls are refused.
    let free = |handle: PerCpuPtr<u8>| answer("FreeError", unsafe { free_percpu(handle) });
    let hits = HITS.handle();
    let rows: &[Row<'_>] = &[
        ("alloc_percpu of a type without size", &|| {
            answer("AllocError", alloc_percpu::<[u64; 0]>())
        }),
        ("alloc_percpu of a type aligned beyond the units", &|| {
            answer("AllocError", alloc_percpu::<Aligned>())
        }),
        ("free_percpu of a static variable", &|| free(hits.cast())),
        (
            "free_percpu of an owner's variable that was dropped",
            &|| free(gone.cast()),
        ),
        ("free_percpu of a real address", &|| {
            free(PerCpuPtr::from_neutral(copy).unwrap())
        }),
        (
            "per_cpu_ptr of a static variable for a CPU behind the last",
            &|| answer("CpuError", per_cpu_ptr(hits, CpuId::new(nr_cpus))),
        ),
    ];
    let before = digest(pcpu);
    walk("Of the process's instance", rows, |call| {
        assert_eq!(before, digest(pcpu), "{call}");
    });
}

#[test]
fn wrong_policies_set_nothing_up() {
    let set_up = |policy: Policy| match small_machine(2).policy(policy).build() {
        Err(MachineError::Setup(error)) => answer("SetupError", Err::<(), _>(error)),
        other => format!("{other:?}"),
    };
    let most = |max_alloc_bytes| {
        set_up(Policy {
            max_alloc_bytes,
            ..Policy::default()
        })
    };
    let rows: &[Row<'_>] = &[
        ("Policy::max_alloc_bytes above a unit", &|| {
            most(UNIT_BYTES + 1)
        }),
        ("Policy::max_alloc_bytes of 0", &|| most(0)),
        ("Policy::max_align_bytes of 0", &|| {
            set_up(Policy {
                max_align_bytes: 0,
                ..Policy::default()
            })
        }),
    ];
    // What is set up and dropped again leaves nothing: the simulated machine looks.
    walk("Setting up", rows, |_| {});
}

/// Nothing is to be found.
struct Deaf;

impl FindingHook for Deaf {
    fn found(&self, finding: &Finding) {
        panic!("{finding}");
    }
}

#[test]
fn wrong_calls_of_harden_change_nothing() {
    let usual = Hardening::new(&Deaf);
    let harden = |prepare: &dyn Fn(&mut SimAllocator), hardening: Hardening| {
        let mut pcpu = small_machine(2).build().unwrap();
        prepare(&mut pcpu);
        let (before, was_hardened) = (digest(&pcpu), pcpu.is_hardened());
        let result = pcpu.harden(hardening);
        assert_eq!((digest(&pcpu), pcpu.is_hardened()), (before, was_hardened));
        answer("HardenError", result)
    };
    let with_guards = |guard_bytes| {
        let hardening = Hardening {
            guard_bytes,
            ..usual
        };
        harden(&|_| {}, hardening)
    };
    let with_quarantine = |quarantine_areas| {
        let hardening = Hardening {
            quarantine_areas,
            ..usual
        };
        harden(&|_| {}, hardening)
    };
    let rows: &[Row<'_>] = &[
        ("harden with guards of 0 bytes", &|| with_guards(0)),
        ("harden with guards of part of a granule", &|| {
            with_guards(GRANULE_BYTES + 1)
        }),
        ("harden with guards above MAX_GUARD_BYTES", &|| {
            with_guards(MAX_GUARD_BYTES + GRANULE_BYTES)
        }),
        ("harden with a quarantine of no area", &|| {
            with_quarantine(0)
        }),
        (
            "harden with a quarantine above MAX_QUARANTINE_AREAS",
            &|| with_quarantine(MAX_QUARANTINE_AREAS + 1),
        ),
        ("harden when an area is live", &|| {
            let allocate = |pcpu: &mut SimAllocator| {
                pcpu.allocate(&Request::new(8, 8)).unwrap();
            };
            harden(&allocate, usual)
        }),
        ("harden of an instance that has caches", &|| {
            harden(&|pcpu| pcpu.enable_caches().unwrap(), usual)
        }),
        ("harden of an instance that is hardened", &|| {
            harden(&|pcpu| pcpu.harden(usual).unwrap(), usual)
        }),
        ("harden without memory for the ledger", &|| {
            harden(&|pcpu| pcpu.backing().set_faults(|_| true), usual)
        }),
    ];
    walk("Hardening", rows, |_| {});
}

/// A limit that no alignment has counts as the one below it.
#[test]
fn a_largest_alignment_is_a_power_of_two() {
    for (asked, granted) in [(1, 1), (3, 2), (24, 16), (4095, 2048), (usize::MAX, 4096)] {
        let policy = Policy {
            max_align_bytes: asked,
            ..Policy::default()
        };
        let pcpu = small_machine(1).policy(policy).build().unwrap();
        assert_eq!(pcpu.max_align_bytes(), granted, "{asked}");
    }
}
