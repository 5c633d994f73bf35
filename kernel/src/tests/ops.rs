//! The operations on the current CPU's copy, of every kind, on all CPUs at once: each CPU finds in its copy what it did, and
//! nothing of what the others did. Operations with interrupts in between: `op_sweeps.rs`.

use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU32, Ordering};

use lock_api::Mutex;
use pcpu::this_cpu::gs::{IrqLock, Masked};
use pcpu::this_cpu::pinned::{Pinned, PreemptionChecked};
use pcpu::unit::CpuId;
use pcpu::{
    CpuBuffer, CpuCell, CpuPair, CpuStack, Full, Link, LocalBuffer, LocalCell, LocalPair,
    LocalStack, PerCpu, define_per_cpu_in, stack_node,
};
use x86_64::instructions::interrupts;

use super::{Test, Why, all_right};
use crate::cpus::work::{nr_online, online};
use crate::ensure;
use crate::memory::areas;
use crate::percpu::{Kernel, copy, current_cpu};

pub const TESTS: &[Test] = &[
    Test::new("every operation on a cell of every width", cells),
    Test::new("a pair changes as one on every CPU", pairs),
    Test::new("a stack on every CPU gives back what it got", stacks),
    Test::new("a buffer on every CPU keeps order and limit", buffers),
    Test::new("guards: interrupts masked, and staying on a CPU", guards),
    Test::new("a lock masks interrupts, and counts on every CPU", locks),
];

const ROUNDS: u64 = 200;

define_per_cpu_in! {
    in Kernel;

    static BYTE: CpuCell<u8> = CpuCell::new(0);
    static SHORT: CpuCell<i16> = CpuCell::new(0);
    static LONG: CpuCell<u32> = CpuCell::new(0);
    static QUAD: CpuCell<i64> = CpuCell::new(0);
    static PAIR: CpuPair<u64> = CpuPair::new(1, 2);
    static STACK: CpuStack<&'static mut Item> = CpuStack::new();
    static BUFFER: CpuBuffer<u64, BUFFER_ITEMS> = CpuBuffer::new();
    static SHARED: AtomicU32 = AtomicU32::new(7);
}

/// What hangs on a stack.
pub struct Item {
    link: Link,
    /// Tells it from the others.
    pub number: u64,
}

stack_node!(Item { link });

impl Item {
    /// One that is on no stack.
    pub const fn new(number: u64) -> Self {
        Self {
            link: Link::new(),
            number,
        }
    }
}

const BUFFER_ITEMS: usize = 8;

/// Every operation of a cell, with values that are different on every CPU.
macro_rules! ops_agree {
    ($variable:expr, $type:ty, $cpu:expr) => {{
        let (variable, cpu) = (&$variable, $cpu.get() as $type);
        variable.write(cpu);
        let mut expected = cpu;
        let mut right = true;
        for round in 0..ROUNDS {
            let value = (round as $type).wrapping_mul(37).wrapping_add(cpu);
            variable.inc();
            variable.add(value);
            variable.sub(3);
            variable.xor(value);
            variable.or(0x21);
            variable.and(!4);
            variable.dec();
            expected = expected.wrapping_add(1).wrapping_add(value).wrapping_sub(3) ^ value;
            expected = ((expected | 0x21) & !4).wrapping_sub(1);
            right &= variable.read() == expected;
            expected = expected.wrapping_add(value);
            right &= variable.add_return(value) == expected;
            right &= variable.xchg(value) == expected;
            right &= variable.cmpxchg(value.wrapping_add(1), 0) == Err(value);
            right &= variable.cmpxchg(value, expected) == Ok(value);
            right &= variable.update(|it| it.wrapping_add(1)) == expected;
            expected = expected.wrapping_add(1);
        }
        right && variable.read() == expected
    }};
}

fn cells() -> Result<(), Why> {
    all_right(|cpu| {
        ops_agree!(BYTE, u8, cpu)
            && ops_agree!(SHORT, i16, cpu)
            && ops_agree!(LONG, u32, cpu)
            && ops_agree!(QUAD, i64, cpu)
    })?;
    // The same by the handle in a register.
    let byte = PerCpu::<CpuCell<i8>, Kernel>::new()?;
    let short = PerCpu::<CpuCell<u16>, Kernel>::new()?;
    let long = PerCpu::<CpuCell<i32>, Kernel>::new()?;
    let quad = PerCpu::<CpuCell<u64>, Kernel>::new()?;
    all_right(|cpu| {
        ops_agree!(byte, i8, cpu)
            && ops_agree!(short, u16, cpu)
            && ops_agree!(long, i32, cpu)
            && ops_agree!(quad, u64, cpu)
    })?;
    // Neighbours of a narrow word keep their values.
    all_right(|_| {
        let (before, long) = (SHORT.read(), LONG.read());
        BYTE.write(u8::MAX);
        BYTE.inc();
        BYTE.read() == 0 && SHORT.read() == before && LONG.read() == long
    })
}

fn pairs() -> Result<(), Why> {
    let dynamic = PerCpu::<CpuPair<u64>, Kernel>::new()?;
    let is_right = |pair: &dyn Fn() -> (u64, u64), start: (u64, u64), cpu: CpuId| {
        let step = u64::from(cpu.get()) + 1;
        pair() == (start.0 + ROUNDS * step, start.1 + 2 * ROUNDS * step)
    };
    all_right(|cpu| {
        let step = u64::from(cpu.get()) + 1;
        for _ in 0..ROUNDS {
            PAIR.update(|(one, two)| (one + step, two + 2 * step));
            dynamic.update(|(one, two)| (one + step, two + 2 * step));
        }
        let now = PAIR.read();
        // Half of it is right, which is not enough.
        let refused = [(now.0, 0), (0, now.1)].map(|old| PAIR.cmpxchg(old, (0, 0)));
        refused == [Err(now); 2]
            && PAIR.xchg((5, 6)) == now
            && PAIR.cmpxchg((5, 6), now) == Ok((5, 6))
            && is_right(&|| PAIR.read(), (1, 2), cpu)
            && is_right(&|| dynamic.read(), (0, 0), cpu)
    })?;
    for cpu in online() {
        // SAFETY: the copy of a static variable stays.
        let seen = unsafe { &*copy(&PAIR, cpu) }.read_remote();
        ensure!(
            is_right(&|| seen, (1, 2), cpu),
            "CPU {cpu}: {seen:?} from afar"
        );
    }
    let step = u64::from(nr_online() * (nr_online() + 1) / 2);
    if online().last().map(CpuId::get) == Some(nr_online() - 1) {
        let sum = dynamic.iter().map(|(_, pair)| pair.read_remote().0);
        ensure!(sum.sum::<u64>() == ROUNDS * step, "a wrong sum");
    }
    Ok(())
}

fn stacks() -> Result<(), Why> {
    const ITEMS: u64 = 20;
    all_right(|cpu| {
        let number = |index: u64| u64::from(cpu.get()) << 32 | index;
        let items = areas::made(ITEMS as usize, |index| Item::new(number(index as u64)));
        items.iter_mut().for_each(|item| STACK.push(item));
        // The last pushed comes first; what is pushed again is the next.
        for index in (ITEMS / 2..ITEMS).rev() {
            let Some(item) = STACK.pop() else {
                return false;
            };
            if item.number != number(index) {
                return false;
            }
            STACK.push(item);
            if STACK
                .pop()
                .is_none_or(|again| again.number != number(index))
            {
                return false;
            }
        }
        let left = STACK.pop_all().map(|item| item.number);
        left.eq((0..ITEMS / 2).rev().map(number)) && STACK.pop().is_none()
    })
}

fn buffers() -> Result<(), Why> {
    let dynamic = PerCpu::<CpuBuffer<u64, BUFFER_ITEMS>, Kernel>::new()?;
    all_right(|cpu| {
        let item = |index: u64| u64::from(cpu.get()) << 32 | index;
        let mut room = [MaybeUninit::uninit(); BUFFER_ITEMS];
        (0..ROUNDS).all(|round| {
            let of_round: [u64; BUFFER_ITEMS] =
                core::array::from_fn(|index| item(round + index as u64));
            let appended = BUFFER.append(of_round[0]).is_ok()
                && BUFFER.append_all(&of_round[1..5]).is_ok()
                && BUFFER.append_all(&of_round[5..]).is_ok();
            let refused = BUFFER.append(item(0)) == Err(Full(item(0)));
            let dynamic_appended = dynamic.append_all(&of_round).is_ok();
            appended
                && refused
                && dynamic_appended
                && *BUFFER.take(&mut room) == of_round
                && BUFFER.take(&mut room).is_empty()
                && *dynamic.take(&mut room) == of_round
        })
    })
}

fn guards() -> Result<(), Why> {
    all_right(|cpu| {
        let enabled = interrupts::are_enabled();
        // SAFETY: in ring 0, and the inner one goes first.
        let outer = unsafe { Masked::new() };
        // SAFETY: as above.
        let inner = unsafe { Masked::new() };
        drop(inner);
        let masked = !interrupts::are_enabled();
        drop(outer);
        let pinned = Pinned::<Kernel>::new();
        pinned.of(&SHARED).fetch_add(cpu.get(), Ordering::Relaxed);
        LONG.checked().write(cpu.get());
        enabled && masked && interrupts::are_enabled() && pinned.cpu() == current_cpu()
    })?;
    for cpu in online() {
        // SAFETY: the copy of a static variable stays.
        let (shared, long) = unsafe { (&*copy(&SHARED, cpu), &*copy(&LONG, cpu)) };
        let (shared, long) = (shared.load(Ordering::Relaxed), long.read_remote());
        ensure!(
            shared == 7 + cpu.get() && long == cpu.get(),
            "CPU {cpu}: {shared}, {long}"
        );
    }
    Ok(())
}

/// Interrupts are as before when the lock is free again, also where it was taken within another, or was not to be had.
fn locks() -> Result<(), Why> {
    static COUNT: Mutex<IrqLock, u64> = Mutex::new(0);
    static OWN: Mutex<IrqLock, ()> = Mutex::new(());
    all_right(|_| {
        (0..ROUNDS).all(|_| {
            let mut count = COUNT.lock();
            *count += 1;
            let masked = !interrupts::are_enabled() && COUNT.is_locked();
            let own = OWN.lock();
            let refused = OWN.try_lock().is_none();
            drop(own);
            let still_masked = !interrupts::are_enabled();
            drop(count);
            masked && refused && still_masked && interrupts::are_enabled()
        })
    })?;
    let (count, expected) = (*COUNT.lock(), ROUNDS * u64::from(nr_online()));
    ensure!(count == expected, "{count}, not {expected}");
    let held = OWN.lock();
    let refused = OWN.try_lock().is_none() && !interrupts::are_enabled();
    drop(held);
    ensure!(
        refused && interrupts::are_enabled(),
        "masked for good, or not at all"
    );
    Ok(())
}
