//! gRPC-web: what a browser does with the published API, over HTTP/1.1 and the page's port.

use http::Method;
use lacuna::service::ServeOptions;
use lacuna::service::proto::generate_event::Event;
use lacuna::service::proto::{GenerateEvent, GenerateRequest, ListModelsRequest, ListModelsResponse, Stopping};
use prost::Message;
use tonic::Code;

use crate::client::{Answer, Client, TASK};
use crate::harness::{generate, request, server};

const GENERATE: &str = "/lacuna.v1.Generation/Generate";
const WEB: [(&str, &str); 2] = [("content-type", "application/grpc-web+proto"), ("x-grpc-web", "1")];

fn framed(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    [&[0][..], &(body.len() as u32).to_be_bytes(), &body].concat()
}

/// Messages, and the trailers, which gRPC-web sends as a last frame.
fn frames(mut body: &[u8]) -> (Vec<&[u8]>, String) {
    let mut messages = vec![];
    while let [flags, a, b, c, d, rest @ ..] = body {
        let (frame, rest) = rest.split_at(u32::from_be_bytes([*a, *b, *c, *d]) as usize);
        if flags & 0x80 != 0 {
            assert!(rest.is_empty(), "something follows the trailers");
            return (messages, String::from_utf8(frame.to_vec()).expect("trailers are text"));
        }
        messages.push(frame);
        body = rest;
    }
    (messages, String::new())
}

/// The status, which stands in the header where there is no message.
fn status(answer: &Answer) -> Code {
    let trailers = frames(&answer.body).1;
    let line = trailers.lines().find_map(|line| line.strip_prefix("grpc-status:")).map(str::trim);
    let code = line.or(answer.header("grpc-status")).unwrap_or_else(|| panic!("no status: {answer:?}"));
    Code::from(code.parse::<i32>().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_and_list() {
    let server = server().await;
    server.serving().await;
    let client = Client::new(&server);
    let asked = GenerateRequest { stopping: Some(Stopping { max_new_tokens: Some(24), stop: vec![] }), ..request(TASK) };
    let expected = generate(&mut server.client().await, asked.clone()).await.expect("it generates");
    let answer = client.ask(Method::POST, GENERATE, &WEB, framed(&asked)).await;
    assert_eq!((answer.status.as_u16(), status(&answer)), (200, Code::Ok));
    let events: Vec<Event> = frames(&answer.body)
        .0
        .into_iter()
        .map(|frame| GenerateEvent::decode(frame).expect("an event").event.expect("one that is known"))
        .collect();
    let text =
        events.iter().filter_map(|event| if let Event::Committed(found) = event { Some(found.text.as_str()) } else { None });
    assert_eq!(text.collect::<String>(), expected.text());
    assert!(matches!((&events[0], events.last()), (Event::Started(_), Some(Event::Finished(_)))));
    assert!(events.iter().any(|event| matches!(event, Event::Step(_))));
    let list = client.ask(Method::POST, "/lacuna.v1.Models/List", &WEB, framed(&ListModelsRequest {})).await;
    let models = ListModelsResponse::decode(frames(&list.body).0[0]).expect("a list");
    assert_eq!(models.models[0].name, "nano");
    let descriptors = client.get("/lacuna.v1.descriptors").await;
    assert_eq!(descriptors.body, lacuna::service::proto::DESCRIPTORS);
    assert_eq!(descriptors.header("content-type"), Some("application/octet-stream"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_is_told_in_grpc() {
    let options = ServeOptions { message_bytes_max: 1000, ..ServeOptions::default() };
    let server = crate::harness::start(crate::client::LIMITS, options).await;
    let client = Client::new(&server);
    let none = GenerateRequest { model: "gpt".into(), ..request(TASK) };
    let big = request(&"x".repeat(2000));
    for (path, body, code) in [
        (GENERATE, framed(&none), Code::NotFound),
        (GENERATE, framed(&GenerateRequest::default()), Code::InvalidArgument),
        (GENERATE, framed(&big), Code::ResourceExhausted),
        (GENERATE, b"\0\0\0\0\x02\xff\xff".to_vec(), Code::InvalidArgument),
        ("/lacuna.v1.Generation/Nothing", vec![0; 5], Code::Unimplemented),
        ("/nowhere", vec![0; 5], Code::Unimplemented),
    ] {
        let answer = client.ask(Method::POST, path, &WEB, body).await;
        assert_eq!(status(&answer), code, "{path}: {answer:?}");
    }
    // The deadline is the same layer's.
    let late = [WEB[0], ("grpc-timeout", "soon")];
    let answer = client.ask(Method::POST, GENERATE, &late, framed(&request(TASK))).await;
    assert_eq!(status(&answer), Code::InvalidArgument);
}
