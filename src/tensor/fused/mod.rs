//! Kernels of our own for GPUs (`cuda/kernels`): what lies between a network's products, and what decoding wants of logits, each in one
//! pass where libtorch takes three to twenty.
//!
//! They are a library that is opened at run time, built by `make cuda` on any machine. Each kernel is first asked a small question on the
//! device (`questions`) and used only if it answers as libtorch's operations do, and takes less time than they (`races`); with
//! `LACUNA_KERNELS=all` it is used without a race. Whoever asks for what a kernel does not take (another
//! type, gradients, strides) gets `None` and leaves it to libtorch; `LACUNA_KERNELS=off` leaves everything to it.
//!
//! The same sources can be compiled for the CPU, where a block's threads take turns: so the tests hold the code that a GPU runs to
//! libtorch's results on a machine without one. Such a library is opened only if the environment names it.

mod calls;
mod questions;
mod races;

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use tracing::{info, warn};

use super::library::Library;
use super::{Device, Kind, TchError, Tensor, kernels};

pub use calls::{Pick, Rows, Turn};
pub use races::Race;

/// Names the library where it does not lie beside the binary.
pub const LIBRARY: &str = "LACUNA_FUSED_LIBRARY";
const FILE: &str = "liblacuna_kernels.so";
/// Of `cuda/kernels/kernels.h`.
const VERSION: c_int = 1;

/// Where a kernel runs, as `kernels.h` has it; likewise below and in `calls`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    stream: *mut c_void,
    device: i32,
}

/// Puts a kernel with these arguments on a stream, and gives an error of CUDA's or 0.
type Launch<A> = unsafe extern "C" fn(Place, *const A) -> c_int;
type Answer = unsafe extern "C" fn() -> c_int;
/// `aoti_torch_get_current_cuda_stream` (libtorch's `aoti_torch/c/shim.h`).
type CurrentStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;

/// The kernels that a device can be trusted with.
pub struct Fused {
    device: Device,
    /// Looked up in libtorch's CUDA half; a CPU has no streams.
    stream: Option<CurrentStream>,
    add_norm: Option<Launch<calls::AddNorm>>,
    gated: Option<Launch<calls::Gated>>,
    rounded: Option<Launch<calls::Rounded>>,
    turned: Option<Launch<calls::Turned>>,
    statistics: Option<Launch<calls::Statistics>>,
    races: Vec<Race>,
}

impl Fused {
    /// The kernels for `device`, opened and questioned when they are first asked for.
    pub fn on(device: Device) -> Option<&'static Self> {
        static OPEN: Mutex<Vec<(Device, Option<&'static Fused>)>> = Mutex::new(vec![]);
        let wanted = match device {
            Device::Cuda(_) => kernels::in_use(),
            _ => std::env::var_os(LIBRARY).is_some(),
        };
        if !wanted {
            return None;
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = open.iter().find(|(known, _)| *known == device) {
            return *found;
        }
        let found = match Self::open(device) {
            Ok(fused) => {
                info!(device = ?device, kernels = fused.names().join(" "), "opened fused kernels");
                // One for each device of a process.
                Some(&*Box::leak(Box::new(fused)))
            }
            Err(reason) => {
                info!(device = ?device, reason, "there are no fused kernels: libtorch's operations are used, which take longer");
                None
            }
        };
        open.push((device, found));
        found
    }

    fn open(device: Device) -> Result<Self, String> {
        // SAFETY: the library is the one that `cuda/kernels` makes.
        let mut fused = Self::of(&unsafe { Library::open(LIBRARY, FILE, (c"lacuna_kernels_version", VERSION))? }, device)?;
        // The CPU's form is there to be tested.
        if matches!(device, Device::Cuda(_)) && std::env::var_os("LACUNA_KERNELS").is_none_or(|wish| wish != "all") {
            fused.race(&races::REAL);
            super::give_back_memory();
        }
        Ok(fused)
    }

    /// Has every kernel run against libtorch, and forgets those that take longer.
    fn race(&mut self, sizes: &races::Sizes) {
        for ((name, make), (_, _, forget)) in races::ALL.into_iter().zip(questions::ALL) {
            if !self.names().contains(&name) {
                continue;
            }
            match tch::no_grad(|| races::run(self, name, make, sizes)) {
                Ok(races) => {
                    let told = |of: fn(&Race) -> f64| races.iter().map(|race| format!("{:.1}", of(race))).collect::<Vec<_>>();
                    let (ours, libtorch) = (told(|race| race.ours).join(" "), told(|race| race.libtorch).join(" "));
                    let pays = races::pays(&races);
                    info!(kernel = name, device = ?self.device, ours, libtorch, pays, "timed a fused kernel beside libtorch, in µs");
                    if !pays {
                        forget(self);
                    }
                    self.races.extend(races);
                }
                Err(error) => {
                    warn!(kernel = name, device = ?self.device, %error, "a fused kernel could not be timed, and is not used");
                    forget(self);
                }
            }
        }
    }

    /// How each kernel fared against libtorch; none where nobody was timed.
    pub fn races(&self) -> &[Race] {
        &self.races
    }

    /// Those of this library, once they have been questioned.
    fn of(library: &Library, device: Device) -> Result<Self, String> {
        // SAFETY: the library is of the version that these types are of.
        let mut fused = unsafe {
            let cuda = library.find::<Answer>(c"lacuna_kernels_cuda")?() != 0;
            if cuda != matches!(device, Device::Cuda(_)) {
                return Err(format!("the library is for {}", if cuda { "GPUs" } else { "the CPU" }));
            }
            Self {
                device,
                stream: if cuda { Some(current_stream()?) } else { None },
                add_norm: Some(library.find(c"lacuna_add_norm")?),
                gated: Some(library.find(c"lacuna_gated")?),
                rounded: Some(library.find(c"lacuna_rounded")?),
                turned: Some(library.find(c"lacuna_turned")?),
                statistics: Some(library.find(c"lacuna_statistics")?),
                races: vec![],
            }
        };
        // A kernel that was not asked yet is used by its own question only.
        for (name, ask, forget) in questions::ALL {
            let answered = tch::no_grad(|| ask(&fused));
            if !matches!(answered, Ok(true)) {
                let told = answered.err().map(|error| error.to_string());
                warn!(kernel = name, device = ?device, error = told, "a fused kernel does not compute what libtorch does, and is not used");
                forget(&mut fused);
            }
        }
        Ok(fused)
    }

    /// Of the kernels that are used.
    pub fn names(&self) -> Vec<&'static str> {
        let all = [
            ("add_norm", self.add_norm.is_some()),
            ("gated", self.gated.is_some()),
            ("rounded", self.rounded.is_some()),
            ("turned", self.turned.is_some()),
            ("statistics", self.statistics.is_some()),
        ];
        all.into_iter().filter(|(_, used)| *used).map(|(name, _)| name).collect()
    }

    /// Whether [`Fused::turned`] takes queries and keys of this kind and heads of this size.
    pub fn turns(&self, kind: Kind, dim: usize) -> bool {
        self.turned.is_some() && matches!(kind, Kind::Float | Kind::BFloat16) && dim.is_multiple_of(2) && dim <= calls::DIM_MAX
    }

    /// Puts a kernel behind what the thread has sent to the device.
    ///
    /// # Safety
    /// The pointers in `arguments` must lead to as much memory of the device as its sizes say.
    unsafe fn launch<A>(&self, launch: Launch<A>, arguments: &A) -> Result<(), TchError> {
        let index = if let Device::Cuda(index) = self.device { index as i32 } else { 0 };
        let mut stream = std::ptr::null_mut();
        // SAFETY: libtorch's function writes a pointer; the rest is as the caller says.
        let status = unsafe {
            match self.stream {
                Some(current) if current(index, &mut stream) != 0 => return Err(failed("there is no current stream")),
                _ => launch(Place { stream, device: index }, arguments),
            }
        };
        if status == 0 { Ok(()) } else { Err(failed(&format!("a fused kernel was refused with CUDA error {status}"))) }
    }

    /// Whether a kernel walks this tensor as it lies.
    fn takes(&self, tensor: &Tensor) -> bool {
        matches!(tensor.kind(), Kind::Float | Kind::BFloat16)
            && tensor.device() == self.device
            && !tensor.requires_grad()
            && tensor.numel() > 0
            && tensor.is_contiguous()
    }
}

fn failed(what: &str) -> TchError {
    TchError::Torch(what.into())
}

fn current_stream() -> Result<CurrentStream, String> {
    // SAFETY: a look-up by name; what is found is the function of this form.
    unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"aoti_torch_get_current_cuda_stream".as_ptr());
        if found.is_null() {
            return Err("libtorch's CUDA half does not tell its current stream".into());
        }
        Ok(std::mem::transmute::<*mut c_void, CurrentStream>(found))
    }
}

#[cfg(test)]
pub(crate) mod tests;
