//! The page's files and health, and who may call from where.

use http::{HeaderValue, Method};
use lacuna::service::ServeOptions;
use serde_json::json;

use crate::client::{Answer, Client, LIMITS};
use crate::harness::{occupied, serve_engine, server, start};

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_whole_and_may_load_nothing_else() {
    let server = server().await;
    let client = Client::new(&server);
    for (path, kind) in [("/", "text/html"), ("/main.js", "text/javascript"), ("/style.css", "text/css")] {
        let file = client.get(path).await;
        assert_eq!(file.status, 200);
        assert_eq!(file.header("content-type"), Some(format!("{kind}; charset=utf-8").as_str()));
        assert_eq!(file.header("x-content-type-options"), Some("nosniff"));
        let policy = file.header("content-security-policy").expect("a policy");
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
        assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"), "{policy}");
        let tag = file.header("etag").expect("a tag").to_owned();
        for (known, status) in [(tag.clone(), 304), (format!("\"other\", W/{tag}"), 304), ("\"other\"".into(), 200)] {
            let again = client.ask(Method::GET, path, &[("if-none-match", &known)], vec![]).await;
            assert_eq!((again.status.as_u16(), again.header("etag")), (status, Some(tag.as_str())), "{known}");
            assert_eq!(again.body.is_empty(), status == 304);
        }
        let head = client.ask(Method::HEAD, path, &[], vec![]).await;
        assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
        assert_eq!(client.ask(Method::POST, path, &[], vec![]).await.status, 405);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_origins_may_call_if_they_are_named() {
    let named = "https://playground.example";
    let preflight = |client: Client, origin: &'static str| async move {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "content-type,authorization,x-stainless-lang"),
        ];
        client.ask(Method::OPTIONS, "/v1/chat/completions", &headers, vec![]).await
    };
    let allowed = |answer: &Answer| answer.header("access-control-allow-origin").map(str::to_owned);
    let closed = server().await;
    assert_eq!(allowed(&preflight(Client::new(&closed), named).await), None);
    assert_eq!(allowed(&Client::new(&closed).ask(Method::GET, "/health", &[("origin", named)], vec![]).await), None);
    let options = ServeOptions { http_origins: vec![HeaderValue::from_static(named)], ..ServeOptions::default() };
    let open = start(LIMITS, options).await;
    let answer = preflight(Client::new(&open), named).await;
    assert_eq!(allowed(&answer).as_deref(), Some(named));
    assert_eq!(answer.header("access-control-allow-headers"), Some("content-type,authorization,x-stainless-lang"));
    assert_eq!(allowed(&preflight(Client::new(&open), "https://other.example").await), None);
    let answer = Client::new(&open).ask(Method::GET, "/v1/models", &[("origin", named)], vec![]).await;
    assert_eq!(allowed(&answer).as_deref(), Some(named));
    let exposed = answer.header("access-control-expose-headers").expect("some headers");
    assert!(exposed.contains("grpc-status") && exposed.contains("x-request-id"), "{exposed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_waits_for_the_warm_up() {
    let (info, engine, events) = occupied().await;
    let server = serve_engine(info, engine, ServeOptions::default()).await;
    let client = Client::new(&server);
    let health = client.get("/health").await;
    assert_eq!((health.status.as_u16(), health.json()), (503, json!({"status": "not serving"})));
    drop(events);
    server.serving().await;
    let health = client.get("/health").await;
    assert_eq!((health.status.as_u16(), health.json()), (200, json!({"status": "serving"})));
    assert_eq!(health.header("cache-control"), Some("no-store"));
}
