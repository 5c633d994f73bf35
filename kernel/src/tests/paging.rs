//! The memory of the units, by page tables: chunks that come and go, frames from the right node, what is gone from every
//! CPU's sight, and CPUs that never came.

use core::sync::atomic::{AtomicU64, Ordering};

use pcpu::unit::{CpuId, NodeId};
use pcpu::{
    AllocError, CpuCell, Domain, LocalCell, PerCpu, PerCpuPtr, RemoteCell, alloc_percpu_in,
    define_per_cpu_in, free_percpu, per_cpu_ptr,
};
use x86_64::instructions::interrupts;
use x86_64::registers::control::Cr3;
use x86_64::structures::paging::PhysFrame;

use super::{Test, Why, copy_of};
use crate::cpus::work::{on_all_cpus, online};
use crate::machine::machine;
use crate::memory::{PAGE_BYTES, PHYSICAL_MAP, frames, paging};
use crate::percpu::{BOOT_CPU, Kernel, copy, frames_held};
use crate::{ensure, println, probe};

pub const TESTS: &[Test] = &[
    Test::new("every unit is on its CPU's node", units_are_near),
    Test::new("chunks come and go, and their frames", chunks_come_and_go),
    Test::new(
        "without frames there is an error, and nothing is lost",
        out_of_frames,
    ),
    Test::new(
        "what a chunk had is out of every CPU's reach",
        memory_is_gone,
    ),
    Test::new("all CPUs make chunks and drop them at once", churn),
    Test::new(
        "an address space sees chunks that came after it, and allocates",
        other_address_space,
    ),
    Test::new(
        "CPUs that never came show initial values, read only",
        never_came,
    ),
];

/// A large area, of several pages: its first word leads to the one before.
pub type Area = [u64; AREA_BYTES / 8];

const AREA_BYTES: usize = 16 << 10;

const INITIAL: u64 = 0xfedc_ba98_7654_3210;

define_per_cpu_in! {
    in Kernel;

    static VALUE: CpuCell<u64> = CpuCell::new(INITIAL);
}

/// Areas in the order of their making, the last first.
pub struct Areas(Option<PerCpuPtr<Area, Kernel>>);

impl Areas {
    /// None so far.
    pub const NONE: Self = Self(None);

    /// As many as make so many chunks more.
    ///
    /// # Errors
    /// As [`add`](Self::add); some have been made then.
    pub fn fill_chunks(&mut self, chunks: u32) -> Result<(), AllocError> {
        let before = Kernel::allocator().stats().chunks;
        while Kernel::allocator().stats().chunks < before + chunks {
            self.add()?;
        }
        Ok(())
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = PerCpuPtr<Area, Kernel>> {
        core::iter::successors(self.0, |&area| {
            // SAFETY: the area is live; `add` wrote to its first word.
            let before = unsafe { (*area_of(area, BOOT_CPU))[0] };
            PerCpuPtr::from_neutral(before as usize)
        })
    }

    /// Makes another one, which must be zero on every CPU, and is filled there.
    ///
    /// # Errors
    /// [`AllocError`]: no memory.
    pub fn add(&mut self) -> Result<(), AllocError> {
        let area = alloc_percpu_in::<Area, Kernel>()?;
        for cpu in online() {
            // SAFETY: a live copy of a CPU that is up, of an area that nobody else knows of.
            let words = unsafe { &mut *area_of(area, cpu) };
            assert!(words.iter().all(|&word| word == 0), "not zero: CPU {cpu}");
            words.fill(u64::MAX);
            words[0] = self.0.map_or(0, |last| last.neutral() as u64);
        }
        self.0 = Some(area);
        Ok(())
    }
}

impl Drop for Areas {
    fn drop(&mut self) {
        while let Some(area) = self.0 {
            // SAFETY: the area is live; `add` wrote to its first word.
            let before = unsafe { (*area_of(area, BOOT_CPU))[0] };
            // SAFETY: nobody else knows of it.
            let freed = unsafe { free_percpu(area) };
            assert_eq!(freed, Ok(()), "a live area");
            self.0 = PerCpuPtr::from_neutral(before as usize);
        }
        Kernel::allocator().upkeep();
    }
}

/// A CPU's copy of an area.
pub fn area_of(area: PerCpuPtr<Area, Kernel>, cpu: CpuId) -> *mut Area {
    let copy = per_cpu_ptr(area, cpu);
    copy.unwrap_or_else(|error| panic!("{error}")).as_ptr()
}

fn units_are_near() -> Result<(), Why> {
    let allocator = Kernel::allocator();
    // The first chunk, and one more.
    let far = alloc_percpu_in::<Area, Kernel>()?;
    let regions = [
        (allocator.neutral_base(), allocator.sizes().sum_bytes()),
        (far.neutral(), AREA_BYTES),
    ];
    for (start, bytes) in regions {
        for cpu in allocator.units().materialised().iter() {
            let wanted = machine().node_of_cpu(cpu);
            for offset in (0..bytes).step_by(PAGE_BYTES) {
                let address = allocator.per_cpu_address(start + offset, cpu)?;
                let node = paging::physical_address(address).and_then(frames::node_of);
                ensure!(
                    node == Some(wanted),
                    "CPU {cpu}, {address:#x}: node {node:?}, not {wanted}"
                );
            }
        }
    }
    let from_afar = allocator.backing().stats().frames_from_afar;
    let others = frames::fall_backs();
    ensure!(
        from_afar == 0 && others == 0,
        "{from_afar} and {others} frames from another node"
    );
    // SAFETY: only the addresses were used.
    unsafe { free_percpu(far)? };
    Ok(())
}

fn chunks_come_and_go() -> Result<(), Why> {
    const CHUNKS: u32 = 3;
    let allocator = Kernel::allocator();
    // What is kept for the next time is there from the second round on.
    let mut left = [(0, 0); 3];
    for left in &mut left {
        let before = (allocator.stats().chunks, frames_held());
        let mut areas = Areas::NONE;
        areas.fill_chunks(CHUNKS)?;
        ensure!(
            frames_held() > before.1 + 4 * u64::from(CHUNKS),
            "no frames"
        );
        drop(areas);
        *left = (allocator.stats().chunks, frames_held());
    }
    ensure!(left[1] == left[2], "{left:?} chunks and frames left");
    Ok(())
}

/// Takes frames away until the allocator has none for an area.
fn out_of_frames() -> Result<(), Why> {
    const LEFT: usize = 64;
    drop_areas_of_one()?;
    let (free, held) = (frames::free_count(), frames_held());
    let mut hoard = Hoard(None);
    let mut wanted = free.saturating_sub(LEFT);
    for node in (0..machine().nr_nodes() as u32).map(NodeId::new) {
        while wanted > 0 && hoard.take_from(node) {
            wanted -= 1;
        }
    }
    let mut areas = Areas::NONE;
    let mut served = 0;
    let error = loop {
        match areas.add() {
            Ok(()) => served += 1,
            Err(error) => break error,
        }
    };
    let live = Kernel::allocator().stats().live;
    let again = alloc_percpu_in::<Area, Kernel>().map(|_| ());
    drop(areas);
    drop(hoard);
    ensure!(matches!(error, AllocError::Backing(_)), "{error}");
    ensure!(again == Err(error), "{again:?} after {error}");
    ensure!(served < LEFT, "{served} areas of {LEFT} frames");
    let freed = live - Kernel::allocator().stats().live;
    ensure!(freed == served as u64, "{freed} freed of {served}");
    drop_areas_of_one()?;
    let (free_now, held_now) = (frames::free_count(), frames_held());
    ensure!(
        free_now + held_now as usize == free + held as usize,
        "{free} free and {held} held before, {free_now} and {held_now} after"
    );
    Ok(())
}

/// An area comes and goes, and with it whatever is kept for the next one.
fn drop_areas_of_one() -> Result<(), Why> {
    let mut areas = Areas::NONE;
    areas.add()?;
    Ok(())
}

/// Frames that nobody else is to have for a while: each has the address of the next in its first word.
struct Hoard(Option<PhysFrame>);

impl Hoard {
    fn take_from(&mut self, node: NodeId) -> bool {
        let Some(frame) = frames::allocate_on(node) else {
            return false;
        };
        let next = self.0.map_or(0, |next| next.start_address().as_u64());
        // SAFETY: a fresh frame.
        unsafe { Self::link(frame).write(next) };
        self.0 = Some(frame);
        true
    }

    fn link(frame: PhysFrame) -> *mut u64 {
        let address = PHYSICAL_MAP + frame.start_address().as_u64() as usize;
        core::ptr::with_exposed_provenance_mut(address)
    }
}

impl Drop for Hoard {
    fn drop(&mut self) {
        while let Some(frame) = self.0 {
            // SAFETY: `take_from` wrote the link.
            let next = unsafe { Self::link(frame).read() };
            let next = (next != 0).then(|| x86_64::PhysAddr::new(next));
            self.0 = next.map(PhysFrame::containing_address);
            // SAFETY: allocated above, and used for the link only.
            unsafe { frames::free(frame) };
        }
    }
}

/// All CPUs look at all copies of an area in a chunk of its own; then it goes, and no CPU finds them any more.
fn memory_is_gone() -> Result<(), Why> {
    let allocator = Kernel::allocator();
    let mut areas = Areas::NONE;
    areas.fill_chunks(3)?;
    let last = areas
        .iter()
        .next()
        .ok_or(Why::new(format_args!("no area")))?;
    // How many copies the CPUs can read.
    let readable = || {
        let readable = AtomicU64::new(0);
        on_all_cpus(&|_| {
            for cpu in allocator.units().materialised().iter() {
                let is_there = probe::read(area_of(last, cpu).addr()).is_ok();
                readable.fetch_add(u64::from(is_there), Ordering::Relaxed);
            }
        });
        readable.into_inner()
    };
    let nr_online = online().count() as u64;
    let before = readable();
    ensure!(before == nr_online * nr_online, "{before} readable before");
    let flushes = allocator.backing().stats().flushes;
    drop(areas);
    let after = readable();
    ensure!(after == 0, "{after} of {before} readable after");
    let flushes = allocator.backing().stats().flushes - flushes;
    ensure!(flushes > 0 && flushes < 32, "{flushes} flushes");
    Ok(())
}

/// A user's address space begins with a copy of the level-4 table: the entries of all windows must be there by then. What comes and
/// goes later does so below them.
fn other_address_space() -> Result<(), Why> {
    let root = frames::allocate(NodeId::new(0)).ok_or(Why::new(format_args!("no frame")))?;
    // SAFETY: a fresh frame; the kernel's own table, in which nothing changes now.
    unsafe { paging::table(root).write((*paging::table(paging::root())).clone()) };
    let mut areas = Areas::NONE;
    areas.fill_chunks(2)?;
    let last = areas.iter().next();
    let last = last.ok_or(Why::new(format_args!("no area")))?;
    let cell = PerCpu::<CpuCell<u64>, Kernel>::new()?;
    let made_there = with_root(root, || {
        let filled = areas.iter().all(|area| {
            // SAFETY: live copies, which nobody writes to now.
            online().all(|cpu| unsafe { (*area_of(area, cpu))[1] == u64::MAX })
        });
        cell.inc();
        filled.then(|| areas.add())
    });
    let (sum, read) = (cell.sum(), probe::read(area_of(last, BOOT_CPU).addr()));
    // What was made there has been written on every CPU, and is here.
    let filled = areas.iter().all(|area| {
        // SAFETY: as above.
        online().all(|cpu| unsafe { (*area_of(area, cpu))[1] == u64::MAX })
    });
    drop(areas);
    let still = with_root(root, || probe::read(area_of(last, BOOT_CPU).addr()));
    // SAFETY: no CPU uses it any more.
    unsafe { frames::free(root) };
    ensure!(
        made_there == Some(Ok(())) && filled,
        "areas are not what they were: {made_there:?}"
    );
    ensure!(sum == 1 && read.is_ok(), "sum {sum}, {read:?}");
    ensure!(still.is_err(), "what has gone is still there");
    Ok(())
}

/// Does something in another address space on this CPU, and nowhere else: no interrupt comes meanwhile.
fn with_root<T>(root: PhysFrame, work: impl FnOnce() -> T) -> T {
    interrupts::without_interrupts(|| {
        let (own, flags) = Cr3::read();
        // SAFETY: it maps what the kernel's own table does.
        unsafe { Cr3::write(root, flags) };
        let result = work();
        // SAFETY: the table that was in use.
        unsafe { Cr3::write(own, flags) };
        result
    })
}

/// Some CPUs at once fill more than a chunk and drop it. They flush at the same time, and so answer each other.
fn churn() -> Result<(), Why> {
    const ROUNDS: u64 = 8;
    const AREAS: usize = 48;
    const CPUS: usize = 8;
    let allocator = Kernel::allocator();
    let areas_per_cpu = AREAS / online().count().min(CPUS);
    let (live, flushes) = (allocator.stats().live, allocator.backing().stats().flushes);
    let (wrong, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    on_all_cpus(&|cpu| {
        if cpu.index() >= CPUS {
            return;
        }
        for round in 1..=ROUNDS {
            let mark = u64::from(cpu.get()) << 32 | round;
            let mut areas = [None; AREAS];
            for area in areas.iter_mut().take(areas_per_cpu) {
                *area = alloc_percpu_in::<Area, Kernel>().ok();
                let Some(area) = *area else {
                    refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                };
                // SAFETY: this CPU's copy of an area that nobody else knows of.
                let words = unsafe { &mut *area_of(area, cpu) };
                let is_zero = words.iter().all(|&word| word == 0);
                words.fill(mark);
                wrong.fetch_add(u64::from(!is_zero), Ordering::Relaxed);
            }
            for area in areas.into_iter().flatten() {
                // SAFETY: as above.
                let words = unsafe { &*area_of(area, cpu) };
                let is_right = words.iter().all(|&word| word == mark);
                // SAFETY: it is not used any more.
                let freed = unsafe { free_percpu(area) };
                wrong.fetch_add(u64::from(!is_right || freed.is_err()), Ordering::Relaxed);
            }
            allocator.upkeep();
        }
    });
    let (wrong, refused) = (wrong.into_inner(), refused.into_inner());
    ensure!(wrong == 0, "{wrong} areas were wrong");
    ensure!(refused == 0, "{refused} areas were refused");
    ensure!(
        allocator.stats().live == live,
        "{} live",
        allocator.stats().live
    );
    let flushes = allocator.backing().stats().flushes - flushes;
    ensure!(flushes > 0, "no memory went back");
    println!("   {flushes} flushes");
    Ok(())
}

fn never_came() -> Result<(), Why> {
    let allocator = Kernel::allocator();
    let units = allocator.units();
    let absent = || {
        let possible = units.possible().iter();
        possible.filter(|&cpu| !units.materialised().contains(cpu))
    };
    let dynamic = PerCpu::<CpuCell<u64>, Kernel>::new()?;
    let (here, mut shared) = (physical(copy(&VALUE, BOOT_CPU)), None);
    for cpu in absent() {
        let value = copy_of(&VALUE, cpu);
        ensure!(value == INITIAL, "CPU {cpu}: {value:#x}");
        // `get` would bring the CPU up.
        let zero = copy_of(&dynamic, cpu);
        ensure!(zero == 0, "CPU {cpu}: a dynamic variable is {zero}");
        let frame = physical(copy(&VALUE, cpu));
        ensure!(
            frame.is_some() && frame != here && shared.is_none_or(|it| it == frame),
            "CPU {cpu}: {frame:?} is not the frame that is shared"
        );
        shared = Some(frame);
        for address in [copy(&VALUE, cpu).addr(), copy(&dynamic, cpu).addr()] {
            // SAFETY: nobody uses copies of a CPU that never came.
            let result = unsafe { probe::rewrite(address) };
            ensure!(result.is_err(), "CPU {cpu}: {address:#x} can be written");
        }
    }
    let there = machine().cpus().iter().filter(|cpu| cpu.enabled).count();
    let expected = machine().cpus().len() - there;
    ensure!(
        absent().count() == expected,
        "{} never came",
        absent().count()
    );
    Ok(())
}

fn physical<T>(copy: *const T) -> Option<x86_64::PhysAddr> {
    paging::physical_address(copy.addr())
}
