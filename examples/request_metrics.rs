//! Metrics of a server: workers count requests, errors and latencies, each on its CPU; a reporter adds the copies up.
//!
//! `cargo run --release --example request_metrics`

use std::error::Error;
use std::time::{Duration, Instant};

use pcpu::{AllocError, CpuCell, LocalCell, PerCpu, RemoteCell};

const WORKERS: u64 = 4;
const REQUESTS: u64 = 200_000;

/// Latencies of 2^63 ns and more do not happen.
const BUCKETS: usize = 64;

struct Metrics {
    requests: PerCpu<CpuCell<u64>>,
    errors: PerCpu<CpuCell<u64>>,
    /// Bucket `i`: latencies from 2^i to 2^(i+1) ns.
    latencies: PerCpu<[CpuCell<u64>]>,
}

impl Metrics {
    fn new() -> Result<Self, AllocError> {
        Ok(Self {
            requests: PerCpu::new()?,
            errors: PerCpu::new()?,
            latencies: PerCpu::new_slice(BUCKETS)?,
        })
    }

    /// What every request calls: two or three additions to this CPU's copies, no lock, no LOCKed instruction.
    fn note<T, E>(&self, result: &Result<T, E>, latency: Duration) {
        let nanos = (latency.as_nanos() as u64).max(1);
        self.requests.inc();
        self.latencies.at(nanos.ilog2() as usize).inc();
        if result.is_err() {
            self.errors.inc();
        }
    }

    fn report(&self) {
        let (requests, errors) = (self.requests.sum(), self.errors.sum());
        println!("{requests:>9} requests, {errors} errors; latencies:");
        for (bucket, element) in self.latencies.elements().enumerate() {
            let count = element.sum();
            if count > 0 {
                let bar = "#".repeat((count * 50).div_ceil(requests.max(1)) as usize);
                println!("  from {:>9} ns {count:>9} {bar}", 1_u64 << bucket);
            }
        }
    }
}

/// A request; one in a hundred is refused.
fn serve(number: u64) -> Result<u64, u64> {
    let work = (0..number % 64).fold(number, |hash, byte| hash.rotate_left(5) ^ byte);
    if number.is_multiple_of(100) {
        Err(work)
    } else {
        Ok(work)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let metrics = Metrics::new()?;
    std::thread::scope(|scope| {
        let worker = |_| {
            scope.spawn(|| {
                for number in 0..REQUESTS {
                    let start = Instant::now();
                    let result = std::hint::black_box(serve(number));
                    metrics.note(&result, start.elapsed());
                }
            })
        };
        let workers: Vec<_> = (0..WORKERS).map(worker).collect();
        while !workers.iter().all(|worker| worker.is_finished()) {
            println!("{:>9} requests so far", metrics.requests.sum());
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    metrics.report();
    for (cpu, requests) in metrics.requests.values().filter(|&(_, count)| count > 0) {
        println!("  CPU {cpu} served {requests}");
    }

    assert_eq!(metrics.requests.sum(), WORKERS * REQUESTS);
    assert_eq!(metrics.errors.sum(), WORKERS * REQUESTS / 100);
    let in_buckets: u64 = metrics
        .latencies
        .elements()
        .map(|bucket| bucket.sum())
        .sum();
    assert_eq!(in_buckets, WORKERS * REQUESTS);
    Ok(())
}
