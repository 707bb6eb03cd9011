//! libtorch behind one small door: where tensors live, of what type they are, and how many threads compute them.
//!
//! Everything else in the crate receives a [`Placement`] and never asks libtorch which devices there are. It knows nothing of
//! models.

mod cuda;
mod device;
pub mod flash;
pub mod fused;
pub mod kernels;
pub mod library;
pub mod memory;
pub mod pages;

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use device::{Description, cpu_name, describe, device, synchronize};
pub use memory::{free_memory, give_back_memory, mebibytes, shared_cache};
pub use tch::{Device, Kind, TchError, Tensor};

/// Floating-point type of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn kind(self) -> Kind {
        match self {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::Bf16 => Kind::BFloat16,
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == Dtype::F32 { 4 } else { 2 }
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }
}

impl FromStr for Dtype {
    type Err = String;

    /// Accepts our names and those that `config.json` uses (`bfloat16`, `torch.float16`, …).
    fn from_str(name: &str) -> Result<Self, String> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "f32" | "float32" => Ok(Dtype::F32),
            "f16" | "float16" => Ok(Dtype::F16),
            "bf16" | "bfloat16" => Ok(Dtype::Bf16),
            _ => Err(format!("unknown dtype '{name}': use f32, f16 or bf16")),
        }
    }
}

/// Where a model's tensors live and of what type they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    pub device: Device,
    pub dtype: Dtype,
}

impl Placement {
    pub const CPU_F32: Placement = Placement { device: Device::Cpu, dtype: Dtype::F32 };

    /// `cpu` or `cuda:N`.
    pub fn device_name(&self) -> String {
        match self.device {
            Device::Cuda(index) => format!("cuda:{index}"),
            _ => "cpu".into(),
        }
    }
}

/// libtorch's generator is one for the whole process.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Seeds libtorch's generator and keeps it for the caller until the guard is dropped: draws of another thread would fall in
/// between, and a seed would no longer repeat what it gave.
#[must_use = "the generator is shared again when the guard is dropped"]
pub fn seeded(seed: u64) -> MutexGuard<'static, ()> {
    let generator = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    generator
}

/// Copies to devices and from them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Copies {
    pub up: u64,
    pub down: u64,
}

impl Copies {
    /// Those that were made after others.
    pub fn since(self, before: Self) -> Self {
        Self { up: self.up - before.up, down: self.down - before.down }
    }
}

static COPIES: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Since the process began; on a CPU those that a GPU would take.
pub fn copies() -> Copies {
    let [up, down] = COPIES.each_ref().map(|count| count.load(Ordering::Relaxed));
    Copies { up, down }
}

/// Numbers from a device, once all that was sent to it before is done.
pub fn download(tensor: &Tensor) -> Result<Vec<f64>, TchError> {
    COPIES[1].fetch_add(1, Ordering::Relaxed);
    Vec::try_from(&tensor.f_to_device(Device::Cpu)?)
}

/// Numbers on a device, without waiting for what it is busy with.
pub fn upload<T: tch::kind::Element>(numbers: &[T], device: Device) -> Result<Tensor, TchError> {
    COPIES[0].fetch_add(1, Ordering::Relaxed);
    let here = Tensor::f_from_slice(numbers)?;
    // Nothing is copied where it is here already. CUDA has taken ordinary memory over by the time the call comes back.
    here.f_to_device_(device, here.kind(), true, false)
}

/// Sets how many threads one operation may use; 0 leaves libtorch's choice (one per core).
pub fn set_threads(threads: usize) {
    if threads > 0 {
        tch::set_num_threads(threads.min(1024) as i32);
    }
}
