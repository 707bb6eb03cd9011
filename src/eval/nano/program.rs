//! The program that judges a body: it runs the task's own solution and the candidate on the same calls and prints one verdict.
//!
//! The verdict line carries a secret that the caller draws per run, so that a body cannot pass by printing or by leaving early.
//! Both functions live in one interpreter; a body that set out to read the secret from the caller's frames could. Bodies come
//! from a model that has only ever seen this module's tasks, so that is accepted; harm to the machine is the sandbox's concern.

use super::Task;

/// Placeholders are Python string literals. The reference answers before the candidate exists, and each function gets its own
/// copy of the arguments, evaluated from source.
const HARNESS: &str = r#"import io, os, sys

def same(a, b):
    if type(a) is not type(b):
        return False
    if type(a) is dict:
        return same(sorted(a.items(), key=repr), sorted(b.items(), key=repr))
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def verdict():
    calls = CALLS
    space = {}
    exec(REFERENCE, space)
    wanted = [space[NAME](*eval(call)) for call in calls]
    try:
        space = {"__name__": "candidate"}
        exec(CANDIDATE, space)
        return all([same(want, space[NAME](*eval(call))) for want, call in zip(wanted, calls)])
    except BaseException:
        return False

write, leave, out = os.write, os._exit, sys.stdout
sys.stdout = sys.stderr = io.StringIO()
line = "\n" + SECRET + (" pass" if verdict() else " fail") + "\n"
write(1, line.encode())
leave(0)
"#;

impl Task {
    /// A complete Python program that runs the solution and `body` on all arguments, compares values and types, and prints
    /// `<secret> pass` or `<secret> fail` as its last line. Whatever the body prints or raises stays inside.
    pub fn test_program(&self, body: &str, secret: &str) -> String {
        let header = self.prompt.lines().find(|line| line.starts_with("def ")).unwrap_or_default();
        let name = header.trim_start_matches("def ").split('(').next().unwrap_or_default();
        let calls: Vec<String> = self.arguments.iter().map(|call| literal(call)).collect();
        // The candidate's text goes in last, so that a placeholder's name inside it is not replaced.
        HARNESS
            .replace("CALLS", &format!("[{}]", calls.join(", ")))
            .replace("REFERENCE", &literal(&format!("{}{}", self.prompt, self.solution)))
            .replace("NAME", &literal(name))
            .replace("SECRET", &literal(secret))
            .replace("CANDIDATE", &literal(&format!("{header}\n{body}")))
    }
}

/// A Python string literal in ASCII.
pub(in crate::eval) fn literal(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\n' => quoted.push_str("\\n"),
            ' '..='~' => quoted.push(character),
            _ => quoted.push_str(&format!("\\U{:08x}", character as u32)),
        }
    }
    quoted + "\""
}
