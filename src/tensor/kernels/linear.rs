//! Products of few rows with a large matrix, at the speed of memory: what a decoding step consists of. Every row of the matrix is
//! read once and meets all rows of the input while it is in a register.

use std::ffi::c_void;
use std::sync::LazyLock;

use tch::TchError;

use super::{Kernel, LANES, Lanes, ROWS_MAX, Stored, fold, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Products of fewer multiplications are not worth other threads.
const PARALLEL_FROM: usize = 32 * 1024;
/// Rows of the matrix, and rows of the input, that are in registers together.
const BLOCK: usize = 4;

/// `x · weightᵀ + bias` for `x: [..., inputs]` and `weight: [outputs, inputs]`, or `None` where libtorch should do it.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>, TchError> {
    let (mut shape, sizes) = (x.size(), weight.size());
    let (Some(last), &[outputs, inputs]) = (shape.last_mut(), sizes.as_slice()) else { return Ok(None) };
    let kind = weight.kind();
    if *last != inputs
        || inputs == 0
        || x.numel() > ROWS_MAX * inputs as usize
        || x.kind() != kind
        || x.requires_grad()
        || x.device() != weight.device()
        || !plain(weight)
    {
        return Ok(None);
    }
    *last = outputs;
    let rows = x.numel() / inputs as usize;
    let half = kind == Kind::BFloat16;
    let paired = half && *PAIRED;
    // The input is small and read over and over; in f32 nothing is left to do for each row of the matrix.
    let input = if paired { x.f_contiguous()? } else { x.f_to_kind(Kind::Float)?.f_contiguous()? };
    let out = Tensor::f_empty(&shape, (kind, tch::Device::Cpu))?;
    let product = Product {
        input: input.data_ptr(),
        weight: weight.data_ptr(),
        out: out.data_ptr(),
        rows,
        inputs: inputs as usize,
        outputs: outputs as usize,
        half,
        paired,
    };
    // SAFETY: the three tensors are contiguous, of the sizes and types that the product says, and outlive the call.
    unsafe { launch(&product, product.inputs * product.outputs >= PARALLEL_FROM) };
    match bias {
        Some(bias) => Ok(Some(out.f_add(bias)?)),
        None => Ok(Some(out)),
    }
}

/// [`linear`] for what lies in plain memory: `x: [rows, inputs]` with an f32 weight, `[rows, outputs]`. `None` if the weight is none
/// that the kernel reads.
pub fn product(weight: &Tensor, bias: Option<&Tensor>, x: &[f32], rows: usize) -> Option<Vec<f32>> {
    let &[outputs, inputs] = weight.size().as_slice() else { return None };
    let (outputs, inputs) = (outputs as usize, inputs as usize);
    if !plain(weight) || weight.kind() != Kind::Float || x.len() != rows * inputs || rows == 0 {
        return None;
    }
    let mut out = vec![0f32; rows * outputs];
    let product = Product {
        input: x.as_ptr().cast(),
        weight: weight.data_ptr(),
        out: out.as_mut_ptr().cast(),
        rows,
        inputs,
        outputs,
        half: false,
        paired: false,
    };
    // SAFETY: memory of these sizes, which outlives the call.
    unsafe { launch(&product, inputs * outputs * rows >= PARALLEL_FROM) };
    if let Some(bias) = bias {
        let mut added = vec![0f32; outputs];
        row(&bias.view([1, -1]), 0, &mut added)?;
        out.chunks_exact_mut(outputs).for_each(|out| out.iter_mut().zip(&added).for_each(|(out, bias)| *out += bias));
    }
    Some(out)
}

/// Row `index` of a matrix in f32 or bf16, widened into `out`; `None` if it is none that can be read, or has no such row.
pub fn row(matrix: &Tensor, index: usize, out: &mut [f32]) -> Option<()> {
    let &[rows, width] = matrix.size().as_slice() else { return None };
    if !plain(matrix) || index >= rows as usize || width as usize != out.len() {
        return None;
    }
    // SAFETY: the row is within the contiguous matrix.
    unsafe {
        let first = index * out.len();
        match matrix.kind() {
            Kind::Float => {
                out.copy_from_slice(std::slice::from_raw_parts(matrix.data_ptr().cast::<f32>().add(first), out.len()))
            }
            _ => {
                let stored = std::slice::from_raw_parts(matrix.data_ptr().cast::<u16>().add(first), out.len());
                out.iter_mut().zip(stored).for_each(|(out, stored)| *out = stored.widen());
            }
        }
    }
    Some(())
}

/// One product, as plain memory.
struct Product {
    /// `[rows, inputs]` in f32, or in bf16 where it is `paired`.
    input: *const c_void,
    /// `[outputs, inputs]` in f32 or bf16.
    weight: *const c_void,
    /// `[rows, outputs]` in the weight's type.
    out: *mut c_void,
    rows: usize,
    inputs: usize,
    outputs: usize,
    half: bool,
    /// Products of two bf16 numbers at a time.
    paired: bool,
}

/// Whether the CPU multiplies pairs of bf16 numbers (AVX-512 BF16).
static PAIRED: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    let paired = std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let paired = false;
    paired
});

impl Kernel for Product {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        let blocks = self.outputs.div_ceil(BLOCK);
        let (from, to) = (blocks * thread / threads * BLOCK, (blocks * (thread + 1) / threads * BLOCK).min(self.outputs));
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.paired {
                return pairs(self, from, to);
            }
            if self.half {
                typed::<V, u16>(self, self.weight.cast(), self.out.cast(), from, to);
            } else {
                typed::<V, f32>(self, self.weight.cast(), self.out.cast(), from, to);
            }
        }
    }
}

#[inline(always)]
unsafe fn typed<V: Lanes, T: Stored>(product: &Product, weight: *const T, out: *mut T, from: usize, to: usize) {
    let mut first = from;
    while first < to {
        unsafe {
            match to - first {
                1 => inputs::<V, T, 1>(product, weight, out, first),
                2 => inputs::<V, T, 2>(product, weight, out, first),
                3 => inputs::<V, T, 3>(product, weight, out, first),
                _ => inputs::<V, T, BLOCK>(product, weight, out, first),
            }
        }
        first += BLOCK;
    }
}

#[inline(always)]
unsafe fn inputs<V: Lanes, T: Stored, const N: usize>(product: &Product, weight: *const T, out: *mut T, first: usize) {
    let mut row = 0;
    while row < product.rows {
        unsafe {
            match product.rows - row {
                1 => block::<V, T, N, 1>(product, weight, out, first, row),
                2 => block::<V, T, N, 2>(product, weight, out, first, row),
                3 => block::<V, T, N, 3>(product, weight, out, first, row),
                _ => block::<V, T, N, BLOCK>(product, weight, out, first, row),
            }
        }
        row += BLOCK;
    }
}

/// `N` rows of the matrix with `M` rows of the input. Every sum runs over the lanes in the same order whatever `N` and `M` are.
#[inline(always)]
unsafe fn block<V: Lanes, T: Stored, const N: usize, const M: usize>(
    product: &Product,
    weight: *const T,
    out: *mut T,
    first: usize,
    row: usize,
) {
    let length = product.inputs;
    let whole = length / LANES * LANES;
    unsafe {
        let (weight, input) = (weight.add(first * length), product.input.cast::<f32>().add(row * length));
        let mut sums = [[V::zero(); M]; N];
        let mut at = 0;
        while at < whole {
            let x: [V; M] = std::array::from_fn(|m| V::load(input.add(m * length + at)));
            for (n, sums) in sums.iter_mut().enumerate() {
                let w: V = T::load(weight.add(n * length + at));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = w.multiply_add(x, *sum);
                }
            }
            at += LANES;
        }
        for (n, sums) in sums.iter().enumerate() {
            for (m, sum) in sums.iter().enumerate() {
                let mut total = sum.total();
                for at in whole..length {
                    total = (*weight.add(n * length + at)).widen().mul_add(*input.add(m * length + at), total);
                }
                *out.add((row + m) * product.outputs + first + n) = T::narrow(total);
            }
        }
    }
}

/// [`typed`] for bf16 in the CPU's own terms: 32 products an instruction, summed in f32.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs(product: &Product, from: usize, to: usize) {
    let (weight, out) = (product.weight.cast::<u16>(), product.out.cast::<u16>());
    let mut first = from;
    while first < to {
        let mut row = 0;
        while row < product.rows {
            // SAFETY: rows and outputs are within the product.
            unsafe {
                match (to - first, product.rows - row) {
                    (BLOCK.., 1) => pair_block::<BLOCK, 1>(product, weight, out, first, row),
                    (BLOCK.., 2) => pair_block::<BLOCK, 2>(product, weight, out, first, row),
                    (BLOCK.., 3) => pair_block::<BLOCK, 3>(product, weight, out, first, row),
                    (BLOCK.., _) => pair_block::<BLOCK, BLOCK>(product, weight, out, first, row),
                    (left, right) => {
                        for first in first..first + left {
                            for row in row..row + right.min(BLOCK) {
                                pair_block::<1, 1>(product, weight, out, first, row);
                            }
                        }
                    }
                }
            }
            row += BLOCK;
        }
        first += BLOCK;
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pair_block<const N: usize, const M: usize>(
    product: &Product,
    weight: *const u16,
    out: *mut u16,
    first: usize,
    row: usize,
) {
    use std::arch::x86_64::*;
    const PAIRS: usize = 2 * LANES;
    let length = product.inputs;
    let whole = length / PAIRS * PAIRS;
    // SAFETY: as for `block`; the two kinds of vector have the same bits.
    unsafe {
        let (weight, input) = (weight.add(first * length), product.input.cast::<u16>().add(row * length));
        let load = |from: *const u16| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast()));
        let mut sums = [[_mm512_setzero_ps(); M]; N];
        let mut at = 0;
        while at < whole {
            let mut x = [load(input.add(at)); M];
            for (m, x) in x.iter_mut().enumerate().skip(1) {
                *x = load(input.add(m * length + at));
            }
            for (n, sums) in sums.iter_mut().enumerate() {
                let w = load(weight.add(n * length + at));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = _mm512_dpbf16_ps(*sum, w, x);
                }
            }
            at += PAIRS;
        }
        for (n, sums) in sums.iter().enumerate() {
            for (m, sum) in sums.iter().enumerate() {
                let mut lanes = [0f32; LANES];
                _mm512_storeu_ps(lanes.as_mut_ptr(), *sum);
                let mut total = fold(lanes);
                for at in whole..length {
                    total = (*weight.add(n * length + at)).widen().mul_add((*input.add(m * length + at)).widen(), total);
                }
                *out.add((row + m) * product.outputs + first + n) = Stored::narrow(total);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    #[test]
    fn products_are_libtorchs_within_rounding() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
            for (rows, inputs, outputs) in [(1, 64, 10), (3, 17, 5), (4, 576, 131), (7, 256, 944), (32, 100, 33)] {
                let (x, weight) = (random(&[rows, inputs], kind), random(&[outputs, inputs], kind));
                let bias = random(&[outputs], kind);
                let ours = linear(&x, &weight, Some(&bias)).unwrap().unwrap().to_kind(Kind::Double);
                let exact = x.to_kind(Kind::Double).linear(&weight.to_kind(Kind::Double), Some(bias.to_kind(Kind::Double)));
                let error = f64::try_from((&ours - &exact).abs().max() / exact.abs().max()).unwrap();
                assert!(error < tolerance, "{kind:?} {rows} x {inputs} x {outputs}: {error}");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (x, weight) = (random(&[13, 200], kind), random(&[301, 200], kind));
            let together = linear(&x, &weight, None).unwrap().unwrap();
            for row in 0..13 {
                let alone = linear(&x.narrow(0, row, 1), &weight, None).unwrap().unwrap();
                assert!(together.narrow(0, row, 1).equal(&alone), "{kind:?} row {row}");
            }
        }
    }

    #[test]
    fn what_is_no_plain_case_is_left_alone() {
        let weight = random(&[8, 16], Kind::Float);
        assert!(linear(&random(&[33, 16], Kind::Float), &weight, None).unwrap().is_none(), "many rows");
        assert!(linear(&random(&[1, 16], Kind::BFloat16), &weight, None).unwrap().is_none(), "mixed types");
        let learning = random(&[8, 16], Kind::Float).set_requires_grad(true);
        assert!(linear(&random(&[1, 16], Kind::Float), &learning, None).unwrap().is_none(), "gradients");
        assert!(linear(&random(&[1, 15], Kind::Float), &weight, None).unwrap().is_none(), "sizes that do not fit");
    }
}
