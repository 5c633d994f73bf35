//! What can be hardened, and how; and how large requests may be then.

use pcpu::allocator::Policy;
use pcpu::backing::BackingError;
use pcpu::backing::sim::Machine;
use pcpu::hardened::{
    Finding, FindingHook, HardenError, Hardening, MAX_GUARD_BYTES, MAX_QUARANTINE_AREAS,
};
use pcpu::{AllocError, Request};

use crate::machine::{Told, hardened};
use crate::small::{UNIT_BYTES, small_machine};

fn hardening(guard_bytes: usize, quarantine_areas: u32) -> Hardening {
    Hardening {
        guard_bytes,
        quarantine_areas,
        ..Hardening::new(Told::new())
    }
}

#[test]
fn wrong_settings_are_refused() {
    let mut pcpu = small_machine(1).build().unwrap();
    for bytes in [0, 3, 6, MAX_GUARD_BYTES + 4, usize::MAX] {
        let error = pcpu.harden(hardening(bytes, 1)).unwrap_err();
        assert_eq!(error, HardenError::GuardBytes { bytes });
        let line = format!(
            "guards of {bytes} bytes, they are a multiple of 4 and at least 4, at most 1024"
        );
        assert_eq!(error.to_string(), line);
    }
    for areas in [0, MAX_QUARANTINE_AREAS + 1] {
        let error = pcpu.harden(hardening(4, areas)).unwrap_err();
        assert_eq!(error, HardenError::QuarantineAreas { areas });
        let line = format!("a quarantine of {areas} areas, it is at least 1 and at most 1048576");
        assert_eq!(error.to_string(), line);
    }
    assert!(!pcpu.is_hardened());
    for (bytes, areas) in [(4, 1), (MAX_GUARD_BYTES, MAX_QUARANTINE_AREAS)] {
        let mut pcpu = small_machine(1).build().unwrap();
        assert_eq!(pcpu.harden(hardening(bytes, areas)), Ok(()));
        assert!(pcpu.is_hardened());
    }
}

#[test]
fn it_comes_before_all_else_and_once() {
    let mut pcpu = small_machine(1).build().unwrap();
    let address = pcpu.allocate(&Request::new(8, 8)).unwrap();
    let live = HardenError::Live { areas: 1 };
    assert_eq!(pcpu.harden(hardening(16, 8)), Err(live));
    // SAFETY: nobody uses the area.
    assert_eq!(unsafe { pcpu.free(address) }, Ok(()));
    assert_eq!(pcpu.harden(hardening(16, 8)), Ok(()));
    assert_eq!(pcpu.harden(hardening(16, 8)), Err(HardenError::Again));
    assert_eq!(pcpu.enable_caches(), Ok(()));
    assert!(!pcpu.has_caches());

    let mut pcpu = small_machine(1).build().unwrap();
    pcpu.enable_caches().unwrap();
    assert_eq!(pcpu.harden(hardening(16, 8)), Err(HardenError::Caches));
    assert_eq!(pcpu.check_areas(), 0);
}

/// Either block may lack; nothing is left behind then, and it may be tried again.
#[test]
fn no_memory_for_it() {
    for call in 0..2 {
        let mut pcpu = small_machine(1).build().unwrap();
        let before = pcpu.backing().metadata_bytes();
        pcpu.backing().set_faults(move |nth| nth == call);
        let error = HardenError::Backing(BackingError::OutOfMetadata);
        assert_eq!(pcpu.harden(hardening(16, 8)), Err(error));
        assert_eq!(pcpu.backing().metadata_bytes(), before);
        assert_eq!(pcpu.harden(hardening(16, 8)), Ok(()));
        assert_eq!(pcpu.stats().metadata_bytes, pcpu.backing().metadata_bytes());
    }
}

/// The largest request is the policy's, as long as it fits into a unit with its guards.
#[test]
fn the_largest_request() {
    let (pcpu, _) = hardened(&Machine::new(1), 8);
    let limit_bytes = Policy::default().max_alloc_bytes;
    assert!(pcpu.allocate(&Request::new(limit_bytes, 4096)).is_ok());
    let bytes = limit_bytes + 1;
    let error = AllocError::TooLarge { bytes, limit_bytes };
    assert_eq!(pcpu.allocate(&Request::new(bytes, 4)), Err(error));

    let (pcpu, _) = hardened(&small_machine(1), 8);
    for (align, guards_bytes) in [(4, 32), (64, 80), (4096, 4112)] {
        let limit_bytes = UNIT_BYTES - guards_bytes;
        let request = Request::new(limit_bytes, align);
        assert!(pcpu.allocate(&request).is_ok(), "{align}");
        let bytes = limit_bytes + 1;
        let error = AllocError::TooLarge { bytes, limit_bytes };
        assert_eq!(pcpu.allocate(&Request::new(bytes, align)), Err(error));
    }
    for (bytes, align, error) in [
        (0, 4, AllocError::ZeroSize),
        (8, 0, AllocError::AlignNotPowerOfTwo { align: 0 }),
        (8, 24, AllocError::AlignNotPowerOfTwo { align: 24 }),
        (
            8,
            8192,
            AllocError::AlignTooLarge {
                align: 8192,
                limit: 4096,
            },
        ),
        (
            8,
            1 << 63,
            AllocError::AlignTooLarge {
                align: 1 << 63,
                limit: 4096,
            },
        ),
        (
            usize::MAX,
            4,
            AllocError::TooLarge {
                bytes: usize::MAX,
                limit_bytes: UNIT_BYTES,
            },
        ),
    ] {
        assert_eq!(pcpu.allocate(&Request::new(bytes, align)), Err(error));
    }
}

/// A hook need not care for leaks.
#[test]
fn a_hook_without_leaks() {
    struct Quiet;
    impl FindingHook for Quiet {
        fn found(&self, finding: &Finding) {
            panic!("{finding}");
        }
    }
    let mut pcpu = small_machine(1).build().unwrap();
    pcpu.harden(Hardening::new(&Quiet)).unwrap();
    pcpu.allocate(&Request::new(8, 8)).unwrap();
}
