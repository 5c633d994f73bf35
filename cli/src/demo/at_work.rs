//! What programs do with per-CPU variables, each kind by threads on every CPU at once, and the whole of it checked.

use std::array;
use std::mem::MaybeUninit;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};

use pcpu::refcount::Kill;
use pcpu::{
    AllocError, BatchCounter, Counter, CpuBuffer, CpuCell, CpuLock, CpuPair, CpuStack, FromZeros,
    Link, LocalBuffer, LocalCell, LocalLock, LocalPair, LocalStack, Parts, PerCpu, RefCount,
    RemoteCell, define_per_cpu, field,
};

use super::checks::Checks;
use super::seats;
use crate::error::CliError;

/// How often each thread does each thing.
const TIMES: u64 = 100_000;

define_per_cpu! {
    static BITS: CpuCell<u32> = CpuCell::new(0);
    static SERVED: CpuPair<u64> = CpuPair::new(0, 0);
}

/// Runs all of it.
///
/// # Errors
/// One line, if a thread could not do its work.
pub fn all(checks: &mut Checks) -> Result<(), CliError> {
    let no_memory = |error: AllocError| CliError::Failed(error.to_string());
    scalars(checks)?;
    pairs(checks)?;
    stacks(checks).map_err(no_memory)??;
    buffers(checks).map_err(no_memory)??;
    histograms(checks).map_err(no_memory)??;
    fields(checks).map_err(no_memory)??;
    locks(checks).map_err(no_memory)??;
    counters(checks).map_err(no_memory)??;
    references(checks).map_err(no_memory)?
}

/// What checks come to, or no memory for what is checked.
type Checked = Result<Result<(), CliError>, AllocError>;

/// Operations on one word, against what is known of the word.
fn scalars(checks: &mut Checks) -> Result<(), CliError> {
    let threads = seats::on_all(|cpu| {
        // The thread that wanders shares its copy with others, and may flip bits only, which all others ignore.
        let Some(_) = cpu else {
            (0..2 * TIMES).for_each(|_| BITS.xor(1 << 31));
            return true;
        };
        let low = |bits: u32| bits & 0xffff;
        BITS.and(1 << 31);
        BITS.or(0b1100);
        BITS.xor(0b0110);
        let are_set = low(BITS.read()) == 0b1010;
        BITS.add(5);
        BITS.sub(1);
        BITS.inc();
        BITS.dec();
        let are_added = low(BITS.add_return(2)) == 16;
        let before = BITS.update(|bits| bits & 1 << 31 | 7);
        are_set && are_added && low(before) == 16 && low(BITS.read()) == 7
    })?;
    let wrong = threads.iter().find(|(_, is_right)| !is_right);
    checks.check(
        format_args!(
            "and, or, xor, add, sub, add_return, update: as said, on {} CPUs beside a thread that wanders",
            threads.len() - 1
        ),
        wrong.map_or(Ok(()), |(cpu, _)| Err(format!("not on {cpu:?}"))),
    )
}

fn pairs(checks: &mut Checks) -> Result<(), CliError> {
    let threads = seats::on_all(|_| {
        let are_together = |_| {
            let (requests, nanos) = SERVED.update(|(requests, nanos)| (requests + 1, nanos + 350));
            nanos == requests * 350
        };
        (0..TIMES).all(are_together)
    })?;
    let wrong = threads.iter().filter(|(_, is_right)| !is_right).count();
    checks.equal(
        format_args!(
            "{} changes of two words at once, which never part",
            threads.len() as u64 * TIMES
        ),
        wrong,
        0,
    )
}

struct Token {
    number: u64,
    link: Link,
}

pcpu::stack_node!(Token { link });

fn stacks(checks: &mut Checks) -> Checked {
    const TOKENS: u64 = 100;
    let mut stack = PerCpu::<CpuStack<Box<Token>>>::new()?;
    for number in 0..TOKENS {
        let link = Link::new();
        stack.push(Box::new(Token { number, link }));
    }
    let threads = seats::on_all(|_| {
        for _ in 0..TIMES {
            let held = [stack.pop(), stack.pop()];
            held.into_iter()
                .flatten()
                .for_each(|token| stack.push(token));
        }
    });
    let tokens = stack.iter_mut().flat_map(|(_, list)| list.take_all());
    let mut numbers: Vec<_> = tokens.map(|token| token.number).collect();
    numbers.sort_unstable();
    Ok(threads.and_then(|threads| {
        checks.check(
            format_args!(
                "{TOKENS} nodes on per-CPU stacks, none lost and none twice after {} pops",
                2 * threads.len() as u64 * TIMES
            ),
            numbers
                .iter()
                .copied()
                .eq(0..TOKENS)
                .then_some(())
                .ok_or("not all are there"),
        )
    }))
}

fn buffers(checks: &mut Checks) -> Checked {
    const ROOM: usize = 100;
    let mut buffer = PerCpu::<CpuBuffer<u64, ROOM>>::new()?;
    let threads = seats::on_all(|_| {
        let mut taken = 0;
        for item in 0..TIMES {
            while buffer.append(item).is_err() {
                taken += buffer
                    .take(&mut [MaybeUninit::uninit(); ROOM])
                    .iter()
                    .sum::<u64>();
            }
        }
        taken
    });
    let left: u64 = buffer
        .iter_mut()
        .map(|(_, copy)| copy.items().iter().sum::<u64>())
        .sum();
    Ok(threads.and_then(|threads| {
        let taken: u64 = threads.iter().map(|(_, taken)| taken).sum();
        let items = threads.len() as u64;
        checks.equal(
            format_args!(
                "{} items appended to per-CPU buffers and taken in batches",
                items * TIMES
            ),
            taken + left,
            items * (0..TIMES).sum::<u64>(),
        )
    }))
}

fn histograms(checks: &mut Checks) -> Checked {
    let histogram = PerCpu::<[CpuCell<u32>]>::new_slice(17)?;
    let threads = seats::on_all(|_| {
        (1..=TIMES).for_each(|value| histogram.at(value.ilog2() as usize).inc());
    });
    Ok(threads.and_then(|threads| {
        let sums: [u32; 17] = array::from_fn(|bucket| histogram.at(bucket).sum());
        let want = |bucket: usize| {
            let values = (1_u64 << bucket)..(2_u64 << bucket).min(TIMES + 1);
            threads.len() as u32 * (values.end - values.start) as u32
        };
        checks.equal(
            "a histogram of 17 buckets that all CPUs counted in",
            sums,
            array::from_fn(want),
        )
    }))
}

#[derive(FromZeros)]
#[zerocopy(crate = "pcpu::zerocopy")]
struct Lookups {
    hits: CpuCell<u64>,
    misses: CpuCell<u64>,
}

fn fields(checks: &mut Checks) -> Checked {
    let lookups = PerCpu::<Lookups>::new()?;
    let (hits, misses) = (field!(Lookups, hits), field!(Lookups, misses));
    let threads = seats::on_all(|_| {
        for number in 0..TIMES {
            let is_miss = number.is_multiple_of(10);
            lookups.field(if is_miss { misses } else { hits }).inc();
        }
    });
    Ok(threads.and_then(|threads| {
        let all = threads.len() as u64 * TIMES;
        checks.equal(
            "two counters in one area, each a variable of its own",
            (lookups.field(hits).sum(), lookups.field(misses).sum()),
            (all / 10 * 9, all / 10),
        )
    }))
}

fn locks(checks: &mut Checks) -> Checked {
    let lock = PerCpu::<CpuLock<[u64; 2]>>::new()?;
    let threads = seats::on_all(|_| {
        for _ in 0..TIMES {
            lock.with(|[a, b]| {
                *a += 1;
                *b += *a;
            });
        }
    });
    Ok(threads.and_then(|threads| {
        let cpus = pcpu::global().units().materialised();
        let on = |cpu| {
            let values = lock.with_on(cpu, |values| *values);
            values.map_err(|error| CliError::Failed(error.to_string()))
        };
        let values: Vec<[u64; 2]> = cpus.iter().map(on).collect::<Result<_, _>>()?;
        let is_whole = |&[a, b]: &[u64; 2]| b == a * (a + 1) / 2;
        checks.equal(
            "a value on every CPU under its own lock, worked on from its CPU and read from elsewhere",
            (
                values.iter().map(|[a, _]| a).sum(),
                values.iter().all(is_whole),
            ),
            (threads.len() as u64 * TIMES, true),
        )
    }))
}

fn counters(checks: &mut Checks) -> Checked {
    const BATCH: NonZeroU32 = NonZeroU32::new(32).unwrap();
    let (exact, batched) = (Counter::new(-5)?, BatchCounter::new(-5, BATCH)?);
    let threads = seats::on_all(|_| {
        for _ in 0..TIMES {
            exact.inc();
            batched.add(3);
        }
    });
    Ok(threads.and_then(|threads| {
        let adds = threads.len() as i64 * TIMES as i64;
        let error = batched.read().abs_diff(3 * adds - 5);
        checks.equal(
            format_args!(
                "a counter, and one whose value is known at any time to within {}: off by {error}",
                batched.error_bound()
            ),
            (exact.sum(), batched.sum(), error <= batched.error_bound()),
            (adds - 5, 3 * adds - 5, true),
        )
    }))
}

fn references(checks: &mut Checks) -> Checked {
    let released = AtomicU64::new(0);
    let count = RefCount::new(|| {
        released.fetch_add(1, Ordering::Relaxed);
    })?;
    let held = count.try_get();
    let threads = seats::on_all(|_| (0..TIMES).all(|_| count.try_get().is_some()));
    let kill = count.kill();
    let is_refused = count.try_get().is_none();
    let before = released.load(Ordering::Relaxed);
    drop(held);
    let after = released.load(Ordering::Relaxed);
    Ok(threads.and_then(|threads| {
        let kill = kill.map_err(|error| CliError::Failed(error.to_string()))?;
        checks.equal(
            "references taken on all CPUs; killed, none is given any more, and the last one tells once",
            (
                threads.iter().all(|(_, were_given)| *were_given),
                kill,
                is_refused,
                (before, after),
            ),
            (true, Kill::Held, true, (0, 1)),
        )
    }))
}
