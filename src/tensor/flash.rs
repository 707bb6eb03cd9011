//! What libtorch's flash kernel can do and its public attention cannot: causal attention of new tokens over all that came before them without
//! a mask ([`causal`]: the diagonal is in the lower right corner, which otherwise takes a mask), and many sequences of different
//! lengths in one call ([`ragged`]: otherwise each is a call of its own, and telling a GPU of thirty of them in every layer takes longer
//! than the attention itself).
//!
//! `tch` does not wrap these operators; libtorch's CUDA half exports them as C functions, looked up by name. They have not been tried by us
//! on every GPU and version, so each is asked a small question first, and used only if it answers as attention with a mask does.

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

/// `aoti_torch_cuda__flash_attention_forward`: query, key, value, where each sequence's queries and keys begin, the longest of both, dropout, causal,
/// debug mask, scale, window to the left and right, how many keys each sequence has, slopes, then what it gives.
type Varlen = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    *const Handle,
    *const Handle,
    i64,
    i64,
    f64,
    i32,
    i32,
    *const f64,
    *const i64,
    *const i64,
    *const Handle,
    *const Handle,
    *mut Handle,
    *mut Handle,
    *mut Handle,
    *mut Handle,
    *mut Handle,
) -> i32;

/// Whether [`causal`] takes tensors of this kind, here.
pub fn fits(kind: Kind, device: Device, dim: usize) -> bool {
    takes(kind, device, dim) && TRUSTED.is_some()
}

/// Whether the flash kernels take tensors of this kind.
fn takes(kind: Kind, device: Device, dim: usize) -> bool {
    let kernel = matches!(device, Device::Cuda(_)) && matches!(kind, Kind::Half | Kind::BFloat16);
    kernel && dim.is_multiple_of(8) && dim <= 256
}

/// Sequences of different lengths, side by side.
pub struct Ragged<'a> {
    /// `[rows, heads, dim]`.
    pub query: &'a Tensor,
    /// `[positions, kv_heads, dim]`, of which sequences have parts.
    pub key: &'a Tensor,
    pub value: &'a Tensor,
    /// Where each sequence's rows begin, and where the last one's end, `[sequences + 1]` in i32.
    pub rows: &'a Tensor,
    /// Where each sequence's positions begin, likewise, and how many there are, `[sequences]`.
    pub positions: &'a Tensor,
    pub visible: &'a Tensor,
    /// The most rows and positions that a sequence has.
    pub longest: (usize, usize),
    /// The last row of each sequence sees all of its positions and each row before it one less; else all see all.
    pub causal: bool,
}

/// Attends over many sequences at once, `[rows, heads, dim]`; `None` if it will not.
pub type Attend = fn(&Ragged) -> Option<Tensor>;

/// What attends over [`Ragged`] sequences of this kind, here.
pub fn ragged(kind: Kind, device: Device, dim: usize) -> Option<Attend> {
    (takes(kind, device, dim) && VARLEN.is_some()).then_some(|asked: &Ragged| varlen(VARLEN.as_ref().copied()?, asked))
}

fn varlen(flash: Varlen, asked: &Ragged) -> Option<Tensor> {
    let handle = |tensor: &Tensor| tensor.as_ptr().cast_mut().cast::<c_void>();
    let (rows, positions, visible) = (handle(asked.rows), handle(asked.positions), handle(asked.visible));
    let (longest_rows, longest_visible) = (asked.longest.0 as i64, asked.longest.1 as i64);
    // Unlike [`Flash`] it writes everything that it gives: what is not wanted has to be taken and dropped.
    let (mut given, nothing) = ([std::ptr::null_mut(); 5], std::ptr::null());
    let [out, normalisers, seed, offset, mask] = &mut given;
    // SAFETY: the function of this form; the tensors outlive the call, and it only reads them. What it gives are new tensors of ours.
    let (failed, given) = unsafe {
        let (q, k, v) = (handle(asked.query), handle(asked.key), handle(asked.value));
        let causal = i32::from(asked.causal);
        let failed = flash(
            q,
            k,
            v,
            &rows,
            &positions,
            longest_rows,
            longest_visible,
            0.0,
            causal,
            0,
            std::ptr::null(),
            nothing,
            nothing,
            &visible,
            std::ptr::null(),
            out,
            normalisers,
            seed,
            offset,
            mask,
        );
        (failed != 0, given.map(|tensor: Handle| (!tensor.is_null()).then(|| Tensor::from_ptr(tensor.cast()))))
    };
    let [out, ..] = given;
    out.filter(|_| !failed)
}

static VARLEN: LazyLock<Option<Varlen>> = LazyLock::new(|| {
    // SAFETY: a look-up by name; what is found is the function of this form.
    let flash = unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"aoti_torch_cuda__flash_attention_forward".as_ptr());
        (!found.is_null()).then(|| std::mem::transmute::<*mut c_void, Varlen>(found))
    }?;
    let right = tch::no_grad(|| answers_ragged(Device::cuda_if_available(), Kind::BFloat16, |asked| varlen(flash, asked)));
    match right {
        Ok(true) => Some(flash),
        _ => {
            tracing::warn!("libtorch's flash attention of many sequences is not what was expected: each attends by itself");
            None
        }
    }
});

/// Whether `attend` does what [`Ragged`] says: of sequences of 1, 3 and 2 rows, and of one row each (a way of its own in the kernel, which then
/// also splits many positions), whose positions lie apart, in another order, and with others between.
fn answers_ragged(device: Device, kind: Kind, attend: impl Fn(&Ragged) -> Option<Tensor>) -> Result<bool, TchError> {
    let (heads, kv_heads, dim) = (4, 2, 64);
    let wave = |rows: i64, heads: i64, step: f64| -> Result<Tensor, TchError> {
        let numbers = Tensor::f_arange(rows * heads * dim, (Kind::Float, device))?.f_mul_scalar(step)?.f_sin()?;
        numbers.f_mul_scalar(1.5)?.f_view([rows, heads, dim])?.f_to_kind(kind)
    };
    // Keys beside values, as a cache has them.
    let both = wave(700, 2 * kv_heads, 1.3)?;
    let (key, value) = (both.f_narrow(1, 0, kv_heads)?, both.f_narrow(1, kv_heads, kv_heads)?);
    for (rows, begins, visible) in [([1, 3, 2], [20, 2, 31], [9, 11, 2]), ([1, 1, 1], [660, 40, 31], [9, 600, 2])] {
        let first = [0, rows[0], rows[0] + rows[1]];
        let all = first[2] + rows[2];
        let query = wave(i64::from(all), heads, 0.7)?;
        let numbers = |numbers: &[i32]| super::upload(numbers, device);
        let (ends, places) =
            (numbers(&[first[0], first[1], first[2], all])?, numbers(&[begins[0], begins[1], begins[2], 700])?);
        let seen = numbers(&visible)?;
        for causal in [false, true] {
            let longest = (rows.into_iter().max().unwrap_or(0) as usize, visible.into_iter().max().unwrap_or(0) as usize);
            let (query, key, value) = (&query, &key, &value);
            let asked = Ragged { query, key, value, rows: &ends, positions: &places, visible: &seen, longest, causal };
            let Some(found) = attend(&asked).filter(|found| found.size() == query.size()) else { return Ok(false) };
            for sequence in 0..3 {
                let (count, seen) = (i64::from(rows[sequence]), i64::from(visible[sequence]));
                let of = |tensor: &Tensor, first: i32, count: i64| {
                    tensor.f_narrow(0, i64::from(first), count)?.f_transpose(0, 1)?.f_unsqueeze(0)
                };
                let (first, begin) = (first[sequence], begins[sequence]);
                let (q, k, v) = (of(query, first, count)?, of(key, begin, seen)?, of(value, begin, seen)?);
                let sees = Tensor::f_ones([count, seen], (Kind::Bool, device))?;
                let sees = if causal { sees.f_tril(seen - count)? } else { sees };
                let right = Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(&sees), 0.0, false, None::<f64>, true)?;
                let error = of(&found, first, count)?.f_to_kind(Kind::Float)?.f_sub(&right.f_to_kind(Kind::Float)?)?;
                let error = error.f_abs()?.f_max()?.f_double_value(&[])?;
                if error.is_nan() || error >= 0.03 {
                    return Ok(false);
                }
            }
        }
    }
    Ok(true)
}

/// [`Ragged`] attention sequence by sequence, for tests.
#[cfg(test)]
pub(crate) fn one_by_one(asked: &Ragged) -> Option<Tensor> {
    let numbers = |tensor: &Tensor| Vec::<i32>::try_from(tensor).unwrap().into_iter().map(i64::from).collect::<Vec<_>>();
    let (rows, begins, visible) = (numbers(asked.rows), numbers(asked.positions), numbers(asked.visible));
    assert_eq!((rows.len(), begins.len()), (visible.len() + 1, visible.len() + 1));
    assert_eq!(asked.longest.1 as i64, *visible.iter().max().unwrap());
    assert_eq!(asked.longest.0 as i64, rows.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap());
    let each = visible.iter().enumerate().map(|(sequence, seen)| {
        let count = rows[sequence + 1] - rows[sequence];
        let of = |tensor: &Tensor, first: i64, count: i64| tensor.narrow(0, first, count).transpose(0, 1).unsqueeze(0);
        let (query, key) = (of(asked.query, rows[sequence], count), of(asked.key, begins[sequence], *seen));
        let value = of(asked.value, begins[sequence], *seen);
        let sees = Tensor::ones([count, *seen], (Kind::Bool, asked.query.device()));
        let sees = if asked.causal { sees.tril(seen - count) } else { sees };
        let mixed = Tensor::scaled_dot_product_attention(&query, &key, &value, Some(&sees), 0.0, false, None::<f64>, true);
        mixed.squeeze_dim(0).transpose(0, 1)
    });
    Some(Tensor::cat(&each.collect::<Vec<_>>(), 0))
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
    fn only_who_attends_over_each_sequence_by_itself_is_trusted() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let asked = |attend: &dyn Fn(&Ragged) -> Option<Tensor>| answers_ragged(Device::Cpu, kind, attend).unwrap();
            assert!(asked(&one_by_one));
            assert!(!asked(&|asked: &Ragged| one_by_one(&Ragged { causal: false, ..*asked })), "no diagonal");
            assert!(!asked(&|asked: &Ragged| one_by_one(&Ragged { value: asked.key, ..*asked })), "keys for values");
            let moved = |asked: &Ragged| one_by_one(&Ragged { positions: &(asked.positions + 1), ..*asked });
            assert!(!asked(&moved), "a neighbour's positions");
            assert!(!asked(&|_: &Ragged| None), "no answer");
        }
        assert!(ragged(Kind::BFloat16, Device::Cpu, 64).is_none());
    }

    /// The function of libtorch's form, on the CPU: like it, it writes to all that it gives.
    unsafe extern "C" fn as_libtorch(
        query: Handle,
        key: Handle,
        value: Handle,
        rows: *const Handle,
        positions: *const Handle,
        longest_rows: i64,
        longest_visible: i64,
        dropout: f64,
        causal: i32,
        debug: i32,
        scale: *const f64,
        left: *const i64,
        right: *const i64,
        visible: *const Handle,
        slopes: *const Handle,
        out: *mut Handle,
        normalisers: *mut Handle,
        seed: *mut Handle,
        offset: *mut Handle,
        mask: *mut Handle,
    ) -> i32 {
        assert!(scale.is_null() && left.is_null() && right.is_null() && slopes.is_null() && dropout == 0.0 && debug == 0);
        unsafe {
            let tensor = |handle: Handle| Tensor::clone_from_ptr(handle.cast());
            let (query, key, value) = (tensor(query), tensor(key), tensor(value));
            let (rows, positions, visible) = (tensor(*rows), tensor(*positions), tensor(*visible));
            let (longest, causal) = ((longest_rows as usize, longest_visible as usize), causal != 0);
            let asked = Ragged {
                query: &query,
                key: &key,
                value: &value,
                rows: &rows,
                positions: &positions,
                visible: &visible,
                longest,
                causal,
            };
            let give = |tensor: Tensor| std::mem::ManuallyDrop::new(tensor).as_ptr().cast_mut().cast::<c_void>();
            *out = give(one_by_one(&asked).unwrap());
            for given in [normalisers, seed, offset, mask] {
                *given = give(Tensor::new());
            }
        }
        0
    }

    #[test]
    fn the_function_for_many_lengths_is_called_as_libtorch_has_it() {
        assert!(answers_ragged(Device::Cpu, Kind::Float, |asked| varlen(as_libtorch, asked)).unwrap());
    }

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
