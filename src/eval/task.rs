//! What a suite is made of: prompts in the form that a model gets them, and checks that tell whether a text solves them.

use std::io;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::nano::{self, Split, literal};
use super::sandbox::{self, Limits};

/// What a chat model is asked about a function's head: EvalPlus's words (github.com/evalplus/evalplus), so that figures compare.
const INSTRUCTION: &str =
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:";

/// Tasks under one name.
#[derive(Clone, Debug)]
pub struct Suite {
    pub name: String,
    /// Where a raw text ends, as its authors judge it.
    pub stops: Vec<String>,
    pub tasks: Vec<Task>,
}

/// How a task is put to a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// The prompt as it is; the text goes on from it.
    #[default]
    Raw,
    /// A user's message in the model's chat template; code is taken from the answer.
    Chat,
    /// The prompt and the beginning of an answer, a hole, and the answer's end.
    Infill,
}

/// One problem.
#[derive(Clone, Debug)]
pub struct Task {
    /// Told in outcomes; no other task of the suite has it.
    pub id: String,
    /// What stands before the answer.
    pub prompt: String,
    /// A right answer, where it is known.
    pub solution: Option<String>,
    /// Set in the infilling form.
    pub hole: Option<Hole>,
    pub check: Check,
}

/// An answer whose middle is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    pub before: String,
    /// What stood there, where it is known.
    pub middle: Option<String>,
    pub after: String,
}

/// When an answer is right.
#[derive(Clone, Debug)]
pub enum Check {
    /// It is a function's body that gives the solution's results on the task's calls.
    Nano(Box<nano::Task>),
    /// Prompt, answer and `test` are a Python program that runs to its end. Where `entry_point` is told, the program ends by calling
    /// `check` with what has that name, as HumanEval's do.
    Program { test: String, entry_point: Option<String> },
    /// It is this text, but for white space around it.
    Reference(String),
}

/// A judgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub passed: bool,
    /// What went wrong, where that is known.
    pub why: Option<String>,
}

impl Verdict {
    fn failed(why: impl Into<String>) -> Self {
        Self { passed: false, why: Some(why.into()) }
    }
}

impl Suite {
    /// `count` nano tasks of held-out compositions. They are drawn by a seed of their own, so that every model meets the same ones.
    pub fn nano(count: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let task = |number: usize| {
            let task = nano::sample(&mut rng, Split::HeldOut);
            let (prompt, solution) = (task.prompt.clone(), Some(task.solution.clone()));
            let id = format!("nano/{number} {}", task.composition);
            Task { id, prompt, solution, hole: None, check: Check::Nano(Box::new(task)) }
        };
        Self { name: "nano".into(), stops: vec![], tasks: (0..count).map(task).collect() }
    }

    /// The same tasks with the middle of every solution to be filled in. A task that came with a hole keeps it; one of which no
    /// solution is known has no middle, and its id is returned.
    pub fn infill(mut self) -> Result<Self, String> {
        for task in &mut self.tasks {
            task.hole = match (task.hole.take(), &task.solution) {
                (Some(hole), _) => Some(hole),
                (None, Some(solution)) => Some(cut(solution)),
                (None, None) => return Err(task.id.clone()),
            };
        }
        Ok(Self { name: format!("{}-infill", self.name), stops: vec![], ..self })
    }

    /// Differs where the tasks do.
    pub fn fingerprint(&self) -> String {
        format!("{:016x}", nano::hash(&format!("{:?}", self.tasks)))
    }

    /// Whether judging runs what a model wrote.
    pub fn runs_programs(&self) -> bool {
        self.tasks.iter().any(|task| !matches!(task.check, Check::Reference(_)))
    }
}

/// Takes out the middle third of a solution's lines; of one with fewer than three, the middle half of its words. Deterministic, and white
/// space goes with what follows it, as in most vocabularies' tokens.
fn cut(solution: &str) -> Hole {
    let lines = parts(solution, |c| c == '\n');
    let (parts, first, last) = match lines.len() {
        0..3 => {
            let words = parts(solution, char::is_whitespace);
            let count = words.len();
            (words, count / 4, (count * 3).div_ceil(4))
        }
        count => (lines, count / 3, (count * 2).div_ceil(3)),
    };
    Hole { before: parts[..first].concat(), middle: Some(parts[first..last].concat()), after: parts[last..].concat() }
}

/// Cuts before every run of gaps that something follows.
fn parts(text: &str, gap: fn(char) -> bool) -> Vec<&str> {
    let (mut found, mut start, mut within) = (vec![], 0, true);
    let end = text.trim_end().len();
    for (at, character) in text[..end].char_indices() {
        if gap(character) && !within {
            found.push(&text[start..at]);
            start = at;
        }
        within = gap(character);
    }
    found.push(&text[start..]);
    found
}

impl Task {
    /// What a user asks of a chat model.
    pub fn message(&self) -> String {
        match &self.check {
            Check::Program { entry_point: Some(_), .. } => format!("{INSTRUCTION}\n```\n{}\n```\n", self.prompt.trim()),
            _ => self.prompt.clone(),
        }
    }

    /// Whether what a model wrote solves the task; in the infilling form `text` is what stands behind the hole's `before`.
    ///
    /// # Errors
    /// When a program could not be started or watched; one that fails is a verdict.
    pub fn judge(&self, text: &str, form: Form, limits: &Limits) -> io::Result<Verdict> {
        let before = self.hole.as_ref().map_or("", |hole| &hole.before);
        let text = if form == Form::Chat { code(text) } else { text };
        let answer = format!("{before}{text}");
        let secret = format!("{:032x}", rand::random::<u128>());
        let program = match &self.check {
            Check::Reference(reference) => {
                let passed = answer.trim() == reference.trim();
                return Ok(if passed { Verdict { passed, why: None } } else { Verdict::failed("not the reference") });
            }
            Check::Nano(task) => task.test_program(&answer, &secret),
            Check::Program { test, entry_point } => {
                let program = match entry_point {
                    Some(name) if form == Form::Chat && defines(&answer, name) => format!("{}{answer}", preamble(&self.prompt)),
                    None if form == Form::Chat => answer,
                    _ => format!("{}{answer}", self.prompt),
                };
                let call = entry_point.as_ref().map_or_else(String::new, |name| format!("check({name})\n"));
                harness(&format!("{program}\n{test}\n{call}"), &secret)
            }
        };
        Ok(verdict(sandbox::run(&program, limits)?, &secret))
    }
}

/// The code in a chat answer: its first fenced block, which may lack an end; without a fence, all of it.
pub fn code(answer: &str) -> &str {
    let (mut at, mut start) = (0, None);
    for line in answer.split_inclusive('\n') {
        match (line.trim_start().starts_with("```"), start) {
            (true, None) => start = Some(at + line.len()),
            (true, Some(start)) => return &answer[start..at],
            (false, _) => {}
        }
        at += line.len();
    }
    start.map_or(answer, |start| &answer[start..])
}

/// Whether `code` holds a function of that name at its outermost level.
fn defines(code: &str, name: &str) -> bool {
    let header = |line: &str| {
        let rest = line.strip_prefix("def ").or_else(|| line.strip_prefix("async def "))?;
        rest.trim_start().strip_prefix(name).map(|rest| rest.trim_start().starts_with('('))
    };
    code.lines().any(|line| header(line) == Some(true))
}

/// A prompt that an answer with the whole function follows: imports and helpers in it count. With its docstring it is a function by
/// itself, which the answer's replaces; without, it needs a body.
fn preamble(prompt: &str) -> String {
    let body = if prompt.trim_end().ends_with(':') { "    pass\n" } else { "" };
    format!("{}\n{body}\n", prompt.trim_end())
}

/// Runs PROGRAM and prints, as the last line, the secret and how it went. The program may print and leave as it likes: stdout is not its
/// own, and leaving is an exception. One that set out to read the secret from the caller's frames could, which is accepted of texts by
/// models that have not seen this; harm to the machine is the sandbox's concern.
const HARNESS: &str = r#"import io, os, sys

def verdict():
    try:
        exec(compile(PROGRAM, "program", "exec"), {"__name__": "candidate"})
        return "pass"
    except BaseException as error:
        try:
            return "fail " + ascii(type(error).__name__ + ": " + str(error))[1:-1][:200]
        except BaseException:
            return "fail"

write, leave, out = os.write, os._exit, sys.stdout
sys.stdout = sys.stderr = io.StringIO()
line = "\n" + SECRET + " " + verdict() + "\n"
write(1, line.encode())
leave(0)
"#;

fn harness(program: &str, secret: &str) -> String {
    // The program goes in last, so that a placeholder's name inside it is not replaced.
    HARNESS.replace("SECRET", &literal(secret)).replace("PROGRAM", &literal(program))
}

fn verdict(outcome: sandbox::Outcome, secret: &str) -> Verdict {
    use sandbox::Outcome;
    match outcome {
        Outcome::TimedOut => Verdict::failed("ran too long"),
        Outcome::OutputLimit => Verdict::failed("printed too much"),
        Outcome::Failed { status, stderr_tail } => {
            let cause = stderr_tail.lines().last().unwrap_or_default();
            Verdict::failed(format!("{status} {cause}").trim())
        }
        Outcome::Finished { stdout } => match stdout.lines().last().and_then(|line| line.strip_prefix(secret)) {
            Some(" pass") => Verdict { passed: true, why: None },
            Some(told) => Verdict::failed(told.trim_start_matches(" fail").trim()),
            None => Verdict::failed("left before the verdict"),
        },
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
