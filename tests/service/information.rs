//! What the server tells of itself: its models, its tokenizer, its API.

use std::time::Duration;

use lacuna::engine::Limits;
use lacuna::service::ServeOptions;
use lacuna::service::proto::models_client::ModelsClient;
use lacuna::service::proto::tokenization_client::TokenizationClient;
use lacuna::service::proto::{DetokenizeRequest, GetModelRequest, ListModelsRequest, Model, Processor, TokenizeRequest};
use tonic::Code;

use crate::harness::{assert_refused, server, start};

#[tokio::test(flavor = "multi_thread")]
async fn models_are_described() {
    let server = server().await;
    // Until then the load that is told changes from call to call.
    server.serving().await;
    let mut client = ModelsClient::new(server.channel().await);
    let list = client.list(ListModelsRequest {}).await.expect("a list").into_inner();
    let [model] = list.models.as_slice() else { panic!("one model is served") };
    assert_eq!((model.name.as_str(), model.family.as_str()), ("nano", "llada"));
    assert_eq!((model.dtype.as_str(), model.device.as_str()), ("f32", "cpu"));
    let processor = model.processor.as_ref().expect("it runs on something");
    assert!(!processor.name.is_empty() && processor.memory_bytes >= processor.memory_free_bytes, "{processor:?}");
    assert_eq!((&processor.compute_capability, &processor.cuda_driver), (&None, &None), "a CPU has neither");
    assert_eq!((model.resident_max, model.queued_max), (4, 16));
    assert_eq!(model.weight_bytes, model.parameters * 4);
    let capabilities = model.capabilities.expect("capabilities");
    assert!(capabilities.diffusion && capabilities.infill && capabilities.chat && !capabilities.autoregressive);
    assert!(list.limits.expect("limits").message_bytes_max > 0);
    // What other programs leave free differs from call to call.
    let settled = |model: &Model| {
        let processor = model.processor.clone().map(|processor| Processor { memory_free_bytes: None, ..processor });
        Model { processor, ..model.clone() }
    };
    for name in ["", "nano"] {
        let one = client.get(GetModelRequest { name: name.into() }).await.expect("it is there").into_inner();
        assert_eq!(one.model.as_ref().map(settled), Some(settled(model)));
    }
    let status = client.get(GetModelRequest { name: "gpt".into() }).await.expect_err("it is not there");
    assert_refused(&status, Code::NotFound, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_limit_is_told_as_it_is_in_force() {
    let options = ServeOptions {
        message_bytes_max: 1 << 20,
        connections_max: 7,
        streams_per_connection_max: 5,
        request_time_max: Duration::from_secs(11),
        drain_timeout: Duration::from_millis(2500),
        ..ServeOptions::default()
    };
    let server = start(Limits { resident: 4, queued: 16, ..Limits::default() }, options).await;
    let mut client = ModelsClient::new(server.channel().await);
    let limits = client.list(ListModelsRequest {}).await.expect("a list").into_inner().limits.expect("limits");
    assert_eq!((limits.message_bytes_max, limits.connections_max, limits.streams_per_connection_max), (1 << 20, 7, 5));
    assert_eq!((limits.request_seconds_max, limits.drain_seconds, limits.choices_max), (11.0, 2.5, 16));
    // Every field of the message has a value: what is not filled in is 0.
    let told = format!("{limits:?}");
    assert!(told.matches(": ").count() >= 27 && !told.contains(": 0,") && !told.contains(": 0.0,"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_text_and_text_is_tokens() {
    let server = server().await;
    let mut client = TokenizationClient::new(server.channel().await);
    let text = "def add(a, b):\n    return a + b\n";
    let asked = TokenizeRequest { text: text.into(), ..TokenizeRequest::default() };
    let tokens = client.tokenize(asked).await.expect("tokens").into_inner().tokens;
    assert!(tokens.len() > 1);
    assert_eq!(tokens.iter().map(|token| token.text.as_str()).collect::<String>(), text);
    let ids = tokens.iter().map(|token| token.token_id).collect();
    let back = DetokenizeRequest { token_ids: ids, ..DetokenizeRequest::default() };
    assert_eq!(client.detokenize(back).await.expect("a text").into_inner().text, text);
    let outside = DetokenizeRequest { token_ids: vec![u32::MAX], ..DetokenizeRequest::default() };
    let status = client.detokenize(outside).await.expect_err("there is no such token");
    assert_refused(&status, Code::InvalidArgument, Some("token_ids"));
    let long = TokenizeRequest { text: "x".repeat((1 << 20) + 1), ..TokenizeRequest::default() };
    let status = client.tokenize(long).await.expect_err("it is too long");
    assert_refused(&status, Code::InvalidArgument, Some("text"));
}

/// The two versions of the protocol differ in their package only.
macro_rules! reflection {
    ($test:ident, $version:ident) => {
        #[tokio::test(flavor = "multi_thread")]
        async fn $test() {
            use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
            use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;
            use tonic_reflection::pb::$version::{ServerReflectionRequest, ServerReflectionResponse};

            let server = server().await;
            let mut client = ServerReflectionClient::new(server.channel().await);
            let ask = |message| ServerReflectionRequest { host: String::new(), message_request: Some(message) };
            let asked = tokio_stream::iter([
                ask(MessageRequest::ListServices(String::new())),
                ask(MessageRequest::FileContainingSymbol("lacuna.v1.Generation".into())),
            ]);
            let mut answers = client.server_reflection_info(asked).await.expect("reflection").into_inner();
            let mut answer = async || -> Option<ServerReflectionResponse> { answers.message().await.expect("an answer") };
            let Some(Some(MessageResponse::ListServicesResponse(list))) = answer().await.map(|a| a.message_response) else {
                panic!("no list of services")
            };
            let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
            for name in ["lacuna.v1.Generation", "lacuna.v1.Models", "lacuna.v1.Tokenization", "grpc.health.v1.Health"] {
                assert!(names.contains(&name), "{name} is not in {names:?}");
            }
            let file = answer().await.map(|a| a.message_response);
            assert!(matches!(file, Some(Some(MessageResponse::FileDescriptorResponse(_)))), "{file:?}");
        }
    };
}

reflection!(reflection_v1_knows_the_services, v1);
reflection!(reflection_v1alpha_knows_the_services, v1alpha);
