//! TLS for both ports: certificate, key, and where clients must show certificates of their own, who may issue those.
//!
//! Files are checked as they are read: that they are there, fit one another and are in force, so that a server with a certificate that
//! nobody accepts does not start. They can be read anew while connections stay. It knows nothing of what is spoken within.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use thiserror::Error;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{CertificateError, Error as RustlsError, RootCertStore, ServerConfig};

/// Nobody's certificate is good for so long: 9999-12-31.
const NEVER: u64 = 253_402_300_799;
const DAY: u64 = 24 * 3600;

/// What HTTP/2 and HTTP/1.1 are called in a handshake; gRPC's port takes the first alone.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and its root, in PEM.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Who issues clients' certificates; unset, clients need none.
    pub client_ca: Option<PathBuf>,
}

/// Files that do not make for TLS.
#[derive(Debug, Error)]
pub enum TlsError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{0} holds no certificate: it needs PEM, '-----BEGIN CERTIFICATE-----'")]
    NoCertificate(PathBuf),
    #[error("{0} holds no private key: it needs PEM without a passphrase, '-----BEGIN PRIVATE KEY-----'")]
    NoKey(PathBuf),
    #[error("the key in {key} is not that of the certificate in {certificate}")]
    Mismatch { key: PathBuf, certificate: PathBuf },
    #[error("the certificate in {path} {reason}")]
    NotInForce { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Unusable { path: PathBuf, reason: String },
}

/// TLS as it is in force.
#[derive(Clone)]
pub struct Tls {
    files: Arc<TlsFiles>,
    current: Arc<RwLock<(TlsAcceptor, Duration)>>,
}

impl Tls {
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let current = Arc::new(RwLock::new(read(&files)?));
        Ok(Self { files: Arc::new(files), current })
    }

    /// Reads the files anew, for connections to come. If something is wrong with them, the old ones stay in force.
    pub fn reload(&self) -> Result<(), TlsError> {
        let new = read(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    pub fn acceptor(&self) -> TlsAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// For how long the certificate is good.
    pub fn time_left(&self) -> Duration {
        let until = self.current.read().unwrap_or_else(PoisonError::into_inner).1;
        until.saturating_sub(Duration::from_secs(UnixTime::now().as_secs()))
    }

    /// Whether clients must show certificates.
    pub fn mutual(&self) -> bool {
        self.files.client_ca.is_some()
    }
}

/// What the files make, and when the certificate ends, since 1970.
fn read(files: &TlsFiles) -> Result<(TlsAcceptor, Duration), TlsError> {
    let provider = Arc::new(ring::default_provider());
    let chain = certificates(&files.certificate)?;
    let key = key(&files.key)?;
    let until = in_force(&files.certificate, &chain, &provider)?;
    let unusable =
        |path: &Path, error: &dyn std::fmt::Display| TlsError::Unusable { path: path.into(), reason: error.to_string() };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&files.certificate, &error))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(roots(path, certificates(path)?)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| unusable(path, &error))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
        RustlsError::InconsistentKeys(_) => {
            TlsError::Mismatch { key: files.key.clone(), certificate: files.certificate.clone() }
        }
        other => unusable(&files.certificate, &other),
    })?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
    Ok((TlsAcceptor::from(Arc::new(config)), until))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |error| pem(path, error, TlsError::NoCertificate);
    let found: Vec<_> = CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    if found.is_empty() { Err(TlsError::NoCertificate(path.into())) } else { Ok(found) }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| pem(path, error, TlsError::NoKey))
}

fn pem(path: &Path, error: PemError, nothing: fn(PathBuf) -> TlsError) -> TlsError {
    match error {
        PemError::Io(source) => TlsError::Read { path: path.into(), source },
        PemError::NoItemsFound => nothing(path.into()),
        other => TlsError::Unusable { path: path.into(), reason: other.to_string() },
    }
}

fn roots(path: &Path, certificates: Vec<CertificateDer<'static>>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate).map_err(|error| TlsError::Unusable { path: path.into(), reason: error.to_string() })?;
    }
    Ok(roots)
}

/// Whether the first certificate is in force now, and until when. rustls tells the time before anything else that may be amiss, so that
/// any root will do to ask it.
fn in_force(path: &Path, chain: &[CertificateDer<'static>], provider: &Arc<CryptoProvider>) -> Result<Duration, TlsError> {
    let unusable = |error: String| TlsError::Unusable { path: path.into(), reason: error };
    let roots = Arc::new(roots(path, chain[chain.len() - 1..].to_vec())?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build();
    let verifier = verifier.map_err(|error| unusable(error.to_string()))?;
    let ask = |seconds: u64| {
        let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        match verifier.verify_client_cert(&chain[0], &chain[1..], time) {
            Err(RustlsError::InvalidCertificate(reason)) => Some(reason),
            _ => None,
        }
    };
    let now = UnixTime::now().as_secs();
    let reason = match ask(now) {
        Some(CertificateError::ExpiredContext { not_after, .. }) => {
            format!("has expired {} days ago: renew it", (now - not_after.as_secs().min(now)) / DAY)
        }
        Some(CertificateError::NotValidYetContext { not_before, .. }) => {
            format!("is not valid yet, but in {} days: look at the clock", (not_before.as_secs().max(now) - now).div_ceil(DAY))
        }
        Some(CertificateError::BadEncoding) => return Err(unusable("its certificate cannot be read".into())),
        _ => {
            let until = match ask(NEVER) {
                Some(CertificateError::ExpiredContext { not_after, .. }) => not_after.as_secs(),
                _ => NEVER,
            };
            return Ok(Duration::from_secs(until));
        }
    };
    Err(TlsError::NotInForce { path: path.into(), reason })
}
