//! Attention of few rows where the heads of keys are no even shares for the threads: three heads for two threads, two for sixteen.
//!
//! First the threads share each head's keys among them: whoever scores a sequence's last keys stores its new ones. When all scores are
//! there, they share the lanes of its values. A score and a lane's sum are computed as by one thread alone, to the same numbers.

use std::rc::Rc;

use super::Kernel;
use super::attend::{Room, shared, width};
use super::attention::{Row, Step};
use super::lanes::{LANES, Lanes, Stored};
use super::turns::Turns;

/// Scores of all tiles, and where they lie: `[tiles][kv_heads, rows, heads, width]`.
#[derive(Clone)]
struct Split {
    step: Rc<Step>,
    scores: *mut f32,
    /// Of each tile's scores.
    starts: Rc<[usize]>,
}

/// Adds both kernels to the list. Each tile must be all that its sequence has.
pub fn push(step: Rc<Step>, turns: &mut Turns) {
    let mut starts = vec![];
    let mut count = 0;
    for tile in &step.tiles {
        starts.push(count);
        count += step.kv_heads * step.of_head(&step.rows[tile.clone()]);
    }
    turns.reuse();
    let split = Split { step, scores: turns.room(count), starts: starts.into() };
    turns.push(Scoring(split.clone()), true);
    turns.push(Mixing(split), true);
}

impl Step {
    /// Scores of a tile with one head of keys.
    fn of_head(&self, rows: &[Row]) -> usize {
        rows.len() * self.group() * width(rows)
    }
}

/// The part of the keys.
struct Scoring(Split);

impl Kernel for Scoring {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe {
            if self.0.step.half { self.0.score::<V, u16>(thread, threads) } else { self.0.score::<V, f32>(thread, threads) }
        }
    }
}

/// The part of the values.
struct Mixing(Split);

impl Kernel for Mixing {
    #[inline(always)]
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
        unsafe { if self.0.step.half { self.0.mix::<V, u16>(thread, threads) } else { self.0.mix::<V, f32>(thread, threads) } }
    }
}

impl Split {
    #[inline(always)]
    unsafe fn score<V: Lanes, T: Stored>(&self, thread: usize, threads: usize) {
        let (step, mut room) = (&self.step, Room::default());
        for (at, tile) in step.tiles.iter().enumerate() {
            // Who has a sequence's last keys has another's first ones.
            let (rows, part) = (&step.rows[tile.clone()], (thread + at) % threads);
            let old = rows[0].slot.min(shared(rows)) / LANES;
            let bound = |part: usize| if part == threads { shared(rows) } else { old * part / threads * LANES };
            for head in 0..step.kv_heads {
                unsafe {
                    let scores = self.scores.add(self.starts[at] + head * step.of_head(rows));
                    step.queries::<V, T>(rows, head * step.group(), step.group(), &mut room);
                    let place = step.place::<T>(rows, head * step.group(), step.group());
                    let last = part + 1 == threads;
                    if last {
                        step.store::<V>(rows, head);
                    }
                    place.score::<V>(rows, room.given(), scores, bound(part)..bound(part + 1));
                    if last {
                        place.score_lines::<V>(rows, room.given(), scores);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn mix<V: Lanes, T: Stored>(&self, thread: usize, threads: usize) {
        let (step, mut room) = (&self.step, Room::default());
        let vectors = step.dim.div_ceil(LANES);
        let all = step.tiles.len() * step.kv_heads * vectors;
        let (mut next, end) = (all * thread / threads, all * (thread + 1) / threads);
        while next < end {
            let (task, first) = (next / vectors, next % vectors);
            let last = vectors.min(first + end - next);
            let (at, head) = (task / step.kv_heads, task % step.kv_heads);
            let rows = &step.rows[step.tiles[at].clone()];
            unsafe {
                let count = step.of_head(rows);
                let scores = std::slice::from_raw_parts(self.scores.add(self.starts[at] + head * count), count);
                step.place::<T>(rows, head * step.group(), step.group()).mix::<V>(rows, room.with(scores), first..last);
            }
            next += last - first;
        }
    }
}
