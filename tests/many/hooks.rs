//! Batches of an instance that tells of its areas: to an event hook, or what is wrong with them, in hardened mode.

use std::sync::Mutex;

use pcpu::hardened::{Finding, FindingHook, Hardening};
use pcpu::{AllocError, AllocFlags, Request};

use crate::batch::{OUT_OF_PLACES, free_many, free_many_at};
use crate::cached::seat;
use crate::copies::stamp;
use crate::small::small_machine;
use crate::told::{Hook, Live};

#[test]
fn the_hook_is_told_of_each_area_or_of_one_failure() {
    static HOOK: Hook = Hook::new();
    for is_cached in [false, true] {
        let mut pcpu = small_machine(2).chunks(3).build().unwrap();
        if is_cached {
            pcpu.enable_caches().unwrap();
        }
        pcpu.set_event_hook(Some(&HOOK));
        let here = seat(&pcpu, 0);
        let request = Request::new(1000, 8).with_owner(77);
        // Some of them in memory that is there, some in chunks to be made.
        let mut out = [0; 40];
        pcpu.allocate_many_at(&here, &request, &mut out).unwrap();
        let told = || HOOK.told().live.clone();
        let expected: Live = out.iter().map(|&address| (address, (1000, 77))).collect();
        assert_eq!(told(), expected);
        let refused = pcpu.allocate_many_at(&here, &request, &mut [0; 100]);
        assert_eq!(refused, Err(OUT_OF_PLACES));
        assert_eq!(told(), expected);
        assert_eq!(HOOK.told().failures, 1 + u64::from(is_cached));
        free_many_at(&pcpu, &here, &out);
        assert!(told().is_empty());
    }
}

#[derive(Debug)]
struct Findings(Mutex<Vec<Finding>>);

impl FindingHook for Findings {
    fn found(&self, finding: &Finding) {
        self.0.lock().unwrap().push(*finding);
    }
}

#[test]
fn a_hardened_instance_serves_batches() {
    static FINDINGS: Findings = Findings(Mutex::new(Vec::new()));
    let mut pcpu = small_machine(2).chunks(3).build().unwrap();
    let hardening = Hardening::new(&FINDINGS);
    pcpu.harden(hardening).unwrap();
    let live = || {
        let mut live = 0;
        pcpu.visit_live_areas(|_| live += 1);
        live
    };
    let mut out = [0; 10];
    pcpu.allocate_many_at(&seat(&pcpu, 0), &Request::new(20, 4), &mut out)
        .unwrap();
    out.iter().for_each(|&address| stamp(&pcpu, (address, 20)));
    assert_eq!((live(), pcpu.check_areas()), (10, 0));
    let refused = pcpu.allocate_many(&Request::new(3000, 4), &mut [0; 50]);
    assert_eq!(refused, Err(OUT_OF_PLACES));
    assert_eq!((live(), pcpu.check_areas()), (10, 0));
    let trying = Request::new(8, 4).with_flags(AllocFlags::TRY);
    assert_eq!(
        pcpu.allocate_many(&trying, &mut [0; 2]),
        Err(AllocError::Busy)
    );
    free_many(&pcpu, &out).unwrap();
    assert_eq!(live(), 0);
    assert_eq!(pcpu.stats().failures, 2);
    assert!(FINDINGS.0.lock().unwrap().is_empty());
}
