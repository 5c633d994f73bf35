//! Wrong calls: each is refused with exactly its error and changes nothing.

#[path = "common/audit.rs"]
mod audit;
#[path = "common/free.rs"]
mod free;
#[path = "common/same.rs"]
mod same;
#[path = "common/small.rs"]
mod small;
#[path = "common/undone.rs"]
mod undone;

use free::FreeArea;
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::backing::{Backing, BackingError};
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, CpuError, FreeError, FreeFlags, Request, SetupError};

use audit::audit;
use same::assert_same;
use small::{UNIT_BYTES, small_machine};
use undone::assert_undone;

const PLAIN: FreeFlags = FreeFlags::empty();

/// Calls that are refused leave everything as it was.
fn refused<T>(pcpu: &SimAllocator, call: impl FnOnce() -> T) -> T {
    let before = audit(pcpu);
    let result = call();
    assert_same(&before, &audit(pcpu));
    result
}

fn assert_not_freed(pcpu: &SimAllocator, address: usize, flags: FreeFlags, error: FreeError) {
    let result = refused(pcpu, || pcpu.free_area(address, flags));
    assert_eq!(result, Err(error), "free of {address:#x}, {flags:?}");
}

/// A machine with an area in every region; the later chunk's area has a second one behind it.
struct Areas {
    pcpu: SimAllocator,
    first: usize,
    reserved: usize,
    later: usize,
    behind: usize,
}

fn areas() -> Areas {
    let pcpu = small_machine(2).online(1).build().unwrap();
    let allocate = |bytes, flags| {
        let request = Request::new(bytes, 4).with_flags(flags);
        pcpu.allocate(&request).unwrap()
    };
    let first = allocate(24, AllocFlags::empty());
    let reserved = allocate(100, AllocFlags::RESERVED);
    let later = allocate(19_000, AllocFlags::empty());
    let behind = allocate(13_400, AllocFlags::empty());
    assert_eq!(
        later,
        pcpu.neutral_base() + UNIT_BYTES,
        "a chunk of its own"
    );
    assert_eq!(behind, pcpu.neutral_base() + UNIT_BYTES + 19_000);
    Areas {
        pcpu,
        first,
        reserved,
        later,
        behind,
    }
}

#[test]
fn an_area_is_freed_once() {
    let Areas {
        pcpu,
        first,
        reserved,
        later,
        behind,
    } = areas();
    for (address, flags) in [
        (later, PLAIN),
        (first, FreeFlags::ATOMIC),
        (reserved, FreeFlags::RESERVED | FreeFlags::TRY),
        (behind, FreeFlags::TRY),
    ] {
        assert_eq!(pcpu.free_area(address, flags), Ok(()));
        assert_not_freed(&pcpu, address, flags, FreeError::NotAllocated { address });
    }
    // Nor later on, when the pages and then the chunk are gone.
    pcpu.trim(1);
    assert_not_freed(
        &pcpu,
        later,
        PLAIN,
        FreeError::NotAllocated { address: later },
    );
    pcpu.trim(0);
    assert_eq!(pcpu.stats().chunks, 1);
    assert_not_freed(
        &pcpu,
        later,
        PLAIN,
        FreeError::NotAllocated { address: later },
    );
}

#[test]
fn an_area_is_freed_at_its_start() {
    let areas = areas();
    for (start, bytes, flags) in [
        (areas.first, 24, PLAIN),
        (areas.reserved, 100, FreeFlags::RESERVED),
        (areas.later, 19_000, PLAIN),
        (areas.behind, 13_400, PLAIN),
    ] {
        for inside in [4, 8, bytes / 8 * 4, bytes - 4] {
            let address = start + inside;
            assert_not_freed(
                &areas.pcpu,
                address,
                flags,
                FreeError::Interior { address, start },
            );
        }
        for by in [1, 2, 3, 5, bytes - 1] {
            let address = start + by;
            assert_not_freed(
                &areas.pcpu,
                address,
                flags,
                FreeError::Misaligned { address },
            );
        }
    }
    let address = areas.behind + 13_400;
    assert_not_freed(
        &areas.pcpu,
        address,
        PLAIN,
        FreeError::NotAllocated { address },
    );
}

#[test]
fn foreign_addresses_are_not_freed() {
    let Areas { pcpu, later, .. } = areas();
    let window = pcpu.backing().window();
    let end = window.base + window.pitch_bytes * window.chunks as usize;
    let tail = pcpu.sizes().regions().tail;
    let copy = |cpu| pcpu.per_cpu_address(later, CpuId::new(cpu)).unwrap();
    let on_the_stack = 0_u64;
    for address in [
        0,
        4,
        usize::MAX,
        usize::MAX - 3,
        window.base - 1,
        window.base - 4,
        end,
        end + 4,
        copy(0),
        copy(1),
        (&raw const on_the_stack).addr(),
        window.base + tail.start,
        window.base + tail.start + 1,
        window.base + tail.end - 4,
    ] {
        assert_not_freed(&pcpu, address, PLAIN, FreeError::Foreign { address });
    }
    // The last addresses of the window are the instance's, though nothing was ever there.
    let address = end - 4;
    assert_not_freed(&pcpu, address, PLAIN, FreeError::NotAllocated { address });
}

#[test]
fn flags_that_do_not_exist_free_nothing() {
    let Areas { pcpu, first, .. } = areas();
    let bits = AllocFlags::NO_ZERO.bits() | 1 << 30;
    for known in [PLAIN, FreeFlags::RESERVED, FreeFlags::all()] {
        let flags = FreeFlags::from_bits_retain(known.bits() | bits);
        assert_not_freed(&pcpu, first, flags, FreeError::UnknownFlags { bits });
    }
}

#[test]
fn regions_are_kept_apart() {
    let Areas {
        pcpu,
        first,
        reserved,
        later,
        ..
    } = areas();
    let base = pcpu.neutral_base();
    let regions = pcpu.sizes().regions();
    // The padding behind the last static variable belongs to it.
    let padding = base + regions.static_vars.end;
    assert!(padding < base + regions.reserved.start);
    for address in [base, base + 4, base + 999, padding] {
        for flags in [PLAIN, FreeFlags::RESERVED] {
            assert_not_freed(&pcpu, address, flags, FreeError::Static { address });
        }
    }
    for address in [
        base + regions.reserved.start,
        reserved,
        reserved + 4,
        base + regions.reserved.end - 4,
    ] {
        assert_not_freed(&pcpu, address, PLAIN, FreeError::Reserved { address });
    }
    for address in [
        base + regions.dynamic.start,
        first,
        later,
        later + 4,
        base + regions.tail.start,
    ] {
        let error = FreeError::NotReserved { address };
        assert_not_freed(&pcpu, address, FreeFlags::RESERVED, error);
    }
}

#[test]
fn no_area_starts_elsewhere() {
    let areas = areas();
    let base = areas.pcpu.neutral_base();
    let regions = areas.pcpu.sizes().regions();
    assert_eq!(areas.pcpu.area_bytes(areas.first), Some(24));
    assert_eq!(areas.pcpu.area_bytes(areas.reserved), Some(100));
    assert_eq!(areas.pcpu.area_bytes(areas.behind), Some(13_400));
    for address in [
        0,
        base,
        base + regions.tail.start,
        areas.first + 1,
        areas.first + 4,
        areas.first + 24,
        areas.reserved + 100,
        areas.behind - 4,
        base + 3 * UNIT_BYTES,
    ] {
        let offset = address.wrapping_sub(base);
        assert_eq!(areas.pcpu.area_bytes(address), None, "base + {offset:#x}");
    }
}

#[test]
fn nonsense_is_not_served() {
    let pcpu = areas().pcpu;
    let limit_bytes = 32 << 10;
    let unknown = AllocFlags::from_bits_retain(1 << 20 | 1 << 9);
    let page_bytes = 4096;
    for (request, error) in [
        (Request::new(0, 4), AllocError::ZeroSize),
        (Request::of::<()>(), AllocError::ZeroSize),
        (
            Request::new(limit_bytes + 1, 4),
            AllocError::TooLarge {
                bytes: limit_bytes + 1,
                limit_bytes,
            },
        ),
        (
            Request::new(usize::MAX, 4),
            AllocError::TooLarge {
                bytes: usize::MAX,
                limit_bytes,
            },
        ),
        (
            Request::new(8, 0),
            AllocError::AlignNotPowerOfTwo { align: 0 },
        ),
        (
            Request::new(8, 3),
            AllocError::AlignNotPowerOfTwo { align: 3 },
        ),
        (
            Request::new(8, usize::MAX),
            AllocError::AlignNotPowerOfTwo { align: usize::MAX },
        ),
        (
            Request::new(8, 2 * page_bytes),
            AllocError::AlignTooLarge {
                align: 2 * page_bytes,
                limit: page_bytes,
            },
        ),
        (
            Request::new(8, 1 << 63),
            AllocError::AlignTooLarge {
                align: 1 << 63,
                limit: page_bytes,
            },
        ),
        (
            Request::new(8, 4).with_flags(unknown | AllocFlags::NO_WARN),
            AllocError::UnknownFlags {
                bits: 1 << 20 | 1 << 9,
            },
        ),
    ] {
        for flags in [
            AllocFlags::empty(),
            AllocFlags::ATOMIC,
            AllocFlags::RESERVED,
        ] {
            let request = request.with_flags(request.flags() | flags);
            let failures = pcpu.stats().failures;
            let result = refused(&pcpu, || pcpu.allocate(&request));
            assert_eq!(result, Err(error), "{request:?}");
            assert_eq!(pcpu.stats().failures, failures + 1);
        }
    }
}

#[test]
fn the_reserved_region_runs_out() {
    let pcpu = areas().pcpu;
    let reserved = |bytes| Request::new(bytes, 4).with_flags(AllocFlags::RESERVED);
    let free_bytes = 2048 - 100;
    let result = refused(&pcpu, || pcpu.allocate(&reserved(free_bytes + 1)));
    let bytes = free_bytes + 1;
    assert_eq!(
        result,
        Err(AllocError::ReservedExhausted { bytes, free_bytes })
    );
    assert!(pcpu.allocate(&reserved(free_bytes)).is_ok());
    let result = refused(&pcpu, || pcpu.allocate(&reserved(1)));
    let exhausted = AllocError::ReservedExhausted {
        bytes: 1,
        free_bytes: 0,
    };
    assert_eq!(result, Err(exhausted));
}

#[test]
fn without_a_reserved_region_nothing_is_reserved() {
    let pcpu = Machine::new(1)
        .spec(pcpu::unit::FirstChunkSpec::default())
        .checked()
        .build()
        .unwrap();
    let request = Request::new(4, 4).with_flags(AllocFlags::RESERVED);
    let result = refused(&pcpu, || pcpu.allocate(&request));
    let exhausted = AllocError::ReservedExhausted {
        bytes: 4,
        free_bytes: 0,
    };
    assert_eq!(result, Err(exhausted));
}

#[test]
fn a_full_window_refuses_and_recovers() {
    let pcpu = small_machine(2).chunks(3).build().unwrap();
    let request = Request::new(UNIT_BYTES, 4096);
    let [first, _] = [(); 2].map(|()| pcpu.allocate(&request).unwrap());
    for flags in [AllocFlags::empty(), AllocFlags::ATOMIC] {
        let before = audit(&pcpu);
        let result = pcpu.allocate(&request.with_flags(flags));
        let full = AllocError::Backing(BackingError::OutOfAddressSpace);
        assert_eq!(result, Err(full));
        assert_undone(&before, &audit(&pcpu), 4096);
    }
    pcpu.free_area(first, FreeFlags::empty()).unwrap();
    assert_eq!(pcpu.allocate(&request), Ok(first));
}

/// Before a request is refused every chunk is looked at, however many are just too badly aligned.
#[test]
fn a_full_window_is_searched_whole() {
    let pcpu = small_machine(1).chunks(9).build().unwrap();
    let allocate = |bytes| pcpu.allocate(&Request::new(bytes, 4)).unwrap();
    allocate(UNIT_BYTES - pcpu.sizes().regions().dynamic.start - 4096 * 4);
    // In each of the chunks the same run would do if it began at a page; in the last it does.
    let starts = [4100, 4100, 4100, 4100, 4100, 4100, 4100, 4];
    let rests = starts.map(|bytes| {
        allocate(bytes);
        allocate(UNIT_BYTES - bytes)
    });
    for rest in rests {
        pcpu.free_area(rest, FreeFlags::empty()).unwrap();
    }
    let wanted = Request::new(24_580, 4096);
    let last = pcpu.neutral_base() + 8 * UNIT_BYTES + 4096;
    // In memory that is there, then in memory that is populated for it.
    for _ in 0..2 {
        assert_eq!(audit(&pcpu).stats.chunks, 9);
        assert_eq!(pcpu.allocate(&wanted), Ok(last));
        pcpu.free_area(last, FreeFlags::empty()).unwrap();
        pcpu.trim(0);
    }
}

#[test]
fn a_window_of_one_chunk_serves_from_the_first() {
    let pcpu = small_machine(1).chunks(1).build().unwrap();
    let small = pcpu.allocate(&Request::new(4096, 8)).unwrap();
    assert!(pcpu.allocate(&Request::new(UNIT_BYTES, 8)).is_err());
    assert_eq!(pcpu.upkeep().chunks_prepared, 0);
    assert!(
        !pcpu.is_upkeep_due(),
        "what cannot be done is not due at once again"
    );
    pcpu.free_area(small, FreeFlags::empty()).unwrap();
    audit(&pcpu);
}

#[test]
fn impossible_cpus_are_refused() {
    let Areas { pcpu, later, .. } = areas();
    for id in [2, 3, 63, 64, 65, 8192, u32::MAX] {
        let cpu = CpuId::new(id);
        let nr_cpu_ids = 2;
        let impossible = CpuError::NotPossible { cpu, nr_cpu_ids };
        assert_eq!(refused(&pcpu, || pcpu.bring_up(cpu)), Err(impossible));
        assert_eq!(pcpu.per_cpu_address(later, cpu), Err(impossible));
        assert_eq!(pcpu.units().offset(cpu), None);
        assert_eq!(pcpu.units().node(cpu), None);
        assert!(!pcpu.units().possible().contains(cpu));
    }
}

/// Every error is told in one line that names the value and the limit.
#[test]
fn errors_tell_value_and_limit() {
    let cpu = CpuId::new(77);
    let error = BackingError::OutOfFrames;
    let table: [(String, &[&str]); 30] = [
        (AllocError::ZeroSize.to_string(), &["0 bytes"]),
        (
            AllocError::TooLarge {
                bytes: 40_000,
                limit_bytes: 32_768,
            }
            .to_string(),
            &["40000", "32768"],
        ),
        (
            AllocError::AlignNotPowerOfTwo { align: 24 }.to_string(),
            &["24", "power of two"],
        ),
        (
            AllocError::AlignTooLarge {
                align: 8192,
                limit: 4096,
            }
            .to_string(),
            &["8192", "4096"],
        ),
        (
            AllocError::UnknownFlags { bits: 0x300 }.to_string(),
            &["0x300"],
        ),
        (
            AllocError::ReservedExhausted {
                bytes: 100,
                free_bytes: 60,
            }
            .to_string(),
            &["100", "60", "reserved"],
        ),
        (
            AllocError::Backing(BackingError::OutOfFrames).to_string(),
            &["memory", "pages"],
        ),
        (
            AllocError::Backing(BackingError::OutOfAddressSpace).to_string(),
            &["address space"],
        ),
        (
            AllocError::Backing(BackingError::OutOfMetadata).to_string(),
            &["metadata"],
        ),
        (
            AllocError::Backing(BackingError::WouldSleep).to_string(),
            &["sleeping"],
        ),
        (AllocError::Busy.to_string(), &["busy"]),
        (
            FreeError::Foreign { address: 0x1234 }.to_string(),
            &["0x1234"],
        ),
        (
            FreeError::Misaligned { address: 0x1235 }.to_string(),
            &["0x1235", "4"],
        ),
        (
            FreeError::Static { address: 0x1234 }.to_string(),
            &["0x1234", "static"],
        ),
        (
            FreeError::Reserved { address: 0x1234 }.to_string(),
            &["0x1234", "reserved"],
        ),
        (
            FreeError::NotReserved { address: 0x1234 }.to_string(),
            &["0x1234", "reserved"],
        ),
        (
            FreeError::NotAllocated { address: 0x1234 }.to_string(),
            &["0x1234"],
        ),
        (
            FreeError::Interior {
                address: 0x1238,
                start: 0x1234,
            }
            .to_string(),
            &["0x1238", "0x1234"],
        ),
        (
            FreeError::UnknownFlags { bits: 0x300 }.to_string(),
            &["0x300"],
        ),
        (FreeError::Busy.to_string(), &["busy"]),
        (
            CpuError::NotPossible {
                cpu,
                nr_cpu_ids: 64,
            }
            .to_string(),
            &["77", "64"],
        ),
        (
            CpuError::NoMemory { cpu, error }.to_string(),
            &["77", "memory"],
        ),
        (
            SetupError::WindowBase {
                base: 0x1000,
                first_chunk: 0x2000,
            }
            .to_string(),
            &["0x1000", "0x2000"],
        ),
        (
            SetupError::WindowPitch {
                pitch_bytes: 4097,
                unit_bytes: 65_536,
            }
            .to_string(),
            &["4097", "65536"],
        ),
        (
            SetupError::Window {
                window: pcpu::backing::Window {
                    base: 0x1000,
                    pitch_bytes: 4096,
                    chunks: 7,
                },
            }
            .to_string(),
            &["0x1000", "4096", "7"],
        ),
        (
            SetupError::UnitBytes {
                unit_bytes: 1 << 40,
                limit_bytes: 8 << 30,
            }
            .to_string(),
            &["1099511627776", "8589934592"],
        ),
        (
            SetupError::MaxAlloc {
                bytes: 70_000,
                limit_bytes: 65_536,
            }
            .to_string(),
            &["70000", "65536"],
        ),
        (
            SetupError::Backing(BackingError::OutOfMetadata).to_string(),
            &["metadata"],
        ),
        (SetupError::Again.to_string(), &["already"]),
        (
            BackingError::OutOfMetadata.to_string(),
            &["no memory for metadata"],
        ),
    ];
    for (text, parts) in table {
        assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
        for part in parts {
            assert!(text.contains(part), "{text:?} names {part:?}");
        }
    }
}
