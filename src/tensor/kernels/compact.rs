//! Products in f32 with weights that a file has in fewer bytes: floats of 16 bits, and ggml's blocks, whose codes share a scale and a minimum.
//! They are widened where they are used, to the very numbers that they mean, so that results are those of [`super::packed`] to the bit.
//!
//! Weights lie as there, sixteen outputs side by side, two inputs after two; before each group of codes lies what it shares. A few rows meet
//! weights as these are widened, in registers. For more rows a block of them is widened once, to where [`super::packed`] takes it from.

use std::marker::PhantomData;
use std::ops::Range;

use tch::TchError;

use super::fixed::Fixed;
use super::lanes::{LANES, Lanes};
use super::packed::{self, BLOCK, PARALLEL_FROM, TILE};
use super::product::Single;
use super::strips::{Coming, Part, Strip, Strips};
use super::turns::{Rows, Turns};
use super::{Kernel, in_use, launch, plain};
use crate::tensor::{Device, Kind, Tensor};

/// Outputs side by side.
const PANEL: usize = LANES;
/// Rows that meet weights in registers together: most of a few, and of several, whose sums only the larger kind of registers has room for. Twice
/// as many meet weights that are widened twice.
const FEW: usize = 4;
const SEVERAL: usize = 6;
/// Rows that are worth widening weights for, however long they are.
const MANY: usize = 64;
/// Inputs of a group, one of which divides the other and [`BLOCK`].
const GROUPS: [usize; 2] = [32, 16];

/// A weight matrix for [`Compact::product`].
#[derive(Debug)]
pub struct Compact {
    form: Form,
    /// `[panels, groups]` records, interleaved by `strips`: scales, minima, then lines of codes.
    data: Fixed,
    strips: Strips,
    inputs: usize,
    outputs: usize,
}

/// How a group lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Bf16,
    F16,
    Codes {
        /// Whether two of them share a byte.
        halves: bool,
        /// Whether scales and minima are f16, not f32.
        brief: bool,
        /// Inputs.
        group: usize,
    },
}

impl Compact {
    /// Weights `code · scale + minimum`: `codes: [outputs, inputs]` (uint8) with `scales` and `minima: [outputs, inputs / group]` (f32). `None` where
    /// there is no kernel for them. A code times its scale must be exact in f32, as it is wherever a scale has 16 bits at most.
    pub fn of(codes: &Tensor, scales: &Tensor, minima: &Tensor) -> Result<Option<Self>, TchError> {
        let (&[outputs, inputs], &[rows, groups]) = (codes.size().as_slice(), scales.size().as_slice()) else {
            return Ok(None);
        };
        let whole = rows == outputs && groups > 0 && inputs % groups == 0 && minima.size() == scales.size();
        let Some(group) = GROUPS.into_iter().find(|group| whole && inputs / groups == *group as i64) else { return Ok(None) };
        let types =
            codes.kind() == Kind::Uint8 && plain(scales) && scales.kind() == Kind::Float && minima.kind() == Kind::Float;
        if !in_use() || !types || codes.device() != Device::Cpu || outputs == 0 {
            return Ok(None);
        }
        let halves = codes.f_max()?.f_int64_value(&[])? < 16 && group == GROUPS[0];
        let shared = Tensor::f_stack(&[scales, minima], 2)?;
        let brief = shared.f_to_kind(Kind::Half)?;
        let exact = brief.f_to_kind(Kind::Float)?.equal(&shared) && group == GROUPS[0];
        let shared = if exact { brief } else { shared };
        let panel = PANEL as i64;
        let panels = (outputs + panel - 1) / panel;
        let missing = panels * panel - outputs;
        // Of each group, what all sixteen outputs have of the same side by side.
        let shared = shared.f_constant_pad_nd([0, 0, 0, 0, 0, missing])?.f_view([panels, panel, groups, 2])?;
        let shared = shared.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_view_dtype(Kind::Uint8)?.f_flatten(2, 3)?;
        let codes = codes.f_constant_pad_nd([0, 0, 0, missing])?.f_view([panels, panel, groups, group as i64 / 2, 2])?;
        let codes = codes.f_permute([0, 2, 3, 4, 1])?;
        let codes = if halves { codes.f_select(3, 0)?.f_add(&codes.f_select(3, 1)?.f_mul_scalar(16)?)? } else { codes };
        let records = Tensor::f_cat(&[shared, codes.f_reshape([panels, groups, -1])?], 2)?;
        Ok(Some(Self::new(Form::Codes { halves, brief: exact, group }, &records, inputs, outputs)?))
    }

    /// Of floats of 16 bits, `weight: [outputs, inputs]`; `None` where there is no kernel for them.
    pub fn of_halves(weight: &Tensor) -> Result<Option<Self>, TchError> {
        let form = match weight.kind() {
            Kind::BFloat16 => Form::Bf16,
            Kind::Half => Form::F16,
            _ => return Ok(None),
        };
        let (&[outputs, inputs], Device::Cpu) = (weight.size().as_slice(), weight.device()) else { return Ok(None) };
        let (panel, group) = (PANEL as i64, GROUPS[0] as i64);
        if !in_use() || outputs == 0 || inputs == 0 || inputs % group != 0 || weight.requires_grad() {
            return Ok(None);
        }
        let (panels, groups) = ((outputs + panel - 1) / panel, inputs / group);
        let full = weight.f_constant_pad_nd([0, 0, 0, panels * panel - outputs])?;
        let records = full.f_view([panels, panel, groups, group])?.f_permute([0, 2, 3, 1])?.f_contiguous()?;
        let records = records.f_view([panels, groups, group * panel])?.f_view_dtype(Kind::Uint8)?;
        Ok(Some(Self::new(form, &records, inputs, outputs)?))
    }

    /// `records: [panels, groups, bytes]`.
    fn new(form: Form, records: &Tensor, inputs: i64, outputs: i64) -> Result<Self, TchError> {
        let strips = Strips::of(records.size()[0] as usize);
        let data = Fixed::of(strips.interleave(records)?);
        Ok(Self { form, data, strips, inputs: inputs as usize, outputs: outputs as usize })
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
        self.data.numel()
    }

    /// `x · weightᵀ` for `x: [..., inputs]` in f32, `[..., outputs]`; `None` if it is none that the kernel reads.
    pub fn product(&self, x: &Tensor) -> Result<Option<Tensor>, TchError> {
        let mut shape = x.size();
        let Some(last) = shape.last_mut().filter(|last| **last == self.inputs as i64) else { return Ok(None) };
        *last = self.outputs as i64;
        let x = x.f_contiguous()?;
        if !plain(&x) || x.kind() != Kind::Float {
            return Ok(None);
        }
        let out = Tensor::f_empty(&shape, (Kind::Float, Device::Cpu))?;
        let rows = x.numel() / self.inputs;
        let product = self.kernel(x.data_ptr().cast(), out.data_ptr().cast(), rows);
        // SAFETY: the tensors are contiguous, of the sizes and types that the product says, and outlive the call.
        unsafe { launch(&product, rows * self.inputs * self.outputs >= PARALLEL_FROM) };
        Ok(Some(out))
    }

    /// [`Compact::product`] into `out`; `None` if sizes or types do not fit.
    pub fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        x.beside(&out)?;
        if x.half || x.width != self.inputs || out.width != self.outputs {
            return None;
        }
        turns.push(self.kernel(x.data.cast(), out.data.cast(), x.count), x.numbers() * self.outputs >= PARALLEL_FROM);
        Some(())
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    fn kernel(&self, input: *const f32, out: *mut f32, rows: usize) -> Product {
        let dense = packed::Product {
            input: input.cast(),
            weight: std::ptr::null(),
            strips: self.strips,
            out: out.cast(),
            rows,
            inputs: self.inputs,
            outputs: self.outputs,
            half: false,
            paired: false,
        };
        Product { form: self.form, records: self.data.address().cast(), dense }
    }
}

/// One product, as plain memory.
struct Product {
    form: Form,
    records: *const u8,
    /// The same with weights as floats, which are none yet.
    dense: packed::Product,
}

/// How a group of sixteen outputs is read.
///
/// # Safety
/// As for [`Lanes`].
trait Record<V> {
    /// Inputs, two by two.
    const PAIRS: usize;
    /// Bytes of scales and minima, and of the codes of two inputs.
    const SHARED: usize;
    const LINE: usize;
    /// Of all that, and of the same for each two inputs.
    const BYTES: usize = Self::SHARED + Self::PAIRS * Self::LINE;
    const STEP: usize = Self::BYTES / Self::PAIRS;
    type Shared: Copy;
    /// Scales and minima.
    unsafe fn shared(record: *const u8) -> Self::Shared;
    /// Two inputs' weights.
    unsafe fn weights(line: *const u8, shared: Self::Shared) -> (V, V);
}

/// Floats of type `T`.
struct Floats<T>(PhantomData<T>);
/// `C` codes under scales of type `S`, of so many pairs.
struct Group<C, S, const PAIRS: usize>(PhantomData<(C, S)>);
struct Nibbles;
struct Bytes;
/// f16, f32 and bf16.
struct Brief;
struct Full;
struct Upper;

/// Parts of a record: the codes of two inputs, and sixteen floats.
trait Codes<V> {
    const BYTES: usize;
    unsafe fn pair(from: *const u8) -> (V, V);
}

trait Vector<V> {
    const BYTES: usize;
    unsafe fn load(from: *const u8) -> V;
}

impl<V: Lanes> Codes<V> for Nibbles {
    const BYTES: usize = LANES;

    #[inline(always)]
    unsafe fn pair(from: *const u8) -> (V, V) {
        unsafe { V::load_u4(from) }
    }
}

impl<V: Lanes> Codes<V> for Bytes {
    const BYTES: usize = 2 * LANES;

    #[inline(always)]
    unsafe fn pair(from: *const u8) -> (V, V) {
        unsafe { (V::load_u8(from), V::load_u8(from.add(LANES))) }
    }
}

impl<V: Lanes> Vector<V> for Brief {
    const BYTES: usize = 2 * LANES;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> V {
        unsafe { V::load_f16(from.cast()) }
    }
}

impl<V: Lanes> Vector<V> for Upper {
    const BYTES: usize = 2 * LANES;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> V {
        unsafe { V::load_bf16(from.cast()) }
    }
}

impl<V: Lanes> Vector<V> for Full {
    const BYTES: usize = 4 * LANES;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> V {
        unsafe { V::load(from.cast()) }
    }
}

impl<V: Lanes, C: Codes<V>, S: Vector<V>, const PAIRS: usize> Record<V> for Group<C, S, PAIRS> {
    const PAIRS: usize = PAIRS;
    const SHARED: usize = 2 * S::BYTES;
    const LINE: usize = C::BYTES;

    type Shared = (V, V);

    #[inline(always)]
    unsafe fn shared(record: *const u8) -> (V, V) {
        unsafe { (S::load(record), S::load(record.add(S::BYTES))) }
    }

    #[inline(always)]
    unsafe fn weights(line: *const u8, (scale, minimum): (V, V)) -> (V, V) {
        unsafe {
            let (first, second) = C::pair(line);
            (first.multiply_add(scale, minimum), second.multiply_add(scale, minimum))
        }
    }
}

impl<V: Lanes, T: Vector<V>> Record<V> for Floats<T> {
    const PAIRS: usize = GROUPS[0] / 2;
    const SHARED: usize = 0;
    const LINE: usize = 2 * T::BYTES;
    type Shared = ();

    #[inline(always)]
    unsafe fn shared(_: *const u8) {}

    #[inline(always)]
    unsafe fn weights(line: *const u8, (): ()) -> (V, V) {
        unsafe { (T::load(line), T::load(line.add(T::BYTES))) }
    }
}

impl Kernel for Product {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe {
            match self.form {
                Form::Bf16 => self.run::<V, Floats<Upper>>(thread, threads),
                Form::F16 => self.run::<V, Floats<Brief>>(thread, threads),
                Form::Codes { halves: true, brief: true, .. } => self.run::<V, Group<Nibbles, Brief, 16>>(thread, threads),
                Form::Codes { halves: true, .. } => self.run::<V, Group<Nibbles, Full, 16>>(thread, threads),
                Form::Codes { brief: true, .. } => self.run::<V, Group<Bytes, Brief, 16>>(thread, threads),
                Form::Codes { group: 32, .. } => self.run::<V, Group<Bytes, Full, 16>>(thread, threads),
                Form::Codes { .. } => self.run::<V, Group<Bytes, Full, 8>>(thread, threads),
            }
        }
    }
}

impl Product {
    /// A thread's share of the strips, with all rows: each strip's weights come from memory once.
    #[inline(always)]
    unsafe fn run<V: Lanes, R: Record<V>>(&self, thread: usize, threads: usize) {
        let packed::Product { rows, inputs, strips, .. } = self.dense;
        let tiles = (rows * inputs * size_of::<f32>()).div_ceil(TILE).min(rows.div_ceil(MANY)).clamp(1, rows.max(1));
        let (mut lines, mut open) = (vec![], vec![]);
        for tile in 0..tiles {
            let rows = rows * tile / tiles..rows * (tile + 1) / tiles;
            for strip in strips.share(thread, threads) {
                let records = unsafe { self.records.add(strip.first * (inputs / (2 * R::PAIRS)) * R::BYTES) };
                if rows.len() > if V::SUMS < 24 { FEW } else { 2 * SEVERAL } {
                    unsafe { self.many::<V, R>(strip, &rows, records, &mut lines, &mut open) };
                    continue;
                }
                let bytes = inputs / (2 * R::PAIRS) * strip.wide * R::BYTES;
                let wide = if rows.len() <= FEW || matches!(rows.len(), 7 | 8) { 3 } else { 2 };
                let turns = inputs / 2 * strip.wide.div_ceil(wide) * rows.len().div_ceil(SEVERAL);
                let coming = &mut strip.coming(rows.len(), records.wrapping_add(bytes), bytes, turns);
                let mut from = 0;
                while from < strip.wide {
                    let part = Part { strip, from };
                    // As many sums as registers hold beside scales and minima.
                    from += unsafe {
                        match (strip.wide - from, rows.len()) {
                            _ if V::SUMS < 24 => self.few::<V, R, 1>(part, &rows, records, coming),
                            (6, 1) => self.few::<V, R, 6>(part, &rows, records, coming),
                            (4, 1) => self.few::<V, R, 4>(part, &rows, records, coming),
                            (3.., ..=FEW) => self.few::<V, R, 3>(part, &rows, records, coming),
                            (2, ..=FEW) => self.few::<V, R, 2>(part, &rows, records, coming),
                            (_, ..=FEW) => self.few::<V, R, 1>(part, &rows, records, coming),
                            (3.., 7 | 8) => self.several::<V, R, 3>(part, &rows, records, coming),
                            (2.., _) => self.several::<V, R, 2>(part, &rows, records, coming),
                            _ => self.several::<V, R, 1>(part, &rows, records, coming),
                        }
                    };
                }
            }
        }
    }

    /// All `rows`, at most [`FEW`], with `P` panels. Gives `P`.
    #[inline(always)]
    unsafe fn few<V: Lanes, R: Record<V>, const P: usize>(
        &self,
        part: Part,
        rows: &Range<usize>,
        records: *const u8,
        coming: &mut Coming,
    ) -> usize {
        unsafe {
            match rows.len() {
                4.. => self.tile::<V, R, P, 4>(part, rows.start, records, coming),
                3 => self.tile::<V, R, P, 3>(part, rows.start, records, coming),
                2 => self.tile::<V, R, P, 2>(part, rows.start, records, coming),
                1 => self.tile::<V, R, P, 1>(part, rows.start, records, coming),
                _ => {}
            }
        }
        P
    }

    /// All `rows`, more than [`FEW`] and at most twice [`SEVERAL`], with `P` panels, which are three only for seven rows and eight. Gives `P`.
    #[inline(always)]
    unsafe fn several<V: Lanes, R: Record<V>, const P: usize>(
        &self,
        part: Part,
        rows: &Range<usize>,
        records: *const u8,
        coming: &mut Coming,
    ) -> usize {
        let times = rows.len().div_ceil(SEVERAL);
        for time in 0..times {
            let row = rows.start + rows.len() * time / times;
            let part = if time == 0 { part } else { part.at_hand() };
            unsafe {
                match rows.start + rows.len() * (time + 1) / times - row {
                    6 if const { P < 3 } => self.tile::<V, R, P, 6>(part, row, records, coming),
                    5 if const { P < 3 } => self.tile::<V, R, P, 5>(part, row, records, coming),
                    4 => self.tile::<V, R, P, 4>(part, row, records, coming),
                    _ => self.tile::<V, R, P, 3>(part, row, records, coming),
                }
            }
        }
        P
    }

    /// `M` rows with `P` panels, block by block as [`packed::Product`] has it.
    #[inline(always)]
    unsafe fn tile<V: Lanes, R: Record<V>, const P: usize, const M: usize>(
        &self,
        part: Part,
        row: usize,
        records: *const u8,
        coming: &mut Coming,
    ) {
        let (inputs, wide) = (self.dense.inputs, part.strip.wide);
        let input = self.dense.input.cast::<f32>().wrapping_add(row * inputs);
        unsafe {
            let mut totals = [[V::zero(); P]; M];
            for start in (0..inputs).step_by(BLOCK) {
                let mut sums = [[V::zero(); P]; M];
                for at in (start..(start + BLOCK).min(inputs)).step_by(2 * R::PAIRS) {
                    let group = records.add(at / (2 * R::PAIRS) * wide * R::BYTES);
                    let own = group.add(part.from * R::BYTES);
                    let mut shared = [R::shared(own); P];
                    for (p, shared) in shared.iter_mut().enumerate().skip(1) {
                        *shared = R::shared(own.add(p * R::BYTES));
                    }
                    for pair in 0..R::PAIRS {
                        // One row asks for its own part of the next groups; the first part of several rows for everybody's.
                        let ahead = if M == 1 { own.add(pair * P * R::STEP) } else { group.add(pair * wide * R::STEP) };
                        part.ask_ahead::<P>(ahead, R::STEP, M == 1);
                        coming.ask();
                        let line = own.add(R::SHARED + pair * R::LINE);
                        for (p, shared) in shared.into_iter().enumerate() {
                            let (first, second) = R::weights(line.add(p * R::BYTES), shared);
                            for (m, sums) in sums.iter_mut().enumerate() {
                                let x = input.add(m * inputs + at + 2 * pair);
                                let sum = first.multiply_add(V::splat(*x), sums[p]);
                                sums[p] = second.multiply_add(V::splat(*x.add(1)), sum);
                            }
                        }
                    }
                }
                for (totals, sums) in totals.iter_mut().zip(sums) {
                    for (total, sum) in totals.iter_mut().zip(sums) {
                        *total = if start == 0 { sum } else { sum.multiply_add(V::splat(1.0), *total) };
                    }
                }
            }
            for (m, totals) in totals.into_iter().enumerate() {
                for (p, total) in totals.into_iter().enumerate() {
                    self.dense.put::<V, Single<f32, f32>>(row + m, (part.panel() + p) * PANEL, total);
                }
            }
        }
    }

    /// All `rows` with a strip, whose weights are widened block by block.
    #[inline(always)]
    unsafe fn many<V: Lanes, R: Record<V>>(
        &self,
        strip: Strip,
        rows: &Range<usize>,
        records: *const u8,
        lines: &mut Vec<[f32; LANES]>,
        open: &mut Vec<V>,
    ) {
        lines.resize(strip.wide * BLOCK, [0.0; LANES]);
        for start in (0..self.dense.inputs).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(self.dense.inputs);
            for at in block.clone().step_by(2 * R::PAIRS) {
                for panel in 0..strip.wide {
                    unsafe {
                        let record = records.add((at / (2 * R::PAIRS) * strip.wide + panel) * R::BYTES);
                        let (shared, part) = (R::shared(record), Part { strip, from: 0 });
                        for pair in 0..R::PAIRS {
                            part.ask_ahead::<1>(record.add(pair * R::STEP), R::STEP, true);
                            let (first, second) = R::weights(record.add(R::SHARED + pair * R::LINE), shared);
                            let line = lines.as_mut_ptr().add((at - start + 2 * pair) * strip.wide + panel);
                            line.write(first.store());
                            line.add(strip.wide).write(second.store());
                        }
                    }
                }
            }
            let group = strip.wide * R::BYTES;
            let next = records.wrapping_add(block.end / (2 * R::PAIRS) * group);
            let turns = block.len() * strip.wide.div_ceil(3) * rows.len().div_ceil(8);
            let coming = strip.coming(rows.len(), next, BLOCK / (2 * R::PAIRS) * group, turns);
            unsafe {
                self.dense.strip::<V, Single<f32, f32>>(strip.at_hand(), rows, &block, lines.as_ptr().cast(), open, coming)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packed::Packed;
    use super::super::tests::alike;
    use super::*;

    /// Largest code, inputs of a group, and whether scales fit f16.
    const FORMS: [(i64, i64, bool); 6] =
        [(15, 32, true), (15, 32, false), (63, 32, true), (255, 32, true), (31, 32, false), (63, 16, false)];

    /// Codes, scales and minima, as floats too.
    fn weight(outputs: i64, inputs: i64, (largest, group, brief): (i64, i64, bool)) -> ([Tensor; 3], Tensor) {
        let codes = Tensor::randint(largest + 1, [outputs, inputs], (Kind::Uint8, Device::Cpu));
        let codes = codes.index_fill(1, &Tensor::from(0i64), largest);
        let shared = || {
            let random = Tensor::randn([outputs, inputs / group], (Kind::Float, Device::Cpu));
            // Seventeen bits at most, so that products with codes are exact, but more than f16 has.
            if brief {
                random.to_kind(Kind::Half).to_kind(Kind::Float)
            } else {
                (random * 8192.0).round() / 65536.0 + 1.0 / 131_072.0
            }
        };
        let (scales, minima) = (shared(), shared());
        let spread = |shared: &Tensor| shared.repeat_interleave_self_int(group, 1, None::<i64>);
        let floats = codes.to_kind(Kind::Float) * spread(&scales) + spread(&minima);
        ([codes, scales, minima], floats)
    }

    fn compact([codes, scales, minima]: &[Tensor; 3]) -> Compact {
        Compact::of(codes, scales, minima).unwrap().unwrap()
    }

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    /// All forms of a weight, with the floats that they are.
    fn all(outputs: i64, inputs: i64) -> Vec<(Compact, Tensor)> {
        let mut all = vec![];
        for form in FORMS {
            let (parts, floats) = weight(outputs, inputs, form);
            let weight = compact(&parts);
            assert_eq!(weight.form, Form::Codes { halves: form.0 < 16, brief: form.2, group: form.1 as usize });
            all.push((weight, floats));
        }
        for kind in [Kind::BFloat16, Kind::Half] {
            let floats = random(&[outputs, inputs]).to_kind(kind);
            all.push((Compact::of_halves(&floats).unwrap().unwrap(), floats.to_kind(Kind::Float)));
        }
        all
    }

    /// Strips of six, four, three and a rest; short inputs and several blocks of them; rows that meet weights in registers and others.
    #[test]
    fn products_are_those_of_floats_to_the_bit() {
        for (outputs, inputs) in [(10, 32), (131, 576), (944, 256), (35, 1536), (96, 352), (64, 608)] {
            for threads in [1, 2] {
                crate::tensor::set_threads(threads);
                for (compact, floats) in all(outputs, inputs) {
                    let packed = Packed::of(&floats).unwrap().unwrap();
                    for rows in (0..14).chain([33, 300]) {
                        let x = random(&[rows, inputs]);
                        let (ours, right) = (compact.product(&x).unwrap().unwrap(), packed.product(&x).unwrap().unwrap());
                        assert!(ours.equal(&right), "{:?}: {rows} x {inputs} x {outputs}", compact.form);
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        for (inputs, outputs) in [(224, 301), (1536, 48), (608, 130)] {
            for (mut weight, _) in all(outputs, inputs) {
                let x = random(&[300, inputs]);
                weight.read_from_memory();
                alike(
                    &|first, rows| weight.product(&x.narrow(0, first, rows)).unwrap().unwrap(),
                    &format!("{:?}", weight.form),
                );
            }
        }
    }

    /// The kinds of vectors that this CPU has, in their own registers.
    #[test]
    fn every_kind_of_vector_gives_the_same() {
        for (compact, _) in all(77, 320) {
            for rows in [2, 7] {
                let x = random(&[rows, 320]);
                let right = compact.product(&x).unwrap().unwrap();
                let check = |share: unsafe fn(&Product, usize, usize)| {
                    let out = right.zeros_like();
                    unsafe { share(&compact.kernel(x.data_ptr().cast(), out.data_ptr().cast(), rows as usize), 0, 1) };
                    assert!(out.equal(&right), "{:?}", compact.form);
                };
                check(Product::share::<[f32; LANES]>);
                #[cfg(target_arch = "x86_64")]
                if in_use() {
                    check(Product::share::<[std::arch::x86_64::__m256; 2]>);
                }
            }
        }
    }

    #[test]
    fn what_is_no_plain_case_is_left_alone() {
        let ([codes, scales, minima], _) = weight(8, 64, FORMS[0]);
        let of = |codes: &Tensor, scales: &Tensor, minima: &Tensor| Compact::of(codes, scales, minima).unwrap();
        assert!(of(&codes.to_kind(Kind::Int8), &scales, &minima).is_none(), "another type");
        assert!(of(&codes, &scales.to_kind(Kind::Half), &minima).is_none(), "another type of scales");
        assert!(of(&codes, &scales.narrow(1, 0, 1), &minima.narrow(1, 0, 1)).is_none(), "groups of another size");
        assert!(of(&codes, &scales, &minima.narrow(0, 0, 1)).is_none(), "minima that are missing");
        let halves = |inputs: i64, kind: Kind| Compact::of_halves(&random(&[8, inputs]).to_kind(kind)).unwrap();
        assert!(halves(64, Kind::Float).is_none() && halves(40, Kind::Half).is_none(), "another type, and no whole groups");
        let weight = of(&codes, &scales, &minima).unwrap();
        assert!(weight.product(&random(&[1, 32])).unwrap().is_none(), "sizes that do not fit");
        assert!(weight.product(&random(&[1, 64]).to_kind(Kind::BFloat16)).unwrap().is_none(), "another type");
        assert!(weight.product(&random(&[1, 64]).set_requires_grad(true)).unwrap().is_none(), "gradients");
    }
}
