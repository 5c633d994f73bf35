//! Reads of all CPUs' copies of a scalar.
//!
//! A dynamic variable's copy is zero on a CPU that is not materialised: that is known without touching it, which
//! would take page tables from the system and, while the CPU is being brought up, could read what is not zeroed yet. A
//! static variable's copy is the initial value there; where looking would take memory, that of one such CPU goes for all.

use core::ptr;
use core::sync::atomic::{Ordering, fence};

use crate::alloc_api::{Domain, Handle, per_cpu_ptr};
use crate::allocator::Region;
use crate::request::CpuError;
use crate::this_cpu::{CpuCell, Live, Scalar, Word};
use crate::unit::CpuId;

/// Reads of any CPU's copy of a [`CpuCell`], and of all of them, for static variables and owners.
///
/// Each copy is read in one piece, while the CPUs go on: a sum is exact for changes that happened before it was called,
/// and has some of those that happen meanwhile. There is nothing here that writes to another CPU's copy: it would
/// lose what that CPU is adding.
///
/// ```
/// use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell, define_per_cpu};
///
/// define_per_cpu! {
///     static OPEN: CpuCell<i64> = CpuCell::new(0);
/// }
/// let bytes = PerCpu::<CpuCell<u64>>::new()?;
///
/// OPEN.inc();
/// // Perhaps on another CPU by now, whose copy becomes -1.
/// OPEN.dec();
/// bytes.add(1500);
/// assert_eq!((OPEN.sum(), bytes.sum()), (0, 1500));
/// # Ok::<(), pcpu::AllocError>(())
/// ```
pub trait RemoteCell<T: Scalar>: Live<Target = CpuCell<T>> {
    /// The value of `cpu`'s copy.
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible.
    fn read_on(&self, cpu: CpuId) -> Result<T, CpuError> {
        let copy = per_cpu_ptr(self, cpu)?;
        let units = <Self::Domain as Domain>::units();
        let is_untouched =
            !units.materialised().contains(cpu) && region_of(self) == Region::Dynamic;
        if is_untouched {
            return Ok(T::new_zeroed());
        }
        // SAFETY: the variable is live on every possible CPU.
        Ok(unsafe { copy.as_ref() }.read_remote())
    }

    /// The values on all CPUs that may have another than zero.
    fn values(&self) -> impl Iterator<Item = (CpuId, T)> {
        values_in(self, region_of(self))
    }

    /// The sum over all possible CPUs, wrapping at the width of the cell. It is right even if each CPU's own value has
    /// wrapped, as that of one that only ever subtracts.
    fn sum(&self) -> T {
        let units = <Self::Domain as Domain>::units();
        let zero = T::new_zeroed().to_word();
        let region = region_of(self);
        let cpus = match region {
            Region::Dynamic => units.materialised(),
            Region::Static | Region::Reserved if !units.comes_with_touch => units.possible(),
            Region::Static | Region::Reserved => {
                let values = values_in(self, region);
                return T::from_word(
                    values.fold(zero, |sum, (_, value)| sum.wrapping_add(value.to_word())),
                );
            }
        };
        // No address of a CPU that is asked for is looked up, nor is it asked again whether the CPU has memory.
        let mut sum = zero;
        units.for_each_copy_on(cpus, self.handle().neutral(), |copy| {
            // SAFETY: the variable is live on every possible CPU.
            let value = unsafe { T::Word::load(ptr::with_exposed_provenance(copy)) };
            sum = sum.wrapping_add(value);
        });
        T::from_word(sum)
    }
}

impl<T: Scalar, H: Live<Target = CpuCell<T>>> RemoteCell<T> for H {}

/// The values of a variable that lies in `region`.
fn values_in<T: Scalar, H: RemoteCell<T> + ?Sized>(
    variable: &H,
    region: Region,
) -> impl Iterator<Item = (CpuId, T)> {
    let units = H::Domain::units();
    let cpus = match region {
        Region::Dynamic => units.materialised(),
        Region::Static | Region::Reserved => units.possible(),
    };
    let mut initial = None;
    cpus.iter().filter_map(move |cpu| {
        if units.materialised().contains(cpu) || !units.comes_with_touch {
            return Some((cpu, variable.read_on(cpu).ok()?));
        }
        if let Some(value) = initial {
            return Some((cpu, value));
        }
        let value = variable.read_on(cpu).ok()?;
        fence(Ordering::Acquire);
        if !units.materialised().contains(cpu) {
            // It has not come meanwhile, so nothing was ever written there.
            initial = Some(value);
        }
        Some((cpu, value))
    })
}

/// The region that a live variable lies in.
fn region_of<H: Handle + ?Sized>(variable: &H) -> Region {
    // A live variable is in one; a static one's copies are read, which is right for any.
    H::Domain::region(variable.handle().neutral()).unwrap_or(Region::Static)
}
