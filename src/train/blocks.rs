//! Block diffusion's batches: BD3-LM's vectorised objective (Arriola et al., arXiv 2503.09573) in SDAR's setting.
//!
//! A text is `prompt | answer | end …` up to a whole number of blocks, cut from the start of the sequence, prompt included, as the
//! decoder cuts it. One forward runs two copies of it side by side: a noisy one, whose every block sees itself and the clean blocks
//! before it, as when it is being filled; and a clean one, whose blocks see themselves and those before, as when their keys have been
//! stored. So every block of a text is learnt from at once, each over the very keys that decoding will have.
//!
//! What nobody looks at is left out: noisy blocks that hold nothing but prompt in all texts of a batch, and the last clean block.

use anyhow::Result;
use rand::{Rng, RngExt};

use super::data::{Batch, Batches, Example, fill_counts, masked_share};
use super::vocabulary::{END, MASK};

/// Which positions the noisy and the clean copy of a text hold, the noisy ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    /// Tokens of a block; what follows is in multiples of it.
    pub block: usize,
    /// First position of the noisy copy, which ends with the text.
    pub from: usize,
    /// Positions of the text.
    pub length: usize,
}

impl Copies {
    /// Position of every token.
    pub fn positions(self) -> Vec<usize> {
        (self.from..self.length).chain(0..self.length - self.block).collect()
    }

    /// Who sees whom, `[tokens × tokens]`: true where a row sees a column.
    pub fn sees(self) -> Vec<bool> {
        let noisy = self.length - self.from;
        let places: Vec<_> =
            self.positions().into_iter().enumerate().map(|(at, position)| (at < noisy, position / self.block)).collect();
        let sees = |(noisy, block): (bool, usize), (other_noisy, other): (bool, usize)| match (noisy, other_noisy) {
            (true, true) => other == block,
            (true, false) => other < block,
            (false, true) => false,
            (false, false) => other <= block,
        };
        places.iter().flat_map(|row| places.iter().map(|column| sees(*row, *column))).collect()
    }
}

impl Batches<'_> {
    /// Both copies of every text. Cells of the answer, its end and the fill behind it are masked, all of a block or a share drawn
    /// for it anew; the prompt never is. Blocks behind a text's own last are filling, of which nothing is asked.
    pub(super) fn mask_blocks(&self, rng: &mut impl Rng, examples: &[Example], all: bool) -> Result<Batch> {
        let (end, mask, block) = (self.token(END)?, self.token(MASK)?, self.block_length);
        let needed = examples.iter().map(|e| e.prompt.len() + e.answer.len() + 1).max().unwrap_or(1);
        let shortest = examples.iter().map(|e| e.prompt.len()).min().unwrap_or(0);
        let copies = Copies { block, from: shortest / block * block, length: needed.next_multiple_of(block) };
        let mut batch = Batch { size: examples.len(), tokens: vec![], rows: vec![], targets: vec![], copies: Some(copies) };
        for Example { prompt, answer } in examples {
            let mut clean: Vec<i64> = prompt.iter().chain(answer).map(|id| i64::from(*id)).collect();
            let ends = clean.len();
            clean.resize(copies.length, end);
            let mut share = 1.0;
            for (position, token) in clean.iter().enumerate().skip(copies.from) {
                if position % block == 0 && !all {
                    share = masked_share(rng);
                }
                let asked = (prompt.len()..(ends + 1).next_multiple_of(block)).contains(&position);
                if !asked || !rng.random_bool(share) {
                    batch.tokens.push(*token);
                    continue;
                }
                if position <= ends || (!all && fill_counts(rng)) {
                    batch.rows.push(batch.tokens.len() as i64);
                    batch.targets.push(*token);
                }
                batch.tokens.push(mask);
            }
            batch.tokens.extend(&clean[..copies.length - block]);
        }
        if batch.rows.is_empty() {
            // Possible only for tiny batches; one row keeps the mean defined.
            batch.rows.push((copies.length - copies.from) as i64 - 1);
            batch.targets.push(end);
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tokenizer::Tokenizer;
    use crate::eval::nano::Split;
    use crate::train::data::Objective;

    #[test]
    fn noisy_blocks_see_themselves_and_the_clean_ones_before() {
        let copies = Copies { block: 2, from: 2, length: 6 };
        assert_eq!(copies.positions(), [2, 3, 4, 5, 0, 1, 2, 3]);
        let drawn = [
            "11..11..", "11..11..", // noisy block 1
            "..111111", "..111111", // noisy block 2
            "....11..", "....11..", // clean block 0
            "....1111", "....1111", // clean block 1
        ];
        let sees: String = copies.sees().into_iter().map(|sees| if sees { '1' } else { '.' }).collect();
        assert_eq!(sees, drawn.concat());
    }

    fn batches(tokenizer: &Tokenizer) -> Batches<'_> {
        Batches { tokenizer, seed: 5, size: 16, split: Split::Train, objective: Objective::Block, block_length: 8 }
    }

    /// Walks over the cells of a batch's noisy copies: `(example, cell, position, noisy token, clean token if it has one)`.
    fn cells(batch: &Batch) -> Vec<(usize, usize, i64, Option<i64>)> {
        let copies = batch.copies.unwrap();
        let (noisy, clean) = (copies.length - copies.from, copies.length - copies.block);
        assert_eq!(batch.tokens.len(), batch.size * (noisy + clean));
        let cell = |example: usize, at: usize| {
            let text = &batch.tokens[example * (noisy + clean)..][..noisy + clean];
            (example, copies.from + at, text[at], text[noisy..].get(copies.from + at).copied())
        };
        (0..batch.size).flat_map(|example| (0..noisy).map(move |at| cell(example, at))).collect()
    }

    #[test]
    fn only_the_answer_is_masked_and_its_tokens_are_asked_for() {
        let tokenizer = Tokenizer::open(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/nano"))).unwrap();
        let (end, mask) = (i64::from(tokenizer.token_id(END).unwrap()), i64::from(tokenizer.token_id(MASK).unwrap()));
        let examples: Vec<Example> = [(10, 9), (21, 14), (12, 2)]
            .map(|(prompt, answer)| Example { prompt: vec![300; prompt], answer: (400..400 + answer).collect() })
            .into();
        let mut rng = <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(1);
        let (mut partly, mut wholly) = (false, false);
        for all in [vec![true], vec![false; 50]].concat() {
            let batch = batches(&tokenizer).mask_blocks(&mut rng, &examples, all).unwrap();
            let copies = batch.copies.unwrap();
            assert_eq!(copies, Copies { block: 8, from: 8, length: 40 });
            let mut masked = vec![];
            for (example, position, token, clean) in cells(&batch) {
                let (prompt, ends) =
                    (examples[example].prompt.len(), examples[example].prompt.len() + examples[example].answer.len());
                let right = match position {
                    position if position < prompt => 300,
                    position if position < ends => 400 + (position - prompt) as i64,
                    _ => end,
                };
                assert!(clean.is_none_or(|clean| clean == right));
                if token == mask {
                    assert!((prompt..(ends + 1).next_multiple_of(8)).contains(&position), "{example} {position}");
                    masked.push((example, position, right));
                } else {
                    assert_eq!(token, right);
                    let asked = (prompt..(ends + 1).next_multiple_of(8)).contains(&position);
                    assert!(!(all && asked), "a cell of a whole answer is open");
                }
            }
            // Rows are masked cells with their right tokens; of the cells up to the first end none is left out.
            let width = batch.tokens.len() as i64 / batch.size as i64;
            let asked: Vec<_> = batch
                .rows
                .iter()
                .zip(&batch.targets)
                .map(|(row, target)| ((row / width) as usize, (row % width) as usize + copies.from, *target))
                .collect();
            assert!(asked.iter().all(|row| masked.contains(row)));
            let ends = |example: usize| examples[example].prompt.len() + examples[example].answer.len();
            assert!(
                masked.iter().filter(|(example, position, _)| *position <= ends(*example)).all(|cell| asked.contains(cell))
            );
            // Of the second text's blocks, 24..32 is all answer.
            let count = masked.iter().filter(|(example, position, _)| *example == 1 && (24..32).contains(position)).count();
            (partly, wholly) = (partly | (1..8).contains(&count), wholly | (count == 8 && !all));
        }
        assert!(partly && wholly, "blocks have shares of their own");
    }

    #[test]
    fn pools_of_real_tasks_come_in_multiples_of_the_block() {
        let tokenizer = Tokenizer::open(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/nano"))).unwrap();
        for batch in batches(&tokenizer).pool(0).unwrap() {
            let copies = batch.copies.unwrap();
            assert!(copies.length.is_multiple_of(8) && copies.from.is_multiple_of(8) && copies.from < copies.length);
            assert!(batch.rows.len() > batch.size && batch.rows.iter().all(|row| batch.tokens[*row as usize] == 1));
        }
    }
}
