//! A lock on every CPU of a process, for what takes more than one operation.
//!
//! # Why a thread of a process can't stay on its CPU
//!
//! A kernel keeps a thread where it is by not scheduling: it disables preemption, works on its CPU's copy, and enables it
//! again. A process has no such switch. `sched_setaffinity` keeps a thread on a CPU, but not other threads away from it, at
//! the price of two system calls; and a restartable sequence may not call, loop without bound, or store twice where
//! others look, for the system may begin it anew at any instruction. So a process has
//! - the operations of one step ([`LocalCell`](crate::LocalCell), [`LocalPair`](crate::LocalPair),
//!   [`LocalStack`](crate::LocalStack), [`LocalBuffer`](crate::LocalBuffer));
//! - closures that compute the next value and are called again if the CPU's copy is another by then: they end with
//!   one store ([`LocalCell::update`](crate::LocalCell::update), [`LocalPair::update`](crate::LocalPair::update));
//! - for all else, this lock: taken by one operation on the copy of the CPU that the thread is on. The thread may leave
//!   that CPU and keeps the copy; others that run there meanwhile wait. As long as closures are short hardly anybody ever
//!   waits, and no two CPUs want one cache line.
//!
//! # How it works
//!
//! A copy has an owner, 0 or a number of the thread. It is taken by a local operation that replaces 0, and given back by a
//! plain store of 0: nobody else writes to an owner other than 0, so the store may come from any CPU.
//!
//! A thread elsewhere that wants the copy ([`LocalLock::with_on`]) can't use that operation. It raises the copy's *gate*
//! first, which the operation tests, and has all operations in progress begin anew ([`LocalOps::wait_for_gated`]). From then
//! on only LOCKed steps change the owner. A thread of the CPU itself that has waited for long goes the same way, so that
//! threads elsewhere can't keep it out.

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use zerocopy::FromZeros;

use crate::alloc_api::{Domain, Global, per_cpu_ptr};
use crate::global::{method, stray_unit};
use crate::request::CpuError;
use crate::this_cpu::process::{Method, ProcessOps};
use crate::this_cpu::{FenceError, Live, LocalOps};
use crate::unit::CpuId;

/// A value on every CPU with a lock of its own.
///
/// ```
/// use pcpu::{CpuLock, LocalLock, PerCpu, global};
/// use std::collections::HashMap;
///
/// /// How often each path was asked for, counted by CPU.
/// let paths = PerCpu::<CpuLock<HashMap<String, u64>>>::new_with(|_| CpuLock::default())?;
///
/// paths.with(|counts| *counts.entry("/index".to_owned()).or_default() += 1);
///
/// let mut total = 0;
/// for cpu in global().units().materialised().iter() {
///     total += paths.with_on(cpu, |counts| counts.values().sum::<u64>())?;
/// }
/// assert_eq!(total, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Default, FromZeros)]
#[repr(C)]
pub struct CpuLock<T> {
    /// The thread that has the value, or 0.
    owner: AtomicU64,
    /// How many threads of other CPUs want the value or have it.
    gate: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is used by one thread at a time.
unsafe impl<T: Send> Sync for CpuLock<T> {}

impl<T> CpuLock<T> {
    /// A value that nobody has locked.
    pub const fn new(value: T) -> Self {
        Self {
            owner: AtomicU64::new(0),
            gate: AtomicU32::new(0),
            value: UnsafeCell::new(value),
        }
    }

    /// The value, for its only user.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

impl<T> fmt::Debug for CpuLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_locked = self.owner.load(Ordering::Relaxed) != 0;
        f.debug_struct("CpuLock")
            .field("is_locked", &is_locked)
            .finish_non_exhaustive()
    }
}

/// Why a CPU's value could not be locked from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LockError {
    /// There is no such CPU, or no memory for its copy.
    Cpu(CpuError),
    /// The system has no fence against restartable sequences, so that nobody can tell when the CPU's own operations are
    /// through (Linux before 5.10, or a filter of system calls).
    Fence(FenceError),
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(error) => error.fmt(f),
            Self::Fence(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for LockError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Cpu(error) => Some(error),
            Self::Fence(error) => Some(error),
        }
    }
}

/// The lock of the current CPU's copy of a [`CpuLock`], and that of any other, for static variables and owners.
///
/// A closure must not lock the same variable again: on the same CPU that panics, and on two CPUs two threads could wait
/// for each other. If a closure panics the lock is given back, and the value stays as the closure left it. Nothing of
/// this is for signal handlers. A lock that another thread holds when the process forks stays held in the child.
pub trait LocalLock<T: Send>: Live<Target = CpuLock<T>, Domain = Global> + Sized {
    /// Waits for the current CPU's value, and works on it. The thread may be on another CPU before `work` ends; the
    /// value stays that of the first.
    ///
    /// # Panics
    /// If the thread has the value already.
    fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let mut patience = Patience::default();
        loop {
            match acquire(self) {
                Ok(mut held) => return work(held.value()),
                Err(Busy::Caller) => panic!("a thread locks the value of a CPU that it has locked"),
                Err(Busy::Others) if !patience.is_over() => patience.wait(),
                // Threads elsewhere may keep the gate up for ever, one after the other: this one becomes one of them.
                Err(Busy::Others) => match hold_on(self, Global::current_cpu()) {
                    Ok((_closed, mut held)) => return work(held.value()),
                    Err(_) => patience.wait(),
                },
            }
        }
    }

    /// Works on the current CPU's value if nobody has it. `None`: somebody has.
    fn try_with<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        Some(work(acquire(self).ok()?.value()))
    }

    /// Waits for `cpu`'s value, and works on it, wherever the caller is. It takes some microseconds: all CPUs that run
    /// the process are interrupted.
    ///
    /// # Errors
    /// [`LockError`].
    ///
    /// # Panics
    /// If the thread has the value already.
    fn with_on<R>(&self, cpu: CpuId, work: impl FnOnce(&mut T) -> R) -> Result<R, LockError> {
        let (_closed, mut held) = hold_on(self, cpu)?;
        Ok(work(held.value()))
    }
}

impl<T: Send, H: Live<Target = CpuLock<T>, Domain = Global>> LocalLock<T> for H {}

/// A number of the calling thread, other than 0 and than that of any thread that lives; the same in shared libraries.
///
/// It is where the thread's control block lies. A thread of a forked child may lie where one of its parent did that held
/// a value: the number of forks is in it.
fn caller() -> u64 {
    #[cfg(target_arch = "x86_64")]
    let place = {
        let place: u64;
        // SAFETY: the first word of a thread's control block points to itself.
        unsafe {
            core::arch::asm!("mov {place}, qword ptr fs:[0]", place = out(reg) place,
                options(nostack, readonly, preserves_flags));
        }
        place
    };
    #[cfg(not(target_arch = "x86_64"))]
    let place = {
        std::thread_local! {
            static PLACE: u64 = const { 0 };
        }
        PLACE.with(|place| (&raw const *place).addr() as u64)
    };
    // Addresses of a process have 47 bits.
    place ^ (crate::global::forks() << 48)
}

/// Who has a value that can't be had.
enum Busy {
    Others,
    Caller,
}

/// Takes the current CPU's value, if nobody has it.
fn acquire<T, V: Live<Target = CpuLock<T>, Domain = Global>>(
    variable: &V,
) -> Result<Held<'_, T>, Busy> {
    let me = caller();
    // SAFETY: the variable is live, and begins with its owner and its gate.
    let (copy, owner) = unsafe { ProcessOps::acquire(variable.handle().neutral(), me) };
    match owner {
        // SAFETY: the copy of a live variable; a `CpuLock` is shared by its locks.
        0 => Ok(unsafe {
            Held {
                lock: &*copy.cast(),
            }
        }),
        owner if owner == me => Err(Busy::Caller),
        _ => Err(Busy::Others),
    }
}

/// Waits for `cpu`'s value, from wherever the caller is. The value is given back before the gate comes down.
///
/// # Panics
/// If the thread has the value already.
fn hold_on<T, V: Live<Target = CpuLock<T>, Domain = Global>>(
    variable: &V,
    cpu: CpuId,
) -> Result<(Closed<'_>, Held<'_, T>), LockError> {
    if !Global::units().materialised().contains(cpu) {
        Global::bring_up(cpu).map_err(LockError::Cpu)?;
    }
    let copy = per_cpu_ptr(variable, cpu).map_err(LockError::Cpu)?;
    // SAFETY: the variable is live; a `CpuLock` is shared by its locks.
    let lock = unsafe { copy.as_ref() };
    let closed = Closed::new(lock);
    if method() == Method::RestartableSequences && cpu != stray_unit() {
        ProcessOps::wait_for_gated().map_err(LockError::Fence)?;
    }
    let me = caller();
    let mut patience = Patience::default();
    loop {
        match lock
            .owner
            .compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed)
        {
            Ok(_) => return Ok((closed, Held { lock })),
            Err(owner) if owner == me => {
                panic!("a thread locks the value of a CPU that it has locked")
            }
            Err(_) => patience.wait(),
        }
    }
}

/// A value that the calling thread has locked.
struct Held<'a, T> {
    lock: &'a CpuLock<T>,
}

impl<T> Held<'_, T> {
    fn value(&mut self) -> &mut T {
        // SAFETY: the thread has the lock.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.lock.owner.store(0, Ordering::Release);
    }
}

/// A copy that its CPU's operations leave alone.
struct Closed<'a> {
    gate: &'a AtomicU32,
}

impl<'a> Closed<'a> {
    fn new<T>(lock: &'a CpuLock<T>) -> Self {
        lock.gate.fetch_add(1, Ordering::SeqCst);
        Self { gate: &lock.gate }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.fetch_sub(1, Ordering::Release);
    }
}

/// How a thread waits for another that may be waiting for its CPU: it lets others run, and sleeps after a while.
#[derive(Default)]
struct Patience {
    rounds: u32,
}

impl Patience {
    /// How often others are let run before it is over.
    const ROUNDS: u32 = 32;

    fn is_over(&self) -> bool {
        self.rounds >= Self::ROUNDS
    }

    fn wait(&mut self) {
        const NAP: Duration = Duration::from_micros(50);
        if self.is_over() {
            std::thread::sleep(NAP);
        } else {
            self.rounds += 1;
            std::thread::yield_now();
        }
    }
}
