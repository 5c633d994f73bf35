//! Static variables of a kernel: where they lie, how aligned, what their copies start from.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pcpu::this_cpu::gs::KernelStatic;
use pcpu::unit::CpuId;
use pcpu::{
    CpuCell, CpuError, Domain, Handle, LocalCell, RemoteCell, define_per_cpu_in, per_cpu_ptr,
};

use crate::kernel::{Cpu, Kernel, cpus, snapshot};

/// Scalars next to each other.
pub type Lanes<T> = [CpuCell<T>; 3];

define_per_cpu_in! {
    in Kernel;

    pub static U8: Lanes<u8> = [const { CpuCell::new(200) }; 3];
    pub static U16: Lanes<u16> = [const { CpuCell::new(50_000) }; 3];
    pub static U32: Lanes<u32> = [const { CpuCell::new(3_000_000_000) }; 3];
    pub static U64: Lanes<u64> = [const { CpuCell::new(1 << 63 | 5) }; 3];
    pub static I8: Lanes<i8> = [const { CpuCell::new(-100) }; 3];
    pub static I16: Lanes<i16> = [const { CpuCell::new(-20_000) }; 3];
    pub static I32: Lanes<i32> = [const { CpuCell::new(i32::MIN) }; 3];
    pub static I64: Lanes<i64> = [const { CpuCell::new(i64::MIN + 1) }; 3];

    pub static ONE_U8: CpuCell<u8> = CpuCell::new(200);
    pub static ONE_U16: CpuCell<u16> = CpuCell::new(50_000);
    pub static ONE_U32: CpuCell<u32> = CpuCell::new(3_000_000_000);
    pub static ONE_U64: CpuCell<u64> = CpuCell::new(1 << 63 | 5);
    pub static ONE_I8: CpuCell<i8> = CpuCell::new(-100);
    pub static ONE_I16: CpuCell<i16> = CpuCell::new(-20_000);
    pub static ONE_I32: CpuCell<i32> = CpuCell::new(i32::MIN);
    pub static ONE_I64: CpuCell<i64> = CpuCell::new(i64::MIN + 1);

    /// What signal handlers change too.
    pub static STORM: [CpuCell<u64>; 8] = [const { CpuCell::new(0) }; 8];

    pub static GUARDED: AtomicU64 = AtomicU64::new(1);
    pub static CHECKED: CpuCell<u64> = CpuCell::new(0);

    pub static PAIR: Pair = Pair([const { CpuCell::new(7) }; 2]);

    /// Documented, and there under a condition.
    #[percpu(first)]
    #[cfg(target_arch = "x86_64")]
    static FIRST: CpuCell<u64> = CpuCell::new(11);
    #[cfg(not(target_arch = "x86_64"))]
    static FIRST: () = ();
    #[percpu(page_aligned)]
    static PAGE: [u8; 5000] = [3; 5000];
    #[cfg(target_arch = "x86_64")]
    #[percpu(cache_aligned)]
    static LINE: CpuCell<u8> = CpuCell::new(12);
    /// Second of its kind.
    #[percpu(cache_aligned)]
    static LINE_TOO: CpuCell<u8> = CpuCell::new(13);
    #[percpu(read_mostly)]
    static NODE: CpuCell<u16> = CpuCell::new(14);
    static SHARED: AtomicU32 = AtomicU32::new(15);
}

/// Two words that are changed together.
#[repr(C, align(16))]
pub struct Pair(pub [CpuCell<u64>; 2]);

/// Where all of the above lie.
pub fn variables() -> Vec<Range<usize>> {
    fn place<V: Handle<Domain = Kernel>>(variable: V) -> Range<usize> {
        let start = variable.handle().neutral();
        start..start + size_of::<V::Target>()
    }
    let lanes = [
        place(U8),
        place(U16),
        place(U32),
        place(U64),
        place(I8),
        place(I16),
        place(I32),
        place(I64),
    ];
    let single = [
        place(ONE_U8),
        place(ONE_U16),
        place(ONE_U32),
        place(ONE_U64),
        place(ONE_I8),
        place(ONE_I16),
        place(ONE_I32),
        place(ONE_I64),
    ];
    let others = [
        place(STORM),
        place(PAIR),
        place(GUARDED),
        place(CHECKED),
        place(FIRST),
        place(PAGE),
        place(LINE),
        place(LINE_TOO),
        place(NODE),
        place(SHARED),
    ];
    [&lanes[..], &single, &others].concat()
}

#[test]
fn copies_start_from_the_initial_value() {
    for cpu in cpus() {
        assert_eq!(FIRST.get(cpu).unwrap().read_remote(), 11);
        assert_eq!(PAGE.get(cpu).unwrap(), &[3; 5000]);
        assert_eq!(NODE.get(cpu).unwrap().read_remote(), 14);
        let _on = Cpu::enter(cpu);
        assert_eq!((LINE.read(), LINE_TOO.read()), (12, 13));
    }
    assert_eq!((NODE.sum(), LINE.sum()), (42, 36));
}

/// A handle is the linker's address; a copy lies the CPU's GS base further.
#[test]
fn a_handle_is_an_address() {
    let pcpu = Kernel::allocator();
    for cpu in cpus() {
        let offset = pcpu.units().offset(cpu).unwrap();
        let copy = per_cpu_ptr(SHARED, cpu).unwrap();
        let expected = SHARED.handle().neutral() + offset;
        assert_eq!(copy.as_ptr().addr(), expected);
        SHARED
            .get(cpu)
            .unwrap()
            .fetch_add(cpu.get(), Ordering::Relaxed);
    }
    for cpu in cpus() {
        assert_eq!(
            snapshot(SHARED)[cpu.index()],
            (15 + cpu.get()).to_le_bytes()
        );
        // The template is not what anybody works on.
        let template = SHARED.handle().neutral() as *const u32;
        // SAFETY: the linker placed it there, and nothing writes to it.
        assert_eq!(unsafe { template.read_volatile() }, 15);
    }
}

#[test]
fn a_cpu_that_does_not_exist_has_no_copy() {
    let cpu = CpuId::new(3);
    let nr_cpu_ids = 3;
    let error = CpuError::NotPossible { cpu, nr_cpu_ids };
    assert_eq!(SHARED.get(cpu).err(), Some(error));
}

#[test]
fn variables_are_as_aligned_as_they_say() {
    let pcpu = Kernel::allocator();
    for cpu in cpus() {
        let offset = pcpu.units().offset(cpu).unwrap();
        let copy = |neutral: usize| neutral + offset;
        assert!(copy(PAGE.handle().neutral()).is_multiple_of(4096));
        assert!(copy(LINE.handle().neutral()).is_multiple_of(64));
        assert!(copy(LINE_TOO.handle().neutral()).is_multiple_of(64));
        assert!(copy(FIRST.handle().neutral()).is_multiple_of(8));
    }
    // Nothing else lies in the lines and pages of their own.
    let all = variables();
    let alone = |start: usize, bytes: usize| {
        let own = start..start + bytes;
        all.iter()
            .filter(|other| other.start < own.end && own.start < other.end)
            .count()
            == 1
    };
    assert!(alone(PAGE.handle().neutral(), 8192));
    assert!(alone(LINE.handle().neutral(), 64));
    assert!(alone(LINE_TOO.handle().neutral(), 64));
}
