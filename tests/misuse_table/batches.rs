//! Wrong batches. One that is refused has allocated nothing, or has freed what stood before the wrong address; the most that ever
//! lived at a time may have grown meanwhile.

use std::mem::MaybeUninit;

use lock_api::RawMutex;
use pcpu::backing::Backing;
use pcpu::backing::sim::SimAllocator;
use pcpu::cache::LockedSeat;
use pcpu::hardened::Hardening;
use pcpu::unit::CpuId;
use pcpu::{
    AllocError, AllocFlags, Domain, FreeFlags, FreeManyError, Global, Handle, PerCpu,
    PerCpuAllocator, PerCpuPtr, Request, alloc_percpu, alloc_percpu_in, alloc_percpu_many,
    alloc_percpu_many_in, alloc_percpu_many_with, free_percpu, free_percpu_many, global,
};

use crate::free::FreeArea;
use crate::small::{UNIT_BYTES, small_machine};
use crate::{Aligned, Areas, Deaf, Digest, HITS, PLAIN, RESERVED, Row, Simulated, answer, walk};

fn digest<B: Backing, R: RawMutex>(pcpu: &PerCpuAllocator<B, R>) -> Digest {
    let mut digest = crate::digest(pcpu);
    digest.stats.live_peak = 0;
    digest.stats.live_peak_bytes = 0;
    digest
}

fn seat(pcpu: &SimAllocator) -> LockedSeat {
    // SAFETY: all seats of these instances are such.
    unsafe { LockedSeat::new(pcpu.units(), CpuId::new(0)) }
}

/// How the table writes what came of freeing a batch.
fn freed(result: Result<(), FreeManyError>) -> String {
    match result {
        Ok(()) => "Ok(())".into(),
        Err(FreeManyError { freed, error }) => {
            format!("{} after {freed}", answer("FreeError", Err::<(), _>(error)))
        }
    }
}

fn allocate(pcpu: &SimAllocator, request: Request, count: usize) -> String {
    answer(
        "AllocError",
        pcpu.allocate_many(&request, &mut vec![0; count]),
    )
}

fn allocate_at(pcpu: &SimAllocator, request: Request, count: usize) -> String {
    let result = pcpu.allocate_many_at(&seat(pcpu), &request, &mut vec![0; count]);
    answer("AllocError", result)
}

fn free(pcpu: &SimAllocator, addresses: &[usize], flags: FreeFlags) -> String {
    // SAFETY: nobody uses what is freed; anything else is refused.
    freed(unsafe { pcpu.free_many(addresses, flags) })
}

/// Areas of a machine of its own: what of them is live once `act` is done.
fn left(machine: &SimAllocator, act: impl Fn(&SimAllocator, [usize; 3]) -> String) -> String {
    let mut areas = [0; 3];
    machine
        .allocate_many(&Request::new(24, 8), &mut areas)
        .unwrap();
    let answer = act(machine, areas);
    let live = areas.map(|area| machine.area_bytes(area).is_some());
    let freed = answer.rsplit(' ').next().unwrap().parse().unwrap();
    let expected = [0, 1, 2].map(|nth| nth >= freed);
    assert_eq!(live, expected, "{answer}");
    assert_eq!(machine.stats().live, 3 - freed as u64);
    for area in areas.into_iter().skip(freed) {
        machine.free_area(area, PLAIN).unwrap();
    }
    answer
}

fn cached() -> SimAllocator {
    let mut pcpu = small_machine(2).build().unwrap();
    pcpu.enable_caches().unwrap();
    pcpu
}

/// More than there is room for, of pages that there is no memory for yet: chunks and pages stay, idle.
fn full_window(pcpu: &SimAllocator) -> String {
    let held = pcpu.allocate(&Request::new(1000, 8)).unwrap();
    let before = pcpu.stats();
    let answer = allocate_at(pcpu, Request::new(1000, 8), 4000);
    let after = pcpu.stats();
    let lasting = |stats: &pcpu::stats::Stats| {
        (
            (stats.live, stats.live_bytes, stats.allocs, stats.frees),
            stats.live_sizes,
        )
    };
    assert_eq!(lasting(&before), lasting(&after));
    pcpu.free_area(held, PLAIN).unwrap();
    pcpu.trim(0);
    assert_eq!((pcpu.stats().live, pcpu.stats().chunks), (0, 1));
    answer
}

fn hardened() -> SimAllocator {
    let mut pcpu = small_machine(2).build().unwrap();
    pcpu.harden(Hardening::new(&Deaf)).unwrap();
    pcpu
}

#[test]
fn wrong_batches_of_an_instance_change_nothing() {
    let areas = Areas::new();
    let pcpu = &areas.pcpu;
    let request = Request::new(24, 8);
    let reserved = Request::new(100, 4).with_flags(AllocFlags::RESERVED);
    let unknown = AllocFlags::from_bits_retain(1 << 31);
    let rows: &[Row<'_>] = &[
        ("allocate_many of 0 bytes", &|| {
            allocate(pcpu, Request::new(0, 8), 2)
        }),
        (
            "allocate_many of more than Policy::max_alloc_bytes",
            &|| allocate(pcpu, Request::new(UNIT_BYTES + 1, 8), 2),
        ),
        ("allocate_many of usize::MAX bytes", &|| {
            allocate(pcpu, Request::new(usize::MAX, 8), 2)
        }),
        ("allocate_many aligned to 24", &|| {
            allocate(pcpu, Request::new(8, 24), 2)
        }),
        ("allocate_many aligned to two pages", &|| {
            allocate(pcpu, Request::new(8, 8192), 2)
        }),
        ("allocate_many with a flag that does not exist", &|| {
            allocate(pcpu, request.with_flags(unknown), 2)
        }),
        (
            "allocate_many of more than the reserved region has room for",
            &|| allocate(pcpu, reserved, 40),
        ),
        (
            "allocate_many with TRY of more than memory that is there has room for",
            &|| allocate(pcpu, request.with_flags(AllocFlags::TRY), 4000),
        ),
        (
            "allocate_many with TRY of two in hardened mode",
            // Not a row to itself: it takes another machine, as some below do.
            &|| allocate(&hardened(), request.with_flags(AllocFlags::TRY), 2),
        ),
        (
            "allocate_many_at of more than the window has room for",
            &|| full_window(&small_machine(2).chunks(4).build().unwrap()),
        ),
        (
            "allocate_many_at of more than the window has room for, with caches",
            &|| full_window(&cached()),
        ),
        ("allocate_many_at of 0 bytes, with caches", &|| {
            allocate_at(&cached(), Request::new(0, 8), 2)
        }),
        ("allocate_many of no area, of 0 bytes", &|| {
            allocate(pcpu, Request::new(0, 8), 0)
        }),
        ("free_many whose first was freed", &|| {
            free(pcpu, &[areas.gone, areas.first], PLAIN)
        }),
        ("free_many whose first is foreign", &|| {
            free(pcpu, &[areas.end(), areas.first], PLAIN)
        }),
        ("free_many whose first is a static variable", &|| {
            free(pcpu, &[areas.base(), areas.first], PLAIN)
        }),
        ("free_many of a reserved area without RESERVED", &|| {
            free(pcpu, &[areas.reserved, areas.first], PLAIN)
        }),
        ("free_many of a dynamic area with RESERVED", &|| {
            free(pcpu, &[areas.first, areas.reserved], RESERVED)
        }),
        ("free_many with a flag that does not exist", &|| {
            let flags = FreeFlags::from_bits_retain(1 << 31);
            free(pcpu, &[areas.first], flags)
        }),
        ("free_many of an area twice", &|| {
            left(&small_machine(2).build().unwrap(), |pcpu, [a, b, _]| {
                free(pcpu, &[a, a, b], PLAIN)
            })
        }),
        ("free_many of two areas and inside of a third", &|| {
            left(&small_machine(2).build().unwrap(), |pcpu, [a, b, c]| {
                free(pcpu, &[a, b, c + 4, c], PLAIN)
            })
        }),
        ("free_many_at of an area twice, with caches", &|| {
            left(&cached(), |pcpu, [a, b, _]| {
                // SAFETY: nobody uses the areas.
                freed(unsafe { pcpu.free_many_at(&seat(pcpu), &[a, a, b], PLAIN) })
            })
        }),
        ("free_many of an area twice in hardened mode", &|| {
            left(&hardened(), |pcpu, [a, b, _]| free(pcpu, &[a, a, b], PLAIN))
        }),
    ];
    let before = digest(pcpu);
    walk("Of batches", rows, |call| {
        assert_eq!(before, digest(pcpu), "{call}");
    });
}

#[test]
fn wrong_batches_by_handles_change_nothing() {
    let pcpu = Simulated::allocator();
    let live: PerCpuPtr<u64, Simulated> = alloc_percpu_in().unwrap();
    let gone: PerCpuPtr<u64, Simulated> = alloc_percpu_in().unwrap();
    // SAFETY: nobody uses it.
    unsafe { free_percpu(gone) }.unwrap();
    let process = global();
    let kept: PerCpuPtr<u64> = alloc_percpu().unwrap();
    let mut places = [const { MaybeUninit::uninit() }; 2];
    let unknown = AllocFlags::from_bits_retain(1 << 20);
    let with_unknown = alloc_percpu_many_with::<u32, Simulated>(unknown, &mut places);
    let with_unknown = answer("AllocError", with_unknown.map(drop));
    let rows: &[Row<'_>] = &[
        ("alloc_percpu_many_in of a type without size", &|| {
            answer("AllocError", alloc_percpu_many_in::<(), Simulated, 2>())
        }),
        (
            "alloc_percpu_many_in of a type aligned to two pages",
            &|| {
                answer(
                    "AllocError",
                    alloc_percpu_many_in::<Aligned, Simulated, 2>(),
                )
            },
        ),
        (
            "alloc_percpu_many_with and a flag that does not exist",
            &|| with_unknown.clone(),
        ),
        ("free_percpu_many whose first was freed", &|| {
            // SAFETY: refused, and so is nothing freed.
            freed(unsafe { free_percpu_many(&[gone, live]) })
        }),
        ("PerCpu::new_many of a type without size", &|| {
            let made: Result<[PerCpu<(), Simulated>; 2], _> = PerCpu::new_many();
            answer("AllocError", made.map(drop))
        }),
        ("alloc_percpu_many of a type without size", &|| {
            answer("AllocError", alloc_percpu_many::<[u64; 0], 2>())
        }),
        (
            "alloc_percpu_many of a type aligned beyond the units",
            &|| answer("AllocError", alloc_percpu_many::<Aligned, 2>()),
        ),
        (
            "PerCpu::new_many of a type aligned beyond the units",
            &|| {
                let made: Result<[PerCpu<Aligned>; 2], AllocError> = PerCpu::new_many();
                answer("AllocError", made.map(drop))
            },
        ),
        ("free_percpu_many of a static variable", &|| {
            let static_var: PerCpuPtr<u64, Global> = HITS.handle().cast();
            // SAFETY: refused, and so is nothing freed.
            freed(unsafe { free_percpu_many(&[static_var, kept]) })
        }),
    ];
    let before = (crate::digest(pcpu), process.area_bytes(kept.neutral()));
    walk("By batches of handles", rows, |call| {
        let after = (crate::digest(pcpu), process.area_bytes(kept.neutral()));
        assert_eq!(before, after, "{call}");
    });
}
