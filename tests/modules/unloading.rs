//! Threads and the code that goes away: the kernel looks at the section that a thread announced last when the thread is
//! run again, and ends the process if nothing is there any more.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use pcpu::{CpuCell, LocalCell, RemoteCell, define_per_cpu};

use crate::alone::{Build, alone};
use crate::counting::{INITIAL, counting, function};
use crate::lives::{is_mapped, possible};

define_per_cpu! {
    static OF_THE_HOST: CpuCell<u64> = CpuCell::new(0);
}

const SLEEPERS: usize = 4;

/// Says that it is over, also if the test fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Threads that have used a library sleep while it goes; others work on all the while, for the host and in another
/// library. The library comes and goes several times. Says whether it was ever mapped in between.
fn unload_while_others_sleep(build: Build) -> bool {
    let other = counting(build, 1);
    let is_over = AtomicBool::new(false);
    let mut was_mapped = false;
    thread::scope(|scope| {
        let _ending = Ending(&is_over);
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    OF_THE_HOST.inc();
                    other.add(1);
                }
            });
        }
        for _ in 0..5 {
            was_mapped |= unload_once(build);
        }
    });
    assert_eq!(other.sum(), INITIAL * possible() + OF_THE_HOST.sum());
    was_mapped
}

/// What the threads wait for: how many sleep, and whether the library is gone.
#[derive(Default)]
struct Dormitory {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Dormitory {
    fn state(&self) -> MutexGuard<'_, (usize, bool)> {
        self.state.lock().expect("nobody panics")
    }

    fn wait_until(&self, is_so: impl Fn(&(usize, bool)) -> bool) {
        let mut state = self.state();
        while !is_so(&state) {
            state = self.changed.wait(state).expect("nobody panics");
        }
    }
}

fn unload_once(build: Build) -> bool {
    let library = counting(build, 0);
    // SAFETY: that is what the library defines; nobody calls it when the library is gone.
    let add: extern "C" fn(u64) = unsafe { function(&library.0, c"add") };
    assert_eq!(u64::from(library.fresh_cpus()), possible());
    let dormitory = Dormitory::default();
    let mut was_mapped = false;
    thread::scope(|scope| {
        for _ in 0..SLEEPERS {
            scope.spawn(|| {
                dormitory.state().0 += 1;
                dormitory.changed.notify_all();
                dormitory.wait_until(|state| state.0 >= SLEEPERS);
                // The last that the thread does before it falls asleep.
                add(1);
                dormitory.state().0 += 1;
                dormitory.changed.notify_all();
                dormitory.wait_until(|state| state.1);
            });
        }
        dormitory.wait_until(|state| state.0 == 2 * SLEEPERS);
        // Time for the last of them to fall asleep.
        thread::sleep(Duration::from_millis(20));
        let sum = library.sum();
        drop(library);
        was_mapped = is_mapped("libcounting.so");
        dormitory.state().1 = true;
        dormitory.changed.notify_all();
        assert_eq!(sum, INITIAL * possible() + SLEEPERS as u64);
    });
    was_mapped
}

#[test]
fn an_unloadable_library_goes_while_its_threads_sleep() {
    alone(
        "unloading::an_unloadable_library_goes_while_its_threads_sleep",
        || {
            assert!(
                !unload_while_others_sleep(Build::Unloadable),
                "it was unmapped"
            );
        },
    );
}

/// Built without the feature, it is detached and stays mapped.
#[test]
fn any_other_library_stays_mapped() {
    alone("unloading::any_other_library_stays_mapped", || {
        unload_while_others_sleep(Build::Staying);
        assert!(is_mapped("libcounting.so"));
    });
}

/// The section that the calling thread has announced to the kernel.
#[cfg(target_arch = "x86_64")]
fn announced() -> Option<usize> {
    // SAFETY: looks a name up.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    if offset.is_null()
        || pcpu::global::method() != pcpu::this_cpu::process::Method::RestartableSequences
    {
        return None;
    }
    let section: usize;
    // SAFETY: glibc defines it as a constant of this type, and every thread has the area, as the method says.
    unsafe {
        std::arch::asm!("mov {section}, qword ptr fs:[{offset} + 8]", section = out(reg) section,
            offset = in(reg) *offset.cast::<isize>(), options(nostack, readonly));
    }
    Some(section)
}

/// Whether an address lies in the program itself.
fn is_of_the_host(address: usize) -> bool {
    let program = std::env::current_exe().expect("there is one");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("there is one");
    maps.lines().any(|line| {
        let (range, _) = line.split_once(' ').expect("a range");
        let (start, end) = range.split_once('-').expect("two ends");
        let address_of = |text| usize::from_str_radix(text, 16).expect("an address");
        line.ends_with(program.to_str().expect("a name"))
            && (address_of(start)..address_of(end)).contains(&address)
    })
}

/// No operation of an unloadable library leaves a section announced, whichever way it takes.
#[test]
#[cfg(target_arch = "x86_64")]
fn no_trace_is_left() {
    alone("unloading::no_trace_is_left", || {
        let library = counting(Build::Unloadable, 0);
        let staying = counting(Build::Staying, 1);
        let mut kinds = 0;
        // The first round finds CPUs without memory.
        for _ in 0..100 {
            kinds = 0;
            while library.operation(kinds) {
                // Who allocates and frees for the library is the host, which stays.
                let left = announced().unwrap_or(0);
                assert!(left == 0 || is_of_the_host(left), "operation {kinds}");
                kinds += 1;
            }
        }
        assert_eq!(kinds, 37);
        // What is looked at is where a trace would be.
        OF_THE_HOST.inc();
        staying.add(1);
        let is_left = (0..1000).any(|_| {
            staying.add(1);
            announced() != Some(0)
        });
        assert!(is_left || announced().is_none());
    });
}
