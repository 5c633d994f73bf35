//! Operations on more than one word where there is nothing but LOCKed steps: on a simulated machine, whose CPUs threads
//! change as they like.

#[path = "common/mix.rs"]
mod mix;
#[path = "common/slots.rs"]
mod model_of_slots;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::thread;

use pcpu::backing::sim::{Machine, Sim, SimAllocator};
use pcpu::this_cpu::portable::Portable;
use pcpu::this_cpu::{LocalOps, Pair, Put, RemotePairs};
use pcpu::unit::CpuId;
use pcpu::{
    AllocFlags, CpuBuffer, CpuPair, CpuStack, Domain, FreeFlags, Handle, Link, LocalBuffer,
    LocalPair, LocalStack, PerCpu, Request, drain_caches,
};

use model_of_slots::{Gates, Hand, Ledger, check_model};

const CPUS: u32 = 3;
const THREADS: u32 = 4;
const STEPS: u32 = 50_000;

thread_local! {
    static CURRENT_CPU: Cell<u32> = const { Cell::new(0) };
    static RANDOM: Cell<u64> = const { Cell::new(1) };
    /// Whether the thread comes to other CPUs by itself.
    static STAYS: Cell<bool> = const { Cell::new(false) };
}

enum Simulated {}

// SAFETY: the instance is made once, and is no other domain's.
unsafe impl Domain for Simulated {
    type Backing = Sim;
    type Lock = parking_lot::RawMutex;
    type Ops = Portable<Self>;

    fn allocator() -> &'static SimAllocator {
        static INSTANCE: OnceLock<SimAllocator> = OnceLock::new();
        INSTANCE.get_or_init(|| Machine::new(CPUS).build().expect("a small machine"))
    }

    /// Another CPU now and then, so that also the steps of one operation come to different ones.
    fn current_cpu() -> CpuId {
        let random = RANDOM.get().wrapping_mul(6_364_136_223_846_793_005) + 1;
        RANDOM.set(random);
        if (random >> 60) == 0 && !STAYS.get() {
            CURRENT_CPU.set((random >> 32) as u32 % CPUS);
        }
        CpuId::new(CURRENT_CPU.get())
    }
}

fn on_threads<R: Send>(work: impl Fn(u32) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("it passes"))
            .collect()
    })
}

#[test]
fn pairs() {
    let pair = PerCpu::<CpuPair<u64, i64>, Simulated>::new().expect("there is memory");
    on_threads(|_| {
        for _ in 0..STEPS {
            let (up, down) = pair.read();
            assert_eq!(up as i64, -down);
            pair.update(|(up, down)| (up + 1, down - 1));
        }
    });
    let sums = pair
        .iter()
        .map(|(_, copy)| copy.read_remote())
        .fold((0, 0), |sums, (up, down)| (sums.0 + up, sums.1 + down));
    let steps = u64::from(THREADS * STEPS);
    assert_eq!(sums, (steps, -(steps as i64)));
}

#[test]
fn slots_are_taken_and_put_as_in_the_model() {
    const STEPS: u64 = 100_000;
    let runs = PerCpu::<CpuPair<u64>, Simulated>::new().expect("there is memory");
    let at = runs.handle().neutral();
    on_threads(|thread| {
        if thread < CPUS {
            CURRENT_CPU.set(thread);
            STAYS.set(true);
            // SAFETY: the pair lives; the thread stays on its CPU.
            unsafe {
                check_model::<Portable<Simulated>>(at, thread.into(), STEPS, Gates::Ignored);
            }
        }
    });
}

#[test]
fn a_slot_has_one_owner() {
    // How many operations there are to one that takes all free slots from all CPUs.
    const UNTIL_DRAIN: u64 = 256;
    type Ops = Portable<Simulated>;
    assert_eq!(Ops::remote_pairs(), RemotePairs::ByLockedStep);
    let runs = PerCpu::<CpuPair<u64>, Simulated>::new().expect("there is memory");
    let at = runs.handle().neutral();
    let copies = || runs.iter().map(|(_, copy)| copy);
    let ledger = Ledger::new();
    let hands = on_threads(|thread| {
        let hand = Hand::new(thread as usize);
        for _ in 0..10 * STEPS {
            // SAFETY: the pair lives, and only the ledger changes it.
            unsafe {
                if hand.random().is_multiple_of(UNTIL_DRAIN) {
                    let copies = copies().map(|copy| (&raw const *copy).cast_mut().cast());
                    ledger.drain::<Ops>(&hand, copies);
                } else {
                    ledger.step::<Ops>(at, &hand);
                }
            }
        }
        hand
    });
    let words = |copy: &CpuPair<u64>| Pair::from(copy.read_remote());
    ledger.settle(&hands, copies().map(words));
}

struct Token {
    number: u32,
    link: Link,
}

pcpu::stack_node!(Token { link });

#[test]
fn stacks() {
    const TOKENS: u32 = 10;
    let mut stack = PerCpu::<CpuStack<Box<Token>>, Simulated>::new().expect("there is memory");
    for number in 0..TOKENS {
        let link = Link::new();
        stack.push(Box::new(Token { number, link }));
    }
    on_threads(|_| {
        for step in 0..STEPS {
            let held = [stack.pop(), stack.pop()];
            held.into_iter()
                .flatten()
                .for_each(|token| stack.push(token));
            if step % 100 == 0 {
                stack.pop_all().for_each(|token| stack.push(token));
            }
        }
    });
    let tokens = stack.iter_mut().flat_map(|(_, copy)| copy.take_all());
    let mut numbers: Vec<_> = tokens.map(|token| token.number).collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..TOKENS));
}

#[test]
fn buffers() {
    const ROOM: usize = 7;
    let mut buffer = PerCpu::<CpuBuffer<[u8; 3], ROOM>, Simulated>::new().expect("there is memory");
    let sum = |items: &[[u8; 3]]| -> u64 {
        let value = |[a, b, c]: [u8; 3]| {
            assert_eq!(c, a ^ b, "torn");
            u64::from(a)
        };
        items.iter().copied().map(value).sum()
    };
    let sums = on_threads(|thread| {
        let (mut appended, mut taken) = (0, 0);
        for step in 0..STEPS {
            let (a, b) = (step as u8, thread as u8);
            match buffer.append([a, b, a ^ b]) {
                Ok(()) => appended += u64::from(a),
                Err(_) => taken += sum(buffer.take(&mut [MaybeUninit::uninit(); ROOM])),
            }
        }
        (appended, taken)
    });
    let left: u64 = buffer.iter_mut().map(|(_, copy)| sum(copy.items())).sum();
    let appended: u64 = sums.iter().map(|sums| sums.0).sum();
    let taken: u64 = sums.iter().map(|sums| sums.1).sum();
    assert!(taken > 0);
    assert_eq!(appended, taken + left);
}

enum Partial {}

// SAFETY: the instance is made once, and is no other domain's.
unsafe impl Domain for Partial {
    type Backing = Sim;
    type Lock = parking_lot::RawMutex;
    type Ops = Portable<Self>;

    fn allocator() -> &'static SimAllocator {
        static INSTANCE: OnceLock<SimAllocator> = OnceLock::new();
        let machine = Machine::new(CPUS).online(1);
        INSTANCE.get_or_init(|| machine.build().expect("a small machine"))
    }

    fn current_cpu() -> CpuId {
        CpuId::new(CURRENT_CPU.get())
    }
}

/// A CPU without memory has no run: it neither gets memory there, for that would be done with the lock held, nor another CPU's run.
#[test]
fn a_cpu_without_memory_has_no_slots() {
    type Ops = Portable<Partial>;
    const RUN: Pair = [0b1010, 7];
    let [here, absent] = [0, 2].map(CpuId::new);
    let pcpu = Partial::allocator();
    let runs = PerCpu::<CpuPair<u64>, Partial>::new().expect("there is memory");
    let at = runs.handle().neutral();
    let gate = AtomicU32::new(0);
    CURRENT_CPU.set(here.get());
    runs.update(|_| RUN.into());
    CURRENT_CPU.set(absent.get());
    let calls = pcpu.backing().fallible_calls();
    // SAFETY: the pair lives, and only this thread uses it.
    unsafe {
        assert_eq!(Ops::peek_pair(at), None);
        assert_eq!(Ops::take_slot(at, 0, 0, &gate), None);
        assert_eq!(Ops::put_slot(at, RUN[1], 1, &gate), Put::Elsewhere);
        assert!(!Ops::replace_pair_gated(at, RUN, [0, 0], &gate));
        assert!(!Ops::replace_pair_gated(at, [0, 0], RUN, &gate));
    }
    assert!(!pcpu.units().materialised().contains(absent));
    assert_eq!(pcpu.backing().fallible_calls(), calls);
    CURRENT_CPU.set(here.get());
    // SAFETY: as above.
    let kept = unsafe { Ops::peek_pair(at) };
    assert_eq!(kept, Some(RUN), "nobody has touched it");
}

/// A machine with caches, two of whose four CPUs are up, and a CPU for each thread that says where it is.
enum Cached {}

// SAFETY: the instance is made once, and is no other domain's.
unsafe impl Domain for Cached {
    type Backing = Sim;
    type Lock = parking_lot::RawMutex;
    type Ops = Portable<Self>;

    fn allocator() -> &'static SimAllocator {
        static INSTANCE: OnceLock<SimAllocator> = OnceLock::new();
        INSTANCE.get_or_init(|| {
            let mut pcpu = Machine::new(4).online(2).checked().build().unwrap();
            pcpu.enable_caches().unwrap();
            pcpu
        })
    }

    fn current_cpu() -> CpuId {
        CpuId::new(CURRENT_CPU.get())
    }
}

#[test]
fn requests_go_to_the_cache_of_the_cpu_that_they_come_from() {
    let request = Request::new(24, 8);
    let free = |area| {
        // SAFETY: nobody uses the area.
        unsafe { Cached::free(area, FreeFlags::empty()) }.unwrap();
    };
    let areas = [0, 1].map(|cpu| {
        CURRENT_CPU.set(cpu);
        Cached::allocate(&request).unwrap()
    });
    for cpu in [0, 1, 1, 0] {
        CURRENT_CPU.set(cpu);
        free(areas[cpu as usize]);
        assert_eq!(Cached::allocate(&request), Ok(areas[cpu as usize]));
    }

    // One that has no memory gets it from a request that may sleep, and from nothing else that has to do with areas.
    CURRENT_CPU.set(3);
    let has_memory = || Cached::units().materialised().contains(CpuId::new(3));
    let atomic = request.with_flags(AllocFlags::ATOMIC);
    free(Cached::allocate(&atomic).unwrap());
    drain_caches::<Cached>();
    assert!(!has_memory());
    let area = Cached::allocate(&request).unwrap();
    assert!(has_memory());
    free(area);
    assert_eq!(Cached::allocate(&request), Ok(area));
    free(area);
    drain_caches::<Cached>();
    CURRENT_CPU.set(2);
    let mut batch = [0; 5];
    Cached::allocate_many(&request, &mut batch).unwrap();
    assert!(Cached::units().materialised().contains(CpuId::new(2)));
}
