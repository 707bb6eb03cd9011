//! Memory that is free on a device.

use std::ffi::c_int;
use std::sync::OnceLock;

use super::{Device, cuda};

/// Bytes that can still be taken on `device`; `None` where nobody says.
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => host(),
        Device::Cuda(index) => cuda::memory(index).map(|memory| memory.free),
        _ => None,
    }
}

/// What the system has left, or this process's control group, if that is less.
fn host() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = kilobytes(&meminfo, "MemAvailable:")?;
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    let group = read("memory.max").zip(read("memory.current")).map(|(max, current)| max.saturating_sub(current));
    Some(group.map_or(available, |group| group.min(available)))
}

/// What the system has, or this process's control group may have, if that is less.
pub(super) fn host_total() -> Option<u64> {
    let total = kilobytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|max| max.trim().parse::<u64>().ok());
    Some(group.map_or(total, |group| group.min(total)))
}

/// Bytes by a line such as `MemAvailable:   123 kB`.
fn kilobytes(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// Bytes of the cache that the cores share; `None` where nobody says.
pub fn shared_cache() -> Option<u64> {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").ok()?;
    size.trim().strip_suffix('K')?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// For people to read.
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A C function that answers 0 where it failed.
pub type Answer = unsafe extern "C" fn() -> c_int;

/// What gives a GPU's memory back. libtorch has it in C++ only, so that a library of ours has to bring it.
static OF_GPUS: OnceLock<Answer> = OnceLock::new();

/// Has [`give_back_memory`] do this, too.
///
/// # Safety
/// Any thread must be able to call `give_back` at any time from now on.
pub unsafe fn also_give_back(give_back: Answer) {
    OF_GPUS.get_or_init(|| give_back);
}

/// Hands memory that tensors had back to the system and to GPUs, where allocators would keep it for later ones: what is free is told without it.
pub fn give_back_memory() {
    // SAFETY: as whoever brought it has said. Where it fails, memory is kept, and nothing else is amiss.
    let given = OF_GPUS.get().is_none_or(|give_back| unsafe { give_back() } != 0);
    if !given {
        tracing::warn!("the GPU's allocator keeps memory that nobody uses");
    }
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it only looks through the allocator's own free lists, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_gives_memory_back_is_asked() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        unsafe extern "C" fn give_back() -> c_int {
            ASKED.fetch_add(1, Ordering::Relaxed);
            1
        }
        // SAFETY: it only counts.
        unsafe { also_give_back(give_back) };
        give_back_memory();
        assert!(ASKED.load(Ordering::Relaxed) >= 1);
    }

    #[test]
    fn the_systems_own_count_is_read() {
        let available = |meminfo| kilobytes(meminfo, "MemAvailable:");
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   20 kB\n"), Some(20 * 1024));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        assert_eq!(available("MemAvailable: much\n"), None);
        if cfg!(target_os = "linux") {
            assert!(free_memory(Device::Cpu).is_some_and(|bytes| bytes > 1 << 20));
        }
    }
}
