//! Free memory of this machine.

use crate::error::{Error, Result};

/// Checks that the system can provide `bytes` more. An allocation would report it later or never: a system that overcommits ends
/// the process instead.
pub(crate) fn ensure_host_memory(what: &str, bytes: usize) -> Result<()> {
    match free_memory() {
        Some(free) if bytes > free => Err(Error::OutOfMemory {
            what: what.into(),
            memory: "memory",
            needed_bytes: Some(bytes as u64),
            free_bytes: Some(free as u64),
            cause: String::new(),
        }),
        _ => Ok(()),
    }
}

/// Bytes that the system can still provide, where it reports them.
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<usize>().ok().map(|kib| kib << 10)
}
