//! A pool of buffers: each CPU has a list of those that nobody uses, and takes and returns them without a lock and
//! without a LOCKed instruction. How many a CPU keeps is
//! bounded, near enough.
//!
//! `cargo run --release --example buffer_pool`

use std::error::Error;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

use pcpu::{AllocError, Counter, CpuCell, CpuStack, Link, LocalCell, LocalStack, PerCpu};

const WORKERS: u64 = 4;
const REQUESTS: u64 = 500_000;

const BUFFER_BYTES: usize = 16 << 10;

/// How many free buffers a CPU keeps.
const KEPT_PER_CPU: i32 = 32;

/// What the lists are made of: the link is within.
struct Block {
    link: Link,
    bytes: [u8; BUFFER_BYTES],
}

pcpu::stack_node!(Block { link });

struct Pool {
    free: PerCpu<CpuStack<Box<Block>>>,
    /// How many are in each list, but for threads that came to another CPU between the list and the number.
    kept: PerCpu<CpuCell<i32>>,
    made: Counter,
}

impl Pool {
    fn new() -> Result<Self, AllocError> {
        Ok(Self {
            free: PerCpu::new()?,
            kept: PerCpu::new()?,
            made: Counter::new(0)?,
        })
    }

    /// A buffer with whatever was in it last.
    fn take(&self) -> Buffer<'_> {
        let block = match self.free.pop() {
            Some(block) => {
                self.kept.dec();
                block
            }
            None => {
                self.made.inc();
                Box::new(Block {
                    link: Link::new(),
                    bytes: [0; BUFFER_BYTES],
                })
            }
        };
        Buffer {
            pool: self,
            block: Some(block),
        }
    }

    fn give_back(&self, block: Box<Block>) {
        if self.kept.add_return(1) <= KEPT_PER_CPU {
            self.free.push(block);
        } else {
            self.kept.dec();
        }
    }
}

/// A buffer that goes back to the pool when it is dropped, to the list of the CPU that it is dropped on.
struct Buffer<'a> {
    pool: &'a Pool,
    block: Option<Box<Block>>,
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.block.as_ref().map_or(&[], |block| &block.bytes)
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.block
            .as_mut()
            .map_or(&mut [], |block| &mut block.bytes)
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.give_back(block);
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let pool = Pool::new()?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let pool = &pool;
            scope.spawn(move || {
                for request in 0..REQUESTS {
                    let mut input = pool.take();
                    let mut output = pool.take();
                    input[..8].copy_from_slice(&(worker << 32 | request).to_le_bytes());
                    output[..8].copy_from_slice(&input[..8]);
                    assert_eq!(output[..8], (worker << 32 | request).to_le_bytes());
                }
            });
        }
    });
    let taken = 2 * WORKERS * REQUESTS;
    let nanos = start.elapsed().as_nanos() as u64 / taken;
    println!(
        "{taken} buffers of {BUFFER_BYTES} bytes were taken and given back, one every {nanos} ns"
    );

    let mut free = pool.free;
    let lists = free
        .iter_mut()
        .map(|(cpu, list)| (cpu, list.take_all().count()));
    let kept: Vec<_> = lists.filter(|&(_, count)| count > 0).collect();
    for &(cpu, count) in &kept {
        println!("  CPU {cpu} has {count} for the next");
    }
    let made = pool.made.sum() as u64;
    println!("  {made} had to be made");
    let kept: usize = kept.iter().map(|&(_, count)| count).sum();
    assert!(kept as u64 <= made && made < taken / 1000);
    Ok(())
}
