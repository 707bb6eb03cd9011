//! Small Python functions to train and test a small model on: a comment that says what to return, and the one body it stands for.
//!
//! A task is a *composition* (domain, filter, map, terminal, style; or a condition with two results) plus names, literals and
//! wording. The composition alone decides how hard the task is, so the test split holds out whole compositions: a model that
//! passes there has put known atoms together in a way that it has not seen. `atoms`, `domains` and `terminals` are the tables,
//! `compose` and `choice` the two grammars, `arguments` the calls, `program` the check.
//!
//! The body is a function of the prompt's text, byte for byte. A model that fills all positions at once has no other way to agree
//! with itself: were two bodies equally right, it could start one and end the other.
//!
//! What this is not: evidence on real code. The wording is a few hundred words of stiff English, no task needs more than one
//! collection, and the literals stay within 0 to 50.

mod arguments;
mod atoms;
mod choice;
mod compose;
mod domains;
mod pieces;
mod program;
mod terminals;
#[cfg(test)]
mod tests;

use std::sync::LazyLock;

use rand::{Rng, RngExt};

use atoms::Shape;
use choice::Choice;
use compose::{Pipeline, pick};
use pieces::pieces;
pub(super) use program::literal;

/// One in so many compositions is held out of training.
const HELD_OUT_ONE_IN: u64 = 8;

/// How often a task is a conditional on plain integers; the rest work through a collection.
const CHOICE_SHARE: f64 = 0.2;

/// The most pieces a prompt may have.
const LONGEST_PROMPT: usize = 40;

const FUNCTIONS: &[&str] = &["solve", "compute", "answer", "process", "run", "f"];

/// A prompt, the body it stands for, and calls that tell right bodies from wrong ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// A comment line that specifies the function, then its header line.
    pub prompt: String,
    /// The body: indented by four spaces, ended by a newline.
    pub solution: String,
    /// Which atoms the task is made of, without wording, names or literals.
    pub composition: String,
    /// Argument tuples as Python source.
    pub arguments: Vec<String>,
}

/// Which compositions to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Compositions a model may be trained on.
    Train,
    /// Compositions that training never shows, made of atoms that it does.
    HeldOut,
}

/// A composition with names, literals and wording drawn.
struct Draft {
    sentence: String,
    parameters: String,
    body: String,
    shape: Shape,
    literals: Vec<i64>,
    letter: Option<&'static str>,
}

/// The compositions of one split, by grammar and within it by domain, so that a domain with many does not crowd out the others.
#[derive(Default)]
struct Pool {
    pipelines: Vec<Vec<Pipeline>>,
    choices: Vec<Choice>,
}

static POOLS: LazyLock<[Pool; 2]> = LazyLock::new(|| [Split::Train, Split::HeldOut].map(Pool::new));

impl Pool {
    fn new(split: Split) -> Pool {
        let mut pool = Pool::default();
        for pipeline in Pipeline::all().into_iter().filter(|pipeline| split_of(&pipeline.key()) == split) {
            match pool.pipelines.last_mut() {
                Some(group) if group[0].domain.id == pipeline.domain.id => group.push(pipeline),
                _ => pool.pipelines.push(vec![pipeline]),
            }
        }
        pool.choices = Choice::all().into_iter().filter(|choice| split_of(&choice.key()) == split).collect();
        pool
    }

    /// Draws a composition, then its names, literals and wording.
    fn draw(&self, rng: &mut impl Rng) -> (String, Draft) {
        if rng.random_bool(CHOICE_SHARE) {
            let choice = pick(rng, &self.choices);
            (choice.key(), choice.draft(rng))
        } else {
            // Half by domain, half by composition: between "each domain alike" and "each composition alike".
            let mut group = &self.pipelines[rng.random_range(0..self.pipelines.len())];
            if rng.random_bool(0.5) {
                let total: usize = self.pipelines.iter().map(Vec::len).sum();
                let mut index = rng.random_range(0..total);
                for candidate in &self.pipelines {
                    group = candidate;
                    if index < candidate.len() {
                        break;
                    }
                    index -= candidate.len();
                }
            }
            let pipeline = pick(rng, group);
            (pipeline.key(), pipeline.draft(rng))
        }
    }
}

/// Draws a task; the same generator state gives the same task.
pub fn sample(rng: &mut impl Rng, split: Split) -> Task {
    let pool = &POOLS[(split == Split::HeldOut) as usize];
    let (composition, draft, prompt) = loop {
        let (composition, draft) = pool.draw(rng);
        let prompt = format!("# {}\ndef {}({}):\n", draft.sentence, pick(rng, FUNCTIONS), draft.parameters);
        // Rarely the longest wording of every part falls together; drawn anew, the task gets another.
        if pieces(&prompt).len() <= LONGEST_PROMPT {
            break (composition, draft, prompt);
        }
    };
    let arguments = arguments::draw(rng, &draft);
    Task { prompt, solution: draft.body, composition, arguments }
}

/// The split that a composition belongs to, whatever else changes in the tables.
fn split_of(composition: &str) -> Split {
    if hash(composition).is_multiple_of(HELD_OUT_ONE_IN) { Split::HeldOut } else { Split::Train }
}

/// FNV-1a over 64 bits: stable across platforms and releases, as the standard library's hasher does not promise to be.
pub(super) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
