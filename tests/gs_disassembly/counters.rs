//! A crate of a kernel: its domain, and static per-CPU variables that it lends to others; see `tests/gs_disassembly.rs`.

use pcpu::this_cpu::gs::{Gs, GsDomain};
use pcpu::unit::CpuId;
use pcpu::{CpuCell, Domain, Global, PerCpuAllocator, define_per_cpu_in};

pub enum Kernel {}

type Backing = <Global as Domain>::Backing;
type Lock = <Global as Domain>::Lock;

// SAFETY: nobody runs an operation.
unsafe impl Domain for Kernel {
    type Backing = Backing;
    type Lock = Lock;
    type Ops = Gs<Self>;

    fn allocator() -> &'static PerCpuAllocator<Backing, Lock> {
        unimplemented!("no operation needs the instance")
    }

    fn current_cpu() -> CpuId {
        unimplemented!("no operation asks for the CPU")
    }
}

// SAFETY: nobody runs an operation.
unsafe impl GsDomain for Kernel {}

define_per_cpu_in! {
    in Kernel;

    pub static THERE_U8: CpuCell<u8> = CpuCell::new(0);
    pub static THERE_U16: CpuCell<u16> = CpuCell::new(0);
    pub static THERE_U32: CpuCell<u32> = CpuCell::new(0);
    pub static THERE_U64: CpuCell<u64> = CpuCell::new(0);
}
