//! Pages of units that share pages of the system: whatever is populated and given back beside a page, what it holds stays,
//! what comes anew is zero, and what nobody needs is not resident.

use std::boxed::Box;
use std::ptr;
use std::thread;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::backing::address_range::faults;
use crate::chunk::PageMask;
use crate::cpus::{Units, UnitsLayout};
use crate::embed;
use crate::metadata::BlockLayout;
use crate::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, storage_words};

const PAGE_BYTES: usize = 4096;
/// Pages of a unit.
const UNIT_PAGES: usize = 8;
/// Units begin in the middle of a page in 31 ways; the rest is for the whole pages and for what comes around.
const CPUS: u32 = 34;
/// Not materialised: nothing is ever populated for it.
const ABSENT: CpuId = CpuId::new(CPUS - 1);

struct Machine {
    memory: Mmap,
    units: Units,
}

/// Pages in the window, chunk for chunk.
type Page = usize;

fn machine(geometry: fn(usize) -> Geometry) -> Machine {
    machine_of(8, geometry)
}

/// A machine whose window has so many chunks.
fn machine_of(chunks: usize, geometry: fn(usize) -> Geometry) -> Machine {
    let spec = FirstChunkSpec {
        atom_bytes: PAGE_BYTES,
        page_bytes: PAGE_BYTES,
        min_unit_bytes: UNIT_PAGES * PAGE_BYTES,
        ..FirstChunkSpec::default()
    };
    let topology = EvenNodes::new(CPUS, 1).unwrap();
    let (mut words, mut offsets) = (vec![0; storage_words(CPUS)], vec![0; CPUS as usize]);
    let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
    let window_bytes = chunks * plan.sizes().unit_bytes();
    let mut memory = Mmap::reserve(&plan, geometry(window_bytes), Placement::Any).unwrap();
    let template = Template {
        bytes: &[],
        base: memory.neutral_base(),
    };
    let first_chunk = embed::build(plan, template, &mut offsets, &mut memory).unwrap();
    let mut block = BlockLayout::new();
    let layout = UnitsLayout::add(&mut block, CPUS).unwrap();
    let block = vec![0_u128; block.finish().size().div_ceil(16)];
    let block = NonNull::from(Box::leak(block.into_boxed_slice())).cast();
    // SAFETY: the block is large and aligned enough, and this is all that it is used for.
    let units = unsafe { Units::new(block, &layout, &first_chunk, true) };
    for cpu in units.possible().iter().filter(|cpu| *cpu != ABSENT) {
        units.populated_for[0].insert(cpu);
    }
    Machine { memory, units }
}

impl Machine {
    fn space(&self, chunk: usize) -> ChunkSpace<'_> {
        ChunkSpace {
            chunk: chunk as u32,
            neutral: self.memory.neutral_base() + chunk * UNIT_PAGES * PAGE_BYTES,
            unit_bytes: UNIT_PAGES * PAGE_BYTES,
            units: &self.units,
        }
    }

    /// The pages of one chunk, a bit for each.
    fn span(&self, chunk: usize, pages: u64) -> PageSpan<'_> {
        PageSpan {
            chunk: chunk as u32,
            neutral: self.space(chunk).neutral,
            page_bytes: PAGE_BYTES,
            pages: PageMask::of_bits(pages),
            cpus: Cpus::Set(&self.units.populated_for[0]),
            units: &self.units,
        }
    }

    fn reserve(&self, chunk: usize) {
        // SAFETY: tests reserve a chunk once.
        unsafe { self.memory.reserve(self.space(chunk), Context::MaySleep) }.unwrap();
    }

    fn release(&self, chunk: usize) {
        // SAFETY: tests release what is reserved, without pages.
        unsafe { self.memory.release(self.space(chunk)) };
    }

    /// Whether the chunk can be written to: in all units, or in none of them.
    fn is_open(&self, chunk: usize) -> bool {
        let open = writable();
        let is_in = |address| open.iter().any(|part| part.contains(&address));
        let is_open: Vec<_> = (self.space(chunk).areas())
            .map(|area| {
                // Pages that a neighbour has a part of may be open for it.
                let pages = whole_pages::within(area.addresses());
                let of_pages: Vec<_> = pages.step_by(PAGE_BYTES).map(is_in).collect();
                assert!(of_pages.iter().all(|page| *page == of_pages[0]), "{area:?}");
                of_pages[0]
            })
            .collect();
        assert_eq!(is_open.len() as u32, CPUS);
        assert!(
            is_open.iter().all(|unit| *unit == is_open[0]),
            "{is_open:?}"
        );
        is_open[0]
    }

    /// How many chunks are open, from the first on; those behind are not.
    fn open_chunks(&self, of: usize) -> usize {
        let is_open: Vec<_> = (0..of).map(|chunk| self.is_open(chunk)).collect();
        let end = is_open.iter().position(|open| !open).unwrap_or(of);
        assert!(is_open[end..].iter().all(|open| !open), "{is_open:?}");
        end
    }

    /// Gives pages memory, finds them zero, and fills them with what tells one page of one CPU from any other.
    fn populate(&self, pages: &[Page]) {
        for (chunk, pages) in by_chunk(pages) {
            // SAFETY: tests populate what is not populated.
            let contents = unsafe {
                self.memory
                    .populate(self.span(chunk, pages), Context::Atomic)
            };
            assert_eq!(contents, Ok(Contents::Zeroed));
        }
        for &page in pages {
            self.assert_holds(page, |_| 0);
            self.fill(page);
        }
    }

    fn depopulate(&self, pages: &[Page]) {
        for (chunk, pages) in by_chunk(pages) {
            // SAFETY: tests use these pages no more.
            unsafe { self.memory.depopulate(self.span(chunk, pages)) };
        }
    }

    fn copies(&self, page: Page) -> impl Iterator<Item = (CpuId, *mut [u64; PAGE_BYTES / 8])> {
        let (chunk, page) = (page / UNIT_PAGES, page % UNIT_PAGES);
        let copies = self.span(chunk, 1 << page).areas();
        copies.map(|area| (area.cpu, ptr::with_exposed_provenance_mut(area.address)))
    }

    fn fill(&self, page: Page) {
        for (cpu, copy) in self.copies(page) {
            // SAFETY: the page is populated, and the caller's.
            unsafe { *copy = [mark(page, cpu); PAGE_BYTES / 8] };
        }
    }

    fn assert_holds(&self, page: Page, word: impl Fn(CpuId) -> u64) {
        for (cpu, copy) in self.copies(page) {
            // SAFETY: as in `fill`.
            let found = unsafe { *copy };
            assert!(
                found == [word(cpu); PAGE_BYTES / 8],
                "page {page} of CPU {cpu}"
            );
        }
    }

    /// The system's pages from the first page of chunk 1 to the end of chunk `last` that have memory, per CPU, counted from
    /// the one that the first page begins in.
    fn resident(&self, cpu: CpuId, last: usize) -> Vec<usize> {
        let first = self.space(1).neutral + self.units.offset(cpu).unwrap();
        let pages = whole_pages::around(first..first + last * UNIT_PAGES * PAGE_BYTES);
        let mut is_resident = vec![0_u8; pages.len() / PAGE_BYTES];
        // SAFETY: the call writes a byte for every page.
        let result = unsafe {
            let start = ptr::with_exposed_provenance_mut(pages.start);
            libc::mincore(start, pages.len(), is_resident.as_mut_ptr())
        };
        assert_eq!(result, 0);
        let all = 0..is_resident.len();
        all.filter(|&page| is_resident[page] & 1 != 0).collect()
    }

    /// Panics unless the system's pages have memory that a populated page has a part of, and no others.
    fn assert_resident(&self, populated: &[Page], last_chunk: usize) {
        for cpu in self.units.possible().iter() {
            let is_whole = self.units.offset(cpu).unwrap().is_multiple_of(PAGE_BYTES);
            let mut needed: Vec<_> = populated
                .iter()
                .map(|page| page - UNIT_PAGES)
                .flat_map(|page| page..page + 1 + usize::from(!is_whole))
                .filter(|_| cpu != ABSENT)
                .collect();
            needed.dedup();
            assert_eq!(self.resident(cpu, last_chunk), needed, "CPU {cpu}");
        }
    }
}

/// What can be written to of this process's addresses.
fn writable() -> Vec<Range<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let part = |line: &str| {
        let (addresses, rest) = line.split_once(' ')?;
        let (start, end) = addresses.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        let part = address(start)?..address(end)?;
        rest.starts_with("rw").then_some(part)
    };
    maps.lines().filter_map(part).collect()
}

fn mark(page: Page, cpu: CpuId) -> u64 {
    1 + page as u64 * u64::from(CPUS) + u64::from(cpu.get())
}

fn by_chunk(pages: &[Page]) -> Vec<(usize, u64)> {
    let mask = |chunk| {
        let of_chunk = pages.iter().filter(|page| *page / UNIT_PAGES == chunk);
        (
            chunk,
            of_chunk.fold(0, |mask, page| mask | 1 << (page % UNIT_PAGES)),
        )
    };
    let last = pages.iter().max().map_or(0, |page| page / UNIT_PAGES);
    let masks = (0..=last).map(mask);
    masks.filter(|(_, mask)| *mask != 0).collect()
}

/// From every set of pages around the border of two chunks to every other one.
#[test]
fn neighbours_keep_what_they_hold_whatever_comes_and_goes() {
    const FIRST: Page = 2 * UNIT_PAGES - 3;
    const SETS: u32 = 1 << 5;
    let pages = |set: u32| -> Vec<Page> {
        (0..5)
            .filter(|bit| set >> bit & 1 != 0)
            .map(|bit| FIRST + bit)
            .collect()
    };
    for geometry in [Geometry::lines, Geometry::pages] {
        let machine = machine(geometry);
        machine.reserve(1);
        machine.reserve(2);
        let mut now = 0;
        let mut go_to = |next: u32| {
            machine.depopulate(&pages(now & !next));
            machine.assert_resident(&pages(now & next), 2);
            machine.populate(&pages(next & !now));
            now = next;
            for page in pages(now) {
                machine.assert_holds(page, |cpu| mark(page, cpu));
            }
        };
        for from in 0..SETS {
            for to in 0..SETS {
                go_to(from);
                go_to(to);
            }
        }
        go_to(0);
        machine.assert_resident(&[], 2);
    }
}

/// Threads that know nothing of each other, each with every third page: all neighbours are another's.
#[test]
fn neighbours_of_other_threads_keep_what_they_hold() {
    const THREADS: usize = 3;
    let machine = machine(Geometry::lines);
    machine.reserve(1);
    machine.reserve(2);
    thread::scope(|scope| {
        for first in 0..THREADS {
            let machine = &machine;
            scope.spawn(move || {
                let own: Vec<Page> = (UNIT_PAGES..3 * UNIT_PAGES)
                    .skip(first)
                    .step_by(THREADS)
                    .collect();
                let mut number = 0x9e37_79b9 * (first as u64 + 1);
                let mut has_memory = vec![false; own.len()];
                for _ in 0..1500 {
                    number ^= number << 13;
                    number ^= number >> 7;
                    number ^= number << 17;
                    let index = (number >> 11) as usize % own.len();
                    let page = own[index];
                    match has_memory[index] {
                        false => machine.populate(&[page]),
                        true => {
                            machine.assert_holds(page, |cpu| mark(page, cpu));
                            machine.depopulate(&[page]);
                        }
                    }
                    has_memory[index] = !has_memory[index];
                }
                for (page, _) in own.iter().zip(has_memory).filter(|(_, has)| *has) {
                    machine.assert_holds(*page, |cpu| mark(*page, cpu));
                    machine.depopulate(&[*page]);
                }
            });
        }
    });
    machine.assert_resident(&[], 2);
}

/// Chunks side by side that are made and destroyed in every order, each full while it is there.
#[test]
fn chunks_keep_what_they_hold_whatever_comes_and_goes_beside_them() {
    let all =
        |chunk: usize| -> Vec<Page> { (chunk * UNIT_PAGES..(chunk + 1) * UNIT_PAGES).collect() };
    let machine = machine(Geometry::lines);
    let is_in = |set: usize, chunk: usize| set >> (chunk - 1) & 1 != 0;
    let mut now = 0;
    let mut go_to = |next: usize| {
        for chunk in (1..=3).filter(|&chunk| is_in(now, chunk) && !is_in(next, chunk)) {
            machine.depopulate(&all(chunk));
            machine.release(chunk);
        }
        for chunk in (1..=3).filter(|&chunk| is_in(next, chunk) && !is_in(now, chunk)) {
            machine.reserve(chunk);
            machine.populate(&all(chunk));
        }
        now = next;
        let there: Vec<Page> = (1..=3)
            .filter(|&chunk| is_in(now, chunk))
            .flat_map(all)
            .collect();
        for &page in &there {
            machine.assert_holds(page, |cpu| mark(page, cpu));
        }
        machine.assert_resident(&there, 3);
    };
    for from in 0..8 {
        for to in 0..8 {
            go_to(from);
            go_to(to);
        }
    }
    go_to(0);
}

/// Threads that make and destroy chunks side by side: each can use its own while it has it.
#[test]
fn chunks_of_other_threads_stay_usable() {
    let machine = machine(Geometry::lines);
    thread::scope(|scope| {
        for chunk in 1..=3 {
            let machine = &machine;
            scope.spawn(move || {
                let edges = [chunk * UNIT_PAGES, (chunk + 1) * UNIT_PAGES - 1];
                for _ in 0..150 {
                    machine.reserve(chunk);
                    machine.populate(&edges);
                    for page in edges {
                        machine.assert_holds(page, |cpu| mark(page, cpu));
                    }
                    machine.depopulate(&edges);
                    machine.release(chunk);
                }
            });
        }
    });
    machine.assert_resident(&[], 3);
}

/// A CPU whose bringing up has failed gives back what is its own; the others keep theirs.
#[test]
fn one_cpu_gives_back_what_the_others_keep() {
    let machine = machine(Geometry::lines);
    machine.reserve(1);
    let page = UNIT_PAGES + 3;
    machine.populate(&[page - 1, page, page + 1]);
    let of = |cpu, page: Page| PageSpan {
        cpus: Cpus::One(CpuId::new(cpu)),
        ..machine.span(1, 1 << (page - UNIT_PAGES))
    };
    // SAFETY: this CPU's copies are not used.
    unsafe { machine.memory.depopulate(of(5, page)) };
    machine.assert_holds(page - 1, |cpu| mark(page - 1, cpu));
    machine.assert_holds(page + 1, |cpu| mark(page + 1, cpu));
    machine.assert_holds(page, |cpu| match cpu.get() {
        5 => 0,
        _ => mark(page, cpu),
    });
    // The page has memory still, and so what the others hold stays when its neighbour goes.
    machine.depopulate(&[page + 1]);
    machine.assert_holds(page, |cpu| match cpu.get() {
        5 => 0,
        _ => mark(page, cpu),
    });
}

/// Chunks that the units of `machine` are open for from the start: 2 MiB, and the first.
const AT_SET_UP: usize = 1 + (2 << 20) / (UNIT_PAGES * PAGE_BYTES);

/// A chunk that comes and goes is there to be used each time, and zero, however far the units are open.
#[test]
fn units_are_opened_for_what_is_reserved_and_closed_when_hardly_any_is() {
    const CHUNKS: usize = 3 * AT_SET_UP;
    for geometry in [Geometry::lines, Geometry::pages] {
        let machine = machine_of(CHUNKS, geometry);
        assert_eq!(machine.open_chunks(CHUNKS), AT_SET_UP);
        let use_all = |chunk: usize| {
            let pages = [chunk * UNIT_PAGES, (chunk + 1) * UNIT_PAGES - 1];
            machine.populate(&pages);
            machine.depopulate(&pages);
        };
        faults::set(0..0);
        for chunk in 1..AT_SET_UP {
            machine.reserve(chunk);
            use_all(chunk);
        }
        assert_eq!(faults::calls(), 0, "all of them are open");
        for _ in 0..2 {
            faults::set(0..0);
            machine.reserve(AT_SET_UP);
            assert_eq!(faults::calls(), CPUS);
            assert_eq!(machine.open_chunks(CHUNKS), 2 * AT_SET_UP);
            use_all(AT_SET_UP);
            // As long as those in use reach far enough nothing is closed.
            faults::set(0..0);
            machine.release(AT_SET_UP);
            machine.reserve(AT_SET_UP);
            use_all(AT_SET_UP);
            machine.reserve(AT_SET_UP + 1);
            use_all(AT_SET_UP + 1);
            assert_eq!(faults::calls(), 0);
            machine.release(AT_SET_UP + 1);
            (2..=AT_SET_UP)
                .rev()
                .for_each(|chunk| machine.release(chunk));
            assert_eq!(machine.open_chunks(CHUNKS), AT_SET_UP);
            (2..AT_SET_UP).for_each(|chunk| machine.reserve(chunk));
        }
        machine.reserve(CHUNKS - 1);
        use_all(CHUNKS - 1);
        assert_eq!(machine.open_chunks(CHUNKS), CHUNKS);
    }
}

/// Each call fails that opens a unit, and all that follow, or none of these.
#[test]
fn where_the_system_does_not_open_much_the_chunk_is_opened_that_is_wanted_or_nothing() {
    const CHUNKS: usize = 2 * AT_SET_UP;
    for failing in 0..CPUS {
        // Not even the first call at set-up: the units are open for the first chunk.
        faults::set(failing..failing + 1);
        let machine = machine_of(CHUNKS, Geometry::lines);
        faults::set(0..0);
        assert_eq!(machine.open_chunks(CHUNKS), 1, "call {failing}");

        faults::set(failing..u32::MAX);
        // SAFETY: the chunk is not reserved.
        let refused = unsafe { machine.memory.reserve(machine.space(1), Context::MaySleep) };
        assert_eq!(
            refused,
            Err(BackingError::OutOfAddressSpace),
            "call {failing}"
        );
        faults::set(0..0);
        assert_eq!(machine.open_chunks(CHUNKS), 1, "call {failing}");

        faults::set(failing..failing + 1);
        machine.reserve(1);
        faults::set(0..0);
        assert_eq!(machine.open_chunks(CHUNKS), 2, "call {failing}");
        machine.populate(&[UNIT_PAGES, 2 * UNIT_PAGES - 1]);
        machine.reserve(2);
        assert_eq!(machine.open_chunks(CHUNKS), AT_SET_UP, "call {failing}");
        machine.assert_holds(UNIT_PAGES, |cpu| mark(UNIT_PAGES, cpu));
    }
}

/// Where all memory is locked as it comes, its pages are made zero by writing: not to units that were never opened.
#[test]
fn units_that_could_not_be_opened_are_left_alone() {
    const NAME: &str = "backing::mmap::tests::units_that_could_not_be_opened_are_left_alone";
    const IS_CHILD: &str = "PCPU_TEST_CHILD";
    if std::env::var_os(IS_CHILD).is_none() {
        // The lock is the whole process's.
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let status = child.args(["--exact", NAME]).env(IS_CHILD, "1").status();
        assert!(status.unwrap().success());
        return;
    }
    // SAFETY: a call without pointers.
    if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
        std::println!("memory cannot be locked here");
        return;
    }
    for failing in 0..CPUS {
        faults::set(failing..failing + 1);
        let machine = machine_of(2 * AT_SET_UP, Geometry::lines);
        faults::set(0..0);
        assert_eq!(machine.open_chunks(2 * AT_SET_UP), 1, "call {failing}");
    }
}

/// One byte that is not zero, wherever it is, in parts of any length; what lies beside them stays.
#[test]
fn bytes_are_made_zero_and_no_others() {
    const BYTES: usize = 300;
    for (start, end) in [(0, BYTES), (1, BYTES - 1), (17, 18), (64, 128), (40, 40)] {
        for at in start..end.max(start + 1) {
            let mut bytes = [0_u8; BYTES];
            bytes[at] = 7;
            bytes[..start].fill(1);
            bytes[end..].fill(1);
            let first = bytes.as_mut_ptr().expose_provenance();
            // SAFETY: the bytes lie in the array, which nobody else uses.
            unsafe { make_zero(first + start..first + end) };
            assert!(bytes[..start].iter().all(|byte| *byte == 1), "{at}");
            assert!(bytes[start..end].iter().all(|byte| *byte == 0), "{at}");
            assert!(bytes[end..].iter().all(|byte| *byte == 1), "{at}");
        }
    }
}
