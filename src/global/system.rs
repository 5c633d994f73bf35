//! Which CPUs and nodes the system has, from `/sys`.

use std::fs;
use std::io;
use std::vec;
use std::vec::Vec;

use crate::unit::{MAX_CPUS, NodeId};

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
    }
}
