use super::*;
use crate::eval::machine::Machine;
use crate::eval::sweep::{Outcome, Unlike};

const TEXT: &str = r#"
name = "pair"
suite = "nano"
tasks = 8
tasks_seed = 7
rounds = 2
warm_up = 2
threads = 2
device = "cpu"
dtype = "f32"
in_flight = [1, 4]
[[path]]
name = "a"
model = "models/a"
settings = ["--threshold 0.9", "--steps 8"]
[[path]]
name = "b"
model = "models/b"
settings = [""]
"#;

fn plan() -> Plan {
    toml::from_str(TEXT).unwrap()
}

#[test]
fn a_plan_is_cells_in_turn() {
    let plan = plan();
    plan.validate(&[]).unwrap();
    let cells = plan.cells();
    assert_eq!(cells.len(), 6);
    let command = "eval nano --json --model models/a --dtype f32 --device cpu --threads 2 --tasks 8 --concurrency 4 --tasks-seed 7 --steps 8";
    assert_eq!(plan.command(&cells[3]), command);
    assert!(plan.command(&cells[4]).ends_with("--concurrency 1 --tasks-seed 7"));
    let file = Plan { suite: Suite::Humaneval, data: Some("h.jsonl".into()), chat: true, ..plan.clone() };
    file.validate(&[]).unwrap();
    assert!(file.command(&cells[4]).ends_with("--concurrency 1 --data h.jsonl --chat"));
    assert_eq!(plan.order(0), [vec![0, 1, 2, 3], vec![4, 5]]);
    // The other path first, each begun elsewhere and run backwards.
    assert_eq!(plan.order(1), [vec![4, 5], vec![0, 3, 2, 1]]);
    for round in 0..20 {
        let mut all = plan.order(round).concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5], "round {round}");
    }
}

#[test]
fn a_plan_that_cannot_be_is_refused() {
    type Case = (fn(&mut Plan), &'static str);
    let cases: [Case; 15] = [
        (|plan| plan.data = Some("x".into()), "the suite nano draws its tasks"),
        (|plan| plan.suite = Suite::Jsonl, "the suite jsonl takes its tasks from a file: give data"),
        (|plan| plan.name = "../x".into(), "the plan's name is '../x'"),
        (|plan| plan.name = String::new(), "the plan's name is ''"),
        (|plan| plan.tasks = 0, "the plan's tasks is 0: use a number from 1 to 100000"),
        (|plan| plan.rounds = 0, "the plan's rounds is 0"),
        (|plan| plan.in_flight = vec![], "the plan has no in_flight"),
        (|plan| plan.in_flight = vec![1, 0], "the plan's in_flight is 0"),
        (|plan| plan.in_flight = vec![4, 1, 4], "the plan's in_flight is 4 twice"),
        (|plan| plan.paths = vec![], "the plan has no path"),
        (|plan| plan.paths[0].settings = vec![], "the plan has no settings of path 'a'"),
        (|plan| plan.paths[0].settings[1] = plan.paths[0].settings[0].clone(), "path 'a' has two settings '--threshold 0.9'"),
        (|plan| plan.paths[1].name = "a".into(), "path 'a' has two entries"),
        (|plan| plan.paths[1].dtype = Some("int8".into()), "the plan's dtype is int8: use f32, f16 or bf16"),
        (|plan| plan.paths[1].dtype = Some("bf16".into()), "the plan's paths differ in dtype (bf16 and f32)"),
    ];
    for (change, told) in cases {
        let mut plan = plan();
        change(&mut plan);
        let error = plan.validate(&[]).unwrap_err().to_string();
        assert!(error.starts_with(told), "{error}");
    }
    let mut mixed = plan();
    mixed.paths[1].dtype = Some("bf16".into());
    mixed.validate(&[Trait::Dtype]).unwrap();
    let machine = Machine { cpu: "here".into(), cores: 2 };
    assert_eq!(Outcome::new(&mixed, machine, "cpu".into(), String::new()).dtype, "bf16 and f32");
    assert!(toml::from_str::<Plan>(&format!("speed = 1\n{TEXT}")).is_err());
}

#[test]
fn a_sweep_goes_on_only_from_its_own_result() {
    let machine = |cpu: &str| Machine { cpu: cpu.into(), cores: 2 };
    let new = |plan: &Plan, cpu: &str| Outcome::new(plan, machine(cpu), "cpu".into(), "sweep x".into());
    let before = new(&plan(), "here");
    assert!(new(&plan(), "here").go_on(before.clone(), &[]).is_ok());
    let mut other = plan();
    other.tasks = 9;
    assert!(matches!(new(&other, "here").go_on(before.clone(), &[]), Err(Unlike::Plan)));
    assert!(matches!(new(&plan(), "there").go_on(before.clone(), &[]), Err(Unlike::Machine(_))));
    assert!(new(&plan(), "there").go_on(before.clone(), &[Trait::Machine]).is_ok());
    let mut older = before;
    older.version = "0.0.1".into();
    assert!(matches!(new(&plan(), "here").go_on(older, &[]), Err(Unlike::Version(_))));
}
