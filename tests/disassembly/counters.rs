//! A crate that lends its static per-CPU variables to others; see `tests/disassembly.rs`.

use pcpu::{CpuCell, CpuPair, define_per_cpu};

define_per_cpu! {
    pub static THERE_U8: CpuCell<u8> = CpuCell::new(0);
    pub static THERE_U16: CpuCell<u16> = CpuCell::new(0);
    pub static THERE_U32: CpuCell<u32> = CpuCell::new(0);
    pub static THERE_U64: CpuCell<u64> = CpuCell::new(0);
    pub static THERE_PAIR: CpuPair<u64> = CpuPair::new(0, 0);
    #[percpu(first)]
    pub static FIRST: CpuCell<u64> = CpuCell::new(0);
    #[percpu(page_aligned)]
    pub static PAGE_ALIGNED: CpuCell<u64> = CpuCell::new(0);
    #[percpu(read_mostly)]
    pub static READ_MOSTLY: CpuCell<u64> = CpuCell::new(0);
    #[percpu(cache_aligned)]
    pub static CACHE_ALIGNED: CpuCell<u64> = CpuCell::new(0);
}
