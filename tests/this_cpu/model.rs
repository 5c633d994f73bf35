//! Every operation on every type of scalar, on every CPU, against the operations of plain integers.

use std::fmt::Debug;

use pcpu::this_cpu::{self, Scalar};
use pcpu::{
    CpuCell, Handle, LocalCell, PerCpuPtr, StaticVar, alloc_percpu, define_per_cpu, free_percpu,
    global,
};

use crate::lane::{LANES, Lane, Lanes, snapshot};
use crate::system::{allowed_cpus, on_cpu};

/// How many operations of each type are tried on each CPU, for a static and for a dynamic variable.
const STEPS: usize = 6000;

/// An operation with its operands.
#[derive(Debug, Clone, Copy)]
enum Operation<T> {
    Read,
    Write(T),
    Add(T),
    Sub(T),
    Inc,
    Dec,
    And(T),
    Or(T),
    Xor(T),
    AddReturn(T),
    Xchg(T),
    Cmpxchg(T, T),
}

impl<T: Copy> Operation<T> {
    /// An operation by number.
    fn pick(number: u64, a: T, b: T) -> Self {
        match number % 12 {
            0 => Self::Read,
            1 => Self::Write(a),
            2 => Self::Add(a),
            3 => Self::Sub(a),
            4 => Self::Inc,
            5 => Self::Dec,
            6 => Self::And(a),
            7 => Self::Or(a),
            8 => Self::Xor(a),
            9 => Self::AddReturn(a),
            10 => Self::Xchg(a),
            _ => Self::Cmpxchg(b, a),
        }
    }
}

/// What an operation answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer<T> {
    Nothing,
    Value(T),
    Exchange(Result<T, T>),
}

/// A plain integer.
trait Plain: Scalar + Copy + Eq + Debug + From<bool> {
    /// A number that is a limit or next to one, or any number.
    fn pick(random: u64) -> Self;
    /// What the operation does to a plain integer.
    fn apply(&mut self, operation: Operation<Self>) -> Answer<Self>;
}

macro_rules! plain {
    ($($type:ident)+) => {$(
        impl Plain for $type {
            fn pick(random: u64) -> Self {
                const LIMITS: [$type; 8] =
                    [0, 1, 2, $type::MAX, $type::MAX - 1, $type::MIN, $type::MIN + 1, $type::MAX / 2 + 1];
                match random % 16 {
                    index @ 0..8 => LIMITS[index as usize],
                    _ => (random >> 4) as Self,
                }
            }

            fn apply(&mut self, operation: Operation<Self>) -> Answer<Self> {
                let before = *self;
                match operation {
                    Operation::Read => return Answer::Value(before),
                    Operation::Write(value) => *self = value,
                    Operation::Add(value) => *self = before.wrapping_add(value),
                    Operation::Sub(value) => *self = before.wrapping_sub(value),
                    Operation::Inc => *self = before.wrapping_add(1),
                    Operation::Dec => *self = before.wrapping_sub(1),
                    Operation::And(value) => *self &= value,
                    Operation::Or(value) => *self |= value,
                    Operation::Xor(value) => *self ^= value,
                    Operation::AddReturn(value) => {
                        *self = before.wrapping_add(value);
                        return Answer::Value(*self);
                    }
                    Operation::Xchg(value) => {
                        *self = value;
                        return Answer::Value(before);
                    }
                    Operation::Cmpxchg(old, new) if before == old => {
                        *self = new;
                        return Answer::Exchange(Ok(before));
                    }
                    Operation::Cmpxchg(..) => return Answer::Exchange(Err(before)),
                }
                Answer::Nothing
            }
        }
    )+};
}

plain!(u8 u16 u32 u64 usize i8 i16 i32 i64 isize);

/// The operation by the methods of static variables and owners.
fn by_method<T: Plain>(cell: impl LocalCell<T>, operation: Operation<T>) -> Answer<T> {
    match operation {
        Operation::Read => return Answer::Value(cell.read()),
        Operation::Write(value) => cell.write(value),
        Operation::Add(value) => cell.add(value),
        Operation::Sub(value) => cell.sub(value),
        Operation::Inc => cell.inc(),
        Operation::Dec => cell.dec(),
        Operation::And(value) => cell.and(value),
        Operation::Or(value) => cell.or(value),
        Operation::Xor(value) => cell.xor(value),
        Operation::AddReturn(value) => return Answer::Value(cell.add_return(value)),
        Operation::Xchg(value) => return Answer::Value(cell.xchg(value)),
        Operation::Cmpxchg(old, new) => return Answer::Exchange(cell.cmpxchg(old, new)),
    }
    Answer::Nothing
}

/// The operation by the functions for raw handles.
fn by_function<T: Plain>(cell: PerCpuPtr<CpuCell<T>>, operation: Operation<T>) -> Answer<T> {
    let one = T::from(true);
    // SAFETY: the variables of these tests are live.
    unsafe {
        match operation {
            Operation::Read => return Answer::Value(this_cpu::read(cell)),
            Operation::Write(value) => this_cpu::write(cell, value),
            Operation::Add(value) => this_cpu::add(cell, value),
            Operation::Sub(value) => this_cpu::sub(cell, value),
            Operation::Inc => this_cpu::add(cell, one),
            Operation::Dec => this_cpu::sub(cell, one),
            Operation::And(value) => this_cpu::and(cell, value),
            Operation::Or(value) => this_cpu::or(cell, value),
            Operation::Xor(value) => this_cpu::xor(cell, value),
            Operation::AddReturn(value) => {
                return Answer::Value(this_cpu::add_return(cell, value));
            }
            Operation::Xchg(value) => return Answer::Value(this_cpu::xchg(cell, value)),
            Operation::Cmpxchg(old, new) => {
                return Answer::Exchange(this_cpu::cmpxchg(cell, old, new));
            }
        }
    }
    Answer::Nothing
}

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
                let found = if random().is_multiple_of(2) {
                    *model
                } else {
                    T::pick(random())
                };
                let operation = Operation::pick(random(), T::pick(random()), found);
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

/// Random numbers.
fn random_numbers(seed: u64) -> impl FnMut() -> u64 + Send {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        crate::storm::mix(state)
    }
}

/// A variable that starts as zero.
fn check_dynamic<T: Plain>() {
    let lanes = alloc_percpu::<Lanes<T>>().expect("there is memory");
    let zeroes = vec![[T::new_zeroed(); LANES]; global().units().possible().count() as usize];
    assert_eq!(snapshot(lanes), zeroes);
    check(lanes, |lane, operation| {
        by_function(lane.handle(), operation)
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
                check(lanes, by_method);
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
