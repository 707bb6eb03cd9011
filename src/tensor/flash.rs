//! Causal attention of new tokens over all that came before them, without a mask: libtorch's flash kernel puts the diagonal into the
//! lower right corner, where its public attention has it in the upper left and wants a mask for anything else.
//!
//! `tch` does not wrap that operator; libtorch's CUDA half exports it as a C function, looked up by name. It has not been tried by us
//! on every GPU and version, so it is asked a small question first, and used only if it answers as attention with a mask does.

use std::ffi::c_void;
use std::sync::LazyLock;

use tch::TchError;

use super::{Device, Kind, Tensor};

/// A pointer to libtorch's own tensor: what the C functions call a handle, and what `tch` holds.
type Handle = *mut c_void;

/// `aoti_torch_cuda__scaled_dot_product_flash_attention` (`c_shim_cuda.h` of libtorch 2.11): query, key, value, dropout, causal, debug mask,
/// scale, then what it gives, of which only the first matters; the others may be null.
type Flash = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    f64,
    i32,
    i32,
    *const f64,
    *mut Handle,
    *mut Handle,
    *mut Handle,
    *mut Handle,
    *mut i64,
    *mut i64,
    *mut Handle,
    *mut Handle,
    *mut Handle,
) -> i32;

/// Whether [`causal`] takes tensors of this kind, here.
pub fn fits(kind: Kind, device: Device, dim: usize) -> bool {
    let kernel = matches!(device, Device::Cuda(_)) && matches!(kind, Kind::Half | Kind::BFloat16);
    kernel && dim.is_multiple_of(8) && dim <= 256 && TRUSTED.is_some()
}

/// Attention of `query: [batch, heads, rows, dim]` over `key`, `value: [batch, kv_heads, seen, dim]`, where the last row sees everything and each row
/// before it one key less; `None` if the kernel will not. Only where it [`fits`].
pub fn causal(query: &Tensor, key: &Tensor, value: &Tensor) -> Option<Tensor> {
    call(TRUSTED.as_ref().copied()?, query, key, value)
}

fn call(flash: Flash, query: &Tensor, key: &Tensor, value: &Tensor) -> Option<Tensor> {
    let handle = |tensor: &Tensor| tensor.as_ptr().cast_mut().cast::<c_void>();
    let (none, mut out) = (std::ptr::null_mut::<Handle>(), std::ptr::null_mut());
    let nothing = std::ptr::null_mut();
    // SAFETY: the function of this form; the tensors outlive the call, and it only reads them. What it gives is a new tensor of ours.
    unsafe {
        let (q, k, v) = (handle(query), handle(key), handle(value));
        let failed =
            flash(q, k, v, 0.0, 1, 0, std::ptr::null(), &mut out, none, none, none, nothing, nothing, none, none, none);
        (failed == 0 && !out.is_null()).then(|| Tensor::from_ptr(out.cast()))
    }
}

static TRUSTED: LazyLock<Option<Flash>> = LazyLock::new(|| {
    // SAFETY: a look-up by name; what is found is the function of this form.
    let flash = unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"aoti_torch_cuda__scaled_dot_product_flash_attention".as_ptr());
        (!found.is_null()).then(|| std::mem::transmute::<*mut c_void, Flash>(found))
    }?;
    let right = tch::no_grad(|| answers(Device::cuda_if_available(), Kind::BFloat16, |q, k, v| call(flash, q, k, v)));
    match right {
        Ok(true) => Some(flash),
        _ => {
            tracing::warn!(
                "libtorch's flash attention is not what was expected: chunks of prompts and chains of drafts take a mask"
            );
            None
        }
    }
});

/// Whether `attend` is attention whose diagonal ends in the lower right corner, of grouped queries: three rows over eleven keys.
fn answers(device: Device, kind: Kind, attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Option<Tensor>) -> Result<bool, TchError> {
    let (heads, kv_heads, rows, seen, dim) = (4, 2, 3, 11, 64);
    let wave = |heads: i64, rows: i64, step: f64| -> Result<Tensor, TchError> {
        let numbers = Tensor::f_arange(heads * rows * dim, (Kind::Float, device))?.f_mul_scalar(step)?.f_sin()?;
        numbers.f_mul_scalar(1.5)?.f_view([1, heads, rows, dim])?.f_to_kind(kind)
    };
    let (query, key, value) = (wave(heads, rows, 0.7)?, wave(kv_heads, seen, 1.3)?, wave(kv_heads, seen, 2.9)?);
    let sees = Tensor::f_ones([rows, seen], (Kind::Bool, device))?.f_tril(seen - rows)?;
    let right = Tensor::f_scaled_dot_product_attention(&query, &key, &value, Some(&sees), 0.0, false, None::<f64>, true)?;
    let Some(found) = attend(&query, &key, &value) else { return Ok(false) };
    let error = found.f_to_kind(Kind::Float)?.f_sub(&right.f_to_kind(Kind::Float)?)?.f_abs()?.f_max()?;
    Ok(found.size() == right.size() && error.f_double_value(&[])? < 0.03)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CPU's operator is reached in the same way; its diagonal begins in the upper left corner, which the question must notice.
    #[test]
    fn only_what_answers_right_is_trusted() {
        type OnCpu =
            unsafe extern "C" fn(Handle, Handle, Handle, f64, i32, *const c_void, *const f64, *mut Handle, *mut Handle) -> i32;
        let name = c"aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu";
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        assert!(!found.is_null());
        let flash = unsafe { std::mem::transmute::<*mut c_void, OnCpu>(found) };
        let attend = |causal: i32, query: &Tensor, key: &Tensor, value: &Tensor| {
            let (handle, mut out) = (|tensor: &Tensor| tensor.as_ptr().cast_mut().cast::<c_void>(), std::ptr::null_mut());
            let (q, k, v, none) = (handle(query), handle(key), handle(value), std::ptr::null());
            let failed = unsafe { flash(q, k, v, 0.0, causal, none, std::ptr::null(), &mut out, std::ptr::null_mut()) };
            assert_eq!(failed, 0);
            unsafe { Tensor::from_ptr(out.cast()) }
        };
        let masked = |query: &Tensor, key: &Tensor, value: &Tensor, corner: i64| {
            let sees = Tensor::ones([query.size()[2], key.size()[2]], (Kind::Bool, Device::Cpu)).tril(corner);
            Tensor::scaled_dot_product_attention(query, key, value, Some(&sees), 0.0, false, None::<f64>, true)
        };
        let repeated = |tensor: &Tensor| tensor.repeat_interleave_self_int(2, 1, None);
        for kind in [Kind::Float, Kind::BFloat16] {
            let asked =
                |attend: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Option<Tensor>| answers(Device::Cpu, kind, attend).unwrap();
            assert!(asked(&|q, k, v| Some(masked(q, k, v, 8))), "the right corner");
            assert!(!asked(&|q, k, v| Some(masked(q, k, v, 0))), "the other corner");
            assert!(!asked(&|q, k, v| Some(attend(1, q, &repeated(k), &repeated(v)))), "the CPU's diagonal");
            assert!(!asked(&|q, k, v| Some(attend(0, q, &repeated(k), &repeated(v)))), "no diagonal");
            assert!(!asked(&|_, _, _| None), "no answer");
        }
        assert!(!fits(Kind::BFloat16, Device::Cpu, 64));
    }
}
