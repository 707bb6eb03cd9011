//! Teacher forcing: a [`Decoder`] that commits a text it was given, token by token as if the network had chosen it, so that what is
//! told of each token is how probable it was. Nothing is chosen, so a forward takes as many tokens as its logits allow.

use crate::decode::canvas::{Canvas, Piece};
use crate::decode::{
    Decoder, Edit, FinishReason, Noise, Pattern, Purpose, RowStatistics, Sampling, Status, Step, Wanted, Window,
};

/// What to score, already validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// At least one token.
    pub text: Vec<u32>,
    /// Tokens run at a time.
    pub chunk: usize,
    /// The distribution as the network gives it.
    pub sampling: Sampling,
}

/// A text being read.
pub struct Scoring {
    parameters: Parameters,
    canvas: Canvas,
    /// Prompt and text.
    tokens: Vec<u32>,
    cached: usize,
    kept: Vec<usize>,
    step: usize,
}

impl Scoring {
    /// `prompt` has at least one token: something must stand before the first one judged.
    pub fn new(parameters: Parameters, prompt: &[u32]) -> Self {
        let canvas = Canvas::new(prompt, &[Piece::Hole(parameters.text.len())], 0);
        let tokens = [prompt, &parameters.text].concat();
        Self { parameters, canvas, tokens, cached: 0, kept: vec![], step: 0 }
    }

    /// Tokens of the next window, and how many of them are followed by the prompt, which nobody judges. The last token of all is
    /// followed by nothing and need not be run.
    fn next(&self) -> (usize, usize) {
        let count = (self.tokens.len() - 1 - self.cached).min(self.parameters.chunk.max(1));
        let skipped = (self.canvas.prompt_len() - 1).saturating_sub(self.cached).min(count);
        (count, skipped)
    }
}

impl Decoder for Scoring {
    fn window(&self) -> Window {
        let (count, skipped) = self.next();
        let (from, to) = (self.cached, self.cached + count);
        Window {
            tokens: self.tokens[from..to].to_vec(),
            pattern: Pattern::Next,
            purpose: Purpose::Prefill,
            wanted: Wanted::Following((skipped..count).collect()),
            guidance: None,
            sampling: self.parameters.sampling.clone(),
            noise: Noise::Given(self.tokens[from + skipped + 1..=to].to_vec()),
            alone: false,
            histories: vec![],
        }
    }

    fn advance(&mut self, rows: &[RowStatistics]) -> Step {
        let (count, _) = self.next();
        self.kept = (0..count).collect();
        self.cached += count;
        let first = self.canvas.frontier();
        let edit = |(at, row): (usize, &RowStatistics)| Edit {
            position: first + at,
            token: row.token,
            status: Status::Committed,
            confidence: row.confidence,
            alternatives: row.alternatives.clone(),
        };
        let edits: Vec<Edit> = rows.iter().enumerate().map(edit).collect();
        edits.iter().for_each(|edit| self.canvas.commit(edit.position, edit.token));
        self.step += 1;
        Step { step: self.step - 1, block: 0, edits }
    }

    fn finished(&self) -> Option<FinishReason> {
        (self.canvas.frontier() == self.canvas.len()).then_some(FinishReason::Length)
    }

    fn canvas(&self) -> &Canvas {
        &self.canvas
    }

    fn cache_room(&self) -> usize {
        self.tokens.len()
    }

    fn kept(&self) -> &[usize] {
        &self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the chunks, every token of the text is asked for once, behind the one before it.
    #[test]
    fn chunks_ask_for_every_token_once() {
        let (prompt, text) = ([5, 6, 7], [8, 9, 10, 11]);
        for chunk in 1..9 {
            let parameters = Parameters { text: text.to_vec(), chunk, sampling: Sampling::default() };
            let mut scoring = Scoring::new(parameters, &prompt);
            let (mut run, mut asked): (Vec<u32>, Vec<(u32, u32)>) = (vec![], vec![]);
            while scoring.finished().is_none() {
                let window = scoring.window();
                let (Wanted::Following(rows), Noise::Given(given)) = (&window.wanted, &window.noise) else { panic!() };
                assert_eq!(rows.len(), given.len());
                asked.extend(rows.iter().map(|row| window.tokens[*row]).zip(given.iter().copied()));
                run.extend(&window.tokens);
                let row = |token: &u32| RowStatistics { token: *token, confidence: 0.5, ..RowStatistics::default() };
                let rows: Vec<_> = given.iter().map(row).collect();
                let step = scoring.advance(&rows);
                assert_eq!((step.edits.len(), scoring.kept().len()), (rows.len(), window.tokens.len()));
                assert!(run.len() < 7, "the last token need not be run");
            }
            assert_eq!(run, [5, 6, 7, 8, 9, 10], "chunks of {chunk}");
            assert_eq!(asked, [(7, 8), (8, 9), (9, 10), (10, 11)], "chunks of {chunk}");
            assert_eq!(scoring.canvas().sequence(), [5, 6, 7, 8, 9, 10, 11]);
        }
    }
}
