//! Block diffusion: a [`Decoder`] for block-causal models (SDAR, Fast-dLLM v2), over a cache of the blocks that are done.
//!
//! Blocks are cut from the start of the sequence, prompt included: what the prompt leaves over, and fixed text, stand in the block
//! that they fall into and are not masked. A block is run until it is full; then its keys are stored, from its final tokens. Where
//! logits are not shifted, that is done in the forward of the next block's first step. Where they are, the next block's first token
//! comes from the row before it, so that storing is a forward of its own and commits that token. The last block is not stored.
//!
//! With [`SubBlocks`], a block's cells are filled in groups from left to right, and steps may run such a group alone, over the keys
//! that the block's last full step left. The end of the canvas may cut the last block short: the rest of it stays masked.

use std::ops::Range;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::canvas::{Canvas, Cell};
use super::super::{Decoder, Edit, FinishReason, Noise, Pattern, Purpose, RowStatistics, Status, Step, Wanted, Window, mix};
use super::pace::Pace;
use super::{Parameters, fill, finished};

/// Tokens of complete blocks that are run at a time.
const CHUNK: usize = 512;

/// Groups of cells that are filled before those behind them (Fast-dLLM v2's small blocks).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubBlocks {
    /// Divides the block's length.
    pub length: usize,
    /// Run a sub-block alone once its first token is known, in the place of its keys of before; else every step runs the block.
    pub cached: bool,
}

/// A canvas being filled block by block.
pub struct BlockDiffusion {
    parameters: Parameters,
    canvas: Canvas,
    /// Row `i` of the logits predicts token `i + 1`.
    shift: bool,
    pace: Pace,
    rng: ChaCha8Rng,
    /// Positions whose keys the cache keeps: whole blocks.
    stored: usize,
    /// Block behind them whose keys the cache has from an earlier step.
    warm: Option<usize>,
    /// What [`Decoder::kept`] answers.
    kept: Vec<usize>,
    /// Where the group of cells being filled starts.
    unit: usize,
    /// Forwards so far that changed a cell.
    step: usize,
}

/// What the next forward does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Runs complete blocks up to `end` for their keys, and for the token behind them if it is open to question.
    Store { end: usize, ask: bool },
    /// Runs the block that is being filled, and those before it that are not stored yet.
    Block,
    /// Runs one sub-block amid the keys of an earlier step.
    Refine,
}

impl BlockDiffusion {
    pub fn new(parameters: Parameters, canvas: Canvas, shift: bool) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(parameters.seed);
        let length = parameters.sub_blocks.map_or(parameters.block_length, |sub| sub.length);
        let pace = Pace::new(parameters.commit, canvas.units_to_fill(length));
        let mut decoder = Self { parameters, canvas, shift, pace, rng, stored: 0, warm: None, kept: vec![], unit: 0, step: 0 };
        decoder.begin_unit();
        decoder
    }

    /// Position of the first masked cell.
    fn first(&self) -> usize {
        self.canvas.prompt_len() + self.canvas.frontier()
    }

    fn block(&self) -> usize {
        self.parameters.block_length
    }

    /// Start of the block being filled.
    fn start(&self) -> usize {
        self.first() / self.block() * self.block()
    }

    fn unit_length(&self) -> usize {
        self.parameters.sub_blocks.map_or(self.block(), |sub| sub.length)
    }

    /// Masked cells of the group being filled.
    fn open_cells(&self) -> Vec<usize> {
        let (prompt, length) = (self.canvas.prompt_len(), self.canvas.len());
        let cell = |position: usize| position.saturating_sub(prompt).min(length);
        self.canvas.masked(cell(self.unit)..cell(self.unit + self.unit_length())).collect()
    }

    /// Turns to the group of the first masked cell. A step whose schedule commits nothing is not run.
    fn begin_unit(&mut self) {
        if self.finished().is_some() {
            return;
        }
        let length = self.unit_length();
        if self.first() / length * length != self.unit || self.step == 0 {
            self.unit = self.first() / length * length;
            // The originals cut their steps for a whole block, however much of it the prompt has taken.
            self.pace.begin(length);
        }
        while self.pace.scheduled(self.open_cells().len()) == Some(0) {
            self.pace.advance();
        }
    }

    fn turn(&self) -> Turn {
        let (block, start) = (self.block(), self.start());
        let pending = start - self.stored;
        let ask = self.shift && start > 0 && self.first() == start;
        if self.parameters.anew {
            return if ask { Turn::Store { end: start, ask } } else { Turn::Block };
        }
        if pending > 0 && (ask || pending > block) {
            let end = start.min(self.stored + (CHUNK / block).max(1) * block);
            return Turn::Store { end, ask: ask && end == start };
        }
        let cached = self.parameters.sub_blocks.is_some_and(|sub| sub.cached);
        if cached && self.warm == Some(start) && self.first() > self.unit { Turn::Refine } else { Turn::Block }
    }

    /// Tokens at these positions; behind the end of the canvas they are masked.
    fn tokens(&self, range: Range<usize>) -> Vec<u32> {
        let sequence = self.canvas.sequence();
        range.map(|position| sequence.get(position).copied().unwrap_or(self.canvas.mask())).collect()
    }

    /// Positions that the turn runs.
    fn range(&self, turn: Turn) -> Range<usize> {
        match turn {
            Turn::Store { end, .. } => self.stored..end,
            Turn::Block => self.stored..self.start() + self.block(),
            Turn::Refine => self.unit..self.unit + self.unit_length(),
        }
    }

    /// Cells that the turn asks about.
    fn asked(&self, turn: Turn) -> Vec<usize> {
        match turn {
            Turn::Store { ask, .. } => if ask { Some(self.canvas.frontier()) } else { None }.into_iter().collect(),
            Turn::Block | Turn::Refine => self.open_cells(),
        }
    }

    fn purpose(&self, turn: Turn) -> Purpose {
        let Turn::Store { end, .. } = turn else { return Purpose::Denoise };
        let prompt = self.canvas.prompt_len();
        let cells = &self.canvas.cells()[self.stored.max(prompt) - prompt..end.max(prompt) - prompt];
        if cells.contains(&Cell::Committed) { Purpose::Denoise } else { Purpose::Prefill }
    }

    /// Commits the token that a storing forward was asked for.
    fn take(&mut self, asked: &[usize], rows: &[RowStatistics]) -> Vec<Edit> {
        let taken = asked.iter().zip(rows).map(|(cell, row)| {
            self.canvas.commit(*cell, row.token);
            Edit {
                position: *cell,
                token: row.token,
                status: Status::Committed,
                confidence: row.confidence,
                alternatives: row.alternatives.clone(),
            }
        });
        taken.collect()
    }
}

impl Decoder for BlockDiffusion {
    fn window(&self) -> Window {
        let (turn, block, prompt) = (self.turn(), self.block(), self.canvas.prompt_len());
        let range = self.range(turn);
        Window {
            tokens: self.tokens(range.clone()),
            pattern: Pattern::Span { start: range.start, sees: range.map(|position| (position / block + 1) * block).collect() },
            purpose: self.purpose(turn),
            wanted: Wanted::Positions(self.asked(turn).iter().map(|cell| (prompt + cell) as u32).collect()),
            guidance: None,
            sampling: self.parameters.sampling.clone(),
            noise: Noise::Seed(mix(self.parameters.seed ^ mix(self.step as u64))),
            alone: self.parameters.deterministic,
            histories: vec![],
        }
    }

    fn advance(&mut self, rows: &[RowStatistics]) -> Step {
        let (turn, start) = (self.turn(), self.start());
        let asked = self.asked(turn);
        let block = start / self.block() - self.canvas.prompt_len() / self.block();
        let stored = match turn {
            Turn::Store { end, .. } => end,
            Turn::Block => start,
            Turn::Refine => self.stored,
        };
        if !self.parameters.anew {
            self.kept = (0..stored - self.stored).collect();
            self.stored = stored;
        }
        let edits = if let Turn::Store { .. } = turn {
            self.take(&asked, rows)
        } else {
            self.warm = Some(start);
            let uniforms: Vec<f64> = (0..self.canvas.len()).map(|_| self.rng.random::<f64>()).collect();
            let rule = self.pace.rule(asked.len());
            self.pace.advance();
            fill(&mut self.canvas, &self.parameters, &asked, rows, rule, &uniforms)
        };
        let step = Step { step: self.step, block, edits };
        self.step += usize::from(!asked.is_empty());
        self.begin_unit();
        step
    }

    fn finished(&self) -> Option<FinishReason> {
        finished(&self.canvas, &self.parameters.end_of_text)
    }

    fn canvas(&self) -> &Canvas {
        &self.canvas
    }

    fn cache_room(&self) -> usize {
        self.canvas.sequence().len().next_multiple_of(self.block())
    }

    fn resumable(&self) -> bool {
        !self.parameters.anew
    }

    fn resume(&mut self, cached: usize) {
        debug_assert!(
            self.step == 0 && cached.is_multiple_of(self.block()) && cached <= self.start(),
            "whole blocks before the first step"
        );
        self.stored = cached;
    }

    fn kept(&self) -> &[usize] {
        &self.kept
    }
}
