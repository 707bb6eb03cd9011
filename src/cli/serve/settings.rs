//! What `lacuna serve` is told, validated once: from here on every file has been read and every number is in its bounds.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Options;
use super::config::Problems;
use crate::checkpoint::name_of;
use crate::cli::load::RunOptions;
use crate::engine::Limits;
use crate::service::ServeOptions;
use crate::service::tls::{Tls, TlsFiles};
use crate::service::tokens::Tokens;
use crate::tensor;

/// A certificate that ends within this is worth a warning.
const RENEW: Duration = Duration::from_secs(14 * 24 * 3600);

pub struct Settings {
    pub grpc: SocketAddr,
    pub http: Option<SocketAddr>,
    pub models: Vec<PathBuf>,
    pub folders: Vec<PathBuf>,
    /// Bytes.
    pub budget: Option<u64>,
    pub run: RunOptions,
    pub limits: Limits,
    pub tls: Option<Tls>,
    pub tokens: Option<Arc<Tokens>>,
    /// Where spans go.
    pub otlp_endpoint: Option<String>,
    pub service: ServeOptions,
}

impl Settings {
    /// All that can be known without loading a model or taking a port.
    pub fn new(options: &Options) -> Result<Self, Problems> {
        let mut problems = vec![];
        let tls = note(tls(options), &mut problems).flatten();
        let tokens = options.tokens.as_ref().map(|path| Tokens::open(path).map_err(|error| format!("tokens: {error}")));
        let tokens = tokens.and_then(|tokens| note(tokens, &mut problems)).map(Arc::new);
        problems.extend(numbers(options));
        problems.extend(paths(options));
        if let Err(error) = tensor::device(&options.run.device) {
            problems.push(format!("device: {error}"));
        }
        if !problems.is_empty() {
            return Err(Problems(problems));
        }
        let limits = Limits {
            resident: options.max_resident,
            queued: options.queue,
            tokens: options.max_tokens,
            queued_tokens: options.queue_tokens,
            prefix_tokens: options.prefix_tokens,
        };
        let service = ServeOptions {
            request_time_max: Duration::from_secs(options.request_seconds),
            drain_timeout: Duration::from_secs(options.drain_seconds),
            connections_max: options.max_connections,
            http_origins: options.http_allow_origin.clone(),
            tokens: tokens.clone(),
            log_prompts: options.log_prompts,
            ends_process: true,
            ..ServeOptions::default()
        };
        Ok(Self {
            grpc: options.address,
            http: options.http.0,
            models: options.model.clone(),
            folders: options.model_folder.clone(),
            budget: options.memory_budget.map(|bytes| bytes.0),
            run: options.run.clone(),
            limits,
            tls,
            tokens,
            otlp_endpoint: options.otlp_endpoint.clone(),
            service,
        })
    }

    /// What is allowed, but perhaps not meant.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = vec![];
        let open: Vec<_> =
            self.addresses().filter(|address| !address.ip().is_loopback()).map(|address| address.to_string()).collect();
        if !open.is_empty() && self.tls.is_none() {
            let open = open.join(" and ");
            warnings.push(format!(
                "listening on {open} beyond this machine without TLS: whoever is on the way reads along, tokens too; \
                 see --tls-certificate"
            ));
        }
        if !open.is_empty() && self.tokens.is_none() && !self.tls.as_ref().is_some_and(Tls::mutual) {
            let open = open.join(" and ");
            warnings.push(format!(
                "listening on {open} beyond this machine without tokens: whoever reaches it may use it; see --tokens"
            ));
        }
        if let Some(left) = self.tls.as_ref().map(Tls::time_left).filter(|left| *left < RENEW) {
            warnings.push(format!("the certificate expires in {} days: renew it, and send SIGHUP", left.as_secs() / 86_400));
        }
        warnings
    }

    fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        [Some(self.grpc), self.http].into_iter().flatten()
    }
}

/// What was found, or its problem among the others.
fn note<T>(found: Result<T, String>, problems: &mut Vec<String>) -> Option<T> {
    found.map_err(|problem| problems.push(problem)).ok()
}

fn tls(options: &Options) -> Result<Option<Tls>, String> {
    let Options { tls_certificate, tls_key, tls_client_ca, .. } = options;
    match (tls_certificate, tls_key) {
        (Some(certificate), Some(key)) => {
            let files = TlsFiles { certificate: certificate.clone(), key: key.clone(), client_ca: tls_client_ca.clone() };
            Tls::open(files).map(Some).map_err(|error| format!("TLS: {error}"))
        }
        (Some(_), None) => Err("tls-certificate needs its tls-key".into()),
        (None, Some(_)) => Err("tls-key needs its tls-certificate".into()),
        (None, None) if tls_client_ca.is_some() => Err("tls-client-ca needs tls-certificate and tls-key".into()),
        (None, None) => Ok(None),
    }
}

fn numbers(options: &Options) -> Vec<String> {
    let within = |name: &str, value: usize, max: usize| {
        (value == 0 || value > max).then(|| format!("{name} is {value}: it must be from 1 to {max}"))
    };
    let more = |name: &str, value: Option<usize>, than: Option<usize>| {
        let (value, than) = (value?, than?);
        (value > than).then(|| format!("{name} is {value}, more than max-tokens, which is {than}"))
    };
    let same = (options.address.port() != 0 && options.http.0 == Some(options.address))
        .then(|| format!("address and http are both {}: give them different ports", options.address));
    let found = [
        within("max-resident", options.max_resident, 1024),
        within("queue", options.queue, 65_536),
        within("max-connections", options.max_connections, 1 << 20),
        more("prefix-tokens", options.prefix_tokens, options.max_tokens),
        same,
    ];
    found.into_iter().flatten().collect()
}

fn paths(options: &Options) -> Vec<String> {
    let mut problems = vec![];
    for (at, path) in options.model.iter().enumerate() {
        let name = name_of(path);
        if !path.exists() {
            problems
                .push(format!("there is no model folder {}: name one that holds config.json, or a GGUF file", path.display()));
        } else if let Some(other) = options.model[..at].iter().find(|other| name_of(other) == name) {
            let (one, other) = (other.display(), path.display());
            problems.push(format!("{one} and {other} would both be called {name}: give them different names"));
        }
    }
    for folder in options.model_folder.iter().filter(|folder| !folder.is_dir()) {
        problems.push(format!("model-folder: there is no folder {}", folder.display()));
    }
    if let Some(folder) = &options.run.drafters {
        if options.model.len() > 1 {
            problems.push("drafters goes with one model: with several, each has its own in drafters/ in its folder".into());
        } else if !folder.is_dir() {
            problems.push(format!("there is no folder {} of draft heads", folder.display()));
        }
    }
    if options.memory_budget.is_some() && options.model_folder.is_empty() {
        problems.push("memory-budget is for models that are loaded by request: give a model-folder too".into());
    }
    problems
}
