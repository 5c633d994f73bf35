//! Builds that succeed keep exactly what the CPUs need; builds that fail, at whichever step, keep nothing.

use std::collections::BTreeSet;

use pcpu::{
    embed, page,
    unit::{
        BuildError, Contents, CpuId, EvenNodes, FirstChunk, FirstChunkKind, FirstChunkSpec,
        LayoutError, NodeId, NodeMap, Storage, Template, UnitPlan, storage_words,
    },
};

use crate::arena::{Arena, Home, LINE_BYTES};

const BASE: usize = 0x7000_0000;

const TEMPLATE: [u8; 5001] = {
    let mut bytes = [0; 5001];
    let mut index = 0;
    while index < bytes.len() {
        bytes[index] = (index % 251) as u8;
        index += 1;
    }
    bytes
};

/// Five CPUs (1, 2, 4 on node 0; 3, 6 on node 1), an odd static size, two units of 32 KiB to an allocation.
fn machine() -> ([Option<NodeId>; 7], FirstChunkSpec) {
    let [a, b] = [0, 1].map(|node| Some(NodeId::new(node)));
    let spec = FirstChunkSpec {
        static_bytes: TEMPLATE.len(),
        reserved_bytes: 400,
        atom_bytes: 64 << 10,
        ..Default::default()
    };
    ([None, a, a, b, a, None, b], spec)
}

/// Builds on the machine; the checks run on the chunk while the storage lives.
fn build(
    kind: FirstChunkKind,
    arena: &mut Arena,
    check: impl FnOnce(&FirstChunk<'_>, &Arena),
) -> Result<(), BuildError<&'static str>> {
    let (nodes, spec) = machine();
    let topology = NodeMap::new(&nodes).unwrap();
    let (mut words, mut offsets) = ([0; storage_words(7)], [usize::MAX; 9]);
    // The template doesn't outlive the build.
    let copy = TEMPLATE.to_vec();
    let template = Template {
        bytes: &copy,
        base: BASE,
    };
    let chunk = match kind {
        FirstChunkKind::Embed => {
            let plan = UnitPlan::embed(&spec, &topology, &mut words)?;
            assert_eq!(
                (plan.nr_units(), plan.nr_groups(), plan.sizes().unit_bytes()),
                (6, 2, 32 << 10)
            );
            embed::build(plan, template, &mut offsets, arena)?
        }
        FirstChunkKind::Page => page::build(
            UnitPlan::page(&spec, &topology, &mut words)?,
            template,
            &mut offsets,
            arena,
        )?,
    };
    drop(copy);
    check(&chunk, arena);
    Ok(())
}

/// Every possible CPU's unit holds the template and zeroes, and that is all that is still handed out.
fn check_chunk(chunk: &FirstChunk<'_>, arena: &Arena) {
    let sum_bytes = chunk.plan().sizes().sum_bytes();
    assert_eq!(chunk.base(), BASE);
    assert_eq!(chunk.unit_offsets().len(), 7);
    let mut kept = BTreeSet::new();
    for cpu in chunk.plan().possible_cpus() {
        let address = BASE.wrapping_add(chunk.unit_offsets()[cpu.index()]);
        assert_eq!(chunk.unit_address(cpu).unwrap().as_ptr().addr(), address);
        assert_eq!(
            chunk.unit_offset(cpu),
            Some(chunk.unit_offsets()[cpu.index()])
        );
        let unit = arena.read(address, sum_bytes);
        assert_eq!(unit[..TEMPLATE.len()], TEMPLATE);
        assert!(
            unit[TEMPLATE.len()..].iter().all(|byte| *byte == 0),
            "CPU {cpu}"
        );
        kept.extend((address..address + sum_bytes).step_by(LINE_BYTES));
    }
    assert_eq!(kept.len() * LINE_BYTES, 5 * sum_bytes, "units overlap");
    assert_eq!(arena.held, kept);
    assert_eq!(
        kept.len() * LINE_BYTES + arena.returned_bytes,
        arena.allocated_bytes
    );
    for cpu in [0, 5, 7, u32::MAX].map(CpuId::new) {
        assert_eq!(
            (chunk.unit_offset(cpu), chunk.unit_address(cpu)),
            (None, None)
        );
    }
    assert_eq!((chunk.unit_offsets()[0], chunk.unit_offsets()[5]), (0, 0));
}

#[test]
fn embed_keeps_what_cpus_need_and_gives_back_the_rest() {
    for contents in [Contents::Dirty, Contents::Zeroed] {
        // Side by side, in windows of their own, and a line more than pages.
        for extra_stride_bytes in [0, 96 << 10, 4096 + 64] {
            let mut arena = Arena::new(Home {
                contents,
                extra_stride_bytes,
                gap_bytes: 300 << 10,
                ..Home::default()
            });
            build(FirstChunkKind::Embed, &mut arena, check_chunk).unwrap();
            assert_eq!(arena.nodes, [0, 1]);
            // 6 units of 32 KiB came, of 5 of them 20 KiB stay.
            assert_eq!(
                (arena.allocated_bytes, arena.returned_bytes),
                (192 << 10, 92 << 10)
            );
        }
    }
}

#[test]
fn page_maps_what_cpus_need() {
    for contents in [Contents::Dirty, Contents::Zeroed] {
        for extra_stride_bytes in [0, 4096 * 5] {
            let mut arena = Arena::new(Home {
                contents,
                extra_stride_bytes,
                ..Home::default()
            });
            build(FirstChunkKind::Page, &mut arena, check_chunk).unwrap();
            assert_eq!(
                (arena.allocated_bytes, arena.returned_bytes),
                (100 << 10, 0)
            );
            // CPUs 1, 2, 3, 4, 6 in turn, each from its own node.
            assert_eq!(
                arena.nodes,
                [[0; 5], [0; 5], [1; 5], [0; 5], [1; 5]].concat()
            );
            let stride_bytes = (32 << 10) + extra_stride_bytes;
            assert_eq!(
                arena.window,
                Some((arena.start.as_ptr().addr(), 4 * stride_bytes + (32 << 10)))
            );
        }
    }
}

#[test]
fn whichever_call_fails_nothing_stays() {
    // Embed: an area per group. Page: the window and 5 pages for each of 5 CPUs.
    for (kind, calls) in [(FirstChunkKind::Embed, 2), (FirstChunkKind::Page, 26)] {
        for extra_stride_bytes in [0, 32 << 10] {
            for failing_call in 0..calls {
                let mut arena = Arena::new(Home {
                    failing_call,
                    extra_stride_bytes,
                    ..Home::default()
                });
                let error = build(kind, &mut arena, |_, _| panic!("it was to fail")).unwrap_err();
                arena.assert_empty();
                assert_eq!(arena.calls, failing_call + 1);
                let node = NodeId::new(failing_call as u32);
                let window_bytes = 5 * (32 << 10) + 4 * extra_stride_bytes;
                let want = match (kind, failing_call) {
                    (FirstChunkKind::Embed, _) => BuildError::Area {
                        group: failing_call as u32,
                        node,
                        error: "out of memory",
                    },
                    (FirstChunkKind::Page, 0) => BuildError::Window {
                        window_bytes,
                        error: "out of memory",
                    },
                    (FirstChunkKind::Page, call) => {
                        let cpu = CpuId::new([1, 2, 3, 4, 6][(call - 1) / 5]);
                        BuildError::Page {
                            cpu,
                            page: (call - 1) % 5,
                            error: "out of memory",
                        }
                    }
                };
                assert_eq!(error, want);
                assert!(
                    error.to_string().ends_with("out of memory")
                        && !error.to_string().contains('\n')
                );
            }
            let mut arena = Arena::new(Home {
                failing_call: calls,
                extra_stride_bytes,
                ..Home::default()
            });
            build(kind, &mut arena, check_chunk).unwrap();
            assert_eq!(arena.calls, calls);
        }
    }
}

#[test]
fn many_groups_roll_back_from_every_one() {
    let topology = EvenNodes::new(40, 20).unwrap();
    let spec = FirstChunkSpec {
        atom_bytes: 4096,
        ..Default::default()
    };
    for failing_call in 0..20 {
        let (mut words, mut offsets) = ([0; storage_words(40)], [0; 40]);
        let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
        let mut arena = Arena::new(Home {
            failing_call,
            ..Home::default()
        });
        let error = embed::build(
            plan,
            Template {
                bytes: &[],
                base: 0,
            },
            &mut offsets,
            &mut arena,
        )
        .unwrap_err();
        assert!(matches!(error, BuildError::Area { group, .. } if group as usize == failing_call));
        arena.assert_empty();
        assert_eq!(arena.allocated_bytes, failing_call * (64 << 10));
    }
}

#[test]
fn groups_too_far_apart_are_refused_and_freed() {
    // Two areas of 4 and 2 units of 32 KiB with a gap between them: a span that three quarters can equal.
    let (gap_bytes, span_bytes) = (384 << 10, 576 << 10);
    for (vm_space_bytes, fits) in [(768 << 10, true), ((768 << 10) - 4, false), (0, false)] {
        let home = Home {
            gap_bytes,
            vm_space_bytes,
            ..Home::default()
        };
        let mut arena = Arena::new(home);
        let result = build(FirstChunkKind::Embed, &mut arena, check_chunk);
        if fits {
            assert_eq!(result, Ok(()));
        } else {
            let limit_bytes = vm_space_bytes / 4 * 3;
            assert_eq!(
                result,
                Err(BuildError::TooFarApart {
                    span_bytes,
                    limit_bytes
                })
            );
            arena.assert_empty();
        }
    }
}

#[test]
fn falls_back_to_pages_with_the_same_static_storage() {
    let (nodes, spec) = machine();
    let topology = NodeMap::new(&nodes).unwrap();
    let template = Template {
        bytes: &TEMPLATE,
        base: BASE,
    };
    let storage = || Storage {
        words: Box::leak(Box::new([0; storage_words(7)])),
        unit_offsets: Box::leak(Box::new([0; 7])),
    };
    let build = |early: &mut Arena, pages: &mut Arena| {
        let mut reason = None;
        let chunk: Result<FirstChunk<'static>, _> = embed::build_or_page(
            &spec,
            &topology,
            template,
            storage(),
            (early, pages),
            |error| reason = Some(error),
        );
        (chunk, reason)
    };

    let (mut early, mut pages) = (Arena::new(Home::default()), Arena::new(Home::default()));
    let (chunk, reason) = build(&mut early, &mut pages);
    check_chunk(&chunk.unwrap(), &early);
    assert_eq!((reason, pages.calls), (None, 0));

    let far = Home {
        vm_space_bytes: 4096,
        ..Home::default()
    };
    let (mut early, mut pages) = (Arena::new(far), Arena::new(Home::default()));
    let (chunk, reason) = build(&mut early, &mut pages);
    check_chunk(&chunk.unwrap(), &pages);
    assert_eq!(chunk.unwrap().kind(), FirstChunkKind::Page);
    assert!(matches!(reason, Some(BuildError::TooFarApart { .. })));
    early.assert_empty();

    let (mut early, mut pages) = (
        Arena::new(far),
        Arena::new(Home {
            failing_call: 20,
            ..Home::default()
        }),
    );
    let (chunk, reason) = build(&mut early, &mut pages);
    assert!(matches!(chunk, Err(BuildError::Page { .. })) && reason.is_some());
    early.assert_empty();
    pages.assert_empty();
}

#[test]
fn memory_that_does_not_fit_the_plan_is_not_asked() {
    let refused = |kind, home| {
        let mut arena = Arena::new(home);
        let error = build(kind, &mut arena, |_, _| panic!("it was to fail")).unwrap_err();
        assert_eq!(arena.calls, 0);
        error
    };
    let home = Home::default();
    for kind in [FirstChunkKind::Embed, FirstChunkKind::Page] {
        // One byte less than a unit.
        let error = refused(
            kind,
            Home {
                extra_stride_bytes: usize::MAX,
                ..home
            },
        );
        assert_eq!(
            error,
            BuildError::StrideTooSmall {
                stride_bytes: 32_767,
                unit_bytes: 32_768
            }
        );
        let error = refused(
            kind,
            Home {
                extra_stride_bytes: 1 << 62,
                ..home
            },
        );
        assert!(matches!(
            error,
            BuildError::Layout(LayoutError::SizeOverflow {
                what: "all units together",
                ..
            })
        ));
    }
    let error = refused(
        FirstChunkKind::Page,
        Home {
            extra_stride_bytes: 64,
            ..home
        },
    );
    assert_eq!(
        error,
        BuildError::StrideMisaligned {
            stride_bytes: 32_832,
            page_bytes: 4096
        }
    );
    let error = refused(
        FirstChunkKind::Page,
        Home {
            page_bytes: 16 << 10,
            ..home
        },
    );
    assert_eq!(
        error,
        BuildError::PageSize {
            memory_page_bytes: 16_384,
            plan_page_bytes: 4096
        }
    );
}

#[test]
fn template_and_plan_must_belong_together() {
    let topology = EvenNodes::new(2, 1).unwrap();
    let spec = FirstChunkSpec {
        static_bytes: 100,
        ..Default::default()
    };
    let mut arena = Arena::new(Home::default());
    let (mut words, mut page_words, mut offsets) =
        ([0; storage_words(2)], [0; storage_words(2)], [0; 2]);
    let embed_plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
    let page_plan = UnitPlan::page(&spec, &topology, &mut page_words).unwrap();
    for template_bytes in [0, 99, 101] {
        let bytes = vec![1; template_bytes];
        let template = Template {
            bytes: &bytes,
            base: 0,
        };
        let want = BuildError::TemplateSize {
            template_bytes,
            static_bytes: 100,
        };
        assert_eq!(
            embed::build(embed_plan, template, &mut offsets, &mut arena).unwrap_err(),
            want
        );
        assert_eq!(
            page::build(page_plan, template, &mut offsets, &mut arena).unwrap_err(),
            want
        );
    }
    let template = Template {
        bytes: &[0; 100],
        base: 0,
    };
    let (embedded, paged) = (FirstChunkKind::Embed, FirstChunkKind::Page);
    let error = embed::build(page_plan, template, &mut offsets, &mut arena).unwrap_err();
    assert_eq!(
        error,
        BuildError::WrongKind {
            plan: paged,
            builder: embedded
        }
    );
    let error = page::build(embed_plan, template, &mut offsets, &mut arena).unwrap_err();
    assert_eq!(
        error,
        BuildError::WrongKind {
            plan: embedded,
            builder: paged
        }
    );
    assert_eq!(arena.calls, 0);
}
