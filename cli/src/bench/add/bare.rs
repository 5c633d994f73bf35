//! The least that a per-CPU addition by a restartable sequence can be: five instructions, written by hand for memory of
//! its own, which neither grows nor is given back.
//!
//! ```text
//! 2: lea   t, [descriptor]
//!    mov   fs:[rseq + rseq_cs], t        announces the section
//! 3: mov   t, fs:[rseq + cpu_id]
//!    shl   t, STRIDE_SHIFT
//!    add   [at + t], value               the commit
//! 4:
//! ```
//!
//! Nothing checks the CPU's number: the mapping has room for every number that the kernel may give, and only threads that
//! are registered with it may count.

use std::arch::asm;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use pcpu::global;
use pcpu::this_cpu::process::Method;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::COUNTERS;
use super::counters::Counters;
use crate::error::CliError;

/// From one CPU's counters to the next one's.
const STRIDE_SHIFT: u32 = 16;

/// Counters in an anonymous mapping.
#[derive(Debug)]
pub struct Bare {
    /// The address of CPU 0's counters; its provenance is exposed.
    base: usize,
    bytes: usize,
    cpus: usize,
    /// Where a thread's rseq area lies, from its thread pointer on.
    rseq: isize,
}

impl Bare {
    /// Counters at 0; `None` if this process has no restartable sequences.
    ///
    /// # Errors
    /// One line, if there is no memory.
    pub fn new() -> Result<Option<Self>, CliError> {
        if global::method() != Method::RestartableSequences {
            return Ok(None);
        }
        // SAFETY: dlsym looks the name up and changes nothing.
        let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
        let Some(offset) = NonNull::new(offset) else {
            return Ok(None);
        };
        let cpus = pcpu::global().units().nr_cpu_ids() as usize;
        let bytes = cpus << STRIDE_SHIFT;
        // SAFETY: a new mapping, at a place of the system's choice.
        let mapped = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        let base = mapped.map_err(|error| CliError::Failed(format!("{bytes} bytes: {error}")))?;
        Ok(Some(Self {
            base: base.expose_provenance(),
            bytes,
            cpus,
            // SAFETY: glibc defines it as a constant integer of this type.
            rseq: unsafe { *offset.cast().as_ptr() },
        }))
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and not used any more.
        let unmapped = unsafe { munmap(ptr::with_exposed_provenance_mut(self.base), self.bytes) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

impl Counters for Bare {
    #[inline(always)]
    fn add(&self, index: usize) {
        let at = self.base + index * size_of::<u64>();
        // SAFETY: `rseq` is where glibc registers the area of each thread that it makes, and no others come here: the CPU's
        // number is below that of the units, and its counters lie in the mapping.
        unsafe {
            asm!(
                ".pushsection pcpu_bench_rseq_cs, \"aw\", @progbits",
                ".balign 32",
                "77:",
                // struct rseq_cs: version, flags, start, length, abort.
                ".long 0, 0",
                ".quad 3f, 4f - 3f, 5f",
                ".popsection",
                "2:",
                "lea {t}, [rip + 77b]",
                "mov qword ptr fs:[{rseq} + 8], {t}",
                "3:",
                "mov {t:e}, dword ptr fs:[{rseq} + 4]",
                "shl {t}, {shift}",
                "add qword ptr [{at} + {t}], {value}",
                "4:",
                ".pushsection pcpu_bench_rseq_abort, \"ax\", @progbits",
                // The signature that glibc registers (RSEQ_SIG), as operand of an instruction that traps.
                ".byte 0x0f, 0xb9, 0x3d",
                ".long 0x53053053",
                "5:",
                "jmp 2b",
                ".popsection",
                t = out(reg) _,
                rseq = in(reg) self.rseq,
                at = in(reg) at,
                value = in(reg) 1_u64,
                shift = const STRIDE_SHIFT,
                options(nostack),
            );
        }
    }

    fn sum(&mut self) -> u64 {
        let counter = |cpu: usize, index: usize| {
            let at = self.base + (cpu << STRIDE_SHIFT) + index * size_of::<u64>();
            // SAFETY: a counter in the mapping, aligned and zero at first; all that read it do so in one piece.
            let counter = unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(at)) };
            counter.load(Ordering::Relaxed)
        };
        (0..self.cpus)
            .flat_map(|cpu| (0..COUNTERS).map(move |index| (cpu, index)))
            .map(|(cpu, index)| counter(cpu, index))
            .sum()
    }
}
