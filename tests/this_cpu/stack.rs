//! Stacks: the order of nodes, who drops them, and that every node is in one place.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pcpu::{CpuStack, Link, LocalStack, PerCpu, define_per_cpu};

use crate::crew::{Crew, without_restartable_sequences};
use crate::mix::mix;
use crate::system::{allowed_cpus, on_cpu};
use crate::whirl::{Handlers, whirl};

#[derive(Debug)]
struct Token {
    number: u32,
    /// The link is not the first field.
    link: Link,
    is_taken: AtomicBool,
    drops: &'static AtomicUsize,
}

pcpu::stack_node!(Token { link });

impl Drop for Token {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
    }
}

fn token(number: u32, drops: &'static AtomicUsize) -> Box<Token> {
    Box::new(Token {
        number,
        link: Link::new(),
        is_taken: AtomicBool::new(false),
        drops,
    })
}

define_per_cpu! {
    static STACK: CpuStack<Box<Token>> = CpuStack::new();
}

#[test]
fn the_last_is_the_first() {
    static DROPS: AtomicUsize = AtomicUsize::new(0);
    for cpu in allowed_cpus() {
        on_cpu(cpu, || {
            assert!(STACK.pop().is_none());
            (0..5).for_each(|number| STACK.push(token(number, &DROPS)));
            assert_eq!(STACK.pop().map(|node| node.number), Some(4));
            STACK.push(token(9, &DROPS));
            let mut chain = STACK.pop_all();
            assert_eq!(chain.next().map(|node| node.number), Some(9));
            assert!(STACK.pop().is_none());
            let others: Vec<_> = chain.map(|node| node.number).collect();
            assert_eq!(others, [3, 2, 1, 0]);
        });
    }
    assert_eq!(DROPS.load(Ordering::Relaxed), 6 * allowed_cpus().len());
}

#[test]
fn nodes_are_dropped_with_their_stack() {
    static DROPS: AtomicUsize = AtomicUsize::new(0);
    let stack = PerCpu::<CpuStack<Box<Token>>>::new().expect("there is memory");
    for cpu in allowed_cpus() {
        on_cpu(cpu, || {
            (0..3).for_each(|number| stack.push(token(number, &DROPS)))
        });
    }
    let mut chain = on_cpu(allowed_cpus()[0], || stack.pop_all());
    drop(chain.next());
    assert_eq!(DROPS.load(Ordering::Relaxed), 1);
    drop(chain);
    assert_eq!(DROPS.load(Ordering::Relaxed), 3);
    drop(stack);
    assert_eq!(DROPS.load(Ordering::Relaxed), 3 * allowed_cpus().len());
}

#[test]
fn nodes_without_a_heap() {
    let node: &'static mut Token = {
        static DROPS: AtomicUsize = AtomicUsize::new(0);
        Box::leak(token(5, &DROPS))
    };
    let stack = PerCpu::<CpuStack<&'static mut Token>>::new().expect("there is memory");
    let cpu = allowed_cpus()[0];
    on_cpu(cpu, || stack.push(node));
    let node = on_cpu(cpu, || stack.pop()).expect("it was pushed there");
    // SAFETY: leaked above, and nobody else has it.
    drop(unsafe { Box::from_raw(node) });
}

/// A node with its owner.
type Owned = Box<Token>;

/// How many nodes are about.
const TOKENS: u32 = 48;

/// What a thread, or the handler in it, holds.
struct Hands {
    tokens: RefCell<Vec<Owned>>,
    random: Cell<u64>,
}

fn storm(crew: Crew, part: u64) {
    static DROPS: AtomicUsize = AtomicUsize::new(0);
    let mut stack = PerCpu::<CpuStack<Box<Token>>>::new().expect("there is memory");
    (0..TOKENS).for_each(|number| stack.push(token(number, &DROPS)));
    let hands = |number| Hands {
        tokens: RefCell::new(Vec::with_capacity(4)),
        random: Cell::new(number as u64),
    };
    let all = {
        let stack = &stack;
        let take = move |hands: &Hands| {
            if let Some(token) = stack.pop() {
                let was_taken = token.is_taken.swap(true, Ordering::Relaxed);
                assert!(!was_taken, "a node was popped twice");
                hands.tokens.borrow_mut().push(token);
            }
        };
        let give = move |hands: &Hands| {
            if let Some(token) = hands.tokens.borrow_mut().pop() {
                token.is_taken.store(false, Ordering::Relaxed);
                stack.push(token);
            }
        };
        whirl(crew, Handlers::Work, part, hands, move |hands| {
            hands.random.set(mix(hands.random.get().wrapping_add(1)));
            let held = hands.tokens.borrow().len();
            match hands.random.get() % 64 {
                0 => {
                    // As many as there are, one by one back.
                    for token in stack.pop_all() {
                        assert!(!token.is_taken.load(Ordering::Relaxed), "popped twice");
                        stack.push(token);
                    }
                }
                1..32 if held < 4 => take(hands),
                _ => give(hands),
            }
        })
    };
    let held = all.into_iter().flat_map(|hands| hands.tokens.into_inner());
    let mut tokens: Vec<_> = held.collect();
    tokens.extend(stack.iter_mut().flat_map(|(_, copy)| copy.take_all()));
    let mut numbers: Vec<_> = tokens.iter().map(|token| token.number).collect();
    numbers.sort_unstable();
    assert!(
        numbers.into_iter().eq(0..TOKENS),
        "every node is in one place"
    );
}

#[test]
fn no_node_is_lost_in_a_storm() {
    storm(Crew::REGISTERED, 1);
}

#[test]
fn no_node_is_lost_among_strays() {
    storm(Crew::HALF_STRAYS, 20);
}

#[test]
fn no_node_is_lost_without_restartable_sequences() {
    let name = "stack::no_node_is_lost_without_restartable_sequences";
    without_restartable_sequences(name, || storm(Crew::REGISTERED, 20));
}
