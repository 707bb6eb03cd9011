//! Which device is meant, whether it is here, and what it is.

use std::fmt;
use std::str::FromStr;
use std::sync::{LazyLock, Once};

use tracing::{info, warn};

use super::memory::{free_memory, host_total, mebibytes};
use super::{Device, cuda};

/// As users name a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// The first GPU, or the CPU where there is none.
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match name.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(index)) => Ok(Self::Cuda(index)),
                _ => Err(format!("unknown device '{name}': use auto, cpu or cuda:N")),
            },
        }
    }
}

/// GPUs that libtorch can use, or why it cannot use any.
type Found = Result<usize, Lack>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Lack {
    /// The CUDA half of libtorch, or a library that it needs.
    Libraries(String),
    /// The libraries are open, and find none.
    Gpu { driver: Option<String> },
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Libraries(reason) => write!(f, "libtorch's CUDA half cannot be opened ({reason})"),
            Self::Gpu { driver: None } => write!(f, "libtorch's CUDA half finds no GPU: there is no driver"),
            Self::Gpu { driver: Some(version) } => {
                write!(
                    f,
                    "libtorch's CUDA half finds no GPU (the driver is of CUDA {version}, CUDA_VISIBLE_DEVICES may hide it)"
                )
            }
        }
    }
}

/// Looked for once, and only when a GPU may be meant: one binary then starts on any machine.
static FOUND: LazyLock<Found> = LazyLock::new(|| {
    open_cuda().map_err(Lack::Libraries)?;
    match tch::Cuda::is_available() {
        true => Ok(tch::Cuda::device_count().max(0) as usize),
        false => Err(Lack::Gpu { driver: cuda::driver() }),
    }
});

/// Resolves `auto`, `cpu` or `cuda:N`. That `auto` has come to the CPU is logged, once.
pub fn device(name: &str) -> Result<Device, String> {
    match name.parse()? {
        Wanted::Cpu => Ok(Device::Cpu),
        wanted => resolve(wanted, &FOUND, name).inspect(|device| {
            if let (Device::Cpu, Err(lack)) = (device, &*FOUND) {
                fell_back(lack);
            }
        }),
    }
}

fn resolve(wanted: Wanted, found: &Found, name: &str) -> Result<Device, String> {
    match (wanted, found) {
        (Wanted::Cpu, _) | (Wanted::Auto, Err(_) | Ok(0)) => Ok(Device::Cpu),
        (Wanted::Auto, Ok(_)) => Ok(Device::Cuda(0)),
        (Wanted::Cuda(index), Ok(count)) if index < *count => Ok(Device::Cuda(index)),
        (Wanted::Cuda(_), Ok(1)) => Err(format!("device '{name}' is not here: there is one GPU, cuda:0")),
        (Wanted::Cuda(_), Ok(count)) => {
            Err(format!("device '{name}' is not here: there are {count} GPUs, from cuda:0 to cuda:{}", count.saturating_sub(1)))
        }
        (Wanted::Cuda(_), Err(lack)) => Err(format!("device '{name}' cannot be used: {lack}; use --device cpu")),
    }
}

/// A machine without a GPU that lacks CUDA's libraries too is as it should be; where one half is there, the other was expected.
fn fell_back(lack: &Lack) {
    static ONCE: Once = Once::new();
    let half = matches!(lack, Lack::Gpu { .. }) || std::path::Path::new("/dev/nvidiactl").exists();
    ONCE.call_once(|| match half {
        true => warn!("running on the CPU: {lack}"),
        false => info!("running on the CPU: {lack}"),
    });
}

/// Makes libtorch's CUDA half available to this process. Nothing links it, so a machine without it is no error.
fn open_cuda() -> Result<(), String> {
    // SAFETY: the name is a NUL-terminated constant; the library registers its kernels when loaded and is never unloaded. What
    // dlerror gives is a NUL-terminated text that stays until the next call of the dl family on this thread.
    unsafe {
        if !libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL).is_null() {
            return Ok(());
        }
        let reason = libc::dlerror();
        if reason.is_null() {
            Err("no reason given".into())
        } else {
            Err(std::ffi::CStr::from_ptr(reason).to_string_lossy().into())
        }
    }
}

/// Waits until everything that was sent to a GPU is done; the CPU is never behind.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// A device as it describes itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Description {
    pub name: String,
    /// Bytes, and those that were free when it was asked.
    pub memory: Option<u64>,
    pub memory_free: Option<u64>,
    /// Of a GPU, such as "9.0".
    pub compute_capability: Option<String>,
    /// CUDA's versions, as the driver and the runtime speak it.
    pub driver: Option<String>,
    pub runtime: Option<String>,
    /// Of a CPU: the extensions that kernels choose among.
    pub instructions: Vec<&'static str>,
}

/// Asks `device` what it is.
pub fn describe(device: Device) -> Description {
    let memory_free = free_memory(device);
    match device {
        Device::Cuda(index) => Description {
            name: cuda::name(index).unwrap_or_else(|| "a GPU without a name".into()),
            memory: cuda::memory(index).map(|memory| memory.total),
            memory_free,
            compute_capability: cuda::capability(index).map(|(major, minor)| format!("{major}.{minor}")),
            driver: cuda::driver(),
            runtime: cuda::runtime(),
            instructions: vec![],
        },
        _ => Description {
            name: cpu_name(),
            memory: host_total(),
            memory_free,
            instructions: instructions(),
            ..Description::default()
        },
    }
}

impl fmt::Display for Description {
    /// In one line.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(capability) = &self.compute_capability {
            write!(f, ", compute capability {capability}")?;
        }
        if let (Some(driver), Some(runtime)) = (&self.driver, &self.runtime) {
            write!(f, ", CUDA {driver} in the driver and {runtime} in the runtime")?;
        }
        if !self.instructions.is_empty() {
            write!(f, ", {}", self.instructions.join(" "))?;
        }
        match (self.memory_free, self.memory) {
            (Some(free), Some(all)) => write!(f, ", {} of {} free", mebibytes(free), mebibytes(all)),
            _ => Ok(()),
        }
    }
}

/// The processor as it names itself.
pub fn cpu_name() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = told.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().to_owned())
}

/// Which of the extensions that matter here this CPU has.
fn instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let known = [
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512vnni", std::is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", std::is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let known = [("neon", cfg!(target_arch = "aarch64"))];
    known.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_device_is_told_with_those_that_there_are() {
        let ask = |name: &str, found: Found| resolve(name.parse()?, &found, name);
        let none = || Err(Lack::Gpu { driver: None });
        let libraries = || Err(Lack::Libraries("libcudnn.so.9: cannot open shared object file".into()));
        assert_eq!(ask("auto", Ok(2)), Ok(Device::Cuda(0)));
        assert_eq!(ask("cuda", Ok(2)), Ok(Device::Cuda(0)));
        assert_eq!(ask("cuda:1", Ok(2)), Ok(Device::Cuda(1)));
        for found in [Ok(0), none(), libraries()] {
            assert_eq!(ask("auto", found), Ok(Device::Cpu));
        }
        assert_eq!(ask("cpu", Ok(2)), Ok(Device::Cpu));
        for (name, found, told) in [
            ("tpu", Ok(1), "unknown device 'tpu': use auto, cpu or cuda:N"),
            ("cuda:x", Ok(1), "unknown device 'cuda:x': use auto, cpu or cuda:N"),
            ("cuda:-1", Ok(1), "unknown device 'cuda:-1'"),
            ("cuda:7", Ok(1), "device 'cuda:7' is not here: there is one GPU, cuda:0"),
            ("cuda:7", Ok(4), "there are 4 GPUs, from cuda:0 to cuda:3"),
            (
                "cuda:0",
                none(),
                "device 'cuda:0' cannot be used: libtorch's CUDA half finds no GPU: there is no driver; use --device cpu",
            ),
            ("cuda:0", libraries(), "cannot be opened (libcudnn.so.9: cannot open shared object file); use --device cpu"),
        ] {
            let error = ask(name, found).expect_err(name);
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn the_cpu_describes_itself() {
        let description = describe(Device::Cpu);
        assert!(!description.name.is_empty() && description.compute_capability.is_none());
        if cfg!(target_os = "linux") {
            assert!(description.memory >= description.memory_free && description.memory_free.is_some(), "{description:?}");
            assert!(description.to_string().ends_with(" free"), "{description}");
        }
    }

    #[test]
    fn a_gpu_is_described_in_one_line() {
        let gpu = Description {
            name: "NVIDIA H100 80GB HBM3".into(),
            memory: Some(80 << 30),
            memory_free: Some(79 << 30),
            compute_capability: Some("9.0".into()),
            driver: Some("13.0".into()),
            runtime: Some("13.0".into()),
            instructions: vec![],
        };
        let told = "NVIDIA H100 80GB HBM3, compute capability 9.0, CUDA 13.0 in the driver and 13.0 in the runtime, \
                    80896.0 MiB of 81920.0 MiB free";
        assert_eq!(gpu.to_string(), told);
    }
}
