//! Disturbs threads: signals and changes of their affinity, so that restartable sequences are interrupted and migrate.

use std::cell::Cell;
use std::mem;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

extern "C" fn ignore(_signal: libc::c_int) {}

/// Runs `work` on `threads` threads, with their number, and disturbs them until they are done.
pub fn run(threads: u64, work: impl Fn(u64) + Sync) {
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(libc::SIGUSR1, ignore as extern "C" fn(libc::c_int) as usize) };
    let cpus = allowed_cpus();
    let tids = Mutex::new(Vec::new());
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|number| {
                let (work, tids) = (&work, &tids);
                scope.spawn(move || {
                    // SAFETY: asks for a number.
                    tids.lock().unwrap().push(unsafe { libc::gettid() });
                    work(number);
                })
            })
            .collect();
        scope.spawn(|| {
            let random = Random::new(threads);
            while !is_done.load(Relaxed) {
                for &tid in tids.lock().unwrap().iter() {
                    disturb(tid, &cpus, &random);
                }
                thread::sleep(Duration::from_micros(50));
            }
        });
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        is_done.store(true, Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
}

/// The thread may have ended; then this does nothing.
fn disturb(tid: libc::pid_t, cpus: &[usize], random: &Random) {
    // SAFETY: the set is plain data of the size that is told; the signal has a handler.
    unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(cpus[random.below(cpus.len() as u64) as usize], &mut set);
        libc::sched_setaffinity(tid, mem::size_of_val(&set), &set);
        libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1);
    }
}

fn allowed_cpus() -> Vec<usize> {
    // SAFETY: the set is plain data of the size that is told.
    let set = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        assert_eq!(
            libc::sched_getaffinity(0, mem::size_of_val(&set), &mut set),
            0
        );
        set
    };
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the number is less than the set has bits.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

/// Makes the calling thread one that the kernel does not know by its rseq area. False if the system refuses.
#[cfg(target_arch = "x86_64")]
pub fn become_stray() -> bool {
    const UNREGISTER: libc::c_int = 1;
    const SIGNATURE: u32 = 0x5305_3053;
    // SAFETY: looks a name up.
    let symbol = unsafe { libc::dlsym(ptr::null_mut(), c"__rseq_offset".as_ptr()) };
    if symbol.is_null() {
        return false;
    }
    let thread_pointer: usize;
    // SAFETY: glibc defines the offset as this type; the thread pointer's first word is its own address; the area is that
    // of this thread, which announces no section outside the crate's operations.
    unsafe {
        let offset = *symbol.cast::<isize>();
        std::arch::asm!("mov {}, fs:[0]", out(reg) thread_pointer);
        let area = thread_pointer.wrapping_add_signed(offset);
        // The size is the one it was registered with, which depends on the version of glibc.
        [32_u32, 40, 64, 28]
            .into_iter()
            .any(|bytes| libc::syscall(libc::SYS_rseq, area, bytes, UNREGISTER, SIGNATURE) == 0)
    }
}

/// As above.
#[cfg(not(target_arch = "x86_64"))]
pub fn become_stray() -> bool {
    false
}

/// Xorshift.
pub struct Random(Cell<u64>);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(Cell::new(
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1,
        ))
    }

    pub fn below(&self, limit: u64) -> u64 {
        let mut state = self.0.get();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.0.set(state);
        state % limit
    }
}
