//! Buffers: what fits, in which order it comes out, and that no item is lost, torn or taken twice.

use std::cell::{Cell, RefCell};
use std::mem::MaybeUninit;

use pcpu::{CpuBuffer, Full, LocalBuffer, PerCpu, define_per_cpu};

use crate::crew::{Crew, without_restartable_sequences};
use crate::mix::mix;
use crate::system::{allowed_cpus, on_cpu};
use crate::whirl::{Handlers, whirl};

define_per_cpu! {
    static WORDS: CpuBuffer<u64, 4> = CpuBuffer::new();
    static BYTES: CpuBuffer<u8, 37> = CpuBuffer::new();
}

#[test]
fn items_come_out_as_they_went_in() {
    for cpu in allowed_cpus() {
        on_cpu(cpu, || {
            let mut room = [MaybeUninit::uninit(); 4];
            assert_eq!(WORDS.take(&mut room), []);
            assert_eq!(WORDS.append(1), Ok(()));
            assert_eq!(WORDS.append_all(&[2, 3]), Ok(()));
            assert_eq!(WORDS.append_all(&[4, 5]), Err(Full(&[4, 5][..])));
            assert_eq!(WORDS.append(4), Ok(()));
            assert_eq!(WORDS.append(5), Err(Full(5)));
            assert_eq!(WORDS.append_all(&[]), Ok(()));
            assert_eq!(WORDS.take(&mut room), [1, 2, 3, 4]);
            assert_eq!(WORDS.take(&mut room), []);
        });
    }
}

/// All lengths around words, at all offsets.
#[test]
fn bytes_of_any_number() {
    on_cpu(allowed_cpus()[0], || {
        let text: Vec<u8> = (1..=37).collect();
        for first in 0..=37 {
            for second in 0..=37 - first {
                assert_eq!(BYTES.append_all(&text[..first]), Ok(()));
                assert_eq!(BYTES.append_all(&text[first..first + second]), Ok(()));
                let too_many = &text[..38 - first - second - 1];
                assert!(BYTES.append_all(&[too_many, &[0]].concat()).is_err());
                let mut room = [MaybeUninit::new(0xee); 37];
                assert_eq!(BYTES.take(&mut room), &text[..first + second]);
                // SAFETY: all of it was initialised.
                let rest = room[first + second..]
                    .iter()
                    .map(|byte| unsafe { byte.assume_init() });
                assert!(rest.into_iter().all(|byte| byte == 0xee), "beyond its end");
            }
        }
    });
}

#[test]
fn the_only_user_looks_into_all_of_them() {
    let mut buffer = PerCpu::<CpuBuffer<u32, 8>>::new().expect("there is memory");
    for cpu in allowed_cpus() {
        on_cpu(cpu, || {
            buffer.append_all(&[cpu.get(), 7]).expect("there is room")
        });
    }
    for cpu in allowed_cpus() {
        let copy = buffer.get_mut(cpu).expect("it is possible");
        assert_eq!(copy.items(), [cpu.get(), 7]);
        copy.clear();
        assert!(copy.items().is_empty());
    }
}

/// Of 20 bytes: no whole number of words.
type Record = [u32; 5];

/// A record that shows if it is torn.
fn record(producer: u32, number: u32) -> Record {
    let hash = mix(u64::from(producer) << 32 | u64::from(number));
    [producer, number, hash as u32, (hash >> 32) as u32, !number]
}

const ROOM: usize = 50;

/// What a thread, or the handler in it, has done.
struct Account {
    producer: u32,
    appended: Cell<u32>,
    taken: RefCell<Box<[(u64, u64)]>>,
}

impl Account {
    fn count(&self, records: &[Record]) {
        let mut taken = self.taken.borrow_mut();
        for &[producer, number, ..] in records {
            let [count, sum] = taken
                .get_mut(producer as usize)
                .map(|(count, sum)| [count, sum])
                .expect("a producer");
            *count += 1;
            *sum += u64::from(number);
        }
    }
}

fn check(records: &[Record]) {
    for &[producer, number, ..] in records {
        assert!(records.contains(&record(producer, number)));
    }
    for found in records {
        assert_eq!(*found, record(found[0], found[1]), "torn");
    }
    // What one producer appends to one CPU's buffer stays in order.
    let is_sorted = |producer| {
        records
            .iter()
            .filter(|record| record[0] == producer)
            .is_sorted_by_key(|record| record[1])
    };
    assert!((0..16).all(is_sorted));
}

fn storm(crew: Crew, handlers: Handlers, part: u64) {
    let mut buffer = PerCpu::<CpuBuffer<Record, ROOM>>::new().expect("there is memory");
    let account = |number: usize| Account {
        producer: number as u32,
        appended: Cell::new(0),
        taken: RefCell::new(vec![(0, 0); 16].into()),
    };
    let accounts = whirl(crew, handlers, part, account, |account| {
        let number = account.appended.get();
        match buffer.append(record(account.producer, number)) {
            Ok(()) => account.appended.set(number + 1),
            Err(Full(_)) => {
                let mut room = [MaybeUninit::uninit(); ROOM];
                let taken = buffer.take(&mut room);
                check(taken);
                account.count(taken);
            }
        }
    });
    let last = account(0);
    for (_, copy) in buffer.iter_mut() {
        check(copy.items());
        last.count(copy.items());
    }
    for producer in &accounts {
        let index = producer.producer as usize;
        let appended = u64::from(producer.appended.get());
        let taken = accounts
            .iter()
            .chain([&last])
            .map(|account| account.taken.borrow()[index]);
        let (count, sum) = taken.fold((0, 0), |(count, sum), one| (count + one.0, sum + one.1));
        assert_eq!(count, appended, "of producer {index}");
        assert_eq!(
            sum,
            appended * appended.saturating_sub(1) / 2,
            "of producer {index}"
        );
    }
}

#[test]
fn no_record_is_lost_in_a_storm() {
    storm(Crew::REGISTERED, Handlers::Work, 1);
}

#[test]
fn no_record_is_lost_among_strays() {
    storm(Crew::HALF_STRAYS, Handlers::Idle, 20);
}

#[test]
fn no_record_is_lost_without_restartable_sequences() {
    let name = "buffer::no_record_is_lost_without_restartable_sequences";
    without_restartable_sequences(name, || storm(Crew::REGISTERED, Handlers::Idle, 20));
}
