//! A process's memory, with each system call about it failing, alone and with all behind it: what is refused is undone and served
//! afterwards, what cannot be refused does without, and memory that is handed out is zero whatever became of giving it back.
//!
//! The calls fail for real (`common/syscalls.rs`). Chunks that are opened many at a time are the matter of `backing/mmap/tests.rs`. Populating makes none: memory comes with the first touch.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "common/copies.rs"]
mod copies;
#[path = "common/syscalls.rs"]
mod syscalls;

use std::error::Error;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::sync::mpsc;
use std::thread;

use pcpu::allocator::{PerCpuAllocator, Policy};
use pcpu::backing::BackingError;
use pcpu::backing::mmap::{Geometry, Mmap, Placement};
use pcpu::cache::LockedSeat;
use pcpu::hardened::{Finding, FindingHook, Hardening};
use pcpu::unit::{CpuId, EvenNodes, FirstChunkKind, FirstChunkSpec, Template, UnitPlan};
use pcpu::{AllocError, AllocFlags, CpuCell, FreeFlags, LocalCell, PerCpu, RemoteCell, Request};
use pcpu::{drain_caches, embed, page};

use copies::{assert_stamped, assert_zero, stamp};

type Pcpu = PerCpuAllocator<Mmap, parking_lot::RawMutex>;

/// Is set in the environment of a process that a test runs.
const IS_CHILD: &str = "PCPU_TEST_CHILD";

const CPUS: u32 = 3;
const WINDOW_BYTES: usize = 32 << 20;
const UNIT_BYTES: usize = 32 << 10;

/// The initial values of the static variables.
fn template() -> Vec<u8> {
    (0..5000_usize).map(|at| (at % 251) as u8 | 1).collect()
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    kind: FirstChunkKind,
    geometry: fn(usize) -> Geometry,
}

const SHAPES: [Shape; 3] = [
    Shape {
        kind: FirstChunkKind::Embed,
        geometry: Geometry::lines,
    },
    Shape {
        kind: FirstChunkKind::Embed,
        geometry: Geometry::pages,
    },
    Shape {
        kind: FirstChunkKind::Page,
        geometry: Geometry::pages,
    },
];

impl Shape {
    fn build(self) -> Result<Pcpu, Box<dyn Error>> {
        let spec = FirstChunkSpec {
            static_bytes: 5000,
            reserved_bytes: 2048,
            atom_bytes: 4096,
            min_unit_bytes: UNIT_BYTES,
            ..FirstChunkSpec::default()
        };
        let topology = EvenNodes::new(CPUS, 1)?;
        let mut words = vec![0; pcpu::unit::storage_words(CPUS)];
        let mut offsets = vec![0; CPUS as usize];
        let plan = match self.kind {
            FirstChunkKind::Embed => UnitPlan::embed(&spec, &topology, &mut words)?,
            FirstChunkKind::Page => UnitPlan::page(&spec, &topology, &mut words)?,
        };
        let mut memory = Mmap::reserve(&plan, (self.geometry)(WINDOW_BYTES), Placement::Any)?;
        let (values, base) = (template(), memory.neutral_base());
        let template = Template {
            bytes: &values,
            base,
        };
        let first_chunk = match self.kind {
            FirstChunkKind::Embed => embed::build(plan, template, &mut offsets, &mut memory)?,
            FirstChunkKind::Page => page::build(plan, template, &mut offsets, &mut memory)?,
        };
        // SAFETY: the first chunk lies in `memory`, which the instance takes over.
        let pcpu = unsafe { Pcpu::new(memory, &first_chunk, Policy::default())? };
        for cpu in (0..CPUS - 1).map(CpuId::new) {
            pcpu.bring_up(cpu)?;
        }
        Ok(pcpu)
    }
}

/// The addresses of an instance's memory, the neutral ones first.
fn range(pcpu: &Pcpu) -> Range<usize> {
    let base = pcpu.neutral_base();
    let bytes = WINDOW_BYTES + CPUS as usize * pcpu.backing().geometry().stride_bytes();
    base..base + bytes.next_multiple_of(4096)
}

/// Length of all mappings of the process that lie within a range, of those that can be written to.
fn writable_bytes(within: &Range<usize>) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let lines = maps.lines().filter_map(|line| {
        let (addresses, rest) = line.split_once(' ')?;
        let (start, end) = addresses.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        let (start, end) = (number(start).max(within.start), number(end).min(within.end));
        rest.starts_with("rw").then(|| end.saturating_sub(start))
    });
    lines.sum()
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Address space of the process, in bytes.
fn address_space_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').next().unwrap().parse::<usize>().unwrap() * 4096
}

/// Does some work on a watched thread. Chunks are opened one by one in this process, so that each takes calls: there is a limit to its
/// data, which it is far from.
fn watched(work: impl FnOnce() + Send + 'static) {
    let limit = libc::rlimit {
        rlim_cur: 1 << 46,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the structure is whole.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_DATA, &limit) }, 0);
    syscalls::on_watched_thread(work);
}

#[test]
fn building_fails_at_each_call() {
    // What the process maps is counted: no other test's thread may be given memory to allocate from meanwhile.
    if std::env::var_os(IS_CHILD).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "building_fails_at_each_call"]);
        assert!(child.env(IS_CHILD, "1").status().unwrap().success());
        return;
    }
    watched(build_failing);
}

fn build_failing() {
    for shape in SHAPES {
        for count in [1, u64::MAX] {
            let (mut refused, mut done_without) = (0, 0);
            for nth in 0.. {
                let before = (open_files(), address_space_bytes());
                syscalls::set_faults(0..usize::MAX, nth, count);
                let built = shape.build();
                let (calls, failed) = syscalls::end_faults();
                match built {
                    Ok(pcpu) => {
                        done_without += failed.min(1);
                        check_static(&pcpu);
                        let area = pcpu.allocate(&Request::new(100, 8)).unwrap();
                        assert_zero(&pcpu, (area, 100), CpuId::new(0));
                    }
                    Err(error) => {
                        assert!(!error.to_string().contains('\n'), "{error}");
                        refused += 1;
                    }
                }
                assert_eq!(open_files(), before.0);
                let grown_bytes = address_space_bytes().saturating_sub(before.1);
                assert!(
                    grown_bytes < WINDOW_BYTES,
                    "{grown_bytes} left of call {nth}"
                );
                if nth >= calls {
                    break;
                }
            }
            println!("{shape:?}, {count}: {refused} refused, {done_without} did without");
            // One that fails alone can be done without, or done anew; pages of single units cannot.
            let least = match (shape.kind, count) {
                (FirstChunkKind::Page, _) => 16,
                (FirstChunkKind::Embed, 1) => 1,
                (FirstChunkKind::Embed, _) => 5,
            };
            assert!(refused >= least, "{shape:?}: {refused}");
            // The template comes out of a file if it can.
            let is_embed = shape.kind == FirstChunkKind::Embed;
            assert!(!is_embed || count > 1 || done_without >= 4);
        }
    }
}

/// The static variables have their initial values on every CPU.
fn check_static(pcpu: &Pcpu) {
    let values = template();
    for cpu in pcpu.units().possible().iter() {
        let copy = pcpu.neutral_base() + pcpu.units().offset(cpu).unwrap();
        let copy = std::ptr::with_exposed_provenance::<u8>(copy);
        // SAFETY: the static region of a unit, which nobody writes to.
        let copy = unsafe { std::slice::from_raw_parts(copy, values.len()) };
        assert!(copy == values, "CPU {cpu}");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Front {
    Nothing,
    Caches,
    Hardened,
}

/// Nothing is to be found.
struct Deaf;

impl FindingHook for Deaf {
    fn found(&self, finding: &Finding) {
        panic!("{finding}");
    }
}

struct Owner {
    pcpu: Pcpu,
    live: Vec<(usize, usize)>,
}

const SMALL: Request = Request::new(40, 8);
const LONG: Request = Request::new(9000, 8);
/// What fills the first chunk, so that more takes a new one.
const FIRST: Op = Op::AllocateMany(Request::new(400, 8), 24);

#[derive(Debug, Clone, Copy)]
enum Op {
    Allocate(Request),
    AllocateMany(Request, usize),
    /// Live areas in the order in which they were allocated, from one number on, so many.
    Free(usize, usize),
    Drain,
    Upkeep,
    Trim,
    BringUp,
}
use Op::{Allocate, AllocateMany, BringUp, Drain, Free, Trim, Upkeep};

/// What is done before, and what is done with calls failing; whether it is refused if all fail.
const ROWS: &[(&[Op], Op, bool)] = &[
    (&[], Allocate(SMALL), false),
    (&[FIRST], Allocate(LONG), true),
    (
        &[FIRST],
        Allocate(LONG.with_flags(AllocFlags::ATOMIC)),
        true,
    ),
    (&[FIRST], AllocateMany(LONG, 9), true),
    (&[FIRST], AllocateMany(SMALL, 3000), true),
    (&[FIRST], Upkeep, false),
    (&[FIRST, AllocateMany(LONG, 6), Free(24, 3)], Trim, false),
    (&[FIRST, AllocateMany(LONG, 6), Free(24, 6)], Trim, false),
    (&[FIRST, AllocateMany(LONG, 6), Free(24, 6)], Upkeep, false),
    (&[FIRST, AllocateMany(LONG, 6)], Free(0, 30), false),
    (&[AllocateMany(SMALL, 300), Free(0, 299)], Drain, false),
    (&[FIRST, AllocateMany(LONG, 6)], BringUp, false),
];

impl Owner {
    fn seat(&self) -> LockedSeat {
        // SAFETY: all seats of these instances are such.
        unsafe { LockedSeat::new(self.pcpu.units(), CpuId::new(1)) }
    }

    fn take_over(&mut self, areas: &[usize], bytes: usize) {
        let cpus = self.pcpu.units().possible();
        for &address in areas {
            cpus.iter()
                .for_each(|cpu| assert_zero(&self.pcpu, (address, bytes), cpu));
        }
        for &address in areas {
            stamp(&self.pcpu, (address, bytes));
            self.live.push((address, bytes));
        }
    }

    fn run(&mut self, op: Op) -> Result<(), AllocError> {
        match op {
            Allocate(request) => {
                let area = self.pcpu.allocate_at(&self.seat(), &request)?;
                self.take_over(&[area], request.bytes());
            }
            AllocateMany(request, count) => {
                let mut areas = vec![0; count];
                self.pcpu
                    .allocate_many_at(&self.seat(), &request, &mut areas)?;
                self.take_over(&areas, request.bytes());
            }
            Free(first, count) => {
                let areas: Vec<_> = self.live.drain(first..first + count).collect();
                for (area, _) in areas {
                    // SAFETY: the owner's, which looks at it no more.
                    unsafe { self.pcpu.free_at(&self.seat(), area, FreeFlags::empty()) }.unwrap();
                }
            }
            Drain => self.pcpu.drain(&self.seat()),
            Upkeep => drop(self.pcpu.upkeep()),
            Trim => drop(self.pcpu.trim(0)),
            BringUp => {
                let cpu = CpuId::new(CPUS - 1);
                self.pcpu.bring_up(cpu).expect("it takes no call");
                for &area in &self.live {
                    assert_zero(&self.pcpu, area, cpu);
                    stamp(&self.pcpu, area);
                }
            }
        }
        Ok(())
    }

    fn check(&self) {
        assert_eq!(self.pcpu.stats().live, self.live.len() as u64);
        assert_eq!(self.pcpu.check_areas(), 0);
        check_static(&self.pcpu);
        for &area in &self.live {
            for cpu in self.pcpu.units().materialised().iter() {
                assert_stamped(&self.pcpu, area, cpu);
            }
        }
    }

    /// Frees all, gives all back, and takes it anew, zeroed.
    fn end(mut self) {
        self.check();
        self.run(Free(0, self.live.len())).unwrap();
        self.run(Drain).unwrap();
        self.run(Trim).unwrap();
        assert_eq!((self.pcpu.stats().live, self.pcpu.stats().chunks), (0, 1));
        self.run(AllocateMany(LONG, 8)).unwrap();
        self.run(AllocateMany(SMALL, 100)).unwrap();
        self.check();
    }
}

/// Runs an operation with calls failing; how many calls it made, how many failed, and why it was refused.
fn run_failing(
    (shape, front): (Shape, Front),
    (before, op, _): &(&[Op], Op, bool),
    (first, count): (u64, u64),
) -> (u64, u64, Option<AllocError>) {
    let mut pcpu = shape.build().unwrap();
    match front {
        Front::Nothing => {}
        Front::Caches => pcpu.enable_caches().unwrap(),
        Front::Hardened => pcpu.harden(Hardening::new(&Deaf)).unwrap(),
    }
    let mut owner = Owner {
        pcpu,
        live: Vec::new(),
    };
    for &op in *before {
        owner.run(op).unwrap();
    }
    let range = range(&owner.pcpu);
    let stats = owner.pcpu.stats();
    let writable = writable_bytes(&range);
    syscalls::set_faults(range.clone(), first, count);
    let result = owner.run(*op);
    let (calls, failed) = syscalls::end_faults();
    owner.check();
    if let Err(error) = result {
        let out = AllocError::Backing(BackingError::OutOfAddressSpace);
        assert_eq!(error, out, "{op:?}");
        let after = owner.pcpu.stats();
        assert_eq!((after.allocs, after.frees), (stats.allocs, stats.frees));
        assert_eq!(after.failures, stats.failures + 1);
        // No chunk, no access to one; chunks that a batch got before may stay.
        let more = after.chunks - stats.chunks;
        let chunks_bytes = more as usize * pages_of_chunk(&owner.pcpu);
        // The page that a chunk shares with the tail of the first one stays, for that one is always there.
        let expected = writable + chunks_bytes + CPUS as usize * 4096;
        // Access cannot be taken away where all calls fail: what is left reads zero.
        let left = writable_bytes(&range);
        assert!(
            left <= expected || count > 1,
            "{op:?}, call {first}: {left} bytes"
        );
        owner.run(*op).unwrap();
    }
    owner.end();
    (calls, failed, result.err())
}

/// What a chunk can be written to on all CPUs, with the pages that it shares, in bytes.
fn pages_of_chunk(pcpu: &Pcpu) -> usize {
    CPUS as usize * (pcpu.sizes().unit_bytes() + 2 * 4096)
}

#[test]
fn each_call_fails_alone_and_with_all_behind_it() {
    watched(operate_failing);
}

fn operate_failing() {
    let (mut refused, mut runs) = (0, 0);
    for shape in SHAPES {
        for front in [Front::Nothing, Front::Caches, Front::Hardened] {
            for row in ROWS {
                let mut was_refused = false;
                for nth in 0.. {
                    let (calls, _, alone) = run_failing((shape, front), row, (nth, 1));
                    let (_, failed, behind) = run_failing((shape, front), row, (nth, u64::MAX));
                    refused += u32::from(alone.is_some()) + u32::from(behind.is_some());
                    was_refused |= behind.is_some();
                    runs += 2;
                    if nth >= calls {
                        assert_eq!(failed, 0);
                        break;
                    }
                }
                assert_eq!(was_refused, row.2, "{:?}, {front:?}, {shape:?}", row.1);
            }
        }
    }
    println!("{runs} runs, {refused} refused");
    assert!(refused > 100, "{refused} of {runs}");
}

type Counter = PerCpu<CpuCell<u64>>;

fn counters() -> Vec<Counter> {
    (0..500).map(|_| PerCpu::new().unwrap()).collect()
}

fn stay_on(cpu: CpuId) {
    // SAFETY: a structure of integers, of which the calls change and read so much.
    unsafe {
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu.index(), &mut cpus);
        assert_eq!(libc::sched_setaffinity(0, size_of_val(&cpus), &cpus), 0);
    }
}

/// A fence that the system refuses, once or always: what idles in another CPU's cache stays there, and nothing is lost.
#[test]
fn a_fence_that_is_refused() {
    let [here, there, ..] = pcpu::global::allowed_cpus()[..] else {
        eprintln!("nothing is tried: it takes two CPUs");
        return;
    };
    // A thread on another CPU, which puts areas into that one's cache when it is asked to.
    let (ask, asked) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        stay_on(there);
        for () in asked {
            drop(counters());
            tell.send(()).unwrap();
        }
    });
    let fill_the_other = move || {
        ask.send(()).unwrap();
        told.recv().unwrap();
    };
    watched(move || {
        stay_on(here);
        refuse_fences(&fill_the_other);
    });
}

fn refuse_fences(fill_the_other: &dyn Fn()) {
    let kept = counters();
    kept.iter().for_each(|counter| counter.add(7));
    let before = pcpu::global().stats();
    let (mut all_failed, mut fences) = (0, 0);
    for count in [0, 1, 2, u64::MAX] {
        fill_the_other();
        syscalls::set_faults(0..0, 0, count);
        drain_caches::<pcpu::Global>();
        pcpu::global().trim(0);
        let (calls, failed) = syscalls::end_faults();
        all_failed += failed;
        fences = fences.max(calls);
        let after = pcpu::global().stats();
        assert_eq!(after.live, before.live);
        assert!(kept.iter().all(|counter| counter.sum() == 7));
        let again = counters();
        assert!(again.iter().all(|counter| counter.sum() == 0));
        again.iter().for_each(|counter| counter.add(1));
    }
    // Without restartable sequences there is no fence.
    assert!(fences == 0 || all_failed >= 4, "{all_failed}");
    fill_the_other();
    drain_caches::<pcpu::Global>();
    pcpu::global().trim(0);
    assert!(kept.iter().all(|counter| counter.sum() == 7));
    assert_eq!(pcpu::global().stats().late_errors, 0);
}

/// Programs that may have little address space: they work, or are told why not in one line.
#[test]
fn little_address_space() {
    let test = "little_address_space";
    if std::env::var_os(IS_CHILD).is_none() {
        let mut worked = 0;
        for mib in [1 << 20, 64 << 10, 8 << 10, 2 << 10, 512, 128, 32] {
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            command
                .args([test, "--exact", "--nocapture"])
                .env(IS_CHILD, "1")
                // A trace takes memory, too, and hangs where there is none.
                .env("RUST_BACKTRACE", "0");
            let limit = libc::rlimit {
                rlim_cur: mib << 20,
                rlim_max: mib << 20,
            };
            // SAFETY: one call that signal handlers may make, too.
            unsafe {
                command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_AS, &limit) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                });
            }
            let output = command.output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            if output.status.success() {
                worked += 1;
                continue;
            }
            println!("{mib} MiB: {told}");
            assert!(told.contains("per-CPU"), "{mib} MiB: {told}");
        }
        println!("{worked} worked");
        assert!(worked >= 4, "{worked}");
        return;
    }
    let counters: Vec<PerCpu<CpuCell<u64>>> = (0..100).map(|_| PerCpu::new().unwrap()).collect();
    counters.iter().for_each(|counter| counter.add(3));
    assert!(counters.iter().all(|counter| counter.sum() == 3));
}
