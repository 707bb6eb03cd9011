//! Products with a weight matrix, for any number of rows: what a forward mostly consists of.

use tch::TchError;

use super::lanes::Stored;
use super::product::{PAIRED, Product};
use super::strips::from_memory;
use super::{launch, plain};
use crate::tensor::{Kind, Tensor};

/// Products of fewer multiplications are not worth other threads.
const PARALLEL_FROM: usize = 32 * 1024;

/// `x · weightᵀ + bias` for `x: [..., inputs]` and `weight: [outputs, inputs]`, or `None` where libtorch should do it.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>, TchError> {
    let (mut shape, sizes) = (x.size(), weight.size());
    let (Some(last), &[outputs, inputs]) = (shape.last_mut(), sizes.as_slice()) else { return Ok(None) };
    let kind = weight.kind();
    if *last != inputs
        || inputs == 0
        || x.numel() == 0
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
    // The input is read over and over; in f32 nothing is left to do for each row of the matrix.
    let input = if paired { x.f_contiguous()? } else { x.f_to_kind(Kind::Float)?.f_contiguous()? };
    let out = Tensor::f_empty(&shape, (kind, tch::Device::Cpu))?;
    let product = Product {
        input: input.data_ptr(),
        weight: weight.data_ptr(),
        out: out.data_ptr(),
        stride: outputs as usize,
        rows,
        inputs: inputs as usize,
        outputs: outputs as usize,
        half,
        paired,
        early: from_memory((outputs * inputs) as usize * kind.elt_size_in_bytes()),
    };
    // SAFETY: the three tensors are contiguous, of the sizes and types that the product says, and outlive the call.
    unsafe { launch(&product, rows * product.inputs * product.outputs >= PARALLEL_FROM) };
    match bias {
        Some(bias) => Ok(Some(out.f_add(bias)?)),
        None => Ok(Some(out)),
    }
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

#[cfg(test)]
mod tests {
    use super::super::tests::alike;
    use super::*;
    use tch::Device;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    #[test]
    fn products_are_exact_within_rounding() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
            // The last one is more than a cache keeps.
            let shapes = [
                (1, 64, 10),
                (3, 17, 5),
                (4, 576, 131),
                (7, 256, 944),
                (32, 100, 33),
                (90, 1536, 35),
                (301, 40, 70),
                (5, 1100, 8192),
            ];
            for (rows, inputs, outputs) in shapes {
                let (x, weight) = (random(&[rows, inputs], kind), random(&[outputs, inputs], kind));
                let bias = random(&[outputs], kind);
                let ours = linear(&x, &weight, Some(&bias)).unwrap().unwrap().to_kind(Kind::Double);
                let exact = x.to_kind(Kind::Double).linear(&weight.to_kind(Kind::Double), Some(bias.to_kind(Kind::Double)));
                let error = f64::try_from((&ours - &exact).abs().max() / exact.abs().max()).unwrap();
                assert!(error < tolerance, "{kind:?} {rows} x {inputs} x {outputs}: {error}");
            }
        }
    }

    /// Long rows go in pieces, many rows in tiles, and both by threads: none of it may show.
    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (inputs, outputs) in [(200, 301), (1536, 48)] {
                let (x, weight) = (random(&[300, inputs], kind), random(&[outputs, inputs], kind));
                alike(
                    &|first, rows| linear(&x.narrow(0, first, rows), &weight, None).unwrap().unwrap(),
                    &format!("{kind:?}, {inputs} inputs"),
                );
            }
        }
    }

    #[test]
    fn an_output_does_not_depend_on_those_beside_it() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (x, weight) = (random(&[9, 96], kind), random(&[37, 96], kind));
            let all = linear(&x, &weight, None).unwrap().unwrap();
            for (first, count) in [(0, 1), (3, 17), (20, 16), (36, 1)] {
                let some = linear(&x, &weight.narrow(0, first, count), None).unwrap().unwrap();
                assert!(all.narrow(1, first, count).equal(&some), "{kind:?}: {count} from {first} on");
            }
        }
    }

    #[test]
    fn what_is_no_plain_case_is_left_alone() {
        let weight = random(&[8, 16], Kind::Float);
        assert!(linear(&random(&[0, 16], Kind::Float), &weight, None).unwrap().is_none(), "no rows");
        assert!(linear(&random(&[1, 16], Kind::BFloat16), &weight, None).unwrap().is_none(), "mixed types");
        let learning = random(&[8, 16], Kind::Float).set_requires_grad(true);
        assert!(linear(&random(&[1, 16], Kind::Float), &learning, None).unwrap().is_none(), "gradients");
        let learning = random(&[1, 16], Kind::Float).set_requires_grad(true);
        assert!(linear(&learning, &weight, None).unwrap().is_none(), "gradients of the input");
        assert!(linear(&random(&[1, 15], Kind::Float), &weight, None).unwrap().is_none(), "sizes that do not fit");
    }
}
