//! CPUs that come up, some of them at the second or third try, while all threads do what they do.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lock_api::RawMutex;
use pcpu::backing::Backing;
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, PerCpuAllocator, Request};

use crate::copies::{assert_stamped, assert_zero, stamp_one};
use crate::free::FreeArea;

/// Brings the CPUs up while two threads allocate and free and a third gives memory back.
pub fn bring_up_amid_churn<B: Backing, R: RawMutex>(pcpu: &PerCpuAllocator<B, R>, cpus: Range<u32>)
where
    PerCpuAllocator<B, R>: Sync,
{
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for worker in 0..2 {
            let is_over = &is_over;
            scope.spawn(move || churn(pcpu, worker, is_over));
        }
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                pcpu.upkeep();
                pcpu.trim(0);
                thread::yield_now();
            }
        });
        for cpu in cpus.map(CpuId::new) {
            while let Err(error) = pcpu.bring_up(cpu) {
                assert!(matches!(error, CpuError::NoMemory { .. }), "{error}");
            }
            thread::sleep(Duration::from_millis(1));
        }
        is_over.store(true, Ordering::Relaxed);
    });
}

/// Allocates and frees. A CPU that came up since an area was stamped reads zero, for its copies were never written.
fn churn<B: Backing, R: RawMutex>(
    pcpu: &PerCpuAllocator<B, R>,
    worker: usize,
    is_over: &AtomicBool,
) {
    let mut live: Vec<((usize, usize), Vec<CpuId>)> = Vec::new();
    let mut turn = worker;
    while !is_over.load(Ordering::Relaxed) || !live.is_empty() {
        turn += 1;
        let wants_more = !is_over.load(Ordering::Relaxed) && live.len() < 12;
        if wants_more {
            let bytes = [40, 4096, 9000, 300, 20_000][turn % 5];
            let flags = [AllocFlags::empty(), AllocFlags::ATOMIC][turn % 2];
            let request = Request::new(bytes, 64).with_flags(flags);
            match pcpu.allocate(&request) {
                Ok(address) => {
                    let area = (address, bytes);
                    let cpus: Vec<_> = pcpu.units().materialised().iter().collect();
                    for &cpu in &cpus {
                        assert_zero(pcpu, area, cpu);
                        stamp_one(pcpu, area, cpu);
                    }
                    live.push((area, cpus));
                }
                Err(error) => assert!(matches!(error, AllocError::Backing(_)), "{error}"),
            }
        }
        if (!wants_more || turn.is_multiple_of(3)) && !live.is_empty() {
            let (area, cpus) = live.swap_remove(turn % live.len());
            for cpu in pcpu.units().materialised().iter() {
                if cpus.contains(&cpu) {
                    assert_stamped(pcpu, area, cpu);
                } else {
                    assert_zero(pcpu, area, cpu);
                }
            }
            pcpu.free_area(area.0, FreeFlags::empty()).unwrap();
        }
    }
}
