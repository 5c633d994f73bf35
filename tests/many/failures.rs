//! Batches that are refused, wholly, whatever the reason; and a free of several that ends before the last.

use pcpu::backing::sim::Machine;
use pcpu::{AllocError, AllocFlags, FreeError, FreeManyError, Request};

use crate::batch::{
    OUT_OF_PLACES, PLAIN, assert_undone, audit_of, free_many, free_many_at, lasting, take_over,
};
use crate::cached::{seat, with_caches};
use crate::copies::assert_stamped;
use crate::small::small_machine;

#[test]
fn wrong_requests_change_nothing() {
    for pcpu in [
        small_machine(2).build().unwrap(),
        with_caches(&small_machine(2)),
    ] {
        let limit_bytes = pcpu.policy().max_alloc_bytes;
        let unknown = AllocFlags::from_bits_retain(1 << 31);
        for (request, error) in [
            (Request::new(0, 8), AllocError::ZeroSize),
            (
                Request::new(usize::MAX, 8),
                AllocError::TooLarge {
                    bytes: usize::MAX,
                    limit_bytes,
                },
            ),
            (
                Request::new(8, 3),
                AllocError::AlignNotPowerOfTwo { align: 3 },
            ),
            (
                Request::new(8, 8).with_flags(unknown),
                AllocError::UnknownFlags { bits: 1 << 31 },
            ),
        ] {
            let before = pcpu.stats();
            let mut out = [0; 4];
            assert_eq!(pcpu.allocate_many(&request, &mut out), Err(error));
            let at = pcpu.allocate_many_at(&seat(&pcpu, 1), &request, &mut out);
            assert_eq!(at, Err(error));
            let after = pcpu.stats();
            assert_eq!(lasting(&before), lasting(&after));
            assert_eq!(after.failures, before.failures + 2);
        }
    }
}

/// Each call of the backing that a batch makes fails in turn, alone and with all behind it.
#[test]
fn a_batch_that_fails_leaves_nothing_behind() {
    let machine = small_machine(4).nodes(2).online(2);
    let machines = [machine.clone(), machine.clone().dirty_memory()];
    let mut failed = 0;
    for machine in &machines {
        for is_cached in [false, true] {
            for flags in [AllocFlags::empty(), AllocFlags::ATOMIC] {
                for &(bytes, align, count) in &[(100, 4, 500), (5000, 8, 12), (12_000, 4096, 4)] {
                    let request = Request::new(bytes, align).with_flags(flags);
                    for nth in 0.. {
                        let (result, calls) =
                            fail_batch(machine, is_cached, &request, count, nth, |call, nth| {
                                call == nth
                            });
                        failed += u32::from(result.is_err());
                        let (result, _) =
                            fail_batch(machine, is_cached, &request, count, nth, |call, nth| {
                                call >= nth
                            });
                        assert!(result.is_err() || nth >= calls);
                        if nth >= calls {
                            break;
                        }
                    }
                }
            }
        }
    }
    assert!(failed > 20, "only {failed} failed");
}

/// Asks for a batch that touches live areas, idle ones and memory that is not there; says how it went, and how many calls there were.
fn fail_batch(
    machine: &Machine,
    is_cached: bool,
    request: &Request,
    count: usize,
    nth: u64,
    fails: fn(u64, u64) -> bool,
) -> (Result<(), AllocError>, u64) {
    let mut pcpu = machine.build().unwrap();
    if is_cached {
        pcpu.enable_caches().unwrap();
    }
    let here = seat(&pcpu, 0);
    let kept: Vec<_> = (0..5)
        .map(|_| pcpu.allocate_at(&here, request).unwrap())
        .collect();
    let size = (request.bytes(), request.align());
    take_over(&pcpu, &kept, size);
    // SAFETY: it is the test's, and not used any more.
    unsafe { pcpu.free_at(&here, kept[1], PLAIN) }.unwrap();
    let live = [kept[0], kept[2], kept[3], kept[4]];
    let before = audit_of(&pcpu);
    pcpu.backing().set_faults(move |call| fails(call, nth));
    let mut out = vec![0; count];
    let result = pcpu.allocate_many_at(&here, request, &mut out);
    let calls = pcpu.backing().fallible_calls();
    pcpu.backing().set_faults(|_| false);
    let after = audit_of(&pcpu);
    match result {
        Ok(()) => take_over(&pcpu, &out, size),
        Err(error) => {
            assert!(matches!(error, AllocError::Backing(_)), "{error:?}");
            if is_cached {
                assert_eq!(before.1, after.1);
                assert_eq!(lasting(&before.0), lasting(&after.0));
            } else {
                assert_undone(&before.2.unwrap(), &after.2.unwrap());
            }
            pcpu.allocate_many_at(&here, request, &mut out).unwrap();
            take_over(&pcpu, &out, size);
        }
    }
    for address in live {
        for cpu in pcpu.units().materialised().iter() {
            assert_stamped(&pcpu, (address, request.bytes()), cpu);
        }
    }
    free_many_at(&pcpu, &here, &out);
    free_many_at(&pcpu, &here, &live);
    assert_eq!(pcpu.stats().live, 0);
    (result, calls)
}

#[test]
fn a_full_window_refuses_the_whole_batch() {
    for is_cached in [false, true] {
        let mut pcpu = small_machine(2).chunks(3).build().unwrap();
        if is_cached {
            pcpu.enable_caches().unwrap();
        }
        let here = seat(&pcpu, 1);
        let mut few = [0; 3];
        let request = Request::new(1000, 8);
        pcpu.allocate_many_at(&here, &request, &mut few).unwrap();
        let before = audit_of(&pcpu);
        let mut out = [0; 200];
        assert_eq!(
            pcpu.allocate_many_at(&here, &request, &mut out),
            Err(OUT_OF_PLACES)
        );
        let after = audit_of(&pcpu);
        assert_eq!((before.1, lasting(&before.0)), (after.1, lasting(&after.0)));
        assert_eq!(after.0.failures, 1);
        pcpu.allocate_many_at(&here, &request, &mut out[..60])
            .unwrap();
        free_many_at(&pcpu, &here, &out[..60]);
        free_many_at(&pcpu, &here, &few);
        assert_eq!(pcpu.stats().live, 0);
    }
}

#[test]
fn a_free_that_is_refused_says_where() {
    let pcpu = small_machine(2).build().unwrap();
    let mut out = [0; 5];
    pcpu.allocate_many(&Request::new(16, 8), &mut out).unwrap();
    let [a, b, c, d, e] = out;
    let error = FreeError::NotAllocated { address: b };
    let refused = free_many(&pcpu, &[a, b, b, c]);
    assert_eq!(refused, Err(FreeManyError { freed: 2, error }));
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains(&error.to_string())
    );
    assert_eq!(pcpu.area_bytes(c), Some(16), "what is behind is live");
    free_many(&pcpu, &[c, d, e]).unwrap();
    assert_eq!(pcpu.stats().live, 0);
}
