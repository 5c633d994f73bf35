//! Static per-CPU variables of all sections, of this crate and of another: where each lies on every CPU, what it starts
//! with, and what may not come near it.

#![cfg(target_os = "linux")]

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use pcpu::allocator::Region;
use pcpu::backing::mmap::Geometry;
use pcpu::{
    CACHE_LINE_BYTES, CpuCell, Global, Handle, LocalCell, RemoteCell, Request, Section, StaticVar,
    alloc_percpu_bytes, define_per_cpu, free_percpu, global, per_cpu_ptr,
};
use pcpu_fixtures::{CACHE_ALIGNED, INITIAL, PLAIN, READ_MOSTLY};

const PAGE_BYTES: usize = 4096;

/// Padded as against lines that are fetched in pairs.
#[repr(align(128))]
struct Padded(AtomicU8);

/// As far aligned as a variable can be.
#[repr(align(4096))]
struct Page(AtomicU8);

define_per_cpu! {
    /// A variable with
    /// a documentation
    /// of more lines
    /// than the macro
    /// takes at once,
    /// and a section
    /// between them
    #[percpu(read_mostly)]
    /// and a condition
    /// that holds,
    /// under which
    /// it is
    /// there
    /// to be
    /// used by
    /// the tests
    #[cfg(all())]
    static LIMIT: CpuCell<u32> = CpuCell::new(100);
    /// Not there, in whichever section.
    #[cfg(any())]
    #[percpu(page_aligned)]
    static NOWHERE: Missing = Missing;
    static HITS: CpuCell<u8> = CpuCell::new(3);
    pub(crate) static PADDED: Padded = Padded(AtomicU8::new(4));
    #[percpu(cache_aligned)]
    static INBOX: AtomicU8 = AtomicU8::new(5);
    #[percpu(cache_aligned)]
    static OUTBOX: [u64; 9] = [6; 9];
    #[percpu(page_aligned)]
    static TABLE: [AtomicU64; 513] = [const { AtomicU64::new(7) }; 513];
    #[percpu(page_aligned)]
    static PAGE: Page = Page(AtomicU8::new(8));
    #[percpu(page_aligned)]
    static SMALL: AtomicU8 = AtomicU8::new(9);
    #[percpu(first)]
    static CANARY: CpuCell<u64> = CpuCell::new(0xbad);
    #[percpu(read_mostly)]
    static NAMES: [&'static str; 2] = ["left", "right"];
}

/// Where a variable lies, from the first byte of the template on.
#[derive(Debug)]
struct Place {
    name: String,
    section: Section,
    bytes: Range<usize>,
    align: usize,
}

impl Place {
    fn of<V: StaticVar + std::fmt::Debug>(variable: V) -> Self {
        let start = variable.handle().neutral() - global().neutral_base();
        Self {
            name: format!("{variable:?}"),
            section: V::SECTION,
            bytes: start..start + size_of::<V::Target>(),
            align: align_of::<V::Target>(),
        }
    }

    /// The lines, or pages, that it lies on.
    fn blocks(&self, block_bytes: usize) -> HashSet<usize> {
        (self.bytes.start / block_bytes..self.bytes.end.div_ceil(block_bytes)).collect()
    }
}

fn places() -> Vec<Place> {
    vec![
        Place::of(LIMIT),
        Place::of(HITS),
        Place::of(PADDED),
        Place::of(INBOX),
        Place::of(OUTBOX),
        Place::of(TABLE),
        Place::of(PAGE),
        Place::of(SMALL),
        Place::of(CANARY),
        Place::of(NAMES),
        Place::of(PLAIN),
        Place::of(CACHE_ALIGNED),
        Place::of(READ_MOSTLY),
    ]
}

#[test]
fn variables_are_aligned_on_every_cpu() {
    for place in places() {
        let section_align = match place.section {
            Section::PageAligned => PAGE_BYTES,
            Section::CacheAligned => CACHE_LINE_BYTES,
            _ => 1,
        };
        let align = place.align.max(section_align);
        let neutral = global().neutral_base() + place.bytes.start;
        assert!(neutral.is_multiple_of(align), "{place:?}");
        for cpu in global().units().possible().iter() {
            let copy = global().per_cpu_address(neutral, cpu).unwrap();
            assert!(copy.is_multiple_of(align), "{place:?} of CPU {cpu}");
        }
        let info = global().address_info(neutral).expect("an address");
        assert_eq!(info.region, Region::Static, "{place:?}");
        assert!(
            place.bytes.end <= global().sizes().static_bytes(),
            "{place:?}"
        );
    }
}

/// Units lie whole pages apart because variables of this program are page aligned.
#[test]
fn page_aligned_variables_decide_on_the_geometry() {
    let geometry = global().backing().geometry();
    assert_eq!(geometry, Geometry::pages(geometry.window_bytes()));
    assert_eq!(global().max_align_bytes(), PAGE_BYTES);
    let page = alloc_percpu_bytes::<Global>(&Request::new(8, PAGE_BYTES)).expect("an alignment");
    assert!(page.neutral().is_multiple_of(PAGE_BYTES));
    // SAFETY: nobody uses it.
    unsafe { free_percpu(page) }.expect("it is allocated");
}

#[test]
fn every_variable_is_in_its_section() {
    let section = |name: &str| {
        let places = places();
        let place = places.iter().find(|place| place.name == name);
        place.expect("a variable").section
    };
    assert_eq!(section("LIMIT"), Section::ReadMostly);
    assert_eq!(section("NAMES"), Section::ReadMostly);
    assert_eq!(section("READ_MOSTLY"), Section::ReadMostly);
    assert_eq!(section("HITS"), Section::Plain);
    assert_eq!(section("PLAIN"), Section::Plain);
    assert_eq!(section("INBOX"), Section::CacheAligned);
    assert_eq!(section("CACHE_ALIGNED"), Section::CacheAligned);
    assert_eq!(section("TABLE"), Section::PageAligned);
    assert_eq!(section("CANARY"), Section::First);
}

#[test]
fn the_first_is_first() {
    assert_eq!(CANARY.handle().neutral(), global().neutral_base());
}

/// Two variables lie on the same block only if `may` says so of their sections.
fn assert_apart(block_bytes: usize, may: impl Fn(Section, Section) -> bool) {
    let places = places();
    for (index, one) in places.iter().enumerate() {
        for other in &places[index + 1..] {
            let together = !one
                .blocks(block_bytes)
                .is_disjoint(&other.blocks(block_bytes));
            assert!(
                !together || may(one.section, other.section),
                "{one:?} and {other:?} on one block of {block_bytes} bytes"
            );
        }
    }
}

#[test]
fn lines_and_pages_belong_to_who_asked_for_them() {
    assert_apart(CACHE_LINE_BYTES, |one, other| {
        one == other && one != Section::CacheAligned && one != Section::PageAligned
    });
    assert_apart(PAGE_BYTES, |one, other| {
        one != Section::PageAligned && other != Section::PageAligned
    });
    // Nor does what comes behind the static variables come near the last of them.
    assert!(
        global()
            .sizes()
            .static_bytes()
            .is_multiple_of(CACHE_LINE_BYTES)
    );
    let mut lines = HashSet::new();
    for place in places() {
        lines.extend(place.blocks(CACHE_LINE_BYTES));
    }
    let end = global().sizes().static_bytes() / CACHE_LINE_BYTES;
    assert!(lines.iter().all(|&line| line < end));
}

#[test]
fn every_cpu_starts_with_the_initial_values() {
    for cpu in global().units().possible().iter() {
        assert_eq!(LIMIT.read_on(cpu), Ok(100));
        assert_eq!(PADDED.get(cpu).unwrap().0.load(Relaxed), 4);
        assert_eq!(INBOX.get(cpu).unwrap().load(Relaxed), 5);
        assert_eq!(OUTBOX.get(cpu).unwrap(), &[6; 9]);
        let table = TABLE.get(cpu).unwrap();
        assert!(table.iter().all(|entry| entry.load(Relaxed) == 7));
        assert_eq!(PAGE.get(cpu).unwrap().0.load(Relaxed), 8);
        assert_eq!(SMALL.get(cpu).unwrap().load(Relaxed), 9);
        assert_eq!(CANARY.read_on(cpu), Ok(0xbad));
        assert_eq!(NAMES.get(cpu).unwrap(), &["left", "right"]);
        assert_eq!(CACHE_ALIGNED.get(cpu).unwrap().load(Relaxed), INITIAL);
        assert_eq!(READ_MOSTLY.read_on(cpu), Ok(7));
    }
}

#[test]
fn variables_of_another_crate_are_like_ones_own() {
    let cpus = u64::from(global().units().possible().count());
    assert_eq!(PLAIN.sum(), cpus * INITIAL);
    let threads = 8;
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for _ in 0..1000 {
                    PLAIN.add(2);
                    HITS.inc();
                }
            });
        }
    });
    assert_eq!(PLAIN.sum(), cpus * INITIAL + threads * 2000);
    assert_eq!(HITS.sum(), (cpus * 3 + threads * 1000) as u8);
    let cpu = global().units().possible().iter().next().unwrap();
    let copy = per_cpu_ptr(PLAIN, cpu).unwrap().as_ptr().cast_const();
    let same: *const CpuCell<u64> = PLAIN.get(cpu).unwrap();
    assert_eq!(copy, same);
}

define_per_cpu! {
    static EARLY: CpuCell<u64> = CpuCell::new(77);
}

static FOUND_EARLY: AtomicU64 = AtomicU64::new(0);

/// Runs before the crate's own start-up code, as a constructor of C++ may.
extern "C" fn constructor() {
    let cpu = pcpu::unit::CpuId::new(0);
    let found = EARLY.get(cpu).map(CpuCell::read_remote);
    FOUND_EARLY.store(found.unwrap_or(0), Relaxed);
}

#[used]
#[unsafe(link_section = ".init_array.00100")]
static CONSTRUCTOR: extern "C" fn() = constructor;

#[test]
fn a_copy_is_there_as_soon_as_anybody_asks() {
    assert_eq!(FOUND_EARLY.load(Relaxed), 77);
}
