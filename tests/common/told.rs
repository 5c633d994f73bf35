//! What an event hook is told: the areas that live, each told of once, and how many events of each kind there were.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use pcpu::stats::{Event, EventHook};

/// Areas by address: the size that was asked for, and the owner.
pub type Live = BTreeMap<usize, (usize, usize)>;

/// What was told.
#[derive(Default)]
pub struct Told {
    pub live: Live,
    pub allocs: u64,
    pub frees: u64,
    pub failures: u64,
}

/// A hook that keeps it, and panics when it is told of an area twice, or of the end of one that it does not know.
pub struct Hook(Mutex<Told>);

impl Hook {
    pub const fn new() -> Self {
        Self(Mutex::new(Told {
            live: BTreeMap::new(),
            allocs: 0,
            frees: 0,
            failures: 0,
        }))
    }

    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap()
    }
}

impl EventHook for Hook {
    fn event(&self, event: &Event) {
        let mut told = self.told();
        match *event {
            Event::Alloc {
                address,
                bytes,
                owner,
                ..
            } => {
                let before = told.live.insert(address, (bytes, owner));
                assert_eq!(before, None, "{address:#x} is told of twice");
                told.allocs += 1;
            }
            Event::Free { address, bytes, .. } => {
                let (asked, _) = told.live.remove(&address).expect("it was handed out");
                assert_eq!(bytes, asked.next_multiple_of(4));
                told.frees += 1;
            }
            Event::Failure { .. } => told.failures += 1,
            _ => {}
        }
    }
}
