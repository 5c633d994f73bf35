//! The instances that areas are allocated on: the process's own, and one with any number of CPUs.
//!
//! The second is like the first in all but its CPUs: the same kind of memory, the same distance between units, the same
//! policy. Its CPUs are all brought up, so that zeroing goes over all of them, in real memory.

use std::error::Error;

use pcpu::backing::mmap::{Mmap, Placement};
use pcpu::embed;
use pcpu::global::GlobalAllocator;
use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};

use crate::error::CliError;

/// An instance that lives as long as the process.
#[derive(Debug, Clone, Copy)]
pub struct Instance {
    /// The allocator.
    pub pcpu: &'static GlobalAllocator,
    /// The CPUs that areas are zeroed on: those from 0 on.
    pub cpus: u32,
}

impl Instance {
    /// The process's own, with the CPUs that the process may run on brought up: no row depends on when the scheduler
    /// first chose a CPU.
    ///
    /// # Errors
    /// One line, if a CPU can't be brought up.
    pub fn of_process() -> Result<Self, CliError> {
        let pcpu = pcpu::global();
        let cpus = last_allowed_cpu(pcpu) + 1;
        bring_up(pcpu, cpus).map_err(|error| CliError::Failed(error.to_string()))?;
        Ok(Self { pcpu, cpus })
    }

    /// One of its own, with so many CPUs.
    ///
    /// # Errors
    /// One line, if there is no address space for it.
    pub fn with_cpus(cpus: u32) -> Result<Self, CliError> {
        let pcpu = build(cpus)
            .map_err(|error| CliError::Failed(format!("an instance with {cpus} CPUs: {error}")))?;
        Ok(Self { pcpu, cpus })
    }

    /// From one CPU's copies to the next one's.
    pub fn stride_bytes(&self) -> usize {
        stride_bytes(self.pcpu)
    }
}

/// 0 if there is one unit only, and so no distance.
fn stride_bytes(pcpu: &GlobalAllocator) -> usize {
    let offset = |cpu| pcpu.units().offset(CpuId::new(cpu));
    match (offset(0), offset(1)) {
        (Some(first), Some(second)) => second - first,
        _ => 0,
    }
}

fn last_allowed_cpu(pcpu: &GlobalAllocator) -> u32 {
    // The last unit is that of stray threads.
    let last = pcpu.units().nr_cpu_ids() - 2;
    match rustix::thread::sched_getaffinity(None) {
        Ok(allowed) => (0..=last)
            .rev()
            .find(|cpu| allowed.is_set(*cpu as usize))
            .unwrap_or(last),
        // More CPUs than the call has room for.
        Err(_) => last,
    }
}

fn bring_up(pcpu: &GlobalAllocator, cpus: u32) -> Result<(), pcpu::CpuError> {
    (0..cpus).try_for_each(|cpu| pcpu.bring_up(CpuId::new(cpu)))
}

fn build(cpus: u32) -> Result<&'static GlobalAllocator, Box<dyn Error>> {
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
    let pcpu = unsafe { GlobalAllocator::new(memory, &first_chunk, *model.policy())? };
    let pcpu = Box::leak(Box::new(pcpu));
    bring_up(pcpu, cpus)?;
    Ok(pcpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_of_any_size_is_like_that_of_the_process() {
        let process = Instance::of_process().unwrap();
        let own = Instance::with_cpus(5).unwrap();
        assert_eq!(own.pcpu.units().materialised().count(), 5);
        assert_eq!(own.pcpu.policy(), process.pcpu.policy());
        assert_eq!(own.stride_bytes(), process.stride_bytes());
        assert_eq!(
            own.pcpu.sizes().unit_bytes(),
            process.pcpu.sizes().unit_bytes()
        );
        assert!(process.pcpu.units().materialised().count() >= process.cpus);
    }
}
