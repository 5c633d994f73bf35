//! Frees that are wrong, each refused and without effect; and memory that is zero again when it comes back.

use pcpu::{
    FreeError, Global, PerCpuPtr, Request, alloc_percpu, alloc_percpu_bytes, free_percpu, global,
    per_cpu_ptr,
};

use super::checks::Checks;
use super::counting::Counter;
use crate::error::CliError;

/// Frees what is not to be freed.
///
/// # Errors
/// One line, if a variable to try it on could not be had.
pub fn wrong_frees(counter: &Counter, checks: &mut Checks) -> Result<(), CliError> {
    let variable = alloc_percpu::<[u64; 4]>().map_err(failed)?;
    let live = global().stats().live;
    let address = variable.neutral();
    // What any code that uses the variable has in hand: a pointer, not the handle.
    let copy = global()
        .units()
        .materialised()
        .iter()
        .next()
        .map(|cpu| per_cpu_ptr(variable, cpu))
        .transpose()
        .map_err(failed)?;

    let wrong = [
        (
            "free inside an area refused",
            address + 8,
            FreeError::Interior {
                address: address + 8,
                start: address,
            },
        ),
        (
            "free of a static variable refused",
            counter.neutral(),
            FreeError::Static {
                address: counter.neutral(),
            },
        ),
    ];
    let pointer = copy.map(|copy| {
        let address = copy.addr().get();
        (
            "free of a CPU's pointer refused",
            address,
            FreeError::Foreign { address },
        )
    });
    for (what, address, want) in wrong.into_iter().chain(pointer) {
        // SAFETY: no area starts at the address.
        refused(checks, what, unsafe { free(address) }, want)?;
    }
    checks.equal(
        "the area is live still, as are all others",
        (global().area_bytes(address), global().stats().live),
        (Some(size_of::<[u64; 4]>()), live),
    )?;

    // SAFETY: nobody uses the variable.
    checks.check("the right free accepted", unsafe { free(address) })?;
    // SAFETY: the area is gone, and no other thread allocates.
    let twice = unsafe { free(address) };
    refused(
        checks,
        "second free refused",
        twice,
        FreeError::NotAllocated { address },
    )
}

fn refused(
    checks: &mut Checks,
    what: &str,
    got: Result<(), FreeError>,
    want: FreeError,
) -> Result<(), CliError> {
    checks.equal(format_args!("{what}: {want}"), got, Err(want))
}

/// Frees whatever starts at a neutral address.
///
/// # Safety
/// If an area starts there, it is the caller's, and not used any more.
unsafe fn free(address: usize) -> Result<(), FreeError> {
    let handle =
        PerCpuPtr::<u8, Global>::from_neutral(address).ok_or(FreeError::Foreign { address })?;
    // SAFETY: the promise of the caller.
    unsafe { free_percpu(handle) }
}

/// Writes to areas on every CPU, frees them, and looks at what comes back.
///
/// # Errors
/// One line, if there is no memory for them.
pub fn zero_again(checks: &mut Checks) -> Result<(), CliError> {
    const ROUNDS: usize = 2;
    const AREAS: usize = 32;
    const BYTES: usize = 192;
    let mut not_zero = 0_u32;
    for _ in 0..ROUNDS {
        let areas = (0..AREAS)
            .map(|_| alloc_percpu_bytes::<Global>(&Request::new(BYTES, 8)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?;
        for &area in &areas {
            for cpu in global().units().possible().iter() {
                let copy = per_cpu_ptr(area, cpu).map_err(failed)?;
                // SAFETY: the area is live and this thread's; any CPU's copy may be read.
                let copy = unsafe { std::slice::from_raw_parts(copy.as_ptr(), BYTES) };
                not_zero += u32::from(copy.iter().any(|&byte| byte != 0));
            }
            for cpu in global().units().materialised().iter() {
                let copy = per_cpu_ptr(area, cpu).map_err(failed)?;
                // SAFETY: as above, no reference to the copy is left; the CPU's copies may be written.
                unsafe { copy.as_ptr().write_bytes(0xd1, BYTES) };
            }
        }
        for area in areas {
            // SAFETY: this thread alone used it.
            unsafe { free_percpu(area) }.map_err(failed)?;
        }
    }
    checks.equal(
        "memory that was written to and freed is zero again on every CPU",
        not_zero,
        0,
    )
}

fn failed(error: impl ToString) -> CliError {
    CliError::Failed(error.to_string())
}
