//! TLS and mTLS on both ports: who is let in, who is not and why, and new certificates without a restart.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacuna::service::tls::{Tls, TlsFiles};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::certificates::{Authority, Issued, path};
use crate::server::{PROMPT, Server, exchange, lacuna, stderr, stdout, write};

/// A handshake by somebody who trusts `ca`, speaks HTTP/1.1 and has no certificate.
async fn handshake(address: SocketAddr, ca: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).expect("PEM")).expect("a root");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    let stream = TcpStream::connect(address).await.expect("the server listens");
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

fn generate(server: &Server, scheme: &str, flags: &[&str]) -> std::process::Output {
    let address = format!("{scheme}{}", server.grpc);
    lacuna(&[&["generate", "--server", &address, "--max-new-tokens", "4", PROMPT], flags].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ports_speak_tls_to_those_who_trust_the_authority() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, other) = (Authority::new(), Authority::new());
    let (ca, wrong) = (authority.file(folder.path(), "ca.pem"), other.file(folder.path(), "other.pem"));
    let issued = authority.issue(folder.path(), "server", 2080);
    let mut server = Server::start(&issued.flags());
    // A peer that says nothing must not keep the others waiting.
    let _silent = TcpStream::connect(server.grpc).await.expect("the server listens");
    let begun = Instant::now();
    let well = generate(&server, "https://", &["--tls-ca", path(&ca)]);
    assert!(well.status.success(), "{}", stderr(&well));
    assert!(begun.elapsed() < Duration::from_secs(9), "it waited for the silent peer's handshake");
    // The other commands that call a server.
    let (target, trust) = (format!("https://{}", server.grpc), ["--tls-ca", path(&ca), "--max-new-tokens", "4", "--json"]);
    let compared = lacuna(&[&["compare", "--server", &target, "--lane", "diffusion", PROMPT], &trust[..]].concat());
    assert!(compared.status.success() && stdout(&compared).contains("\"model\":\"nano\""), "{}", stderr(&compared));
    let load = ["bench", "serve", "--target", &target, "--concurrency", "1", "--requests", "2", "--warm-up", "1"];
    let measured = lacuna(&[&load[..], &trust].concat());
    assert!(measured.status.success() && stdout(&measured).contains("\"finished\":2"), "{}", stderr(&measured));
    for (scheme, flags, told) in [
        ("https://", vec!["--tls-ca", path(&wrong)], "UnknownIssuer"),
        ("https://", vec![], "no server answers on https://"),
        ("http://", vec![], "error: "),
        ("", vec!["--tls-ca", path(&ca)], "write https://"),
    ] {
        let ill = generate(&server, scheme, &flags);
        assert_eq!(ill.status.code(), Some(1), "{told}");
        assert!(stderr(&ill).contains(told), "{told}: {}", stderr(&ill));
    }
    let stream = handshake(server.http, &authority.pem).await.expect("the HTTP port speaks TLS too");
    let (status, _, body) = exchange(stream, "GET /health HTTP/1.1").await;
    assert_eq!((status, body.as_str()), (200, "{\"status\":\"serving\"}"));
    assert!(handshake(server.http, &other.pem).await.is_err());

    // A new certificate, of another authority, and one that does not fit its key: the old one stays in force.
    let next = other.issue(folder.path(), "next", 2080);
    std::fs::copy(&next.certificate, &issued.certificate).expect("a copy");
    server.signal(libc::SIGHUP);
    assert!(server.logged("the old ones stay in force").contains("is not that of the certificate in"));
    assert!(handshake(server.http, &authority.pem).await.is_ok());
    std::fs::copy(&next.key, &issued.key).expect("a copy");
    server.signal(libc::SIGHUP);
    server.logged("certificates read anew");
    assert!(handshake(server.http, &authority.pem).await.is_err());
    assert!(handshake(server.http, &other.pem).await.is_ok());
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_show_certificates_where_they_must() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, clients) = (Authority::new(), Authority::new());
    let (ca, client_ca) = (authority.file(folder.path(), "ca.pem"), clients.file(folder.path(), "clients.pem"));
    let issued = authority.issue(folder.path(), "server", 2080);
    let server = Server::start(&[&issued.flags()[..], &["--tls-client-ca", path(&client_ca)]].concat());
    let trust = ["--tls-ca", path(&ca)];
    let known = clients.issue(folder.path(), "known", 2080);
    let well = generate(&server, "https://", &[&trust[..], &known.flags()].concat());
    assert!(well.status.success(), "{}", stderr(&well));
    let (stranger, expired) = (authority.issue(folder.path(), "stranger", 2080), clients.issue(folder.path(), "expired", 2021));
    for flags in [&[][..], &stranger.flags(), &expired.flags()] {
        let ill = generate(&server, "https://", &[&trust[..], flags].concat());
        assert_eq!(ill.status.code(), Some(1), "{flags:?}: {}", stdout(&ill));
    }
    server.stop();
}

#[test]
fn files_that_do_not_do_are_told_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let authority = Authority::new();
    let (good, other) = (authority.issue(folder, "good", 2080), authority.issue(folder, "other", 2080));
    let (expired, ca) = (authority.issue(folder, "expired", 2021), authority.file(folder, "ca.pem"));
    let empty = write(folder, "empty.pem", "");
    let open = |certificate: &Path, key: &Path, client_ca: Option<&Path>| {
        let files = TlsFiles { certificate: certificate.into(), key: key.into(), client_ca: client_ca.map(Into::into) };
        Tls::open(files).map(|tls| tls.time_left().as_secs() / 86_400).map_err(|error| error.to_string())
    };
    let Issued { certificate, key } = &good;
    assert!(open(certificate, key, Some(&ca)).expect("it is good") > 10_000);
    for (told, found) in [
        ("cannot read", open(&folder.join("none.pem"), key, None)),
        ("cannot read", open(certificate, &folder.join("none.key"), None)),
        ("holds no certificate", open(&empty, key, None)),
        ("holds no certificate", open(key, key, None)),
        ("holds no private key", open(certificate, certificate, None)),
        ("is not that of the certificate in", open(certificate, &other.key, None)),
        ("has expired", open(&expired.certificate, &expired.key, None)),
        ("holds no certificate", open(certificate, key, Some(&empty))),
    ] {
        let said = found.expect_err(told);
        assert!(said.contains(told) && said.contains(".pem") | said.contains(".key"), "{told}: {said}");
    }
}
