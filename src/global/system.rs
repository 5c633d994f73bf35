//! Which CPUs and nodes the system has, from `/sys`, and which of them may run what.

use std::fs;
use std::io;
use std::vec;
use std::vec::Vec;

use crate::unit::{CpuId, MAX_CPUS, NodeId};

/// The node of every CPU up to the highest possible one.
///
/// Where `/sys` does not tell (a sandbox), the CPUs that are configured are taken, on one node.
pub(super) fn nodes_of_cpus() -> io::Result<Vec<NodeId>> {
    let possible = match fs::read_to_string("/sys/devices/system/cpu/possible") {
        Ok(list) => parse_list(&list)?,
        // SAFETY: the call has no preconditions.
        Err(_) => (0..unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) }.max(1) as u32).collect(),
    };
    let highest = possible.iter().max().copied().unwrap_or(0);
    let mut nodes = vec![NodeId::new(0); highest as usize + 1];
    for (node, cpus) in node_lists() {
        for cpu in cpus {
            // CPUs that a node lists without their being possible are left out.
            if let Some(of_cpu) = nodes.get_mut(cpu as usize) {
                *of_cpu = node;
            }
        }
    }
    Ok(nodes)
}

/// The CPUs that are online, in order; `None` where `/sys` does not tell.
pub(super) fn online_cpus() -> Option<Vec<CpuId>> {
    let list = fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    let ids = parse_list(&list).ok()?;
    Some(ids.into_iter().map(CpuId::new).collect())
}

/// The CPUs that the calling thread may run on, in order; `None` if the system does not tell.
pub(super) fn allowed_cpus() -> Option<Vec<CpuId>> {
    // A bit for every CPU that a system can have: with fewer the kernel may refuse.
    let mut words = [0_u64; MAX_CPUS as usize / 64];
    // SAFETY: a set of CPUs is an array of integers, of the size that is given.
    let result =
        unsafe { libc::sched_getaffinity(0, size_of_val(&words), words.as_mut_ptr().cast()) };
    let is_allowed = |id: &u32| words[*id as usize / 64] >> (id % 64) & 1 != 0;
    (result == 0).then(|| (0..MAX_CPUS).filter(is_allowed).map(CpuId::new).collect())
}

/// The nodes with their CPUs. A system that tells of none has one, with all CPUs.
fn node_lists() -> Vec<(NodeId, Vec<u32>)> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/node") else {
        return Vec::new();
    };
    let node = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let number = entry
            .file_name()
            .to_str()?
            .strip_prefix("node")?
            .parse()
            .ok()?;
        let cpus = parse_list(&fs::read_to_string(entry.path().join("cpulist")).ok()?).ok()?;
        Some((NodeId::new(number), cpus))
    };
    entries.filter_map(node).collect()
}

/// Parses a list as the system writes it: `0-3,8`.
fn parse_list(list: &str) -> io::Result<Vec<u32>> {
    let invalid = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            std::format!("CPU list {:?}", list.trim()),
        )
    };
    let number = |text: &str| {
        text.parse()
            .ok()
            .filter(|&id: &u32| id < MAX_CPUS)
            .ok_or_else(invalid)
    };
    let mut ids = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        ids.extend(number(first)?..=number(last)?);
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        assert_eq!(parse_list("0-3,8\n").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(parse_list("5").unwrap(), [5]);
        assert_eq!(parse_list("\n").unwrap(), Vec::<u32>::new());
        for bad in ["a", "1-", "-2", "9000", "1;2"] {
            assert!(parse_list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn this_cpu_is_among_the_machines() {
        let cpu = rustix::thread::sched_getcpu();
        assert!(cpu < nodes_of_cpus().unwrap().len());
        let cpu = CpuId::new(cpu as u32);
        assert!(allowed_cpus().unwrap().contains(&cpu));
        assert!(online_cpus().is_none_or(|online| online.contains(&cpu)));
    }
}
