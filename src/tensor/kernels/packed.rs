//! Products with a weight that has been rearranged once, when its model was loaded: sixteen outputs side by side, input
//! after input.
//!
//! So a vector of the weight meets one broadcast number of the input and sums of sixteen outputs grow side by side, with nothing to
//! add up across lanes in the end, as `product` must with a weight as it lies. Several such panels are gone through together, and so
//! they lie interleaved (`strips`). Each sum runs over the inputs in order, in
//! blocks of `BLOCK`: a result depends on its own row and output alone, whatever is computed beside it.

use std::ffi::c_void;
use std::hint::black_box;
use std::ops::Range;

use tch::TchError;

use super::fixed::Fixed;
use super::lanes::{LANES, Lanes, Stored};
use super::pointwise::widen;
use super::product::{Format, PAIRED, Single};
use super::strips::{Coming, Part, Strip, Strips};
use super::turns::{Rows, Turns};
use super::{Kernel, launch, plain};
use crate::tensor::{Kind, Tensor};

/// Outputs side by side.
const PANEL: usize = LANES;
/// Vectors of a panel that are summed up by themselves: short sums of f32 lose less, and the input's part of them stays near.
pub(super) const BLOCK: usize = 256;
/// Bytes of the input that are gone through together, so that they stay in the second-level cache.
pub(super) const TILE: usize = 256 * 1024;
/// Products of fewer multiplications are not worth other threads.
pub(super) const PARALLEL_FROM: usize = 32 * 1024;

/// A weight matrix for [`Packed::product`].
#[derive(Debug)]
pub struct Packed {
    /// Lines of sixteen numbers, or of sixteen pairs, interleaved by `strips`.
    data: Fixed,
    strips: Strips,
    kind: Kind,
    inputs: usize,
    outputs: usize,
    paired: bool,
}

impl Packed {
    /// `weight: [outputs, inputs]`, rearranged; `None` where libtorch is to do its products.
    pub fn of(weight: &Tensor) -> Result<Option<Self>, TchError> {
        let (&[outputs, inputs], true) = (weight.size().as_slice(), plain(weight)) else { return Ok(None) };
        if outputs == 0 || inputs == 0 {
            return Ok(None);
        }
        let paired = weight.kind() == Kind::BFloat16 && *PAIRED;
        let unit = if paired { 2 } else { 1 };
        let (panel, units) = (PANEL as i64, (inputs + unit - 1) / unit);
        let panels = (outputs + panel - 1) / panel;
        let full = weight.f_constant_pad_nd([0, units * unit - inputs, 0, panels * panel - outputs])?;
        let strips = Strips::of(panels as usize);
        let lines =
            full.f_view([panels, panel, units, unit])?.f_permute([0, 2, 1, 3])?.f_reshape([panels, units, panel * unit])?;
        let data = strips.interleave(&lines)?;
        let data = Fixed::of(data);
        Ok(Some(Self { data, strips, kind: weight.kind(), inputs: inputs as usize, outputs: outputs as usize, paired }))
    }

    /// The same weights under another handle.
    pub fn shallow_clone(&self) -> Self {
        Self { data: self.data.shallow_clone(), ..*self }
    }

    /// Has weights asked for ahead of their use: no cache keeps them from one product to the next.
    pub fn read_from_memory(&mut self) {
        self.strips.read_from_memory();
    }

    /// Where the weights begin, and their bytes.
    pub fn memory(&self) -> (usize, usize) {
        self.data.memory()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.numel() * self.data.kind().elt_size_in_bytes()
    }

    /// Type of the weight, and of what comes out.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// `x · weightᵀ` for `x: [..., inputs]` of the weight's type, `[..., outputs]`; `None` if `x` is not on the CPU, wants gradients or
    /// is of another size.
    pub fn product(&self, x: &Tensor) -> Result<Option<Tensor>, TchError> {
        let mut shape = x.size();
        let Some(last) = shape.last_mut().filter(|last| **last == self.inputs as i64) else { return Ok(None) };
        if x.kind() != self.kind || x.device() != tch::Device::Cpu || x.requires_grad() {
            return Ok(None);
        }
        *last = self.outputs as i64;
        let rows = x.numel() / self.inputs;
        let unit = if self.paired { 2 } else { 1 };
        let mut input = if self.paired { x.f_contiguous()? } else { x.f_to_kind(Kind::Float)?.f_contiguous()? };
        if !self.inputs.is_multiple_of(unit) {
            input = input.f_constant_pad_nd([0, 1])?.f_contiguous()?;
        }
        let out = Tensor::f_empty(&shape, (self.kind, tch::Device::Cpu))?;
        let inputs = self.inputs.next_multiple_of(unit);
        let product = Product { inputs, ..self.kernel(input.data_ptr(), out.data_ptr(), rows) };
        // SAFETY: the three tensors are contiguous, of the sizes and types that the product says, and outlive the call.
        unsafe { launch(&product, rows * self.inputs * self.outputs >= PARALLEL_FROM) };
        Ok(Some(out))
    }

    /// [`Packed::product`] into `out`; `None` if sizes or types do not fit.
    pub fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        x.beside(&out)?;
        let half = self.kind == Kind::BFloat16;
        if x.half != half || x.width != self.inputs || out.width != self.outputs || (self.paired && !x.width.is_multiple_of(2))
        {
            return None;
        }
        turns.reuse();
        let input = if self.paired { x.data.cast_const() } else { widen(x, turns).cast() };
        turns.push(self.kernel(input, out.data, x.count), x.numbers() * self.outputs >= PARALLEL_FROM);
        Some(())
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    fn kernel(&self, input: *const c_void, out: *mut c_void, rows: usize) -> Product {
        Product {
            input,
            weight: self.data.address(),
            strips: self.strips,
            out,
            rows,
            inputs: self.inputs,
            outputs: self.outputs,
            half: self.kind == Kind::BFloat16,
            paired: self.paired,
        }
    }
}

/// One product, as plain memory.
pub(super) struct Product {
    /// `[rows, inputs]` in f32, or in bf16 where it is `paired`.
    pub input: *const c_void,
    pub weight: *const c_void,
    pub strips: Strips,
    /// `[rows, outputs]` in the weight's type.
    pub out: *mut c_void,
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub half: bool,
    pub paired: bool,
}

impl Kernel for Product {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.paired {
                return pairs(self, thread, threads);
            }
            if self.half {
                self.run::<V, Single<u16, u16>>(thread, threads);
            } else {
                self.run::<V, Single<f32, f32>>(thread, threads);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs(product: &Product, thread: usize, threads: usize) {
    use super::product::Pairs;
    unsafe { product.run::<std::arch::x86_64::__m512, Pairs>(thread, threads) }
}

impl Product {
    /// A thread's share of the strips, with all rows: each strip's weights come from memory once.
    #[inline(always)]
    unsafe fn run<V: Lanes, F: Format<V>>(&self, thread: usize, threads: usize) {
        let tiles = (self.rows * self.inputs * size_of::<F::Input>()).div_ceil(TILE).clamp(1, self.rows.max(1));
        let (units, mut open) = (self.inputs / F::UNIT, vec![]);
        for tile in 0..tiles {
            let rows = self.rows * tile / tiles..self.rows * (tile + 1) / tiles;
            // Once through all inputs, or block by block, so that the next block is no larger than what waits in a core's own cache.
            let step = if self.strips.asks_early(rows.len()) { BLOCK } else { units.max(1) };
            for strip in self.strips.share(thread, threads) {
                let line = strip.wide * F::STEP;
                let lines = self.weight.cast::<F::Weight>().wrapping_add(strip.first * units * F::STEP);
                for start in (0..units).step_by(step) {
                    let block = start..(start + step).min(units);
                    let lines = lines.wrapping_add(start * line);
                    // Blocks lie one behind the other, as strips do.
                    let next = lines.wrapping_add(block.len() * line);
                    let parts = if rows.len() <= 4 { 1 } else { strip.wide.div_ceil(3) };
                    let turns = block.len() * parts * rows.len().div_ceil(8);
                    let coming = strip.coming(rows.len(), next, step * line * size_of::<F::Weight>(), turns);
                    unsafe { self.strip::<V, F>(strip, &rows, &block, lines, &mut open, coming) };
                }
            }
        }
    }

    /// All `rows` with the panels of a strip, over the inputs of `units`, a whole block of them or all, whose lines are there; `open` keeps the
    /// sums from block to block, and what is `coming` is asked for meanwhile.
    #[inline(always)]
    pub(super) unsafe fn strip<V: Lanes, F: Format<V>>(
        &self,
        strip: Strip,
        rows: &Range<usize>,
        units: &Range<usize>,
        lines: *const F::Weight,
        open: &mut Vec<V>,
        mut coming: Coming,
    ) {
        let coming = &mut coming;
        let (mut from, all) = (0, self.inputs / F::UNIT);
        if all > BLOCK {
            open.resize(rows.len() * strip.wide, unsafe { V::zero() });
        }
        while from < strip.wide {
            let part = Part { strip, from };
            // A part that goes through all its blocks at once needs no place of its own.
            let open = open.as_mut_ptr().wrapping_add(if units.len() < all { rows.len() * from } else { 0 });
            // As many sums as registers hold; few rows take more panels, or every sum would wait for its last addition.
            from += unsafe {
                match (strip.wide - from, rows.len()) {
                    _ if V::SUMS < 24 => self.part::<V, F, 1, 6>(part, rows, units, lines, open, coming),
                    (4, 7) if F::UNIT > 1 => self.part::<V, F, 2, 8>(part, rows, units, lines, open, coming),
                    (6, ..=4) => self.part::<V, F, 6, 4>(part, rows, units, lines, open, coming),
                    (4, _) => self.part::<V, F, 4, 6>(part, rows, units, lines, open, coming),
                    (3.., _) => self.part::<V, F, 3, 8>(part, rows, units, lines, open, coming),
                    (2, _) => self.part::<V, F, 2, 8>(part, rows, units, lines, open, coming),
                    _ => self.part::<V, F, 1, 8>(part, rows, units, lines, open, coming),
                }
            };
        }
    }

    /// All `rows` with `P` panels, at most `M` at a time (every count up to it is one pass: the weights are what takes long). Gives `P`.
    #[inline(always)]
    unsafe fn part<V: Lanes, F: Format<V>, const P: usize, const M: usize>(
        &self,
        part: Part,
        rows: &Range<usize>,
        units: &Range<usize>,
        lines: *const F::Weight,
        open: *mut V,
        coming: &mut Coming,
    ) -> usize {
        unsafe {
            for start in units.clone().step_by(BLOCK) {
                let block = start..(start + BLOCK).min(units.end);
                let lines = lines.add(((start - units.start) * part.strip.wide + part.from) * F::STEP);
                let mut row = rows.start;
                while row < rows.end {
                    let open = open.wrapping_add((row - rows.start) * P);
                    let part = if row == rows.start { part } else { part.at_hand() };
                    row += match (rows.end - row).min(M) {
                        8.. => self.tile::<V, F, P, 8>(part, row, &block, lines, open, coming),
                        7 => self.tile::<V, F, P, 7>(part, row, &block, lines, open, coming),
                        6 => self.tile::<V, F, P, 6>(part, row, &block, lines, open, coming),
                        5 => self.tile::<V, F, P, 5>(part, row, &block, lines, open, coming),
                        4 => self.tile::<V, F, P, 4>(part, row, &block, lines, open, coming),
                        3 => self.tile::<V, F, P, 3>(part, row, &block, lines, open, coming),
                        2 => self.tile::<V, F, P, 2>(part, row, &block, lines, open, coming),
                        _ => self.tile::<V, F, P, 1>(part, row, &block, lines, open, coming),
                    };
                }
            }
        }
        P
    }

    /// `M` rows with `P` panels over one block of inputs, whose lines are there. Adds to what is `open`, unless the block is the first, and leaves the sums
    /// there, unless it is the last. Gives `M`.
    #[inline(always)]
    unsafe fn tile<V: Lanes, F: Format<V>, const P: usize, const M: usize>(
        &self,
        part: Part,
        row: usize,
        block: &Range<usize>,
        lines: *const F::Weight,
        open: *mut V,
        coming: &mut Coming,
    ) -> usize {
        let units = self.inputs / F::UNIT;
        unsafe {
            let input = self.input.cast::<F::Input>().add(row * self.inputs + block.start * F::UNIT);
            // Where each row begins, in a register of its own: an address that is computed anew for every number takes an eighth of the loop's time.
            let inputs: [_; M] = black_box(std::array::from_fn(|m| input.add(m * self.inputs)));
            let (mut line, step) = (lines, part.strip.wide * F::STEP);
            let mut sums = [[V::zero(); P]; M];
            for unit in 0..block.len() {
                let mut w = [F::weight(line); P];
                for (p, w) in w.iter_mut().enumerate().skip(1) {
                    *w = F::weight(line.add(p * F::STEP));
                }
                part.ask_ahead::<P>(line.cast(), F::STEP * size_of::<F::Weight>(), M == 1);
                coming.ask();
                for (sums, input) in sums.iter_mut().zip(inputs) {
                    let x = F::spread(input.add(unit * F::UNIT));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = F::multiply_add(w, x, *sum);
                    }
                }
                line = line.wrapping_add(step);
            }
            let (first, last) = (block.start == 0, block.end == units);
            for (m, sums) in sums.into_iter().enumerate() {
                for (p, mut sum) in sums.into_iter().enumerate() {
                    let open = open.wrapping_add(m * P + p);
                    if !first {
                        sum = sum.multiply_add(V::splat(1.0), *open);
                    }
                    if last {
                        self.put::<V, F>(row + m, (part.panel() + p) * PANEL, sum);
                    } else {
                        *open = sum;
                    }
                }
            }
        }
        M
    }

    #[inline(always)]
    pub(super) unsafe fn put<V: Lanes, F: Format<V>>(&self, row: usize, first: usize, sum: V) {
        unsafe {
            let (out, values) = (self.out.cast::<F::Out>().add(row * self.outputs + first), sum.store().map(F::Out::narrow));
            match self.outputs - first {
                // A known count spares a call.
                PANEL.. => out.cast::<[F::Out; PANEL]>().write_unaligned(values),
                count => std::ptr::copy_nonoverlapping(values.as_ptr(), out, count),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::alike;
    use super::*;
    use tch::Device;

    const SHAPES: [(i64, i64, i64); 9] = [
        (1, 64, 10),
        (3, 17, 5),
        (4, 576, 131),
        (7, 256, 944),
        (32, 100, 33),
        (90, 1536, 35),
        (301, 40, 70),
        (2, 704, 256),
        (1, 256, 300),
    ];

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    #[test]
    fn products_are_exact_within_rounding() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
            for (rows, inputs, outputs) in SHAPES {
                let (x, weight) = (random(&[rows, inputs], kind), random(&[outputs, inputs], kind));
                let ours = Packed::of(&weight).unwrap().unwrap().product(&x).unwrap().unwrap().to_kind(Kind::Double);
                let exact = x.to_kind(Kind::Double).matmul(&weight.to_kind(Kind::Double).transpose(0, 1));
                let error = f64::try_from((&ours - &exact).abs().max() / exact.abs().max()).unwrap();
                assert!(error < tolerance, "{kind:?} {rows} x {inputs} x {outputs}: {error}");
            }
        }
    }

    /// Many rows go in tiles, long ones in blocks, and all by threads: none of it may show.
    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (inputs, outputs) in [(200, 301), (1536, 48), (601, 130)] {
                let (x, weight) = (random(&[300, inputs], kind), random(&[outputs, inputs], kind));
                let mut weight = Packed::of(&weight).unwrap().unwrap();
                weight.read_from_memory();
                alike(
                    &|first, rows| weight.product(&x.narrow(0, first, rows)).unwrap().unwrap(),
                    &format!("{kind:?}, {inputs} inputs"),
                );
            }
        }
    }

    /// The sums of every kind of vector that this CPU has, in its own registers, are the same to the bit.
    #[test]
    fn every_kind_of_vector_gives_the_same() {
        let (x, weight) = (random(&[13, 301], Kind::Float), random(&[77, 301], Kind::Float));
        let packed = Packed::of(&weight).unwrap().unwrap();
        let right = packed.product(&x).unwrap().unwrap();
        let out = Tensor::zeros([13, 77], (Kind::Float, Device::Cpu));
        let product = Product {
            input: x.data_ptr(),
            weight: packed.data.address(),
            strips: packed.strips,
            out: out.data_ptr(),
            rows: 13,
            inputs: 301,
            outputs: 77,
            half: false,
            paired: false,
        };
        unsafe { product.share::<[f32; LANES]>(0, 1) };
        assert!(out.equal(&right));
    }

    #[test]
    fn what_is_no_plain_case_is_left_alone() {
        assert!(Packed::of(&random(&[8], Kind::Float)).unwrap().is_none(), "no matrix");
        assert!(Packed::of(&random(&[8, 4], Kind::Float).set_requires_grad(true)).unwrap().is_none(), "gradients");
        assert!(Packed::of(&random(&[8, 4], Kind::Double)).unwrap().is_none(), "another type");
        let weight = Packed::of(&random(&[8, 16], Kind::Float)).unwrap().unwrap();
        assert!(weight.product(&random(&[1, 15], Kind::Float)).unwrap().is_none(), "sizes that do not fit");
        assert!(weight.product(&random(&[1, 16], Kind::BFloat16)).unwrap().is_none(), "mixed types");
        assert!(weight.product(&random(&[1, 16], Kind::Float).set_requires_grad(true)).unwrap().is_none(), "gradients");
        assert_eq!(weight.product(&random(&[0, 16], Kind::Float)).unwrap().unwrap().size(), [0, 8], "no rows");
    }
}
