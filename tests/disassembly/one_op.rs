//! A function for every operation, to look at its machine code; see `tests/disassembly.rs`.
//!
//! Each is exported as `op.OPERATION.WIDTH.WHERE`. Where is `here` for a static variable of this crate, `there` for one
//! of another crate, the name of a section for one of another crate in that section, `dynamic` for a handle that comes in a
//! register. `op.handle.u64.WHERE` is the handle itself. Parts of variables are beside these.

#[macro_use]
#[path = "../common/one_op_macros.rs"]
mod one_op_macros;

use std::sync::atomic::AtomicU32;

use counters::{CACHE_ALIGNED, FIRST, PAGE_ALIGNED, READ_MOSTLY};
use counters::{THERE_PAIR, THERE_U8, THERE_U16, THERE_U32, THERE_U64};
use pcpu::this_cpu::{LocalOps, Pair};
use pcpu::{
    CpuBuffer, CpuCell, CpuPair, CpuStack, Domain, Field, Global, Handle, Link, LocalBuffer, LocalCell, LocalPair,
    LocalStack, Parts, PerCpu, PerCpuPtr, define_per_cpu, field,
};

define_per_cpu! {
    static HERE_U8: CpuCell<u8> = CpuCell::new(0);
    static HERE_U16: CpuCell<u16> = CpuCell::new(0);
    static HERE_U32: CpuCell<u32> = CpuCell::new(0);
    static HERE_U64: CpuCell<u64> = CpuCell::new(0);
    static PAIR: CpuPair<u64> = CpuPair::new(0, 0);
    static STACK: CpuStack<&'static mut Node> = CpuStack::new();
    static BUFFER: CpuBuffer<u64, 16> = CpuBuffer::new();
}

#[repr(C)]
struct Node {
    link: Link,
}
pcpu::stack_node!(Node { link });

macro_rules! handle_of_static {
    ($place:literal, $variable:ident) => {
        keep!("handle", u64, $place, () -> usize, $variable.handle().neutral());
    };
}

/// A handle in a register.
type Cell<T> = PerCpuPtr<CpuCell<T>>;

/// Operations on more than one word.
fn on_words() {
    keep!("pair.read", u64, "here", () -> bool, PAIR.read() == (1, 2));
    keep!("pair.read", u64, "there", () -> bool, THERE_PAIR.read() == (1, 2));
    keep!("pair.cmpxchg", u64, "here", (a: u64, b: u64) -> bool, PAIR.cmpxchg((a, b), (b, a)).is_ok());
    keep!("pair.cmpxchg", u64, "there", (a: u64, b: u64) -> bool, THERE_PAIR.cmpxchg((a, b), (b, a)).is_ok());
    keep!("stack.push", Node, "here", (node: &'static mut Node), STACK.push(node));
    keep!("stack.pop", Node, "here", () -> bool, STACK.pop().is_some());
    keep!("buffer.append", u64, "here", (item: u64) -> bool, BUFFER.append(item).is_ok());
}

/// Operations on a run whose handle is in a register.
fn on_slots() {
    type Ops = <Global as Domain>::Ops;
    // SAFETY: nobody calls these.
    keep!("slot.take", u64, "dynamic", (at: usize, class: u64, mask: u64, gate: &AtomicU32, pair: &mut Pair) -> bool, {
        unsafe { Ops::take_slot(at, class, mask, gate) }.map(|taken| *pair = taken).is_some()
    });
    // SAFETY: as above.
    keep!("slot.put", u64, "dynamic", (at: usize, run: u64, slot: u64, gate: &AtomicU32) -> u8, {
        unsafe { Ops::put_slot(at, run, slot, gate) as u8 }
    });
    // SAFETY: as above.
    keep!("slot.replace", u64, "dynamic", (at: usize, old: &Pair, new: &Pair, gate: &AtomicU32) -> bool, {
        unsafe { Ops::replace_pair_gated(at, *old, *new, gate) }
    });
}

/// Two cells in one variable; what is looked at is the second.
struct Two {
    _first: CpuCell<u64>,
    second: CpuCell<u64>,
}

define_per_cpu! {
    static TWO: Two = Two { _first: CpuCell::new(0), second: CpuCell::new(0) };
    static ROW: [CpuCell<u64>; 8] = [const { CpuCell::new(0) }; 8];
}

/// Operations on parts of variables.
fn parts() {
    const SECOND: Field<Two, CpuCell<u64>> = field!(Two, second);
    keep!("add", u64, "static_field", (value: u64), TWO.field(SECOND).add(value));
    keep!("read", u64, "static_field", () -> u64, TWO.field(SECOND).read());
    keep!("add", u64, "static_element", (value: u64), ROW.element(5).add(value));
    keep!("add", u64, "owner", (owner: &PerCpu<CpuCell<u64>>, value: u64), owner.add(value));
    keep!("add", u64, "owner_field", (owner: &PerCpu<Two>, value: u64), owner.field(SECOND).add(value));
}

fn main() {
    on_words();
    on_slots();
    parts();
    on_static!(u8, "here", HERE_U8);
    on_static!(u16, "here", HERE_U16);
    on_static!(u32, "here", HERE_U32);
    on_static!(u64, "here", HERE_U64);
    on_static!(u8, "there", THERE_U8);
    on_static!(u16, "there", THERE_U16);
    on_static!(u32, "there", THERE_U32);
    on_static!(u64, "there", THERE_U64);
    on_static!(u64, "first", FIRST);
    on_static!(u64, "page_aligned", PAGE_ALIGNED);
    on_static!(u64, "read_mostly", READ_MOSTLY);
    on_static!(u64, "cache_aligned", CACHE_ALIGNED);
    handle_of_static!("here", HERE_U64);
    handle_of_static!("there", THERE_U64);
    handle_of_static!("first", FIRST);
    handle_of_static!("page_aligned", PAGE_ALIGNED);
    handle_of_static!("read_mostly", READ_MOSTLY);
    handle_of_static!("cache_aligned", CACHE_ALIGNED);
    on_dynamic!(u8);
    on_dynamic!(u16);
    on_dynamic!(u32);
    on_dynamic!(u64);
    let sections = FIRST.add_return(1)
        + PAGE_ALIGNED.add_return(2)
        + READ_MOSTLY.add_return(4)
        + CACHE_ALIGNED.add_return(8);
    println!(
        "{}",
        HERE_U64.add_return(2) + THERE_U64.add_return(25) + sections
    );
}
