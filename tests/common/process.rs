//! The real binary as a server on free ports, its log, and as much HTTP as a scrape needs.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lacuna::service::proto::generate_event::Event;
use lacuna::service::proto::generate_request::{Method, Prompt};
use lacuna::service::proto::generation_client::GenerationClient;
use lacuna::service::proto::{Diffusion, GenerateEvent, GenerateRequest, Stopping};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// Longer than anything here takes, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(120);
pub const PROMPT: &str = "# Return the sum of xs.\ndef solve(xs):\n";

/// A server in a process of its own, which dies with this.
pub struct Process {
    child: Child,
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
}

impl Process {
    /// Starts it on models/nano and waits until it is warm.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, "info")
    }

    /// With a log of this much.
    pub fn start_with(arguments: &[&str], log_filter: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
        command.args(["--log-format", "json", "serve", "--address", "127.0.0.1:0", "--http", "127.0.0.1:0"]).args(arguments);
        command.env("RUST_LOG", log_filter).env("OMP_NUM_THREADS", "1").current_dir(env!("CARGO_MANIFEST_DIR"));
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let log = Arc::new(Mutex::new(vec![]));
        let mut address = |message: &str| {
            for line in lines.by_ref() {
                let line = line.expect("a line");
                let entry: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
                log.lock().unwrap().push(line);
                if entry["fields"]["message"] == message {
                    return entry["fields"]["address"].as_str().expect("an address").parse().expect("one that parses");
                }
            }
            panic!("it ended before it was {message}: {:?}", log.lock().unwrap());
        };
        let (grpc, http) = (address("listening"), address("listening for HTTP"));
        let kept = log.clone();
        // The log must be read on, or the server would wait for room in the pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| kept.lock().unwrap().push(line)));
        let process = Self { child, grpc, http, log };
        process.until("it is warm", || process.get("/health").0 == 200);
        process
    }

    /// Looks again and again until `done`.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !done() {
            assert!(
                started.elapsed() < PATIENCE,
                "{what}: not within {PATIENCE:?}; the last of the log: {:?}",
                self.log().last()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Every line of the log, each of which is JSON.
    pub fn log(&self) -> Vec<Value> {
        let lines = self.log.lock().unwrap();
        lines.iter().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }

    pub fn log_text(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// What was logged of the request.
    pub fn called(&self, request: &str) -> Option<Value> {
        let entries = self.log().into_iter().map(|entry| entry["fields"].clone());
        entries.filter(|fields| fields["message"] == "called").find(|fields| fields["request"] == request)
    }

    /// A path's status and body.
    pub fn get(&self, path: &str) -> (u16, String) {
        self.ask("GET", path)
    }

    pub fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.http).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
        assert!(!chunked, "{head}");
        (status, body.into())
    }

    pub fn channel(&self) -> Channel {
        self.endpoint().connect_lazy()
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(format!("http://{}", self.grpc)).expect("an address is a URI")
    }

    pub fn client(&self) -> GenerationClient<Channel> {
        GenerationClient::new(self.channel())
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: kill() has no memory to get wrong, and the child has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it can be waited for") {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Bytes of memory that it has now.
    pub fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("its memory");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("a number") << 10
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A short request.
pub fn request(text: &str) -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::Text(text.into())), ..GenerateRequest::default() }
}

/// A request that takes exactly `steps` steps, or as many as the model has room for: seconds, if there are many.
pub fn long(steps: u64) -> GenerateRequest {
    // No step commits less than a cell.
    let cells = steps.clamp(64, 220);
    let diffusion = Diffusion {
        steps: Some(steps),
        suppress_end: Some(true),
        finish_early: Some(false),
        block_length: Some(cells),
        ..Diffusion::default()
    };
    GenerateRequest {
        method: Some(Method::Diffusion(diffusion)),
        stopping: Some(Stopping { max_new_tokens: Some(cells), stop: vec![] }),
        ..request(PROMPT)
    }
}

/// Reads a stream to its end; gives its text, and whether it was told to be complete.
pub async fn read(mut stream: Streaming<GenerateEvent>) -> Result<(String, bool), Status> {
    let (mut text, mut finished) = (String::new(), false);
    while let Some(event) = tokio::time::timeout(PATIENCE, stream.message()).await.expect("an event in time")? {
        match event.event.expect("an event that is known") {
            Event::Committed(committed) => text.push_str(&committed.text),
            Event::Finished(_) => finished = true,
            Event::Started(_) | Event::Step(_) => {}
        }
    }
    Ok((text, finished))
}

/// Sends a request and reads it to its end.
pub async fn generate(client: &mut GenerationClient<Channel>, request: GenerateRequest) -> Result<(String, bool), Status> {
    read(client.generate(request).await?.into_inner()).await
}
