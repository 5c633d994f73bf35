//! System calls of this thread that fail for real: a filter has the kernel raise SIGSYS for some of them, and the handler makes the
//! call, or answers that it failed. The calls of memory that is not the test's go through, for the process needs that.
//!
//! The handler makes calls by an instruction of its own, which the filter knows by its address.

use std::cell::Cell;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc;
use std::thread;

/// `SYS_SECCOMP`'s filters, as `linux/seccomp.h` and `linux/audit.h` number them.
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_TRAP: u32 = 0x0003_0000;
const ARCH_X86_64: u32 = 0xc000_003e;

/// The calls that a filter is put on: those by which memory comes and goes, and the fence.
const WATCHED: [i64; 7] = [
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_pwrite64,
    libc::SYS_membarrier,
];

/// A mapping from this length on is not the system allocator's.
const LARGE_BYTES: usize = 64 << 20;

thread_local! {
    /// Calls of the test's own since faults were set.
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static FAILED: Cell<u64> = const { Cell::new(0) };
    /// The calls that fail: from one on, so many. None while there are no faults.
    static FAULTS: Cell<Option<(u64, u64)>> = const { Cell::new(None) };
    /// Addresses of the test's own memory.
    static OWN: Cell<(usize, usize)> = const { Cell::new((0, usize::MAX)) };
}

std::arch::global_asm!(
    ".globl pcpu_test_make_call",
    "pcpu_test_make_call:",
    "mov rax, [rdi]",
    "mov rsi, [rdi + 16]",
    "mov rdx, [rdi + 24]",
    "mov r10, [rdi + 32]",
    "mov r8, [rdi + 40]",
    "mov r9, [rdi + 48]",
    "mov rdi, [rdi + 8]",
    "syscall",
    ".globl pcpu_test_call_made",
    "pcpu_test_call_made:",
    "ret",
);

unsafe extern "C" {
    /// Makes the system call of this number with these six arguments.
    fn pcpu_test_make_call(call: *const [i64; 7]) -> i64;
    static pcpu_test_call_made: u8;
}

fn is_own(call: &[i64; 7]) -> bool {
    let [number, address, second, _, flags, ..] = *call;
    let (start, end) = OWN.get();
    let is_inside = (start..end).contains(&(address as usize));
    match number {
        libc::SYS_mmap if flags as i32 & libc::MAP_FIXED != 0 => is_inside,
        libc::SYS_mmap => second as usize >= LARGE_BYTES,
        libc::SYS_mprotect | libc::SYS_madvise => is_inside,
        _ => true,
    }
}

/// What the system says of a call that fails, as far as it can tell.
fn errno_of(number: i64) -> i32 {
    match number {
        libc::SYS_madvise => libc::EINVAL,
        libc::SYS_membarrier => libc::EPERM,
        libc::SYS_memfd_create => libc::EMFILE,
        libc::SYS_ftruncate | libc::SYS_pwrite64 => libc::ENOSPC,
        _ => libc::ENOMEM,
    }
}

extern "C" fn on_sigsys(_: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands the handler its context.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let call = [
        libc::REG_RAX,
        libc::REG_RDI,
        libc::REG_RSI,
        libc::REG_RDX,
        libc::REG_R10,
        libc::REG_R8,
        libc::REG_R9,
    ]
    .map(|register| registers[register as usize]);
    let mut fails = false;
    if let Some((first, count)) = FAULTS.get()
        && is_own(&call)
    {
        let nth = CALLS.replace(CALLS.get() + 1);
        fails = nth >= first && nth - first < count;
    }
    registers[libc::REG_RAX as usize] = match fails {
        true => {
            FAILED.set(FAILED.get() + 1);
            -i64::from(errno_of(call[0]))
        }
        // SAFETY: it is the call that the thread was about to make.
        false => unsafe { pcpu_test_make_call(&call) },
    };
}

/// Does some work on a thread whose calls go through the handler, from which no thread may be started. If the system lets nobody
/// filter calls nothing is done, and said so.
///
/// The thread does not end before the process: calls of its end are made with all signals blocked.
pub fn on_watched_thread(work: impl FnOnce() + Send + 'static) {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        // A panic goes on in whoever waits.
        let watched = watch().map(|()| panic::catch_unwind(AssertUnwindSafe(work)));
        // Whoever waits is there still.
        let _ = tell.send(watched);
        loop {
            thread::park();
        }
    });
    match told.recv().expect("the thread tells") {
        Ok(Ok(())) => {}
        Ok(Err(panicked)) => panic::resume_unwind(panicked),
        Err(error) => eprintln!("nothing is tried, calls cannot be filtered: {error}"),
    }
}

/// Has the watched calls of this thread go through the handler from now on.
fn watch() -> io::Result<()> {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = |at: u32| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0, 0);
    let equals =
        |k: u32, jt: u8, jf: u8| statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, jt, jf);
    let answer = |k: u32| statement(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    let made = (&raw const pcpu_test_call_made).addr();
    // The offsets are those of `struct seccomp_data`: number, architecture, address of the instruction.
    let mut filter = vec![
        load(4),
        equals(ARCH_X86_64, 1, 0),
        answer(RET_ALLOW),
        load(8),
        equals(made as u32, 0, 3),
        load(12),
        equals((made >> 32) as u32, 0, 1),
        answer(RET_ALLOW),
        load(0),
    ];
    for (nth, number) in WATCHED.iter().enumerate() {
        let to_trap = (WATCHED.len() - nth) as u8;
        filter.push(equals(*number as u32, to_trap, 0));
    }
    filter.extend([answer(RET_ALLOW), answer(RET_TRAP)]);
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: a structure of integers.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    action.sa_sigaction = on_sigsys as *const () as usize;
    // SAFETY: the handler touches this thread's cells only; the filter is a whole program, of which each jump ends inside.
    let is_done = unsafe {
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) == 0
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    };
    match is_done {
        true => Ok(()),
        false => Err(io::Error::last_os_error()),
    }
}

/// From now on calls of this thread about memory within `own` fail: `count` of them, from the `first` on, counted from 0.
pub fn set_faults(own: Range<usize>, first: u64, count: u64) {
    OWN.set((own.start, own.end));
    CALLS.set(0);
    FAILED.set(0);
    FAULTS.set(Some((first, count)));
}

/// Ends that; how many calls there were, and how many of them failed.
pub fn end_faults() -> (u64, u64) {
    FAULTS.set(None);
    (CALLS.get(), FAILED.get())
}
