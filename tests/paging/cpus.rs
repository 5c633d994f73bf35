//! The first chunk, and CPUs that come late or never.

use pcpu::backing::Backing;
use pcpu::backing::BackingError;
use pcpu::backing::paging::InitialError;
use pcpu::unit::{CpuId, NodeId};
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, Request};

use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::free::FreeArea;
use crate::machine::{BASE, Machine, Shape};

const LATE: CpuId = CpuId::new(3);

impl Machine<'_, '_> {
    /// A CPU's copy, for reading.
    fn bytes(&self, neutral: usize, bytes: usize, cpu: CpuId) -> &[u8] {
        let address = self.pcpu.per_cpu_address(neutral, cpu).expect("possible");
        // SAFETY: readable on all possible CPUs; nobody writes it meanwhile.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), bytes) }
    }
}

#[test]
fn every_cpu_reads_the_initial_values() {
    for static_bytes in [0, 1, 5001, 8192, 3 << 20] {
        let shape = Shape {
            static_bytes,
            unit_bytes: if static_bytes > 8192 {
                4 << 20
            } else {
                32 << 10
            },
            ..Shape::default()
        };
        shape.run(|machine| {
            machine.audit();
            let sum_bytes = machine.pcpu.sizes().sum_bytes();
            let template = shape.template();
            let up = machine
                .pcpu
                .units()
                .materialised()
                .iter()
                .collect::<Vec<_>>();
            assert_eq!(up, [0, 1].map(CpuId::new));
            for cpu in machine.pcpu.units().possible().iter() {
                assert_eq!(
                    machine.bytes(BASE, static_bytes, cpu),
                    template,
                    "CPU {cpu}"
                );
                let rest = machine.bytes(BASE + static_bytes, sum_bytes - static_bytes, cpu);
                assert!(rest.iter().all(|&byte| byte == 0), "CPU {cpu}");
            }
            // A CPU that comes later starts from the same, whatever others wrote.
            if static_bytes > 0 {
                stamp(machine.pcpu, (BASE, static_bytes));
            }
            machine.pcpu.bring_up(LATE).unwrap();
            machine.audit();
            assert_eq!(machine.bytes(BASE, static_bytes, LATE), template);
            if static_bytes > 0 {
                assert_stamped(machine.pcpu, (BASE, static_bytes), CpuId::new(0));
                assert_eq!(machine.bytes(BASE, static_bytes, CpuId::new(2)), template);
            }
        });
    }
}

#[test]
fn a_late_cpu_gets_pages_of_its_own() {
    Shape::default().run(|machine| {
        let pcpu = machine.pcpu;
        let sizes = [13_000, 9000, 30_000, 100, 4096, 12_000];
        let areas: Vec<_> = sizes
            .map(|bytes| (pcpu.allocate(&Request::new(bytes, 8)).unwrap(), bytes))
            .into();
        areas.iter().for_each(|&area| stamp(pcpu, area));
        machine.audit();
        for &area in &areas {
            // Read before it comes, so that a translation is remembered.
            assert_zero(pcpu, area, LATE);
        }
        let flushes = machine.paging.stats().flushes;
        pcpu.bring_up(LATE).unwrap();
        assert_eq!(
            machine.paging.stats().flushes,
            flushes + 1,
            "one flush for all"
        );
        machine.audit();
        for &area in &areas {
            assert_zero(pcpu, area, LATE);
            assert_stamped(pcpu, area, CpuId::new(1));
        }
        areas.iter().for_each(|&area| stamp(pcpu, area));
        machine.audit();
        for &area in &areas {
            for cpu in [0, 1, 3].map(CpuId::new) {
                assert_stamped(pcpu, area, cpu);
            }
            assert_zero(pcpu, area, CpuId::new(2));
        }
    });
}

#[test]
fn cpus_that_never_come_cost_next_to_nothing() {
    let frames_of = |cpus| {
        let shape = Shape {
            cpus,
            nodes: 1,
            online: 2,
            unit_bytes: 256 << 10,
            static_bytes: 212_992,
            reserved_bytes: 8192,
            ..Shape::default()
        };
        let mut frames = 0;
        shape.run(|machine| {
            for _ in 0..8 {
                machine.pcpu.allocate(&Request::new(30_000, 8)).unwrap();
            }
            machine.audit();
            frames = machine.host.out().len();
            assert_eq!(machine.pcpu.units().possible().count(), cpus);
        });
        frames
    };
    let (two, many) = (frames_of(2), frames_of(240));
    println!("frames with 2 possible CPUs: {two}, with 240: {many}");
    assert!(many * 10 <= two * 11, "{many} frames instead of {two}");
}

/// As many units as the entries of several tables, on the largest topology.
#[test]
fn thousands_of_cpus_are_possible() {
    let shape = Shape {
        cpus: 1500,
        nodes: 4,
        ..Shape::default()
    };
    shape.run(|machine| {
        let last = CpuId::new(1499);
        let area = (
            machine.pcpu.allocate(&Request::new(20_000, 8)).unwrap(),
            20_000,
        );
        assert_zero(machine.pcpu, area, last);
        machine.pcpu.bring_up(last).unwrap();
        stamp(machine.pcpu, area);
        machine.audit();
        assert_stamped(machine.pcpu, area, last);
    });
}

#[test]
fn address_spaces_may_copy_the_top_level() {
    let shape = Shape::default();
    let host = shape.host();
    let mut copied = Vec::new();
    shape
        .run_on(&host, |machine| {
            copied = host.level_4_words();
            for cpu in 0..4 {
                machine.pcpu.bring_up(CpuId::new(cpu)).unwrap();
            }
            let areas = [(); 20].map(|()| machine.pcpu.allocate(&Request::new(30_000, 8)).unwrap());
            assert_eq!(host.level_4_words(), copied);
            for area in areas {
                machine.pcpu.free_area(area, FreeFlags::empty()).unwrap();
            }
            machine.pcpu.trim(0);
            // SAFETY: nobody frees meanwhile.
            unsafe { machine.pcpu.trim_metadata() };
            assert_eq!(host.level_4_words(), copied);
        })
        .unwrap();
}

#[test]
fn frames_come_from_afar_when_a_node_has_none() {
    let shape = Shape::default();
    shape.run(|machine| {
        assert_eq!(machine.paging.stats().frames_from_afar, 0);
        machine.host.leave(NodeId::new(0), 3);
        let area = (
            machine.pcpu.allocate(&Request::new(30_000, 8)).unwrap(),
            30_000,
        );
        let from_afar = machine.paging.stats().frames_from_afar;
        assert!(from_afar > 0);
        machine.audit();
        stamp(machine.pcpu, area);
        assert_stamped(machine.pcpu, area, CpuId::new(0));

        machine.host.leave(NodeId::new(1), 2);
        let out = machine.host.out().len();
        let refused = machine
            .pcpu
            .allocate(&Request::new(30_000, 8).with_flags(AllocFlags::ATOMIC));
        assert!(
            matches!(refused, Err(AllocError::Backing(_))),
            "{refused:?}"
        );
        // A chunk may have been made before its pages could not be had.
        machine.pcpu.trim(0);
        // SAFETY: nobody frees meanwhile.
        unsafe { machine.pcpu.trim_metadata() };
        assert_eq!(machine.host.out().len(), out);
        let cpu = LATE;
        let error = BackingError::OutOfFrames;
        assert_eq!(
            machine.pcpu.bring_up(cpu),
            Err(CpuError::NoMemory { cpu, error })
        );
        assert_eq!(machine.host.out().len(), out);
        machine.audit();
    });
}

#[test]
fn a_page_is_where_the_backing_says() {
    Shape::default().run(|machine| {
        let (pcpu, paging) = (machine.pcpu, machine.paging);
        let area = pcpu.allocate(&Request::new(20_000, 8)).unwrap();
        for cpu in pcpu.units().possible().iter() {
            for neutral in [BASE, BASE + 4999, area, area + 12_345] {
                let address = pcpu.per_cpu_address(neutral, cpu).unwrap();
                let translation = machine.host.mmu.translate(address).unwrap();
                let expected = translation.frame + (address % 4096) as u64;
                assert_eq!(paging.physical_address(address), Some(expected));
            }
        }
        assert_eq!(paging.physical_address(BASE), None);
        assert_eq!(paging.physical_address(machine.host.mmu.window.end), None);
        let hole = pcpu
            .per_cpu_address(BASE + (1 << 29), CpuId::new(0))
            .unwrap();
        assert_eq!(paging.physical_address(hole), None);
    });
}

/// A module's initial values, for CPUs that never came.
#[test]
fn initial_values_of_modules_wait_for_their_cpus() {
    let shape = Shape::default();
    shape.run(|machine| {
        let request = Request::new(1500, 64).with_flags(AllocFlags::RESERVED);
        let module = machine.pcpu.allocate(&request).unwrap();
        let values: Vec<u8> = (0..1500).map(|at| (at % 7) as u8 + 1).collect();
        // SAFETY: no CPU is brought up, nobody reads.
        unsafe { machine.paging.set_initial(module, &values) }.unwrap();
        let absent = CpuId::new(2);
        assert_eq!(machine.bytes(module, 1500, absent), values);
        assert_zero(machine.pcpu, (module, 1500), CpuId::new(1));
        machine.pcpu.bring_up(LATE).unwrap();
        assert_eq!(machine.bytes(module, 1500, LATE), values);
        assert_eq!(machine.bytes(BASE, 5001, LATE), shape.template());
        machine.audit();

        let limit_bytes = machine.pcpu.sizes().regions().reserved.end;
        for (neutral, bytes) in [
            (BASE - 1, 1),
            (BASE + limit_bytes, 1),
            (BASE + limit_bytes - 1, 2),
            (BASE, limit_bytes + 1),
        ] {
            let outside = InitialError::Outside {
                neutral,
                bytes,
                base: BASE,
                limit_bytes,
            };
            // SAFETY: as above.
            let result = unsafe { machine.paging.set_initial(neutral, &vec![9; bytes]) };
            assert_eq!(result, Err(outside));
        }
        assert_eq!(machine.bytes(module, 1500, absent), values);
        // SAFETY: as above.
        unsafe { machine.paging.set_initial(module, &[0; 1500]) }.unwrap();
        assert_zero(machine.pcpu, (module, 1500), absent);
        machine.pcpu.free_area(module, FreeFlags::RESERVED).unwrap();
    });
}
