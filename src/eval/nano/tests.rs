use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::process::Command;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::domains::DOMAINS;
use super::pieces::pieces;
use super::*;

fn tasks(split: Split, count: usize) -> Vec<Task> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    (0..count).map(|_| sample(&mut rng, split)).collect()
}

fn python(program: &str) -> String {
    let output = Command::new("python3").args(["-I", "-S", "-c", program]).output().expect("python3 runs");
    assert!(output.status.success(), "{}\n{program}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the harness prints text")
}

#[test]
fn a_seed_decides_everything() {
    assert_eq!(tasks(Split::Train, 200), tasks(Split::Train, 200));
}

#[test]
fn the_prompt_decides_the_solution() {
    let mut seen: HashMap<String, String> = HashMap::new();
    for split in [Split::Train, Split::HeldOut] {
        for task in tasks(split, 20_000) {
            if let Some(earlier) = seen.insert(task.prompt.clone(), task.solution.clone()) {
                assert_eq!(earlier, task.solution, "{}", task.prompt);
            }
        }
    }
}

/// Two compositions may draw different bodies from literals that happen not to collide in a sample; the templates must not.
#[test]
fn no_wording_stands_for_two_bodies() {
    let blank = |text: &str| -> String {
        pieces(text).iter().map(|p| if p.trim().parse::<i64>().is_ok_and(|n| n > 2) { " 9" } else { p }).collect()
    };
    let mut seen: HashMap<String, (String, String)> = HashMap::new();
    for task in tasks(Split::Train, 60_000).into_iter().chain(tasks(Split::HeldOut, 20_000)) {
        let (prompt, body) = (blank(&task.prompt), blank(&task.solution));
        if let Some((earlier, key)) = seen.insert(prompt.clone(), (body.clone(), task.composition.clone())) {
            assert_eq!(earlier, body, "{prompt} {key} {}", task.composition);
        }
    }
}

#[test]
fn held_out_compositions_stay_out_of_training() {
    let keys = |split| tasks(split, 20_000).into_iter().map(|task| task.composition).collect::<BTreeSet<_>>();
    let (train, held_out) = (keys(Split::Train), keys(Split::HeldOut));
    assert!(train.is_disjoint(&held_out));
    let share = held_out.len() as f64 / (train.len() + held_out.len()) as f64;
    println!("{} compositions, {} held out ({share:.3})", train.len() + held_out.len(), held_out.len());
    assert!((0.08..0.18).contains(&share), "{share}");
}

#[test]
fn training_meets_every_atom() {
    let pool = &POOLS[0];
    let mut missing = Vec::new();
    for domain in DOMAINS {
        let pipelines: Vec<_> = pool.pipelines.iter().flatten().filter(|p| p.domain.id == domain.id).collect();
        for filter in domain.filters.iter().flat_map(|table| table.iter()) {
            for style in domain.loops {
                if pipelines.iter().filter(|p| p.style == *style && p.filter.is_some_and(|f| f.id == filter.id)).count() < 2 {
                    missing.push(format!("{}/{}/{:?}", domain.id, filter.id, style));
                }
            }
        }
        for map in domain.maps {
            if pipelines.iter().filter(|p| p.map.is_some_and(|m| m.id == map.id)).count() < 2 {
                missing.push(format!("{}//{}", domain.id, map.id));
            }
        }
        // A held-out task's terminal must be known in its domain, and in its style somewhere.
        for held in POOLS[1].pipelines.iter().flatten().filter(|p| p.domain.id == domain.id) {
            if !pipelines.iter().any(|p| p.terminal.id == held.terminal.id)
                || !pool.pipelines.iter().flatten().any(|p| p.terminal.id == held.terminal.id && p.style == held.style)
            {
                missing.push(held.key());
            }
        }
    }
    for held in &POOLS[1].choices {
        let known = |test: &dyn Fn(&Choice) -> bool| pool.choices.iter().any(|c| c.family.id == held.family.id && test(c));
        if !known(&|c| c.condition.id == held.condition.id && c.statement == held.statement)
            || !known(&|c| c.yes.id == held.yes.id)
            || !known(&|c| c.no.id == held.no.id)
        {
            missing.push(held.key());
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn tasks_are_short_and_the_vocabulary_small() {
    let mut vocabulary: BTreeMap<String, usize> = BTreeMap::new();
    let (mut prompts, mut bodies) = (Vec::new(), Vec::new());
    for task in tasks(Split::Train, 20_000).into_iter().chain(tasks(Split::HeldOut, 5_000)) {
        let (prompt, body) = (pieces(&task.prompt), pieces(&task.solution));
        assert!(prompt.len() <= 40, "{} {}", prompt.len(), task.prompt);
        assert!(body.len() <= 44, "{} {}", body.len(), task.solution);
        prompts.push(prompt.len());
        bodies.push(body.len());
        for piece in prompt.into_iter().chain(body) {
            *vocabulary.entry(piece.to_string()).or_default() += 1;
        }
    }
    prompts.sort_unstable();
    bodies.sort_unstable();
    let at = |list: &[usize], share: f64| list[((list.len() - 1) as f64 * share) as usize];
    for (name, list) in [("prompt", &prompts), ("solution", &bodies)] {
        println!("{name}: {:?}", [0.0, 0.1, 0.5, 0.9, 1.0].map(|share| at(list, share)));
    }
    let rarest: Vec<_> = vocabulary.iter().filter(|(_, count)| **count < 20).collect();
    println!("{} pieces, rare: {rarest:?}", vocabulary.len());
    let words: BTreeSet<_> = vocabulary.keys().map(|piece| piece.trim()).collect();
    println!("{} words", words.len());
    assert!(words.len() <= 360);
}

#[test]
fn solutions_run_and_pass_their_own_check() {
    for task in tasks(Split::Train, 120).into_iter().chain(tasks(Split::HeldOut, 80)) {
        assert!((6..=10).contains(&task.arguments.len()), "{:?}", task.arguments);
        assert_eq!(python(&task.test_program(&task.solution, "s")).trim(), "s pass", "{task:#?}");
    }
}

fn golden(call: &str) -> Task {
    Task {
        prompt: "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n".into(),
        solution: "    return sum(x for x in xs if x > 17)\n".into(),
        composition: String::new(),
        arguments: vec!["([],)".into(), call.into()],
    }
}

#[test]
fn a_check_tells_right_from_wrong() {
    let task = golden("([16, 17, 18],)");
    let check = |body: &str| python(&task.test_program(body, "s")).trim().to_string();
    assert_eq!(check("    return sum(xs[i] for i in range(len(xs)) if xs[i] >= 18)\n"), "s pass");
    for wrong in [
        "    return sum(x for x in xs if x >= 17)\n",
        "    return float(sum(x for x in xs if x > 17))\n",
        "    return (\n",
        "    raise SystemExit\n",
        "    xs.clear()\n    return 0\n",
        "    print('s pass')\n    return 1\n",
        "    é 😀 CALLS\n",
        "",
    ] {
        assert_eq!(check(wrong), "s fail", "{wrong}");
    }
    assert_eq!(check("    import os\n    os._exit(0)\n"), "");
}

#[test]
fn bodies_give_known_values() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (key, argument, value) in [
        ("numbers/all/squared/sum/expression", "[1, -2, 4]", "21"),
        ("numbers/negative/same/running/for", "[-1, 5, -2, -3]", "[-1, -3, -6]"),
        ("numbers/odd/same/positions/expression", "[2, 3, 4, -5]", "[1, 3]"),
        ("text/vowel/same/string/for", "'banana split'", "aaai"),
        ("text/all/same/counts/for", "'abba'", "{'a': 2, 'b': 2}"),
        ("words/palindrome/same/list/expression", "['noon', 'moon', '']", "['noon', '']"),
        ("words/all/length/largest/for", "[]", "None"),
        ("keys/even/same/sorted/for", "{'b': 2, 'c': 3, 'a': 0}", "['a', 'b']"),
        ("entries/all/squared/dict/expression", "{'a': -3}", "{'a': 9}"),
        ("digits/even/same/sum/while", "2048", "14"),
    ] {
        let pipeline = Pipeline::all().into_iter().find(|pipeline| pipeline.key() == key).expect(key);
        let draft = pipeline.draft(&mut rng);
        let program = format!("def f({}):\n{}print(f({argument}))", draft.parameters, draft.body);
        assert_eq!(python(&program).trim(), value, "{key}");
    }
}
