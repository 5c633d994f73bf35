//! All of it together: the operations by %gs on variables in pages that page tables lead to. Threads are the CPUs.

use std::sync::LazyLock;
use std::thread;

use parking_lot::RawMutex;
use pcpu::this_cpu::gs::{Gs, GsDomain};
use pcpu::unit::CpuId;
use pcpu::{CpuCell, Domain, Instance, LocalCell, PerCpu, PerCpuAllocator, RemoteCell};

use crate::host::Host;
use crate::machine::{Backing, Front, Shape};

const SHAPE: Shape = Shape {
    cpus: 4,
    nodes: 2,
    online: 1,
    unit_bytes: 32 << 10,
    static_bytes: 100,
    reserved_bytes: 0,
    frames_of_a_node: 2000,
    max_chunks: u32::MAX,
    front: Front::Nothing,
};

enum Kernel {}

type Memory = &'static Backing<'static>;
static INSTANCE: Instance<Memory, RawMutex> = Instance::new();
static BOOT: LazyLock<()> = LazyLock::new(|| {
    let host: &'static Host = Box::leak(Box::new(SHAPE.host()));
    INSTANCE.set_up(SHAPE.boot_for_good(host)).expect("once");
});

// SAFETY: `allocator` is always the same instance.
unsafe impl Domain for Kernel {
    type Backing = Memory;
    type Lock = RawMutex;
    type Ops = Gs<Self>;

    fn allocator() -> &'static PerCpuAllocator<Memory, RawMutex> {
        LazyLock::force(&BOOT);
        INSTANCE.get().expect("booted")
    }

    fn current_cpu() -> CpuId {
        unreachable!("no operation asks for the CPU")
    }
}

// SAFETY: operations run in threads that have loaded their GS base, after their CPU was brought up.
unsafe impl GsDomain for Kernel {}

fn on_cpu(cpu: CpuId, act: impl FnOnce() + Send) {
    const ARCH_SET_GS: i32 = 0x1001;
    let base = Kernel::allocator().units().offset(cpu).expect("possible");
    let run = move || {
        // SAFETY: the calling thread's GS base, which nothing else uses in a process.
        let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
        assert_eq!(result, 0);
        act();
    };
    thread::scope(|scope| scope.spawn(run).join().expect("it ran"));
}

#[test]
fn cpus_count_in_their_own_pages() {
    const COUNT: u64 = 50_000;
    let cells: Vec<PerCpu<CpuCell<u64>, Kernel>> = (0..3000)
        .map(|_| PerCpu::new().expect("there is memory"))
        .collect();
    assert!(Kernel::allocator().stats().chunks > 1);
    let last = cells.last().expect("some");
    let count = |cpu: u32| {
        on_cpu(CpuId::new(cpu), || {
            for _ in 0..COUNT {
                last.inc();
            }
            cells.iter().for_each(|cell| cell.add(u64::from(cpu) + 1));
            assert_eq!(last.read(), COUNT + u64::from(cpu) + 1);
        });
    };
    count(0);
    assert_eq!(last.sum(), COUNT + 1);
    assert_eq!(last.read_on(CpuId::new(2)), Ok(0));
    Kernel::allocator()
        .bring_up(CpuId::new(2))
        .expect("there is memory");
    Kernel::allocator()
        .bring_up(CpuId::new(3))
        .expect("there is memory");
    thread::scope(|scope| {
        scope.spawn(|| count(2));
        scope.spawn(|| count(3));
    });
    assert_eq!(last.sum(), 3 * COUNT + 1 + 3 + 4);
    assert_eq!(cells[0].sum(), 1 + 3 + 4);
    assert_eq!(last.read_on(CpuId::new(1)), Ok(0));
}
