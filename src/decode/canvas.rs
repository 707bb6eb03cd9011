//! The canvas: prompt, fixed text and cells to fill, with the state of every cell kept beside its token.
//!
//! A cell is masked because its state says so and never because it holds the mask token: a prompt may hold that token's text.

use super::Status;

/// A stretch of the canvas, as a request lays it out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Given text, never altered.
    Fixed(Vec<u32>),
    /// So many cells to fill.
    Hole(usize),
}

/// State of one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    Fixed,
    Masked,
    Committed,
}

/// A prompt and the cells behind it.
#[derive(Clone, Debug)]
pub struct Canvas {
    /// Prompt and canvas; masked cells hold the mask token.
    tokens: Vec<u32>,
    cells: Vec<Cell>,
    prompt: usize,
    mask: u32,
}

impl Canvas {
    /// Lays out `pieces` behind `prompt`.
    pub fn new(prompt: &[u32], pieces: &[Piece], mask: u32) -> Self {
        let mut canvas = Self { tokens: prompt.to_vec(), cells: vec![], prompt: prompt.len(), mask };
        for piece in pieces {
            match piece {
                Piece::Fixed(tokens) => {
                    canvas.tokens.extend(tokens);
                    canvas.cells.extend(tokens.iter().map(|_| Cell::Fixed));
                }
                Piece::Hole(length) => {
                    canvas.tokens.extend(std::iter::repeat_n(mask, *length));
                    canvas.cells.extend(std::iter::repeat_n(Cell::Masked, *length));
                }
            }
        }
        canvas
    }

    /// Cells of the canvas; the prompt does not count.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// Cells that are masked.
    pub fn holes(&self) -> usize {
        self.cells.iter().filter(|cell| **cell == Cell::Masked).count()
    }

    pub fn prompt_len(&self) -> usize {
        self.prompt
    }

    /// What masked cells hold.
    pub fn mask(&self) -> u32 {
        self.mask
    }

    /// Prompt and canvas, `[prompt + canvas]`.
    pub fn sequence(&self) -> &[u32] {
        &self.tokens
    }

    /// The canvas alone. Masked cells hold the mask token; ask [`Canvas::cells`] which they are.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Masked cells among `range`, ascending.
    pub fn masked(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = usize> + '_ {
        range.filter(|cell| self.cells[*cell] == Cell::Masked)
    }

    /// Blocks of `block_length` cells that hold a masked one.
    pub fn blocks_to_fill(&self, block_length: usize) -> usize {
        self.cells.chunks(block_length.max(1)).filter(|block| block.contains(&Cell::Masked)).count()
    }

    /// Likewise of units of the whole sequence, prompt included.
    pub fn units_to_fill(&self, length: usize) -> usize {
        let unit = |cell: usize| (self.prompt + cell) / length.max(1);
        let mut units: Vec<usize> = self.masked(0..self.len()).map(unit).collect();
        units.dedup();
        units.len()
    }

    /// Cells from the left without a masked one: what can be given out as text.
    pub fn frontier(&self) -> usize {
        self.cells.iter().position(|cell| *cell == Cell::Masked).unwrap_or(self.cells.len())
    }

    /// Fills a masked cell.
    pub fn commit(&mut self, cell: usize, token: u32) {
        debug_assert_eq!(self.cells[cell], Cell::Masked, "only a masked cell can be committed");
        self.tokens[self.prompt + cell] = token;
        self.cells[cell] = Cell::Committed;
    }

    /// The sequence with its prompt masked, for classifier-free guidance.
    pub fn unconditional(&self) -> Vec<u32> {
        let mut tokens = self.tokens.clone();
        tokens[..self.prompt].fill(self.mask);
        tokens
    }

    /// First committed cell that holds one of `ends`. Fixed text may hold such a token without ending anything.
    pub fn first_end(&self, ends: &[u32]) -> Option<usize> {
        (0..self.len()).find(|cell| self.cells[*cell] == Cell::Committed && ends.contains(&self.tokens()[*cell]))
    }

    /// Applies what a client is told of a step. Replaying every step's edits rebuilds the canvas.
    pub fn replay(&mut self, edit: &super::Edit) {
        let at = self.prompt + edit.position;
        match edit.status {
            Status::Provisional => {}
            Status::Committed | Status::Edited => {
                self.tokens[at] = edit.token;
                self.cells[edit.position] = Cell::Committed;
            }
            Status::Remasked => {
                self.tokens[at] = self.mask;
                self.cells[edit.position] = Cell::Masked;
            }
        }
    }
}
