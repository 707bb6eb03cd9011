use std::time::Duration;

use super::*;
use crate::eval::problems::{self, Format};

fn problem(test: &str) -> Task {
    Task {
        id: "t".into(),
        prompt: "from typing import List\nimport math\n\n\ndef helper(x):\n    return x + 1\n\n\ndef f(xs: List[int]) -> int:\n    \"\"\" Sum. \"\"\"\n".into(),
        solution: Some("    total = 0\n    for x in xs:\n        total += x\n    return total\n".into()),
        hole: None,
        check: Check::Program { test: test.into(), entry_point: Some("f".into()) },
    }
}

const TEST: &str = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n";

fn judged(task: &Task, text: &str, form: Form) -> (bool, String) {
    let verdict = task.judge(text, form, &Limits::default()).unwrap();
    (verdict.passed, verdict.why.unwrap_or_default())
}

#[test]
fn a_completion_must_run_through_the_test() {
    let task = problem(TEST);
    assert_eq!(judged(&task, task.solution.as_ref().unwrap(), Form::Raw), (true, String::new()));
    // The interpreter still has its library.
    let library = "    import collections, functools, hashlib, itertools, json, random, re, statistics, string\n    return math.floor(sum(xs))\n";
    assert_eq!(judged(&task, library, Form::Raw), (true, String::new()));
    let failures = [
        ("    return 3\n", "AssertionError: "),
        ("    return sun(xs)\n", "NameError: name 'sun' is not defined"),
        ("  return 3\n", "IndentationError: "),
        ("    import sys\n    sys.exit(0)\n", "SystemExit: 0"),
        ("    import os\n    os._exit(0)\n", "left before the verdict"),
        ("    print('pass')\n    raise SystemExit\n", "SystemExit: "),
        ("    while True: pass\n", "ran too long"),
        ("    while True: print('x' * 10000)\n", "MemoryError: "),
        ("    return input()\n", "EOFError: "),
        ("    return f(xs)\n", "RecursionError: "),
    ];
    let harmful = [
        ("    import os\n    while True: os.fork()\n", "BlockingIOError: "),
        ("    import os\n    os.kill(os.getppid(), 9)\n", "PermissionError: "),
        ("    return len(open('/etc/passwd').read())\n", "PermissionError: "),
        ("    return bytearray(1 << 40)\n", "MemoryError: "),
        ("    import socket\n    socket.create_connection(('127.0.0.1', 22))\n", "OSError: [Errno 101]"),
    ];
    // Where a fence is missing, which is said at start, such a program does harm.
    let failures = failures.iter().chain(if sandbox::capabilities().is_empty() { &harmful[..] } else { &[] });
    for (text, told) in failures {
        let (passed, why) = judged(&task, text, Form::Raw);
        assert!(!passed && why.starts_with(told.trim()), "{text}: {why}");
    }
    // And the next one is judged as if nothing had been.
    assert_eq!(judged(&task, task.solution.as_ref().unwrap(), Form::Raw), (true, String::new()));
}

#[test]
fn a_chat_answer_may_be_the_function_or_its_body() {
    let task = problem(TEST);
    let whole =
        "Sure!\n\n```python\ndef f(xs):\n    return sum(helper(x) - 1 for x in xs)\n```\n\nIt sums.\n```\nf([1])\n```\n";
    assert_eq!(judged(&task, whole, Form::Chat), (true, String::new()));
    assert_eq!(judged(&task, "```\n    return sum(xs)\n```", Form::Chat), (true, String::new()));
    assert_eq!(judged(&task, "def f(xs):\n    return sum(xs)", Form::Chat), (true, String::new()), "no fence at all");
    // What a script does when it is run by itself is not judged.
    let script = "```python\ndef f(xs):\n    return sum(xs)\n\nif __name__ == \"__main__\":\n    raise SystemExit(1)\n";
    assert_eq!(judged(&task, script, Form::Chat), (true, String::new()), "cut off before the fence ended");
    let (passed, why) = judged(&task, "```python\ndef g(xs):\n    return sum(xs)\n```", Form::Chat);
    assert!(!passed && why.starts_with("AssertionError"), "the function asked for is the prompt's empty one: {why}");
    assert!(!judged(&task, "I cannot do that.", Form::Chat).0);
    let headless = Task { prompt: "def f(xs):\n".into(), ..problem(TEST) };
    assert_eq!(judged(&headless, "```\ndef f(xs):\n    return sum(xs)\n```", Form::Chat), (true, String::new()));
    let message = task.message();
    assert!(message.contains("code block:\n```\nfrom typing") && message.ends_with("\"\"\" Sum. \"\"\"\n```\n"), "{message}");
}

#[test]
fn a_reference_is_met_but_for_white_space_around_it() {
    let task = Task { check: Check::Reference("42\n".into()), ..problem("") };
    assert_eq!(judged(&task, " 42", Form::Raw), (true, String::new()));
    assert_eq!(judged(&task, "```\n42\n```", Form::Chat), (true, String::new()));
    assert_eq!(judged(&task, "4 2", Form::Raw), (false, "not the reference".into()));
}

#[test]
fn the_middle_of_a_solution_goes_and_comes_back() {
    let hole = |text: &str| {
        let Hole { before, middle, after } = cut(text);
        (before, middle.unwrap(), after)
    };
    let texts = |before: &str, middle: &str, after: &str| (before.to_owned(), middle.to_owned(), after.to_owned());
    assert_eq!(hole("    a\n    b\n\n    c\n"), texts("    a", "\n    b", "\n\n    c\n"));
    assert_eq!(hole("a\nb\nc\nd\ne\n"), texts("a", "\nb\nc\nd", "\ne\n"));
    assert_eq!(hole("    return sum(x for x in xs)\n"), texts("    return", " sum(x for x in", " xs)\n"));
    assert_eq!(hole("x"), texts("", "x", ""));

    let suites = [Suite::nano(40, 3), Suite { name: "s".into(), stops: vec![], tasks: vec![problem(TEST)] }];
    for suite in suites {
        for task in suite.infill().unwrap().tasks {
            let hole = task.hole.clone().unwrap();
            let (middle, solution) = (hole.middle.unwrap(), task.solution.clone().unwrap());
            assert_eq!(format!("{}{middle}{}", hole.before, hole.after), solution);
            assert!(!middle.trim().is_empty(), "{solution}");
            assert_eq!(judged(&task, &format!("{middle}{}", hole.after), Form::Infill), (true, String::new()), "{solution}");
            assert!(!judged(&task, &hole.after, Form::Infill).0 || middle.trim().len() < 4, "{solution}");
        }
    }
    let unsolved = Suite { tasks: vec![Task { solution: None, ..problem(TEST) }], ..Suite::nano(0, 0) };
    assert_eq!(unsolved.infill().err(), Some("t".into()));
}

fn nano_task(drawn: &nano::Task) -> Task {
    Task { check: Check::Nano(Box::new(drawn.clone())), prompt: drawn.prompt.clone(), ..problem("") }
}

#[test]
fn only_a_right_body_passes() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..20 {
        let drawn = nano::sample(&mut rng, Split::Train);
        let task = nano_task(&drawn);
        assert_eq!(judged(&task, &drawn.solution, Form::Raw), (true, String::new()), "{drawn:#?}");
        for wrong in
            ["    import sys\n    sys.exit(0)\n", "    import os\n    os._exit(0)\n", "    return object()\n", "", "  )"]
        {
            assert!(!judged(&task, wrong, Form::Raw).0, "{wrong}");
        }
    }
}

/// Each row is a slip that a model makes; where it changes a solution, some argument should show it.
#[test]
fn arguments_catch_slips() {
    let slips = [
        (" > ", " >= "),
        (" < ", " <= "),
        (" >= ", " > "),
        (" == ", " != "),
        (" % ", " // "),
        (" * ", " + "),
        (" + ", " - "),
        ("max(", "min("),
        ("upper", "lower"),
        ("not in", "in"),
        ("sorted(", "list("),
        (", reverse=True", ""),
        ("set(", "list("),
        ("[::-1]", ""),
        ("total += ", "total = "),
        ("startswith", "endswith"),
        ("    return None", "    return 0"),
    ];
    let (mut made, mut missed) = (0, Vec::new());
    let limits = Limits { wall: Duration::from_secs(1), ..Limits::default() };
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for _ in 0..80 {
        let drawn = nano::sample(&mut rng, Split::Train);
        // Not for a running extreme, where `x >= best` is as right as `x > best`, nor for `while`, which would only run on.
        if ["largest", "smallest", "/while"].iter().any(|part| drawn.composition.contains(part)) {
            continue;
        }
        for (right, wrong) in slips {
            let body = drawn.solution.replacen(right, wrong, 1);
            if body != drawn.solution {
                made += 1;
                if nano_task(&drawn).judge(&body, Form::Raw, &limits).unwrap().passed {
                    missed.push(format!("{right} -> {wrong}: {} {:?}", drawn.solution, drawn.arguments));
                }
            }
        }
    }
    assert!(missed.len() * 10 < made, "{} of {made}: {missed:#?}", missed.len());
}

/// Every one of the published solutions passes, whole and with its middle put back.
#[test]
#[ignore = "needs LACUNA_HUMANEVAL, the path of HumanEval.jsonl.gz"]
fn humaneval_s_own_solutions_pass() {
    let path = std::env::var_os("LACUNA_HUMANEVAL").expect("LACUNA_HUMANEVAL names HumanEval.jsonl.gz");
    let suite = problems::read(path.as_ref(), Format::HumanEval, usize::MAX).unwrap();
    assert_eq!(suite.tasks.len(), 164);
    for task in suite.infill().unwrap().tasks {
        let hole = task.hole.clone().unwrap();
        let text = format!("{}{}", hole.middle.unwrap(), hole.after);
        assert_eq!(judged(&task, &text, Form::Infill), (true, String::new()), "{}", task.id);
        let whole = Task { hole: None, ..task };
        let answer = format!("```python\n{}{}```\n", whole.prompt, whole.solution.as_ref().unwrap());
        assert_eq!(judged(&whole, &answer, Form::Chat), (true, String::new()), "{}", whole.id);
    }
}
