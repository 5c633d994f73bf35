//! Every operation on every type of scalar, on every CPU, against the operations of plain integers.

use pcpu::{
    CpuCell, Handle, LocalCell, PerCpuPtr, StaticVar, alloc_percpu, define_per_cpu, free_percpu,
    global,
};

use crate::lane::{LANES, Lane, Lanes, snapshot};
use crate::operations::{Answer, Operation, Plain, random_numbers};
use crate::system::{allowed_cpus, on_cpu};

/// How many operations of each type are tried on each CPU, for a static and for a dynamic variable.
const STEPS: usize = 6000;

/// Tries operations on one lane after the other, on one CPU after the other. Neither the other lanes nor the copies of
/// other CPUs may change.
fn check<T: Plain>(
    lanes: PerCpuPtr<Lanes<T>>,
    apply: impl Fn(Lane<T>, Operation<T>) -> Answer<T> + Sync,
) {
    let mut expected = snapshot(lanes);
    for cpu in allowed_cpus() {
        let mut of_cpu = expected[cpu.index()];
        let mut random = random_numbers(cpu.index() as u64);
        on_cpu(cpu, || {
            for step in 0..STEPS {
                // A while on each lane, so that neighbours have all kinds of values.
                let index = step / 16 % LANES;
                // SAFETY: the caller's variable lives.
                let lane = unsafe { Lane::of(lanes, index) };
                let model = &mut of_cpu[index];
                let operation = Operation::any(&mut random, *model);
                let before = *model;
                let answer = apply(lane, operation);
                assert_eq!(
                    answer,
                    model.apply(operation),
                    "{operation:?} on {before:?}"
                );
                assert_eq!(lane.on(cpu), *model, "{operation:?} on {before:?}");
            }
        });
        expected[cpu.index()] = of_cpu;
        assert_eq!(snapshot(lanes), expected);
    }
}

/// A variable that starts as zero.
fn check_dynamic<T: Plain>() {
    let lanes = alloc_percpu::<Lanes<T>>().expect("there is memory");
    let zeroes = vec![[T::new_zeroed(); LANES]; global().units().possible().count() as usize];
    assert_eq!(snapshot(lanes), zeroes);
    check(lanes, |lane, operation| {
        // SAFETY: freed below.
        unsafe { operation.by_function(lane.handle()) }
    });
    // SAFETY: nobody uses the variable any more.
    unsafe { free_percpu(lanes) }.expect("it is allocated");
}

macro_rules! types {
    ($($test:ident: $static:ident of $type:ident, $initial:expr;)+) => {
        define_per_cpu! {
            $(static $static: Lanes<$type> = [const { CpuCell::new($initial) }; LANES];)+
        }

        $(
            #[test]
            fn $test() {
                let lanes = $static.handle();
                let initial = vec![[$initial; LANES]; global().units().possible().count() as usize];
                assert_eq!(snapshot(lanes), initial);
                check(lanes, |lane, operation| operation.by_method(lane));
                check_dynamic::<$type>();
            }
        )+
    };
}

types! {
    operations_on_u8: U8 of u8, 200;
    operations_on_u16: U16 of u16, 50_000;
    operations_on_u32: U32 of u32, 3_000_000_000;
    operations_on_u64: U64 of u64, 1 << 63 | 5;
    operations_on_usize: USIZE of usize, 7;
    operations_on_i8: I8 of i8, -100;
    operations_on_i16: I16 of i16, -20_000;
    operations_on_i32: I32 of i32, i32::MIN;
    operations_on_i64: I64 of i64, i64::MIN + 1;
    operations_on_isize: ISIZE of isize, -1;
}

define_per_cpu! {
    static COUNT: CpuCell<i16> = CpuCell::new(-3);
}

/// What a user writes: a static variable by its name, from any thread.
#[test]
fn a_static_by_its_name() {
    for cpu in allowed_cpus() {
        on_cpu(cpu, || {
            assert_eq!(COUNT.read(), -3);
            COUNT.inc();
            COUNT.sub(-5);
            assert_eq!(COUNT.add_return(i16::MAX), i16::MIN + 2);
            assert_eq!(COUNT.cmpxchg(0, 1), Err(i16::MIN + 2));
            assert_eq!(COUNT.cmpxchg(i16::MIN + 2, 1), Ok(i16::MIN + 2));
            COUNT.dec();
            COUNT.dec();
            assert_eq!(COUNT.xchg(9), -1);
        });
    }
    for cpu in global().units().possible().iter() {
        let value = COUNT.get(cpu).expect("a possible CPU").read_remote();
        let is_used = allowed_cpus().contains(&cpu);
        assert_eq!(value, if is_used { 9 } else { -3 });
    }
}
