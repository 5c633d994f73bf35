//! The operations on a scalar, and what each of them does to a plain integer: the model that tests of a home compare with.

use std::fmt::Debug;

use pcpu::this_cpu::{self, Scalar};
use pcpu::{CpuCell, Domain, LocalCell, PerCpuPtr};

use crate::mix::{STEP, mix};

/// An operation with its operands.
#[derive(Debug, Clone, Copy)]
pub enum Operation<T> {
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

/// What an operation answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer<T> {
    Nothing,
    Value(T),
    Exchange(Result<T, T>),
}

impl<T: Plain> Operation<T> {
    /// Any operation, with any operands; an exchange succeeds half of the time and more if the variable is `value`.
    pub fn any(random: &mut impl FnMut() -> u64, value: T) -> Self {
        let found = if random().is_multiple_of(2) {
            value
        } else {
            T::any(random())
        };
        let (number, operand) = (random(), T::any(random()));
        match number % 12 {
            0 => Self::Read,
            1 => Self::Write(operand),
            2 => Self::Add(operand),
            3 => Self::Sub(operand),
            4 => Self::Inc,
            5 => Self::Dec,
            6 => Self::And(operand),
            7 => Self::Or(operand),
            8 => Self::Xor(operand),
            9 => Self::AddReturn(operand),
            10 => Self::Xchg(operand),
            _ => Self::Cmpxchg(found, operand),
        }
    }

    /// By the methods of static variables and owners.
    pub fn by_method(self, cell: impl LocalCell<T>) -> Answer<T> {
        match self {
            Self::Read => return Answer::Value(cell.read()),
            Self::Write(value) => cell.write(value),
            Self::Add(value) => cell.add(value),
            Self::Sub(value) => cell.sub(value),
            Self::Inc => cell.inc(),
            Self::Dec => cell.dec(),
            Self::And(value) => cell.and(value),
            Self::Or(value) => cell.or(value),
            Self::Xor(value) => cell.xor(value),
            Self::AddReturn(value) => return Answer::Value(cell.add_return(value)),
            Self::Xchg(value) => return Answer::Value(cell.xchg(value)),
            Self::Cmpxchg(old, new) => return Answer::Exchange(cell.cmpxchg(old, new)),
        }
        Answer::Nothing
    }

    /// By the functions for raw handles.
    ///
    /// # Safety
    /// The variable is live.
    pub unsafe fn by_function<D: Domain>(self, cell: PerCpuPtr<CpuCell<T>, D>) -> Answer<T> {
        // SAFETY: the variable is live (promise of the caller).
        unsafe {
            match self {
                Self::Read => return Answer::Value(this_cpu::read(cell)),
                Self::Write(value) => this_cpu::write(cell, value),
                Self::Add(value) => this_cpu::add(cell, value),
                Self::Sub(value) => this_cpu::sub(cell, value),
                Self::Inc => this_cpu::inc(cell),
                Self::Dec => this_cpu::dec(cell),
                Self::And(value) => this_cpu::and(cell, value),
                Self::Or(value) => this_cpu::or(cell, value),
                Self::Xor(value) => this_cpu::xor(cell, value),
                Self::AddReturn(value) => return Answer::Value(this_cpu::add_return(cell, value)),
                Self::Xchg(value) => return Answer::Value(this_cpu::xchg(cell, value)),
                Self::Cmpxchg(old, new) => {
                    return Answer::Exchange(this_cpu::cmpxchg(cell, old, new));
                }
            }
        }
        Answer::Nothing
    }
}

/// A plain integer.
pub trait Plain: Scalar + Copy + Eq + Debug + From<bool> {
    /// A number that is a limit or next to one, or any number.
    fn any(random: u64) -> Self;
    /// What the operation does to a plain integer.
    fn apply(&mut self, operation: Operation<Self>) -> Answer<Self>;
}

macro_rules! plain {
    ($($type:ident)+) => {$(
        impl Plain for $type {
            fn any(random: u64) -> Self {
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

/// The same numbers for the same seed.
pub fn random_numbers(seed: u64) -> impl FnMut() -> u64 + Send {
    let mut state = seed;
    move || {
        state = state.wrapping_add(STEP);
        mix(state)
    }
}
