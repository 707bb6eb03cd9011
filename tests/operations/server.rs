//! The binary as a process, with its log.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lacuna::service::proto::generate_request::{Method, Prompt};
use lacuna::service::proto::generation_client::GenerationClient;
use lacuna::service::proto::{Diffusion, GenerateEvent, GenerateRequest, Stopping, generate_event};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tonic::body::Body;
use tonic::codegen::StdError;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// Longer than anything here takes, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub const PROMPT: &str = "Write a function that adds two numbers.\n";

/// `lacuna` with these arguments, and nothing of this process's own settings.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LACUNA_")) {
        command.env_remove(name);
    }
    command.args(arguments).env_remove("RUST_LOG").env("OMP_NUM_THREADS", "1").current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

pub fn lacuna(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the binary starts")
}

pub fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("stdout is UTF-8")
}

pub fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("stderr is UTF-8")
}

/// A file in a folder of its own.
pub fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("a file is written");
    path
}

pub struct Server {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    pub grpc: SocketAddr,
    pub http: SocketAddr,
}

impl Server {
    /// On free ports; ready to take calls.
    pub fn start(arguments: &[&str]) -> Self {
        let ports = ["serve", "--address", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-format", "json"];
        Self::run(command(&[&ports, arguments].concat()))
    }

    pub fn run(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary starts");
        let stderr = child.stderr.take().expect("it is piped");
        let log = Arc::new(Mutex::new(vec![]));
        let lines = log.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().expect("no panic").push(line);
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut server = Self { child, log, grpc: nowhere, http: nowhere };
        server.grpc = server.address("listening");
        server.http = server.address("listening for HTTP");
        server.logged("\"warm\"");
        server
    }

    fn address(&mut self, message: &str) -> SocketAddr {
        let line = self.logged(&format!("\"{message}\""));
        let line: Value = serde_json::from_str(&line).expect("the log is JSON");
        line["fields"]["address"].as_str().expect("an address").parse().expect("an address")
    }

    /// The first line of the log that contains this, once there is one.
    pub fn logged(&mut self, part: &str) -> String {
        let begun = Instant::now();
        loop {
            if let Some(line) = self.log().iter().find(|line| line.contains(part)) {
                return line.clone();
            }
            assert!(self.child.try_wait().expect("a child").is_none(), "it ended: {}", self.log().join("\n"));
            assert!(begun.elapsed() < PATIENCE, "no '{part}' in {}", self.log().join("\n"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("no panic").clone()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain system call; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Bytes of its own that are in memory.
    pub fn anonymous_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux says so");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.grpc)).expect("an address is a URI");
        endpoint.connect().await.expect("the server listens")
    }

    /// Ends it as an operator would, and waits for that.
    pub fn stop(mut self) -> Vec<String> {
        self.signal(libc::SIGTERM);
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{status}: {}", self.log().join("\n"));
        self.log()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A channel whose calls have a token.
pub type Authorised = InterceptedService<Channel, Token>;

#[derive(Clone)]
pub struct Token(pub String);

impl tonic::service::Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let value: MetadataValue<_> = format!("Bearer {}", self.0).parse().expect("a token is ASCII");
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}

pub fn with_token(channel: &Channel, token: &str) -> Authorised {
    InterceptedService::new(channel.clone(), Token(token.into()))
}

/// A request for a canvas of so many cells, filled one by one.
pub fn request(cells: u64) -> GenerateRequest {
    let diffusion =
        Diffusion { steps: Some(cells), finish_early: Some(false), suppress_end: Some(true), ..Diffusion::default() };
    GenerateRequest {
        prompt: Some(Prompt::Text(PROMPT.into())),
        method: Some(Method::Diffusion(diffusion)),
        stopping: Some(Stopping { max_new_tokens: Some(cells), stop: vec![] }),
        ..GenerateRequest::default()
    }
}

pub async fn begin<T>(channel: T, request: GenerateRequest) -> Result<Streaming<GenerateEvent>, Status>
where
    T: tonic::client::GrpcService<Body>,
    T::Error: Into<StdError>,
    T::ResponseBody: tonic::transport::Body<Data = tonic::codegen::Bytes> + Send + 'static,
    <T::ResponseBody as tonic::transport::Body>::Error: Into<StdError> + Send,
{
    Ok(GenerationClient::new(channel).generate(request).await?.into_inner())
}

/// Reads a stream to its end; gives the number of its tokens.
pub async fn finish(mut stream: Streaming<GenerateEvent>) -> Result<u64, Status> {
    let mut tokens = None;
    while let Some(event) = stream.message().await? {
        if let Some(generate_event::Event::Finished(finished)) = event.event {
            tokens = Some(finished.usage.expect("usage").generated_tokens);
        }
    }
    Ok(tokens.expect("an OK stream ends with Finished"))
}

/// An answer by HTTP/1.1 to a request without a body: the status, the header and the body.
pub async fn exchange(stream: impl AsyncRead + AsyncWrite + Unpin, head: &str) -> (u16, String, String) {
    send(stream, &format!("{head}\r\nhost: lacuna\r\nconnection: close\r\n\r\n")).await
}

pub async fn send(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> (u16, String, String) {
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut answer = vec![];
    stream.read_to_end(&mut answer).await.expect("it answers");
    let answer = String::from_utf8(answer).expect("text");
    let (header, body) = answer.split_once("\r\n\r\n").expect("a header");
    (header[9..12].parse().expect("a status"), header.to_lowercase(), body.into())
}
