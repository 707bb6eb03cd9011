//! Searches in rows of logits, as few passes over each as there can be: the best number, sums of exponentials, and where a share of
//! them ends. What is searched for, and why, is the caller's: [`crate::model::statistics`].

use std::cell::{Cell, RefCell};
use std::ops::Range;

use tch::TchError;

use super::lanes::{LANES, Lanes, Stored, exp, fold};
use super::{Kernel, launch, plain, side_by_side};
use crate::tensor::{Kind, Tensor};

/// Fewer numbers are not worth other threads.
const PARALLEL_FROM: usize = 1 << 13;
/// Numbers whose exponentials are summed in f32; sums of these are summed in f64.
const BLOCK: usize = 64 * LANES;
/// Numbers of which the largest is looked up first.
const GROUP: usize = 8 * LANES;
/// Intervals that numbers are sorted into by how far they lie below the best one, and how many of them make one unit: e^-104 is
/// the last exponential that f32 knows. The last interval holds whatever lies lower.
const INTERVALS: usize = 104 * 32;
const PER_UNIT: f32 = 32.0;

/// What `work` makes of each row of `logits: [rows, vocab]`, given the row's index and its numbers in f32, which it may change; or
/// `None` where libtorch should do it. All numbers of a row that has one that is NaN or +∞ are NaN.
pub fn each<T: Send>(logits: &Tensor, work: impl Fn(usize, &mut [f32]) -> T) -> Result<Option<Vec<T>>, TchError> {
    let (rows, vocab) = logits.size2()?;
    let (rows, vocab) = (rows as usize, vocab as usize);
    if vocab == 0 || !plain(logits) {
        return Ok(None);
    }
    let stored = Stores { logits: logits.data_ptr().cast_const().cast(), half: logits.kind() == Kind::BFloat16 };
    let several = |range: Range<usize>| -> Vec<T> {
        let mut numbers = NUMBERS.take();
        numbers.resize(vocab, 0.0);
        let one = |row| {
            // SAFETY: contiguous logits of this size and type, which outlive the call.
            unsafe { stored.read(row, &mut numbers) };
            work(row, &mut numbers)
        };
        let found = range.map(one).collect();
        NUMBERS.set(numbers);
        found
    };
    let threads = tch::get_num_threads().max(1) as usize;
    if rows < 2 || threads < 2 || rows * vocab < PARALLEL_FROM {
        return Ok(Some(several(0..rows)));
    }
    let parts = threads.min(rows);
    // SAFETY: the parts read the same logits, which nobody writes to.
    let found = unsafe { side_by_side(parts, |part| several(rows * part / parts..rows * (part + 1) / parts)) };
    Ok(Some(found.into_iter().flatten().collect()))
}

thread_local! {
    /// Room for a row, which would take as long to make as to read.
    static NUMBERS: RefCell<Vec<f32>> = const { RefCell::new(vec![]) };
}

struct Stores {
    logits: *const u8,
    half: bool,
}

impl Stores {
    unsafe fn read(&self, row: usize, numbers: &mut [f32]) {
        let start = row * numbers.len() * if self.half { 2 } else { 4 };
        let read = Read { stored: unsafe { self.logits.add(start) }, half: self.half, numbers: RefCell::new(numbers) };
        unsafe { launch(&read, false) };
    }
}

struct Read<'a> {
    stored: *const u8,
    half: bool,
    numbers: RefCell<&'a mut [f32]>,
}

impl Kernel for Read<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, _: usize, _: usize) {
        unsafe { if self.half { self.run::<u16>() } else { self.run::<f32>() } }
    }
}

impl Read<'_> {
    #[inline(always)]
    unsafe fn run<T: Stored>(&self) {
        let numbers = &mut **self.numbers.borrow_mut();
        let stored = unsafe { std::slice::from_raw_parts(self.stored.cast::<T>(), numbers.len()) };
        let mut broken = 0u32;
        for (number, stored) in numbers.iter_mut().zip(stored) {
            *number = stored.widen();
            broken |= u32::from(number.is_nan() | (*number == f32::INFINITY));
        }
        if broken > 0 {
            numbers.fill(f32::NAN);
        }
    }
}

/// The first of the largest numbers and its place; `None` if there is none above −∞.
pub fn peak(numbers: &[f32]) -> Option<(usize, f32)> {
    let peak = Peak { numbers, best: Cell::new(f32::NEG_INFINITY) };
    // SAFETY: the kernel reads the slice alone.
    unsafe { launch(&peak, false) };
    let best = peak.best.get();
    numbers.iter().position(|number| *number == best).filter(|_| best.is_finite()).map(|place| (place, best))
}

struct Peak<'a> {
    numbers: &'a [f32],
    best: Cell<f32>,
}

impl Kernel for Peak<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, _: usize, _: usize) {
        self.best.set(most(self.numbers));
    }
}

#[inline(always)]
fn most(numbers: &[f32]) -> f32 {
    let (lines, rest) = numbers.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for line in lines {
        for (best, number) in lanes.iter_mut().zip(line) {
            *best = if *number > *best { *number } else { *best };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// How numbers become weights: e^((number − best) · scale), and nothing for those below `least`.
#[derive(Clone, Copy, Debug)]
pub struct Slope {
    pub best: f32,
    /// One over the temperature.
    pub scale: f32,
    pub least: f32,
}

impl Slope {
    /// Without limits, but for what is −∞.
    pub fn new(best: f32, temperature: f64) -> Self {
        Self { best, scale: (1.0 / temperature) as f32, least: f32::MIN }
    }

    /// The logarithm of a number's weight; −∞ for one that weighs nothing.
    pub fn logarithm(&self, number: f32) -> f64 {
        if number >= self.least { f64::from((number - self.best) * self.scale) } else { f64::NEG_INFINITY }
    }

    #[inline(always)]
    fn weight(&self, number: f32) -> f32 {
        if number >= self.least { exp((number - self.best) * self.scale) } else { 0.0 }
    }

    #[inline(always)]
    fn interval(&self, number: f32) -> u32 {
        let below = ((self.best - number) * self.scale * PER_UNIT).max(0.0).min((INTERVALS - 1) as f32);
        // In a number of this size the last bit counts ones; a conversion by `as` would be checked number by number.
        const WHOLE: f32 = 8_388_608.0;
        (below + WHOLE).to_bits() & 0x007f_ffff
    }
}

/// Σ w of each `BLOCK` in order, and Σ w · ln w of all.
pub struct Sums {
    pub blocks: Vec<f64>,
    pub total: f64,
    pub weighted: f64,
}

/// Weights of all numbers.
pub fn weigh(numbers: &[f32], slope: Slope) -> Sums {
    let empty = Sums { blocks: Vec::with_capacity(numbers.len().div_ceil(BLOCK)), total: 0.0, weighted: 0.0 };
    let weigh = Weigh { numbers, slope, sums: RefCell::new(empty) };
    // SAFETY: the kernel reads the slice alone.
    unsafe { launch(&weigh, false) };
    weigh.sums.into_inner()
}

struct Weigh<'a> {
    numbers: &'a [f32],
    slope: Slope,
    sums: RefCell<Sums>,
}

impl Kernel for Weigh<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, _: usize, _: usize) {
        let sums = &mut *self.sums.borrow_mut();
        let slope = self.slope;
        for block in self.numbers.chunks(BLOCK) {
            let (lines, rest) = block.as_chunks::<LANES>();
            let (mut weights, mut weighted) = ([0f32; LANES], [0f32; LANES]);
            let mut add = |at: usize, number: f32| {
                let weight = slope.weight(number);
                weights[at] += weight;
                // What is −∞ has no weight, and must not become 0 · ∞.
                weighted[at] = weight.mul_add(((number - slope.best) * slope.scale).max(-1e4), weighted[at]);
            };
            for line in lines {
                for (at, number) in line.iter().enumerate() {
                    add(at, *number);
                }
            }
            for (at, number) in rest.iter().enumerate() {
                add(at, *number);
            }
            let sum = f64::from(fold(weights));
            sums.blocks.push(sum);
            sums.total += sum;
            sums.weighted += f64::from(fold(weighted));
        }
    }
}

/// Where `uniform`, from 0 to 1, falls in the cumulated weights of all numbers. What weighs nothing is not picked.
pub fn pick(numbers: &[f32], slope: Slope, uniform: f64) -> usize {
    let sums = weigh(numbers, slope);
    // Below the total, so that rounding cannot reach past the last number that weighs anything.
    let place = (uniform * sums.total).min(sums.total * (1.0 - 1e-12));
    let mut before = 0.0;
    let mut last = 0;
    for (block, sum) in sums.blocks.iter().enumerate() {
        if *sum > 0.0 {
            last = block;
            if before + sum > place {
                break;
            }
            before += sum;
        }
    }
    let start = last * BLOCK;
    let mut chosen = start;
    for (at, number) in numbers[start..].iter().take(BLOCK).enumerate() {
        let weight = f64::from(slope.weight(*number));
        if weight > 0.0 {
            chosen = start + at;
            before += weight;
            if before > place {
                break;
            }
        }
    }
    chosen
}

/// A limit among numbers: those above it are in, those below out, and of those that equal it `out` are out.
#[derive(Debug, PartialEq)]
pub struct Limit {
    pub least: f32,
    pub out: Vec<usize>,
}

/// The fewest of the heaviest numbers that together weigh more than `share` of all.
pub fn heaviest(numbers: &[f32], slope: Slope, share: f64) -> Limit {
    let intervals = histogram(numbers, slope);
    let limit = share * intervals.iter().sum::<f64>();
    let mut before = 0.0;
    let crossing = intervals.iter().position(|weight| {
        let passes = before + weight > limit;
        before += if passes { 0.0 } else { *weight };
        passes
    });
    let Some(crossing) = crossing else { return Limit { least: f32::MIN, out: vec![] } };
    let mut members = members(numbers, slope, crossing);
    members.sort_unstable_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
    let inside = members.iter().position(|(_, number)| {
        let out = before > limit;
        before += f64::from(slope.weight(*number));
        out
    });
    let inside = inside.unwrap_or(members.len());
    let least = members[..inside].last().map_or(slope.best, |(_, number)| *number);
    let out = members[inside..].iter().take_while(|(_, number)| *number == least).map(|(place, _)| *place).collect();
    Limit { least, out }
}

/// The `count`-th largest of the numbers, or the least of all where there are fewer.
pub fn largest(numbers: &[f32], count: usize) -> f32 {
    let count = count.clamp(1, numbers.len());
    let nth = |mut numbers: Vec<f32>| *numbers.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1;
    let maxima = maxima(numbers);
    if maxima.len() < count {
        return nth(numbers.to_vec());
    }
    // So many groups have a number as large as this: the one looked for is not less.
    let bound = nth(maxima.clone());
    let groups = numbers.chunks(GROUP).zip(&maxima).filter(|(_, most)| **most >= bound);
    nth(groups.flat_map(|(group, _)| group.iter().copied().filter(|number| *number >= bound)).collect())
}

/// The largest number of each [`GROUP`].
fn maxima(numbers: &[f32]) -> Vec<f32> {
    let maxima = Maxima { numbers, found: RefCell::new(Vec::with_capacity(numbers.len().div_ceil(GROUP))) };
    // SAFETY: the kernel reads the slice alone.
    unsafe { launch(&maxima, false) };
    maxima.found.into_inner()
}

struct Maxima<'a> {
    numbers: &'a [f32],
    found: RefCell<Vec<f32>>,
}

impl Kernel for Maxima<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, _: usize, _: usize) {
        self.found.borrow_mut().extend(self.numbers.chunks(GROUP).map(most));
    }
}

/// What the numbers of each interval weigh.
fn histogram(numbers: &[f32], slope: Slope) -> Vec<f64> {
    let histogram = Histogram { numbers, slope, intervals: RefCell::new(vec![0.0; INTERVALS]) };
    // SAFETY: the kernel reads the slice alone.
    unsafe { launch(&histogram, false) };
    histogram.intervals.into_inner()
}

struct Histogram<'a> {
    numbers: &'a [f32],
    slope: Slope,
    intervals: RefCell<Vec<f64>>,
}

impl Kernel for Histogram<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, _: usize, _: usize) {
        let intervals = &mut *self.intervals.borrow_mut();
        let (mut weights, mut places) = ([0f32; LANES], [0u32; LANES]);
        for line in self.numbers.chunks(LANES) {
            for (place, number) in places.iter_mut().zip(line) {
                *place = self.slope.interval(*number);
            }
            for (weight, number) in weights.iter_mut().zip(line) {
                *weight = self.slope.weight(*number);
            }
            for (place, weight) in places.iter().zip(&weights).take(line.len()) {
                intervals[*place as usize] += f64::from(*weight);
            }
        }
    }
}

/// Numbers of one interval and their places.
fn members(numbers: &[f32], slope: Slope, interval: usize) -> Vec<(usize, f32)> {
    let members = Members { numbers, slope, interval: interval as u32, found: RefCell::default() };
    // SAFETY: the kernel reads the slice alone.
    unsafe { launch(&members, false) };
    members.found.into_inner()
}

struct Members<'a> {
    numbers: &'a [f32],
    slope: Slope,
    interval: u32,
    found: RefCell<Vec<(usize, f32)>>,
}

impl Kernel for Members<'_> {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, _: usize, _: usize) {
        let found = &mut *self.found.borrow_mut();
        for (line, numbers) in self.numbers.chunks(LANES).enumerate() {
            let mut any = 0u32;
            for number in numbers {
                any |= u32::from(self.slope.interval(*number) == self.interval);
            }
            if any > 0 {
                let inside = numbers.iter().enumerate().filter(|(_, x)| self.slope.interval(**x) == self.interval);
                found.extend(inside.map(|(at, number)| (line * LANES + at, *number)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_widened_in_order_and_broken_ones_show() {
        let logits = Tensor::from_slice(&[1.0f32, 3.0, 2.0, f32::NAN, 9.0, 2.0, 0.0, f32::INFINITY, 0.0]).view([3, 3]);
        for kind in [Kind::Float, Kind::BFloat16] {
            let found = each(&logits.to_kind(kind), |row, numbers| (row, peak(numbers))).unwrap().unwrap();
            assert_eq!(found, [(0, Some((1, 3.0))), (1, None), (2, None)]);
        }
        assert_eq!(peak(&[f32::NEG_INFINITY; 20]), None);
        // Enough for several threads.
        crate::tensor::set_threads(2);
        let wide = Tensor::arange(40_000, (Kind::Float, tch::Device::Cpu)).view([40, 1000]);
        let found = each(&wide, |row, numbers| (row, numbers[999])).unwrap().unwrap();
        assert!(found.into_iter().enumerate().all(|(row, found)| found == (row, (1000 * row + 999) as f32)));
    }

    /// Of numbers in every order and spread, with ties: against sorting them.
    #[test]
    fn limits_are_those_of_the_sorted_numbers() {
        for spread in [0.001f32, 1.0, 300.0] {
            let numbers: Vec<f32> = (0..3001).map(|at| ((at * 7919) % 1009) as f32 / 1009.0 * spread).collect();
            let slope = Slope::new(peak(&numbers).unwrap().1, 0.7);
            let mut order: Vec<usize> = (0..numbers.len()).collect();
            order.sort_by(|a, b| numbers[*b].total_cmp(&numbers[*a]).then(a.cmp(b)));
            for count in [1, 2, 50, 1000, 3001, 9999] {
                assert_eq!(largest(&numbers, count), numbers[order[count.min(3001) - 1]], "{count} of {spread}");
            }
            let total = weigh(&numbers, slope).total;
            for share in [1e-6, 0.1, 0.5, 0.95, 0.999] {
                let mut before = 0.0;
                let inside = order.iter().take_while(|at| {
                    let inside = before <= share * total;
                    before += slope.logarithm(numbers[**at]).exp();
                    inside
                });
                let inside: Vec<usize> = inside.copied().collect();
                let limit = heaviest(&numbers, slope, share);
                let ours = order.iter().filter(|at| numbers[**at] >= limit.least && !limit.out.contains(at)).count();
                assert!(ours.abs_diff(inside.len()) <= inside.len() / 1000, "{ours}, not {}: {share}, {spread}", inside.len());
            }
        }
    }
}
