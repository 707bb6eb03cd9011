//! Messages that are not what the API says: the client is told that the fault is its own.

use lacuna::service::proto::GenerateEvent;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::harness::{PROMPT, TestServer, generate, request, server};

/// Encodes to a GenerateRequest whose text is not UTF-8.
#[derive(Clone, PartialEq, prost::Message)]
struct BadText {
    #[prost(bytes = "vec", tag = "3")]
    text: Vec<u8>,
}

/// Encodes to a GenerateRequest whose `sampling` is a number.
#[derive(Clone, PartialEq, prost::Message)]
struct BadType {
    #[prost(uint64, tag = "8")]
    sampling: u64,
}

/// Encodes to a GenerateRequest whose `sampling` ends too early.
#[derive(Clone, PartialEq, prost::Message)]
struct Truncated {
    #[prost(bytes = "vec", tag = "8")]
    sampling: Vec<u8>,
}

async fn send<M: prost::Message + 'static>(server: &TestServer, message: M) -> Status {
    let mut client = Grpc::new(server.channel().await);
    client.ready().await.expect("it is connected");
    let path = PathAndQuery::from_static("/lacuna.v1.Generation/Generate");
    let codec: ProstCodec<M, GenerateEvent> = ProstCodec::default();
    client.server_streaming(Request::new(message), path, codec).await.expect_err("this cannot be read")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_message_is_an_invalid_argument() {
    let server = server().await;
    let statuses = [
        send(&server, BadText { text: vec![0xff, 0xfe] }).await,
        send(&server, BadType { sampling: 3 }).await,
        send(&server, Truncated { sampling: vec![0x09, 0x01] }).await,
    ];
    for status in statuses {
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(!status.details().is_empty());
    }
    generate(&mut server.client().await, request(PROMPT)).await.expect("a good request still works");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_exhausts() {
    let server = server().await;
    let mut client = server.client().await;
    let status = client.generate(request(&"x".repeat(5 << 20))).await.expect_err("5 MiB are too much");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    generate(&mut client, request(PROMPT)).await.expect("a good request still works");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_deadline_is_refused() {
    let server = server().await;
    let mut asked = Request::new(request(PROMPT));
    asked.metadata_mut().insert("grpc-timeout", "soon".parse().expect("ascii"));
    let status = server.client().await.generate(asked).await.expect_err("that is no time");
    crate::harness::assert_refused(&status, Code::InvalidArgument, Some("grpc-timeout"));
}
