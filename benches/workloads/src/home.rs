//! The instances that areas are allocated on: the process's own, and others with any number of CPUs.
//!
//! The others are like the first in all but their CPUs: the same kind of memory, the same distance between units, the same
//! policy. Their CPUs are all brought up, so that zeroing goes over all of them, in real memory. Each has a domain of its
//! own, [`Machine`], so that what a domain does for its requests is part of what is measured.

use std::error::Error;
use std::fmt;
use std::marker::PhantomData;

use pcpu::backing::mmap::{Mmap, Placement};
use pcpu::embed;
use pcpu::global::{GlobalAllocator, ProcessLock};
use pcpu::this_cpu::portable::Portable;
use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};
use pcpu::{CpuError, Domain, Global, Instance, SetupError};

use crate::WorkloadError;

/// How many instances there can be beside that of the process: slots from 0 on.
pub const SLOTS: usize = 5;

static MACHINES: [Instance<Mmap, ProcessLock>; SLOTS] = [const { Instance::new() }; SLOTS];

/// The domain of the instance in a slot, which [`Home::with_cpus`] makes.
#[derive(Debug, Clone, Copy)]
pub enum Machine<const SLOT: usize> {}

// SAFETY: `allocator` always returns the instance of the slot, which no other domain returns.
unsafe impl<const SLOT: usize> Domain for Machine<SLOT> {
    type Backing = Mmap;
    type Lock = ProcessLock;
    type Ops = Portable<Self>;

    #[inline]
    fn allocator() -> &'static GlobalAllocator {
        MACHINES[SLOT].get().expect("the slot has an instance")
    }

    fn current_cpu() -> CpuId {
        let cpu = rustix::thread::sched_getcpu() as u32;
        CpuId::new(cpu % Self::units().nr_cpu_ids())
    }
}

/// An instance that lives as long as the process, and whose CPUs are brought up.
pub struct Home<D> {
    /// The CPUs that areas are zeroed on: those from 0 on.
    pub cpus: u32,
    domain: PhantomData<D>,
}

impl<D> Clone for Home<D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for Home<D> {}

impl<D> fmt::Debug for Home<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home")
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}

impl Home<Global> {
    /// The process's own, with the CPUs that the process may run on brought up: no figure depends on when the scheduler
    /// first chose a CPU.
    ///
    /// # Errors
    /// [`WorkloadError::Cpu`] if a CPU can't be brought up.
    pub fn of_process() -> Result<Self, WorkloadError> {
        Self::up_to(last_allowed_cpu())
    }

    /// The same with all possible CPUs brought up, also those that nothing runs on.
    ///
    /// # Errors
    /// [`WorkloadError::Cpu`] if a CPU can't be brought up.
    pub fn of_process_with_all_cpus() -> Result<Self, WorkloadError> {
        Self::up_to(last_cpu())
    }

    fn up_to(last: u32) -> Result<Self, WorkloadError> {
        let cpus = last + 1;
        bring_up(pcpu::global(), cpus)?;
        Ok(Self {
            cpus,
            domain: PhantomData,
        })
    }
}

impl<const SLOT: usize> Home<Machine<SLOT>> {
    /// One of its own, with so many CPUs, in the slot from now on.
    ///
    /// # Errors
    /// [`WorkloadError::Home`] if there is no address space for it, or the slot has an instance with another number of CPUs.
    pub fn with_cpus(cpus: u32) -> Result<Self, WorkloadError> {
        let failed = |error: Box<dyn Error + Send + Sync>| WorkloadError::Home { cpus, error };
        let machine = &MACHINES[SLOT];
        if machine.get().is_none() {
            machine
                .set_up(build(cpus).map_err(failed)?)
                .map_err(|error| failed(error.into()))?;
        }
        let there = Machine::<SLOT>::units().nr_cpu_ids();
        if there != cpus {
            return Err(failed(SetupError::Again.into()));
        }
        Ok(Self {
            cpus,
            domain: PhantomData,
        })
    }
}

impl<D: Domain> Home<D> {
    /// From one CPU's copies to the next one's; 0 if there is one unit only, and so no distance.
    pub fn stride_bytes(&self) -> usize {
        let offset = |cpu| D::units().offset(CpuId::new(cpu));
        match (offset(0), offset(1)) {
            (Some(first), Some(second)) => second - first,
            _ => 0,
        }
    }

    /// Where `cpu`'s copy of an area lies.
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible.
    pub fn copy(&self, area: usize, cpu: u32) -> Result<*mut u64, CpuError> {
        let address = D::allocator().per_cpu_address(area, CpuId::new(cpu))?;
        Ok(std::ptr::with_exposed_provenance_mut(address))
    }
}

/// The last of the process's CPUs: behind it is the unit of stray threads.
fn last_cpu() -> u32 {
    pcpu::global::stray_unit().get() - 1
}

fn last_allowed_cpu() -> u32 {
    let last = last_cpu();
    match rustix::thread::sched_getaffinity(None) {
        Ok(allowed) => (0..=last)
            .rev()
            .find(|cpu| allowed.is_set(*cpu as usize))
            .unwrap_or(last),
        // More CPUs than the call has room for.
        Err(_) => last,
    }
}

fn bring_up(pcpu: &GlobalAllocator, cpus: u32) -> Result<(), CpuError> {
    (0..cpus).try_for_each(|cpu| pcpu.bring_up(CpuId::new(cpu)))
}

fn build(cpus: u32) -> Result<GlobalAllocator, Box<dyn Error + Send + Sync>> {
    let model = pcpu::global();
    let page_bytes = model.sizes().page_bytes();
    let spec = FirstChunkSpec {
        static_bytes: 0,
        reserved_bytes: model.sizes().reserved_bytes(),
        dyn_bytes: model.sizes().dyn_bytes(),
        atom_bytes: page_bytes,
        page_bytes,
        min_unit_bytes: model.sizes().unit_bytes(),
    };
    let topology = EvenNodes::new(cpus, 1)?;
    let mut words = vec![0; storage_words(cpus)];
    let mut offsets = vec![0; cpus as usize];
    let plan = UnitPlan::embed(&spec, &topology, &mut words)?;
    let geometry = model.backing().geometry();
    let mut memory = Mmap::reserve(&plan, geometry, Placement::Any)?;
    let template = Template {
        bytes: &[],
        base: memory.neutral_base(),
    };
    let first_chunk = embed::build(plan, template, &mut offsets, &mut memory)?;
    // SAFETY: the first chunk lies in `memory`, which the instance takes over.
    let mut pcpu = unsafe { GlobalAllocator::new(memory, &first_chunk, *model.policy())? };
    pcpu.enable_caches()?;
    bring_up(&pcpu, cpus)?;
    Ok(pcpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_of_any_size_is_like_that_of_the_process() {
        let process = Home::of_process().unwrap();
        let own = Home::<Machine<0>>::with_cpus(5).unwrap();
        let (model, pcpu) = (Global::allocator(), Machine::<0>::allocator());
        assert_eq!(pcpu.units().materialised().count(), 5);
        assert_eq!(pcpu.policy(), model.policy());
        assert_eq!(own.stride_bytes(), process.stride_bytes());
        assert_eq!(pcpu.sizes().unit_bytes(), model.sizes().unit_bytes());
        assert!(model.units().materialised().count() >= process.cpus);
    }

    #[test]
    fn all_cpus_of_the_process_are_brought_up() {
        let home = Home::of_process_with_all_cpus().unwrap();
        let units = Global::units();
        assert_eq!(home.cpus, units.nr_cpu_ids() - 1);
        let is_up = |cpu| units.materialised().contains(CpuId::new(cpu));
        assert!((0..home.cpus).all(is_up));
    }

    #[test]
    fn a_slot_has_one_instance() {
        Home::<Machine<1>>::with_cpus(3).unwrap();
        Home::<Machine<1>>::with_cpus(3).unwrap();
        let error = Home::<Machine<1>>::with_cpus(4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "an instance with 4 CPUs: the instance is set up already"
        );
    }
}
