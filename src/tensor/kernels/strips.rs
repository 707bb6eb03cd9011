//! How the panels of a packed weight (sixteen outputs each) lie in memory: a few of them interleaved, line by line, as a strip.
//!
//! A product with few rows is as fast as weights come from memory, and they come fastest in one stream: two threads read 77 GB/s so, and
//! 45 where each went through eight panels side by side (docs/LOG.md). What a line holds is the weight's own business.

use std::sync::LazyLock;

use tch::TchError;

use super::Tensor;
use crate::tensor::shared_cache;

/// Panels of a strip at most: with one row, so many sums hide how long an addition takes.
const WIDE_MAX: usize = 6;
/// And at least, unless there are fewer.
const WIDE_MIN: usize = 3;

/// A matrix's panels, in strips of `wide` and a narrower last one.
#[derive(Clone, Copy, Debug)]
pub struct Strips {
    panels: usize,
    wide: usize,
    ahead: Ahead,
}

/// Which of a product's lines are asked for ahead of their use, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ahead {
    /// None: they are at hand, or an AMD core has them from a cache as fast as it computes.
    Nothing,
    /// All; what is used once, past the caches, so that it displaces nothing. AMD's cores are fastest so.
    PastCaches,
    /// All, through the caches. Intel's cores do without the second-level cache otherwise, which has more lines under way than the nearest one:
    /// 11 GB/s in place of 17. Nor do they have lines from the cache that cores share by themselves in time: a product of 16 rows takes a third
    /// longer (docs/LOG.md).
    ThroughCaches,
}

impl Ahead {
    /// Whether so many rows ask for [`Coming`] weights: where these come from memory, and one row does not fill the time; or from the cache that cores
    /// share, which few rows find as fast as they compute. (With Intel's cores nobody has measured it.)
    fn early(self, rows: usize) -> bool {
        match self {
            Self::Nothing => rows >= MANY,
            Self::PastCaches => rows > 1,
            Self::ThroughCaches => false,
        }
    }
}

/// Panels side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strip {
    pub first: usize,
    pub wide: usize,
    ahead: Ahead,
}

/// Weights that are used next, and asked for evenly while those before them are used.
///
/// A product with several rows goes through the same weights again and again: for further rows, and panel by panel. If it only asked for
/// what is just ahead, memory would be busy the first time and idle the others, and its time would come on top of the arithmetic's
/// (docs/LOG.md).
pub struct Coming {
    next: *const u8,
    end: *const u8,
    /// Lines for each turn of the innermost loop.
    each: usize,
}

impl Coming {
    /// Nothing.
    pub const NONE: Self = Self { next: std::ptr::null(), end: std::ptr::null(), each: 0 };

    /// `bytes` from `next` on, in so many turns of the innermost loop.
    pub fn of(next: *const u8, bytes: usize, turns: usize) -> Self {
        Self { next, end: next.wrapping_add(bytes), each: bytes.div_ceil(LINE).div_ceil(turns.max(1)) }
    }

    /// Asks for one turn's lines, which wait in the second-level cache.
    #[inline(always)]
    pub fn ask(&mut self) {
        for _ in 0..self.each {
            if self.next >= self.end {
                return;
            }
            // SAFETY: a hint, which does nothing where there is no such memory.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T1>(self.next.cast());
            }
            self.next = self.next.wrapping_add(LINE);
        }
    }
}

/// Some panels of a strip, from one of them on.
#[derive(Clone, Copy)]
pub struct Part {
    pub strip: Strip,
    pub from: usize,
}

/// Rows for which a cache's lines are asked for early (measured: docs/LOG.md).
const MANY: usize = 16;

/// How far ahead of what is used weights are asked for, in bytes.
const AHEAD: usize = 2048;
/// Bytes that a cache fetches together.
const LINE: usize = 64;

/// Whether a weight of so many bytes alone is too large for the shared cache to keep, and its lines are best asked for as [`Coming`].
pub fn from_memory(bytes: usize) -> bool {
    static SHARED_CACHE: LazyLock<Option<u64>> = LazyLock::new(shared_cache);
    !*INTEL && SHARED_CACHE.is_some_and(|cache| bytes as u64 > cache / 2)
}

/// Whether the cores are Intel's.
static INTEL: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = std::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
});

impl Strip {
    /// What so many rows ask for while they use its lines: `bytes` from `next` on, in so many turns of the innermost loop.
    pub fn coming<T>(&self, rows: usize, next: *const T, bytes: usize, turns: usize) -> Coming {
        if self.ahead.early(rows) { Coming::of(next.cast(), bytes, turns) } else { Coming::NONE }
    }

    /// Likewise, once its lines are in the caches.
    pub fn at_hand(self) -> Self {
        Self { ahead: Ahead::Nothing, ..self }
    }
}

impl Part {
    /// For further rows, which find its lines in the caches.
    pub fn at_hand(self) -> Self {
        Self { strip: self.strip.at_hand(), ..self }
    }

    /// Asks for what lies [`AHEAD`] of the part's first line, of `P` of `bytes` each, side by side. It helps where weights come from memory, and harms an
    /// AMD core where a cache has them (docs/LOG.md). One row uses a line once: it is not to displace what is kept in the caches. Several rows may go through a
    /// strip part by part, and the first asks for all.
    #[inline(always)]
    pub fn ask_ahead<const P: usize>(&self, line: *const u8, bytes: usize, one_row: bool) {
        if self.strip.ahead == Ahead::Nothing {
            return;
        }
        // SAFETY: a hint, which does nothing where there is no such memory.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::{_MM_HINT_NTA, _MM_HINT_T0, _mm_prefetch};
            let ahead = |at: usize| line.wrapping_add(at + AHEAD).cast::<i8>();
            if one_row && self.strip.ahead == Ahead::ThroughCaches {
                (0..P * bytes).step_by(LINE).for_each(|at| _mm_prefetch::<_MM_HINT_T0>(ahead(at)));
            } else if one_row {
                (0..P * bytes).step_by(LINE).for_each(|at| _mm_prefetch::<_MM_HINT_NTA>(ahead(at)));
            } else if self.from == 0 {
                (0..self.strip.wide * bytes).step_by(LINE).for_each(|at| _mm_prefetch::<_MM_HINT_T0>(ahead(at)));
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (line, bytes, one_row);
    }

    /// The first one's place among all panels.
    pub fn panel(&self) -> usize {
        self.strip.first + self.from
    }
}

impl Strips {
    /// As wide as leaves the threads even shares.
    pub fn of(panels: usize) -> Self {
        let threads = tch::get_num_threads().max(1) as usize;
        let longest = |wide: &usize| panels.div_ceil(*wide).div_ceil(threads) * wide;
        // Of five, three rows of registers would be left over.
        let wide = (WIDE_MIN..=WIDE_MAX).rev().filter(|wide| *wide != 5).min_by_key(longest).unwrap_or(WIDE_MAX);
        Self { panels, wide, ahead: if *INTEL { Ahead::ThroughCaches } else { Ahead::Nothing } }
    }

    /// Has lines asked for ahead of their use: no cache keeps them from one product to the next.
    pub fn read_from_memory(&mut self) {
        self.ahead = if *INTEL { Ahead::ThroughCaches } else { Ahead::PastCaches };
    }

    /// Whether so many rows ask for [`Coming`] weights.
    pub fn asks_early(self, rows: usize) -> bool {
        self.ahead.early(rows)
    }

    /// A thread's part of them.
    pub fn share(self, thread: usize, threads: usize) -> impl Iterator<Item = Strip> {
        let strips = self.panels.div_ceil(self.wide);
        (strips * thread / threads..strips * (thread + 1) / threads).map(move |strip| {
            let first = strip * self.wide;
            Strip { first, wide: self.wide.min(self.panels - first), ahead: self.ahead }
        })
    }

    /// `panels: [panels, lines, ...]`, with each strip's lines interleaved; a strip begins where its first panel would.
    pub fn interleave(self, panels: &Tensor) -> Result<Tensor, TchError> {
        let (size, wide) = (panels.size(), self.wide as i64);
        let &[count, lines, ref line @ ..] = size.as_slice() else { return panels.f_contiguous() };
        let line: i64 = line.iter().product();
        let turn = |from: i64, strips: i64, wide: i64| {
            panels.f_narrow(0, from, strips * wide)?.f_reshape([strips, wide, lines, line])?.f_transpose(1, 2)?.f_reshape([-1])
        };
        let whole = count / wide;
        match count % wide {
            0 => turn(0, whole, wide),
            rest if whole == 0 => turn(0, 1, rest),
            rest => Tensor::f_cat(&[turn(0, whole, wide)?, turn(whole * wide, 1, rest)?], 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_leave_even_shares_and_none_out() {
        crate::tensor::set_threads(2);
        for (panels, wide) in [(36, 6), (60, 6), (192, 6), (16, 4), (3072, 6), (1, 3)] {
            let strips = Strips::of(panels);
            assert_eq!(strips.wide, wide, "{panels}");
            for threads in 1..=5 {
                let all: Vec<Strip> = (0..threads).flat_map(|thread| strips.share(thread, threads)).collect();
                let mut next = 0;
                for strip in all {
                    assert!(strip.first == next && strip.wide > 0 && strip.wide <= wide);
                    next += strip.wide;
                }
                assert_eq!(next, panels);
            }
        }
    }

    #[test]
    fn lines_lie_side_by_side() {
        let strips = Strips { wide: 3, ..Strips::of(5) };
        let panels = Tensor::arange(5 * 2 * 4, (tch::Kind::Int64, tch::Device::Cpu)).view([5, 2, 4]);
        let lines: Vec<i64> = Vec::try_from(&strips.interleave(&panels).unwrap()).unwrap();
        let first: Vec<i64> = lines.chunks(4).map(|line| line[0] / 4).collect();
        // By number of the line: panel 0's are 0 and 1, panel 1's 2 and 3.
        assert_eq!(first, [0, 2, 4, 1, 3, 5, 6, 8, 7, 9]);
    }
}
