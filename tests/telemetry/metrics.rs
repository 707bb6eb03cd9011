//! A scrape says what was done, and nothing else.

use tonic::Code;

use crate::exposition::Scrape;
use crate::process::{PROMPT, Process, generate, long, request};

fn scrape(process: &Process) -> Scrape {
    let (status, text) = process.get("/metrics");
    assert_eq!(status, 200);
    Scrape::parse(&text)
}

const GENERATE: (&str, &str) = ("method", "lacuna.v1.Generation/Generate");

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_counts_what_was_asked() {
    let process =
        Process::start(&["--model", "models/nano", "--model", "models/nano-ar", "--max-resident", "2", "--queue", "1"]);
    // The warm-up has been counted by the engines, not as calls.
    let before = scrape(&process);
    assert_eq!(before.sum("lacuna_requests_total", &[GENERATE]), 0.0);
    assert_eq!(before.sum("lacuna_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);

    let mut client = process.client();
    for _ in 0..3 {
        generate(&mut client, request(PROMPT)).await.expect("a text");
    }
    generate(&mut client, long(6)).await.expect("a text");
    let causal = lacuna::service::proto::GenerateRequest { model: "nano-ar".into(), ..request(PROMPT) };
    generate(&mut client, causal).await.expect("a text");
    let mut unknown = request(PROMPT);
    unknown.model = "somebody-elses".into();
    assert_eq!(generate(&mut client, unknown).await.expect_err("no such model").code(), Code::NotFound);
    let mut bad = request(PROMPT);
    bad.stopping = Some(lacuna::service::proto::Stopping { max_new_tokens: Some(0), stop: vec![] });
    assert_eq!(generate(&mut client, bad).await.expect_err("no room").code(), Code::InvalidArgument);
    assert_eq!(process.get("/nowhere").0, 404);
    assert_eq!(process.ask("HEAD", "/").0, 200);

    let after = scrape(&process);
    let calls = |model, code| after.sum("lacuna_requests_total", &[GENERATE, ("model", model), ("code", code)]);
    assert_eq!((calls("nano", "OK"), calls("nano-ar", "OK")), (4.0, 1.0));
    assert_eq!((calls("", "NOT_FOUND"), calls("nano", "INVALID_ARGUMENT")), (1.0, 1.0));
    assert_eq!(after.sum("lacuna_requests_total", &[GENERATE]), 7.0);
    assert_eq!(after.sum("lacuna_request_seconds_count", &[GENERATE]), 7.0);
    assert_eq!(after.sum("lacuna_requests_inflight", &[GENERATE]), 0.0);
    assert_eq!(after.sum("lacuna_requests_total", &[("method", "other"), ("code", "404")]), 1.0);
    // A response without a body is a whole one.
    assert_eq!(after.sum("lacuna_requests_total", &[("method", "/"), ("code", "200")]), 1.0);
    assert!(!after.values("model").contains("somebody-elses"), "a stranger chose a label");

    let grown = |name: &str, labels: &[(&str, &str)]| after.sum(name, labels) - before.sum(name, labels);
    let (nano, causal) = ([("model", "nano"), ("decoder", "diffusion")], [("model", "nano-ar"), ("decoder", "autoregressive")]);
    for name in ["queue_seconds", "time_to_first_commit_seconds", "time_to_first_provisional_seconds", "decoding_seconds"] {
        let name = format!("lacuna_{name}_count");
        assert_eq!((grown(&name, &nano), grown(&name, &causal)), (4.0, 1.0), "{name}");
    }
    // What the log tells of the calls is what the counters add up to.
    process.until("every call is logged", || process.log_text().matches("\"message\":\"called\"").count() >= 7);
    let logged = |key: &str, model: &str| -> f64 {
        let entries = process.log().into_iter().map(|entry| entry["fields"].clone());
        let calls = entries.filter(|fields| fields["message"] == "called" && fields["model"] == model);
        calls.map(|fields| fields[key].as_f64().expect("a number")).sum()
    };
    for (model, labels) in [("nano", nano), ("nano-ar", causal)] {
        assert_eq!(grown("lacuna_prompt_tokens_total", &labels), logged("prompt_tokens", model));
        assert_eq!(grown("lacuna_output_tokens_total", &labels), logged("tokens", model));
        assert_eq!(grown("lacuna_request_output_tokens_sum", &labels), logged("tokens", model));
        assert_eq!(grown("lacuna_tokens_committed_per_step_count", &labels), logged("steps", model));
    }
    // The six steps of the long one, and at least one of each other: as many forwards, as nothing else ran beside them.
    assert!(grown("lacuna_forward_passes_total", &[("model", "nano"), ("phase", "denoise")]) >= 9.0);
    assert_eq!(
        grown("lacuna_forward_passes_total", &[("model", "nano")]),
        grown("lacuna_batch_size_sum", &[("model", "nano")])
    );
    assert_eq!(
        grown("lacuna_forward_seconds_count", &[("model", "nano")]),
        grown("lacuna_batch_size_count", &[("model", "nano")])
    );
    assert_eq!(grown("lacuna_spec_draft_tokens_total", &[("model", "nano")]), 0.0);
    assert!(after.sum("lacuna_kv_total_bytes", &[("model", "nano")]) > 0.0);
    assert_eq!(after.sum("lacuna_panics_total", &[]), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_and_cancelled_requests_are_counted_by_reason() {
    let process = Process::start(&["--max-resident", "1", "--queue", "1"]);
    let mut client = process.client();
    let running = client.generate(long(4096)).await.expect("it begins");
    let gauge = |name: &str| scrape(&process).sum(name, &[("model", "nano")]);
    process.until("one is resident", || gauge("lacuna_residents") == 1.0);
    assert!(gauge("lacuna_resident_tokens") > 0.0 && gauge("lacuna_kv_used_bytes") > 0.0);
    let waiting = client.generate(long(4096)).await.expect("it waits");
    process.until("one waits", || gauge("lacuna_queue_depth") == 1.0);
    assert!(gauge("lacuna_queue_tokens") >= 64.0);
    assert_eq!(scrape(&process).sum("lacuna_requests_inflight", &[GENERATE]), 2.0);
    let refused = client.generate(long(2)).await.expect_err("there is no room");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop((running, waiting));
    process.until("both are gone", || scrape(&process).sum("lacuna_cancelled_total", &[("reason", "client_left")]) == 2.0);
    let mut late = tonic::Request::new(long(4096));
    late.set_timeout(std::time::Duration::from_millis(300));
    let late = crate::process::read(client.generate(late).await.expect("it begins").into_inner()).await;
    assert_eq!(late.expect_err("there is no time").code(), Code::DeadlineExceeded);
    process.until("its time is over", || scrape(&process).sum("lacuna_cancelled_total", &[("reason", "deadline")]) == 1.0);
    let after = scrape(&process);
    assert_eq!(after.sum("lacuna_rejected_total", &[("reason", "queue_full")]), 1.0);
    let code = |code| after.sum("lacuna_requests_total", &[GENERATE, ("code", code)]);
    assert_eq!((code("RESOURCE_EXHAUSTED"), code("CANCELLED"), code("DEADLINE_EXCEEDED")), (1.0, 2.0, 1.0));
    assert_eq!(after.sum("lacuna_requests_inflight", &[GENERATE]), 0.0);
}
