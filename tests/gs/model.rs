//! Every operation on every width, on every CPU, against the operations of plain integers.

use pcpu::this_cpu::gs::{Gs, replace_pair};
use pcpu::this_cpu::{Change, LocalOps, Word};
use pcpu::{Handle, PerCpuPtr, alloc_percpu_in, free_percpu};

use crate::kernel::{Cpu, Kernel, cpus, snapshot};
use crate::operations::{Answer, Operation, Plain, random_numbers};
use crate::statics::{self, Lanes};

/// How many operations of each type are tried on each CPU.
const STEPS: usize = 4000;

/// Tries operations on the scalar in the middle of `whole`, `at` bytes into it, on one CPU after the other: neither its
/// neighbours nor the copies of other CPUs may change.
fn check<T: Plain, V: Handle<Domain = Kernel>>(
    whole: V,
    at: usize,
    apply: impl Fn(Operation<T>) -> Answer<T>,
) {
    let mut expected = snapshot(&whole);
    for cpu in cpus() {
        let _on = Cpu::enter(cpu);
        let mut random = random_numbers(cpu.get().into());
        let Answer::Value(mut model) = apply(Operation::Read) else {
            panic!("a read answers the value");
        };
        for _ in 0..STEPS {
            let operation = Operation::any(&mut random, model);
            let before = model;
            let answer = apply(operation);
            assert_eq!(
                answer,
                model.apply(operation),
                "{operation:?} on {before:?}"
            );
            let bytes = model.to_word();
            let bytes = bytes.widen().to_le_bytes();
            expected[cpu.index()][at..at + size_of::<T>()]
                .copy_from_slice(&bytes[..size_of::<T>()]);
            assert_eq!(snapshot(&whole), expected, "{operation:?} on {before:?}");
        }
    }
}

macro_rules! types {
    ($($test:ident: $type:ident, $lanes:ident, $single:ident, $initial:expr;)+) => {$(
        #[test]
        fn $test() {
            // A static variable by its name: the symbol is in the instruction.
            let initial: [u8; size_of::<$type>()] = <$type>::to_le_bytes($initial);
            assert_eq!(snapshot(statics::$single), vec![initial.to_vec(); 3]);
            check::<$type, _>(statics::$single, 0, |operation| operation.by_method(statics::$single));
            // And by a reference, in code that does not know which variable it is.
            check::<$type, _>(statics::$single, 0, |operation| operation.by_method(&&statics::$single));

            // By an address in a register: the middle one of three.
            let at = size_of::<$type>();
            let middle = |whole: PerCpuPtr<Lanes<$type>, Kernel>| whole.cast().byte_add(at).unwrap();
            let lanes = statics::$lanes.handle();
            assert_eq!(snapshot(lanes), vec![initial.repeat(3); 3]);
            // SAFETY: a static variable.
            check::<$type, _>(lanes, at, |operation| unsafe { operation.by_function(middle(lanes)) });

            // A dynamic variable.
            let lanes = alloc_percpu_in::<Lanes<$type>, Kernel>().unwrap();
            assert_eq!(snapshot(lanes), vec![vec![0; 3 * at]; 3]);
            // SAFETY: freed below.
            check::<$type, _>(lanes, at, |operation| unsafe { operation.by_function(middle(lanes)) });
            // SAFETY: nobody uses the variable any more.
            unsafe { free_percpu(lanes) }.unwrap();
        }
    )+};
}

types! {
    operations_on_u8: u8, U8, ONE_U8, 200;
    operations_on_u16: u16, U16, ONE_U16, 50_000;
    operations_on_u32: u32, U32, ONE_U32, 3_000_000_000;
    operations_on_u64: u64, U64, ONE_U64, 1 << 63 | 5;
    operations_on_i8: i8, I8, ONE_I8, -100;
    operations_on_i16: i16, I16, ONE_I16, -20_000;
    operations_on_i32: i32, I32, ONE_I32, i32::MIN;
    operations_on_i64: i64, I64, ONE_I64, i64::MIN + 1;
}

/// All fetches of the kernel's operations, those included that no method of a cell asks for.
fn check_fetches<W: Word>(cell: PerCpuPtr<u8, Kernel>) {
    let mut random = random_numbers(size_of::<W>() as u64);
    let _on = Cpu::enter(cpus().last().expect("some"));
    // SAFETY: here and below the variable lives, and is a word of this width.
    let mut model = unsafe { Gs::<Kernel>::read::<W>(cell.neutral()) };
    for _ in 0..STEPS {
        let (before, value) = (model, W::narrow(random()));
        let (wide, bits) = (before.widen(), value.widen());
        let (change, after) = match random() % 6 {
            0 => (Change::Set(value), bits),
            1 => (Change::Add(value), wide.wrapping_add(bits)),
            2 => (Change::And(value), wide & bits),
            3 => (Change::Or(value), wide | bits),
            4 => (Change::Xor(value), wide ^ bits),
            _ => (Change::Replace(before, value), bits),
        };
        model = W::narrow(after);
        // SAFETY: as above.
        let (found, left) = unsafe {
            let found = Gs::<Kernel>::fetch(cell.neutral(), change);
            (found, Gs::<Kernel>::read::<W>(cell.neutral()))
        };
        assert_eq!((found, left), (before, model), "{change:?}");
    }
}

#[test]
fn fetches_return_what_was() {
    let cell = alloc_percpu_in::<u64, Kernel>().unwrap().cast();
    check_fetches::<u8>(cell);
    check_fetches::<u16>(cell);
    check_fetches::<u32>(cell);
    check_fetches::<u64>(cell);
    // SAFETY: nobody uses the variable any more.
    unsafe { free_percpu(cell) }.unwrap();
}

#[test]
fn pairs_are_replaced_whole() {
    let at = statics::PAIR.handle().neutral();
    assert!(at.is_multiple_of(16));
    let mut random = random_numbers(7);
    let mut expected = snapshot(statics::PAIR);
    for cpu in cpus() {
        let _on = Cpu::enter(cpu);
        let mut model = [7_u64; 2];
        for _ in 0..STEPS {
            let mut old = model;
            // As it is, or another in one half or both.
            for (half, bit) in old.iter_mut().zip([1, 2]) {
                if random().is_multiple_of(4) {
                    *half ^= bit << (random() % 60);
                }
            }
            let new = [random(), random()];
            // SAFETY: the pair lives, is aligned, and this CPU is the only one to change its copy.
            let result = unsafe { replace_pair(at, old, new) };
            if old == model {
                assert_eq!(result, Ok(()));
                model = new;
            } else {
                assert_eq!(result, Err(model));
            }
            expected[cpu.index()] = model.map(u64::to_le_bytes).concat();
            assert_eq!(snapshot(statics::PAIR), expected);
        }
    }
}
