//! Libraries of our own that are opened at run time, where they are: beside the binary, or where the environment names them.

use std::ffi::{CStr, CString, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// An open library, which stays open.
pub struct Library {
    handle: NonNull<c_void>,
    path: PathBuf,
}

type Number = unsafe extern "C" fn() -> c_int;

impl Library {
    /// The file that `variable` names; else `file` beside the binary, or where the system looks for libraries. `version` is the name of a
    /// function that must give the number beside it.
    ///
    /// # Safety
    /// Loading the library must be sound, and `version.0`, where it has it, a function without arguments that gives an `int`.
    pub unsafe fn open(variable: &str, file: &str, version: (&CStr, c_int)) -> Result<Self, String> {
        let beside = || Some(std::env::current_exe().ok()?.parent()?.join(file)).filter(|path| path.exists());
        let named = std::env::var_os(variable).map(PathBuf::from);
        let path = named.or_else(beside).unwrap_or_else(|| file.into());
        // SAFETY: as the caller says.
        unsafe { Self::of(&path, version) }.map_err(|reason| format!("{reason}: 'make cuda' builds it, {variable} names it"))
    }

    /// The library in this file.
    ///
    /// # Safety
    /// As for [`Library::open`].
    pub unsafe fn of(path: &Path, version: (&CStr, c_int)) -> Result<Self, String> {
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| "its path holds a NUL")?;
        // SAFETY: as the caller says; what dlerror gives is a NUL-terminated text that stays until this thread's next call of the family.
        let handle = unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            NonNull::new(handle).ok_or_else(|| {
                let reason = libc::dlerror();
                let reason = if reason.is_null() { "no reason given".into() } else { CStr::from_ptr(reason).to_string_lossy() };
                format!("{} cannot be opened ({reason})", path.display())
            })?
        };
        let library = Self { handle, path: path.to_owned() };
        let (function, wanted) = version;
        // SAFETY: likewise.
        let found = unsafe { library.find::<Number>(function)?() };
        if found != wanted {
            return Err(format!("{} is of version {found}, not {wanted}", library.path.display()));
        }
        Ok(library)
    }

    /// The function of this name.
    ///
    /// # Safety
    /// `F` must be the type of a pointer to it.
    pub unsafe fn find<F: Copy>(&self, name: &CStr) -> Result<F, String> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: a look-up by name; the form is as the caller says.
        unsafe {
            let found = NonNull::new(libc::dlsym(self.handle.as_ptr(), name.as_ptr()))
                .ok_or_else(|| format!("{} lacks {}", self.path.display(), name.to_string_lossy()))?;
            Ok(std::mem::transmute_copy::<NonNull<c_void>, F>(&found))
        }
    }
}
