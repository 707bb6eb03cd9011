//! The way to a server: its address, and where it asks for them, TLS, a certificate and a token. Shared by every command that calls
//! one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Where a token may stand beside the file: a flag would be seen by everybody on the machine.
const TOKEN: &str = "LACUNA_TOKEN";

/// A connection whose every call has the token, if there is one.
pub type Connection = InterceptedService<Channel, Bearer>;

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Server")]
pub struct ConnectionFlags {
    /// Who issued the server's certificate (PEM) [default: whom this machine trusts]
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Certificate to show to the server (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// File with the token to send; without it, LACUNA_TOKEN in the environment is sent
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl ConnectionFlags {
    /// A connection to the server at `address`: `HOST:PORT`, or `https://HOST:PORT` for TLS.
    pub async fn connect(&self, address: &str) -> Result<Connection> {
        let (tls, host) = match address.split_once("://") {
            Some(("https", host)) => (true, host),
            Some(("http", host)) => (false, host),
            _ => (false, address),
        };
        ensure!(
            tls || (self.tls_ca.is_none() && self.tls_certificate.is_none()),
            "'{address}' is an address without TLS: write https://{host}, or leave --tls-ca and --tls-certificate out"
        );
        let scheme = if tls { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{host}"))
            .ok()
            .filter(|endpoint| endpoint.uri().port().is_some())
            .with_context(|| format!("'{address}' is no address: use HOST:PORT, or https://HOST:PORT"))?
            .connect_timeout(CONNECT_TIMEOUT);
        let bearer = Bearer::new(self.token()?)?;
        let endpoint = if tls { endpoint.tls_config(self.tls()?).context("TLS cannot be set up")? } else { endpoint };
        let channel = endpoint.connect().await.map_err(|error| told(address, tls, error))?;
        Ok(InterceptedService::new(channel, bearer))
    }

    fn tls(&self) -> Result<ClientTlsConfig> {
        let tls = match &self.tls_ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        Ok(match (&self.tls_certificate, &self.tls_key) {
            (Some(certificate), Some(key)) => tls.identity(Identity::from_pem(read(certificate)?, read(key)?)),
            _ => tls,
        })
    }

    fn token(&self) -> Result<Option<String>> {
        let token = match &self.token_file {
            Some(path) => Some(String::from_utf8(read(path)?).with_context(|| format!("{} is no text", path.display()))?),
            None => std::env::var(TOKEN).ok(),
        };
        Ok(token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()))
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// tonic's own error says only that there was one; its causes know which.
fn told(address: &str, tls: bool, error: tonic::transport::Error) -> anyhow::Error {
    let mut causes: Vec<String> = vec![];
    let mut cause = std::error::Error::source(&error);
    while let Some(found) = cause {
        causes.push(found.to_string());
        cause = found.source();
    }
    let reason = causes.last().cloned().unwrap_or_else(|| error.to_string());
    match tls {
        true => anyhow!("no server answers on {address} by TLS: {reason}"),
        false => anyhow!("no server answers on {address}: {reason}; start one with 'make serve'"),
    }
}

/// Puts the token on a call.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn new(token: Option<String>) -> Result<Self> {
        let value = token.map(|token| format!("Bearer {token}").parse());
        let mut value: Option<MetadataValue<Ascii>> =
            value.transpose().ok().context("the token has characters that no token has")?;
        if let Some(value) = &mut value {
            value.set_sensitive(true);
        }
        Ok(Self(value))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}
