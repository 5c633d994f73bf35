//! Sizes and storage that make no layout.

use std::mem::discriminant;

use pcpu::{
    embed,
    unit::{
        BuildError, EvenNodes, FirstChunkSpec, LayoutError, MAX_BYTES, Template, UnitPlan,
        storage_words,
    },
};

use crate::arena::{Arena, Home};

fn size_error(spec: FirstChunkSpec) -> LayoutError {
    let topology = EvenNodes::new(3, 1).unwrap();
    let (mut words, mut page_words) = ([0; storage_words(3)], [0; storage_words(3)]);
    let error = UnitPlan::embed(&spec, &topology, &mut words).unwrap_err();
    // What isn't about the atom or the dynamic size is wrong for single pages as well.
    if let Err(page_error) = UnitPlan::page(&spec, &topology, &mut page_words) {
        assert_eq!(discriminant(&error), discriminant(&page_error));
    }
    assert!(!error.to_string().contains('\n'));
    error
}

#[test]
fn sizes_that_make_no_layout() {
    let good = FirstChunkSpec::default();
    for page_bytes in [
        0,
        1,
        2048,
        3000,
        4097,
        12_288,
        128 << 10,
        usize::MAX,
        1 << 63,
    ] {
        assert_eq!(
            size_error(FirstChunkSpec { page_bytes, ..good }),
            LayoutError::PageSize { page_bytes }
        );
    }
    for atom_bytes in [0, 1, 4095, 4097, 6144, usize::MAX] {
        let want = LayoutError::AtomMisaligned {
            atom_bytes,
            page_bytes: 4096,
        };
        assert_eq!(size_error(FirstChunkSpec { atom_bytes, ..good }), want);
    }
    let spec = FirstChunkSpec {
        atom_bytes: 4096,
        page_bytes: 65_536,
        ..good
    };
    assert_eq!(
        size_error(spec),
        LayoutError::AtomMisaligned {
            atom_bytes: 4096,
            page_bytes: 65_536
        }
    );
    for reserved_bytes in [1, 2, 3, 8193, usize::MAX] {
        let want = LayoutError::ReservedMisaligned { reserved_bytes };
        assert_eq!(
            size_error(FirstChunkSpec {
                reserved_bytes,
                ..good
            }),
            want
        );
    }
    for min_unit_bytes in [0, 4096, 32_767] {
        let want = LayoutError::UnitTooSmall {
            unit_bytes: min_unit_bytes,
            limit_bytes: 32_768,
        };
        assert_eq!(
            size_error(FirstChunkSpec {
                min_unit_bytes,
                ..good
            }),
            want
        );
    }
}

#[test]
fn sizes_that_overflow() {
    let good = FirstChunkSpec::default();
    let overflow = |what, bytes| LayoutError::SizeOverflow {
        what,
        bytes,
        limit_bytes: MAX_BYTES,
    };
    let max = usize::MAX as u128;
    // usize::MAX + 12288, rounded up to a page.
    let (regions, bytes) = ("the regions of a unit", max + 1 + 12_288);
    assert_eq!(
        size_error(FirstChunkSpec {
            static_bytes: usize::MAX,
            ..good
        }),
        overflow(regions, bytes)
    );
    let spec = FirstChunkSpec {
        reserved_bytes: usize::MAX - 3,
        ..good
    };
    assert_eq!(size_error(spec), overflow(regions, bytes));
    assert_eq!(
        size_error(FirstChunkSpec {
            dyn_bytes: usize::MAX,
            ..good
        }),
        overflow(regions, max + 1)
    );
    let spec = FirstChunkSpec {
        static_bytes: usize::MAX,
        reserved_bytes: usize::MAX - 3,
        dyn_bytes: usize::MAX,
        ..good
    };
    assert_eq!(size_error(spec), overflow(regions, 3 * (max + 1)));
    let alloc = "an allocation of units";
    let spec = FirstChunkSpec {
        atom_bytes: 1 << 63,
        ..good
    };
    assert_eq!(size_error(spec), overflow(alloc, 1 << 63));
    let spec = FirstChunkSpec {
        min_unit_bytes: usize::MAX,
        ..good
    };
    assert_eq!(size_error(spec), overflow(alloc, max + 1));
    // Each unit would do, all three don't.
    let spec = FirstChunkSpec {
        static_bytes: 1 << 62,
        atom_bytes: 4096,
        ..good
    };
    assert_eq!(
        size_error(spec),
        overflow("all units together", 3 * ((1 << 62) + 12_288))
    );
}

#[test]
fn exact_units() {
    let topology = EvenNodes::new(5, 2).unwrap();
    let spec = FirstChunkSpec {
        static_bytes: 100_000,
        ..Default::default()
    };
    let mut words = [0; storage_words(5)];
    let mut exact = |unit_bytes| {
        UnitPlan::exact(&spec, unit_bytes, &topology, &mut words).map(|plan| {
            (
                plan.nr_units(),
                plan.sizes().unit_bytes(),
                plan.sizes().sum_bytes(),
            )
        })
    };
    assert_eq!(exact(114_688), Ok((5, 114_688, 114_688)));
    assert_eq!(exact(262_144), Ok((5, 262_144, 114_688)));
    assert_eq!(
        exact(110_592),
        Err(LayoutError::UnitTooSmall {
            unit_bytes: 110_592,
            limit_bytes: 114_688
        })
    );
    assert_eq!(
        exact(0),
        Err(LayoutError::UnitTooSmall {
            unit_bytes: 0,
            limit_bytes: 114_688
        })
    );
    assert_eq!(
        exact(262_208),
        Err(LayoutError::UnitMisaligned {
            unit_bytes: 262_208,
            page_bytes: 4096
        })
    );
    let error = exact(1 << 63).unwrap_err();
    assert_eq!(
        error,
        LayoutError::SizeOverflow {
            what: "a unit",
            bytes: 1 << 63,
            limit_bytes: MAX_BYTES
        }
    );
}

#[test]
fn storage_that_is_too_small() {
    let topology = EvenNodes::new(7, 1).unwrap();
    let needed = storage_words(7);
    for entries in 0..needed {
        let mut words = vec![0; entries];
        let error = UnitPlan::embed(&FirstChunkSpec::default(), &topology, &mut words).unwrap_err();
        assert_eq!(
            error,
            LayoutError::StorageTooSmall {
                what: "the plan (32-bit words)",
                entries,
                needed
            }
        );
    }
    let mut words = vec![0; storage_words(7)];
    let plan = UnitPlan::embed(&FirstChunkSpec::default(), &topology, &mut words).unwrap();
    let template = Template {
        bytes: &[],
        base: 0,
    };
    let error = embed::build(
        plan,
        template,
        &mut [0; 6],
        &mut Arena::new(Home::default()),
    )
    .unwrap_err();
    let what = "the offset of each CPU's unit";
    assert_eq!(
        error,
        BuildError::Layout(LayoutError::StorageTooSmall {
            what,
            entries: 6,
            needed: 7
        })
    );
}
