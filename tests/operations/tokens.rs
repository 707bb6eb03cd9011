//! Tokens: who is let in on either port, what a token's limits do, and new ones without a restart.

use std::path::{Path, PathBuf};

use lacuna::service::proto::models_client::ModelsClient;
use lacuna::service::proto::{GenerateRequest, ListModelsRequest, LoadModelRequest};
use tokio::net::TcpStream;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use crate::certificates::{Authority, path};
use crate::server::{
    PROMPT, Server, begin, command, exchange, finish, lacuna, request, send, stderr, stdout, with_token, write,
};

/// A token, and its entry with these limits.
fn made(name: &str, limits: &str) -> (String, String) {
    let output = lacuna(&["token", name]);
    assert!(output.status.success(), "{}", stderr(&output));
    let token = stdout(&output).trim_end().to_owned();
    assert!(!stderr(&output).contains(&token), "the entry has the token in it");
    (token, format!("{}{limits}\n", stderr(&output)))
}

fn tokens_file(folder: &Path, entries: &[&str]) -> PathBuf {
    write(folder, "tokens.toml", &entries.join("\n"))
}

/// The reason that programs read.
fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_both_ports() {
    let folder = tempfile::tempdir().expect("a folder");
    let (token, entry) = made("playground", "");
    let file = tokens_file(folder.path(), &[&entry]);
    let server = Server::start(&["--tokens", path(&file)]);
    let channel = server.channel().await;
    let missing = begin(channel.clone(), request(4)).await.expect_err("it has no token");
    assert_eq!((missing.code(), reason(&missing).as_str()), (Code::Unauthenticated, "TOKEN_MISSING"));
    for wrong in [&token[..token.len() - 1], "x", &token.to_uppercase()] {
        let unknown = begin(with_token(&channel, wrong), request(4)).await.expect_err("it is not the token");
        assert_eq!((unknown.code(), reason(&unknown).as_str()), (Code::Unauthenticated, "TOKEN_UNKNOWN"));
    }
    assert_eq!(finish(begin(with_token(&channel, &token), request(4)).await.expect("it is let in")).await.expect("it ends"), 4);
    // Health needs none; reflection, like everything else, does.
    let health = HealthClient::new(channel.clone()).check(HealthCheckRequest { service: String::new() }).await;
    assert!(health.is_ok(), "{health:?}");
    let listed = ModelsClient::new(channel.clone()).list(ListModelsRequest {}).await.expect_err("it has no token");
    assert_eq!(listed.code(), Code::Unauthenticated);
    let listed = ModelsClient::new(with_token(&channel, &token)).list(ListModelsRequest {}).await.expect("it is let in");
    let caller = listed.into_inner().caller.expect("it is told who it is");
    assert_eq!((caller.name.as_str(), caller.admin, caller.max_new_tokens), ("playground", false, None));

    let get = async |head: &str| exchange(TcpStream::connect(server.http).await.expect("it listens"), head).await;
    for open in ["GET /health HTTP/1.1", "GET / HTTP/1.1", "HEAD /style.css HTTP/1.1"] {
        assert_eq!(get(open).await.0, 200, "{open}");
    }
    for closed in ["GET /v1/models HTTP/1.1", "POST /v1/completions HTTP/1.1", "GET /v1/nothing HTTP/1.1", "POST / HTTP/1.1"] {
        let (status, header, body) = get(closed).await;
        assert_eq!(status, 401, "{closed}");
        assert!(header.contains("www-authenticate: bearer"), "{header}");
        let error: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(error["error"]["code"], "invalid_api_key", "{body}");
        let (status, ..) = get(&format!("{closed}\r\nauthorization: Bearer {token}")).await;
        assert_ne!(status, 401, "{closed}");
    }
    let web = "POST /lacuna.v1.Models/List HTTP/1.1\r\ncontent-type: application/grpc-web+proto\r\ncontent-length: 0";
    let (status, header, _) = get(web).await;
    assert_eq!(status, 200, "gRPC tells its status in its own way");
    assert!(header.contains("grpc-status: 16") && header.contains("application/grpc-web+proto"), "{header}");
    // By the client in the binary, from a file or from the environment.
    let kept = write(folder.path(), "token", &format!("{token}\n"));
    let address = server.grpc.to_string();
    let call = ["generate", "--server", &address, "--max-new-tokens", "4", PROMPT];
    assert!(lacuna(&[&call[..], &["--token-file", path(&kept)]].concat()).status.success());
    assert!(command(&call).env("LACUNA_TOKEN", &token).output().expect("it starts").status.success());
    let ill = lacuna(&call);
    assert!(stderr(&ill).contains("the request has no token") && ill.status.code() == Some(1), "{}", stderr(&ill));
    let log = server.stop().join("\n");
    assert!(log.contains("playground") && !log.contains(&token), "the log has the name, and not the token: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_for_each_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let (one_token, first) = made("one", "requests-in-flight = 1\nmax-new-tokens = 100");
    let (few, second) = made("few", "requests-per-minute = 2\nmodels = [\"nano-ar\"]");
    let file = tokens_file(folder.path(), &[&first, &second]);
    let server = Server::start(&["--tokens", path(&file), "--model", "models/nano", "--model", "models/nano-ar"]);
    let channel = server.channel().await;
    let (one, few) = (with_token(&channel, &one_token), with_token(&channel, &few));

    let denied = begin(one.clone(), request(101)).await.expect_err("it is too much");
    assert_eq!((denied.code(), reason(&denied).as_str()), (Code::PermissionDenied, "TOO_MANY_NEW_TOKENS"));
    let unsaid = GenerateRequest { stopping: None, ..request(8) };
    assert!(finish(begin(one.clone(), unsaid).await.expect("as much as it may")).await.expect("it ends") <= 100);
    let running = begin(one.clone(), request(100)).await.expect("it begins");
    let second = begin(one.clone(), request(4)).await.expect_err("one is under way");
    assert_eq!((second.code(), reason(&second).as_str()), (Code::ResourceExhausted, "REQUESTS_IN_FLIGHT"));
    assert!(second.get_details_retry_info().is_some() && second.get_details_quota_failure().is_some(), "{second:?}");
    assert!(begin(few.clone(), request(4)).await.expect_err("another's is not in the way").code() != Code::ResourceExhausted);
    drop(running);
    // The server learns soon that nobody reads any more.
    let begun = std::time::Instant::now();
    loop {
        match begin(one.clone(), request(4)).await {
            Ok(stream) => break assert_eq!(finish(stream).await.expect("it ends"), 4),
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
        }
        assert!(begun.elapsed() < crate::server::PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }

    // The same by HTTP.
    let post = async |max_tokens: u64| {
        let body = format!("{{\"model\": \"nano\", \"prompt\": \"x\", \"max_tokens\": {max_tokens}}}");
        let head =
            format!("authorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}", one_token, body.len());
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: lacuna\r\nconnection: close\r\n{head}\r\n\r\n{body}");
        send(TcpStream::connect(server.http).await.expect("it listens"), &head).await
    };
    let (status, _, body) = post(101).await;
    assert!(status == 403 && body.contains("permission_denied"), "{status}: {body}");
    let (status, _, body) = post(4).await;
    assert_eq!(status, 200, "{body}");
    let running = begin(one.clone(), request(100)).await.expect("it begins");
    let (status, header, body) = post(4).await;
    assert!(status == 429 && header.contains("retry-after: 1") && body.contains("rate_limit_exceeded"), "{status}: {body}");
    finish(running).await.expect("it ends");

    let load = LoadModelRequest { name: "nano-block".into() };
    let denied = ModelsClient::new(one.clone()).load(load).await.expect_err("it is no administrator's");
    assert_eq!((denied.code(), reason(&denied).as_str()), (Code::PermissionDenied, "ADMIN_NEEDED"));
    // Its first request was refused for the model, which is the default one, and counted.
    let denied = GenerateRequest { model: "nano".into(), ..request(4) };
    let denied = begin(few.clone(), denied).await.expect_err("it is not its model");
    assert_eq!((denied.code(), reason(&denied).as_str()), (Code::PermissionDenied, "MODEL_NOT_ALLOWED"));
    let third = begin(few.clone(), request(4)).await.expect_err("that was the minute's last");
    assert_eq!((third.code(), reason(&third).as_str()), (Code::ResourceExhausted, "REQUESTS_PER_MINUTE"));
    let retry = third.get_details_retry_info().and_then(|info| info.retry_delay).expect("it is told when");
    assert!(retry.as_secs() <= 30 && !retry.is_zero(), "{retry:?}");
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_has_tokens_read_anew() {
    let folder = tempfile::tempdir().expect("a folder");
    let ((old, first), (new, second)) = (made("old", ""), made("new", ""));
    let file = tokens_file(folder.path(), &[&first]);
    let mut server = Server::start(&["--tokens", path(&file)]);
    let channel = server.channel().await;
    let call =
        async |token: &str| begin(with_token(&channel, token), request(2)).await.map(drop).map_err(|status| status.code());
    assert_eq!((call(&old).await, call(&new).await), (Ok(()), Err(Code::Unauthenticated)));
    tokens_file(folder.path(), &[&first, "[[token]]", "name = 7"]);
    server.signal(libc::SIGHUP);
    assert!(server.logged("the old ones stay in force").contains("tokens.toml:"));
    assert_eq!((call(&old).await, call(&new).await), (Ok(()), Err(Code::Unauthenticated)));
    tokens_file(folder.path(), &[&second]);
    server.signal(libc::SIGHUP);
    server.logged("tokens read anew");
    assert_eq!((call(&old).await, call(&new).await), (Err(Code::Unauthenticated), Ok(())));
    server.stop();
}

#[test]
fn python_calls_over_tls_with_a_token() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("LACUNA_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{} is missing: run `make setup-tests`", python.display());
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let (ca, issued) = (authority.file(folder.path(), "ca.pem"), authority.issue(folder.path(), "server", 2080));
    let (token, entry) = made("python", "");
    let file = tokens_file(folder.path(), &[&entry]);
    let server = Server::start(&[&issued.flags()[..], &["--tokens", path(&file)]].concat());
    let output = std::process::Command::new(python)
        .arg(root.join("tests/python/test_secure.py"))
        .envs([("LACUNA_ADDRESS", server.grpc.to_string()), ("LACUNA_CA", path(&ca).into()), ("LACUNA_TOKEN", token)])
        .output()
        .expect("python starts");
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    server.stop();
}
