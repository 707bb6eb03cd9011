//! Memory that is free on a device.

use std::ffi::c_int;

use super::Device;

/// Bytes that can still be taken on `device`; `None` where nobody says.
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => host(),
        Device::Cuda(_) => cuda(),
        _ => None,
    }
}

/// What the system has left, or this process's control group, if that is less.
fn host() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = available(&meminfo)?;
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    let group = read("memory.max").zip(read("memory.current")).map(|(max, current)| max.saturating_sub(current));
    Some(group.map_or(available, |group| group.min(available)))
}

/// Bytes by the line `MemAvailable:   123 kB`.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// Bytes of the cache that the cores share; `None` where nobody says.
pub fn shared_cache() -> Option<u64> {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").ok()?;
    size.trim().strip_suffix('K')?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// Hands memory that tensors had back to the system, where the allocator would keep it for later ones.
pub fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it only looks through the allocator's own free lists, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> c_int;

/// The runtime's own word for the current device, where the CUDA half is open.
fn cuda() -> Option<u64> {
    // SAFETY: a look-up by name, of the CUDA runtime's function of this form; it writes two numbers.
    unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"cudaMemGetInfo".as_ptr());
        if found.is_null() {
            return None;
        }
        let (mut free, mut total) = (0, 0);
        let status = std::mem::transmute::<*mut libc::c_void, MemGetInfo>(found)(&mut free, &mut total);
        (status == 0).then_some(free as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_own_count_is_read() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   20 kB\n"), Some(20 * 1024));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        assert_eq!(available("MemAvailable: much\n"), None);
        if cfg!(target_os = "linux") {
            assert!(free_memory(Device::Cpu).is_some_and(|bytes| bytes > 1 << 20));
        }
    }
}
