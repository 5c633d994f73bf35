//! A hardened machine, who is told of its findings, and mistakes.

use std::sync::Mutex;

use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::hardened::{Finding, FindingHook, FindingKind, Hardening, Leaks};
use pcpu::unit::CpuId;

/// Keeps what it is told.
#[derive(Debug, Default)]
pub struct Told {
    findings: Mutex<Vec<Finding>>,
    leaks: Mutex<Vec<String>>,
}

impl Told {
    pub fn new() -> &'static Self {
        Box::leak(Box::default())
    }

    /// What was found since this was asked last.
    pub fn findings(&self) -> Vec<Finding> {
        std::mem::take(&mut self.findings.lock().unwrap())
    }

    /// The only finding since this was asked last: (kind, address, bytes, CPU, byte, what stood there).
    pub fn only(&self) -> (FindingKind, usize, usize, u32, isize, u8) {
        let found = self.findings();
        let [one] = found[..] else {
            panic!("{found:?}");
        };
        (
            one.kind,
            one.address,
            one.bytes,
            one.cpu.get(),
            one.at_bytes,
            one.found,
        )
    }

    pub fn leaks(&self) -> Vec<String> {
        std::mem::take(&mut self.leaks.lock().unwrap())
    }
}

impl FindingHook for Told {
    fn found(&self, finding: &Finding) {
        self.findings.lock().unwrap().push(*finding);
    }

    fn leaked(&self, leaks: &Leaks<'_>) {
        self.leaks.lock().unwrap().push(leaks.to_string());
    }
}

/// The machine, hardened, with so many areas in quarantine.
pub fn hardened(machine: &Machine, quarantine_areas: u32) -> (SimAllocator, &'static Told) {
    let told = Told::new();
    let mut pcpu = machine.build().unwrap();
    let hardening = Hardening {
        quarantine_areas,
        ..Hardening::new(told)
    };
    pcpu.harden(hardening).unwrap();
    (pcpu, told)
}

/// Writes a byte, counted from the start of a CPU's copy of an area: to a guard, or to an area in quarantine.
pub fn write(pcpu: &SimAllocator, address: usize, cpu: u32, at_bytes: isize, byte: u8) {
    let copy = pcpu.per_cpu_address(address, CpuId::new(cpu)).unwrap();
    let at = std::ptr::with_exposed_provenance_mut::<u8>(copy.wrapping_add_signed(at_bytes));
    // SAFETY: the instance has the memory of guards and of areas in quarantine, and nobody looks at it now.
    unsafe { at.write_volatile(byte) };
}
