//! What a suite is made of: prompts, and checks that tell whether a text solves them.

use std::io;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::nano::{self, Split};
use super::sandbox::{self, Limits};

/// Tasks under one name.
#[derive(Clone, Debug)]
pub struct Suite {
    pub name: String,
    pub tasks: Vec<Task>,
}

/// One problem.
#[derive(Clone, Debug)]
pub struct Task {
    /// Told in outcomes; no other task of the suite has it.
    pub id: String,
    /// What stands before the text to come.
    pub prompt: String,
    pub check: Check,
}

/// When a text is right.
#[derive(Clone, Debug)]
pub enum Check {
    /// The text is a function's body that gives the solution's results on the task's calls.
    Nano(Box<nano::Task>),
}

impl Suite {
    /// `count` nano tasks of held-out compositions. They are drawn by a seed of their own, so that every model meets the same ones.
    pub fn nano(count: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let task = |number: usize| {
            let task = nano::sample(&mut rng, Split::HeldOut);
            let id = format!("nano/{number} {}", task.composition);
            Task { id, prompt: task.prompt.clone(), check: Check::Nano(Box::new(task)) }
        };
        Self { name: "nano".into(), tasks: (0..count).map(task).collect() }
    }
}

impl Task {
    /// Whether `text` solves it.
    ///
    /// # Errors
    /// When a program could not be started or watched; one that fails is `Ok(false)`.
    pub fn passes(&self, text: &str, limits: &Limits) -> io::Result<bool> {
        match &self.check {
            Check::Nano(task) => sandbox::passes(task, text, limits),
        }
    }
}
