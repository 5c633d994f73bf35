//! A scalar among neighbours of its width, as what operations work on.

use pcpu::this_cpu::{Live, Scalar};
use pcpu::unit::CpuId;
use pcpu::{CpuCell, Global, Handle, PerCpuPtr, global, per_cpu_ptr};

/// How many scalars lie next to each other.
pub const LANES: usize = 16;

/// Scalars next to each other.
pub type Lanes<T> = [CpuCell<T>; LANES];

/// One of [`Lanes`] of a variable that is never freed while the tests run.
#[derive(Debug)]
pub struct Lane<T>(PerCpuPtr<CpuCell<T>>);

impl<T> Clone for Lane<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Lane<T> {}

impl<T: Scalar> Lane<T> {
    /// # Safety
    /// The variable lives for as long as the result is used.
    pub unsafe fn of(lanes: PerCpuPtr<Lanes<T>>, index: usize) -> Self {
        assert!(index < LANES);
        let lane = lanes.cast().byte_add(index * size_of::<T>());
        Self(lane.expect("a variable does not wrap around"))
    }

    /// A CPU's copy.
    pub fn on(self, cpu: CpuId) -> T {
        let copy = per_cpu_ptr(self.0, cpu).expect("a possible CPU");
        // SAFETY: the variable is live (promise of `of`).
        unsafe { copy.as_ref() }.read_remote()
    }
}

impl<T: Scalar> Handle for Lane<T> {
    type Target = CpuCell<T>;
    type Domain = Global;

    fn handle(&self) -> PerCpuPtr<CpuCell<T>> {
        self.0
    }
}

// SAFETY: the promise of whoever made it: the variable is live, and zero or initial on every CPU.
unsafe impl<T: Scalar> Live for Lane<T> {}

/// All copies of all lanes, in the order of the CPUs; the stray unit is the last.
pub fn snapshot<T: Scalar>(lanes: PerCpuPtr<Lanes<T>>) -> Vec<[T; LANES]> {
    let of_cpu = |cpu| {
        // SAFETY: used at once; the variable lives.
        std::array::from_fn(|index| unsafe { Lane::of(lanes, index) }.on(cpu))
    };
    global().units().possible().iter().map(of_cpu).collect()
}
