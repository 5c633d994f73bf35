//! What the tests ask of Linux: on which CPUs a thread runs, signals to threads, to be without restartable sequences.

use pcpu::unit::CpuId;

/// Names a thread to the system; 0 is the caller.
pub type ThreadId = libc::pid_t;

/// The calling thread.
pub fn thread_id() -> ThreadId {
    // SAFETY: asks for a number.
    unsafe { libc::gettid() }
}

/// The CPUs that the calling thread may run on.
pub fn allowed_cpus() -> Vec<CpuId> {
    // SAFETY: a set of CPUs is an array of integers.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is of the size that is given.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    (0..libc::CPU_SETSIZE as u32)
        // SAFETY: the id is below the size of the set.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu as usize, &set) })
        .map(CpuId::new)
        .collect()
}

/// Lets a thread run on these CPUs only. When it returns the caller itself is on one of them.
pub fn keep_on(thread: ThreadId, cpus: &[CpuId]) {
    let is_kept = try_keep_on(thread, cpus);
    assert!(is_kept, "{}", std::io::Error::last_os_error());
}

/// [`keep_on`], unless none of the CPUs can be had.
pub fn try_keep_on(thread: ThreadId, cpus: &[CpuId]) -> bool {
    // SAFETY: a set of CPUs is an array of integers.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus {
        // SAFETY: the set asserts that the id is below its size.
        unsafe { libc::CPU_SET(cpu.index(), &mut set) };
    }
    // SAFETY: the set is of the size that is given.
    let result = unsafe { libc::sched_setaffinity(thread, size_of_val(&set), &set) };
    result == 0
}

/// Runs `body` on a thread of its own that stays on `cpu`.
pub fn on_cpu<R: Send>(cpu: CpuId, body: impl FnOnce() -> R + Send) -> R {
    let on_it = || {
        keep_on(0, &[cpu]);
        body()
    };
    std::thread::scope(|scope| scope.spawn(on_it).join().expect("the body has passed"))
}

/// Leaves the other threads more time than the calling one takes, so that a single one comes to disturb many like it.
pub fn step_back() {
    const NICENESS: libc::c_int = 5;
    // SAFETY: changes the caller's own priority only. Who stands further back already is refused, and stays there.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
}

/// The signal of the storm.
const SIGNAL: libc::c_int = libc::SIGUSR1;

/// Has `handler` called in threads that [`interrupt`] is called for.
pub fn handle_interrupts(handler: extern "C" fn(libc::c_int)) {
    // SAFETY: an action without handler, flags and mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler takes one integer, as an action without SA_SIGINFO asks for.
    let result = unsafe { libc::sigaction(SIGNAL, &action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Sends a thread of this process the signal of the storm.
pub fn interrupt(thread: ThreadId) {
    // SAFETY: the signal has a handler.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Takes restartable sequences from the calling thread, as if it had been made by a raw `clone`. False if it has none.
#[cfg(target_arch = "x86_64")]
pub fn unregister() -> bool {
    const RSEQ_FLAG_UNREGISTER: libc::c_int = 1;
    const RSEQ_SIG: u32 = 0x5305_3053;
    // SAFETY: looks a name up.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    if offset.is_null() {
        return false;
    }
    let thread_pointer: usize;
    // SAFETY: the first word of a thread's control block points to itself.
    unsafe {
        std::arch::asm!("mov {}, qword ptr fs:[0]", out(reg) thread_pointer, options(nostack, readonly));
    }
    // SAFETY: glibc defines it as a constant of this type.
    let area = thread_pointer.wrapping_add_signed(unsafe { *offset.cast::<isize>() });
    // The size must be the one that glibc registered: 32 bytes at first, more where the kernel has more to tell.
    (32..=256).step_by(4).any(|bytes: u32| {
        // SAFETY: the kernel forgets the area, or refuses; operations of an unregistered thread do without it.
        let result =
            unsafe { libc::syscall(libc::SYS_rseq, area, bytes, RSEQ_FLAG_UNREGISTER, RSEQ_SIG) };
        result == 0
    })
}

/// No other processor has restartable sequences here.
#[cfg(not(target_arch = "x86_64"))]
pub fn unregister() -> bool {
    false
}
