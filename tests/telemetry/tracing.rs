//! Spans, as a collector gets them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::process::{PROMPT, Process, generate, long, request};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.expect("a resource").attributes;
            assert!(attributes.iter().any(|attribute| attribute.key == "service.name"));
            self.0.lock().unwrap().extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let server = Server::builder().add_service(TraceServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        address
    }

    fn spans(&self) -> Vec<Span> {
        self.0.lock().unwrap().clone()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn number(span: &Span, key: &str) -> Option<i64> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == key)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        Value::IntValue(number) => Some(*number),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_its_spans_in_its_clients_trace() {
    let collector = Collector::default();
    let endpoint = format!("http://{}", collector.start().await);
    let mut process = Process::start(&["--otlp-endpoint", &endpoint]);
    let mut client = process.client();
    let mut traced = Request::new(long(20));
    let context = format!("00-{TRACE}-{PARENT}-01").parse().expect("ascii");
    traced.metadata_mut().insert("traceparent", context);
    crate::process::read(client.generate(traced).await.expect("it begins").into_inner()).await.expect("a text");
    let mut unsampled = Request::new(long(2));
    let context = format!("00-{}-{PARENT}-00", TRACE.replace('0', "f")).parse().expect("ascii");
    unsampled.metadata_mut().insert("traceparent", context);
    crate::process::read(client.generate(unsampled).await.expect("it begins").into_inner()).await.expect("a text");
    // One that says nothing of a trace, and one whose words are not one.
    generate(&mut client, request(PROMPT)).await.expect("a text");
    let mut garbled = Request::new(request(PROMPT));
    garbled.metadata_mut().insert("traceparent", "00-nothing-of-the-kind".parse().expect("ascii"));
    crate::process::read(client.generate(garbled).await.expect("it begins").into_inner()).await.expect("a text");
    // The last spans leave with the process.
    process.signal(libc::SIGTERM);
    assert_eq!(process.end().code(), Some(0));

    let spans = collector.spans();
    let calls: Vec<&Span> = spans.iter().filter(|span| span.name == "lacuna.v1.Generation/Generate").collect();
    assert_eq!(calls.len(), 3, "the one that its client does not sample has none");
    assert!(spans.iter().all(|span| !span.name.contains("health")), "health checks are not traced");
    let call = calls.iter().find(|span| hex(&span.trace_id) == TRACE).expect("in its client's trace");
    assert_eq!(hex(&call.parent_span_id), PARENT);
    assert_eq!(number(call, "rpc.grpc.status_code"), Some(0));
    assert_eq!(number(call, "lacuna.steps"), Some(20));
    assert_eq!(number(call, "gen_ai.usage.output_tokens"), Some(64));
    let parts: Vec<&Span> = spans.iter().filter(|span| span.parent_span_id == call.span_id).collect();
    let mut names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["decode", "queue"], "diffusion has no prefill of its own");
    for part in parts {
        assert_eq!(part.trace_id, call.trace_id);
        assert!(part.start_time_unix_nano <= part.end_time_unix_nano);
        assert!(call.start_time_unix_nano <= part.end_time_unix_nano && part.start_time_unix_nano <= call.end_time_unix_nano);
    }
    // Rounds 1, 2, 4, 8 and 16 of twenty, linked both ways.
    assert_eq!(call.links.len(), 5);
    for link in &call.links {
        let round = spans.iter().find(|span| span.span_id == link.span_id).expect("the round that is linked");
        assert_eq!((round.name.as_str(), &round.trace_id), ("round", &link.trace_id));
        assert!(round.links.iter().any(|back| back.span_id == call.span_id), "it links back");
    }
    let words = format!("{spans:?}");
    assert!(!words.contains("Return the sum"), "a prompt stands in a span");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_autoregressive_request_has_a_prefill() {
    let collector = Collector::default();
    let endpoint = format!("http://{}", collector.start().await);
    let mut process = Process::start(&["--model", "models/nano-ar", "--otlp-endpoint", &endpoint]);
    generate(&mut process.client(), request(PROMPT)).await.expect("a text");
    process.signal(libc::SIGTERM);
    assert_eq!(process.end().code(), Some(0));
    let spans = collector.spans();
    let call = spans.iter().find(|span| span.name.ends_with("/Generate")).expect("a span");
    let mut parts: Vec<&Span> = spans.iter().filter(|span| span.parent_span_id == call.span_id).collect();
    parts.sort_by_key(|part| part.start_time_unix_nano);
    assert_eq!(parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>(), ["queue", "prefill", "decode"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_collector_harms_nothing_and_is_told_once() {
    // Nobody listens there; the other one takes connections and says nothing for ever.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let silent = format!("http://{}", silent.local_addr().expect("an address"));
    for endpoint in ["http://127.0.0.1:9", &silent] {
        let mut process = Process::start(&["--otlp-endpoint", endpoint]);
        let mut client = process.client();
        for _ in 0..20 {
            generate(&mut client, request(PROMPT)).await.expect("a text");
        }
        let begun = Instant::now();
        process.signal(libc::SIGTERM);
        assert_eq!(process.end().code(), Some(0));
        println!("{endpoint}: ended after {:?}", begun.elapsed());
        assert!(begun.elapsed().as_secs() < 15, "{:?}", begun.elapsed());
        let told = process.log_text().matches("the collector takes no spans").count();
        assert!(told <= 1, "{}", process.log_text());
    }
}
