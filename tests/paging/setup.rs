//! What is refused at set-up: by one clear line, with the value and the limit.

use parking_lot::RawMutex;
use pcpu::backing::Backing;
use pcpu::backing::paging::{
    FirstChunkError, InitialError, InstanceError, Paging, PagingError, PagingSetup,
};
use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};
use x86_64::VirtAddr;

use crate::host::Host;
use crate::machine::{BASE, setup};

fn plan(words: &mut [u32], cpus: u32, unit_bytes: usize, page_bytes: usize) -> UnitPlan<'_> {
    let spec = FirstChunkSpec {
        static_bytes: 100,
        atom_bytes: page_bytes,
        page_bytes,
        ..FirstChunkSpec::default()
    };
    let topology = EvenNodes::new(cpus, 1).unwrap();
    UnitPlan::exact(&spec, unit_bytes, &topology, words).unwrap()
}

fn refused(host: &Host, setup: PagingSetup, plan: &UnitPlan<'_>) -> PagingError {
    // SAFETY: it is refused.
    let result = unsafe { Paging::<_, RawMutex>::new(host, setup, plan) };
    let error = result.expect_err("it is refused");
    assert!(host.out().is_empty());
    assert!(!error.to_string().contains('\n'));
    error
}

#[test]
fn what_cannot_be_is_refused() {
    let host = Host::new(1, 200, 4);
    let mut words = vec![0; storage_words(4)];
    let good = setup(&host);

    let large_pages = plan(&mut words, 4, 64 << 10, 16 << 10);
    let error = refused(&host, good, &large_pages);
    assert_eq!(
        error,
        PagingError::PageSize {
            page_bytes: 16 << 10
        }
    );

    let large = plan(&mut words, 4, 2 << 30, 4096);
    let (unit_bytes, limit_bytes) = (2 << 30, 1 << 30);
    let error = refused(&host, good, &large);
    assert_eq!(
        error,
        PagingError::UnitTooLarge {
            unit_bytes,
            limit_bytes
        }
    );

    let plan = plan(&mut words, 4, 32 << 10, 4096);
    let address = host.mmu.window.start + (1 << 30);
    let window = VirtAddr::new(address as u64);
    let align_bytes = 1 << 39;
    let error = refused(&host, PagingSetup { window, ..good }, &plan);
    assert_eq!(
        error,
        PagingError::WindowMisaligned {
            address,
            align_bytes
        }
    );

    let neutral_base = 1 << 63;
    let offset = (host.mmu.window.start + (1 << 30)).wrapping_sub(neutral_base);
    let error = refused(
        &host,
        PagingSetup {
            neutral_base,
            ..good
        },
        &plan,
    );
    assert_eq!(error, PagingError::OffsetNotCanonical { offset });

    // SAFETY: the set-up is true; nothing of it is used.
    let paging = unsafe { Paging::<_, RawMutex>::new(&host, good, &plan) }.unwrap();
    // SAFETY: as above.
    let again = unsafe { Paging::<_, RawMutex>::new(&host, good, &plan) };
    let address = host.mmu.window.start;
    assert_eq!(again.err(), Some(PagingError::WindowInUse { address }));
    // SAFETY: nobody used it.
    unsafe { paging.tear_down() };
    assert!(host.out().is_empty());
}

/// Small units make room for many chunks, of which only so many are wanted.
#[test]
fn chunks_are_limited() {
    let host = Host::new(1, 200, 320);
    let spec = FirstChunkSpec {
        static_bytes: 100,
        ..FirstChunkSpec::default()
    };
    let mut words = vec![0; storage_words(240)];
    let topology = EvenNodes::new(240, 1).unwrap();
    let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
    let room = (1 << 30) / plan.sizes().unit_bytes() as u32;
    for (max_chunks, chunks) in [
        (0, 1),
        (1, 1),
        (100, 100),
        (room + 1, room),
        (u32::MAX, room),
    ] {
        let setup = PagingSetup {
            max_chunks,
            ..setup(&host)
        };
        // SAFETY: the set-up is true; nothing of it is used.
        let paging = unsafe { Paging::<_, RawMutex>::new(&host, setup, &plan) }.unwrap();
        assert_eq!(paging.window().chunks, chunks, "{max_chunks}");
        // SAFETY: nobody used it.
        unsafe { paging.tear_down() };
    }
    assert!(host.out().is_empty());
}

#[test]
fn windows_end_with_their_half_of_the_address_space() {
    let host = Host::new(1, 200, 4);
    let mut words = vec![0; storage_words(600)];
    let plan = plan(&mut words, 600, 32 << 10, 4096);
    for address in [(1_usize << 47) - (1 << 39), (1_usize << 39).wrapping_neg()] {
        let window = VirtAddr::new(address as u64);
        let bytes = 601 << 30;
        let error = refused(
            &host,
            PagingSetup {
                window,
                ..setup(&host)
            },
            &plan,
        );
        assert_eq!(error, PagingError::WindowTooLong { address, bytes });
    }
}

#[test]
fn the_first_chunk_is_that_of_the_set_up() {
    let host = Host::new(1, 400, 4);
    let (mut words, mut other_words) = (vec![0; storage_words(4)], vec![0; storage_words(4)]);
    let plan_here = plan(&mut words, 4, 32 << 10, 4096);
    let other = plan(&mut other_words, 4, 64 << 10, 4096);
    // SAFETY: the set-up is true; nothing of it is used.
    let mut paging =
        unsafe { Paging::<_, RawMutex>::new(&host, setup(&host), &plan_here) }.unwrap();
    let before = host.out();
    let mut offsets = [0; 4];
    let bytes = [1; 100];
    let template = Template {
        bytes: &bytes,
        base: BASE,
    };
    // SAFETY: nobody uses the windows.
    let early = unsafe { paging.set_initial(BASE, &[1]) };
    assert_eq!(early, Err(InitialError::NoFirstChunk));
    let error = paging.build_first_chunk(other, template, &mut offsets, |_| true);
    let (what, given, set_up_for) = ("bytes of a unit", 64 << 10, 32 << 10);
    let other_plan = FirstChunkError::OtherPlan {
        what,
        given,
        set_up_for,
    };
    assert_eq!(error.err(), Some(other_plan));
    let elsewhere = Template {
        base: BASE + 4096,
        ..template
    };
    let error = paging.build_first_chunk(plan_here, elsewhere, &mut offsets, |_| true);
    assert!(matches!(
        error,
        Err(FirstChunkError::OtherPlan {
            what: "the neutral base",
            ..
        })
    ));
    let short = Template {
        bytes: &bytes[1..],
        ..template
    };
    let error = paging.build_first_chunk(plan_here, short, &mut offsets, |_| true);
    assert!(matches!(error, Err(FirstChunkError::Build(_))));
    assert_eq!(host.out(), before);

    let built = paging.build_first_chunk(plan_here, template, &mut offsets, |cpu| cpu.get() < 2);
    let units = [0, 1, 2, 3].map(|cpu| built.as_ref().unwrap().unit_address(CpuId::new(cpu)));
    let mut other_offsets = [0; 4];
    let again = paging.build_first_chunk(plan_here, template, &mut other_offsets, |_| true);
    assert_eq!(again.err(), Some(FirstChunkError::Again));
    for unit in units {
        // SAFETY: readable on every possible CPU.
        assert_eq!(unsafe { unit.unwrap().cast::<[u8; 100]>().read() }, bytes);
    }
    // SAFETY: nobody uses it any more.
    unsafe { paging.tear_down() };
    assert!(host.out().is_empty());
}

/// Windows, first chunk and allocator at one go: what is refused says at which of the three, and leaves nothing.
#[test]
fn all_is_set_up_at_one_go() {
    let host = Host::new(1, 400, 4);
    let bytes = [1; 100];
    let (mut words, mut offsets) = (vec![0; storage_words(4)], [0; 4]);
    let plan = plan(&mut words, 4, 32 << 10, 4096);
    let template = Template {
        bytes: &bytes,
        base: BASE,
    };
    let boot_cpu = CpuId::new(0);
    let refused = |setup, template, offsets: &mut [usize]| {
        // SAFETY: the set-up is true, or refused.
        let result = unsafe {
            Paging::<_, RawMutex>::set_up(&host, setup, plan, template, offsets, boot_cpu)
        };
        let error = result.expect_err("it is refused");
        assert!(host.out().is_empty(), "{error}");
        assert!(host.level_4_words().iter().all(|&word| word == 0));
        assert!(!error.to_string().contains('\n'));
        error
    };
    let window = VirtAddr::new(host.mmu.window.start as u64 + (1 << 30));
    let misaligned = PagingSetup {
        window,
        ..setup(&host)
    };
    let error = refused(misaligned, template, &mut offsets);
    let is_windows = matches!(
        error,
        InstanceError::Windows(PagingError::WindowMisaligned { .. })
    );
    assert!(is_windows, "{error}");
    let error = refused(setup(&host), template, &mut offsets[..3]);
    let is_first_chunk = matches!(error, InstanceError::FirstChunk(FirstChunkError::Build(_)));
    assert!(is_first_chunk, "{error}");

    // SAFETY: the set-up is true, and the window nobody else's.
    let pcpu = unsafe {
        Paging::<_, RawMutex>::set_up(&host, setup(&host), plan, template, &mut offsets, boot_cpu)
    };
    let mut pcpu = pcpu.unwrap();
    pcpu.enable_caches().unwrap();
    for cpu in (0..4).map(CpuId::new) {
        pcpu.bring_up(cpu).unwrap();
        let copy = pcpu.per_cpu_address(BASE, cpu).unwrap();
        let copy = std::ptr::with_exposed_provenance::<[u8; 100]>(copy);
        // SAFETY: the static region of a CPU that has memory.
        assert_eq!(unsafe { copy.read() }, bytes);
    }
}
