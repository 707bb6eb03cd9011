//! The log is JSON where it should be, names every request, and keeps what people wrote to itself.

use lacuna::service::proto::GenerateRequest;
use tonic::Code;

use crate::process::{Process, generate, request};

const SECRET: &str = "the-cat-sleeps-at-noon";

async fn ask(process: &Process) {
    let asked = GenerateRequest { request_id: Some("mine:1".into()), ..request(&format!("# {SECRET}\n")) };
    generate(&mut process.client(), asked).await.expect("a text");
    // A refusal that quotes the client is the client's alone.
    let asked = GenerateRequest { request_id: Some("mine:2".into()), model: SECRET.into(), ..request(SECRET) };
    assert_eq!(generate(&mut process.client(), asked).await.expect_err("no such model").code(), Code::NotFound);
    process.until("both are logged", || process.called("mine:1").is_some() && process.called("mine:2").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_is_logged_once_by_its_name_and_without_its_words() {
    let process = Process::start_with(&[], "lacuna=trace,info");
    ask(&process).await;
    let (first, second) = (process.called("mine:1").expect("logged"), process.called("mine:2").expect("logged"));
    assert_eq!(
        (&first["code"], &first["model"], &first["method"]),
        (&"OK".into(), &"nano".into(), &"lacuna.v1.Generation/Generate".into())
    );
    assert!(first["steps"].as_u64() > Some(0) && first["prompt_tokens"].as_u64() > Some(0), "{first}");
    assert_eq!(second["code"], "NOT_FOUND");
    // A call that does not say its name gets one, which its client is told.
    let response = process.client().generate(request("x = ")).await.expect("it begins");
    let id = response.metadata().get("x-request-id").and_then(|id| id.to_str().ok()).expect("an id").to_owned();
    crate::process::read(response.into_inner()).await.expect("a text");
    process.until("it is logged", || process.called(&id).is_some());
    assert!(!process.log_text().contains(SECRET), "{}", process.log_text());
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_logged_where_that_is_asked_for() {
    let process = Process::start(&["--log-prompts"]);
    ask(&process).await;
    let asked = process.log().into_iter().find(|entry| entry["fields"]["message"] == "asked").expect("it is logged");
    assert_eq!(asked["fields"]["request"], "mine:1");
    assert!(asked["fields"]["prompt"].as_str().is_some_and(|prompt| prompt.contains(SECRET)), "{asked}");
}
