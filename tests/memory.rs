//! What an instance costs in real memory: resident pages, page tables and mappings, as the system counts them.
//!
//! Each test runs in a process of its own, for the figures are those of a whole process.

#![cfg(target_os = "linux")]

#[path = "common/child.rs"]
mod child;

use std::fmt;
use std::fs;
use std::sync::OnceLock;

use pcpu::allocator::PerCpuAllocator;
use pcpu::backing::BackingError;
use pcpu::backing::mmap::{Geometry, Mmap, Placement};
use pcpu::embed;
use pcpu::global::{GlobalAllocator, ProcessLock};
use pcpu::this_cpu::Live;
use pcpu::this_cpu::portable::Portable;
use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};
use pcpu::{
    AllocError, CpuCell, Domain, Handle, LocalCell, PerCpu, PerCpuPtr, RemoteCell, Request, global,
    per_cpu_ptr,
};

use child::run_in_child;

/// Objects of the tests, and their size.
const OBJECTS: usize = 10_000;
const OBJECT_BYTES: usize = 64;

/// What a process has at one time.
#[derive(Debug, Clone, Copy)]
struct Usage {
    /// Memory of all kinds but files: how much of the program has been read depends on where its parts lie.
    resident_bytes: u64,
    /// Memory that no file is behind.
    anonymous_bytes: u64,
    page_table_bytes: u64,
    mappings: u64,
}

impl Usage {
    fn now() -> Self {
        let rollup = fs::read_to_string("/proc/self/smaps_rollup").expect("Linux 5.1 has it so");
        let status = fs::read_to_string("/proc/self/status").expect("every Linux has it");
        let maps = fs::read_to_string("/proc/self/maps").expect("every Linux has it");
        Self {
            resident_bytes: field(&rollup, "Anonymous:") + field(&rollup, "Pss_Shmem:"),
            anonymous_bytes: field(&rollup, "Anonymous:"),
            page_table_bytes: field(&status, "VmPTE:"),
            mappings: maps.lines().count() as u64,
        }
    }

    /// What has come since `earlier`.
    fn since(&self, earlier: &Self) -> Growth {
        let grown = |now: u64, then: u64| now as i64 - then as i64;
        Growth {
            resident_bytes: grown(self.resident_bytes, earlier.resident_bytes),
            anonymous_bytes: grown(self.anonymous_bytes, earlier.anonymous_bytes),
            page_table_bytes: grown(self.page_table_bytes, earlier.page_table_bytes),
            mappings: grown(self.mappings, earlier.mappings),
        }
    }
}

/// A figure that the system gives in kB.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.trim().strip_suffix("kB"));
    let kib: u64 = number.expect(name).trim().parse().expect(name);
    kib * 1024
}

/// A difference of two [`Usage`]s.
#[derive(Debug, Clone, Copy)]
struct Growth {
    resident_bytes: i64,
    anonymous_bytes: i64,
    page_table_bytes: i64,
    mappings: i64,
}

impl Growth {
    /// Memory that is in use because of it.
    fn bytes(&self) -> i64 {
        self.resident_bytes + self.page_table_bytes
    }
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>8} bytes resident ({} of them anonymous), {} of page tables, {} mappings",
            self.resident_bytes, self.anonymous_bytes, self.page_table_bytes, self.mappings
        )
    }
}

/// An instance as a process has it, on a machine of `cpus` possible CPUs, with static variables that begin as `template`.
fn instance(cpus: u32, template: &[u8]) -> GlobalAllocator {
    let spec = FirstChunkSpec {
        static_bytes: template.len(),
        atom_bytes: 4096,
        dyn_bytes: 20 << 10,
        min_unit_bytes: 256 << 10,
        ..FirstChunkSpec::default()
    };
    let topology = EvenNodes::new(cpus, 1).expect("a machine");
    let (mut words, mut offsets) = (vec![0; storage_words(cpus)], vec![0; cpus as usize]);
    let plan = UnitPlan::embed(&spec, &topology, &mut words).expect("a plan");
    let mut memory =
        Mmap::reserve(&plan, Geometry::lines(1 << 30), Placement::Any).expect("address space");
    let template = Template {
        bytes: template,
        base: memory.neutral_base(),
    };
    let first_chunk =
        embed::build(plan, template, &mut offsets, &mut memory).expect("a first chunk");
    // SAFETY: the first chunk lies in `memory`, which the instance takes over.
    let made = unsafe { PerCpuAllocator::new(memory, &first_chunk, *global().policy()) };
    made.expect("an instance")
}

/// 256 possible CPUs, of which two ever come.
#[test]
fn cpus_that_never_come_cost_nothing() {
    if run_in_child("cpus_that_never_come_cost_nothing", |_| ()) {
        return;
    }
    let start = Usage::now();
    let pcpu = instance(256, &[]);
    println!("set up:  {}", Usage::now().since(&start));
    let cpus = [0, 1].map(CpuId::new);
    for cpu in cpus {
        pcpu.bring_up(cpu).expect("a possible CPU");
    }
    // What the test itself remembers has its memory before.
    let mut areas = vec![usize::MAX; OBJECTS];
    let base = Usage::now();

    let request = Request::new(OBJECT_BYTES, 8);
    areas.fill_with(|| pcpu.allocate(&request).expect("there is memory"));
    for cpu in cpus {
        for &area in &areas {
            let address = pcpu.per_cpu_address(area, cpu).expect("a possible CPU");
            let object = std::ptr::with_exposed_provenance_mut::<[u8; OBJECT_BYTES]>(address);
            // SAFETY: the area is allocated, has memory on this CPU, and nobody else knows of it.
            unsafe {
                assert_eq!(*object, [0; OBJECT_BYTES]);
                *object = [cpu.get() as u8 + 1; OBJECT_BYTES];
            }
        }
    }
    let filled = Usage::now().since(&base);
    println!("written: {filled}");
    println!("metadata: {} bytes", pcpu.stats().metadata_bytes);
    let payload_bytes = (OBJECTS * OBJECT_BYTES * cpus.len()) as i64;
    assert!(filled.anonymous_bytes > payload_bytes * 9 / 10, "{filled}");
    assert!(filled.bytes() <= 1_400_000, "{filled}");

    // A few stay, so that no chunk goes as a whole.
    for area in areas.chunks(1000).flat_map(|some| &some[1..]) {
        // SAFETY: allocated above, and not used any more.
        unsafe { pcpu.free(*area) }.expect("it is allocated");
    }
    pcpu.trim(0);
    assert_eq!(pcpu.stats().chunks_destroyed, 0);
    let emptied = Usage::now().since(&base);
    println!("freed:   {emptied}");
    // What stays: the first chunk, a page where an area is left, and metadata.
    assert!(emptied.bytes() <= 300_000, "{emptied}");
}

/// Static variables with initial values: those of a CPU that never comes are there to be read, and cost nothing.
#[test]
fn static_variables_cost_nothing_on_cpus_that_never_come() {
    const INITIAL: u64 = 0x0123_4567_89ab_cdef;
    const CPUS: u32 = 256;

    static INSTANCE: OnceLock<GlobalAllocator> = OnceLock::new();
    /// A machine of its own, with a variable at the start of the template.
    #[derive(Debug)]
    enum Large {}
    // SAFETY: the instance is made once, and is no other domain's.
    unsafe impl Domain for Large {
        type Backing = Mmap;
        type Lock = ProcessLock;
        type Ops = Portable<Self>;
        fn allocator() -> &'static GlobalAllocator {
            INSTANCE.get().expect("made by the test")
        }
        fn current_cpu() -> CpuId {
            CpuId::new(77)
        }
    }
    struct First;
    impl Handle for First {
        type Target = CpuCell<u64>;
        type Domain = Large;
        fn handle(&self) -> PerCpuPtr<CpuCell<u64>, Large> {
            PerCpuPtr::from_neutral(Large::allocator().neutral_base()).expect("not at 0")
        }
    }
    // SAFETY: the template has a value for it, and the instance stays.
    unsafe impl Live for First {}

    if run_in_child(
        "static_variables_cost_nothing_on_cpus_that_never_come",
        |_| (),
    ) {
        return;
    }
    let template: Vec<u8> = (0..8).flat_map(|_| INITIAL.to_ne_bytes()).collect();
    assert_eq!(template.len(), 64);
    // What comes with the first instance of any size. It stays, so that no other takes over its memory.
    let first = instance(2, &template);
    let start = Usage::now();
    let few = instance(2, &template);
    let of_few = Usage::now().since(&start);
    let start = Usage::now();
    INSTANCE.set(instance(CPUS, &template)).expect("the first");
    let of_many = Usage::now().since(&start);
    println!("2 CPUs:   {of_few}");
    println!("{CPUS} CPUs: {of_many}");
    assert!(of_many.bytes() <= of_few.bytes() + 100_000, "{of_many}");
    drop((first, few));

    let start = Usage::now();
    assert_eq!(First.sum(), INITIAL.wrapping_mul(CPUS.into()));
    let of_sum = Usage::now().since(&start);
    println!("summed:   {of_sum}");
    assert!(of_sum.bytes() <= 100_000, "{of_sum}");

    // SAFETY: the variable is live, and changed by operations only.
    unsafe { pcpu::this_cpu::add(First.handle(), 5) };
    for cpu in (0..CPUS).map(CpuId::new) {
        let changed = match cpu.get() {
            77 => INITIAL + 5,
            _ => INITIAL,
        };
        let copy = per_cpu_ptr(First, cpu).expect("possible").cast();
        // SAFETY: the template, and what follows it in the first chunk, can be read on every CPU.
        let found: [u64; 512] = unsafe { *copy.as_ptr() };
        assert_eq!(found[0], changed, "CPU {cpu}");
        assert_eq!(found[1..8], [INITIAL; 7], "CPU {cpu}");
        assert_eq!(found[8..], [0; 504], "CPU {cpu}");
    }
    assert_eq!(
        First.sum(),
        INITIAL.wrapping_mul(CPUS.into()).wrapping_add(5)
    );
}

/// Memory that grows: who lets it grow looks into the caches of CPUs that have had something in theirs, not of all.
#[test]
fn growing_looks_at_no_cpu_that_allocates_nothing() {
    const CPUS: u32 = 256;

    static INSTANCE: OnceLock<GlobalAllocator> = OnceLock::new();
    #[derive(Debug)]
    enum Wide {}
    // SAFETY: the instance is made once, and is no other domain's.
    unsafe impl Domain for Wide {
        type Backing = Mmap;
        type Lock = ProcessLock;
        type Ops = Portable<Self>;
        fn allocator() -> &'static GlobalAllocator {
            INSTANCE.get().expect("made by the test")
        }
        fn current_cpu() -> CpuId {
            CpuId::new(77)
        }
    }

    if run_in_child("growing_looks_at_no_cpu_that_allocates_nothing", |_| ()) {
        return;
    }
    let mut made = instance(CPUS, &[]);
    made.enable_caches().expect("there is memory");
    INSTANCE.set(made).expect("the first");
    let pcpu = Wide::allocator();
    for cpu in (0..CPUS).map(CpuId::new) {
        pcpu.bring_up(cpu).expect("a possible CPU");
    }
    let base = Usage::now();
    let request = Request::new(OBJECT_BYTES, 8);
    for _ in 0..OBJECTS {
        Wide::allocate(&request).expect("there is memory");
    }
    let grown = Usage::now().since(&base);
    println!("grown: {grown}");
    assert!(pcpu.stats().cache_misses > 0, "there are runs");
    // Nobody has touched an area; to look into a CPU's cache takes page tables, 8 KiB a CPU.
    assert!(grown.page_table_bytes < 100_000, "{grown}");
}

/// Where there is no file to be had the template is copied.
#[test]
fn the_template_needs_no_file() {
    if run_in_child("the_template_needs_no_file", |_| ()) {
        return;
    }
    let no_files = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call reads the structure only.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &no_files) };
    assert_eq!(result, 0);
    let pcpu = instance(40, &[7; 5000]);
    for cpu in pcpu.units().possible().iter() {
        let copy = pcpu.per_cpu_address(pcpu.neutral_base(), cpu);
        let copy = std::ptr::with_exposed_provenance::<[u8; 5000]>(copy.expect("possible"));
        // SAFETY: the static region is as long, and can be read on every CPU.
        assert_eq!(unsafe { *copy }, [7; 5000], "CPU {cpu}");
    }
}

/// What counts as data of the process, in bytes.
fn data_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("every Linux has it");
    field(&status, "VmData:")
}

/// Limits the data of the process.
fn limit_data(bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the call reads the structure only.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_DATA, &limit) }, 0);
}

/// A limit that comes when the instance is there already: no more is opened than is used from then on.
#[test]
fn a_limit_of_data_that_comes_late_is_kept() {
    const CPUS: u32 = 64;
    const UNIT_BYTES: u64 = 256 << 10;
    if run_in_child("a_limit_of_data_that_comes_late_is_kept", |_| ()) {
        return;
    }
    let pcpu = instance(CPUS, &[]);
    limit_data(1 << 40);
    let start = data_bytes();
    // What is open from the start, and a little more.
    let chunks = (2 << 20) / UNIT_BYTES + 2;
    for _ in 0..chunks * UNIT_BYTES / (32 << 10) {
        pcpu.allocate(&Request::new(32 << 10, 8))
            .expect("there is room");
    }
    let grown = data_bytes() - start;
    assert!(grown < 4 * u64::from(CPUS) * UNIT_BYTES, "{grown}");
}

/// A process whose data is limited: no more of the units is opened than is used, and where the limit is reached a request is
/// refused, and nothing is lost.
#[test]
fn a_limit_of_data_is_kept() {
    const CPUS: u32 = 64;
    const UNIT_BYTES: u64 = 256 << 10;
    // What chunks take, and room for what the test itself needs.
    const ROOM_BYTES: u64 = 3 * CPUS as u64 * UNIT_BYTES + UNIT_BYTES * CPUS as u64 / 2;
    if run_in_child("a_limit_of_data_is_kept", |_| ()) {
        return;
    }
    // One that is far away: what is not used is left to others all the same.
    limit_data(1 << 40);
    let start = data_bytes();
    let pcpu = instance(CPUS, &[]);
    assert!(data_bytes() < start + u64::from(CPUS) * UNIT_BYTES * 5 / 4);
    drop(pcpu);

    limit_data(data_bytes() + ROOM_BYTES);
    let pcpu = instance(CPUS, &[]);
    let request = Request::new(32 << 10, 8);
    let mut areas = Vec::new();
    let refused = loop {
        match pcpu.allocate(&request) {
            Ok(area) => areas.push(area),
            Err(error) => break error,
        }
    };
    assert_eq!(
        refused,
        AllocError::Backing(BackingError::OutOfAddressSpace)
    );
    // The first chunk, and two more.
    assert_eq!(areas.len() as u64 / (UNIT_BYTES / (32 << 10)), 2);
    // What is freed can be had again.
    for area in areas.drain(..) {
        // SAFETY: allocated above, and not used.
        unsafe { pcpu.free(area) }.expect("it is allocated");
    }
    pcpu.trim(0);
    pcpu.allocate(&request).expect("there is room");
}

/// Owners in the process's own instance, each used on one CPU.
#[test]
fn an_owner_costs_its_bytes_on_the_cpu_that_uses_it() {
    if run_in_child("an_owner_costs_its_bytes_on_the_cpu_that_uses_it", |_| ()) {
        return;
    }
    keep_on_this_cpu();
    let mut owners = Vec::new();
    owners.resize_with(OBJECTS, || None);
    LocalCell::inc(&PerCpu::<CpuCell<u64>>::new().expect("there is memory"));
    let base = Usage::now();

    for owner in &mut owners {
        let cells = PerCpu::<[CpuCell<u64>; 8]>::new().expect("there is memory");
        // SAFETY: the owner lives on, and the cells are changed by operations only.
        unsafe { pcpu::this_cpu::add(cells.as_ptr().cast::<CpuCell<u64>>(), 1) };
        *owner = Some(cells);
    }
    let filled = Usage::now().since(&base);
    println!("used:  {filled}");
    let payload_bytes = (OBJECTS * OBJECT_BYTES) as i64;
    assert!(filled.anonymous_bytes > payload_bytes * 9 / 10, "{filled}");
    assert!(filled.bytes() <= payload_bytes + 120_000, "{filled}");

    owners.iter_mut().for_each(|owner| *owner = None);
    global().trim(0);
    let emptied = Usage::now().since(&base);
    println!("freed: {emptied}");
    assert!(emptied.bytes() <= 120_000, "{emptied}");
}

/// Lets the calling thread run on the CPU only that it is on.
fn keep_on_this_cpu() {
    // SAFETY: a set of CPUs is an array of integers; the set asserts that the id is below its size.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
