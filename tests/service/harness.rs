//! A server on a free port, and what tests share of a client.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacuna::checkpoint::Checkpoint;
use lacuna::engine::request::{self, DiffusionOptions, GenerateOptions, ModelInfo, validate};
use lacuna::engine::{self, Engine, Failure, Limits};
use lacuna::http::listen::Acceptor;
use lacuna::service::proto::generate_event::Event;
use lacuna::service::proto::generate_request::{Method, Prompt};
use lacuna::service::proto::generation_client::GenerationClient;
use lacuna::service::proto::{
    Committed, Diffusion, EditStatus, Finished, GenerateEvent, GenerateRequest, Started, Step, Stopping,
};
use lacuna::service::{Listeners, ServeError, ServeOptions, Served, serve};
use lacuna::tensor::Placement;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

/// Longer than anything here takes, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub const PROMPT: &str = "Write a function that adds two numbers.\n";

pub struct TestServer {
    pub address: SocketAddr,
    /// Where it speaks HTTP.
    #[allow(dead_code, reason = "for the tests of HTTP")]
    pub http: SocketAddr,
    /// The first model's.
    pub engine: Engine,
    pub shutdown: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<Result<(), ServeError>>,
}

/// A server with room for every test.
pub async fn server() -> TestServer {
    start(Limits { resident: 4, queued: 16, ..Limits::default() }, ServeOptions::default()).await
}

pub async fn start(limits: Limits, options: ServeOptions) -> TestServer {
    let (info, engine) = engine(limits);
    serve_engine(info, engine, options).await
}

/// The model that ships.
pub fn engine(limits: Limits) -> (Arc<ModelInfo>, Engine) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano");
    assert!(folder.join("model.safetensors").exists(), "models/nano has no weights: check them out");
    lacuna::tensor::set_threads(1);
    let checkpoint = Checkpoint::open(&folder).expect("the model opens");
    let context = checkpoint.config.max_positions;
    let model = checkpoint.load(Placement::CPU_F32, context, &mut |_| {}).expect("the model loads");
    let info = Arc::new(ModelInfo::new(checkpoint, &model, vec![]));
    let engine =
        Engine::start(model, lacuna::draft::Drafters::default(), info.tokenizer.clone(), limits).expect("the engine starts");
    (info, engine)
}

/// An engine with one place, which a request that nobody reads has for as long as that is kept: a warm-up would have to wait.
pub async fn occupied() -> (Arc<ModelInfo>, Engine, mpsc::Receiver<Result<engine::Event, Failure>>) {
    let (info, engine) = engine(Limits { resident: 1, queued: 4, ..Limits::default() });
    let options = GenerateOptions {
        id: "first".into(),
        prompt: request::Prompt::Tokens(vec![]),
        template: vec![],
        max_new_tokens: Some(200),
        method: None,
        autoregressive: Default::default(),
        // As long as `long`: seconds.
        diffusion: DiffusionOptions {
            steps: Some(200),
            block_length: Some(200),
            suppress_end: Some(true),
            finish_early: Some(false),
            ..Default::default()
        },
        sampling: Default::default(),
        stops: vec![],
        steps: true,
        deadline: None,
        priority: 0,
    };
    let events = engine.submit(validate(&info, options).expect("it is valid")).expect("there is room");
    // Until it has the only place, the warm-up, whose priority is higher, would go first.
    let begun = Instant::now();
    while engine.load().residents == 0 {
        assert!(begun.elapsed() < PATIENCE, "it gets no place");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    (info, engine, events)
}

pub async fn serve_engine(info: Arc<ModelInfo>, engine: Engine, options: ServeOptions) -> TestServer {
    let served = Served { info, engine };
    serve_models(vec![served], options).await
}

pub async fn serve_models(models: Vec<Served>, options: ServeOptions) -> TestServer {
    let listeners = [TcpListener::bind("127.0.0.1:0").await, TcpListener::bind("127.0.0.1:0").await];
    let [grpc, http] = listeners.map(|listener| listener.expect("a free port"));
    let [address, http_address] = [&grpc, &http].map(|listener| listener.local_addr().expect("an address"));
    let listeners = Listeners { grpc, http: Some(http), acceptor: Acceptor::Plain };
    let (shutdown, signal) = oneshot::channel();
    let engine = models[0].engine.clone();
    let task = tokio::spawn(serve(listeners, models, options, async {
        let _ = signal.await;
    }));
    TestServer { address, http: http_address, engine, shutdown: Some(shutdown), task }
}

impl TestServer {
    pub fn endpoint(&self) -> Endpoint {
        Channel::from_shared(format!("http://{}", self.address)).expect("an address is a URI")
    }

    pub async fn channel(&self) -> Channel {
        self.endpoint().connect().await.expect("the server listens")
    }

    pub async fn client(&self) -> GenerationClient<Channel> {
        GenerationClient::new(self.channel().await)
    }

    pub fn signal_shutdown(&mut self) {
        self.shutdown.take().expect("signalled once").send(()).expect("the server waits for the signal");
    }

    /// Waits until nothing is queued or resident, and says how long that took.
    pub async fn idle(&self) -> Duration {
        let started = Instant::now();
        while self.engine.active() > 0 {
            assert!(started.elapsed() < PATIENCE, "the engine is still busy");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        started.elapsed()
    }

    /// Waits until the health service says so of the whole server.
    pub async fn serving(&self) {
        let request = HealthCheckRequest { service: String::new() };
        let mut watch = HealthClient::new(self.channel().await).watch(request).await.expect("health").into_inner();
        while watch.message().await.expect("a status").expect("no end").status() != ServingStatus::Serving {}
    }
}

/// A short request.
pub fn request(text: &str) -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::Text(text.into())), ..GenerateRequest::default() }
}

pub fn with_diffusion(diffusion: Diffusion) -> GenerateRequest {
    GenerateRequest { method: Some(Method::Diffusion(diffusion)), ..request(PROMPT) }
}

/// A request that takes exactly `steps` steps over a canvas of 200: seconds, if there are many.
pub fn long(steps: u64) -> GenerateRequest {
    let diffusion = Diffusion {
        steps: Some(steps),
        suppress_end: Some(true),
        finish_early: Some(false),
        block_length: Some(200),
        ..Diffusion::default()
    };
    GenerateRequest { stopping: Some(Stopping { max_new_tokens: Some(200), stop: vec![] }), ..with_diffusion(diffusion) }
}

/// Everything that a stream told.
#[derive(Debug)]
pub struct Generated {
    pub started: Started,
    pub steps: Vec<Step>,
    pub commits: Vec<Committed>,
    pub finished: Finished,
}

impl Generated {
    pub fn text(&self) -> String {
        self.commits.iter().map(|commit| commit.text.as_str()).collect()
    }

    pub fn token_ids(&self) -> Vec<u32> {
        self.commits.iter().flat_map(|commit| commit.token_ids.clone()).collect()
    }

    /// The canvas after all edits, `None` where it is still masked. Written from the API's words alone.
    pub fn replayed(&self) -> Vec<Option<u32>> {
        let mut canvas: Vec<_> = self.started.canvas.iter().map(|cell| (!cell.masked).then_some(cell.token_id)).collect();
        for edit in self.steps.iter().flat_map(|step| &step.edits) {
            let cell = &mut canvas[edit.position as usize];
            match edit.status() {
                EditStatus::Unspecified => panic!("an edit has no status"),
                EditStatus::Provisional => assert_eq!(*cell, None, "a guess for a cell that is not masked"),
                EditStatus::Committed => {
                    assert_eq!(cell.replace(edit.token_id), None, "cell {} was committed twice", edit.position);
                }
                EditStatus::Edited => assert!(cell.replace(edit.token_id).is_some(), "an edit of a masked cell"),
                EditStatus::Remasked => assert!(cell.take().is_some(), "a masked cell was masked"),
            }
        }
        canvas
    }
}

/// Reads a stream to its end, and checks the order of its events.
pub async fn collect(mut stream: Streaming<GenerateEvent>) -> Result<Generated, Status> {
    let started = started(&mut stream).await?;
    let (mut steps, mut commits, mut finished) = (vec![], vec![], None);
    while let Some(event) = next(&mut stream).await? {
        assert!(finished.is_none(), "something follows Finished");
        match event {
            Event::Started(_) => panic!("Started came twice"),
            Event::Step(step) => steps.push(step),
            Event::Committed(commit) => commits.push(commit),
            Event::Finished(event) => finished = Some(event),
        }
    }
    Ok(Generated { started, steps, commits, finished: finished.expect("an OK stream ends with Finished") })
}

/// The first event.
pub async fn started(stream: &mut Streaming<GenerateEvent>) -> Result<Started, Status> {
    match next(stream).await? {
        Some(Event::Started(started)) => Ok(started),
        other => panic!("the first event is {other:?}"),
    }
}

pub async fn next(stream: &mut Streaming<GenerateEvent>) -> Result<Option<Event>, Status> {
    let event = tokio::time::timeout(PATIENCE, stream.message()).await.expect("an event in time")?;
    Ok(event.map(|event| event.event.expect("an event that is known")))
}

/// Sends a request and reads it to its end.
pub async fn generate(client: &mut GenerationClient<Channel>, request: GenerateRequest) -> Result<Generated, Status> {
    collect(client.generate(request).await?.into_inner()).await
}

/// Checks a refusal: its code, and the field that it names.
pub fn assert_refused(status: &Status, code: Code, field: Option<&str>) {
    assert_eq!(status.code(), code, "{status:?}");
    let details = status.get_error_details();
    let named = details.bad_request().map(|bad| bad.field_violations[0].field.clone());
    assert_eq!(named.as_deref(), field, "{status:?}");
    assert!(status.message().starts_with(char::is_lowercase), "{}", status.message());
}
