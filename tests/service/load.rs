//! `lacuna bench serve`, the real binary, against a server in this process; and `bench compare` on what it prints.

use std::process::{Command, Output};

use lacuna::engine::Limits;
use lacuna::service::ServeOptions;
use serde_json::Value;

use crate::harness::{TestServer, server, start};

async fn lacuna(arguments: Vec<String>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    command.args(arguments).env_remove("RUST_LOG").current_dir(env!("CARGO_MANIFEST_DIR"));
    let run = tokio::task::spawn_blocking(move || command.output().expect("the binary starts"));
    run.await.expect("no panic")
}

/// The command's words; none of them has a blank in it.
async fn bench(server: &TestServer, flags: &str) -> Output {
    let command = format!("bench serve --target {} {flags}", server.address);
    lacuna(command.split_whitespace().map(str::to_owned).collect()).await
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

async fn measured(server: &TestServer, flags: &str) -> Value {
    let output = bench(server, &format!("{flags} --json")).await;
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{flags}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn count(lane: &Value, which: &str, name: &str) -> u64 {
    lane[which][name].as_u64().unwrap_or_else(|| panic!("{which} has no {name}: {lane}"))
}

/// Whatever was sent has ended in one way.
fn assert_adds_up(lane: &Value) {
    for which in ["counted", "all"] {
        let ways = ["finished", "cancelled", "rejected", "failed"].map(|name| count(lane, which, name));
        assert_eq!(ways.iter().sum::<u64>(), count(lane, which, "sent"), "{lane}");
        let codes = lane[which]["failed_by_code"].as_object().expect("codes");
        assert_eq!(codes.values().filter_map(Value::as_u64).sum::<u64>(), count(lane, which, "failed"), "{lane}");
    }
    assert!(count(lane, "counted", "sent") <= count(lane, "all", "sent"), "{lane}");
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_loops_are_measured_and_compared() {
    let server = server().await;
    server.serving().await;
    let flags = "--concurrency 1,4 --rounds 2 --requests 6 --warm-up 2 --count 5 --max-new-tokens 16 --threshold 0.9 --events \
                 --connections 2 --client-threads 2 --ttfc-limit-ms 600000 --seed 3";
    let report = measured(&server, flags).await;
    for (field, wanted) in
        [("model", "nano"), ("dtype", "f32"), ("device", "cpu"), ("method", "diffusion"), ("prompts", "nano")]
    {
        assert_eq!(report[field], wanted, "{report}");
    }
    assert_eq!((&report["settings"]["threshold"], &report["seed"]), (&0.9.into(), &3.into()), "{report}");
    let lanes = report["lanes"].as_array().expect("lanes");
    assert_eq!([&lanes[0]["lane"], &lanes[1]["lane"]], ["concurrency 1", "concurrency 4"]);
    for lane in lanes {
        assert_adds_up(lane);
        assert_eq!((count(lane, "counted", "finished"), count(lane, "counted", "sent")), (12, 12), "{lane}");
        assert!(count(lane, "all", "sent") >= 2 * (2 + 6), "{lane}");
        let latency = &lane["latency_ms"];
        for (time, times) in [("total", 12), ("first_provisional", 12)] {
            assert_eq!(latency[time]["count"], times, "{time}: {lane}");
            let [p50, p90, p99, max] = ["p50", "p90", "p99", "max"].map(|part| latency[time][part].as_f64().expect("a time"));
            assert!(0.0 < p50 && p50 <= p90 && p90 <= p99 && p99 <= max, "{time}: {lane}");
        }
        assert!(latency["first_committed"]["p50"].as_f64() <= latency["total"]["max"].as_f64(), "{lane}");
        assert_eq!((&lane["queue_ms"]["count"], &lane["send_delay_ms"]["count"]), (&12.into(), &12.into()), "{lane}");
        assert!(lane["generated_tokens"].as_u64() > Some(0) && lane["prompt_tokens"].as_u64() > Some(0), "{lane}");
        assert!(lane["forwards"]["denoise"].as_u64() >= Some(12) && lane["forwards"]["decode"] == 0, "{lane}");
        assert!(lane["tokens_per_second"].as_f64() > Some(0.0), "{lane}");
        assert_eq!(lane["goodput_per_second"], lane["requests_per_second"], "every request keeps such a limit: {lane}");
        assert_eq!(lane["tokens_per_second_by_round"].as_array().map(Vec::len), Some(2), "{lane}");
    }

    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, report: &Value| {
        let path = folder.path().join(name).display().to_string();
        std::fs::write(&path, report.to_string()).expect("a file");
        path
    };
    let mut other = report.clone();
    other["dtype"] = "bf16".into();
    let (a, b, none) = (write("a.json", &report), write("b.json", &other), write("none.json", &Value::Null));
    let compare = |files: &[&str]| lacuna([&["bench", "compare"], files].concat().iter().map(|word| (*word).into()).collect());
    let same = compare(&[&a, &a]).await;
    let table = text(&same.stdout);
    assert!(same.status.success() && table.lines().filter(|line| line.ends_with(" 1.00")).count() > 10, "{table}");
    let refused = compare(&[&a, &b]).await;
    assert_eq!((refused.status.code(), text(&refused.stdout)), (Some(1), ""));
    let told = text(&refused.stderr);
    assert_eq!(
        told.trim_end(),
        "error: the results differ in dtype (f32 and bf16): measure both alike, or compare them with --anyway"
    );
    let anyway = compare(&[&a, &b, "--anyway"]).await;
    assert!(text(&anyway.stdout).starts_with("dtype: f32 and bf16\n"), "{anyway:?}");
    let told = compare(&[&a, &none]).await;
    assert!(text(&told.stderr).contains("none.json is no result of a load"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_loop_sends_what_is_due_or_says_that_it_did_not() {
    let server = server().await;
    server.serving().await;
    let common = "--max-new-tokens 8 --steps 4 --warm-up 2 --requests 10 --count 4";
    let report = measured(&server, &format!("{common} --rate 20")).await;
    let lane = &report["lanes"][0];
    assert_adds_up(lane);
    assert_eq!((&lane["lane"], count(lane, "all", "finished")), (&"rate 20".into(), 12), "{lane}");
    assert_eq!(lane["latency_ms"]["first_provisional"], Value::Null, "no steps were asked for: {lane}");

    let report = measured(&server, &format!("{common} --rate 5000 --max-in-flight 1")).await;
    let lane = &report["lanes"][0];
    assert_adds_up(lane);
    let unsent = count(lane, "all", "unsent");
    assert!(unsent > 0 && count(lane, "counted", "unsent") <= unsent, "{lane}");
    assert_eq!(count(lane, "all", "sent") + unsent, 12, "{lane}");
    assert!(lane["notes"].to_string().contains("were due and not sent"), "{lane}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_cancelled_or_given_up() {
    let server = server().await;
    server.serving().await;
    // As many steps as cells, so that there is time within a request.
    let flags =
        "--max-new-tokens 32 --steps 32 --no-finish-early --suppress-end --count 2 --concurrency 2 --warm-up 2 --requests 8";
    let report = measured(&server, &format!("{flags} --cancel-share 1")).await;
    let lane = &report["lanes"][0];
    assert_adds_up(lane);
    assert!(count(lane, "counted", "cancelled") > 0, "{lane}");
    assert!(count(lane, "all", "finished") >= 2, "the warm-up is left alone: {lane}");
    // Whatever was cancelled has left its place.
    server.idle().await;
    let report = measured(&server, flags).await;
    assert_eq!(count(&report["lanes"][0], "all", "cancelled"), 0, "{report}");
    let report = measured(&server, &format!("{flags} --timeout 0.002")).await;
    let lane = &report["lanes"][0];
    assert_adds_up(lane);
    assert_eq!(lane["counted"]["failed_by_code"], serde_json::json!({ "DEADLINE_EXCEEDED": 8 }), "{lane}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_shows_as_rejected() {
    let server = start(Limits { resident: 1, queued: 1, ..Limits::default() }, ServeOptions::default()).await;
    server.serving().await;
    let flags = "--max-new-tokens 32 --steps 32 --no-finish-early --suppress-end --count 1";
    let report = measured(&server, &format!("{flags} --concurrency 8 --warm-up 0 --requests 8")).await;
    let lane = &report["lanes"][0];
    assert_adds_up(lane);
    assert!(count(lane, "counted", "rejected") > 0 && count(lane, "all", "finished") > 0, "{lane}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_cannot_be_is_refused() {
    let server = server().await;
    server.serving().await;
    for (flags, code, told) in [
        ("--method autoregressive", 1, "the server refused or failed: "),
        ("--rate 100000 --duration 3600", 1, "use a lower --rate"),
        ("--rate 0", 2, "use a number from 0.001"),
        ("--rate 1 --concurrency 1", 2, "cannot be used with"),
        ("--cancel-share 2", 2, "use a number from 0 to 1"),
        ("--requests 5 --duration 5", 2, "cannot be used with"),
        ("--prompts no/such.jsonl", 1, "cannot read no/such.jsonl"),
    ] {
        let output = bench(&server, flags).await;
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(code), ""), "{flags}");
        let message = text(&output.stderr);
        assert!(message.starts_with("error: ") && message.contains(told), "{flags}: {message}");
    }
    let gone = ["bench", "serve", "--target", "127.0.0.1:1"].map(str::to_owned).to_vec();
    assert!(text(&lacuna(gone).await.stderr).contains("no server answers on 127.0.0.1:1"));
}
