//! What runs out, of any kind, is back as soon as somebody gives it back.

use pcpu::backing::BackingError;
use pcpu::backing::sim::SimAllocator;
use pcpu::unit::{CpuId, NodeId};
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, Request};

use crate::audit::audit;
use crate::free::FreeArea;
use crate::owner::Live;
use crate::same::assert_same;
use crate::small::small_machine;
use crate::table::{ATOMIC, WHOLE};

/// Serves `request` until it is refused; the areas and the error.
fn exhaust(pcpu: &SimAllocator, request: &Request) -> (Live, AllocError) {
    let mut live = Live::new();
    loop {
        match pcpu.allocate(request) {
            Ok(address) => live.push((address, request.bytes())),
            Err(error) => return (live, error),
        }
    }
}

#[test]
fn whatever_runs_out_comes_back() {
    let metadata_bytes = small_machine(2).build().unwrap().stats().metadata_bytes;
    let chunk_bytes = small_machine(2).build().unwrap();
    let chunk_bytes = chunk_bytes.chunk_metadata_layout().size();
    for (machine, error, chunks) in [
        (
            small_machine(2).metadata_bytes(metadata_bytes + 2 * chunk_bytes),
            BackingError::OutOfMetadata,
            2,
        ),
        (
            small_machine(2).chunks(4),
            BackingError::OutOfAddressSpace,
            3,
        ),
        // Three chunks' pages on two CPUs, and two pages that are not enough for a fourth.
        (
            small_machine(2).node_frames(3 * 8 * 2 + 2),
            BackingError::OutOfFrames,
            3,
        ),
    ] {
        for flags in [AllocFlags::empty(), ATOMIC] {
            let pcpu = machine.build().unwrap();
            let whole = WHOLE.with_flags(flags);
            let metadata_bytes = pcpu.stats().metadata_bytes;
            let (live, refused) = exhaust(&pcpu, &whole);
            assert_eq!(refused, AllocError::Backing(error));
            assert_eq!(live.len(), chunks);
            let before = audit(&pcpu);
            for _ in 0..3 {
                assert_eq!(pcpu.allocate(&whole), Err(AllocError::Backing(error)));
                assert_same(&before, &audit(&pcpu));
            }
            // What is small still finds room in the first chunk.
            let small = pcpu.allocate(&Request::new(64, 64)).unwrap();
            pcpu.free_area(small, FreeFlags::empty()).unwrap();
            pcpu.free_area(live[1].0, FreeFlags::empty()).unwrap();
            assert_eq!(pcpu.allocate(&whole), Ok(live[1].0));
            for (address, _) in live {
                pcpu.free_area(address, FreeFlags::empty()).unwrap();
            }
            pcpu.trim(0);
            // SAFETY: nobody frees meanwhile.
            unsafe { pcpu.trim_metadata() };
            let end = audit(&pcpu).stats;
            assert_eq!((end.chunks, end.metadata_bytes), (1, metadata_bytes));
            assert_eq!(exhaust(&pcpu, &whole).0.len(), chunks);
        }
    }
}

/// A node whose frames are out takes another's, page by page; what it borrowed goes back to where it came from.
#[test]
fn an_empty_node_borrows() {
    // CPUs 0 and 1 on node 0, of which both are up; 2 and 3 on node 1, of which none is.
    let pcpu = small_machine(4)
        .nodes(2)
        .online(2)
        .node_frames(20)
        .build()
        .unwrap();
    let left = || [0, 1].map(|node| pcpu.backing().frames_left(NodeId::new(node)));
    let first = pcpu.allocate(&WHOLE).unwrap();
    assert_eq!(left(), [Some(4), Some(20)]);
    assert_eq!(pcpu.backing().frames_from_afar(), 0);
    let second = pcpu.allocate(&WHOLE).unwrap();
    assert_eq!(left(), [Some(0), Some(8)]);
    assert_eq!(pcpu.backing().frames_from_afar(), 12);
    // Sixteen more are not to be had, eight for a CPU of the other node neither with two chunks of eight pages.
    let out = AllocError::Backing(BackingError::OutOfFrames);
    assert_eq!(pcpu.allocate(&WHOLE), Err(out));
    let cpu = CpuId::new(2);
    let before = audit(&pcpu);
    let no_memory = CpuError::NoMemory {
        cpu,
        error: BackingError::OutOfFrames,
    };
    assert_eq!(pcpu.bring_up(cpu), Err(no_memory));
    assert_same(&before, &audit(&pcpu));
    assert_eq!(left(), [Some(0), Some(8)]);
    pcpu.free_area(first, FreeFlags::empty()).unwrap();
    pcpu.trim(0);
    assert_eq!(left(), [Some(16), Some(8)]);
    assert_eq!(pcpu.backing().frames_from_afar(), 12);
    assert_eq!(pcpu.bring_up(cpu), Ok(()));
    assert_eq!(left(), [Some(16), Some(0)]);
    pcpu.free_area(second, FreeFlags::empty()).unwrap();
    pcpu.trim(0);
    assert_eq!(left(), [Some(20), Some(20)]);
}
