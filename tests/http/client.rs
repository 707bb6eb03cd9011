//! A client of plain HTTP: one request at a time, answers whole or event by event.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use lacuna::checkpoint::Checkpoint;
use lacuna::draft::Drafters;
use lacuna::engine::request::ModelInfo;
use lacuna::engine::{Engine, Limits};
use lacuna::service::{ServeOptions, Served};
use lacuna::tensor::Placement;
use serde_json::{Value, json};

use crate::harness::{PATIENCE, TestServer, engine, serve_models};

pub const TASK: &str = "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n";
pub const LIMITS: Limits = Limits { resident: 4, queued: 16, tokens: None, queued_tokens: None, prefix_tokens: None };

/// A server of the pair that ships, warm.
pub async fn pair() -> TestServer {
    let (info, engine) = engine(LIMITS);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-ar");
    let checkpoint = Checkpoint::open(&folder).expect("the model opens");
    let network = checkpoint.load(Placement::CPU_F32, 4096, &mut |_| {}).expect("the model loads");
    let drafters = Drafters::load(&folder.join("drafters"), network.config(), Placement::CPU_F32).expect("drafters");
    let causal = ModelInfo::new(checkpoint, &network, drafters.infos());
    let causal_engine = Engine::start(network, drafters, causal.tokenizer.clone(), LIMITS).expect("the engine starts");
    let models = vec![Served { info, engine }, Served { info: Arc::new(causal), engine: causal_engine }];
    let server = serve_models(models, ServeOptions::default()).await;
    server.serving().await;
    server
}

pub struct Client {
    pool: Pool<HttpConnector, Full<Bytes>>,
    address: SocketAddr,
}

/// An answer that has been read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    async fn read(response: Response<Incoming>) -> hyper::Result<Self> {
        let (head, body) = response.into_parts();
        Ok(Self { status: head.status, headers: head.headers, body: body.collect().await?.to_bytes().to_vec() })
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("a header is text"))
    }
}

/// One connection and no other: a pool opens a second where the first is not back from its last answer yet.
pub struct Connection(SendRequest<Full<Bytes>>);

impl Connection {
    pub async fn new(server: &TestServer) -> Self {
        let stream = tokio::net::TcpStream::connect(server.http).await.expect("the server listens");
        let (sender, connection) = handshake(TokioIo::new(stream)).await.expect("a connection");
        tokio::spawn(connection);
        Self(sender)
    }

    pub async fn ask(&mut self, method: Method, path: &str, body: Vec<u8>) -> Answer {
        let request = Request::builder().method(method).uri(path).header("host", "localhost");
        let request = request.header("content-type", "application/json").body(Full::from(body)).expect("a request");
        let answer = async {
            self.0.ready().await?;
            Answer::read(self.0.send_request(request).await?).await
        };
        tokio::time::timeout(PATIENCE, answer).await.expect("an answer in time").expect("an answer")
    }
}

impl Client {
    pub fn new(server: &TestServer) -> Self {
        Self { pool: Pool::builder(TokioExecutor::new()).build_http(), address: server.http }
    }

    pub async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Response<Incoming> {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::from(body)).expect("a request");
        tokio::time::timeout(PATIENCE, self.pool.request(request)).await.expect("an answer in time").expect("an answer")
    }

    pub async fn ask(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer {
        let answer = Answer::read(self.send(method, path, headers, body).await);
        tokio::time::timeout(PATIENCE, answer).await.expect("a body in time").expect("a whole body")
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, &[], vec![]).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask(Method::POST, path, &[("content-type", "application/json")], body.to_string().into_bytes()).await
    }

    /// An answer that must be good.
    pub async fn well(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, 200, "{body}: {answer:?}");
        answer.json()
    }

    pub async fn stream(&self, path: &str, body: &Value) -> Events {
        let headers = [("content-type", "application/json")];
        let response = self.send(Method::POST, path, &headers, body.to_string().into_bytes()).await;
        assert_eq!(response.status(), 200, "{body}");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Events { body: response.into_body(), read: vec![] }
    }

    /// All chunks of a stream that must end well.
    pub async fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let mut events = self.stream(path, &body).await;
        let mut chunks = vec![];
        while let Some(data) = events.next().await {
            if data == "[DONE]" {
                assert_eq!(events.next().await, None, "something follows the end");
                return chunks;
            }
            chunks.push(serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}")));
        }
        panic!("no [DONE]: {chunks:?}");
    }
}

/// A stream of events on its way.
pub struct Events {
    body: Incoming,
    read: Vec<u8>,
}

impl Events {
    /// The next event's data; comments are passed over. `None` where the stream ends.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.read.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.read.drain(..at + 2).collect();
                // Every frame is whole characters, however the bytes came.
                let event = String::from_utf8(event).expect("an event is UTF-8");
                match event.trim_end().strip_prefix("data: ") {
                    Some(data) => return Some(data.to_owned()),
                    None => assert!(event.starts_with(':'), "{event}"),
                }
                continue;
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.expect("an event in time");
            match frame.map(|frame| frame.expect("no error").into_data()) {
                Some(Ok(data)) => self.read.extend_from_slice(&data),
                Some(Err(_)) => {}
                None => {
                    assert!(self.read.is_empty(), "the stream ends within an event");
                    return None;
                }
            }
        }
    }
}

/// The text of a choice of a whole answer.
pub fn text(answer: &Value, index: usize) -> &str {
    let choice = &answer["choices"][index];
    let text = if choice["message"].is_object() { &choice["message"]["content"] } else { &choice["text"] };
    text.as_str().unwrap_or_else(|| panic!("no text: {answer}"))
}

/// What a chunk adds to the choice, if it is about that.
pub fn added(chunk: &Value, index: usize) -> &str {
    let choices = chunk["choices"].as_array().expect("choices");
    let choice = choices.iter().find(|choice| choice["index"] == index);
    let text = choice.and_then(|choice| choice["delta"].get("content").or(choice.get("text")));
    text.map_or("", |text| text.as_str().expect("text"))
}

/// The text that the chunks of a choice come to.
pub fn joined(chunks: &[Value], index: usize) -> String {
    chunks.iter().map(|chunk| added(chunk, index)).collect()
}
