//! Who does the operations: an instance, and the areas that live.

use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags};

use crate::audit::audit;
use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::free::FreeArea;
use crate::table::Op::{self, Allocate, BringUp, Free, Trim, Upkeep};
use crate::table::Row;

/// Live areas: address and length.
pub type Live = Vec<(usize, usize)>;

/// What refused an operation.
#[derive(Debug)]
pub enum Failure {
    Alloc(AllocError),
    Cpu(CpuError),
}

/// An instance with what its owner knows of it.
pub struct Owner {
    pub pcpu: SimAllocator,
    live: Live,
}

impl Owner {
    pub fn new(row: &Row, machine: &Machine) -> Self {
        let pcpu = (row.machine)(machine.clone()).build().unwrap();
        let mut owner = Self {
            pcpu,
            live: Live::new(),
        };
        for &op in row.before {
            owner.run(op).unwrap();
        }
        owner.pcpu.backing().record();
        owner.pcpu.backing().set_faults(|_| false);
        owner
    }

    pub fn run(&mut self, op: Op) -> Result<(), Failure> {
        let pcpu = &self.pcpu;
        match op {
            Allocate(request) => {
                let address = pcpu.allocate(&request).map_err(Failure::Alloc)?;
                let area = (address, request.bytes());
                if !request.flags().contains(AllocFlags::NO_ZERO) {
                    for cpu in pcpu.units().possible().iter() {
                        assert_zero(pcpu, area, cpu);
                    }
                }
                stamp(pcpu, area);
                self.live.push(area);
            }
            Free(nth) => {
                let (address, _) = self.live.remove(nth);
                pcpu.free_area(address, FreeFlags::empty()).unwrap();
            }
            Upkeep => drop(pcpu.upkeep()),
            Trim(spares) => drop(pcpu.trim(spares)),
            BringUp(cpu) => {
                pcpu.bring_up(CpuId::new(cpu)).map_err(Failure::Cpu)?;
                self.live.iter().for_each(|&area| stamp(pcpu, area));
            }
        }
        Ok(())
    }

    pub fn check_copies(&self) {
        for &area in &self.live {
            for cpu in self.pcpu.units().materialised().iter() {
                assert_stamped(&self.pcpu, area, cpu);
            }
        }
    }

    /// Frees everything, and finds only the first chunk.
    pub fn end(self) {
        self.check_copies();
        let reserved = self.pcpu.neutral_base() + self.pcpu.sizes().regions().reserved.start
            ..self.pcpu.neutral_base() + self.pcpu.sizes().regions().reserved.end;
        for (address, _) in &self.live {
            let flags = match reserved.contains(address) {
                true => FreeFlags::RESERVED,
                false => FreeFlags::empty(),
            };
            self.pcpu.free_area(*address, flags).unwrap();
        }
        self.pcpu.trim(0);
        let end = audit(&self.pcpu).stats;
        let first_pages = self.pcpu.sizes().populated_pages() as u64;
        assert_eq!(
            (end.live, end.chunks, end.populated_pages),
            (0, 1, first_pages)
        );
        assert_eq!(end.empty_pages, 0);
    }
}
