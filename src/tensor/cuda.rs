//! What the CUDA runtime and the driver say of a GPU, by their C functions.
//!
//! Nothing here is linked: libtorch's CUDA half brings the runtime with it, so each function is looked up by name and whoever asks
//! where there is none gets `None`. Only functions of numbers and texts are used, whose form has been the same since CUDA 6; the
//! runtime's structure of all properties changes its layout between versions.

use std::ffi::{CStr, c_char, c_int, c_void};

/// Bytes of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub free: u64,
    pub total: u64,
}

type Get = unsafe extern "C" fn(*mut c_int) -> c_int;
type Set = unsafe extern "C" fn(c_int) -> c_int;
type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> c_int;
type Attribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
type Init = unsafe extern "C" fn(u32) -> c_int;
type DriverDevice = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
type DriverName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;

/// `cudaDevAttrComputeCapabilityMajor` and `…Minor`.
const CAPABILITY: [c_int; 2] = [75, 76];
const NAME_BYTES_MAX: usize = 256;

/// A function of this name and form.
///
/// # Safety
/// `F` must be the type of a pointer to the function of this name.
unsafe fn find<F>(library: *mut c_void, name: &CStr) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a look-up by name; what is found is a function of the form that the caller says.
    unsafe {
        let found = libc::dlsym(library, name.as_ptr());
        (!found.is_null()).then(|| std::mem::transmute_copy::<*mut c_void, F>(&found))
    }
}

/// Free and total memory of GPU `index`. The runtime tells of the calling thread's current device, which is the old one again after
/// the question.
pub fn memory(index: usize) -> Option<Memory> {
    let index = c_int::try_from(index).ok()?;
    // SAFETY: the runtime's functions of these names, which write a number each; none of them may be called from within another.
    unsafe {
        let get_device: Get = find(libc::RTLD_DEFAULT, c"cudaGetDevice")?;
        let set_device: Set = find(libc::RTLD_DEFAULT, c"cudaSetDevice")?;
        let get_info: MemGetInfo = find(libc::RTLD_DEFAULT, c"cudaMemGetInfo")?;
        let (mut before, mut free, mut total) = (0, 0, 0);
        if get_device(&mut before) != 0 || set_device(index) != 0 {
            return None;
        }
        let status = get_info(&mut free, &mut total);
        set_device(before);
        (status == 0).then_some(Memory { free: free as u64, total: total as u64 })
    }
}

/// Major and minor compute capability of GPU `index`.
pub fn capability(index: usize) -> Option<(i32, i32)> {
    let index = c_int::try_from(index).ok()?;
    // SAFETY: the runtime's function of this name, which writes a number.
    let get: Attribute = unsafe { find(libc::RTLD_DEFAULT, c"cudaDeviceGetAttribute")? };
    let ask = |attribute| {
        let mut value = 0;
        (unsafe { get(&mut value, attribute, index) } == 0).then_some(value)
    };
    Some((ask(CAPABILITY[0])?, ask(CAPABILITY[1])?))
}

/// The version of CUDA that the driver speaks; `None` where there is no driver.
pub fn driver() -> Option<String> {
    version(c"cudaDriverGetVersion")
}

/// The version of the runtime that libtorch brought.
pub fn runtime() -> Option<String> {
    version(c"cudaRuntimeGetVersion")
}

fn version(name: &CStr) -> Option<String> {
    let mut version = 0;
    // SAFETY: both functions write a number.
    let status = unsafe { find::<Get>(libc::RTLD_DEFAULT, name)?(&mut version) };
    (status == 0 && version > 0).then(|| spell(version))
}

/// 13000 is 13.0, and 12080 is 12.8.
fn spell(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// What GPU `index` calls itself, such as "NVIDIA H100 80GB HBM3". Only the driver knows in a form that does not change.
pub fn name(index: usize) -> Option<String> {
    let index = c_int::try_from(index).ok()?;
    // SAFETY: the driver's functions of these names; the last one writes a text with its NUL into no more than it is told.
    unsafe {
        let driver = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        if driver.is_null() {
            return None;
        }
        let init: Init = find(driver, c"cuInit")?;
        let device: DriverDevice = find(driver, c"cuDeviceGet")?;
        let get_name: DriverName = find(driver, c"cuDeviceGetName")?;
        let (mut handle, mut text) = (0, [0 as c_char; NAME_BYTES_MAX]);
        let told = init(0) == 0
            && device(&mut handle, index) == 0
            && get_name(text.as_mut_ptr(), (NAME_BYTES_MAX - 1) as c_int, handle) == 0;
        told.then(|| CStr::from_ptr(text.as_ptr()).to_string_lossy().trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_spelled_as_people_do() {
        assert_eq!((spell(13_000), spell(12_080), spell(11_020)), ("13.0".into(), "12.8".into(), "11.2".into()));
    }

    /// The runtime is there with or without a GPU: the functions must be found, and tell a GPU that is not there by `None`.
    #[test]
    fn a_gpu_that_is_not_there_is_no_error() {
        // SAFETY: the function is only looked up.
        let found = unsafe { find::<MemGetInfo>(libc::RTLD_DEFAULT, c"cudaMemGetInfo") };
        assert!(found.is_some(), "libtorch brings the runtime");
        assert!(runtime().is_some_and(|version| version.starts_with("13.")), "{:?}", runtime());
        assert_eq!((memory(4096), capability(4096), name(4096)), (None, None, None));
        assert_eq!(memory(usize::MAX), None);
    }
}
