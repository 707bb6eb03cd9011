//! Products of whole numbers: weights of eight bits, and rows that are rounded to eight bits when they come.
//!
//! A row's numbers are divided by its own scale and rounded; the products of whole numbers are exact, whatever their order. Weights lie
//! as in [`super::packed`], sixteen outputs side by side, but four inputs at a time, which is what one instruction (AVX-512 VNNI)
//! multiplies and adds. It takes one factor without a sign: that is the weight, 128 more than it means, for which 128 times the row's
//! sum is taken off again.

use std::ffi::c_void;
use std::sync::LazyLock;

use tch::TchError;

use super::codes::write;
use super::lanes::{LANES, Lanes, Stored};
use super::{Kernel, in_use, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Outputs side by side.
const PANEL: usize = LANES;
/// Inputs that one instruction takes.
const UNIT: usize = 4;
/// What is added to a weight's code.
const OFFSET: i32 = 128;
/// The largest code.
const LARGEST: f32 = 127.0;
/// More inputs could overflow a sum of 32 bits.
const INPUTS_MAX: usize = 1 << 16;
/// Bytes of rounded input that are gone through together, so that they stay in the second-level cache.
const TILE: usize = 256 * 1024;
/// Products of fewer multiplications, and fewer numbers to round, are not worth other threads.
const PARALLEL_FROM: usize = 128 * 1024;
const ROUND_PARALLEL_FROM: usize = 16 * 1024;

/// A weight matrix of eight bits for [`Int8::product`].
#[derive(Debug)]
pub struct Int8 {
    /// `[panels, units, 16, 4]`, codes plus 128.
    data: Tensor,
    /// One for each output, filled up to whole panels.
    scales: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Int8 {
    /// `codes: [outputs, inputs]` (int8) and `scales: [outputs]`; `None` where libtorch is to do the products.
    pub fn of(codes: &Tensor, scales: &Tensor) -> Result<Option<Self>, TchError> {
        let &[outputs, inputs] = codes.size().as_slice() else { return Ok(None) };
        let usable = in_use() && codes.kind() == Kind::Int8 && codes.device() == tch::Device::Cpu;
        if !usable || outputs == 0 || inputs == 0 || inputs as usize > INPUTS_MAX || scales.numel() != outputs as usize {
            return Ok(None);
        }
        let (panel, unit) = (PANEL as i64, UNIT as i64);
        let (panels, units) = ((outputs + panel - 1) / panel, (inputs + unit - 1) / unit);
        let full = codes.f_constant_pad_nd([0, units * unit - inputs, 0, panels * panel - outputs])?;
        let full = full.f_view_dtype(Kind::Uint8)?.f_bitwise_xor(i64::from(OFFSET))?;
        let data = full.f_view([panels, panel, units, unit])?.f_permute([0, 2, 1, 3])?.f_contiguous()?;
        let mut scales: Vec<f32> = Vec::try_from(&scales.f_to_kind(Kind::Float)?.f_reshape([-1])?)?;
        scales.resize((panels * panel) as usize, 0.0);
        Ok(Some(Self { data, scales, inputs: inputs as usize, outputs: outputs as usize }))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.numel() + self.scales.len() * size_of::<f32>()
    }

    /// `x · weightᵀ` for `x: [..., inputs]` in f32 or bf16, `[..., outputs]` of the same type; `None` if it is none that the kernel reads.
    pub fn product(&self, x: &Tensor) -> Result<Option<Tensor>, TchError> {
        let mut shape = x.size();
        let Some(last) = shape.last_mut().filter(|last| **last == self.inputs as i64) else { return Ok(None) };
        *last = self.outputs as i64;
        let x = x.f_contiguous()?;
        if !plain(&x) {
            return Ok(None);
        }
        let (rows, half) = (x.numel() / self.inputs, x.kind() == Kind::BFloat16);
        let units = self.inputs.div_ceil(UNIT);
        let (mut codes, mut scales, mut sums) = (vec![0i8; rows * units * UNIT], vec![0f32; rows], vec![0i32; rows]);
        let rounding = Rounding {
            input: x.data_ptr(),
            half,
            rows,
            inputs: self.inputs,
            stride: units * UNIT,
            codes: codes.as_mut_ptr(),
            scales: scales.as_mut_ptr(),
            sums: sums.as_mut_ptr(),
        };
        let out = Tensor::f_empty(&shape, (x.kind(), tch::Device::Cpu))?;
        let product = Product {
            input: codes.as_ptr(),
            input_scales: scales.as_ptr(),
            input_sums: sums.as_ptr(),
            weight: self.data.data_ptr().cast(),
            weight_scales: self.scales.as_ptr(),
            out: out.data_ptr(),
            half,
            rows,
            units,
            outputs: self.outputs,
        };
        // SAFETY: memory of the sizes and types that both say, which outlives the calls; the second reads what the first has written.
        unsafe {
            launch(&rounding, rows > 1 && rows * self.inputs >= ROUND_PARALLEL_FROM);
            launch(&product, rows * self.inputs * self.outputs >= PARALLEL_FROM);
        }
        Ok(Some(out))
    }
}

/// Rows to codes, each with a scale of its own.
struct Rounding {
    /// `[rows, inputs]`, in bf16 or f32.
    input: *const c_void,
    half: bool,
    rows: usize,
    inputs: usize,
    /// Codes of a row, zeros behind the inputs included.
    stride: usize,
    codes: *mut i8,
    scales: *mut f32,
    /// Of each row's codes.
    sums: *mut i32,
}

impl Kernel for Rounding {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        for row in self.rows * thread / threads..self.rows * (thread + 1) / threads {
            unsafe {
                if self.half {
                    self.row::<u16>(row);
                } else {
                    self.row::<f32>(row);
                }
            }
        }
    }
}

impl Rounding {
    #[inline(always)]
    unsafe fn row<T: Stored>(&self, row: usize) {
        let (input, codes) = unsafe {
            let input = std::slice::from_raw_parts(self.input.cast::<T>().add(row * self.inputs), self.inputs);
            (input, std::slice::from_raw_parts_mut(self.codes.add(row * self.stride), self.inputs))
        };
        // Sixteen at a time, so that they become vectors; a number that is none is remembered, as a comparison forgets it.
        let (lines, rest) = input.as_chunks::<LANES>();
        let (mut largest, mut broken) = ([0f32; LANES], [0u32; LANES]);
        for line in lines {
            for ((largest, broken), value) in largest.iter_mut().zip(&mut broken).zip(line) {
                let value = value.widen().abs();
                *largest = if value > *largest { value } else { *largest };
                *broken |= u32::from(!value.is_finite());
            }
        }
        let mut most = largest.into_iter().fold(0f32, f32::max);
        let mut any = broken.into_iter().fold(0, |any, broken| any | broken);
        for value in rest {
            let value = value.widen().abs();
            most = most.max(value);
            any |= u32::from(!value.is_finite());
        }
        let scale = if any != 0 { f32::NAN } else { most / LARGEST };
        let inverse = if scale > 0.0 { LARGEST / most } else { 0.0 };
        let mut sum = 0i32;
        for (code, value) in codes.iter_mut().zip(input) {
            // Adding a number of this size rounds, ties to even, and leaves the whole number in the lowest bits.
            const WHOLE: f32 = 12_582_912.0;
            *code = (value.widen() * inverse + WHOLE).to_bits() as u8 as i8;
            sum += i32::from(*code);
        }
        unsafe {
            *self.scales.add(row) = scale;
            *self.sums.add(row) = sum;
        }
    }
}

/// One product, as plain memory.
struct Product {
    /// `[rows, units, 4]`, with a scale and a sum for each row.
    input: *const i8,
    input_scales: *const f32,
    input_sums: *const i32,
    /// `[panels, units, 16, 4]`.
    weight: *const u8,
    weight_scales: *const f32,
    /// `[rows, outputs]`, in bf16 or f32.
    out: *mut c_void,
    half: bool,
    rows: usize,
    units: usize,
    outputs: usize,
}

/// Whether the CPU multiplies four pairs of bytes at a time (AVX-512 VNNI).
static DOTS: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    let dots = std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    let dots = false;
    dots
});

impl Kernel for Product {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if *DOTS {
                return dots(self, thread, threads);
            }
            self.run::<[i32; LANES]>(thread, threads);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dots(product: &Product, thread: usize, threads: usize) {
    unsafe { product.run::<std::arch::x86_64::__m512i>(thread, threads) }
}

/// Sixteen running sums of whole numbers.
trait Sums: Copy {
    /// How many fit the CPU's registers, beside what they are made from.
    const COUNT: usize;

    fn zero() -> Self;
    /// Adds for each lane the products of four weights at `weight + 4 · lane` with the four codes in `input`.
    unsafe fn add(self, weight: *const u8, input: i32) -> Self;
    fn store(self) -> [i32; LANES];
}

#[cfg(target_arch = "x86_64")]
impl Sums for std::arch::x86_64::__m512i {
    const COUNT: usize = 24;

    #[inline(always)]
    fn zero() -> Self {
        unsafe { std::arch::x86_64::_mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn add(self, weight: *const u8, input: i32) -> Self {
        use std::arch::x86_64::*;
        unsafe { _mm512_dpbusd_epi32(self, _mm512_loadu_si512(weight.cast()), _mm512_set1_epi32(input)) }
    }

    #[inline(always)]
    fn store(self) -> [i32; LANES] {
        let mut lanes = [0; LANES];
        unsafe { std::arch::x86_64::_mm512_storeu_si512(lanes.as_mut_ptr().cast(), self) };
        lanes
    }
}

/// For CPUs without the instruction.
impl Sums for [i32; LANES] {
    const COUNT: usize = 6;

    #[inline(always)]
    fn zero() -> Self {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn add(mut self, weight: *const u8, input: i32) -> Self {
        let weight = unsafe { weight.cast::<[[u8; UNIT]; LANES]>().read_unaligned() };
        let input = input.to_le_bytes();
        for (sum, weight) in self.iter_mut().zip(weight) {
            for (weight, input) in weight.into_iter().zip(input) {
                *sum += i32::from(weight) * i32::from(input as i8);
            }
        }
        self
    }

    #[inline(always)]
    fn store(self) -> [i32; LANES] {
        self
    }
}

impl Product {
    /// A thread's share of the panels, with all rows: each panel's weights come from memory once.
    #[inline(always)]
    unsafe fn run<S: Sums>(&self, thread: usize, threads: usize) {
        let panels = self.outputs.div_ceil(PANEL);
        let mine = panels * thread / threads..panels * (thread + 1) / threads;
        let tiles = (self.rows * self.units * UNIT).div_ceil(TILE).clamp(1, self.rows.max(1));
        for tile in 0..tiles {
            let rows = self.rows * tile / tiles..self.rows * (tile + 1) / tiles;
            let mut panel = mine.start;
            while panel < mine.end {
                let (left, mut row) = (mine.end - panel, rows.start);
                // Few rows take more panels, or every sum would wait for its last addition.
                let wide = match rows.len() {
                    _ if S::COUNT < 24 => 1,
                    1 if left >= 8 => 8,
                    2..=4 if left >= 4 => 4,
                    _ => left.min(3),
                };
                while row < rows.end {
                    let more = rows.end - row;
                    row += unsafe {
                        match wide {
                            8 => self.tile::<S, 8, 1>(panel, row),
                            4 if more >= 4 => self.tile::<S, 4, 4>(panel, row),
                            4 if more == 3 => self.tile::<S, 4, 3>(panel, row),
                            4 if more == 2 => self.tile::<S, 4, 2>(panel, row),
                            4 => self.tile::<S, 4, 1>(panel, row),
                            3 if more >= 8 => self.tile::<S, 3, 8>(panel, row),
                            3 if more >= 4 => self.tile::<S, 3, 4>(panel, row),
                            3 if more >= 2 => self.tile::<S, 3, 2>(panel, row),
                            3 => self.tile::<S, 3, 1>(panel, row),
                            2 if more >= 8 => self.tile::<S, 2, 8>(panel, row),
                            2 if more >= 2 => self.tile::<S, 2, 2>(panel, row),
                            2 => self.tile::<S, 2, 1>(panel, row),
                            _ if more >= 4 => self.tile::<S, 1, 4>(panel, row),
                            _ => self.tile::<S, 1, 1>(panel, row),
                        }
                    };
                }
                panel += wide;
            }
        }
    }

    /// `M` rows with `P` panels. Gives `M`.
    #[inline(always)]
    unsafe fn tile<S: Sums, const P: usize, const M: usize>(&self, panel: usize, row: usize) -> usize {
        let stride = self.units * PANEL * UNIT;
        unsafe {
            let weight = self.weight.add(panel * stride);
            let input = self.input.add(row * self.units * UNIT).cast::<i32>();
            let mut sums = [[S::zero(); P]; M];
            for unit in 0..self.units {
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = input.add(m * self.units + unit).read_unaligned();
                    for (p, sum) in sums.iter_mut().enumerate() {
                        *sum = sum.add(weight.add(p * stride + unit * PANEL * UNIT), x);
                    }
                }
            }
            for (m, sums) in sums.into_iter().enumerate() {
                for (p, sum) in sums.into_iter().enumerate() {
                    self.put(row + m, (panel + p) * PANEL, sum.store());
                }
            }
        }
        M
    }

    #[inline(always)]
    unsafe fn put(&self, row: usize, first: usize, sums: [i32; LANES]) {
        unsafe {
            let (scale, excess) = (*self.input_scales.add(row), OFFSET * *self.input_sums.add(row));
            let scales = self.weight_scales.add(first).cast::<[f32; LANES]>().read_unaligned();
            let values: [f32; LANES] = std::array::from_fn(|lane| (sums[lane] - excess) as f32 * (scales[lane] * scale));
            let (at, count) = (row * self.outputs + first, (self.outputs - first).min(PANEL));
            if self.half {
                write(self.out.cast::<u16>().add(at), values, count);
            } else {
                write(self.out.cast::<f32>().add(at), values, count);
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

    fn weight(outputs: i64, inputs: i64) -> (Tensor, Tensor) {
        let codes = Tensor::randint_low(-127, 128, [outputs, inputs], (Kind::Int8, Device::Cpu));
        (codes, Tensor::rand([outputs], (Kind::Float, Device::Cpu)) / 100.0)
    }

    /// What it should come to, in f64.
    fn expected(x: &Tensor, codes: &Tensor, scales: &Tensor) -> Tensor {
        let x = x.to_kind(Kind::Float);
        let scale = x.abs().amax(-1, true) / 127.0;
        let rounded =
            (&x * x.abs().amax(-1, true).reciprocal() * 127.0).round().to_kind(Kind::Double) * scale.to_kind(Kind::Double);
        rounded.matmul(&(codes.to_kind(Kind::Double) * scales.to_kind(Kind::Double).unsqueeze(1)).transpose(0, 1))
    }

    #[test]
    fn products_are_those_of_the_rounded_numbers() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (rows, inputs, outputs) in [
                (1, 64, 10),
                (3, 17, 5),
                (4, 576, 131),
                (7, 256, 944),
                (32, 100, 33),
                (90, 1536, 35),
                (2, 704, 256),
                (1, 256, 300),
            ] {
                let ((codes, scales), x) = (weight(outputs, inputs), random(&[rows, inputs], kind));
                let ours = Int8::of(&codes, &scales).unwrap().unwrap().product(&x).unwrap().unwrap();
                assert_eq!(ours.kind(), kind);
                let exact = expected(&x, &codes, &scales);
                let error = f64::try_from((ours.to_kind(Kind::Double) - &exact).abs().max() / exact.abs().max()).unwrap();
                assert!(
                    error < if kind == Kind::Float { 1e-6 } else { 5e-3 },
                    "{kind:?} {rows} x {inputs} x {outputs}: {error}"
                );
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        for (inputs, outputs) in [(200, 301), (1536, 48), (601, 130)] {
            let ((codes, scales), x) = (weight(outputs, inputs), random(&[300, inputs], Kind::Float));
            let weight = Int8::of(&codes, &scales).unwrap().unwrap();
            let product = |first: i64, rows: i64| weight.product(&x.narrow(0, first, rows)).unwrap().unwrap();
            let alone: Vec<Tensor> = (0..300).map(|row| product(row, 1)).collect();
            for (threads, rows) in [(1, 300), (2, 300), (3, 299), (2, 87), (5, 13), (1, 6), (2, 5), (1, 3), (2, 2)] {
                crate::tensor::set_threads(threads);
                let first = (300 - rows) / 2;
                let expected = Tensor::cat(&alone[first as usize..(first + rows) as usize], 0);
                assert!(product(first, rows).equal(&expected), "{rows} rows of {inputs} on {threads} threads");
            }
        }
    }

    /// With the instruction and without.
    #[test]
    fn every_kind_of_sum_gives_the_same() {
        let weights = Tensor::randint(256, [3 * 40 * 64], (Kind::Uint8, Device::Cpu));
        let input = Tensor::randint_low(-127, 128, [5 * 160], (Kind::Int8, Device::Cpu));
        let (scales, sums, weight_scales) = ([0.5f32; 5], [3i32; 5], [0.25f32; 48]);
        let run = |generic: bool| {
            let out = Tensor::zeros([5, 41], (Kind::Float, Device::Cpu));
            let product = Product {
                input: input.data_ptr().cast(),
                input_scales: scales.as_ptr(),
                input_sums: sums.as_ptr(),
                weight: weights.data_ptr().cast(),
                weight_scales: weight_scales.as_ptr(),
                out: out.data_ptr(),
                half: false,
                rows: 5,
                units: 40,
                outputs: 41,
            };
            unsafe { if generic { product.run::<[i32; LANES]>(0, 1) } else { launch(&product, false) } };
            out
        };
        assert!(run(true).equal(&run(false)));
    }

    #[test]
    fn what_is_no_plain_case_is_left_alone_and_broken_rows_show() {
        let (codes, scales) = weight(8, 16);
        assert!(Int8::of(&codes.to_kind(Kind::Float), &scales).unwrap().is_none(), "another type");
        assert!(Int8::of(&codes, &scales.narrow(0, 0, 7)).unwrap().is_none(), "scales that do not fit");
        let weight = Int8::of(&codes, &scales).unwrap().unwrap();
        assert!(weight.product(&random(&[1, 15], Kind::Float)).unwrap().is_none(), "sizes that do not fit");
        assert!(weight.product(&random(&[1, 16], Kind::Double)).unwrap().is_none(), "another type");
        assert_eq!(weight.product(&random(&[0, 16], Kind::Float)).unwrap().unwrap().size(), [0, 8], "no rows");
        for broken in [f32::NAN, f32::INFINITY] {
            let x =
                Tensor::cat(&[Tensor::from_slice(&[broken]), Tensor::zeros([31], (Kind::Float, Device::Cpu))], 0).view([2, 16]);
            let out = weight.product(&x).unwrap().unwrap();
            assert!(out.get(0).isnan().all().int64_value(&[]) == 1 && f64::try_from(out.get(1).abs().max()).unwrap() == 0.0);
        }
    }
}
