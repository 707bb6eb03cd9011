use super::*;

fn read_text(text: &str) -> Result<Source, Unreadable> {
    parse("folder/x.json", "x.json".into(), text.as_bytes())
}

/// The results that are committed, by their names.
fn committed(name: &str) -> Source {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results/cpu-2-threads");
    read(&folder.join(name)).unwrap()
}

const EVALUATION: &str = r#"{"suite": "nano", "tasks": 10, "passed": 9, "pass_at_1": 0.9, "generated_tokens": 100,
    "forwards": {"prefill": 10, "denoise": 40, "draft": 7}, "tokens_per_forward": 2.0, "decoding_seconds": 1.0, "tokens_per_second": 100.0,
    "model": "nano", "dtype": "f32", "device": "cpu", "threads": 2, "tasks_seed": 7,
    "command": "eval nano --json --steps 8 --cache dual"}"#;

#[test]
fn an_evaluation_is_one_point() {
    let source = read_text(EVALUATION).unwrap();
    assert_eq!((source.kind, source.file.as_str()), (Kind::Evaluation, "x.json"));
    let about = &source.about;
    assert_eq!(
        (about.dtype.as_deref(), about.device.as_deref(), about.threads, about.seed()),
        (Some("f32"), Some("cpu"), Some(2), Some(7))
    );
    let [point] = source.points.as_slice() else { panic!("{:?}", source.points) };
    assert_eq!((point.path.as_str(), point.setting.as_str(), point.in_flight), ("nano, cache dual", "steps 8", Some(1)));
    // A drafter's forwards are not the model's.
    assert_eq!((point.forwards, point.share()), (Some(50), Some(0.9)));
    assert_eq!(point.tokens_per_second, Some(Spread::one(100.0)));
    assert_eq!(about.suite().as_deref(), Some("nano"));
    // Several texts a task: the interval is the file's.
    let sampled = EVALUATION.replace("\"tasks\": 10", "\"tasks\": 5, \"samples\": 2, \"form\": \"chat\", \"pass_at\": [{\"k\": 1, \"value\": 0.9, \"low\": 0.7, \"high\": 1}]");
    let source = read_text(&sampled).unwrap();
    assert_eq!((source.points[0].share(), source.points[0].interval), (Some(0.9), Some((0.7, 1.0))));
    assert_eq!(source.about.suite().as_deref(), Some("nano, chat"));
    // With others in flight the clock on the wall counts.
    let wall = EVALUATION.replace("\"tasks\": 10", "\"tasks\": 10, \"concurrency\": 4, \"wall_tokens_per_second\": 300.0");
    let point = &read_text(&wall).unwrap().points[0];
    assert_eq!((point.in_flight, point.tokens_per_second), (Some(4), Some(Spread::one(300.0))));
}

#[test]
fn drafts_and_peers_and_steps() {
    let source = committed("speculate-nano-ar-f32.json");
    let settings: Vec<_> = source.points.iter().map(|point| point.setting.as_str()).collect();
    assert_eq!((source.kind, settings), (Kind::Speculation, vec!["plain", "chain", "lookup", "medusa", "redrafter"]));
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/cpu-2-threads/speculate-nano-ar-f32.json");
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let shares: Vec<f64> = serde_json::from_value(value["redrafter"]["acceptance_by_position"].clone()).unwrap();
    assert!(shares.len() > 1 && source.points[4].acceptance == shares, "{:?}", source.points[4].acceptance);
    assert_eq!((source.points[4].same_text, source.points[0].costs.len()), (Some((24, 24)), 9));

    let source = committed("compare-pytorch-smollm2-shape.json");
    let named: Vec<_> =
        source.points.iter().map(|point| (point.path.as_str(), point.measured.as_ref().unwrap().1.median)).collect();
    assert_eq!(named, [("lacuna step", 63.043), ("pytorch forward and head", 68.084)]);
    assert_eq!(source.points[0].ratio, Some(Spread { median: 0.9396, min: 0.9143, max: 1.2352 }));

    let source = committed("step-smollm2-shape-bf16.json");
    let point = &source.points[0];
    assert_eq!(
        (point.model.as_str(), point.setting.as_str(), point.in_flight),
        ("smollm2-135m", "prompt 64, canvas 64", Some(1))
    );
    let parts: Vec<_> = point.parts.iter().map(|(part, _)| *part).collect();
    assert_eq!(parts, ["forward", "head", "selection", "events"]);

    let source = committed("step-grid-smollm2-shape-bf16.json");
    let point = &source.points[1];
    assert_eq!((source.kind, source.points.len(), point.model.as_str()), (Kind::Grid, 12, "smollm2-135m"));
    assert_eq!((point.setting.as_str(), point.in_flight), ("window 4, prefix 256", Some(1)));
    let ((floor, bound), total) = (point.floor.clone().unwrap(), point.total.unwrap().median);
    assert!(bound == "memory" && floor > 0.0 && total > floor && point.outside.is_some(), "{floor} by {bound}, {total}");
}

#[test]
fn a_load_is_a_point_for_each_lane() {
    let spread = r#"{"count": 5, "mean": 4, "p50": 3, "p90": 7, "p99": 9, "max": 9}"#;
    let counts = r#"{"sent": 5, "finished": 5, "cancelled": 0, "rejected": 0, "failed": 0, "failed_by_code": {}, "unsent": 0}"#;
    let lane = |name: &str| {
        format!(
            r#"{{"lane": "{name}", "window_seconds": 1, "tokens_per_second": 120, "tokens_per_second_by_round": [100, 140],
            "requests_per_second": 5, "goodput_per_second": null, "counted": {counts}, "all": {counts}, "straddling": 0,
            "latency_ms": {{"first_provisional": null, "first_committed": {spread}, "between_commits": null, "total": {spread}}},
            "queue_ms": null, "send_delay_ms": null, "prompt_tokens": 5, "generated_tokens": 100,
            "forwards": {{"prefill": 5, "denoise": 0, "cache_store": 0, "decode": 45, "verify": 0, "draft": 9}}, "notes": []}}"#
        )
    };
    let text = format!(
        r#"{{"target": "h:1", "model": "nano-ar", "parameters": 1, "dtype": "f32", "device": "cpu", "threads": 2, "resident_max": 16,
        "queued_max": 64, "method": "autoregressive", "drafter": "redrafter", "settings": {{}}, "prompts": "nano", "prompts_count": 24,
        "prompts_seed": 7, "max_new_tokens": null, "events": false, "cancel_share": 0, "limits": {{"first_committed_ms": null, "total_ms": null}},
        "seed": 1, "connections": 1, "client_threads": 1, "client_version": "0", "command": "bench serve --target h:1 --threshold 0.9",
        "lanes": [{}, {}]}}"#,
        lane("concurrency 4"),
        lane("rate 20")
    );
    let source = read_text(&text).unwrap();
    assert_eq!((source.kind, source.points.len()), (Kind::Load, 2));
    let point = &source.points[0];
    assert_eq!((point.path.as_str(), point.in_flight), ("nano-ar, autoregressive, drafter redrafter", Some(4)));
    assert_eq!((point.setting.as_str(), source.about.seed()), ("threshold 0.9", Some(7)));
    assert_eq!(point.tokens_per_second, Some(Spread { median: 120.0, min: 100.0, max: 140.0 }));
    assert_eq!((point.first_ms, point.tokens_per_forward), (Some((3.0, 7.0)), Some(2.0)));
    assert_eq!((source.points[1].in_flight, source.points[1].setting.as_str()), (None, "rate 20"));
}

#[test]
fn texts_of_others_and_likelihoods() {
    let source = committed("eval-humaneval-smollm2-transformers.json");
    let point = &source.points[0];
    assert_eq!(
        (source.kind, point.path.as_str(), point.passed, point.tokens_per_second),
        (Kind::Evaluation, "transformers 5.23.0", Some(12), None)
    );
    assert_eq!((source.about.suite().as_deref(), source.about.commands.len()), (Some("humaneval, chat"), 2));

    let source = committed("likelihood-smollm2-f32.json");
    let programs: Vec<_> = source.points.iter().map(|point| (point.path.as_str(), point.tokens)).collect();
    assert_eq!((source.kind, programs), (Kind::Likelihood, vec![("lacuna", Some(2232)), ("transformers", Some(2232))]));
    let bound = r#"{"model": "nano", "kind": "bound", "tokens": 100, "perplexity": 20, "standard_error": 5, "bits_per_byte": 1, "command": "eval likelihood x"}"#;
    let source = read_text(bound).unwrap();
    assert_eq!((source.points[0].perplexity, source.points[0].setting.as_str()), (Some((20.0, Some(1.0))), "bound"));
    assert_eq!(source.about.commands, ["eval likelihood x"]);
}

#[test]
fn what_is_no_result_is_refused_by_what_is_wrong() {
    let cases = [
        ("{", "folder/x.json is not JSON ("),
        ("[1]", "folder/x.json has the fields of no result that a report knows: name one of 'lacuna eval --json'"),
        (r#"{"text": "def", "usage": {}}"#, "folder/x.json has the fields of no result"),
        (
            r#"{"suite": "nano", "pass_at_1": 1}"#,
            "folder/x.json seems to be a result of 'lacuna eval', but missing field `model`",
        ),
    ];
    for (text, told) in cases {
        let error = read_text(text).unwrap_err().to_string();
        assert!(error.starts_with(told), "{error}");
    }
    let wrong = EVALUATION.replace("\"passed\": 9", "\"passed\": \"nine\"");
    let error = read_text(&wrong).unwrap_err().to_string();
    assert!(error.contains("invalid type: string \"nine\", expected u64: measure anew"), "{error}");
    let error = read(Path::new("no/such.json")).unwrap_err().to_string();
    assert!(error.starts_with("cannot read no/such.json: No such file"), "{error}");
}
